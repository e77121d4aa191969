"""Deciding and applying: the factor for a norm, and one pass that writes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType
from numclip.inputs import Entry
from numclip.kernels import backend, formulas
from numclip.kernels.backend import Batch
from numclip.measuring import Norms, batches, measure
from numclip.nonfinite import first_error
from numclip.outputs import Place


class Factors(NamedTuple):
    """Factors ``mantissas * 2**powers`` of groups of tensors.

    `active` says that some change something, `truncate` that results may be subnormal where
    rounding them up would break the bound.
    """

    mantissas: Array
    powers: Array
    active: bool
    truncate: bool

    def take(self, groups: Array) -> Factors:
        """Return the factor of each tensor from those of the groups."""
        return self._replace(mantissas=self.mantissas[groups], powers=self.powers[groups])

    def values(self, dtype: DType) -> Array:
        """Return the factors in the type a dtype is computed in, which holds them exactly."""
        return np.ldexp(self.mantissas, self.powers).astype(dtype.compute)


def decide(norms: Norms, bounds: Array, dtypes: Iterable[DType], ones: Any) -> Factors:
    """Return the factors that bring norms to their bounds, see `kernels.formulas`.

    `ones` is the norm, measured the same way, of as many ones as a group has elements: a
    number, or one for each group.
    """
    rows = list(dtypes)
    roundoffs = norms.spread * max(row.roundoff for row in rows)
    limits = np.array([min(row.digits for row in rows), max(row.tiny for row in rows)])
    finest = max(row.grain for row in rows) / (2.0 * formulas.GRAIN_LIMIT)
    coarse = np.full(bounds.size, ones * finest)
    return Factors(*backend.factors(norms[:2], bounds, coarse, roundoffs, limits))


def apply(tensors: Sequence[Batch], factors: Factors) -> None:
    """Write each tensor times its factor, in one pass."""
    operation = backend.scale_truncating if factors.truncate else backend.scale
    for batch in tensors:
        operation(batch, factors.mantissas[batch.places], factors.powers[batch.places])


def write(entries: Sequence[Entry], places: Sequence[Place], factors: Factors) -> None:
    """Write each gradient times the one factor, or as it is if that changes nothing."""
    if not factors.active:
        copy(entries, places)
        return
    all_alike = np.zeros(len(entries), np.int64)
    apply(batches(entries, [place.flat for place in places]), factors.take(all_alike))
    for place in places:
        place.finish()


def copy(entries: Sequence[Entry], places: Sequence[Place]) -> None:
    """Copy each gradient to where its result goes, unless that is where it is."""
    for entry, place in zip(entries, places, strict=True):
        if place.in_place:
            continue
        if place.flat is not entry.flat:
            np.copyto(place.flat, entry.flat)
        place.finish()


def clip(
    entries: Sequence[Entry],
    places: Sequence[Place],
    bound: float,
    *,
    ord: float = 2.0,
    divisor: float = 1.0,
    nonfinite: str = "propagate",
    duplicates: str = "sum",
    use_norm: float | None = None,
) -> float:
    """Clip gradients by their joint norm over `divisor`; return that before clipping."""
    if not entries:
        return 0.0 if use_norm is None else use_norm
    if use_norm is not None and nonfinite == "propagate":
        norms = _given(use_norm)
    else:
        norms = measure(entries, ord, duplicates)
        finite = math.isfinite(norms.roots[0]) and math.isfinite(use_norm or 0.0)
        if not finite and nonfinite == "raise":
            raise first_error(entries, norms.roots[0] if use_norm is None else use_norm)
        if not finite and nonfinite == "skip":
            copy(entries, places)
            return norms.values()[0] if use_norm is None else use_norm
        if not finite and nonfinite == "zero":
            entries, places = _without_bad(entries, places)
            norms = measure(entries, ord, duplicates)
        if divisor != 1.0:
            norms = norms.divided(divisor)
        if use_norm is not None and math.isfinite(use_norm):
            norms = _given(use_norm)
    elements = sum(entry.flat.size for entry in entries)
    ones = formulas.root(float(elements), ord) / divisor
    factors = decide(norms, np.array([bound]), {entry.dtype for entry in entries}, ones)
    write(entries, places, factors)
    return float(norms.values()[0])


def _given(norm: float) -> Norms:
    return Norms(np.array([norm]), np.zeros(1, np.int64), np.ones(1))


def _without_bad(
    entries: Sequence[Entry], places: Sequence[Place]
) -> tuple[list[Entry], list[Place]]:
    """Write the gradients with 0 for what is not finite; return those as the ones to clip."""
    cleaned, rewritten = [], []
    for entry, place in zip(entries, places, strict=True):
        if place.flat is not entry.flat:
            np.copyto(place.flat, entry.flat)
        entry = entry._replace(flat=place.flat)
        entry.native[~np.isfinite(entry.native)] = 0
        cleaned.append(entry)
        rewritten.append(place._replace(in_place=False))
    return cleaned, rewritten


def clamp(entry: Entry, place: Place, low: Any, high: Any) -> None:
    """Write a gradient held between two bounds: floats, or arrays in NumPy's slower way."""
    dtype = entry.native.dtype
    with np.errstate(over="ignore", under="ignore"):  # a bound out of range is infinite or 0
        low, high = np.asarray(low).astype(dtype), np.asarray(high).astype(dtype)
    if low.ndim == high.ndim == 0:
        tensors = batches([entry], [place.flat])
        backend.clamp(tensors[0], float(low), float(high))
        place.finish()
        return
    if entry.slices is not None:
        low, high = (
            np.broadcast_to(bound, entry.dense_shape)[entry.slices.indices] for bound in (low, high)
        )
    place.array[...] = np.maximum(np.minimum(entry.values, high), low)

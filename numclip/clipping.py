"""Deciding and applying: the factor for a norm, and one pass that writes it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from numclip.dtypes import Array, DType
from numclip.inputs import Entry
from numclip.isolation import isolated
from numclip.kernels import backend, formulas
from numclip.kernels.backend import Batch
from numclip.kernels.threads import Call
from numclip.measuring import Norms, batches, measure
from numclip.nonfinite import first_error
from numclip.outputs import Place
from numclip.slices import IndexedSlices


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
        return np.ldexp(self.mantissas, self.powers.astype(np.intc)).astype(dtype.compute)

    def over(self, scale: float, dtypes: Sequence[DType]) -> Factors:
        """Return each factor over a loss scale, rounded down to what its dtype can hold."""
        if scale == 1.0:
            return self
        digits = np.array([row.digits for row in dtypes], np.int64)
        mantissas, powers = backend.divided_factors(self.mantissas, self.powers, scale, digits)
        tiny = max((row.tiny for row in dtypes), default=0.0)
        values = np.ldexp(mantissas, powers.astype(np.intc))
        small = bool(((mantissas > 0.0) & (values < tiny)).any())
        return Factors(mantissas, powers, True, self.truncate or small)


def decide(
    norms: Norms, bounds: Array, dtypes: Iterable[DType], ones: Any, loss: float = 0.0
) -> Factors:
    """Return the factors that bring norms to their bounds, see `kernels.formulas`.

    `ones` is the norm, measured the same way, of as many ones as a group has elements: a
    number, or one for each group. `loss` is what subnormal terms of repeated rows can add.
    """
    rows = list(dtypes)
    roundoffs = norms.spread * max(row.roundoff for row in rows)
    limits = np.array([min(row.digits for row in rows), max(row.tiny for row in rows)])
    coarse = np.full(bounds.size, ones * max(row.coarse for row in rows))
    targets = np.maximum(bounds - loss, 0.0) if loss else bounds
    return Factors(*backend.factors(norms[:2], (bounds, targets, coarse), roundoffs, limits))


class Repeating(Protocol):
    """A gradient whose rows may repeat, in the host's memory or on a GPU."""

    @property
    def dtype(self) -> DType:
        """The element type."""

    @property
    def slices(self) -> IndexedSlices | None:
        """The gradient, where it is slices."""

    @property
    def repeated(self) -> bool:
        """Whether rows of the dense array are stored more than once."""


def repeated_loss(entries: Sequence[Repeating], ord: float) -> float:
    """Return the norm of what rounding subnormal terms can add to the sums of repeated rows."""
    parts = [
        2.0 ** entry.dtype.precision[1] * formulas.root(_counts(entry, ord), ord)
        for entry in entries
        if entry.repeated
    ]
    return sum(parts)


def _counts(entry: Repeating, ord: float) -> float:
    """Return the sum of powers (the maximum) of how many terms each dense element has."""
    assert entry.slices is not None
    counts = np.diff(entry.slices.grouping.starts).astype(np.float64)
    if ord == math.inf:
        return float(counts.max())
    numbers = math.prod(entry.slices.dense_shape[1:]) * entry.dtype.components
    return float((counts**ord).sum()) * numbers


def together(parts: Sequence[Factors]) -> Factors:
    """Return the factors of several decisions as those of one."""
    return Factors(
        np.concatenate([part.mantissas for part in parts]),
        np.concatenate([part.powers for part in parts]),
        any(part.active for part in parts),
        any(part.truncate for part in parts),
    )


def apply(tensors: Sequence[Batch], factors: Factors) -> None:
    """Write each tensor times its factor, in one pass and one native call."""
    backend.make(_scaling(tensors, factors))


def _scaling(tensors: Sequence[Batch], factors: Factors) -> list[Call]:
    """Return the calls that write each tensor times its factor."""
    calls = []
    for batch in tensors:
        own = factors.take(batch.places)
        if factors.truncate:
            calls.append(backend.truncating(batch, own.mantissas, own.powers))
        else:
            calls.append(backend.scaling(batch, own.values(batch.dtype)))
    return calls


def write(entries: Sequence[Entry], places: Sequence[Place], factors: Factors) -> None:
    """Write each gradient times the one factor, or as it is if that changes nothing."""
    if not factors.active:
        copy(entries, places)
        return
    all_alike = np.zeros(len(entries), np.int64)
    tensors = batches(entries, [place.flat for place in places])
    scale = backend.ready(_scaling(tensors, factors.take(all_alike)))

    def finish() -> None:
        scale()
        for place in places:
            place.finish()

    backend.whole(finish)


def copy(entries: Sequence[Entry], places: Sequence[Place]) -> None:
    """Copy each gradient to where its result goes, unless that is where it is."""

    def finish() -> None:
        for entry, place in zip(entries, places, strict=True):
            if place.in_place:
                continue
            if place.flat is not entry.flat:
                np.copyto(place.flat, entry.flat)
            place.finish()

    backend.whole(finish)


@isolated
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
    summed = duplicates == "sum" and any(entry.repeated for entry in entries)
    if use_norm is not None and nonfinite == "propagate" and not summed:
        norms = _given(use_norm)
    else:
        norms = measure(entries, ord, duplicates)
        finite = math.isfinite(norms.roots[0]) and math.isfinite(use_norm or 0.0)
        if not finite and nonfinite == "raise":
            raise first_error(entries, use_norm)
        if not finite and nonfinite == "skip":
            copy(entries, places)
            return norms.values()[0] if use_norm is None else use_norm
        if not finite and nonfinite == "zero":
            entries, places = _without_bad(entries, places)
            norms = measure(entries, ord, duplicates)
        if divisor != 1.0:
            norms = norms.divided(divisor)
        if use_norm is not None and (nonfinite == "propagate" or math.isfinite(use_norm)):
            norms = _given(use_norm, norms)
    elements = sum(entry.flat.size for entry in entries)
    ones = formulas.root(float(elements), ord) / divisor
    loss = repeated_loss(entries, ord) / divisor if summed else 0.0
    factors = decide(norms, np.array([bound]), {entry.dtype for entry in entries}, ones, loss)
    write(entries, places, factors)
    return float(norms.values()[0])


@np.errstate(all="ignore")
def _given(norm: float, measured: Norms | None = None) -> Norms:
    """Return a norm the user gave, with the spread that was measured."""
    spread = 1.0
    if measured is not None and norm > 0.0:
        spread = max(1.0, float(measured.spread[0] * measured.values()[0] / norm))
    return Norms(np.array([norm]), np.zeros(1, np.int64), np.array([spread]))


def _without_bad(
    entries: Sequence[Entry], places: Sequence[Place]
) -> tuple[list[Entry], list[Place]]:
    """Return copies with 0 for what is not finite as the gradients to clip."""
    cleaned, rewritten = [], []
    for entry, place in zip(entries, places, strict=True):
        entry = entry._replace(flat=entry.flat.copy())
        entry.native[~np.isfinite(entry.native)] = 0
        cleaned.append(entry)
        rewritten.append(place._replace(in_place=False))
    return cleaned, rewritten


@isolated
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

"""Measure, decide, apply: what every clip consists of.

Norms are kept as ``root * 2**exponent``, which no magnitude overflows, until they are told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from numclip.dtypes import FLOAT64, Array, DType
from numclip.inputs import Entry
from numclip.kernels import backend, formulas
from numclip.kernels.backend import Batch
from numclip.nonfinite import first_error
from numclip.outputs import Place


class Tensor(Protocol):
    """What is measured; `inputs.Entry` is one."""

    @property
    def dtype(self) -> DType:
        """The element type."""

    @property
    def flat(self) -> Array:
        """The elements as contiguous storage."""


class Numbers(NamedTuple):
    """A tensor of intermediate results."""

    dtype: DType
    flat: Array


class Norms(NamedTuple):
    """Norms ``roots * 2**exponents`` of groups of tensors.

    `spread` is the norm of the rows' summed magnitudes over the norm, 1 where no row repeats:
    by so much the rounding errors of repeated rows can exceed those of their sum.
    """

    roots: Array
    exponents: Array
    spread: Array

    def values(self) -> Array:
        """Return the norms as float64, infinite where one exceeds that."""
        pairs = zip(self.roots.tolist(), self.exponents.tolist(), strict=True)
        return np.array([formulas.scale_by_power(*pair) for pair in pairs])

    def divided(self, divisor: Any, exponents: Any = 0) -> Norms:
        """Return the norms over ``divisor * 2**exponents``: means, or ratios of norms."""
        return self._replace(roots=self.roots / divisor, exponents=self.exponents - exponents)


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


def batches(tensors: Sequence[Tensor], targets: Sequence[Array] | None = None) -> list[Batch]:
    """Return tensors, with where they are written, as one batch for each dtype."""
    members: dict[DType, list[int]] = {}
    spans: list[tuple[int, int, int]] = []
    for k, tensor in enumerate(tensors):
        flat = tensor.flat
        target = flat if targets is None else targets[k]
        members.setdefault(tensor.dtype, []).append(k)
        address = flat.ctypes.data
        spans.append((address, address if target is flat else target.ctypes.data, flat.size))
    table = np.array(spans, np.int64).reshape(-1, 3)
    arrays = [tensor.flat for tensor in tensors], targets
    if len(members) == 1:
        (dtype,) = members
        return [backend.batch(dtype, np.arange(len(spans)), table, arrays)]
    return [
        backend.batch(dtype, np.array(places), table[places], arrays)
        for dtype, places in members.items()
    ]


def squares_of(tensors: Sequence[Batch], count: int) -> tuple[Array, Array]:
    """Return the sums of squares of `count` tensors as ``total * 4**exponent``: one read."""
    totals = np.zeros(count)
    exponents = np.zeros(count, np.int64)
    for batch in tensors:
        totals[batch.places], exponents[batch.places] = backend.squares(batch)
    return totals, exponents


def norms_of(tensors: Sequence[Batch], groups: Array, count: int, ord: float) -> Norms:
    """Return the norms of groups of tensors: one read, two where `ord` is not 2."""
    if ord == 2.0:
        totals, exponents = squares_of(tensors, groups.size)
        return Norms(*backend.join(totals, exponents, groups, count, ord), np.ones(count))
    return _norms_of_order(tensors, groups, count, ord)


@np.errstate(invalid="ignore")  # NaN passes on
def _norms_of_order(tensors: Sequence[Batch], groups: Array, count: int, ord: float) -> Norms:
    """Return norms of an order other than 2, of magnitudes over the largest of each group."""
    totals = np.zeros(groups.size)
    for batch in tensors:
        totals[batch.places] = backend.largest(batch)
    peaks = np.zeros(count)
    np.maximum.at(peaks, groups, totals)
    usable = (peaks > 0.0) & np.isfinite(peaks)
    scales = np.where(usable, peaks, 1.0)
    if ord == np.inf:
        totals /= scales[groups]
    else:
        for batch in tensors:
            totals[batch.places] = backend.powers(batch, scales[groups[batch.places]], ord)
    roots, _ = backend.join(totals, np.zeros(groups.size, np.int64), groups, count, ord)
    fractions, exponents = np.frexp(scales)
    roots = np.where(usable, roots * fractions, peaks)
    return Norms(roots, np.where(usable, exponents, 0), np.ones(count))


def measure(entries: Sequence[Entry], ord: float = 2.0, duplicates: str = "sum") -> Norms:
    """Return the joint norm of some gradients."""
    groups = np.zeros(len(entries), np.int64)
    summed = [duplicates == "sum" and entry.repeated for entry in entries]
    if ord == 2.0:
        if any(summed):
            return _measure_squares(entries, summed, groups)
        return norms_of(batches(entries), groups, 1, ord)
    norms = norms_of(batches(_magnitudes(entries, summed)), groups, 1, ord)
    if any(summed):
        terms = batches(_magnitudes(entries, summed, of_terms=True))
        norms = norms._replace(spread=_ratio(norms_of(terms, groups, 1, ord), norms))
    return norms


def _measure_squares(entries: Sequence[Entry], summed: Sequence[bool], groups: Array) -> Norms:
    """Return the joint L2 norm where rows of some gradients are summed."""
    plain = [k for k, sums in enumerate(summed) if not sums]
    totals = np.zeros(groups.size)
    exponents = np.zeros(groups.size, np.int64)
    singles = batches([entries[k] for k in plain])
    totals[plain], exponents[plain] = squares_of(singles, len(plain))
    terms = totals.copy()
    for k, sums in enumerate(summed):
        if sums:
            totals[k], terms[k], exponents[k] = _grouped_squares(entries[k])
    norms = Norms(*backend.join(totals, exponents, groups, 1, 2.0), np.ones(1))
    upper = norms._replace(roots=backend.join(terms, exponents, groups, 1, 2.0)[0])
    return norms._replace(spread=_ratio(upper, norms))


def _grouped_squares(entry: Entry) -> tuple[float, float, int]:
    """Return the squared norms of summed rows and of summed magnitudes, over ``4**exponent``."""
    assert entry.slices is not None
    grouping = entry.slices.grouping
    rows = entry.flat.reshape(grouping.order.size, -1)
    total, terms = backend.grouped_squares(*grouping, rows)
    if entry.dtype.digits < 53 or backend.is_safe(terms):
        return total, terms, 0
    peak = np.abs(rows).max()
    if peak == 0.0 or not np.isfinite(peak):
        return total, terms, 0
    exponent = int(np.frexp(peak)[1]) - 1
    return *backend.grouped_squares(*grouping, np.ldexp(rows, -exponent)), exponent


def _magnitudes(
    entries: Sequence[Entry], summed: Sequence[bool], *, of_terms: bool = False
) -> list[Tensor]:
    """Return real tensors with the gradients' magnitudes; repeated rows are summed.

    The sums `of_terms`, magnitudes before they are added, bound what rounding can add.
    """
    tensors: list[Tensor] = []
    for entry, sums in zip(entries, summed, strict=True):
        if not sums and entry.dtype.components == 1:
            tensors.append(entry)
            continue
        wide = entry.native.astype(np.result_type(entry.native.dtype, np.float64))
        if sums and entry.slices is not None:
            wide = entry.slices.summed(np.abs(wide) if of_terms else wide)
        tensors.append(Numbers(FLOAT64, np.abs(wide).reshape(-1)))
    return tensors


@np.errstate(invalid="ignore", over="ignore")
def _ratio(upper: Norms, lower: Norms) -> Array:
    """Return quotients of norms, 1 where the lower one is 0."""
    quotients = upper.roots / np.where(lower.roots == 0.0, 1.0, lower.roots)
    ratio = np.ldexp(quotients, upper.exponents - lower.exponents)
    return np.where(lower.roots == 0.0, 1.0, np.maximum(ratio, 1.0))


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

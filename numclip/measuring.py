"""Measuring: norms of gradients, of groups of them, and of units.

Norms are kept as ``root * 2**exponent``, which no magnitude overflows, until they are told.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from numclip.dtypes import FLOAT64, Array, DType, as_stored
from numclip.inputs import Entry
from numclip.isolation import isolated
from numclip.kernels import backend, formulas
from numclip.kernels.backend import Batch

HEADROOM = 64  # bits: no sum of that many terms, and no hypotenuse, exceeds float64


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


class Sums(NamedTuple):
    """Sums of squares of tensors, ``totals * 4**exponents``.

    `terms` are those of the summed magnitudes of rows, the totals where no row repeats.
    """

    totals: Array
    terms: Array
    exponents: Array

    def norms(self, groups: Array, count: int) -> Norms:
        """Return the norms of groups of tensors, each added in the order of its tensors."""
        roots, exponents = backend.join(self.totals, self.exponents, groups, count, 2.0)
        norms = Norms(roots, exponents, np.ones(count))
        if self.terms is self.totals:
            return norms
        roots, exponents = backend.join(self.terms, self.exponents, groups, count, 2.0)
        return norms._replace(spread=_ratio(Norms(roots, exponents, norms.spread), norms))


def squares_of(tensors: Sequence[Batch], count: int) -> Sums:
    """Return the sums of squares of `count` tensors in batches: one read."""
    if len(tensors) == 1 and tensors[0].places.size == count:
        totals, exponents = backend.squares(tensors[0])
        return Sums(totals, totals, exponents)
    totals = np.zeros(count)
    exponents = np.zeros(count, np.int64)
    for batch in tensors:
        totals[batch.places], exponents[batch.places] = backend.squares(batch)
    return Sums(totals, totals, exponents)


def sum_squares(
    entries: Sequence[Entry], duplicates: str = "sum", made: Sequence[Batch] | None = None
) -> Sums:
    """Return the sum of squares of each gradient, rows that repeat summed or as they lie.

    `made` are batches of the entries, if there are any already.
    """
    repeated = [k for k, entry in enumerate(entries) if duplicates == "sum" and entry.repeated]
    if not repeated:
        return squares_of(batches(entries) if made is None else made, len(entries))
    plain = [k for k in range(len(entries)) if k not in repeated]
    totals = np.zeros(len(entries))
    exponents = np.zeros(len(entries), np.int64)
    singles = squares_of(batches([entries[k] for k in plain]), len(plain))
    totals[plain], exponents[plain] = singles.totals, singles.exponents
    terms = totals.copy()
    for k in repeated:
        totals[k], terms[k], exponents[k] = _grouped_squares(entries[k])
    return Sums(totals, terms, exponents)


def norms_of(tensors: Sequence[Batch], groups: Array, count: int, ord: float) -> Norms:
    """Return the norms of groups of tensors: one read, two where `ord` is not 2."""
    if ord == 2.0:
        return squares_of(tensors, groups.size).norms(groups, count)
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


@isolated
def measure(entries: Sequence[Entry], ord: float = 2.0, duplicates: str = "sum") -> Norms:
    """Return the joint norm of some gradients."""
    groups = np.zeros(len(entries), np.int64)
    if ord == 2.0:
        return sum_squares(entries, duplicates).norms(groups, 1)
    summed = [duplicates == "sum" and entry.repeated for entry in entries]
    shift = HEADROOM if any(map(may_overflow, entries, summed)) else 0
    made = batches(_magnitudes(entries, summed, shift))
    norms = norms_of(made, groups, 1, ord)
    if any(summed):
        terms = batches(_magnitudes(entries, summed, shift, of_terms=True))
        norms = norms._replace(spread=_ratio(norms_of(terms, groups, 1, ord), norms))
    return norms._replace(exponents=norms.exponents + shift)


def over_power(array: Array, shift: int) -> Array:
    """Return an array in double precision, over ``2**shift``."""
    wide = array.astype(np.result_type(array.dtype, np.float64))
    if shift:
        parts = as_stored(wide)  # a complex product would make NaN of Inf
        parts *= 2.0**-shift
    return wide


def may_overflow(entry: Entry, summed: bool) -> bool:
    """Tell whether a magnitude, or a sum of rows, could exceed float64."""
    if entry.dtype.digits < 53 or not (summed or entry.dtype.components == 2):
        return False
    return bool((np.abs(entry.flat) > 2.0 ** (1023 - HEADROOM)).any())


def _grouped_squares(entry: Entry) -> tuple[float, float, int]:
    """Return the squared norms of summed rows and of summed magnitudes, over ``4**exponent``."""
    assert entry.slices is not None
    grouping = entry.slices.grouping
    rows = entry.flat.reshape(grouping.order.size, -1)
    total, terms = backend.grouped_squares(*grouping, rows)
    if entry.dtype.digits < 53 or (backend.is_safe(terms) and backend.is_safe(total)):
        return total, terms, 0
    if backend.is_safe(terms):  # rows cancel and leave what is too small to be squared
        merged = as_stored(entry.slices.summed(entry.native)).reshape(-1)
        totals, exponents = backend.squares(batches([Numbers(FLOAT64, merged)])[0])
        exponent = int(exponents[0])
        return float(totals[0]), formulas.scale_by_power(terms, -2 * exponent), exponent
    peak = np.abs(rows).max()
    if peak == 0.0 or not np.isfinite(peak):
        return total, terms, 0
    exponent = int(np.frexp(peak)[1]) - 1
    return *backend.grouped_squares(*grouping, np.ldexp(rows, -exponent)), exponent


def _magnitudes(
    entries: Sequence[Entry], summed: Sequence[bool], shift: int, *, of_terms: bool = False
) -> list[Tensor]:
    """Return real tensors with the gradients' magnitudes over ``2**shift``, rows summed.

    The sums `of_terms`, magnitudes before they are added, bound what rounding can add.
    """
    tensors: list[Tensor] = []
    for entry, sums in zip(entries, summed, strict=True):
        if not sums and entry.dtype.components == 1 and shift == 0:
            tensors.append(entry)
            continue
        wide = over_power(entry.native, shift)
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

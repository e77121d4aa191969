"""Norms of orders other than 2: of magnitudes over the largest of each pool."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import FLOAT64, Array, DType, as_stored
from numclip.engine import Groups
from numclip.host import batches, rows
from numclip.host.strided import elements
from numclip.law import Pool
from numclip.memory import Memory, RowSpan, Span
from numclip.tables import BAD, PEAK, TERMS, TERMS_PEAK, TOTAL

HEADROOM = 64  # bits: no sum of that many terms, and no hypotenuse, exceeds float64


class Magnitudes(NamedTuple):
    """Real tensors with the magnitudes of gradients over ``2**shift``; `kept` holds copies."""

    spans: dict[int, Span]
    kept: list[Array]


def write_powers(
    spans: Mapping[int, Span | RowSpan],
    groupings: Mapping[int, Groups],
    pools: Sequence[Pool],
    ord: float,
    law: Array,
    shifts: Array,
    sums: Array,
) -> None:
    """Write each tensor's sum of powers over its pool's peak, and the peaks into the law.

    `groupings` are those of the tensors whose rows are to be summed. All of a pool is taken over
    a power of two, its shift, where magnitudes or sums of rows could exceed float64.
    """
    pool_of = np.zeros(len(sums), np.int64)
    for p, pool in enumerate(pools):
        pool_of[pool.first : pool.last] = p
        members = [spans[t] for t in range(pool.first, pool.last)]
        summed = [t in groupings for t in range(pool.first, pool.last)]
        far = any(map(_may_overflow, members, summed))
        shifts[p] = HEADROOM if far else 0
    values = _magnitudes(spans, groupings, shifts[pool_of], of_terms=False)
    totals, peaks, bad = _powers(values, pool_of, ord, len(pools))
    sums[:, :] = 0.0
    sums[:, TOTAL] = sums[:, TERMS] = totals
    sums[:, BAD], law[:, PEAK] = bad, peaks
    if groupings:
        terms = _magnitudes(spans, groupings, shifts[pool_of], of_terms=True)
        sums[:, TERMS], law[:, TERMS_PEAK], _ = _powers(terms, pool_of, ord, len(pools))


def _powers(
    found: Magnitudes, pool_of: Array, ord: float, pools: int
) -> tuple[Array, Array, Array]:
    """Return sums of powers of tensors, the peaks of pools, and which tensors are not finite."""
    count = pool_of.size
    parts = batches.batches(found.spans)
    own = np.zeros(count)
    for batch in parts:
        own = np.maximum(own, batches.largest(batch, count))
    peaks = np.zeros(pools)
    with np.errstate(invalid="ignore"):
        np.maximum.at(peaks, pool_of, own)
    usable = np.where((peaks > 0.0) & np.isfinite(peaks), peaks, 1.0)[pool_of]
    if ord == np.inf:
        with np.errstate(all="ignore"):
            totals = own / usable
    else:
        totals = np.zeros(count)
        for batch in parts:
            totals += batches.powers(batch, usable, ord, count)
    return totals, peaks, ~np.isfinite(own)


def values_of(span: Span | RowSpan) -> Array:
    """Return a tensor's elements, rows as rows."""
    if isinstance(span, RowSpan):
        return rows.rows_of(span)
    count = span.size // span.dtype.components
    return elements(span.dtype, (count,), Memory(span.source, (span.dtype.native.itemsize,)))


def _may_overflow(span: Span | RowSpan, summed: bool) -> bool:
    """Tell whether a magnitude, or a sum of rows, could exceed float64."""
    if span.dtype.digits < 53 or not (summed or span.dtype.components == 2):
        return False
    return _is_far(values_of(span))


def _is_far(values: Array) -> bool:
    return bool((np.abs(as_stored(values)) > 2.0 ** (1023 - HEADROOM)).any())


def real_rows(dtype: DType, values: Array) -> tuple[Array, DType, int]:
    """Return rows of magnitudes over ``2**shift`` as stored numbers, their type and the shift.

    Real rows are returned as they are.
    """
    if dtype.components == 1:
        return as_stored(values), dtype, 0
    shift = HEADROOM if dtype.digits == 53 and _is_far(values) else 0
    return np.abs(_over_power(values, dtype.wide.native, shift)), FLOAT64, shift


def _magnitudes(
    spans: Mapping[int, Span | RowSpan],
    groupings: Mapping[int, Groups],
    shifts: Array,
    *,
    of_terms: bool,
) -> Magnitudes:
    """Return the magnitudes of gradients, rows summed, or their terms' before they are added."""
    found: dict[int, Span] = {}
    kept: list[Array] = []
    for t, span in spans.items():
        shift = int(shifts[t])
        if t not in groupings and span.dtype.components == 1 and shift == 0:
            found[t] = Span(*span[:4])
            continue
        wide = _over_power(values_of(span), span.dtype.wide.native, shift)
        if t in groupings:
            wide = rows.summed(np.abs(wide) if of_terms else wide, groupings[t])
        flat = np.abs(wide).reshape(-1)
        kept.append(flat)
        found[t] = Span(FLOAT64, flat.ctypes.data, flat.ctypes.data, flat.size)
    return Magnitudes(found, kept)


def _over_power(values: Array, dtype: np.dtype[Any], shift: int) -> Array:
    """Return values in double precision, over ``2**shift``."""
    wide = values.astype(dtype)
    if shift:
        parts = as_stored(wide)  # a complex product would make NaN of Inf
        parts *= 2.0**-shift
    return wide

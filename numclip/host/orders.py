"""Sums of powers of orders other than 2: of magnitudes over the largest of each tensor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import FLOAT64, Array, DType, as_stored
from numclip.engine import Groups
from numclip.host import batches, rows
from numclip.host.strided import elements
from numclip.memory import Memory, RowSpan, Span
from numclip.tables import BAD, ERROR, EXPONENT, TERMS, TERMS_EXPONENT, TOTAL

TOTALLED, TERMED = [TOTAL, EXPONENT], [TERMS, TERMS_EXPONENT]
HEADROOM = 64  # bits: no sum of that many terms, and no hypotenuse, exceeds float64


class Magnitudes(NamedTuple):
    """Real tensors with the magnitudes of gradients over ``2**shift``; `kept` owns the copies."""

    spans: dict[int, Span]
    shifts: Array
    kept: list[Array]


def write_powers(
    spans: Mapping[int, Span | RowSpan], groupings: Mapping[int, Groups], ord: float, sums: Array
) -> None:
    """Write each tensor's sum of powers, or for an infinite order its largest magnitude.

    `groupings` are those of the tensors whose rows are to be summed.
    """
    sums[:, TERMED] = sums[:, TOTALLED] = _power_sums(
        _magnitudes(spans, groupings, of_terms=False), ord
    )
    sums[:, BAD], sums[:, ERROR] = ~np.isfinite(sums[:, TOTAL]), 0.0
    if groupings:
        sums[:, TERMED] = _power_sums(_magnitudes(spans, groupings, of_terms=True), ord)


def _power_sums(found: Magnitudes, ord: float) -> Array:
    return batches.power_sums(batches.batches(found.spans), ord, found.shifts)


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
    spans: Mapping[int, Span | RowSpan], groupings: Mapping[int, Groups], *, of_terms: bool
) -> Magnitudes:
    """Return magnitudes of gradients; of rows those of their sums, or `of_terms` sums of those."""
    found: dict[int, Span] = {}
    shifts, kept = np.zeros(len(spans), np.int64), []
    for t, span in spans.items():
        shift = HEADROOM if _may_overflow(span, t in groupings) else 0
        if t not in groupings and span.dtype.components == 1 and shift == 0:
            found[t] = Span(*span[:4])
            continue
        wide = _over_power(values_of(span), span.dtype.wide.native, shift)
        if t in groupings:
            wide = rows.summed(np.abs(wide) if of_terms else wide, groupings[t])
        flat = np.abs(wide).reshape(-1)
        kept.append(flat)
        shifts[t] = shift
        found[t] = Span(FLOAT64, flat.ctypes.data, flat.ctypes.data, flat.size)
    return Magnitudes(found, shifts, kept)


def _over_power(values: Array, dtype: np.dtype[Any], shift: int) -> Array:
    """Return values in double precision, over ``2**shift``."""
    wide = values.astype(dtype)
    if shift:
        parts = as_stored(wide)  # a complex product would make NaN of Inf
        parts *= 2.0**-shift
    return wide

"""Rows that share an index, in the host's memory: their sums, and the norms of the sums."""

from __future__ import annotations

import numpy as np

from numclip.dtypes import FLOAT64, Array, as_stored
from numclip.engine import Groups
from numclip.facts import Facts
from numclip.formulas import is_safe, scale_by_power
from numclip.host import batches
from numclip.host.kernels import grouping as kernels
from numclip.host.runtime import threads
from numclip.host.strided import elements
from numclip.memory import Memory, RowSpan, Span, strides_of
from numclip.tables import BAD, EXPONENT, SUM_COLUMNS, TERMS, TERMS_EXPONENT, TOTAL


def group(indices: Array) -> tuple[Array, Array]:
    """Return the order that brings equal indices together, and where each group starts."""
    row = np.uint32 if indices.size < 1 << 32 else np.int64
    table = np.zeros(1 << (2 * indices.size - 1).bit_length(), row)
    order = np.empty(indices.size, np.int64)
    starts = np.empty(indices.size + 1, np.int64)
    count = kernels.group_rows(indices, table, order, starts)
    return order, starts[: count + 1]


def grouped_squares(order: Array, starts: Array, values: Array) -> tuple[float, float]:
    """Return the squared norms that `kernels.squares_of_groups` does, by all threads."""
    rows, count = kernels.shares(order, values)

    def squares(exact: bool) -> tuple[float, float]:
        partial = np.empty((count, 2))
        arguments = rows, order, starts, values, exact, partial
        threads.run(kernels.grouped_squares, count, values.nbytes, *arguments)
        return kernels.total(partial)  # type: ignore[no-any-return]

    if values.dtype != np.float64:
        total, terms, trusted = kernels.with_margin(*squares(False))
        if trusted:
            return total, terms
    return squares(True)


def merge_rows(order: Array, starts: Array, values: Array, out: Array) -> None:
    """Write the sum of each group of rows to a row of `out`; both are 2-d storage."""
    arguments = order, starts, values, out
    threads.run(kernels.merge_rows, starts.size - 1, values.nbytes, *arguments)


def are_within(indices: Array, height: int) -> bool:
    """Tell whether all indices are in ``range(height)``."""
    return kernels.are_within(indices, height)  # type: ignore[no-any-return]


def repeats(grouping: Groups) -> bool:
    """Tell whether an index appears more than once."""
    order, starts = grouping
    return starts.size - 1 < order.size


def rows_of(span: RowSpan) -> Array:
    """Return rows as a 2-d array of elements: a view, or a copy if they are not contiguous."""
    if span.strided is not None:
        found = elements(span.dtype, span.strided.shape, span.strided.read)
        return np.ascontiguousarray(found).reshape(found.shape[0], -1)
    shape = span.size // max(span.length, 1), span.length // span.dtype.components
    steps = strides_of(shape, span.dtype.native.itemsize)
    return elements(span.dtype, shape, Memory(span.source, steps))


def write_squares(span: RowSpan, grouping: Groups, out: Array) -> None:
    """Write the sums of squares of summed rows and of summed magnitudes to a row of sums."""
    total, terms, exponent = _squares(span, grouping)
    out[TOTAL], out[EXPONENT] = total, exponent
    out[TERMS], out[TERMS_EXPONENT] = terms, exponent
    out[BAD] = 0.0 if np.isfinite(total) else 1.0


def _squares(span: RowSpan, grouping: Groups) -> tuple[float, float, int]:
    """Return the squared norms of summed rows and of summed magnitudes, over ``4**exponent``."""
    rows = as_stored(rows_of(span))
    total, terms = grouped_squares(*grouping, rows)
    if span.dtype.digits < 53 or (is_safe(terms) and is_safe(total)):
        return total, terms, 0
    if is_safe(terms):  # rows cancel and leave sums whose squares underflow
        sums = np.zeros((1, SUM_COLUMNS))
        merged = summed(rows, grouping).reshape(-1)
        span64 = Span(FLOAT64, merged.ctypes.data, merged.ctypes.data, merged.size)
        for batch in batches.batches({0: span64}):
            batches.write_squares(batch, sums)
        exponent = int(sums[0, EXPONENT])
        return float(sums[0, TOTAL]), scale_by_power(terms, -2 * exponent), exponent
    peak = np.abs(rows).max(initial=0.0)
    if peak == 0.0 or not np.isfinite(peak):
        return total, terms, 0
    exponent = int(np.frexp(peak)[1]) - 1
    return *grouped_squares(*grouping, np.ldexp(rows, -exponent)), exponent


def summed(rows: Array, grouping: Groups) -> Array:
    """Return the sums of the rows that share an index, as stored numbers or as elements."""
    sums = np.empty((grouping[1].size - 1, rows.shape[1]), rows.dtype)
    merge_rows(*grouping, as_stored(rows), as_stored(sums))
    return sums


def sum_rows(
    source: Facts, target: Facts, grouping: Groups, target_rows: Array, _stream: object = None
) -> None:
    """Write the sum of each group of rows to its row in `target_rows`, and 0 to the other rows.

    The dtype of the target holds the rows; sums are rounded once to it.
    """
    target.array[...] = 0
    if source.nbytes:
        rows = np.ascontiguousarray(source.array, target.native)
        sums = summed(rows.reshape(rows.shape[0], -1), grouping)
        target.array[target_rows] = sums.reshape(target_rows.size, *target.shape[1:])

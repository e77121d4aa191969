"""Loops over arrays part by part: units along columns, and sums over examples.

Shares and types are as in `cpu`.
"""

import numpy as np

from numclip.kernels.cpu import add_exactly, copy, scaled, settle
from numclip.kernels.elements import narrow, widen
from numclip.kernels.jit import inline, kernel
from numclip.kernels.tuning import ROWS


@inline
def add_squares(x, out):
    """Add the squares of an array to a float64 array."""
    for i in range(x.size):
        value = np.float64(widen(x[i]))
        out[i] += value * value


@kernel
def column_squares(begin, end, x, width, out):
    """Write the sums of squares over the middle axis of `x` to `out`, blocks of `width` columns.

    `x` has the shape (outer, reduced, inner), `out` (outer, inner); the share is of blocks.
    """
    blocks = -(-x.shape[2] // width)
    for item in range(begin, end):
        a = item // blocks
        first = item % blocks * width
        total = out[a, first : first + width]
        error = np.zeros(total.size)
        for start in range(0, x.shape[1], ROWS):
            part = np.zeros(total.size)
            for r in range(start, min(start + ROWS, x.shape[1])):
                add_squares(x[a, r, first : first + width], part)
            add_exactly(part, total, error)
        settle(total, error)


@kernel
def scale_columns(begin, end, x, factors, out):
    """Multiply by a factor for each (outer, inner) pair; shapes as in `column_squares`.

    The share is of rows, ``outer * reduced`` of them. In place where `x` and `out` are one.
    """
    for item in range(begin, end):
        a = item // x.shape[1]
        r = item % x.shape[1]
        row = out[a, r]
        if x.ctypes.data != out.ctypes.data:
            copy(x[a, r], row)
        for i in range(row.size):
            row[i] = scaled(row[i], factors[a, i])


@inline
def add_weighted(row, weight, total):
    """Add an array times a weight to a float64 array."""
    for i in range(total.size):
        total[i] += np.float64(widen(row[i])) * weight


@inline
def add_four_weighted(a, b, c, d, weights, total):
    """Add four arrays times their weights to a float64 array, which is written once."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for i in range(total.size):
        low = np.float64(widen(a[i])) * wa + np.float64(widen(b[i])) * wb
        high = np.float64(widen(c[i])) * wc + np.float64(widen(d[i])) * wd
        total[i] += low + high


@kernel
def sum_examples(begin, end, x, factors, width, out):
    """Write the sum over examples of ``x[example] * factors[example]``, in float64.

    `x` has the shape (examples, elements); the share is of blocks of `width` elements.
    """
    fours = x.shape[0] // 4 * 4
    for block in range(begin, end):
        first = block * width
        last = min(first + width, out.size)
        total = np.zeros(last - first)
        for e in range(0, fours, 4):
            add_four_weighted(
                x[e, first:last],
                x[e + 1, first:last],
                x[e + 2, first:last],
                x[e + 3, first:last],
                factors[e : e + 4],
                total,
            )
        for e in range(fours, x.shape[0]):
            add_weighted(x[e, first:last], factors[e], total)
        result = out[first:last]
        for i in range(result.size):
            result[i] = narrow(total[i], result[i])

"""Loops over arrays part by part: units along columns, and sums over examples.

`begin`, `end` and `like` are as in `cpu`.
"""

import numpy as np

from numclip.host.kernels.cpu import add_exactly, scaled, settle
from numclip.host.kernels.elements import array_at, nearest, widen
from numclip.host.kernels.scalars import two_sum
from numclip.host.kernels.tuning import COLUMNS
from numclip.host.runtime.jit import inline, kernel


@inline
def square(value):
    """Return the square of a stored element."""
    wide = np.float64(widen(value))
    return wide * wide


@inline
def add_squares(a, sums):
    """Add the squares of a row to their sums, collecting the rounding errors.

    `sums` holds both, `COLUMNS` numbers each: at a fixed distance a loop needs no checks for
    overlapping memory, of which LLVM emits eight at most.
    """
    for i in range(a.size):
        sums[i], rest = two_sum(sums[i], square(a[i]))
        sums[COLUMNS + i] += rest


@inline
def add_eight_squares(a, b, c, d, e, f, g, h, sums):
    """Add the squares of eight rows, rounded three times, as `add_squares` does."""
    for i in range(a.size):
        first = (square(a[i]) + square(b[i])) + (square(c[i]) + square(d[i]))
        last = (square(e[i]) + square(f[i])) + (square(g[i]) + square(h[i]))
        sums[i], rest = two_sum(sums[i], first + last)
        sums[COLUMNS + i] += rest


@inline
def row_at(row, part, x):
    """Return a row of columns; `part` is (address of row 0, stride of rows, length).

    The array has no owner: a slice would be reference-counted, eight times for a few reads.
    """
    return array_at(part[0] + row * part[1], part[2], x)


@inline
def sum_squares(part, rows, x, sums):
    """Write the sums of squares over rows of columns, see `row_at` and `add_squares`.

    The eight rows added together are an eighth of the rows apart: a processor prefetches eight
    streams, but hardly eight short adjacent rows (twice as slow for rows of 64). A Zen 3 reads 24
    GB/s in the second-level cache, where one sum of all reads 38, and in memory 1.2 times as fast
    as that sum.
    """
    sums[:] = 0.0
    step = rows // 8
    for r in range(step):
        add_eight_squares(
            row_at(r, part, x),
            row_at(r + step, part, x),
            row_at(r + 2 * step, part, x),
            row_at(r + 3 * step, part, x),
            row_at(r + 4 * step, part, x),
            row_at(r + 5 * step, part, x),
            row_at(r + 6 * step, part, x),
            row_at(r + 7 * step, part, x),
            sums,
        )
    for r in range(8 * step, rows):
        add_squares(row_at(r, part, x), sums)
    settle(sums[: part[2]], sums[COLUMNS:])


@kernel
def column_squares(begin, end, x, rows, out):
    """Write the sums of squares over parts of the middle axis of `x`, `rows` of it each.

    `x` has the shape (outer, reduced, inner), `out` (outer, parts, inner); `begin` and `end`
    count blocks of `COLUMNS` columns of a part.
    """
    sums = np.empty(2 * COLUMNS)
    blocks = -(-x.shape[2] // COLUMNS)
    for item in range(begin, end):
        a = item // (out.shape[1] * blocks)
        begin_row = item // blocks % out.shape[1] * rows
        first = item % blocks * COLUMNS
        width = min(COLUMNS, x.shape[2] - first)
        offset = (a * x.shape[1] + begin_row) * x.shape[2] + first
        part = x.ctypes.data + offset * x.itemsize, x.shape[2] * x.itemsize, width
        sum_squares(part, min(rows, x.shape[1] - begin_row), x, sums)
        out[a, item // blocks % out.shape[1], first : first + width] = sums[:width]


@kernel
def add_parts(parts):
    """Add the sums of the parts, (outer, parts, inner), to those of the first part, in order."""
    for a in range(parts.shape[0]):
        error = np.zeros(parts.shape[2])
        for part in range(1, parts.shape[1]):
            add_exactly(parts[a, part], parts[a, 0], error)
        settle(parts[a, 0], error)


@inline
def multiply_each(x, factors):
    """Multiply an array in place by an array with a factor for each number."""
    for i in range(x.size):
        x[i] = scaled(x[i], factors[i])


@inline
def multiply_each_into(x, factors, out):
    """Write the products to `out`: a loop of its own, as one that may alias is not vectorised."""
    for i in range(x.size):
        out[i] = scaled(x[i], factors[i])


@kernel
def scale_columns(begin, end, x, factors, out):
    """Multiply by a factor for each (outer, inner) pair; shapes as in `column_squares`.

    `begin` and `end` count the ``outer * reduced`` rows. In place where `x` and `out` are one.
    """
    inner, source, target = x.shape[2], np.int64(x.ctypes.data), np.int64(out.ctypes.data)
    part = np.int64(factors.ctypes.data), inner * factors.itemsize, inner
    for item in range(begin, end):
        own = row_at(item // x.shape[1], part, factors)
        row = row_at(item, (target, inner * x.itemsize, inner), out)
        if source == target:
            multiply_each(row, own)
        else:
            multiply_each_into(row_at(item, (source, inner * x.itemsize, inner), x), own, row)


@inline
def add_weighted(row, weight, total):
    """Add an array times a weight to a float64 array."""
    for i in range(total.size):
        total[i] += np.float64(widen(row[i])) * weight


@inline
def add_four_weighted(a, b, c, d, weights, total):
    """Add four arrays times their weights to a float64 array, writing that once."""
    wa, wb, wc, wd = weights[0], weights[1], weights[2], weights[3]
    for i in range(total.size):
        low = np.float64(widen(a[i])) * wa + np.float64(widen(b[i])) * wb
        high = np.float64(widen(c[i])) * wc + np.float64(widen(d[i])) * wd
        total[i] += low + high


@kernel
def sum_examples(begin, end, x, factors, width, out):
    """Write the sum over examples of ``x[example] * factors[example]``, in float64.

    `x` has the shape (examples, elements); `begin` and `end` count blocks of `width` elements.
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
            result[i] = nearest(total[i], result[i])

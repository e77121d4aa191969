"""Rows of a sparse gradient that share an index: bringing them together, summing, measuring.

Shares and types are as in `cpu`. A sum of rows is held in two float64, so that rows may cancel:
the rounding errors of its additions are found and collected. Where that is not asked to be exact,
the sums of four rows are rounded before. Rows of a group lie apart in memory, where no processor
foresees them: they are fetched into the caches some rows ahead.
"""

import numpy as np

from numclip import formulas
from numclip.host.kernels.cpu import array_of_squares, settle, slot_of, two_sum
from numclip.host.kernels.elements import array_at, narrow, prefetch, widen
from numclip.host.kernels.tuning import AHEAD, LINE, STRIP
from numclip.host.runtime.jit import inline, kernel

FOUR = 4  # rows added together, so that their sums are loaded and stored once

settled = inline(formulas.settled)


@kernel
def group_rows(indices, table, order, starts):
    """Write the rows group by group, in the order their indices first appear; return the groups.

    Group g has the rows ``order[starts[g]:starts[g + 1]]``, as they stand. `table` is a hash
    table, a power of two of slots that hold 0; `starts` has room for a group for each row.
    """
    groups = np.empty(indices.size, table.dtype)
    ranks = np.empty(indices.size, table.dtype)
    count = 0
    starts[0] = 0
    for k in range(indices.size):
        slot = slot_of(indices[k], table.size)
        # A slot holds the first row of its index, and one more.
        while table[slot] != 0 and indices[table[slot] - 1] != indices[k]:
            slot = (slot + 1) & (table.size - 1)
        if table[slot] == 0:
            table[slot] = k + 1
            groups[k] = count
            count += 1
            starts[count] = 0
        else:
            groups[k] = groups[table[slot] - 1]
        ranks[k] = starts[groups[k] + 1]
        starts[groups[k] + 1] += 1
    for g in range(count):
        starts[g + 1] += starts[g]
    for k in range(indices.size):
        order[starts[groups[k]] + ranks[k]] = k
    return count


@inline
def begin_sums(a, sums):
    """Write a strip as sums without errors, and its magnitudes; see `add_strip`."""
    for i in range(a.size):
        value = 0.0 + np.float64(widen(a[i]))  # -0.0 becomes 0.0, as in a dense array of zeros
        sums[i] = value
        sums[STRIP + i] = 0.0
        sums[2 * STRIP + i] = abs(value)


@inline
def add_strip(a, sums):
    """Add a strip to its sums, collecting the rounding errors, and its magnitudes.

    `sums` holds all three, `STRIP` numbers each: at fixed distances a loop needs no checks
    for memory that overlaps, which cost as much as a short row.
    """
    for i in range(a.size):
        value = np.float64(widen(a[i]))
        sums[i], rest = two_sum(sums[i], value)
        sums[STRIP + i] += rest
        sums[2 * STRIP + i] += abs(value)


@inline
def add_four(a, b, c, d, sums):
    """Add four strips as `add_strip` does, but for two rounding errors of the sum of the four."""
    for i in range(a.size):
        first = np.float64(widen(a[i]))
        second = np.float64(widen(b[i]))
        third = np.float64(widen(c[i]))
        fourth = np.float64(widen(d[i]))
        sums[i], rest = two_sum(sums[i], (first + second) + (third + fourth))
        sums[STRIP + i] += rest
        sums[2 * STRIP + i] += (abs(first) + abs(second)) + (abs(third) + abs(fourth))


@inline
def add_four_exactly(a, b, c, d, sums):
    """Add four strips as `add_strip` does."""
    for i in range(a.size):
        first = np.float64(widen(a[i]))
        second = np.float64(widen(b[i]))
        third = np.float64(widen(c[i]))
        fourth = np.float64(widen(d[i]))
        low, low_rest = two_sum(first, second)
        high, high_rest = two_sum(third, fourth)
        four, middle_rest = two_sum(low, high)
        sums[i], rest = two_sum(sums[i], four)
        sums[STRIP + i] += (low_rest + high_rest) + (middle_rest + rest)
        sums[2 * STRIP + i] += (abs(first) + abs(second)) + (abs(third) + abs(fourth))


@inline
def fetch(order, begin, end, strip, nbytes):
    """Fetch the strips of the rows that come so many bytes after ``order[begin:end]``."""
    ahead = FOUR + AHEAD // max(nbytes, LINE)
    for k in range(begin + ahead, min(end + ahead, order.size)):
        address = strip[0] + order[k] * strip[1]
        for line in range(0, nbytes, LINE):
            prefetch(address + line)


@inline
def strip_at(row, strip, values):
    """Return the strip of a row; `strip` is the first's address, the stride and the length."""
    return array_at(strip[0] + row * strip[1], strip[2], values)


@inline
def sum_strips(order, begin, end, strip, values, exact, sums):
    """Write the sums of the strips of the rows ``order[begin:end]``, see `add_strip`."""
    nbytes = strip[2] * values.itemsize
    fetch(order, begin, begin + 1, strip, nbytes)
    begin_sums(strip_at(order[begin], strip, values), sums)
    fours = begin + 1 + (end - begin - 1) // FOUR * FOUR
    for k in range(begin + 1, fours, FOUR):
        fetch(order, k, k + FOUR, strip, nbytes)
        a = strip_at(order[k], strip, values)
        b = strip_at(order[k + 1], strip, values)
        c = strip_at(order[k + 2], strip, values)
        d = strip_at(order[k + 3], strip, values)
        if exact:
            add_four_exactly(a, b, c, d, sums)
        else:
            add_four(a, b, c, d, sums)
    fetch(order, fours, end, strip, nbytes)
    for k in range(fours, end):
        add_strip(strip_at(order[k], strip, values), sums)
    settle(sums[: strip[2]], sums[STRIP:])


@inline
def strip_squares(order, begin, end, strip, values, exact, sums):
    """Return the squared norms of the sum of some rows' strips, and of their magnitudes' sum."""
    if end - begin == 1:
        fetch(order, begin, end, strip, strip[2] * values.itemsize)
        square = array_of_squares(strip_at(order[begin], strip, values))
        return square, square
    sum_strips(order, begin, end, strip, values, exact, sums)
    terms = array_of_squares(sums[2 * STRIP : 2 * STRIP + strip[2]])
    return array_of_squares(sums[: strip[2]]), terms


@kernel
def grouped_squares(begin, end, rows, order, starts, values, exact, out):
    """Write the squared norms of the groups' summed rows, and of their summed magnitudes.

    `values` has the shape (rows, elements) and is read once. Share s has the groups that start
    at the positions ``rows * s`` to ``rows * (s + 1)``; `out` has the shape (shares, 2).
    """
    sums = np.empty(3 * STRIP)
    stride = values.shape[1] * values.itemsize
    for s in range(begin, end):
        total = error = terms = terms_error = 0.0
        first, last = np.searchsorted(starts[:-1], np.array([rows * s, rows * (s + 1)]))
        for column in range(0, values.shape[1], STRIP):
            address = values.ctypes.data + column * values.itemsize
            strip = address, stride, min(STRIP, values.shape[1] - column)
            for g in range(first, last):
                square, term = strip_squares(
                    order, starts[g], starts[g + 1], strip, values, exact, sums
                )
                total, rest = two_sum(total, square)
                error += rest
                terms, rest = two_sum(terms, term)
                terms_error += rest
        out[s, 0] = settled(total, error)
        out[s, 1] = settled(terms, terms_error)


@kernel
def total(partial):
    """Return the sum of the shares' squares, and of their terms, in their order."""
    total = error = terms = terms_error = 0.0
    for s in range(partial.shape[0]):
        total, rest = two_sum(total, partial[s, 0])
        error += rest
        terms, rest = two_sum(terms, partial[s, 1])
        terms_error += rest
    return settled(total, error), settled(terms, terms_error)


@inline
def round_sums(sums, out):
    """Write sums, each rounded once."""
    for i in range(out.size):
        out[i] = narrow(sums[i], out[i])


@kernel
def merge_rows(begin, end, order, starts, values, out):
    """Write the sum of each group of rows to a row of `out`, rounded once."""
    sums = np.empty(3 * STRIP)
    stride = values.shape[1] * values.itemsize
    for g in range(begin, end):
        for column in range(0, values.shape[1], STRIP):
            offset = column * values.itemsize
            strip = values.ctypes.data + offset, stride, min(STRIP, values.shape[1] - column)
            sum_strips(order, starts[g], starts[g + 1], strip, values, True, sums)
            target = out.ctypes.data + offset, stride, strip[2]
            round_sums(sums, strip_at(g, target, out))

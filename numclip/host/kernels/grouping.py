"""Rows of a sparse gradient that share an index: grouped, summed and measured.

`begin`, `end` and `like` are as in `cpu`. A sum of rows is held in two float64, the sum and its
collected rounding errors, so that rows may cancel. Unless `exact`, eight rows are first added with
plain rounding. Rows of a group are scattered in memory, where no processor prefetches them: they
are prefetched some rows ahead.
"""

import numpy as np

from numclip.host.kernels.cpu import array_of_squares, settle, slot_of
from numclip.host.kernels.elements import (
    WORDS,
    array_at,
    empty,
    empty_table,
    nearest,
    prefetch,
    widen,
    zeros,
)
from numclip.host.kernels.running import insertion_index
from numclip.host.kernels.scalars import settled, two_sum
from numclip.host.kernels.tuning import AHEAD, CHUNK, LINE, STRIP
from numclip.host.runtime.jit import block_sum, inline, kernel

CANCELLATION = 2.0**20
"""The most by which the norm of summed magnitudes may exceed that of the sums, if sums of eight
rows are rounded: the norm is then accurate to 2**-31."""

TERMS_MARGIN = 1.0 + 2.0**-25
"""The factor for the norm of the magnitudes in that case, see `squares_of_groups`."""

SLOTS, TOTALS = np.empty(0, np.uint32), np.empty(0)  # storage samples of hash tables and of sums
FOUR, EIGHT = 4, 8  # rows added together, so that their sums are loaded and stored once


@kernel
def group_rows(indices, table, order, starts):
    """Write row numbers group by group, as their indices first appear; return how many groups.

    Group g has the rows ``order[starts[g]:starts[g + 1]]``, in ascending order. `table` is a hash
    table, a power of two of slots that hold 0; `starts` has one more entry than `indices`.
    """
    groups = empty(indices.size, table)
    ranks = empty(indices.size, table)
    count = 0
    starts[0] = 0
    for k in range(indices.size):
        slot = slot_of(indices[k], table.size)
        # A slot holds the first row of its index plus 1.
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


@kernel
def are_within(indices, height):
    """Tell whether all indices are at least 0 and less than `height`."""
    within = True
    for i in range(indices.size):
        within &= indices[i] >= 0 and indices[i] < height
    return within


@inline
def slots_for(count):
    """Return how many slots a hash table has for `count` keys: a power of two, at least twice."""
    slots = 1
    while slots < 2 * count:
        slots *= 2
    return slots


@inline
def wide(value):
    """Return an element in float64."""
    return np.float64(widen(value))


@inline
def eight_sums(a, b, c, d, e, f, g, h):
    """Return the sum of eight numbers, rounded in three levels, and that of their magnitudes."""
    terms = (abs(a) + abs(b)) + (abs(c) + abs(d))
    terms += (abs(e) + abs(f)) + (abs(g) + abs(h))
    return ((a + b) + (c + d)) + ((e + f) + (g + h)), terms


@inline
def add_eight(low, high, length, like, sums):
    """Add strips at eight addresses to sums, rounding errors, and sums of magnitudes.

    The errors of `eight_sums` are lost. `sums` holds all three, `STRIP` numbers each: at fixed
    distances a loop needs no checks for overlapping memory, which cost as much as a short row.
    """
    a, b = array_at(low[0], length, like), array_at(low[1], length, like)
    c, d = array_at(low[2], length, like), array_at(low[3], length, like)
    e, f = array_at(high[0], length, like), array_at(high[1], length, like)
    g, h = array_at(high[2], length, like), array_at(high[3], length, like)
    for i in range(length):
        first = wide(a[i]), wide(b[i]), wide(c[i]), wide(d[i])
        eight, terms = eight_sums(*first, wide(e[i]), wide(f[i]), wide(g[i]), wide(h[i]))
        sums[i], rest = two_sum(sums[i], eight)
        sums[STRIP + i] += rest
        sums[2 * STRIP + i] += terms


@inline
def add_strip(a, sums):
    """Add one strip as `add_eight` does; no rounding error is lost."""
    for i in range(a.size):
        value = wide(a[i])
        sums[i], rest = two_sum(sums[i], value)
        sums[STRIP + i] += rest
        sums[2 * STRIP + i] += abs(value)


@inline
def add_four_exactly(rows, length, like, sums):
    """Add four strips as `add_eight` does, and collect the rounding errors of their sum, too."""
    a, b = array_at(rows[0], length, like), array_at(rows[1], length, like)
    c, d = array_at(rows[2], length, like), array_at(rows[3], length, like)
    for i in range(length):
        first, second, third, fourth = wide(a[i]), wide(b[i]), wide(c[i]), wide(d[i])
        low, low_rest = two_sum(first, second)
        high, high_rest = two_sum(third, fourth)
        four, middle_rest = two_sum(low, high)
        sums[i], rest = two_sum(sums[i], four)
        sums[STRIP + i] += (low_rest + high_rest) + (middle_rest + rest)
        sums[2 * STRIP + i] += (abs(first) + abs(second)) + (abs(third) + abs(fourth))


@block_sum
def squares_of_eight(low, high, length, like):
    """Return the squared norms of the sum of eight strips, and of their magnitudes' sum.

    For elements under 64 bits. No intermediate sum is stored.
    """
    a, b = array_at(low[0], length, like), array_at(low[1], length, like)
    c, d = array_at(low[2], length, like), array_at(low[3], length, like)
    e, f = array_at(high[0], length, like), array_at(high[1], length, like)
    g, h = array_at(high[2], length, like), array_at(high[3], length, like)
    total = total_terms = 0.0
    for i in range(length):
        first = wide(a[i]), wide(b[i]), wide(c[i]), wide(d[i])
        eight, terms = eight_sums(*first, wide(e[i]), wide(f[i]), wide(g[i]), wide(h[i]))
        total += eight * eight
        total_terms += terms * terms
    return total, total_terms


@inline
def fetch(order, begin, end, strip, values):
    """Prefetch the strips of the rows that come some `AHEAD` bytes after ``order[begin:end]``."""
    nbytes = strip[2] * values.itemsize
    ahead = EIGHT + AHEAD // max(nbytes, LINE)
    for k in range(begin + ahead, min(end + ahead, order.size)):
        address = strip[0] + order[k] * strip[1]
        for line in range(0, nbytes, LINE):
            prefetch(address + line)


@inline
def strip_at(row, strip, values):
    """Return the strip of a row; `strip` is (address in row 0, stride of rows, length)."""
    return array_at(strip[0] + row * strip[1], strip[2], values)


@inline
def row_or_zeros(order, k, end, strip, sums):
    """Return the address of the strip of row ``order[k]``, or from `end` on of zeros in `sums`."""
    if k < end:
        return strip[0] + order[k] * strip[1]
    return np.int64(sums.ctypes.data) + 3 * STRIP * sums.itemsize


@inline
def four_rows(order, begin, end, strip, sums):
    """Return four addresses, of the strips of ``order[begin:end]`` and then of zeros."""
    return (
        row_or_zeros(order, begin, end, strip, sums),
        row_or_zeros(order, begin + 1, end, strip, sums),
        row_or_zeros(order, begin + 2, end, strip, sums),
        row_or_zeros(order, begin + 3, end, strip, sums),
    )


@inline
def sum_strips(order, begin, end, strip, values, exact, sums):
    """Write the sums of the strips of the rows ``order[begin:end]``, see `add_eight`."""
    fetch(order, begin, begin + 1, strip, values)
    first = strip_at(order[begin], strip, values)
    for i in range(first.size):
        value = 0.0 + wide(first[i])  # -0.0 becomes 0.0, as in a dense array of zeros
        sums[i], sums[STRIP + i], sums[2 * STRIP + i] = value, 0.0, abs(value)
    k = begin + 1
    while exact and k + FOUR <= end:
        fetch(order, k, k + FOUR, strip, values)
        add_four_exactly(four_rows(order, k, end, strip, sums), strip[2], values, sums)
        k += FOUR
    while exact and k < end:
        fetch(order, k, k + 1, strip, values)
        add_strip(strip_at(order[k], strip, values), sums)
        k += 1
    while k < end:
        fetch(order, k, min(k + EIGHT, end), strip, values)
        low = four_rows(order, k, end, strip, sums)
        high = four_rows(order, k + FOUR, end, strip, sums)
        add_eight(low, high, strip[2], values, sums)
        k += EIGHT
    settle(sums[: strip[2]], sums[STRIP:])


@inline
def strip_squares(order, begin, end, strip, values, exact, sums):
    """Return the squared norms of the sum of ``order[begin:end]``'s strips and of magnitudes'."""
    if end - begin == 1:
        fetch(order, begin, end, strip, values)
        square = array_of_squares(strip_at(order[begin], strip, values))
        return square, square
    if end - begin <= EIGHT and not exact:
        fetch(order, begin, end, strip, values)
        low = four_rows(order, begin, end, strip, sums)
        high = four_rows(order, begin + FOUR, end, strip, sums)
        return squares_of_eight(low, high, strip[2], values)
    sum_strips(order, begin, end, strip, values, exact, sums)
    terms = array_of_squares(sums[2 * STRIP : 2 * STRIP + strip[2]])
    return array_of_squares(sums[: strip[2]]), terms


@kernel
def grouped_squares(begin, end, rows, order, starts, values, exact, out):
    """Write the squared norms of the groups' summed rows, and of their summed magnitudes.

    `values` has the shape (rows, elements) and is read once. Share s has the groups whose `starts`
    are from ``rows * s`` to less than ``rows * (s + 1)``; `out` has the shape (shares, 2).
    """
    sums = zeros(4 * STRIP, TOTALS)
    stride = values.shape[1] * values.itemsize
    for s in range(begin, end):
        total = error = terms = terms_error = 0.0
        first = insertion_index(rows * s, starts, starts.size - 1)
        last = insertion_index(rows * (s + 1), starts, starts.size - 1)
        for column in range(0, values.shape[1], STRIP):
            address = np.int64(values.ctypes.data) + column * values.itemsize
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
    """Return the sums of the shares' squares and of their terms, added in the shares' order."""
    total = error = terms = terms_error = 0.0
    for s in range(partial.shape[0]):
        total, rest = two_sum(total, partial[s, 0])
        error += rest
        terms, rest = two_sum(terms, partial[s, 1])
        terms_error += rest
    return settled(total, error), settled(terms, terms_error)


@kernel
def shares(order, values):
    """Return (rows, shares): rows of a share, more if a group is longer, and how many shares."""
    rows = max(1, CHUNK // max(values.shape[1], 1))
    return rows, -(-order.size // rows)


@kernel
def with_margin(total, terms):
    """Return both squared norms, that of terms times the margin, and whether they may be used."""
    return total, terms * TERMS_MARGIN**2, terms <= CANCELLATION**2 * total


@kernel
def squares_of_groups(order, starts, values):
    """Return the squared norms of the summed rows and of the rows' summed magnitudes.

    For elements under 64 bits the sums of eight rows are rounded to float64, by at most
    ``3 * 2**-53`` of their magnitudes each: with ``M`` the norm of all, the norm is right to
    ``3 * 2**-53 M``. `TERMS_MARGIN` adds 16 such units to ``u M``, the allowance for rounding
    the terms of a result (see `formulas`): 3 for the norm, 3 for that of the result measured
    again, and M's own. Where ``M`` exceeds `CANCELLATION` times the norm, nothing is rounded.
    """
    rows, count = shares(order, values)
    partial = empty_table(count, 2, TOTALS)
    exact = values.itemsize >= 8  # no constant: one code serves both, and is compiled once
    if not exact:
        grouped_squares(0, count, rows, order, starts, values, exact, partial)
        squares, terms = total(partial)
        squares, terms, trusted = with_margin(squares, terms)
        if trusted:
            return squares, terms
    exact = values.itemsize > 0
    grouped_squares(0, count, rows, order, starts, values, exact, partial)
    return total(partial)


@inline
def round_sums(sums, out):
    """Write sums, each rounded once."""
    for i in range(out.size):
        out[i] = nearest(sums[i], out[i])


@kernel
def merge_rows(begin, end, order, starts, values, out):
    """Write the sum of each group of rows to a row of `out`, rounded once."""
    sums = zeros(4 * STRIP, TOTALS)
    stride = values.shape[1] * values.itemsize
    for g in range(begin, end):
        for column in range(0, values.shape[1], STRIP):
            offset, length = column * values.itemsize, min(STRIP, values.shape[1] - column)
            strip = np.int64(values.ctypes.data) + offset, stride, length
            sum_strips(order, starts[g], starts[g + 1], strip, values, True, sums)
            target = out.ctypes.data + offset, stride, length
            round_sums(sums, strip_at(g, target, out))


@kernel
def sum_rows(indices, values, height, distinct, out):
    """Write the distinct indices, in the order they first appear, and the sums of their rows.

    Return how many there are, -1 if an index is outside `height` rows. `values` and `out` are 2-d.
    """
    if not are_within(indices, height):
        return -1
    order, starts = empty(indices.size, WORDS), empty(indices.size + 1, WORDS)
    table = zeros(slots_for(indices.size), SLOTS)
    count = group_rows(indices, table, order, starts)
    for g in range(count):
        distinct[g] = indices[order[starts[g]]]
    merge_rows(0, count, order, starts, values, out)
    return count

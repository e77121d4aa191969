"""Rows of a sparse gradient that share an index: bringing them together, summing, measuring.

Shares and types are as in `cpu`.
"""

import numpy as np

from numclip.kernels.cpu import add_exactly, array_of_squares, settle, slot_of, two_sum
from numclip.kernels.elements import array_at, narrow, widen
from numclip.kernels.jit import inline, kernel
from numclip.kernels.tuning import STRIP


@kernel
def group_rows(indices, table, group, starts):
    """Assign numbers to distinct indices in the order they appear; return how many there are.

    `table` is a hash table, a power of two of slots that hold -1; `group` receives the number
    of each index, `starts` the sizes of the groups, shifted by one.
    """
    first = np.empty(indices.size, np.int64)
    count = 0
    for k in range(indices.size):
        index = indices[k]
        slot = slot_of(index, table.size)
        while table[slot] >= 0 and indices[first[table[slot]]] != index:
            slot = (slot + 1) & (table.size - 1)
        if table[slot] < 0:
            table[slot] = count
            first[count] = k
            count += 1
        group[k] = table[slot]
        starts[table[slot] + 1] += 1
    return count


@kernel
def order_rows(group, starts, order):
    """List the rows group by group, in the order they stand; turn sizes into starts."""
    for g in range(1, starts.size):
        starts[g] += starts[g - 1]
    place = starts[:-1].copy()
    for k in range(group.size):
        order[place[group[k]]] = k
        place[group[k]] += 1


@inline
def sum_rows(rows, values, total, error):
    """Write the exact sums of some rows of `values`, as far as two float64 hold them."""
    total[:] = 0.0
    error[:] = 0.0
    for k in rows:
        add_exactly(values[k], total, error)
    settle(total, error)


@inline
def add_pair(a, b, sums):
    """Add two strips to their sums, collecting the rounding errors, and their magnitudes.

    `sums` holds all three, `STRIP` numbers each: at fixed distances a loop needs no checks
    for memory that overlaps, which cost as much as a short row.
    """
    for i in range(a.size):
        first = np.float64(widen(a[i]))
        second = np.float64(widen(b[i]))
        total, rest = two_sum(sums[i], first)
        sums[i], other = two_sum(total, second)
        sums[STRIP + i] += rest + other
        sums[2 * STRIP + i] += abs(first) + abs(second)


@inline
def strip_squares(rows, address, stride, zeros, sums, out):
    """Write the squared norms of the sum of some rows' strips, and of their magnitudes' sum.

    Row k has its strip `stride` times k after `address`; `zeros` is a strip of no effect.
    """
    width = zeros.size
    last = array_at(address + rows[-1] * stride, width, zeros)
    if rows.size == 1:
        out[:] = array_of_squares(last)
        return
    for part in range(0, sums.size, STRIP):
        sums[part : part + width] = 0.0
    for k in range(1, rows.size, 2):
        a = array_at(address + rows[k - 1] * stride, width, zeros)
        b = array_at(address + rows[k] * stride, width, zeros)
        add_pair(a, b, sums)
    if rows.size % 2:
        add_pair(last, zeros, sums)
    settle(sums[:width], sums[STRIP:])
    out[0] = array_of_squares(sums[:width])
    out[1] = array_of_squares(sums[2 * STRIP : 2 * STRIP + width])


@kernel
def grouped_squares(begin, end, shares, order, starts, values, out):
    """Write the squared norms of the groups' summed rows, and of their summed magnitudes.

    `values` has the shape (rows, elements) and is read once. Share s has the groups in
    ``shares[s:s + 2]``; `out` has the shape (shares, 2).
    """
    zeros = np.zeros(STRIP, values.dtype)
    sums = np.empty(3 * STRIP)
    squares = np.empty(2)
    stride = values.shape[1] * values.itemsize
    for s in range(begin, end):
        total = np.zeros(2)
        error = np.zeros(2)
        for g in range(shares[s], shares[s + 1]):
            # An array without an owner: threads would fight over the count of references.
            here = order.ctypes.data + starts[g] * order.itemsize
            rows = array_at(here, starts[g + 1] - starts[g], order)
            for first in range(0, values.shape[1], STRIP):
                address = values.ctypes.data + first * values.itemsize
                strip = zeros[: values.shape[1] - first]
                strip_squares(rows, address, stride, strip, sums, squares)
                add_exactly(squares, total, error)
        settle(total, error)
        out[s] = total


@kernel
def merge_rows(begin, end, order, starts, values, out):
    """Write the sum of each group of rows to a row of `out`, rounded once."""
    total = np.empty(values.shape[1])
    error = np.empty(values.shape[1])
    for g in range(begin, end):
        sum_rows(order[starts[g] : starts[g + 1]], values, total, error)
        for i in range(total.size):
            out[g, i] = narrow(total[i], out[g, i])

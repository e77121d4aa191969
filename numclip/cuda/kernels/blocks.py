"""What the threads of a block do together: sums, maxima, and detection of the last block."""

import numpy as np

from numclip.cuda.device import THREADS, cuda, inline
from numclip.cuda.kernels.packets import size_of
from numclip.cuda.kernels.scalars import binned_square, joined_bins, larger, settled, two_sum

BINS = 7  # three sums, their rounding errors, and a count
EMPTY = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@inline
def tree_sum(total, error, place, count, apart, room):
    """Return the sum of sums and errors over the `count` threads equal to `place` modulo `apart`.

    `place` is the thread's number. They are added in a tree; `apart` is 1, or `apart` and `count`
    are powers of two.
    """
    totals, errors = room[0], room[1]
    totals[place] = total
    errors[place] = error
    cuda.syncthreads()
    while count > apart:
        half = (count + 1) >> 1
        if place < count - half:
            totals[place], rest = two_sum(totals[place], totals[place + half])
            errors[place] += errors[place + half] + rest
        cuda.syncthreads()
        count = half
    own = place & (apart - 1)
    result = settled(totals[own], errors[own])
    cuda.syncthreads()
    return result


@inline
def lane_sum(total, error, place, apart, room):
    """Return the sum of sums and errors over THREADS threads equal to `place` modulo `apart`."""
    return tree_sum(total, error, place, THREADS, apart, room)


@inline
def with_terms(bins, small, middle, large, count):
    """Return bins after adding to each of the three sums, and to the count."""
    small, low = two_sum(bins[0], small)
    middle, mid = two_sum(bins[1], middle)
    large, high = two_sum(bins[2], large)
    return small, middle, large, bins[3] + low, bins[4] + mid, bins[5] + high, bins[6] + count


@inline
def with_square(bins, value, count, like):
    """Return bins after adding the square of a value to a sum, and `count` to the count.

    Only squares of float64 can need another bin than the middle one.
    """
    small, middle, large = 0.0, value * value, 0.0
    if size_of(like) == 8:
        small, middle, large = binned_square(value)
    return with_terms(bins, small, middle, large, count)


@inline
def lane_bins(bins, place, apart, room):
    """Return (total, exponent, count) of bins over the threads equal to `place` modulo `apart`.

    The sum is ``total * 4**exponent``. All bins are added in one tree, as `lane_sum` adds one
    sum; `room` has a row for each.
    """
    for k in range(len(bins)):
        room[k, place] = bins[k]
    cuda.syncthreads()
    half = THREADS >> 1
    while half >= apart:
        if place < half:
            for k in range(3):
                room[k, place], rest = two_sum(room[k, place], room[k, place + half])
                room[k + 3, place] += room[k + 3, place + half] + rest
            room[6, place] += room[6, place + half]
        cuda.syncthreads()
        half >>= 1
    own = place & (apart - 1)
    small, middle = settled(room[0, own], room[3, own]), settled(room[1, own], room[4, own])
    large, count = settled(room[2, own], room[5, own]), room[6, own]
    cuda.syncthreads()
    total, exponent = joined_bins(small, middle, large)
    return total, exponent, count


@inline
def lane_max(value, place, apart, room):
    """Return the largest value over the threads equal to `place` modulo `apart`, NaN if one is."""
    values = room[0]
    values[place] = value
    cuda.syncthreads()
    half = THREADS >> 1
    while half >= apart:
        if place < half:
            values[place] = larger(values[place], values[place + half])
        cuda.syncthreads()
        half >>= 1
    result = values[place & (apart - 1)]
    cuda.syncthreads()
    return result


@inline
def block_sum(total, error, room):
    """Return the sum over all threads of the block of sums and their errors."""
    return lane_sum(total, error, cuda.threadIdx.x, 1, room)


@inline
def block_max(value, room):
    """Return the largest value over all threads of the block, NaN if one is."""
    return lane_max(value, cuda.threadIdx.x, 1, room)


@inline
def arrives_last(tickets, index, count, room):
    """Return, in all threads of a block, whether it is the last of `count` blocks to call this."""
    cuda.threadfence()  # blocks that arrive later see what was written before
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        arrived = cuda.atomic.inc(tickets, index, np.uint32(count - 1))  # wraps to 0
        cuda.threadfence()  # with the barrier: no thread reads a stale copy after it
        room[0, 0] = 1.0 if arrived == count - 1 else 0.0
    cuda.syncthreads()
    last = room[0, 0] == 1.0
    cuda.syncthreads()
    return last

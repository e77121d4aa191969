"""What the threads of a block do together: sums, maxima, and finding out who is last."""

import numpy as np

from numclip.kernels.cuda.device import THREADS, cuda, inline
from numclip.kernels.cuda.packets import size_of
from numclip.kernels.cuda.scalars import binned_square, joined_bins, larger, settled, two_sum

NOTHING = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0  # bins of squares, each with its rounding error


@inline
def tree_sum(total, error, place, count, apart, room):
    """Return the sum of `count` sums and their errors over the places modulo `apart`.

    They are added in a tree; `apart` is a power of two, and `count` a multiple of it.
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
    """Return the sum of sums and their errors over the threads of a place modulo `apart`."""
    return tree_sum(total, error, place, THREADS, apart, room)


@inline
def with_square(bins, value, like):
    """Return bins of squares, each with its rounding error, after adding the square of a value.

    Only squares of float64 can be out of the middle one.
    """
    small, middle, large = 0.0, value * value, 0.0
    if size_of(like) == 8:
        small, middle, large = binned_square(value)
    small, low = two_sum(bins[0], small)
    middle, mid = two_sum(bins[2], middle)
    large, high = two_sum(bins[4], large)
    return small, bins[1] + low, middle, bins[3] + mid, large, bins[5] + high


@inline
def lane_squares(bins, place, apart, room):
    """Return the sum of bins of squares as `lane_sum` does, as ``total * 4**exponent``."""
    small = lane_sum(bins[0], bins[1], place, apart, room)
    middle = lane_sum(bins[2], bins[3], place, apart, room)
    return joined_bins(small, middle, lane_sum(bins[4], bins[5], place, apart, room))


@inline
def lane_bins(bins, place, apart, room):
    """Return the sums of three bins and of a count over the threads of a place modulo `apart`.

    `bins` are three sums, their errors, and the count; all are added in one tree, as `lane_sum`
    adds one. `room` has a row for each.
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
    return small, middle, large, count


@inline
def lane_max(value, place, apart, room):
    """Return the largest value over the threads of a place modulo `apart`, NaN where one is."""
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
    """Return the largest value of all threads of the block, NaN where one is."""
    return lane_max(value, cuda.threadIdx.x, 1, room)


@inline
def arrives_last(tickets, index, count, room):
    """Tell all threads of a block whether it is the last of `count` to come here."""
    cuda.threadfence()  # what was written before is seen by whoever comes later
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        arrived = cuda.atomic.inc(tickets, index, np.uint32(count - 1))  # wraps to 0
        cuda.threadfence()  # with the barrier: no thread reads a stale copy after it
        room[0, 0] = 1.0 if arrived == count - 1 else 0.0
    cuda.syncthreads()
    last = room[0, 0] == 1.0
    cuda.syncthreads()
    return last

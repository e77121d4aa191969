"""What the threads of a block do together: sums, maxima, and detection of the last block."""

import numpy as np

from numclip.cuda.device import THREADS, cuda, inline
from numclip.cuda.kernels.packets import size_of
from numclip.cuda.kernels.scalars import binned_square, larger, settled, sum_of_bins, two_sum

BINS = 7  # three sums, their rounding errors, and a count
EMPTY = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0


@inline
def tree_sum(total, error, thread, count, apart, scratch):
    """Return the sum of sums and errors over the `count` threads equal to `thread` modulo `apart`.

    `thread` is the thread's number. They are added in a tree; `apart` is 1, or `apart` and `count`
    are powers of two.
    """
    totals, errors = scratch[0], scratch[1]
    totals[thread] = total
    errors[thread] = error
    cuda.syncthreads()
    while count > apart:
        half = (count + 1) >> 1
        if thread < count - half:
            totals[thread], rest = two_sum(totals[thread], totals[thread + half])
            errors[thread] += errors[thread + half] + rest
        cuda.syncthreads()
        count = half
    own = thread & (apart - 1)
    result = settled(totals[own], errors[own])
    cuda.syncthreads()
    return result


@inline
def lane_sum(total, error, thread, apart, scratch):
    """Return the sum of sums and errors over THREADS threads equal to `thread` modulo `apart`."""
    return tree_sum(total, error, thread, THREADS, apart, scratch)


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
def lane_bins(bins, thread, apart, scratch):
    """Return (total, exponent, count) of bins over the threads equal to `thread` modulo `apart`.

    The sum is ``total * 4**exponent``. All bins are added in one tree, as `lane_sum` adds one
    sum; `scratch` has a row for each.
    """
    for k in range(len(bins)):
        scratch[k, thread] = bins[k]
    cuda.syncthreads()
    half = THREADS >> 1
    while half >= apart:
        if thread < half:
            for k in range(3):
                scratch[k, thread], rest = two_sum(scratch[k, thread], scratch[k, thread + half])
                scratch[k + 3, thread] += scratch[k + 3, thread + half] + rest
            scratch[6, thread] += scratch[6, thread + half]
        cuda.syncthreads()
        half >>= 1
    own = thread & (apart - 1)
    small = settled(scratch[0, own], scratch[3, own])
    middle = settled(scratch[1, own], scratch[4, own])
    large, count = settled(scratch[2, own], scratch[5, own]), scratch[6, own]
    cuda.syncthreads()
    total, exponent = sum_of_bins(small, middle, large)
    return total, exponent, count


@inline
def lane_max(value, thread, apart, scratch):
    """Return the largest value over the threads equal to `thread` modulo `apart`, NaN if one is."""
    values = scratch[0]
    values[thread] = value
    cuda.syncthreads()
    half = THREADS >> 1
    while half >= apart:
        if thread < half:
            values[thread] = larger(values[thread], values[thread + half])
        cuda.syncthreads()
        half >>= 1
    result = values[thread & (apart - 1)]
    cuda.syncthreads()
    return result


@inline
def block_sum(total, error, scratch):
    """Return the sum over all threads of the block of sums and their errors."""
    return lane_sum(total, error, cuda.threadIdx.x, 1, scratch)


@inline
def block_max(value, scratch):
    """Return the largest value over all threads of the block, NaN if one is."""
    return lane_max(value, cuda.threadIdx.x, 1, scratch)


@inline
def arrives_last(tickets, index, count, scratch):
    """Return, in all threads of a block, whether it is the last of `count` blocks to call this."""
    cuda.threadfence()  # blocks that arrive later see what was written before
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        arrived = cuda.atomic.inc(tickets, index, np.uint32(count - 1))  # wraps to 0
        cuda.threadfence()  # with the barrier: no thread reads a stale copy after it
        scratch[0, 0] = 1.0 if arrived == count - 1 else 0.0
    cuda.syncthreads()
    last = scratch[0, 0] == 1.0
    cuda.syncthreads()
    return last

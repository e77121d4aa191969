"""What the threads of a block do together: sums, maxima, and finding out who is last."""

import numpy as np

from numclip.kernels.cuda.device import THREADS, cuda, inline
from numclip.kernels.cuda.scalars import larger, settled, two_sum


@inline
def block_sum(total, error, room):
    """Return the sum over the threads of the block of sums and their errors, added in a tree."""
    totals, errors = room[0], room[1]
    i = cuda.threadIdx.x
    totals[i] = total
    errors[i] = error
    cuda.syncthreads()
    half = THREADS >> 1
    while half > 0:
        if i < half:
            totals[i], rest = two_sum(totals[i], totals[i + half])
            errors[i] += errors[i + half] + rest
        cuda.syncthreads()
        half >>= 1
    result = settled(totals[0], errors[0])
    cuda.syncthreads()
    return result


@inline
def block_max(value, room):
    """Return the largest value of the threads of the block, NaN where one is."""
    values = room[0]
    i = cuda.threadIdx.x
    values[i] = value
    cuda.syncthreads()
    half = THREADS >> 1
    while half > 0:
        if i < half:
            values[i] = larger(values[i], values[i + half])
        cuda.syncthreads()
        half >>= 1
    result = values[0]
    cuda.syncthreads()
    return result


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

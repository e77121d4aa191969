"""Float32 numbers and their 16-bit copies, and 16-bit gradients of float32 ones.

Of each chunk, the source is where elements of 16 bits are, the target where those of float32 are.
"""

import numpy as np

from numclip import tables as col
from numclip.cuda.device import cuda, inline, kernel
from numclip.cuda.kernels.packets import (
    differ,
    each,
    load_at,
    nearest,
    over_packets,
    store_at,
)
from numclip.cuda.kernels.scaling import added

WIDE = np.float32(0.0)


@kernel
def round_chunks(chunks, like):
    """Write the nearest copies. One read, one write of half the size."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        copies, numbers = chunks[c, col.SOURCE], chunks[c, col.TARGET]
        length, arguments = chunks[c, col.LENGTH], (copies, numbers, like)
        over_packets(round_at, arguments, copies | numbers, length, like)
        c += cuda.gridDim.x


@inline
def round_at(spots, copies, numbers, like):
    """Write the copies at some spots."""
    store_at(copies, spots, each(nearest, (load_at(numbers, spots, WIDE),), (like,)), like)


@kernel
def take_over_chunks(chunks, like):
    """Let numbers be those of the copies that are none of theirs. Two reads, rarely a write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        copies, numbers = chunks[c, col.SOURCE], chunks[c, col.TARGET]
        length, arguments = chunks[c, col.LENGTH], (copies, numbers, like)
        over_packets(take_over_at, arguments, copies | numbers, length, like)
        c += cuda.gridDim.x


@inline
def take_over_at(spots, copies, numbers, like):
    """Do so at some spots."""
    own, x = load_at(copies, spots, like), load_at(numbers, spots, WIDE)
    if any_differs(x, own, like):
        store_at(numbers, spots, each(taken, (x, own), (like,)), WIDE)


@inline
def any_differs(x, copies, like):
    """Tell whether one of some copies is none of its number."""
    found = False
    for k in range(len(x)):
        found |= differ(x[k], copies[k], like)
    return found


@inline
def taken(number, copy, like):
    """Return the number, or the copy if it is none of it."""
    return copy if differ(number, copy, like) else number


@kernel
def widen_chunks(chunks, adds, like):
    """Copy each chunk, or add it. One read of half the size, or two, and one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        source, target = chunks[c, col.SOURCE], chunks[c, col.TARGET]
        length, arguments = chunks[c, col.LENGTH], (source, target, adds, like)
        over_packets(widen_at, arguments, source | target, length, like)
        c += cuda.gridDim.x


@inline
def widen_at(spots, source, target, adds, like):
    """Copy what is at some spots, or add it."""
    x = load_at(source, spots, like)
    if adds:
        x = each(added, (x, load_at(target, spots, WIDE)), ())
    store_at(target, spots, x, WIDE)

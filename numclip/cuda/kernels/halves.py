"""Float32 numbers and their 16-bit copies, and 16-bit gradients of float32 ones.

Of each chunk, the source is where elements of 16 bits are, the target where those of float32 are.
"""

import numpy as np

from numclip.cuda.device import inline, kernel
from numclip.cuda.kernels.packets import differ, each, load_at, over_chunks, rounded, store_at

WIDE = np.float32(0.0)


@kernel
def round_chunks(chunks, like):
    """Write the nearest copies. One read, one write of half the size."""
    over_chunks(round_at, (like,), chunks, like)


@inline
def round_at(spots, copies, numbers, like):
    """Write the copies at some spots."""
    store_at(copies, spots, each(rounded, (load_at(numbers, spots, WIDE),), (like,)), like)


@kernel
def take_over_chunks(chunks, like):
    """Let numbers be those of the copies that are none of theirs. Two reads, rarely a write."""
    over_chunks(take_over_at, (like,), chunks, like)


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
def widen_chunks(chunks, like):
    """Copy each chunk. One read of half the size, one write."""
    over_chunks(widen_at, (like,), chunks, like)


@inline
def widen_at(spots, source, target, like):
    """Copy what is at some spots."""
    store_at(target, spots, load_at(source, spots, like), WIDE)

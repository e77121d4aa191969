"""Conversion between float32 numbers and their 16-bit copies, or 16-bit gradients of float32 ones.

The source of each chunk has elements of 16 bits, the target those of float32.
"""

import numpy as np

from numclip.cuda.device import inline, kernel
from numclip.cuda.kernels.packets import differ, each, load_at, over_chunks, rounded, store_at

WIDE = np.float32(0.0)


@kernel
def round_chunks(chunks, like):
    """Round each number to its 16-bit copy, to nearest. One read, one write of half the size."""
    over_chunks(round_at, (like,), chunks, like)


@inline
def round_at(spots, copies, numbers, like):
    """Write the copies at some spots."""
    store_at(copies, spots, each(rounded, (load_at(numbers, spots, WIDE),), (like,)), like)


@kernel
def take_over_chunks(chunks, like):
    """Set each number to its copy unless it rounds to that copy. Two reads, rarely a write."""
    over_chunks(take_over_at, (like,), chunks, like)


@inline
def take_over_at(spots, copies, numbers, like):
    """Set the numbers at some spots to their copies unless they round to them."""
    own, x = load_at(copies, spots, like), load_at(numbers, spots, WIDE)
    if any_differs(x, own, like):
        store_at(numbers, spots, each(taken, (x, own), (like,)), WIDE)


@inline
def any_differs(x, copies, like):
    """Tell whether a number does not round to its copy."""
    found = False
    for k in range(len(x)):
        found |= differ(x[k], copies[k], like)
    return found


@inline
def taken(number, copy, like):
    """Return the number if it rounds to the copy, else the copy."""
    return copy if differ(number, copy, like) else number


@kernel
def widen_chunks(chunks, like):
    """Copy each chunk, widened to float32. One read of half the size, one write."""
    over_chunks(widen_at, (like,), chunks, like)


@inline
def widen_at(spots, source, target, like):
    """Copy the elements at some spots, widened to float32."""
    store_at(target, spots, load_at(source, spots, like), WIDE)

"""Contiguous arrays of one dtype that hold little: what most calls clip, by their L2 norm.

`little` takes these and others, with the same bits. It compiles in 20 s of processor time, and
these kernels in 4: the first call of a process that finds nothing compiled is made by them.
"""

import math

from numclip.host.kernels.arrays import (
    COMPONENTS,
    HEADER,
    NEEDS,
    NONE,
    WRITEABLE,
    own_their_data,
    read,
)
from numclip.host.kernels.cpu import (
    LENGTH,
    SOURCE,
    array_of_squares,
    hold,
    multiply,
)
from numclip.host.kernels.elements import WORDS, array_at, as_computed, empty, empty_table, rounded
from numclip.host.kernels.joint import decide, joined
from numclip.host.kernels.spans import divisor_for
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime.jit import inline, kernel_with_gil

DONE, ELSEWHERE, MUCH = range(3)
SPARE = 64  # chunks that a call has room for beyond one for each array
FEW = 32  # chunks that are compared in pairs


@inline
def are_apart(chunks, itemsize):
    """Tell whether chunks, of which there are few, share no memory."""
    for c in range(chunks.shape[0]):
        begin, end = chunks[c, SOURCE], chunks[c, SOURCE] + chunks[c, LENGTH] * itemsize
        for d in range(c):
            other = chunks[d, SOURCE]
            if begin < other + chunks[d, LENGTH] * itemsize and other < end:
                return False
    return chunks.shape[0] <= FEW


@inline
def read_little(items, count, facts, like, chunks):
    """Write the chunks of arrays; return DONE, ELSEWHERE or MUCH, how many, and the elements."""
    used, elements = read(items, count, facts, chunks)
    if used < 0:
        return ELSEWHERE, 0, elements
    if used > chunks.shape[0] or elements * like.itemsize >= PARALLEL_BYTES:
        return MUCH, 0, elements
    apart = facts[NEEDS] & WRITEABLE == 0
    apart = apart or own_their_data(items, count, facts[HEADER], facts[NONE])
    if apart or are_apart(chunks[:used], like.itemsize):
        return DONE, used, elements
    return ELSEWHERE, 0, elements


@inline
def norm_of(chunks, like, limits, totals):
    """Return as `joined` does, reading every element once."""
    partial = empty(chunks.shape[0], totals)
    for c in range(partial.size):
        partial[c] = array_of_squares(array_at(chunks[c, SOURCE], chunks[c, LENGTH], like))
    return joined(chunks, partial, limits, totals)


@kernel_with_gil
def clip(items, count, facts, limits, bound, what, like):
    """Clip arrays in place by their norm; return what became of them, and the norm.

    `what` says what that is divided by. Where the facts do not ask for arrays that can be written,
    `bound` is infinite.
    """
    chunks = empty_table(count + SPARE, 4, WORDS)
    state, used, elements = read_little(items, count, facts, like, chunks)
    if state != DONE:
        return state, 0.0
    norm, safe = norm_of(chunks[:used], like, limits, empty(count, limits))
    divisor = divisor_for(elements // facts[COMPONENTS], what)
    norm /= divisor
    if not safe:
        return ELSEWHERE, 0.0
    factor, truncate = decide(norm, bound, math.sqrt(elements), divisor, limits)
    if truncate:
        return ELSEWHERE, 0.0
    for c in range(used if factor != 1.0 else 0):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        multiply(x, as_computed(factor, like))
    return DONE, norm


@kernel_with_gil
def clamp(items, count, facts, low, high, like):
    """Hold the elements of arrays between bounds; return what became of them."""
    chunks = empty_table(count + SPARE, 4, WORDS)
    state, used, _ = read_little(items, count, facts, like, chunks)
    least, most = rounded(low, like), rounded(high, like)
    for c in range(used):
        hold(array_at(chunks[c, SOURCE], chunks[c, LENGTH], like), least, most)
    return state

"""Small contiguous arrays of one dtype, clipped by their L2 norm: what most calls pass.

`little` takes these and others, with the same bits. It compiles in 20 s of processor time, and
these kernels in 4: they serve the first call of a process that finds nothing in the cache.
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
from numclip.host.kernels.one_norm import decide, norm_of_chunks
from numclip.host.kernels.spans import divisor_for
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime.jit import inline, kernel_with_gil

DONE, ELSEWHERE, MUCH = range(3)
SPARE = 64  # chunks that a call has room for beyond one for each array
FEW = 32  # the most chunks for which `are_apart` returns True


@inline
def are_apart(chunks, itemsize):
    """Tell whether there are at most `FEW` chunks and no two of them share memory."""
    if chunks.shape[0] > FEW:
        return False
    for c in range(chunks.shape[0]):
        begin, end = chunks[c, SOURCE], chunks[c, SOURCE] + chunks[c, LENGTH] * itemsize
        for d in range(c):
            other = chunks[d, SOURCE]
            if begin < other + chunks[d, LENGTH] * itemsize and other < end:
                return False
    return True


@inline
def read_little(items, count, facts, like, chunks):
    """Write chunks; return (state, chunks, elements), where state is DONE, ELSEWHERE or MUCH."""
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
    """Return what `norm_of_chunks` does, after reading every element once."""
    partial = empty(chunks.shape[0], totals)
    for c in range(partial.size):
        partial[c] = array_of_squares(array_at(chunks[c, SOURCE], chunks[c, LENGTH], like))
    return norm_of_chunks(chunks, partial, limits, totals)


@kernel_with_gil
def clip(items, count, facts, limits, bound, options, like):
    """Clip arrays in place by their norm; return (state, norm).

    `options` selects the norm's divisor, see `spans.divisor_for`. `bound` must be infinite where
    the facts do not require writeable arrays.
    """
    chunks = empty_table(count + SPARE, 4, WORDS)
    state, used, elements = read_little(items, count, facts, like, chunks)
    if state != DONE:
        return state, 0.0
    norm, safe = norm_of(chunks[:used], like, limits, empty(count, limits))
    divisor = divisor_for(elements // facts[COMPONENTS], options)
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
    """Clamp arrays to [low, high] in place; return DONE, ELSEWHERE or MUCH."""
    chunks = empty_table(count + SPARE, 4, WORDS)
    state, used, _ = read_little(items, count, facts, like, chunks)
    least, most = rounded(low, like), rounded(high, like)
    for c in range(used):
        hold(array_at(chunks[c, SOURCE], chunks[c, LENGTH], like), least, most)
    return state

"""From the sums of chunks to the decision for each pool, on the host; see `decisions`.

Sums are added in the order of chunks, then of tensors, with the rounding errors kept.
"""

import math

import numpy as np

from numclip.decisions import DECISIONS, SCALARS, compiled
from numclip.kernels.cpu import LENGTH, OWNER, SOURCE, TARGET, array_of_squares, multiply
from numclip.kernels.elements import array_at, as_computed
from numclip.kernels.jit import inline, kernel
from numclip.tables import (
    BAD,
    BROKEN,
    DIGITS,
    EXPONENT,
    FIRST,
    LAST,
    LEAVE,
    MODE,
    MULTIPLY,
    ORD,
    POLICY,
    RARE,
    REPEATED,
    SET,
    TERMS,
    TERMS_EXPONENT,
    TOTAL,
)

_parts = compiled((*SCALARS, *DECISIONS), inline)
two_sum, settled, is_safe = _parts.two_sum, _parts.settled, _parts.is_safe
scale_by_power, larger, factor_of = _parts.scale_by_power, _parts.larger, _parts.factor_of
write_norm, write_spread, decide = _parts.write_norm, _parts.write_spread, _parts.decide


@inline
def write_sum(out, total, exponent):
    """Write the sum of a tensor in which no rows repeat: its terms are its elements."""
    out[TOTAL], out[EXPONENT] = total, exponent
    out[BAD] = 0.0 if math.isfinite(total) else 1.0
    out[TERMS], out[TERMS_EXPONENT] = total, exponent


@inline
def add_chunks(chunks, partial, sums):
    """Write the sum of each tensor that has a chunk; tell whether all are in the safe range."""
    tensor = error = 0.0
    safe = True
    for c in range(partial.size):
        tensor, rest = two_sum(tensor, partial[c])
        error += rest
        owner = chunks[c, OWNER]
        if c + 1 == partial.size or chunks[c + 1, OWNER] != owner:
            write_sum(sums[owner], settled(tensor, error), 0.0)
            safe &= is_safe(sums[owner, TOTAL])
            tensor = error = 0.0
    return safe


@inline
def add_tensors(pool, column, largest, sums):
    """Return the sum of a pool's tensors as ``total * 4**exponent``; of inf order, the largest."""
    exponent, empty = 0.0, True
    for t in range(pool[FIRST], pool[LAST]):
        if sums[t, column] != 0.0 and (empty or sums[t, column + 1] > exponent):
            exponent, empty = sums[t, column + 1], False
    total = error = 0.0
    for t in range(pool[FIRST], pool[LAST]):
        value, apart = sums[t, column], sums[t, column + 1] - exponent
        if apart != 0.0:
            value = scale_by_power(value, 2 * int(apart))
        if largest:
            total = larger(total, value)
        else:
            total, rest = two_sum(total, value)
            error += rest
    return settled(total, error), int(exponent)


@inline
def add_bad(pool, sums):
    """Return how many of a pool's tensors are not finite."""
    bad = 0.0
    for t in range(pool[FIRST], pool[LAST]):
        bad += sums[t, BAD]
    return bad


@inline
def decide_all(pools, laws, shifts, sums, decisions):
    """Write the norm and the decision of each pool, and in the last row if there is work."""
    count = pools.shape[0]
    skipped = np.zeros(count, np.bool_)
    for p in range(count):
        largest = laws[p, ORD] == math.inf
        total, exponent = add_tensors(pools[p], TOTAL, largest, sums)
        bad = add_bad(pools[p], sums)
        write_norm(laws[p], total, exponent, shifts[p], bad, decisions[p])
        if pools[p, REPEATED] != 0:
            terms = add_tensors(pools[p], TERMS, largest, sums)
            write_spread(laws[p], (total, exponent), terms, decisions[p])
        if decisions[p, BROKEN] != 0.0:
            skipped[pools[p, SET]] = True
    last = decisions[count]
    last[MODE] = last[RARE] = 0.0
    for p in range(count):
        bad = skipped[pools[p, SET]]
        decide(laws[p], pools[p, POLICY], int(pools[p, DIGITS]), bad, decisions[p])
        last[MODE] += decisions[p, MODE] != LEAVE
        last[RARE] += decisions[p, MODE] > MULTIPLY


@kernel
def decide_pools(pools, laws, shifts, sums, decisions):
    """Decide for every pool, from the sums of the tensors. One more row tells if there is work."""
    decide_all(pools, laws, shifts, sums, decisions)


@kernel
def add_partials(chunks, partial, sums):
    """Add the sums of squares of chunks, as `add_chunks` does."""
    return add_chunks(chunks, partial, sums)


@kernel
def measure_and_decide(chunks, like, pools, laws, shifts, sums, decisions):
    """Read every element once, and decide; tell whether all sums are in the safe range."""
    partial = np.empty(chunks.shape[0])
    for c in range(partial.size):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        partial[c] = array_of_squares(x)
    safe = add_chunks(chunks, partial, sums)
    decide_all(pools, laws, shifts, sums, decisions)
    return safe


@kernel
def scale_decided(chunks, pool_of, decisions, column, like):
    """Multiply tensors in place by the factors that are decided, a column of the decisions."""
    for c in range(chunks.shape[0]):
        factor = as_computed(decisions[pool_of[chunks[c, OWNER]], column], like)
        if factor != 1.0:
            multiply(array_at(chunks[c, TARGET], chunks[c, LENGTH], like), factor)

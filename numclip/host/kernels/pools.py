"""From the sums of chunks to the decision for each pool, on the host; see `decisions`.

Chunk sums are added in their order with the rounding errors kept, tensor sums as if exactly: the
sum of a pool is rounded once, so that it does not depend on the order of the tensors.
"""

import math

import numpy as np

from numclip.host.kernels import elements
from numclip.host.kernels.cpu import (
    LENGTH,
    OWNER,
    SOURCE,
    TARGET,
    array_of_squares,
    hold,
    multiply,
    written,
)
from numclip.host.kernels.elements import array_at, as_computed, empty, zeros
from numclip.host.kernels.scalars import (
    decide,
    is_safe,
    is_settled,
    larger,
    scale_by_power,
    settled,
    two_sum,
    write_cancellation,
    write_norm,
    write_root,
)
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import (
    BAD,
    BROKEN,
    CANCELLATION,
    CLAMPED,
    DIGITS,
    ERROR,
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
    SKIPPED,
    TERMS,
    TERMS_EXPONENT,
    TOTAL,
)

LARGEST = np.finfo(np.float64).max
MOST_PARTS = 64  # at most 40 numbers of 53 bits fit into float64's range without overlapping
SMALLEST = 5e-324


@inline
def write_sum(out, total, error):
    """Write the row of sums of a tensor without repeated rows: its terms are its elements."""
    rounded = settled(total, error)
    finite = math.isfinite(rounded)
    out[TOTAL], out[EXPONENT], out[BAD] = rounded, 0.0, 0.0 if finite else 1.0
    out[TERMS], out[TERMS_EXPONENT] = rounded, 0.0
    out[ERROR] = (total - rounded) + error if finite else 0.0


@kernel
def add_chunks(chunks, partial, zeros, sums):
    """Write the sum of each tensor that has a chunk; return whether all are in the safe range.

    `zeros` says that a sum of 0 counts as safe, since no nonzero element was added to it.
    """
    tensor = error = 0.0
    safe = True
    for c in range(partial.size):
        tensor, rest = two_sum(tensor, partial[c])
        error += rest
        owner = chunks[c, OWNER]
        if c + 1 == partial.size or chunks[c + 1, OWNER] != owner:
            write_sum(sums[owner], tensor, error)
            safe &= is_safe(sums[owner, TOTAL]) or (zeros and sums[owner, TOTAL] == 0.0)
            tensor = error = 0.0
    return safe


@inline
def add_sum(sums, value, rest):
    """Return (total, error, doubt): `sums` plus a tensor's sum and its rounding error.

    `doubt` adds up the magnitudes of what rounding takes from `error`.
    """
    total, lost = two_sum(sums[0], value)
    error, lost = two_sum(sums[1], lost)
    doubt = sums[2] + abs(lost)
    if rest != 0.0:
        error, lost = two_sum(error, rest)
        doubt += abs(lost)
    return total, error, doubt


@inline
def highest(pool, column, sums):
    """Return the highest exponent of a pool's nonzero sums, 0 if there are none."""
    exponent, empty = 0.0, True
    for t in range(pool[FIRST], pool[LAST]):
        if sums[t, column] != 0.0 and (empty or sums[t, column + 1] > exponent):
            exponent, empty = sums[t, column + 1], False
    return exponent


@inline
def scaled_down(value, apart):
    """Return ``value * 4**apart``, apart <= 0; a positive value stays positive, to break ties."""
    if apart == 0.0:
        return value
    small = scale_by_power(value, 2 * int(apart))
    return SMALLEST if small == 0.0 and value > 0.0 else small


@inline
def add_part(parts, count, value):
    """Add `value` to `count` non-overlapping parts of rising magnitude; return the new count.

    The parts are an exact sum (Shewchuk 1997).
    """
    kept = 0
    for i in range(count):
        value, rest = two_sum(value, parts[i])
        if rest != 0.0:
            parts[kept] = rest
            kept += 1
    parts[kept] = value
    return kept + 1


@inline
def rounded(parts, count):
    """Return (total, rest): an exact sum rounded to nearest, and about its rounding error."""
    total, rest = parts[count - 1], 0.0
    i = count - 1
    while i > 0 and rest == 0.0:
        i -= 1
        total, rest = two_sum(total, parts[i])
    if i > 0 and (rest > 0.0) == (parts[i - 1] > 0.0):  # lower parts show that it is no tie
        up = total + 2.0 * rest
        if up - total == 2.0 * rest:
            return up, -rest
    return total, rest


@inline
def add_exactly(pool, column, exponent, sums):
    """Return (total, rest) as `add_tensors` does, for finite sums, by exact arithmetic."""
    parts, count = empty(MOST_PARTS, sums), 0
    for t in range(pool[FIRST], pool[LAST]):
        apart = sums[t, column + 1] - exponent
        count = add_part(parts, count, scaled_down(sums[t, column], apart))
        if column == TOTAL:
            count = add_part(parts, count, scaled_down(sums[t, ERROR], apart))
    return rounded(parts, count)


@inline
def add_tensors(pool, column, largest, sums):
    """Return (total, rest, exponent): the sum of a pool's tensors is ``total * 4**exponent``.

    `rest` is the rounding error of the total, to about 53 bits. With `largest`, for order inf, the
    total is the largest of the tensors' values.
    """
    exponent = highest(pool, column, sums)
    total = error = doubt = 0.0
    for t in range(pool[FIRST], pool[LAST]):
        apart = sums[t, column + 1] - exponent
        value = scaled_down(sums[t, column], apart)
        if largest:
            total = larger(total, value)
        else:
            rest = scaled_down(sums[t, ERROR], apart) if column == TOTAL else 0.0
            total, error, doubt = add_sum((total, error, doubt), value, rest)
    result = settled(total, error)
    if not math.isfinite(result):
        return result, 0.0, int(exponent)
    if is_settled(total, error, doubt):
        return result, (total - result) + error, int(exponent)
    result, rest = add_exactly(pool, column, exponent, sums)
    return result, rest, int(exponent)


@inline
def add_bad(pool, sums):
    """Return how many of a pool's tensors are non-finite."""
    bad = 0.0
    for t in range(pool[FIRST], pool[LAST]):
        bad += sums[t, BAD]
    return bad


@inline
def decide_measured(pools, laws, decisions):
    """Decide each pool by its norm; count in the last row the pools to write and the rare ones."""
    count = pools.shape[0]
    skipped = zeros(count, pools)
    for p in range(count):
        if decisions[p, BROKEN] != 0.0:
            skipped[pools[p, SET]] = 1
    last = decisions[count]
    last[MODE] = last[RARE] = 0.0
    for p in range(count):
        bad = skipped[pools[p, SET]] != 0
        decide(laws[p], pools[p, POLICY], int(pools[p, DIGITS]), bad, decisions[p])
        last[MODE] += decisions[p, MODE] != LEAVE
        last[RARE] += decisions[p, MODE] > MULTIPLY


@kernel
def decide_all(pools, laws, sums, decisions):
    """Write the norm and the decision of each pool, and the counts of `decide_measured`."""
    for p in range(pools.shape[0]):
        largest = laws[p, ORD] == math.inf
        total, _, exponent = add_tensors(pools[p], TOTAL, largest, sums)
        bad = add_bad(pools[p], sums)
        write_norm(laws[p], total, exponent, bad, decisions[p])
        if pools[p, REPEATED] != 0:
            terms, _, power = add_tensors(pools[p], TERMS, largest, sums)
            write_cancellation(laws[p], (total, exponent), (terms, power), decisions[p])
    decide_measured(pools, laws, decisions)


@inline
def add_squares(pool, column, sums):
    """Return (total, sure): a pool's sum of squares, and whether it is that of `add_tensors`."""
    total = error = doubt = 0.0
    no_exponents = True
    for t in range(pool[FIRST], pool[LAST]):
        rest = sums[t, ERROR] if column == TOTAL else 0.0
        total, error, doubt = add_sum((total, error, doubt), sums[t, column], rest)
        no_exponents &= sums[t, column + 1] == 0.0
    result = settled(total, error)
    return result, no_exponents and (not math.isfinite(result) or is_settled(total, error, doubt))


@inline
def decide_squares(pools, laws, sums, decisions):
    """Decide as `decide_all` does, by sums of squares; return whether the decisions are the same.

    They are, unless a sum has an exponent or its rounding is an exact tie. The code for these, and
    for other orders, takes as long to compile as all the rest.
    """
    right = True
    for p in range(pools.shape[0]):
        total, sure = add_squares(pools[p], TOTAL, sums)
        write_root(laws[p], math.sqrt(total), 0, add_bad(pools[p], sums), decisions[p])
        right &= sure
        if pools[p, REPEATED] != 0 and total > 0.0:
            terms, sure = add_squares(pools[p], TERMS, sums)
            decisions[p, CANCELLATION] = math.sqrt(terms) / math.sqrt(total)
            right &= sure
    decide_measured(pools, laws, decisions)
    return right


@inline
def are_elements(pool, sums):
    """Tell whether the sum of terms equals the sum of elements in each of a pool's tensors."""
    alike = True
    for t in range(pool[FIRST], pool[LAST]):
        alike &= sums[t, TERMS] == sums[t, TOTAL] and sums[t, TERMS_EXPONENT] == sums[t, EXPONENT]
    return alike


@inline
def write_total(pool, sums, out):
    """Write the sum of a pool's tensors as a row of sums, for order 2."""
    total, error, exponent = add_tensors(pool, TOTAL, False, sums)
    terms, power = total, exponent
    if not are_elements(pool, sums):
        terms, _, power = add_tensors(pool, TERMS, False, sums)
    out[TOTAL], out[EXPONENT], out[BAD] = total, exponent, add_bad(pool, sums)
    out[TERMS], out[TERMS_EXPONENT], out[ERROR] = terms, power, error


@kernel
def add_pools(pools, sums, out):
    """Write the sum of each pool's tensors; return whether one has a nonzero exponent."""
    scaled = False
    for p in range(pools.shape[0]):
        write_total(pools[p], sums, out[p])
        scaled |= out[p, EXPONENT] != 0.0 or out[p, TERMS_EXPONENT] != 0.0
    return scaled


@inline
def finite_norm(norm):
    """Return a norm as rules receive it: 0 for NaN, the largest float64 for Inf."""
    return 0.0 if math.isnan(norm) else min(norm, LARGEST)


@kernel
def write_norms(sums, unscale, divisors, norms):
    """Write the norms of tensors as rules receive them, with the bits of `clipping.outcome`.

    Return (norm, bad, plain): the norm of all, whether a tensor is non-finite, and whether all
    exponents are 0. Otherwise the norms are wrong.
    """
    bad, no_exponents = False, True
    for t in range(norms.size):
        norms[t] = finite_norm(math.sqrt(sums[t, TOTAL]) / unscale / divisors[t])
        bad |= sums[t, BAD] != 0.0
        no_exponents &= sums[t, EXPONENT] == 0.0
    total, _, _ = add_tensors((0, norms.size), TOTAL, False, sums)
    return finite_norm(math.sqrt(total) / unscale), bad, no_exponents


@inline
def has_vanished(total, x):
    """Tell whether all squares of a nonzero float64 array underflowed, so that `total` is 0."""
    some = False
    if total == 0.0 and x.itemsize == 8:
        for i in range(x.size):
            some |= x[i] != 0.0
    return some


@kernel
def measure(chunks, like, sums):
    """Write sums of squares in one pass; return whether all are safe or of zeros alone."""
    partial, zeros = empty(chunks.shape[0], sums), True
    for c in range(partial.size):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        partial[c] = array_of_squares(x)
        zeros &= not has_vanished(partial[c], x)
    return add_chunks(chunks, partial, zeros, sums)


@kernel
def measure_and_decide(chunks, like, pools, laws, sums, decisions):
    """Measure as `measure` does, and decide; return what `measure` does."""
    safe = measure(chunks, like, sums)
    decide_all(pools, laws, sums, decisions)
    return safe


@kernel
def scale_decided(chunks, pool_of, decisions, column, like):
    """Multiply tensors in place by their pools' factors, which are a column of the decisions."""
    for c in range(chunks.shape[0]):
        factor = as_computed(decisions[pool_of[chunks[c, OWNER]], column], like)
        if factor != 1.0:
            multiply(array_at(chunks[c, TARGET], chunks[c, LENGTH], like), factor)


@inline
def hold_chunk(chunk, pool, decisions, low, high, like):
    """Clamp the elements of a chunk to [low, high], if its pool is not skipped.

    CLAMPED of the pool's decision becomes 1 if an element was outside.
    """
    if decisions[pool, SKIPPED] == 0.0:
        least, most = elements.rounded(low, like), elements.rounded(high, like)
        if hold(written(chunk, like), least, most):
            decisions[pool, CLAMPED] = 1.0


@kernel
def clamp_decided(chunks, pool_of, decisions, members, low, high, like):
    """Call `hold_chunk` for the chunks of tensors ``members[0]`` to ``members[1] - 1``."""
    for c in range(chunks.shape[0]):
        owner = chunks[c, OWNER]
        if members[0] <= owner < members[1]:
            hold_chunk(chunks[c], pool_of[owner], decisions, low, high, like)

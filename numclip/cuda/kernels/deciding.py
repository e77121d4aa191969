"""From sums to factors: a *pool* is the tensors of one norm, a *set* pools skipped together.

Norm, decision and factor stay on the GPU.
"""

import math

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import (
    BINS,
    EMPTY,
    arrives_last,
    block_sum,
    lane_bins,
    with_terms,
)
from numclip.cuda.kernels.scalars import (
    decide,
    power_sum,
    scale_by_power,
    usable,
    write_cancellation,
    write_norm,
)


@inline
def add_rows(sums, column, k, last, step, bins):
    """Return bins with every `step`-th row of sums added, and their non-finite counts.

    `column` is TOTAL or TERMS; the exponent is in the next one.
    """
    while k < last:
        total, exponent = sums[k, column], sums[k, column + 1]
        small, large = total if exponent < 0.0 else 0.0, total if exponent > 0.0 else 0.0
        middle = total if exponent == 0.0 else 0.0
        bins = with_terms(bins, small, middle, large, sums[k, col.BAD])
        k += step
    return bins


@inline
def join(sums, column, first, last, scratch):
    """Return, in all threads, (total, exponent, non-finite count) of some rows of sums."""
    i = cuda.threadIdx.x
    return lane_bins(add_rows(sums, column, first + i, last, THREADS, EMPTY), i, 1, scratch)


@inline
def join_powers(sums, column, first, last, ord, scratch):
    """Return what `join` does for sums of powers: for orders but 2, all rows have one exponent."""
    total, exponent, bad = join(sums, column, first, last, scratch)
    if ord != 2.0:
        exponent = int(sums[first, column + 1]) if first < last else 0
    return total, exponent, bad


@inline
def over_one(total, exponent, ord, peak, ratio):
    """Return (total, exponent) of a sum of powers without its scale, see `formulas.power_sum`.

    The scale is that of `peak`; a peak of 0 says that the sum has none. For infinite order, the
    result is the peak times `ratio`, the largest magnitude over the largest part.
    """
    if ord == 2.0 or peak == 0.0:
        return total, exponent
    if not math.isfinite(peak):
        return peak, 0
    if ord < math.inf:
        return power_sum(total, usable(peak, ord), 0, ord)
    fraction, power = math.frexp(peak)
    odd = power & 1
    return math.ldexp(fraction * ratio, odd), (power - odd) >> 1


@inline
def add_parts(tensor, repeated, ord, law, partial, out, scratch):
    """Write the sum of a tensor's partial sums, and that for the magnitudes of its terms.

    `repeated` says that a tensor of its pool has terms: rows that can share an index.
    """
    first, last = tensor[col.FIRST], tensor[col.LAST]
    total, exponent, bad = join_powers(partial, col.TOTAL, first, last, ord, scratch)
    total, exponent = over_one(total, exponent, ord, law[col.PEAK], law[col.RATIO])
    terms, power = total, exponent
    if tensor[col.REPEATS] != 0:
        terms, power, _ = join_powers(partial, col.TERMS, first, last, ord, scratch)
        terms, power = over_one(terms, power, ord, law[col.TERMS_PEAK], law[col.TERMS_RATIO])
    elif repeated and ord != 2.0:  # with the exponent of other tensors' terms
        largest, power = over_one(1.0, 0, ord, law[col.TERMS_PEAK], law[col.TERMS_RATIO])
        terms = largest if ord == math.inf else scale_by_power(total, 2 * (exponent - power))
    if cuda.threadIdx.x == 0:
        out[col.TOTAL], out[col.EXPONENT], out[col.BAD] = total, exponent, bad
        out[col.TERMS], out[col.TERMS_EXPONENT] = terms, power


@inline
def add_tensors(pool, ord, law, sums, out, scratch):
    """Write the norm of a pool's tensors, and its cancellation: the norm of terms over that."""
    first, last = pool[col.FIRST], pool[col.LAST]
    total, exponent, bad = join_powers(sums, col.TOTAL, first, last, ord, scratch)
    terms, power = total, exponent
    if pool[col.REPEATED] != 0:
        terms, power, _ = join_powers(sums, col.TERMS, first, last, ord, scratch)
    if ord == math.inf:  # each row has the largest magnitude of all
        total, terms = sums[first, col.TOTAL], sums[first, col.TERMS]
    if cuda.threadIdx.x == 0:
        write_norm(law, total, exponent, bad, out)
        if pool[col.REPEATED] != 0:
            write_cancellation(law, (total, exponent), (terms, power), out)


@kernel
def decide_pools(tensors, pools, ord, laws, partial, tickets, sums, decisions):
    """Add up each tensor's partial sums, each pool's tensors, and decide; a block for each tensor.

    `ord` is the order of the partial sums. `tickets` has, for each pool, the number of tensors
    done; then, for each set, a flag that it is not finite; and last the number of blocks done. All
    are 0 again in the end.
    """
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    count = pools.shape[0]
    while t < tensors.shape[0]:
        p = tensors[t, col.POOL]
        repeated = pools[p, col.REPEATED] != 0
        add_parts(tensors[t], repeated, ord, laws[p], partial, sums[t], scratch)
        if arrives_last(tickets, p, pools[p, col.LAST] - pools[p, col.FIRST], scratch):
            add_tensors(pools[p], ord, laws[p], sums, decisions[p], scratch)
            if cuda.threadIdx.x == 0 and decisions[p, col.BROKEN] != 0.0:
                cuda.atomic.max(tickets, count + pools[p, col.SET], np.uint32(1))
        t += cuda.gridDim.x
    if arrives_last(tickets, tickets.shape[0] - 1, cuda.gridDim.x, scratch):
        decide_all(pools, laws, tickets, decisions, scratch)


@inline
def decide_all(pools, laws, tickets, decisions, scratch):
    """Decide for every pool; write to the last row how many have work, and rare work."""
    count = pools.shape[0]
    work, rare = 0.0, 0.0
    p = np.int64(cuda.threadIdx.x)
    while p < count:
        bad = tickets[count + pools[p, col.SET]] != 0
        decide(laws[p], pools[p, col.POLICY], int(pools[p, col.DIGITS]), bad, decisions[p])
        work += 1.0 if decisions[p, col.MODE] != col.LEAVE else 0.0
        rare += 1.0 if decisions[p, col.MODE] > col.MULTIPLY else 0.0
        p += THREADS
    work, rare = block_sum(work, 0.0, scratch), block_sum(rare, 0.0, scratch)
    if cuda.threadIdx.x == 0:  # the sums also waited until every thread had read the tickets
        decisions[count, col.MODE], decisions[count, col.RARE] = work, rare
    k = count + cuda.threadIdx.x
    while k < tickets.shape[0]:
        tickets[k] = 0
        k += THREADS

"""From sums to the factors of units, which have norms of their own.

A *family* is the units of tensors that have equally many: of one tensor, or examples, of which
every tensor has a part. A *slab* is ``2**BITS`` of a family's units, at most; a block takes a slab
at a time, the lanes of a unit share its partial sums. A family with a PARAM is bounded by a
fraction of that tensor's norms. BASE is the row of `base` that can have the family skipped.
"""

import math

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import (
    BINS,
    EMPTY,
    arrives_last,
    block_max,
    block_sum,
    lane_bins,
    lane_max,
    with_terms,
)
from numclip.cuda.kernels.deciding import add_rows, join, over_one
from numclip.cuda.kernels.scalars import (
    binned_square,
    larger,
    norm_of,
    relative,
    scale_by_power,
    write_factor,
)


@inline
def unit_of(slab):
    """Return the number of the thread's unit, its lane, and how many lanes there are."""
    i, bits = np.int64(cuda.threadIdx.x), slab[col.BITS]
    return slab[col.NUMBER] + (i & ((1 << bits) - 1)), i >> bits, np.int64(THREADS) >> bits


@inline
def writes_unit(slab, u, lane):
    """Tell whether the thread is the one that writes the results of its unit."""
    return lane == 0 and u - slab[col.NUMBER] < slab[col.COUNT]


@inline
def unit_total(slab, first, last, tensors, partial, scratch):
    """Return (total, exponent), the sum of powers of the thread's unit over some tensors."""
    u, lane, lanes = unit_of(slab)
    bins, t = EMPTY, first
    while t < last:
        start = tensors[t, col.FIRST] + u + lane * slab[col.UNITS]
        stop = tensors[t, col.LAST] if u < slab[col.UNITS] else start
        bins = add_rows(partial, col.TOTAL, start, stop, lanes * slab[col.UNITS], bins)
        t += 1
    total, exponent, _ = lane_bins(bins, cuda.threadIdx.x, np.int64(1) << slab[col.BITS], scratch)
    return total, exponent


@kernel
def find_unit_peaks(slabs, tensors, laws, partial, column, out):
    """Write the largest of each unit's partial maxima to a column; PEAK sets RATIO and ORD too."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < slabs.shape[0]:
        slab = slabs[s]
        u, lane, lanes = unit_of(slab)
        largest, t = 0.0, slab[col.FIRST]
        while t < slab[col.LAST]:
            part = tensors[t, col.FIRST] + u + lane * slab[col.UNITS]
            while part < tensors[t, col.LAST] and u < slab[col.UNITS]:
                largest = larger(largest, partial[part, col.TOTAL])
                part += lanes * slab[col.UNITS]
            t += 1
        largest = lane_max(largest, cuda.threadIdx.x, np.int64(1) << slab[col.BITS], scratch)
        if writes_unit(slab, u, lane):
            own = out[slab[col.ROW] + u]
            own[column] = largest
            if column == col.PEAK:
                own[col.RATIO], own[col.ORD] = 1.0, laws[slab[col.LAW], col.ORD]
        s += cuda.gridDim.x


@inline
def decide_slab(slab, tensors, law, partial, base, scratch, out):
    """Write the factors of a slab's units; return the mode of the one the thread wrote."""
    u, lane, _ = unit_of(slab)
    total, exponent = unit_total(slab, slab[col.FIRST], slab[col.LAST], tensors, partial, scratch)
    other, shift = 1.0, 0
    if slab[col.PARAM] >= 0:
        param = slab[col.PARAM]
        other, shift = unit_total(slab, param, param + 1, tensors, partial, scratch)
    if not writes_unit(slab, u, lane):
        return float(col.LEAVE)
    own = out[slab[col.ROW] + u]
    if law[col.ORD] != 2.0:  # the columns PEAK and RATIO are missing for 2
        total, exponent = over_one(total, 0, law[col.ORD], own[col.PEAK], own[col.RATIO])
    root, power = norm_of(total, exponent, law[col.ORD])
    norm = root / law[col.UNSCALE], power
    bound, compared, truncate_below = law[col.BOUND], norm, law[col.TRUNCATE_BELOW]
    if slab[col.PARAM] >= 0:
        bound, compared, truncate_below = relative(law, norm, (math.sqrt(other), shift))
    leaves = base[slab[col.BASE], col.SKIPPED] != 0.0
    limits = bound, bound, truncate_below, law[col.ROUNDOFF]
    write_factor(law, limits, compared, norm, leaves, int(slab[col.PRECISION]), own)
    return own[col.MODE]


@kernel
def decide_units(slabs, tensors, laws, partial, base, tickets, out):
    """Write the factor of every unit, and to the last row whether there is work, and rare work.

    `tickets` has the number of blocks that are done, a flag of work and one of rare work; all are
    0 again in the end.
    """
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    work, rare = 0.0, 0.0
    s = np.int64(cuda.blockIdx.x)
    while s < slabs.shape[0]:
        mode = decide_slab(slabs[s], tensors, laws[slabs[s, col.LAW]], partial, base, scratch, out)
        work += 1.0 if mode != col.LEAVE else 0.0
        rare += 1.0 if mode > col.MULTIPLY else 0.0
        s += cuda.gridDim.x
    work, rare = block_sum(work, 0.0, scratch), block_sum(rare, 0.0, scratch)
    if cuda.threadIdx.x == 0:
        cuda.atomic.max(tickets, 1, np.uint32(work > 0.0))
        cuda.atomic.max(tickets, 2, np.uint32(rare > 0.0))
    if arrives_last(tickets, 0, cuda.gridDim.x, scratch) and cuda.threadIdx.x == 0:
        last = out.shape[0] - 1
        out[last, col.MODE], out[last, col.RARE] = tickets[1], tickets[2]
        tickets[1], tickets[2] = 0, 0


@inline
def sum_slab(slab, bound, units, out, scratch):
    """Write the sum of squares of a slab's norms after clipping, to TOTAL and EXPONENT.

    BAD is how many units exceed the bound, TERMS the smallest factor, negated.
    """
    i = np.int64(cuda.threadIdx.x)
    bins, least = EMPTY, -1.0
    if i < slab[col.COUNT]:
        unit = units[slab[col.ROW] + slab[col.NUMBER] + i]
        small, middle, large = binned_square(unit[col.CLIPPED])
        bins = with_terms(bins, small, middle, large, 1.0 if unit[col.NORM] > bound else 0.0)
        least = -unit[col.SCALE]
    total, exponent, count = lane_bins(bins, i, 1, scratch)
    least = block_max(least, scratch)
    if i == 0:
        out[col.TOTAL], out[col.EXPONENT], out[col.BAD], out[col.TERMS] = (
            total,
            exponent,
            count,
            least,
        )


@kernel
def summarize_units(slabs, families, laws, units, tickets, partial, out):
    """Write each family's norm after clipping, smallest factor, and how many exceed the bound.

    `families` has FIRST and LAST of each family's slabs, `partial` a row for each slab.
    `tickets` counts the slabs of each family that are done; all are 0 again in the end.
    """
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < slabs.shape[0]:
        f = slabs[s, col.LAW]
        sum_slab(slabs[s], laws[f, col.BOUND], units, partial[s], scratch)
        first, last = families[f, col.FIRST], families[f, col.LAST]
        if arrives_last(tickets, f, last - first, scratch):
            total, exponent, count = join(partial, col.TOTAL, first, last, scratch)
            least, k = -1.0, first + cuda.threadIdx.x
            while k < last:
                least = larger(least, partial[k, col.TERMS])
                k += THREADS
            least = block_max(least, scratch)
            if cuda.threadIdx.x == 0:
                out[f, col.AFTER] = scale_by_power(math.sqrt(total), int(exponent))
                out[f, col.LEAST], out[f, col.CLIPPED_COUNT] = -least, count
        s += cuda.gridDim.x

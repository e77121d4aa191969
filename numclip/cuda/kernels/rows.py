"""Rows that share an index: kernels that measure the sums of rows, or write them.

The table of groups has, for each index, the start of its rows in `order` and their number. A
*share* is a row of another table: some groups of a tensor, in a strip of columns that a block
can hold. A thread has a column, a lane (lanes share the rows of a group), and a team (teams take
groups in turn). Sums are in two float64, and depend on the tables alone, not on the grid.
"""

import math

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import (
    BINS,
    EMPTY,
    block_max,
    block_sum,
    lane_bins,
    lane_sum,
    with_square,
)
from numclip.cuda.kernels.packets import load, rounded, size_of, store
from numclip.cuda.kernels.scalars import (
    larger,
    power_term,
    settled,
    two_sum,
    usable,
)
from numclip.formulas import BIN_EXPONENT, BIN_SCALE

THREAD_BITS = THREADS.bit_length() - 1


@inline
def number_of(share, part):
    """Return the index in a row of a thread's stored number; `part` is 1 for the imaginary one."""
    column = share[col.COLUMN] + (np.int64(cuda.threadIdx.x) & ((1 << share[col.WIDTH]) - 1))
    return column * share[col.COMPONENTS] + part


@inline
def lane_of(share):
    """Return the lane of a thread in its team."""
    return np.int64(cuda.threadIdx.x) >> (THREAD_BITS - share[col.LANES])


@inline
def teams_of(share):
    """Return how many teams a block has."""
    return np.int64(THREADS) >> (share[col.WIDTH] + share[col.LANES])


@inline
def team_of(share):
    """Return the team of a thread."""
    return (np.int64(cuda.threadIdx.x) >> share[col.WIDTH]) & (teams_of(share) - 1)


@inline
def element_of(share, row, number, like):
    """Return a stored number of a row, and whether it, or its complex partner, is not finite."""
    address = share[col.SOURCE] + (row * share[col.LENGTH] + number) * size_of(like)
    value = np.float64(load(address, like))
    odd = not math.isfinite(value)
    if share[col.COMPONENTS] == 2:
        other = size_of(like) if number & 1 == 0 else -size_of(like)
        odd = odd or not math.isfinite(np.float64(load(address + other, like)))
    return value, odd


@inline
def lane_sums(share, group, number, order, masked, scale, like):
    """Return a lane's share of a group's sum: (sum, error, sum of magnitudes, non-finite count).

    Elements are multiplied by `scale`; those that are not finite count as 0 where `masked`.
    """
    total, error, terms, bad = 0.0, 0.0, 0.0, 0.0
    k = group[col.START] + lane_of(share)
    stop = group[col.START] + group[col.MEMBERS]
    while k < stop:
        value, odd = element_of(share, order[k], number, like)
        if odd:
            bad += 1.0
            value = 0.0 if masked else value
        value *= scale
        total, rest = two_sum(total, value)
        error += rest
        terms += abs(value)
        k += np.int64(1) << share[col.LANES]
    return total, error, terms, bad


@inline
def team_sums(share, total, error, terms, scratch):
    """Return a sum and that of magnitudes in the first lane of each team, 0 in the others."""
    if share[col.LANES] == 0:
        return settled(total, error), terms
    i, apart = np.int64(cuda.threadIdx.x), np.int64(THREADS) >> share[col.LANES]
    total = lane_sum(total, error, i, apart, scratch)
    terms = lane_sum(terms, 0.0, i, apart, scratch)
    return (total, terms) if i < apart else (0.0, 0.0)


@inline
def sums_of(share, g, groups, order, part, reading, scratch):
    """Return (sum, sum of magnitudes, lane's non-finite count) of group `g` in a thread's column.

    All threads of a block must call this together. `reading` is (masked, scale, like) of
    `lane_sums`.
    """
    total, error, terms, bad = 0.0, 0.0, 0.0, 0.0
    number = number_of(share, part)
    if g < share[col.END] and number < share[col.LENGTH]:
        masked, scale, like = reading
        total, error, terms, bad = lane_sums(share, groups[g], number, order, masked, scale, like)
    total, terms = team_sums(share, total, error, terms, scratch)
    return total, terms, bad


@inline
def share_squares(share, groups, order, reading, scratch):
    """Return (total, exponent, non-finite count) of a share's squared sums, and of magnitudes'."""
    sums, terms = EMPTY, EMPTY
    g = share[col.BEGIN]
    while g < share[col.END]:
        own, part = g + team_of(share), np.int64(0)
        while part < share[col.COMPONENTS]:
            value, size, odd = sums_of(share, own, groups, order, part, reading, scratch)
            sums = with_square(sums, value, odd, reading[2])
            terms = with_square(terms, size, 0.0, reading[2])
            part += 1
        g += teams_of(share)
    i = np.int64(cuda.threadIdx.x)
    return lane_bins(sums, i, 1, scratch), lane_bins(terms, i, 1, scratch)


@kernel
def sum_row_squares(shares, groups, order, tensors, like, out):
    """Write each share's squared norms of sums and of sums of magnitudes. Reads all rows once.

    Where a sum exceeds float64 they are read again, divided by a power of two.
    """
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < shares.shape[0]:
        share, shift = shares[s], 0
        masked = tensors[share[col.OWNER], col.ZEROING] != 0
        sums, terms = share_squares(share, groups, order, (masked, 1.0, like), scratch)
        if size_of(like) == 8 and not math.isfinite(terms[0]):
            reading, shift = (masked, 1.0 / BIN_SCALE, like), BIN_EXPONENT
            sums, terms = share_squares(share, groups, order, reading, scratch)
        if cuda.threadIdx.x == 0:
            found = out[share[col.PART]]
            found[col.TOTAL], found[col.EXPONENT] = sums[0], sums[1] + shift
            found[col.BAD] = sums[2]
            found[col.TERMS], found[col.TERMS_EXPONENT] = terms[0], terms[1] + shift
        s += cuda.gridDim.x


@kernel
def max_row_magnitude(shares, groups, order, tensors, like, out):
    """Write each share's largest parts of sums and of their terms. Reads all rows once.

    A sum that overflows float64 is counted as not finite.
    """
    scratch = cuda.shared.array((2, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < shares.shape[0]:
        share = shares[s]
        reading = tensors[share[col.OWNER], col.ZEROING] != 0, 1.0, like
        largest, terms, bad = 0.0, 0.0, 0.0
        g = share[col.BEGIN]
        while g < share[col.END]:
            own, part = g + team_of(share), np.int64(0)
            while part < share[col.COMPONENTS]:
                value, size, odd = sums_of(share, own, groups, order, part, reading, scratch)
                largest, terms = larger(largest, abs(value)), larger(terms, size)
                bad += odd + (0.0 if math.isfinite(value) else 1.0)
                part += 1
            g += teams_of(share)
        largest, terms = block_max(largest, scratch), block_max(terms, scratch)
        bad = block_sum(bad, 0.0, scratch)
        if cuda.threadIdx.x == 0:
            found = out[share[col.PART]]
            found[col.TOTAL], found[col.EXPONENT], found[col.BAD] = largest, 0.0, bad
            found[col.TERMS], found[col.TERMS_EXPONENT] = terms, 0.0
        s += cuda.gridDim.x


@inline
def ratios_of(share, g, groups, order, reading, law, scratch):
    """Return a thread's magnitudes of a group's sum and of its terms, each over its scale."""
    value, size = 0.0, 0.0
    scale = usable(law[col.PEAK], law[col.ORD])
    terms_scale = usable(law[col.TERMS_PEAK], law[col.ORD])
    part = np.int64(0)
    while part < share[col.COMPONENTS]:
        total, terms, _ = sums_of(share, g, groups, order, part, reading, scratch)
        value = math.hypot(value, total / scale)
        size = math.hypot(size, terms / terms_scale)
        part += 1
    return value, size


@inline
def share_powers(share, groups, order, reading, law, scratch):
    """Return a share's sums of powers, of sums and of terms; for order inf, the largest ratios."""
    total, error, terms, ord = 0.0, 0.0, 0.0, law[col.ORD]
    g = share[col.BEGIN]
    while g < share[col.END]:
        value, size = ratios_of(share, g + team_of(share), groups, order, reading, law, scratch)
        if ord == math.inf:
            total, terms = larger(total, value), larger(terms, size)
        else:
            total, rest = two_sum(total, power_term(value, ord))
            error += rest
            terms += power_term(size, ord)
        g += teams_of(share)
    if ord == math.inf:
        return block_max(total, scratch), block_max(terms, scratch)
    return block_sum(total, error, scratch), block_sum(terms, 0.0, scratch)


@kernel
def sum_row_powers(shares, groups, order, tensors, laws, like, out):
    """Write each share's sums of ``(|x| / scale) ** ord``, of sums and of their terms.

    For infinite order, write the largest ratios.
    """
    scratch = cuda.shared.array((2, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < shares.shape[0]:
        share = shares[s]
        tensor = tensors[share[col.OWNER]]
        reading = tensor[col.ZEROING] != 0, 1.0, like
        total, terms = share_powers(share, groups, order, reading, laws[tensor[col.POOL]], scratch)
        if cuda.threadIdx.x == 0:
            out[share[col.PART], col.TOTAL], out[share[col.PART], col.TERMS] = total, terms
        s += cuda.gridDim.x


@inline
def write_sums(share, groups, order, reading, to, scratch):
    """Write the sum of each of a share's groups, rounded once, to the group's TARGET_ROW.

    `to` is a 0 of the type that the sums are stored as.
    """
    g = share[col.BEGIN]
    while g < share[col.END]:
        own, part = g + team_of(share), np.int64(0)
        while part < share[col.COMPONENTS]:
            value, _, _ = sums_of(share, own, groups, order, part, reading, scratch)
            number = number_of(share, part)
            if own < share[col.END] and number < share[col.LENGTH] and lane_of(share) == 0:
                element = groups[own, col.TARGET_ROW] * share[col.LENGTH] + number
                store(share[col.TARGET] + element * size_of(to), rounded(value, to), to)
            part += 1
        g += teams_of(share)


@kernel
def sum_rows(shares, groups, order, like, to):
    """Write the sum of each group of rows, in the type of `to`. Reads all rows once."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < shares.shape[0]:
        write_sums(shares[s], groups, order, (False, 1.0, like), to, scratch)
        s += cuda.gridDim.x


@kernel
def sum_scaled_rows(shares, groups, order, tensors, decisions, like):
    """Write the sum of each group of rows times the factor of their pool, if that is not skipped.

    A factor of the mode TRUNCATE or CLEAN was applied to the rows before.
    """
    scratch = cuda.shared.array((2, THREADS), np.float64)
    s = np.int64(cuda.blockIdx.x)
    while s < shares.shape[0]:
        decision = decisions[tensors[shares[s, col.OWNER], col.POOL]]
        if decision[col.SKIPPED] == 0.0:
            factor = decision[col.FACTOR] if decision[col.MODE] == col.MULTIPLY else 1.0
            write_sums(shares[s], groups, order, (False, factor, like), like, scratch)
        s += cuda.gridDim.x

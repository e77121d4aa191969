"""Units of arrays: their sums along rows, their factors, and what these make of them.

Shares and types are as in `cpu`.
"""

import math

import numpy as np

from numclip.host.kernels.columns import add_parts, column_squares, scale_columns
from numclip.host.kernels.cpu import copy, multiply, multiply_into, squares_of
from numclip.host.kernels.elements import as_computed
from numclip.host.kernels.pools import _parts
from numclip.host.kernels.tuning import COLUMN_ROWS, COLUMNS
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import (
    AFTER,
    BOUND,
    CLIPPED,
    CLIPPED_COUNT,
    COARSE,
    LEAST,
    LEAVE,
    MODE,
    MULTIPLY,
    NORM,
    ORD,
    PEAK,
    RARE,
    RATIO,
    ROUNDOFF,
    SCALE,
    TINY,
    UNSCALE,
)

norm_of, relative, write_factor = _parts.norm_of, _parts.relative, _parts.write_factor
binned_square, joined_bins = _parts.binned_square, _parts.joined_bins
scale_by_power, larger, is_safe = _parts.scale_by_power, _parts.larger, _parts.is_safe
factor_of = _parts.factor_of


@kernel
def row_squares(begin, end, x, out):
    """Write the sum of squares of each row, added as those of the chunks of a tensor are."""
    for r in range(begin, end):
        out[r] = squares_of(x[r])


@kernel
def scale_rows(begin, end, x, factors, out):
    """Multiply each row by its factor; a factor of 1 copies bits, in place it touches nothing."""
    for r in range(begin, end):
        factor = factors[r]
        if x.ctypes.data == out.ctypes.data:
            if factor != 1.0:
                multiply(x[r], factor)
        elif factor != 1.0:
            multiply_into(x[r], factor, out[r])
        else:
            copy(x[r], out[r])


@kernel
def decide_units(sums, params, law, digits, leaves, out, last):
    """Write the factor of every unit, and add to `last` if there is work, and rare work.

    `sums` are totals and exponents, `params` likewise those of the parameters if they count.
    """
    for u in range(out.shape[0]):
        own = out[u]
        own[ORD] = law[ORD]
        root, power = norm_of(sums[0, u], int(sums[1, u]), law[ORD], own[PEAK], own[RATIO])
        if law[ORD] != 2.0:  # magnitudes were taken over a power of two
            power += int(sums[1, u])
        norm = root / law[UNSCALE], power
        bound, judged, coarse = law[BOUND], norm, law[COARSE]
        if params.shape[1]:
            owner = math.sqrt(params[0, u]), int(params[1, u])
            bound, judged, coarse = relative(law, norm, owner)
        limits = bound, bound, coarse, law[ROUNDOFF]
        write_factor(law, limits, judged, norm, leaves, digits, own)
        last[MODE] += own[MODE] != LEAVE
        last[RARE] += own[MODE] > MULTIPLY


@inline
def is_lossless(total, x, unit):
    """Tell whether a unit's sum of squares in float64 lost nothing: of zeros, too, it is right."""
    if total != 0.0:
        return is_safe(total)
    return not x[unit // x.shape[2], :, unit % x.shape[2]].any()


@inline
def unit_squares(x, digits, out):
    """Write the sums of squares of rows, or of columns; tell whether all are right.

    `x` has the shape (outer, reduced, inner), of rows the last is 1.
    """
    if x.shape[2] == 1:
        row_squares(0, x.shape[0], x.reshape(x.shape[0], x.shape[1]), out)
    else:
        parts = np.empty((x.shape[0], -(-x.shape[1] // COLUMN_ROWS), x.shape[2]))
        blocks = x.shape[0] * parts.shape[1] * -(-x.shape[2] // COLUMNS)
        column_squares(0, blocks, x, COLUMN_ROWS, parts)
        if parts.shape[1] > 1:
            add_parts(parts)
        for unit in range(out.size):
            out[unit] = parts[unit // x.shape[2], 0, unit % x.shape[2]]
    if digits == 53:
        for unit in range(out.size):
            if not is_lossless(out[unit], x, unit):
                return False
    return True


@kernel
def clip_little(x, params, law, digits, out):
    """Clip units, see `unit_squares`; tell whether that is done, and else nothing is written.

    Not where sums lose something, or results are to be truncated.
    """
    count = x.shape[0] * x.shape[2]
    sums, owners = np.zeros(count), np.zeros(count if params.size else 0)
    if not unit_squares(x, digits, sums):
        return False
    if params.size and not unit_squares(params, digits, owners):
        return False
    factors, clips = np.full(count, as_computed(1.0, x)), False
    for unit in range(count):
        norm = math.sqrt(sums[unit]), 0
        bound, coarse = law[BOUND], law[COARSE]
        if params.size:
            bound, norm, coarse = relative(law, norm, (math.sqrt(owners[unit]), 0))
        mantissa, power, small = factor_of(
            norm[0], norm[1], bound, bound, coarse, law[ROUNDOFF], digits, law[TINY]
        )
        if small:
            return False
        if mantissa != 1.0 or power != 0:
            factors[unit], clips = scale_by_power(mantissa, power), True
    if not clips and x.ctypes.data == out.ctypes.data:
        return True
    if x.shape[2] == 1:
        shape = x.shape[0], x.shape[1]
        scale_rows(0, count, x.reshape(shape), factors, out.reshape(shape))
    else:
        shape = x.shape[0], x.shape[2]
        scale_columns(0, x.shape[0] * x.shape[1], x, factors.reshape(shape), out)
    return True


@kernel
def summarize(units, bound, out):
    """Write the norm of all units after clipping, the smallest factor, how many are clipped."""
    small = middle = large = 0.0
    least = -1.0
    count = 0
    for u in range(units.shape[0]):
        parts = binned_square(units[u, CLIPPED])
        small, middle, large = small + parts[0], middle + parts[1], large + parts[2]
        least = larger(least, -units[u, SCALE])
        count += units[u, NORM] > bound
    total, exponent = joined_bins(small, middle, large)
    out[AFTER] = scale_by_power(math.sqrt(total), exponent)
    out[LEAST], out[CLIPPED_COUNT] = -least, count

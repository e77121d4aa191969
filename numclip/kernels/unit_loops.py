"""Units of arrays: their sums along rows, their factors, and what these make of them.

Shares and types are as in `cpu`.
"""

import math

from numclip.kernels.cpu import copy, multiply, multiply_into, squares_of
from numclip.kernels.jit import kernel
from numclip.kernels.pools import _parts
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
    UNSCALE,
)

norm_of, relative, write_factor = _parts.norm_of, _parts.relative, _parts.write_factor
binned_square, joined_bins = _parts.binned_square, _parts.joined_bins
scale_by_power, larger = _parts.scale_by_power, _parts.larger


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

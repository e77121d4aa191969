"""Units of arrays: their sums along rows or columns, their factors, and their scaling.

`begin`, `end` and `like` are as in `cpu`.
"""

import math

import numpy as np

from numclip.formulas import SLACK
from numclip.host.kernels.columns import add_parts, column_squares, row_at, scale_columns
from numclip.host.kernels.cpu import copy, multiply, multiply_into, squares_of
from numclip.host.kernels.elements import array_at, as_computed
from numclip.host.kernels.examples import UNKNOWN
from numclip.host.kernels.scalars import (
    binned_square,
    factor_of,
    is_safe,
    larger,
    norm_of,
    relative,
    scale_by_power,
    sum_of_bins,
    write_factor,
)
from numclip.host.kernels.spans import sum_of
from numclip.host.kernels.tuning import COLUMN_ROWS, COLUMNS
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import (
    AFTER,
    BOUND,
    CLIPPED,
    CLIPPED_COUNT,
    EPS,
    FACTOR,
    LEAST,
    LEAVE,
    MODE,
    MULTIPLY,
    NORM,
    ORD,
    RARE,
    ROUNDOFF,
    SCALE,
    SKIPPED,
    TINY,
    TRUNCATE_BELOW,
    UNSCALE,
)

# Columns of a family: the end of its units, the digits of factors, whether bounds are fractions of
# the parameters' norms, and its row of `base`.
END, FAMILY_DIGITS, RELATES, BASE, FAMILY_COLUMNS = range(5)
# Columns of a small array: its address, its lengths before, in and after the reduced axes, the
# address of its parameter (0 if that does not count) and its first unit.
ADDRESS, OUTER, REDUCED, INNER, PARAM, UNIT = range(6)
LOW, HIGH = 2.0**-930, 2.0**930  # quotients of numbers between them neither over- nor underflow


@kernel
def row_squares(begin, end, x, out):
    """Write the sum of squares of each row, added chunk by chunk as those of tensors are."""
    part = np.int64(x.ctypes.data), x.shape[1] * x.itemsize, x.shape[1]
    for r in range(begin, end):
        out[r] = squares_of(row_at(r, part, x))


@kernel
def scale_rows(begin, end, x, factors, out):
    """Multiply each row by its factor; a factor of 1 copies bits or, in place, writes nothing."""
    step = x.shape[1] * x.itemsize, x.shape[1]
    source, target = np.int64(x.ctypes.data), np.int64(out.ctypes.data)
    for r in range(begin, end):
        factor, row = factors[r], row_at(r, (target, *step), out)
        if source == target:
            if factor != 1.0:
                multiply(row, factor)
        elif factor != 1.0:
            multiply_into(row_at(r, (source, *step), x), factor, row)
        else:
            copy(row_at(r, (source, *step), x), row)


@inline
def decide_unit(sums, params, relates, law, digits, leaves, out):
    """Write the decision of a unit, by (total, exponent) of its sum and of its parameter's."""
    root, power = norm_of(sums[0], int(sums[1]), law[ORD])
    norm = root / law[UNSCALE], power
    bound, compared, truncate_below = law[BOUND], norm, law[TRUNCATE_BELOW]
    if relates:
        param = math.sqrt(params[0]), int(params[1])
        bound, compared, truncate_below = relative(law, norm, param)
    limits = bound, bound, truncate_below, law[ROUNDOFF]
    write_factor(law, limits, compared, norm, leaves, digits, out)


@kernel
def decide_units(families, sums, params, laws, base, out):
    """Write the decision of every unit; the last row counts units to write and rare ones.

    `sums` are totals and exponents, `params` those of parameters, for families that have these.
    `base` holds decisions that can skip a family; it may be empty.
    """
    last, first = out[-1], 0
    last[:] = 0.0
    for f in range(families.shape[0]):
        own = families[f]
        leaves = base.shape[0] > 0 and base[own[BASE], SKIPPED] != 0.0
        for u in range(first, own[END]):
            relates, digits = own[RELATES] != 0, int(own[FAMILY_DIGITS])
            decide_unit(sums[:, u], params[:, u], relates, laws[f], digits, leaves, out[u])
            last[MODE] += out[u, MODE] != LEAVE
            last[RARE] += out[u, MODE] > MULTIPLY
        first = own[END]


@inline
def is_lossless(total, x, unit):
    """Tell whether a unit's float64 sum of squares is in the safe range, or of zeros alone."""
    if total != 0.0:
        return is_safe(total)
    return not x[unit // x.shape[2], :, unit % x.shape[2]].any()


@inline
def unit_squares(x, digits, out):
    """Write the sums of squares of units, rows or columns; return whether none lost something.

    `x` has the shape (outer, reduced, inner); units are rows if `inner` is 1.
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


@inline
def units_at(address, lengths, like):
    """Return the storage at an address as (outer, reduced, inner), see `unit_squares`."""
    outer, reduced, inner = lengths[0], lengths[1], lengths[2]
    return array_at(address, outer * reduced * inner, like).reshape((outer, reduced, inner))


@inline
def write_squares(address, row, digits, like, sums):
    """Write the totals and exponents of an array's units; return what `unit_squares` does."""
    x = units_at(address, row[OUTER:], like)
    own = sums[:, row[UNIT] : row[UNIT] + x.shape[0] * x.shape[2]]
    own[1, :] = 0.0
    return unit_squares(x, digits, own[0])


@kernel
def measure_little(arrays, digits, like, sums, params, right):
    """Call `write_squares` for arrays, and for their parameters if these count.

    `right` receives for each array whether its sums lost nothing; return whether all did not.
    """
    done = True
    for k in range(arrays.shape[0]):
        own = arrays[k]
        right[k] = write_squares(own[ADDRESS], own, digits, like, sums)
        if own[PARAM] != 0:
            right[k] &= write_squares(own[PARAM], own, digits, like, params)
        done &= right[k]
    return done


@inline
def one_factor(total, owner, law, digits, relates):
    """Return the factor for a unit's sum of squares.

    It is UNKNOWN where a sum is UNKNOWN, or results must be truncated.
    """
    if total < 0.0 or owner < 0.0:
        return UNKNOWN
    norm, bound, truncate_below = (math.sqrt(total), 0), law[BOUND], law[TRUNCATE_BELOW]
    if relates:
        bound, norm, truncate_below = relative(law, norm, (math.sqrt(owner), 0))
    mantissa, power, small = factor_of(
        norm[0], norm[1], bound, bound, truncate_below, law[ROUNDOFF], digits, law[TINY]
    )
    return UNKNOWN if small else scale_by_power(mantissa, power)


@inline
def write_quotients(sums, owners, law, digits, out):
    """Write factors before they are rounded down, NaN where a number is near a limit.

    The loop has no branches, so that it is vectorised, eight at once. The bits are those of
    `decisions.factor_of`: except near limits, a quotient's do not depend on the exponents.
    """
    bound, eps, relates = law[BOUND], law[EPS], owners.size > 0
    truncate_below, tiny, margin = law[TRUNCATE_BELOW], law[TINY], 1.0 + law[ROUNDOFF]
    slack = 1.0 - (SLACK if digits > 24 else 2.0 * SLACK)
    in_range = bound == math.inf or LOW < bound < HIGH
    for u in range(sums.size):
        ratio, root = np.sqrt(sums[u]), 1.0
        if relates:
            root = np.sqrt(owners[u])
            root = eps if root < eps else root
            ratio /= root
        factor = bound / ratio / margin * slack
        right = in_range & (ratio < HIGH) & (factor >= tiny) & (bound >= truncate_below / root)
        factor = factor if right else math.nan
        out[u] = 1.0 if in_range & (ratio <= bound) else factor


@kernel
def unit_factors(begin, end, sums, owners, law, digits, out):
    """Write each unit's factor by its sum of squares, UNKNOWN where the general path must decide.

    `owners` are the sums of the parameters, empty if these do not count.
    """
    relates, own = owners.size > 0, out[begin:end]
    write_quotients(sums[begin:end], owners[begin:end], law, digits, own)
    bits, mask = own.view(np.int64), np.int64(-1) << (53 - digits)
    for u in range(bits.size):
        bits[u] &= mask
    for u in range(begin, end):
        if math.isnan(out[u]):
            owner = owners[u] if relates else 0.0
            out[u] = one_factor(sums[u], owner, law, digits, relates)


@kernel
def row_factors(begin, end, x, ord, law, digits, out):
    """Write the factor of each real row by its norm of an order other than 2, or UNKNOWN."""
    part = np.int64(x.ctypes.data), x.shape[1] * x.itemsize, x.shape[1]
    for r in range(begin, end):
        row = row_at(r, part, x)
        total, exponent = sum_of(row, ord)
        norm, power = norm_of(total, exponent, ord)
        mantissa, shift, small = factor_of(
            norm,
            power,
            law[BOUND],
            law[BOUND],
            law[TRUNCATE_BELOW],
            law[ROUNDOFF],
            digits,
            law[TINY],
        )
        out[r] = UNKNOWN if small else scale_by_power(mantissa, shift)


@kernel
def mark_lossy(x, sums):
    """Write UNKNOWN for sums of squares that lost something; `x` is as in `unit_squares`."""
    for unit in range(sums.size):
        if not is_lossless(sums[unit], x, unit):
            sums[unit] = UNKNOWN


@inline
def scale_units(x, factors):
    """Multiply the units of `x`, see `unit_squares`, in place by their factors."""
    if x.shape[2] == 1:
        rows = x.reshape(x.shape[0], x.shape[1])
        scale_rows(0, factors.size, rows, factors, rows)
    else:
        shape = x.shape[0], x.shape[2]
        scale_columns(0, x.shape[0] * x.shape[1], x, factors.reshape(shape), x)


@kernel
def scale_little(begin, end, arrays, units, like):
    """Multiply the units of arrays in place by the factors in `units`, the decisions."""
    for k in range(begin, end):
        own = arrays[k]
        x = units_at(own[ADDRESS], own[OUTER:], like)
        factors, clips = np.full(x.shape[0] * x.shape[2], as_computed(1.0, x)), False
        for unit in range(factors.size):
            factors[unit] = units[own[UNIT] + unit, FACTOR]
            clips |= factors[unit] != 1.0
        if clips:
            scale_units(x, factors)


@inline
def summarize_units(units, bound, out):
    """Write the norm of some units after clipping, the smallest factor, how many are clipped."""
    small = middle = large = 0.0
    least = -1.0
    count = 0
    for u in range(units.shape[0]):
        parts = binned_square(units[u, CLIPPED])
        small, middle, large = small + parts[0], middle + parts[1], large + parts[2]
        least = larger(least, -units[u, SCALE])
        count += units[u, NORM] > bound
    total, exponent = sum_of_bins(small, middle, large)
    out[AFTER] = scale_by_power(math.sqrt(total), exponent)
    out[LEAST], out[CLIPPED_COUNT] = -least, count


@kernel
def summarize(families, units, laws, out):
    """Call `summarize_units` for every family that has units."""
    first = 0
    for f in range(families.shape[0]):
        end = families[f, END]
        if end > first:
            summarize_units(units[first:end], laws[f, BOUND], out[f])
        first = end

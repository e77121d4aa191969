"""Units of an array of `spans`, rows or columns of it, each clipped by its own norm.

Sums and factors are those of `host.units`. Where that falls back from columns to a transposed
copy, kernels return RARE, and the caller does the same.
"""

import math

import numpy as np

from numclip.host.kernels.columns import add_parts, column_squares, scale_columns
from numclip.host.kernels.elements import as_computed
from numclip.host.kernels.one_norm import DIGITS, ROUNDOFF, TINY, TRUNCATE_BELOW
from numclip.host.kernels.scalars import factor_of, is_safe, scale_by_power, settled
from numclip.host.kernels.spans import (
    BAD_BOUND,
    COMPLEX,
    KIND,
    LENGTH,
    NARROW_LIKE,
    NARROW_LIMITS,
    NARROW_PRECISION,
    RARE,
    UNCHANGED,
    WIDE,
    WIDE_LIKE,
    WIDE_LIMITS,
    WIDE_PRECISION,
    WRITTEN,
    array_of,
    field,
    rescued_squares,
    scale_array,
)
from numclip.host.kernels.tuning import COLUMN_ROWS, COLUMNS
from numclip.host.runtime.jit import inline, kernel

# Of a factor, and whether results must be truncated; before `decide_units`, total and exponent.
MANTISSA, POWER, TRUNCATES = range(3)


@inline
def decide_units(units, size, bound, limits):
    """Replace sums by factors; return UNCHANGED, WRITTEN (multiply) or RARE (truncate)."""
    truncate_below = math.sqrt(float(size)) * limits[TRUNCATE_BELOW]
    digits = int(limits[DIGITS])
    done = UNCHANGED
    for u in range(units.shape[0]):
        norm, power = math.sqrt(units[u, MANTISSA]), int(units[u, POWER])
        mantissa, shift, small = factor_of(
            norm, power, bound, bound, truncate_below, limits[ROUNDOFF], digits, limits[TINY]
        )
        units[u, MANTISSA], units[u, POWER], units[u, TRUNCATES] = mantissa, shift, small
        if small:
            done = RARE
        elif done == UNCHANGED and (mantissa != 1.0 or shift != 0):
            done = WRITTEN
    return done


@inline
def clip_rows_of(x, count, bound, limits, precision):
    """Clip each of `count` rows of an array; return the outcome."""
    size = x.size // count
    units = np.empty((count, 3))
    for u in range(count):
        total, lost, exponent = rescued_squares(x[u * size : (u + 1) * size])
        units[u, MANTISSA], units[u, POWER] = settled(total, lost), exponent
    done = decide_units(units, size, bound, limits)
    if done == UNCHANGED:
        return done
    for u in range(count):
        mantissa, power = units[u, MANTISSA], int(units[u, POWER])
        if mantissa != 1.0 or power != 0:
            row = x[u * size : (u + 1) * size]
            scale_array(row, mantissa, power, units[u, TRUNCATES] != 0.0, precision)
    return WRITTEN


@inline
def clip_columns_of(x, components, bound, limits, like):
    """Clip each (outer, inner) unit of a 3-d array; return the outcome, RARE if left undone."""
    outer, reduced, inner = x.shape
    parts = max(1, -(-reduced // COLUMN_ROWS))
    sums = np.empty((outer, parts, inner))
    column_squares(0, outer * parts * -(-inner // COLUMNS), x, COLUMN_ROWS, sums)
    if parts > 1:
        add_parts(sums)
    units = np.zeros((outer * inner // components, 3))
    for u in range(units.shape[0]):
        a, i = divmod(u * components, inner)
        for k in range(components):
            units[u, MANTISSA] += sums[a, 0, i + k]
        if x.itemsize == 8 and not is_safe(units[u, MANTISSA]):
            return RARE
    done = decide_units(units, reduced * components, bound, limits)
    if done != WRITTEN:
        return done
    factors = np.empty((outer, inner), like.dtype)
    for u in range(units.shape[0] * components):
        mantissa, power = units[u // components, MANTISSA], int(units[u // components, POWER])
        factors[u // inner, u % inner] = as_computed(scale_by_power(mantissa, power), like)
    scale_columns(0, outer * reduced, x, factors, x)
    return done


@kernel
def clip_rows(rows, count, bound):
    """Clip each of `count` rows of the first tensor; return the outcome."""
    if not bound >= 0.0:
        return BAD_BOUND
    if field(rows, 0, LENGTH) == 0:
        return UNCHANGED
    if field(rows, 0, KIND) & WIDE:
        x = array_of(rows, 0, WIDE_LIKE)
        return clip_rows_of(x, count, bound, WIDE_LIMITS, WIDE_PRECISION)
    y = array_of(rows, 0, NARROW_LIKE)
    return clip_rows_of(y, count, bound, NARROW_LIMITS, NARROW_PRECISION)


@kernel
def clip_columns(rows, outer, reduced, bound):
    """Clip each unit of the first tensor, of shape (outer, reduced, inner), or return RARE."""
    if not bound >= 0.0:
        return BAD_BOUND
    length = field(rows, 0, LENGTH)
    if length == 0:
        return UNCHANGED
    shape = outer, reduced, length // (outer * reduced)
    components = 2 if field(rows, 0, KIND) & COMPLEX else 1
    if field(rows, 0, KIND) & WIDE:
        x = array_of(rows, 0, WIDE_LIKE).reshape(shape)
        return clip_columns_of(x, components, bound, WIDE_LIMITS, WIDE_LIKE)
    y = array_of(rows, 0, NARROW_LIKE).reshape(shape)
    return clip_columns_of(y, components, bound, NARROW_LIMITS, NARROW_LIKE)

"""Units of small contiguous arrays of one dtype: all arrays clipped in one call.

Sums and factors are those of `unit_loops`: at an array for which one is unknown, clipping stops.
"""

import numpy as np

from numclip.host.kernels import given
from numclip.host.kernels.arrays import FLAGS, WRITEABLE, own_their_data
from numclip.host.kernels.cpu import LENGTH, SOURCE
from numclip.host.kernels.elements import as_computed, word_at
from numclip.host.kernels.examples import UNKNOWN
from numclip.host.kernels.plain import are_apart
from numclip.host.kernels.unit_loops import scale_units, unit_factors, unit_squares, units_at
from numclip.host.runtime.jit import inline, kernel_with_gil
from numclip.tables import BOUND, EPS

# Columns of an array: its lengths before, in and after the reduced axes, in stored numbers, the
# digits of factors, and the index of its parameter among the arrays, 0 if that does not count.
OUTER, REDUCED, INNER, DIGITS, PARAM = range(5)


@inline
def can_be_written(items, arrays, wanted, addresses, itemsize):
    """Tell whether the arrays to clip are writeable, and no array or parameter shares memory."""
    header = wanted[given.HEADER]
    for k in range(arrays.shape[0]):
        if word_at(word_at(items + k * given.WORD) + header + FLAGS) & WRITEABLE == 0:
            return False
    if own_their_data(items, addresses.size, header, wanted[given.NONE]):
        return True
    spans = np.empty((addresses.size, 4), np.int64)
    for k in range(addresses.size):
        own = arrays[k % arrays.shape[0]]
        spans[k, SOURCE] = addresses[k]
        spans[k, LENGTH] = own[OUTER] * own[REDUCED] * own[INNER]
    return are_apart(spans, itemsize)


@inline
def clip_units(x, params, law, digits):
    """Clip the units of an array in place, or return False and write nothing.

    That is where a sum loses something in float64, or results must be truncated.
    """
    count = x.shape[0] * x.shape[2]
    sums, owners = np.zeros(count), np.zeros(count if params.size else 0)
    if not unit_squares(x, digits, sums):
        return False
    if params.size and not unit_squares(params, digits, owners):
        return False
    found, factors, clips = np.empty(count), np.full(count, as_computed(1.0, x)), False
    unit_factors(0, count, sums, owners, law, digits, found)
    for unit in range(count):
        if found[unit] == UNKNOWN:
            return False
        factors[unit] = found[unit]
        clips |= found[unit] != 1.0
    if clips:
        scale_units(x, factors)
    return True


@kernel_with_gil
def clip(items, wanted, arrays, laws, bound, eps, like):
    """Clip the units of a tuple's arrays in place; return whether all arrays are done.

    Behind the arrays are their parameters, if these count. If some arrays are not done, clipping
    all again changes nothing in those that are.
    """
    count = arrays.shape[0]
    addresses = np.empty(count * (2 if arrays[0, PARAM] != 0 else 1), np.int64)
    if not given.find(items, wanted, addresses):
        return False
    if not can_be_written(items, arrays, wanted, addresses, like.itemsize):
        return False
    for k in range(count):
        own, law = arrays[k], laws[k].copy()
        law[BOUND], law[EPS] = bound, eps
        x, params = units_at(addresses[k], own, like), like.reshape((0, 0, 0))
        if own[PARAM] != 0:
            params = units_at(addresses[own[PARAM]], own, like)
        if not clip_units(x, params, law, int(own[DIGITS])):
            return False
    return True

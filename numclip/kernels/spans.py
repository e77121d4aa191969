"""Tensors of one or two element types, measured and scaled for code that users compile.

A table, given by its address and its number of rows, says of each tensor where its contiguous
numbers are, how many, of which kind, and between which addresses the user's array lies.
`narrow` and `wide` are the types float32 and float64, or both the one type that all tensors
have; as types, and as bare addresses, arguments cost nothing. Sums, factors and products are
those of `cpu` and `joint`, chunk by chunk, so that the bits are the same.
"""

import math

import numpy as np
from numba import carray

from numclip.dtypes import lookup
from numclip.kernels import formulas
from numclip.kernels.cpu import (
    array_of_powers,
    array_of_squares,
    blocks_of_squares,
    hold,
    join,
    larger,
    multiply,
    multiply_truncating,
    scale_by_power,
    two_sum,
)
from numclip.kernels.elements import pointer, word_at
from numclip.kernels.jit import inline, kernel
from numclip.kernels.joint import decide, is_safe
from numclip.kernels.tuning import BLOCK, CHUNK, NARROW_BLOCK

ADDRESS, LENGTH, KIND, LOW, HIGH = range(5)
FIELDS = 5
FEW = 16  # arrays compared in pairs; sorting allocates twice
WIDE, COMPLEX = 1, 2  # bits of a kind
NARROW, WIDER = lookup(np.dtype(np.float32)), lookup(np.dtype(np.float64))
NARROW_PRECISION, WIDE_PRECISION = NARROW.precision, WIDER.precision
NARROW_LIMITS, WIDE_LIMITS = NARROW.limits, WIDER.limits
ABI = 1  # of what follows and of the table; code that users keep on disk calls by it

settled = inline(formulas.settled)


@inline
def field(rows, t, k):
    """Return a field of the table."""
    return word_at(rows + (t * FIELDS + k) * 8)


@inline
def is_double(dtype):
    """Tell whether a type is float64."""
    return np.float64(dtype(0.1)) == 0.1


@inline
def squares(address, length, dtype):
    """Return a tensor's sum of squares, as `cpu.sum_squares` and `cpu.merge` do."""
    if length <= CHUNK:
        return array_of_squares(carray(pointer(address), length, dtype))
    x = carray(pointer(address), length, dtype)
    size = BLOCK if is_double(dtype) else NARROW_BLOCK
    total = 0.0
    error = 0.0
    for start in range(0, length, CHUNK):
        chunk = blocks_of_squares(x[start : start + CHUNK], size)
        total, rest = two_sum(total, chunk)
        error += rest
    return settled(total, error)


@kernel
def joint_norm(rows, count, narrow, wide):
    """Return the norm of all tensors, and if no sum lost anything. Reads every element once."""
    total = 0.0
    error = 0.0
    right = True
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        if field(rows, t, KIND) & WIDE:
            tensor = squares(address, length, wide)
            right &= is_safe(tensor) or length == 0
        else:
            tensor = squares(address, length, narrow)
        total, rest = two_sum(total, tensor)
        error += rest
    return math.sqrt(settled(total, error)), right


@inline
def rescued_squares(address, length):
    """Return a float64 tensor's sum of squares, ``total * 4**exponent``, as `backend.squares`."""
    total = squares(address, length, np.float64)
    if is_safe(total) or length == 0:
        return total, 0
    x = carray(pointer(address), length, np.float64)
    peak = 0.0
    for i in range(length):
        peak = larger(peak, abs(x[i]))
    if not (math.isfinite(peak) and peak > 0.0):
        return total, 0
    exponent = math.frexp(peak)[1] - 1
    scale = math.ldexp(1.0, exponent)
    total = 0.0
    error = 0.0
    for start in range(0, length, CHUNK):
        chunk = array_of_powers(x[start : start + CHUNK], scale, 2.0)
        total, rest = two_sum(total, chunk)
        error += rest
    return settled(total, error), exponent


@kernel
def rescued_norm(rows, count, narrow):
    """Return the norm as ``root * 2**exponent`` where float64 sums over- or underflow."""
    totals = np.empty(count)
    exponents = np.zeros(count, np.int64)
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        if field(rows, t, KIND) & WIDE:
            totals[t], exponents[t] = rescued_squares(address, length)
        else:
            totals[t] = squares(address, length, narrow)
    roots = np.zeros(1)
    shifts = np.zeros(1, np.int64)
    join(totals, exponents, np.zeros(count, np.int64), 2.0, roots, shifts)
    return roots[0], shifts[0]


@inline
def scale(x, mantissa, power, truncate, precision, dtype):
    """Multiply an array in place by ``mantissa * 2**power``."""
    if truncate:
        multiply_truncating(x, mantissa, power, precision[0], precision[1])
    else:
        multiply(x, dtype(scale_by_power(mantissa, power)))


@kernel
def bring(rows, count, narrow, wide, norm, exponent, bound, divisor):
    """Bring a norm over `divisor` to its bound, in place; tell whether anything was written."""
    elements = 0
    for t in range(count):
        elements += field(rows, t, LENGTH)
    limits = WIDE_LIMITS if is_double(narrow) else NARROW_LIMITS  # of the coarser type
    norm /= divisor
    mantissa, power, truncate = decide(norm, exponent, bound, elements, divisor, limits)
    if mantissa == 1.0:
        return False
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        if field(rows, t, KIND) & WIDE:
            x = carray(pointer(address), length, wide)
            scale(x, mantissa, power, truncate, WIDE_PRECISION, wide)
        else:
            y = carray(pointer(address), length, narrow)
            scale(y, mantissa, power, truncate, NARROW_PRECISION, narrow)
    return True


@inline
def clear(x, parts):
    """Write 0 for each number of which one of its parts is not finite."""
    for i in range(0, x.size, parts):
        if not (math.isfinite(x[i]) and math.isfinite(x[i + parts - 1])):
            x[i] = 0.0
            x[i + parts - 1] = 0.0


@kernel
def clear_nonfinite(rows, count, narrow, wide):
    """Write 0 for each number of all tensors that is not finite."""
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        parts = 2 if field(rows, t, KIND) & COMPLEX else 1
        if field(rows, t, KIND) & WIDE:
            clear(carray(pointer(address), length, wide), parts)
        else:
            clear(carray(pointer(address), length, narrow), parts)


@inline
def sort_by_address(rows, order):
    """Sort numbers of rows by where their arrays begin (Shell 1959, gaps of Knuth)."""
    gap = 1
    while gap < order.size // 3:
        gap = 3 * gap + 1
    while gap > 0:
        for k in range(gap, order.size):
            t = order[k]
            low = field(rows, t, LOW)
            while k >= gap and field(rows, order[k - gap], LOW) > low:
                order[k] = order[k - gap]
                k -= gap
            order[k] = t
        gap //= 3


@kernel
def are_apart(rows, count):
    """Tell whether the spans of all arrays are apart."""
    if count <= FEW:
        for t in range(count):
            for other in range(t):
                below = field(rows, t, HIGH) <= field(rows, other, LOW)
                if not (below or field(rows, other, HIGH) <= field(rows, t, LOW)):
                    return False
        return True
    order = np.arange(count)
    sort_by_address(rows, order)
    reached = field(rows, order[0], HIGH)
    for k in range(1, count):
        if field(rows, order[k], LOW) < reached:
            return False
        reached = max(reached, field(rows, order[k], HIGH))
    return True


@kernel
def clamp(address, length, dtype, low, high):
    """Hold each element of an array between two bounds, which are rounded to its type."""
    hold(carray(pointer(address), length, dtype), dtype(low), dtype(high))

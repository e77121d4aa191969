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

from numclip.kernels import formulas
from numclip.kernels.cpu import (
    array_of_powers,
    array_of_squares,
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
from numclip.kernels.tuning import CHUNK

ADDRESS, LENGTH, KIND, LOW, HIGH = range(5)
FIELDS = 5
FEW = 16  # arrays compared in pairs; sorting allocates twice
WIDE, COMPLEX = 1, 2  # bits of a kind
NARROW_PRECISION = 24, -149
WIDE_PRECISION = 53, -1074

settled = inline(formulas.settled)


@inline
def field(rows, t, k):
    """Return a field of the table."""
    return word_at(rows + (t * FIELDS + k) * 8)


@inline
def numbers_at(address, length, dtype):
    """Return the numbers at an address as an array."""
    return carray(pointer(address), length, dtype)


@inline
def chunk_at(address, start, length, dtype):
    """Return the chunk of a tensor that begins at element `start`."""
    itemsize = 4 if dtype(0.1) != 0.1 else 8
    return numbers_at(address + start * itemsize, min(CHUNK, length - start), dtype)


@inline
def squares(address, length, dtype):
    """Return a tensor's sum of squares, as `cpu.sum_squares` and `cpu.merge` do."""
    if length <= CHUNK:
        return array_of_squares(numbers_at(address, length, dtype))
    total = 0.0
    error = 0.0
    for start in range(0, length, CHUNK):
        x = chunk_at(address, start, length, dtype)
        total, rest = two_sum(total, array_of_squares(x))
        error += rest
    return settled(total, error)


@inline
def powers(address, length, scale, ord, dtype):
    """Return a tensor's sum of ``(|x| / scale) ** ord``, as `cpu.sum_powers` does."""
    total = 0.0
    error = 0.0
    for start in range(0, length, CHUNK):
        x = chunk_at(address, start, length, dtype)
        total, rest = two_sum(total, array_of_powers(x, scale, ord))
        error += rest
    return settled(total, error)


@inline
def largest(address, length, dtype):
    """Return a tensor's largest magnitude, NaN where there is one."""
    peak = 0.0
    for value in numbers_at(address, length, dtype):
        peak = larger(peak, np.float64(abs(value)))
    return peak


@inline
def squares_of(rows, t, narrow, wide):
    """Return the sum of squares of a tensor of either type, and if it lost nothing."""
    address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
    if field(rows, t, KIND) & WIDE:
        total = squares(address, length, wide)
        return total, is_safe(total) or length == 0
    return squares(address, length, narrow), True


@inline
def joint_norm(rows, count, narrow, wide):
    """Return the norm of all tensors, and if no sum lost anything."""
    total = 0.0
    error = 0.0
    right = True
    for t in range(count):
        tensor, safe = squares_of(rows, t, narrow, wide)
        right &= safe
        total, rest = two_sum(total, tensor)
        error += rest
    return math.sqrt(settled(total, error)), right


@kernel
def narrow_norm(rows, count, narrow, wide):
    """Return as `norm_of` does, where no tensor is wide."""
    norm, _ = joint_norm(rows, count, narrow, wide)
    return norm, 0


@kernel
def norm_of(rows, count, narrow, wide):
    """Return the L2 norm of all tensors as ``root * 2**exponent``. Reads every element once."""
    norm, right = joint_norm(rows, count, narrow, wide)
    if right:
        return norm, 0
    return rescued_norm(rows, count, narrow, wide)


@kernel
def rescued_norm(rows, count, narrow, wide):
    """Return as `norm_of` does where float64 sums over- or underflow."""
    totals = np.empty(count)
    exponents = np.zeros(count, np.int64)
    for t in range(count):
        totals[t], safe = squares_of(rows, t, narrow, wide)
        if safe:
            continue
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        peak = largest(address, length, wide)
        if math.isfinite(peak) and peak > 0.0:
            exponents[t] = math.frexp(peak)[1] - 1
            scale = math.ldexp(1.0, int(exponents[t]))
            totals[t] = powers(address, length, scale, 2.0, wide)
    roots = np.zeros(1)
    shifts = np.zeros(1, np.int64)
    join(totals, exponents, np.zeros(count, np.int64), 2.0, roots, shifts)
    return roots[0], shifts[0]


@inline
def elements_of(rows, count):
    """Return how many numbers all tensors have."""
    elements = 0
    for t in range(count):
        elements += field(rows, t, LENGTH)
    return elements


@inline
def scale(x, mantissa, power, truncate, precision, dtype):
    """Multiply an array in place by ``mantissa * 2**power``."""
    if truncate:
        multiply_truncating(x, mantissa, power, precision[0], precision[1])
    else:
        multiply(x, dtype(scale_by_power(mantissa, power)))


@kernel
def scale_all(rows, count, narrow, wide, mantissa, power, truncate):
    """Multiply all tensors in place by ``mantissa * 2**power``."""
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        if field(rows, t, KIND) & WIDE:
            x = numbers_at(address, length, wide)
            scale(x, mantissa, power, truncate, WIDE_PRECISION, wide)
        else:
            y = numbers_at(address, length, narrow)
            scale(y, mantissa, power, truncate, NARROW_PRECISION, narrow)


@kernel
def clip(rows, count, narrow, wide, limits, norm, exponent, bound, divisor):
    """Bring a norm over `divisor` to its bound, in place; tell whether anything was written."""
    norm /= divisor
    elements = elements_of(rows, count)
    mantissa, power, truncate = decide(norm, exponent, bound, elements, divisor, limits)
    if mantissa == 1.0:
        return False
    scale_all(rows, count, narrow, wide, mantissa, power, truncate)
    return True


@inline
def clear(x, parts):
    """Write 0 for each number of which one of its parts is not finite."""
    for i in range(0, x.size, parts):
        if not (math.isfinite(x[i]) and math.isfinite(x[i + parts - 1])):
            x[i] = 0.0
            x[i + parts - 1] = 0.0


@kernel
def clear_all(rows, count, narrow, wide):
    """Write 0 for each number of all tensors that is not finite."""
    for t in range(count):
        address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
        parts = 2 if field(rows, t, KIND) & COMPLEX else 1
        if field(rows, t, KIND) & WIDE:
            clear(numbers_at(address, length, wide), parts)
        else:
            clear(numbers_at(address, length, narrow), parts)


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
    lows = np.empty(count, np.int64)
    highs = np.empty(count, np.int64)
    for t in range(count):
        lows[t] = field(rows, t, LOW)
        highs[t] = field(rows, t, HIGH)
    lows.sort()
    highs.sort()
    for t in range(1, count):
        if highs[t - 1] > lows[t]:
            return False
    return True

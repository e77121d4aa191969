"""Tensors of float32 and float64, measured and clipped for code that users compile.

A table, given by its address and its number of rows, says of each tensor where its contiguous
numbers are, how many, of which kind, and between which addresses the user's array lies. Sums,
factors and products are those of `cpu` and `pools`, in their order, so that the bits are the same.
"""

import math

import numpy as np

from numclip.dtypes import lookup
from numclip.kernels.cpu import (
    array_of_powers,
    clean_array,
    hold,
    multiply,
    multiply_truncating,
    parts_of_squares,
)
from numclip.kernels.elements import array_at, as_computed, word_at
from numclip.kernels.jit import inline, kernel
from numclip.kernels.joint import COARSE, DIGITS, ROUNDOFF, SMALLEST
from numclip.kernels.pools import (
    _parts,
    add_sum,
    add_tensors,
    factor_of,
    is_safe,
    is_settled,
    larger,
    scale_by_power,
    settled,
    two_sum,
    write_sum,
)
from numclip.kernels.tuning import CHUNK
from numclip.tables import EXPONENT, PROPAGATE, RAISE, SKIP, SUM_COLUMNS, TOTAL, ZERO

ADDRESS, LENGTH, KIND, LOW, HIGH = range(5)
FIELDS = 5
WIDE, COMPLEX = 1, 2  # bits of KIND
# What to do: a policy of `tables`, and bits.
POLICY, IN_PLACE, GIVEN, AVERAGE, ROOT_MEAN = 3, 4, 8, 16, 32
FOUND = 6  # the bits above them are what the caller has found wrong
# What became of it.
UNCHANGED, WRITTEN, BAD_BOUND, BAD_NORM, BAD_ORDER, OVERLAP, NONFINITE, BAD_INTERVAL, RARE = range(
    9
)
FEW = 16  # arrays compared in pairs; sorting allocates twice
_NARROW, _WIDE = lookup(np.dtype(np.float32)), lookup(np.dtype(np.float64))
NARROW_LIKE, WIDE_LIKE = _NARROW.like, _WIDE.like
NARROW_PRECISION, WIDE_PRECISION = _NARROW.precision, _WIDE.precision
NARROW_LIMITS, WIDE_LIMITS = _NARROW.limits, _WIDE.limits

norm_from, root, usable = _parts.norm_of, _parts.root, _parts.usable


@inline
def field(rows, t, k):
    """Return a field of the table."""
    return word_at(rows + (t * FIELDS + k) * 8)


@inline
def array_of(rows, t, like):
    """Return a tensor's numbers."""
    return array_at(field(rows, t, ADDRESS), field(rows, t, LENGTH), like)


@inline
def peak_of(x):
    """Return the largest magnitude of an array, NaN where there is one."""
    peak = 0.0
    for i in range(x.size):
        peak = larger(peak, np.float64(abs(x[i])))
    return peak


@inline
def tensor_peak(rows, t):
    """Return the largest magnitude of a tensor."""
    if field(rows, t, KIND) & WIDE:
        return peak_of(array_of(rows, t, WIDE_LIKE))
    return peak_of(array_of(rows, t, NARROW_LIKE))


@inline
def powers_of(x, scale, ord):
    """Return the same sum, added as those of the chunks of a tensor are."""
    total = error = 0.0
    for start in range(0, x.size, CHUNK):
        total, rest = two_sum(total, array_of_powers(x[start : start + CHUNK], scale, ord))
        error += rest
    return settled(total, error)


@inline
def tensor_powers(rows, t, scale, ord):
    """Return a tensor's sum of ``(|x| / scale) ** ord``."""
    if field(rows, t, KIND) & WIDE:
        return powers_of(array_of(rows, t, WIDE_LIKE), scale, ord)
    return powers_of(array_of(rows, t, NARROW_LIKE), scale, ord)


@inline
def plain_norm(rows, count):
    """Return the norm of all tensors, and whether it is finite and no sum left the safe range."""
    total = error = doubt = 0.0
    safe = True
    for t in range(count):
        if field(rows, t, KIND) & WIDE:
            x = array_of(rows, t, WIDE_LIKE)
            tensor, lost = parts_of_squares(x)
            value = tensor + lost
            safe &= is_safe(value) or (value == 0.0 and peak_of(x) == 0.0)
        else:
            tensor, lost = parts_of_squares(array_of(rows, t, NARROW_LIKE))
            value = tensor + lost
        total, error, doubt = add_sum((total, error, doubt), value, (tensor - value) + lost)
    norm = math.sqrt(total + error)
    return norm, safe and math.isfinite(norm) and is_settled(total, error, doubt)


@inline
def rescued_squares(x):
    """Return an array's sum of squares as ``total * 4**exponent``, as `batches.write_squares`.

    Between them what rounding has taken from the total.
    """
    total, lost = parts_of_squares(x)
    if x.itemsize < 8 or is_safe(total + lost):
        return total, lost, 0
    peak = peak_of(x)
    if not 0.0 < peak < math.inf:
        return total, lost, 0
    exponent = math.frexp(peak)[1] - 1
    return powers_of(x, math.ldexp(1.0, exponent), 2.0), 0.0, exponent


@inline
def joint_squares(rows, count):
    """Return the sum of squares of all tensors as ``total * 4**exponent``."""
    sums = np.empty((count, SUM_COLUMNS))
    for t in range(count):
        if field(rows, t, KIND) & WIDE:
            tensor, lost, exponent = rescued_squares(array_of(rows, t, WIDE_LIKE))
        else:
            tensor, lost, exponent = rescued_squares(array_of(rows, t, NARROW_LIKE))
        write_sum(sums[t], tensor, lost)
        sums[t, EXPONENT] = exponent
    total, _, power = add_tensors((0, count), TOTAL, False, sums)
    return total, power


@inline
def joint_norm(rows, count, ord):
    """Return the norm of all tensors as ``root * 2**exponent``."""
    if ord == 2.0:
        total, exponent = joint_squares(rows, count)
        return norm_from(total, exponent, 2.0, 0.0, 1.0)
    peak = total = error = 0.0
    for t in range(count):
        peak = larger(peak, tensor_peak(rows, t))
    for t in range(count if ord < math.inf else 0):
        total, rest = two_sum(total, tensor_powers(rows, t, usable(peak), ord))
        error += rest
    return norm_from(settled(total, error), 0, ord, peak, 1.0)


@inline
def factor(rows, count, norm, power, bound, ord, divisor):
    """Return what `decisions.factor_of` does for a norm over a divisor."""
    elements, wide = 0, True
    for t in range(count):
        elements += field(rows, t, LENGTH)
        wide &= field(rows, t, KIND) & WIDE != 0
    limits = WIDE_LIMITS if wide else NARROW_LIMITS  # of the coarsest type
    coarse = root(float(elements), ord) / divisor * limits[COARSE]
    digits = int(limits[DIGITS])
    return factor_of(norm, power, bound, bound, coarse, limits[ROUNDOFF], digits, limits[SMALLEST])


@inline
def scale_array(x, mantissa, power, truncate, precision, like):
    """Multiply an array in place by ``mantissa * 2**power``."""
    if truncate:
        multiply_truncating(x, mantissa, power, precision[0], precision[1])
    else:
        multiply(x, as_computed(scale_by_power(mantissa, power), like))


@inline
def scale(rows, count, mantissa, power, truncate):
    """Multiply all tensors."""
    for t in range(count):
        if field(rows, t, KIND) & WIDE:
            x = array_of(rows, t, WIDE_LIKE)
            scale_array(x, mantissa, power, truncate, WIDE_PRECISION, WIDE_LIKE)
        else:
            y = array_of(rows, t, NARROW_LIKE)
            scale_array(y, mantissa, power, truncate, NARROW_PRECISION, NARROW_LIKE)


@inline
def clean(rows, count):
    """Write 0 for each number of all tensors that is not finite."""
    for t in range(count):
        components = 2 if field(rows, t, KIND) & COMPLEX else 1
        if field(rows, t, KIND) & WIDE:
            clean_array(array_of(rows, t, WIDE_LIKE), components)
        else:
            clean_array(array_of(rows, t, NARROW_LIKE), components)


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


@inline
def are_apart(rows, count):
    """Tell whether the extents of all arrays are apart."""
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


@inline
def fault(rows, count, bound, given, ord, what):
    """Return what is wrong with the arguments, `UNCHANGED` where nothing is."""
    if what >> FOUND:
        return what >> FOUND
    if not bound >= 0.0:
        return BAD_BOUND
    if what & GIVEN and given < 0.0:
        return BAD_NORM
    if not ord >= 1.0:
        return BAD_ORDER
    return OVERLAP if what & IN_PLACE and not are_apart(rows, count) else UNCHANGED


@inline
def divisor_of(rows, what):
    """Return what the norm of the first tensor is divided by."""
    if not what & (AVERAGE | ROOT_MEAN):
        return 1.0
    size = field(rows, 0, LENGTH) >> (field(rows, 0, KIND) // COMPLEX)
    return float(max(size, 1)) if what & AVERAGE else math.sqrt(max(size, 1))


@inline
def multiply_all(rows, count, scale):
    """Multiply all tensors."""
    for t in range(count):
        if field(rows, t, KIND) & WIDE:
            multiply(array_of(rows, t, WIDE_LIKE), scale)
        else:
            multiply(array_of(rows, t, NARROW_LIKE), as_computed(scale, NARROW_LIKE))


@kernel
def clip(rows, count, bound, given, ord, what):
    """Clip tensors in place by their joint norm, or by a given one; return it and what became.

    What is `RARE` is left to `clip_rare`, a kernel that takes long to compile.
    """
    wrong = fault(rows, count, bound, given, ord, what)
    if wrong != UNCHANGED or count == 0:
        return given if what & GIVEN else 0.0, wrong
    norm, safe = 0.0, ord == 2.0
    if safe and (what & POLICY != PROPAGATE or not what & GIVEN):
        norm, safe = plain_norm(rows, count)
    divisor = divisor_of(rows, what)
    norm /= divisor
    if what & GIVEN:
        norm, safe = given, safe and math.isfinite(given)
    if not safe:
        return norm, RARE
    if norm <= bound:
        return norm, UNCHANGED
    mantissa, power, truncate = factor(rows, count, norm, 0, bound, ord, divisor)
    if truncate:
        return norm, RARE
    multiply_all(rows, count, scale_by_power(mantissa, power))
    return norm, WRITTEN


@kernel
def clip_rare(rows, count, bound, given, ord, what):
    """Do the same where norms are of other orders or not finite, or where sums or results are."""
    policy = what & POLICY
    norm, power = 0.0, 0
    if policy != PROPAGATE or not what & GIVEN:
        norm, power = joint_norm(rows, count, ord)
    bad = not math.isfinite(norm) or (what & GIVEN != 0 and not math.isfinite(given))
    if bad and policy == RAISE:
        return norm, NONFINITE
    cleaned = bad and policy == ZERO
    if cleaned:
        clean(rows, count)
        norm, power = joint_norm(rows, count, ord)
    divisor = divisor_of(rows, what)
    norm /= divisor
    if what & GIVEN and (policy != ZERO or math.isfinite(given)):
        norm, power = given, 0
    told = scale_by_power(norm, power)
    mantissa, shift, truncate = factor(rows, count, norm, power, bound, ord, divisor)
    if (bad and policy == SKIP) or (mantissa == 1.0 and shift == 0):
        return told, WRITTEN if cleaned else UNCHANGED
    scale(rows, count, mantissa, shift, truncate or cleaned)
    return told, WRITTEN


@kernel
def clamp(rows, low, high):
    """Hold each number of the first tensor between two bounds, which are rounded to its type."""
    if not low <= high:
        return BAD_INTERVAL
    if field(rows, 0, KIND) & WIDE:
        hold(array_of(rows, 0, WIDE_LIKE), low, high)
    else:
        least, most = as_computed(low, NARROW_LIKE), as_computed(high, NARROW_LIKE)
        hold(array_of(rows, 0, NARROW_LIKE), least, most)
    return WRITTEN

"""Small tensors of any gradient types, measured and clipped by one call.

For arrays of NumPy (see `little`) and for code that users compile, which has no 16-bit types. A
table, passed as its address and its number of rows, holds for each tensor the address of its
contiguous numbers, their count, their kind, and the extent [LOW, HIGH) of the user's array. Sums,
factors and products are those of `cpu` and `pools`, in their order, so that the bits are the same.
"""

import math

import numpy as np

from numclip.dtypes import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from numclip.host.kernels.cpu import (
    array_of_powers,
    clean_array,
    hold,
    largest_bits,
    multiply,
    multiply_truncating,
    parts_of_squares,
)
from numclip.host.kernels.elements import array_at, as_computed, rounded, widen, word_at
from numclip.host.kernels.one_norm import DIGITS, ROUNDOFF, TINY, TRUNCATE_BELOW
from numclip.host.kernels.pools import (
    add_sum,
    add_tensors,
    write_sum,
)
from numclip.host.kernels.scalars import (
    capped_order,
    factor_of,
    is_product,
    is_safe,
    is_settled,
    larger,
    power_sum,
    root,
    scale_by_power,
    settled,
    two_sum,
    usable,
)
from numclip.host.kernels.scalars import norm_of as norm_from
from numclip.host.kernels.tuning import CHUNK
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import EXPONENT, PROPAGATE, RAISE, SKIP, SUM_COLUMNS, TOTAL, ZERO

ADDRESS, LENGTH, KIND, LOW, HIGH = range(5)
FIELDS = 5
WIDE, COMPLEX, HALF, BRAIN = 1, 2, 4, 8  # of KIND: float64, complex, float16, bfloat16; 0: float32
# Bits of `options`: a mask for a policy of `tables`, and flags.
POLICY, IN_PLACE, GIVEN, AVERAGE, ROOT_MEAN = 3, 4, 8, 16, 32
FOUND = 6  # from this bit on: the outcome for a fault that the caller has found, or 0
# Outcomes.
UNCHANGED, WRITTEN, BAD_BOUND, BAD_NORM, BAD_ORDER, OVERLAP, NONFINITE, BAD_INTERVAL, RARE = range(
    9
)
FEW = 16  # the most arrays that are compared in pairs; sorting allocates twice
HALF_LIKE, BRAIN_LIKE = FLOAT16.like, BFLOAT16.like
NARROW_LIKE, WIDE_LIKE = FLOAT32.like, FLOAT64.like
HALF_MASK, NARROW_MASK, WIDE_MASK = FLOAT16.mask, FLOAT32.mask, FLOAT64.mask
NARROW_PRECISION, WIDE_PRECISION = FLOAT32.precision, FLOAT64.precision
PRECISIONS = WIDE_PRECISION, FLOAT16.precision, BFLOAT16.precision, NARROW_PRECISION
NARROW_LIMITS, WIDE_LIMITS = FLOAT32.limits, FLOAT64.limits
LIMITS = WIDE_LIMITS, FLOAT16.limits, BFLOAT16.limits, NARROW_LIMITS  # by kind, see `of_kind`


@inline
def field(rows, t, k):
    """Return field `k` of row `t` of the table."""
    return word_at(rows + (t * FIELDS + k) * 8)


@inline
def array_of(rows, t, like):
    """Return a tensor's numbers as an array with the dtype of `like`."""
    return array_at(field(rows, t, ADDRESS), field(rows, t, LENGTH), like)


@inline
def peak_of(x):
    """Return the largest magnitude of contiguous numbers, NaN if one is NaN."""
    begin, bits = np.int64(x.ctypes.data), np.zeros(1, np.int64)
    if x.size and x.itemsize == 8:
        bits[0] = largest_bits((begin, begin, x.size), WIDE_MASK)
    elif x.size and x.itemsize == 4:
        bits[0] = largest_bits((begin, begin, x.size), NARROW_MASK)
    elif x.size:
        bits[0] = largest_bits((begin, begin, x.size), HALF_MASK)
    peak = np.float64(widen(array_at(np.int64(bits.ctypes.data), 1, x)[0]))
    return peak if bits.size else 0.0  # this use of `bits` keeps its memory until it is read


@inline
def bits_of_peak(rows, t, mask):
    """Return the largest magnitude of a tensor as an integer, see `cpu.largest_bits`."""
    address, length = field(rows, t, ADDRESS), field(rows, t, LENGTH)
    return np.int64(largest_bits((address, address, length), mask)) if length else np.int64(0)


@inline
def global_peak(rows, count):
    """Return the largest magnitude of all tensors, NaN if one number is NaN."""
    peaks = np.zeros(4, np.int64)  # of each kind, as bits
    for t in range(count):
        kind = field(rows, t, KIND)
        if kind & WIDE:
            peaks[0] = max(peaks[0], bits_of_peak(rows, t, WIDE_MASK))
        elif kind & (HALF | BRAIN):
            k = 1 if kind & HALF else 2
            peaks[k] = max(peaks[k], bits_of_peak(rows, t, HALF_MASK))
        else:
            peaks[3] = max(peaks[3], bits_of_peak(rows, t, NARROW_MASK))
    first = np.int64(peaks.ctypes.data)
    wide, narrow = array_at(first, 1, WIDE_LIKE)[0], array_at(first + 24, 1, NARROW_LIKE)[0]
    half, brain = array_at(first + 8, 1, HALF_LIKE)[0], array_at(first + 16, 1, BRAIN_LIKE)[0]
    peak = larger(larger(wide, np.float64(narrow)), np.float64(widen(half)))
    peak = larger(peak, np.float64(widen(brain)))
    return peak if peaks.size else 0.0  # this use of `peaks` keeps its memory until it is read


@inline
def powers_of(x, scale, ord):
    """Return the sum of ``(|x| / scale) ** ord``, added chunk by chunk as `cpu` does."""
    total = error = 0.0
    for start in range(0, x.size, CHUNK):
        total, rest = two_sum(total, array_of_powers(x[start : start + CHUNK], scale, ord))
        error += rest
    return settled(total, error)


@inline
def sum_of(x, ord):
    """Return (total, exponent): an array's sum of powers, or for order inf its peak.

    Powers that are products are summed unscaled where that loses nothing; else, and for other
    orders, magnitudes are divided by a scale that follows from the peak.
    """
    total, scale = 0.0, 1.0
    for scaled in range(0 if is_product(ord) else 1, 2):
        if scaled:
            peak = peak_of(x)
            if ord == math.inf:
                return peak, 0
            scale = usable(peak, ord)
        total = powers_of(x, scale, ord)
        if is_safe(total):
            break
    return power_sum(total, scale, 0, ord)


@inline
def by_kind(turn, rows, t, arguments):
    """Return ``turn(x, *arguments)`` for a tensor's numbers as an array `x` of their type."""
    kind = field(rows, t, KIND)
    if kind & WIDE:
        return turn(array_of(rows, t, WIDE_LIKE), *arguments)
    if kind & HALF:
        return turn(array_of(rows, t, HALF_LIKE), *arguments)
    if kind & BRAIN:
        return turn(array_of(rows, t, BRAIN_LIKE), *arguments)
    return turn(array_of(rows, t, NARROW_LIKE), *arguments)


@inline
def tensor_squares(rows, t):
    """Return (total, error): a tensor's sum of squares and its rounding error."""
    kind = field(rows, t, KIND)
    if kind & WIDE:
        return parts_of_squares(array_of(rows, t, WIDE_LIKE))
    if kind & HALF:
        return parts_of_squares(array_of(rows, t, HALF_LIKE))
    if kind & BRAIN:
        return parts_of_squares(array_of(rows, t, BRAIN_LIKE))
    return parts_of_squares(array_of(rows, t, NARROW_LIKE))


@inline
def direct_norm(rows, count, ord):
    """Return (norm, safe) of all tensors, for order 2 or inf.

    `safe` says that the norm is finite and rounded for sure, and no sum left the safe range.
    """
    if ord != 2.0:
        peak = global_peak(rows, count)
        return peak, math.isfinite(peak)
    total = error = doubt = 0.0
    safe = True
    for t in range(count):
        tensor, lost = tensor_squares(rows, t)
        value = tensor + lost
        if field(rows, t, KIND) & WIDE:
            zero = value == 0.0 and bits_of_peak(rows, t, WIDE_MASK) == 0
            safe &= zero or is_safe(value)
        total, error, doubt = add_sum((total, error, doubt), value, (tensor - value) + lost)
    norm = math.sqrt(total + error)
    return norm, safe and math.isfinite(norm) and is_settled(total, error, doubt)


@inline
def rescued_squares(x):
    """Return (total, error, exponent): an array's sum of squares, ``total * 4**exponent``.

    `error` is the rounding error of the total. The bits are those of `batches.write_squares`.
    """
    total, lost = parts_of_squares(x)
    if x.itemsize < 8 or is_safe(total + lost):
        return total, lost, 0
    peak = peak_of(x)
    if not 0.0 < peak < math.inf:
        return total, lost, 0
    scale = usable(peak, 2.0)
    return powers_of(x, scale, 2.0), 0.0, math.frexp(scale)[1] - 1


@inline
def global_norm_of(rows, count, ord):
    """Return the norm of all tensors as ``root * 2**exponent``."""
    sums = np.empty((count, SUM_COLUMNS))
    for t in range(count):
        tensor, lost, exponent = 0.0, 0.0, 0
        if ord == 2.0 and field(rows, t, KIND) & WIDE:
            tensor, lost, exponent = rescued_squares(array_of(rows, t, WIDE_LIKE))
        elif ord == 2.0:
            tensor, lost = tensor_squares(rows, t)
        else:
            tensor, exponent = by_kind(sum_of, rows, t, (ord,))
        write_sum(sums[t], tensor, lost)
        sums[t, EXPONENT] = exponent
    total, _, power = add_tensors((0, count), TOTAL, ord == math.inf, sums)
    return norm_from(total, power, ord)


@inline
def of_kind(kind, wide, half, brain, narrow):
    """Return the one of four values that belongs to a dtype kind."""
    if kind & WIDE:
        return wide
    if kind & HALF:
        return half
    return brain if kind & BRAIN else narrow


@inline
def factor(rows, count, norm, power, bound, ord, divisor):
    """Return what `decisions.factor_of` does for a norm that is already divided by `divisor`."""
    elements, digits = 0, 53.0
    roundoff = truncate_below = tiny = 0.0  # of the coarsest type
    for t in range(count):
        elements += field(rows, t, LENGTH)
        limits = of_kind(field(rows, t, KIND), *LIMITS)
        roundoff, digits = max(roundoff, limits[ROUNDOFF]), min(digits, limits[DIGITS])
        truncate_below = max(truncate_below, limits[TRUNCATE_BELOW])
        tiny = max(tiny, limits[TINY])
    truncate_below *= root(float(elements), ord) / divisor
    return factor_of(norm, power, bound, bound, truncate_below, roundoff, int(digits), tiny)


@inline
def scale_array(x, mantissa, power, truncate, precision):
    """Multiply an array in place by ``mantissa * 2**power``, truncating if `truncate`."""
    if truncate:
        multiply_truncating(x, mantissa, power, precision[0], precision[1])
    else:
        multiply(x, as_computed(scale_by_power(mantissa, power), x))


@inline
def scale(rows, count, mantissa, power, truncate):
    """Multiply all tensors in place, see `scale_array`."""
    for t in range(count):
        precision = of_kind(field(rows, t, KIND), *PRECISIONS)
        by_kind(scale_array, rows, t, (mantissa, power, truncate, precision))


@inline
def clean(rows, count):
    """Set each element of all tensors that is not finite to 0."""
    for t in range(count):
        by_kind(clean_array, rows, t, (2 if field(rows, t, KIND) & COMPLEX else 1,))


@inline
def sort_by_address(rows, order):
    """Sort row numbers by the LOW addresses of their arrays (Shell 1959, gaps of Knuth)."""
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
    """Tell whether no extents of arrays overlap."""
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
def fault(rows, count, bound, given, ord, options):
    """Return the outcome for a faulty argument or overlapping arrays, else `UNCHANGED`."""
    if options >> FOUND:
        return options >> FOUND
    if not bound >= 0.0:
        return BAD_BOUND
    if options & GIVEN and given < 0.0:
        return BAD_NORM
    if not ord >= 1.0:
        return BAD_ORDER
    return OVERLAP if options & IN_PLACE and not are_apart(rows, count) else UNCHANGED


@inline
def divisor_for(size, options):
    """Return the divisor of the norm of `size` elements: `size`, its square root or 1."""
    if options & AVERAGE:
        return float(max(size, 1))
    return math.sqrt(max(size, 1)) if options & ROOT_MEAN else 1.0


@inline
def divisor_of(rows, options):
    """Return the divisor of the first tensor's norm."""
    return divisor_for(field(rows, 0, LENGTH) >> (field(rows, 0, KIND) // COMPLEX & 1), options)


@inline
def multiply_all(rows, count, scale):
    """Multiply all tensors in place, 15 ns faster for each than by `by_kind`."""
    for t in range(count):
        kind = field(rows, t, KIND)
        if kind & WIDE:
            multiply(array_of(rows, t, WIDE_LIKE), scale)
        elif kind & HALF:
            multiply(array_of(rows, t, HALF_LIKE), as_computed(scale, HALF_LIKE))
        elif kind & BRAIN:
            multiply(array_of(rows, t, BRAIN_LIKE), as_computed(scale, BRAIN_LIKE))
        else:
            multiply(array_of(rows, t, NARROW_LIKE), as_computed(scale, NARROW_LIKE))


@kernel
def clip(rows, count, bound, given, ord, options):
    """Clip tensors in place by the norm over all of them, or a given one; return (norm, outcome).

    After `RARE`, nothing is written and the caller calls `clip_rare`, which takes long to compile.
    """
    wrong = fault(rows, count, bound, given, ord, options)
    if wrong != UNCHANGED or count == 0:
        return given if options & GIVEN else 0.0, wrong
    norm, safe = 0.0, ord == 2.0 or ord == math.inf
    if safe and (options & POLICY != PROPAGATE or not options & GIVEN):
        norm, safe = direct_norm(rows, count, ord)
    divisor = divisor_of(rows, options)
    norm /= divisor
    if options & GIVEN:
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
def clip_rare(rows, count, bound, given, ord, options):
    """Clip as `clip` does, for any order, non-finite norms, unsafe sums and truncated results."""
    policy, ord = options & POLICY, capped_order(ord)
    norm, power = 0.0, 0
    if policy != PROPAGATE or not options & GIVEN:
        norm, power = global_norm_of(rows, count, ord)
    bad = not math.isfinite(norm) or (options & GIVEN != 0 and not math.isfinite(given))
    if bad and policy == RAISE:
        return norm, NONFINITE
    cleaned = bad and policy == ZERO
    if cleaned:
        clean(rows, count)
        norm, power = global_norm_of(rows, count, ord)
    divisor = divisor_of(rows, options)
    norm /= divisor
    if options & GIVEN and (policy != ZERO or math.isfinite(given)):
        norm, power = given, 0
    reported = scale_by_power(norm, power)
    mantissa, shift, truncate = factor(rows, count, norm, power, bound, ord, divisor)
    if (bad and policy == SKIP) or (mantissa == 1.0 and shift == 0):
        return reported, WRITTEN if cleaned else UNCHANGED
    scale(rows, count, mantissa, shift, truncate or cleaned)
    return reported, WRITTEN


@inline
def hold_array(x, low, high):
    """Clamp an array in place to two bounds, which are rounded to its type."""
    hold(x, rounded(low, x), rounded(high, x))


@kernel
def clamp(rows, low, high):
    """Clamp the first tensor to two bounds, which are rounded to its type; return the outcome."""
    if not low <= high:
        return BAD_INTERVAL
    by_kind(hold_array, rows, 0, (low, high))
    return WRITTEN

"""Scalar mathematics of clipping, in plain Python; each target compiles this source.

Notation: ``u`` is the unit roundoff of a dtype (2**-24 for float32), ``N`` the exact norm of
the gradients, ``C`` the bound, ``s`` the factor, ``y = fl(s x)`` a stored result.

**Why the bound holds.** Every product is rounded once, so where ``y`` is not subnormal
``|y| <= s |x| (1 + u)``; where it is, rounding adds at most half the spacing ``h`` of the
subnormal numbers. Norms are monotone and obey the triangle inequality, hence for any p-norm

    norm(y) <= s N (1 + u) + r,        r = (h / 2) norm((1, ..., 1)).

The measured norm ``n`` has a relative error of at most 9 * 2**-53, for elements under 64 bits
20 * 2**-53 (see ``tuning``; of orders over 4, and of fractions, if the power function is right to
a unit in the last place).
`clip_factor` returns

    s = down(C / n / (1 + u) * (1 - slack)),

rounded down to the significand that the multiplication can hold. The slack is 32 * 2**-53, or
64 * 2**-53 where s has 24 bits; it pays for the error of ``n`` here and when the result is
measured again (18 or 40), for the four operations of the law itself (4) and for ``r`` up
to ``2**-50 C`` (8). So
``norm(y) <= C`` in real arithmetic, and clipping the result again changes nothing. Where
``r`` is larger, or ``s`` itself is subnormal, `truncated_product` is used, whose subnormal
results are rounded toward zero, so that ``r`` is 0.

**Why little of the norm is lost.** The result falls short of C by the margin (u), by rounding
``s`` down to 24 bits (under 2 u) and by rounding the products (u), in all under 4 u for
float32: (1 - u)(1 - 2 u)(1 - u) exceeds 1 - 4 u by 5 u**2 = 160 * 2**-53, more than the slack,
the law's operations and the norm's error together.
float16 and bfloat16 multiply in float32, so that only 2 u are lost; float64 has s at full
precision and loses at most 32 + 8 + 4 units of 2**-53.

**Rows that repeat.** For summed rows of a sparse gradient the rounding errors of the terms
add up: with ``M`` the norm of the sums of magnitudes, ``u N`` above becomes ``u M``; the caller
passes ``roundoff = u M / N``. Subnormal terms can each be off by the spacing ``h``, in either
direction of the sum, and rounding toward zero does not help: the caller aims at ``C`` less
``h norm(counts)``, counts being how many terms each element of the dense array has.
"""

import math
from typing import Any

SLACK = 2.0**-48
SUBNORMAL_LIMIT = 2.0**-50
SAFE = 2.0**-960, 2.0**1000
BIN_LIMIT = 2.0**480
BIN_EXPONENT = 600
BIN_SCALE = 2.0**BIN_EXPONENT
MOST_ORDER = 2.0**46
"""Orders from here on count as inf: with all elements that memory holds a norm differs by 5e-13.

For smaller orders the exponents of sums of powers are exact in tables of float64.
"""
LOWEST = -1022
"""The exponent of the smallest normal float64, whose reciprocal is a number, too."""


def two_sum(a: float, b: float) -> tuple[float, float]:
    """Return ``fl(a + b)`` and its exact rounding error (Knuth, TAOCP 2, 4.2.2, theorem B)."""
    total = a + b
    rest = total - a
    return total, (a - (total - rest)) + (b - rest)


def is_safe(total: Any) -> Any:
    """Tell whether a float64 sum of squares lost nothing to under- or overflow."""
    return (total > SAFE[0]) & (total < SAFE[1])


def scale_by_power(value: float, exponent: int) -> float:
    """Return ``value * 2**exponent``, infinite on overflow where `math.ldexp` may raise."""
    if exponent == 0 or value == 0.0 or not math.isfinite(value):
        return value
    fraction, power = math.frexp(value)
    if power + exponent > 1024:
        return math.copysign(math.inf, value)
    return math.ldexp(fraction, max(power + exponent, -1100))  # a C int


def settled(total: float, error: float) -> float:
    """Return a sum with the rounding errors collected beside it; an infinite sum has none."""
    return total + error if math.isfinite(total) else total


def is_settled(total: float, error: float, doubt: float) -> bool:
    """Tell whether ``total + error``, off by up to `doubt`, is rounded as the exact sum is."""
    slack = 2.0 * doubt + 2.0**-50 * abs(error)
    return doubt == 0.0 or total + (error - slack) == total + (error + slack)


def binned_square(value: float) -> tuple[float, float, float]:
    """Return the square of a float64 in one of three bins, where it cannot over- or underflow.

    Squares of small numbers are times ``4**600``, of large ones times ``4**-600`` (Blue 1978).
    """
    size = abs(value)
    if size > BIN_LIMIT:
        return 0.0, 0.0, (size / BIN_SCALE) * (size / BIN_SCALE)
    if size < 1.0 / BIN_LIMIT:
        return (size * BIN_SCALE) * (size * BIN_SCALE), 0.0, 0.0
    return 0.0, size * size, 0.0


def sum_of_bins(small: float, middle: float, large: float) -> tuple[float, int]:
    """Return the sum of three bins of squares as ``total * 4**exponent``."""
    if large != 0.0:
        return large + middle / BIN_SCALE / BIN_SCALE, BIN_EXPONENT
    if middle != 0.0:
        return middle + small / BIN_SCALE / BIN_SCALE, 0
    return small, -BIN_EXPONENT


def larger(a: float, b: float) -> float:
    """Return the larger of two numbers, NaN where one is NaN."""
    return a if a > b or a != a else b


def capped_order(ord: float) -> float:
    """Return an order, or infinity for orders from `MOST_ORDER` on."""
    return ord if ord < MOST_ORDER else math.inf


def is_product(ord: float) -> bool:
    """Tell whether `power_term` only multiplies for an order."""
    return ord <= 4.0 and ord == math.floor(ord)


def usable(peak: float, ord: float) -> float:
    """Return the divisor for magnitudes up to `peak` before their powers are taken.

    Where powers are products it is a power of two and a normal number, so that nothing is
    rounded; else it is `peak` itself. It is 1 if the peak is 0 or not finite.
    """
    if not 0.0 < peak < math.inf:
        return 1.0
    if not is_product(ord):
        return peak
    return math.ldexp(1.0, max(math.frexp(peak)[1] - 1, LOWEST))


def power_term(ratio: float, ord: float) -> float:
    """Return the term of an element of magnitude `ratio` in a sum of powers."""
    if ord == 2.0:
        return ratio * ratio
    if ord == 1.0:
        return ratio
    if ord == 3.0:
        return ratio * ratio * ratio
    if ord == 4.0:
        return ratio * ratio * (ratio * ratio)
    return math.pow(ratio, ord)


def root(total: float, ord: float) -> float:
    """Return the norm of a sum of powers; for ``ord=inf`` the sum is a maximum."""
    if ord == 2.0:
        return math.sqrt(total)
    if ord == 1.0 or ord == math.inf:
        return total
    found = math.pow(total, 1.0 / ord)
    if is_product(ord) and 0.0 < total < math.inf:  # a step of Newton's, for 1 / 3 is not exact
        found -= (power_term(found, ord) - total) / (ord * power_term(found, ord - 1.0))
    return found


def split_order(ord: float) -> tuple[int, float, float]:
    """Return an order in three parts, whose products with exponents of float64 are exact.

    They are its integer, a fraction of 26 bits, and the rest, whose product is small.
    """
    whole = math.floor(ord)
    part = ord - whole
    high = math.floor(part * 2.0**26) * 2.0**-26
    return int(whole), high, part - high


def power_sum(total: float, scale: float, shift: int, ord: float) -> tuple[float, int]:
    """Return a sum of powers as ``total * 4**exponent``, from that of magnitudes over `scale`.

    The magnitudes are also multiplied by ``2**shift``; the order is finite. The exponent is a
    multiple of 128 that follows from the scale and the shift, usually 0. Scales that are powers
    of two give the same result, unless digits are lost to underflow.
    """
    fraction, power = math.frexp(scale)
    power += shift
    whole, high, low = split_order(ord)
    # The scale's logarithm times the order: an integer, and a rest from 0 to 1.
    first = math.floor(power * high)
    rest = (power * high - first) + power * low
    rest += -ord if fraction == 0.5 else ord * math.log2(fraction)
    second = math.floor(rest)
    rest -= second
    bits = power * whole + int(first) + int(second)
    if rest != 0.0:
        total *= math.pow(2.0, rest)
    return scale_by_power(total, bits & 255), (bits >> 8) * 128


def norm_of(total: float, exponent: int, ord: float) -> tuple[float, int]:
    """Return the norm ``root * 2**power`` of a sum of powers, see `power_sum`.

    For an infinite order the sum is the largest magnitude.
    """
    if ord == 2.0:
        return math.sqrt(total), exponent
    if not 0.0 < total < math.inf:
        return total, 0
    fraction, power = math.frexp(total)
    power += 2 * exponent
    if ord == math.inf:
        return fraction, power
    whole, high, low = split_order(ord)
    count = math.floor(power / ord + 0.5)
    rest = (power - count * whole) - count * high - count * low
    if is_product(ord):
        return root(scale_by_power(fraction, int(rest)), ord), count
    return math.pow(2.0, (math.log2(fraction) + rest) / ord), count


def clip_factor(
    bound: float, norm: float, exponent: int, roundoff: float, digits: int
) -> tuple[float, int]:
    """Return the factor ``mantissa * 2**power`` that brings ``norm * 2**exponent`` to `bound`.

    The norm exceeds the bound or is not finite; one that is not gives NaN unless the bound is
    infinite. The module's docstring says why the bound then holds for the rounded results.
    """
    if bound == math.inf:
        return 1.0, 0
    if not math.isfinite(norm) or bound != bound:
        return math.nan, 0
    if bound == 0.0:
        return 0.0, 0
    fraction, power = math.frexp(bound)
    norm_fraction, norm_power = math.frexp(norm)
    slack = SLACK if digits > 24 else 2.0 * SLACK
    quotient = fraction / norm_fraction / (1.0 + roundoff) * (1.0 - slack)
    mantissa, shift = math.frexp(quotient)
    grid = math.ldexp(1.0, digits)
    return math.floor(mantissa * grid) / grid, power - norm_power - exponent + shift


def factor_over(mantissa: float, power: int, scale: float, digits: int) -> tuple[float, int]:
    """Return the factor ``mantissa * 2**power`` over a loss scale, rounded down to `digits`."""
    if not math.isfinite(mantissa):
        return mantissa, power
    fraction, exponent = math.frexp(scale)
    quotient, shift = math.frexp(mantissa / fraction)
    if fraction != 0.5:  # else the quotient is exact
        grid = math.ldexp(1.0, digits)
        quotient = math.floor(quotient * grid) / grid
    return quotient, power + shift - exponent


def truncated_product(
    value: float, mantissa: float, exponent: int, digits: int, lowest: int
) -> float:
    """Return ``value * mantissa * 2**exponent``, subnormal results rounded toward zero.

    `digits` is the precision of the dtype the result is stored in, ``2**lowest`` its smallest
    positive number. A product that is not subnormal is left to the rounding of the store; others
    are cut to multiples of that number, which are stored exactly. The product itself is rounded
    in float64, which the margin of `clip_factor` covers.
    """
    if value == 0.0 or not (math.isfinite(value) and math.isfinite(mantissa)):
        return value * mantissa
    fraction, power = math.frexp(value)
    product = fraction * mantissa
    bits = power + exponent - lowest
    if bits > (digits if abs(product) < 0.5 else digits - 1):
        return math.ldexp(product, power + exponent)
    if bits < 0:
        return math.copysign(0.0, value)
    return math.ldexp(float(math.trunc(math.ldexp(product, bits))), lowest)


def clamped(value: float, low: float, high: float) -> float:
    """Return `value` held between `low` and `high`; NaN stays NaN."""
    if value > high:
        return high
    if value < low:
        return low
    return value


def sgd_velocity(slope: float, velocity: float, momentum: float) -> float:
    """Return the new velocity of gradient descent with momentum."""
    return momentum * velocity + slope


def sgd_direction(slope: float, velocity: float, own: float, lookahead: float) -> float:
    """Return the direction of a step: the velocity (0, 1), or Nesterov's (1, momentum)."""
    return own * slope + lookahead * velocity


def moment(grad: float, average: float, weight: float) -> float:
    """Return an exponential average after adding `grad` with a weight."""
    return average + weight * (grad - average)


def adam_step(mean: float, root_square: float, rate: float, eps: float) -> float:
    """Return Adam's step, from the root of the second moment.

    `rate` and `eps` carry the corrections of the moments' biases.
    """
    return rate * mean / (root_square + eps)


def adam_rate(lr: float, count: float, first: float, second: float) -> tuple[float, float]:
    """Return the rate with the corrections of both moments, and the factor for eps."""
    root_bias = math.sqrt(1.0 - math.pow(second, count))
    return lr * root_bias / (1.0 - math.pow(first, count)), root_bias


def adam_numbers(
    lr: float, decay: float, first: float, second: float, eps: float, count: float
) -> tuple[float, float, float, float, float]:
    """Return the numbers of the `count`-th step of Adam, from the user's settings.

    They are the share of a parameter that decays, the weights of the gradient and of its square in
    their averages, and for `adam_step` the rate and eps.
    """
    rate, root_bias = adam_rate(lr, count, first, second)
    return lr * decay, 1.0 - first, 1.0 - second, rate, eps * root_bias

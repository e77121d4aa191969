"""The scalar mathematics against exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numclip import formulas

finite = st.floats(allow_nan=False, allow_infinity=False)
positive = st.floats(min_value=0.0, exclude_min=True, allow_infinity=False)
DTYPES = {
    "float16": (11, -24),
    "bfloat16": (8, -133),
    "float32": (24, -149),
    "float64": (53, -1074),
}


def exact(mantissa, power):
    return Fraction(mantissa) * Fraction(2) ** power


@given(st.floats(-1e300, 1e300), st.floats(-1e300, 1e300))
def test_two_sum_loses_nothing(a, b):
    total, error = formulas.two_sum(a, b)
    assert total == a + b
    assert Fraction(total) + Fraction(error) == Fraction(a) + Fraction(b)


@given(finite, st.integers(-3000, 3000))
@example(1.0, 1)
@example(1.0, 1024)
@example(0.75, 1024)
@example(-1.5, 1023)
@example(5e-324, 2097)
def test_scale_by_power_rounds_once(value, exponent):
    result = formulas.scale_by_power(value, exponent)
    wanted = exact(value, exponent)
    if math.isinf(result):
        assert abs(wanted) >= 2**1024
    elif abs(wanted) >= Fraction(2) ** -1022:
        assert Fraction(result) == wanted
    else:
        assert abs(Fraction(result) - wanted) <= Fraction(2) ** -1075


@pytest.mark.parametrize("value", [math.inf, -math.inf, 0.0, -0.0])
def test_scale_by_power_keeps_what_has_no_exponent(value):
    for exponent in (7, 2000):
        result = formulas.scale_by_power(value, exponent)
        assert result == value
        assert math.copysign(1.0, result) == math.copysign(1.0, value)
        assert math.isnan(formulas.scale_by_power(math.nan, exponent))


@pytest.mark.parametrize("precision", [precision for precision, _ in DTYPES.values()], ids=DTYPES)
@given(bound=positive, norm=positive, exponent=st.integers(-1000, 1000))
def test_factor_leaves_room_for_rounding(precision, bound, norm, exponent):
    digits = min(53, max(24, precision))
    roundoff = 2.0**-precision
    measured = exact(norm, exponent)
    if measured <= Fraction(bound):
        return
    mantissa, power = formulas.clip_factor(bound, norm, exponent, roundoff, digits)
    factor = exact(mantissa, power)
    assert 0.5 <= mantissa < 1.0
    assert (mantissa * 2**digits).is_integer()
    reached = factor * measured * (1 + Fraction(roundoff)) / Fraction(bound)
    assert reached <= 1 - Fraction(28, 2**53)
    lost = Fraction(36, 2**53) if digits == 53 else Fraction(68, 2**53) + Fraction(2, 2**24)
    assert reached >= 1 - lost


def test_factor_of_special_norms():
    assert formulas.clip_factor(math.inf, math.nan, 0, 0.0, 53) == (1.0, 0)
    assert formulas.clip_factor(0.0, 3.0, 0, 0.0, 53) == (0.0, 0)
    for bound, norm in ((1.0, math.nan), (1.0, math.inf), (math.nan, 1.0), (0.0, math.nan)):
        assert math.isnan(formulas.clip_factor(bound, norm, 0, 0.0, 53)[0])


@pytest.mark.parametrize(("digits", "lowest"), DTYPES.values(), ids=DTYPES)
@given(
    value=finite,
    mantissa=st.integers(2**23, 2**24 - 1).map(lambda n: n / 2**24),
    power=st.integers(-1100, 0),
)
@example(value=3.0 * 2.0**-149, mantissa=0.5, power=0)
@example(value=2.0**-126, mantissa=0.75, power=0)
@example(value=-5e-324, mantissa=0.5, power=0)
@example(value=1.0, mantissa=0.75, power=-7)
@example(value=(1.0 + 2.0**-10) * 2.0**-13, mantissa=0.75, power=0)  # normal in float16
def test_truncated_product_does_not_grow(digits, lowest, value, mantissa, power):
    result = Fraction(formulas.truncated_product(value, mantissa, power, digits, lowest))
    wanted = Fraction(value) * exact(mantissa, power)
    assert abs(result) <= abs(wanted) * (1 + Fraction(1, 2**53))
    assert result * wanted >= 0
    spacing = max(exact(1.0, lowest), abs(wanted) / 2**53)
    assert abs(result - wanted) <= spacing * (1 + Fraction(1, 2**50))
    if abs(wanted) < exact(1.0, lowest + digits - 1):
        assert (result / exact(1.0, lowest)).denominator == 1
    else:  # for the store to round
        assert abs(result - wanted) <= abs(wanted) / 2**53


@pytest.mark.parametrize("value", [0.0, -0.0, math.inf, -math.inf, math.nan])
def test_truncated_product_of_special_values(value):
    result = formulas.truncated_product(value, 0.75, -3, 24, -149)
    np.testing.assert_equal([result, math.copysign(1, result)], [value, math.copysign(1, value)])
    assert math.isnan(formulas.truncated_product(2.0, math.nan, 0, 24, -149))


def test_larger_prefers_nan():
    assert formulas.larger(1.0, 2.0) == formulas.larger(2.0, 1.0) == 2.0
    assert math.isnan(formulas.larger(math.nan, 1.0))
    assert math.isnan(formulas.larger(1.0, math.nan))


@pytest.mark.parametrize(
    ("ord", "term", "norm"),
    [(1.0, 3.0, 8.0), (2.0, 9.0, 8.0**0.5), (3.0, 27.0, 2.0)],
)
def test_power_terms_and_roots(ord, term, norm):
    assert formulas.power_term(3.0, ord) == term
    assert formulas.root(8.0, ord) == pytest.approx(norm, rel=1e-15)
    assert formulas.root(8.0, math.inf) == 8.0


def test_clamped():
    assert [formulas.clamped(x, -1.0, 2.0) for x in (-5.0, 0.5, 7.0)] == [-1.0, 0.5, 2.0]
    assert math.isnan(formulas.clamped(math.nan, -1.0, 2.0))


def test_optimizer_steps():
    assert formulas.sgd_velocity(3.0, 2.0, 0.5) == 4.0
    assert formulas.sgd_direction(3.0, 4.0, 0.0, 1.0) == 4.0
    assert formulas.sgd_direction(3.0, 4.0, 1.0, 0.5) == 5.0
    assert formulas.moment(8.0, 4.0, 0.25) == 5.0
    assert formulas.adam_step(6.0, 2.0, 0.5, 1.0) == 1.0


def test_binned_squares_lose_nothing():
    for exponent in (-1074, -800, -481, -480, -300, 0, 300, 480, 481, 1000, 1023):
        value = math.ldexp(1.0 + 2.0**-20 if exponent > -1040 else 1.0, exponent)
        bins = formulas.binned_square(value)
        assert sum(part != 0.0 for part in bins) == 1, exponent
        total, power = formulas.sum_of_bins(*bins)
        exact = Fraction(value) ** 2
        lost = abs(Fraction(total) * Fraction(4) ** power - exact)
        assert lost <= exact * Fraction(2) ** -53, exponent


def test_joined_bins_keep_what_counts():
    limit, unit = formulas.BIN_LIMIT, 2.0**-50
    parts = {power: math.ldexp(1.0, power) for power in (-500, -480, 400, 480, 500)}
    for large, small in [(500, 480), (400, -480), (-480, -500)]:
        bins = [formulas.binned_square(parts[power]) for power in (large, small)]
        total, power = formulas.sum_of_bins(*map(sum, zip(*bins, strict=True)))
        exact = sum(Fraction(parts[power]) ** 2 for power in (large, small))
        assert abs(Fraction(total) * Fraction(4) ** power / exact - 1) <= unit
    assert formulas.sum_of_bins(*formulas.binned_square(0.0))[0] == 0.0
    assert math.isnan(formulas.sum_of_bins(*formulas.binned_square(math.nan))[0])
    assert formulas.sum_of_bins(*formulas.binned_square(math.inf))[0] == math.inf
    assert limit**2 < 2.0**1000


def test_an_infinite_sum_has_no_error():
    assert formulas.settled(1.0, 2.0**-60) == 1.0
    assert formulas.settled(math.inf, math.nan) == math.inf


@pytest.mark.parametrize("scale", [1024.0, 3.0, 0.1])
def test_factor_over_a_loss_scale_is_rounded_down(scale):
    mantissa, power = formulas.factor_over(0.75, -3, scale, 24)
    exact = Fraction(0.75) / 8 / Fraction(scale)
    found = Fraction(mantissa) * Fraction(2) ** power
    assert exact * (1 - Fraction(2) ** -23) <= found <= exact * (1 + Fraction(2) ** -52)
    assert math.isnan(formulas.factor_over(math.nan, 0, scale, 24)[0])


def test_adam_numbers_correct_both_biases():
    share, first, second, rate, eps = formulas.adam_numbers(0.1, 0.01, 0.9, 0.99, 1e-8, 2.0)
    assert (share, first, second) == pytest.approx((0.001, 0.1, 0.01))
    root_bias = math.sqrt(1.0 - 0.99**2)
    assert rate == pytest.approx(0.1 * root_bias / (1.0 - 0.9**2))
    assert eps == pytest.approx(1e-8 * root_bias)


ORDERS = [1.0, 1.1, 2.5, 3.0, 4.0, 7.0, 33.3, 2000.0, 1e9 / 3, 2.0**46 - 0.25]


@pytest.mark.parametrize("ord", ORDERS)
@given(positive, st.integers(-60, 60), st.integers(1, 1 << 40))
def test_norms_belong_to_sums_of_powers(ord, peak, shift, count):
    """Of so many elements as large as the peak, which stands for ``2**shift`` times as much."""
    scale = formulas.usable(peak, ord)
    total = count * formulas.power_term(peak / scale, ord)
    root, power = formulas.norm_of(*formulas.power_sum(total, scale, shift, ord), ord)
    fraction, exponent = math.frexp(peak)
    wanted = fraction * math.exp(math.log(count) / ord)
    assert math.ldexp(root, power - exponent - shift) == pytest.approx(wanted, rel=1e-14)


@pytest.mark.parametrize("ord", [1.0, 3.0, 4.0])
@given(positive, st.integers(0, 50))
def test_sums_of_products_do_not_depend_on_the_scale(ord, peak, more):
    """Of a larger scale, so that no digits vanish."""
    scale = formulas.usable(peak, ord)
    larger = math.ldexp(scale, min(more, 1023 - math.frexp(scale)[1]))
    found = [
        formulas.power_sum(formulas.power_term(1.5 * scale / own, ord), own, 0, ord)
        for own in (scale, larger)
    ]
    one, other = (Fraction(total) * Fraction(4) ** exponent for total, exponent in found)
    assert one == other == (Fraction(3, 2) * Fraction(scale)) ** int(ord)


def test_magnitudes_are_divided_by_a_largest_one_that_is_a_positive_number():
    assert formulas.usable(0.25, 1.5) == 0.25
    assert formulas.usable(0.75, 1.5) == 0.75
    assert formulas.usable(0.75, 3.0) == 0.5
    assert formulas.usable(5e-324, 3.0) == 2.0**-1022
    for ord in (1.0, 2.5):
        assert [formulas.usable(peak, ord) for peak in (0.0, math.inf, math.nan)] == [1.0] * 3


def test_sums_of_squares_are_safe_within_a_range():
    for total in (0.0, 2.0**-961, 2.0**-959, 1.0, 2.0**999, 2.0**1001, math.inf):
        assert formulas.is_safe(total) is (2.0**-960 < total < 2.0**1000)


@pytest.mark.parametrize("error", [2.0**-60, 2.0**-53, -(2.0**-54), 3 * 2.0**-53])
def test_sums_are_settled_where_doubt_changes_no_bit(error):
    assert formulas.is_settled(1.0, error, 0.0)
    is_midway = error != 2.0**-60
    assert formulas.is_settled(1.0, error, 2.0**-65) is not is_midway
    assert formulas.is_settled(1.0, -error / 3, 2.0**-65)

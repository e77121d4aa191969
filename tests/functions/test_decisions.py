"""The decision, from a norm and a law to a factor, in exact rational arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from numclip import decisions
from numclip import tables as t

U, TINY = 2.0**-24, 2.0**-126  # of float32
norms = st.floats(1e-20, 1e20)
scales = st.sampled_from([1.0, 1024.0, 3.0, 0.1])


def law_of(**columns):
    """Return the law of a pool of float32 without a divisor or a given norm, but for `columns`."""
    law = np.zeros(t.LAW_COLUMNS)
    usual = {"divisor": 1.0, "given": -1.0, "roundoff": U, "tiny": TINY, "unscale": 1.0, "ord": 2.0}
    for name, value in {**usual, **columns}.items():
        law[getattr(t, name.upper())] = value
    law[t.AIM] = columns.get("aim", law[t.BOUND])
    return law


def decide(law, norm, exponent=0, *, spread=0.0, policy=t.PROPAGATE, digits=24, bad=0.0):
    """Return the decision on a pool of a norm ``norm * 2**exponent``."""
    out = np.full(t.DECISION_COLUMNS, np.nan)
    out[t.ROOT], out[t.ROOT_EXPONENT], out[t.CANCELLATION] = norm, exponent, spread
    decisions.decide(law, policy, digits, bad, out)
    return out


def factor_in(out):
    assert out[t.FACTOR] == math.ldexp(out[t.MANTISSA], int(out[t.POWER]))
    return Fraction(out[t.FACTOR])


@given(norms, norms, scales, st.sampled_from([0.0, 1.0, 1.5, 40.0]), st.sampled_from([24, 53]))
@example(1.0, 1.0, 3.0, 1.5, 24)
@example(2.0, 1.0, 1.0, 1.5, 53)
def test_the_factor_reaches_the_bound_and_no_more(norm, bound, unscale, spread, digits):
    law = law_of(bound=bound, unscale=unscale)
    out = decide(law, norm, spread=spread, digits=digits)
    factor, exact = factor_in(out), 1 / Fraction(unscale)
    if norm > bound:
        roundoff = Fraction(U) * Fraction(max(spread, 1.0))
        exact *= Fraction(bound) / Fraction(norm) / (1 + roundoff)
    units = 4 * Fraction(2) ** -digits + 68 * Fraction(2) ** -53
    assert exact * (1 - units) <= factor <= exact * (1 + Fraction(2) ** -51)
    own = Fraction(out[t.SCALE]) / Fraction(unscale)
    assert own * (1 - Fraction(2) ** -51) <= Fraction(out[t.FINE]) <= own * (1 + Fraction(2) ** -51)
    assert out[t.NORM] == norm
    assert out[t.CLIPPED] == pytest.approx(min(norm, bound), rel=1e-5)
    if norm <= bound and unscale == 1.0:
        assert out[t.MODE] == t.LEAVE
    elif min(out[t.SCALE], factor) < TINY:
        assert out[t.MODE] == t.TRUNCATE
    else:
        assert out[t.MODE] == t.MULTIPLY


@pytest.mark.parametrize("policy", [t.SKIP, t.RAISE])
def test_what_is_skipped_is_left(policy):
    for unscale in (1.0, 3.0):
        out = decide(law_of(bound=1.0, unscale=unscale), math.inf, policy=policy, bad=1.0)
        assert out[t.SKIPPED] == 1.0
        assert out[t.MODE] == t.LEAVE
        assert out[[t.FACTOR, t.FINE, t.SCALE, t.MANTISSA, t.POWER]].tolist() == [1, 1, 1, 1, 0]
        assert out[t.NORM] == out[t.CLIPPED] == math.inf
        out = decide(law_of(bound=1.0, unscale=unscale), 4.0, policy=policy)
        assert out[t.SKIPPED] == 0.0
        assert out[t.MODE] == t.MULTIPLY


def test_what_is_not_finite_is_nan_or_zero():
    for norm in (math.nan, math.inf):
        out = decide(law_of(bound=1.0), norm, bad=1.0)
        assert out[t.MODE] == t.MULTIPLY
        assert np.isnan(out[[t.FACTOR, t.FINE, t.CLIPPED]]).all()
        assert decide(law_of(bound=math.inf), norm, bad=1.0)[t.FACTOR] == 1.0
    for norm, factor in ((4.0, 0.25), (0.5, 1.0)):
        out = decide(law_of(bound=1.0), norm, policy=t.ZERO, bad=1.0)
        assert out[t.MODE] == t.CLEAN
        assert out[t.FACTOR] == pytest.approx(factor, rel=1e-6)
        assert decide(law_of(bound=1.0), norm, policy=t.ZERO)[t.MODE] != t.CLEAN


def test_a_bound_of_zero_clips_what_underflows_but_no_zeros():
    assert decide(law_of(bound=0.0), 0.0)[t.MODE] == t.LEAVE
    for exponent in (0, -3000):
        out = decide(law_of(bound=0.0), 1.0, exponent)
        assert out[t.MODE] == t.MULTIPLY
        assert out[t.FACTOR] == out[t.CLIPPED] == 0.0


def test_results_are_truncated_where_the_grain_or_the_factor_asks_for_it():
    cases = [
        ({"bound": 1.0, "truncate_below": 0.5}, t.MULTIPLY),
        ({"bound": 1.0, "truncate_below": 1.5}, t.TRUNCATE),
        ({"bound": 2.0, "aim": 1.0, "truncate_below": 1.5}, t.TRUNCATE),
        ({"bound": 8.0 * TINY}, t.MULTIPLY),
        ({"bound": 2.0 * TINY}, t.TRUNCATE),
        ({"bound": 8.0 * TINY, "unscale": 64.0}, t.TRUNCATE),
        ({"bound": 1e30, "unscale": 2.0**127}, t.TRUNCATE),
        ({"bound": 0.0, "aim": 0.0, "truncate_below": 1.0, "unscale": 2.0}, t.MULTIPLY),
    ]
    for columns, mode in cases:
        assert decide(law_of(**columns), 4.0)[t.MODE] == mode, columns
    assert decide(law_of(bound=8.0, truncate_below=9.0), 4.0)[t.MODE] == t.LEAVE
    out = decide(law_of(bound=2.0, aim=1.0), 4.0)
    assert out[t.CLIPPED] == pytest.approx(1.0, rel=1e-6)


def test_a_given_norm_takes_the_place_of_the_measured_one():
    for given_norm, factor in ((8.0, 0.25), (1.0, 1.0), (0.0, 1.0)):
        out = decide(law_of(bound=2.0, given=given_norm), 4.0)
        assert out[t.NORM] == given_norm
        assert out[t.FACTOR] == pytest.approx(factor, rel=1e-6)
    assert decide(law_of(bound=2.0, given=math.nan), 4.0)[t.MODE] == t.MULTIPLY
    out = decide(law_of(bound=2.0, given=math.nan), 4.0, policy=t.ZERO, bad=1.0)
    assert out[t.NORM] == 4.0
    # Terms of eight times the measured norm are of four times the given one.
    law = law_of(bound=2.0, given=8.0, roundoff=2.0**-8)
    own = decide(law, 1.0, 2, spread=8.0, digits=53)
    assert own[t.FACTOR] == pytest.approx(0.25 / (1.0 + 4.0 * 2.0**-8), rel=1e-12)
    assert decide(law_of(bound=2.0, given=0.0), 4.0, spread=8.0)[t.FACTOR] == 1.0


def test_norms_are_roots_of_sums_over_divisors():
    def norm(total, exponent=0, bad=0.0, **columns):
        out = np.full(t.DECISION_COLUMNS, np.nan)
        decisions.write_norm(law_of(**columns), total, exponent, bad, out)
        assert out[t.CANCELLATION] == 0.0
        return math.ldexp(out[t.ROOT], int(out[t.ROOT_EXPONENT])), out[t.BROKEN]

    assert norm(16.0, 3) == (32.0, 0.0)
    assert norm(16.0, 3, divisor=4.0, unscale=0.5) == (16.0, 0.0)
    assert norm(81.0, 2, ord=4.0) == (6.0, 0.0)
    assert norm(3.0, 5, ord=math.inf) == (3072.0, 0.0)
    for total in (0.0, math.inf):
        assert norm(total, 5, ord=3.0) == (total, 0.0)
    assert math.isnan(norm(math.nan, ord=3.0)[0])
    for value, broken in ((math.nan, 3.0), (math.inf, 3.0), (7.0, 2.0), (0.0, 2.0), (-1.0, 2.0)):
        assert norm(1.0, bad=2.0, given=value)[1] == broken


def test_the_spread_is_by_how_much_magnitudes_exceed_their_sums():
    def spread(sums, terms, **columns):
        out = np.full(t.DECISION_COLUMNS, -1.0)
        decisions.write_cancellation(law_of(**columns), sums, terms, out)
        return out[t.CANCELLATION]

    assert spread((4.0, 1), (36.0, 2)) == 6.0
    assert spread((4.0, 1), (4.0, -700)) == 2.0**-701
    assert spread((0.0, 0), (36.0, 0)) == -1.0
    assert spread((2.0, 0), (5.0, 1), ord=math.inf) == 10.0


def test_relative_bounds_are_of_ratios():
    def relative(bound, norm, param, eps=0.0, truncate_below=0.0):
        law = law_of(bound=bound, eps=eps, truncate_below=truncate_below)
        bound, (root, power), truncate_below = decisions.relative(law, norm, param)
        return bound, math.ldexp(root, int(power)), truncate_below

    assert relative(0.5, (6.0, 1), (3.0, 3), truncate_below=12.0) == (0.5, 0.5, 0.5)
    assert relative(0.5, (6.0, 0), (3.0, -3), eps=0.5) == (0.5, 12.0, 0.0)
    assert relative(0.5, (6.0, 0), (3.0, -3), eps=0.375) == (0.5, 16.0, 0.0)
    # Of a parameter of zeros nothing is left, unless nothing is to be clipped.
    assert relative(0.5, (6.0, 1), (0.0, 0), truncate_below=3.0) == (0.0, 12.0, 3.0)
    assert relative(math.inf, (6.0, 1), (0.0, 0)) == (math.inf, 12.0, 0.0)
    # A bound without all its digits is told as one with them, and so is the ratio.
    assert relative(2.0**-1030, (6.0, -1030), (3.0, 0), truncate_below=3 * 2.0**-1000) == (
        0.5,
        1.0,
        2.0**29,
    )

"""The grid of magnitudes that LAPACK's test of nrm2 goes through, for every dtype and target.

Two magnitudes share each vector: 0, the smallest subnormal, the smallest normal number, the
spacing at 1, 1, and their reciprocals, then Inf and NaN.
"""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.oracle import cases, checks, reference

pytestmark = pytest.mark.within_njit
LENGTHS = (2, 7, 130, 33)
LARGE = 40_003
NAMES = ("0", "tiny", "safmin", "ulp", "1", "1/ulp", "huge", "safmax", "inf", "nan")


def magnitudes(dtype: Any) -> dict[str, float]:
    info = reference.float_info(dtype)
    tiny, safmin, ulp = float(info.smallest_subnormal), float(info.tiny), float(info.eps)
    values = [0.0, tiny, safmin, ulp, 1.0, 1 / ulp, float(info.max), 1 / safmin, math.inf, math.nan]
    return dict(zip(NAMES, values, strict=True))


def vector(dtype: np.dtype, first: float, second: float, size: int) -> np.ndarray:
    """Alternately one magnitude and the other, with changing signs."""
    real = reference.real_dtype(dtype)
    numbers = np.empty(size * dtype.itemsize // real.itemsize)
    numbers[::2], numbers[1::2] = first, second
    numbers[::3] *= -1
    return numbers.astype(real).view(dtype)


def check(target: Any, grad: np.ndarray) -> None:
    exact = reference.norm([grad])
    norm = target.global_norm([grad])
    clip_norms = [1.0] if not 0 < exact < math.inf else [exact / 3, exact * 0.999, 1e-8, 5e-324]
    if not reference.all_finite([grad]):
        np.testing.assert_equal(norm, exact)
        (clipped,), norm = target.clip_by_global_norm([grad], 1.0)
        np.testing.assert_equal(norm, exact)
        checks.assert_all_nan(clipped)
        checks.assert_all_nan(target.clip_by_norm(grad, 1.0))
        return
    checks.assert_norm(norm, [grad])
    for clip_norm in clip_norms:
        squared = Fraction(clip_norm) ** 2
        (clipped,), same_norm = target.clip_by_global_norm([grad], clip_norm)
        assert same_norm == norm
        checks.assert_clipped([grad], [clipped], squared, norm)
        checks.assert_clipped([grad], [target.clip_by_norm(grad, clip_norm)], squared)


@pytest.mark.each_value
@pytest.mark.many_calls
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("name", reference.DTYPES)
def test_pairs_of_magnitudes(target, name, first):
    dtype = reference.DTYPES[name]
    values = magnitudes(dtype)
    for second in NAMES:
        for size in LENGTHS:
            check(target, vector(dtype, values[first], values[second], size))


@pytest.mark.full
@pytest.mark.jit_only
@pytest.mark.parametrize("first", NAMES)
@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_pairs_of_magnitudes_in_long_vectors(name, first):
    """One element differs from 40 002 others."""
    dtype = reference.DTYPES[name]
    values = magnitudes(dtype)
    for second in NAMES:
        grad = np.full(LARGE, values[second]).astype(dtype)
        grad[LARGE // 2] = values[first]
        exact = reference.norm([grad])
        norm = nc.global_norm([grad])
        if reference.all_finite([grad]):
            checks.assert_norm(norm, [grad])
            bound = exact / 3 if 0 < exact < math.inf else 1.0
            (clipped,), _ = nc.clip_by_global_norm([grad], bound)
            checks.assert_clipped([grad], [clipped], Fraction(bound) ** 2, norm)
        else:
            np.testing.assert_equal(norm, exact)


@pytest.mark.parametrize("ord", [1, 1.5, 3, 10, 100.0, math.inf])
@pytest.mark.parametrize("name", reference.DTYPES)
def test_other_orders_at_every_magnitude(target, name, ord):
    dtype = reference.DTYPES[name]
    for magnitude in magnitudes(dtype).values():
        grad = vector(dtype, magnitude, magnitude / 2, 7)
        exact = reference.norm([grad], ord)
        np.testing.assert_allclose(target.global_norm([grad], ord), exact, rtol=1e-12, atol=5e-324)


@pytest.mark.parametrize(
    ("name", "value", "count", "clip_norm"),
    [
        ("float32", 1e20, 4, 1.0),
        ("float32", 1e-30, 4, 1e-31),
        ("float32", 3e38, 1000, 1e38),
        ("float32", 1e-43, 1000, 1e-42),
        ("float16", 300.0, 1000, 1.0),
        ("float16", 1e-4, 1000, 1e-3),
        ("bfloat16", 3e38, 1000, 1.0),
        ("float64", 1e200, 4, 1.0),
        ("float64", 1e-200, 4, 1e-201),
        ("float64", 1.7e308, 100, 1.0),
        ("complex128", 1e308 + 1e308j, 3, 2.0),
    ],
)
def test_where_squares_overflow_or_underflow(target, name, value, count, clip_norm):
    grad = np.full(count, value).astype(reference.DTYPES[name])
    (clipped,), norm = target.clip_by_global_norm([grad], clip_norm)
    checks.assert_norm(norm, [grad])
    checks.assert_scaled([grad], [clipped], Fraction(clip_norm) ** 2)
    assert np.any(clipped != 0)


@pytest.mark.full
@pytest.mark.parametrize("power", [0, 665, -665])
def test_sums_whose_rounding_errors_all_go_one_way(target, power):
    grad = np.full((128, 128), math.ldexp(float.fromhex("0x1.f83122fb3b533p+0"), power))
    for array in (grad.reshape(-1), cases.strided(grad)):
        checks.assert_norm(target.global_norm([array]), [array])


# The clip, the axes it reduces, and the square of the norm it allows.
RULES = {
    "global_norm": (
        lambda target, g, c: target.clip_by_global_norm([g], c)[0][0],
        None,
        lambda _, c: Fraction(c) ** 2,
    ),
    "norm": (lambda target, g, c: target.clip_by_norm(g, c), None, lambda _, c: Fraction(c) ** 2),
    "columns": (
        lambda target, g, c: target.clip_by_norm(g, c, 0),
        0,
        lambda _, c: Fraction(c) ** 2,
    ),
    "rows": (lambda target, g, c: target.clip_by_norm(g, c, 1), 1, lambda _, c: Fraction(c) ** 2),
    "average_norm": (
        lambda target, g, c: target.clip_by_average_norm(g, c),
        None,
        reference.average_norm_bound,
    ),
    "block_rms": (
        lambda target, g, c: target.clip_by_block_rms(g, c),
        None,
        reference.block_rms_bound,
    ),
    "adaptive": (
        lambda target, g, c: target.adaptive_clip(g, np.full(g.shape, 2.0), c),
        0,
        lambda unit, c: reference.adaptive_bound(np.full(unit.shape, 2.0), c, 1e-3),
    ),
}


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e-300])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["float32", "float64", "complex128"])
def test_bounds_of_a_few_subnormals(target, name, rule, scale):
    """Where rounding a result up by half a smallest subnormal would break the bound."""
    clip, axes, squared_bound = RULES[rule]
    rng = np.random.default_rng(6)
    for rows, count in itertools.product((1, 2, 6, 11), (1, 2, 3, 7, 16, 39)):
        numbers = rng.uniform(0.5, 1, (rows, 4)) * rng.choice([-scale, scale], (rows, 4))
        grad = (numbers * (1 + 1j if name == "complex128" else 1)).astype(name)
        bound = count * 5e-324
        clipped = clip(target, grad, bound)
        for unit in reference.units(grad.shape, axes):
            squared = squared_bound(grad[unit], bound)
            checks.assert_clipped([grad[unit]], [clipped[unit]], squared)


@pytest.mark.each_value
@pytest.mark.parametrize("name", reference.REAL_DTYPES)
def test_value_bounds_of_a_few_subnormals_are_rounded_to_nearest(target, name):
    dtype = reference.DTYPES[name]
    smallest = float(reference.float_info(dtype).smallest_subnormal)
    low, high = (-4.0, 7.0) if dtype == np.float64 else (-3.6, 6.7)
    grad = (np.arange(-10, 10) * smallest).astype(dtype)
    for own in (grad, np.repeat(grad, 2)[::2]):
        held = target.clip_by_value(own, low * smallest, high * smallest)
        expected = (np.clip(np.arange(-10, 10), -4, 7) * smallest).astype(dtype)
        checks.assert_same_bits(held, expected)
    if dtype.itemsize == 2:  # rounded once: float32 has no number between this and the midway one
        low = 1.0 + 2.0 ** -reference.PRECISION[name] + 2.0**-40
        held = target.clip_by_value(np.zeros(3, dtype), low, 2.0)
        checks.assert_same_bits(held, reference.nearest(np.full(3, low), dtype))


@pytest.mark.each_value
@pytest.mark.parametrize("factor", [0.0, 5e-324, 1e-310])
@pytest.mark.parametrize("sizes", [(1e-219, 1e307), (7e-24, 1e300), (5e-324, 1e48)])
def test_ratios_that_underflow_are_held_to_their_bound(target, factor, sizes):
    size, owner = sizes
    grad, param = np.array([[size, 0.0], [0.0, size]]), np.full((2, 2), owner)
    clipped = target.adaptive_clip(grad, param, factor)
    for column in range(2):
        unit = grad[:, column], clipped[:, column]
        bound = reference.adaptive_bound(param[:, column], factor, 0.0)
        checks.assert_clipped(*([one] for one in unit), bound)


@pytest.mark.parametrize("name", ["float64", "complex128"])
def test_averages_that_underflow_are_held_to_a_bound_of_0(target, name):
    grad = np.full(7, 5e-324, name)
    checks.assert_same_bits(target.clip_by_average_norm(grad, 0.0), 0 * grad)

"""The oracles themselves, against numbers from independent sources."""

from __future__ import annotations

import math
from fractions import Fraction
from types import SimpleNamespace

import numpy as np
import pytest

from tests.oracle import reference


@pytest.mark.parametrize(
    ("square", "expected"),
    [
        (0, 0.0),
        (25, 5.0),
        (Fraction(1, 4), 0.5),
        (2, math.sqrt(2)),
        (Fraction(10) ** 500, 1e250),
        (Fraction(1, 10**500), 1e-250),
        (Fraction(5e-324) ** 2, 5e-324),
        (Fraction(1.7e308) ** 2 * 4, math.inf),
        # One half ulp above 1 rounds to even, anything more rounds up.
        ((1 + Fraction(1, 2**53)) ** 2, 1.0),
        ((1 + Fraction(1, 2**53) + Fraction(1, 2**90)) ** 2, 1 + 2**-52),
    ],
)
def test_root_is_correctly_rounded(square, expected):
    assert reference.root(Fraction(square)) == expected


@pytest.mark.parametrize("name", reference.DTYPES)
def test_square_sum_is_exact(name):
    dtype = reference.DTYPES[name]
    info = reference.float_info(dtype)
    array = np.array([3, -4, float(info.smallest_subnormal), float(info.max)]).astype(dtype)
    expected = sum(Fraction(c) ** 2 for c in reference.components(array).tolist())
    assert reference.array_square_sum(array) == expected
    assert reference.array_square_sum(array[:2]) == 25


def test_complex_numbers_have_two_components():
    assert reference.norm([np.array([3 + 4j], np.complex64)]) == 5
    assert reference.norm([np.array([3 + 4j, 12])], 1) == 17


def test_precision_matches_the_dtypes():
    for name, dtype in reference.DTYPES.items():
        assert 2.0 ** (1 - reference.PRECISION[name]) == float(reference.float_info(dtype).eps)


@pytest.mark.parametrize("ord", [1, 1.5, 2, 3, 7.25, math.inf])
def test_norm_agrees_with_numpy(ord):
    x = np.random.default_rng(0).standard_normal(50)
    assert reference.norm([x[:20], None, x[20:]], ord) == pytest.approx(
        np.linalg.norm(x, ord), rel=1e-14
    )


def test_repeated_rows_add_up():
    slices = SimpleNamespace(
        values=np.array([[3.0, 0], [1, 1], [4, 0]]),
        indices=np.array([2, 0, 2]),
        dense_shape=(3, 2),
    )
    np.testing.assert_array_equal(reference.densify(slices), [[1, 1], [0, 0], [7, 0]])
    assert reference.square_sum([slices]) == 51
    assert reference.square_sum([slices], "raw") == 27
    assert reference.uncancelled_square_sum([slices]) == 51
    slices.values[2, 0] = -4
    assert reference.square_sum([slices]) == 3
    assert reference.uncancelled_square_sum([slices]) == 51


def test_norm_within():
    one = Fraction(1)
    slack = 4 * reference.ulp(1.0, 53)
    assert slack == Fraction(2) ** -50
    assert reference.norm_within(1 + 2.0**-50, one, slack)
    assert not reference.norm_within(1 + 2.0**-49, one, slack)
    assert not reference.norm_within(1 - 2.0**-49, one, slack)
    assert not reference.norm_within(math.inf, one, slack)
    assert not reference.norm_within(math.nan, one, slack)
    assert reference.ulp(1.0, 24) == Fraction(2) ** -23
    assert reference.ulp(5e-324, 53) == Fraction(5e-324)


def test_ulp_distance_crosses_zero():
    smallest = np.float32(1e-45)
    a = np.array([1, -smallest, 0.0, -1], np.float32)
    b = np.array([np.nextafter(np.float32(1), np.float32(2)), smallest, -0.0, -1], np.float32)
    assert reference.ulp_distance(a, b).tolist() == [1, 2, 0, 0]


def test_units_of_axes():
    grad = np.arange(24.0).reshape(2, 3, 4)
    assert [grad[u].shape for u in reference.units(grad.shape, (0, -1))] == [(2, 4)] * 3
    assert [grad[u].shape for u in reference.units(grad.shape, None)] == [(2, 3, 4)]
    clipped = reference.clip_by_norm(grad, 1.0, 1)
    lengths = np.linalg.norm(grad, axis=1, keepdims=True)
    np.testing.assert_allclose(clipped, grad / np.maximum(lengths, 1), rtol=1e-15)


def test_adaptive_clip_of_two_columns():
    grad = np.array([[3.0, 0.3], [4.0, 0.4]])
    param = np.array([[1.0, 0.0], [0.0, 0.0]])
    expected = [[0.06, 0.06 * 1e-3], [0.08, 0.08 * 1e-3]]
    np.testing.assert_allclose(reference.adaptive_clip(grad, param, 0.1), expected, rtol=1e-15)


@pytest.mark.parametrize(
    ("layerwise", "count"), [(None, 1), ("uniform", [1, 1]), ("proportional", [1, 1])]
)
def test_clip_per_example_of_two(layerwise, count):
    grads = [np.array([[3.0], [0.1]]), np.array([[4.0, 0, 0], [0.1, 0, 0]])]
    bounds = {None: (0.6, 0.8), "uniform": (0.5**0.5,) * 2, "proportional": (0.5, 0.75**0.5)}
    (a, b), clipped = reference.clip_per_example(grads, 1.0, layerwise)
    assert clipped == count
    assert (a[0], b[0]) == pytest.approx([s + 0.1 for s in bounds[layerwise]])

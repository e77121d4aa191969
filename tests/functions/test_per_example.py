"""clip_per_example on every target: axis 0 of every gradient is the example."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

import numclip as nc
from tests.oracle import cases, reference

SHAPES = [(9, 5, 3), (9,), (9, 2, 0), (9, 4)]


@pytest.mark.parametrize("layerwise", [None, "uniform", "proportional"])
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize("clip_norm", [1e-2, 3.0, 1e3])
def test_sums_and_counts(target, dtype, layerwise, clip_norm):
    rng = np.random.default_rng(3)
    grads = [(rng.standard_normal(shape) * 0.7).astype(reference.DTYPES[dtype]) for shape in SHAPES]
    grads[0][4] *= 10
    before = [grad.tobytes() for grad in grads]
    summed, count = target.clip_per_example(grads, clip_norm, layerwise=layerwise)
    expected, clipped = reference.clip_per_example(grads, clip_norm, layerwise)
    assert [grad.tobytes() for grad in grads] == before
    assert count == clipped
    for new, exact, grad in zip(summed, expected, grads, strict=True):
        assert new.dtype == grad.dtype
        scale = min(clip_norm, float(np.max(np.abs(reference.wide(grad)), initial=0)))
        # Nine terms, each rounded after scaling, summed in any order.
        slack = 2 * len(grad) * float(reference.unit_roundoff(new.dtype)) * scale * len(grad)
        np.testing.assert_allclose(reference.wide(new), exact, rtol=0, atol=slack)


def test_structure_and_counts(target):
    rng = np.random.default_rng(21)
    batch = {"w": cases.normal(rng, (5, 4, 3)), "none": None, "b": cases.normal(rng, (5, 3))}
    summed, count = target.clip_per_example(batch, 1e-2)
    assert type(count) is int
    assert count == 5
    assert summed["none"] is None
    assert [summed[key].shape for key in ("w", "b")] == [(4, 3), (3,)]
    assert list(summed) == list(batch)
    for layerwise in ("uniform", "proportional"):
        _, counts = target.clip_per_example(batch, 1e-2, layerwise=layerwise)
        assert counts == {"w": 5, "none": None, "b": 5}


def test_without_examples(target):
    summed, count = target.clip_per_example([np.empty((0, 4), np.float32)], 1.0)
    assert count == 0
    np.testing.assert_array_equal(summed[0], np.zeros(4))


def test_keeps_every_example_within_the_bound(target):
    rng = np.random.default_rng(21)
    batch = [cases.normal(rng, (1, 30)), cases.normal(rng, (1, 2, 2))]
    summed, count = target.clip_per_example(batch, 0.5)
    assert count == 1
    assert reference.norm(summed) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize("layerwise", [None, "uniform", "proportional"])
def test_any_layout(layerwise):
    rng = np.random.default_rng(21)
    grads = [cases.normal(rng, (6, 5, 3)), cases.normal(rng, (6, 4), "float64")]
    expected, count = nc.clip_per_example(grads, 1.0, layerwise=layerwise)
    for make in cases.LAYOUTS.values():
        summed, same_count = nc.clip_per_example(
            [make(grad) for grad in grads], 1.0, layerwise=layerwise
        )
        assert same_count == count
        for new, old in zip(summed, expected, strict=True):
            assert new.dtype == old.dtype
            np.testing.assert_allclose(new, old, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_example_that_is_not_finite_spoils_the_sums(target, bad):
    grads = [np.ones((3, 2)), np.ones((3, 4), np.float32)]
    grads[1][1, 2] = bad
    summed, _ = target.clip_per_example(grads, 1.0)
    assert all(np.isnan(new).all() for new in summed)
    summed, _ = target.clip_per_example(grads, 1.0, layerwise="uniform")
    np.testing.assert_array_equal(np.isnan(summed[0]), [False, False])
    assert np.isnan(summed[1]).all()


def test_extreme_magnitudes(target):
    for name, magnitude in (("float32", 3e38), ("float32", 1e-44), ("float64", 1e300)):
        grads = [np.full((4, 6), magnitude, name), np.full((4, 3), magnitude, name)]
        summed, count = target.clip_per_example(grads, magnitude / 4)
        assert count == 4
        expected, _ = reference.clip_per_example(grads, magnitude / 4)
        smallest = float(reference.float_info(name).smallest_subnormal)
        for new, exact in zip(summed, expected, strict=True):
            np.testing.assert_allclose(new, exact, rtol=1e-6, atol=4 * smallest)
    for bound in (1e-310, 3e-323, 2e-320):  # by factors of a few bits, or under all numbers
        for size in (1e13, 1e300):
            grads = [np.full((5, 4), size), np.full((5, 5), -size), np.ones((5, 1), np.float32)]
            grads[0][3] = grads[1][3] = bound / 8  # is added as it is
            grads[2][3] = 0
            summed, count = target.clip_per_example(grads, bound)
            assert count == 4
            assert reference.square_sum(summed) <= (4 * Fraction(bound) * Fraction(9, 8)) ** 2
            for new, sign in zip(summed, (1, -1, 0), strict=True):
                wanted = sign * (4 * bound / 3) + abs(sign) * bound / 8
                np.testing.assert_allclose(new, wanted, rtol=0, atol=6 * 5e-324)
    for name in ("float16", "bfloat16"):
        smallest = float(reference.float_info(name).smallest_subnormal)
        grads = [(np.arange(1, 19).reshape(6, 3) * smallest).astype(reference.DTYPES[name])]
        for count in (3, 40, 1000):
            (new,), _ = target.clip_per_example(grads, count * smallest)
            (exact,), _ = reference.clip_per_example(grads, count * smallest)
            assert (np.abs(reference.wide(new) - exact) <= 0.5001 * smallest).all()

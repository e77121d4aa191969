"""Inputs made to break a promise: systematic rounding, rows that cancel, hashes that meet."""

import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference

# Its square is just under half a unit of roundoff of 1: added to 1, it is lost every time.
LOST = math.sqrt(2**-53) * (1 - 1e-9)


def assert_at_most(results, bound):
    square = reference.square_sum(results)
    assert square <= Fraction(bound) ** 2, f"{reference.root(square)!r} exceeds {bound!r}"


@pytest.mark.jit_only  # counts on the lanes of compiled loops
@pytest.mark.parametrize("large", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("period", [64, 128, 256, 1024])
def test_sums_that_lose_every_term(large, period):
    block = np.full(period, LOST)
    block[:large] = 1.0
    grad = np.tile(block, 200)
    exact = reference.square_sum([grad])
    norm = nc.global_norm([grad])
    assert reference.norm_within(norm, exact, 4 * Fraction(math.ulp(norm)))
    (clipped,), _ = nc.clip_by_global_norm([grad], 0.5)
    assert_at_most([clipped], 0.5)
    assert nc.global_norm([clipped]) <= 0.5


@pytest.mark.jit_only
@pytest.mark.parametrize("large", [1, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("period", [256, 512, 1024])
def test_narrow_sums_that_lose_every_term(large, period):
    block = np.full(period, 2.0**-27 * (1 + 2**-20), np.float32)
    block[:large] = 1.0
    grad = np.tile(block, 100)
    (clipped,), norm = nc.clip_by_global_norm([grad], 0.5)
    exact = reference.square_sum([grad])
    assert reference.norm_within(norm, exact, Fraction(norm) * 20 / 2**53)
    assert_at_most([clipped], 0.5)
    assert nc.global_norm([clipped]) <= 0.5


@pytest.mark.parametrize("rows", [8, 64, 256, 1000])
@pytest.mark.parametrize("clip", ["norm", "adaptive"])
def test_columns_that_lose_every_term(rows, clip):
    grad = np.full((rows, 2), LOST)
    grad[0] = 1.0
    if clip == "norm":
        clipped = nc.clip_by_norm(grad, 0.5, axes=0)
    else:
        clipped = nc.adaptive_clip(grad, np.full((rows, 2), 0.5 / math.sqrt(rows)), 1.0, eps=0.5)
    for column in clipped.T:
        assert_at_most([column], 0.5)


@pytest.mark.parametrize(
    ("dtype", "bound"),
    [
        (np.float16, 1.0),
        (np.float16, 1e-2),
        (np.float16, 1e-5),
        (np.float16, 1e-6),
        (ml_dtypes.bfloat16, 1e-39),
        (np.float32, 1e-43),
        (np.float64, 1e-321),
    ],
)
@pytest.mark.parametrize("given", [False, True], ids=["measured", "use_norm"])
def test_rows_that_cancel_hold_the_bound(dtype, bound, given):
    rng = np.random.default_rng(6)
    for _ in range(60):
        values = np.array([[2 + rng.random()], [-1 - rng.random()], [rng.random()]]).astype(dtype)
        slices = nc.IndexedSlices(values, [0, 0, 1], (3, 1))
        norm = nc.global_norm([slices]) if given else None
        clipped, _ = nc.clip_by_global_norm([slices], bound, norm)
        assert_at_most(clipped, bound)


def test_rows_that_cancel_to_little():
    slices = nc.IndexedSlices(np.array([[1.0], [-1.0], [1e-200]]), [0, 0, 1], (5, 1))
    assert nc.global_norm([slices]) == 1e-200
    (clipped,), _ = nc.clip_by_global_norm([slices], 1e-210)
    assert_at_most([clipped], 1e-210)


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_sums_of_rows_beyond_the_largest_number(ord):
    slices = nc.IndexedSlices(np.array([[1.5e308], [1.5e308]]), [0, 0], (5, 1))
    with_complex = [slices, np.array([1.5e308 + 1.5e308j])]
    clipped, norm = nc.clip_by_global_norm(with_complex, 1.0, ord=ord, nonfinite="raise")
    assert norm == math.inf
    assert nc.global_norm(clipped, ord) == pytest.approx(1.0, rel=1e-14)


def test_indices_that_share_a_hash():
    indices = np.arange(20_000) * (2**31 + 1)
    slices = nc.IndexedSlices(np.ones((indices.size, 1)), indices, (2**62, 1))
    assert not slices.has_duplicates


def test_indices_are_a_copy():
    indices = np.arange(4)
    slices = nc.IndexedSlices(np.ones((4, 3)), indices, (5, 3))
    indices[:] = [10**9, 1, 2, 3]
    assert slices.indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="read-only"):
        slices.indices[0] = 7
    with pytest.raises(AttributeError):
        slices.indices = indices
    assert nc.clip_per_example([slices], 1.0)[1] == 4

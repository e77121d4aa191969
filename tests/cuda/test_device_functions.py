"""The device functions of `numclip.cuda`, called from kernels as users write them."""

from __future__ import annotations

import math
import re
from fractions import Fraction

import numpy as np
import pytest
from numba import cuda
from numba.core.errors import TypingError

import numclip as nc
import numclip.cuda
from tests.cuda import standin
from tests.cuda.devices import ready
from tests.cuda.gpu import HARDWARE
from tests.oracle import checks, reference, strategies

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::Warning")]
both = pytest.mark.parametrize("dtype", ["float32", "float64"])
MOST = 40


@cuda.jit
def clip_rows(x, bounds, norms):
    row = cuda.grid(1)
    if row < x.shape[0]:
        norms[row] = numclip.cuda.clip_vector(x[row], bounds[row])


@cuda.jit
def clip_copies(x, bounds, norms):
    """Clip rows in memory of the thread's own, the first in the block's."""
    shared = cuda.shared.array(MOST, np.float32)
    local = cuda.local.array(MOST, np.float32)
    row = cuda.threadIdx.x
    own = shared if row == 0 else local
    for k in range(x.shape[1]):
        own[k] = x[row, k]
    norms[row] = numclip.cuda.clip_vector(own[: x.shape[1]], bounds[row])
    for k in range(x.shape[1]):
        x[row, k] = own[k]


@cuda.jit
def clip_rows_by_blocks(x, bounds, norms):
    row = cuda.blockIdx.x
    thread = cuda.threadIdx.x + cuda.blockDim.x * (
        cuda.threadIdx.y + cuda.blockDim.y * cuda.threadIdx.z
    )
    norms[row, thread] = numclip.cuda.clip_block(x[row], bounds[row])


@cuda.jit
def find_norms(x, out):
    row = cuda.blockIdx.x
    out[row, 0] = numclip.cuda.vector_norm(x[row])
    out[row, 1] = numclip.cuda.block_norm(x[row])


@cuda.jit
def find_factors(norms, bounds, out):
    for k in range(norms.size):
        out[0, k] = numclip.cuda.clip_factor(norms[k], bounds[k])
        out[1, k] = numclip.cuda.clip_factor(norms[k], bounds[k], 53)
        out[2, k] = numclip.cuda.clip_factor(norms[k], bounds[k], 11)


def rows_of(seed: int, dtype: str, count: int, size: int) -> np.ndarray:
    """Rows of any bits, and of bands of exponents from the smallest to the largest."""
    rng, kind = np.random.default_rng(seed), np.dtype(dtype)
    info = np.finfo(kind)
    lowest, highest = math.frexp(float(info.smallest_subnormal))[1], info.maxexp
    made = [strategies.from_bits(rng, size, kind)]
    for _ in range(1, count):
        exponent = int(rng.integers(lowest, highest))
        made.append(strategies.in_band(rng, size, kind, exponent, int(rng.choice([0, 2, 30]))))
    return np.stack(made)


def bounds_of(seed: int, rows: np.ndarray) -> np.ndarray:
    rng = np.random.default_rng(seed)
    norms = np.array([min(nc.global_norm([row]), 1e308) for row in rows])
    ratios = rng.choice([0.0, 1e-9, 0.3, 1 - 2**-20, 1 + 2**-20, 2.0], norms.size)
    return np.where(rng.random(norms.size) < 0.2, 1e-40, norms * ratios)


def assert_rows_clipped(before, after, bounds, norms) -> None:
    for old, new, bound, norm in zip(before, after, bounds.tolist(), norms.tolist(), strict=True):
        checks.assert_norm(norm, [old])
        checks.assert_clipped([old], [new], Fraction(bound) ** 2, norm)


# ---- vectors of a thread


@both
@pytest.mark.parametrize("size", [0, 1, 2, 17, MOST])
def test_a_vector_of_a_thread(dtype, size):
    for seed in range(3):
        before = rows_of(seed, dtype, 40, size)
        bounds, norms, after = bounds_of(seed, before), np.empty(40), before.copy()
        clip_rows[3, 16](after, bounds, norms)
        assert_rows_clipped(before, after, bounds, norms)


def test_memory_of_a_thread_and_of_a_block():
    before = rows_of(5, "float32", 20, 33)
    bounds, norms, after = bounds_of(5, before), np.empty(20), before.copy()
    clip_copies[1, 20](after, bounds, norms)
    assert_rows_clipped(before, after, bounds, norms)


def test_strided_vectors():
    before = rows_of(6, "float32", 24, 9)
    bounds, norms = bounds_of(6, before), np.empty(24)
    memory = cuda.to_device(np.repeat(before, 2, axis=1))
    clip_rows[1, 24](memory[:, ::2], bounds, norms)
    found = memory.copy_to_host()
    assert_rows_clipped(before, found[:, ::2].copy(), bounds, norms)
    checks.assert_same_bits(found[:, 1::2].copy(), before)


# ---- vectors of a block

BLOCKS = [1, 7, 32, 100, (8, 4, 3), (1, 5, 2), 1024]


@both
@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_vector_of_a_block(dtype, block):
    threads = math.prod(np.atleast_1d(block).tolist())
    for seed, size in enumerate((0, 1, 6, 250)):
        before = rows_of(seed + 10, dtype, 4, size)
        bounds, norms, after = bounds_of(seed, before), np.empty((4, threads)), before.copy()
        clip_rows_by_blocks[4, block](after, bounds, norms)
        assert_rows_clipped(before, after, bounds, norms[:, 0])
        assert (norms == norms[:, :1]).all()


@pytest.mark.skipif(HARDWARE, reason="orders threads as the stand-in can")
def test_the_order_of_threads_changes_nothing():
    before, norms = rows_of(3, "float64", 3, 500), np.empty((3, 96))
    bounds = bounds_of(3, before)
    wanted = before.copy()
    clip_rows_by_blocks[3, 96](wanted, bounds, norms)
    for seed in range(5):
        with standin.in_random_order(seed):
            after, found = before.copy(), np.empty((3, 96))
            clip_rows_by_blocks[3, 96](after, bounds, found)
        checks.assert_same_bits(after, wanted)
        checks.assert_same_bits(found, norms)


@both
def test_norms_alone(dtype):
    rows, norms = rows_of(8, dtype, 30, 70), np.empty((30, 2))
    find_norms[30, 16](rows, norms)
    for row, found in zip(rows, norms.tolist(), strict=True):
        for norm in found:
            checks.assert_norm(norm, [row])


# ---- the factor alone


def test_factors_hold_the_bound_of_what_is_rounded():
    rng = np.random.default_rng(2)
    rows = [(rng.standard_normal(50) * 10.0 ** rng.integers(-2, 3)) for _ in range(30)]
    for digits, dtype in enumerate(("float32", "float64", "float16")):
        before = [row.astype(dtype) for row in rows]
        norms = np.array([nc.global_norm([row]) for row in before])
        bounds, factors = norms * rng.uniform(0.1, 1.1, norms.size), np.empty((3, norms.size))
        find_factors[1, 1](norms, bounds, factors)
        for row, norm, bound, factor in zip(before, norms, bounds, factors[digits], strict=True):
            product = (row.astype(np.result_type(dtype, "f")) * factor).astype(dtype)
            checks.assert_clipped([row], [product], Fraction(float(bound)) ** 2, float(norm))


def test_factors_at_the_ends():
    largest = np.finfo(np.float64).max
    cases = {
        (1.0, 1.0): 1.0,
        (0.0, 0.0): 1.0,
        (2.0, 0.0): 0.0,
        (largest, math.inf): 1.0,
        (math.inf, math.inf): 1.0,
        (math.inf, 1.0): math.nan,
        (math.nan, 1.0): math.nan,
        (1.0, -1.0): math.nan,
        (1.0, math.nan): math.nan,
    }
    norms, bounds = (np.array(values) for values in zip(*cases, strict=True))
    factors = np.empty((3, len(cases)))
    find_factors[1, 1](norms, bounds, factors)
    np.testing.assert_array_equal(factors, [list(cases.values())] * 3)


# ---- edge cases


@both
def test_edges(dtype):
    nan, inf = math.nan, math.inf
    row = np.array([3.0, -0.0, -4.0], dtype)
    before = np.stack([row, row, row, row, row * 0, row, row]).astype(dtype)
    before[2, 1], before[3, 1] = nan, -inf
    bounds = np.array([0.0, inf, 1.0, inf, 0.0, -1.0, nan])
    wanted = before.copy()
    wanted[0], wanted[2], wanted[5], wanted[6] = [0.0, -0.0, -0.0], nan, nan, nan
    for clip, place, block in ((clip_rows, np.empty(7), 7), (clip_rows_by_blocks, None, 8)):
        norms, after = np.empty((7, 8)) if place is None else place, before.copy()
        clip[7, block](after, bounds, norms)
        np.testing.assert_array_equal(after, wanted)
        assert not np.signbit(after[0, 0])
        assert np.signbit(after[0, 1:]).all()
        checks.assert_same_bits(after[[1, 3, 4]], before[[1, 3, 4]])
        norms = norms if place is not None else norms[:, 0]
        np.testing.assert_array_equal(norms, [5.0, 5.0, nan, inf, 0.0, 5.0, 5.0])


@pytest.mark.parametrize("x", [np.ones((2, 2, 2), "f"), np.ones((2, 2), np.int32)])
def test_what_is_no_vector_is_refused(x):
    with pytest.raises(TypingError, match="x: expected a 1-d array of float32 or float64, got"):
        clip_rows[1, 2](x, np.ones(2), np.empty(2))


def test_the_documented_example():
    (code,) = re.findall(r"```python\n(.*?)```", numclip.cuda.__doc__, re.DOTALL)
    found = {}
    exec(code, found)
    norms, clipped = found["norms"].copy_to_host(), found["gradients"].copy_to_host()
    before = np.array([[3e30, 4e30], [0.3, 0.4]], np.float32)
    assert norms.tolist() == [reference.norm([row]) for row in before]
    assert_rows_clipped(before, clipped, np.ones(2), norms)


def test_names():
    assert all(getattr(numclip.cuda, name).__doc__ for name in numclip.cuda.__all__)

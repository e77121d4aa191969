"""The functions called from within `@njit`: the bits, the promises and the refusals of Python's."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from fractions import Fraction
from typing import NamedTuple

import cases
import checks
import numba
import numpy as np
import pytest
import reference
from numba import njit
from numba.core.errors import TypingError

import numclip as nc
from numclip.kernels.jit import INTERPRETED

compiled_only = pytest.mark.skipif(INTERPRETED, reason="nothing is compiled in this run")
DTYPES = ["float32", "float64", "complex64", "complex128"]


@njit
def global_norm(grads):
    return nc.global_norm(grads)


@njit
def clip(grads, bound):
    return nc.clip_by_global_norm(grads, bound)


@njit
def clip_in_place(grads, bound):
    return nc.clip_by_global_norm(grads, bound, out=grads)


@njit
def clip_by_norm(grad, bound):
    return nc.clip_by_norm(grad, bound)


@njit
def clip_by_average_norm(grad, bound):
    return nc.clip_by_average_norm(grad, bound)


@njit
def clip_by_block_rms(grad, bound):
    return nc.clip_by_block_rms(grad, bound)


@njit
def clip_by_norm_in_place(grad, bound):
    return nc.clip_by_norm(grad, bound, out=grad)


@njit
def clip_by_average_norm_in_place(grad, bound):
    return nc.clip_by_average_norm(grad, bound, out=grad)


@njit
def clip_by_block_rms_in_place(grad, bound):
    return nc.clip_by_block_rms(grad, bound, out=grad)


def gradients(dtype: str, scale: float = 1.0) -> tuple:
    """Arrays of every kind of layout; the longest has three chunks."""
    rng = np.random.default_rng(7)
    return (
        cases.normal(rng, (33, 17), dtype, scale),
        cases.normal(rng, (40_000 if not INTERPRETED else 400,), dtype, scale),
        np.asfortranarray(cases.normal(rng, (5, 7), dtype, scale)),
        cases.normal(rng, (), dtype, scale),
        cases.normal(rng, (3, 0), dtype, scale),
        cases.strided(cases.normal(rng, (13, 11), dtype, scale)),
    )


def assert_all_same_bits(after, before):
    assert len(after) == len(before)
    for new, old in zip(after, before, strict=True):
        assert (new is None) == (old is None)
        if old is not None:
            checks.assert_same_bits(new, old)


# ---- the same bits, and the promises


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_from_python(dtype):
    for scale in (1.0, 1e-30, 1e30 if dtype in ("float32", "complex64") else 1e200):
        for ratio in (0.1, 1 - 2**-20, 1 + 2**-20):
            grads = gradients(dtype, scale)
            bound = ratio * nc.global_norm(grads)
            expected, norm = nc.clip_by_global_norm(grads, bound)
            assert global_norm(grads) == norm
            clipped, measured = clip(grads, bound)
            assert measured == norm
            assert_all_same_bits(clipped, expected)
            assert_all_same_bits(grads, gradients(dtype, scale))
            checks.assert_clipped(list(grads), list(clipped), Fraction(bound) ** 2, norm)
            written, measured = clip_in_place(grads, bound)
            assert measured == norm
            assert_all_same_bits(grads, expected)
            assert_all_same_bits(written, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_magnitudes_whose_squares_leave_the_range(dtype):
    info = np.finfo(dtype)
    for size in (float(info.max) / 4, float(info.tiny) * 3, float(info.smallest_subnormal) * 5):
        grads = (np.full(7, size, dtype), np.zeros(3, dtype))
        for ratio in (0.3, 1e-3):
            bound = ratio * nc.global_norm(grads)
            expected, norm = nc.clip_by_global_norm(grads, bound)
            clipped, measured = clip(grads, bound)
            assert measured == norm
            assert_all_same_bits(clipped, expected)


@pytest.mark.parametrize("bound", [0.0, math.inf, 1e-320, 3.0])
@pytest.mark.parametrize("value", [0.0, math.nan, math.inf, 1e-310])
def test_edges(bound, value):
    grads = (np.array([1.0, value, -2.0]), np.array([0.5, value], np.float32), None)
    expected, norm = nc.clip_by_global_norm(grads, bound)
    clipped, measured = clip(grads, bound)
    np.testing.assert_equal(measured, norm)
    assert clipped[2] is None
    assert_all_same_bits(clipped, expected)


class Layer(NamedTuple):
    weights: np.ndarray
    bias: np.ndarray


@pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")
def test_containers():
    rng = np.random.default_rng(3)
    arrays = [cases.normal(rng, (n, 3)) for n in range(1, 41)]
    expected, norm = nc.clip_by_global_norm(arrays, 1.0)
    typed = numba.typed.List([array.copy() for array in arrays])
    strided = [cases.strided(array) for array in arrays]
    for grads in ([array.copy() for array in arrays], typed, strided):
        clipped, measured = clip(grads, 1.0)
        assert measured == norm == global_norm(grads)
        assert_all_same_bits(list(clipped), expected)
        assert_all_same_bits(list(grads), arrays)
        clip_in_place(grads, 1.0)
        assert_all_same_bits(list(grads), expected)
    layer = Layer(arrays[3], arrays[4].astype(np.float64))
    clipped, _ = clip(layer, 0.5)
    assert type(clipped) is Layer
    assert_all_same_bits(clipped, nc.clip_by_global_norm(layer, 0.5)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["clip_by_norm", "clip_by_average_norm", "clip_by_block_rms"])
def test_one_array(name, dtype):
    for grad in gradients(dtype)[::2]:
        for bound in (1e-4, 0.3, 100.0):
            expected = getattr(nc, name)(grad, bound)
            checks.assert_same_bits(globals()[name](grad, bound), expected)
            work = cases.strided(grad) if grad.ndim else grad.copy()
            globals()[f"{name}_in_place"](work, bound)
            checks.assert_same_bits(
                work,
                getattr(nc, name)(np.ascontiguousarray(grad), bound) if grad.ndim else expected,
            )


@njit
def hold(grad, low, high):
    return nc.clip_by_value(grad, low, high)


@njit
def hold_in_place(grad, low, high):
    return nc.clip_by_value(grad, low, high, out=grad)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_clip_by_value(dtype):
    grad = np.array([[-3.0, -0.0, 0.1], [np.nan, np.inf, 1e-40]], dtype)
    expected = nc.clip_by_value(grad, -0.1, 0.1)
    for array in (grad, np.asfortranarray(grad), cases.strided(grad)):
        checks.assert_same_bits(hold(array, -0.1, 0.1), expected)
        hold_in_place(array, -0.1, 0.1)
        checks.assert_same_bits(array, expected)
    for low, high in ((1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="clip_value_min"):
            hold(grad, low, high)


# ---- non-finite gradients


@njit
def skip(grads, bound):
    return nc.clip_by_global_norm(grads, bound, nonfinite="skip", out=grads)


@njit
def zero(grads, bound):
    return nc.clip_by_global_norm(grads, bound, nonfinite="zero")


@njit
def refuse(grads, bound):
    return nc.clip_by_global_norm(grads, bound, nonfinite="raise", out=grads)


@pytest.mark.parametrize("bad", [math.nan, -math.inf, None])
@pytest.mark.parametrize("dtype", ["float32", "complex128"])
def test_nonfinite(bad, dtype):
    def made():
        grads = np.arange(1, 8, dtype=dtype), np.ones((2, 2), dtype)
        if bad is not None:
            grads[0][3] = bad if dtype == "float32" else complex(1.0, bad)
        return grads

    for policy, function in (("skip", skip), ("zero", zero)):
        grads = made()
        expected, norm = nc.clip_by_global_norm(made(), 1.0, nonfinite=policy)
        clipped, measured = function(grads, 1.0)
        np.testing.assert_equal(measured, norm)
        assert_all_same_bits(clipped, expected)
    grads = made()
    if bad is None:
        refuse(grads, 1.0)
        assert_all_same_bits(grads, nc.clip_by_global_norm(made(), 1.0)[0])
        return
    with pytest.raises(nc.NonFiniteGradientError):
        refuse(grads, 1.0)
    assert_all_same_bits(grads, made())


# ---- the flags of users' functions


@njit(fastmath=True, error_model="numpy", boundscheck=True)
def fast(grads, bound):
    return nc.clip_by_global_norm(grads, bound, nonfinite="zero", out=grads)


@njit(parallel=True, fastmath=True)
def in_parallel(stack, bound):
    norms = np.empty(stack.shape[0])
    for k in numba.prange(stack.shape[0]):
        grads = (stack[k], stack[k, 0] * np.float32(2.0))
        _, norms[k] = nc.clip_by_global_norm(grads, bound, out=grads)
    return norms


def test_fastmath_of_the_caller_changes_nothing():
    grads = (np.array([np.nan, 3.0, 4.0, -np.inf], np.float32), np.full(300, 1e-41, np.float32))
    expected, norm = nc.clip_by_global_norm(grads, 1.0, nonfinite="zero")
    _, measured = fast(grads, 1.0)
    assert measured == norm
    assert_all_same_bits(grads, expected)
    with pytest.raises(ValueError, match="clip_norm"):
        fast(grads, math.nan)


@pytest.mark.jit_only
def test_in_prange():
    stack = cases.normal(np.random.default_rng(1), (50, 8, 30))
    expected, norms = stack.copy(), []
    for part in expected:
        grads = (part, part[0] * np.float32(2.0))
        norms.append(nc.clip_by_global_norm(grads, 1.0, out=grads)[1])
    assert in_parallel(stack, 1.0).tolist() == norms
    checks.assert_same_bits(stack, expected)


# ---- what is refused


@compiled_only
def test_arguments_that_are_refused_when_the_code_runs():
    grads = (np.ones(3), np.ones((2, 2)))
    with pytest.raises(ValueError, match="clip_norm"):
        clip_in_place(grads, -1.0)
    same = np.ones(3)
    with pytest.raises(ValueError, match="share no memory"):
        clip_in_place((same, same), 1.0)
    assert same.tolist() == [1.0, 1.0, 1.0]

    @njit
    def elsewhere(grads, out):
        return nc.clip_by_global_norm(grads, 1.0, out=out)

    with pytest.raises(ValueError, match="out"):
        elsewhere(grads, (np.ones(3), np.ones((2, 2))))


@compiled_only
@pytest.mark.parametrize(
    ("grads", "says"),
    [
        (np.ones(3), "pass a single gradient as"),
        ((np.ones(3, np.int32),), r"grads\[0\].*float32, float64, complex64, complex128"),
        (3.0, "a tuple, list or typed list"),
    ],
)
def test_types_that_are_refused(grads, says):
    with pytest.raises(TypingError, match=says):
        clip(grads, 1.0)


@compiled_only
def test_read_only_arrays_are_refused_in_place():
    grad = np.ones(3)
    grad.flags.writeable = False
    assert clip((grad,), 1.0)[1] == nc.global_norm([grad])
    with pytest.raises(TypingError, match="read-only"):
        clip_in_place((grad,), 1.0)


# ---- users' caches

PROGRAM = """
import sys, numpy as np, numba, numclip as nc
@numba.njit(cache=True)
def clip(grads, bound):
    return nc.clip_by_global_norm(grads, bound, out=grads)[1]
print(clip((np.array([3.0, 4.0]), np.zeros(2, np.float32)), 1.0))
print(sum(clip.stats.cache_hits.values()))
"""


@compiled_only
def test_code_from_the_cache_of_another_process(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    paths = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths}
    for hits in ("0", "1"):
        command = [sys.executable, str(program)]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout.split() == ["5.0", hits]
    assert reference.norm([np.array([3.0, 4.0])]) == 5.0

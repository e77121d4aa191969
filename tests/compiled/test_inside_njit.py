"""The functions called from within `@njit`: the same bits as from Python, and what is refused."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from typing import NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit
from numba.core.errors import TypingError
from numba.core.runtime import _nrt_python as nrt
from numba.core.runtime import rtsys

import numclip as nc
from tests.compiled import wrappers
from tests.oracle import cases, checks, reference, strategies
from tests.oracle.recorded import CASES, load
from tests.rings import covering

pytestmark = pytest.mark.jit_only
DTYPES = ["float32", "float64", "complex64", "complex128"]
# Reflected lists, which numba advises against.
listed = pytest.mark.filterwarnings("ignore::numba.core.errors.NumbaPendingDeprecationWarning")


def gradients(dtype: str, scale: float = 1.0) -> tuple:
    """Arrays of every kind of layout; the longest has three chunks."""
    rng = np.random.default_rng(7)
    return (
        cases.normal(rng, (33, 17), dtype, scale),
        cases.normal(rng, (40_000,), dtype, scale),
        np.asfortranarray(cases.normal(rng, (5, 7), dtype, scale)),
        cases.normal(rng, (), dtype, scale),
        None,
        cases.normal(rng, (3, 0), dtype, scale),
        cases.strided(cases.normal(rng, (13, 11), dtype, scale)),
    )


def assert_all_same_bits(after, before):
    assert len(after) == len(before)
    for new, old in zip(after, before, strict=True):
        assert (new is None) == (old is None)
        if old is not None:
            checks.assert_same_bits(new, old)


def copies(grads):
    return tuple(None if grad is None else grad.copy("K") for grad in grads)


def assert_as_from_python(grads, bound, clip=wrappers.clip, in_place=wrappers.clip_in_place):
    """Clip in both ways, and compare with what Python gives."""
    expected, norm = nc.clip_by_global_norm(list(grads), bound)
    kept = copies(grads)
    clipped, measured = clip(grads, bound)
    np.testing.assert_equal(measured, norm)
    assert_all_same_bits(list(clipped), expected)
    assert_all_same_bits(list(grads), kept)
    written, measured = in_place(grads, bound)
    np.testing.assert_equal(measured, norm)
    assert_all_same_bits(list(grads), expected)
    assert_all_same_bits(list(written), expected)


# ---- the same bits


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts(dtype):
    for scale in (1.0, 1e-30, 1e30 if dtype in ("float32", "complex64") else 1e200):
        for ratio in (0.1, 1 - 2**-20, 1 + 2**-20):
            grads = gradients(dtype, scale)
            bound = ratio * nc.global_norm(grads)
            assert wrappers.global_norm(grads) == nc.global_norm(grads)
            assert_as_from_python(grads, bound)


def test_mixed():
    """Each of the bounds makes the kernels take another way."""
    for value in (0.0, 1e-310, 1e200, math.nan, math.inf):
        for bound in (0.0, 1e-320, 3.0, math.inf):
            grads = np.array([1.0, value, -2.0]), np.array([0.5, -1e-40], np.float32)
            assert_as_from_python(grads, bound)


@given(
    grads=st.tuples(*[strategies.arrays(name) for name in DTYPES]),
    ratio=st.sampled_from([0.0, 0.3, 1 - 2**-20, 2.0]),
)
def test_generated(grads, ratio):
    norm = nc.global_norm(grads)
    bound = ratio * min(norm, 1e300)
    kept = copies(grads)
    assert_as_from_python(grads, bound)
    checks.assert_clipped(list(kept), list(grads), Fraction(bound) ** 2, norm)


def test_an_array_in_fortran_order_is_measured_in_the_order_of_memory():
    rng = np.random.default_rng(3)
    for _ in range(60):  # in C order a sixth of the norms would differ
        grad = np.asfortranarray(rng.normal(size=(4, 5)))
        found = wrappers.clip_by_norm(grad, 0.5)
        checks.assert_same_bits(found, nc.clip_by_norm(grad, 0.5))
        assert found.flags.f_contiguous


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_array(dtype):
    names = ["clip_by_norm", "clip_by_average_norm", "clip_by_block_rms"]
    grad = gradients(dtype)[0]
    for kind, name in enumerate(names):
        for bound in (1e-4, 0.3, 100.0):
            expected = getattr(nc, name)(grad, bound)
            checks.assert_same_bits(getattr(wrappers, name)(grad, bound), expected)
            work = cases.strided(grad)
            assert wrappers.all_in_place(work, kind, bound).ctypes.data == work.ctypes.data
            checks.assert_same_bits(work, expected)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float64", pytest.param("float32", marks=pytest.mark.full)])
def test_clip_by_value(dtype):
    grad = np.array([[-3.0, -0.0, 0.1], [np.nan, np.inf, 1e-40]], dtype)
    expected = nc.clip_by_value(grad, -0.1, 0.1)
    for array in (grad, cases.strided(grad)):
        checks.assert_same_bits(wrappers.clip_by_value(array, -0.1, 0.1), expected)
        wrappers.clip_by_value_in_place(array, -0.1, 0.1)
        checks.assert_same_bits(array, expected)
    for low, high in ((1.0, 0.0), (math.nan, 1.0)):
        with pytest.raises(ValueError, match="clip_value_min"):
            wrappers.clip_by_value(grad, low, high)


@pytest.mark.full
def test_bounds_in_the_memory_of_the_gradient_are_read_before_it_is_written():
    values = np.array([1.0, 5.0, 3.0, 4.0, 2.0])
    expected = nc.clip_by_value(values[1:], -9.0, values[:-1])
    wrappers.clip_by_value_in_place(values[1:], -9.0, values[:-1])
    checks.assert_same_bits(values[1:], expected)


@pytest.mark.full
def test_bounds_that_are_arrays():
    """Of any shape that broadcasts; the sign of a zero between bounds of 0 stays."""
    rng = np.random.default_rng(3)
    row = np.array([-0.5, 0.0, 1e-60])
    for dtype, shape in (("float32", (4, 3)), ("float64", (2, 4, 3))):
        grad = cases.normal(rng, shape, dtype)
        grad.flat[:4] = [-0.0, math.nan, math.inf, 1e-45]
        for low, high in (
            (row, 0.5),
            (-1, np.array([[1], [0], [2], [3]])),
            (row.astype("f"), row[::-1].astype("f") + 2),
            (np.array(-0.5), np.broadcast_to(row + 1, shape)),
            (np.zeros(1), np.zeros((4, 1))),
        ):
            expected = nc.clip_by_value(grad, low, high)
            array = grad.copy() if dtype == "float32" else cases.strided(grad)
            checks.assert_same_bits(wrappers.clip_by_value(array, low, high), expected)
            checks.assert_same_bits(array, grad)
            wrappers.clip_by_value_in_place(array, low, high)
            checks.assert_same_bits(array, expected)


@pytest.mark.full
def test_bounds_that_are_no_such_arrays():
    grad = np.ones((2, 3))
    for low, high in (
        (np.ones(2), 2.0),
        (0.0, np.ones((2, 2, 3))),
        (np.array([0, math.nan, 0]), 1.0),
        (np.array([0, 2, 0]), 1),
        (0.5, np.array([[1.0], [math.nan]])),
    ):
        with pytest.raises(ValueError, match="clip_value_min"):
            wrappers.clip_by_value_in_place(grad, low, high)
    assert (grad == 1.0).all()


@pytest.mark.full
@pytest.mark.parametrize("ord", [1.0, 1.5, 3.0, math.inf])
def test_other_orders(ord):
    rng = np.random.default_rng(5)
    for scale in (1.0, 1e-38, math.inf):
        grads = cases.normal(rng, (20_000,)), cases.normal(rng, (3, 5), "float64", scale)
        norm = nc.global_norm(grads, ord)
        np.testing.assert_equal(wrappers.global_norm_of_order(grads, ord), norm)
        for bound in (norm / 3, 1e-44):
            expected, _ = nc.clip_by_global_norm(grads, bound, ord=ord)
            work = copies(grads)
            wrappers.clip_of_order(work, bound, ord)
            assert_all_same_bits(work, expected)
    with pytest.raises(ValueError, match="ord: expected a real number >= 1"):
        wrappers.global_norm_of_order(grads, 0.5)


AXES = [-1, 0, 1, (0, 2), (1, 2), (0, 1, 2), ()]
ALONG = [*itertools.product(AXES, ["c", "strided"], DTYPES)]


@pytest.mark.full
@pytest.mark.parametrize(("axes", "layout", "dtype"), [ALONG[k] for k in covering(ALONG, 2)])
def test_axes(axes, layout, dtype):
    rng = np.random.default_rng(11)
    clips, clips_in_place = (wrappers.along(axes, in_place) for in_place in (False, True))
    for scale in (1.0, 1e-30, float(np.finfo(dtype).tiny), 0.0):
        grad = cases.normal(rng, (3, 1100, 4), dtype, scale)
        grad = cases.strided(grad) if layout == "strided" else grad
        for bound in (2.0 * scale, 70.0 * scale, math.inf):
            expected = nc.clip_by_norm(grad, bound, axes)
            checks.assert_same_bits(clips(grad, bound), expected)
            work = grad.copy()
            clips_in_place(work, bound)
            checks.assert_same_bits(work, expected)


# ---- structures


class Layer(NamedTuple):
    weights: np.ndarray
    bias: np.ndarray


@listed
@pytest.mark.full
def test_lists():
    rng = np.random.default_rng(3)
    arrays = [cases.normal(rng, (n, 3)) for n in range(1, 41)]
    for grads in (arrays, [cases.strided(array) for array in arrays]):
        assert_as_from_python([grad.copy("K") for grad in grads], 1.0)
        assert_as_from_python(numba.typed.List([grad.copy("K") for grad in grads]), 1.0)
    overlapping = numba.typed.List([arrays[3], *arrays[:30], arrays[4]])
    with pytest.raises(ValueError, match="share no memory"):
        wrappers.clip_in_place(overlapping, 1.0)


@pytest.mark.full
def test_structures():
    layer = Layer(np.ones((2, 3), np.float32), np.ones(3))
    clipped, _ = wrappers.clip(layer, 0.5)
    assert type(clipped) is Layer
    assert_all_same_bits(clipped, nc.clip_by_global_norm(layer, 0.5)[0])
    assert wrappers.clip((None,), 1.0) == ((None,), 0.0)
    typed = numba.typed.List.empty_list(numba.float32[::1])
    assert wrappers.global_norm(typed) == 0.0


@listed
@pytest.mark.full
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['op']}")
def test_golden(case):
    """What is taken of the recorded inputs gives Python's bits; these are held to the records."""
    inputs, args = [load(entry) for entry in case["inputs"]], dict(case["args"])
    dense = all(type(grad) is np.ndarray and str(grad.dtype) in DTYPES for grad in inputs)
    function = getattr(wrappers, case["op"], None)
    args.pop("array_bounds", None)
    if args.keys() - {"clip_norm", "threshold", "clip_value_min", "clip_value_max"} or not dense:
        pytest.skip("not taken, or tried elsewhere")
    if case["op"] == "clip_by_global_norm":
        alike = len({(grad.dtype, grad.ndim) for grad in inputs}) == 1
        assert_as_from_python(numba.typed.List(inputs) if alike else tuple(inputs), *args.values())
    elif function is not None:
        grads = inputs if case["op"] != "global_norm" else [tuple(inputs)]
        expected = getattr(nc, case["op"])(*grads, **args)
        checks.assert_same_bits(function(*grads, *args.values()), expected)


# ---- non-finite gradients


@pytest.mark.each_value
@pytest.mark.parametrize("norm", [None, 2.0, math.nan])
@pytest.mark.parametrize("policy", wrappers.POLICIES)
def test_nonfinite(policy, norm):
    function = wrappers.POLICIES[policy]
    for bad in (math.nan, -math.inf, 1.0):
        for bound in (1.0, 1e-44, math.inf):
            grads = np.arange(1, 8, dtype=np.float32), np.ones((2, 2), np.complex128)
            grads[0][3], grads[1][0, 1] = bad, complex(1.0, bad)
            kept, expected = copies(grads), copies(grads)
            try:
                told = nc.clip_by_global_norm(
                    expected, bound, norm, nonfinite=policy, out=expected
                )[1]
            except nc.NonFiniteGradientError:
                with pytest.raises(nc.NonFiniteGradientError, match="nothing was modified"):
                    function(grads, bound, norm)
                assert_all_same_bits(grads, kept)
                continue
            np.testing.assert_equal(function(grads, bound, norm)[1], told)
            assert_all_same_bits(grads, expected)


# ---- the flags of users' functions


@njit(fastmath=True, error_model="numpy", boundscheck=True, nogil=True)
def fast(grads, bound):
    return nc.clip_by_global_norm(grads, bound, nonfinite="zero", out=grads)


@njit(parallel=True, fastmath=True)
def in_parallel(stack, bound):
    norms = np.empty(stack.shape[0])
    for k in numba.prange(stack.shape[0]):
        grads = (stack[k], stack[k, 0] * np.float32(2.0))
        _, norms[k] = nc.clip_by_global_norm(grads, bound, out=grads)
    return norms


@pytest.mark.full
def test_fastmath_of_the_caller_changes_nothing():
    grads = (np.array([np.nan, 3.0, 4.0, -np.inf], np.float32), np.full(300, 1e-41, np.float32))
    expected, norm = nc.clip_by_global_norm(grads, 1.0, nonfinite="zero")
    assert fast(grads, 1.0)[1] == norm
    assert_all_same_bits(grads, expected)
    with pytest.raises(ValueError, match="clip_norm"):
        fast(grads, math.nan)


@pytest.mark.full
def test_in_prange():
    stack = cases.normal(np.random.default_rng(1), (50, 8, 30))
    expected, norms = stack.copy(), []
    for part in expected:
        grads = (part, part[0] * np.float32(2.0))
        norms.append(nc.clip_by_global_norm(grads, 1.0, out=grads)[1])
    assert in_parallel(stack, 1.0).tolist() == norms
    checks.assert_same_bits(stack, expected)


# ---- what is refused


@njit
def columns(grad, bound):
    return nc.clip_by_norm(grad, bound, 0)


@pytest.mark.full
def test_arguments_that_are_refused_when_the_code_runs():
    grads = np.ones(3), np.ones((2, 2))
    same = np.ones(3)
    for call in (
        lambda: wrappers.clip_in_place(grads, -1.0),
        lambda: wrappers.propagate(grads, 1.0, -1.0),
        lambda: wrappers.clip_in_place((same, same), 1.0),
        lambda: elsewhere(grads, (np.ones(3), np.ones((2, 2)))),
        lambda: columns(grads[1], -1.0),
        lambda: columns(grads[1], math.nan),
    ):
        with pytest.raises(ValueError, match=r"clip_norm|use_norm|share no memory|in place"):
            call()
    assert all((grad == 1.0).all() for grad in (*grads, same))


def tangled(shape, strides):
    return np.lib.stride_tricks.as_strided(np.ones(40), shape, strides)


@pytest.mark.full
def test_elements_that_share_memory_are_refused_in_place():
    apart = tangled((3, 2), (24, 8))[::-1], tangled((1, 4), (0, 16)), tangled((0, 2), (0, 0))
    rest, by_columns = np.ones((2, 2)), wrappers.along(0, True)
    for grad in (tangled((3, 2), (8, 8)), tangled((2, 4), (0, 8)), tangled((2, 3), (16, 8))):
        for call in (
            lambda grad: wrappers.clip_in_place((rest, grad), 1.0),
            lambda grad: wrappers.clip_in_place(numba.typed.List([grad, grad[1:]]), 1.0),
            lambda grad: wrappers.all_in_place(grad, 0, 1.0),
            lambda grad: wrappers.clip_by_value_in_place(grad, 0.0, 0.5),
            lambda grad: wrappers.clip_by_value_in_place(grad, np.zeros(1), 0.5),
            lambda grad: by_columns(grad, 0.1),
        ):
            with pytest.raises(ValueError, match="do not interleave, of elements that share no"):
                call(grad)
        assert (grad == 1.0).all()
        assert (rest == 1.0).all()
        expected = nc.clip_by_global_norm([grad], 1.0)[0]
        assert_all_same_bits(wrappers.clip((grad,), 1.0)[0], expected)
    for grad in apart:
        expected = nc.clip_by_value(grad, 0.0, 0.5)
        checks.assert_same_bits(wrappers.clip_by_value_in_place(grad, 0.0, 0.5), expected)


@njit
def catch(grad, count):
    caught = 0
    for _ in range(count):
        try:
            nc.clip_by_norm(grad, -1.0)
        except Exception:
            caught += 1
    return caught


@pytest.mark.full
def test_errors_free_the_new_arrays():
    nrt.memsys_enable_stats()
    try:
        before = rtsys.get_allocation_stats()
        assert catch(np.ones(3), 100) == 100
        after = rtsys.get_allocation_stats()
    finally:
        nrt.memsys_disable_stats()
    assert after.alloc - before.alloc >= 100
    assert after.free - before.free >= after.alloc - before.alloc - 5


@njit
def elsewhere(grads, out):
    return nc.clip_by_global_norm(grads, 1.0, out=out)


@njit
def along(grad, axes):
    return nc.clip_by_norm(grad, 1.0, axes)


@njit
def with_policy(grads, policy):
    return nc.clip_by_global_norm(grads, 1.0, nonfinite=policy)


def read_only(grad):
    grad.flags.writeable = False
    return grad


REFUSED = [
    (lambda: wrappers.clip(np.ones(3), 1.0), "pass a single gradient as"),
    (lambda: wrappers.clip((np.ones(3, np.int32),), 1.0), r"grads\[0\].*float32, float64"),
    (lambda: wrappers.clip(3.0, 1.0), "a tuple, list or typed list"),
    (lambda: wrappers.clip((np.ones(3),), "1"), "clip_norm: expected a real number"),
    (lambda: wrappers.clip((np.ones(3),), True), "clip_norm: expected a real number"),
    (lambda: wrappers.clip_in_place((read_only(np.ones(3)),), 1.0), "read-only"),
    (lambda: wrappers.clip_of_order((np.ones(3, complex),), 1.0, 3.0), "complex"),
    (lambda: wrappers.clip_by_value(np.ones(3, complex), 0.0, 1.0), "real numbers to hold"),
    (lambda: wrappers.clip_by_value(np.ones(3), np.ones(3, complex), 2.0), "clip_value_min: exp"),
    (lambda: elsewhere((np.ones(3),), (np.ones((3, 3)),)), "grads itself"),
    (lambda: along(np.ones((2, 3)), 0), "axes: expected .* written in the call"),
    (lambda: wrappers.along(2, False)(np.ones((2, 3)), 1.0), "axes: expected different axes"),
    (lambda: wrappers.along((0, 0), False)(np.ones((2, 3)), 1.0), "axes: expected different"),
    (lambda: with_policy((np.ones(3),), "skip"), "written in the call"),
]


def test_types_that_are_refused():
    for call, says in REFUSED:
        with pytest.raises(TypingError, match=says):
            call()


def test_arrays_that_are_only_read_need_not_be_writeable():
    grads = (read_only(np.ones(3)),)
    clipped, norm = wrappers.clip(grads, 1.0)
    assert norm == reference.norm([np.ones(3)])
    assert clipped[0].flags.writeable

"""Units: columns of tall arrays, and parameters that are 0."""

from __future__ import annotations

import numpy as np
import pytest

import numclip as nc
from numclip.host import batches, lists, plain_units
from numclip.host.kernels import little
from numclip.host.runtime import threads
from tests.oracle import reference
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_columns_of_tall_arrays(dtype):
    grad = np.random.default_rng(1).standard_normal((2100, 3)).astype(dtype)
    clipped = nc.clip_by_norm(grad, 1.0, axes=0)
    for before, after in zip(grad.T, clipped.T, strict=True):
        assert 1.0 - 1e-6 <= reference.norm([after]) <= 1.0
        np.testing.assert_allclose(after, before / reference.norm([before]), rtol=1e-6)


def test_parameters_of_norm_0_allow_nothing_without_eps():
    grad, param = np.ones((2, 2)), np.array([[0.0, 3.0], [0.0, 4.0]])
    clipped = nc.adaptive_clip(grad, param, clip_factor=0.1, eps=0.0)
    np.testing.assert_array_equal(clipped[:, 0], 0.0)
    assert reference.norm([clipped[:, 1]]) <= 0.5
    free = nc.adaptive_clip(grad, param, clip_factor=np.inf, eps=0.0)
    np.testing.assert_array_equal(free, grad)


@pytest.mark.parametrize("axes", [0, 1, (0, 1)])
def test_norms_of_other_orders_that_squares_cannot_hold(axes):
    grad = np.array([[3e200 + 4e200j, 0.0], [0.0, 1e-200j]])
    clipped = nc.clip_by_norm(grad, 1.0, axes, ord=3)
    np.testing.assert_allclose(clipped[0, 0], 0.6 + 0.8j, rtol=1e-12)
    assert clipped[1, 1] in (1e-200j, 0.0)


def general(array):
    """Return the array as a view of a subclass, which no plain way takes."""
    return array.view(Other)


class Other(np.ndarray):
    """Another kind of array."""


@pytest.mark.each_value
@pytest.mark.parametrize("dtype", reference.DTYPES)
@pytest.mark.parametrize(
    ("shape", "axes"),
    [((5, 7), 1), ((5, 7), 0), ((64, 1), 0), ((3, 1200, 2), 1), ((3, 4, 5), (1, 2)), ((9,), 0)],
)
@pytest.mark.parametrize("scale", [1.0, 1e-160, 1e160, 6e-8])
def test_plain_arrays_have_the_bits_of_others(dtype, shape, axes, scale):
    rng = np.random.default_rng(5)
    with np.errstate(all="ignore"):
        grad = (normal(rng, shape, "float64") * scale).astype(dtype)
        param = (normal(rng, shape, "float64") * scale).astype(dtype)
    grad[0] = 0
    for bound in (0.0, 0.7 * scale, 2.0, np.inf):
        own = nc.clip_by_norm(grad, bound, axes)
        assert_same_bits(own, np.asarray(nc.clip_by_norm(general(grad), bound, axes)))
        own = nc.adaptive_clip(grad, param, bound, 1e-3 * scale, axes)
        other = nc.adaptive_clip(general(grad), param, bound, 1e-3 * scale, axes)
        assert_same_bits(own, np.asarray(other))
        place = grad.copy()
        assert nc.adaptive_clip(place, param, bound, 1e-3 * scale, axes, out=place) is place
        assert_same_bits(place, own)
        for ord in (1, 3, np.inf):
            own = nc.clip_by_norm(grad, bound, axes, ord=ord)
            other = nc.clip_by_norm(general(grad), bound, axes, ord=ord)
            assert_same_bits(own, np.asarray(other))


def grads_and_params(dtype: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Return two matrices in one buffer and a third one, and parameters of their shapes."""
    rng = np.random.default_rng(8)
    buffer = normal(rng, (90,), dtype)
    grads = [buffer[:30].reshape(5, 6), buffer[30:90].reshape(15, 4), normal(rng, (2, 3), dtype)]
    return grads, [normal(rng, grad.shape, dtype) for grad in grads]


@pytest.mark.parametrize(
    ("changed", "k", "change"),
    [
        ("nothing", 0, np.copy),
        ("bound", 0, np.copy),  # so small that results are truncated
        ("grads", 2, lambda grad: grad * 1e-170),  # whose squares are lost
        ("params", 1, lambda param: param * 1e-160),
        ("grads", 2, lambda grad: grad.astype("float32")),
        ("params", 0, np.asfortranarray),
        ("params", 0, lambda param: param.astype("float32")),
    ],
    ids=[
        "plain",
        "truncated",
        "lossy",
        "lossy parameter",
        "mixed",
        "other order",
        "other parameter",
    ],
)
@pytest.mark.each_value
@pytest.mark.parametrize(
    "clip",
    [
        lambda grads, _, bound, out=None: nc.clip_by_norm(grads, bound, 0, out=out),
        lambda *pair, out=None: nc.adaptive_clip(*pair, axes=0, out=out),
    ],
    ids=["norm", "ratio"],
)
def test_units_of_a_list_are_those_of_each(monkeypatch, clip, changed, k, change):
    grads, params = grads_and_params("float64")
    for name, arrays in (("grads", grads), ("params", params)):
        if name == changed:
            arrays[k] = change(arrays[k])

    bound = 1e-308 if changed == "bound" else 0.3
    pairs = zip(grads, params, strict=True)
    wanted = [np.asarray(clip(general(own), param, bound)) for own, param in pairs]
    before = [grad.copy() for grad in grads]
    if changed == "nothing":  # all is one native call
        monkeypatch.setattr(lists, "each", None)
    made = clip(grads, params, bound)
    for own, grad, other, right in zip(made, grads, before, wanted, strict=True):
        assert_same_bits(own, right)
        assert_same_bits(grad, other)
        assert not np.shares_memory(own, grad)
    for own, grad, right in zip(clip(grads, params, bound, out=grads), grads, wanted, strict=True):
        assert own is grad
        assert_same_bits(own, right)


def test_parameters_are_read_before_anything_is_written_there():
    square = np.random.default_rng(9).standard_normal((4, 4))
    wanted = nc.adaptive_clip([square, 2 * square], [square, 2 * square], 0.3, axes=0)
    grads = [square.copy(), 2 * square]
    for own, right in zip(
        nc.adaptive_clip(grads, grads, 0.3, axes=0, out=grads), wanted, strict=True
    ):
        assert_same_bits(own, right)
    grads = [square.copy(), 2 * square]
    with pytest.raises(ValueError, match="shares memory with param"):
        nc.adaptive_clip(grads, grads[::-1], 0.3, axes=0, out=grads)
    assert_same_bits(grads[0], square)


@pytest.mark.parametrize(
    ("grads", "params"),
    [
        (lambda g: {"enc": {"w": g()}, "out": g()}, lambda p: {"out": p(), "enc.w": p()}),
        (lambda g: [[g()], g()], lambda p: [p(), p()]),
        (lambda g: ([g(), g()],), lambda p: (p(), p())),
        (lambda g: [g(), g()], lambda p: [[p()], p()]),
        (lambda g: {"a": g(), "b": g()}, lambda p: {"b": p(), "c": p()}),
    ],
)
@pytest.mark.full
def test_parameters_are_those_of_the_same_path(grads, params):
    def made():
        return np.ones((3, 2))

    with pytest.raises((TypeError, ValueError), match="param"):
        nc.adaptive_clip(grads(made), params(made), 0.01)


def test_units_in_place_are_refused_as_a_whole():
    grads, _ = grads_and_params("float64")
    before = [grad.copy() for grad in grads]
    grads[2].flags.writeable = False
    with pytest.raises(ValueError, match=r"out\[2\]"):
        nc.clip_by_norm(grads, 0.1, 0, out=grads)
    overlapping = [grads[0], grads[0][:, ::-1]]
    with pytest.raises(ValueError, match="out"):
        nc.clip_by_norm(overlapping, 0.1, 0, out=overlapping)
    shifted = [grads[0], grads[0].reshape(-1)[3:15].reshape(3, 4)]
    with pytest.raises(ValueError, match="out"):
        nc.clip_by_norm(shifted, 0.1, 0, out=shifted)
    for own, other in zip(grads, before, strict=True):
        assert_same_bits(own, other)
    with pytest.raises(TypeError, match="axes"):
        nc.clip_by_norm(grads[0], 0.1, True, out=grads[0])
    with pytest.raises(ValueError, match="axes"):
        nc.clip_by_norm(grads[0], 0.1, 2, out=grads[0])
    assert_same_bits(grads[0], before[0])


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("axes", [0, 1])
def test_much_is_clipped_by_units_as_little_is(monkeypatch, dtype, axes):
    grad, param = (normal(np.random.default_rng(k), (40, 24), dtype) for k in (6, 7))
    grad[3], grad[:, 5] = 0, 0
    little = nc.clip_by_norm(grad, 4.0, axes), nc.adaptive_clip(grad, param, 0.9, axes=axes)
    for module in (batches, plain_units, threads):
        monkeypatch.setattr(module, "PARALLEL_BYTES", 8)
    much = nc.clip_by_norm(grad, 4.0, axes), nc.adaptive_clip(grad, param, 0.9, axes=axes)
    for own, other in zip(little, much, strict=True):
        assert_same_bits(own, other)
    place = grad.copy()
    assert nc.clip_by_norm(place, 1e3, axes, out=place) is place
    assert_same_bits(place, grad)
    assert_same_bits(nc.clip_by_norm(place, 4.0, axes, out=place), little[0])
    lossy = grad * np.asarray(1e-170).astype(dtype)  # whose squares float64 does not hold
    other = np.asarray(nc.clip_by_norm(general(lossy), 1e-171, axes))
    assert_same_bits(nc.clip_by_norm(lossy, 1e-171, axes), other)
    small = nc.clip_by_norm(grad, 1e-44, axes)  # whose results are to be truncated
    assert_same_bits(small, np.asarray(nc.clip_by_norm(general(grad), 1e-44, axes)))


def test_parameters_whose_squares_overflow_go_the_general_way():
    grad, param = np.full((2, 3), 1.0), np.full((2, 3), 1e200)
    own = nc.adaptive_clip(grad, param, 1e-203, axes=1)
    assert_same_bits(own, np.asarray(nc.adaptive_clip(general(grad), param, 1e-203, axes=1)))
    np.testing.assert_allclose(own, 1e-3, rtol=1e-12)


def test_much_is_held_between_bounds_by_all_threads(monkeypatch):
    monkeypatch.setattr(little, "PARALLEL_BYTES", 8)  # which compiled kernels do not see
    grad = np.linspace(-3, 3, 50)
    np.testing.assert_array_equal(nc.clip_by_value(grad, -1.0, 2.0), np.clip(grad, -1, 2))


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_a_unit_has_the_bits_that_it_has_alone(dtype):
    low = {"float16": -6, "float32": -41, "float64": -315}[dtype]
    for seed in range(30):
        rng = np.random.default_rng(seed)
        grad = rng.standard_normal((2, 200)) * 10.0 ** rng.integers(low, low + 8, 200)
        grad[:, 0], param = 1.0, np.ones((2, 200))
        param[1] = 10.0 ** (-6 if dtype == "float16" else low - 2)
        grad, param = grad.astype(dtype), param.astype(dtype)
        both = nc.adaptive_clip(grad, param, 0.01, 0.0, axes=1)  # results of the second truncate
        alone = nc.adaptive_clip(grad[:1], param[:1], 0.01, 0.0, axes=1)
        assert both[:1].tobytes() == alone.tobytes()

"""What is refused on the GPU, and what is said where there is none."""

from __future__ import annotations

import gc
import math
import os
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import device, driver, engine, memory, streams
from numclip.cuda.arrays import DeviceArray
from tests.cuda.devices import fetch, ready, send
from tests.cuda.foreign import Foreign, Tensor, torch
from tests.cuda.gpu import new_stream
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES

__all__ = ["ready", "torch"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
GROUPS = "import numpy as np, numclip as nc; nc.ParamGroups([nc.Group('g', {'x': np.ones(3)})]"


def without_gpu(code: str, before: str = "") -> str:
    """The last line a process prints that has no GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", f"{before}\n{code}"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    return result.stderr.strip().splitlines()[-1]


def test_no_gpu():
    message = without_gpu(f"{GROUPS}, device='cuda')")
    assert message.startswith('numclip.errors.DeviceError: device: "cuda" needs an NVIDIA')
    assert 'pip install "numba-cuda[cu12]>=0.30" "numpy<2.6"' in message


@pytest.mark.parametrize("code", [f"{GROUPS}, device='cuda')", "import numclip.cuda"])
def test_no_numba_cuda(code):
    message = without_gpu(code, "import sys; sys.modules['numba_cuda'] = None")
    assert "needs the package numba-cuda, which is missing" in message
    assert 'pip install "numba-cuda[cu12]>=0.30" "numpy<2.6"' in message


def test_numba_cuda_that_is_not_in_the_place_of_numbas_own():
    """Where no .pth file runs: with PYTHONPATH, in a zip file, or without `site`."""
    code = f"import sys; sys.path[:] = {sys.path!r}; import numclip.cuda.device"
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    last = result.stderr.strip().splitlines()[-1]
    assert 'DeviceError: device: "cuda" needs numba-cuda in place of numba\'s own' in last


def test_the_error_can_be_named():
    assert issubclass(nc.DeviceError, RuntimeError)


def test_device_and_stream_are_checked():
    group = nc.Group("g", {"x": np.ones(3)})
    with pytest.raises(ValueError, match=r"device: expected one of 'cpu', 'cuda', got 'tpu'"):
        nc.ParamGroups([group], device="tpu")
    with pytest.raises(ValueError, match=r'stream: expected None for device="cpu"'):
        nc.ParamGroups([group], stream=0)
    with pytest.raises(TypeError, match=r"stream: expected a CUDA stream or None, got str"):
        nc.ParamGroups([group], device="cuda", stream="fast")


def test_a_stream_is_held_as_long_as_it_is_used():
    """CuPy's and numba's are destroyed with their objects."""

    class Stream:
        ptr = new_stream()

    groups = nc.ParamGroups([nc.Group("g", {"x": np.ones(3)})], device="cuda", stream=Stream())
    held = weakref.ref(groups._held)
    gc.collect()
    assert held() is not None
    groups.stream = None
    gc.collect()
    assert held() is None


def test_streams_share_no_memory(monkeypatch):
    grad = send(np.ones(9))
    made = []
    plan = engine.Plan
    monkeypatch.setattr(engine, "Plan", lambda *a: made.append(handle) or plan(*a))
    one, two = new_stream(), new_stream()
    driver.synchronize(None)  # none of the two waits for what was sent
    for handle in (one, two, one):
        assert nc.global_norm([Foreign(np.ones(9), grad, version=3, stream=handle)]) == 3.0
    assert made == [one, two]


def test_copies_wait_for_every_stream_where_none_is_named(monkeypatch):
    groups = nc.ParamGroups([nc.Group("g", {"x": np.ones(3)})], device="cuda")
    optimizer, array = nc.Adam(groups), groups.params["x"]
    waits = []
    monkeypatch.setattr(driver, "synchronize", waits.append)
    for copy in (lambda: np.asarray(array), lambda: optimizer._updater.slots["g"].steps):
        waits.clear()
        copy()
        assert waits[0] is None
    for write in (lambda: array.copy_from(np.zeros(3)), lambda: array.add(send(np.zeros(3)))):
        waits.clear()
        write()
        assert waits[0] is waits[-1] is None
    waits.clear()
    array.copy_from(np.zeros(3), stream=0)
    assert not waits


def test_no_work_is_no_launch():
    """The driver refuses a grid of no blocks; gradients can have no elements."""
    device.launch(None, 0, 0)


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones(4, "f"), ValueError, r"grads\['x'\]: expected shape \(3,\), got \(4,\)"),
        (np.ones(3, "D"), TypeError, r"grads\['x'\]: expected dtype float32, got complex128"),
        (nc.IndexedSlices(np.ones(1, "f"), [0], (3,)), TypeError, "expected an array, got Indexed"),
    ],
)
def test_gradients_that_do_not_fit(grad, error, message):
    groups = nc.ParamGroups([nc.Group("g", {"x": np.ones(3, "f"), "y": np.ones(2)})], device="cuda")
    with pytest.raises(error, match=message):
        groups.set_grads({"y": np.ones(2), "x": grad})
    assert not fetch(groups.grads["y"]).any()
    with pytest.raises(TypeError, match=r"grads\['x'\]: expected dtype float32 in C order"):
        groups.accumulate({"x": send(np.ones(3))})


@pytest.mark.parametrize(
    ("array", "told", "error", "message"),
    [
        (np.ones(4), {"typestr": "<i4"}, TypeError, r"grads\[0\]: .*int32; convert it"),
        (np.ones(4), {"typestr": "<V2"}, TypeError, r"grads\[0\]: expected an array of float16"),
        (np.ones(4), {"data": (4, False)}, ValueError, r"grads\[0\]: expected an aligned CUDA"),
        (np.ones(4), {"strides": (12,)}, ValueError, r"grads\[0\]: .*aligned.*strides \(12,\)"),
    ],
)
def test_arrays_that_are_not_taken(array, told, error, message):
    with pytest.raises(error, match=message):
        nc.clip_by_global_norm([Foreign(array, **told)], 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_tensors_of_pytorch(torch, dtype):  # noqa: ARG001
    rng = np.random.default_rng(0)
    grads = [normal(rng, (5, 7), dtype), normal(rng, (3,))]
    grads[0] = np.asfortranarray(grads[0])
    sent = [Tensor(grad) for grad in grads]
    wanted, norm = nc.clip_by_global_norm(grads, 0.5)
    clipped, same = nc.clip_by_global_norm(sent, 0.5)
    assert float(same) == pytest.approx(norm, rel=1e-14)
    for new, old, grad, here in zip(clipped, sent, grads, wanted, strict=True):
        assert isinstance(new, Tensor)
        assert_same_bits(fetch(old.sent), grad)
        found, expected = (np.asarray(a, np.complex128) for a in (fetch(new.sent), here))
        np.testing.assert_allclose(found, expected, rtol=1e-15)
    pointers = [tensor.data_ptr() for tensor in sent]
    again, _ = nc.clip_by_global_norm(sent, 0.5, out=sent)
    assert [tensor.data_ptr() for tensor in again] == pointers
    for new, old in zip(clipped, sent, strict=True):
        assert_same_bits(fetch(old.sent), fetch(new.sent))


def test_tensors_that_are_not_taken(torch):  # noqa: ARG001
    odd = Tensor(np.ones(4))
    for dtype, message in [("torch.int64", "int64; convert it"), ("torch.float8_e5m2", "float8_")]:
        odd.dtype = dtype
        with pytest.raises(TypeError, match=rf"grads\[0\]: expected an array of .*{message}"):
            nc.clip_by_global_norm([odd], 1.0)


@pytest.mark.parametrize(
    ("told", "value", "message"),
    [
        ("is_conj", True, r"to be conjugated or negated .* pass tensor\.resolve_conj\(\)"),
        ("is_neg", True, r"to be conjugated or negated"),
        ("get_device", 1, r"on GPU 0, got one on GPU 1; a process uses one GPU"),
        ("data_ptr", 0, r"with memory on the GPU, got Tensor at address 0; pass its local part"),
    ],
)
def test_tensors_whose_memory_is_not_their_values(torch, told, value, message):  # noqa: ARG001
    odd = Tensor(np.ones(4))
    setattr(odd, told, lambda: value)
    with pytest.raises(ValueError, match=rf"grads\[0\]: expected .*{message}"):
        nc.global_norm([odd])


def test_arrays_of_numba_come_back_as_such():
    from numba import cuda

    grad = np.asfortranarray(normal(np.random.default_rng(0), (5, 7), "float32"))
    sent = cuda.to_device(grad)
    clipped = nc.clip_by_norm(sent, 0.5)
    assert type(clipped) is type(sent)
    np.testing.assert_array_max_ulp(clipped.copy_to_host(), nc.clip_by_norm(grad, 0.5), 1)


def test_places_are_not_mixed():
    there, here = send(np.ones(3)), np.ones(3)
    with pytest.raises(TypeError, match=r"grads\[1\]: expected a CUDA array, as the others are"):
        nc.clip_by_global_norm([there, here], 1.0)
    with pytest.raises(TypeError, match=r"grads\[1\]: .* got DeviceArray on the GPU; copy it"):
        nc.clip_by_global_norm([here, there], 1.0)
    with pytest.raises(TypeError, match=r"out\[0\]: expected a CUDA array"):
        nc.clip_by_global_norm([there], 1.0, out=[here])
    assert_same_bits(fetch(there), here)


def test_results_are_checked():
    grads = {"a": send(np.ones(4)), "b": None}
    read_only = Foreign(np.ones(4), data=(grads["a"].address, True))
    for out, error, message in [
        ({"a": send(np.ones(3)), "b": None}, ValueError, r"out\['a'\]: expected shape \(4,\)"),
        ({"a": send(np.ones(4, "f")), "b": None}, TypeError, r"out\['a'\]: expected dtype float64"),
        ({"a": None, "b": None}, ValueError, r"out\['a'\]: expected an array, as in grads\['a'\]"),
        ({"b": None}, ValueError, r"out: expected the 2 keys of grads .*\['a'\]"),
        ({"a": read_only, "b": None}, ValueError, r"out\['a'\]: expected a writeable array"),
    ]:
        with pytest.raises(error, match=message):
            nc.clip_by_global_norm(grads, 1.0, out=out)


def test_results_do_not_overlap():
    room = memory.Memory(64)
    parts = [DeviceArray(room, start, (4,), np.dtype("f8")) for start in (0, 16)]
    grad = send(np.ones(4))
    with pytest.raises(ValueError, match=r"out\[1\]: shares memory with out\[0\]"):
        nc.clip_by_global_norm([grad, send(np.ones(4))], 1.0, out=parts)
    with pytest.raises(ValueError, match=r"out: shares memory with grad; pass out= the grad"):
        nc.clip_by_norm(parts[0], 1.0, out=parts[1])
    apart = [send(np.zeros(4)), send(np.zeros(4))]
    nc.clip_by_global_norm([grad, grad], 1.0, out=apart)  # may be read twice
    assert_same_bits(fetch(apart[0]), fetch(apart[1]))


@pytest.mark.parametrize("step", [1, 2])
def test_results_that_are_in_place_in_part(step):
    """Where nothing is clipped, what is not in place is copied all the same."""
    grads = [normal(np.random.default_rng(k), (600,))[::step] for k in (0, 1)]
    sent = [send(grad) for grad in grads]
    other = send(np.zeros_like(grads[1]))
    nc.clip_by_global_norm(sent, 1e9, out=[sent[0], other])
    assert_same_bits(fetch(other), grads[1])


def test_results_between_the_elements_of_others():
    room = send(np.arange(12.0).reshape(3, 4))
    even, odd = (
        DeviceArray(room._memory, 8 * start, (3, 2), np.dtype("f8"), (32, 16)) for start in (0, 1)
    )
    clipped = nc.clip_by_norm(even, 1.0, out=odd)
    assert clipped is odd
    assert_same_bits(fetch(odd), nc.clip_by_norm(fetch(even), 1.0))
    for out, message in [
        (room.part(1, (3, 2)), "out: shares memory with grad; pass out= the gradients"),
        (
            DeviceArray(memory.Memory(99), 0, (3, 2), np.dtype("f8"), (16, 0)),
            r"out: expected distinct elements, got strides \(16, 0\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            nc.clip_by_norm(even, 1.0, out=out)
    with pytest.raises(ValueError, match=r"out\[1\]: shares memory with out\[0\]"):
        nc.clip_by_global_norm([room, send(np.ones((3, 2)))], 1.0, out=[room, odd])


def test_what_bounds_do_not_take():
    grad = send(np.ones((2, 3), "f"))
    for low, high, error, message in [
        (send(np.full(3, math.nan)), 1.0, ValueError, "clip_value_min: expected numbers, got NaN"),
        (0.0, send(np.ones(2)), ValueError, "clip_value_max: expected a shape that broadcasts"),
        (np.ones(3), send(np.zeros(3)), ValueError, "clip_value_min: expected at most clip_value"),
    ]:
        with pytest.raises(error, match=message):
            nc.clip_by_value(grad, low, high)
    with pytest.raises(TypeError, match=r"grad: expected real numbers to hold between bounds"):
        nc.clip_by_value(send(np.ones(3, "D")), -1, 1)


def test_examples_that_do_not_fit():
    for odd, message in [
        (np.ones((3, 2)), r"grads\[1\]: expected 2 examples along axis 0, as in grads\[0\], got 3"),
        (np.ones(()), r"grads\[1\]: expected examples along axis 0, got a 0-d array"),
    ]:
        with pytest.raises(ValueError, match=message):
            nc.clip_per_example([send(np.ones((2, 2))), send(odd)], 1.0)


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (send(np.ones((3, 2))), ValueError, r"param: expected an array of the gradient's shape"),
        (np.ones((2, 3)), TypeError, r"param: expected a CUDA array, as the others are, got ndarr"),
    ],
)
def test_parameters_that_do_not_fit(param, error, message):
    with pytest.raises(error, match=message):
        nc.adaptive_clip(send(np.ones((2, 3))), param)


def test_copying_between_host_and_device_is_checked():
    array = send(np.arange(6.0).reshape(2, 3))
    for source in (np.ones((3, 2)), np.ones((2, 3), "f"), send(np.ones((2, 3), "f"))):
        with pytest.raises(ValueError, match=r"source: expected float64 of shape \(2, 3\)"):
            array.copy_from(source)
    with pytest.raises(TypeError, match=r"index: expected \.\.\."):
        array[0] = np.ones(3)
    with pytest.raises(ValueError, match=r"copy: expected True or None"):
        np.asarray(array, copy=False)
    assert (repr(array), array.ndim) == ("DeviceArray(float64, shape=(2, 3))", 2)
    clipped = nc.clip_by_norm(send(np.asfortranarray(np.ones((2, 3)))), 1.0)
    for copy in (clipped.copy_from, clipped.add):
        with pytest.raises(ValueError, match=r"array: expected one in C order to copy to, got str"):
            copy(np.ones((2, 3)))


@pytest.mark.parametrize("policy", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_policies_of_the_functions(policy, value):
    grads = [normal(np.random.default_rng(0), (70,), name) for name in ("float32", "float64")]
    grads[1][5] = value
    sent = [send(grad) for grad in grads]
    if policy == "raise":
        with pytest.raises(nc.NonFiniteGradientError, match=r"grads\[1\] is not finite"):
            nc.clip_by_global_norm(sent, 1.0, nonfinite=policy, out=sent)
        assert_same_bits(fetch(sent[0]), grads[0])
        return
    wanted, norm = nc.clip_by_global_norm(grads, 1.0, nonfinite=policy)
    found, same = nc.clip_by_global_norm(sent, 1.0, nonfinite=policy, out=sent)
    np.testing.assert_allclose(float(same), norm, rtol=1e-14)
    for there, here in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(fetch(there), here)


@pytest.mark.parametrize("given", [0.0, 0.5, 7.0, math.inf, math.nan])
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_a_norm_that_is_given(given, policy):
    grad = normal(np.random.default_rng(0), (33,), "float32")
    wanted, norm = nc.clip_by_global_norm([grad], 1.0, given, nonfinite=policy)
    found, same = nc.clip_by_global_norm([send(grad)], 1.0, given, nonfinite=policy)
    np.testing.assert_allclose(float(same), norm, rtol=1e-14)
    np.testing.assert_array_equal(fetch(found[0]), wanted[0])


def test_a_norm_is_a_number_for_whoever_asks():
    grad = send(np.array([3.0, 4.0]))
    norm = nc.global_norm([grad])
    assert (norm == 5.0, norm < 6, norm >= 5, bool(norm), hash(norm)) == (*4 * [True], hash(5.0))
    assert (norm + 1, 1 + norm, norm - 1, 1 - norm) == (6.0, 6.0, 4.0, -4.0)
    assert (2 * norm, norm * 2, norm / 2, 10 / norm, norm**2) == (10.0, 10.0, 2.5, 2.0, 25.0)
    assert (-norm, abs(norm), round(norm, 1), norm.item()) == (-5.0, 5.0, 5.0, 5.0)
    assert (f"{norm:.2f}", repr(norm), math.isfinite(norm)) == ("5.00", "5.0", True)
    assert (np.isfinite(norm), np.sqrt(nc.global_norm([grad]))) == (True, math.sqrt(5.0))
    assert np.asarray(norm, np.float32).dtype == np.float32
    with pytest.raises(ValueError, match=r"copy: expected True or None"):
        np.asarray(norm, copy=False)
    assert norm == nc.global_norm([grad])
    clipped, same = nc.clip_by_global_norm([grad], 1.0, nc.global_norm([grad]))
    assert same == 5.0
    np.testing.assert_allclose(fetch(clipped[0]), [0.6, 0.8], rtol=1e-14)


def test_collections_of_every_kind():
    grads = {"a": send(np.array([3.0])), "b": None, "c": send(np.array([4.0]))}
    for given in (grads.values(), iter(grads.values()), (g for g in grads.values())):
        clipped, norm = nc.clip_by_global_norm(given, 1.0)
        assert type(clipped) is list
        assert clipped[1] is None
        assert norm == 5.0
    assert nc.global_norm(iter(grads.values())) == 5.0
    with pytest.raises(TypeError, match=r"grads: expected a list, tuple or dict of gradients"):
        nc.global_norm(grads["a"])


def test_a_stream_of_cupy_is_kept_as_long_as_a_norm_can_be_read(monkeypatch):
    theirs = SimpleNamespace(ptr=new_stream())
    cupy = SimpleNamespace(cuda=SimpleNamespace(get_current_stream=lambda: theirs))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    array = type("ndarray", (), {"__module__": "cupy"})()
    assert streams.current_stream(array).owner is theirs
    theirs.ptr = 0
    assert streams.current_stream(array) == 0

"""What only a GPU can show: speed apart, that runs agree bit for bit, and with other libraries."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.cuda.devices import fetch, hardware, ready, send
from tests.oracle import reference
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES, REAL_DTYPES

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, hardware]
SIZES = [1, 255, 256, 257, 4095, 1_000_003, 40_000_000]


def ulps(found: np.ndarray, wanted: np.ndarray) -> int:
    """The largest distance in units in the last place."""
    bits = f"i{found.dtype.itemsize}"
    return int(np.abs(found.view(bits).astype(np.int64) - wanted.view(bits)).max())


@pytest.mark.parametrize("offset", [0, 1, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", REAL_DTYPES)
def test_agreement_with_the_cpu(dtype, size, offset):
    grad = normal(np.random.default_rng(size), (size,), dtype)
    sent = send(grad, offset * grad.itemsize)
    norm = nc.global_norm([grad])
    assert abs(float(nc.global_norm([sent])) - norm) <= 1e-14 * norm
    for order in (1, 3, np.inf):
        wanted = nc.global_norm([grad], order)
        assert abs(float(nc.global_norm([sent], order)) - wanted) <= 1e-12 * wanted
    wanted_grad, _ = nc.clip_by_global_norm([grad], 0.3 * norm)
    found, _ = nc.clip_by_global_norm([sent], 0.3 * norm)
    # One unit of the factor, and in float64 its rounding in the product.
    assert ulps(fetch(found[0]), wanted_grad[0]) <= (2 if dtype == "float64" else 1)
    held = nc.clip_by_value(sent, -0.5, 0.25, out=sent)
    assert_same_bits(fetch(held), nc.clip_by_value(grad, -0.5, 0.25))


VIEWS = {
    "columns": lambda x: x[:, 3:900],
    "reversed": lambda x: x[::-1, ::-2],
    "permuted": lambda x: x.reshape(1009, 5, 200).transpose(1, 2, 0)[:, ::2],
    "few": lambda x: x[:, :3],
}


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_and_units(dtype, view):
    whole, param = (normal(np.random.default_rng(k), (1009, 1000), dtype) for k in (0, 1))
    grad, param = VIEWS[view](whole), VIEWS[view](param)
    sent, bound = send(grad), 0.9 * nc.global_norm([grad])
    assert_near(nc.clip_by_norm(sent, bound), nc.clip_by_norm(grad, bound))
    for axes in [(0,), (grad.ndim - 1,)]:
        middle = 1.001 * float(np.median(np.linalg.norm(grad.astype("D"), axis=axes[0])))
        for ord in (2, 1, np.inf):
            wanted = nc.clip_by_norm(grad, middle, axes, ord=ord)
            assert_near(nc.clip_by_norm(sent, middle, axes, ord=ord), wanted)
        twice = [fetch(nc.clip_by_norm(sent, middle, axes)) for _ in range(2)]
        assert_same_bits(*twice)
        wanted = nc.adaptive_clip(grad, param, 1.0, axes=axes)
        assert_near(nc.adaptive_clip(sent, send(param), 1.0, axes=axes), wanted)
    examples = grad.astype("D").reshape(len(grad), -1)
    limit = 1.001 * float(np.median(np.linalg.norm(examples, axis=1)))
    summed, count = nc.clip_per_example([grad], limit)
    found, same = nc.clip_per_example([sent], limit)
    assert same == count
    np.testing.assert_allclose(fetch(found[0]).astype("D"), summed[0].astype("D"), rtol=0.01)
    assert not fetch(nc.clip_by_norm(sent, 0.0, out=sent)).any()


def assert_near(found: Any, wanted: np.ndarray) -> None:
    """A few units apart at most: the norms' last bits, and those of the power function."""
    pair = (np.ascontiguousarray(a).astype("D") for a in (fetch(found), wanted))
    rounding = 8.0 * float(reference.unit_roundoff(wanted.dtype)) + 1e-12
    smallest = float(reference.float_info(wanted.dtype).smallest_subnormal)
    np.testing.assert_allclose(*pair, rtol=rounding, atol=smallest)


@pytest.mark.parametrize("scale", [1e200, 1e-200, 5e-324])
def test_magnitudes(scale):
    grad = normal(np.random.default_rng(0), (100_003,), "float64") * scale
    norm = nc.global_norm([grad])
    found, same = nc.clip_by_global_norm([send(grad)], 0.5 * norm)
    assert abs(float(same) - norm) <= 1e-14 * norm
    assert nc.global_norm([fetch(found[0])]) <= 0.5 * norm


def test_a_hundred_runs_agree():
    rng = np.random.default_rng(0)
    grads = [normal(rng, (int(n),), "float32") for n in rng.integers(1, 300_000, 150)]
    sent = [send(grad) for grad in grads]
    outcomes = set()
    for _ in range(100):
        clipped, norm = nc.clip_by_global_norm(sent, 1.0)
        outcomes.add((float(norm), b"".join(fetch(array).tobytes() for array in clipped)))
    assert len(outcomes) == 1


def zipfian(columns: int, dtype: str = "float32") -> nc.IndexedSlices:
    """Rows as a batch of words has them: a few of many, and many of a few."""
    rng = np.random.default_rng(columns)
    indices = np.minimum(rng.zipf(1.3, 65_536), 20_000) - 1
    return nc.IndexedSlices(normal(rng, (65_536, columns), dtype), indices, (20_000, columns))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64", "complex64"])
@pytest.mark.parametrize("columns", [1, 3, 64, 1000])
def test_rows_that_repeat(columns, dtype):
    slices = zipfian(columns, dtype)
    sent = send(slices)
    norm = nc.global_norm([slices])
    for order, wanted in ((2, norm), (3, nc.global_norm([slices], 3))):
        assert abs(float(nc.global_norm([sent], order)) - wanted) <= 1e-13 * wanted
    assert_same_bits(fetch(sent.coalesce()), slices.coalesce())
    outcomes = set()
    for _ in range(20):
        (clipped,), same = nc.clip_by_global_norm([sent], 0.3 * norm)
        outcomes.add((float(same), fetch(clipped).values.tobytes()))
    assert len(outcomes) == 1
    assert nc.global_norm([fetch(clipped)]) <= 0.3 * norm


@pytest.mark.parametrize("kind", [nc.SGD, nc.Adam])
def test_a_sparse_group(kind):
    groups = [nc.Group("g", {"E": np.ones((20_000, 64), "f")}, clip=nc.ByNorm(1.0), sparse=True)]
    cpu, gpu = nc.ParamGroups(groups), nc.ParamGroups(groups, device="cuda")
    one, two = kind(cpu, 0.1), kind(gpu, 0.1)
    for _ in range(3):
        for managed, optimizer in ((cpu, one), (gpu, two)):
            managed.grads["E"] = zipfian(64)
            optimizer.step()
    np.testing.assert_allclose(fetch(gpu.params["E"]), cpu.params["E"], rtol=1e-6, atol=1e-6)


def test_slices_of_pytorch():
    torch = pytest.importorskip("torch")
    host = zipfian(64)
    values = torch.from_numpy(host.values).cuda()
    indices = torch.from_numpy(host.indices.copy()).cuda()
    slices = nc.IndexedSlices(values, indices, (20_000, 64))
    (clipped,), norm = nc.clip_by_global_norm([slices], 1.0)
    assert norm == pytest.approx(nc.global_norm([host]), rel=1e-14)
    assert isinstance(clipped.values, torch.Tensor)
    dense = slices.to_dense()
    wanted = torch.zeros_like(dense).index_add_(0, indices, values)
    torch.testing.assert_close(dense, wanted, rtol=1e-4, atol=1e-2)


def torch_gradients(torch: Any) -> list[Any]:
    generator = torch.Generator("cuda").manual_seed(0)
    dtypes = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
    shape = (1001, 3)
    return [torch.randn(shape, generator=generator, device="cuda").to(d) for d in dtypes]


def test_pytorch_in_place():
    torch = pytest.importorskip("torch")
    grads = torch_gradients(torch)
    pointers = [grad.data_ptr() for grad in grads]
    copies = [grad.double() for grad in grads]
    clipped, norm = nc.clip_by_global_norm(grads, 1.0, out=grads)
    exact = torch.cat([copy.reshape(-1) for copy in copies]).norm().item()
    assert norm == pytest.approx(exact, rel=1e-12)
    assert [grad.data_ptr() for grad in clipped] == pointers
    assert torch.cat([grad.double().reshape(-1) for grad in grads]).norm().item() <= 1 + 1e-14


def test_pytorch_parameters_are_updated_where_they_lie():
    torch = pytest.importorskip("torch")
    own = [torch.nn.Parameter(grad.float()) for grad in torch_gradients(torch)]
    theirs = [torch.nn.Parameter(param.detach().clone()) for param in own]
    ours = nc.Adam(None, 0.01, weight_decay=0.1)
    reference = torch.optim.AdamW(theirs, 0.01, weight_decay=0.1)
    for step in range(1, 5):
        grads = [param.detach() * step for param in theirs]
        clipped, _ = nc.clip_by_global_norm(grads, 1.0, out=grads)
        for param, grad in zip(theirs, clipped, strict=True):
            param.grad = grad
        ours.apply_gradients(zip(clipped, own, strict=True))
        reference.step()
    for param, wanted in zip(own, theirs, strict=True):
        torch.testing.assert_close(param, wanted, rtol=1e-5, atol=1e-6)


def test_pytorchs_own_call_waits_for_nothing():
    torch = pytest.importorskip("torch")
    from numclip.torch import clip_grad_norm_

    params = [torch.nn.Parameter(grad.clone()) for grad in torch_gradients(torch)]
    for param in params:
        param.grad = param.detach().clone()
    clip_grad_norm_(params, 1.0)  # compiles
    for param in params:
        param.grad = param.detach().clone()
    exact = torch.cat([param.double().reshape(-1) for param in params]).norm().item()
    busy = torch.ones(8192, 8192, device="cuda")
    for _ in range(20):
        busy = busy @ busy
    done = torch.cuda.Event()
    done.record()
    norm = clip_grad_norm_(params, 1.0)
    assert not done.query()
    assert (norm.device.type, norm.dtype, norm.shape) == ("cuda", torch.float64, ())
    assert norm.item() == pytest.approx(exact, rel=1e-12)
    total = torch.cat([param.grad.double().reshape(-1) for param in params]).norm()
    assert total.item() <= 1 + 1e-14


def test_dlpack_of_pytorch():
    torch = pytest.importorskip("torch")

    class Shared:
        """A tensor that tells of itself by DLPack alone."""

        def __init__(self, tensor: Any) -> None:
            self.tensor = tensor

        def __dlpack__(self, **options: Any) -> Any:
            return self.tensor.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.tensor.__dlpack_device__()

    with torch.cuda.stream(torch.cuda.Stream()):
        for grad in torch_gradients(torch):
            for _ in range(20):
                grad = grad * 1.5
                wanted = torch.linalg.vector_norm(grad.double())
                norm = nc.global_norm([Shared(grad)])
                assert float(norm) == pytest.approx(wanted.item(), rel=1e-12)


def test_pytorch_gets_tensors_back_on_its_stream():
    torch = pytest.importorskip("torch")
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        grads = torch_gradients(torch)
        for _ in range(20):
            grads = [grad * 2 for grad in grads]
            clipped, _ = nc.clip_by_global_norm(grads, 1.0)
            total = torch.cat([grad.double().reshape(-1) for grad in clipped]).norm()
            assert total.item() == pytest.approx(1.0, abs=0.01)
            grads = clipped
    assert all(isinstance(grad, torch.Tensor) for grad in clipped)


def test_groups_on_a_stream_of_pytorch_are_read_when_it_is_done():
    torch = pytest.importorskip("torch")
    params = {"w": np.ones(20_000_000, "f"), "none": np.ones((0, 3), "f")}
    group = nc.Group("g", params, clip=nc.ByGlobalNorm(1e9))
    groups = nc.ParamGroups([group], device="cuda", stream=torch.cuda.Stream())
    groups.set_grads({"w": np.ones(20_000_000, "f")})
    groups.accumulate({"none": np.ones((0, 3), "f")})
    optimizer = nc.SGD(groups, 1.0)
    for turn in range(20):
        optimizer.step()
        assert (np.asarray(groups.params["w"]) == -turn).all()
    assert optimizer.state_dict()["groups"]["g"]["steps"] == 20


def test_one_tensor_is_measured_on_two_streams():
    torch = pytest.importorskip("torch")
    grad = torch.ones(30_000_000, device="cuda")
    torch.cuda.synchronize()
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    norms = []
    for turn in range(40):
        with torch.cuda.stream(streams[turn % 2]):
            norms.append(nc.global_norm([grad]))
    assert len(set(map(float, norms))) == 1
    assert float(norms[0]) == pytest.approx(30_000_000**0.5, rel=1e-14)


def test_the_host_does_not_wait_for_what_is_queued():
    """New bounds and numbers of steps are sent, and rows' tables, while the GPU is busy."""
    torch = pytest.importorskip("torch")
    params = [torch.ones(1000, device="cuda") for _ in range(4)]
    grads = [torch.ones(1000, device="cuda") for _ in params]
    groups = nc.ParamGroups(
        [
            nc.Group("g", {"w": np.ones(1000, "f")}, clip=nc.ByGlobalNorm(lambda k: 1.0 + k)),
            nc.Group("s", {"e": np.ones((9, 4), "f")}, clip=nc.ByNorm(1.0), sparse=True),
        ],
        device="cuda",
    )
    optimizer, own = nc.SGD(groups, 0.1), nc.Adam(None)
    rows = nc.IndexedSlices(torch.ones(5, 4, device="cuda"), np.array([1, 1, 2, 8, 1]), (9, 4))

    def work(turn: int) -> None:
        nc.clip_by_global_norm(grads, 1.0 + turn, out=grads)
        own.apply_gradients(zip(grads, params, strict=True))
        groups.set_grads({"w": grads[0], "e": rows})
        groups.accumulate({"w": grads[0]})
        optimizer.step()

    for turn in range(3):
        work(turn)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    busy = torch.cuda.Event()
    busy.record()
    work(3)
    assert not busy.query()


def test_cupy_in_place_and_back():
    cupy = pytest.importorskip("cupy")
    grads = [cupy.arange(1000, dtype=name) for name in ("float16", "float32", "float64")]
    for out in (None, grads):
        before = [grad.astype("f8") for grad in grads]
        clipped, norm = nc.clip_by_global_norm(grads, 1.0, out=out)
        exact = sum(float((grad**2).sum()) for grad in before) ** 0.5
        assert norm == pytest.approx(exact, rel=1e-12)
        assert all(isinstance(grad, cupy.ndarray) for grad in clipped)
        assert sum(float((grad.astype("f8") ** 2).sum()) for grad in clipped) <= 1 + 1e-14


def test_numba_arrays():
    from numba import cuda

    grad = cuda.to_device(np.arange(100.0))
    clipped = nc.clip_by_norm(grad, 1.0)
    assert type(clipped) is type(grad)
    assert_same_bits(clipped.copy_to_host(), nc.clip_by_norm(np.arange(100.0), 1.0))


@pytest.mark.parametrize("kind", [nc.SGD, nc.Adam])
def test_a_step_in_a_cuda_graph(kind):
    torch = pytest.importorskip("torch")

    def made() -> tuple[Any, Any]:
        params = {"w": np.ones((257, 33), "f"), "b": np.ones(7)}
        group = nc.Group("g", params, clip=nc.ByGlobalNorm(0.5), nonfinite="skip")
        groups = nc.ParamGroups([group], device="cuda")
        groups.set_grads({name: np.full_like(p, 0.1) for name, p in params.items()})
        return groups, kind(groups, 0.1)

    (captured, one), (plain, two) = made(), made()
    one.step()
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    captured.stream = stream
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        one.step()
    for _ in range(5):
        graph.replay()
    torch.cuda.synchronize()
    for _ in range(6):
        two.step()
    for name in plain.params:
        assert_same_bits(fetch(captured.params[name]), fetch(plain.params[name]))


def test_views_are_taken_without_a_copy():
    torch = pytest.importorskip("torch")
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros((3, 4), "f")})], device="cuda")
    tensor = torch.as_tensor(groups.grads["w"], device="cuda")
    assert tensor.data_ptr() == groups.grads["w"].address
    tensor.fill_(2.0)
    torch.cuda.synchronize()
    assert (fetch(groups.grads["w"]) == 2.0).all()


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_compute_sanitizer(tool):
    program = shutil.which("compute-sanitizer")
    if program is None:
        pytest.skip("compute-sanitizer is not installed")
    chosen = "vector-float or odd-float or with_none or mixed"
    # cuda.bindings asks the driver for functions that it does not have, which is no error here.
    command = [program, "--tool", tool, "--report-api-errors", "no", "--error-exitcode", "9"]
    command += [sys.executable, "-m", "pytest"]
    command += ["-q", "-m", "gpu", "-k", chosen, "tests/cuda/test_cuda_conformance.py"]
    result = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:]

"""On the GPU: against PyTorch, CuPy and a copy within the device. Run with ``-m gpu``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.cuda.gpu import ready
from tests.oracle.models import MODELS

__all__ = ["ready"]
pytestmark = pytest.mark.gpu
SHAPES = {"flat 4 GB": [(1 << 30,)]}
SHAPES |= {name: MODELS[name] for name in ("GPT-2 small", "1000 x 256")}
models = pytest.mark.parametrize("model", SHAPES)


@pytest.fixture
def torch() -> Any:
    return pytest.importorskip("torch")


@pytest.fixture
def timed_on_gpu(benchmark: Any, torch: Any) -> Callable[..., None]:
    """Return a function that times a call with the work it launches, and records GB/s."""

    def run(call: Callable[[], object], nbytes: int) -> None:
        def whole() -> None:
            call()
            torch.cuda.synchronize()

        for _ in range(3):
            whole()
        benchmark(whole)
        if not benchmark.disabled:
            benchmark.extra_info["GB/s"] = round(nbytes / benchmark.stats.stats.median / 1e9, 1)
            benchmark.extra_info["device"] = torch.cuda.get_device_name()

    return run


def gradients(torch: Any, model: str, benchmark: Any) -> list[Any]:
    shapes = [(1000,)] if benchmark.disabled else SHAPES[model]
    generator = torch.Generator("cuda").manual_seed(0)
    return [torch.randn(shape, generator=generator, device="cuda") for shape in shapes]


def size_of(grads: list[Any]) -> int:
    return sum(grad.numel() * grad.element_size() for grad in grads)


@models
@pytest.mark.parametrize("method", ["numclip", "torch", "cupy", "copy"])
def test_norm(benchmark, torch, timed_on_gpu, model, method):
    benchmark.group = f"GPU norm, {model}"
    grads = gradients(torch, model, benchmark)
    calls: dict[str, Callable[[], object]] = {
        "numclip": lambda: nc.global_norm(grads),
        "torch": lambda: torch.stack(torch._foreach_norm(grads)).norm(),
        "copy": lambda: [grad.clone() for grad in grads],
    }
    if method == "cupy":
        cupy = pytest.importorskip("cupy")
        arrays = [cupy.asarray(grad).reshape(-1) for grad in grads]
        calls["cupy"] = lambda: sum(cupy.dot(array, array) for array in arrays)
    timed_on_gpu(calls[method], size_of(grads) * (2 if method == "copy" else 1))


@models
@pytest.mark.parametrize("outcome", ["clips", "does not clip"])
@pytest.mark.parametrize("method", ["numclip groups", "numclip", "torch"])
def test_clip(benchmark, torch, timed_on_gpu, model, method, outcome):
    """Shrink the bound at every call: at a fixed one, clipped gradients would not clip again."""
    benchmark.group = f"GPU clip in place, {outcome}, {model}"
    grads = gradients(torch, model, benchmark)
    for grad in grads:
        grad.grad = grad.clone()
    owned = [grad.grad for grad in grads]
    bound = [float(nc.global_norm(owned)) * (1e6 if outcome == "does not clip" else 1.0)]

    def ours() -> None:
        nc.clip_by_global_norm(owned, bound[0], out=owned)

    def theirs() -> None:
        torch.nn.utils.clip_grad_norm_(grads, bound[0], foreach=True)

    calls = {"numclip": ours, "torch": theirs}
    if method == "numclip groups":
        arrays = {str(k): np.zeros(tuple(grad.shape), "f") for k, grad in enumerate(grads)}
        rule = nc.ByGlobalNorm(lambda _: bound[0])
        groups = nc.ParamGroups([nc.Group("g", arrays, clip=rule)], device="cuda")
        groups.set_grads({str(k): grad for k, grad in enumerate(owned)})
        calls[method] = groups.clip

    def shrinking() -> None:
        if outcome == "clips":
            bound[0] *= 0.999
        calls[method]()

    timed_on_gpu(shrinking, size_of(grads) * (3 if outcome == "clips" else 1))


@models
@pytest.mark.parametrize("method", ["numclip", "torch"])
def test_clip_and_adam(benchmark, torch, timed_on_gpu, model, method):
    benchmark.group = f"GPU clip and Adam, {model}"
    grads = gradients(torch, model, benchmark)
    nbytes = 8 * size_of(grads)
    if method == "torch":
        params = [torch.nn.Parameter(torch.ones_like(grad)) for grad in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer = torch.optim.AdamW(params, fused=True)

        def theirs() -> None:
            torch.nn.utils.clip_grad_norm_(params, 1.0, foreach=True)
            optimizer.step()

        timed_on_gpu(theirs, nbytes)
        return
    arrays = {str(k): np.ones(tuple(grad.shape), np.float32) for k, grad in enumerate(grads)}
    groups = nc.ParamGroups([nc.Group("g", arrays, clip=nc.ByGlobalNorm(1.0))], device="cuda")
    groups.set_grads({str(k): grad for k, grad in enumerate(grads)})
    del grads, arrays
    step = nc.Adam(groups, weight_decay=0.01)
    timed_on_gpu(step.step, nbytes)


@pytest.mark.parametrize("shape", [(1 << 14, 1 << 13), (1 << 21, 64), (4, 1 << 25)], ids=str)
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("method", ["numclip", "torch"])
def test_units(benchmark, torch, timed_on_gpu, shape, axis, method):
    """Clip units by a bound that shrinks at every call; half of the units exceed the first one."""
    benchmark.group = f"GPU units, {shape} along axis {axis}"
    grad = torch.randn((8, 8) if benchmark.disabled else shape, device="cuda")
    bound = [float(grad.shape[axis]) ** 0.5]

    def ours() -> None:
        nc.clip_by_norm(grad, bound[0], axis, out=grad)

    def theirs() -> None:
        norms = torch.linalg.vector_norm(grad, dim=axis, keepdim=True)
        grad.mul_(torch.clamp(bound[0] / norms, max=1.0))

    def shrinking() -> None:
        bound[0] *= 0.999
        (ours if method == "numclip" else theirs)()

    timed_on_gpu(shrinking, 3 * size_of([grad]))


@pytest.mark.parametrize("method", ["numclip", "torch"])
def test_per_example(benchmark, torch, timed_on_gpu, method):
    benchmark.group = "GPU per example, 256 of 1 M"
    shapes = [(4, 3)] if benchmark.disabled else [(256, 1000, 1000), (256, 1000), (256, 1000, 24)]
    grads = [torch.randn(shape, device="cuda") for shape in shapes]

    def theirs() -> None:
        flat = [grad.flatten(1) for grad in grads]
        norms = sum(torch.linalg.vector_norm(x, dim=1) ** 2 for x in flat) ** 0.5
        factors = torch.clamp(100.0 / norms, max=1.0)
        [factors @ x for x in flat]

    calls = {"numclip": lambda: nc.clip_per_example(grads, 100.0), "torch": theirs}
    timed_on_gpu(calls[method], 2 * size_of(grads))

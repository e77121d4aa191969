"""What a call asks of the driver, counted by the stand-in for it."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.cuda import standin
from tests.cuda.devices import ready, send
from tests.cuda.foreign import Tensor, torch
from tests.cuda.gpu import HARDWARE, new_stream

__all__ = ["ready", "torch"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(HARDWARE, reason="counts the calls of the stand-in's driver"),
]
QUESTIONS = {"cuCtxGetCurrent", "cuStreamIsCapturing"}  # that start nothing
MEMORY = {"cuMemAlloc", "cuMemFree", "cuMemHostAlloc", "cuMemFreeHost", "cuMemAllocAsync"}


def calls_of(work: Any) -> dict[str, int]:
    """The calls that do something, and how often each is made."""
    gc.collect()
    standin.reset()
    kept = work()
    found = {name: n for name, n in standin.calls().items() if name not in QUESTIONS}
    del kept
    return found


@pytest.mark.parametrize("count", [4, 300])
def test_a_clip_at_known_addresses_is_three_launches(torch, count):  # noqa: ARG001
    items = [Tensor(np.ones(5, "f")) for _ in range(count)]
    clip = lambda: nc.clip_by_global_norm(items, 1.0, out=items)  # noqa: E731
    clip()
    clip()
    assert calls_of(clip) == {"cuLaunchKernelEx": 3}
    assert not standin.waits()
    nc.global_norm(items)
    assert calls_of(lambda: nc.global_norm(items)) == {"cuLaunchKernelEx": 2}


def test_another_bound_is_sent_and_nothing_waits(torch):  # noqa: ARG001
    items = [Tensor(np.ones(5, "f")) for _ in range(4)]
    for bound in (1.0, 2.0):
        nc.clip_by_global_norm(items, bound, out=items)
    found = calls_of(lambda: nc.clip_by_global_norm(items, 3.0, out=items))
    assert found == {"cuLaunchKernelEx": 3, "cuMemcpyHtoDAsync": 1}
    assert not standin.waits()


@pytest.mark.parametrize("handles", ["default", "own"])
def test_new_addresses_allocate_nothing_and_wait_for_nothing(torch, handles):
    """Once as many plans were made as are kept."""
    torch.cuda.current_stream(None).cuda_stream = new_stream() if handles == "own" else 0
    sets = [[Tensor(np.ones(5, "f")) for _ in range(3)] for _ in range(120)]
    for items in sets[:-20]:
        nc.clip_by_global_norm(items, 1.0, out=items)

    def work() -> None:
        for items in sets[-20:]:
            nc.clip_by_global_norm(items, 1.0, out=items)

    found = calls_of(work)
    assert found["cuLaunchKernelEx"] == 60
    assert not MEMORY & set(found)
    assert not standin.waits()


def test_rows_that_change_allocate_nothing_and_wait_for_nothing(torch):  # noqa: ARG001
    rng = np.random.default_rng(0)
    values = Tensor(np.ones((20_000, 4), "f"))
    made = [nc.IndexedSlices(values, rng.integers(0, 5000, 20_000), (5000, 4)) for _ in range(6)]
    assert made[0].grouping[0].nbytes > 1 << 16
    for slices in made[:3]:
        nc.clip_by_global_norm([slices], 1.0, out=[slices])
    found = calls_of(
        lambda: [nc.clip_by_global_norm([slices], 1.0, out=[slices]) for slices in made[3:]]
    )
    assert not MEMORY & set(found)
    assert not standin.waits()


@pytest.mark.parametrize("kind", [nc.SGD, nc.Adam])
def test_a_step_is_launches_alone(kind):
    params = {f"p{k}": np.ones(7, "f") for k in range(30)}
    groups = nc.ParamGroups([nc.Group("g", params, clip=nc.ByGlobalNorm(1.0))], device="cuda")
    optimizer = kind(groups, 0.1)
    for _ in range(2):
        optimizer.step()
    assert set(calls_of(optimizer.step)) == {"cuLaunchKernelEx"}
    assert not standin.waits()


def test_gradients_from_the_host_do_not_make_it_wait():
    params = {f"p{k}": np.ones(40_000, "f") for k in range(3)}
    groups = nc.ParamGroups([nc.Group("g", params)], device="cuda")
    for _ in range(2):
        groups.set_grads(params)
    found = calls_of(lambda: groups.set_grads(params))
    assert not MEMORY & set(found)
    assert not standin.waits()


def test_gradients_of_the_device_are_copied_by_one_launch():
    params = {f"p{k}": np.ones(7 + k, "f") for k in range(30)}
    groups = nc.ParamGroups([nc.Group("g", params)], device="cuda")
    sent = {name: send(param) for name, param in params.items()}
    for work in (groups.set_grads, groups.accumulate):
        work(sent)
        assert sum(calls_of(lambda own=work: own(sent)).values()) <= 4

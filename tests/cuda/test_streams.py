"""Work of several streams, done as late as can be: what is not ordered is read too early."""

from __future__ import annotations

import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import device, driver, memory
from tests.cuda import standin
from tests.cuda.devices import fetch, ready, send
from tests.cuda.foreign import Foreign, Producer, Tensor, settled, torch
from tests.cuda.gpu import HARDWARE, late, new_stream

__all__ = ["ready", "settled", "torch"]
pytestmark = pytest.mark.gpu
ROOT = Path(__file__).parents[2]
on_standin = pytest.mark.skipif(HARDWARE, reason="asks the stand-in for a GPU")


@pytest.fixture(autouse=True)
def as_late_as_can_be() -> Any:
    with late():
        yield


def written(sent: Any, value: float, stream: int) -> None:
    """What another library's kernel does on a stream of its own."""
    source = np.full(sent.shape, value, sent.dtype).reshape(-1).view(np.uint8)
    memory.write(sent.address, source, stream)


def on_stream(stream: int, value: float, dtype: str = "f") -> Foreign:
    """An array that its library has still to write, on the stream that it names."""
    sent = send(np.zeros(1000, dtype))
    driver.synchronize(None)
    made = Foreign(np.zeros(1000, dtype), sent, version=3, stream=stream)
    written(sent, value, stream)
    return made


class LikeJax(Producer):
    """JAX's arrays: one description tells no stream and does not wait, DLPack's does."""

    def __init__(self, array: np.ndarray, stream: int) -> None:
        super().__init__(np.zeros_like(array))
        driver.synchronize(None)
        self.stream = stream
        written(self.sent, float(array[0]), stream)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {**self.sent.__cuda_array_interface__, "version": 2}

    def __dlpack__(self, *, stream: Any, **newer: Any) -> Any:
        driver.order(stream, self.stream)
        return super().__dlpack__(stream=stream, **newer)


def test_arrays_like_those_of_jax_are_read_once_they_are_written():
    item = LikeJax(np.full(1000, 2.0, "f"), new_stream())
    assert nc.global_norm([item]) == pytest.approx(4000**0.5)
    assert len(item.asked) == 1


@pytest.mark.parametrize("streams", [1, 2, 3])
def test_every_stream_is_waited_for(streams):
    items = [on_stream(new_stream(), 2.0) for _ in range(streams)]
    assert nc.global_norm(items) == pytest.approx((4000 * streams) ** 0.5)


def test_every_stream_waits():
    """What their libraries write afterwards does not come before what is read here."""
    one, two = new_stream(), new_stream()
    items = [on_stream(one, 1.0), on_stream(two, 2.0)]
    norm = nc.global_norm(items)
    written(items[1].kept, 9.0, two)
    driver.synchronize(two)
    assert norm == pytest.approx(5000**0.5)


def test_results_are_waited_for_on_their_own_stream():
    one, two = new_stream(), new_stream()
    grad, out = on_stream(one, 2.0), on_stream(two, 0.0)
    nc.clip_by_global_norm([grad], 1.0, out=[out])
    found = memory.read(out.kept.address, 4000, two).view("f")
    assert np.linalg.norm(found) == pytest.approx(1.0)
    made = nc.clip_by_norm(grad, 1.0)  # a new array, which is of the default stream
    assert nc.global_norm([made]) == pytest.approx(1.0)


def test_gradient_and_parameter_of_two_libraries():
    one, two = new_stream(), new_stream()
    grad, param = on_stream(one, 3.0), on_stream(two, 1.0)
    nc.SGD(None, 1.0).apply_gradients([(grad, param)])
    found = memory.read(param.kept.address, 4000, two).view("f")
    assert (found == -2.0).all()
    bounded = nc.adaptive_clip(grad, on_stream(two, 1.0), 1.0)
    assert nc.global_norm([bounded]) == pytest.approx(1000**0.5)


@pytest.mark.parametrize("stream", [0, 1, None])
def test_groups_take_gradients_of_other_streams(stream):
    own = 0 if stream is None else new_stream() if stream else 0
    groups = nc.ParamGroups(
        [nc.Group("g", {"w": np.zeros(1000, "f")}, clip=nc.ByGlobalNorm(1e9))],
        device="cuda",
        stream=own,
    )
    optimizer, other = nc.SGD(groups, 1.0), new_stream()
    for step in range(3):
        grad = on_stream(other, 1.0 + step)
        groups.set_grads({"w": grad})
        written(grad.kept, 100.0, other)  # its library uses the memory again at once
        optimizer.step()
    assert (fetch(groups.params["w"]) == -6.0).all()


def test_bounds_that_change_while_work_is_queued(torch):
    torch.cuda.current_stream(None).cuda_stream = stream = new_stream()
    item = Tensor(np.zeros(1000, "f"))
    driver.synchronize(None)
    written(item.sent, 1.0, stream)
    norms = [nc.global_norm([item])]
    for bound in (20.0, 10.0, 5.0):
        nc.clip_by_global_norm([item], bound, out=[item])
        norms.append(nc.global_norm([item]))
    assert [float(norm) for norm in norms] == pytest.approx([1000**0.5, 20.0, 10.0, 5.0])


def test_tables_that_are_used_again_wait_for_their_last_use():
    """Those of groups are made on the default stream, and used on another."""
    stream = new_stream()
    for step in range(4):
        groups = nc.ParamGroups(
            [nc.Group("g", {"w": np.zeros(1000, "f")}, clip=nc.ByGlobalNorm(1.0))], device="cuda"
        )
        groups.stream = stream
        groups.set_grads({"w": np.full(1000, 1.0 + step, "f")})
        report = groups.clip()
        grads = groups.grads["w"]
        del groups
        norm = nc.global_norm([send(np.full(1000, 3.0, "f"))])
        assert norm == pytest.approx(9000**0.5)
        assert report.norm == pytest.approx((1 + step) * 1000**0.5)
        assert np.linalg.norm(fetch(grads)) == pytest.approx(1.0)


def test_two_threads():
    """A thread that has no context, and one stream for each."""
    found: dict[int, list[float]] = {}

    def work(number: int) -> None:
        item = on_stream(new_stream(), 1.0 + number)
        found[number] = [float(nc.global_norm([item])) for _ in range(20)]

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number in range(2):
        assert found[number] == pytest.approx([(1 + number) * 1000**0.5] * 20)


def test_threads_with_the_same_arrays_take_turns(monkeypatch):
    """One plan is theirs, with one law: what one decides, the other is not to write by."""
    grad, other = send(np.full(9, 2.0)), send(np.zeros(9))
    clip = lambda bound: nc.clip_by_global_norm([grad], bound, out=[other])  # noqa: E731
    clip(1.0)
    second = threading.Thread(target=clip, args=(4.0,))
    turns: list[int] = []
    launch = device.launch

    def noting(*arguments: Any) -> None:
        turns.append(threading.get_ident())
        launch(*arguments)
        if len(turns) == 1:
            second.start()
            second.join(0.3)  # which it does where nothing holds it up

    monkeypatch.setattr(device, "launch", noting)
    clip(2.0)
    second.join()
    assert turns == sorted(turns, key=turns.index)
    assert len(turns) == 6


@on_standin
def test_a_thread_works_on_the_gpu_that_was_current_at_first():
    code = """
        import threading, numpy as np
        from tests.cuda import gpu, standin
        from cuda.bindings import driver
        driver.cuInit(0)
        driver.cuCtxSetCurrent(driver.cuDevicePrimaryCtxRetain(1)[1])
        import numclip as nc
        from numclip.cuda.arrays import empty
        array = empty((9,), np.dtype("f"))
        array.copy_from(np.ones(9, "f"))
        found = []
        def work():
            found.append(float(nc.global_norm([array])))
            found.append(int(driver.cuCtxGetDevice()[1]))
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert found == [3.0, 1], found
    """
    lines = "\n".join(line[8:] for line in code.splitlines())
    environment = {**standin.environment(), "NUMCLIP_STANDIN_DEVICES": "2"}
    command = [sys.executable, "-c", lines]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def captured(stream: int, work: Any) -> Any:
    """A graph of what is done on a stream, not done yet."""
    from cuda.bindings import driver

    error, graph = driver.cuStreamBeginCapture(stream, 0)[0], None
    assert not error
    try:
        work()
    finally:
        error, graph = driver.cuStreamEndCapture(stream)
        assert not error
    error, made = driver.cuGraphInstantiate(graph, 0)
    assert not error
    return lambda: driver.cuGraphLaunch(made, stream)


def stepping(rate: Any) -> tuple[Any, Any, int]:
    groups = nc.ParamGroups(
        [nc.Group("g", {"w": np.zeros(1000, "f")}, clip=nc.ByGlobalNorm(10.0))], device="cuda"
    )
    optimizer = nc.SGD(groups, rate)
    groups.set_grads({"w": np.full(1000, 1.0, "f")})
    optimizer.step()
    driver.synchronize(None)
    groups.stream = stream = new_stream()
    return groups, optimizer, stream


def test_a_step_can_be_captured_and_replayed():
    (groups, one, stream), (plain, two, _) = stepping(0.5), stepping(0.5)
    dropped = [send(np.ones(9)) for _ in range(20)]

    def work() -> None:
        one.step()
        dropped.clear()  # memory is given back meanwhile

    replay = captured(stream, work)
    for _ in range(3):
        replay()
        two.step()
    driver.synchronize(None)
    np.testing.assert_array_equal(fetch(groups.params["w"]), fetch(plain.params["w"]))


@pytest.mark.parametrize("what", ["rate", "unscale"])
def test_what_changed_on_the_host_is_not_captured(what):
    """A graph would read the host's memory at each replay, whatever is there by then."""
    groups, optimizer, stream = stepping(0.5)
    if what == "rate":
        optimizer.lr = 0.25
    options = {"unscale": 2.0} if what == "unscale" else {}
    with pytest.raises(RuntimeError, match=r"stream: expected one that is not captured, as some"):
        captured(stream, lambda: optimizer.step(**options))
    driver.synchronize(None)
    assert np.isfinite(fetch(groups.params["w"])).all()

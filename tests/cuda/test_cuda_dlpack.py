"""Arrays on the GPU that DLPack alone describes."""

from __future__ import annotations

import gc
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import dlpack, driver
from numclip.cuda.arrays import DeviceArray
from tests.cuda.devices import fetch, ready
from tests.cuda.foreign import Foreign, Producer, settle, settled
from tests.cuda.gpu import HARDWARE, late, new_stream
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES

__all__ = ["ready", "settled"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@pytest.mark.parametrize("versioned", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_clipping(dtype, versioned):
    rng = np.random.default_rng(0)
    grads = [normal(rng, (5, 7), dtype), normal(rng, (), dtype), normal(rng, (0, 3), dtype)]
    items = [Producer(grad, versioned=versioned) for grad in grads]
    wanted, norm = nc.clip_by_global_norm(grads, 0.5)
    clipped, same = nc.clip_by_global_norm(items, 0.5)
    assert float(same) == pytest.approx(norm, rel=1e-14)
    if versioned:
        again, _ = nc.clip_by_global_norm(items, 0.5, out=items)
        assert all(result is item for result, item in zip(again, items, strict=True))
    for new, item, expected in zip(clipped, items, wanted, strict=True):
        assert type(new) is DeviceArray
        found = fetch(new)
        assert_same_bits(fetch(item.sent), found if versioned else item.array)
        assert found.dtype == expected.dtype
        np.testing.assert_allclose(
            found.astype("D"), expected.astype("D"), rtol=1e-15 if expected.itemsize > 4 else 0
        )


@pytest.mark.parametrize("versioned", [True, False])
def test_memory_is_given_back_once_and_streams_are_told(versioned):
    item = Producer(np.ones(4), versioned=versioned)
    assert nc.global_norm([item]) == 2.0
    settle()
    assert item.returned == [item.pointer]
    newer = {"max_version": (1, 0)} if versioned else {}
    assert item.asked == [{"stream": 1, **newer}]


def test_memory_is_given_back_after_what_streams_still_do():
    """The default one, and whichever one the array before says."""
    other = Foreign(np.ones(4), version=3, stream=new_stream())
    for others in ([], [other]):
        settle()
        with late():
            item = Producer(np.ones(4))
            norm = nc.global_norm([*others, item])
            gc.collect()
            driver.after_default(lambda: None)
            assert HARDWARE or not item.returned
            assert norm == (4.0 * (1 + len(others))) ** 0.5
            settle()
        assert item.returned == [item.pointer]


@pytest.mark.parametrize("told", [{"flags": 1}, {"flags": 2}, {"versioned": False}], ids=str)
def test_what_is_read_only_or_copied_is_not_written(told):
    """Capsules of the older protocol cannot tell: those of JAX, whose arrays do not change."""
    item = Producer(np.array([3.0, 4.0]), **told)
    assert nc.global_norm([item]) == 5.0
    with pytest.raises(ValueError, match=r"out: expected a writeable array, got a read-only one"):
        nc.clip_by_norm(item, 1.0, out=item)
    assert fetch(nc.clip_by_norm(item, 10.0)).tolist() == [3.0, 4.0]


@pytest.mark.parametrize(
    ("told", "error", "message"),
    [
        ({"gpu": 1}, ValueError, r"on GPU 0, got one on GPU 1; a process uses one GPU"),
        ({"code": 0}, TypeError, r"expected an array of .*, got int32; convert it"),
        ({"code": 10, "bits": 8}, TypeError, r"expected an array of .*, got Producer"),
        ({"lanes": 4}, TypeError, r"expected an array of .*, got Producer"),
        ({"major": 2}, TypeError, r"expected DLPack of version 1, got 2\.0"),
    ],
)
def test_what_is_not_taken(told, error, message):
    item = Producer(np.ones(4, "f"), **told)
    with pytest.raises(error, match=rf"grads\[0\]: .*{message}"):
        nc.global_norm([item])
    settle()
    assert item.returned == [item.pointer]


def test_no_capsule():
    item = Producer(np.ones(4))
    item.versioned = False
    given = item.__dlpack__(stream=1)
    odd = SimpleNamespace(__dlpack__=lambda **_: given, __dlpack_device__=lambda: (2, 0))
    assert nc.global_norm([odd]) == 2.0
    with pytest.raises(TypeError, match=r"grads\[0\]: expected a DLPack capsule, got <capsule"):
        nc.global_norm([odd])  # it was used


def test_offsets_and_missing_strides():
    grad = np.arange(4.0)
    for told in ({"offset": 64}, {"strides": False}):
        assert nc.global_norm([Producer(grad, **told)]) == 14**0.5
    ordered = np.asfortranarray(normal(np.random.default_rng(0), (3, 4)))
    found = fetch(nc.clip_by_norm(Producer(ordered), 0.5))
    assert_same_bits(found, nc.clip_by_norm(ordered, 0.5))


class Told:
    """NumPy's own capsules, which are of the host."""

    def __init__(self, array: Any, *, versioned: bool) -> None:
        self.array, self.versioned = array, versioned

    def __dlpack__(self, **options: Any) -> Any:
        if "max_version" in options and not self.versioned:
            raise TypeError
        return self.array.__dlpack__(**{k: o for k, o in options.items() if k != "stream"})


@pytest.mark.parametrize("versioned", [True, False])
def test_capsules_of_numpy_are_read(versioned):
    for array in (np.ones((3, 4), "f"), np.ones((2, 3, 4), "D")[:, ::2], np.float16([[1.0]]).T):
        count = sys.getrefcount(array)
        told = dlpack.read("x", Told(array, versioned=versioned))
        assert sys.getrefcount(array) == count + 1
        assert told[:4] == (array.dtype, array.shape, array.strides, array.ctypes.data)
        assert told.read_only is not versioned
        del told
        settle()
        assert sys.getrefcount(array) == count
    fixed = np.ones(3)
    fixed.flags.writeable = False
    assert dlpack.read("x", Told(fixed, versioned=True)).read_only


def test_groups_take_them():
    grad = normal(np.random.default_rng(0), (3, 4))
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros((3, 4), "f")})], device="cuda")
    groups.set_grads({"w": Producer(grad)})
    groups.accumulate({"w": Producer(grad)})
    assert_same_bits(fetch(groups.grads["w"]), 2 * grad)

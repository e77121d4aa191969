"""Tensors of PyTorch on the GPU that come again are not described again, where that is right."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import engine, memory, tensors
from tests.cuda.devices import fetch, ready, send
from tests.cuda.foreign import Tensor, torch
from tests.cuda.gpu import new_stream
from tests.oracle.checks import assert_same_bits

__all__ = ["ready", "torch"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),
    pytest.mark.usefixtures("torch"),
]


@pytest.fixture
def described(monkeypatch):
    """The names of the arrays that are described."""
    names: list[str] = []
    facts = engine.facts

    def noting(name: str, array: Any) -> Any:
        names.append(name)
        return facts(name, array)

    monkeypatch.setattr(engine, "facts", noting)
    return names


def grads() -> list[Any]:
    return [Tensor(np.array([3.0, 0.0])), None, Tensor(np.array([[4.0]], "f"))]


def test_tensors_at_the_same_places_are_not_described_again(described):
    items = grads()
    assert nc.global_norm(items) == 5.0
    assert len(described) == 2
    assert nc.global_norm(items) == nc.global_norm(items, 2.0) == 5.0
    assert len(described) == 2
    clipped, norm = nc.clip_by_global_norm(items, 2.5, out=items)
    again, later = nc.clip_by_global_norm(items, 1.0, out=items)
    assert len(described) == 4
    assert (norm, later) == (5.0, pytest.approx(2.5, rel=1e-6))
    for results in (clipped, again):
        assert all(result is item for result, item in zip(results, items, strict=True))
    for other in ([*items], (*items,)):
        nc.clip_by_global_norm(items, 1.0, out=other)
    assert len(described) == 4
    named = dict(zip("abc", items, strict=True))
    results, _ = nc.clip_by_global_norm(named, 0.5, out=named)
    assert len(described) == 4
    assert list(results) == ["a", "b", "c"]
    np.testing.assert_allclose(fetch(items[0].sent), [0.3, 0.0], rtol=1e-6)


@pytest.mark.parametrize(
    "change",
    [
        {"shape": (1, 2)},
        {"steps": (2,)},
        {"dtype": "torch.float32"},
        {"data_ptr": lambda: 0},
        {"is_neg": lambda: True},
        {"is_conj": lambda: True},
        {"get_device": lambda: 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_whatever_else_a_tensor_tells_it_is_described(described, change):
    items = grads()
    nc.global_norm(items)
    vars(items[0]).update(change)
    described.clear()
    try:
        nc.global_norm(items)
    except ValueError as error:
        assert str(error).startswith("grads[0]: expected ")  # noqa: PT017
    assert described[0] == "grads[0]"


def test_every_way_to_clip_has_its_own_plan(described, torch):
    items = grads()
    for _ in range(2):
        torch.cuda.current_stream(None).cuda_stream = new_stream()
        for options in ({"nonfinite": "skip"}, {"nonfinite": "zero"}, {"ord": 3}, {}):
            for count in (2, 0):
                described.clear()
                nc.clip_by_global_norm(items, math.inf, out=items, **options)
                assert len(described) == count


def test_what_was_measured_is_checked_before_it_is_written():
    item = Tensor(np.array([3.0, 4.0]))
    twice = [item, item]
    for _ in range(2):
        assert nc.global_norm(twice) == pytest.approx(50**0.5)
        with pytest.raises(ValueError, match=r"out\[1\]: shares memory with out\[0\]"):
            nc.clip_by_global_norm(twice, 1.0, out=twice)
    assert fetch(item.sent).tolist() == [3.0, 4.0]


def test_an_error_names_the_tensor():
    items = [Tensor(np.ones(2)), Tensor(np.array([1.0, math.nan]))]
    for _ in range(2):
        with pytest.raises(nc.NonFiniteGradientError, match=r"grads\[1\] is not finite"):
            nc.clip_by_global_norm(items, 1.0, nonfinite="raise", out=items)


def test_other_arrays_have_no_facts(torch):
    class Sparse(Tensor):
        def data_ptr(self) -> int:
            raise RuntimeError("Cannot access data pointer of Tensor that doesn't have storage")

    assert tensors.facts([None]) == ()
    assert len(tensors.facts(grads()) or ()) == 8
    torch.Tensor = torch.nn.Parameter = Sparse
    assert tensors.facts([Sparse(np.ones(3))]) is None
    assert tensors.facts([Tensor(np.ones(3))]) is None
    assert tensors.facts([send(np.ones(3))]) is None


def test_new_results_are_new_every_time():
    items = grads()
    wanted = [fetch(item.sent) for item in (items[0], items[2])]
    for _ in range(2):
        clipped, _ = nc.clip_by_global_norm(items, 1.0)
        assert clipped[0] is not items[0]
        for item, before in zip((items[0], items[2]), wanted, strict=True):
            assert_same_bits(fetch(item.sent), before)


def test_other_libraries_take_a_norm_by_its_address(monkeypatch):
    _, norm = nc.clip_by_global_norm(grads(), 1.0)
    read = memory.read_table
    monkeypatch.setattr(memory, "read_table", lambda *_: pytest.fail("waited"))
    taken = norm.__cuda_array_interface__
    assert (taken["shape"], taken["typestr"]) == ((), "<f8")
    assert nc.clip_by_global_norm([norm], 2.5)[0][0].shape == ()  # as an array on the GPU
    monkeypatch.setattr(memory, "read_table", read)
    (clipped,), same = nc.clip_by_global_norm([norm], 2.5)
    assert (norm, same) == (5.0, 5.0)
    assert float(fetch(clipped)) == pytest.approx(2.5)

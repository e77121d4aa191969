"""apply_gradients on the GPU: arrays of a user's own, against the same on the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.clipping import array_updating as updating
from numclip.cuda import device, engine, memory
from tests.cuda.devices import fetch, ready, send
from tests.cuda.foreign import Foreign, Producer, Tensor, settle, torch
from tests.oracle import plain_optim
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES

__all__ = ["ready", "torch"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SHAPES: list[tuple[int, ...]] = [(5, 3), (), (0, 2), (141,)]
ROUNDOFF = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-14, "complex128": 1e-14}


def some(dtype: str, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [normal(rng, shape, dtype) for shape in SHAPES]


def assert_close(there: list[Any], here: list[np.ndarray]) -> None:
    """Multiplication and addition are one operation on the GPU: the last bits can differ."""
    for variable, wanted in zip(there, here, strict=True):
        found = fetch(variable)
        assert found.dtype == wanted.dtype
        roundoff = ROUNDOFF.get(found.dtype.name, 1e-6)
        pair = (array.astype(np.complex128) for array in (found, wanted))
        np.testing.assert_allclose(*pair, rtol=4 * roundoff, atol=roundoff)


@pytest.mark.parametrize("dtype", DTYPES)
@plain_optim.kinds
def test_as_on_the_cpu(kind, dtype):
    """Arrays that come later, or not at all, have counts of their own."""
    here = some(dtype, 0)
    there = [send(param) for param in here]
    one, two = (plain_optim.made(kind, None)[0] for _ in range(2))
    for step, members in enumerate([[0, 1, 2], [0, 1, 2, 3], [3, 0], [0, 1, 2, 3]]):
        grads = some(dtype, step + 1)
        one.apply_gradients([(grads[k], here[k]) for k in members])
        two.apply_gradients([(send(grads[k]), there[k]) for k in members])
        assert_close(there, here)
    assert not np.array_equal(fetch(there[3]), some(dtype, 0)[3])


@pytest.mark.parametrize("make", [nc.SGD, nc.Adam])
def test_dtypes_side_by_side_and_a_launch_for_each(monkeypatch, make):
    launches: list[Any] = []
    launch = device.launch
    monkeypatch.setattr(device, "launch", lambda *a: launches.append(a[0]) or launch(*a))
    here = [normal(np.random.default_rng(k), (9,), name) for k, name in enumerate(DTYPES)]
    here += [array.copy() for array in here]
    there = [send(param) for param in here]
    one, two = make(None, lambda step: 0.1 / (1 + step)), make(None, lambda step: 0.1 / (1 + step))
    for step in range(2):
        grads = [normal(np.random.default_rng(step), (9,), param.dtype) for param in here]
        one.apply_gradients([*zip(grads, here, strict=True), (None, there[0])])
        launches.clear()
        two.apply_gradients([(None, here[0]), *zip(map(send, grads), there, strict=True)])
        # Complex numbers are pairs of real ones, but rows of their own in the table of dtypes.
        assert len(launches) == len(DTYPES)
    assert_close(there, here)


def test_nothing_is_made_for_the_same_arrays_again(monkeypatch):
    grads, variables = [send(np.ones(3)) for _ in range(2)], [send(np.ones(3)) for _ in range(2)]
    made: list[int] = []
    tables = engine.updates_of_arrays
    monkeypatch.setattr(engine, "updates_of_arrays", lambda *a: made.append(1) or tables(*a))
    optimizer = nc.Adam(None, 0.1)
    for expected in (1, 1):
        optimizer.apply_gradients(zip(grads, variables, strict=True))
        assert len(made) == expected
    monkeypatch.setattr(memory, "Memory", None)
    monkeypatch.setattr(memory, "table", None)
    optimizer.apply_gradients(zip(grads, variables, strict=True))


def test_tensors_of_pytorch_are_not_described_again(monkeypatch, torch):  # noqa: ARG001
    here, grad = np.ones((3, 2), "f"), normal(np.random.default_rng(0), (3, 2))
    sent, variable = Tensor(grad), Tensor(here)
    one, two = nc.Adam(None, 0.1), nc.Adam(None, 0.1)
    one.apply_gradients([(grad, here)])
    two.apply_gradients([(sent, variable)])
    one.apply_gradients([(grad, here)])
    monkeypatch.setattr(updating, "describe", None)
    two.apply_gradients([(sent, variable)])
    monkeypatch.undo()
    assert_close([variable.sent], [here])


def test_sets_of_arrays_that_are_not_used_are_forgotten(monkeypatch):
    monkeypatch.setattr(updating, "KEPT", 2)
    optimizer, variable = nc.SGD(None, 1.0), send(np.ones(3))
    for grad in [send(np.ones(3)) for _ in range(4)]:
        optimizer.apply_gradients([(grad, variable)])
    assert len(optimizer._arrays._planned) == 2
    assert_same_bits(fetch(variable), np.full(3, -3.0))


def test_an_array_that_changed_gets_new_states():
    optimizer, variable = nc.SGD(None, 1.0, momentum=0.5), send(np.zeros(8))
    for _ in range(2):
        optimizer.apply_gradients([(send(np.ones(8)), variable)])
    assert fetch(variable)[0] == -2.5
    variable.shape = (4,)
    optimizer.apply_gradients([(send(np.ones(4)), variable)])
    assert fetch(variable)[0] == -3.5
    variable.shape = (8,)
    optimizer.apply_gradients([(send(np.ones(8)), variable)])
    assert fetch(variable)[0] == -4.5


def test_arrays_of_dlpack_are_held_until_they_are_used(monkeypatch):
    grad, variable = Producer(np.ones(3)), Producer(np.ones(3))
    returned: list[int] = []
    launch = device.launch

    def noting(*arguments: Any) -> None:
        settle()
        returned.append(len(grad.returned))
        launch(*arguments)

    monkeypatch.setattr(device, "launch", noting)
    nc.SGD(None, 1.0).apply_gradients([(grad, variable)])
    settle()
    assert returned == [0]
    assert len(grad.returned) == len(variable.returned) == 1
    assert_same_bits(fetch(variable.sent), np.zeros(3))


@pytest.mark.parametrize("dtype", DTYPES)
@plain_optim.kinds
def test_slices_update_the_rows_that_they_have(kind, dtype):
    rng = np.random.default_rng(0)
    here = [normal(rng, (6, 150), dtype), normal(rng, (9,), dtype), normal(rng, (4,), dtype)]
    there = [send(param) for param in here]
    one, two = (plain_optim.made(kind, None)[0] for _ in range(2))
    for indices in ([3, 0, 3], [], [5]):
        values, grad = normal(rng, (len(indices), 150), dtype), normal(rng, (9,), dtype)
        few = normal(rng, (2,), dtype)
        one.apply_gradients(
            [
                (nc.IndexedSlices(values, indices, (6, 150)), here[0]),
                (grad, here[1]),
                (nc.IndexedSlices(few, [1, 1], (4,)), here[2]),
            ]
        )
        two.apply_gradients(
            [
                (nc.IndexedSlices(send(values), indices, (6, 150)), there[0]),
                (send(grad), there[1]),
                (nc.IndexedSlices(send(few), [1, 1], (4,)), there[2]),
            ]
        )
        assert_close(there, here)


def test_pairs_that_are_not_taken():
    optimizer, ones, there = nc.SGD(None, 1.0), np.ones((2, 2)), send(np.ones((2, 2)))
    fixed = Foreign(np.ones((2, 2)), data=(there.address, True))
    ordered = send(np.asfortranarray(normal(np.random.default_rng(0), (2, 2), "float64")))
    slices = nc.IndexedSlices(np.ones((1, 2)), [0], (2, 2))
    sent = nc.IndexedSlices(send(np.ones((1, 2))), [0], (2, 2))
    first = (send(np.ones(3)), send(np.ones(3)))
    overlapping = Foreign(np.ones(2), data=(first[1].address + 8, False))
    for pair, error, message in [
        ((ones, there), TypeError, r"on the GPU, as the first array is, got ndarray elsewhere"),
        ((there, ones), TypeError, r"on the GPU, as the first array is, got ndarray elsewhere"),
        ((send(np.ones(4)), there), ValueError, r"a gradient of shape \(2, 2\) and dtype float64"),
        ((send(np.ones((2, 2), "f")), there), ValueError, r"float64, got \(2, 2\) and float32"),
        ((there, fixed), ValueError, r"a writeable array, got a read-only one"),
        (
            (ordered, there),
            ValueError,
            r"expected C order for device='cuda', .*pass contiguous ones",
        ),
        (
            (there, ordered),
            ValueError,
            r"expected C order for device='cuda', .*pass contiguous ones",
        ),
        ((send(np.ones(2)), overlapping), ValueError, r"shares memory with grads_and_vars\[0\]"),
        ((slices, there), TypeError, r"got IndexedSlices elsewhere"),
        ((there, sent), TypeError, r"an array to update, got IndexedSlices"),
        ((sent, first[0]), ValueError, r"of shape \(3,\) and dtype float64, got \(2, 2\)"),
    ]:
        with pytest.raises(error, match=rf"grads_and_vars\[1\]: .*{message}"):
            optimizer.apply_gradients([first, pair])
        assert_same_bits(fetch(first[1]), np.ones(3))
    with pytest.raises(TypeError, match=r"grads_and_vars\[1\]: .*in the host's memory, .*got Dev"):
        optimizer.apply_gradients([(ones, ones), (there, there)])
    with pytest.raises(ValueError, match=r"lr\(step=0\): expected a finite number"):
        nc.SGD(None, lambda _: math.nan).apply_gradients([first])
    assert_same_bits(ones, np.ones((2, 2)))

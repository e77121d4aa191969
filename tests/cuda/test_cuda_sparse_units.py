"""Units and examples of IndexedSlices on the GPU, against those of the host."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import memory
from tests.cuda.compared import assert_as_on_the_cpu
from tests.cuda.devices import fetch, ready, send
from tests.oracle import reference
from tests.oracle.cases import normal, slices, strided
from tests.oracle.checks import assert_same_bits

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DTYPES = ("bfloat16", "float64", "complex64")
AXES: list[Any] = [(), 0, 1, (1, 2), (0, 2)]
SHAPE = (9, 2, 3)


def example(name: str = "float32", *, repeated: bool, seed: int = 5) -> nc.IndexedSlices:
    return slices(np.random.default_rng(seed), 8, SHAPE, name, repeated=repeated)


def assert_same(found: Any, wanted: nc.IndexedSlices) -> None:
    np.testing.assert_array_equal(found.indices, wanted.indices)
    assert found.dense_shape == wanted.dense_shape
    assert_as_on_the_cpu(fetch(found.values), wanted.values)


def both(run: Callable[..., Any], grad: nc.IndexedSlices, param: Any = None) -> None:
    """Compare new slices, those in other slices, and those in place."""
    there = functools.partial(run, param if param is None else send(param))
    here = functools.partial(run, param)
    assert_same(there(send(grad)), here(grad))
    for inplace in (False, True):
        mine = grad.with_values(grad.values.copy() if inplace else np.ones_like(grad.values))
        sent = send(mine)
        assert there(sent if inplace else send(grad), out=sent) is sent
        here(mine if inplace else grad, out=mine)
        assert_same(sent, mine)


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("axes", AXES)
@pytest.mark.parametrize("name", DTYPES)
def test_axes(name, axes, repeated):
    grad = example(name, repeated=repeated)
    for bound in (1.3, 1e6):
        both(lambda _, g, out=None, b=bound: nc.clip_by_norm(g, b, axes, out=out), grad)


@pytest.mark.parametrize("ord", [1, 3, math.inf])
def test_orders(ord):
    grad = example(repeated=True)
    found = fetch(nc.clip_by_norm(send(grad), 0.9, 0, ord=ord))
    np.testing.assert_allclose(
        found.values, nc.clip_by_norm(grad, 0.9, 0, ord=ord).values, rtol=3e-7
    )


@pytest.mark.parametrize("repeated", [True, False])
@pytest.mark.parametrize("axes", [None, 2, (0, 2)])
@pytest.mark.parametrize(("name", "other"), [("float32", "float64"), ("complex64", "complex64")])
def test_adaptive(name, other, axes, repeated):
    grad, param = example(name, repeated=repeated), normal(np.random.default_rng(1), SHAPE, other)
    param[3] = 0
    for made in (param, strided(param)) if axes == 2 else (param,):
        both(lambda p, g, out=None: nc.adaptive_clip(g, p, 0.3, axes=axes, out=out), grad, made)


def test_a_parameter_that_is_not_finite_spoils_its_rows_alone():
    grad, param = example(repeated=True), np.ones(SHAPE, np.float32)
    param[grad.indices[0]] = math.nan
    param[grad.indices[1], 0, 0] = math.inf
    both(lambda p, g, out=None: nc.adaptive_clip(g, p, axes=(1, 2), out=out), grad, param)


@pytest.mark.parametrize("shape", [(4,), (4, 0), (4, 3)])
@pytest.mark.parametrize("rows", [0, 3])
def test_few_rows_and_no_elements(shape, rows):
    grad = nc.IndexedSlices(np.ones((rows, *shape[1:]), "f"), [1] * rows, shape)
    for axes in {0, len(shape) - 1}:
        both(lambda _, g, out=None, a=axes: nc.clip_by_norm(g, 0.5, a, out=out), grad)
        both(
            lambda p, g, out=None, a=axes: nc.adaptive_clip(g, p, 0.5, axes=a, out=out),
            grad,
            np.ones(shape),
        )


def test_only_rows_that_repeat_are_waited_for(monkeypatch):
    grads = [send(example(repeated=repeated)) for repeated in (False, True)]
    param, reads, read = send(np.ones(SHAPE, "f")), [], memory.read_table
    monkeypatch.setattr(memory, "read_table", lambda *a: reads.append(a) or read(*a))
    for grad, count in zip(grads, (0, 2), strict=True):
        nc.clip_by_norm(grad, 0.1, 0)
        nc.adaptive_clip(grad, param, axes=1)
        assert len(reads) == count


def test_parameters_that_do_not_fit():
    grad = send(example(repeated=False))
    for param, got in [(send(np.ones((9, 2))), r"got \(9, 2\)"), (grad, "got IndexedSlices")]:
        with pytest.raises(ValueError, match=rf"param: .*shape \(9, 2, 3\), {got}"):
            nc.adaptive_clip(grad, param)


@pytest.mark.parametrize("layerwise", [None, "uniform"])
@pytest.mark.parametrize("name", ["float32", "complex64"])
def test_examples(name, layerwise):
    grads = [example(name, repeated=True), normal(np.random.default_rng(2), (9, 4), name)]
    grads.append(slices(np.random.default_rng(3), 4, (9, 2), name, repeated=False))
    wanted, counts = nc.clip_per_example(grads, 1.5, layerwise=layerwise)
    sent = [send(grad) for grad in grads]
    found, same = nc.clip_per_example(sent, 1.5, layerwise=layerwise)
    assert same == counts
    assert reference.norm(wanted) > 0
    for new, old in zip(found, wanted, strict=True):
        assert_same_bits(fetch(new), old)
    assert_same_bits(fetch(sent[0]), grads[0])

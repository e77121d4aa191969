"""Units on the GPU: the same as on the CPU, and what groups will ask of their plan."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip import tables
from numclip.border.gradients import describe
from numclip.clipping import parts
from numclip.cuda import device, memory, plans
from numclip.cuda.units import UnitPlan
from numclip.law import Family
from numclip.memory import Strided
from tests.cuda.compared import assert_as_on_the_cpu
from tests.cuda.devices import fetch, ready, send
from tests.oracle import reference
from tests.oracle.cases import fortran, normal, strided
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
SHAPE = (3, 2, 7)
RNG = np.random.default_rng(8)


@pytest.mark.parametrize("axes", [(), 0, (1,), 2, (0, 2), (1, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_axes(dtype, axes):
    grad = normal(RNG, SHAPE, dtype)
    for made in (grad, fortran(grad), strided(grad)) if axes == (0, 2) else (grad,):
        wanted = nc.clip_by_norm(made, 1.7, axes)
        assert_as_on_the_cpu(fetch(nc.clip_by_norm(send(made), 1.7, axes)), wanted)


@pytest.mark.parametrize("ord", [1, 2.5, math.inf])
@pytest.mark.parametrize("dtype", ["float16", "float64", "complex64", "complex128"])
def test_orders(dtype, ord):
    grad = normal(RNG, SHAPE, dtype)
    for scale in (1.0, 1e-300, 1e300) if dtype in ("float64", "complex128") else (1.0,):
        scaled, bound = (grad * scale).astype(grad.dtype), 1.5 * scale
        wanted = nc.clip_by_norm(scaled, bound, (0, 2), ord=ord)
        found = fetch(nc.clip_by_norm(send(scaled), bound, (0, 2), ord=ord))
        pair = (reference.wide(a) for a in (found, wanted))
        rounding = 2.0 ** -reference.PRECISION[dtype] + 1e-12
        np.testing.assert_allclose(*pair, rtol=2 * rounding)


def test_magnitudes_beyond_the_range():
    """Norms that exceed float64, of parts that do not, by any order."""
    grad = np.full((3, 2), 1.5e308 + 1.5e308j)
    for ord in (1, 2, 3, math.inf):
        wanted = 2.0**9 * nc.clip_by_norm(grad / 2.0**9, 1e308 / 2.0**9, 1, ord=ord)
        found = fetch(nc.clip_by_norm(send(grad), 1e308, 1, ord=ord))
        np.testing.assert_allclose(found, wanted, rtol=1e-14)


@pytest.mark.parametrize("scale", [1e-320, 1e-200, 1.0, 1e200, 1e307])
@pytest.mark.parametrize("eps", [0.0, 1e-3])
def test_adaptive_magnitudes(scale, eps):
    grad, param = normal(RNG, (9, 4), "float64"), normal(RNG, (9, 4), "float64")
    param[:, 1] = 0.0
    param[:, 2] *= scale
    grad[:, 3] *= scale
    for factor in (0.0, 0.5, math.inf):
        wanted = nc.adaptive_clip(grad, param, factor, eps)
        found = fetch(nc.adaptive_clip(send(grad), send(strided(param)), factor, eps))
        np.testing.assert_allclose(found, wanted, rtol=1e-14, atol=5e-324)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_only_a_unit_that_is_not_finite_is_spoilt(value):
    grad = np.ones((4, 3), np.float32)
    grad[1, 2] = value
    for axes in (0, 1):
        found = fetch(nc.clip_by_norm(send(grad), 1.0, axes))
        np.testing.assert_array_equal(found, nc.clip_by_norm(grad, 1.0, axes))
        assert np.isnan(found).sum() == grad.shape[axes]


def test_results_in_other_steps():
    grad = normal(RNG, (6, 7), "float32")
    for make, axes in itertools.product((fortran, strided, np.ascontiguousarray), (0, 1)):
        out = send(make(np.zeros_like(grad)))
        assert nc.clip_by_norm(send(grad), 0.9, axes, out=out) is out
        assert_same_bits(fetch(out), nc.clip_by_norm(grad, 0.9, axes))


@pytest.fixture
def launches(monkeypatch):
    """The kernels that were started, in order."""
    started: list[Any] = []
    launch = device.launch

    def noted(kernel: Any, count: int, *arguments: Any) -> None:
        if count:
            started.append(kernel)
        launch(kernel, count, *arguments)

    monkeypatch.setattr(device, "launch", noted)
    return started


def test_many_units_take_as_many_launches_as_one(launches):
    for count in (1, 200):
        launches.clear()
        grad, param = send(np.ones((2, count), "f")), send(np.ones((2, count), "f"))
        nc.clip_by_norm(grad, 0.5, 0, out=grad)
        nc.adaptive_clip(grad, param, out=grad)
        assert len(launches) == 3 + 4


def test_steps_allocate_nothing(monkeypatch):
    grad = send(normal(RNG, (4, 5), "float32"))
    nc.clip_by_norm(grad, 2.0, 0, out=grad)
    for name in ("table", "Memory", "update"):
        monkeypatch.setattr(memory, name, None)
    nc.clip_by_norm(grad, 2.0, 0, out=grad)


def test_plans_that_hold_much_memory_are_not_kept(monkeypatch):
    monkeypatch.setattr(plans, "_plans", OrderedDict())
    monkeypatch.setattr(plans, "MOST_BYTES", 1500)
    grads = [send(np.ones((2, 15), "f")) for _ in range(3)]  # of 896 + 360 bytes
    for grad in grads:
        nc.clip_by_norm(grad, 0.5, 0, out=grad)
        assert len(plans._plans) == 1
    nc.clip_by_norm(grads[0], 0.5, 1, out=grads[0])
    nc.clip_by_norm(grads[1], 0.5, 1, out=grads[1])
    assert len(plans._plans) == 2


def plan_for(grads: list[Any], params: list[Any], *, ord: float = 2.0, **options: Any) -> UnitPlan:
    def described(array: Any) -> Strided:
        entry = describe("grad", 0, array)
        return parts._strided(entry, entry, (0,))

    pairs = itertools.zip_longest(grads, params)
    families = [
        Family((described(grad),), None if param is None else described(param), **options)
        for grad, param in pairs
    ]
    return UnitPlan(families, ord, 0)


def run(plan: UnitPlan, bound: Any, base: Any = None, **options: Any) -> np.ndarray:
    plan.write_laws(bound, 0, **options)
    plan.measure(0)
    plan.decide(0, base)
    plan.scale(0)
    summary = plan.summary(0)
    plan.summarize(summary, 0)
    return memory.read_table(summary, 0)


def test_families_have_laws_of_their_own_and_tell_what_became_of_them():
    grads = [normal(RNG, (5, 9), "float32"), normal(RNG, (7, 2), "float64")]
    sent = [send(grad) for grad in grads]
    told = run(plan_for(sent, []), np.array([0.8, 1.1]), unscale=4.0)
    for grad, there, bound, row in zip(grads, sent, (0.8, 1.1), told, strict=True):
        wanted = nc.clip_by_norm(grad / 4, bound, 0)
        np.testing.assert_allclose(fetch(there), wanted, rtol=1e-6)
        norms, after = (np.linalg.norm(a, axis=0) for a in (grad / 4, wanted))
        assert row[tables.AFTER] == pytest.approx(np.linalg.norm(after), rel=1e-6)
        assert row[tables.LEAST] == pytest.approx((after / norms).min(), rel=1e-6)
        assert row[tables.CLIPPED_COUNT] == (norms > bound).sum()


def test_many_blocks_tell_what_became_of_many_units():
    """More than one takes; and a family of none, between two others."""
    grads = [normal(RNG, shape, "float64") for shape in [(2, 70), (3, 0), (5, 41)]]
    sent = [send(grad) for grad in grads]
    plan = plan_for(sent, [])
    for bound in (0.5, 1.5):
        told = run(plan, bound)
        for grad, row in zip(grads, told, strict=True):
            norms = np.linalg.norm(grad, axis=0)
            after = np.minimum(norms, bound)
            assert row[tables.AFTER] == pytest.approx(np.linalg.norm(after), rel=1e-12)
            assert row[tables.LEAST] == pytest.approx((after / norms).min(initial=1), rel=1e-12)
            assert row[tables.CLIPPED_COUNT] == (norms > bound).sum()
        for grad, there in zip(grads, sent, strict=True):
            there.copy_from(grad)


def test_what_a_base_skips_is_left():
    grads = [normal(RNG, (4, 3), "float32") for _ in range(2)]
    grads[1][0, 0] = math.inf
    sent = [send(grad) for grad in grads]
    skips = np.zeros((1, tables.DECISION_COLUMNS))
    skips[0, tables.SKIPPED] = 1.0
    told = run(plan_for(sent, []), 0.1, memory.table(skips, 0), unscale=2.0)
    for grad, there in zip(grads, sent, strict=True):
        assert_same_bits(fetch(there), grad)
    np.testing.assert_array_equal(told[:, tables.LEAST], 1.0)
    assert told[1, tables.AFTER] == math.inf


@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("dtype", ["float64", "complex64"])
def test_what_is_not_finite_counts_as_0_where_it_will_be(dtype, ord):
    grad = normal(RNG, (6, 3), dtype)
    grad[1, 1] = math.nan
    sent = send(grad)
    run(plan_for([sent], [], zeroing=True, ord=ord), 0.3)
    clean = np.where(np.isfinite(grad), grad, 0)
    wanted = nc.clip_by_norm(clean, 0.3, 0, ord=ord)
    found = np.where(np.isfinite(grad), fetch(sent), 0)
    np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_a_structure_is_clipped_one_by_one():
    grads, params = [normal(RNG, SHAPE, "float32")] * 2, [normal(RNG, (3, 2, 7), "float32")] * 2
    sent, owners = list(map(send, grads)), dict(enumerate(map(send, params)))
    for clip in (
        lambda grad: nc.clip_by_norm(grad, 1.7),
        lambda grad: nc.clip_by_norm(grad, 1.7, axes=(0, 2)),
        lambda grad: nc.clip_by_value(grad, -0.5, 0.5),
    ):
        for result in clip(sent):
            assert_same_bits(fetch(result), fetch(clip(sent[0])))
    result = nc.adaptive_clip(dict(enumerate(sent)), owners, 0.1)
    assert_same_bits(fetch(result[1]), fetch(nc.adaptive_clip(sent[1], owners[1], 0.1)))

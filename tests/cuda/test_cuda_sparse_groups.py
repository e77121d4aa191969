"""Sparse groups on the GPU, or on its stand-in, against those of the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import device
from tests.cuda.compared import FOLLOWING, forbid, numbers, pair
from tests.cuda.devices import HARDWARE, fetch, ready, send
from tests.oracle import plain_optim
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import NORM_RULES, frozen

__all__ = ["ready"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # plain Python's on overflow
]
SHAPES = {"e": (9, 3), "v": (7,), "wide": (5, 2, 4)}
KINDS = [("decay", "float16"), ("nesterov", "float32"), ("adamw", "float64"), ("adam", "complex64")]
if HARDWARE:
    KINDS = [(kind, dtype) for kind in plain_optim.KINDS for _, dtype in KINDS]


def group_of(dtype: str = "float64", name: str = "rows", **settings: Any) -> nc.Group:
    rng = np.random.default_rng(0)
    params = {f"{key}": normal(rng, shape, dtype) for key, shape in SHAPES.items()}
    return nc.Group(name, params, sparse=True, **settings)


def grads_of(groups: nc.ParamGroups, seed: int = 1) -> dict[str, Any]:
    """Gradients of another number of rows in each step."""
    rng = np.random.default_rng(seed)
    return {
        name: slices(rng, 4 + 3 * seed, param.shape, param.dtype.name, repeated=True)
        if group.sparse
        else normal(rng, param.shape, param.dtype)
        for group in groups
        for name, param in group.params.items()
    }


def values_of(grad: Any) -> np.ndarray:
    found = fetch(grad) if not isinstance(grad, np.ndarray) else grad
    return found.values if isinstance(found, nc.IndexedSlices) else found


def assert_same(cpu: nc.ParamGroups, gpu: Any, roundoff: float) -> None:
    for name, grad in cpu.grads.items():
        wanted = grad.values if isinstance(grad, nc.IndexedSlices) else grad
        np.testing.assert_allclose(values_of(gpu.grads[name]), wanted, rtol=roundoff, atol=1e-300)
        if isinstance(grad, nc.IndexedSlices):
            np.testing.assert_array_equal(gpu.grads[name].indices, grad.indices)


@pytest.mark.parametrize("rule", NORM_RULES, ids=repr)
def test_rules(rule):
    cpu, gpu = pair(group_of(clip=rule))
    for step, unscale in enumerate((1.0, 3.0, 1.0)):
        grads = grads_of(cpu, seed=step)
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        assert numbers(gpu.clip(unscale=unscale)) == numbers(cpu.clip(unscale=unscale))
        assert_same(cpu, gpu, 2e-15 if isinstance(rule, FOLLOWING) else 1e-15)
    assert len(gpu.history) == 3


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "complex64"])
def test_dtypes(dtype):
    cpu, gpu = pair(group_of(dtype, clip=nc.ByGlobalNorm(0.5)))
    cpu.set_grads(grads_of(cpu))
    gpu.set_grads(grads_of(cpu))
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    for name, grad in cpu.grads.items():
        assert_same_bits(fetch(gpu.grads[name]), grad)


def test_sparse_and_dense_groups_share_a_norm():
    shared = nc.ByGlobalNorm(0.5, shared="model")
    members = [
        nc.Group("dense", {"w": np.ones((2, 3), "f")}, clip=shared, nonfinite="skip"),
        nc.Group("between", {"b": np.ones(4)}, clip=nc.ByNorm(0.5)),
        group_of(clip=shared, nonfinite="skip"),
    ]
    cpu, gpu = pair(*members)
    for bad in (False, True):
        grads = grads_of(cpu)
        if bad:
            grads["v"].values[2] = np.inf
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = cpu.clip(), gpu.clip()
        assert numbers(found) == numbers(wanted)
        assert found.groups["dense"].skipped == bad
        assert_same(cpu, gpu, 3e-7)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_policies(policy, value):
    cpu, gpu = pair(
        group_of("float32", name="bad", clip=nc.ByNorm(0.4), nonfinite=policy),
        nc.Group("good", {"x": np.ones(9)}, clip=nc.ByGlobalNorm(0.5)),
    )
    grads = grads_of(cpu)
    grads["e"].values[2, 1] = value
    cpu.set_grads(grads)
    gpu.set_grads(grads)
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    for name, grad in cpu.grads.items():
        wanted = grad.values if isinstance(grad, nc.IndexedSlices) else grad
        np.testing.assert_allclose(values_of(gpu.grads[name]), wanted, rtol=1e-15)


def test_raise_names_the_element_and_modifies_nothing():
    groups = nc.ParamGroups([group_of(nonfinite="raise", clip=nc.ByNorm(0.1))], device="cuda")
    grads = grads_of(groups)
    grads["v"].values[4] = math.nan
    groups.set_grads(grads)
    with pytest.raises(nc.NonFiniteGradientError, match=r"rows\.v is not finite: nan at flat inde"):
        groups.clip()
    for name, grad in grads.items():
        assert_same_bits(fetch(groups.grads[name]), grad)


def test_gradients_come_from_host_and_device():
    cpu, gpu = pair(group_of("float32"))
    grads = grads_of(cpu)
    wider = nc.IndexedSlices(grads["wide"].values.astype("d"), grads["wide"].indices, (5, 2, 4))
    for groups, move in ((cpu, lambda grad: grad), (gpu, send)):
        groups.set_grads({"e": move(grads["e"]), "v": grads["v"], "wide": wider})
        groups.accumulate({"e": grads["e"], "v": move(grads["v"]), "wide": None})
        groups.grads["wide"] = move(grads["wide"])
        groups.accumulate({"wide": groups.grads["wide"]})
    for name, grad in cpu.grads.items():
        assert_same_bits(fetch(gpu.grads[name]), grad)
        np.testing.assert_array_equal(gpu.grads[name].indices, grad.indices)
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    gpu.set_grads({"e": None})
    assert gpu.grads["e"] is None
    gpu.zero_grads()
    assert gpu.grads["v"] is gpu.grads["wide"] is None
    assert gpu.clip().norm == 0.0


@pytest.mark.parametrize(
    ("grad", "error", "message"),
    [
        (np.ones((9, 3), "f"), TypeError, "expected IndexedSlices, as its group is spar"),
        (nc.IndexedSlices(np.ones((1, 3), "f"), [0], (8, 3)), ValueError, r"expected shape \(9, 3"),
        (nc.IndexedSlices(np.ones((1, 3), "F"), [0], (9, 3)), TypeError, "expected dtype float32"),
        (nc.IndexedSlices(np.ones((1, 3)), [0], (9, 3)), TypeError, "dtype float32 in C order, go"),
    ],
)
def test_gradients_that_do_not_fit(grad, error, message):
    groups = nc.ParamGroups([group_of("float32")], device="cuda")
    given = send(grad) if grad.dtype == np.float64 else grad
    with pytest.raises(error, match=rf"grads\['e'\]: .*{message}"):
        groups.set_grads({"v": grads_of(groups)["v"], "e": given})
    assert groups.grads["v"] is None


@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_optimizers(kind, dtype):
    rule = nc.ByGlobalNorm(0.7, shared="all")
    cpu, gpu = pair(
        group_of(dtype, clip=rule, nonfinite="skip"),
        nc.Group("dense", {"x": np.ones(3, "f")}, clip=rule, nonfinite="skip"),
    )
    one, two = (plain_optim.made(kind, groups)[0] for groups in (cpu, gpu))
    before = {name: param.copy() for name, param in cpu.params.items()}
    touched = set()
    for step in range(3):
        grads = grads_of(cpu, seed=step)
        if step == 1:
            grads["e"].values[0, 0] = math.nan
        else:
            touched |= set(grads["e"].indices.tolist())
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        assert numbers(two.step()) == numbers(one.step())
        for name, grad in grads.items():
            assert_same_bits(fetch(gpu.grads[name]), grad)
    roundoff = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-14}.get(dtype, 1e-6)
    for name, param in cpu.params.items():
        found = fetch(gpu.params[name]).astype(np.complex128)
        slack = 1e-6 if name == "x" else roundoff
        np.testing.assert_allclose(found, param, rtol=4 * slack, atol=slack)
    rest = sorted(set(range(9)) - touched)
    assert_same_bits(fetch(gpu.params["e"])[rest], before["e"][rest])
    gpu.zero_grads()
    kept = frozen(gpu.state_dict()["params"]["e"])
    two.step()
    assert frozen(gpu.state_dict()["params"]["e"]) == kept
    assert two.state_dict()["groups"]["rows"]["steps"] == 3


def test_repeated_rows_are_scaled_before_they_are_summed():
    values = np.array([[4e4, 1.0], [4e4, 2.0]], np.float16)
    param = np.ones((3, 2), np.float16)
    group = nc.Group("g", {"e": param}, clip=nc.ByNorm(1.0), sparse=True)
    groups = nc.ParamGroups([group], device="cuda")
    groups.grads["e"] = nc.IndexedSlices(values, [1, 1], (3, 2))
    nc.SGD(groups, lr=0.5).step()
    np.testing.assert_allclose(fetch(groups.params["e"]), [[1, 1], [0.5, 1], [1, 1]], rtol=1e-3)


def test_factors_that_are_no_plain_numbers():
    cpu, gpu = pair(
        group_of("float32", name="tiny", clip=nc.ByNorm(1e-40), nonfinite="zero"),
    )
    one, two = nc.SGD(cpu, 0.1), nc.SGD(gpu, 0.1)
    grads = grads_of(cpu)
    grads["e"].values[1, 1] = math.inf
    cpu.set_grads(grads)
    gpu.set_grads(grads)
    assert numbers(two.step(unscale=4.0)) == numbers(one.step(unscale=4.0))
    for name, param in cpu.params.items():
        np.testing.assert_allclose(fetch(gpu.params[name]), param, rtol=1e-6)


def test_the_host_does_not_wait(monkeypatch):
    groups = nc.ParamGroups([group_of(clip=nc.ByGlobalNorm(0.5))], device="cuda")
    optimizer = nc.Adam(groups, 0.1)
    forbid(monkeypatch)
    for step in range(2):
        groups.set_grads(grads_of(groups, seed=step))
        groups.accumulate({"e": send(grads_of(groups, seed=3)["e"])})
        optimizer.step()
        groups.clip()


def test_launches_are_as_many_whatever_the_rows(monkeypatch):
    groups = nc.ParamGroups([group_of(clip=nc.ByGlobalNorm(0.5))], device="cuda")
    optimizer = nc.Adam(groups, 0.1)
    groups.set_grads(grads_of(groups, seed=2))
    optimizer.step()
    groups.set_grads(grads_of(groups, seed=1))
    optimizer.step()
    launches: list[Any] = []
    monkeypatch.setattr(device, "launch", lambda kernel, *_: launches.append(kernel))
    optimizer.step()
    assert len(launches) == 6

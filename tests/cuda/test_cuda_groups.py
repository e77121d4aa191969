"""Parameter groups and optimizers on the GPU, or on its stand-in, against those of the CPU."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.clipping import steps as kept_steps
from numclip.cuda import device
from numclip.cuda.values import DeviceFloat
from tests.cuda.compared import FOLLOWING, MOVING, WAITING, forbid, numbers, pair
from tests.cuda.devices import OnDevice, fetch, hardware, ready, send
from tests.oracle import plain_optim
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import frozen
from tests.oracle.reference import DTYPES, REAL_DTYPES

__all__ = ["OnDevice", "hardware", "ready"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # plain Python's on overflow
]
SHAPES = {"w": (5, 3), "b": (3,), "scalar": (), "none": (0, 2), "long": (141,)}
RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(1e9),
    nc.ByGlobalNorm(0.0),
    nc.ByNorm(0.4),
    nc.ByAverageNorm(0.05),
    nc.ByBlockRMS(0.2),
    nc.ByGlobalNorm(0.7, ord=3),
    nc.ByNorm(0.3, ord=math.inf),
    nc.ByNorm(1.5, ord=1),
    nc.ByNorm(0.3, axes=(), ord=3),
    nc.Adaptive(0.3),
    nc.ByValue(-0.1, 0.2),
    nc.AutoClip(percentile=50, window=9),
    nc.ZClip(alpha=0.9, warmup=2, z=0.5),
    nc.AdaGC(relative=0.9, absolute=0.5, warmup=2),
]


def params_of(dtype: str = "float64", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: normal(rng, shape, dtype) for name, shape in SHAPES.items()}


def grads_of(groups: nc.ParamGroups, seed: int = 1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: normal(rng, p.shape, p.dtype) for name, p in groups.params.items()}


def assert_close(found: Any, wanted: Any, ulps: int = 4) -> None:
    """Equal but for units in the last place: of the norm, of the factor, of the product."""
    here = fetch(found) if not isinstance(found, np.ndarray) else found
    assert here.dtype == wanted.dtype
    here, wanted = (np.atleast_1d(a.astype(np.longdouble)) for a in (here, wanted))
    digits = {2: 8, 4: 24, 8: 53}[np.dtype(found.dtype).itemsize]
    np.testing.assert_allclose(here, wanted, rtol=ulps * 2.0 ** (1 - digits), atol=1e-300)


def assert_same(cpu: nc.ParamGroups, gpu: Any, ulps: int = 4) -> None:
    for name, grad in cpu.grads.items():
        assert_close(gpu.grads[name], grad, ulps)
    for name, param in cpu.params.items():
        assert_close(gpu.params[name], param, ulps)


@pytest.mark.parametrize("unscale", [1.0, 3.0])
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_rules(rule, unscale):
    cpu, gpu = pair(nc.Group("g", params_of(), clip=rule))
    follows = isinstance(rule, FOLLOWING)
    steps = 3 if follows else 1
    for step in range(steps):
        grads = grads_of(cpu, seed=step)
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = cpu.clip(unscale=unscale), gpu.clip(unscale=unscale)
        assert numbers(found) == numbers(wanted)
        assert_same(cpu, gpu, ulps=8 if follows else 4)  # bounds made of norms add to it
    assert gpu.history.summary().keys() == cpu.history.summary().keys()
    assert len(gpu.history) == steps


@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes(dtype):
    cpu, gpu = pair(nc.Group("g", params_of(dtype), clip=nc.ByGlobalNorm(0.5)))
    cpu.set_grads(grads_of(cpu))
    gpu.set_grads(grads_of(cpu))
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    for name, grad in cpu.grads.items():
        assert_same_bits(fetch(gpu.grads[name]), grad)


@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(0.5), nc.ByNorm(0.5, ord=3)], ids=repr)
def test_complex_elements_are_measured_and_cleaned_as_a_whole(rule):
    cpu, gpu = pair(nc.Group("g", params_of("complex64"), clip=rule, nonfinite="zero"))
    grads = grads_of(cpu)
    grads["w"][2, 1] = complex(1.0, math.nan)
    cpu.set_grads(grads)
    gpu.set_grads(grads)
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    for name, grad in cpu.grads.items():
        assert_same_bits(fetch(gpu.grads[name]), grad)


@pytest.mark.parametrize("kind", ["nesterov", "adamw"])
def test_units_along_axes(kind):
    """Adaptive reads the parameters, which every step changes."""
    shapes = {"w": (5, 3), "filter": (2, 3, 4), "half": (33, 2)}
    rng = np.random.default_rng(4)
    params = {name: normal(rng, shape) for name, shape in shapes.items()}
    params["half"] = params["half"].astype("f2")
    cpu, gpu = pair(
        nc.Group("adaptive", params, clip=nc.Adaptive(0.1, eps=0.5)),
        nc.Group("rows", {"a": params["w"]}, clip=nc.Adaptive(0.02, axes=1), nonfinite="skip"),
        nc.Group("columns", {"b": params["filter"]}, clip=nc.ByNorm(0.5, axes=(0, 1))),
        nc.Group("ends", {"c": params["filter"]}, clip=nc.ByNorm(0.5, axes=(0, -1), ord=math.inf)),
    )
    one, two = (plain_optim.made(kind, groups)[0] for groups in (cpu, gpu))
    for step in range(3):
        grads = grads_of(cpu, seed=step)
        if step == 1:
            grads["a"][1, 1] = np.inf
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = one.step(unscale=4.0), two.step(unscale=4.0)
        assert numbers(found) == numbers(wanted)
        assert found.groups["rows"].skipped == (step == 1)
        for name, grad in cpu.grads.items():
            assert_close(gpu.grads[name], grad)
        for name, param in cpu.params.items():
            assert_close(gpu.params[name], param, ulps=64)


def test_dtypes_mixed_in_a_group():
    params = {name: normal(np.random.default_rng(3), (11,), name) for name in REAL_DTYPES}
    cpu, gpu = pair(nc.Group("g", params, clip=nc.ByGlobalNorm(0.5)))
    cpu.set_grads(grads_of(cpu))
    gpu.set_grads(grads_of(cpu))
    assert numbers(gpu.clip()) == numbers(cpu.clip())
    for name, grad in cpu.grads.items():
        assert_same_bits(fetch(gpu.grads[name]), grad)


def test_groups_share_a_norm():
    shared = nc.ByGlobalNorm(0.5, shared="model")
    cpu, gpu = pair(
        nc.Group("one", {"a": np.ones(4)}, clip=shared, nonfinite="skip"),
        nc.Group("between", {"b": np.ones(4)}, clip=nc.ByNorm(0.5)),
        nc.Group("two", {"c": np.ones((2, 3), "f")}, clip=shared, nonfinite="skip"),
    )
    one, two = nc.SGD(cpu, 0.1), nc.SGD(gpu, 0.1)
    for bad in (False, True):
        grads = grads_of(cpu)
        if bad:
            grads["c"][1, 1] = np.inf
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = cpu.clip(), gpu.clip()
        assert numbers(found) == numbers(wanted)
        assert found.groups["one"].skipped == bad
        assert numbers(two.step()) == numbers(one.step())
        assert_same(cpu, gpu)


@pytest.mark.parametrize(
    "rule",
    [
        None,
        nc.ByGlobalNorm(0.5),
        nc.ByNorm(0.4),
        nc.ByGlobalNorm(0.5, ord=3),
        nc.ByValue(-1, 1),
        nc.Adaptive(0.1),
    ],
    ids=repr,
)
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
def test_policies(policy, value, rule):
    cpu, gpu = pair(
        nc.Group("bad", params_of("float32"), clip=rule, nonfinite=policy),
        nc.Group("good", {"x": np.ones(9)}, clip=nc.ByGlobalNorm(0.5)),
    )
    grads = grads_of(cpu)
    grads["w"][2, 1] = value
    cpu.set_grads(grads)
    gpu.set_grads(grads)
    assert numbers(gpu.clip(unscale=3.0)) == numbers(cpu.clip(unscale=3.0))
    for name, grad in cpu.grads.items():
        np.testing.assert_array_equal(fetch(gpu.grads[name]), grad)


def test_raise_names_the_element_and_modifies_nothing():
    groups = nc.ParamGroups(
        [
            nc.Group("first", {"x": np.ones(9)}, clip=nc.ByGlobalNorm(0.5)),
            nc.Group("bad", params_of("float32"), nonfinite="raise"),
        ],
        device="cuda",
    )
    grads = grads_of(groups)
    grads["w"][2, 1] = math.nan
    groups.set_grads(grads)
    with pytest.raises(nc.NonFiniteGradientError, match=r"bad\.w is not finite: nan at flat index"):
        groups.clip()
    for name, grad in grads.items():
        assert_same_bits(fetch(groups.grads[name]), grad)
    assert groups.step == 0


@pytest.mark.parametrize(
    "rule",
    [nc.ByNorm(0.1), nc.ByNorm(0.1, ord=3), nc.Adaptive(0.1), nc.ByValue(-0.1, 0.2)],
    ids=repr,
)
def test_measuring_leaves_the_gradients(rule):
    cpu, gpu = pair(nc.Group("g", params_of("float32"), clip=rule, nonfinite="zero"))
    grads = grads_of(cpu)
    grads["w"][2, 1] = math.nan
    for _ in range(2):
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = cpu.clip(unscale=2.0, apply=False), gpu.clip(unscale=2.0, apply=False)
        assert numbers(found) == numbers(wanted)
        assert found.clipped
        for name, grad in grads.items():
            assert_same_bits(fetch(gpu.grads[name]), grad)
    assert gpu.step == len(gpu.history) == 0
    assert numbers(gpu.clip()) == numbers(cpu.clip())


def test_orders_and_kinds_of_rules_side_by_side():
    """Each is measured by its own; groups that share a norm need not be neighbours."""
    shared = nc.ByGlobalNorm(0.5, ord=3, shared="model")
    cpu, gpu = pair(
        nc.Group("one", {"a": np.ones(4)}, clip=shared, nonfinite="skip"),
        nc.Group("held", {"h": np.ones(4, "f")}, clip=nc.ByValue(-0.1, 0.2), nonfinite="zero"),
        nc.Group("largest", {"b": np.ones(4)}, clip=nc.ByNorm(0.5, ord=math.inf)),
        nc.Group("two", {"c": np.ones((2, 3), "f")}, clip=shared, nonfinite="skip"),
        nc.Group("plain", {"p": np.ones((2, 3), "e")}, clip=nc.ByGlobalNorm(0.5)),
    )
    one, two = nc.SGD(cpu, 0.1), nc.SGD(gpu, 0.1)
    for bad in (None, "c", "b", "h"):
        grads = grads_of(cpu)
        if bad is not None:
            grads[bad].flat[1] = np.inf
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        wanted, found = (one.step(), two.step()) if bad == "c" else (cpu.clip(), gpu.clip())
        assert numbers(found) == numbers(wanted)
        assert found.groups["one"].skipped == (bad == "c")
        assert_same(cpu, gpu)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "complex64"])
@plain_optim.kinds
def test_optimizers(kind, dtype):
    cpu, gpu = pair(
        nc.Group("g", params_of(dtype), clip=nc.ByGlobalNorm(0.7), nonfinite="skip"),
        nc.Group("own", {"x": np.ones(3, "f")}, clip=nc.ByNorm(0.5, ord=3), lr=0.5),
    )
    one, two = (plain_optim.made(kind, groups)[0] for groups in (cpu, gpu))
    for step in range(3):
        grads = grads_of(cpu, seed=step)
        if step == 1:
            grads["b"][0] = math.nan
        cpu.set_grads(grads)
        gpu.set_grads(grads)
        assert numbers(two.step()) == numbers(one.step())
    # Multiplication and addition are one operation on the GPU: the last bits can differ.
    for name, param in cpu.params.items():
        found, wanted = (np.asarray(a, np.complex128) for a in (fetch(gpu.params[name]), param))
        roundoff = {"float16": 1e-3, "bfloat16": 8e-3, "float64": 1e-14}.get(dtype, 1e-6)
        roundoff = 1e-6 if name == "x" else roundoff
        np.testing.assert_allclose(found, wanted, rtol=4 * roundoff, atol=roundoff)
    assert not np.array_equal(fetch(gpu.params["long"]), params_of(dtype)["long"])


def test_optimizers_by_value_and_with_factors_that_are_no_plain_numbers():
    cpu, gpu = pair(
        nc.Group("held", params_of("float32"), clip=nc.ByValue(-0.1, 0.2)),
        nc.Group("tiny", {"x": np.ones(9, "f")}, clip=nc.ByNorm(1e-40)),
        nc.Group("zero", {"z": np.ones(9)}, clip=nc.ByNorm(0.5), nonfinite="zero"),
    )
    one, two = nc.SGD(cpu, 0.1), nc.SGD(gpu, 0.1)
    grads = grads_of(cpu)
    grads["z"][4] = math.inf
    cpu.set_grads(grads)
    gpu.set_grads(grads)
    assert numbers(two.step(unscale=4.0)) == numbers(one.step(unscale=4.0))
    for name, param in cpu.params.items():
        assert_close(gpu.params[name], param, ulps=4)

    without = nc.ParamGroups(
        [nc.Group("tiny", {"x": np.ones(9, "f")}, clip=nc.ByNorm(1e-40))], device="cuda"
    )
    without.set_grads({"x": grads["x"]})
    nc.SGD(without, 1.0).step()
    assert 0.0 < np.linalg.norm(fetch(without.grads["x"]).astype(np.float64)) <= 1e-40


def test_state_goes_from_one_device_to_the_other(tmp_path):
    cpu, gpu = pair(nc.Group("g", params_of(), clip=nc.ByGlobalNorm(0.7)))
    one, two = nc.Adam(cpu, 0.1), nc.Adam(gpu, 0.1)
    for step in range(2):
        gpu.set_grads(grads_of(gpu, seed=step))
        two.step()
    gpu.save(tmp_path / "groups.npz")
    two.save(tmp_path / "adam.npz")
    cpu.load(tmp_path / "groups.npz")
    one.load(tmp_path / "adam.npz")
    assert frozen(cpu.state_dict()) == frozen(gpu.state_dict())
    assert frozen(one.state_dict()) == frozen(two.state_dict())
    fresh = nc.ParamGroups(
        [nc.Group("g", params_of(seed=9), clip=nc.ByGlobalNorm(0.7))], device="cuda"
    )
    other = nc.Adam(fresh, 0.1)
    fresh.load_state_dict(cpu.state_dict())
    other.load_state_dict(one.state_dict())
    for groups, optimizer in ((gpu, two), (fresh, other)):
        groups.set_grads(grads_of(groups, seed=7))
        optimizer.step()
    assert frozen(gpu.state_dict()["params"]) == frozen(fresh.state_dict()["params"])


def test_gradients_come_from_host_and_device():
    groups = nc.ParamGroups([nc.Group("g", params_of("float32"))], device="cuda")
    grads = grads_of(groups)
    groups.set_grads({"w": send(grads["w"]), "b": grads["b"].astype(np.float64), "long": None})
    groups.accumulate({"w": send(grads["w"]), "long": grads["long"], "b": None})
    groups.grads["scalar"] = grads["scalar"]
    assert_same_bits(fetch(groups.grads["w"]), grads["w"] * np.float32(2))
    for name in ("b", "long", "scalar"):
        assert_same_bits(fetch(groups.grads[name]), grads[name])
    groups.zero_grads()
    assert not any(fetch(grad).any() for grad in groups.grads.values())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_gradients_of_16_bits_are_widened_for_masters(dtype):
    rng = np.random.default_rng(0)
    params = {name: normal(rng, shape, dtype) for name, shape in [("v", (1003,)), ("w", (5, 3))]}
    table = {"e": normal(rng, (9, 3), dtype)}
    members = [
        nc.Group("g", params, master="float32"),
        nc.Group("rows", table, sparse=True, master="float32"),
    ]
    groups = nc.ParamGroups(members, device="cuda")
    grads = {name: normal(rng, param.shape, dtype) for name, param in params.items()}
    rows = nc.IndexedSlices(normal(rng, (4, 3), dtype), [8, 1, 1, 5], (9, 3))
    sent = {name: send(grad) for name, grad in grads.items()} | {"e": send(rows)}
    groups.set_grads(sent)
    groups.accumulate(sent)
    for name, grad in grads.items():
        assert_same_bits(fetch(groups.grads[name]), grad.astype("f") + grad.astype("f"))
    wide = np.concatenate([rows.values, rows.values]).astype("f")
    assert_same_bits(fetch(groups.grads["e"].values), wide)
    for value in (grads["w"], grads["w"].astype("f") / 3):
        groups.params["w"] = send(value)
        assert_same_bits(fetch(groups["g"].masters["w"]), value.astype("f"))
        assert_same_bits(fetch(groups.params["w"]), value.astype(dtype))
    with pytest.raises(TypeError, match=rf"expected dtype {dtype} or float32 in C order, got f"):
        groups.set_grads({"v": send(np.ones(1003))})
    plain = nc.ParamGroups([nc.Group("g", {"v": np.ones(3, "f")})], device="cuda")
    with pytest.raises(TypeError, match="expected dtype float32 in C order, got float16"):
        plain.set_grads({"v": send(np.ones(3, "e"))})


def test_parameters_come_from_host_and_device():
    params = params_of("float32")
    params["turned"] = np.arange(6.0).reshape(2, 3).T
    sent = {name: send(array) for name, array in params.items()}
    groups = nc.ParamGroups([nc.Group("g", sent, clip=nc.ByNorm(1.0))], device="cuda")
    for name, array in params.items():
        assert_same_bits(fetch(groups.params[name]), array)
    with pytest.raises(TypeError, match=r"params\['turned'\]: .* got DeviceArray on the GPU"):
        nc.ParamGroups([nc.Group("g", {"turned": sent["turned"]})])
    with pytest.raises(TypeError, match=r"params\['odd'\]: expected an array of .* got int64"):
        nc.Group("g", {"odd": send(np.arange(3))})


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_add_up_wherever_they_lie(monkeypatch, dtype):
    """No table is sent for it, nothing is allocated."""
    item = np.dtype(dtype).itemsize
    for size, here, there in [(1, 0, 0), (7, item, item), (200, 3 * item, 3 * item), (99, item, 0)]:
        own, grad = (normal(np.random.default_rng(k), (size,), dtype) for k in (0, 1))
        total, sent = send(own, here), send(grad, there)
        with monkeypatch.context() as patched:
            forbid(patched, MOVING)
            total.add(sent, 0)
        assert_same_bits(fetch(total), own + grad)


def test_views_are_of_one_buffer():
    params = params_of("float32")
    groups = nc.ParamGroups([nc.Group("g", params)], device="cuda")
    flat = np.concatenate([array.reshape(-1) for array in params.values()])
    assert_same_bits(fetch(groups["g"].flat_params["float32"]), flat)
    assert groups["g"].flat_params["float32"].address % 64 == 0
    groups.params["w"][...] = 7.0 * np.ones((5, 3), "f")
    assert (fetch(groups["g"].flat_params["float32"])[:15] == 7.0).all()
    np.testing.assert_array_equal(np.asarray(groups.params["w"]), 7.0)


def test_reports_and_norms_are_read_when_asked_for(monkeypatch):
    groups = nc.ParamGroups([nc.Group("g", params_of(), clip=nc.ByNorm(0.1))], device="cuda")
    optimizer = nc.Adam(groups, 0.1)
    grad = send(np.ones(9))
    forbid(monkeypatch)
    reports = [groups.clip(), optimizer.step()]
    clipped, norm = nc.clip_by_global_norm([grad], 1.0)
    monkeypatch.undo()
    assert isinstance(norm, DeviceFloat)
    assert isinstance(reports[0], nc.ClipReport)
    assert norm == 3.0
    assert fetch(clipped[0]) @ fetch(clipped[0]) <= 1.0
    assert [report.step for report in reports] == [0, 0]  # one applies what the other wrote
    assert repr(reports[1]).startswith("step 0:")


@pytest.mark.parametrize("make", [nc.SGD, nc.Adam])
def test_after_the_first_step_nothing_is_allocated_moved_or_waited_for(monkeypatch, make):
    """So a step can be captured in a graph."""
    members = [
        nc.Group("one", params_of(), clip=nc.ByGlobalNorm(0.5), nonfinite="skip"),
        nc.Group("two", {"x": np.ones(9, "f")}, clip=nc.ByNorm(0.5), nonfinite="zero"),
        nc.Group("three", {"y": np.ones(9, "e")}, clip=nc.ByValue(-0.1, 0.1), master="float32"),
        nc.Group("four", {"z": np.ones(9, "e")}, clip=nc.ByNorm(0.5, ord=3)),
        nc.Group("five", {"v": np.ones((4, 2), "f")}, clip=nc.Adaptive(0.1), nonfinite="zero"),
    ]
    groups = nc.ParamGroups(members, device="cuda")
    optimizer = make(groups, 0.1)
    groups.set_grads(grads_of(groups))
    groups.clip(unscale=4.0)
    optimizer.step(unscale=4.0)
    forbid(monkeypatch, WAITING + MOVING)
    groups.clip(unscale=4.0)
    optimizer.step(unscale=4.0)
    monkeypatch.undo()
    assert len(groups.history) == 2


@pytest.mark.parametrize("rule", [None, nc.ByGlobalNorm(3.0), nc.ByValue(-1, 1)], ids=repr)
def test_no_step_is_lost(monkeypatch, rule):
    """Memory for what steps have found is used again; reports and the history have it all."""
    monkeypatch.setattr(kept_steps, "KEPT", 3)
    cpu, gpu = pair(nc.Group("g", {"x": np.ones(3)}, clip=rule))
    reports = []
    for step in range(11):
        for groups in (cpu, gpu):
            groups.set_grads({"x": np.full(3, float(step))})
            if step % 4 == 1:
                groups.clip(apply=False)
            reports.append(groups.clip())
    assert [numbers(r) for r in reports[::2]] == [numbers(r) for r in reports[1::2]]
    assert len(gpu.history) == len(cpu.history) == 11
    assert repr(gpu.history.to_dict()) == repr(cpu.history.to_dict())  # with NaNs


def test_a_full_block_of_steps_is_handed_over_without_waiting(monkeypatch):
    monkeypatch.setattr(kept_steps, "KEPT", 2)
    groups = nc.ParamGroups([nc.Group("g", {"x": np.ones(3)})], device="cuda")
    groups.clip()
    with monkeypatch.context() as patched:
        forbid(patched, (*WAITING, "table", "Memory", "update", "write", "clear"))
        groups.clip()
        groups.clip()
    assert len(groups.history) == 3


@pytest.mark.parametrize(
    ("rule", "count"),
    [
        (nc.ByGlobalNorm(1.0), 5),
        (nc.ByNorm(1.0, ord=3), 9),
        (nc.Adaptive(), 10),
        (nc.ByValue(-1, 1), 8),
    ],
    ids=repr,
)
def test_a_fixed_number_of_launches(monkeypatch, rule, count):
    for tensors in (2, 40):
        params = {f"p{k}": np.ones(3, "f") for k in range(tensors)}
        groups = nc.ParamGroups([nc.Group("g", params, clip=rule)], device="cuda")
        optimizer = nc.Adam(groups)
        launches = []
        monkeypatch.setattr(device, "launch", lambda kernel, *_, own=launches: own.append(kernel))
        optimizer.step()
        monkeypatch.undo()
        assert len(launches) == count

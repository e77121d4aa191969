"""Gradients are clipped once, and applied once: what is known to be old is not applied again."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import numclip as nc
from numclip.clipping import steps
from numclip.clipping.updating import GroupUpdater
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import frozen
from tests.oracle.plain_optim import KINDS, made
from tests.oracle.reference import DTYPES

RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(0.7, ord=3),
    nc.ByNorm(0.4),
    nc.AutoClip(percentile=50, window=9),
    nc.AdaGC(relative=0.9, absolute=0.5, warmup=2),
    nc.ByValue(-0.1, 0.2),
    nc.Adaptive(0.3),
]
SHAPES = {"w": (4, 3), "b": (3,)}


def groups_by(rule, device="cpu", policy="propagate", dtype="float64"):
    rng = np.random.default_rng(0)
    params = {name: normal(rng, shape, dtype) for name, shape in SHAPES.items()}
    dense = nc.Group("g", params, clip=rule, nonfinite=policy)
    sparse = nc.Group("s", {"e": np.ones((6, 3))}, clip=nc.ByNorm(0.4), sparse=True)
    return nc.ParamGroups([dense, sparse], device=device)


def grads_of(seed, factor=1.0):
    rng = np.random.default_rng(seed)
    found = {name: normal(rng, shape, "float64") * factor for name, shape in SHAPES.items()}
    rows = slices(rng, 4, (6, 3), "float64", repeated=True)
    found["e"] = nc.IndexedSlices(rows.values * factor, rows.indices, rows.dense_shape)
    return found


def left_of(groups, optimizer):
    return frozen(groups.state_dict()), frozen(optimizer.state_dict())


# ---- a step after a clip


@pytest.mark.parametrize("scale", [1.0, 1024.0])
@pytest.mark.parametrize("repeated", [False, True])
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.each_value
@pytest.mark.many_calls
@pytest.mark.full
def test_clip_then_step_is_a_step(target, kind, rule, repeated, scale):
    """Up to the rounding of what is clipped: rules see and count each step once."""
    both, alone = (groups_by(rule, target.device) for _ in range(2))
    asked = []

    def rate(step):
        asked.append(step)
        return 0.1

    optimizers = [made(kind, both, rate)[0], made(kind, alone, 0.1)[0]]
    for step in range(4):
        for groups in (both, alone):
            groups.set_grads(grads_of(step, scale))
        report = both.clip(unscale=scale)
        again = optimizers[0].step(**({"unscale": scale} if repeated else {}))
        wanted = optimizers[1].step(unscale=scale)
        assert repr(again.to_dict()) == repr(report.to_dict()) == repr(wanted.to_dict())
        for name, param in alone.params.items():
            np.testing.assert_allclose(np.asarray(both.params[name]), param, rtol=1e-9, atol=1e-12)
    assert both.step == len(both.history) == 4
    assert set(asked) == {0, 1, 2, 3}
    assert repr(both.history.to_dict()) == repr(alone.history.to_dict())
    assert frozen(both.state_dict()["rules"]) == frozen(alone.state_dict()["rules"])
    assert [own["steps"] for own in optimizers[0].state_dict()["groups"].values()] == [4, 4]


def test_a_clipped_gradient_is_applied_as_it_is():
    """What is added to it afterwards is not clipped; other loss scales are refused."""
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, clip=nc.ByGlobalNorm(1.0))])
    optimizer = nc.SGD(groups, lr=1.0)
    groups.set_grads({"w": np.array([6.0, 8.0])})
    groups.clip(unscale=2.0)
    groups.grads["w"][0] += 100.0
    with pytest.raises(ValueError, match=r"unscale: expected 2.0, .*clip\(\).*, got 3.0"):
        optimizer.step(unscale=3.0)
    assert not groups.params["w"].any()
    optimizer.step(unscale=2.0)
    np.testing.assert_allclose(groups.params["w"], [-100.6, -0.8])
    groups.set_grads({"w": np.array([0.6, 0.8])})
    assert optimizer.step().step == 1


@pytest.mark.parametrize("change", ["set", "accumulate", "zero", "given", "load", "rule"])
@pytest.mark.full
def test_a_gradient_that_is_set_after_a_clip_is_clipped(change):
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, clip=nc.ByGlobalNorm(1.0))])
    optimizer, grads = nc.SGD(groups, lr=1.0), {"w": np.array([6.0, 8.0])}
    state = groups.state_dict()
    groups.set_grads(grads)
    groups.clip()
    if change == "set":
        groups.set_grads(grads)
    elif change == "accumulate":
        groups.accumulate(grads)
    elif change == "load":
        groups.load_state_dict(state)
    elif change == "zero":
        groups.zero_grads()
    elif change == "rule":
        groups["g"].clip = nc.ByGlobalNorm(0.5)
    report = optimizer.step(grads if change == "given" else None)
    wanted = {"accumulate": 11.0, "zero": 0.0, "load": 0.0, "rule": 1.0}.get(change, 10.0)
    assert report.norm == pytest.approx(wanted)
    assert groups.step == (1 if change == "load" else 2)


@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.full
def test_what_a_clip_skips_a_step_skips(target, policy):
    both, alone = (groups_by(nc.ByGlobalNorm(0.5), target.device, policy) for _ in range(2))
    optimizers = [nc.Adam(groups, lr=0.1) for groups in (both, alone)]
    for step in range(3):
        grads = grads_of(step)
        if step == 1:
            grads["b"][1] = math.inf
        for groups in (both, alone):
            groups.set_grads(grads)
        both.clip()
        optimizers[0].step()
        optimizers[1].step()
    for name, param in alone.params.items():
        np.testing.assert_allclose(np.asarray(both.params[name]), param, rtol=1e-9)
    steps = [
        [own["steps"] for own in optimizer.state_dict()["groups"].values()]
        for optimizer in optimizers
    ]
    assert steps[0] == steps[1] == [2 if policy == "skip" else 3, 3]


# ---- what a step has applied


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rule", [None, nc.ByGlobalNorm(0.5), nc.AutoClip(50)], ids=repr)
@pytest.mark.each_value
@pytest.mark.many_calls
def test_old_gradients_are_not_applied_again(target, kind, rule):
    """After one is set, others count as absent, as where gradients are given; for clip() too."""
    set_in, given_to, clipped = (groups_by(rule, target.device) for _ in range(3))
    optimizers = [made(kind, groups, 0.1)[0] for groups in (set_in, given_to, clipped)]
    rounds = ("wbe", "w", "be", "e", "b", "wbe")
    for step, names in enumerate(rounds):
        grads = {name: grad for name, grad in grads_of(step).items() if name in names}
        for name, grad in grads.items():
            set_in.set_grads({name: grad})
            clipped.set_grads({name: grad})
        clipped.clip()
        optimizers[2].step()
        reports = optimizers[0].step(), optimizers[1].step(grads)
        assert repr(reports[0].to_dict()) == repr(reports[1].to_dict())
        assert left_of(set_in, optimizers[0]) == left_of(given_to, optimizers[1])
        for name, param in set_in.params.items():
            own = np.asarray(clipped.params[name])
            np.testing.assert_allclose(own, param, rtol=1e-9, atol=1e-12)
    assert repr(clipped.history.to_dict()) == repr(set_in.history.to_dict())
    steps = [own["steps"] for own in optimizers[2].state_dict()["groups"].values()]
    assert steps == [5, 4]


def test_what_may_have_been_written_is_applied():
    """Also where it was not set: nobody knows what is written to a view."""
    start = {"a": np.zeros(2), "b": np.zeros(2)}
    for view in ("grads", "flat", "group"):
        groups = nc.ParamGroups([nc.Group("g", start)])
        optimizer = nc.SGD(groups, lr=1.0)
        if view == "grads":
            a = groups.grads["a"]
        elif view == "flat":
            a = groups["g"].flat_grads["float64"][:2]
        else:
            a = groups["g"].grads["a"]
        for step in range(1, 4):
            a[...] = step
            groups.grads["b"] = np.ones(2)
            optimizer.step()
        assert groups.params["a"].tolist() == [-6, -6]
        assert groups.params["b"].tolist() == [-3, -3]


def test_steps_apply_what_was_set_and_all_where_nothing_was():
    groups = nc.ParamGroups([nc.Group("g", {"a": np.zeros(2)})])
    optimizer = nc.SGD(groups, lr=1.0)
    groups.set_grads({"a": np.ones(2)})
    for _ in range(3):
        optimizer.step()
    assert groups.params["a"].tolist() == [-3, -3]
    groups.zero_grads()
    optimizer.step()
    assert groups.params["a"].tolist() == [-3, -3]
    for dtype, size in itertools.product(DTYPES.values(), (2, 0)):
        start = {"a": np.zeros(2, dtype), "b": np.zeros(3, dtype), "none": np.zeros(size, dtype)}
        groups = nc.ParamGroups([nc.Group("g", start)])
        optimizer = nc.SGD(groups, lr=1.0)
        for rate, names in enumerate((["a", "b", "none"], ["a"], ["b", "none"], ["b"]), 1):
            groups.set_grads({name: np.full_like(start[name], rate) for name in names})
            optimizer.step()
            for name in names:
                start[name] -= start[name].dtype.type(rate)
            for name, wanted in start.items():
                assert_same_bits(np.asarray(groups.params[name]), wanted)


# ---- groups that share a norm


@pytest.mark.parametrize("kind", ["plain", "adam"])
def test_groups_of_one_norm_have_rates_of_their_own(target, kind):
    rule = nc.ByGlobalNorm(1.0, shared="all")
    start = {"a": np.array([1.0, 2.0]), "b": np.array([3.0]), "e": np.ones((6, 3))}
    rates = {"a": 0.1, "b": 0.4, "e": 0.2}
    groups = nc.ParamGroups(
        [nc.Group(n, {n: p}, clip=rule, lr=rates[n], sparse=n == "e") for n, p in start.items()],
        device=target.device,
    )
    optimizer, plain = made(kind, groups, 0.3)
    expected = {name: param.copy() for name, param in start.items()}
    for step in range(4):
        rng = np.random.default_rng(step)
        grads = {name: normal(rng, param.shape, "float64") for name, param in start.items()}
        groups.set_grads(grads | {"e": nc.IndexedSlices(grads["e"], np.arange(6), (6, 3))})
        optimizer.step()
        for name, grad in nc.clip_by_global_norm(grads, 1.0)[0].items():
            expected[name] = plain.update(name, expected[name], grad, rates[name])
    for name, wanted in expected.items():
        np.testing.assert_allclose(np.asarray(groups.params[name]), wanted, rtol=1e-12)
    states = optimizer.state_dict()["groups"].values()
    assert [own["steps"] for own in states] == [4, 4, 4]


@pytest.mark.parametrize(
    "rules", [[nc.ByGlobalNorm(9.0)], [nc.ByGlobalNorm(9.0), nc.AutoClip(warmup=9)]]
)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.full
def test_what_was_applied_and_left_out_is_not_added_to(rules, dtype):
    """Neither where a step is one native call nor in the general way."""
    members = [
        nc.Group(f"g{k}", {f"a{k}": np.zeros(1, dtype), f"b{k}": np.zeros(1, dtype)}, clip=rule)
        for k, rule in enumerate(rules)
    ]
    for at_once in (True, False):
        with pytest.MonkeyPatch.context() as patch:
            if not at_once:
                patch.setattr(GroupUpdater, "_ready", lambda *_: None)
            groups = nc.ParamGroups(members)
            optimizer = nc.SGD(groups, lr=1.0)
            ones = {name: np.ones(1, dtype) for name in groups.params}
            groups.set_grads(ones)
            optimizer.step()
            groups.set_grads({"a0": ones["a0"]})
            optimizer.step()
            groups.accumulate(ones)
            told = optimizer.step().tensors
            assert [told[name].norm for name in told] == [2.0 if n == "a0" else 1.0 for n in told]


@pytest.mark.parametrize(
    "rule",
    [nc.ByGlobalNorm(0.5), nc.ByGlobalNorm(lambda step: 0.25 + step % 3), nc.AutoClip(50, 9)],
    ids=["fixed", "scheduled", "following"],
)
@pytest.mark.parametrize("seed", range(2))
def test_the_history_has_what_reports_told(target, monkeypatch, rule, seed):
    """Steps are kept in stretches that differ in their numbers alone, or each by itself."""
    records = []
    for kept in (4, 1):
        monkeypatch.setattr(steps, "KEPT", kept)
        rng, told, number = np.random.default_rng(seed), nc.History(), 0
        groups = groups_by(rule, target.device, "skip")
        optimizer = nc.SGD(groups, lr=0.01)
        for _ in range(30):
            grads = grads_of(rng.integers(99), rng.choice([1.0, np.nan], p=[0.9, 0.1]))
            unscale = rng.choice([1.0, 4.0], p=[0.7, 0.3]).item()
            if rng.random() < 0.1:
                number += 5
                groups.step = np.uint8(number)
            groups.set_grads(grads)
            what = rng.choice(["clip", "step", "step(grads)", "measure", "ask"])
            if what == "ask":
                assert len(groups.history) == len(told)
            elif what == "measure":
                groups.clip(unscale=unscale, apply=False)
            else:
                given = (grads,) if what == "step(grads)" else ()
                take = groups.clip if what == "clip" else optimizer.step
                told.record(take(*given, unscale=unscale))
                assert told.to_dict()["all"]["step"][-1] == number
                number += 1
        records += [repr(groups.history.to_dict()), repr(told.to_dict())]
    assert records == [records[0]] * 4

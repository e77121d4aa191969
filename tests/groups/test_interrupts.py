"""Interrupts: what is begun and not ended is found by the next call, and done."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.clipping import outcome, steps, updating
from numclip.clipping.clipper import Clipper
from numclip.host import at_once
from numclip.host.plan import Plan
from numclip.host.units import UnitPlan
from numclip.host.updates import GroupUpdates

pytestmark = pytest.mark.full


def interrupt(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def late(function: Any) -> Any:
    """A function that is interrupted when it has done all."""

    def call(*given: Any) -> None:
        function(*given)
        raise KeyboardInterrupt

    return call


def interrupted(monkeypatch, owner: Any, name: str, call: Any) -> None:
    """Make a call in which something is interrupted."""
    with monkeypatch.context() as changed:
        changed.setattr(owner, name, interrupt)
        with pytest.raises(KeyboardInterrupt):
            call()


@pytest.mark.parametrize("steps_by", ["clip", "step"])
@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(1.0), nc.ByValue(-0.5, 0.5), nc.AutoClip()])
def test_what_is_found_goes_to_the_memory_of_the_present_steps(rule, steps_by, monkeypatch):
    monkeypatch.setattr(steps, "KEPT", 2)
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, rule)])
    optimizer = nc.SGD(groups, lr=0.1)

    def take(size: float) -> nc.ClipReport:
        groups.set_grads({"w": np.array([3.0, 4.0]) * size})
        return groups.clip() if steps_by == "clip" else optimizer.step()

    reports = [take(1.0), take(2.0)]  # the next one goes to other memory
    interrupted(monkeypatch, at_once, "point", lambda: take(9.0))
    reports += [take(3.0), take(4.0)]
    assert [report.norm for report in reports] == [5.0, 10.0, 15.0, 20.0]
    assert [report.tensors["w"].norm for report in reports] == [5.0, 10.0, 15.0, 20.0]
    assert groups.history.to_dict()["g"]["norm"] == [5.0, 10.0, 15.0, 20.0]


@pytest.mark.parametrize("name", ["hand_over", "__init__"])
def test_a_block_is_handed_over_whatever_comes(name, monkeypatch):
    monkeypatch.setattr(steps, "KEPT", 2)
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, nc.ByGlobalNorm(1.0))])

    def take(size: float) -> nc.ClipReport:
        groups.set_grads({"w": np.array([3.0, 4.0]) * size})
        return groups.clip()

    reports, whole = [take(1.0)], getattr(steps.Block, name)
    with monkeypatch.context() as changed:
        endings = iter([late(whole)])
        changed.setattr(steps.Block, name, lambda *given: next(endings, whole)(*given))
        with pytest.raises(KeyboardInterrupt):
            take(2.0)
    reports += [take(3.0), take(4.0), take(5.0)]
    assert [report.norm for report in reports] == [5.0, 15.0, 20.0, 25.0]
    assert groups.history.to_dict()["g"]["norm"] == [5.0, 10.0, 15.0, 20.0, 25.0]


def test_a_step_that_was_interrupted_when_it_was_kept_says_nothing_of_the_next():
    groups = nc.ParamGroups([nc.Group(name, {name: np.zeros(2)}, nc.ByNorm(1.0)) for name in "ab"])
    told = []

    class Kept(list):
        def append(self, stretch: Any) -> None:
            super().append(stretch)
            raise KeyboardInterrupt

    for size, scale in ((1.0, 1.0), (7.0, 4.0), (2.0, 1.0)):
        groups.set_grads({name: np.array([3.0, 4.0]) * size * scale for name in "ab"})
        block = groups._manager.made_steps()._block
        if scale != 1.0:
            kept, block.stretches = block.stretches, Kept(block.stretches)
            with pytest.raises(KeyboardInterrupt):
                groups.clip(unscale=scale)
            kept[:], block.stretches = block.stretches, kept
        else:
            told.append(groups.clip(unscale=scale))
    assert [report.groups["a"].norm for report in told] == [5.0, 10.0]
    assert groups.history.to_dict()["a"]["norm"] == [5.0, 10.0]


@pytest.mark.parametrize("count", [3, 5, 8])
def test_a_record_that_is_interrupted_loses_no_step(count, monkeypatch):
    monkeypatch.setattr(steps, "KEPT", 3)
    members = [nc.Group(name, {name: np.zeros(2)}, nc.ByNorm(1.0)) for name in "ab"]
    groups = nc.ParamGroups(members)
    for step in range(count):
        groups.set_grads({"a": np.array([3.0, 4.0]), "b": np.array([0.0, step])})
        groups.clip()
    for name in ("norms_together", "hypotenuses"):
        interrupted(monkeypatch, outcome, name, lambda: len(groups.history))
    told = groups.history.to_dict()
    assert list(told) == ["a", "b", "all"]
    assert [own["step"] for own in told.values()] == [list(range(count))] * 3
    assert told["b"]["norm"] == list(range(count))


def test_a_step_in_place_of_one_that_was_told_is_told():
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, nc.ByNorm(1.0))])
    groups.set_grads({"w": np.array([3.0, 4.0])})
    taken = groups._manager.made_steps()
    groups.clip()
    slot = taken._slot
    groups.clip(apply=False)
    taken._slot = slot  # as where that is interrupted once it is kept
    assert len(groups.history) == 1
    groups.clip()
    assert groups.history.to_dict()["g"]["step"] == [0, 1]
    assert len(groups.history) == groups.step


def test_rows_that_the_plan_does_not_know_yet(monkeypatch):
    groups, other = (
        nc.ParamGroups([nc.Group("e", {"e": np.zeros((9, 2))}, nc.ByNorm(1.0, ord=3), sparse=True)])
        for _ in range(2)
    )
    few, many = (nc.IndexedSlices(np.full((n, 2), 2.0), [1] * n, (9, 2)) for n in (2, 60))
    groups.set_grads({"e": few})
    groups.clip()
    groups.set_grads({"e": many})
    interrupted(monkeypatch, Plan, "_lay_out", groups.clip)
    other.set_grads({"e": many})
    assert repr(groups.clip().tensors) == repr(other.clip().tensors)
    np.testing.assert_array_equal(groups.grads["e"].values, other.grads["e"].values)


@pytest.mark.parametrize("rule", [nc.ByNorm(1.0, ord=3), nc.Adaptive(0.5)])
def test_a_law_is_written_again(rule, monkeypatch):
    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(2)}, rule)])

    def clip(unscale: float) -> nc.ClipReport:
        groups.set_grads({"w": np.array([3.0, 4.0])})
        return groups.clip(unscale=unscale)

    first = repr(clip(1.0))
    with monkeypatch.context() as changed:
        for owner in (Plan, UnitPlan):
            changed.setattr(owner, "write_laws", late(owner.write_laws))
        with pytest.raises(KeyboardInterrupt):
            clip(16.0)
    assert repr(clip(1.0)).replace("step 1", "step 0") == first


def test_rates_are_written_again(monkeypatch):
    groups, other = (
        nc.ParamGroups([nc.Group(name, {name: np.ones(2)}, nc.ByNorm(1.0)) for name in "ab"])
        for _ in range(2)
    )
    grads = {name: np.array([3.0, 4.0]) for name in "ab"}
    optimizers = [nc.SGD(own, lr=0.5) for own in (groups, other)]
    for optimizer in optimizers:
        optimizer.step(grads)
    optimizers[0].lr = 0.25
    with monkeypatch.context() as changed:
        changed.setattr(GroupUpdates, "write_settings", late(GroupUpdates.write_settings))
        with pytest.raises(KeyboardInterrupt):
            optimizers[0].step(grads)
    optimizers[0].lr = 0.5
    for optimizer in optimizers:
        optimizer.step(grads)
    np.testing.assert_array_equal(groups.params["a"], other.params["a"])


def test_updates_of_another_rule_are_made_again(monkeypatch):
    groups, other = (
        nc.ParamGroups([nc.Group("g", {"w": np.ones(2)}, nc.ByNorm(1.0))]) for _ in range(2)
    )
    optimizers = [nc.SGD(own, lr=0.5, momentum=0.9) for own in (groups, other)]
    grads = {"w": np.array([3.0, 4.0])}
    for optimizer in optimizers:
        optimizer.step(grads)
        optimizer.groups["g"].clip = nc.ByNorm(0.5, ord=3)
    interrupted(monkeypatch, updating, "update_span", lambda: optimizers[0].step(grads))
    for optimizer in optimizers:
        optimizer.step(grads)
    np.testing.assert_array_equal(groups.params["w"], other.params["w"])


def test_a_bound_that_was_asked_for_is_taken_by_the_next_step(monkeypatch):
    rule = nc.ByNorm(lambda step: 9.0 if step == 0 else 1.0)
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, rule)])
    groups.set_grads({"w": np.array([3.0, 4.0])})
    groups.clip()
    with monkeypatch.context() as changed:
        changed.setattr(Clipper, "_bounds_at", late(Clipper._bounds_at))
        with pytest.raises(KeyboardInterrupt):
            groups.clip()
    assert groups.clip().tensors["w"].threshold == 1.0

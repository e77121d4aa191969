"""Steps by one native call, or two, give what several calls give, bit for bit."""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

import numclip as nc
from numclip.clipping.outcome import norms_of, norms_together
from numclip.clipping.steps import Steps
from numclip.clipping.updating import GroupUpdater
from numclip.host.kernels.pools import write_norms
from numclip.host.plan import Plan
from numclip.host.runtime import environment
from numclip.tables import BAD, ERROR, EXPONENT, SUM_COLUMNS, TOTAL
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import arrays as gradients

RULES = {
    "none": lambda: None,
    "global": lambda: nc.ByGlobalNorm(2.0),
    "zero": lambda: nc.ByGlobalNorm(0.0),
    "never": lambda: nc.ByGlobalNorm(math.inf),
    "tiny": lambda: nc.ByGlobalNorm(1e-42),
    "by step": lambda: nc.ByGlobalNorm(lambda step: 3.0 / (1 + step)),
    "each": lambda: nc.ByNorm(2.0),
    "AutoClip": lambda: nc.AutoClip(percentile=40),
    "AdaGC": lambda: nc.AdaGC(warmup=1),
    "value": lambda: nc.ByValue(-0.5, 0.25),
    "ZClip": lambda: nc.ZClip(warmup=1, max_norm=4.0),
    "adaptive": lambda: nc.Adaptive(0.25),
}
OPTIMIZERS = {
    "clip": None,
    "SGD": lambda groups: nc.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1),
    "Adam": lambda groups: nc.Adam(groups, lr=0.5),
}


def run(
    steps: list[list[np.ndarray]], rule: str, optimizer: str, policy: str = "propagate"
) -> list[Any]:
    """Take steps of one group; return all that they leave behind."""
    params = {str(k): np.ones_like(grad) for k, grad in enumerate(steps[0])}
    groups = nc.ParamGroups([nc.Group("model", params, RULES[rule](), nonfinite=policy)])
    make = OPTIMIZERS[optimizer]
    step = groups.clip if make is None else make(groups).step
    left: list[Any] = []
    for grads in steps:
        groups.set_grads(dict(zip(params, grads, strict=True)))
        if policy == "propagate":  # else nothing is measured before the step
            left.append(repr(groups.clip(apply=False).to_dict()))
        left.append(repr(step().to_dict()))
        left += [array.tobytes() for array in (*groups.params.values(), *groups.grads.values())]
    left.append(repr(groups.history.to_dict()))
    state = groups.state_dict()["rules"]["model"]
    return [*left, {key: np.asarray(value).tobytes() for key, value in state.items()}]


def same_both_ways(
    steps: list[list[np.ndarray]], rule: str, optimizer: str, policy: str = "propagate"
) -> None:
    at_once = run(steps, rule, optimizer, policy)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "clip_at_once", lambda *_: False)
        patch.setattr(GroupUpdater, "_ready", lambda *_: None)
        assert run(steps, rule, optimizer, policy) == at_once
        patch.setattr(Plan, "_decide_at_once", lambda *_: False)
        assert run(steps, rule, optimizer, policy) == at_once


@given(st.data(), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(RULES)))
def test_any_gradients(data, dtype, rule):
    assume(rule != "value" or DTYPES[dtype].kind != "c")  # which are not ordered
    grads = data.draw(st.lists(gradients(dtype), min_size=1, max_size=3))
    steps = [grads, [grad[::-1] for grad in grads], [grad * 0 for grad in grads]]
    with np.errstate(all="ignore"):
        same_both_ways(steps, rule, data.draw(st.sampled_from(sorted(OPTIMIZERS))))


@pytest.mark.parametrize("rule", RULES)
def test_what_needs_care(rule):
    for bad in (math.nan, math.inf, 1e-300, 1e300):
        with np.errstate(all="ignore"):
            grads = [np.array([3.0, bad]), np.ones(5)]
            same_both_ways([grads], rule, "clip")
            same_both_ways([grads, [np.ones(2), np.ones(5)]], rule, "SGD", "skip")


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_steps_by_norms_so_far_are_native_and_leave_what_was_told(optimizer, monkeypatch):
    """No step goes the general way, and none copies the window of norms."""
    params = {name: np.ones(3, "f") for name in "abc"}
    rules = {"a": nc.AutoClip(50, window=4), "b": nc.ZClip(warmup=2), "c": nc.AdaGC(warmup=2)}
    groups = nc.ParamGroups([nc.Group(n, {n: params[n]}, clip=rules[n]) for n in rules])
    make = OPTIMIZERS[optimizer]
    step = groups.clip if make is None else make(groups).step
    groups.set_grads(params)
    step()
    monkeypatch.setattr(Steps, "decide", None)
    monkeypatch.setattr(nc.AutoClip, "observe", None)
    for number in range(2, 8):
        held = {name: groups[name].rule_state for name in rules}
        state = groups.state_dict()["rules"]
        groups.set_grads({name: own * number for name, own in params.items()})
        step()
        for name, own in held.items():
            for key, array in own.items():
                assert array.tobytes() == state[name][key].tobytes()
        after = groups["a"].rule_state
        assert (held["a"]["count"], after["count"]) == (number - 1, number)
        assert after["norms"][(number - 1) % 4] == np.float64(math.sqrt(3.0 * number**2))


@pytest.mark.full
@given(st.lists(st.sampled_from([0.0, 2.0, 5e-324, 1e308, math.inf, math.nan]) | st.floats(0.0),
                min_size=1, max_size=6), st.sampled_from([1.0, 3.0, 1e-300]))  # fmt: skip
def test_norms_are_told_with_the_bits_of_reports(totals, unscale):
    sums = np.zeros((len(totals), SUM_COLUMNS))
    sums[:, TOTAL], norms = totals, np.empty(len(totals))
    sums[:, ERROR] = [0.0 if total > 1e300 else total * 1e-17 for total in totals]
    sums[:, BAD] = ~np.isfinite(totals)
    divisors = np.arange(1.0, len(totals) + 1.0)
    total, bad, plain = write_norms(sums, unscale, divisors, norms)
    with np.errstate(all="ignore"):
        wanted = np.nan_to_num(norms_of(sums, unscale) / divisors)
    assert norms.tobytes() == wanted.tobytes()
    assert (bad, plain) == (not np.isfinite(totals).all(), True)
    with np.errstate(all="ignore"), contextlib.suppress(OverflowError):
        assert total == np.nan_to_num(norms_together(sums, unscale))
    sums[-1, EXPONENT] = 1.0
    assert not write_norms(sums, unscale, divisors, norms)[2]


SEVERAL = [np.full(3, 2.0, "f"), np.arange(4.0).reshape(2, 2), np.ones(5, "f2"), np.ones(2)]


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_several_dtypes_are_taken_natively(optimizer, monkeypatch):
    """By one call that measures and one that writes; what needs care goes the general way."""
    steps = [SEVERAL, [grad * 0 for grad in SEVERAL], [grad * 3 for grad in SEVERAL]]
    for rule in ("global", "each", "AutoClip", "AdaGC"):
        same_both_ways(steps, rule, optimizer)
    same_both_ways(steps, "tiny", optimizer, "skip")
    with np.errstate(all="ignore"):  # the averages of these are bounds that make subnormal numbers
        small = [grad * grad.dtype.type(1e-38) for grad in SEVERAL]
    same_both_ways([small, SEVERAL], "AdaGC", optimizer, "skip")
    for bad in (math.nan, 1e300, 1e-300):
        same_both_ways([[*SEVERAL[:3], np.array([bad, 1.0])]], "global", optimizer, "skip")
    monkeypatch.setattr(Steps, "decide", None)
    for rule in ("global", "never", "none", "AutoClip"):
        run([SEVERAL, SEVERAL], rule, optimizer, "skip")


def test_several_dtypes_of_which_some_have_no_gradient():
    def left(*, natively: bool) -> list[Any]:
        with pytest.MonkeyPatch.context() as patch:
            if natively:
                patch.setattr(Steps, "decide", None)
            else:
                patch.setattr(GroupUpdater, "_ready", lambda *_: None)
            members = [nc.Group("a", dict(zip("vw", SEVERAL[:2], strict=True)), nc.AutoClip(50)),
                       nc.Group("b", dict(zip("xy", SEVERAL[2:], strict=True)))]  # fmt: skip
            groups = nc.ParamGroups(members)
            step = OPTIMIZERS["Adam"](groups).step
            every = dict(zip("vwxy", SEVERAL, strict=True))
            reports = [step({name: every[name] for name in names}) for names in ("vwxy", "wx", "v")]
            groups.set_grads({"w": SEVERAL[1]})
            reports += [step(), step({"v": SEVERAL[0][::-1].copy()[::-1]})]  # which is copied
            state = groups.state_dict()["rules"]["a"]
            return [
                *(repr(report.to_dict()) for report in reports),
                *(array.tobytes() for array in groups.params.values()),
                *(np.asarray(own).tobytes() for own in state.values()),
            ]

    assert left(natively=True) == left(natively=False)


def test_values_held_where_squares_vanish():
    """What is left is measured anew: its squares are no numbers that float64 has."""
    rule = nc.ByValue(-1e-300, 1e-300)
    groups = nc.ParamGroups([nc.Group("m", {"w": np.zeros(2)}, clip=rule)])
    groups.set_grads({"w": np.array([3.0, 4.0])})
    report = groups.clip()
    assert (report.norm, report.clipped_norm) == (5.0, math.hypot(1e-300, 1e-300))


def test_zeros_take_one_call_and_squares_that_vanish_do_not(monkeypatch):
    """A sum of squares of 0 is right where all elements are 0."""
    params = {"w": np.ones(2), "b": np.ones(3)}, {"e": np.ones((4, 2))}
    groups = nc.ParamGroups(
        [
            nc.Group("dense", params[0], nc.ByGlobalNorm(1.0)),
            nc.Group("rows", params[1], nc.ByGlobalNorm(1.0), sparse=True),
        ]
    )
    optimizer = nc.SGD(groups, lr=0.5)
    monkeypatch.setattr(Steps, "decide", None)  # by which all else goes
    w, zeros = np.array([3.0, 4.0]), np.zeros(3)
    for indices in ([0, 1], [2, 2]):
        rows = nc.IndexedSlices(np.zeros((2, 2)), indices, (4, 2))
        for grads in ({"w": w, "b": zeros, "e": rows}, {"w": w, "b": None, "e": rows}):
            assert optimizer.step(grads).norm == 5.0
        groups.set_grads({"w": 0 * w, "b": zeros, "e": rows})
        assert groups.clip().norm == 0.0
        for small in (np.array([0.0, 1e-200, 0.0]), np.full(3, 5e-324)):
            with pytest.raises(TypeError, match="NoneType"):
                optimizer.step({"w": w, "b": small, "e": rows})
            tiny = nc.IndexedSlices(small[:2].reshape(2, 1) * [1, 1], indices, (4, 2))
            with pytest.raises(TypeError, match="NoneType"):
                optimizer.step({"w": w, "b": zeros, "e": tiny})


def test_gradients_that_are_cast_are_applied_by_one_call(monkeypatch):
    """They are copied first, and need no more then than those of the parameters' dtype."""
    monkeypatch.setattr(GroupUpdater, "step", None)
    left = []
    for dtype in ("float32", "float64"):
        groups = nc.ParamGroups([nc.Group("m", {"w": np.ones(2, "f")}, clip=nc.ByGlobalNorm(1.0))])
        report = nc.SGD(groups, lr=0.5).step({"w": np.array([3.0, 4.0], dtype)})
        left.append((report.norm, groups.params["w"].tobytes()))
    assert left[0] == left[1]


def test_a_field_of_a_report_enters_the_ordinary_environment_once(monkeypatch):
    members = [nc.Group(name, {name: np.zeros(2)}, clip=nc.ByNorm(1.0)) for name in "ab"]
    groups = nc.ParamGroups(members)
    groups.set_grads({name: np.array([3.0, 4.0]) for name in "ab"})
    report, entered, run = groups.clip(), [], environment.run

    def counted(function: Any, *arguments: Any) -> Any:
        entered.append(function)
        return run(function, *arguments)

    monkeypatch.setattr(environment, "run", counted)
    assert report.norm == pytest.approx(math.hypot(5.0, 5.0))
    assert report.groups["a"].clipped_norm <= 1.0
    assert len(entered) == 2


def test_reports_keep_what_they_saw():
    groups = nc.ParamGroups([nc.Group("m", {"w": np.zeros(2)}, clip=nc.ByGlobalNorm(1.0))])
    groups.set_grads({"w": np.array([3.0, 4.0])})
    report = groups.clip()
    groups.set_grads({"w": np.array([30.0, 40.0])})
    groups.clip()
    assert report.tensors["w"].norm == 5.0


def test_reports_are_valid_for_ever():
    """Also when the memory of their step has become rows of the history."""
    groups = nc.ParamGroups(
        [nc.Group("m", {"w": np.zeros(2)}, clip=nc.ByGlobalNorm(1.0))], history=590
    )
    reports = []
    for step in range(600):
        groups.set_grads({"w": np.array([3.0, 4.0]) * step})
        reports.append(groups.clip())
    assert [report.norm for report in reports] == [5.0 * step for step in range(600)]
    assert reports[300].tensors["w"].norm == 1500.0
    assert groups.history.to_dict()["m"]["norm"] == [5.0 * step for step in range(10, 600)]
    assert len(nc.History(4)) == 0


def test_a_record_that_is_held_goes_on():
    groups = nc.ParamGroups([nc.Group("m", {"w": np.zeros(2)})])
    history = groups.history
    groups.clip()
    assert len(history) == 1
    held = copy.deepcopy(history)
    groups.clip(apply=False)
    groups.clip()
    groups["m"].clip = nc.ByGlobalNorm(1.0)  # what clips by it has seen no step yet
    groups.clip()
    assert (len(history), len(held)) == (3, 1)
    assert history.to_dict()["m"]["step"] == [0, 1, 2]
    state = groups.state_dict()
    groups.clip()
    groups.load_state_dict(state)
    groups.clip()
    assert len(history) == len(groups.history) == 4
    assert history is not groups.history

"""The step of little overhead does what the general one does, bit for bit, or nothing."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip import groups as manager
from numclip.joint_step import JointStep, attempt
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import arrays as gradients

RULES = {
    "none": lambda: None,
    "global": lambda: nc.ByGlobalNorm(2.0),
    "zero": lambda: nc.ByGlobalNorm(0.0),
    "never": lambda: nc.ByGlobalNorm(math.inf),
    "tiny": lambda: nc.ByGlobalNorm(1e-42),
    "by step": lambda: nc.ByGlobalNorm(lambda step: 3.0 / (1 + step)),
    "AutoClip": lambda: nc.AutoClip(percentile=40),
    "ZClip": lambda: nc.ZClip(warmup=1, max_norm=4.0),
}
OPTIMIZERS = {
    "clip": None,
    "SGD": lambda groups: nc.SGD(groups, lr=0.5, momentum=0.9, weight_decay=0.1),
    "Adam": lambda groups: nc.Adam(groups, lr=0.5),
}


def run(steps: list[list[np.ndarray]], rule: str, optimizer: str) -> list[Any]:
    """Take steps of one group; return all that they leave behind."""
    params = {str(k): np.ones_like(grad) for k, grad in enumerate(steps[0])}
    groups = nc.ParamGroups([nc.Group("model", params, clip=RULES[rule]())])
    make = OPTIMIZERS[optimizer]
    step = groups.clip if make is None else make(groups).step
    left: list[Any] = []
    for grads in steps:
        groups.set_grads(dict(zip(params, grads, strict=True)))
        left.append(repr(groups.clip(apply=False).to_dict()))
        left.append(repr(step().to_dict()))
        left += [array.tobytes() for array in (*groups.params.values(), *groups.grads.values())]
    left.append(repr(groups.history.to_dict()))
    state = groups.state_dict()["rules"]["model"]
    return [*left, {key: np.asarray(value).tobytes() for key, value in state.items()}]


def same_both_ways(steps: list[list[np.ndarray]], rule: str, optimizer: str) -> None:
    jointly = run(steps, rule, optimizer)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(manager, "attempt", lambda *_: None)
        assert run(steps, rule, optimizer) == jointly


@given(st.data(), st.sampled_from(sorted(DTYPES)), st.sampled_from(sorted(RULES)))
def test_any_gradients(data, dtype, rule):
    grads = data.draw(st.lists(gradients(dtype), min_size=1, max_size=3))
    steps = [grads, [grad[::-1] for grad in grads], [grad * 0 for grad in grads]]
    with np.errstate(all="ignore"):
        same_both_ways(steps, rule, data.draw(st.sampled_from(sorted(OPTIMIZERS))))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e-300, 1e300])
def test_what_needs_care_is_left_to_the_general_step(rule, bad):
    grads = [np.array([3.0, bad]), np.ones(5)]
    groups = nc.ParamGroups([nc.Group("model", {"a": np.zeros(2), "b": grads[1]})])
    groups.set_grads({"a": grads[0], "b": grads[1]})
    assert (attempt(groups["model"], 1.0, 0) is None) == (bad != 1e-300)
    with np.errstate(all="ignore"):
        same_both_ways([grads], rule, "clip")


def test_what_it_takes():
    one = {"w": np.ones(3, np.float32)}
    two = {"w": np.ones(3, np.float32), "b": np.ones(3)}

    def taken(params: Any = one, unscale: float = 1.0, **options: Any) -> bool:
        groups = nc.ParamGroups([nc.Group("model", params, **options)])
        (step,) = groups.judged(unscale, write=False)
        return isinstance(step, JointStep)

    assert taken()
    assert taken(clip=nc.ByGlobalNorm(1.0))
    assert not taken(two)
    assert not taken(unscale=2.0)
    assert not taken(sparse=True)
    assert not taken(clip=nc.ByNorm(1.0))
    assert not taken(clip=nc.ByGlobalNorm(1.0, ord=1))
    assert not taken(clip=nc.ByGlobalNorm(1.0, shared="all of them"))


def test_a_group_follows_the_rule_it_is_given_later():
    grads = {"w": np.array([3.0, 4.0]), "b": np.array([0.3, 0.4])}
    groups = nc.ParamGroups([nc.Group("m", grads, clip=nc.ByGlobalNorm(1.0))])
    groups.set_grads(grads)
    groups.clip(apply=False)
    groups["m"].clip = nc.ByNorm(1.0)
    scales = {name: report.scale for name, report in groups.clip().tensors.items()}
    assert scales["w"] == pytest.approx(0.2)
    assert scales["b"] == 1.0


def test_reports_keep_what_they_saw():
    groups = nc.ParamGroups([nc.Group("m", {"w": np.zeros(2)}, clip=nc.ByGlobalNorm(1.0))])
    groups.set_grads({"w": np.array([3.0, 4.0])})
    report = groups.clip()
    groups.set_grads({"w": np.array([30.0, 40.0])})
    groups.clip()
    assert report.tensors["w"].norm == 5.0

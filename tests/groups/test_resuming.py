"""States that are taken up with another bound, rule or rate, or by other parameters."""

from __future__ import annotations

import copy
import pickle
import re

import numpy as np
import pytest

import numclip as nc
from tests.oracle.grouped import frozen, grads_of, snapshot


def groups_of(clip, names="wb", size=3, **more):
    params = {name: np.full(size, 1.0 + k) for k, name in enumerate(names)}
    return nc.ParamGroups([nc.Group("g", params, clip=clip, **more)])


def run(groups, steps=range(4), optimizer=None):
    for step in steps:
        groups.set_grads(grads_of(groups, step))
        groups.clip() if optimizer is None else optimizer.step()
    return groups


RULES = {
    "bound": (nc.ByGlobalNorm(1.0), nc.ByGlobalNorm(0.5)),
    "rule": (nc.ByGlobalNorm(1.0), nc.AutoClip(50)),
    "none": (None, nc.ByNorm(1.0)),
    "setting": (nc.AdaGC(warmup=2), nc.AdaGC(relative=2.0, warmup=2)),
    "window": (nc.AutoClip(50, window=9), nc.AutoClip(50, window=8)),
}


def test_another_rule_is_taken_up_when_asked(tmp_path):
    for name in RULES:
        before, after = RULES[name]
        saved, path = run(groups_of(before)), tmp_path / "run.npz"
        saved.save(path)
        groups = groups_of(after)
        other = snapshot(groups)
        message = (
            f"{path}: rule of 'g': expected {after!r}, got {before!r}; strict=False leaves it out"
        )
        with pytest.raises(nc.StateError, match=f"^{re.escape(message)}$"):
            groups.load(path)
        assert snapshot(groups) == other
        left_out = groups.load(path, strict=False)
        assert left_out[0] == f"rule of 'g': expected {after!r}, got {before!r}"
        assert len(left_out) == 2 if name == "window" else 1
        assert groups.step == 4
        assert frozen(groups.history.state_dict()) == frozen(saved.history.state_dict())
        np.testing.assert_array_equal(groups.params["w"], saved.params["w"])
        taken = saved if name == "setting" else groups_of(after)
        assert frozen(groups["g"].rule_state) == frozen(taken["g"].rule_state)
        run(groups, range(4, 6))


def test_all_that_fits_is_taken_up_strictly_and_nothing_is_left_out(tmp_path):
    saved, groups = run(groups_of(nc.AdaGC())), groups_of(nc.AdaGC())
    saved.save(tmp_path / "run")
    assert groups.load(tmp_path / "run") == []
    assert frozen(groups.state_dict()) == frozen(saved.state_dict())
    assert groups.load(tmp_path / "run", strict=False) == []
    assert frozen(groups.state_dict()) == frozen(saved.state_dict())


OTHERS = [
    (
        "wbc",
        3,
        "state['params']['c']: expected array of float64 and shape (3,), got nothing",
        "wb",
    ),
    (
        "w",
        3,
        "state['params']['b']: expected nothing, got array of float64 and shape (3,)",
        "w",
    ),
    ("wb", 2, "state['params']['w']: expected array of float64 and shape (2,), got", ""),
]


def test_other_parameters():
    for names, size, slot, fits in OTHERS:
        saved = run(groups_of(nc.AdaGC()))
        saved.params["w"][...] = 7.0
        groups = groups_of(nc.AdaGC(), names, size)
        with pytest.raises(nc.StateError):
            groups.load_state_dict(saved.state_dict())
        left_out = groups.load_state_dict(saved.state_dict(), strict=False)
        assert any(reason.startswith(slot) for reason in left_out)
        assert any("AdaGC" in reason for reason in left_out) is (len(names) != 2)
        assert groups.params["w"][0] == (7.0 if "w" in fits else 1.0)
        run(groups, range(4, 6))


def test_other_groups_and_whatever_is_no_state():
    saved = run(groups_of(nc.ByNorm(1.0))).state_dict()
    groups = nc.ParamGroups([nc.Group("h", {"w": np.zeros(3)})])
    left_out = groups.load_state_dict(saved, strict=False)
    assert "history: unknown group 'g'" in left_out
    assert "state['rules']['g']: expected nothing, got dict" in left_out
    assert groups.params["w"].tolist() == [1.0] * 3
    assert len(groups.history) == 4
    for odd in ({}, {"step": -1}, {"rules": 3, "history": [], "params": None, "more": {}}):
        before = snapshot(groups)
        assert groups.load_state_dict(odd, strict=False)
        assert snapshot(groups) == before


def optimizers(kind=nc.Adam, names="wb", lr=0.1, **settings):
    groups = groups_of(nc.ByGlobalNorm(1.0), names)
    return groups, kind(groups, lr, **settings)


def test_optimizers_go_on_with_another_rate_and_more_parameters(tmp_path):
    groups, optimizer = optimizers()
    run(groups, optimizer=optimizer)
    optimizer.save(tmp_path / "adam")
    more, other = optimizers(names="wbc", lr=0.01)
    with pytest.raises(nc.StateError, match=r"adam: state\['groups'\]\['g'\]\['states'\]\['c'\]"):
        other.load(tmp_path / "adam")
    (left_out,) = other.load(tmp_path / "adam", strict=False)
    assert left_out.startswith("state['groups']['g']['states']['c']: expected dict, got nothing")
    states = other.state_dict()["groups"]["g"]
    wanted = optimizer.state_dict()["groups"]["g"]
    assert states["steps"] == wanted["steps"] == 4
    assert frozen({name: states["states"][name] for name in "wb"}) == frozen(wanted["states"])
    assert not states["states"]["c"]["mean"].any()
    run(more, optimizer=other)


def test_steps_of_an_optimizer_are_those_of_its_states():
    groups, optimizer = optimizers()
    run(groups, optimizer=optimizer)
    saved = optimizer.state_dict()
    for other in (optimizers(names="xy")[1], optimizers(nc.SGD)[1]):
        before = frozen(other.state_dict())
        assert other.load_state_dict(saved, strict=False)
        assert frozen(other.state_dict()) == before
    plain, with_momentum = optimizers(nc.SGD)[1], optimizers(nc.SGD, momentum=0.9)[1]
    run(plain.groups, optimizer=plain)
    assert with_momentum.load_state_dict(plain.state_dict(), strict=False)
    assert with_momentum.state_dict()["groups"]["g"]["steps"] == 0


def test_groups_are_copied_by_their_state_as_advised():
    for copied in (copy.copy, copy.deepcopy, pickle.dumps):
        groups = run(groups_of(nc.AdaGC()))
        with pytest.raises(
            TypeError, match=r"make new ones, and let them load_state_dict\(groups\."
        ):
            copied(groups)
        twin = groups_of(nc.AdaGC())
        twin.load_state_dict(pickle.loads(pickle.dumps(groups.state_dict())))
        assert frozen(twin.state_dict()) == frozen(groups.state_dict())


def test_absurd_counts_of_steps_are_refused():
    for steps in (-1, 2**62 + 1, 2**70):
        groups, optimizer = optimizers()
        run(groups, optimizer=optimizer)
        state, states = groups.state_dict(), optimizer.state_dict()
        state["step"] = states["groups"]["g"]["steps"] = steps
        for owner, saved in ((groups, state), (optimizer, states)):
            with pytest.raises(
                nc.StateError, match=f"step.*: expected a count from 0 to .* got {steps}"
            ):
                owner.load_state_dict(saved)
            assert owner.load_state_dict(saved, strict=False)
        assert groups.step == optimizer.state_dict()["groups"]["g"]["steps"] == 4
        run(groups, optimizer=optimizer)


@pytest.mark.parametrize(
    "rule", [nc.AutoClip(50, window=3), nc.ZClip(warmup=2), nc.AdaGC(warmup=2)]
)
def test_a_running_rule_goes_back_to_an_earlier_state(rule):
    groups = run(groups_of(rule), range(5))
    state = groups.state_dict()
    ahead = snapshot(run(groups, range(5, 9)))
    assert groups.load_state_dict(state) == []
    assert snapshot(run(groups, range(5, 9))) == ahead


def test_a_rule_that_is_set_begins_anew_where_its_state_is_not_that_of_the_last():
    groups = run(groups_of(nc.ByNorm(1.0)))
    groups["g"].clip = nc.AutoClip(50)
    run(groups)
    assert groups["g"].rule_state["count"] == 4
    groups["g"].clip = nc.AutoClip(20)
    assert groups["g"].rule_state["count"] == 4
    groups["g"].clip = None
    run(groups)
    assert groups["g"].rule_state == {}

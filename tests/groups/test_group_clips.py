"""What groups clip: the functions' bits, loss scales, policies, schedules, reports."""

import json
import math
from fractions import Fraction

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_norm, assert_same_bits, assert_within
from tests.oracle.grouped import (
    NORM_RULES,
    ROWS,
    RULES,
    SHAPES,
    assert_as_by_functions,
    frozen,
    grads_of,
    over,
    params_of,
    snapshot,
)
from tests.oracle.reference import DTYPES

# ---- clipping


@pytest.mark.each_value
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("dtypes", [("float32",), ("float16", "float64"), tuple(DTYPES)], ids=len)
def test_clips_have_the_bits_of_the_functions(rule, dtypes):
    names = [d for d in dtypes if isinstance(rule, nc.ByValue) <= (DTYPES[d].kind != "c")]
    shapes = [n for n in SHAPES if n == "filter" or not isinstance(rule, nc.Adaptive)]
    make = [{f"{n}-{d}": params_of(d)[n] for n in shapes} for d in names]
    joined = [nc.Group("one", {n: p for part in make for n, p in part.items()}, clip=rule)]
    apart = [nc.Group(d, p, clip=rule) for d, p in zip(names, make, strict=True)]
    for members in (joined, apart):
        groups = nc.ParamGroups(members)
        for step in range(5):
            before = grads_of(groups, step, scale=1.0 + step)
            groups.set_grads(before)
            report = groups.clip()
            assert_as_by_functions(groups, before, report)
            for name, tensor in report.tensors.items():
                if rule is None or rule.ord == 2 or rule.scope == "group":
                    assert_norm(tensor.norm, [before[name]])
                else:
                    norm = nc.global_norm([before[name]], ord=rule.ord)
                    assert tensor.norm == pytest.approx(norm, rel=1e-14)
            assert report.step == step


@pytest.mark.parametrize("rule", NORM_RULES, ids=repr)
@pytest.mark.parametrize("order", ["C", "F"])
def test_sparse_clips_have_the_bits_of_the_functions(rule, order):
    params = {code: np.ones(ROWS, code) for code in ("f8", "f4", "f2")}
    groups = nc.ParamGroups([nc.Group("rows", params, clip=rule, sparse=True)])
    for step in range(4):
        before = grads_of(groups, step)
        for name, grad in before.items():
            values = np.array(grad.values, order=order)
            groups.grads[name] = nc.IndexedSlices(values, grad.indices, grad.dense_shape)
        assert_as_by_functions(groups, before, groups.clip())


@pytest.mark.parametrize("order", [2, 1, math.inf])
def test_a_shared_norm_is_the_joint_one(order):
    rule, rng = nc.ByGlobalNorm(0.5, ord=order, shared="joint"), np.random.default_rng(7)
    members = [
        nc.Group("a", params_of("float32"), clip=rule),
        nc.Group("apart", {"z": np.ones(4)}, clip=nc.ByGlobalNorm(0.5, ord=order)),
        nc.Group("b", {"e": np.ones(ROWS)}, clip=rule, sparse=True),
    ]
    groups = nc.ParamGroups(members)
    before = {**grads_of(groups), "e": slices(rng, 8, ROWS, "float64", repeated=True)}
    groups.set_grads(before)
    report = groups.clip()
    joint = {name: grad for name, grad in before.items() if name != "z"}
    wanted, norm = nc.clip_by_global_norm(joint, 0.5, ord=order)
    wanted["z"] = nc.clip_by_global_norm([before["z"]], 0.5, ord=order)[0][0]
    for name, grad in wanted.items():
        assert_same_bits(groups.grads[name], grad)
    assert report.groups["a"].scale == report.groups["b"].scale
    assert report.groups["a"].scale == pytest.approx(0.5 / norm, rel=1e-6)
    for differing in ({"clip": nc.ByGlobalNorm(9.0, shared="joint")}, {"nonfinite": "zero"}):
        other = nc.Group(**({"name": "c", "params": {"c": np.ones(2)}, "clip": rule} | differing))
        with pytest.raises(ValueError, match="'a' and 'c' share"):
            nc.ParamGroups([*members, other])


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_measuring_only_writes_nothing(rule):
    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones((4, 3))}, clip=rule, nonfinite="zero")])
    groups.set_grads(grads_of(groups))
    for poison in (1.0, np.nan):
        groups.grads["w"][1, 1] = poison
        before = snapshot(groups)
        measured = groups.clip(apply=False, unscale=2.0)
        assert snapshot(groups) == before
    assert groups.step == len(groups.history) == 0
    assert repr(measured.to_dict()) == repr(groups.clip(unscale=2.0).to_dict())
    assert groups.step == len(groups.history) == 1


@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.parametrize("power", [-3, 12])
def test_a_power_of_two_as_loss_scale_keeps_the_bits(rule, power):
    members = [nc.Group("g", {"w": np.ones((4, 3)), "v": np.ones((4, 3), "f")}, clip=rule)]
    if rule in NORM_RULES:
        members.append(nc.Group("rows", {"e": np.ones(ROWS, "f")}, clip=rule, sparse=True))
    groups = nc.ParamGroups(members)
    for step in range(4):
        plain = grads_of(groups, step)
        scale = 2.0 ** (power + step)
        groups.set_grads({name: over(grad, 1 / scale) for name, grad in plain.items()})
        report = groups.clip(unscale=scale)
        assert_as_by_functions(groups, plain, report)
        assert report.norm == nc.global_norm(plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_loss_scale_holds_the_bound(dtype):
    param = {"w": np.ones((4, 3), DTYPES[dtype])}
    for seed in range(20):
        grad = normal(np.random.default_rng(seed), (4, 3), dtype)
        exact = nc.global_norm([grad]) / 3.0
        for bound in (exact * (1 - 2**-52), exact * 0.75, 0.0, exact * 1.25):
            groups = nc.ParamGroups([nc.Group("g", param, clip=nc.ByGlobalNorm(bound))])
            groups.set_grads({"w": grad})
            report = groups.clip(unscale=3.0)
            if bound < exact:
                assert_within([grad], [groups.grads["w"]], Fraction(bound) ** 2)
            wanted = reference.wide(grad) / 3.0 * min(1.0, bound / exact)
            units = 2 * float(reference.roundoff_units([grad.dtype]))
            np.testing.assert_allclose(reference.wide(groups.grads["w"]), wanted, rtol=units)
            assert report.norm == pytest.approx(exact, rel=1e-15)
    for wrong in (0.0, -1.0, math.nan, math.inf, "2"):
        before = snapshot(groups)
        with pytest.raises((TypeError, ValueError), match="unscale: "):
            groups.clip(unscale=wrong)
        assert snapshot(groups) == before


@pytest.mark.parametrize("rule", [None, nc.ByNorm(0.4), nc.ByGlobalNorm(1e9)], ids=repr)
def test_a_loss_scale_costs_float64_no_precision_beside_float32(rule):
    members = {"w": np.ones((4, 3)), "v": np.ones((4, 3), "f")}
    groups = nc.ParamGroups([nc.Group("g", members, clip=rule)])
    grads = grads_of(groups)
    groups.set_grads(grads)
    groups.clip(unscale=3.0)
    wanted = grads["w"] / 3.0
    if isinstance(rule, nc.ByNorm):
        wanted = reference.clip_by_norm(wanted, 0.4)
    np.testing.assert_allclose(groups.grads["w"], wanted, rtol=1e-13)


@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_extreme_loss_scales(scale):
    wanted = np.array([3.0, 4.0])
    groups = nc.ParamGroups(
        [nc.Group("g", {"w": wanted}, clip=nc.ByGlobalNorm(1e200), nonfinite="raise")]
    )
    for size in (1e30, 1e-30, 1.0):
        groups.set_grads({"w": wanted * scale * size})
        assert groups.clip(unscale=scale).norm == pytest.approx(5 * size, rel=1e-14)
        np.testing.assert_allclose(groups.grads["w"], wanted * size, rtol=1e-14)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_norm_beyond_float64_is_clipped_and_reported(sparse):
    param, values = np.ones((2, 2)), np.full((2, 2), 1.7e308)
    rule = nc.ByGlobalNorm(1.0)
    groups = nc.ParamGroups(
        [nc.Group("g", {"w": param}, clip=rule, sparse=sparse, nonfinite="raise")]
    )
    groups.grads["w"] = nc.IndexedSlices(values, [1, 1], (2, 2)) if sparse else values
    report = groups.clip()
    assert report.norm == math.inf
    assert not report.nonfinite
    assert nc.global_norm([groups.grads["w"]]) == pytest.approx(1.0, rel=1e-14)
    for part in (report, report.groups["g"], report.tensors["w"]):
        assert part.clipped_norm == pytest.approx(1.0, rel=1e-14)


# ---- what is not finite


def policy_groups(policy, rule=None, poison=math.nan):
    rule = rule or nc.ByGlobalNorm(0.5)
    members = [
        nc.Group("first", {"a": np.ones(4)}, clip=nc.ByGlobalNorm(0.5), nonfinite="zero"),
        nc.Group("bad", {"w": np.ones((4, 3)), "v": np.ones(3)}, clip=rule, nonfinite=policy),
        nc.Group("last", {"z": np.ones(4)}, clip=nc.ByNorm(0.5)),
    ]
    groups = nc.ParamGroups(members)
    grads = grads_of(groups)
    grads["w"][1, 2] = poison
    groups.set_grads(grads)
    return groups, grads


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("rule", NORM_RULES, ids=repr)
def test_policies(rule, poison):
    groups, grads = policy_groups("raise", rule, poison)
    groups.grads["a"][0] = math.nan  # its group would be rewritten
    before = snapshot(groups)
    with pytest.raises(nc.NonFiniteGradientError, match=r"bad.*w.*index 5, 1 of 12") as caught:
        groups.clip()
    assert (caught.value.index, caught.value.name) == (5, "w")
    assert snapshot(groups) == before
    for policy in ("skip", "zero", "propagate"):
        groups, grads = policy_groups(policy, rule, poison)
        state = frozen(groups["bad"].rule_state)
        report = groups.clip()
        assert frozen(groups["bad"].rule_state) == state
        found = report.groups["bad"]
        assert found.nonfinite
        assert found.skipped == (policy == "skip")
        assert report.skipped == found.skipped
        assert not report.groups["first"].nonfinite
        for name in ("a", "z"):
            assert_same_bits(groups.grads[name], nc.clip_by_norm(grads[name], 0.5))
        if policy == "skip":
            assert_same_bits(groups.grads["w"], grads["w"])
            assert_same_bits(groups.grads["v"], grads["v"])
            continue
        if policy == "zero":
            grads["w"][1, 2] = 0.0
        assert math.isfinite(report.norm) == (policy == "zero")
        assert_as_by_functions(groups, grads, report)


def test_groups_that_share_a_norm_are_skipped_together():
    rule = nc.ByGlobalNorm(0.5, shared="joint")
    make = {"clip": rule, "nonfinite": "skip"}
    groups = nc.ParamGroups(
        [nc.Group("a", {"a": np.ones(3)}, **make), nc.Group("b", {"b": np.ones(3)}, **make)]
    )
    groups.set_grads({"a": np.array([1.0, math.inf, 2.0]), "b": np.ones(3)})
    before = {name: frozen(grad) for name, grad in groups.grads.items()}
    report = groups.clip()
    assert {name: frozen(grad) for name, grad in groups.grads.items()} == before
    assert report.groups["a"].skipped
    assert report.groups["b"].skipped
    for order, norm in ((1, 3.0), (2, math.sqrt(3.0)), (3, 3.0 ** (1 / 3)), (math.inf, 1.0)):
        make = {"clip": nc.ByNorm(9.0, ord=order), "nonfinite": "skip"}
        alone = nc.ParamGroups([nc.Group("g", {"a": np.ones(3), "b": np.ones(3)}, **make)])
        alone.set_grads({"a": np.array([1.0, math.nan, 2.0]), "b": np.ones(3)})
        found = alone.clip().tensors["b"]
        assert (found.norm, found.clipped_norm) == (pytest.approx(norm, rel=1e-15),) * 2
        make["clip"] = nc.ByGlobalNorm(0.5, ord=order, shared="joint")
        both = nc.ParamGroups(
            [nc.Group("a", {"a": np.ones(3)}, **make), nc.Group("b", {"b": np.ones(3)}, **make)]
        )
        both.set_grads({"a": np.array([1.0, math.nan, 2.0]), "b": np.ones(3)})
        known = both.clip().groups["b"]  # of the group alone if the order is 2, else of both
        assert known.norm == pytest.approx(norm if order == 2 else math.nan, nan_ok=True)
        assert known.clipped_norm == pytest.approx(known.norm, nan_ok=True)


@pytest.mark.full
@pytest.mark.parametrize("dtype", DTYPES)
def test_what_one_group_cleans_changes_no_bit_of_another(dtype):
    low = -5 if dtype == "float16" else -40
    for seed in range(30):
        rng = np.random.default_rng(seed)
        grad = (rng.standard_normal(200) * 10.0 ** rng.integers(low, 3)).astype(DTYPES[dtype])
        bound = 10.0 ** rng.integers(low - 2, 2)
        groups = nc.ParamGroups(
            [
                nc.Group("a", {"a": np.zeros_like(grad)}, nc.ByGlobalNorm(bound)),
                nc.Group("b", {"b": np.zeros_like(grad)}, nc.ByGlobalNorm(1.0), nonfinite="zero"),
            ]
        )
        bad = grad.copy()
        bad[7] = math.nan
        groups.set_grads({"a": grad, "b": bad})
        groups.clip()
        assert_same_bits(groups.grads["a"], nc.clip_by_global_norm([grad], bound)[0][0])


# ---- reports, schedules, history


def test_report_and_history():
    groups = nc.ParamGroups(
        [
            nc.Group("clipped", {"w": np.ones(2)}, clip=nc.ByGlobalNorm(1.0)),
            nc.Group("free", {"v": np.ones(2), "u": np.ones(1)}, clip=nc.ByNorm(10.0)),
        ],
        history=3,
    )
    for step in range(5):
        w, v, u = np.array([3.0, 4.0]) + step, np.array([0.0, 12.0]), np.array([5.0])
        groups.set_grads({"w": w, "v": v, "u": u})
        report = groups.clip()
    own, free = report.groups["clipped"], report.groups["free"]
    norm = math.hypot(7, 8)
    assert own.norm == pytest.approx(norm, rel=1e-15)
    assert own.clipped_norm == pytest.approx(1.0, rel=1e-14)
    assert own.scale == pytest.approx(1 / norm, rel=1e-14)
    assert (own.clipped, own.skipped, own.threshold, own.nonfinite) == (True, False, 1.0, False)
    assert (free.norm, free.threshold, free.scale) == (13.0, None, pytest.approx(10 / 12))
    assert free.clipped_norm == pytest.approx(math.hypot(10, 5), rel=1e-14)
    assert report.tensors["u"] == (5.0, 5.0, 1.0, 10.0)
    assert report.norm == pytest.approx(math.hypot(norm, 13), rel=1e-15)
    assert report.clipped_norm == pytest.approx(math.hypot(1, 10, 5), rel=1e-14)
    assert report.scale == own.scale
    assert (report.step, report.threshold, report.clipped) == (4, None, True)
    assert json.loads(json.dumps(report.to_dict()))["groups"]["clipped"]["norm"] == own.norm
    record = groups.history.to_dict()
    assert record["clipped"]["step"] == record["all"]["step"] == [2, 3, 4]
    assert record["clipped"]["norm"][-1] == own.norm
    assert record["all"]["clipped_norm"][-1] == report.clipped_norm
    groups.zero_grads()
    report = groups.clip()
    assert (report.norm, report.clipped, report.scale) == (0.0, False, 1.0)


@pytest.mark.parametrize(("grad", "low", "high"), [([1e10, -1e-10], 0, 1e20), ([np.inf], -1, 1)])
def test_a_clamp_is_reported(grad, low, high):
    rules = {"g": nc.ByValue(float(low), float(high)), "free": nc.ByValue(-math.inf, math.inf)}
    groups = nc.ParamGroups(
        [nc.Group(name, {name: np.ones(len(grad))}, rule) for name, rule in rules.items()]
    )
    groups.set_grads({name: np.array(grad) for name in rules})
    report = groups.clip()
    assert groups.grads["g"].tolist() != grad
    assert groups.grads["free"].tolist() == grad
    assert report.clipped
    assert (report.groups["g"].clipped, report.groups["free"].clipped) == (True, False)


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_groups_of_one_norm_report_it_and_ask_for_its_bound_once(policy):
    asked = []

    def schedule(step):
        asked.append(step)
        return 1.0

    rule = nc.ByGlobalNorm(schedule, shared="all")
    params = {"a": np.ones(3, np.float32), "b": np.ones((2, 2), np.float32)}
    groups = nc.ParamGroups(
        [nc.Group(name, {name: own}, rule, nonfinite=policy) for name, own in params.items()]
    )
    grads = {
        name: np.linspace(-3.1, 9.7, own.size).reshape(own.shape) for name, own in params.items()
    }
    for step, bad in enumerate([0.0, math.inf, -math.inf, math.nan]):
        grads["a"][0] = bad
        groups.set_grads(grads)
        norm = nc.global_norm(groups.grads)
        report = groups.clip()
        skips = bad != 0.0 and policy == "skip"
        np.testing.assert_equal(report.norm, norm)
        np.testing.assert_equal(
            report.clipped_norm, norm if skips else report.groups["b"].clipped_norm
        )
        assert (report.skipped, report.nonfinite) == (skips, bad != 0.0)
        record = groups.history.to_dict()["all"]
        for name in ("norm", "clipped_norm", "scale"):
            assert record[name][-1] == report.to_dict()[name]
        assert asked == [*range(step + 1)]


def by_units(bound):
    return nc.ByNorm(bound, axes=0)


@pytest.mark.parametrize(
    "make",
    [nc.ByNorm, nc.ByGlobalNorm, nc.ByAverageNorm, nc.ByBlockRMS, nc.Adaptive, by_units],
)
@pytest.mark.parametrize("wrong", [-1.0, math.nan, "one", None])
def test_bounds_as_functions_of_the_step(make, wrong):
    steps = []

    def schedule(step):
        steps.append(step)
        return [0.5, 0.25][step] if step < 2 else wrong

    groups, _ = policy_groups("propagate", make(schedule))
    fixed, _ = policy_groups("propagate", make(0.5))
    for g in (fixed, groups):
        g.set_grads(grads_of(g))
        first = g.clip()
    assert frozen(groups.grads) == frozen(fixed.grads)
    groups.set_grads(grads_of(groups))
    reports = first, groups.clip()
    assert set(steps) == {0, 1}
    for name, record in groups.history.to_dict().items():
        thresholds = [(r if name == "all" else r.groups[name]).threshold for r in reports]
        assert record["threshold"] == thresholds
    groups.set_grads(grads_of(groups))
    groups.grads["a"][0] = math.nan  # to be zeroed in a group that comes first
    before = snapshot(groups)
    with pytest.raises((TypeError, ValueError), match=r"\(step=2\): expected"):
        groups.clip()
    assert snapshot(groups) == before

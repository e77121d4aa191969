"""Gradients given to a step: read where they lie, with the bits that buffers of ours give."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip.clipping.buffers import GroupState
from numclip.host.given import Given
from tests.oracle.cases import fortran, normal, slices, strided
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import RULES, frozen
from tests.oracle.plain_optim import PlainAdam
from tests.oracle.reference import DTYPES

SHAPES = {"w": (4, 3), "b": (3,), "scalar": (), "none": (0, 2)}
OPTIMIZERS = {
    "SGD": lambda groups: nc.SGD(groups, lr=0.5),
    "momentum": lambda groups: nc.SGD(groups, 0.5, momentum=0.9, nesterov=True, weight_decay=0.1),
    "Adam": lambda groups: nc.Adam(groups, lr=0.1, weight_decay=0.1),
}
REAL_RULES = [rule for rule in RULES if getattr(rule, "scope", "") != "element"]


def grads_for(groups: nc.ParamGroups, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: slices(rng, 5, param.shape, param.dtype.name, repeated=True)
        if group.sparse
        else normal(rng, param.shape, param.dtype)
        for group in groups
        for name, param in group.params.items()
    }


def left_of(groups: nc.ParamGroups, optimizer: Any) -> Any:
    """What steps leave behind: parameters, states, counts, rules, history."""
    return frozen(groups.state_dict()), frozen(optimizer.state_dict())


def make(device: str, members: Any, optimizer: str) -> tuple[nc.ParamGroups, Any]:
    groups = nc.ParamGroups(members(), device=device)
    return groups, OPTIMIZERS[optimizer](groups)


def assert_same_both_ways(
    device: str, members: Any, optimizer: str, steps: Any, unscale: float = 1.0
) -> None:
    """Compare `step(grads)` with `set_grads` and `step`; the gradients stay as they are."""
    given_to, set_in = (make(device, members, optimizer) for _ in range(2))
    for grads in steps(given_to[0]):
        before = frozen(grads)
        set_in[0].set_grads(grads)
        wanted = repr(set_in[1].step(unscale=unscale).to_dict())
        assert repr(given_to[1].step(grads, unscale=unscale).to_dict()) == wanted
        assert frozen(grads) == before
        assert left_of(*given_to) == left_of(*set_in)


# ---- the same bits


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("policy", ["propagate", "skip", "zero"])
@pytest.mark.parametrize("rule", RULES, ids=repr)
@pytest.mark.many_calls
@pytest.mark.full
def test_any_rule(target, rule, policy, optimizer):
    def members():
        rng = np.random.default_rng(0)
        params = {name: normal(rng, shape, "float32") for name, shape in SHAPES.items()}
        return [nc.Group("g", params, clip=rule, nonfinite=policy)]

    def steps(groups):
        for seed in range(4):
            grads = grads_for(groups, seed)
            if seed == 2:
                grads["b"][1] = math.inf
            yield grads

    with np.errstate(all="ignore"):
        assert_same_both_ways(target.device, members, optimizer, steps)


@given(st.data())
def test_any_groups(data):
    dtypes = [data.draw(st.sampled_from(sorted(DTYPES))) for _ in range(2)]
    rules = [data.draw(st.sampled_from(REAL_RULES)) for _ in range(2)]
    sparse = data.draw(st.booleans())
    if sparse and getattr(rules[1], "scope", "") == "unit":
        rules[1] = None

    def members():
        rng = np.random.default_rng(0)
        first = {name: normal(rng, shape, dtypes[0]) for name, shape in SHAPES.items()}
        last = {"z": normal(rng, (6, 2), dtypes[1])}
        return [
            nc.Group("first", first, clip=rules[0], lr=0.25),
            nc.Group("last", last, clip=rules[1], sparse=sparse),
        ]

    def steps(groups):
        for seed in range(3):
            grads = grads_for(groups, seed)
            order = data.draw(st.permutations(sorted(grads)))
            yield {name: grads[name] for name in order}

    with np.errstate(all="ignore"):
        optimizer = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
        unscale = data.draw(st.sampled_from([1.0, 3.0, 1024.0]))
        assert_same_both_ways("cpu", members, optimizer, steps, unscale)


def unusual(draw: Any, array: np.ndarray) -> Any:
    """Return a gradient of an array's shape in another dtype or order, or no gradient at all."""
    kind = draw(st.sampled_from(["dtype"] * 3 + ["order"] * 3 + ["plain", "none", "odd", "shape"]))
    if kind == "dtype":
        array = array * draw(st.sampled_from([1.0, 1e4, 1e30]))
        return array.astype(DTYPES[draw(st.sampled_from(sorted(DTYPES)))])
    if kind == "order":
        return strided(array) if array.ndim and draw(st.booleans()) else fortran(array)
    if kind == "odd":
        odd = array.astype("i4"), array.tolist(), np.ma.masked_array(array), array.astype(">f4")
        return draw(st.sampled_from([*odd, array[()]]))
    return {"plain": array, "none": None, "shape": array[..., None]}[kind]


@pytest.mark.full
@given(st.data())
def test_gradients_that_are_copied_have_the_bits_of_the_general_way(data):
    """Of other dtypes and orders: cast, added or refused alike, by whichever way they come."""
    dtype = DTYPES[data.draw(st.sampled_from(sorted(DTYPES)))]
    policy = data.draw(st.sampled_from(["propagate", "skip", "zero", "raise"]))
    arrays = {name: normal(np.random.default_rng(1), s, "float64") for name, s in SHAPES.items()}
    calls = data.draw(st.lists(st.sampled_from(["set_grads", "accumulate", "step"]), max_size=3))
    with np.errstate(all="ignore"):
        steps = [(call, {k: unusual(data.draw, a) for k, a in arrays.items()}) for call in calls]

    def left() -> list[Any]:
        params = {name: np.ones(shape, dtype) for name, shape in SHAPES.items()}
        groups = nc.ParamGroups([nc.Group("g", params, nc.ByGlobalNorm(0.5), nonfinite=policy)])
        optimizer, found = nc.SGD(groups, lr=0.5), list[Any]()
        for call, grads in steps:
            before = frozen(grads)
            try:
                found.append(repr(getattr(optimizer if call == "step" else groups, call)(grads)))
            except (ArithmeticError, TypeError, ValueError) as error:
                found.append(str(error))
            assert frozen(grads) == before
            found += [frozen(groups.state_dict()), [frozen(groups["g"].seen(k)) for k in SHAPES]]
        return found

    with np.errstate(all="ignore"), pytest.MonkeyPatch.context() as patch:
        found = left()
        patch.setattr(Given, "copies", lambda *_, **__: None)
        assert found == left()


@pytest.mark.full
def test_little_gradients_of_any_order_and_dtype_are_taken_by_one_call(monkeypatch):
    params = {"w": np.ones((4, 3), "f"), "b": np.float32(1)}
    groups = nc.ParamGroups([nc.Group("g", params, nc.ByGlobalNorm(1.0))])
    optimizer = nc.SGD(groups, lr=1.0)
    monkeypatch.setattr(GroupState, "fitting", None)  # of the general way
    for w in (np.full((4, 3), 2.0), fortran(np.full((4, 3), 2.0)), np.full((4, 6), 2.0)[:, ::2]):
        groups.set_grads({"w": w, "b": np.float64(1.0)})
        assert groups.clip().norm == 7.0
        assert optimizer.step({"w": w, "b": w.sum(dtype="f") * 0 + 1}).norm == 7.0


@pytest.mark.jit_only
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize(
    "rule", [None, nc.ByGlobalNorm(1e-39), nc.ByNorm(0.5, ord=3), nc.AutoClip(50)], ids=repr
)
@pytest.mark.parametrize("factor", [1.0, 1e-40, math.nan])
@pytest.mark.each_value
@pytest.mark.full
def test_much_data(dtype, rule, factor):
    """More than is copied; some of it so small that results are subnormal, or not finite."""

    def members():
        rng = np.random.default_rng(0)
        params = {"w": normal(rng, (1100, 1000), dtype), "b": normal(rng, (3,), dtype)}
        other = {"v": normal(rng, (900, 900), "float64")}
        return [nc.Group("g", params, clip=rule), nc.Group("h", other, clip=nc.ByGlobalNorm(0.5))]

    def steps(groups):
        for seed in range(2):
            grads = grads_for(groups, seed)
            grads["b"] *= np.float32(factor)
            yield grads

    with np.errstate(all="ignore"):
        assert_same_both_ways("cpu", members, "Adam", steps)


@pytest.mark.jit_only
def test_much_data_is_not_copied():
    params = {"w": np.ones((1100, 1000), np.float32)}
    groups = nc.ParamGroups([nc.Group("g", params, clip=nc.ByGlobalNorm(0.5))])
    nc.SGD(groups, lr=0.5).step({"w": np.ones((1100, 1000), np.float32)})
    assert not groups.grads["w"].any()
    assert groups.params["w"][0, 0] < 1


# ---- gradients of other kinds are copied


@pytest.mark.parametrize(
    "changed",
    [
        lambda grad: grad.astype(np.float64),
        lambda grad: grad.astype(np.float16),
        fortran,
        strided,
        lambda grad: grad.astype(">f4"),
        lambda grad: np.lib.stride_tricks.as_strided(grad[:1], grad.shape, (0, grad.strides[1])),
    ],
    ids=["wider", "narrower", "fortran", "strided", "swapped", "repeated"],
)
@pytest.mark.full
def test_gradients_of_other_kinds(target, changed):
    def members():
        return [nc.Group("g", {"w": np.ones((4, 3), np.float32)}, clip=nc.ByGlobalNorm(0.5))]

    def steps(_groups):
        for seed in range(2):
            yield {"w": changed(normal(np.random.default_rng(seed), (4, 3), "float32"))}

    assert_same_both_ways(target.device, members, "Adam", steps)


def test_gradients_that_are_parameters_or_states():
    """All are read before anything is written."""
    start = {"a": np.arange(6.0), "b": np.arange(6.0)[::-1].copy()}
    groups = nc.ParamGroups([nc.Group("g", start)])
    a, b = groups.params["a"], groups.params["b"]
    nc.SGD(groups, lr=0.5).step({"a": b, "b": a})
    assert_same_bits(a, start["a"] - 0.5 * start["b"])
    assert_same_bits(b, start["b"] - 0.5 * start["a"])
    flat = groups["g"].flat_params["float64"]
    before = flat.copy()
    nc.SGD(groups, lr=0.5).step({"a": flat[3:9], "b": flat[:6]})
    assert_same_bits(a, before[:6] - 0.5 * before[3:9])
    assert_same_bits(b, before[6:] - 0.5 * before[:6])
    groups.set_grads(start)
    own = dict(groups.grads)
    before = flat.copy()
    nc.SGD(groups, lr=0.5).step({"a": own["b"], "b": own["a"]})
    assert_same_bits(a, before[:6] - 0.5 * start["b"])


# ---- parameters without a gradient


@pytest.mark.parametrize("absent", ["missing", "none"])
@pytest.mark.parametrize("way", ["given", "set"])
def test_parameters_without_a_gradient_are_left(target, absent, way):
    """As an optimizer on each group alone, where only the group counts the steps."""
    start = {"a": np.array([1.0, 2.0]), "b": np.array([3.0]), "c": np.array([4.0, 5.0])}
    members = [
        nc.Group("first", {"a": start["a"], "b": start["b"]}, clip=nc.ByGlobalNorm(1.0)),
        nc.Group("last", {"c": start["c"]}, clip=nc.ByNorm(1.0)),
    ]
    groups = nc.ParamGroups(members, device=target.device)
    optimizer, plain = nc.Adam(groups, lr=0.1), PlainAdam()
    expected = {name: param.copy() for name, param in start.items()}
    counts = {"first": 0, "last": 0}
    rng = np.random.default_rng(0)
    for names in ("abc", "a", "c", "ab", "bc", "c", "abc"):
        grads = {name: normal(rng, start[name].shape, "float64") for name in names}
        present = [name for name in names if absent == "missing"]
        sent = grads if present else {name: grads.get(name) for name in start}
        if way == "given":
            report = optimizer.step(sent)
        else:
            groups.set_grads(grads)
            report = optimizer.step()
        for group, members_of in (("first", "ab"), ("last", "c")):
            own = {name: grad for name, grad in grads.items() if name in members_of}
            if not own:
                continue
            bound = nc.clip_by_global_norm(own, 1.0)
            for name, grad in bound[0].items():
                _, *moments = plain.moments.get(name, (0, 0.0, 0.0))
                plain.moments[name] = counts[group], *moments
                expected[name] = plain.update(name, expected[name], grad, 0.1)
            counts[group] += 1
            assert report.groups[group].norm == pytest.approx(bound[1])
        for name, wanted in expected.items():
            np.testing.assert_allclose(np.asarray(groups.params[name]), wanted, rtol=1e-12)
    states = optimizer.state_dict()["groups"]
    assert {name: own["steps"] for name, own in states.items()} == counts


@pytest.mark.parametrize(
    "rule", [nc.AutoClip(50), nc.ZClip(warmup=2), nc.AdaGC(warmup=2)], ids=repr
)
@pytest.mark.full
def test_rules_see_no_norm_of_what_is_absent(rule):
    start = {"a": np.ones(2), "b": np.ones(3)}
    alone = [nc.ParamGroups([nc.Group(n, {n: p}, clip=rule)]) for n, p in start.items()]
    both = nc.ParamGroups([nc.Group(n, {n: p}, clip=rule) for n, p in start.items()])
    optimizers = [nc.SGD(groups, lr=0.1) for groups in alone]
    optimizer = nc.SGD(both, lr=0.1)
    for step in range(8):
        name = "abba"[step % 4]
        grads = {name: np.full_like(start[name], step + 1.0)}
        optimizers["ab".index(name)].step(grads)
        optimizer.step(grads)
    for groups in alone:
        for group in groups:
            assert frozen(both[group.name].rule_state) == frozen(group.rule_state)
            assert_same_bits(both.params[group.name], groups.params[group.name])


def test_a_tensor_that_is_absent_keeps_its_norms():
    rule = nc.AdaGC(warmup=1)
    groups = nc.ParamGroups([nc.Group("g", {"a": np.ones(2), "b": np.ones(3)}, clip=rule)])
    optimizer = nc.SGD(groups, lr=0.1)
    for _ in range(3):
        optimizer.step({"a": np.ones(2), "b": np.ones(3)})
    before = groups["g"].rule_state["gamma"][1]
    for _ in range(5):
        optimizer.step({"a": np.ones(2)})
    assert groups["g"].rule_state["gamma"][1] == before


# ---- errors change nothing


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"w": np.ones((4, 3)), "x": np.ones(2)}, KeyError, "'x' is no parameter"),
        ({"w": np.ones((3, 4)), "b": np.ones(3)}, ValueError, r"grads\['w'\]: expected shape"),
        ({"w": np.ones((4, 3), int)}, TypeError, r"grads\['w'\]: "),
        ({"w": np.ones((4, 3), complex)}, TypeError, r"grads\['w'\]: "),
        ({"w": np.full((4, 3), math.nan), "b": np.ones(3)}, ArithmeticError, "w.*index 0"),
        (5.0, TypeError, "grads: "),
    ],
)
@pytest.mark.parametrize("rule", [None, nc.AutoClip(50)], ids=repr)
@pytest.mark.each_value
@pytest.mark.many_calls
@pytest.mark.full
def test_errors_change_nothing(target, grads, error, message, rule):
    params = {"w": np.ones((4, 3)), "b": np.ones(3)}
    group = nc.Group("g", params, clip=rule, nonfinite="raise")
    groups = nc.ParamGroups([group], device=target.device)
    optimizer = nc.Adam(groups, lr=0.1)
    optimizer.step({"w": np.ones((4, 3)), "b": np.ones(3)})
    before = left_of(groups, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step(grads)
    assert left_of(groups, optimizer) == before
    with pytest.raises((TypeError, ValueError), match="unscale"):
        optimizer.step(params, unscale=0.0)
    assert left_of(groups, optimizer) == before


# ---- measuring what is given


@pytest.mark.parametrize("rule", [RULES[k] for k in (1, 2, 8, 12, 13)], ids=repr)
@pytest.mark.full
def test_measuring_given_gradients(target, rule):
    def members():
        params = {"w": np.ones((4, 3)), "b": np.ones(3)}
        scales = getattr(rule, "scope", "") not in ("element", "unit")
        group = nc.Group("sparse", {"e": np.ones((6, 2))}, clip=nc.ByNorm(0.5), sparse=True)
        return [nc.Group("dense", params, clip=rule)] + [group] * scales

    groups, other = (nc.ParamGroups(members(), device=target.device) for _ in range(2))
    groups.set_grads(grads_for(groups, 0))
    before = frozen(dict(groups.grads)), frozen(groups.state_dict())
    grads = grads_for(groups, 1)
    given_to = groups.clip(apply=False, grads=grads, unscale=2.0)
    found = repr(given_to.to_dict())
    assert (frozen(dict(groups.grads)), frozen(groups.state_dict())) == before
    other.set_grads(grads)
    assert found == repr(other.clip(apply=False, unscale=2.0).to_dict())
    with pytest.raises(ValueError, match=r"grads: .*step\(grads\).*clip_by_global_norm"):
        groups.clip(grads=grads)
    assert (frozen(dict(groups.grads)), frozen(groups.state_dict())) == before


# ---- copying in by one call


@given(st.sampled_from(sorted(DTYPES)), st.data())
def test_setting_and_accumulating(dtype, data):
    rng = np.random.default_rng(0)
    params = {name: normal(rng, shape, dtype) for name, shape in SHAPES.items()}
    groups = nc.ParamGroups([nc.Group("g", params)])
    expected = {name: np.zeros_like(param) for name, param in params.items()}
    for _ in range(4):
        names = data.draw(st.lists(st.sampled_from(sorted(SHAPES)), unique=True))
        grads = {name: normal(rng, SHAPES[name], dtype) for name in names}
        if data.draw(st.booleans()) and names:
            grads[names[0]] = None
        if data.draw(st.booleans()):
            groups.accumulate(grads)
            for name in names:
                expected[name] = expected[name] + (0 if grads[name] is None else grads[name])
                expected[name] = expected[name].astype(dtype)
        else:
            groups.set_grads(grads)
            for name in names:
                zero = np.zeros_like(params[name])
                expected[name] = zero if grads[name] is None else grads[name]
        for name, wanted in expected.items():
            assert_same_bits(groups.grads[name], wanted)


@pytest.mark.jit_only
@pytest.mark.parametrize("dtypes", [["float32"], ["float32", "complex128"]])
def test_setting_much(dtypes):
    rng = np.random.default_rng(0)
    params = {dtype: normal(rng, (1100, 1000), dtype) for dtype in dtypes} | {"x": np.ones(3)}
    groups = nc.ParamGroups([nc.Group("g", params)])
    groups.set_grads(params)
    groups.accumulate(params)
    for name, param in params.items():
        assert_same_bits(groups.grads[name], param + param)
    groups.set_grads(dict.fromkeys(params))
    assert not any(grad.any() for grad in groups.grads.values())


def test_copying_in_goes_wrong_for_none_or_all():
    groups = nc.ParamGroups([nc.Group("g", {"a": np.zeros(3), "b": np.zeros(3)})])
    for call in (groups.set_grads, groups.accumulate):
        for bad in (np.ones(4), np.ones(3, complex), "x", np.ma.masked_array(np.ones(3))):
            with pytest.raises((TypeError, ValueError), match=r"grads\['b'\]"):
                call({"a": np.ones(3), "b": bad})
            assert not groups.grads["a"].any()
        with pytest.raises(TypeError, match="grads: "):
            call(3.0)
    groups.set_grads({"a": np.ones(3), "b": np.full(3, 2.0)})
    groups.set_grads({"a": groups.grads["b"], "b": groups.grads["a"]})
    assert groups.grads["a"].tolist() == [2, 2, 2]
    assert groups.grads["b"].tolist() == [1, 1, 1]
    groups.accumulate({"b": groups.grads["a"], "a": groups.grads["b"]})
    assert groups.grads["a"].tolist() == groups.grads["b"].tolist() == [3, 3, 3]


# ---- nested gradients

NESTED = {
    "enc": [{"W": np.ones((4, 3)), "b": np.ones(3)}, {"W": np.full((3, 2), 2.0), "b": np.ones(2)}],
    "act": (),
    "out": (np.full(2, 3.0), {"scale": np.array(1.0)}),
}
NAMES = ["enc.0.W", "enc.0.b", "enc.1.W", "enc.1.b", "out.0", "out.1.scale"]


def like(tree: Any, make: Any) -> Any:
    """The same structure of other arrays."""
    if isinstance(tree, dict):
        return {key: like(part, make) for key, part in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)([like(part, make) for part in tree])
    return make(tree)


def backward(tree: Any) -> Any:
    """The same structure with its keys in another order."""
    if isinstance(tree, dict):
        return {key: backward(tree[key]) for key in reversed(tree)}
    return type(tree)(map(backward, tree)) if isinstance(tree, (list, tuple)) else tree


def flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    pairs = tree.items() if isinstance(tree, dict) else enumerate(tree)
    found: dict[str, Any] = {}
    for key, part in pairs:
        is_inner = isinstance(part, (dict, list, tuple))
        found |= flat(part, f"{prefix}{key}.") if is_inner else {f"{prefix}{key}": part}
    return found


@pytest.mark.parametrize("change", [lambda tree: tree, backward, flat])
@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(1.0), nc.AutoClip(50)], ids=repr)
@pytest.mark.each_value
def test_nested_gradients(target, change, rule):
    nested, named = (
        nc.ParamGroups([nc.Group("g", params, clip=rule)], device=target.device)
        for params in (NESTED, flat(NESTED))
    )
    assert list(nested.params) == list(named.params) == NAMES
    optimizers = [nc.Adam(groups, lr=0.1) for groups in (nested, named)]
    for seed in range(4):
        rng = np.random.default_rng(seed)
        grads = like(NESTED, lambda array, rng=rng: normal(rng, array.shape, "float64"))
        if seed % 2:
            optimizers[0].step(change(grads))
            optimizers[1].step(flat(grads))
        else:
            nested.set_grads(change(grads))
            nested.accumulate(change(grads))
            named.set_grads({name: grad + grad for name, grad in flat(grads).items()})
            assert repr(nested.clip(apply=False, grads=change(grads)).norm) == repr(
                named.clip(apply=False, grads=flat(grads)).norm
            )
            for optimizer in optimizers:
                optimizer.step()
        assert left_of(nested, optimizers[0]) == left_of(named, optimizers[1])


def test_nested_gradients_of_several_groups_and_in_part():
    enc, out = ({key: NESTED[key]} for key in ("enc", "out"))
    groups = nc.ParamGroups([nc.Group("enc", enc), nc.Group("out", out)])
    optimizer = nc.SGD(groups, lr=0.5)
    for _ in range(3):
        groups.set_grads(NESTED)
        for name, array in flat(NESTED).items():
            assert_same_bits(groups.grads[name], array)
    optimizer.step({"enc": [{"W": np.ones((4, 3))}], "out": (None, {})})
    for name, array in flat(NESTED).items():
        assert_same_bits(groups.params[name], array - (0.5 if name == "enc.0.W" else 0.0))
    listed = nc.ParamGroups([nc.Group("g", [np.ones(2), np.ones(3)])])
    for _ in range(2):
        nc.SGD(listed, lr=0.5).step([np.ones(2), None])
    assert [param.tolist() for param in listed.params.values()] == [[0, 0], [1, 1, 1]]


@pytest.mark.parametrize(
    ("grads", "error", "message"),
    [
        ({"enc": [{"W": np.ones(5)}]}, ValueError, r"grads\['enc.0.W'\]: expected shape"),
        ({"enc": [{"X": np.ones(5)}]}, KeyError, r"'enc.0.X' is no parameter"),
        ({"enc": {0: np.ones(5)}}, TypeError, "grads: expected str names, got 0"),
        ({"out.0": np.ones(2), "out": (np.ones(2),)}, ValueError, "two items .*'out.0'"),
        (np.ones(3), TypeError, "grads: expected a mapping by name"),
    ],
)
@pytest.mark.full
def test_nested_gradients_that_do_not_fit(grads, error, message):
    groups = nc.ParamGroups([nc.Group("g", NESTED)])
    for call in (groups.set_grads, groups.accumulate, nc.SGD(groups, lr=1.0).step):
        with pytest.raises(error, match=message):
            call(grads)
    with pytest.raises(ValueError, match=r"params: two items .*'a.b'"):
        nc.Group("g", {"a": {"b": np.ones(1)}, "a.b": np.ones(1)})


class Popping(str):
    """A key whose comparison takes another key away."""

    __slots__ = ("owner",)

    def __eq__(self, other):
        self.owner.pop("b", None)
        return str.__eq__(self, other)

    __hash__ = str.__hash__


def test_a_dict_that_changes_meanwhile_is_read_as_it_was():
    groups = nc.ParamGroups([nc.Group("g", {"a": np.zeros(2), "b": np.zeros(2)})])
    key = Popping("a")
    key.owner = grads = {key: np.ones(2), "b": np.full(2, 2.0)}
    groups.set_grads(grads)
    assert [grad.tolist() for grad in groups.grads.values()] == [[1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("call", ["set_grads", "accumulate", "step"])
def test_an_ellipsis_is_no_gradient(call):
    groups = nc.ParamGroups([nc.Group("g", {"a": np.zeros(2), "b": np.zeros(2)})])
    act = nc.SGD(groups, 0.1).step if call == "step" else getattr(groups, call)
    with pytest.raises(TypeError, match=r"grads\['a'\]: .*got ellipsis"):
        act({"a": ..., "b": np.ones(2)})


@pytest.mark.parametrize("size", [10, 2_000_000])
def test_an_error_names_the_gradient_that_was_read(size):
    rule = nc.ByGlobalNorm(1.0)
    groups = nc.ParamGroups([nc.Group("g", {"W": np.zeros(size)}, rule, nonfinite="raise")])
    groups.grads["W"][3] = np.inf  # which is not the step's
    grad = np.ones(size)
    grad[5] = np.nan
    with pytest.raises(nc.NonFiniteGradientError, match=r"g\.W is not finite: nan at flat index 5"):
        nc.SGD(groups, 0.1).step({"W": grad})
    assert not groups.params["W"].any()


def test_groups_without_a_gradient_do_not_count_the_step():
    params = {name: {name.lower(): np.zeros(1, np.float32)} for name in "AB"}
    rule = nc.ByGlobalNorm(9.0)
    groups = nc.ParamGroups([nc.Group(name, own, rule) for name, own in params.items()])
    optimizer = nc.Adam(groups, 1.0)
    optimizer.step({"b": np.ones(1, np.float32)})
    optimizer.step({"a": np.ones(1, np.float32)})
    saved = optimizer.state_dict()["groups"]
    assert [saved[name]["steps"] for name in "AB"] == [1, 1]
    np.testing.assert_allclose(groups.params["a"], -1.0)


def test_gradients_of_two_dtypes_add_up():
    groups = nc.ParamGroups([nc.Group("g", {"a": np.zeros(3, "f"), "b": np.zeros(2)})])
    grads = {"a": np.arange(3, dtype="f"), "b": np.ones(2)}
    for _ in range(3):
        groups.accumulate(grads)
    assert groups.grads["a"].tolist() == [0.0, 3.0, 6.0]
    assert groups.grads["b"].tolist() == [3.0, 3.0]

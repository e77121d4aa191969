"""Clips and steps with sparse gradients by one native call give what several calls give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip.clipping.held_rows import RowTaker
from numclip.clipping.intake import Intake
from numclip.clipping.steps import Steps
from numclip.clipping.updating import GroupUpdater
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import frozen
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import from_bits, in_band

RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(2.0, shared="both"),
    nc.ByGlobalNorm(1e-40),
    nc.ByGlobalNorm(lambda step: 3.0 / (1 + step)),
    nc.ByNorm(0.4),
    nc.ByAverageNorm(0.05),
    nc.AutoClip(percentile=40),
    nc.AdaGC(warmup=1),
    nc.ZClip(warmup=1, max_norm=4.0),
]
OPTIMIZERS = {
    "SGD": lambda groups: nc.SGD(groups, lr=0.5, weight_decay=0.1),
    "momentum": lambda groups: nc.SGD(groups, lr=0.5, momentum=0.9, nesterov=True),
    "Adam": lambda groups: nc.Adam(groups, lr=0.1, weight_decay=0.1),
}
SPARSE = {"e": (6, 3), "f": (4,), "none": (3, 0, 2)}
OPERATIONS = ["set", "accumulate", "some", "zero", "measure", "clip", "step", "given", "given some"]


def members(dtype: str, rules: Any, policies: Any, masters: Any = None) -> list[nc.Group]:
    rng = np.random.default_rng(0)
    dense = {"w": normal(rng, (4, 2), dtype), "b": normal(rng, (3,), dtype)}
    rows = {name: normal(rng, shape, dtype) for name, shape in SPARSE.items()}
    return [
        nc.Group("dense", dense, rules[0], nonfinite=policies[0], master=masters),
        nc.Group("rows", rows, rules[1], nonfinite=policies[1], sparse=True, master=masters),
    ]


def numbers(rng: np.random.Generator, shape: Any, dtype: np.dtype, kind: str) -> np.ndarray:
    size = math.prod(shape)
    if kind == "any":
        return from_bits(rng, size, dtype).reshape(shape)
    array = in_band(rng, size, dtype, -200 if kind == "subnormal" else -2, 4)
    if kind == "bad" and size:
        array[rng.integers(size)] = rng.choice([np.nan, np.inf])
    return array.reshape(shape)


def gradients(rng: np.random.Generator, groups: Any, kind: str) -> dict[str, Any]:
    """Rows unsorted, repeated or not, or none at all; some gradients are absent."""
    found: dict[str, Any] = {}
    for group in groups:
        for name, param in group.updated.items():
            if rng.random() < 0.1:
                found[name] = None
                continue
            if not group.sparse:
                found[name] = numbers(rng, param.shape, param.dtype, kind)
                continue
            rows = int(rng.integers(0, 12)) if param.shape[0] else 0
            values = numbers(rng, (rows, *param.shape[1:]), param.dtype, kind)
            indices = rng.integers(0, param.shape[0], rows)
            if rng.random() < 0.3:  # that cancel
                values = np.concatenate([values, -values])
                indices = np.concatenate([indices, indices])
            found[name] = nc.IndexedSlices(values, indices, param.shape)
    return found


def done(groups: Any, optimizer: Any, operation: str, grads: Any, unscale: float) -> Any:
    """Do something; return what it tells."""
    some = dict(list(grads.items())[1:-1])
    if operation in ("set", "accumulate", "some"):
        method = groups.accumulate if operation == "accumulate" else groups.set_grads
        method(some if operation == "some" else grads)
        return None
    if operation == "zero":
        groups.zero_grads()
        return None
    report = {
        "measure": lambda: groups.clip(apply=False, unscale=unscale),
        "clip": lambda: groups.clip(unscale=unscale),
        "step": optimizer.step,
        "given": lambda: optimizer.step(grads, unscale=unscale),
        "given some": lambda: optimizer.step(some),
    }[operation]()
    return repr(report.to_dict())


def left(make: Any, optimizer: str, operations: Any, kinds: Any, unscale: float) -> list[Any]:
    """Do one thing after another; return all that is left after each."""
    groups = nc.ParamGroups(make())
    made = OPTIMIZERS[optimizer](groups)
    rng, found = np.random.default_rng(1), []
    for operation, kind in zip(operations, kinds, strict=True):
        grads = gradients(rng, groups, kind)
        before = frozen(grads)
        try:
            found.append(done(groups, made, operation, grads, unscale))
        except nc.NonFiniteGradientError as error:
            found.append(str(error))
        assert frozen(grads) == before
        if "given" in operation:
            groups.zero_grads()  # after which they are defined
        seen = {name: groups["rows"].seen(name) for name in SPARSE}
        found.append((frozen(seen), frozen(made.state_dict()), frozen(groups.state_dict())))
    return found


@contextmanager
def in_parts() -> Iterator[None]:
    """Let nothing be done by one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "clip_at_once", lambda *_: False)
        patch.setattr(RowTaker, "take", lambda *_, **__: False)
        patch.setattr(GroupUpdater, "_ready", lambda *_: None)
        yield


def assert_same_both_ways(*case: Any) -> None:
    with np.errstate(all="ignore"):
        at_once = left(*case)
        with in_parts():
            for k, (found, wanted) in enumerate(zip(at_once, left(*case), strict=True)):
                assert found == wanted, (k, case)


@given(st.data())
def test_any_sequence(data):
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    rules = [data.draw(st.sampled_from(RULES)) for _ in range(2)]
    policy = st.sampled_from(["propagate", "skip", "zero", "raise"])
    policies = (
        [data.draw(policy)] * 2 if rules[0] is rules[1] else [data.draw(policy) for _ in "12"]
    )
    masters = "float32" if dtype in ("float16", "bfloat16") and data.draw(st.booleans()) else None
    operations = data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=6))
    kind = st.sampled_from(["plain", "plain", "any", "subnormal", "bad"])
    kinds = [data.draw(kind) for _ in operations]
    optimizer = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    unscale = data.draw(st.sampled_from([1.0, 1.0, 3.0, 1024.0]))

    def make():
        return members(dtype, rules, policies, masters)

    assert_same_both_ways(make, optimizer, operations, kinds, unscale)


# ---- what takes one call, and what does not


def few(dtype: str = "float32", rule: Any = None, *, masters: Any = None) -> Any:
    params = {"w": np.ones((3, 2), dtype)}, {"e": np.ones((9, 4), dtype)}
    rule = nc.ByGlobalNorm(0.5) if rule is None else rule
    groups = nc.ParamGroups(
        [
            nc.Group("dense", params[0], rule, master=masters),
            nc.Group("rows", params[1], rule, sparse=True, master=masters),
        ]
    )
    return groups, nc.Adam(groups, lr=0.1)


def few_gradients(dtype: str = "float32", seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rows = slices(rng, 6, (9, 4), dtype, repeated=True)
    return {"w": normal(rng, (3, 2), dtype), "e": rows}


@contextmanager
def at_once_alone() -> Iterator[None]:
    """Let what takes several calls be an error."""

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("several calls")

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in [(Steps, "decide"), (Steps, "leave"), (Intake, "_put_each")]:
            patch.setattr(owner, name, refuse)

        yield


@pytest.mark.parametrize("rule", [*RULES[1:3], *RULES[5:]], ids=repr)
def test_little_data_takes_one_call(rule):
    groups, optimizer = few(rule=rule)
    groups.set_grads(few_gradients())  # from now on there is memory for the rows
    groups.accumulate(few_gradients())
    with at_once_alone():
        for seed in range(3):
            grads = few_gradients(seed=seed)
            optimizer.step(grads)
            groups.set_grads(grads)
            groups.accumulate({"e": grads["e"]})
            groups.clip()
            optimizer.step()
            groups.set_grads({"e": None, "w": grads["w"]})
            optimizer.step()
    assert len(groups.history) == 9


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_masters_take_over_rows_that_are_held(dtype):
    """Rows that are given go the general way: masters take over other rows than are held."""
    both = [few(DTYPES[dtype], masters="float32") for _ in range(2)]
    for seed in range(3):
        grads = few_gradients("float32", seed)
        for groups, optimizer in both:
            groups.params["e"][seed] = 7  # to be taken over
            if groups is both[0][0]:
                optimizer.step(grads)
            else:
                groups.set_grads(grads)
                optimizer.step()
    assert frozen(both[0][0].state_dict()) == frozen(both[1][0].state_dict())


def test_values_of_other_kinds_go_the_general_way():
    values = np.random.default_rng(0).standard_normal((6, 8)).astype(np.float32)
    indices = np.array([3, 1, 3, 8, 0, 1])
    plain = nc.IndexedSlices(values[:, ::2].copy(), indices, (9, 4))
    kinds = [
        plain,
        nc.IndexedSlices(values[:, ::2], indices, (9, 4)),
        nc.IndexedSlices(values[:, ::2].astype(">f4"), indices.astype(np.uint8), (9, 4)),
        nc.IndexedSlices(values[:, ::2].astype(np.float64), indices, (9, 4)),
    ]
    results = []
    for rows in kinds:
        groups, optimizer = few()
        for grads in ({"w": np.ones((3, 2), np.float32), "e": rows}, {"e": rows}):
            optimizer.step(grads)
            groups.set_grads(grads)
            groups.accumulate({"e": rows})
            optimizer.step()
        results.append(frozen(groups.state_dict()))
    assert all(found == results[0] for found in results)


@pytest.mark.parametrize("index", [-1, 9, 1 << 40])
def test_indices_that_were_changed_are_not_used(index):
    """They are checked when slices are made; whoever sets their flags can write to them then."""
    rows = few_gradients()["e"]
    rows.indices.flags.writeable = True
    rows.indices[2] = index
    groups, _ = few()
    steps, held = groups._manager.made_steps(), groups["rows"].rows["e"]
    held.append(rows, None)
    before = held._part(0, 6).copy()
    assert steps._native is not None
    assert not steps.clip_at_once(steps.taken(0, 1.0), None, "")
    assert_same_bits(held._part(0, 6), before)
    groups.set_grads({"e": rows})
    with pytest.raises(ValueError, match="indices"):
        groups.clip()
    variable = np.ones(rows.dense_shape, rows.values.dtype)
    with pytest.raises(ValueError, match="indices"):
        nc.SGD(None, lr=1.0).apply_gradients([(rows, variable)])
    assert (variable == 1.0).all()


def test_rows_that_are_ours_are_read_before_others_are_written():
    groups, optimizer = few()
    groups.set_grads(few_gradients())
    groups.set_grads(few_gradients(seed=1))
    wanted = frozen(groups.grads["e"])
    groups.set_grads({"e": groups.grads["e"]})
    assert frozen(groups.grads["e"]) == wanted
    both = groups.grads["e"] + groups.grads["e"]
    groups.accumulate({"e": groups.grads["e"]})
    assert frozen(groups.grads["e"]) == frozen(both)
    params = groups.params["e"]
    params[...] = np.random.default_rng(0).standard_normal((9, 4))
    other, own = few()
    other.params["e"][...] = params
    own.step({"e": nc.IndexedSlices(params.copy(), range(9), (9, 4))})
    optimizer.step({"e": nc.IndexedSlices(params, range(9), (9, 4))})
    assert_same_bits(groups.params["e"], other.params["e"])


def test_much_data_is_left_to_threads():
    shape = (1 << 13, 1 << 8)
    groups = nc.ParamGroups([nc.Group("g", {"e": np.ones(shape, np.float32)}, sparse=True)])
    optimizer = nc.SGD(groups, lr=0.5)
    rows = nc.IndexedSlices(np.ones(shape, np.float32), range(shape[0]), shape)
    steps = groups._manager.made_steps()
    where = steps, steps.taken(0, 1.0), optimizer._updater.settings(0)
    assert not optimizer._updater.step_at_once(*where, (rows,), frozenset())


# ---- arrays of the user's own


@pytest.mark.each_value
@pytest.mark.parametrize("kind", ["SGD", "momentum", "Adam"])
@pytest.mark.parametrize("dtype", ["float16", "float32", "complex64"])
def test_pairs_with_rows(kind, dtype):
    """The same bits as of groups without a rule, whatever rows come."""
    groups, optimizer = few(DTYPES[dtype], rule=nc.ByGlobalNorm(math.inf))
    made = {
        "SGD": lambda of: nc.SGD(of, lr=0.5),
        "momentum": lambda of: nc.SGD(of, lr=0.5, momentum=0.5),
        "Adam": lambda of: nc.Adam(of, lr=0.1),
    }[kind]
    groups, optimizer, alone = few(DTYPES[dtype])[0], None, made(None)
    for group in groups:
        group.clip = None
    optimizer = made(groups)
    own = {name: np.array(param) for name, param in groups.params.items()}
    for seed in range(4):
        grads = few_gradients(dtype, seed)
        if seed == 3:
            grads["e"] = nc.IndexedSlices(grads["e"].values[:0], [], (9, 4))
        optimizer.step(grads)
        alone.apply_gradients([(grads[name], own[name]) for name in ("w", "e")])
        assert frozen(own) == frozen(dict(groups.params))


def test_pairs_with_rows_that_cannot_be_applied_at_once():
    """Parameters that share memory are refused, whatever was known; rows of them are copied."""
    table = np.arange(36.0).reshape(9, 4)
    optimizer = nc.SGD(None, lr=0.5)
    pairs = [(nc.IndexedSlices(table, range(9), (9, 4)), table)]
    for _ in range(2):
        optimizer.apply_gradients(pairs)
    assert_same_bits(table, np.arange(36.0).reshape(9, 4) / 4)
    rows = nc.IndexedSlices(np.ones((2, 4)), [1, 1], (9, 4))
    with pytest.raises(ValueError, match="memory"):
        optimizer.apply_gradients([(rows, table), (np.ones((2, 4)), table[3:5])])
    for grad, param in [(rows, table), (rows, table.copy()), (rows, np.zeros((8, 4)))]:
        if param.shape == rows.dense_shape:
            before = param[1].copy()
            optimizer.apply_gradients([(rows, param)])
            assert_same_bits(param[1], before - 1.0)
        else:
            with pytest.raises(ValueError, match="shape"):
                optimizer.apply_gradients([(grad, param)])


# ---- what one call leaves to several


def test_rows_without_an_index_each_are_not_read():
    groups, optimizer = few()
    grads = few_gradients()
    groups.set_grads(grads)
    before = frozen(groups.state_dict()), frozen(groups.grads)
    items = grads["w"], grads["e"].values[:5].copy(), grads["e"].indices
    for adds in (False, True):
        assert not groups._manager.intake._takers[0]._given.take(items, adds=adds)
    (clipper,) = groups._manager.made_steps().clippers
    where = 0, 1.0, clipper.bounds, clipper.tables
    assert not optimizer._updater._at_once.take(items, *where)
    assert not optimizer._updater._at_once.measure(items, *where)
    assert (frozen(groups.state_dict()), frozen(groups.grads)) == before


def test_sums_that_overflow():
    """They are scaled before they are summed."""
    rows = nc.IndexedSlices(np.full((2, 4), 6e4, np.float16), [1, 1], (9, 4))
    groups, optimizer = few("float16")
    groups.set_grads({"e": rows})
    optimizer.step()
    groups.accumulate({"w": np.ones((3, 2), np.float16)})  # the rows stay
    assert np.isfinite(groups.params["e"]).all()
    assert (groups.params["e"][1] < 1).all()
    other, own = few("float16")
    with in_parts():
        own.step({"e": rows})
    assert_same_bits(groups.params["e"], other.params["e"])


def test_a_step_after_an_error_knows_nothing_of_the_rows_before():
    rule = nc.ByGlobalNorm(1.0, ord=1, shared="all")
    groups = nc.ParamGroups(
        [
            nc.Group("s", {"E": np.ones((9, 3))}, rule, nonfinite="raise", sparse=True),
            nc.Group("d", {"W": np.zeros(2)}, rule, nonfinite="raise"),
        ]
    )
    rows = nc.IndexedSlices(np.full((1, 3), 100.0), [1], (9, 3))
    groups.set_grads({"E": rows, "W": np.array([math.nan, 0.0])})
    with pytest.raises(nc.NonFiniteGradientError, match="W"):
        groups.clip()
    groups.set_grads({"E": None, "W": np.array([0.3, 0.4])})
    assert groups.clip().groups["d"].norm == pytest.approx(0.7)  # of order 1, of both groups


def test_rows_without_an_index_each_are_refused_by_name():
    values = np.ones((4, 2))
    rows = nc.IndexedSlices(values, [0, 1, 2, 3], (9, 2))
    with pytest.raises(ValueError, match=r"^values: expected shape \(4, 2\), got \(1, 2\)"):
        rows.with_values(np.ones((1, 2)))
    groups = nc.ParamGroups(
        [
            nc.Group("s", {"E": np.ones((9, 2))}, sparse=True),
            nc.Group("d", {"W": np.zeros(2)}),
        ]
    )
    groups.set_grads({"W": np.array([5.0, 5.0])})
    values.resize((2, 2), refcheck=False)
    for call in (
        lambda: nc.global_norm([rows]),
        lambda: groups.set_grads({"W": np.ones(2), "E": rows}),
        lambda: nc.SGD(None, lr=1.0).apply_gradients([(rows, np.zeros((9, 2)))]),
    ):
        with pytest.raises(
            ValueError, match=r"values: expected a row of shape \(2,\) for each of 4"
        ):
            call()
    assert (groups.grads["W"] == 5.0).all()

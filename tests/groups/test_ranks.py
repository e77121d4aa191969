"""One norm and one decision for many ranks; here they are threads, see tests/oracle/ranks.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

import numclip as nc
from numclip.errors import RankError
from numclip.rules import Rule
from tests.oracle import checks, ranks, reference
from tests.oracle.grouped import frozen
from tests.oracle.shares import (
    CHUNK,
    NUMBERS,
    REPLICATED,
    RULES,
    assert_told_alike,
    numbers,
    shards,
    trained,
)

SIZES = [1, 2, 3, 4, 8]


def together(size, program):
    """Run a program on ranks, none of which may raise."""
    results = ranks.run(size, program)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def raised(size, program, kind=RankError):
    """Run a program that must raise on every rank; return the messages."""
    results = ranks.run(size, program)
    for result in results:
        if not isinstance(result, kind):
            raise AssertionError(f"not {kind}: {results}") from (
                result if isinstance(result, BaseException) else None
            )
    return [str(result) for result in results]


# ---- the function


@pytest.mark.each_value
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_shards_of_whole_chunks_have_the_bits_of_all_at_once(size, dtype):
    rng = np.random.default_rng(size)
    whole = rng.standard_normal(9 * CHUNK + 5).astype(dtype)
    parts = shards(whole, size, aligned=True)
    clipped, norm = nc.clip_by_global_norm([whole], 3.0)
    results = together(
        size, lambda comm: nc.clip_by_global_norm([parts[comm.Get_rank()]], 3.0, comm=comm)
    )
    assert {told for _, told in results} == {norm}
    checks.assert_same_bits(np.concatenate([own[0] for own, _ in results]), clipped[0])


@pytest.mark.full
@pytest.mark.parametrize("ord", [1, 2, 3.5, math.inf])
@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
@pytest.mark.parametrize("size", [2, 3, 8])
def test_any_shards_have_the_norm_of_all_and_keep_the_bound(ord, scale, size):
    rng = np.random.default_rng(7)
    tensors = [rng.standard_normal(n) * scale for n in (5, 1, 300)]
    norm = nc.global_norm(tensors, ord)
    parts = [shards(tensor, size) for tensor in tensors]

    def program(comm):
        own = {k: part[comm.Get_rank()] for k, part in enumerate(parts)}
        found = nc.clip_by_global_norm(own, norm / 7, ord=ord, out=own, comm=comm)
        assert found[0][0] is own[0]
        return found

    results = together(size, program)
    assert len({told for _, told in results}) == 1
    assert results[0][1] == pytest.approx(norm, rel=1e-15 if ord == 2 else 1e-14)
    clipped = [np.concatenate([own[k] for own, _ in results]) for k in range(3)]
    expected, _ = nc.clip_by_global_norm(tensors, norm / 7, ord=ord)
    for one, other in zip(clipped, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-14)
    if ord == 2:
        assert reference.square_sum(clipped) <= Fraction(norm / 7) ** 2


def test_rows_that_repeat_and_iterators_and_nothing_at_all():
    def program(comm):
        if comm.Get_rank() == 0:
            return nc.clip_by_global_norm([], 1.0, comm=comm)
        if comm.Get_rank() == 1:
            return nc.clip_by_global_norm((g for g in [None, np.array([12.0])]), 6.5, comm=comm)
        rows = nc.IndexedSlices(np.array([[4.0], [1.0]]), [2, 2], (5, 1))
        return nc.clip_by_global_norm({"e": rows}, 6.5, comm=comm)

    assert all(isinstance(found, RankError) for found in ranks.run(3, program))  # clip_norm differs

    def agreeing(comm):
        rows = nc.IndexedSlices(np.array([[4.0], [1.0]]), [2, 2], (5, 1))
        grads = [[], (g for g in [None, np.array([12.0])]), {"e": rows}][comm.Get_rank()]
        return nc.clip_by_global_norm(grads, 6.5, comm=comm)

    nothing, dense, sparse = together(3, agreeing)
    assert nothing == ([], 13.0)
    assert dense[0][0] is None
    assert dense[0][1] == pytest.approx(6.0, rel=1e-14)
    assert sparse[0]["e"].to_dense()[2] == pytest.approx(2.5, rel=1e-14)


def test_the_subnormal_results_of_all_ranks_together_stay_within_the_bound():
    rng = np.random.default_rng(5)
    parts = [rng.standard_normal(64).astype(np.float32) for _ in range(16)]
    for bound in np.float64(2.0) ** np.arange(-108, -94, 0.5):
        results = together(
            16,
            lambda comm, to=bound: nc.clip_by_global_norm([parts[comm.Get_rank()]], to, comm=comm),
        )
        square = reference.square_sum([own[0] for own, _ in results])
        assert square <= Fraction(float(bound)) ** 2


@pytest.mark.full
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_one_verdict_on_what_is_not_finite(value):
    def grads(comm):
        own = np.array([3.0, 4.0])
        if comm.Get_rank() == 1:
            own[1] = value
        return [own]

    def clip(policy):
        def program(comm):
            own = grads(comm)
            kept = own[0].copy()
            try:
                found = nc.clip_by_global_norm(own, 1.0, nonfinite=policy, out=own, comm=comm)
            finally:
                if policy == "raise":
                    checks.assert_same_bits(own[0], kept)
            return found

        return program

    for own, norm in together(3, clip("propagate")):
        assert np.isnan(own[0]).all()
        assert not math.isfinite(norm)
    for rank, (own, norm) in enumerate(together(3, clip("skip"))):
        assert own[0][0] == 3.0
        assert own[0][1] == 4.0 or rank == 1
        assert not math.isfinite(norm)
    results = together(3, clip("zero"))
    assert {norm for _, norm in results} == {math.sqrt(59)}
    assert results[1][0][0][1] == 0.0
    errors = ranks.run(3, clip("raise"))
    assert {str(error) for error in errors} == {
        f"rank 1: grads[0] is not finite: {value} at flat index 1, 1 of 2 elements; "
        "nothing was modified"
    }
    assert {(error.rank, error.name, error.index) for error in errors} == {(1, 0, 1)}


def test_a_rank_that_raises_is_an_error_on_all():
    def program(comm):
        return nc.clip_by_global_norm(
            [np.ones(2, int if comm.Get_rank() else float)], 1.0, comm=comm
        )

    first, second = ranks.run(2, program)
    assert isinstance(second, TypeError)
    assert isinstance(first, RankError)
    assert re.fullmatch(
        r"rank 1 raised TypeError: grads\[0\]: .*; nothing was modified on any rank", str(first)
    )

    def bad_bound(comm):
        return nc.clip_by_global_norm([np.ones(2)], -1.0 if comm.Get_rank() else 1.0, comm=comm)

    first, second = ranks.run(2, bad_bound)
    assert isinstance(second, ValueError)
    assert str(first).startswith("rank 1 raised ValueError: clip_norm: expected a number >= 0")


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clip_norm": 2.0}, "clip_norm: 1.0 on rank 0, but 2.0 on rank 2"),
        ({"ord": 1}, "ord: 2.0 on rank 0, but 1.0 on rank 2"),
        ({"nonfinite": "skip"}, "nonfinite: 'propagate' on rank 0, but 'skip' on rank 2"),
        ({"duplicates": "raw"}, "duplicates: 'sum' on rank 0, but 'raw' on rank 2"),
    ],
)
def test_arguments_that_differ_are_an_error_on_all(change, text):
    def program(comm):
        own = {"clip_norm": 1.0, **(change if comm.Get_rank() == 2 else {})}
        grads = [np.full(2, 5.0)]
        try:
            nc.clip_by_global_norm(grads, out=grads, comm=comm, **own)
        finally:
            assert grads[0].tolist() == [5.0, 5.0]

    assert set(raised(3, program)) == {f"{text}; nothing was modified on any rank"}


def test_one_rank_asks_nobody():
    def program(comm):
        found = nc.clip_by_global_norm([np.array([3.0, 4.0])], 1.0, comm=comm)
        assert comm.calls == []
        return found[1]

    assert together(1, program) == [5.0]


def test_what_is_no_communicator_is_refused():
    grads = [np.ones(2)]
    with pytest.raises(TypeError, match="comm: expected an intra-communicator of mpi4py or None"):
        nc.clip_by_global_norm(grads, 1.0, comm=3)

    def inter(comm):
        comm.Is_inter = lambda: True
        nc.clip_by_global_norm(grads, 1.0, comm=comm)

    assert "got an inter-communicator" in raised(1, inter, ValueError)[0]

    class Null(ranks.Comm):
        """As COMM_NULL, which is false, of which nothing can be asked."""

        def __init__(self):
            pass

        def __bool__(self):
            return False

    with pytest.raises(ValueError, match="comm: expected an intra-communicator, got COMM_NULL"):
        nc.clip_by_global_norm(grads, 1.0, comm=Null())

    def with_use_norm(comm):
        nc.clip_by_global_norm(grads, 1.0, 3.0, comm=comm)

    assert "use_norm: expected None" in raised(2, with_use_norm, ValueError)[0]


# ---- groups


@pytest.mark.full
@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("size", [2, 3])
def test_sharded_groups_are_clipped_as_if_they_were_whole(name, size):
    rule = RULES[name]
    results = together(size, lambda comm: trained(rule, comm, size, comm.Get_rank()))
    assert_told_alike(results)
    expected, reports, _ = trained(rule, ranks.run(1, lambda comm: comm)[0])
    np.testing.assert_allclose(
        np.array(results[0][1], float), np.array(reports, float), rtol=2e-14, atol=1e-300
    )
    for key, param in expected.items():
        parts = [found[key] for found, *_ in results]
        joined = parts[0] if key == "c" else np.concatenate(parts)
        np.testing.assert_allclose(joined, param, rtol=1e-13, atol=1e-15)


@pytest.mark.full
@pytest.mark.parametrize("name", REPLICATED)
def test_copies_count_once(name):
    rule = REPLICATED[name]
    results = together(3, lambda comm: trained(rule, comm, sharded=False))
    assert_told_alike(results)
    expected, reports, _ = trained(rule, sharded=False)
    np.testing.assert_allclose(
        np.array(results[0][1], float), np.array(reports, float), rtol=1e-15, atol=0
    )
    for found, *_ in results:
        for key, param in expected.items():
            checks.assert_same_bits(found[key], param)


def test_a_call_is_one_collective_of_some_bytes_for_each_group():
    def program(comm):
        trained(RULES["global"], comm, 2, comm.Get_rank())
        return comm.calls

    calls = together(2, program)[0]
    assert [name for name, _ in calls[:3]] == ["allgather", "allgather", "Allgather"]
    assert set(calls[2:]) == {("Allgather", 16 + 3 * 56)}
    assert len(calls[2:]) == 15


def test_sharded_rows_that_repeat_count_as_their_sums():
    values, indices = np.array([[3.0], [1.0], [2.0]]), np.array([0, 0, 1])

    def program(comm):
        groups = nc.ParamGroups(
            [
                nc.Group(
                    "e", {"E": np.zeros((4, 1))}, nc.ByGlobalNorm(1.0), sparse=True, sharded=True
                )
            ]
        )
        for rows in (indices[::-1], indices):  # from the second step on, ranks know one another
            scaled = values * (1 + comm.Get_rank())
            groups.grads["E"] = nc.IndexedSlices(scaled, rows.copy(), (4, 1))
            report = groups.clip(comm=comm)
            yield report.norm, groups.grads["E"].to_dense()

    every = together(2, lambda comm: [*program(comm)])
    for results, norm in zip(zip(*every, strict=True), (math.sqrt(90), 10.0), strict=True):
        assert {found for found, _ in results} == {norm}
        square = reference.square_sum([dense for _, dense in results])
        assert Fraction(1 - 2**-40) < square <= 1


# ---- what is not finite


@pytest.mark.full
@pytest.mark.parametrize("sharded", [True, False])
@pytest.mark.parametrize("policy", ["propagate", "skip", "raise", "zero"])
@pytest.mark.parametrize("rule", ["none", "global", "tensors", "global of order 1", "percentile"])
def test_all_ranks_take_one_decision_on_what_is_not_finite(rule, policy, sharded):
    def program(comm):
        params = {"w": np.zeros(3), "b": np.zeros(2)}
        groups = nc.ParamGroups(
            [nc.Group("g", params, RULES[rule], nonfinite=policy, sharded=sharded)]
        )
        w = np.array([1.0, math.nan if comm.Get_rank() == 1 else 2.0, 3.0])
        groups.set_grads({"w": w, "b": np.ones(2)})
        optimizer = nc.SGD(groups, lr=1.0)
        try:
            report = optimizer.step(comm=comm)
        finally:
            if policy in ("raise", "skip"):
                assert not groups["g"].flat_params["float64"].any()
        return numbers(report), groups["g"].flat_params["float64"].copy()

    results = ranks.run(3, program)
    if policy == "raise":
        texts = {str(error) for error in results}
        assert len(texts) == 1
        assert texts.pop().startswith("rank 1: g.w is not finite: nan at flat index 1")
        return
    if policy == "zero" and not sharded:  # what is left differs
        cause = r"\(without what is NaN or Inf on rank 1\), but the group is not sharded"
        for error in results:
            assert isinstance(error, RankError)
            assert re.search(cause, str(error))
        return
    told = [own for own, _ in results]
    np.testing.assert_equal(told[1:], told[:-1])
    assert told[0][1][NUMBERS.index("nonfinite")]
    assert told[0][1][NUMBERS.index("skipped")] == (policy == "skip")
    if policy == "zero":
        assert all(np.isfinite(param).all() for _, param in results)


# ---- what differs


def make(**changes):
    """Groups and an optimizer, that of one rank changed."""
    own = {
        "name": "g",
        "key": "w",
        "clip": nc.ByGlobalNorm(1.0),
        "dtype": np.float64,
        "shape": (2,),
        "nonfinite": "skip",
        "lr": 0.5,
        **changes,
    }
    params = {own["key"]: np.zeros(own["shape"], own["dtype"])}
    groups = nc.ParamGroups([nc.Group(own["name"], params, own["clip"], own["nonfinite"])])
    groups.set_grads({own["key"]: np.full(own["shape"], 5.0, own["dtype"])})
    return groups, nc.SGD(groups, lr=own["lr"])


@pytest.mark.full
@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"name": "h"}, "groups: g on rank 0, but h on rank 1"),
        ({"key": "v"}, "group 'g', w: float64 of shape (2,) on rank 0, but nothing on rank 1"),
        ({"shape": (3,)}, "group 'g', w: float64 of shape (2,) on rank 0, but float64 of shape (3"),
        ({"dtype": np.float32}, "group 'g', w: float64 of shape (2,) on rank 0, but float32"),
        ({"clip": nc.ByNorm(1.0)}, "group 'g', clip: ByGlobalNorm(max_norm=1.0"),
        ({"nonfinite": "zero"}, "group 'g', nonfinite: 'skip' on rank 0, but 'zero' on rank 1"),
        ({"lr": 0.25}, "call: descend of [[0.5, 0.0, 0.0, 0.0, 1.0]] on rank 0, but descend of"),
    ],
)
def test_groups_that_differ_are_an_error_on_all(change, text):
    def program(comm):
        groups, optimizer = make(**(change if comm.Get_rank() == 1 else {}))
        try:
            optimizer.step(comm=comm)
        finally:
            assert not any(param.any() for param in groups.params.values())

    texts = set(raised(3, program))
    assert len(texts) == 1
    assert text in texts.pop()


def test_steps_scales_bounds_and_calls_that_differ_are_an_error_on_all():
    def differing(act):
        def program(comm):
            rank = comm.Get_rank()
            clip = nc.ByGlobalNorm(lambda step: 1.0 + (rank if step == 1 else 0))
            groups, optimizer = make(clip=clip)
            groups.clip(comm=comm)
            act(groups, optimizer, comm, rank)

        texts = set(raised(2, program))
        assert len(texts) == 1
        return texts.pop()

    def stepped(groups, _, comm, rank):
        groups.step += rank
        groups.clip(comm=comm)

    assert "step: 1 on rank 0, but 2 on rank 1" in differing(stepped)
    text = differing(lambda groups, _, comm, rank: groups.clip(unscale=1.0 + rank, comm=comm))
    assert "unscale: 1.0 on rank 0, but 2.0 on rank 1" in text
    text = differing(lambda groups, _, comm, __: groups.clip(comm=comm))
    assert "group 'g', bound: 1.0 on rank 0, but 2.0 on rank 1" in text
    text = differing(lambda groups, _, comm, rank: groups.clip(apply=rank == 0, comm=comm))
    assert "call: clip(apply=True) on rank 0, but clip(apply=False) on rank 1" in text


def test_a_rule_that_one_rank_changes_is_an_error_and_one_that_all_change_is_taken_up():
    def program(comm):
        groups, optimizer = make()
        optimizer.step(comm=comm)
        before = groups.params["w"].copy()
        if comm.Get_rank() == 1:
            groups["g"].clip = nc.ByGlobalNorm(2.0)
        with pytest.raises(RankError, match=r"clip: ByGlobalNorm\(max_norm=1.0"):
            optimizer.step(comm=comm)
        checks.assert_same_bits(groups.params["w"], before)
        groups["g"].clip = nc.ByGlobalNorm(2.0)
        return optimizer.step(comm=comm).threshold

    assert together(3, program) == [2.0] * 3


def test_a_state_that_one_rank_loads_is_looked_at():
    def program(comm):
        groups, optimizer = make(clip=nc.AutoClip())
        kept = groups.state_dict()
        optimizer.step(comm=comm)
        if comm.Get_rank() == 1:
            groups.load_state_dict(kept)
        with pytest.raises(RankError, match="state of the rule"):
            optimizer.step(comm=comm)
        if comm.Get_rank() == 0:
            groups.load_state_dict(kept)
        groups.set_grads({"w": np.full(2, 5.0)})
        return optimizer.step(comm=comm).clipped

    assert together(2, program) == [False] * 2


def test_copies_that_differ_are_an_error_on_all():
    def program(comm):
        groups, optimizer = make()
        groups.grads["w"][:] = 3e200, 4e200 * (1 + 1e-9 * (comm.Get_rank() == 2))
        optimizer.step(comm=comm)

    texts = set(raised(3, program))
    assert len(texts) == 1
    told = r"'g': the gradients differ, of norm [45]\.\d+e\+200 on rank 0 and 5\.0{8}3\d*e\+200 on"
    assert re.search(told, texts.pop())


@pytest.mark.parametrize("first", [True, False])
def test_a_rank_that_raises_before_it_measures_is_an_error_on_all(first):
    def rate(step):
        if step == (0 if first else 1) and rank_of[0] is not None:
            raise KeyError("no rate")
        return 0.5

    rank_of = [None]

    def program(comm):
        own = rate if comm.Get_rank() == 1 else (lambda step: 0.5)  # noqa: ARG005
        groups, optimizer = make(lr=own)
        if not first:
            optimizer.step(comm=comm)
        rank_of[0] = 1
        before = groups.params["w"].copy()
        try:
            optimizer.step(comm=comm)
        finally:
            checks.assert_same_bits(groups.params["w"], before)

    results = ranks.run(3, program)
    assert isinstance(results[1], KeyError)
    for rank in (0, 2):
        assert str(results[rank]) == (
            "rank 1 raised KeyError: 'no rate'; nothing was modified on any rank"
        )


def test_sharded_groups_need_a_communicator_and_rules_that_scale():
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, sharded=True)])
    with pytest.raises(ValueError, match="comm: expected the communicator of the ranks that share"):
        groups.clip()
    with pytest.raises(ValueError, match="a rule that scales for a sharded group"):
        nc.Group("g", {"w": np.zeros((2, 2))}, nc.ByNorm(1.0, axes=0), sharded=True)


# ---- gradients of the step, and steps after clips


def pair(policy="propagate", sharded=True):
    params = {"w": np.zeros(3), "b": np.zeros(2)}
    groups = nc.ParamGroups(
        [nc.Group("g", params, nc.ByGlobalNorm(1.0), nonfinite=policy, sharded=sharded)]
    )
    return groups, nc.SGD(groups, lr=1.0)


def test_gradients_where_they_lie_are_those_of_all_ranks():
    def program(comm):
        rank = comm.Get_rank()
        grads = {"w": np.array([1.0, 2.0, 3.0]) + rank, "b": np.ones(2)}
        given = {"w": grads["w"].astype(np.float32)[::-1][::-1] if rank else grads["w"], "b": None}
        groups, optimizer = pair()
        measured = groups.clip(apply=False, grads=given, comm=comm)
        report = optimizer.step(given, comm=comm)
        return measured.norm, report.norm, groups.params["w"].copy(), groups.params["b"].copy()

    results = together(2, program)
    norm = math.sqrt(1 + 4 + 9 + 4 + 9 + 16)
    assert {(own[0], own[1]) for own in results} == {(norm, norm)}
    for rank, (_, _, w, b) in enumerate(results):
        np.testing.assert_allclose(w, -(np.array([1.0, 2.0, 3.0]) + rank) / norm, rtol=1e-14)
        assert not b.any()


@pytest.mark.full
@pytest.mark.parametrize("max_norm", [1e-3, 1e-300])  # the latter makes factors subnormal
@pytest.mark.parametrize("scale", [1.0, 1e20, math.nan])
def test_it_is_a_ranks_own_business_where_it_reads_much_data(max_norm, scale):
    grad = np.random.default_rng(2).standard_normal((800, 700)).astype(np.float32).astype(float)
    grad[3, 5] *= scale

    def stepped(grads, comm=None):
        clip = nc.ByGlobalNorm(max_norm)
        groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(grad.shape)}, clip, "raise")])
        optimizer = nc.SGD(groups, lr=1e100)
        try:
            report = optimizer.step({"w": grads}, comm=comm)
        except nc.NonFiniteGradientError as error:
            return str(error).removeprefix("rank 0: ")
        if max_norm > 1e-300:
            assert groups.grads["w"].any() == (grads is not grad)
        return numbers(report), groups.params["w"].copy()

    def program(comm):
        return stepped([grad, np.asfortranarray(grad)][comm.Get_rank()], comm)

    expected = stepped(np.asfortranarray(grad))
    for found in together(2, program):
        np.testing.assert_equal(found, expected)


def test_parameters_that_only_some_ranks_leave_are_an_error_where_they_are_copies():
    def program(comm):
        _, optimizer = pair(sharded=False)
        optimizer.step({"w": np.ones(3), "b": np.zeros(2) if comm.Get_rank() else None}, comm=comm)

    texts = set(raised(2, program))
    assert len(texts) == 1
    assert "without ['b'] on rank 0, but descend of" in texts.pop()


@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_step_after_a_clip_applies_what_all_ranks_have_decided(policy):
    def program(comm):
        groups, optimizer = pair(policy)
        bad = math.nan if comm.Get_rank() == 1 else 1.0
        groups.set_grads({"w": np.array([bad, 2.0, 3.0]), "b": np.ones(2)})
        first = groups.clip(comm=comm)
        second = optimizer.step(comm=comm)
        np.testing.assert_equal(numbers(second), numbers(first))
        return groups.step, groups["g"].flat_params["float64"].copy()

    for step, params in together(3, program):
        assert step == 1
        assert np.isnan(params).all() if policy == "propagate" else not params.any()


def test_a_step_after_a_clip_on_some_ranks_alone_is_an_error_on_all():
    def program(comm):
        groups, optimizer = pair()
        groups.set_grads({"w": np.ones(3), "b": np.ones(2)})
        groups.clip(comm=comm)
        if comm.Get_rank() == 1:
            groups.set_grads({"w": np.ones(3), "b": np.ones(2)})
        optimizer.step(comm=comm)

    texts = set(raised(2, program))
    assert len(texts) == 1
    assert "call: clipped before, descend of" in texts.pop()


@pytest.mark.each_value
@pytest.mark.parametrize("value", [1.0, 1e200, 5e-324, math.nan])
@pytest.mark.parametrize("policy", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(2.0), nc.ByNorm(lambda step: 1.0 + 0.5 * step)])
def test_two_native_calls_clip_as_the_general_way_does(rule, dtype, policy, value):
    with np.errstate(over="ignore"):
        values = np.array([[3.0, -4.0], [value, 0.5]]).astype(dtype)  # rank 1 has the odd one

    def program(comm):
        found = []
        for attempt in range(2):
            params = {"a": np.zeros(2, dtype), "b": np.zeros(3, dtype)}
            group = nc.Group("g", params, rule, nonfinite=policy, sharded=True)
            groups = nc.ParamGroups([group])
            groups.clip(comm=comm)  # the first time, ranks agree
            if attempt == comm.Get_rank():
                groups._manager._ranks._native = (
                    None  # one rank goes the general way, the other does not
                )
            groups.set_grads({"a": values[comm.Get_rank()], "b": np.ones(3, dtype)})
            report = groups.clip(comm=comm)
            groups.clip(comm=comm)
            found.append((report, {name: np.array(own) for name, own in groups.grads.items()}))
        return found

    for (one, grads), (other, others) in together(2, program):
        assert repr(one.to_dict()) == repr(other.to_dict())
        for name in grads:
            checks.assert_same_bits(grads[name], others[name])


def test_several_dtypes_are_clipped_by_one_norm():
    """Which one call does alone, but not with others."""

    def program(comm):
        params = {"a": np.zeros(1, "f"), "b": np.zeros(1)}
        rule = nc.ByGlobalNorm(2.5)
        groups = nc.ParamGroups([nc.Group("g", params, rule, sharded=True)])
        for _ in range(2):
            groups.set_grads({"ab"[comm.Get_rank()]: np.full(1, 3.0 + comm.Get_rank())})
            report = groups.clip(comm=comm)
        return [report.norm, report.clipped_norm, *(own.item() for own in groups.grads.values())]

    for found, wanted in zip(together(2, program), ([1.5, 0.0], [0.0, 2.0]), strict=True):
        np.testing.assert_allclose(found, [5.0, 2.5, *wanted], rtol=1e-6)


def test_copies_are_clipped_tensor_by_tensor_at_every_step():
    rules = [None, nc.ByNorm(1.0), nc.ByAverageNorm(0.5), nc.ByBlockRMS(0.5)]

    def program(comm):
        params = {"w": np.zeros(2), "b": np.zeros(3)}
        found = []
        for rule in rules:
            groups, alone = (nc.ParamGroups([nc.Group("g", params, rule)]) for _ in range(2))
            for size in (0.5, 10.0, 20.0, 0.1):
                grads = {"w": np.array([0.6, 0.8]) * size, "b": np.ones(3) * size}
                groups.set_grads(grads)
                alone.set_grads(grads)
                found.append((groups.clip(comm=comm).to_dict(), alone.clip().to_dict()))
                for name in params:
                    checks.assert_same_bits(groups.grads[name], alone.grads[name])
        return found

    pairs = [pair for found in together(2, program) for pair in found]
    assert len(pairs) == 2 * 4 * len(rules)
    for one, other in pairs:
        assert repr(one) == repr(other)


@pytest.mark.parametrize("sharded", [True, False])
def test_the_history_has_what_was_decided_by_all_ranks_and_what_by_one(sharded):
    def program(comm):
        groups = nc.ParamGroups(
            nc.Group(name, {name: np.zeros(2)}, nc.ByGlobalNorm(9.0), sharded=sharded)
            for name in "gh"
        )
        told, wanted = nc.History(), []
        for step in range(12):
            groups.set_grads({name: np.array([3.0, 4.0]) * step for name in "gh"})
            given = comm if sharded or step % 4 < 3 else None
            told.record(groups.clip(comm=given))
            wanted.append(5.0 * step * math.sqrt(4.0 if sharded else 2.0))
        return groups.history.to_dict(), told.to_dict(), wanted

    for found, told, wanted in together(2, program):
        assert found == told
        np.testing.assert_allclose(found["all"]["norm"], wanted, rtol=1e-15)


@dataclass(frozen=True, repr=False)
class ByRootMeanSquare(Rule):
    """Hold the root mean square of a group to a bound."""

    scope: ClassVar[str] = "group"
    bound_name: ClassVar[str | None] = "most"
    most: float = 0.5

    def divisor(self, size: int) -> float:
        return math.sqrt(size)


@pytest.mark.full
def test_a_norm_is_that_of_all_ranks_where_one_has_a_single_element():
    def program(comm):
        part = np.full(1 + 2 * comm.Get_rank(), 2.0)
        group = nc.Group("g", {"w": part}, ByRootMeanSquare(), sharded=True)
        groups, found = nc.ParamGroups([group]), []
        for _ in range(1030):  # and those of the memory after that of the first steps
            groups.set_grads({"w": part})
            report = groups.clip(comm=comm)
            found.append((report.norm, report.clipped_norm, report.groups["g"].norm))
        return found, groups.history.to_dict()["all"]["norm"]

    for found, told in together(2, program):
        assert {norms[::2] for norms in found} == {(4.0, 4.0)}
        assert all(1.0 - 1e-14 < clipped <= 1.0 for _, clipped, _ in found)
        assert set(told) == {4.0}


@pytest.mark.parametrize("kind", ["SGD", "Adam"])
@pytest.mark.parametrize(
    "rule",
    [
        nc.ByNorm(1.0, axes=0),
        nc.Adaptive(0.1),
        nc.ByValue(-1.0, 1.0),
        nc.ByNorm(1.0),
        nc.AutoClip(),
    ],
    ids=repr,
)
@pytest.mark.full
def test_what_one_rank_skips_no_rank_applies(rule, kind):
    """Whatever writes gradients before they are applied, and however often."""

    def program(comm):
        params = {"w": np.ones((2, 2), np.float32), "v": np.ones(3, np.float32)}
        sound = nc.Group("sound", {"u": np.ones((3, 2), np.float32)}, clip=rule)
        groups = nc.ParamGroups([nc.Group("m", params, clip=rule, nonfinite="skip"), sound])
        optimizer = getattr(nc, kind)(groups, lr=1.0)
        grads = {
            name: np.full(own.shape, 1000.0, np.float32) for name, own in groups.params.items()
        }
        before = frozen(optimizer.state_dict()["groups"]["m"])
        if comm.Get_rank() == 0:
            grads["w"][0, 0] = np.nan
        groups.set_grads(grads)
        told = optimizer.step(comm=comm).groups
        again = optimizer.step(grads, comm=comm).groups
        assert (told["m"].skipped, again["m"].skipped) == (True, True)
        assert (told["sound"].skipped, again["sound"].skipped) == (False, False)
        assert frozen(optimizer.state_dict()["groups"]["m"]) == before
        assert all((groups.params[name] == 1.0).all() for name in params)
        assert (groups.params["u"] != 1.0).all()
        return frozen(groups.params)

    first, second = ranks.run(2, program)
    assert first == second

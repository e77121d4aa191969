"""The norm of gradients that arrive in pieces: the bits of all at once, in any order."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import threading
from fractions import Fraction
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from tests.oracle import checks, reference, strategies

# Squares whose sum is a tie, 2.25 and half a unit in its last place, and what decides it.
TIE = [np.array([1.5]), np.full(4, 2.0**-27)]
DECIDING = [np.array([2.0**-54])] * 1000


def accumulated(pieces, ord=2):
    found = nc.NormAccumulator(ord)
    for piece in pieces:
        found.add(piece)
    return found


def stepped(grads):
    """Return the norm that a step reports; nothing is clipped."""
    own = {str(k): grad for k, grad in enumerate(grads)}
    params = {name: np.zeros_like(grad) for name, grad in own.items()}
    groups = nc.ParamGroups([nc.Group("g", params, nc.ByGlobalNorm(9.0))])
    norm = nc.SGD(groups, lr=1.0).step(own).norm
    for name, grad in own.items():
        assert np.array_equal(groups.params[name], -grad)
    return norm


def grouped(parts, draw):
    """Merge accumulators two by two, any two, until one is left."""
    parts = [pickle.loads(pickle.dumps(part)) for part in parts]
    while len(parts) > 1:
        other = parts.pop(draw(st.integers(0, len(parts) - 1)))
        parts[draw(st.integers(0, len(parts) - 1))].merge(other)
    return parts[0]


@given(st.data(), st.lists(strategies.arrays() | strategies.sparse(), min_size=1, max_size=6))
def test_any_order_and_grouping_has_the_bits_of_all_at_once(data, grads):
    norm = nc.global_norm(grads)
    shuffled = data.draw(st.permutations(grads))
    assert nc.global_norm(shuffled) == norm
    count = data.draw(st.integers(1, len(grads)))
    pieces = [shuffled[k::count] for k in range(count)]
    whole = grouped([accumulated([piece]) for piece in pieces], data.draw)
    assert whole.norm == accumulated([shuffled]).norm == norm
    bound = data.draw(strategies.bounds(reference.norm(grads)))
    results = [nc.clip_by_global_norm(piece, bound, whole) for piece in pieces]
    assert {told for _, told in results} == {norm}
    with mock.patch.object(nc.NormAccumulator, "norm_alone", return_value=math.nan):
        general = [nc.clip_by_global_norm(piece, bound, whole) for piece in pieces]
    for (own, told), (others, known) in zip(results, general, strict=True):
        assert told == known
        for one, other in zip(own, others, strict=True):
            checks.assert_same_bits(one, other)
    clipped = list(itertools.chain.from_iterable(own for own, _ in results))
    given_to = list(itertools.chain.from_iterable(pieces))
    if len({reference.stored(grad).dtype for grad in grads}) == 1 and count == 1:
        at_once, _ = nc.clip_by_global_norm(shuffled, bound)
        for one, other in zip(clipped, at_once, strict=True):
            checks.assert_same_bits(one, other)
    if norm > bound:
        checks.assert_within(given_to, clipped, Fraction(bound) ** 2)
        return
    for one, other in zip(given_to, clipped, strict=True):
        checks.assert_same_bits(one, other)


def test_what_decides_a_tie_counts_wherever_it_arrives():
    orders = TIE + DECIDING, DECIDING + TIE, [DECIDING[0], *TIE, *DECIDING[1:]]
    alone = [*TIE, DECIDING[0]], [DECIDING[0], *TIE[::-1]]
    for grads in (*orders, *alone):
        assert nc.global_norm(grads) == stepped(grads) == 1.5 + 2.0**-52
        mixed = [np.zeros(1, np.float32), *grads]  # the general path: two dtypes
        assert nc.global_norm(mixed) == 1.5 + 2.0**-52
        assert accumulated([grads]).norm == accumulated([[g] for g in grads]).norm == 1.5 + 2.0**-52
    for grads in (TIE, TIE[::-1]):
        assert nc.global_norm(grads) == accumulated([grads]).norm == stepped(grads) == 1.5
        assert accumulated([[g] for g in grads]).norm == 1.5


@pytest.mark.parametrize("base", [[1.5, 1.0], [1.25, 1.25], [1.0, 1.0, 1.0], [1.75, 0.5]])
@pytest.mark.parametrize("odd", [[], [2.0**-25, 2.0**-25]])
def test_a_clip_tells_the_norm_where_all_but_decides_a_tie(base, odd):
    grads = [np.array([value]) for value in (*base, *odd, 2.0**-26, 2.0**-100)]
    whole = accumulated([grads])
    assert nc.clip_by_global_norm(grads, 0.5, whole)[1] == whole.norm == nc.global_norm(grads)


def merged(parts, fan):
    """Merge neighbours, so many at a time, until one is left; the parts stay as they are."""
    parts = list(map(copy.copy, parts))
    while len(parts) > 1:
        for k, part in enumerate(parts):
            if k % fan:
                parts[k - k % fan].merge(part)
        parts = parts[::fan]
    return parts[0]


def assert_any_grouping_has_the_bits_of_all_at_once(ranks):
    rng = np.random.default_rng(3)
    scales = 10.0 ** rng.integers(-12, 12, 10_000)
    grads = list(rng.standard_normal((10_000, 3)) * scales[:, None])
    parts = [accumulated([grads[k::ranks]]) for k in range(ranks)]
    shuffled = [parts[k] for k in rng.permutation(ranks)]
    trees = [merged(parts, 2), merged(parts[::-1], 2), merged(shuffled, 7)]
    chains = [merged(parts, ranks + 1), merged(shuffled, ranks + 1)]
    assert {whole.norm for whole in trees + chains} == {nc.global_norm(grads)}


def test_any_grouping_of_ranks_has_the_bits_of_all_at_once():
    for ranks in (1, 10, 100):
        assert_any_grouping_has_the_bits_of_all_at_once(ranks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", [1000, 10_000])
def test_any_grouping_of_thousands_of_ranks_has_the_bits_of_all_at_once(ranks):
    assert_any_grouping_has_the_bits_of_all_at_once(ranks)


@pytest.mark.full
@pytest.mark.parametrize("ord", [1, 1.3, 3, 4, 33.3, 1500, 1e7, 2.0**46 - 1, math.inf])
@pytest.mark.parametrize("size", [1e-200, 1.0, 1e200])
def test_other_orders_have_the_bits_of_all_at_once(ord, size):
    rng = np.random.default_rng(4)
    scales = size * 2.0 ** rng.integers(-40, 40, 30)
    grads = list(rng.standard_normal((30, 7)) * scales[:, None])
    grads += list(rng.standard_normal((2, 7)).astype(np.float32))
    norm = nc.global_norm(grads, ord)
    assert norm == nc.global_norm(grads[::-1], ord) == accumulated([grads], ord).norm
    assert max(abs(g).max() for g in grads) <= norm
    for ranks in (2, 3, 30):
        parts = [accumulated([grads[k::ranks]], ord) for k in range(ranks)]
        whole = nc.NormAccumulator(ord)
        for part in reversed(parts):
            whole.merge(part)
        assert whole.norm == norm
    clipped = [nc.clip_by_global_norm([g], norm / 3, whole, ord=ord)[0][0] for g in grads]
    assert norm / 3 * (1 - 1e-6) <= nc.global_norm(clipped, ord) <= norm / 3


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", [694, 1176, 1318, 1684, 3948])
def test_roots_of_fractional_orders_have_the_bits_of_all_at_once(seed):
    """Of 4000 seeds these five have a root that Python's power function tells otherwise."""
    grad = (np.random.default_rng(seed).integers(-256, 257, 15) / 128).astype(np.float32)
    assert accumulated([[grad]], 2.5).norm == nc.global_norm([grad], 2.5)


@pytest.mark.full
@pytest.mark.parametrize("ord", [1, 2.5, 3, 2000])
@given(st.data(), st.lists(strategies.arrays() | strategies.sparse(), min_size=1, max_size=6))
def test_any_grouping_has_the_bits_of_all_at_once_in_other_orders(ord, data, grads):
    shuffled = data.draw(st.permutations(grads))
    whole = grouped([accumulated([[grad]], ord) for grad in shuffled], data.draw)
    assert whole.norm == nc.global_norm(grads, ord)


def test_orders_near_infinity_are_infinite():
    assert nc.NormAccumulator(2.0**46).ord == math.inf == nc.NormAccumulator(1e300).ord
    assert nc.global_norm([np.full(9, 3.0)], 1e300) == 3.0


def test_rows_that_cancel_are_held_to_the_bound_as_all_at_once(target):
    rng, ord = np.random.default_rng(8), math.inf
    for size in (1.0, 2.0**1015) * 2:
        grads = []
        for _ in range(3):
            values = rng.standard_normal((12, 2))
            values[1::2] = -values[::2] * (1 + rng.integers(0, 3, (6, 1)) * 2.0**-52)
            rows = np.repeat(rng.integers(0, 6, 6), 2)
            grads.append(nc.IndexedSlices(values * size, rows, (6, 2)))
        whole = accumulated([[g] for g in grads], ord)
        for ratio in rng.uniform(0.05, 1.0, 4):
            bound = whole.norm * ratio
            wanted, _ = target.clip_by_global_norm(grads, bound, ord=ord)
            for grad, own in zip(grads, wanted, strict=True):
                (found,), _ = target.clip_by_global_norm([grad], bound, whole, ord=ord)
                assert abs(reference.densify(found)).max() <= bound
                if target.device == "cpu":  # where the norm has the same bits
                    checks.assert_same_bits(found, own)


def test_finite_gradients_whose_norm_exceeds_float64_are_clipped():
    grads = [np.full(1, 1.5e308), np.full(1, 1.5e308, np.float64)]
    whole = accumulated([[g] for g in grads])
    assert whole.norm == math.inf == nc.global_norm(grads)
    wanted = nc.clip_by_global_norm(grads, 1e300)[0][0]
    assert wanted[0] == pytest.approx(1e300 / math.sqrt(2), rel=1e-14)
    for grad, policy in itertools.product(grads, ("propagate", "raise", "skip", "zero")):
        clipped, _ = nc.clip_by_global_norm([grad], 1e300, whole, nonfinite=policy)
        checks.assert_same_bits(clipped[0], wanted)


@pytest.mark.full
@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_passes_on_to_every_piece(ord, value):
    good, bad = [np.array([3.0])], [np.array([1.0, value])]
    whole = accumulated([good, bad], ord)
    found = nc.global_norm([*good, *bad], ord)
    assert whole.norm == found or (math.isnan(whole.norm) and math.isnan(found))
    assert np.isnan(nc.clip_by_global_norm(good, 1.0, whole, ord=ord)[0][0]).all()
    left, _ = nc.clip_by_global_norm(good, 1.0, whole, ord=ord, nonfinite="skip")
    assert left[0] == 3.0
    for piece in (good, bad):  # the norm of the rest, of all pieces, is not known
        with pytest.raises(
            ValueError, match='use_norm: expected finite gradients for nonfinite="z'
        ):
            nc.clip_by_global_norm(piece, 0.5, whole, ord=ord, nonfinite="zero", out=piece)
    assert good[0] == 3.0
    assert bad[0][0] == 1.0
    with pytest.raises(nc.NonFiniteGradientError, match="use_norm is not finite"):
        nc.clip_by_global_norm(good, 1.0, whole, ord=ord, nonfinite="raise")
    with pytest.raises(nc.NonFiniteGradientError, match=r"grads\[0\] is not finite"):
        nc.clip_by_global_norm(bad, 1.0, whole, ord=ord, nonfinite="raise")
    assert good[0] == 3.0


def test_threads_add_to_one_accumulator():
    grads = [np.full(5, float(k)) for k in range(64)]
    whole = nc.NormAccumulator()

    def add(k):
        for grad in grads[k::8]:
            whole.add([grad])

    workers = [threading.Thread(target=add, args=(k,)) for k in range(8)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert whole.norm == nc.global_norm(grads)


def test_of_nothing():
    whole = nc.NormAccumulator()
    whole.add([])
    whole.add({"a": None, "b": np.empty((0, 3))})
    assert whole.norm == 0.0
    assert nc.clip_by_global_norm([], 1.0, whole) == ([], 0.0)
    assert nc.clip_by_global_norm([None, np.ones(0)], 1.0, whole)[1] == 0.0
    grads = [np.ones(2)]
    with pytest.raises(ValueError, match=r"use_norm: .*nothing was added"):
        nc.clip_by_global_norm(grads, 1.0, whole, out=grads)
    assert grads[0].tolist() == [1.0, 1.0]
    assert repr(whole) == "NormAccumulator(ord=2, norm=0.0)"


def test_copies_are_independent():
    whole = accumulated([[np.array([3.0])]])
    other = copy.deepcopy(whole)
    other.add([np.array([4.0])])
    assert (whole.norm, other.norm) == (3.0, 5.0)


def test_the_subnormal_results_of_all_pieces_together_stay_within_the_bound():
    # 64 pieces whose results round at the smallest numbers: each alone may add its grain.
    rng = np.random.default_rng(5)
    grads = [rng.standard_normal(64).astype(np.float32) for _ in range(64)]
    whole = accumulated([[g] for g in grads])
    for bound in np.float64(2.0) ** np.arange(-110, -92, 0.75):
        clipped = [nc.clip_by_global_norm([g], bound, whole)[0][0] for g in grads]
        assert reference.square_sum(clipped) <= Fraction(float(bound)) ** 2


def test_what_does_not_fit_is_refused():
    whole = nc.NormAccumulator()
    with pytest.raises(TypeError, match=r"grads\[1\]: expected an array"):
        whole.add([np.ones(2), np.ones(2, int)])
    assert whole.norm == 0.0
    with pytest.raises(ValueError, match="duplicates: expected one of"):
        whole.add([], duplicates="both")
    with pytest.raises(TypeError, match="other: expected a NormAccumulator, got float"):
        whole.merge(1.0)
    with pytest.raises(ValueError, match="other: expected another accumulator"):
        whole.merge(whole)
    with pytest.raises(ValueError, match="other: expected one of ord=2, got one of ord=1"):
        whole.merge(nc.NormAccumulator(1))
    with pytest.raises(ValueError, match="use_norm: expected one of ord=1, got one of ord=2"):
        nc.clip_by_global_norm([np.ones(1)], 1.0, whole, ord=1)
    with pytest.raises(ValueError, match="ord: expected a number >= 1"):
        nc.NormAccumulator(0.5)

"""Plain arrays with rows that repeat take a shorter way: the same bits, at any thread count."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numclip as nc
from numclip.host import plain_rows
from tests.oracle.cases import LAYOUTS, normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES, float_info


def slices(values):
    """Return slices of a few rows, of which each index has many."""
    indices = np.random.default_rng(0).integers(0, len(values) // 4 + 1, len(values))
    return nc.IndexedSlices(values, indices, (len(values), *values.shape[1:]))


def values_of(grads):
    return [own.values if isinstance(own, nc.IndexedSlices) else own for own in grads]


def results_of(grads, bound, *, in_place):
    """Return what becomes of slices of the first array, alone and with the others."""
    own = [slices(grads[0].copy()), *[grad.copy() for grad in grads[1:]]]
    norm = nc.global_norm(own)
    alone = nc.clip_by_norm(own[0], bound)
    clipped, told = nc.clip_by_global_norm(own, bound, out=own if in_place else None)
    np.testing.assert_equal(told, norm)
    return [*values_of([*clipped, alone]), np.float64(norm)]


def assert_same_both_ways(grads, bound, *, taken=True):
    """Clip and measure by the shorter way, where it is taken, and by the general one."""
    decide, calls = plain_rows._decided, []

    def noted(*arguments, **names):
        calls.append(decide(*arguments, **names) is not None)
        return decide(*arguments, **names)

    for in_place in (False, True):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(plain_rows, "_decided", noted)
            found = results_of(grads, bound, in_place=in_place)
            patch.setattr(plain_rows, "_decided", lambda *_, **__: None)
            expected = results_of(grads, bound, in_place=in_place)
        assert len(calls) == 3
        assert calls[-1] == taken
        calls.clear()
        for one, other in zip(found, expected, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("width", [(), (5,), (2, 3)])
@pytest.mark.parametrize("name", DTYPES)
def test_any_dtype_and_magnitude(name, width):
    rng = np.random.default_rng(9)
    grads = [normal(rng, shape, name) for shape in ((23, *width), (40,), (0,))]
    for power in (0, 60, -60):  # float16 overflows and underflows
        with np.errstate(all="ignore"):
            own = [grad * grad.dtype.type(2.0**power) for grad in grads]
        for bound in (3.0, 1e30):
            assert_same_both_ways(
                own, math.ldexp(bound, power), taken=name != "float16" or not power
            )


@pytest.mark.parametrize("name", DTYPES)
def test_small_bounds(name):
    """What rounding subnormal terms adds counts beside them, by the last bit or altogether."""
    rng = np.random.default_rng(3)
    lowest = round(math.log2(float(float_info(DTYPES[name]).smallest_subnormal)))
    for above in (-2, 0, 3, 50, 52, 53, 54, 55, 56, 60):
        bound = math.ldexp(1.0 + rng.random(), max(lowest + above, -1074))
        grads = [normal(rng, (9,), name), normal(rng, (4,), name)]
        with pytest.MonkeyPatch.context() as patch:
            found = results_of(grads, bound, in_place=False)
            patch.setattr(plain_rows, "_decided", lambda *_, **__: None)
            for one, other in zip(found, results_of(grads, bound, in_place=False), strict=True):
                assert_same_bits(one, other)


@pytest.mark.parametrize("name", DTYPES)
def test_pieces_of_a_norm(monkeypatch, name):
    rng = np.random.default_rng(4)
    arrays = [normal(rng, shape, name) for shape in ((23,), (40, 2), ())]
    for power in (0, 200, -200):
        with np.errstate(all="ignore"):
            own = [np.asarray(a * a.dtype.type(2.0**power)) for a in arrays]
        infinite = np.full(2, math.inf, own[0].dtype)
        for grads in (own, [slices(own[0]), None, *own[1:]], [infinite, None]):
            found, expected = nc.NormAccumulator(), nc.NormAccumulator()
            found.add(iter(grads))
            with monkeypatch.context() as patch:
                patch.setattr(plain_rows, "sums_of", lambda *_: None)
                expected.add(grads)
            np.testing.assert_equal(found.__getstate__(), expected.__getstate__())
    assert plain_rows.sums_of((arrays[1],), {}) is not None


@pytest.mark.parametrize("value", [1e-200, 1e200, math.nan, math.inf, 0.0])
def test_sums_that_lose_something_go_the_general_way(value):
    assert_same_both_ways([np.full((8, 3), value), np.ones(4)], 1.0, taken=False)


def test_a_bound_of_nothing():
    assert_same_both_ways([np.ones((8, 3), np.float32), np.ones(4, np.float32)], 0.0)


def test_rows_whose_shape_was_changed_are_refused():
    values = np.ones((4, 6), np.float32)
    for indices in ([1, 1, 2, 2], [1, 2, 3, 4]):
        grad = nc.IndexedSlices(values.copy(), indices, (10, 6))
        grad.values.resize((4, 2, 3), refcheck=False)
        for call in (nc.global_norm, lambda grads: nc.clip_by_global_norm(grads, 1.0)):
            with pytest.raises(ValueError, match=r"grads\[0\].values"):
                call([grad])
        with pytest.raises(ValueError, match="values"):
            nc.clip_by_norm(grad, 1.0)


@pytest.mark.parametrize("layout", ["fortran", "strided", "misaligned", "byte_swapped"])
def test_rows_in_other_orders_go_the_general_way(layout):
    values = LAYOUTS[layout](normal(np.random.default_rng(1), (8, 6), "float32"))
    grad = slices(values)
    assert plain_rows.norm_of((values,), {0: grad.grouping}) is None
    expected = nc.clip_by_global_norm([slices(np.ascontiguousarray(values))], 1.0)
    (clipped,), norm = nc.clip_by_global_norm([grad], 1.0)
    assert norm == expected[1]
    assert_same_bits(clipped.values, expected[0][0].values)


def test_rows_as_they_lie():
    grad = nc.IndexedSlices(np.array([[3.0], [4.0]]), [1, 1], (2, 1))
    for grads in ([grad], {"a": {"b": grad}}):
        assert nc.global_norm(grads) == 7.0
        assert nc.global_norm(grads, duplicates="raw") == 5.0
        assert nc.clip_by_global_norm(grads, 1.0, duplicates="raw")[1] == 5.0


def test_others_go_the_general_way():
    grad = nc.IndexedSlices(np.array([[3.0], [4.0]]), [1, 1], (2, 1))
    wide = np.ones(3, np.float32)
    clipped, norm = nc.clip_by_global_norm([grad, wide], 1.0)
    assert norm == math.sqrt(52.0)
    assert clipped[1].dtype == np.float32
    assert nc.global_norm([grad], 1) == 7.0
    assert nc.clip_by_global_norm([grad], 1.0, use_norm=14.0)[1] == 14.0
    both = nc.IndexedSlices(grad.values, [0, 0], (2, 1))
    with pytest.raises(ValueError, match="out"):
        nc.clip_by_global_norm([grad, both], 1.0, out=[grad, both])  # of the same values


@pytest.mark.jit_only
def test_the_same_bits_at_any_number_of_threads():
    values = normal(np.random.default_rng(8), (30_000, 64), "float32")
    once = nc.clip_by_global_norm([slices(values)], 100.0)
    nc.set_num_threads(1)
    try:
        again = nc.clip_by_global_norm([slices(values)], 100.0)
    finally:
        nc.set_num_threads(None)
    assert once[1] == again[1]
    assert_same_bits(once[0][0].values, again[0][0].values)

"""Plain arrays with rows that repeat take a shorter way: the same bits, at any thread count."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numclip as nc
from numclip.host import plain_rows
from tests.oracle.cases import LAYOUTS, normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES


def slices(values, seed=0):
    """Return slices of a few rows, each of which has many values."""
    indices = np.random.default_rng(seed).integers(0, len(values) // 4 + 1, len(values))
    return nc.IndexedSlices(values, indices, (len(values), *values.shape[1:]))


def values_of(grads):
    return [own.values if isinstance(own, nc.IndexedSlices) else own for own in grads]


def assert_same_both_ways(grads, bound, *, taken=True):
    """Clip and measure by the shorter way and by the general one, into new arrays and in place."""
    calls = []

    def counted(*arguments, **names):
        found = decide(*arguments, **names)
        calls.append(found is not None)
        return found

    decide = plain_rows._decided
    for in_place in (False, True):
        results = []
        for way in (counted, lambda *_, **__: None):
            own = [slices(v.copy(), 0) if v.ndim == 2 else v.copy() for v in values_of(grads)]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(plain_rows, "_decided", way)
                norm = nc.global_norm(own)
                out = own if in_place else None
                clipped, told = nc.clip_by_global_norm(own, bound, out=out)
                alone = nc.clip_by_norm(own[0], bound)
            np.testing.assert_equal(told, norm)
            results.append([*values_of([*clipped, alone]), np.float64(norm)])
        for one, other in zip(*results, strict=True):
            assert_same_bits(one, other)


@pytest.mark.parametrize("name", DTYPES)
def test_any_dtype_and_magnitude(name):
    rng = np.random.default_rng(9)
    grads = [slices(normal(rng, (23, 5), name)), normal(rng, (40,), name), normal(rng, (0,), name)]
    for power in (0, 60, -60):  # float16 overflows and underflows
        finite = name != "float16" or power <= 0
        with np.errstate(all="ignore"):
            own = [g * g.dtype.type(2.0**power) for g in values_of(grads)]
        zeros = not own[0].any()
        for bound in (3.0, 1e30):
            bound = math.ldexp(bound, power)
            assert_same_both_ways(own, bound, taken=finite and not zeros)


@pytest.mark.parametrize("value", [1e-200, 1e200, math.nan, math.inf, 0.0])
def test_sums_that_lose_something_go_the_general_way(value):
    assert_same_both_ways([np.full((8, 3), value), np.ones(4)], 1.0, taken=False)


def test_small_bounds_go_the_general_way():
    grads = [np.ones((8, 3), np.float32), np.ones(4, np.float32)]
    for bound in (0.0, 1e-44, 1e-36):  # results are subnormal; rounding their terms counts
        assert_same_both_ways(grads, bound, taken=False)


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

"""Plain gradients per example take a shorter way: the same bits, at any number of threads."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numclip as nc
from numclip.host import plain_arrays, plain_examples
from numclip.host.kernels.tuning import EXAMPLE_COLUMNS
from tests.oracle.cases import LAYOUTS, normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES


def assert_same_both_ways(grads, bound, *, taken=True):
    found = plain_examples.clip(grads, bound)
    assert (found is not None) == taken
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain_arrays, "READABLE", False)
        expected, count = nc.clip_per_example(grads, bound)
    summed, own = nc.clip_per_example(grads, bound)
    assert own == count
    for one, other in zip(summed, expected, strict=True):
        assert_same_bits(one, other)


@pytest.mark.jit_only
@pytest.mark.parametrize("name", DTYPES)
def test_any_lengths_and_magnitudes(name):
    rng = np.random.default_rng(7)
    shapes = [(3, 5), (), (0,), (2 * EXAMPLE_COLUMNS + 3,), (1,)]
    grads = [normal(rng, (6, *shape), name) for shape in shapes]
    for power in (0, 60, -60):  # float16 overflows and underflows
        with np.errstate(all="ignore"):
            own = [grad * grad.dtype.type(2.0**power) for grad in grads]
        assert_same_both_ways(own, math.ldexp(100.0, power))
    assert_same_both_ways([0 * grads[0]], 1.0)
    assert_same_both_ways([grads[3]], 0.0)
    assert_same_both_ways([grads[3]], math.inf)
    grads[0][2, 1, 1] = np.nan
    assert_same_both_ways(grads, 1.0, taken=grads[0].real.itemsize < 8)


@pytest.mark.parametrize("value", [1e-200, 1e200, 5e-324])
def test_squares_out_of_range_go_the_general_way(value):
    grads = [np.full((2, 3), value), np.ones((2, 4))]
    assert_same_both_ways(grads, 1.0, taken=False)
    large = np.full((2, 3), 1e13)  # whose factors are subnormal
    assert_same_both_ways([large], 1e-310, taken=False)
    assert_same_both_ways([large.astype(np.float32)], 1e-310)


def test_what_is_odd_goes_the_general_way():
    first = np.ones((4, 3), np.float32)
    others = [LAYOUTS[name](first) for name in ("fortran", "strided", "misaligned", "byte_swapped")]
    for other in (
        *others,
        None,
        first.astype(np.float64),
        nc.IndexedSlices(first, [0] * 4, (4, 3)),
    ):
        assert plain_examples.clip([first, other], 1.0) is None
    for other in (np.ones((5, 3), np.float32), np.ones((), np.float32)):
        with pytest.raises(ValueError, match=r"grads\[1\]"):
            nc.clip_per_example([first, other], 1.0)
    assert plain_examples.clip([np.ones((0, 3))], 1.0) is None


def test_results_have_the_structure_of_the_gradients():
    first = np.ones((4, 3), np.float32)
    for grads in ([first], (first,), {"w": first}):
        summed, count = plain_examples.clip(grads, 1.0)
        assert type(summed) is type(grads)
        assert count == 4
        assert summed == {"w": summed["w"]} if type(grads) is dict else len(summed) == 1


@pytest.mark.jit_only
def test_the_same_bits_at_any_number_of_threads():
    grads = [normal(np.random.default_rng(8), (64, n)) for n in (30_000, 7)]
    once, count = plain_examples.clip(grads, 100.0)
    nc.set_num_threads(1)
    try:
        again = plain_examples.clip(grads, 100.0)
    finally:
        nc.set_num_threads(None)
    assert again[1] == count
    for one, other in zip(once, again[0], strict=True):
        assert_same_bits(one, other)

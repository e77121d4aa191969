"""The borders of arguments: numbers that are no real numbers, indices, axes, sums out of range."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference
from tests.oracle.checks import assert_same_bits

ONES = np.ones(3, np.float32)
NO_NUMBERS = {
    "complex": np.complex64(1),
    "0-d complex": np.array(1 + 0j),
    "timedelta": np.timedelta64(3, "s"),
    "unit-less timedelta": np.timedelta64(3),
    "masked": np.ma.masked,
    "a masked number": np.ma.masked_array(2.0, True),
}
BEYOND = {"longdouble": np.longdouble("1e4000"), "int": 10**400}
TAKERS = {
    "clip_norm": lambda value: nc.clip_by_norm(ONES, value),
    "use_norm": lambda value: nc.clip_by_global_norm([ONES], 1.0, value),
    "ord": lambda value: nc.global_norm([ONES], value),
    "clip_value_max": lambda value: nc.clip_by_value(ONES, -1.0, value),
    "max_norm": nc.ByGlobalNorm,
    "lr": lambda value: nc.SGD(None, value),
}


def test_what_is_no_real_number_is_refused():
    for taker, kind in itertools.product(TAKERS, NO_NUMBERS):
        with pytest.raises(TypeError, match=rf"^{taker}: expected (a )?real number"):
            TAKERS[taker](NO_NUMBERS[kind])


def test_numbers_beyond_float64_are_refused():
    for taker in TAKERS:
        for value in BEYOND.values():
            if value == np.longdouble(np.inf):
                continue  # where a longdouble is a float64
            with pytest.raises(
                ValueError, match=rf"^{taker}: expected a number in the range of float64"
            ):
                TAKERS[taker](value)
        if taker != "lr":
            TAKERS[taker](np.longdouble(np.inf))


def test_numbers_are_within_their_ranges():
    groups = nc.ParamGroups([nc.Group("g", {"w": ONES})])
    takers = {**TAKERS, "unscale": lambda value: groups.clip(unscale=value)}
    inf, nan = math.inf, math.nan
    for taker, within, beyond in (
        ("clip_norm", (0, 1e300, inf), (-1, -1e-300, -inf, nan)),
        ("use_norm", (0, 1e300, inf, nan), (-1, -1e-300, -inf)),
        ("ord", (1, 1.5, inf), (0, 1 - 2**-24, -inf, nan)),
        ("max_norm", (0, inf), (-1, nan)),
        ("lr", (0, 1e30), (-1, inf, nan)),
        ("unscale", (1e-30, 2), (0, -1, inf, nan)),
    ):
        for make in (float, np.float64, np.array):
            for value in within:
                takers[taker](make(value))
            for value in beyond:
                with pytest.raises(ValueError, match=rf"^{taker}: expected a .*, got "):
                    takers[taker](make(value))


def test_arrays_of_bounds_hold_real_numbers():
    for bound in (np.ones(3, complex), np.ma.ones(3), np.ones(3, "m8")):
        with pytest.raises(TypeError, match=r"^clip_value_max: expected real numbers, got "):
            nc.clip_by_value(ONES, np.zeros(3), bound)


def test_bounds_for_many_axes():
    for ndim in (33, 64):
        grad = np.ones((2,) + (1,) * (ndim - 2) + (3,), np.float32)
        clipped = nc.clip_by_value(grad, np.full(3, -0.5), 0.5)
        assert_same_bits(clipped, np.full_like(grad, 0.5))
        with pytest.raises(ValueError, match="clip_value_min: expected a shape that broadcasts"):
            nc.clip_by_value(grad, np.full(2, -0.5), 0.5)


BEYOND_INT64 = [
    (
        np.ma.masked_array([0, 1], [True, False]),
        (5,),
        "indices: expected an array, got a masked",
    ),
    (np.array([2**63, 0], np.uint64), (2**64,), r"dense_shape: .*none .*above 2\*\*63 - 1"),
    ([0, 1], (2**70,), r"dense_shape: .*none .*above 2\*\*63 - 1"),
    ([0, 0], (True,), "dense_shape: expected a sequence of integers"),
]


def test_indices_and_shapes_beyond_int64():
    for indices, dense_shape, message in BEYOND_INT64:
        with pytest.raises((TypeError, ValueError), match=f"^{message}"):
            nc.IndexedSlices(np.ones(2), indices, dense_shape)
        largest = nc.IndexedSlices(np.ones(2), [0, 2**63 - 2], (2**63 - 1,))
        assert nc.global_norm([largest]) == 2**0.5
        assert nc.clip_by_average_norm(largest, 1e-20).values.max() < 1.0


def test_sums_of_rows_beyond_the_range():
    for dtype in reference.DTYPES:
        native = reference.DTYPES[dtype]
        largest = float(reference.float_info(native).max)
        values = np.array([[largest], [largest], [1.0]]).astype(native)
        slices = nc.IndexedSlices(values, [0, 0, 1], (3, 1))
        (clipped,), _ = nc.clip_by_global_norm([slices], 1.0)
        assert nc.global_norm([clipped]) <= 1.0
        for name, run in {
            "grad": lambda g: nc.clip_by_norm(g, 1.0, axes=1),
            "grad'": lambda g: nc.clip_by_norm(g, 1.0, axes=0, out=g),
            "grad''": lambda g: nc.adaptive_clip(g, np.ones((3, 1))),
            r"grads\[0\]": lambda g: nc.clip_per_example([g], 1.0),
        }.items():
            with pytest.raises(
                ValueError, match=rf"^{name.strip(chr(39))}: .*sums .*a wider dtype"
            ):
                run(slices)
        assert_same_bits(values, slices.values)
        broken = slices.with_values(np.array([[np.inf], [1.0], [1.0]]).astype(native))
        assert np.isnan(nc.clip_by_norm(broken, 1.0, axes=0).values.astype(complex)).all()


def test_the_sum_of_one_example_is_bounded_before_it_is_rounded():
    rng = np.random.default_rng(0)
    for _ in range(200):
        grad = rng.standard_normal((1, 40)).astype(np.float16)
        (summed,), _ = nc.clip_per_example([grad], 0.37)
        assert nc.global_norm([summed]) <= 0.37 * (1 + 2.0**-11)


def test_repeated_rows_of_no_width():
    for dtype, shape in itertools.product(reference.DTYPES, [(3, 0), (3, 2, 0)]):
        values = np.zeros((2, *shape[1:]), reference.DTYPES[dtype])
        slices = nc.IndexedSlices(values, [1, 1], shape)
        assert nc.global_norm([slices]) == nc.global_norm([slices], ord=3) == 0.0
        for run in (
            lambda g: nc.clip_by_global_norm([g], 1.0)[0][0],
            lambda g: nc.clip_by_average_norm(g, 1.0, out=g),
            lambda g: nc.clip_by_norm(g, 1.0, axes=0),
            lambda g: nc.adaptive_clip(g, np.ones(g.dense_shape)),
            lambda g: nc.clip_by_norm(g, 0.0, axes=-1, out=g),
        ):
            assert run(slices).dense_shape == shape


VIEWED = [
    lambda g: nc.clip_by_norm(g, 0.5, out=g.T),
    lambda g: nc.clip_by_norm(g, 0.5, axes=0, out=g.T),
    lambda g: nc.clip_by_average_norm(g, 1e-3, out=g.T),
    lambda g: nc.clip_by_value(g, -0.5, 0.5, out=g.T),
    lambda g: nc.adaptive_clip(g, g, out=g.T),
    lambda g: nc.clip_by_global_norm([g], 0.5, out=[g.T]),
    lambda g: nc.clip_by_global_norm([g], 0.5, out=[g[::-1]]),
]


def test_a_view_of_the_gradient_in_another_order_is_refused():
    for run in VIEWED:
        grad = np.arange(16.0).reshape(4, 4)
        with pytest.raises(ValueError, match=r"^out.*: shares memory with grad.*in place"):
            run(grad)
        assert_same_bits(grad, np.arange(16.0).reshape(4, 4))


SUMMING = [
    lambda g, **o: nc.clip_by_norm(g, 1.0, axes=1, **o),
    lambda g, **o: nc.clip_by_value(g, -1.0, 1.0, **o),
    lambda g, **o: nc.adaptive_clip(g, np.full((9, 2), 0.1), 1.0, axes=1, **o),
]


def test_sums_of_rows_go_to_the_first_row_of_each():
    for run in SUMMING:
        values = np.array([[7.0, 1], [2, 2], [70, 3], [5, 4], [20, 5]])
        slices = nc.IndexedSlices(values, [7, 2, 7, 5, 2], (9, 2))
        dense = run(slices.to_dense())
        found = run(slices, out=slices)
        assert found is slices
        wanted = np.array([dense[7], dense[2], [0, 0], dense[5], [0, 0]])
        np.testing.assert_allclose(values, wanted, rtol=1e-14)


def test_indices_are_copied():
    indices = np.array([1, 2])
    slices = nc.IndexedSlices(np.array([3.0, 4.0]), indices, (5,))
    indices[...] = 3
    assert slices.indices.tolist() == [1, 2]
    with pytest.raises(ValueError, match="read-only"):
        slices.indices[0] = 3
    assert nc.global_norm([slices]) == 5.0

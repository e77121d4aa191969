"""Every magnitude and random gradients on the GPU, or its stand-in: the bound holds exactly."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import numclip as nc
from tests.cuda.devices import HARDWARE, OnDevice, ready
from tests.functions import test_magnitudes as magnitudes
from tests.functions import test_properties as properties
from tests.oracle import checks, reference, strategies

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
some = settings(
    max_examples=200 if HARDWARE else 25,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    functions = OnDevice()
    for module in (magnitudes, properties):
        monkeypatch.setattr(module, "nc", functions)
    for rule in ("norm", "average_norm", "block_rms"):
        clip = getattr(functions, f"clip_by_{rule}")
        monkeypatch.setitem(magnitudes.RULES, rule, (clip, *magnitudes.RULES[rule][1:]))


@pytest.mark.parametrize("first", magnitudes.NAMES if HARDWARE else ("tiny", "safmax"))
@pytest.mark.parametrize("name", reference.DTYPES)
def test_pairs_of_magnitudes(name, first):
    magnitudes.test_pairs_of_magnitudes(name, first)


@pytest.mark.parametrize("scale", [1.0, 1e-16, 1e-300])
@pytest.mark.parametrize("rule", ["global_norm", "norm", "average_norm", "block_rms"])
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_bounds_of_a_few_subnormals(name, rule, scale):
    magnitudes.test_bounds_of_a_few_subnormals(name, rule, scale)


@pytest.mark.parametrize("ord", [1, 1.5, 3, 10, 100.0, math.inf])
@pytest.mark.parametrize("name", reference.REAL_DTYPES)
def test_other_orders_at_every_magnitude(name, ord):
    magnitudes.test_other_orders_at_every_magnitude(name, ord)


@some
@given(st.data(), strategies.lists())
def test_global_norm_bound(data, grads):
    properties.test_global_norm_bound.hypothesis.inner_test(data, grads)


@some
@given(st.data(), strategies.lists(wild=False))
def test_global_norm_bound_of_ordinary_magnitudes(data, grads):
    properties.test_global_norm_bound_of_ordinary_magnitudes.hypothesis.inner_test(data, grads)


@some
@given(st.data(), strategies.arrays())
def test_average_norm_bound(data, grad):
    properties.test_average_norm_bound.hypothesis.inner_test(data, grad)


@some
@given(st.data(), strategies.lists())
def test_second_clip_changes_no_bit(data, grads):
    properties.test_second_clip_changes_no_bit.hypothesis.inner_test(data, grads)


@some
@given(strategies.lists())
def test_norm_is_right(grads):
    properties.test_norm_is_right.hypothesis.inner_test(grads)


@some
@given(st.data(), strategies.sparse(), strategies.arrays())
def test_sparse_bound(data, slices, other):
    properties.test_sparse_bound.hypothesis.inner_test(data, slices, other)


@some
@given(st.data(), strategies.sparse())
def test_raw_sparse_bound(data, slices):
    properties.test_raw_sparse_bound.hypothesis.inner_test(data, slices)


@some
@given(strategies.sparse())
def test_sparse_norm_is_right(slices):
    properties.test_sparse_norm_is_right.hypothesis.inner_test(slices)


@some
@given(strategies.sparse(), st.sampled_from([1e-3, 0.3, 0.999]))
def test_sparse_is_as_on_the_host(slices, ratio):
    bound = min(ratio * nc.global_norm([slices]), 1e300)
    wanted, norm = nc.clip_by_global_norm([slices], bound)
    found, same = OnDevice().clip_by_global_norm([slices], bound)
    assert same == pytest.approx(norm, rel=1e-15)
    values = found[0].values, wanted[0].values
    if np.finfo(slices.dtype if slices.dtype.kind != "V" else "f4").bits < 64:
        checks.assert_same_bits(*values)
    else:
        real = reference.real_dtype(slices.dtype)
        np.testing.assert_array_max_ulp(*(array.view(real) for array in values), 4)

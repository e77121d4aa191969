"""IndexedSlices on the GPU, or on its stand-in, against those of the host."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip import tables
from numclip.cuda import memory
from numclip.cuda import rows as grouping
from numclip.cuda.arrays import DeviceArray
from numclip.dtypes import lookup
from numclip.host.rows import group
from numclip.memory import RowSpan
from tests.cuda.devices import HARDWARE, OnDevice, fetch, ready, send
from tests.oracle import cases, checks, reference

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
DTYPES = reference.DTYPES if HARDWARE else ("bfloat16", "float32", "float64", "complex64")


ROWS = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]], np.float32)
INDICES = np.array([4, 1, 4, 0])
DENSE = np.array([[7.0, 8], [3, 4], [0, 0], [0, 0], [6, 8]], np.float32)


def few_rows() -> nc.IndexedSlices:
    return nc.IndexedSlices(ROWS.copy(), INDICES.copy(), (5, 2))


def example(name: str = "float32", seed: int = 8) -> nc.IndexedSlices:
    rng = np.random.default_rng(seed)
    return cases.slices(rng, 40, (30, 4), name, repeated=True)


def integers(indices: Any, dtype: Any = np.int64) -> DeviceArray:
    """Indices on the device."""
    array = np.array(indices, dtype)
    made = DeviceArray(memory.Memory(array.nbytes), 0, array.shape, array.dtype)
    memory.write(made.address, array.reshape(-1).view(np.uint8), 0)
    return made


# ---- construction


@pytest.mark.parametrize("dtype", [np.int32, np.uint64])
def test_construction(dtype):
    values = send(ROWS)
    slices = nc.IndexedSlices(values, integers(INDICES, dtype), [5, 2])
    assert type(slices) is nc.IndexedSlices
    assert slices.values is values
    assert slices.is_cuda
    assert (slices.dtype, slices.dense_shape) == (np.float32, (5, 2))
    assert repr(slices) == "IndexedSlices(4 rows of float32, dense_shape=(5, 2))"
    np.testing.assert_array_equal(slices.indices, INDICES)
    np.testing.assert_array_equal(fetch(slices.to_dense()), DENSE)
    assert nc.global_norm([slices]) == reference.norm([DENSE])


@pytest.mark.parametrize(
    ("indices", "dense_shape", "error", "message"),
    [
        ([4, 1, 4], (5, 2), ValueError, r"indices: expected one for each row of values"),
        ([4, 1, 4, 5], (5, 2), ValueError, r"indices: expected rows in \[0, 5\).*1 to 5"),
        ([4, 1, 4, 0], (5, 3), ValueError, r"values: expected rows of shape \(3,\)"),
        ([4, 1, 4, 0], (5.5, 2), TypeError, r"dense_shape: expected a sequence of integers"),
    ],
)
def test_construction_errors(indices, dense_shape, error, message):
    for given in (indices, integers(indices)):
        with pytest.raises(error, match=message):
            nc.IndexedSlices(send(ROWS), given, dense_shape)


def test_what_slices_are_not_made_of():
    values = send(ROWS)
    with pytest.raises(TypeError, match=r"indices: expected integers, got float64"):
        nc.IndexedSlices(values, send(np.ones(4)), (5, 2))
    with pytest.raises(ValueError, match=r"indices: expected a contiguous 1-d CUDA array, got str"):
        nc.IndexedSlices(values, integers([INDICES]), (5, 2))
    with pytest.raises(ValueError, match=r"values: expected rows in C order on the GPU, got str"):
        nc.IndexedSlices(send(np.asfortranarray(ROWS)), INDICES, (5, 2))
    with pytest.raises(TypeError, match=r"values: expected one of float16.* got int64"):
        nc.IndexedSlices(integers(ROWS), INDICES, (5, 2))
    with pytest.raises(TypeError, match=r"to_scipy: expected values in the host's memory, got a"):
        nc.IndexedSlices(values, INDICES, (5, 2)).to_scipy()


@pytest.mark.parametrize("name", DTYPES)
def test_slices_are_joined_there(name):
    one, two = example(name, 1), example(name, 2)
    joined = send(one) + send(two)
    assert joined.is_cuda
    np.testing.assert_array_equal(joined.indices, (one + two).indices)
    checks.assert_same_bits(fetch(joined.values), (one + two).values)
    with pytest.raises(ValueError, match=r"parts\[1\]: expected .*'cuda', as in .*got .*'cpu'"):
        nc.IndexedSlices.concatenate([send(one), two])


# ---- merging


@pytest.mark.parametrize("name", DTYPES)
def test_sums_are_those_of_the_host(name):
    slices = example(name)
    sent = send(slices)
    checks.assert_same_bits(fetch(sent.coalesce()), slices.coalesce())
    np.testing.assert_array_equal(sent.coalesce().indices, slices.coalesce().indices)
    checks.assert_same_bits(fetch(sent.to_dense()), slices.to_dense())
    checks.assert_same_bits(fetch(sent), slices)


@pytest.mark.parametrize("shape", [(9,), (9, 0), (9, 2, 3), (9, 17)])
@pytest.mark.parametrize("rows", [0, 1, 23])
def test_shapes(shape, rows):
    """One column and several strips of them, no element, no row, indices of every count."""
    slices = cases.slices(np.random.default_rng(rows), rows, shape, "float32", repeated=True)
    slices = nc.IndexedSlices(slices.values, slices.indices * slices.indices // 99, shape)
    sent = send(slices)
    checks.assert_same_bits(fetch(sent.to_dense()), slices.to_dense())
    assert nc.global_norm([sent]) == pytest.approx(nc.global_norm([slices]), rel=1e-15)


@pytest.mark.parametrize("name", ["float16", "float32", "complex128"])
@pytest.mark.parametrize("columns", [1, 3, 64, 300, 1500])
def test_shares_cover_every_sum_once(columns, name):
    dtype = lookup(np.dtype(name))
    for rows, most in ((0, 1), (1, 1), (50, 2), (200, 150), (3000, 4)):
        indices = np.random.default_rng(rows).integers(0, most, rows)
        groups = group(indices)
        span = RowSpan(dtype, 0, 0, rows * columns, columns * dtype.components)
        distinct = groups[1].size - 1
        mapped = grouping._mapped(span, groups, 0, 0, np.arange(distinct))
        assert len(mapped.shares) == grouping.count(span)
        seen = np.zeros((distinct, columns), int)
        for share in mapped.shares:
            width, lanes = 1 << share[tables.WIDTH], 1 << share[tables.LANES]
            assert width * lanes <= 256
            first = share[tables.COLUMN]
            seen[share[tables.BEGIN] : share[tables.END], first : first + width] += 1
        assert (seen == 1).all()


# ---- clipping


@pytest.mark.parametrize("policy", ["propagate", "raise", "skip", "zero"])
@pytest.mark.parametrize(
    ("name", "ord", "duplicates"),
    [("float64", 2, "sum"), ("complex128", 3, "sum"), ("float32", 1, "raw")],
)
def test_policies(policy, name, ord, duplicates):
    grads = {"E": example(name), "w": cases.normal(np.random.default_rng(0), (9,))}
    grads["E"].values[3, 1], grads["E"].values[7, 2] = math.nan, -math.inf
    sent = {name: send(grad) for name, grad in grads.items()}
    how = {"nonfinite": policy, "duplicates": duplicates, "ord": ord}
    if policy == "raise":
        with pytest.raises(nc.NonFiniteGradientError, match=r"grads\['E'\] is not finite: .*nan"):
            nc.clip_by_global_norm(sent, 1.0, **how, out=sent)
        checks.assert_same_bits(fetch(sent["E"]), grads["E"])
        return
    wanted, norm = nc.clip_by_global_norm(grads, 1.0, **how)
    for out in (None, sent):
        found, same = nc.clip_by_global_norm(sent, 1.0, **how, out=out)
        np.testing.assert_allclose(float(same), norm, rtol=1e-13)
        for name, grad in wanted.items():
            pair = reference.stored(fetch(found[name])), reference.stored(grad)
            np.testing.assert_allclose(*pair, rtol={1: 2e-7, 2: 1e-15, 3: 1e-12}[ord])


@pytest.mark.parametrize("given", [0.0, 0.5, 70.0, math.inf, math.nan])
@pytest.mark.parametrize("policy", ["propagate", "zero"])
def test_a_norm_that_is_given(policy, given):
    values = np.array([[8.0], [-7.9], [1.0]], np.float32)
    slices = nc.IndexedSlices(values, np.array([1, 1, 0]), (3, 1))
    wanted, norm = nc.clip_by_global_norm([slices], 1.0, given, nonfinite=policy)
    found, same = nc.clip_by_global_norm([send(slices)], 1.0, given, nonfinite=policy)
    np.testing.assert_allclose(float(same), norm)
    np.testing.assert_array_equal(fetch(found[0]).values, wanted[0].values)


@pytest.mark.parametrize("scale", [1.5e308, 1e200, 1.0, 1e-200, 1e-308, 5e-324])
@pytest.mark.parametrize("cancels", [False, True])
def test_every_magnitude_of_float64(scale, cancels):
    """Sums beyond float64, squares beyond it on either side, and rows that cancel."""
    rng = np.random.default_rng(3)
    values = rng.choice([-1.0, -0.75, 0.5, 1.0], (12, 3)) * scale
    if cancels:
        values[::2] = -values[1::2] * (1 - 2.0**-40)
    slices = nc.IndexedSlices(values, np.arange(12) // 6, (4, 3))
    exact = reference.norm([slices])
    sent = send(slices)
    checks.assert_norm(float(nc.global_norm([sent])), [slices])
    for bound in (0.3 * min(exact, 1e308), 1e-5):
        (clipped,), norm = nc.clip_by_global_norm([sent], bound)
        checks.assert_clipped([slices], [fetch(clipped)], Fraction(bound) ** 2, float(norm))


def test_bounds_of_a_few_subnormals():
    """What rounding subnormal terms can add is left room for, as on the host."""
    values = np.array([[1.0], [-0.3], [-0.4]], np.float32)
    slices = nc.IndexedSlices(values, np.array([1, 1, 1]), (3, 1))
    for units in (1.0, 2.5, 7.7, 300.3):
        bound = units * 2.0**-149
        (clipped,), _ = nc.clip_by_global_norm([send(slices)], bound)
        assert reference.square_sum([fetch(clipped)]) <= Fraction(bound) ** 2
        wanted = nc.clip_by_global_norm([slices], bound)[0][0]
        checks.assert_same_bits(fetch(clipped), wanted)


@pytest.mark.parametrize("repeated", [False, True])
def test_clip_by_value_between_arrays(repeated):
    rng = np.random.default_rng(2)
    slices = cases.slices(rng, 12, (30, 4), "float32", repeated=repeated)
    low, high = -0.3 * rng.random((30, 1)), 0.3 * rng.random((30, 4))
    wanted = nc.clip_by_value(slices, low, high)
    sent = nc.IndexedSlices(send(slices.values), slices.indices, slices.dense_shape)
    found = nc.clip_by_value(sent, send(low), high)
    np.testing.assert_array_equal(found.indices, wanted.indices)
    checks.assert_same_bits(fetch(found.values), wanted.values)


def test_clip_by_value_into_other_slices():
    slices = few_rows()
    for other in (None, few_rows()):
        sent = send(slices)
        out = sent if other is None else send(other)
        assert nc.clip_by_value(sent, -1.0, 6.5, out=out) is out
        wanted = few_rows()
        nc.clip_by_value(slices, -1.0, 6.5, out=wanted)
        checks.assert_same_bits(fetch(out), wanted)


def test_results_are_checked():
    sent = send(few_rows())
    others = {
        r"out\[0\]: expected IndexedSlices, got DeviceArray": (TypeError, sent.values),
        r"out\[0\]: expected the indices and dense_shape of grads\[0\]": (
            ValueError,
            nc.IndexedSlices(sent.values, INDICES[::-1], (5, 2)),
        ),
    }
    for message, (error, out) in others.items():
        with pytest.raises(error, match=message):
            nc.clip_by_global_norm([sent], 1.0, out=[out])
    with pytest.raises(TypeError, match=r"out\[0\]: expected an array, got IndexedSlices"):
        nc.clip_by_global_norm([sent.values], 1.0, out=[sent])


def test_tables_are_sent_once_for_the_same_rows(monkeypatch):
    sent, other = send(few_rows()), send(few_rows())
    norm = nc.global_norm([sent])
    monkeypatch.setattr(grouping.Rows, "take", None)
    assert nc.global_norm([sent]) == norm
    with pytest.raises(TypeError):
        nc.global_norm([nc.IndexedSlices(sent.values, sent.indices, (5, 2))])
    monkeypatch.undo()
    again = nc.IndexedSlices(sent.values, np.array([0, 1, 2, 3]), (5, 2))
    assert nc.global_norm([again]) == pytest.approx(reference.norm([ROWS]), rel=1e-15)
    assert nc.global_norm([sent]) == norm == nc.global_norm([other])


@pytest.mark.parametrize("name", ["float32", "complex64"])
@pytest.mark.parametrize("ord", [1, 2.5, math.inf])
def test_other_orders_of_rows_that_cancel(name, ord):
    """The factor leaves room for the rounding of terms, as on the host."""
    values = np.array([[8.0, 1.0], [-7.9, 0.5], [1.0, -2.0]]).astype(name)
    if name == "complex64":
        values = values * np.complex64(1 - 0.7j)
    slices = nc.IndexedSlices(values, np.array([1, 1, 0]), (3, 2))
    grads = [slices, cases.normal(np.random.default_rng(0), (5,), name)]
    wanted, norm = nc.clip_by_global_norm(grads, 0.5, ord=ord)
    found, same = OnDevice().clip_by_global_norm(grads, 0.5, ord=ord)
    assert same == pytest.approx(norm, rel=1e-14)
    for here, there in zip(wanted, found, strict=True):
        pair = reference.stored(there), reference.stored(here)
        np.testing.assert_allclose(*pair, rtol=2e-7)


def test_sums_beyond_float64_are_not_finite_for_other_orders():
    slices = nc.IndexedSlices(np.full((2, 1), 1.7e308), np.array([0, 0]), (1, 1))
    with pytest.raises(nc.NonFiniteGradientError, match=r"the sum of repeated rows is not finite"):
        nc.clip_by_global_norm([send(slices)], 1.0, ord=3, nonfinite="raise")

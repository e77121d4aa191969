"""IndexedSlices: a sparse gradient is the dense array it stands for, on every target."""

from __future__ import annotations

import math
import tracemalloc
from fractions import Fraction

import numpy as np
import pytest
import scipy.sparse

import numclip as nc
from numclip.host.kernels.tuning import STRIP
from tests.oracle import cases, checks, reference

ROWS = np.array([[1.0, 2], [3, 4], [5, 6], [7, 8]], np.float32)
INDICES = np.array([4, 1, 4, 0])
DENSE = np.array([[7.0, 8], [3, 4], [0, 0], [0, 0], [6, 8]], np.float32)


def example() -> nc.IndexedSlices:
    return nc.IndexedSlices(ROWS.copy(), INDICES.copy(), (5, 2))


def random(name: str = "float32", rows: int = 40, shape: tuple[int, ...] = (30, 4)):
    return cases.slices(np.random.default_rng(8), rows, shape, name, repeated=True)


# ---- construction


def test_attributes():
    slices = nc.IndexedSlices(ROWS, INDICES, [5, 2])
    np.testing.assert_array_equal(slices.values, ROWS)
    np.testing.assert_array_equal(slices.indices, INDICES)
    assert slices.dense_shape == (5, 2)
    assert slices.has_duplicates
    assert not nc.IndexedSlices(ROWS[:3], [4, 1, 0], (5, 2)).has_duplicates
    of_lists = nc.IndexedSlices(ROWS.tolist(), INDICES.tolist(), (5, 2))
    assert of_lists.dtype == np.float64
    np.testing.assert_array_equal(of_lists.to_dense(), DENSE)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.int64, np.uint32, np.uint64])
def test_any_integer_indices(dtype):
    slices = nc.IndexedSlices(ROWS, INDICES.astype(dtype), (5, 2))
    np.testing.assert_array_equal(slices.to_dense(), DENSE)
    assert nc.global_norm([slices]) == reference.norm([DENSE])


@pytest.mark.parametrize(
    ("values", "indices", "dense_shape", "error", "message"),
    [
        (ROWS, [4, 1, 4], (5, 2), ValueError, r"indices"),
        (ROWS, [[4, 1], [4, 0]], (5, 2), ValueError, r"indices"),
        (ROWS, [4, 1, 4, 5], (5, 2), ValueError, r"indices.*5"),
        (ROWS, [4, 1, -1, 0], (5, 2), ValueError, r"indices.*-1"),
        (ROWS, [4.0, 1, 4, 0], (5, 2), TypeError, r"indices.*float64"),
        (ROWS, [True, False, True, True], (5, 2), TypeError, r"indices.*bool"),
        (ROWS, INDICES, (5, 3), ValueError, r"rows of shape \(3,\) as in .*\(5, 3\), got \(2,\)"),
        (ROWS, INDICES, (5,), ValueError, r"values|dense_shape"),
        (ROWS, INDICES, (), ValueError, r"dense_shape"),
        (ROWS, INDICES, (-5, 2), ValueError, r"dense_shape.*-5"),
        (ROWS, INDICES, (5.5, 2), TypeError, r"dense_shape.*5\.5|dense_shape.*float"),
        (ROWS.astype(int), INDICES, (5, 2), TypeError, r"values.*int64"),
        (ROWS.astype(object), INDICES, (5, 2), TypeError, r"values.*object"),
        (np.float32(1), [0], (5,), ValueError, r"values"),
    ],
)
def test_construction_errors(values, indices, dense_shape, error, message):
    with pytest.raises(error, match=f"(?s){message}"):
        nc.IndexedSlices(values, np.array(indices), dense_shape)


# ---- merging


@pytest.mark.parametrize("name", reference.DTYPES)
def test_coalesce_sorts_and_sums(name):
    slices = random(name)
    before = slices.values.tobytes(), slices.indices.tobytes()
    merged = slices.coalesce()
    assert (slices.values.tobytes(), slices.indices.tobytes()) == before
    np.testing.assert_array_equal(merged.indices, np.unique(slices.indices))
    assert merged.dense_shape == slices.dense_shape
    assert merged.values.dtype == slices.values.dtype
    exact, terms = reference.densify(slices), reference.dense_squares(slices, absolute=True)
    rounding = len(slices.indices) * float(reference.unit_roundoff(slices.values.dtype))
    slack = rounding * np.sqrt(terms.astype(np.float64))
    assert np.all(np.abs(reference.densify(merged) - exact) <= slack)
    checks.assert_same_bits(merged.coalesce().values, merged.values)
    # Rounded once: the sum of the first two terms is midway between two numbers.
    midway = 2.0 ** reference.PRECISION[name]
    terms = np.array([[midway], [1.0], [2.0**-20]]).astype(merged.values.dtype)
    total = nc.IndexedSlices(terms, [1, 1, 1], (2, 1)).coalesce()
    assert total.values.astype(complex) == midway + 2.0


def test_dense_array():
    dense = example().to_dense()
    assert dense.dtype == np.float32
    np.testing.assert_array_equal(dense, DENSE)
    empty = nc.IndexedSlices(ROWS[:0], INDICES[:0], (5, 2))
    np.testing.assert_array_equal(empty.to_dense(), np.zeros((5, 2)))
    assert empty.coalesce().indices.size == 0


@pytest.mark.parametrize("name", ["float32", "float64", "complex64"])
@pytest.mark.parametrize("kind", ["csr_array", "csr_matrix", "coo_array", "coo_matrix"])
def test_from_scipy(kind, name):
    rng = np.random.default_rng(1)
    dense = np.where(rng.random((12, 5)) < 0.2, rng.standard_normal((12, 5)), 0)
    matrix = getattr(scipy.sparse, kind)(dense.astype(name))
    slices = nc.IndexedSlices.from_scipy(matrix)
    assert slices.dense_shape == (12, 5)
    checks.assert_same_bits(slices.to_dense(), dense.astype(name))
    assert set(np.unique(slices.indices)) == set(np.flatnonzero(dense.any(axis=1)))


def test_from_scipy_sums_repeated_entries():
    coordinates = (np.array([1, 1, 0]), np.array([2, 2, 0]))
    matrix = scipy.sparse.coo_array((np.array([1.0, 2, 5]), coordinates), shape=(3, 4))
    np.testing.assert_array_equal(nc.IndexedSlices.from_scipy(matrix).to_dense(), matrix.toarray())


def test_from_scipy_asks_for_no_more_than_is_stored_many_times():
    rng = np.random.default_rng(0)
    shape, count = (20_000, 5_000_000), 2000
    places = rng.integers(0, shape[0], count), rng.integers(0, shape[1], count)
    matrix = scipy.sparse.coo_array((np.ones(count, "f"), places), shape=shape)
    with pytest.raises(
        ValueError, match=r"m: expected 2000 .*GiB; pass m.reshape\(-1, 1\) for its"
    ):
        nc.IndexedSlices.from_scipy(matrix)
    elements = nc.IndexedSlices.from_scipy(matrix.reshape(-1, 1))
    assert elements.dense_shape == (shape[0] * shape[1], 1)
    assert nc.global_norm([elements]) == pytest.approx(2000**0.5)
    (clipped,), _ = nc.clip_by_global_norm([elements], 1.0)
    again = clipped.to_scipy().reshape(shape).tocsr()
    assert scipy.sparse.linalg.norm(again) == pytest.approx(1.0)
    assert (again.astype(bool) != matrix.tocsr().astype(bool)).nnz == 0


def test_slices_are_joined_and_stand_for_the_sum():
    one, two, three = (random(rows=rows) for rows in (40, 7, 0))
    joined = nc.IndexedSlices.concatenate(iter([one, two, three]))
    assert joined.indices.tolist() == [*one.indices, *two.indices, *three.indices]
    dense = sum(part.to_dense() for part in (one, two, three))
    np.testing.assert_allclose(joined.to_dense(), dense, rtol=1e-6, atol=1e-6)
    checks.assert_same_bits((one + two).values, np.concatenate([one.values, two.values]))
    before = one.values.copy()
    (one + two).values[...] = 0.0
    checks.assert_same_bits(one.values, before)
    turned = one.with_values(np.asfortranarray(one.values))
    checks.assert_same_bits((turned + one).to_dense(), (one + one).to_dense())


APART = [
    (lambda _: np.ones(3), r"parts\[1\]: expected IndexedSlices, got ndarray"),
    (
        lambda g: g.with_values(g.values.astype("d")),
        r"parts\[1\]: expected float32 .*got float64",
    ),
    (lambda g: nc.IndexedSlices(g.values, g.indices, (99, *g.dense_shape[1:])), r"\(99, "),
]


def test_slices_that_cannot_be_joined():
    for other, message in APART:
        slices = random()
        with pytest.raises((TypeError, ValueError), match=message):
            nc.IndexedSlices.concatenate([slices, other(slices)])
        with pytest.raises(ValueError, match="parts: expected at least one"):
            nc.IndexedSlices.concatenate([])
        with pytest.raises(TypeError, match="parts: expected an iterable of IndexedSlices"):
            nc.IndexedSlices.concatenate(slices)
        for odd in (np.ones(3), 0):
            with pytest.raises(TypeError, match=r"to_dense|unsupported operand"):
                slices + odd


def test_slices_become_no_array_of_numpy_by_the_way():
    slices = random()
    for run in (
        lambda: np.asarray(slices),
        lambda: np.array([slices]),
        lambda: np.linalg.norm(slices),
    ):
        with pytest.raises(TypeError, match=r"stand for an array of shape .*by \.to_dense\(\)"):
            run()
    with pytest.raises(TypeError, match="to_dense"):
        np.ones(3) * slices


@pytest.mark.parametrize("name", ["float32", "float64", "complex128"])
def test_to_scipy(name):
    slices = random(name)
    matrix = slices.to_scipy()
    assert scipy.sparse.issparse(matrix)
    assert matrix.format in ("csr", "coo")
    assert matrix.shape == slices.dense_shape
    assert matrix.dtype == slices.values.dtype
    np.testing.assert_allclose(
        matrix.toarray(), slices.to_dense(), rtol=1e-6, atol=1e-6
    )  # scipy adds repeated rows in another order
    np.testing.assert_allclose(
        nc.IndexedSlices.from_scipy(matrix).to_dense(), slices.to_dense(), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        (np.ones((2, 2)), r"scipy"),
        (scipy.sparse.coo_array(np.eye(2, dtype=int)), r"int64"),
    ],
)
def test_from_scipy_errors(argument, message):
    with pytest.raises(TypeError, match=message):
        nc.IndexedSlices.from_scipy(argument)


def test_to_scipy_is_for_matrices():
    slices = random(shape=(30, 2, 3))
    with pytest.raises(ValueError, match=r"\(30, 2, 3\)"):
        slices.to_scipy()


# ---- clipping


def test_repeated_rows_are_summed(target):
    slices = nc.IndexedSlices(np.array([[3.0, 0], [4.0, 0]], np.float32), np.array([1, 1]), (5, 2))
    assert target.global_norm([slices]) == 7
    assert target.global_norm([slices], duplicates="raw") == 5
    (clipped,), norm = target.clip_by_global_norm([slices], 1.0)
    assert norm == 7
    checks.assert_close(clipped.values, np.array([[3 / 7, 0], [4 / 7, 0]]))
    (clipped,), norm = target.clip_by_global_norm([slices], 1.0, duplicates="raw")
    assert norm == 5
    checks.assert_close(clipped.values, np.array([[0.6, 0], [0.8, 0]]))


@pytest.mark.parametrize("name", reference.DTYPES)
def test_rows_that_cancel(target, name):
    """The sum is small beside its terms; the bound holds all the same."""
    dtype = reference.DTYPES[name]
    big, step = 8.0, 8.0 * float(reference.float_info(dtype).eps)
    for small in (step, 3 * step, 0.5, 1.0):
        values = np.array([[big, 1.0], [-(big - small), 0.0]]).astype(dtype)
        slices = nc.IndexedSlices(values, np.array([2, 2]), (3, 2))
        for clip_norm in (0.9, 1e-3, 1e-6):
            (clipped,), norm = target.clip_by_global_norm([slices], clip_norm)
            checks.assert_clipped([slices], [clipped], Fraction(clip_norm) ** 2, norm)


@pytest.mark.parametrize("name", reference.DTYPES)
def test_rows_that_cancel_into_subnormal_results(name):
    """Truncating a negative term makes the sum larger, so no way of rounding keeps the bound."""
    dtype = reference.DTYPES[name]
    smallest = float(reference.float_info(dtype).smallest_subnormal)
    rng = np.random.default_rng(12)
    for _ in range(20):
        values = np.array([1, *-rng.uniform(0.1, 0.45, 2)]).reshape(3, 1).astype(dtype)
        slices = nc.IndexedSlices(values, np.array([1, 1, 1]), (3, 1))
        for clip_norm in smallest * rng.uniform(1, 5000, 5):
            clipped = {
                "global_norm": nc.clip_by_global_norm([slices], clip_norm)[0][0],
                "norm": nc.clip_by_norm(slices, clip_norm),
                "rows": nc.clip_by_norm(slices, clip_norm, axes=1),
                "average_norm": nc.clip_by_average_norm(slices, clip_norm / 3),
                "block_rms": nc.clip_by_block_rms(slices, clip_norm / 2),
            }
            for rule, result in clipped.items():
                assert reference.square_sum([result]) <= Fraction(clip_norm) ** 2, rule


@pytest.mark.parametrize(
    ("name", "big", "small", "count", "clip_norm"),
    [
        ("float16", 100.0, -0.5, 150, 1e-3),
        ("float16", 10.0, -0.33, 20, 1e-4),
        pytest.param("float16", 1000.0, -0.0907, 10_000, 1e-2, marks=pytest.mark.jit_only),
        pytest.param("float32", 1e6, -0.907, 20_000, 1e-37, marks=pytest.mark.jit_only),
    ],
)
def test_many_small_rows_against_a_large_one(target, name, big, small, count, clip_norm):
    values = np.array([[big], *[[small]] * count]).astype(name)
    slices = nc.IndexedSlices(values, np.zeros(count + 1, int), (1, 1))
    (clipped,), norm = target.clip_by_global_norm([slices], clip_norm)
    checks.assert_norm(norm, [slices])
    assert reference.square_sum([clipped]) <= Fraction(clip_norm) ** 2


@pytest.mark.parametrize("axes", [None, 0, 1, (0, 1)])
@pytest.mark.parametrize("name", reference.DTYPES)
def test_sums_are_not_rounded_before_they_are_measured(target, name, axes):
    """The sum exceeds the bound by less than the spacing of the dtype, yet it does."""
    excess = 0.9 * float(reference.unit_roundoff(name))
    values = np.array([[1.0], [excess]]).astype(reference.DTYPES[name])
    slices = nc.IndexedSlices(values, np.array([0, 0]), (2, 1))
    bound = 1.0 if reference.PRECISION[name] < 53 else 1 - 2.0**-40
    clipped = target.clip_by_norm(slices, bound, axes)
    assert reference.square_sum([clipped]) <= Fraction(bound) ** 2


@pytest.mark.parametrize(
    "name",
    [
        "float32",
        *(pytest.param(name, marks=pytest.mark.full) for name in ("float16", "complex128")),
    ],
)
def test_wide_rows_on_indices_of_every_count(name):
    """Rows of several strips, and groups of one, two and more rows, even and odd."""
    rng = np.random.default_rng(17)
    indices = rng.permutation(np.repeat(np.arange(6), [1, 2, 3, 4, 5, 1]))
    values = cases.normal(rng, (indices.size, 2 * STRIP + 3), name)
    slices = nc.IndexedSlices(values, indices, (9, values.shape[1]))
    checks.assert_norm(nc.global_norm([slices]), [slices])
    clipped = nc.clip_by_norm(slices, 1.0)
    checks.assert_clipped([slices], [clipped], Fraction(1))


def test_rows_that_cancel_entirely(target):
    slices = nc.IndexedSlices(np.array([[1e30], [-1e30]]), np.array([0, 0]), (3, 1))
    (clipped,), norm = target.clip_by_global_norm([slices], 1e-3)
    assert norm == 0
    checks.assert_same_bits(clipped, slices)


def test_sums_beyond_the_range_of_the_dtype(target):
    for name, largest in (("float16", 65504.0), ("float32", 3e38), ("float64", 1.7e308)):
        slices = nc.IndexedSlices(np.full((3, 2), largest, name), np.array([1, 1, 1]), (4, 2))
        (clipped,), norm = target.clip_by_global_norm([slices], 1.0)
        checks.assert_norm(norm, [slices])
        checks.assert_scaled([slices], [clipped], Fraction(1))


OWNER = np.geomspace(1e-3, 10.0, 120).reshape(30, 4)
RULES = {
    "norm": lambda target, g: target.clip_by_norm(g, 0.5),
    "norm_of_columns": lambda target, g: target.clip_by_norm(g, 0.5, axes=0),
    "norm_of_rows": lambda target, g: target.clip_by_norm(g, 0.5, axes=-1),
    "average_norm": lambda target, g: target.clip_by_average_norm(g, 1e-3),
    "block_rms": lambda target, g: target.clip_by_block_rms(g, 0.05),
    "adaptive": lambda target, g: target.adaptive_clip(g, OWNER.astype(g.dtype)),
    "adaptive_of_another_dtype": lambda target, g: target.adaptive_clip(g, OWNER),
    "adaptive_rows": lambda target, g: target.adaptive_clip(g, OWNER.astype(g.dtype), axes=1),
    "adaptive_whole": lambda target, g: target.adaptive_clip(g, OWNER.astype(g.dtype), axes=(0, 1)),
    "value": lambda target, g: target.clip_by_value(g, -0.3, 0.2),
    "order_1": lambda target, g: target.clip_by_global_norm([g], 0.5, ord=1)[0][0],
    "order_3": lambda target, g: target.clip_by_global_norm([g], 0.5, ord=3)[0][0],
    "order_inf": lambda target, g: target.clip_by_global_norm([g], 0.5, ord=math.inf)[0][0],
}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["float32", "float64"])
def test_same_as_dense(target, rule, name):
    repeated = random(name)
    distinct = nc.IndexedSlices(repeated.values[:9], np.arange(9) * 3 + 2, (30, 4))
    for slices in (repeated, distinct):
        before = slices.values.copy()
        dense = reference.densify(slices).astype(name)
        sparse = RULES[rule](target, slices)
        assert isinstance(sparse, nc.IndexedSlices)
        checks.assert_same_bits(slices.values, before)
        assert not np.shares_memory(sparse.values, slices.values)
        expected = RULES[rule](target, dense)
        # Each row is a sum of up to a handful of terms no larger than 10.
        slack = 100 * float(reference.unit_roundoff(name))
        np.testing.assert_allclose(sparse.to_dense(), expected, rtol=slack, atol=slack)
        assert np.any(sparse.to_dense() != slices.to_dense())


def test_untriggered_is_untouched(target):
    slices = random()
    for clipped in (
        target.clip_by_global_norm([slices], 1e6)[0][0],
        target.clip_by_norm(slices, 1e6),
        target.clip_by_norm(slices, 1e6, axes=1),
        target.clip_by_average_norm(slices, 1e6),
        target.clip_by_block_rms(slices, 1e6),
        target.adaptive_clip(slices, np.ones((30, 4), np.float32), 1e6),
    ):
        checks.assert_same_bits(clipped, slices)
        np.testing.assert_array_equal(clipped.indices, slices.indices)
        assert clipped is not slices


def test_in_place():
    slices = random()
    values = slices.values
    expected = nc.clip_by_norm(slices, 0.5)
    assert nc.clip_by_norm(slices, 0.5, out=slices) is slices
    assert slices.values is values
    checks.assert_same_bits(values, expected.values)
    with pytest.raises(TypeError, match="out: expected IndexedSlices, got ndarray"):
        nc.clip_by_norm(slices, 0.25, out=values)
    with pytest.raises(TypeError, match="out: expected an array, got IndexedSlices"):
        nc.clip_by_norm(values, 0.25, out=slices)
    checks.assert_same_bits(values, expected.values)


def test_values_of_any_layout():
    expected = nc.clip_by_norm(example(), 0.5)
    for layout in ("fortran", "strided", "negative", "misaligned"):
        values = cases.LAYOUTS[layout](ROWS)
        slices = nc.IndexedSlices(values, INDICES, (5, 2))
        checks.assert_same_bits(nc.clip_by_norm(slices, 0.5), expected)
        nc.clip_by_norm(slices, 0.5, out=slices)
        checks.assert_same_bits(slices, expected)
        assert slices.values is values
    slices = nc.IndexedSlices(cases.read_only(ROWS), INDICES, (5, 2))
    checks.assert_same_bits(nc.clip_by_norm(slices, 0.5), expected)
    with pytest.raises(ValueError, match=r"out.*read-only"):
        nc.clip_by_norm(slices, 0.5, out=slices)


def test_clip_by_value_merges(target):
    clipped = target.clip_by_value(example(), -1.0, 6.5)
    np.testing.assert_array_equal(clipped.indices, [0, 1, 4])
    np.testing.assert_array_equal(clipped.to_dense(), np.minimum(DENSE, 6.5))


@pytest.mark.parametrize(("low", "high"), [(0.5, 1.0), (-1.0, -0.5), (1e-30, 1.0)])
def test_clip_by_value_keeps_the_rows_that_are_not_stored(target, low, high):
    with pytest.raises(ValueError, match=r"(?s)clip_value_m(in|ax).*0"):
        target.clip_by_value(example(), low, high)


@pytest.mark.parametrize("axes", [None, (1,), (0,)])
def test_non_finite_rows(target, axes):
    slices = example()
    slices.values[2, 0] = np.inf  # one of two terms of row 4
    clipped = target.clip_by_norm(slices, 1.0, axes).to_dense()
    spoilt = np.zeros((5, 2), bool)
    spoilt[{None: (INDICES,), (1,): (4,), (0,): (INDICES, 0)}[axes]] = True
    np.testing.assert_array_equal(np.isnan(clipped), spoilt)


# ---- size


def test_nothing_of_the_dense_size_is_allocated():
    rows = 10**9
    values = cases.normal(np.random.default_rng(0), (50, 8))
    indices = np.random.default_rng(1).integers(0, rows, 50)
    indices[:10] = rows - 1
    slices = nc.IndexedSlices(values, indices, (rows, 8))
    exact = reference.norm([slices])

    def run():
        clipped, norm = nc.clip_by_global_norm([slices], exact / 2)
        assert norm == pytest.approx(exact, rel=1e-7)
        nc.clip_by_norm(slices, 0.1)
        nc.clip_by_norm(slices, 0.1, axes=0)
        nc.clip_by_norm(slices, 0.1, axes=1)
        nc.clip_by_average_norm(slices, 1e-12)
        nc.clip_by_block_rms(slices, 1e-6)
        nc.clip_by_value(slices, -0.1, 0.1)
        nc.clip_by_global_norm(clipped, 1.0, out=clipped)
        slices.coalesce()

    run()  # compiled here, measured below
    tracemalloc.start()
    try:
        run()
        assert tracemalloc.get_traced_memory()[1] < 2**22
    finally:
        tracemalloc.stop()


def test_rows_too_many_to_count_in_int32():
    big = 2**40
    slices = nc.IndexedSlices(ROWS, np.array([big - 1, 3, big - 1, 2**33]), (big, 2))
    assert nc.global_norm([slices]) == pytest.approx(reference.norm([DENSE]), rel=1e-7)
    np.testing.assert_array_equal(slices.coalesce().indices, [3, 2**33, big - 1])

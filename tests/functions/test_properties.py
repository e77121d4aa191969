"""What holds for every input, host and GPU: generated gradients of every magnitude and dtype."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import assume
from hypothesis import strategies as st

import numclip as nc
from tests.oracle import cases, checks, reference, strategies


def grid(array: np.ndarray, columns: int) -> np.ndarray:
    """The array cut to whole rows of so many columns."""
    return array[: array.size // columns * columns].reshape(-1, columns)


# ---- bound, shortfall, identity, direction, sign


@strategies.drawn(st.data(), strategies.lists())
def test_global_norm_bound(target, data, grads):
    norm = target.global_norm(grads)
    bound = data.draw(strategies.bounds(reference.norm(grads)))
    clipped, same_norm = target.clip_by_global_norm(grads, bound)
    assert same_norm == norm
    checks.assert_clipped(grads, clipped, Fraction(bound) ** 2, norm)


@strategies.drawn(st.data(), strategies.lists(wild=False))
def test_global_norm_bound_of_ordinary_magnitudes(target, data, grads):
    norm = reference.norm(grads)
    assume(norm > 0)
    bound = norm * data.draw(st.floats(0.25, 1 - 2**-20))
    clipped, _ = target.clip_by_global_norm(grads, bound)
    assert not any(map(checks.underflowed, grads, clipped)), "the shortfall would go unseen"
    checks.assert_scaled(grads, clipped, Fraction(bound) ** 2)


@pytest.mark.parametrize("axes", [None, 0, 1, (0, 1)])
@strategies.drawn(st.data(), strategies.arrays())
def test_norm_bound(target, axes, data, flat):
    grad = grid(flat, 3)
    units = reference.units(grad.shape, axes)
    which = data.draw(st.sampled_from(units)) if units else ...
    bound = data.draw(strategies.bounds(reference.norm([grad[which]])))
    clipped = target.clip_by_norm(grad, bound, axes)
    for unit in units:
        checks.assert_clipped([grad[unit]], [clipped[unit]], Fraction(bound) ** 2)
    checks.assert_same_bits(target.clip_by_norm(clipped, bound, axes), clipped)


@strategies.drawn(st.data(), strategies.arrays())
def test_average_norm_bound(target, data, grad):
    norm = reference.root(reference.square_sum([grad]) / max(grad.size, 1) ** 2)
    bound = data.draw(strategies.bounds(norm))
    clipped = target.clip_by_average_norm(grad, bound)
    checks.assert_clipped([grad], [clipped], reference.average_norm_bound(grad, bound))
    checks.assert_same_bits(target.clip_by_average_norm(clipped, bound), clipped)


@strategies.drawn(st.data(), strategies.arrays())
def test_block_rms_bound(target, data, grad):
    rms = reference.root(reference.square_sum([grad]) / max(grad.size, 1))
    bound = data.draw(strategies.bounds(rms))
    clipped = target.clip_by_block_rms(grad, bound)
    checks.assert_clipped([grad], [clipped], reference.block_rms_bound(grad, bound))
    checks.assert_same_bits(target.clip_by_block_rms(clipped, bound), clipped)


@strategies.drawn(st.data(), strategies.arrays(most=24))
def test_adaptive_bound(target, data, flat):
    grad = grid(flat, 2)
    wild = data.draw(st.booleans())
    drawn = data.draw(strategies.arrays(flat.dtype.name, wild=wild, most=24))
    param = np.resize(drawn, grad.shape) if drawn.size else np.zeros_like(grad)
    factor = data.draw(st.sampled_from([1e-30, 0.01, 0.1, 1 / 3, 1.0, 50.0]))
    eps = data.draw(st.sampled_from([1e-3, 1e-300, 1.0]))
    clipped = target.adaptive_clip(grad, param, factor, eps)
    for unit in reference.units(grad.shape, (0,)):
        bound = reference.adaptive_bound(param[unit], factor, eps)
        checks.assert_clipped([grad[unit]], [clipped[unit]], bound)
    checks.assert_same_bits(target.adaptive_clip(clipped, param, factor, eps), clipped)


@strategies.drawn(st.data(), strategies.sparse(), strategies.arrays())
def test_sparse_bound(target, data, slices, other):
    grads = {"sparse": slices, "dense": other}
    bound = data.draw(strategies.bounds(reference.norm(grads)))
    clipped, norm = target.clip_by_global_norm(grads, bound)
    np.testing.assert_array_equal(clipped["sparse"].indices, slices.indices)
    checks.assert_clipped(grads, clipped, Fraction(bound) ** 2, norm)
    again, norm = target.clip_by_global_norm(clipped, bound)
    assert norm <= bound
    for name in grads:
        checks.assert_same_bits(again[name], clipped[name])


@strategies.drawn(st.data(), strategies.sparse())
def test_raw_sparse_bound(target, data, slices):
    norm = reference.norm([slices], duplicates="raw")
    bound = data.draw(strategies.bounds(norm))
    (clipped,), norm = target.clip_by_global_norm([slices], bound, duplicates="raw")
    checks.assert_clipped([slices.values], [clipped.values], Fraction(bound) ** 2, norm)


@strategies.drawn(st.data(), strategies.lists())
def test_second_clip_changes_no_bit(target, data, grads):
    bound = data.draw(strategies.bounds(reference.norm(grads)))
    once, _ = target.clip_by_global_norm(grads, bound)
    twice, norm = target.clip_by_global_norm(once, bound)
    assert norm <= bound
    for first, second in zip(once, twice, strict=True):
        checks.assert_same_bits(second, first)


@strategies.drawn(st.data(), strategies.lists())
def test_in_place_and_out_of_place_agree(target, data, grads):
    bound = data.draw(strategies.bounds(reference.norm(grads)))
    kept = [grad.copy() for grad in grads]
    expected, norm = target.clip_by_global_norm(grads, bound)
    for grad, copy in zip(grads, kept, strict=True):
        checks.assert_same_bits(grad, copy)
    _, same_norm = target.clip_by_global_norm(grads, bound, out=grads)
    assert same_norm == norm
    for grad, new in zip(grads, expected, strict=True):
        checks.assert_same_bits(grad, new)


@pytest.mark.each_value
@pytest.mark.parametrize("ord", [1, 1.5, 3, 10, math.inf])
@strategies.drawn(st.data(), strategies.lists(wild=False))
def test_other_orders(target, ord, data, grads):
    exact = reference.norm(grads, ord)
    assume(exact > 0)
    bound = exact * data.draw(st.sampled_from([1 / 3, 0.999, 1.001, 7.0]))
    clipped, norm = target.clip_by_global_norm(grads, bound, ord=ord)
    assert norm == pytest.approx(exact, rel=1e-12)
    if norm <= bound:
        for old, new in zip(grads, clipped, strict=True):
            checks.assert_same_bits(new, old)
        return
    checks.assert_one_factor(grads, clipped)
    # The exact bound is promised for the L2 norm; rounding may cost the others the same either way.
    units = float(reference.roundoff_units(grad.dtype for grad in grads))
    assert reference.norm(clipped, ord) == pytest.approx(bound, rel=units)


@strategies.drawn(
    strategies.lists(wild=False), st.floats(0.5, 1e6), st.sampled_from([0.01, 0.4, 2.0])
)
def test_use_norm_takes_the_place_of_the_norm(target, grads, use_norm, ratio):
    bound = use_norm * ratio
    clipped, norm = target.clip_by_global_norm(grads, bound, use_norm)
    assert norm == use_norm
    if ratio < 1:
        checks.assert_one_factor(grads, clipped)
    for old, new in zip(grads, clipped, strict=True):
        if ratio >= 1:
            checks.assert_same_bits(new, old)
        else:
            checks.assert_close(new, reference.wide(old) * (bound / use_norm), grads)


# ---- the norm


@strategies.drawn(strategies.lists())
def test_norm_is_right(target, grads):
    checks.assert_norm(target.global_norm(grads), grads)


@strategies.drawn(strategies.sparse())
def test_sparse_norm_is_right(target, slices):
    checks.assert_norm(target.global_norm([slices]), [slices])
    checks.assert_norm(target.global_norm([slices], duplicates="raw"), [slices], "raw")


@pytest.mark.full
@pytest.mark.jit_only
@pytest.mark.parametrize("name", reference.DTYPES)
def test_norm_of_a_million_elements_is_right(target, name):
    rng = np.random.default_rng(11)
    grad = cases.normal(rng, (1_000_003,), name)
    checks.assert_norm(target.global_norm([grad]), [grad])
    # A few large elements first, then many small ones that a plain running sum would lose.
    grad = np.full(1_000_003, 1e-3).astype(grad.dtype)
    grad[:7] = 100
    checks.assert_norm(target.global_norm([grad]), [grad])


@pytest.mark.parametrize("name", ["float64", "complex128"])
@pytest.mark.parametrize(
    ("size", "exponents"),
    [
        (3000, (-33, -31, -29)),
        # 2**-54 is lost in a plain sum; compiled kernels add each block in several lanes.
        pytest.param(300_000, (-33, -31, -29, -27), marks=[pytest.mark.jit_only, pytest.mark.full]),
    ],
)
def test_norm_keeps_what_a_running_sum_would_lose(target, name, size, exponents):
    for exponent in exponents:
        grad = np.full(size, 2.0**exponent).astype(name)
        grad[0] = 1
        checks.assert_norm(target.global_norm([grad]), [grad])
        checks.assert_norm(target.global_norm(np.split(grad, [1, 7, 100])), [grad])


# ---- sparse gradients are the dense arrays they stand for


@pytest.mark.parametrize("axes", [None, 0, 1, (0, 1)])
@strategies.drawn(st.data(), strategies.sparse(wild=False))
def test_sparse_is_dense(target, axes, data, slices):
    dense = reference.densify(slices)
    bound = data.draw(st.sampled_from([1e-2, 0.3, 1.0, 30.0])) * float(np.max(np.abs(dense)))
    clipped = target.clip_by_norm(slices, bound, axes)
    before, after = reference.dense_squares(slices), reference.dense_squares(clipped)
    # Repeated rows that cancel leave the rounding of their terms behind.
    terms = reference.dense_squares(slices, absolute=True)
    units = 2 * float(reference.roundoff_units([slices.values.dtype]))
    actual = reference.densify(clipped)
    for unit in reference.units(dense.shape, axes):
        square, squared_bound = np.sum(before[unit]), Fraction(bound) ** 2
        factor = 1.0 if square <= squared_bound else reference.root(squared_bound / square)
        if not reference.norm_within(bound, square, checks.norm_slack([slices])):
            assert np.sum(after[unit]) <= squared_bound
        size = np.sqrt(terms[unit].astype(np.float64))
        loss = reference.root(np.sum(terms[unit]) / square) if square else 1.0
        slack = units * factor * (size + loss * np.abs(dense[unit]))
        assert np.all(np.abs(actual[unit] - dense[unit] * factor) <= slack)


# ---- the same bits


@pytest.fixture
def threads():
    yield
    nc.set_num_threads(None)


@pytest.mark.jit_only
@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("name", reference.DTYPES)
def test_same_bits_for_any_number_of_threads(name):
    rng = np.random.default_rng(5)
    big, wide = cases.normal(rng, (700_001,), name), cases.normal(rng, (300, 1501), name)
    small = [cases.normal(rng, (97,), name) for _ in range(200)]
    rows = cases.slices(rng, 20_000, (5_000, 32), name, repeated=True)
    results = []
    for count in (1, 2, 3):
        nc.set_num_threads(count)
        assert nc.get_num_threads() == count
        clipped, norm = nc.clip_by_global_norm([big, *small, rows], 1.0)
        arrays = [*map(reference.stored, clipped)]
        arrays += [nc.clip_by_norm(wide, 1.0, axes) for axes in (None, 0, 1)]
        arrays += [nc.clip_by_average_norm(wide, 1e-6), nc.clip_by_block_rms(wide, 0.1)]
        arrays += [nc.adaptive_clip(wide, wide[::-1]), *nc.clip_per_example([wide], 1.0)[0]]
        arrays += [np.array([norm, nc.global_norm([big], 1), nc.global_norm([big], 3)])]
        results.append([array.tobytes() for array in arrays])
    assert results[0] == results[1] == results[2]


@pytest.mark.parametrize("name", reference.DTYPES)
@pytest.mark.parametrize("size", [3, 100, 1027, pytest.param(50_001, marks=pytest.mark.jit_only)])
def test_same_bits_at_any_alignment(name, size):
    grad = cases.normal(np.random.default_rng(size), (size,), name)
    bound = 0.3 * reference.norm([grad])
    offsets = [0, grad.itemsize, 3 * grad.itemsize, 16, 32, 48, 1, 7]
    expected, norm = nc.clip_by_global_norm([grad], bound)
    for offset in offsets:
        moved = cases.at_offset(grad, offset)
        clipped, same_norm = nc.clip_by_global_norm([moved], bound)
        assert same_norm == norm
        checks.assert_same_bits(clipped[0], expected[0])
        nc.clip_by_global_norm([moved], bound, out=[moved])
        checks.assert_same_bits(moved, expected[0])


@pytest.mark.parametrize("name", reference.DTYPES)
def test_same_bits_for_any_strides(name):
    grad = cases.normal(np.random.default_rng(9), (41, 29), name)
    for axes in (None, 0, 1):
        expected = nc.clip_by_norm(grad, 1.0, axes)
        for layout in ("strided", "negative", "misaligned", "read_only"):
            laid_out = cases.LAYOUTS[layout](grad)
            checks.assert_same_bits(nc.clip_by_norm(laid_out, 1.0, axes), expected)


def test_same_bits_in_every_run():
    grads = cases.layers(np.random.default_rng(2))
    runs = [nc.clip_by_global_norm(grads, 0.7) for _ in range(5)]
    for one, other in itertools.pairwise(runs):
        assert one[1] == other[1]
        for a, b in zip(one[0], other[0], strict=True):
            checks.assert_same_bits(a, b)

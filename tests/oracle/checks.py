"""What must hold after every clip, asserted in exact arithmetic."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from tests.oracle import reference

# Elements whose factor is computed in exact arithmetic; larger arrays are sampled evenly.
SAMPLE = 2000


def assert_same_bits(after: Any, before: Any) -> None:
    after, before = reference.stored(after), reference.stored(before)
    assert after.dtype == before.dtype
    assert after.shape == before.shape
    assert after.tobytes() == before.tobytes()


def norm_slack(grads: Any, duplicates: str = "sum") -> Fraction:
    """How far the norm may be off: 4 ulp of float64 if all have 53 bits, else an ulp of float32.

    If repeated rows are summed, it is the ulp of the norm that they would have uncancelled.
    """
    names = [reference.stored(g).dtype.name for g in reference.leaves(grads)]
    summed = duplicates == "sum" and any(map(reference.is_sparse, reference.leaves(grads)))
    square = reference.square_sum(grads, duplicates)
    size = reference.root(reference.uncancelled_square_sum(grads) if summed else square)
    if all(reference.PRECISION[name] == 53 for name in names):
        return 4 * reference.ulp(size, 53)
    return reference.ulp(size, 24)


def assert_norm(measured: float, grads: Any, duplicates: str = "sum") -> None:
    assert type(measured) is float
    exact = reference.square_sum(grads, duplicates)
    assert reference.norm_within(measured, exact, norm_slack(grads, duplicates)), (
        f"norm {measured!r}, exactly {reference.root(exact)!r}"
    )


def factor_interval(before: np.ndarray, after: np.ndarray) -> tuple[Fraction, Fraction]:
    """The least and greatest f for which each result is x * f, rounded once in any direction."""
    x, result = reference.components(before), reference.components(after)
    step = max(1, x.size // SAMPLE)
    x, result = np.abs(x[::step]), np.abs(result[::step])
    assert not result[x == 0].any()
    x, result = x[x != 0], result[x != 0]
    smallest = float(reference.float_info(before.dtype).smallest_subnormal)
    spacing = np.ldexp(1.0, np.frexp(result)[1] - reference.PRECISION[before.dtype.name])
    ulps = np.maximum(np.where(result, spacing, smallest), smallest)
    low, high = Fraction(0), Fraction(1)
    for value, scaled, ulp in tightest(x, result, ulps):
        size, clipped = Fraction(value), Fraction(scaled)
        low = max(low, (clipped - Fraction(ulp)) / size)
        high = min(high, (clipped + Fraction(ulp)) / size)
    return low, high


def tightest(x: np.ndarray, result: np.ndarray, ulps: np.ndarray) -> set[tuple[float, ...]]:
    """The (x, result, ulp) that limit the common factor most, and all within rounding of these."""
    if not x.size:
        return set()
    wide, spacing = result.astype(np.longdouble), ulps.astype(np.longdouble)
    lows, highs = (wide - spacing) / x, (wide + spacing) / x
    most, least, doubt = lows.max(), highs.min(), 4 * np.finfo(np.longdouble).eps
    near = (lows >= most - doubt * abs(most)) | (highs <= least + doubt * least)
    return set(zip(x[near].tolist(), result[near].tolist(), ulps[near].tolist(), strict=True))


def assert_one_factor(before: Sequence[Any], after: Sequence[Any]) -> None:
    """Assert that no sign flips, and that one factor in [0, 1] explains every element."""
    low, high = Fraction(0), Fraction(1)
    for old, new in zip(map(reference.stored, before), map(reference.stored, after), strict=True):
        assert new.dtype == old.dtype
        assert new.shape == old.shape
        x, result = reference.components(old), reference.components(new)
        assert not np.any((result != 0) & (np.signbit(result) != np.signbit(x)))
        assert np.all(np.abs(result) <= np.abs(x))
        lowest, highest = factor_interval(old, new)
        low, high = max(low, lowest), min(high, highest)
    assert low <= high, f"no single factor: at least {float(low)!r} and at most {float(high)!r}"


def underflowed(before: Any, after: Any) -> bool:
    """Whether a result is subnormal, or zero where the input was not."""
    old, new = reference.stored(before), reference.stored(after)
    tiny = float(reference.float_info(new.dtype).tiny)
    x, result = reference.components(old), reference.components(new)
    return bool(np.any((np.abs(result) < tiny) & (x != 0)))


def assert_within(before: Sequence[Any], after: Sequence[Any], squared_bound: Fraction) -> None:
    """Assert that the exact norm is at most the bound, and below it by no more than rounding."""
    square = reference.square_sum(after)
    assert square <= squared_bound, (
        f"norm {reference.root(square)!r} exceeds {reference.root(squared_bound)!r} "
        f"by a relative {float(square / squared_bound - 1) / 2 if squared_bound else math.inf!r}"
    )
    if any(underflowed(old, new) for old, new in zip(before, after, strict=True)):
        return
    units = reference.roundoff_units(reference.stored(g).dtype for g in after)
    if any(reference.is_sparse(g) for g in before):
        loss = reference.uncancelled_square_sum(before) / reference.square_sum(before)
        units *= Fraction(reference.root(loss))
    least = max(1 - units, Fraction(0)) ** 2 * squared_bound
    assert square >= least, (
        f"norm {reference.root(square)!r} falls short of {reference.root(squared_bound)!r} "
        f"by a relative {float(1 - square / squared_bound) / 2!r}"
    )


def assert_scaled(before: Sequence[Any], after: Sequence[Any], squared_bound: Fraction) -> None:
    assert_one_factor(before, after)
    assert_within(before, after, squared_bound)


def assert_clipped(
    before: Sequence[Any], after: Sequence[Any], squared_bound: Fraction, norm: float | None = None
) -> None:
    """Assert that gradients at or below the bound are untouched, and those above scaled to it.

    The reported norm decides which. Without it, a norm that may round to either side of the bound
    may be treated either way.
    """
    before, after = reference.leaves(before), reference.leaves(after)
    square = reference.square_sum(before)
    if norm is not None:
        touched = norm > reference.root(squared_bound)
    else:
        if reference.norm_within(reference.root(squared_bound), square, norm_slack(before)):
            pairs = zip(map(reference.stored, before), map(reference.stored, after), strict=True)
            touched = any(old.tobytes() != new.tobytes() for old, new in pairs)
        else:
            touched = square > squared_bound
    if touched:
        assert_scaled(before, after, squared_bound)
        return
    for old, new in zip(before, after, strict=True):
        assert_same_bits(new, old)


def assert_close(actual: Any, expected: Any, beside: Sequence[Any] = ()) -> None:
    """Assert equality with an oracle up to the contract's rounding, or one smallest subnormal.

    The least precise dtype sets the tolerance, of `actual` and of those clipped `beside` it.
    """
    actual = np.asarray(actual)
    expected = np.asarray(expected)
    assert actual.shape == expected.shape
    tolerance = float(reference.roundoff_units(g.dtype for g in (actual, *beside)))
    smallest = float(reference.float_info(actual.dtype).smallest_subnormal)
    np.testing.assert_allclose(
        reference.components(actual), reference.components(expected), rtol=tolerance, atol=smallest
    )


def assert_all_nan(gradient: Any) -> None:
    assert np.isnan(reference.components(reference.stored(gradient))).all()

"""The four policies for gradients that are not finite."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest

import numclip as nc
from tests.oracle import cases, checks, reference

BAD = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def spoilt(name: str, value: float) -> dict[str, np.ndarray]:
    """The second of three gradients has two bad elements, the third has one."""
    rng = np.random.default_rng(4)
    first, second, third = (cases.normal(rng, (5, 4), name) for _ in range(3))
    second[1, 2] = second[3, 0] = value
    third[0, 0] = -value
    return {"a": first, "b": second, "c": third}


def copies(grads):
    return {key: grad.copy() for key, grad in grads.items()}


def assert_unchanged(grads, kept):
    for key, grad in kept.items():
        checks.assert_same_bits(grads[key], grad)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", reference.DTYPES)
class TestPolicies:
    @pytest.mark.parametrize("in_place", [False, True])
    def test_propagate(self, name, bad, in_place):
        grads = spoilt(name, BAD[bad])
        kept = copies(grads)
        expected = reference.norm(kept)
        np.testing.assert_equal(nc.global_norm(grads), expected)
        clipped, norm = nc.clip_by_global_norm(grads, 1.0, out=grads if in_place else None)
        np.testing.assert_equal(norm, expected)
        for grad in clipped.values():
            checks.assert_all_nan(grad)
        if not in_place:
            assert_unchanged(grads, kept)

    def test_raise(self, name, bad):
        grads = spoilt(name, BAD[bad])
        kept = copies(grads)
        for out in (None, grads):
            with pytest.raises(nc.NonFiniteGradientError, match=r"'b'") as caught:
                nc.clip_by_global_norm(grads, 1.0, nonfinite="raise", out=out)
            assert isinstance(caught.value, ArithmeticError)
            assert caught.value.name == "b"
            assert type(caught.value.index) is int
            assert caught.value.index == 6
            assert caught.value.count == 2
            np.testing.assert_equal(caught.value.value, kept["b"][1, 2].item())
            assert_unchanged(grads, kept)
        with pytest.raises(nc.NonFiniteGradientError):
            nc.clip_by_global_norm(grads, math.inf, nonfinite="raise")

    def test_skip(self, name, bad):
        grads = spoilt(name, BAD[bad])
        kept = copies(grads)
        expected = reference.norm(kept)
        for out in (None, grads):
            clipped, norm = nc.clip_by_global_norm(grads, 1.0, nonfinite="skip", out=out)
            np.testing.assert_equal(norm, expected)
            assert_unchanged(clipped, kept)
            assert_unchanged(grads, kept)

    @pytest.mark.parametrize("ratio", [0.3, 3.0])
    def test_zero(self, name, bad, ratio):
        grads = spoilt(name, BAD[bad])
        kept, rest = copies(grads), copies(grads)
        rest["b"][1, 2] = rest["b"][3, 0] = rest["c"][0, 0] = 0
        bound = ratio * reference.norm(rest)
        clipped, norm = nc.clip_by_global_norm(grads, bound, nonfinite="zero")
        assert norm == nc.global_norm(rest)
        checks.assert_clipped(rest, clipped, Fraction(bound) ** 2, norm)
        assert_unchanged(grads, kept)
        result, same_norm = nc.clip_by_global_norm(grads, bound, nonfinite="zero", out=grads)
        assert same_norm == norm
        assert_unchanged(grads, clipped)
        assert all(result[key] is grads[key] for key in grads)

    def test_one_gradient(self, name, bad):
        grad = spoilt(name, BAD[bad])["b"]
        for clip in (nc.clip_by_norm, nc.clip_by_average_norm, nc.clip_by_block_rms):
            checks.assert_all_nan(clip(grad, 1.0))

    @pytest.mark.parametrize("axes", [0, 1, (0, 1)])
    def test_units_of_their_own(self, name, bad, axes):
        grad = spoilt(name, BAD[bad])["b"]
        results = [nc.clip_by_norm(grad, 0.5, axes)]
        results += [nc.adaptive_clip(grad, np.full((5, 4), 0.1), 0.5, axes=axes)]
        for clipped in results:
            for unit in reference.units(grad.shape, axes):
                if not reference.all_finite([grad[unit]]):
                    checks.assert_all_nan(clipped[unit])
        for unit in reference.units(grad.shape, axes):
            if reference.all_finite([grad[unit]]):
                checks.assert_clipped([grad[unit]], [results[0][unit]], Fraction(1, 4))
                bound = reference.adaptive_bound(np.full((5, 4), 0.1)[unit], 0.5, 1e-3)
                checks.assert_clipped([grad[unit]], [results[1][unit]], bound)


def test_both_nan_and_infinity_make_nan():
    grads = [np.array([1.0, np.inf, np.nan, -np.inf], np.float32), np.array([np.inf])]
    for ord in (1, 2, 3, math.inf):
        assert math.isnan(nc.global_norm(grads, ord))
        assert math.isnan(nc.global_norm(grads[::-1], ord))
        assert nc.global_norm(grads[1:], ord) == math.inf


def test_position_of_the_first_bad_gradient():
    grads = [None, np.ones(3), np.asfortranarray(np.ones((3, 4))), np.array(np.nan)]
    grads[2][2, 1] = math.inf
    with pytest.raises(nc.NonFiniteGradientError, match=r"2") as caught:
        nc.clip_by_global_norm(grads, 1.0, nonfinite="raise")
    error = caught.value
    assert (error.name, error.index, error.value, error.count) == (2, 9, math.inf, 1)
    for word in (r"grads[2]", "9", "inf"):
        assert word in str(error)


@pytest.mark.jit_only
def test_position_in_a_long_gradient():
    grad = np.ones(1_000_000, np.float32)
    grad[[700_001, 900_000]] = np.nan, np.inf
    with pytest.raises(nc.NonFiniteGradientError) as caught:
        nc.clip_by_global_norm([np.ones(3), grad], 1.0, nonfinite="raise")
    assert (caught.value.name, caught.value.index, caught.value.count) == (1, 700_001, 2)
    assert math.isnan(caught.value.value)


def test_complex_gradients_are_bad_if_one_part_is():
    grad = np.array([3 + 4j, complex(math.inf, 1), complex(2, math.nan)], np.complex64)
    with pytest.raises(nc.NonFiniteGradientError) as caught:
        nc.clip_by_global_norm([grad], 1.0, nonfinite="raise")
    assert (caught.value.index, caught.value.count) == (1, 2)
    assert caught.value.value == complex(math.inf, 1)
    (clipped,), norm = nc.clip_by_global_norm([grad], 10.0, nonfinite="zero")
    assert norm == 5
    np.testing.assert_array_equal(clipped, [3 + 4j, 0, 0])
    (clipped,), _ = nc.clip_by_global_norm([grad], 10.0)
    assert np.isnan(clipped.real).all()
    assert np.isnan(clipped.imag).all()


@pytest.mark.parametrize("indices", [[0, 2, 3], [1, 1, 1]])
def test_sparse_gradients(indices):
    values = np.array([[1.0, 2], [np.inf, 3], [-np.inf, 4]], np.float32)
    slices = nc.IndexedSlices(values, np.array(indices), (5, 2))
    kept = values.copy()
    clipped, norm = nc.clip_by_global_norm({"e": slices, "w": np.ones(2)}, 1.0)
    assert not math.isfinite(norm)
    checks.assert_all_nan(clipped["e"])
    checks.assert_all_nan(clipped["w"])
    with pytest.raises(nc.NonFiniteGradientError, match=r"'e'") as caught:
        nc.clip_by_global_norm({"e": slices}, 1.0, nonfinite="raise", out={"e": slices})
    assert (caught.value.index, caught.value.value, caught.value.count) == (2, math.inf, 2)
    checks.assert_same_bits(slices.values, kept)
    (clipped,), norm = nc.clip_by_global_norm([slices], 100.0, nonfinite="zero")
    np.testing.assert_array_equal(clipped.values, [[1, 2], [0, 3], [0, 4]])
    np.testing.assert_array_equal(clipped.indices, indices)
    assert norm == nc.global_norm([clipped])
    (clipped,), _ = nc.clip_by_global_norm([slices], 1.0, nonfinite="skip")
    checks.assert_same_bits(clipped.values, kept)


@pytest.mark.parametrize("policy", ["propagate", "raise", "skip", "zero"])
def test_finite_gradients_with_an_infinite_norm_are_clipped(policy):
    grads = [np.full(50, 1.7e308), np.array([1.0, -1.7e308]), np.ones(3, np.float32)]
    clipped, norm = nc.clip_by_global_norm(grads, 2.0, nonfinite=policy)
    assert norm == math.inf
    checks.assert_clipped(grads, clipped, Fraction(4), norm)
    checks.assert_clipped(grads[:1], [nc.clip_by_norm(grads[0], 2.0)], Fraction(4))


@pytest.mark.parametrize("policy", ["propagate", "raise", "skip", "zero"])
def test_bound_of_zero(policy):
    grads = [np.array([1.0, np.nan, 2.0]), np.ones(2, np.float32)]
    if policy == "raise":
        with pytest.raises(nc.NonFiniteGradientError):
            nc.clip_by_global_norm(grads, 0, nonfinite=policy)
    else:
        clipped, _ = nc.clip_by_global_norm(grads, 0, nonfinite=policy)
        expected = {"propagate": [[np.nan] * 3, [np.nan] * 2], "skip": grads}
        for new, wanted in zip(clipped, expected.get(policy, [[0] * 3, [0] * 2]), strict=True):
            np.testing.assert_array_equal(new, wanted)
    for new in nc.clip_by_global_norm([np.ones(3), np.zeros(2)], 0, nonfinite=policy)[0]:
        assert not new.any()


def test_bound_of_infinity():
    grads = [np.array([1.0, np.nan, -np.inf]), np.ones(2, np.float32)]
    for policy in ("propagate", "skip"):
        clipped, norm = nc.clip_by_global_norm(grads, math.inf, nonfinite=policy)
        assert math.isnan(norm)
        for new, old in zip(clipped, grads, strict=True):
            checks.assert_same_bits(new, old)
    clipped, norm = nc.clip_by_global_norm(grads, math.inf, nonfinite="zero")
    assert norm == nc.global_norm([np.ones(3)])
    np.testing.assert_array_equal(clipped[0], [1, 0, 0])
    np.testing.assert_array_equal(clipped[1], [1, 1])

"""Every case of the table through every function, host and GPU: the contract's guarantees."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.oracle import checks, reference
from tests.oracle.cases import CASES, DENSE_CASES, Case


def params(cases: list[Case]) -> list[Any]:
    marks = {True: [pytest.mark.jit_only], False: []}
    return [pytest.param(case, id=case.name, marks=marks[case.large]) for case in cases]


WRITABLE = [case for case in CASES if case.writable]
# Of the norm: far below, just below, just above, far above.
RATIOS = [0.1, 1 - 2**-20, 1 + 2**-20, 10.0]


def native(gradient: Any) -> Any:
    """The gradient in the machine's byte order, as results come back."""
    if gradient is None or reference.is_sparse(gradient):
        return gradient
    return np.asarray(gradient).astype(gradient.dtype.newbyteorder("="))


def native_leaves(grads: Any) -> list[Any]:
    return [native(g) for g in reference.leaves(grads)]


def bytes_of(grads: Any) -> list[bytes]:
    return [reference.stored(g).tobytes() for g in reference.leaves(grads)]


def assert_same_structure(result: Any, grads: Any) -> None:
    assert type(result) is type(grads)
    assert len(result) == len(grads)
    if isinstance(grads, dict):
        assert list(result) == list(grads)
        result, grads = result.values(), grads.values()
    for new, old in zip(result, grads, strict=True):
        assert (new is None) == (old is None)
        assert reference.is_sparse(new) == reference.is_sparse(old)


def assert_apart(result: Any, grads: Any) -> None:
    for new, old in zip(reference.leaves(result), reference.leaves(grads), strict=True):
        assert new is not old
        assert isinstance(new, nc.IndexedSlices | np.ndarray)
        assert not np.shares_memory(reference.stored(new), reference.stored(old))


@pytest.mark.within_njit
@pytest.mark.parametrize("case", params(CASES))
def test_global_norm(target, case):
    grads = case.gradients()
    before = bytes_of(grads)
    checks.assert_norm(target.global_norm(grads), native_leaves(grads))
    checks.assert_norm(target.global_norm(grads, duplicates="raw"), native_leaves(grads), "raw")
    assert bytes_of(grads) == before


@pytest.mark.each_value
@pytest.mark.parametrize("ord", [1, 1.5, 3, math.inf])
@pytest.mark.parametrize("case", params([c for c in CASES if not c.large]))
def test_global_norm_of_other_orders(target, case, ord):
    grads = case.gradients()
    exact = reference.norm(native_leaves(grads), ord)
    assert target.global_norm(grads, ord) == pytest.approx(exact, rel=1e-12)
    norm = target.clip_by_global_norm(grads, 1.0, ord=ord)[1]
    assert norm == target.global_norm(grads, ord)


@pytest.mark.within_njit
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", params(CASES))
def test_clip_by_global_norm(target, case, ratio):
    grads = case.gradients()
    before = bytes_of(grads)
    bound = ratio * reference.norm(native_leaves(grads)) or 1.0
    clipped, norm = target.clip_by_global_norm(grads, bound)
    assert bytes_of(grads) == before
    assert_same_structure(clipped, grads)
    assert_apart(clipped, grads)
    assert norm == target.global_norm(grads)
    checks.assert_clipped(native_leaves(grads), clipped, Fraction(bound) ** 2, norm)

    again, norm = target.clip_by_global_norm(clipped, bound)
    assert norm <= bound
    assert bytes_of(again) == bytes_of(clipped)


@pytest.mark.within_njit
@pytest.mark.each_value
@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", params(WRITABLE))
def test_clip_by_global_norm_in_place(target, case, ratio):
    grads = case.gradients()
    bound = ratio * reference.norm(reference.leaves(grads)) or 1.0
    expected, norm = target.clip_by_global_norm(grads, bound)
    arrays = [reference.stored(g) for g in reference.leaves(grads)]
    clipped, same_norm = target.clip_by_global_norm(grads, bound, out=grads)
    assert_same_structure(clipped, grads)
    for new, old in zip(reference.leaves(clipped), reference.leaves(grads), strict=True):
        assert new is old
    for new, old in zip(reference.leaves(grads), arrays, strict=True):
        assert reference.stored(new) is old
    assert same_norm == norm
    assert bytes_of(grads) == bytes_of(expected)


@pytest.mark.each_value
@pytest.mark.parametrize("ratio", [0.1, 10.0])
@pytest.mark.parametrize("case", params(WRITABLE))
def test_clip_by_global_norm_into_other_arrays(target, case, ratio):
    grads, out = case.gradients(), case.gradients()
    for gradient in reference.leaves(out):
        reference.stored(gradient)[...] = 7
    before = bytes_of(grads)
    bound = ratio * reference.norm(reference.leaves(grads)) or 1.0
    expected, norm = target.clip_by_global_norm(grads, bound)
    clipped, same_norm = target.clip_by_global_norm(grads, bound, out=out)
    assert bytes_of(grads) == before
    assert same_norm == norm
    for new, given in zip(reference.leaves(clipped), reference.leaves(out), strict=True):
        assert new is given
    assert bytes_of(out) == bytes_of(expected)


def axes_of(shape: tuple[int, ...]) -> list[Any]:
    if not shape:
        return []
    last = len(shape) - 1
    return [0, (last,), [0, last] if last else [0], tuple(range(last + 1))]


def check_clip_by_norm(target: Any, case: Case, axes: Any) -> None:
    (grad,) = case.gradients()
    before = grad.tobytes()
    units = reference.units(grad.shape, axes)
    norms = [reference.norm([native(grad)[unit]]) for unit in units]
    for bound in [1e-3, *(float(np.median(norms)) or 1.0 for _ in norms[:1]), 1e6]:
        clipped = target.clip_by_norm(grad, bound, axes)
        assert grad.tobytes() == before
        assert_apart([clipped], [grad])
        for unit in units[:50]:
            old, new = native(grad)[unit], clipped[unit]
            checks.assert_clipped([old], [new], Fraction(bound) ** 2)
        checks.assert_same_bits(target.clip_by_norm(clipped, bound, axes), clipped)
        if case.writable:
            (work,) = case.gradients()
            assert target.clip_by_norm(work, bound, axes, out=work) is work
            checks.assert_same_bits(work, clipped)


@pytest.mark.within_njit
@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_clip_by_norm(target, case):
    check_clip_by_norm(target, case, None)


@pytest.mark.each_value
@pytest.mark.many_calls
@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_clip_by_norm_of_units(target, case):
    for axes in axes_of(case.gradients()[0].shape):
        check_clip_by_norm(target, case, axes)


WHOLE_ARRAY_RULES = {
    "clip_by_average_norm": reference.average_norm_bound,
    "clip_by_block_rms": reference.block_rms_bound,
}


@pytest.mark.within_njit
@pytest.mark.each_value
@pytest.mark.parametrize("rule", WHOLE_ARRAY_RULES)
@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_rules_for_a_whole_array(target, case, rule):
    clip, squared_bound = getattr(target, rule), WHOLE_ARRAY_RULES[rule]
    (grad,) = case.gradients()
    before = grad.tobytes()
    for bound in (1e-4, 0.3, 100.0):
        clipped = clip(grad, bound)
        assert grad.tobytes() == before
        assert_apart([clipped], [grad])
        checks.assert_clipped([native(grad)], [clipped], squared_bound(grad, bound))
        checks.assert_same_bits(clip(clipped, bound), clipped)
        if case.writable:
            (work,) = case.gradients()
            assert clip(work, bound, out=work) is work
            checks.assert_same_bits(work, clipped)


@pytest.mark.each_value
@pytest.mark.many_calls
@pytest.mark.parametrize("case", params([c for c in DENSE_CASES if not c.large]))
def test_adaptive_clip(target, case):
    (grad,), (param,) = case.gradients(), case.gradients(seed=1)
    for axes in {None, *axes_of(grad.shape)[:1]}:
        for factor in (0.01, 1.0, 1e4):
            clipped = target.adaptive_clip(grad, param, factor, axes=axes)
            assert_apart([clipped], [grad])
            for unit in reference.units(grad.shape, reference.adaptive_axes(grad.shape, axes)):
                bound = reference.adaptive_bound(native(param)[unit], factor, 1e-3)
                checks.assert_clipped([native(grad)[unit]], [clipped[unit]], bound)
            if case.writable:
                (work,) = case.gradients()
                assert target.adaptive_clip(work, param, factor, axes=axes, out=work) is work
                checks.assert_same_bits(work, clipped)


@pytest.mark.within_njit
@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_clip_by_value(target, case):
    (grad,) = case.gradients()
    if grad.dtype.kind == "c":
        with pytest.raises(TypeError, match=r"grad.*complex"):
            target.clip_by_value(grad, -1.0, 1.0)
        return
    before = grad.tobytes()
    for low, high in [(-0.5, 0.3), (-100.0, 100.0), (0.0, 0.0), (0.25, 1.0)]:
        clipped = target.clip_by_value(grad, low, high)
        assert grad.tobytes() == before
        assert_apart([clipped], [grad])
        checks.assert_same_bits(clipped, reference.clip_by_value(native(grad), low, high))
        if case.writable:
            (work,) = case.gradients()
            assert target.clip_by_value(work, low, high, out=work) is work
            checks.assert_same_bits(work, clipped)


@pytest.mark.within_njit
def test_zeros_keep_their_sign_between_bounds_of_zero(target):
    grad, zeros = np.array([-0.0, 0.0] * 40, "f"), np.zeros(80)
    for low, high in ((0.0, 0.0), (zeros, 1.0), (-1.0, zeros)):
        checks.assert_same_bits(target.clip_by_value(grad, low, high), grad)


def test_the_largest_magnitude_of_real_and_complex_gradients(target):
    grads = [np.full(5, 3.0), np.array([1 + 1j]), np.array([2, 3], "f")]
    assert target.global_norm(grads, math.inf) == 3.0
    grads[1][0] = 3 + 4j
    assert target.global_norm(grads, math.inf) == 5.0

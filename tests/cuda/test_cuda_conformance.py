"""The conformance suite's cases on the GPU, or on its stand-in."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.cuda.devices import HARDWARE, OnDevice, ready
from tests.functions import test_conformance as suite
from tests.oracle.cases import CASES, DENSE_CASES, Case

__all__ = ["ready"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # of the references, on overflow
]
# Without a GPU every case is seen, but fewer bounds: a block takes 0.1 ms or more.
ORDERS = [1, 1.5, 3, math.inf] if HARDWARE else [1.5, math.inf]
RATIOS = suite.RATIOS if HARDWARE else [0.1, 1 + 2**-20]
# The layouts that lie on no GPU, or are refused there (see test_cuda_errors).
ELSEWHERE = ("misaligned", "byte_swapped", "read_only")
# Strided arrays and units are many calls: some are seen here, test_cuda_tiles has others.
FEW = ["scalar-float64", "vector-float16", "empty_rows-float32", "strided-float64"]
FEW += ["negative-bfloat16", "fortran-complex64"]
UNITS = [case for case in DENSE_CASES if HARDWARE or case.name in FEW]


def lies_there(case: Case) -> bool:
    return not case.name.startswith(ELSEWHERE)


def params(cases: list[Case]) -> list[Any]:
    return [pytest.param(case, id=case.name) for case in cases if lies_there(case)]


@pytest.fixture(autouse=True)
def on_device(monkeypatch):
    functions = OnDevice()
    monkeypatch.setattr(suite, "nc", functions)
    rules = {
        name: (getattr(functions, clip.__name__), bound)
        for name, (clip, bound) in suite.WHOLE_ARRAY_RULES.items()
    }
    monkeypatch.setattr(suite, "WHOLE_ARRAY_RULES", rules)


@pytest.mark.parametrize("case", params(CASES))
def test_global_norm(case):
    suite.test_global_norm(case)


@pytest.mark.parametrize("ord", ORDERS)
@pytest.mark.parametrize("case", params(CASES))
def test_global_norm_of_other_orders(case, ord):
    suite.test_global_norm_of_other_orders(case, ord)


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("case", params(CASES))
def test_clip_by_global_norm(case, ratio):
    suite.test_clip_by_global_norm(case, ratio)


@pytest.mark.parametrize("ratio", [10.0, *RATIOS[:1]])
@pytest.mark.parametrize("case", params(CASES))
def test_clip_by_global_norm_in_place(case, ratio):
    suite.test_clip_by_global_norm_in_place(case, ratio)


@pytest.mark.parametrize("ratio", RATIOS[:1] + RATIOS[2:])
@pytest.mark.parametrize("case", params(CASES))
def test_clip_by_global_norm_into_other_arrays(case, ratio):
    suite.test_clip_by_global_norm_into_other_arrays(case, ratio)


@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_clip_by_norm(case, monkeypatch):
    monkeypatch.setattr(suite, "axes_of", lambda _: [None])
    suite.test_clip_by_norm(case)


@pytest.mark.parametrize("case", params(UNITS))
def test_clip_by_norm_of_units(case, monkeypatch):
    every = suite.axes_of
    monkeypatch.setattr(suite, "axes_of", lambda shape: every(shape)[1:])
    suite.test_clip_by_norm(case)


@pytest.mark.parametrize("rule", suite.WHOLE_ARRAY_RULES)
@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_rules_for_a_whole_array(case, rule):
    suite.test_rules_for_a_whole_array(case, rule)


@pytest.mark.parametrize("case", params(UNITS))
def test_adaptive_clip(case):
    suite.test_adaptive_clip(case)


@pytest.mark.parametrize("case", params(DENSE_CASES))
def test_clip_by_value(case):
    suite.test_clip_by_value(case)


def test_many_small_tensors():
    (case,) = (case for case in CASES if case.name == "many_small")
    grads = case.gradients()
    bound = 0.5 * nc.global_norm(grads)
    clipped, norm = OnDevice().clip_by_global_norm(grads, bound)
    expected, same = nc.clip_by_global_norm(grads, bound)
    assert norm == pytest.approx(same, rel=1e-14)
    for found, wanted in zip(clipped, expected, strict=True):
        np.testing.assert_array_max_ulp(found, wanted, 1)


def test_the_largest_magnitude_of_real_and_complex_gradients():
    grads = [np.full(5, 3.0), np.array([1 + 1j]), np.array([2, 3], "f")]
    assert OnDevice().global_norm(grads, math.inf) == 3.0
    grads[1][0] = 3 + 4j
    assert OnDevice().global_norm(grads, math.inf) == 5.0

"""Many small tensors on the GPU, or on its stand-in, against the host."""

from __future__ import annotations

import numpy as np
import pytest

import numclip as nc
from tests.cuda.devices import OnDevice, ready
from tests.oracle.cases import CASES

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


def test_many_small_tensors():
    (case,) = (case for case in CASES if case.name == "many_small")
    grads = case.gradients()
    bound = 0.5 * nc.global_norm(grads)
    clipped, norm = OnDevice().clip_by_global_norm(grads, bound)
    expected, same = nc.clip_by_global_norm(grads, bound)
    assert norm == pytest.approx(same, rel=1e-14)
    for found, wanted in zip(clipped, expected, strict=True):
        np.testing.assert_array_max_ulp(found, wanted, 1)

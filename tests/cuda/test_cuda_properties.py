"""Random sparse gradients on the GPU, or on its stand-in: the host's bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import strategies as st

import numclip as nc
from tests.oracle import checks, reference, strategies


@strategies.drawn(strategies.sparse(), st.sampled_from([1e-3, 0.3, 0.999]))
def test_sparse_is_as_on_the_host(target, slices, ratio):
    bound = min(ratio * nc.global_norm([slices]), 1e300)
    wanted, norm = nc.clip_by_global_norm([slices], bound)
    found, same = target.clip_by_global_norm([slices], bound)
    assert same == pytest.approx(norm, rel=1e-15)
    values = found[0].values, wanted[0].values
    if np.finfo(slices.dtype if slices.dtype.kind != "V" else "f4").bits < 64:
        checks.assert_same_bits(*values)
    else:
        real = reference.real_dtype(slices.dtype)
        np.testing.assert_array_max_ulp(*(array.view(real) for array in values), 4)

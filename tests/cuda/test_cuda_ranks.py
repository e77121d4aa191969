"""Norms in pieces and of many ranks, of gradients on the GPU."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numclip as nc
from tests.cuda.devices import fetch, ready, send
from tests.oracle import ranks

__all__ = ["ready"]
pytestmark = pytest.mark.gpu

GRADS = [
    np.linspace(-1, 1, 300).astype(np.float32),
    np.array([3e200, -4e200]),
    np.array([1.0 + 2.0j, 3.0], np.complex64),
]


@pytest.mark.parametrize("ord", [1, 2, math.inf])
@pytest.mark.parametrize("last", [1, 3])
def test_pieces_are_clipped_by_their_norm_together(ord, last):
    grads = [grad for k, grad in enumerate(GRADS) if k != last]
    whole, here = nc.NormAccumulator(ord), nc.NormAccumulator(ord)
    for grad in grads:
        whole.add([send(grad)])
        here.add([grad])
    assert whole.norm == pytest.approx(float(nc.global_norm(grads, ord)), rel=1e-14)
    bound = whole.norm / 3
    for grad in grads:
        (clipped,), norm = nc.clip_by_global_norm([send(grad)], bound, whole, ord=ord)
        assert float(norm) == pytest.approx(whole.norm, rel=1e-15)
        (expected,), _ = nc.clip_by_global_norm([grad], bound, here, ord=ord)
        np.testing.assert_allclose(fetch(clipped), expected, rtol=1e-6)


@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(2.0), nc.ByGlobalNorm(2.0, ord=1), nc.ByNorm(1)])
def test_groups_on_the_gpu_are_clipped_by_the_norm_of_all_ranks(rule):
    own = np.array([3.0, 4.0])
    groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, rule, sharded=True)], device="cuda")
    groups.set_grads({"w": own})
    report = nc.SGD(groups, lr=1.0).step(comm=ranks.Mirror(4))
    norm = 28.0 if rule.ord == 1 else 10.0
    assert report.groups["g"].norm == pytest.approx(norm)
    assert report.norm == pytest.approx(10.0)
    bound = 1.0 if isinstance(rule, nc.ByNorm) else 2.0
    params = np.array(groups.params["w"].copy_to_host())
    np.testing.assert_allclose(params, -own * bound / norm, rtol=1e-12)


@pytest.mark.parametrize("bad", [0.0, math.nan])
def test_elements_are_held_on_the_gpu_where_all_ranks_step(bad):
    group = nc.Group("g", {"w": np.zeros(2)}, nc.ByValue(-1.0, 1.0), nonfinite="skip")
    groups = nc.ParamGroups([group], device="cuda")
    groups.set_grads({"w": np.array([3.0, -0.5 + bad])})
    report = nc.SGD(groups, lr=1.0).step(comm=ranks.Mirror(2))
    assert report.skipped == (bad != 0.0)
    params = np.array(groups.params["w"].copy_to_host())
    np.testing.assert_array_equal(params, [0.0, 0.0] if report.skipped else [-1.0, 0.5])

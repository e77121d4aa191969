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
    parts = [np.array([3.0, 4.0]), np.array([12.0])]

    def program(comm):
        own = parts[comm.Get_rank()]
        groups = nc.ParamGroups(
            [nc.Group("g", {"w": np.zeros_like(own)}, rule, sharded=True)], device="cuda"
        )
        groups.set_grads({"w": own})
        optimizer = nc.SGD(groups, lr=1.0)
        report = optimizer.step(comm=comm)
        return report.groups["g"].norm, report.norm, np.array(groups.params["w"].copy_to_host())

    results = ranks.run(2, program)
    for found in results:
        if isinstance(found, BaseException):
            raise found
    norm = 19.0 if getattr(rule, "ord", 2) == 1 else 13.0
    assert [found[:2] for found in results] == [(pytest.approx(norm), pytest.approx(13.0))] * 2
    for own, (_, _, params) in zip(parts, results, strict=True):
        bound = 1.0 if isinstance(rule, nc.ByNorm) else 2.0
        np.testing.assert_allclose(params, -own * bound / norm, rtol=1e-12)

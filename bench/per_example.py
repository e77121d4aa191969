"""Clipping each example's gradients and summing them: numclip and its peers.

No example can be added before its norm is known: data larger than the caches are read twice.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import numclip as nc
from bench import memory_speed
from bench.workload import Bound, Call, Workload, library


def exact(grads: list[np.ndarray], bound: float) -> tuple[Any, float]:
    """Return the sums and how many examples were clipped."""
    norms = norms_of(grads)
    factors = np.minimum(1.0, bound / norms)
    return (np.einsum("n,n...->...", factors, grad) for grad in grads), int(np.sum(norms > bound))


def norms_of(grads: list[np.ndarray]) -> np.ndarray:
    flat = [grad.reshape(len(grad), -1) for grad in grads]
    return np.sqrt(sum(np.einsum("nk,nk->n", x, x, dtype=np.float64) for x in flat))


def two_reads(source: list[np.ndarray], _: Bound) -> Call:
    read = memory_speed.streams(None, 1, sum(grad.size for grad in source))
    return lambda: (read(), read())


def numclip(source: list[np.ndarray], bound: Bound) -> Call:
    return lambda: nc.clip_per_example(source, bound())


def numpy_einsum(source: list[np.ndarray], bound: Bound) -> Call:
    def call() -> tuple[Any, Any]:
        flat = [grad.reshape(len(grad), -1) for grad in source]
        norms = np.sqrt(sum(np.einsum("nk,nk->n", x, x) for x in flat))
        limit = np.float32(bound())
        factors = np.minimum(np.float32(1), limit / norms)
        sums = [np.einsum("n,n...->...", factors, grad) for grad in source]
        return sums, np.count_nonzero(norms > limit)

    return call


@cache
def optax_compiled() -> Any:
    return library("jax").jit(library("optax").per_example_global_norm_clip)


def optax_jit(source: list[np.ndarray], bound: Bound) -> Call:
    jax, clip = library("jax"), optax_compiled()
    grads = [jax.numpy.array(grad) for grad in source]
    return lambda: jax.block_until_ready(clip(grads, bound()))


def torch_opacus(source: list[np.ndarray], bound: Bound) -> Call:
    """Return a call with the operations of Opacus' DPOptimizer.clip_and_accumulate."""
    torch = library("torch")
    torch.set_num_threads(nc.get_num_threads())
    grads = [torch.from_numpy(grad) for grad in source]

    def call() -> tuple[Any, Any]:
        norms = torch.stack([x.reshape(len(x), -1).norm(2, dim=-1) for x in grads], dim=1)
        norms = norms.norm(2, dim=1)
        limit = bound()
        factors = (limit / (norms + 1e-6)).clamp(max=1.0)
        return [torch.einsum("i,i...", factors, x) for x in grads], (norms > limit).sum()

    return call


PER_EXAMPLE = Workload(
    exact,
    {
        "limit": two_reads,
        "numclip": numclip,
        "NumPy einsum": numpy_einsum,
        "optax jit": optax_jit,
        "torch as Opacus": torch_opacus,
    },
    passes=(2, 2),
    norm=lambda grads: float(np.median(norms_of(grads))),
)

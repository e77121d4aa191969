"""Clipping and an optimizer's step: numclip and its peers."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np

import numclip as nc
from bench import memory_speed
from bench.clips import clip_loop, grouped, optax_clip, torch_parameters
from bench.workload import Bound, Call, Workload, copied, library, norm_of

# The parameters are the gradients' own values: what matters is that they are other memory.
LR, BETA1, BETA2, EPS = 1e-3, 0.9, 0.999, 1e-8


def exact(grads: list[np.ndarray], bound: float, adam: bool) -> tuple[Any, float]:
    """Return the parameters after the first step."""
    norm = norm_of(grads)
    factor = min(1.0, bound / norm)

    def updated(grad: np.ndarray) -> np.ndarray:
        x = grad.astype(np.float64)
        clipped = x * factor
        return x - LR * (clipped / (np.abs(clipped) + EPS) if adam else clipped)

    return map(updated, grads), norm


def numclip(source: list[np.ndarray], bound: Bound, optimizer: Callable[..., Any]) -> Call:
    groups = grouped(source, nc.ByGlobalNorm(bound))
    made = optimizer(groups, lr=LR)
    views = list(groups.params.values())
    return lambda: (views, made.step().norm)


def own_arrays(source: list[np.ndarray], bound: Bound) -> Call:
    """Parameters that stay where they are."""
    params, grads = copied(source), copied(source)
    optimizer = nc.Adam(None, lr=LR)

    def call() -> tuple[Any, Any]:
        norm = nc.clip_by_global_norm(grads, bound(), out=grads)[1]
        optimizer.apply_gradients(zip(grads, params, strict=True))
        return params, norm

    return call


def numpy_sgd(source: list[np.ndarray], bound: Bound) -> Call:
    params, grads = copied(source), copied(source)

    def call() -> tuple[Any, Any]:
        norm = clip_loop(grads, bound())
        for param, grad in zip(params, grads, strict=True):
            param -= LR * grad
        return params, norm

    return call


def numpy_adam(source: list[np.ndarray], bound: Bound) -> Call:
    params, grads = copied(source), copied(source)
    means, squares = ([np.zeros_like(x) for x in source] for _ in range(2))
    step = 0

    def call() -> tuple[Any, Any]:
        nonlocal step
        step += 1
        norm = clip_loop(grads, bound())
        for param, grad, m, v in zip(params, grads, means, squares, strict=True):
            m *= BETA1
            m += (1 - BETA1) * grad
            v *= BETA2
            v += (1 - BETA2) * grad * grad
            root = np.sqrt(v / (1 - BETA2**step)) + EPS
            param -= LR / (1 - BETA1**step) * m / root
        return params, norm

    return call


def torch_step(source: list[np.ndarray], bound: Bound, name: str, **options: bool) -> Call:
    torch = library("torch")
    arrays = copied(source)
    params = torch_parameters(arrays, copied(source))
    optimizer = getattr(torch.optim, name)(params, lr=LR, **options)
    clip = torch.nn.utils.clip_grad_norm_

    def call() -> tuple[Any, Any]:
        norm = clip(params, bound(), foreach=True)
        optimizer.step()
        return arrays, norm

    return call


@cache
def optax_compiled(name: str) -> tuple[Any, Any]:
    jax, optax = library("jax"), library("optax")
    optimizer = getattr(optax, name)(LR)

    def step(params: Any, state: Any, grads: Any, bound: Any) -> tuple[Any, Any, Any]:
        clipped, norm = optax_clip(grads, bound)
        updates, state = optimizer.update(clipped, state, params)
        return optax.apply_updates(params, updates), state, norm

    return optimizer, jax.jit(step, donate_argnums=(0, 1))


def optax_step(source: list[np.ndarray], bound: Bound, name: str) -> Call:
    jax = library("jax")
    optimizer, step = optax_compiled(name)
    params, grads = ([jax.numpy.array(x) for x in source] for _ in range(2))
    state = optimizer.init(params)

    def call() -> tuple[Any, Any]:
        nonlocal params, state
        params, state, norm = jax.block_until_ready(step(params, state, grads, bound()))
        return params, norm

    return call


SGD = Workload(
    partial(exact, adam=False),
    {
        "limit": memory_speed.read_and(memory_speed.descend, 2),
        "numclip": partial(numclip, optimizer=nc.SGD),
        "NumPy loop": numpy_sgd,
        "torch foreach": partial(torch_step, name="SGD", foreach=True),
        "torch fused": partial(torch_step, name="SGD", fused=True),
        "optax jit": partial(optax_step, name="sgd"),
    },
    passes=(4, 4),
    follows=False,
)
ADAM = Workload(
    partial(exact, adam=True),
    {
        "limit": memory_speed.read_and(memory_speed.adam, 4),
        "numclip": partial(numclip, optimizer=nc.Adam),
        "numclip, own arrays": own_arrays,
        "NumPy loop": numpy_adam,
        "torch foreach": partial(torch_step, name="Adam", foreach=True),
        "torch fused": partial(torch_step, name="Adam", fused=True),
        "optax jit": partial(optax_step, name="adam"),
    },
    passes=(8, 8),
    follows=False,
)

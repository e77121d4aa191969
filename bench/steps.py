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

# The parameters have the gradients' values; it only matters that they have memory of their own.
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


def rule(bound: Bound) -> nc.ByGlobalNorm:
    """Return a rule with a fixed bound: a step writes no gradient, so each one clips alike."""
    return nc.ByGlobalNorm(bound.value)


def numclip(source: list[np.ndarray], bound: Bound, optimizer: Callable[..., Any]) -> Call:
    groups = grouped(source, rule(bound))
    made = optimizer(groups, lr=LR)
    views = list(groups.params.values())
    return lambda: (views, made.step().norm)


def given(source: list[np.ndarray], bound: Bound, optimizer: Callable[..., Any]) -> Call:
    """Return a call that gives `step` the gradients, which it reads where they are."""
    groups = grouped(source, rule(bound))
    made = optimizer(groups, lr=LR)
    views = list(groups.params.values())
    grads = {str(k): array for k, array in enumerate(copied(source))}
    return lambda: (views, made.step(grads).norm)


def set_in(source: list[np.ndarray], bound: Bound, optimizer: Callable[..., Any]) -> Call:
    """Return a call that copies the gradients in by `set_grads` first."""
    groups = grouped(source, rule(bound))
    made = optimizer(groups, lr=LR)
    views = list(groups.params.values())
    grads = {str(k): array for k, array in enumerate(copied(source))}

    def call() -> tuple[Any, Any]:
        groups.set_grads(grads)
        return views, made.step().norm

    return call


def own_arrays(source: list[np.ndarray], bound: Bound) -> Call:
    """Return a call that clips and updates the user's own arrays, without groups."""
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


# ---- a step of an embedding (rows and their indices) and of small dense gradients

Sparse = tuple[list[np.ndarray], np.ndarray]
WORDS = 1000


def summed(source: Sparse) -> list[np.ndarray]:
    """Return the dense array that the rows stand for, and the dense gradients."""
    (rows, *dense), indices = source
    table = np.zeros((WORDS, rows.shape[1]))
    np.add.at(table, indices, rows)
    return [table, *dense]


def exact_rows(source: Sparse, bound: float, adam: bool) -> tuple[Any, float]:
    """Return what `exact` does, for an embedding that starts as ones."""
    sums, factor = summed(source), min(1.0, bound / norm_of(summed(source)))
    steps = [grad.astype(np.float64) * factor for grad in sums]
    if adam:
        steps = [step / (np.abs(step) + EPS) for step in steps]
    begins = [np.ones_like(sums[0]), *sums[1:]]
    return [x - LR * step for x, step in zip(begins, steps, strict=True)], norm_of(sums)


def of_rows(source: Sparse, bound: Bound, optimizer: Callable[..., Any], sets: bool) -> Call:
    """Return a call that makes slices, and gives them to `step` or sets and clips them first."""
    (rows, *dense), indices = source
    table = np.ones((WORDS, rows.shape[1]), rows.dtype)
    named = {str(k): array for k, array in enumerate(dense)}
    rule = nc.ByGlobalNorm(bound, shared="all")
    members = [nc.Group("rows", {"table": table}, rule, sparse=True), nc.Group("m", named, rule)]
    groups = nc.ParamGroups(members)
    made, views = optimizer(groups, lr=LR), list(groups.params.values())

    def call() -> tuple[Any, Any]:
        grads = {"table": nc.IndexedSlices(rows, indices, table.shape), **named}
        if not sets:
            return views, made.step(grads).norm
        groups.set_grads(grads)
        groups.clip()
        return views, made.step().norm

    return call


def numpy_rows(source: Sparse, bound: Bound) -> Call:
    """Return a call of the same work in NumPy, for gradient descent only."""
    (rows, *dense), indices = source
    table, params = np.ones((WORDS, rows.shape[1]), rows.dtype), copied(dense)

    def call() -> tuple[Any, Any]:
        distinct, places = np.unique(indices, return_inverse=True)
        sums = np.zeros((distinct.size, rows.shape[1]), rows.dtype)
        np.add.at(sums, places, rows)
        grads = [sums, *copied(dense)]
        norm = clip_loop(grads, bound())
        table[distinct] -= LR * grads[0]
        for param, grad in zip(params, grads[1:], strict=True):
            param -= LR * grad
        return [table, *params], norm

    return call


def limit_of_rows(source: Sparse, bound: Bound) -> Call:
    return memory_speed.read_and(memory_speed.descend, 2)(source[0], bound)


SGD = Workload(
    partial(exact, adam=False),
    {
        "limit": memory_speed.read_and(memory_speed.descend, 2),
        "numclip": partial(numclip, optimizer=nc.SGD),
        "numclip, given": partial(given, optimizer=nc.SGD),
        "numclip, set_grads": partial(set_in, optimizer=nc.SGD),
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
        "numclip, given": partial(given, optimizer=nc.Adam),
        "numclip, set_grads": partial(set_in, optimizer=nc.Adam),
        "numclip, own arrays": own_arrays,
        "NumPy loop": numpy_adam,
        "torch foreach": partial(torch_step, name="Adam", foreach=True),
        "torch fused": partial(torch_step, name="Adam", fused=True),
        "optax jit": partial(optax_step, name="adam"),
    },
    passes=(8, 8),
    follows=False,
)
SGD_ROWS = Workload(
    partial(exact_rows, adam=False),
    {
        "limit": limit_of_rows,
        "numclip": partial(of_rows, optimizer=nc.SGD, sets=False),
        "numclip, set_grads and clip": partial(of_rows, optimizer=nc.SGD, sets=True),
        "NumPy loop": numpy_rows,
    },
    passes=(4, 4),
    norm=lambda source: norm_of(summed(source)),
    follows=False,
)
ADAM_ROWS = Workload(
    partial(exact_rows, adam=True),
    {
        "limit": limit_of_rows,
        "numclip": partial(of_rows, optimizer=nc.Adam, sets=False),
        "numclip, set_grads and clip": partial(of_rows, optimizer=nc.Adam, sets=True),
    },
    passes=(8, 8),
    norm=lambda source: norm_of(summed(source)),
    follows=False,
)

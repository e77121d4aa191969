"""Clipping by the global norm, in place: numclip and its peers."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import numpy as np

import numclip as nc
from bench import memory_speed
from bench.workload import Bound, Call, Workload, copied, library, norm_of


def exact(grads: list[np.ndarray], bound: float) -> tuple[Any, float]:
    norm = norm_of(grads)
    factor = min(1.0, bound / norm)
    return (grad.astype(np.float64) * factor for grad in grads), norm


def numclip(source: list[np.ndarray], bound: Bound) -> Call:
    grads = copied(source)
    return lambda: nc.clip_by_global_norm(grads, bound(), out=grads)


def grouped(source: list[np.ndarray], rule: Any) -> nc.ParamGroups:
    named = {str(k): array for k, array in enumerate(source)}
    groups = nc.ParamGroups([nc.Group("model", named, clip=rule)])
    groups.set_grads(named)
    return groups


def flat(source: list[np.ndarray], bound: Bound) -> Call:
    groups = grouped(source, nc.ByGlobalNorm(bound))
    views = list(groups.grads.values())
    return lambda: (views, groups.clip().norm)


def clip_loop(grads: list[np.ndarray], bound: float) -> float:
    """Clip in place as NumPy code commonly does; return the norm."""
    norm = math.sqrt(sum(float(np.vdot(grad, grad)) for grad in grads))
    if norm > bound:
        for grad in grads:
            grad *= bound / norm
    return norm


def numpy_loop(source: list[np.ndarray], bound: Bound) -> Call:
    grads = copied(source)
    return lambda: (grads, clip_loop(grads, bound()))


def torch_parameters(params: list[np.ndarray], grads: list[np.ndarray]) -> list[Any]:
    """Return parameters with gradients that share the arrays' memory."""
    torch = library("torch")
    torch.set_num_threads(nc.get_num_threads())
    made = [torch.nn.Parameter(torch.from_numpy(param), requires_grad=False) for param in params]
    for param, grad in zip(made, grads, strict=True):
        param.grad = torch.from_numpy(grad)
    return made


def torch_clip(source: list[np.ndarray], bound: Bound, foreach: bool) -> Call:
    grads = copied(source)
    params = torch_parameters(grads, grads)
    clip = library("torch").nn.utils.clip_grad_norm_
    return lambda: (grads, clip(params, bound(), foreach=foreach))


def torch_foreach(source: list[np.ndarray], bound: Bound) -> Call:
    return torch_clip(source, bound, foreach=True)


def torch_loop(source: list[np.ndarray], bound: Bound) -> Call:
    return torch_clip(source, bound, foreach=False)


def optax_clip(grads: Any, bound: Any) -> tuple[Any, Any]:
    optax = library("optax")
    rule = optax.clip_by_global_norm(bound)
    return rule.update(grads, rule.init(grads))[0], optax.global_norm(grads)


@cache
def optax_compiled() -> Any:
    return library("jax").jit(optax_clip, donate_argnums=0)


def optax_jit(source: list[np.ndarray], bound: Bound) -> Call:
    jax, clip = library("jax"), optax_compiled()
    grads = [jax.numpy.array(grad) for grad in source]

    def call() -> tuple[Any, Any]:
        nonlocal grads
        grads, norm = jax.block_until_ready(clip(grads, bound()))
        return grads, norm

    return call


@cache
def tensorflow() -> Any:
    tf = library("tensorflow")
    tf.config.set_visible_devices([], "GPU")
    tf.config.threading.set_intra_op_parallelism_threads(nc.get_num_threads())
    return tf


@cache
def tf_compiled() -> Any:
    return tensorflow().function(tensorflow().clip_by_global_norm)


def tf_function(source: list[np.ndarray], bound: Bound) -> Call:
    tf, clip = tensorflow(), tf_compiled()
    grads = [tf.constant(grad) for grad in source]

    def call() -> tuple[Any, Any]:
        nonlocal grads
        grads, norm = clip(grads, np.float32(bound()))
        return grads, norm

    return call


CLIP = Workload(
    exact,
    {
        "limit": memory_speed.clip,
        "numclip": numclip,
        "numclip, flat": flat,
        "NumPy loop": numpy_loop,
        "torch foreach": torch_foreach,
        "torch loop": torch_loop,
        "optax jit": optax_jit,
        "tf.function": tf_function,
    },
    passes=(1, 3),
)

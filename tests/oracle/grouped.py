"""Gradients for parameter groups, comparable snapshots, and the functions' results on groups."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

import numclip as nc
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import real_dtype

SHAPES = {"w": (5, 3), "b": (3,), "scalar": (), "none": (0, 2), "filter": (2, 3, 2)}
ROWS = (6, 3)

NORM_RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(0.7, ord=3),
    nc.ByGlobalNorm(1e9),
    nc.ByNorm(0.4),
    nc.ByNorm(0.3, ord=math.inf),
    nc.ByAverageNorm(0.05),
    nc.ByBlockRMS(0.2),
    nc.AutoClip(percentile=50, window=9),
    nc.ZClip(alpha=0.9, warmup=2, z=0.5),
    nc.ZClip(warmup=2, max_norm=0.3),
    nc.AdaGC(relative=0.9, absolute=0.5, warmup=2),
]
WITHIN_RULES = [
    nc.ByValue(-0.1, 0.2),
    nc.Adaptive(0.3),
    nc.Adaptive(0.1, 0.5, axes=()),
    nc.ByNorm(0.3, axes=()),
]
RULES = NORM_RULES + WITHIN_RULES


def params_of(dtype: str = "float64", seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: normal(rng, shape, dtype) for name, shape in SHAPES.items()}


def grads_of(groups: nc.ParamGroups, seed: int = 1, scale: float = 1.0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    return {
        name: slices(rng, 5, param.shape, param.dtype.name, repeated=True)
        if group.sparse
        else normal(rng, param.shape, param.dtype, scale)
        for group in groups
        for name, param in group.params.items()
    }


def frozen(value: Any) -> Any:
    """A gradient or a state tree as a value that compares bit by bit."""
    if isinstance(value, nc.IndexedSlices):
        return frozen(value.values), frozen(value.indices)
    if isinstance(value, Mapping):
        return {name: frozen(part) for name, part in value.items()}
    if isinstance(value, np.ndarray):
        return value.dtype.name, value.shape, value.tobytes()
    return repr(value)


def snapshot(groups: nc.ParamGroups) -> Any:
    return frozen(groups.grads), frozen(groups.state_dict())


def over(grad: Any, divisor: float) -> Any:
    """A new gradient of the same dtype: `grad` over a divisor that the dtype can represent."""
    if isinstance(grad, nc.IndexedSlices):
        return nc.IndexedSlices(over(grad.values, divisor), grad.indices, grad.dense_shape)
    parts = np.array(grad).reshape(-1).view(real_dtype(grad.dtype))  # complex division spreads NaN
    return (parts / parts.dtype.type(divisor)).view(grad.dtype).reshape(grad.shape)


def by_functions(group: Any, grads: Mapping[str, Any], report: nc.ClipReport) -> dict[str, Any]:
    """The group's gradients, clipped by numclip's functions instead of the group's rule.

    For a rule that has no function, the bound is the threshold in `report`.
    """
    own = {name: grads[name] for name in group.params}
    match group.clip:
        case None:
            return own
        case nc.ByGlobalNorm(max_norm=bound, ord=order):
            return nc.clip_by_global_norm(own, bound, ord=order)[0]
        case nc.AutoClip() | nc.ZClip():
            return nc.clip_by_global_norm(own, report.groups[group.name].threshold)[0]
        case nc.AdaGC():
            bounds = {name: report.tensors[name].threshold for name in own}
            return {name: nc.clip_by_norm(g, bounds[name]) for name, g in own.items()}
        case nc.ByNorm(max_norm=bound, axes=axes, ord=order):
            return {name: nc.clip_by_norm(g, bound, axes, ord=order) for name, g in own.items()}
        case nc.ByAverageNorm(max_norm=bound):
            return {name: nc.clip_by_average_norm(g, bound) for name, g in own.items()}
        case nc.ByBlockRMS(threshold=bound):
            return {name: nc.clip_by_block_rms(g, bound) for name, g in own.items()}
        case nc.ByValue(min=low, max=high):
            return {name: nc.clip_by_value(g, low, high) for name, g in own.items()}
        case nc.Adaptive(clip_factor=factor, eps=eps, axes=axes):
            settings = factor, eps, axes
            return {n: nc.adaptive_clip(g, group.params[n], *settings) for n, g in own.items()}
    raise AssertionError(group.clip)


def assert_as_by_functions(
    groups: nc.ParamGroups, before: Mapping[str, Any], report: nc.ClipReport
) -> None:
    for group in groups:
        for name, wanted in by_functions(group, before, report).items():
            assert_same_bits(groups.grads[name], wanted)

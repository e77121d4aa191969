"""Gradients clipped one by one, or of two dtypes: numclip and the NumPy lines it replaces."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

import numclip as nc
from bench import memory_speed
from bench.clips import clip_loop, numclip
from bench.clips import exact as exact_whole
from bench.workload import Bound, Call, Workload, copied

Each = Callable[[np.ndarray, float], Any]
RATIO_EPS = 1e-3


def each(source: list[np.ndarray], bound: Bound, clip: Each) -> Call:
    """Return the call that clips one gradient after another, in place."""
    grads = copied(source)

    def call() -> tuple[Any, Any]:
        now = bound()
        for grad in grads:
            clip(grad, now)
        return grads, 0.0

    return call


def exact(source: list[np.ndarray], bound: float, clip: Each) -> tuple[Any, float]:
    """Return the results of `clip`, a line of NumPy, in float64; 0 in place of a norm."""
    wide = [grad.astype(np.float64) for grad in source]
    for grad in wide:
        clip(grad, bound)
    return wide, 0.0


def numpy_value(grad: np.ndarray, bound: float) -> None:
    np.clip(grad, -bound, bound, out=grad)


def numpy_columns(grad: np.ndarray, bound: float) -> None:
    norms = np.sqrt((grad * grad).sum(axis=0, keepdims=True))
    grad *= np.minimum(1, bound / norms)


def numpy_ratio(grad: np.ndarray, bound: float) -> None:
    """Clip by the norms of parameters that are all 1, as `numclip_ratio` does."""
    norms = np.sqrt((grad * grad).sum(axis=0, keepdims=True))
    param = np.ones_like(grad)
    owners = np.maximum(np.sqrt((param * param).sum(axis=0, keepdims=True)), RATIO_EPS)
    grad *= np.minimum(1, bound * owners / norms)


def numclip_ratio(grad: np.ndarray, bound: float) -> None:
    nc.adaptive_clip(grad, np.ones_like(grad), bound, RATIO_EPS, axes=0, out=grad)


def of_two_dtypes(source: list[np.ndarray], bound: Bound, way: Callable[..., Call]) -> Call:
    """Return the call of a way on gradients of which every second one is float64."""
    return way(
        [grad.astype(np.float64 if k % 2 else grad.dtype) for k, grad in enumerate(source)], bound
    )


def numpy_loop(grads: list[np.ndarray], bound: Bound) -> Call:
    return lambda: (grads, clip_loop(grads, bound()))


def workload(ours: Each, line: Each, norm: Callable[[Any], float]) -> Workload:
    ways = {
        "limit": memory_speed.clip,
        "numclip": partial(each, clip=ours),
        "NumPy loop": partial(each, clip=line),
    }
    return Workload(partial(exact, clip=line), ways, passes=(1, 3), norm=norm, follows=False)


def column_norms(source: list[np.ndarray]) -> list[np.ndarray]:
    return [np.sqrt((grad.astype(np.float64) ** 2).sum(axis=0)) for grad in source]


VALUE = workload(
    lambda grad, bound: nc.clip_by_value(grad, -bound, bound, out=grad),
    numpy_value,
    norm=lambda source: float(max(np.abs(grad).max() for grad in source)),
)
COLUMNS = workload(
    lambda grad, bound: nc.clip_by_norm(grad, bound, axes=0, out=grad),
    numpy_columns,
    norm=lambda source: float(max(norms.max() for norms in column_norms(source))),
)
RATIO = workload(
    numclip_ratio,
    numpy_ratio,
    norm=lambda source: float(
        max(
            (norms / len(grad) ** 0.5).max()
            for grad, norms in zip(source, column_norms(source), strict=True)
        )
    ),
)
MIXED = Workload(
    exact_whole,
    {
        "limit": memory_speed.clip,
        "numclip": partial(of_two_dtypes, way=numclip),
        "NumPy loop": partial(of_two_dtypes, way=numpy_loop),
    },
    passes=(1, 3),
)

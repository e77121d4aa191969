"""The functions as users' compiled code calls them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import njit

import numclip as nc


@njit
def global_norm(grads):
    return nc.global_norm(grads)


@njit
def global_norm_of_order(grads, ord):
    return nc.global_norm(grads, ord)


@njit
def clip(grads, bound):
    return nc.clip_by_global_norm(grads, bound)


@njit
def clip_in_place(grads, bound):
    return nc.clip_by_global_norm(grads, bound, out=grads)


@njit
def clip_of_order(grads, bound, ord):
    return nc.clip_by_global_norm(grads, bound, ord=ord, out=grads)


@njit
def clip_by_norm(grad, bound):
    return nc.clip_by_norm(grad, bound)


@njit
def clip_by_average_norm(grad, bound):
    return nc.clip_by_average_norm(grad, bound)


@njit
def clip_by_block_rms(grad, bound):
    return nc.clip_by_block_rms(grad, bound)


@njit
def clip_by_value(grad, low, high):
    return nc.clip_by_value(grad, low, high)


@njit
def all_in_place(grad, kind, bound):
    if kind == 0:
        return nc.clip_by_norm(grad, bound, out=grad)
    if kind == 1:
        return nc.clip_by_average_norm(grad, bound, out=grad)
    return nc.clip_by_block_rms(grad, bound, out=grad)


@njit
def clip_by_value_in_place(grad, low, high):
    return nc.clip_by_value(grad, low, high, out=grad)


@njit
def skip(grads, bound, norm):
    return nc.clip_by_global_norm(grads, bound, norm, nonfinite="skip", out=grads)


@njit
def zero(grads, bound, norm):
    return nc.clip_by_global_norm(grads, bound, norm, nonfinite="zero", out=grads)


@njit
def propagate(grads, bound, norm):
    return nc.clip_by_global_norm(grads, bound, norm, out=grads)


@njit
def refuse(grads, bound, norm):
    return nc.clip_by_global_norm(grads, bound, norm, nonfinite="raise", out=grads)


def along(axes: Any, in_place: bool) -> Callable[..., Any]:
    """Return the clip along axes, which are to be known when it is compiled."""
    if in_place:
        return njit(lambda grad, bound: nc.clip_by_norm(grad, bound, axes, out=grad))
    return njit(lambda grad, bound: nc.clip_by_norm(grad, bound, axes))


POLICIES: dict[str, Callable[..., Any]] = {
    "propagate": propagate,
    "raise": refuse,
    "skip": skip,
    "zero": zero,
}

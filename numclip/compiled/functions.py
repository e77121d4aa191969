"""The implementations of the functions within compiled code, by the types of arguments."""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types

from numclip.compiled import units
from numclip.compiled.arrays import broadcast, copied, entered, left
from numclip.compiled.containers import (
    all_copied,
    all_entered,
    all_left,
    check_target,
    fault_of_target,
)
from numclip.compiled.tables import (
    UNFIT,
    check,
    clamp_array,
    clip_all,
    number_of,
)
from numclip.compiled.types_taken import (
    check_bound,
    check_gradient,
    check_number,
    check_order,
    check_out,
    choice,
    is_nothing,
    members,
    refuse,
)
from numclip.host.kernels.scalars import clamped
from numclip.host.kernels.spans import (
    AVERAGE,
    BAD_INTERVAL,
    FOUND,
    GIVEN,
    IN_PLACE,
    ROOT_MEAN,
    UNCHANGED,
    WRITTEN,
)
from numclip.host.runtime.jit import expanded, inline
from numclip.law import POLICIES

DUPLICATES = ("sum", "raw")
INFINITE = float("inf")


def global_norm(grads: Any, ord: Any, duplicates: Any) -> Any:
    """Return the implementation for these types."""
    check_order(ord, members("grads", grads))
    choice("duplicates", duplicates, DUPLICATES)

    def norm(grads, ord=2, duplicates="sum"):
        works = all_entered(grads)
        norm, status = clip_all(grads, works, (INFINITE, 0.0, number_of(ord), 0))
        check(status)
        return norm

    return norm


def _clips(grads: Any, out: Any, options: int) -> Any:
    """Return the function that clips arrays, in place or into new ones."""

    def into_new_arrays(grads, out, bound, given, ord):
        works = all_copied(grads)
        norm, status = clip_all(works, works, (bound, given, ord, options))
        check(status)
        return works, norm

    def in_place(grads, out, bound, given, ord):
        # The kernel returns a fault of `out`: a branch here would count references to `out`.
        wrong = fault_of_target(out, grads) << FOUND
        works = all_entered(grads)
        norm, status = clip_all(grads, works, (bound, given, ord, options | IN_PLACE | wrong))
        check(status)
        if status != UNCHANGED:
            all_left(grads, works)
        return grads, norm

    return expanded(into_new_arrays if is_nothing(out) else in_place)


def clip_by_global_norm(
    grads: Any, clip_norm: Any, use_norm: Any, ord: Any, nonfinite: Any, duplicates: Any, out: Any
) -> Any:
    """Return the implementation for these types."""
    gradients = members("grads", grads)
    check_order(ord, gradients)
    choice("duplicates", duplicates, DUPLICATES)
    check_number("clip_norm", clip_norm)
    check_out("grads", out, grads, gradients)
    options = POLICIES[choice("nonfinite", nonfinite, tuple(POLICIES))]
    if not is_nothing(use_norm):
        check_number("use_norm", use_norm)
        options |= GIVEN
    clips = _clips(grads, out, options)

    def clip(
        grads, clip_norm, use_norm=None, ord=2, nonfinite="propagate", duplicates="sum", out=None
    ):
        return clips(grads, out, number_of(clip_norm), number_of(use_norm), number_of(ord))

    return clip


def _one_array(name: str, grad: Any, bound: Any, ord: Any, out: Any, options: int) -> Any:
    """Return the function that clips one array."""
    check_gradient("grad", grad)
    check_number(name, bound)
    check_order(ord, [grad])
    check_out("grad", out, grad, [grad])
    as_tuple = types.UniTuple(grad, 1)
    clips = _clips(as_tuple, out, options)
    if is_nothing(out):

        def clip(grad, bound, ord, out):
            return clips((grad,), None, number_of(bound), 0.0, number_of(ord))[0][0]

    else:

        def clip(grad, bound, ord, out):
            return clips((grad,), (out,), number_of(bound), 0.0, number_of(ord))[0][0]

    return expanded(clip)


def clip_by_norm(grad: Any, clip_norm: Any, axes: Any, ord: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    if not is_nothing(axes):
        check_gradient("grad", grad)
        check_number("clip_norm", clip_norm)
        check_out("grad", out, grad, [grad])
        return units.clip_by_norm(grad, axes, ord, out)
    clip = _one_array("clip_norm", grad, clip_norm, ord, out, 0)
    return lambda grad, clip_norm, axes=None, ord=2, out=None: clip(grad, clip_norm, ord, out)


def clip_by_average_norm(grad: Any, clip_norm: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    clip = _one_array("clip_norm", grad, clip_norm, 2, out, AVERAGE)
    return lambda grad, clip_norm, out=None: clip(grad, clip_norm, 2, out)


def clip_by_block_rms(grad: Any, threshold: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    clip = _one_array("threshold", grad, threshold, 2, out, ROOT_MEAN)
    return lambda grad, threshold, out=None: clip(grad, threshold, 2, out)


@inline
def clamp_all(work, low, high):
    """Clamp the numbers of an array between two numbers; return the status."""
    return clamp_array(work, number_of(low), number_of(high))


@inline
def clamp_between(work, low, high):
    """Clamp between numbers or arrays that broadcast to the shape; return the status."""
    lows, low_fits = broadcast(low, work)
    highs, high_fits = broadcast(high, work)
    if not (low_fits and high_fits):
        return UNFIT
    for index in np.ndindex(work.shape):
        if not lows[index] <= highs[index]:
            return BAD_INTERVAL
    for index in np.ndindex(work.shape):
        least, most = work.dtype.type(lows[index]), work.dtype.type(highs[index])
        work[index] = clamped(work[index], least, most)
    return WRITTEN


def clip_by_value(grad: Any, clip_value_min: Any, clip_value_max: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    check_gradient("grad", grad)
    if isinstance(grad.dtype, types.Complex):
        raise refuse("grad", "real numbers to hold between bounds", grad)
    are_arrays = [
        check_bound("clip_value_min", clip_value_min),
        check_bound("clip_value_max", clip_value_max),
    ]
    clamp = clamp_between if any(are_arrays) else clamp_all

    def into_new_array(grad, clip_value_min, clip_value_max, out=None):
        work = copied(grad, None)
        status = clamp(work, clip_value_min, clip_value_max)
        check(status)
        return work

    def in_place(grad, clip_value_min, clip_value_max, out=None):
        check_target(out, grad)
        work = entered(grad, None)
        status = clamp(work, clip_value_min, clip_value_max)
        check(status)
        left(grad, work)
        return grad

    def by_a_copy(grad, clip_value_min, clip_value_max, out=None):
        check_target(out, grad)
        work = into_new_array(grad, clip_value_min, clip_value_max)
        for index in np.ndindex(grad.shape):
            grad[index] = work[index]
        return grad

    if not check_out("grad", out, grad, [grad]):
        return into_new_array
    into_new_array = expanded(into_new_array)
    return by_a_copy if any(are_arrays) else in_place  # bounds may share the gradient's memory

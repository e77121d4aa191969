"""Norms over whole arrays, and clips by them, within compiled code."""

from __future__ import annotations

import math
from typing import Any

from numclip.compiled.arrays import are_same, copied, entered, left
from numclip.compiled.checks import check_apart, check_bounds, check_same, number_of
from numclip.compiled.containers import (
    all_copied,
    all_entered,
    all_left,
    describe_all,
    keep,
    room_for,
    table_in,
)
from numclip.compiled.policies import POLICIES, measured, propagated
from numclip.compiled.types_taken import (
    check_default,
    check_gradient,
    check_number,
    check_out,
    choice,
    element_types,
    is_nothing,
    members,
)
from numclip.kernels.jit import inline
from numclip.kernels.spans import scale_by_power

OTHER_ORDERS = "other orders are taken outside compiled code"
DUPLICATES = ("sum", "raw")


def global_norm(grads: Any, ord: Any, duplicates: Any) -> Any:
    """Return the implementation for these types."""
    gradients = members("grads", grads)
    check_default("ord", ord, 2, OTHER_ORDERS)
    choice("duplicates", duplicates, DUPLICATES)
    narrow, wide = element_types(gradients)

    def norm(grads, ord=2, duplicates="sum"):
        works = all_entered(grads)
        room = room_for(grads)
        rows = table_in(room, grads)
        describe_all(rows, grads, works)
        root, exponent = measured(rows, len(grads), narrow, wide)
        keep(room)
        keep(works)
        return scale_by_power(root, exponent)

    return norm


def clip_by_global_norm(
    grads: Any, clip_norm: Any, use_norm: Any, ord: Any, nonfinite: Any, duplicates: Any, out: Any
) -> Any:
    """Return the implementation for these types."""
    gradients = members("grads", grads)
    check_default("ord", ord, 2, OTHER_ORDERS)
    choice("duplicates", duplicates, DUPLICATES)
    check_number("clip_norm", clip_norm)
    if not is_nothing(use_norm):
        check_number("use_norm", use_norm)
    run = POLICIES[choice("nonfinite", nonfinite, tuple(POLICIES))]
    narrow, wide = element_types(gradients)

    def into_new_arrays(
        grads, clip_norm, use_norm=None, ord=2, nonfinite="propagate", duplicates="sum", out=None
    ):
        bound, given = number_of(clip_norm), number_of(use_norm)
        check_bounds(bound, given)
        works = all_copied(grads)
        room = room_for(grads)
        rows = table_in(room, works)
        describe_all(rows, works, works)
        norm, _ = run(rows, len(grads), narrow, wide, bound, given, 1.0)
        keep(room)
        return works, norm

    def in_place(
        grads, clip_norm, use_norm=None, ord=2, nonfinite="propagate", duplicates="sum", out=None
    ):
        bound, given = number_of(clip_norm), number_of(use_norm)
        check_bounds(bound, given)
        check_same(are_same(out, grads))
        works = all_entered(grads)
        room = room_for(grads)
        rows = table_in(room, grads)
        describe_all(rows, grads, works)
        check_apart(rows, len(grads))
        norm, written = run(rows, len(grads), narrow, wide, bound, given, 1.0)
        if written:
            all_left(grads, works)
        keep(room)
        keep(works)
        return grads, norm

    return in_place if check_out("grads", out, grads, gradients) else into_new_arrays


@inline
def one(size):
    """Return the divisor of a norm itself."""
    return 1.0


@inline
def float_of(size):
    """Return the divisor of an average norm."""
    return float(size)


@inline
def root_of(size):
    """Return the divisor of a root mean square."""
    return math.sqrt(size)


def clip_by_divided_norm(name: str, grad: Any, bound: Any, out: Any, divisor_of: Any) -> Any:
    """Return what clips one array by its norm over a divisor, in place or not."""
    check_gradient("grad", grad)
    check_number(name, bound)
    narrow, wide = element_types([grad])

    def into_new_array(grad, out, clip_norm):
        bound = number_of(clip_norm)
        check_bounds(bound, -1.0)
        work = copied(grad, None)
        rows = table_in(None, (work,))
        describe_all(rows, (work,), (work,))
        propagated(rows, 1, narrow, wide, bound, -1.0, divisor_of(max(grad.size, 1)))
        return work

    def in_place(grad, out, clip_norm):
        bound = number_of(clip_norm)
        check_bounds(bound, -1.0)
        check_same(are_same(out, grad))
        work = entered(grad, None)
        rows = table_in(None, (grad,))
        describe_all(rows, (grad,), (work,))
        divisor = divisor_of(max(grad.size, 1))
        _, written = propagated(rows, 1, narrow, wide, bound, -1.0, divisor)
        if written:
            left(grad, work)
        keep(work)
        return grad

    return in_place if check_out("grad", out, grad, [grad]) else into_new_array


def clip_by_norm(grad: Any, clip_norm: Any, axes: Any, ord: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    check_default("ord", ord, 2, OTHER_ORDERS)
    check_default("axes", axes, None, "units along axes are clipped outside compiled code")
    clip = inline(clip_by_divided_norm("clip_norm", grad, clip_norm, out, one))
    if is_nothing(out):
        return lambda grad, clip_norm, axes=None, ord=2, out=None: clip(grad, grad, clip_norm)
    return lambda grad, clip_norm, axes=None, ord=2, out=None: clip(grad, out, clip_norm)


def clip_by_average_norm(grad: Any, clip_norm: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    clip = inline(clip_by_divided_norm("clip_norm", grad, clip_norm, out, float_of))
    if is_nothing(out):
        return lambda grad, clip_norm, out=None: clip(grad, grad, clip_norm)
    return lambda grad, clip_norm, out=None: clip(grad, out, clip_norm)


def clip_by_block_rms(grad: Any, threshold: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    clip = inline(clip_by_divided_norm("threshold", grad, threshold, out, root_of))
    if is_nothing(out):
        return lambda grad, threshold, out=None: clip(grad, grad, threshold)
    return lambda grad, threshold, out=None: clip(grad, out, threshold)

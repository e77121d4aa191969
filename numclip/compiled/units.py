"""`clip_by_norm` along axes, within compiled code."""

from __future__ import annotations

from typing import Any

import numpy as np

from numclip.border.arguments import axes_of
from numclip.compiled.arrays import turned
from numclip.compiled.containers import check_target
from numclip.compiled.tables import (
    check,
    clip_array_by_columns,
    clip_array_by_rows,
    number_of,
)
from numclip.compiled.types_taken import is_nothing, refuse, require_two, value_of
from numclip.host.kernels.spans import RARE, WRITTEN
from numclip.host.runtime.jit import inline


@inline
def product(shape, begin, end):
    """Return the product of ``shape[begin:end]``."""
    total = 1
    for k in range(begin, end):
        total *= shape[k]
    return total


@inline
def write(values, out):
    """Copy an array to another."""
    for index in np.ndindex(out.shape):
        out[index] = values[index]


@inline
def in_c_order(values):
    """Return a copy in C order."""
    out = np.empty(values.shape, values.dtype)
    write(values, out)
    return out


def _clipped_in_order(axes: tuple[int, ...], ndim: int) -> Any:
    """Return a function that clips along adjacent axes; by columns it can return RARE."""
    first, last = (axes[0], axes[-1] + 1) if axes else (ndim, ndim)
    if last == ndim:
        return lambda work, bound: clip_array_by_rows(work, product(work.shape, 0, first), bound)

    def clip(work, bound):
        outer, reduced = product(work.shape, 0, first), product(work.shape, first, last)
        return clip_array_by_columns(work, outer, reduced, bound)

    return clip


def _clipped(axes: tuple[int, ...], ndim: int) -> Any:
    """Return a function that clips units of a C-order array in place and returns a status."""
    kept = tuple(k for k in range(ndim) if k not in axes)
    order = kept + axes
    back = tuple(order.index(k) for k in range(ndim))
    beside = not axes or axes[-1] - axes[0] + 1 == len(axes)
    at_once = inline(_clipped_in_order(axes, ndim)) if beside else None
    if beside and order == tuple(range(ndim)):
        return at_once
    count = len(kept)

    def by_rows(work, bound):
        rows = in_c_order(turned(work, order))
        status = clip_array_by_rows(rows, product(rows.shape, 0, count), bound)
        if status == WRITTEN:
            write(turned(rows, back), work)
        return status

    transposed = inline(by_rows)

    def by_columns(work, bound):
        status = at_once(work, bound)
        return transposed(work, bound) if status == RARE else status

    return inline(by_columns) if beside else transposed


def clip_by_norm(grad: Any, axes: Any, ord: Any, out: Any) -> Any:
    """Return the implementation; `ord` and `axes` are checked here, other types before."""
    require_two(ord, "(other orders along axes are taken outside compiled code)")
    try:
        reduced = axes_of(value_of(axes), grad.ndim)
    except (TypeError, ValueError):
        wanted = f"different axes of an array of {grad.ndim} dimensions, written in the call"
        raise refuse("axes", wanted, axes) from None
    if grad.ndim == 0 or reduced is None:
        raise refuse("axes", "None for an array without dimensions", axes)
    clipped = _clipped(reduced, grad.ndim)
    lies_so = grad.layout == "C"

    def into_new_array(grad, clip_norm, axes=None, ord=2, out=None):
        work = in_c_order(grad)
        status = clipped(work, number_of(clip_norm))
        check(status)
        return work

    def in_place(grad, clip_norm, axes=None, ord=2, out=None):
        check_target(out, grad)
        status = clipped(grad, number_of(clip_norm))
        check(status)
        return grad

    def in_place_by_a_copy(grad, clip_norm, axes=None, ord=2, out=None):
        check_target(out, grad)
        work = in_c_order(grad)
        status = clipped(work, number_of(clip_norm))
        check(status)
        if status == WRITTEN:
            write(work, grad)
        return grad

    if is_nothing(out):
        return into_new_array
    return in_place if lies_so else in_place_by_a_copy

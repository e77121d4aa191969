"""Elements held between two bounds, within compiled code."""

from __future__ import annotations

from typing import Any

from numba import types

from numclip.compiled.arrays import are_same, copied, entered, left
from numclip.compiled.calls import call
from numclip.compiled.checks import check_interval, check_same, number_of
from numclip.compiled.types_taken import (
    check_gradient,
    check_number,
    check_out,
    element_types,
    refuse,
)
from numclip.kernels.spans import clamp


def clip_by_value(grad: Any, clip_value_min: Any, clip_value_max: Any, out: Any) -> Any:
    """Return the implementation for these types."""
    check_gradient("grad", grad)
    if isinstance(grad.dtype, types.Complex):
        raise refuse("grad", "real numbers to hold between bounds", grad)
    check_number("clip_value_min", clip_value_min)
    check_number("clip_value_max", clip_value_max)
    dtype, _ = element_types([grad])

    def into_new_array(grad, clip_value_min, clip_value_max, out=None):
        low, high = number_of(clip_value_min), number_of(clip_value_max)
        check_interval(low, high)
        work = copied(grad, None)
        call(clamp, (work.ctypes.data, work.size, dtype, low, high))
        return work

    def in_place(grad, clip_value_min, clip_value_max, out=None):
        low, high = number_of(clip_value_min), number_of(clip_value_max)
        check_interval(low, high)
        check_same(are_same(out, grad))
        work = entered(grad, None)
        call(clamp, (work.ctypes.data, work.size, dtype, low, high))
        left(grad, work)
        return grad

    return in_place if check_out("grad", out, grad, [grad]) else into_new_array

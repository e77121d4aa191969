"""What is checked when users' compiled code runs, before anything is written."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numclip.compiled.calls import call
from numclip.compiled.types_taken import is_nothing
from numclip.kernels.jit import inline
from numclip.kernels.spans import are_apart


@intrinsic
def number_of(_typing: Any, value: Any) -> Any:
    """Return a number, or a 0-d array of one, as a float; -1 where there is none."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if is_nothing(value):
            return context.get_constant(types.float64, -1.0)
        number, kind = arguments[0], value
        if isinstance(value, types.Array):
            array = cgutils.create_struct_proxy(value)(context, builder, value=number)
            number, kind = builder.load(array.data), value.dtype
        return context.cast(builder, number, kind, types.float64)

    return types.float64(value), emit


@inline
def check_bounds(bound, given):
    """Refuse a bound that is no bound, and a given norm that is no norm; -1 is none."""
    if not bound >= 0.0:
        raise ValueError("clip_norm, or threshold: expected a number >= 0 (inf never clips)")
    if given < 0.0 and given != -1.0:
        raise ValueError("use_norm: expected a norm, which is >= 0")


@inline
def check_same(same):
    """Refuse results that would go elsewhere."""
    if not same:
        raise ValueError("out: expected the gradients themselves, to work in place, or None")


@inline
def check_apart(rows, count):
    """Refuse to write arrays that share memory."""
    if not call(are_apart, (rows, count)):
        raise ValueError("out: expected arrays that share no memory")


@inline
def check_interval(low, high):
    """Refuse bounds on values that exclude everything."""
    if low != low or high != high:
        raise ValueError("clip_value_min, clip_value_max: expected numbers, got NaN")
    if low > high:
        raise ValueError("clip_value_min: expected at most clip_value_max")

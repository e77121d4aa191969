"""Tables of arrays for `kernels.spans`, and the calls of kernels on them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from numclip.compiled.arrays import WORD, write_row
from numclip.compiled.calls import KERNELS, emit_call, emit_clip
from numclip.compiled.types_taken import CONTAINERS, is_nothing
from numclip.errors import NonFiniteGradientError
from numclip.host.kernels import spans
from numclip.host.kernels.spans import FIELDS
from numclip.host.runtime.jit import OWN_FLAGS, expanded

_IN_PLACE = "out: expected the gradients themselves, to work in place, or None"
ELSEWHERE, UNFIT = range(spans.RARE + 1, spans.RARE + 3)
_FAULTS: dict[int, tuple[type[Exception], tuple[Any, ...]]] = {
    ELSEWHERE: (ValueError, (_IN_PLACE,)),
    spans.BAD_BOUND: (
        ValueError,
        ("clip_norm, or threshold: expected a number >= 0 (inf never clips)",),
    ),
    spans.BAD_NORM: (ValueError, ("use_norm: expected a norm, which is >= 0",)),
    spans.BAD_ORDER: (ValueError, ("ord: expected a real number >= 1 or inf",)),
    spans.OVERLAP: (
        ValueError,
        ("out: expected arrays that do not interleave, of elements that share no memory",),
    ),
    spans.NONFINITE: (
        NonFiniteGradientError,
        ("grads, or use_norm: expected finite numbers; nothing was modified", None, 0, math.nan, 0),
    ),
    spans.BAD_INTERVAL: (
        ValueError,
        ("clip_value_min: expected a number that is at most clip_value_max; neither is NaN",),
    ),
    UNFIT: (
        ValueError,
        ("clip_value_min, clip_value_max: expected shapes that broadcast to the gradient's",),
    ),
}
# Raised after `fail`: so numba knows that the code ends there, and frees arrays before.
UNREACHABLE = SystemError


@intrinsic
def fail(_typing: Any, status: Any) -> Any:
    """Raise the error that a status stands for."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        for code, (error, texts) in _FAULTS.items():
            with builder.if_then(builder.icmp_signed("==", arguments[0], ir.Constant(WORD, code))):
                context.call_conv.return_user_exc(builder, error, texts)
        return context.get_dummy_value()

    return types.none(types.int64), emit


@expanded
def check(status):
    """Raise the error that a status stands for, if it is one."""
    if status > spans.WRITTEN:
        fail(status)
        raise UNREACHABLE


@intrinsic
def number_of(_typing: Any, value: Any) -> Any:
    """Return a number, or a 0-d array of one, as a float; 0 for None."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if is_nothing(value):
            return context.get_constant(types.float64, 0.0)
        number, kind = arguments[0], value
        if isinstance(value, types.Array):
            array = cgutils.create_struct_proxy(value)(context, builder, value=number)
            number, kind = builder.load(array.data), value.dtype
        return context.cast(builder, number, kind, types.float64)

    return types.float64(value), emit


@intrinsic
def _describe(_typing: Any, table: Any, t: Any, grad: Any, work: Any) -> Any:
    """Write row `t` of a table for an array and the one to work on."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows = _address_of(context, builder, table, arguments[0])
        write_row(builder, context, rows, arguments[1], grad, tuple(arguments[2:]))
        return context.get_dummy_value()

    return types.none(table, types.int64, grad, work), emit


def _address_of(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    array = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    return builder.ptrtoint(array.data, WORD)


@intrinsic
def _clip_table(_typing: Any, table: Any, count: Any, numbers: Any) -> Any:
    """Clip the `count` arrays of a table."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        rows = _address_of(context, builder, table, arguments[0])
        rest = cgutils.unpack_tuple(builder, arguments[2])
        return emit_clip(context, builder, [rows, arguments[1], *rest])

    return KERNELS["clip"].return_type(table, types.int64, numbers), emit


def _table_of_tuple(context: Any, builder: Any, kinds: Any, grads: Any, works: Any) -> Any:
    """Emit the table of a tuple of arrays on the stack; return its address and its length.

    `works` are the arrays to work on: others of the same types, or `grads` themselves.
    """
    arrays = [k for k, kind in enumerate(kinds) if isinstance(kind, types.Array)]
    words = ir.ArrayType(WORD, max(len(arrays), 1) * FIELDS)
    rows = builder.ptrtoint(cgutils.alloca_once(builder, words), WORD)
    for t, k in enumerate(arrays):
        pair = builder.extract_value(grads, k), builder.extract_value(works, k)
        write_row(builder, context, rows, ir.Constant(WORD, t), kinds[k], pair)
    return rows, ir.Constant(WORD, len(arrays))


@intrinsic
def _clip_tuple(_typing: Any, grads: Any, works: Any, numbers: Any) -> Any:
    """Clip a tuple of arrays, working on `works` if it is not None."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        worked_on = arguments[0 if is_nothing(works) else 1]
        rows, count = _table_of_tuple(context, builder, grads, arguments[0], worked_on)
        rest = cgutils.unpack_tuple(builder, arguments[2])
        return emit_clip(context, builder, [rows, count, *rest])

    return KERNELS["clip"].return_type(grads, works, numbers), emit


def _emit_for_array(name: str) -> Any:
    """Return the function that emits a call of a kernel with the table of one array."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kinds = [signature.args[0]]
        packed = context.make_tuple(builder, types.Tuple(kinds), arguments[:1])
        rows, _ = _table_of_tuple(context, builder, kinds, packed, packed)
        return emit_call(context, builder, name, [rows, *arguments[1:]])

    return emit


@intrinsic
def clamp_array(_typing: Any, work: Any, low: Any, high: Any) -> Any:
    """Clamp the numbers of an array between two bounds."""
    return types.int64(work, types.float64, types.float64), _emit_for_array("clamp")


@intrinsic
def clip_array_by_rows(_typing: Any, work: Any, count: Any, bound: Any) -> Any:
    """Clip each of `count` rows of an array."""
    return types.int64(work, types.int64, types.float64), _emit_for_array("clip_rows")


@intrinsic
def clip_array_by_columns(_typing: Any, work: Any, outer: Any, reduced: Any, bound: Any) -> Any:
    """Clip the units of an array of shape (outer, reduced, inner)."""
    kinds = types.int64, types.int64, types.float64
    return types.int64(work, *kinds), _emit_for_array("clip_columns")


def clip_all(grads, works, numbers):
    """Clip arrays by the kernel's arguments `numbers`; return (norm, status)."""


@overload(clip_all, jit_options=OWN_FLAGS)
def _clip_all(grads, works, numbers):
    if not isinstance(grads, CONTAINERS):
        return lambda grads, works, numbers: _clip_tuple(grads, works, numbers)

    def clip(grads, works, numbers):
        table = np.empty(len(grads) * FIELDS, np.int64)
        for t in range(len(grads)):
            _describe(table, t, grads[t], grads[t] if works is None else works[t])
        return _clip_table(table, len(grads), numbers)

    return clip

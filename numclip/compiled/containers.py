"""Tuples and lists of arrays within compiled code, as tables of where their numbers are."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_new_ref
from numba.extending import intrinsic, overload
from numba.typed import List as TypedList

from numclip.compiled.arrays import copied, describe, entered, left, write_row
from numclip.compiled.types_taken import CONTAINERS, members
from numclip.kernels.jit import OWN_FLAGS
from numclip.kernels.spans import FIELDS

_WORD = ir.IntType(64)


def _like(items: Any, parts: list[Any]) -> Any:
    """Return the type of a tuple like another, of other parts."""
    if isinstance(items, types.LiteralList):
        return types.LiteralList(parts)
    return types.BaseTuple.from_types(parts, getattr(items, "instance_class", None))


@intrinsic
def mapped(typing: Any, function: Any, items: Any, others: Any) -> Any:
    """Return a tuple of what a function returns for each pair of arrays of two tuples."""
    signatures = [
        None
        if isinstance(item, types.NoneType)
        else typing.resolve_function_type(function, (item, other), {})
        for item, other in zip(items, others, strict=True)
    ]
    made = _like(items, [types.none if s is None else s.return_type for s in signatures])

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        result = context.get_constant_undef(made)
        for k, signature in enumerate(signatures):
            value = context.get_dummy_value()
            if signature is not None:
                call = context.get_function(function, signature)
                context.add_linking_libs(getattr(call, "libs", ()))
                pair = [builder.extract_value(argument, k) for argument in arguments[1:]]
                value = call(builder, pair)
            result = builder.insert_value(result, value, k)
        return impl_ret_new_ref(context, builder, made, result)

    return made(function, items, others), emit


def _is_contiguous(grads: Any) -> bool:
    return all(part.layout != "A" for part in members("grads", grads))


def all_copied(grads):
    """Return new arrays in the same structure."""


@overload(all_copied, jit_options=OWN_FLAGS)
def _all_copied(grads):
    if isinstance(grads, types.List):
        return lambda grads: [copied(grad, None) for grad in grads]
    if not isinstance(grads, types.ListType):
        return lambda grads: mapped(copied, grads, grads)
    kind = grads.dtype.copy(readonly=False)

    def copy(grads):
        results = TypedList.empty_list(kind, len(grads))
        for grad in grads:
            results.append(copied(grad, None))
        return results

    return copy


def all_entered(grads):
    """Return the arrays as ones that are contiguous."""


@overload(all_entered, jit_options=OWN_FLAGS)
def _all_entered(grads):
    if _is_contiguous(grads):
        return lambda grads: grads
    if isinstance(grads, CONTAINERS):
        return lambda grads: [entered(grad, None) for grad in grads]
    return lambda grads: mapped(entered, grads, grads)


def all_left(grads, works):
    """Bring what was written to copies back into the arrays."""


@overload(all_left, jit_options=OWN_FLAGS)
def _all_left(grads, works):
    if _is_contiguous(grads):
        return lambda grads, works: None
    if not isinstance(grads, CONTAINERS):
        return lambda grads, works: mapped(left, grads, works)

    def leave(grads, works):
        for t in range(len(grads)):
            left(grads[t], works[t])

    return leave


def room_for(grads):
    """Return memory for the table of a list; that of a tuple is on the stack."""


@overload(room_for, jit_options=OWN_FLAGS)
def _room_for(grads):
    if isinstance(grads, CONTAINERS):
        return lambda grads: np.empty(len(grads) * FIELDS, np.int64)
    return lambda grads: None


@intrinsic
def table_in(_typing: Any, room: Any, grads: Any) -> Any:
    """Return the address of the table, on the stack of the calling function for a tuple."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        if isinstance(room, types.Array):
            array = cgutils.create_struct_proxy(room)(context, builder, value=arguments[0])
            return builder.ptrtoint(array.data, _WORD)
        words = ir.ArrayType(_WORD, max(len(grads), 1) * FIELDS)
        return builder.ptrtoint(cgutils.alloca_once(builder, words), _WORD)

    return types.int64(room, grads), emit


@intrinsic
def _describe_tuple(_typing: Any, rows: Any, grads: Any, works: Any) -> Any:
    """Write the rows of a tuple of arrays."""

    def emit(context: Any, builder: Any, _signature: Any, arguments: Any) -> Any:
        for k, part in enumerate(grads):
            pair = tuple(builder.extract_value(argument, k) for argument in arguments[1:])
            write_row(builder, context, arguments[0], ir.Constant(_WORD, k), part, pair)
        return context.get_dummy_value()

    return types.none(rows, grads, works), emit


def describe_all(rows, grads, works):
    """Write the table of arrays, and of what is worked on."""


@overload(describe_all, jit_options=OWN_FLAGS)
def _describe_all(rows, grads, works):
    if not isinstance(grads, CONTAINERS):
        return lambda rows, grads, works: _describe_tuple(rows, grads, works)

    def fill(rows, grads, works):
        for t in range(len(grads)):
            describe(rows, t, grads[t], works[t])

    return fill


@intrinsic
def keep(_typing: Any, held: Any) -> Any:
    """Keep memory, of which only addresses are used, until here."""

    def emit(context: Any, _builder: Any, _signature: Any, _arguments: Any) -> Any:
        return context.get_dummy_value()

    return types.none(held), emit

"""Operations on tuples and lists of arrays within compiled code, see `arrays`."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.core.imputils import impl_ret_new_ref
from numba.extending import intrinsic, overload
from numba.typed import List as TypedList

from numclip.compiled.arrays import are_distinct, are_same, copied, entered, left
from numclip.compiled.tables import ELSEWHERE, fail
from numclip.compiled.types_taken import CONTAINERS, members
from numclip.host.kernels.spans import OVERLAP, UNCHANGED
from numclip.host.runtime.jit import OWN_FLAGS, inline


def _like(items: Any, parts: list[Any]) -> Any:
    """Return the type of a tuple of the kind of `items`, with the types `parts`."""
    if isinstance(items, types.LiteralList):
        return types.LiteralList(parts)
    return types.BaseTuple.from_types(parts, getattr(items, "instance_class", None))


@intrinsic
def mapped(typing: Any, function: Any, items: Any, others: Any) -> Any:
    """Return a tuple of ``function(item, other)`` for each pair of arrays of two tuples."""
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
    """Return copies of the arrays in the same structure, see `copied`."""


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


def all_distinct(grads):
    """Tell whether no two elements of one array share memory."""


@overload(all_distinct, jit_options=OWN_FLAGS)
def _all_distinct(grads):
    if not isinstance(grads, CONTAINERS):
        return lambda grads: are_distinct(grads)
    if _is_contiguous(grads):
        return lambda grads: True

    def all_of_them(grads):
        distinct = True
        for grad in grads:
            distinct &= are_distinct(grad)
        return distinct

    return all_of_them


@inline
def fault_of_target(out, grads):
    """Return the status of `out`: it must be the gradients, of elements that share no memory."""
    if not are_same(out, grads):
        return ELSEWHERE
    return UNCHANGED if all_distinct(grads) else OVERLAP


@inline
def check_target(out, grads):
    """Raise the error for `out`, if it has one."""
    wrong = fault_of_target(out, grads)
    if wrong != UNCHANGED:
        fail(wrong)


def all_entered(grads):
    """Return contiguous arrays, see `entered`; None if the types are contiguous already."""


@overload(all_entered, jit_options=OWN_FLAGS)
def _all_entered(grads):
    if _is_contiguous(grads):
        return lambda grads: None
    if isinstance(grads, CONTAINERS):
        return lambda grads: [entered(grad, None) for grad in grads]
    return lambda grads: mapped(entered, grads, grads)


def all_left(grads, works):
    """Copy `works` back to the arrays, where `all_entered` made copies."""


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

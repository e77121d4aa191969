"""Operations on one array within compiled code: copies, comparisons, the row of a table."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.core.imputils import impl_ret_borrowed
from numba.extending import intrinsic, overload

from numclip.host.kernels.spans import COMPLEX, FIELDS, WIDE
from numclip.host.runtime.jit import OWN_FLAGS, inline

WORD = ir.IntType(64)
_WIDE_ELEMENTS = (types.float64, types.complex128)


@intrinsic
def any_layout(_typing: Any, array: Any) -> Any:
    """Return an array with the type of one that may be strided."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return impl_ret_borrowed(context, builder, signature.return_type, arguments[0])

    return array.copy(layout="A")(array), emit


@intrinsic(prefer_literal=True)
def turned(_typing: Any, array: Any, order: Any) -> Any:
    """Return a view with the axes in another order; NumPy's takes seconds to compile."""
    axes = [axis.literal_value for axis in order]

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        kind = signature.return_type
        view = cgutils.create_struct_proxy(kind)(context, builder, value=arguments[0])
        for name in ("shape", "strides"):
            values = cgutils.unpack_tuple(builder, getattr(view, name))
            setattr(view, name, cgutils.pack_array(builder, [values[axis] for axis in axes]))
        return impl_ret_borrowed(context, builder, kind, view._getvalue())

    return array.copy(layout="A")(array, order), emit


@intrinsic
def broadcast(_typing: Any, value: Any, array: Any) -> Any:
    """Return (view, fits): a number or an array as a view of the shape of `array`.

    `fits` says whether `value` broadcasts to that shape.
    """
    kind = types.unliteral(value)
    element = kind.dtype if isinstance(kind, types.Array) else kind
    made = types.Array(element, array.ndim, "A", readonly=True)

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        proxy = cgutils.create_struct_proxy
        whole = proxy(array)(context, builder, value=arguments[1])
        lengths = cgutils.unpack_tuple(builder, whole.shape)
        zero, one = ir.Constant(WORD, 0), ir.Constant(WORD, 1)
        view, fits = proxy(made)(context, builder), ir.Constant(ir.IntType(1), 1)
        view.meminfo, view.parent = (ir.Constant(v.type, None) for v in (view.meminfo, view.parent))
        strides = [zero] * array.ndim
        if isinstance(kind, types.Array):
            own = proxy(kind)(context, builder, value=arguments[0])
            view.data, view.meminfo, view.parent = own.data, own.meminfo, own.parent
            fits = ir.Constant(ir.IntType(1), kind.ndim <= array.ndim)
            axes = zip(
                *(cgutils.unpack_tuple(builder, v) for v in (own.shape, own.strides)), strict=True
            )
            for k, (size, stride) in enumerate(list(axes)[max(kind.ndim - array.ndim, 0) :]):
                at = k + max(array.ndim - kind.ndim, 0)
                is_one = builder.icmp_signed("==", size, one)
                same = builder.icmp_signed("==", size, lengths[at])
                fits = builder.and_(fits, builder.or_(is_one, same))
                strides[at] = builder.select(is_one, zero, stride)
        else:
            number = context.cast(builder, arguments[0], value, kind)
            view.data = cgutils.alloca_once_value(
                builder, context.get_value_as_data(builder, kind, number)
            )
        view.shape = whole.shape
        view.strides = cgutils.pack_array(builder, strides, WORD)
        view.itemsize = ir.Constant(WORD, element.bitwidth // 8)
        view.nitems = whole.nitems
        pair = context.make_tuple(builder, signature.return_type, [view._getvalue(), fits])
        return impl_ret_borrowed(context, builder, signature.return_type, pair)

    return types.Tuple((made, types.boolean))(value, array), emit


@inline
def lies_in_order(shape, strides, itemsize, fortran):
    """Tell whether an array is contiguous, in C or in Fortran order."""
    step = itemsize
    ordered = True
    for k in range(len(shape)):
        j = k if fortran else len(shape) - 1 - k
        if shape[j] == 0:
            return True
        ordered &= shape[j] == 1 or strides[j] == step
        step *= shape[j]
    return ordered


def copied(grad, _):
    """Return a copy of the same type, in memory order if `grad` is contiguous, else in C order."""


@overload(copied, jit_options=OWN_FLAGS)
def _copied(grad, _):
    if grad.layout == "C":
        return lambda grad, _: grad.copy()
    if grad.layout == "F":  # numba's own copy would be in C order
        return lambda grad, _: grad.T.copy().T

    def copy(grad, _):
        shape, strides = grad.shape, grad.strides
        if lies_in_order(shape, strides, grad.itemsize, False):
            return any_layout(grad.copy())
        if lies_in_order(shape, strides, grad.itemsize, True):
            return any_layout(grad.T.copy().T)
        return any_layout(grad.copy())

    return copy


def entered(grad, _):
    """Return the array itself if it is contiguous, else a copy in C order."""


@overload(entered, jit_options=OWN_FLAGS)
def _entered(grad, _):
    if grad.layout != "A":
        return lambda grad, _: grad

    def enter(grad, _):
        shape, strides = grad.shape, grad.strides
        if lies_in_order(shape, strides, grad.itemsize, False):
            return grad
        if lies_in_order(shape, strides, grad.itemsize, True):
            return grad
        return any_layout(grad.copy())

    return enter


def left(grad, work):
    """Copy `work` back to the array, if `entered` made a copy."""


@overload(left, jit_options=OWN_FLAGS)
def _left(grad, work):
    if grad.layout != "A":
        return lambda grad, work: None

    def leave(grad, work):
        if grad.ctypes.data != work.ctypes.data:
            for index in np.ndindex(grad.shape):  # an assignment would take 6 s to compile
                grad[index] = work[index]

    return leave


def is_same(builder: Any, context: Any, kind: Any, one: Any, other: Any) -> Any:
    """Emit whether two values of a type are the same arrays, or the same list of them."""
    if isinstance(kind, types.Array):
        first = cgutils.create_struct_proxy(kind)(context, builder, value=one)
        second = cgutils.create_struct_proxy(kind)(context, builder, value=other)
        same = builder.icmp_unsigned("==", first.data, second.data)
        for field in ("shape", "strides"):
            pairs = zip(
                cgutils.unpack_tuple(builder, getattr(first, field)),
                cgutils.unpack_tuple(builder, getattr(second, field)),
                strict=True,
            )
            for a, b in pairs:
                same = builder.and_(same, builder.icmp_signed("==", a, b))
        return same
    if isinstance(kind, (types.List, types.ListType)):
        first = cgutils.create_struct_proxy(kind)(context, builder, value=one)
        second = cgutils.create_struct_proxy(kind)(context, builder, value=other)
        return builder.icmp_unsigned("==", first.meminfo, second.meminfo)
    same = ir.Constant(ir.IntType(1), 1)
    for k, part in enumerate(() if isinstance(kind, types.NoneType) else kind):
        a, b = builder.extract_value(one, k), builder.extract_value(other, k)
        same = builder.and_(same, is_same(builder, context, part, a, b))
    return same


@intrinsic
def are_same(_typing: Any, one: Any, other: Any) -> Any:
    """Tell whether two values are the same arrays, or the same list of them."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return is_same(builder, context, one, *arguments)

    return types.boolean(one, other), emit


def _is_distinct(builder: Any, context: Any, kind: Any, value: Any) -> Any:
    """Emit whether no two elements of an array share memory, or of any array of a tuple.

    False also for an array whose strides are not nested, of which that is not known.
    """
    distinct = ir.Constant(ir.IntType(1), 1)
    if not isinstance(kind, types.Array):
        for k, part in enumerate(() if isinstance(kind, types.NoneType) else kind):
            own = builder.extract_value(value, k)
            distinct = builder.and_(distinct, _is_distinct(builder, context, part, own))
        return distinct
    if kind.layout != "A":
        return distinct
    array = cgutils.create_struct_proxy(kind)(context, builder, value=value)
    zero, one = ir.Constant(WORD, 0), ir.Constant(WORD, 1)
    sizes = cgutils.unpack_tuple(builder, array.shape)
    axes = []  # the distances of two elements, and of the first and the last
    for size, stride in zip(sizes, cgutils.unpack_tuple(builder, array.strides), strict=True):
        negative = builder.icmp_signed("<", stride, zero)
        step = builder.select(negative, builder.neg(stride), stride)
        axes.append((step, builder.mul(builder.sub(size, one), step)))
    for k, (step, _) in enumerate(axes):
        taken = array.itemsize
        for closer, reach in axes[:k] + axes[k + 1 :]:
            is_closer = builder.icmp_signed("<=", closer, step)
            taken = builder.add(taken, builder.select(is_closer, reach, zero))
        single = builder.icmp_signed("==", sizes[k], one)
        apart = builder.or_(single, builder.icmp_signed(">=", step, taken))
        distinct = builder.and_(distinct, apart)
    return builder.or_(distinct, builder.icmp_signed("==", array.nitems, zero))


@intrinsic
def are_distinct(_typing: Any, grads: Any) -> Any:
    """Tell whether no two elements of an array, or of one of a tuple, share memory."""

    def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return _is_distinct(builder, context, grads, arguments[0])

    return types.boolean(grads), emit


def _ends(builder: Any, kind: Any, array: Any) -> tuple[Any, Any]:
    """Emit the addresses where an array begins and ends."""
    begin = builder.ptrtoint(array.data, WORD)
    nbytes = builder.mul(array.nitems, array.itemsize)
    if kind.layout != "A":
        return begin, builder.add(begin, nbytes)
    zero = ir.Constant(WORD, 0)
    low, high = begin, builder.add(begin, array.itemsize)
    for size, stride in zip(
        cgutils.unpack_tuple(builder, array.shape),
        cgutils.unpack_tuple(builder, array.strides),
        strict=True,
    ):
        reach = builder.mul(builder.sub(size, ir.Constant(WORD, 1)), stride)
        forward = builder.icmp_signed(">", reach, zero)
        low = builder.add(low, builder.select(forward, zero, reach))
        high = builder.add(high, builder.select(forward, reach, zero))
    empty = builder.icmp_signed("==", array.nitems, zero)
    return low, builder.select(empty, low, high)


def write_row(
    builder: Any, context: Any, rows: Any, t: Any, kind: Any, values: tuple[Any, Any]
) -> None:
    """Emit row `t` of a table of `kernels.spans`; `values` are an array and the one to work on."""
    proxy = cgutils.create_struct_proxy(kind)
    grad, work = (proxy(context, builder, value=value) for value in values)
    is_complex = isinstance(kind.dtype, types.Complex)
    bits = COMPLEX * is_complex + WIDE * (kind.dtype in _WIDE_ELEMENTS)
    length = builder.mul(work.nitems, ir.Constant(WORD, 1 + is_complex))
    address = builder.ptrtoint(work.data, WORD)
    fields = [address, length, ir.Constant(WORD, bits), *_ends(builder, kind, grad)]
    first = builder.mul(t, ir.Constant(WORD, FIELDS))
    pointer = builder.inttoptr(rows, WORD.as_pointer())
    for k, value in enumerate(fields):
        at = builder.add(first, ir.Constant(WORD, k))
        builder.store(value, builder.gep(pointer, [at]))

"""Elements in memory: arrays at addresses, and elements in the type they are computed in.

float16 is stored as uint16 and bfloat16 as int16, so that an array's dtype distinguishes them.
Both are computed in float32. Where numba's compiler is disabled, the same names are plain NumPy.
"""

import ctypes
import functools
import re

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.core import cgutils
from numba.core.errors import TypingError
from numba.extending import intrinsic

from numclip.halves import (
    double_to_float,
    float_to_bfloat,
    float_to_half,
    half_to_float,
    narrow_interpreted,
    widen_interpreted,
)
from numclip.host.runtime.jit import INTERPRETED

WORDS = np.empty(0, np.int64)
"""The storage sample of arrays of int64."""

_I32, _I64, _F32 = ir.IntType(32), ir.IntType(64), ir.FloatType()


@functools.cache
def converts_halves(codegen) -> bool:
    """Tell whether the processor that code is made for has instructions to convert float16.

    For others, which `NUMBA_CPU_NAME` and `NUMBA_CPU_FEATURES` can select, LLVM calls a function
    that no process has, and the process ends. So the assembly of two conversions is searched.
    """
    module = ir.Module()
    module.triple = binding.get_process_triple()
    for name, made, taken, convert in (
        ("narrower", ir.HalfType(), _F32, ir.IRBuilder.fptrunc),
        ("wider", _F32, ir.HalfType(), ir.IRBuilder.fpext),
    ):
        function = ir.Function(module, ir.FunctionType(made, [taken]), name)
        builder = ir.IRBuilder(function.append_basic_block())
        builder.ret(convert(builder, function.args[0], made))
    parsed = binding.parse_assembly(str(module))
    return not re.search("hfsf|sfhf|h2f|f2h", codegen._tm.emit_assembly(parsed))


@intrinsic
def _word_at(_typing, address):
    """Return the 64-bit integer at an address; reading it by an array costs four times more."""

    def emit(_context, builder, _signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()))

    return types.int64(address), emit


@intrinsic
def _prefetch(_typing, address):
    """Prefetch the cache line of an address, which need not be readable."""

    def emit(context, builder, _signature, arguments):
        pointer = builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        ask = builder.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
        read, keep, data = ir.Constant(_I32, 0), ir.Constant(_I32, 3), ir.Constant(_I32, 1)
        builder.call(ask, [pointer, read, keep, data])
        return context.get_dummy_value()

    return types.void(address), emit


def _widened(context, builder, element, stored):
    """Emit the value of an element of the type `stored`, in the type it is computed in."""
    if stored == types.uint16:
        return half_to_float(builder, element, native=converts_halves(context.codegen()))
    if stored == types.int16:
        wide = builder.shl(builder.zext(element, _I32), ir.Constant(_I32, 16))
        return builder.bitcast(wide, _F32)
    return element


def _nearest_of(context, builder, value, own, stored):
    """Emit a number of the type `own` rounded to nearest in the type `stored`, ties to even."""
    if stored in (types.float32, types.float64):
        return context.cast(builder, value, own, stored)
    number = double_to_float(builder, value) if own == types.float64 else value
    if stored == types.uint16:
        native = converts_halves(context.codegen())
        return float_to_half(builder, number, native=native, nearest=True)
    return float_to_bfloat(builder, number, nearest=True)


@intrinsic
def _widen(_typing, value):
    """Return the value of a stored element in the type it is computed in."""
    if value not in (types.float32, types.float64, types.uint16, types.int16):
        raise TypingError(f"no gradient element is stored as {value}")

    def emit(context, builder, _signature, arguments):
        return _widened(context, builder, arguments[0], value)

    computed = types.float64 if value == types.float64 else types.float32
    return computed(value), emit


@intrinsic
def _narrow(_typing, value, like):
    """Return a number in the type of the element `like`; 16-bit subnormals are truncated."""

    def emit(context, builder, signature, arguments):
        if like in (types.float32, types.float64):
            return context.cast(builder, arguments[0], signature.args[0], like)
        number = context.cast(builder, arguments[0], signature.args[0], types.float32)
        if like == types.uint16:
            return float_to_half(builder, number, native=converts_halves(context.codegen()))
        return float_to_bfloat(builder, number)

    return like(value, like), emit


@intrinsic
def _nearest(_typing, value, like):
    """Return a number rounded to nearest in the type of the element `like`, ties to even."""

    def emit(context, builder, _signature, arguments):
        return _nearest_of(context, builder, arguments[0], value, like)

    return like(value, like), emit


@intrinsic
def _as_computed(_typing, value, like):
    """Return a number in the type that elements with the dtype of `like` are computed in."""
    wanted = types.float64 if like.dtype == types.float64 else types.float32

    def emit(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], signature.args[0], wanted)

    return wanted(value, like), emit


@intrinsic
def _rounded(_typing, value, like):
    """Return a number rounded to nearest in the dtype of `like`, in the type it is computed in."""
    stored = like.dtype
    wanted = types.float64 if stored == types.float64 else types.float32

    def emit(context, builder, _signature, arguments):
        number = _nearest_of(context, builder, arguments[0], value, stored)
        return _widened(context, builder, number, stored)

    return wanted(value, like), emit


def _array_in_memory(made):
    """Return a function that emits an array of the type `made`, by its address and its shape.

    numba's own `carray` compiles two functions for each dtype, and emits calls of them.
    """

    def emit(context, builder, _signature, arguments):
        from numba.np.arrayobj import populate_array  # takes 40 ms, saved if nothing is compiled

        address, *shape = arguments[:-1]
        itemsize = context.get_constant(types.intp, made.dtype.bitwidth // 8)
        strides = [itemsize]
        for length in shape[:0:-1]:
            strides.insert(0, builder.mul(strides[0], length))
        array = context.make_array(made)(context, builder)
        data = builder.inttoptr(address, context.get_data_type(made.dtype).as_pointer())
        populate_array(array, data, shape, strides, itemsize, None)
        return array._getvalue()

    return emit


def _allocated(context, builder, made, shape):
    """Emit a new, uninitialised array of the type `made`."""
    from numba.np.arrayobj import _empty_nd_impl

    return _empty_nd_impl(context, builder, made, shape)


@intrinsic
def _array_at(_typing, _address, _length, like):
    """Return the `length` elements stored at `address` as an array with the dtype of `like`."""
    made = types.Array(like.dtype, 1, "C")
    return made(types.int64, types.int64, like), _array_in_memory(made)


@intrinsic
def _empty(_typing, _length, like):
    """Return a new array with the dtype of `like`; `np.empty` compiles a function for each."""
    made = types.Array(like.dtype, 1, "C")

    def emit(context, builder, _signature, arguments):
        return _allocated(context, builder, made, arguments[:-1])._getvalue()

    return made(types.int64, like), emit


@intrinsic
def _zeros(_typing, _length, like):
    """Return a new array of zeros with the dtype of `like`."""
    made = types.Array(like.dtype, 1, "C")

    def emit(context, builder, _signature, arguments):
        array = _allocated(context, builder, made, arguments[:-1])
        cgutils.memset(builder, array.data, builder.mul(array.itemsize, array.nitems), 0)
        return array._getvalue()

    return made(types.int64, like), emit


@intrinsic
def _empty_table(_typing, _rows, _columns, like):
    """Return a new 2-d array with the dtype of `like`."""
    made = types.Array(like.dtype, 2, "C")

    def emit(context, builder, _signature, arguments):
        return _allocated(context, builder, made, arguments[:-1])._getvalue()

    return made(types.int64, types.int64, like), emit


@intrinsic
def _table_at(_typing, _address, _rows, _columns, like):
    """Return the numbers stored at `address` as a 2-d array with the dtype of `like`."""
    made = types.Array(like.dtype, 2, "C")
    return made(types.int64, types.int64, types.int64, like), _array_in_memory(made)


def _table_at_interpreted(address, rows, columns, like):
    return _array_at_interpreted(address, rows * columns, like).reshape((rows, columns))


def _empty_interpreted(length, like):
    return np.empty(length, like.dtype)


def _zeros_interpreted(length, like):
    return np.zeros(length, like.dtype)


def _empty_table_interpreted(rows, columns, like):
    return np.empty((rows, columns), like.dtype)


def _array_at_interpreted(address, length, like):
    buffer = (ctypes.c_char * (int(length) * like.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, like.dtype)


def _word_at_interpreted(address):
    return ctypes.c_int64.from_address(int(address)).value


def _prefetch_interpreted(_address):
    pass


def _nearest_interpreted(value, like):
    return narrow_interpreted(value, like, nearest=True)


def _as_computed_interpreted(value, like):
    return np.float64(value) if like.dtype == np.float64 else np.float32(value)


def _rounded_interpreted(value, like):
    return widen_interpreted(narrow_interpreted(value, like, nearest=True))


if INTERPRETED:
    array_at, widen, narrow = _array_at_interpreted, widen_interpreted, narrow_interpreted
    table_at, empty_table = _table_at_interpreted, _empty_table_interpreted
    empty, zeros = _empty_interpreted, _zeros_interpreted
    as_computed, word_at = _as_computed_interpreted, _word_at_interpreted
    prefetch, nearest = _prefetch_interpreted, _nearest_interpreted
    rounded = _rounded_interpreted
else:
    array_at, table_at, widen, narrow = _array_at, _table_at, _widen, _narrow
    empty, zeros, empty_table = _empty, _zeros, _empty_table
    as_computed, word_at, prefetch, nearest = _as_computed, _word_at, _prefetch, _nearest
    rounded = _rounded

"""Elements in memory: addresses as arrays, and 16-bit floats, which numba does not know.

float16 travels as uint16 and bfloat16 as int16, so that the array's type tells them apart.
Both are computed in float32. Interpreted, the same names are plain NumPy.
"""

import ctypes

import numpy as np
from llvmlite import binding, ir
from numba import carray, types
from numba.core.errors import TypingError
from numba.extending import intrinsic

from numclip.kernels.jit import INTERPRETED, inline

_I16, _I32, _I64, _F32 = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
_MAGNITUDE, _SIGN = 0x7FFF_FFFF, 0x8000
_INFINITY, _QUIET = 0x7F80_0000, 0x0040_0000
_HALF_INFINITY, _HALF_NAN = 0x7C00, 0x7E00
_HALF_NORMAL = 113 << 23  # 2**-14, the smallest normal float16, as a float32's bits
_REBIAS = 112 << 23  # difference of the exponents' biases


def _host_converts_halves() -> bool:
    """Tell whether the processor converts float16; without F16C, LLVM calls a missing symbol."""
    if binding.get_process_triple().startswith(("x86_64", "i386", "i686")):
        return bool(binding.get_host_cpu_features().get("f16c", False))
    return binding.get_process_triple().startswith(("aarch64", "arm64"))


NATIVE_HALVES = _host_converts_halves()


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


def _half_to_float(builder, half):
    """Emit the exact float32 of float16 bits."""
    if NATIVE_HALVES:
        return builder.fpext(builder.bitcast(half, ir.HalfType()), _F32)
    wide = builder.zext(half, _I32)
    shifted = builder.shl(builder.and_(wide, _int(0x7FFF)), _int(13))
    scaled = builder.fmul(builder.bitcast(shifted, _F32), ir.Constant(_F32, 2.0**112))
    bits = builder.bitcast(scaled, _I32)
    special = builder.icmp_unsigned(">=", shifted, _int(_HALF_INFINITY << 13))
    bits = builder.select(special, builder.or_(bits, _int(_INFINITY)), bits)
    sign = builder.shl(builder.and_(wide, _int(_SIGN)), _int(16))
    return builder.bitcast(builder.or_(bits, sign), _F32)


def _float_to_half(builder, value):
    """Emit float16 bits: to nearest even, below the normal numbers toward zero."""
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _int(_MAGNITUDE))
    positive = builder.bitcast(magnitude, _F32)
    if NATIVE_HALVES:
        rounded = builder.bitcast(builder.fptrunc(positive, ir.HalfType()), _I16)
        rounded = builder.zext(rounded, _I32)
    else:
        odd = builder.and_(builder.lshr(magnitude, _int(13)), _int(1))
        biased = builder.add(builder.add(magnitude, _int(0xFFF)), odd)
        rounded = builder.lshr(builder.sub(biased, _int(_REBIAS)), _int(13))
        over = builder.icmp_unsigned(">", rounded, _int(_HALF_INFINITY))
        rounded = builder.select(over, _int(_HALF_INFINITY), rounded)
        is_nan = builder.icmp_unsigned(">", magnitude, _int(_INFINITY))
        rounded = builder.select(is_nan, _int(_HALF_NAN), rounded)
    count = builder.fptosi(builder.fmul(positive, ir.Constant(_F32, 2.0**24)), _I32)
    small = builder.icmp_unsigned("<", magnitude, _int(_HALF_NORMAL))
    rounded = builder.select(small, count, rounded)
    sign = builder.and_(builder.lshr(bits, _int(16)), _int(_SIGN))
    return builder.trunc(builder.or_(rounded, sign), _I16)


def _float_to_bfloat(builder, value):
    """Emit bfloat16 bits: to nearest even, below the normal numbers toward zero."""
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _int(_MAGNITUDE))
    odd = builder.and_(builder.lshr(bits, _int(16)), _int(1))
    rounded = builder.add(builder.add(bits, _int(0x7FFF)), odd)
    small = builder.icmp_unsigned("<", magnitude, _int(1 << 23))
    rounded = builder.select(small, bits, rounded)
    is_nan = builder.icmp_unsigned(">", magnitude, _int(_INFINITY))
    rounded = builder.select(is_nan, builder.or_(bits, _int(_QUIET)), rounded)
    return builder.trunc(builder.lshr(rounded, _int(16)), _I16)


@intrinsic
def pointer(_typing, address):
    """Turn an address into a pointer."""

    def emit(_context, builder, _signature, arguments):
        return builder.inttoptr(arguments[0], ir.IntType(8).as_pointer())

    return types.voidptr(address), emit


@intrinsic
def _word_at(_typing, address):
    """Return the 64-bit integer stored at an address; an array there would cost four times more."""

    def emit(_context, builder, _signature, arguments):
        return builder.load(builder.inttoptr(arguments[0], _I64.as_pointer()))

    return types.int64(address), emit


@intrinsic
def _widen(_typing, value):
    """Return the value of a stored element in the type it is computed in."""
    if value not in (types.float32, types.float64, types.uint16, types.int16):
        raise TypingError(f"no gradient element is stored as {value}")

    def emit(_context, builder, _signature, arguments):
        if value == types.uint16:
            return _half_to_float(builder, arguments[0])
        if value == types.int16:
            wide = builder.shl(builder.zext(arguments[0], _I32), _int(16))
            return builder.bitcast(wide, _F32)
        return arguments[0]

    computed = types.float64 if value == types.float64 else types.float32
    return computed(value), emit


@intrinsic
def _narrow(_typing, value, like):
    """Return `value` as an element stored like `like`."""

    def emit(context, builder, signature, arguments):
        if like in (types.float32, types.float64):
            return context.cast(builder, arguments[0], signature.args[0], like)
        number = context.cast(builder, arguments[0], signature.args[0], types.float32)
        return (_float_to_half if like == types.uint16 else _float_to_bfloat)(builder, number)

    return like(value, like), emit


@intrinsic
def _as_computed(_typing, value, like):
    """Return a number in the type that elements stored like `like` are computed in."""
    wanted = types.float64 if like.dtype == types.float64 else types.float32

    def emit(context, builder, signature, arguments):
        return context.cast(builder, arguments[0], signature.args[0], wanted)

    return wanted(value, like), emit


def _array_at(address, length, like):
    """Return the `length` elements stored at `address` as an array with the dtype of `like`."""
    return carray(pointer(address), length, like.dtype)


def _array_at_interpreted(address, length, like):
    buffer = (ctypes.c_char * (int(length) * like.itemsize)).from_address(int(address))
    return np.frombuffer(buffer, like.dtype)


def _word_at_interpreted(address):
    return ctypes.c_int64.from_address(int(address)).value


def _widen_interpreted(value):
    if value.dtype == np.uint16:
        return np.float32(value.view(np.float16))
    if value.dtype == np.int16:
        return np.uint32(int(value.view(np.uint16)) << 16).view(np.float32)
    return value


def _as_computed_interpreted(value, like):
    return np.float64(value) if like.dtype == np.float64 else np.float32(value)


def _narrow_interpreted(value, like):
    if like.dtype.kind == "f":
        return like.dtype.type(value)
    number = np.float32(value)
    bits = int(number.view(np.uint32))
    if like.dtype == np.uint16:
        if abs(number) < 2.0**-14:
            return np.uint16(int(abs(number) * 2.0**24) | bits >> 16 & _SIGN)
        return np.float16(number).view(np.uint16)
    if np.isnan(number):
        bits |= _QUIET
    elif bits & _MAGNITUDE >= 1 << 23:
        bits += 0x7FFF + (bits >> 16 & 1)
    return np.uint16(bits >> 16).view(np.int16)


if INTERPRETED:
    array_at, widen, narrow = _array_at_interpreted, _widen_interpreted, _narrow_interpreted
    as_computed, word_at = _as_computed_interpreted, _word_at_interpreted
else:
    array_at, widen, narrow = inline(_array_at), _widen, _narrow
    as_computed, word_at = _as_computed, _word_at

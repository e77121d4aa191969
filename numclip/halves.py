"""Conversions of 16-bit floats, which numba does not support, for both engines.

Emitted for LLVM, and in NumPy where kernels are interpreted. float16 is stored as uint16, and
bfloat16 as int16.
"""

import numpy as np
from llvmlite import ir

_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()
_MAGNITUDE, _SIGN = 0x7FFF_FFFF, 0x8000
_INFINITY, _QUIET = 0x7F80_0000, 0x0040_0000
_HALF_INFINITY, _HALF_NAN = 0x7C00, 0x7E00
_HALF_NORMAL = 113 << 23  # 2**-14, the smallest normal float16, as a float32's bits
_ONE_HALF = 126 << 23  # 0.5 likewise
_REBIAS = 112 << 23  # difference of the exponents' biases


def _int(value: int) -> ir.Constant:
    return ir.Constant(_I32, value)


def half_to_float(builder, half, *, native):
    """Emit the exact float32 of float16 bits; `native` if the processor has an instruction."""
    if native:
        return builder.fpext(builder.bitcast(half, ir.HalfType()), _F32)
    wide = builder.zext(half, _I32)
    shifted = builder.shl(builder.and_(wide, _int(0x7FFF)), _int(13))
    scaled = builder.fmul(builder.bitcast(shifted, _F32), ir.Constant(_F32, 2.0**112))
    bits = builder.bitcast(scaled, _I32)
    special = builder.icmp_unsigned(">=", shifted, _int(_HALF_INFINITY << 13))
    bits = builder.select(special, builder.or_(bits, _int(_INFINITY)), bits)
    sign = builder.shl(builder.and_(wide, _int(_SIGN)), _int(16))
    return builder.bitcast(builder.or_(bits, sign), _F32)


def double_to_float(builder, value):
    """Emit a float64 rounded to a float32, an odd one if inexact: 16 bits are then rounded once.

    The nearest float32 could be midway between two 16-bit numbers (Boldo and Melquiond 2008).
    """
    near = builder.fptrunc(value, _F32)
    back, bits = builder.fpext(near, _F64), builder.bitcast(near, _I32)
    own, other = (
        builder.shl(builder.bitcast(x, _I64), ir.Constant(_I64, 1)) for x in (value, back)
    )
    toward_zero = builder.sub(bits, builder.zext(builder.icmp_unsigned(">", other, own), _I32))
    inexact = builder.fcmp_ordered("!=", back, value)
    return builder.bitcast(builder.select(inexact, builder.or_(toward_zero, _int(1)), bits), _F32)


def float_to_half(builder, value, *, native, nearest=False):
    """Emit float16 bits, rounded to nearest even; unless `nearest`, subnormals toward zero."""
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _int(_MAGNITUDE))
    positive = builder.bitcast(magnitude, _F32)
    if native:
        rounded = builder.bitcast(builder.fptrunc(positive, ir.HalfType()), _I16)
        rounded = builder.zext(rounded, _I32)
    else:
        odd = builder.and_(builder.lshr(magnitude, _int(13)), _int(1))
        biased = builder.add(builder.add(magnitude, _int(0xFFF)), odd)
        rounded = builder.lshr(builder.sub(biased, _int(_REBIAS)), _int(13))
        over = builder.icmp_unsigned(">", rounded, _int(_HALF_INFINITY))
        rounded = builder.select(over, _int(_HALF_INFINITY), rounded)
        is_nan = builder.icmp_unsigned(">", magnitude, _int(_INFINITY))
        payload = builder.and_(builder.lshr(magnitude, _int(13)), _int(0x3FF))
        rounded = builder.select(is_nan, builder.or_(payload, _int(_HALF_NAN)), rounded)
    if nearest:  # the last place of a float32 from 0.5 to 1 is 2**-24, the smallest subnormal
        sum_ = builder.fadd(positive, ir.Constant(_F32, 0.5))
        count = builder.sub(builder.bitcast(sum_, _I32), _int(_ONE_HALF))
    else:
        count = builder.fptosi(builder.fmul(positive, ir.Constant(_F32, 2.0**24)), _I32)
    small = builder.icmp_unsigned("<", magnitude, _int(_HALF_NORMAL))
    if not (native and nearest):
        rounded = builder.select(small, count, rounded)
    sign = builder.and_(builder.lshr(bits, _int(16)), _int(_SIGN))
    return builder.trunc(builder.or_(rounded, sign), _I16)


def float_to_bfloat(builder, value, *, nearest=False):
    """Emit bfloat16 bits, rounded likewise."""
    bits = builder.bitcast(value, _I32)
    magnitude = builder.and_(bits, _int(_MAGNITUDE))
    odd = builder.and_(builder.lshr(bits, _int(16)), _int(1))
    rounded = builder.add(builder.add(bits, _int(0x7FFF)), odd)
    if not nearest:
        small = builder.icmp_unsigned("<", magnitude, _int(1 << 23))
        rounded = builder.select(small, bits, rounded)
    is_nan = builder.icmp_unsigned(">", magnitude, _int(_INFINITY))
    rounded = builder.select(is_nan, builder.or_(bits, _int(_QUIET)), rounded)
    return builder.trunc(builder.lshr(rounded, _int(16)), _I16)


def widen_interpreted(value):
    """Return the value of a stored element in the dtype it is computed in."""
    if value.dtype == np.uint16:
        return np.float32(value.view(np.float16))
    if value.dtype == np.int16:
        return np.uint32(int(value.view(np.uint16)) << 16).view(np.float32)
    return value


def narrow_interpreted(value, like, *, nearest=False):
    """Return `value` as an element of the dtype of `like`, a storage sample."""
    if like.dtype.kind == "f":
        return like.dtype.type(value)
    number = np.float32(value)
    bits = int(number.view(np.uint32))
    if nearest and float(number) != value and value == value:
        bits = bits - (abs(float(number)) > abs(value)) | 1
        number = np.uint32(bits).view(np.float32)
    if like.dtype == np.uint16:
        if abs(number) < 2.0**-14 and not nearest:
            return np.uint16(int(abs(number) * 2.0**24) | bits >> 16 & _SIGN)
        return np.float16(number).view(np.uint16)
    if np.isnan(number):
        bits |= _QUIET
    elif nearest or bits & _MAGNITUDE >= 1 << 23:
        bits += 0x7FFF + (bits >> 16 & 1)
    return np.uint16(bits >> 16).view(np.int16)

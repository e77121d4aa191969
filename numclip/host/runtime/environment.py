"""The floating-point environment of the calling thread, for computations outside kernels."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numclip.host.runtime.jit import INTERPRETED, without_entry
from numclip.host.runtime.registers import REGISTER

Result = TypeVar("Result")
ORDINARY = -1
"""The number that stands for the ordinary environment."""

_I64 = ir.IntType(64)


@intrinsic
def _read(_typing):
    """Return the register's value, or ORDINARY for the ordinary environment."""

    def emit(_context, builder, _signature, _arguments):
        if REGISTER is None:
            return ir.Constant(_I64, ORDINARY)
        value = REGISTER.read(builder)
        wide = builder.zext(value, _I64) if value.type.width < _I64.width else value
        odd = REGISTER.is_odd(builder, value)
        return builder.select(odd, wide, ir.Constant(_I64, ORDINARY))

    return types.int64(), emit


@intrinsic
def _write(_typing, _value):
    """Set the register to a value that `_read` returned."""

    def emit(context, builder, _signature, arguments):
        if REGISTER is not None:
            wide = arguments[0]
            narrow = builder.trunc(wide, REGISTER.word) if REGISTER.word != _I64 else wide
            odd = builder.icmp_signed("!=", wide, ir.Constant(_I64, ORDINARY))
            with builder.if_else(odd) as (given, ordinary):
                with given:
                    REGISTER.write(builder, narrow)
                with ordinary:
                    REGISTER.write(builder, None)
        return context.get_dummy_value()

    return types.void(types.int64), emit


@without_entry
def read():
    """Return the environment of the calling thread as a number."""
    return _read()


@without_entry
def write(value):
    """Set the environment of the calling thread to a number that `read` returned."""
    _write(value)


def run(function: Callable[..., Result], args: Any, kwargs: Mapping[str, Any]) -> Result:
    """Call a function in the ordinary environment and restore the caller's."""
    before = ORDINARY if INTERPRETED else read()
    if before == ORDINARY:
        return function(*args, **kwargs)
    try:
        write(ORDINARY)
        return function(*args, **kwargs)
    finally:
        write(before)

"""Calls from users' compiled code to our kernels, which are compiled once, by themselves.

Linking a kernel into each function that calls it would optimise it again each time: seconds. A
symbol would end a process that loads users' code from numba's cache before the kernels are loaded.
So each call holds the kernel's address, 0 until it is needed; then it gets it from Python, which
compiles or loads the kernel. Code in the cache has the version of its kernels, see `current`.
"""

from __future__ import annotations

import functools
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

import numclip
from numclip.host.kernels import span_units, spans
from numclip.host.runtime import digest

_WORD = ir.IntType(64)
_NUMBERS = (types.float64,) * 3
_CLIP = types.Tuple((types.float64, types.int64))(types.int64, types.int64, *_NUMBERS, types.int64)
KERNELS = {
    "clip": _CLIP,
    "clip_rare": _CLIP,
    "clamp": types.int64(types.int64, types.float64, types.float64),
    "clip_rows": types.int64(types.int64, types.int64, types.float64),
    "clip_columns": types.int64(types.int64, types.int64, types.int64, types.float64),
}
OUTDATED = (
    "numclip was updated since this function was compiled, or its kernels cannot be compiled: "
    "delete what numba's cache (NUMBA_CACHE_DIR, or __pycache__ beside the file) holds of it"
)


class OutdatedCodeError(OSError):
    """Raised for users' code of another version of the kernels, so that it is compiled anew.

    numba treats an OSError while it reads its cache as code that is not there.
    """


def _kernel(name: str) -> Any:
    return getattr(spans, name, None) or getattr(span_units, name)


@functools.cache
def version() -> str:
    """Return the release, and digests of the kernels and of the module `spans`."""
    parts = [digest.of(_kernel(name).py_func) for name in KERNELS]
    return " ".join([numclip.__version__, *parts, digest.of_modules(spans)])


class Current:
    """Pickled by numba with users' code; unpickling it checks the kernels' version."""

    def __init__(self, wanted: str) -> None:
        self.wanted = wanted

    def __call__(self) -> None:
        """Do nothing when numba has loaded the code."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Current) and other.wanted == self.wanted

    def __hash__(self) -> int:
        return hash(self.wanted)

    def __reduce__(self) -> tuple[Any, ...]:
        return current, (self.wanted,)


def current(wanted: str) -> Current:
    """Return `Current(wanted)`; raise OutdatedCodeError if the kernels' version is another."""
    if wanted != version():
        raise OutdatedCodeError(OUTDATED)
    return Current(wanted)


class Address:
    """Pickled into users' code; unpickling it returns the address of a kernel."""

    def __init__(self, name: str, wanted: str) -> None:
        self.name, self.wanted = name, wanted

    def __reduce__(self) -> tuple[Any, ...]:
        return address_of, (self.name, self.wanted)


def address_of(name: str, wanted: str) -> int:
    """Compile a kernel, or load it, and return its address."""
    current(wanted)
    kernel = _kernel(name)
    arguments = KERNELS[name].args
    kernel.compile(arguments)
    result = kernel.overloads[arguments]
    assert result.signature.return_type == KERNELS[name].return_type
    return int(result.library.get_pointer_to_function(result.fndesc.llvm_func_name))


def _address(context: Any, builder: Any, name: str) -> Any:
    """Emit a kernel's address, 0 if Python cannot return it."""
    slot = cgutils.add_global_variable(builder.module, _WORD, f"numclip.{name}")
    slot.linkage, slot.initializer = "internal", ir.Constant(_WORD, 0)
    known = builder.load(slot)
    begin = builder.basic_block
    missing = builder.icmp_unsigned("==", known, ir.Constant(_WORD, 0))
    with builder.if_then(missing, likely=False):
        python = context.get_python_api(builder)
        gil = python.gil_ensure()
        number = python.unserialize(python.serialize_object(Address(name, version())))
        with builder.if_else(cgutils.is_null(builder, number)) as (failed, found):
            with failed:
                python.err_write_unraisable(python.get_null_object())
            with found:
                builder.store(python.long_as_longlong(number), slot)
                python.decref(number)
        python.gil_release(gil)
        end = builder.basic_block
        fetched = builder.load(slot)
    address = builder.phi(_WORD)
    address.add_incoming(known, begin)
    address.add_incoming(fetched, end)
    return address


def emit_call(context: Any, builder: Any, name: str, arguments: list[Any]) -> Any:
    """Emit a call of a kernel; kernels never raise."""
    signature = KERNELS[name]
    context.active_code_library._reload_init.add(Current(version()))
    address = _address(context, builder, name)
    missing = builder.icmp_unsigned("==", address, ir.Constant(_WORD, 0))
    with builder.if_then(missing, likely=False):
        context.call_conv.return_user_exc(builder, RuntimeError, (OUTDATED,))
    kind = context.call_conv.get_function_type(signature.return_type, signature.args)
    function = builder.inttoptr(address, kind.as_pointer())
    _, result = context.call_conv.call_function(
        builder, function, signature.return_type, signature.args, arguments
    )
    return result


def emit_clip(context: Any, builder: Any, arguments: list[Any]) -> Any:
    """Emit a call of `clip`, and one of `clip_rare` if the first returns RARE."""
    result = emit_call(context, builder, "clip", arguments)
    slot = cgutils.alloca_once_value(builder, result)
    rare = ir.Constant(_WORD, spans.RARE)
    is_rare = builder.icmp_signed("==", builder.extract_value(result, 1), rare)
    with builder.if_then(is_rare, likely=False):
        builder.store(emit_call(context, builder, "clip_rare", arguments), slot)
    return builder.load(slot)

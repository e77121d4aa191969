"""Calls from users' compiled code to our kernels, which are compiled once, by themselves.

Linking a kernel into each function that calls it would optimise it again each time: seconds.
Users' code calls it by a symbol instead, as it calls numba's own helpers. Where numba loads
users' code from its cache, it first runs `provide`, which makes the symbol known.
"""

from __future__ import annotations

import hashlib
from functools import partial
from typing import Any

from llvmlite import binding
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from numclip.kernels import spans

_held: dict[str, Any] = {}


def provide(name: str, arguments: tuple[Any, ...], abi: int) -> tuple[str, Any]:
    """Compile a kernel, or load it, and make its symbol known; return that and its signature."""
    kernel = getattr(spans, name, None)
    if abi != spans.ABI or kernel is None:
        raise RuntimeError(
            "numclip was updated since this function was compiled: delete what numba's cache "
            "(NUMBA_CACHE_DIR, or __pycache__ beside the file) holds of it"
        )
    digest = hashlib.sha256(repr((arguments, abi)).encode()).hexdigest()[:16]
    symbol = f"numclip_{name}_{digest}"
    if symbol not in _held:
        kernel.compile(arguments)
        result = kernel.overloads[arguments]
        address = result.library.get_pointer_to_function(result.fndesc.llvm_func_name)
        binding.add_symbol(symbol, address)
        _held[symbol] = result
    return symbol, _held[symbol].signature


@intrinsic
def call(_typing: Any, kernel: Any, arguments: Any) -> Any:
    """Call a kernel, which never raises, with a tuple of arguments."""
    name = kernel.dispatcher.py_func.__name__
    wanted = tuple(map(types.unliteral, arguments.types))
    symbol, signature = provide(name, wanted, spans.ABI)

    def emit(context: Any, builder: Any, _signature: Any, values: Any) -> Any:
        library = context.active_code_library
        library._reload_init.add(partial(provide, name, wanted, spans.ABI))
        kind = context.call_conv.get_function_type(signature.return_type, wanted)
        function = cgutils.get_or_insert_function(builder.module, kind, symbol)
        given = [
            context.cast(builder, builder.extract_value(values[1], k), old, new)
            for k, (old, new) in enumerate(zip(arguments.types, wanted, strict=True))
        ]
        _, result = context.call_conv.call_function(
            builder, function, signature.return_type, wanted, given
        )
        return result

    return signature.return_type(kernel, arguments), emit

"""Digests of what compiled code is made of: a function, and all values that it refers to.

numba compiles a function's bytecode, the values of the globals that it names, and the functions
that it calls. The digest follows these from one to the next likewise, and needs no source file.
Values of Python, NumPy, numba and llvmlite count by name alone, as the versions of these are part
of the code's description anyway (see `jit`).
"""

import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types as numba_types
from numba.core.dispatcher import Dispatcher
from numba.core.extending import _Intrinsic

NAMED = {*sys.stdlib_module_names, "numpy", "numba", "llvmlite"}
ATOMS = (bool, int, float, complex, str, bytes, type(None), type(Ellipsis), np.generic, np.dtype)
TYPED = (numba_types.Type, ir.Type, ir.Constant)


class NoDigestError(TypeError):
    """Raised if a function refers to a value of which no digest can be made."""


def of(function: Callable[..., Any]) -> str:
    """Return the digest of a Python function that numba compiles.

    Raises
    ------
    NoDigestError
        If the function, or one that it calls, refers to a value that is no number, text, array,
        slice, type or function.
    """
    digest = hashlib.sha256()
    for part in _function(function, set()):
        digest.update(part.encode() + b"\0")
    return digest.hexdigest()


@functools.cache
def of_modules(*modules: types.ModuleType) -> str:
    """Return the digest of the code that some modules define, and of their constants.

    It is the same wherever they were imported from.
    """
    digest = hashlib.sha256()
    for module in modules:
        for name, value in sorted(vars(module).items()):
            if name.startswith("__"):  # its file, and its docstring
                continue
            for part in (name, *_defined(value, module.__name__)):
                digest.update(part.encode() + b"\0")
    return digest.hexdigest()


def _defined(value: Any, module: str) -> Iterator[str]:
    """Describe a constant, or a function or class of the module by its code."""
    if isinstance(value, ATOMS):
        yield repr(value)
    elif getattr(value, "__module__", None) == module:
        members = vars(value).values() if isinstance(value, type) else [value]
        for member in members:
            code = getattr(getattr(member, "fget", member), "__code__", None)
            if code is not None:
                yield from _code(code, set(), set())


def _value(value: Any, names: set[str], seen: set[int]) -> Iterator[str]:
    """Describe a value; of a module, the members in `names` alone."""
    if isinstance(value, ATOMS):
        yield f"{type(value).__name__} {value!r}"
    elif isinstance(value, TYPED):
        yield f"{type(value).__name__} {value}"
    elif isinstance(value, tuple | list | set | frozenset | Mapping):
        yield from _several(value, names, seen)
    elif isinstance(value, slice):  # a constant of code since Python 3.14
        yield from _several([value.start, value.stop, value.step], names, seen)
    elif isinstance(value, np.ndarray):
        yield f"{value.dtype} {value.shape} {value.tobytes().hex()}"
    elif isinstance(value, types.CodeType):
        yield from _code(value, names, seen)
    elif isinstance(value, Dispatcher):
        yield from _several(value.targetoptions, names, seen)
        yield from _function(value.py_func, seen)
    elif isinstance(value, _Intrinsic):
        yield from _function(value._defn, seen)
    elif isinstance(value, types.ModuleType):
        yield value.__name__
        if not _is_named(value.__name__):
            for name in sorted(names & vars(value).keys()):
                yield name
                yield from _value(vars(value)[name], names, seen)
    elif _is_named(getattr(value, "__module__", None) or type(value).__module__):
        yield f"{getattr(value, '__module__', None)} {_name(value)}"
    elif isinstance(value, types.FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, type):
        yield f"{value.__module__} {value.__qualname__}"
        yield from _defined(value, value.__module__)
    elif hasattr(value, "__wrapped__"):  # functools.cache
        yield from _value(value.__wrapped__, names, seen)
    else:
        raise NoDigestError(f"{value!r} is of {type(value)}")


def _several(value: Any, names: set[str], seen: set[int]) -> Iterator[str]:
    """Describe the values of a collection, in an order that is the same in each process."""
    yield f"{type(value).__name__} {len(value)}"
    if isinstance(value, Mapping):
        value = sorted(value.items(), key=repr)
    elif isinstance(value, set | frozenset):
        value = sorted(value, key=repr)
    for item in value:
        yield from _value(item, names, seen)


def _function(function: Any, seen: set[int]) -> Iterator[str]:
    """Describe a function: its code, defaults and cells, and the globals that it names."""
    yield f"{function.__module__} {function.__qualname__}"
    if id(function) in seen:
        return
    seen.add(id(function))
    code = function.__code__
    names = set(_names(code))
    yield from _code(code, names, seen)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    yield from _several([function.__defaults__, function.__kwdefaults__, *cells], names, seen)
    for name in sorted(names & function.__globals__.keys()):
        yield name
        yield from _value(function.__globals__[name], names, seen)


def _code(code: types.CodeType, names: set[str], seen: set[int]) -> Iterator[str]:
    yield code.co_code.hex()
    yield f"{code.co_argcount} {code.co_kwonlyargcount} {code.co_flags}"
    yield repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars))
    yield from _several(code.co_consts, names, seen)


def _names(code: types.CodeType) -> Iterator[str]:
    """Yield the names of globals and attributes in a code and those within it."""
    yield from code.co_names
    for value in code.co_consts:
        if isinstance(value, types.CodeType):
            yield from _names(value)


def _is_named(module: str) -> bool:
    return module.partition(".")[0] in NAMED


def _name(value: Any) -> str:
    name = getattr(value, "__qualname__", None) or getattr(value, "__name__", None)
    if not isinstance(name, str):
        raise NoDigestError(f"{value!r} is of {type(value)}")
    return name

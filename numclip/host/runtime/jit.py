"""Compiles the CPU's kernels: the only module that names numba's options and its cache.

`device` is that module for numba-cuda, which is loaded only when a GPU is used.
"""

import contextlib
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import llvmlite
import numba
import numpy as np
from llvmlite import binding
from numba import njit
from numba.core import config, sigutils, types
from numba.core.compiler import Compiler, CompileResult
from numba.core.runtime.nrt import rtsys
from numba.core.serialize import dumps
from numba.core.typing.templates import make_concrete_template

from numclip.host.runtime import cache, digest, entries, parts, registers
from numclip.host.runtime.entries import KernelCompiler
from numclip.host.runtime.parts import PartCompiler

Function = TypeVar("Function", bound=Callable[..., Any])

INTERPRETED = bool(vars(config)["DISABLE_JIT"])

# Division that raises keeps loops from vectorising; kernels return a status instead. Unset flags
# would be inherited from a user's function whose compilation is the first to need a kernel.
OWN_FLAGS: dict[str, Any] = {"error_model": "numpy", "fastmath": False, "forceinline": False}
# Nobody calls a kernel from C.
_OPTIONS: dict[str, Any] = {**OWN_FLAGS, "nogil": True, "no_cfunc_wrapper": True}
# Nobody calls a part of kernels from Python: without a wrapper it compiles in a fifth less time.
_PART_OPTIONS: dict[str, Any] = {
    **_OPTIONS,
    "no_cpython_wrapper": True,
    "pipeline_class": PartCompiler,
}
# Reassociation alone lets a sum vectorise. "nnan" and "ninf" stay off: NaN and Inf must pass.
_SUM_FLAGS = {"reassoc", "contract", "nsz"}
# The NUMBA_... settings, other than the processor, that change the code that numba makes.
_SETTINGS = (
    "OPT",
    "LOOP_VECTORIZE",
    "SLP_VECTORIZE",
    "LLVM_REFPRUNE_PASS",
    "LLVM_REFPRUNE_FLAGS",
    "DEBUGINFO_DEFAULT",
    "BOUNDSCHECK",
    "EXTEND_VARIABLE_LIFETIMES",
    "NRT_STATS",
    "USING_SVML",
)
QUIET = "NUMCLIP_QUIET"

_announced = False


def _announce() -> None:
    """Print once, on stderr, that this call compiles and so takes longer than the next."""
    global _announced
    if _announced or os.environ.get(QUIET, "0") not in ("", "0"):
        return
    _announced = True
    path, refused = cache.folder()
    kept = f"kept in {path}" if path else f"kept nowhere ({'; '.join(refused)})"
    if sys.stderr is None:
        return
    with contextlib.suppress(Exception):  # stderr can be closed
        print(
            f"numclip: compiling, which takes seconds; the code is {kept} ({QUIET}=1 hides this)",
            file=sys.stderr,
        )


def description(function: Callable[..., Any], options: Any, kinds: Any, target: Any) -> str:
    """Return a text of everything that compiled code depends on.

    `kinds` are the types of its arguments, `target` the processor and the features it may use.
    """
    settings = {name: str(vars(config).get(name)) for name in _SETTINGS}
    return "\n".join(
        f"{name}: {value}"
        for name, value in {
            "function": f"{function.__module__}.{function.__qualname__}",
            "source": digest.of(function),
            "arguments": [str(kind) for kind in kinds],
            "compiler": digest.of_modules(entries, parts, registers),
            "options": sorted((key, str(_ordered(value))) for key, value in options.items()),
            "target": [str(part) for part in target],
            "settings": settings,
            "numba": numba.__version__,
            "llvmlite": (llvmlite.__version__, binding.llvm_version_info),
            "numpy": np.__version__,
            "python": (sys.version, sys.implementation.name, getattr(sys, "abiflags", "")),
        }.items()
    )


def _ordered(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else value


class Cache:
    """The cache that numba loads a kernel's code from and saves it to; see `cache`."""

    def __init__(self, function: Callable[..., Any], options: Any) -> None:
        self._function = function
        self._options = options

    @property
    def cache_path(self) -> str | None:
        """The folder that numba's statistics show."""
        return cache.folder().path

    def load_overload(self, signature: Any, target: Any) -> Any:
        """Return the compiled function for a signature; None if it has to be compiled."""
        wanted, _ = sigutils.normalize_signature(signature)
        try:
            found = self._load(tuple(wanted), target)
        except Exception:  # reading broken code can raise anything
            found = None
        if found is None:
            _announce()
        return found

    def _load(self, wanted: Any, target: Any) -> Any:
        payload = cache.read(self._function.__qualname__, self._description(wanted, target))
        if payload is None:
            return None
        symbols, reduced = pickle.loads(payload)
        # numba would load its whole library first, with scipy.linalg: half a second. Code needs
        # only the symbols that it was linked to.
        rtsys.initialize(target)
        if not all(map(binding.address_of_symbol, symbols)):
            target.refresh()
        if not all(map(binding.address_of_symbol, symbols)):
            return None  # LLVM would end the process
        result = CompileResult._rebuild(target, *reduced)
        same = result.fndesc.qualname == self._function.__qualname__
        return result if same and tuple(result.signature.args) == wanted else None

    def save_overload(self, signature: Any, result: Any) -> None:
        """Write a compiled function to the cache, if that is possible."""
        if result.lifted or result.library.has_dynamic_globals:
            return
        wanted, _ = sigutils.normalize_signature(signature)
        with contextlib.suppress(Exception):  # what cannot be described or pickled is not kept
            described = self._description(wanted, result.target_context)
            payload = dumps((_symbols(result.library), result._reduce()))
            cache.write(self._function.__qualname__, described, payload)

    def _description(self, wanted: Any, target: Any) -> str:
        return description(self._function, self._options, wanted, target.codegen().magic_tuple())

    def flush(self) -> None:
        """Do nothing: outdated code has other file names."""

    enable = disable = flush


def _symbols(library: Any) -> list[str]:
    """Return the names of functions and variables that a library takes from the process."""
    module = library._final_module
    return sorted(
        value.name
        for value in (*module.functions, *module.global_variables)
        if value.is_declaration and not value.name.startswith("llvm.")
    )


def kernel(function: Function) -> Function:
    """Compile `function` at its first call and keep the code on disk where that is possible."""
    return _cached(function, {**_OPTIONS, "pipeline_class": KernelCompiler})


def kernel_with_gil(function: Function) -> Function:
    """Compile a kernel that reads Python objects, which no other thread may change meanwhile."""
    return _cached(function, {**_OPTIONS, "nogil": False, "pipeline_class": KernelCompiler})


def entry(function: Callable[..., Any], *arguments: Any) -> Callable[..., Any]:
    """Return the specialisation of a kernel for these arguments' types, which checks no types.

    A call with seven arguments takes 0.2 us less. Pass only our own tables: an array of another
    dtype or layout would be read as if it had the types of `arguments`.
    """
    if INTERPRETED:
        return function
    compiled: Any = function
    return compiled.compile(tuple(map(numba.typeof, arguments)))  # type: ignore[no-any-return]


def without_entry(function: Function) -> Function:
    """Compile a function that reads or sets the floating-point environment, see `entries`."""
    return _cached(function, {**_OPTIONS, "nogil": False, "pipeline_class": Compiler})


def _cached(function: Function, options: dict[str, Any]) -> Function:
    if INTERPRETED:
        return np.errstate(all="ignore")(function)  # compiled code does not warn
    compiled: Any = njit(**options)(function)
    compiled._cache = Cache(compiled.py_func, {**compiled.targetoptions, **options})
    part: Any = _part(function)  # in kernels that call it: they need neither entry nor wrapper
    compiled.get_call_template, compiled.get_overload = part.get_call_template, part.get_overload
    return compiled  # type: ignore[no-any-return]


def inline(function: Function) -> Function:
    """Compile `function` as a part of the kernels that call it."""
    return _part(function)


def expanded(function: Function) -> Function:
    """Write `function` out where kernels call it: a call costs 3 ns, as much as 250 bytes read."""
    return _part(function, inline="always")


def block_sum(function: Function) -> Function:
    """Compile a plain sum over a slice, vectorised by reassociation, as a part of kernels."""
    return _part(function, fastmath=_SUM_FLAGS)


def _part(function: Function, **options: Any) -> Function:
    """Compile a function that only kernels call; from Python there is no way into its code."""
    compiled: Any = njit(**{**_PART_OPTIONS, **options})(function)
    if INTERPRETED:
        return compiled  # type: ignore[no-any-return]

    def refuse(*_arguments: Any, **_names: Any) -> None:
        raise TypeError(f"{function.__qualname__} is a part of kernels: only they can call it")

    def template(kinds: Any, names: Any) -> Any:  # numba's own compiles for each literal
        signature, kinds = compiled._compiler.fold_argument_types(kinds, names)
        kinds = tuple(map(types.unliteral, kinds))
        result = compiled.overloads.get(kinds)
        if result is None:  # the dispatcher takes time for each lock of each inner part
            result = compiled.overloads[kinds] = compiled._compiler.compile(kinds, None)
        key = function.__qualname__
        made = make_concrete_template(key, key=key, signatures=[result.signature])
        return made, signature, kinds, {}

    compiled._compile_for_args = refuse
    compiled.get_call_template = template
    return compiled  # type: ignore[no-any-return]

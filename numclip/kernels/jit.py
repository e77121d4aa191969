"""How the CPU's kernels are compiled: the one place that names numba's options and its cache.

`device` is that place for numba-cuda, which is loaded only when a GPU is asked for.
"""

import contextlib
import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numba import njit
from numba.core import config
from numba.core.caching import FunctionCache

Function = TypeVar("Function", bound=Callable[..., Any])

INTERPRETED = bool(vars(config)["DISABLE_JIT"])

# Division that raises keeps loops from vectorising; a kernel reports by value instead. What is
# not set is taken over from a user's function in whose compilation a kernel is first met.
OWN_FLAGS: dict[str, Any] = {
    "error_model": "numpy",
    "fastmath": False,
    "boundscheck": False,
    "forceinline": False,
}
_OPTIONS: dict[str, Any] = {**OWN_FLAGS, "nogil": True}
# Reassociation alone lets a sum vectorise. "nnan" and "ninf" stay off: NaN and Inf must pass.
_SUM_FLAGS = {"reassoc", "contract", "nsz"}


def _stamp() -> str:
    """Return a digest of every kernel source: a cached kernel holds inlined code of them all."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


class _Cache(FunctionCache):
    """numba's file cache, where a file that cannot be read or written is a miss."""

    stamp = _stamp()

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = self.stamp

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a truncated file can raise whatever unpickling raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        try:
            try:
                super().save_overload(sig, data)
            except Exception:  # the index is broken: begin a new one
                self.flush()
                super().save_overload(sig, data)
        except OSError:  # disk full or read-only: run uncached
            pass


def kernel(function: Function) -> Function:
    """Compile `function` at its first call and keep the code on disk where that is possible."""
    return _cached(function, _OPTIONS)


def kernel_with_gil(function: Function) -> Function:
    """Compile a kernel that reads Python objects, which no other thread may change meanwhile."""
    return _cached(function, {**_OPTIONS, "nogil": False})


def _cached(function: Function, options: dict[str, Any]) -> Function:
    if INTERPRETED:
        return np.errstate(all="ignore")(function)  # compiled code does not warn
    compiled: Any = njit(**options)(function)
    with contextlib.suppress(AttributeError, RuntimeError):  # no writable directory
        compiled._cache = _Cache(compiled.py_func)
    return compiled  # type: ignore[no-any-return]


def inline(function: Function) -> Function:
    """Compile `function` as a part of the kernels that call it."""
    return njit(**_OPTIONS)(function)  # type: ignore[no-any-return]


def expanded(function: Function) -> Function:
    """Write `function` out where kernels call it: a call costs 3 ns, as much as 250 bytes read."""
    return njit(inline="always", **_OPTIONS)(function)  # type: ignore[no-any-return]


def block_sum(function: Function) -> Function:
    """Compile a plain sum over a slice, vectorised by reassociation, as a part of kernels."""
    return njit(**{**_OPTIONS, "fastmath": _SUM_FLAGS})(function)  # type: ignore[no-any-return]

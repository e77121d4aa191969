"""numba-cuda's import, its options, workarounds for its faults, and kernel launches.

numba compiles; `driver` and `memory` do the rest. Importing this module starts no driver.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from numclip import decisions, formulas, halves, tables
from numclip.errors import INSTALL, DeviceError

Function = TypeVar("Function", bound=Callable[..., Any])

if importlib.util.find_spec("numba_cuda") is None:
    raise DeviceError(f'device: "cuda" needs the package numba-cuda, which is missing: {INSTALL}')
if not hasattr(np, "row_stack"):  # numba-cuda 0.30 needs it at its first compilation
    setattr(np, "row_stack", np.vstack)  # noqa: B010 - no attribute that type checkers know

with warnings.catch_warnings():  # NumPy 2.5's, as numba-cuda 0.30 calls np.timedelta64("nat")
    warnings.filterwarnings("ignore", "The 'generic' unit", DeprecationWarning)
    import numba.cuda

cuda: Any = numba.cuda
types: Any = numba.cuda.types
if getattr(cuda, "implementation", "") != "NVIDIA":
    raise DeviceError(
        'device: "cuda" needs numba-cuda in place of numba\'s own numba.cuda, got the latter: '
        "its .pth file did not run; install it into site-packages, or import "
        "_numba_cuda_redirector before numba"
    )

from cuda.bindings import driver as cu  # noqa: E402
from numba.cuda.dispatcher import CUDACache  # noqa: E402

from numclip.cuda import driver  # noqa: E402
from numclip.cuda.driver import handle_of  # noqa: E402
from numclip.cuda.memory import Table  # noqa: E402

# A power of two: the block's sums are added in a tree. Not measured on hardware yet.
THREADS = 256
# Bytes a partial sum covers.
CHUNK_BYTES = 1 << 17
# The shares that a tensor's rows are summed in, at least; the most rows of a group that one lane
# sums, lanes share larger ones; the bytes that memory is read in. Reasoned, not measured yet.
ROW_SHARES = 512
LONG_GROUP = 16
SECTOR = 32


def sources() -> list[Path]:
    """Return the source files whose code a cached kernel can hold: changes to any outdate it."""
    shared = (Path(str(module.__file__)) for module in (decisions, formulas, halves, tables))
    return [*sorted(Path(__file__).parent.rglob("*.py")), *shared]


class _Cache(CUDACache):
    """numba-cuda's file cache, where a file that cannot be read or written is a miss."""

    stamp = hashlib.sha256(b"".join(path.read_bytes() for path in sources())).hexdigest()

    def __init__(self, function: Any) -> None:
        super().__init__(function)
        self._cache_file._source_stamp = self.stamp

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        try:
            return super().load_overload(sig, target_context)
        except Exception:  # a truncated file can raise whatever unpickling raises
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        with contextlib.suppress(OSError):  # disk full or read-only: run uncached
            try:
                super().save_overload(sig, data)
            except Exception:  # the index is broken: begin a new one
                self.flush()
                super().save_overload(sig, data)


def kernel(function: Function) -> Function:
    """Compile `function` for the GPU at its first launch, and cache it on disk where possible."""
    compiled = cuda.jit(function)
    with contextlib.suppress(AttributeError, RuntimeError):  # no writable directory
        compiled._cache = _Cache(compiled.py_func)
    return compiled  # type: ignore[no-any-return]


def inline(function: Function) -> Function:
    """Compile `function` as a part of the kernels that call it."""
    return cuda.jit(device=True, forceinline=True)(function)  # type: ignore[no-any-return]


def require() -> None:
    """Raise DeviceError where there is no usable GPU; the message says what is missing."""
    driver.gpu()


_functions: dict[Any, Any] = {}


@functools.cache
def _type(dtype: Any, ndim: int) -> Any:
    """Return numba's type of a scalar (`ndim` 0), or of an array in C order with `ndim` axes."""
    element = getattr(types, dtype.name)
    return types.Array(element, ndim, "C") if ndim else element


def _function(compiled: Any, arguments: tuple[Any, ...]) -> Any:
    """Return the driver's handle of a kernel's specialisation for the types of its arguments."""
    signature = tuple(_type(argument.dtype, len(argument.shape)) for argument in arguments)
    found = _functions.get((compiled, signature))
    if found is None:
        found = compiled.compile(signature).library.get_cufunc().handle
        _functions[compiled, signature] = found
    return found


class _Launch:
    """A kernel with its grid and arguments, laid out as the driver takes them."""

    def __init__(self, compiled: Any, count: int, stream: Any, arguments: tuple[Any, ...]) -> None:
        words: list[int] = []
        for argument in arguments:
            if isinstance(argument, Table):
                argument.used_on(stream)
                words += argument.words()
            else:
                words.append(int.from_bytes(argument.tobytes(), "little"))
        self._words = np.array(words, np.uint64)
        self._pointers = self._words.ctypes.data + 8 * np.arange(len(words), dtype=np.uint64)
        self._kept = arguments[1:]  # the first one keeps this launch
        grid = min(count, driver.gpu().blocks), 1, 1, THREADS, 1, 1, 0
        pointers = self._pointers.ctypes.data
        self._call = _function(compiled, arguments), *grid, handle_of(stream), pointers, 0

    def __call__(self) -> None:
        driver.checked(cu.cuLaunchKernel(*self._call))


def launch(compiled: Any, count: int, stream: Any, *arguments: Any) -> None:
    """Launch a kernel whose blocks share `count` work items, if any; return at once.

    Arguments are tables and NumPy scalars. If the first one is a table, it keeps the prepared
    launch: each launch with the same arguments after the first takes a few microseconds.
    """
    if not count:  # the driver refuses a grid of no blocks
        return
    driver.gpu()
    handle = handle_of(stream)
    kept = arguments[0].launches if isinstance(arguments[0], Table) else {}
    key = (
        compiled,
        count,
        handle,
        *[a if isinstance(a, Table) else (a.dtype.char, a.tobytes()) for a in arguments[1:]],
    )
    found = kept.get(key)
    if found is None:
        kept[key] = found = _Launch(compiled, count, stream, arguments)
    found()

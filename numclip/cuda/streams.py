"""Streams: the one a user gives, the one a library works on, and the order between them."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from numclip.cuda import driver
from numclip.cuda.protocols import library_of
from numclip.facts import Facts


def stream_from(stream: Any) -> Any:
    """Return the `Stream` of a user's stream: numba's, CuPy's, PyTorch's, a handle, or None."""
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return driver.Stream(handle)
    if isinstance(stream, int) and not isinstance(stream, bool):
        return driver.Stream(stream)
    if stream is None:
        return driver.Stream(0)
    if hasattr(stream, "begin_building"):  # a graph builder of cuda.core
        stream = stream.stream
    if hasattr(stream, "__cuda_stream__"):
        return driver.Stream(int(stream.__cuda_stream__()[1]))
    raise TypeError(f"stream: expected a CUDA stream or None, got {type(stream).__name__}")


def stream_of(entries: Sequence[Facts]) -> Any:
    """Return the stream to work on: the one that the library of the first array works on.

    It waits for the streams of the other arrays; that of an array read by DLPack is the default
    stream, which waits for the array's library. Call `give_back` after the work on it.
    """
    own, *others = _streams_of(entries) or [driver.Stream(0)]
    for other in others:
        driver.order(own, other)
    if driver.handle_of(own):
        for entry in entries:
            if entry.lease is not None:
                entry.lease.streams.append(own)
    return own


def give_back(stream: Any, entries: Sequence[Facts]) -> None:
    """Make the streams of the arrays' libraries wait for the work queued on `stream`."""
    for other in _streams_of(entries):
        driver.order(other, stream)


def _streams_of(entries: Sequence[Facts]) -> list[Any]:
    """Return the streams that the libraries of some arrays work on, each once."""
    found: dict[int, Any] = {}
    libraries: set[str] = set()
    for entry in entries:
        package = library_of(entry.array)
        if package not in libraries:
            libraries |= {package} & {"torch", "cupy"}  # one current stream for all arrays
            stream = current_stream(entry.array)
            found.setdefault(driver.handle_of(stream), stream)
    return list(found.values())


def current_stream(array: Any) -> Any:
    """Return the stream that the library of an array works on at present."""
    package = library_of(array)
    if package == "torch":
        return driver.Stream(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    if package == "cupy":
        theirs = sys.modules["cupy"].cuda.get_current_stream()
        stream = driver.Stream(theirs.ptr)
        stream.owner = theirs
        return stream
    return driver.Stream(_exported_stream(array))


def _exported_stream(array: Any) -> int:
    """Return the stream's handle in an array's interface; 1 and None are the default one, 0."""
    interface = getattr(array, "__cuda_array_interface__", None) or {}
    handle = interface.get("stream") or 0
    return 0 if handle == 1 else int(handle)


@contextlib.contextmanager
def in_order(stream: Any, entries: Sequence[Facts]) -> Iterator[None]:
    """Order the body's work on `stream` after the libraries' past work and before later work."""
    driver.order(stream, stream_of(entries))
    yield
    give_back(stream, entries)

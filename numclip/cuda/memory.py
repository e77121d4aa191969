"""GPU memory: buffers of arrays, tables of plans, and copies to and from the host.

Tables come from an arena for each stream, which grows and reuses its blocks, as an allocation
takes long and freeing memory waits for the whole GPU. They are sent from pinned memory, as the
host may have to wait for a copy from pageable memory.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import math
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from cuda.bindings import driver as cu

from numclip.cuda.driver import (
    NO_TIMING,
    OUT_OF_MEMORY,
    checked,
    forked,
    gpu,
    handle_of,
    is_captured,
    order,
    synchronize,
)
from numclip.dtypes import Array
from numclip.errors import DeviceError

RELAXED = cu.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
ALIGNMENT = 256
ARENA_BYTES = 1 << 20
"""The bytes that an arena allocates from the driver at a time, at least."""

MOST_KEPT = 1 << 26
"""The bytes of the largest table that an arena holds; the memory of larger ones is freed."""

RING_BYTES = 1 << 18
"""The initial bytes of each of the two halves of a stream's ring of pinned memory."""

MOST_PINNED = 1 << 25
"""The most bytes sent through pinned memory at a time; the host waits for a larger copy."""


@contextlib.contextmanager
def _beside_captures() -> Iterator[None]:
    """Allow memory to be allocated and freed, outside any graph, while a stream is captured."""
    mode = checked(cu.cuThreadExchangeStreamCaptureMode(RELAXED))
    try:
        yield
    finally:
        checked(cu.cuThreadExchangeStreamCaptureMode(mode))


def _taken(nbytes: int) -> int:
    """Return the address of new memory; if memory is short, empty PyTorch's and CuPy's caches.

    Their allocators cache all the memory that they ever allocated.
    """
    gpu()
    with _beside_captures():
        result = cu.cuMemAlloc(max(nbytes, 1))
        if result[0] == OUT_OF_MEMORY:
            if "torch" in sys.modules:
                sys.modules["torch"].cuda.empty_cache()
            if "cupy" in sys.modules:
                sys.modules["cupy"].get_default_memory_pool().free_all_blocks()
            result = cu.cuMemAlloc(max(nbytes, 1))
    if result[0] == OUT_OF_MEMORY:
        raise DeviceError(
            f"CUDA: expected {nbytes:,} bytes of the GPU's memory, got CUDA_ERROR_OUT_OF_MEMORY, "
            "after what PyTorch and CuPy keep unused was given back; free arrays, or let JAX take "
            "less (XLA_PYTHON_CLIENT_PREALLOCATE=false)"
        )
    return int(checked(result))


def _give_back(address: int) -> None:
    """Free memory; do nothing in a forked process, which cannot use the GPU."""
    if not forked():
        gpu()
        with _beside_captures():
            checked(cu.cuMemFree(address))


class Memory:
    """GPU memory that this object owns, aligned to 64 bytes or more."""

    def __init__(self, nbytes: int) -> None:
        self.nbytes, self.address = nbytes, _taken(nbytes)
        weakref.finalize(self, _give_back, self.address).atexit = False


class _Block:
    """A block of an arena; deleting this object returns the block to the arena."""

    def __init__(self, arena: _Arena, size_class: int, address: int) -> None:
        self._arena, self._class, self.address = arena, size_class, address
        self._streams: set[Any] = set()

    def used_on(self, stream: Any) -> None:
        """Note that `stream` uses the block: the arena's stream waits for it before reuse."""
        if stream != self._arena.stream:
            self._streams.add(stream)

    def __del__(self) -> None:
        self._arena.free[self._class].append((self.address, self._streams))


class _Arena:
    """Memory for the tables of one stream, in blocks of powers of two."""

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self.free: list[list[tuple[int, set[Any]]]] = [[] for _ in range(64)]
        self._next = 0
        self._end = 0
        self._lock = threading.Lock()

    def block(self, nbytes: int) -> Any:
        """Return a block of at least `nbytes` bytes."""
        if nbytes > MOST_KEPT:
            return _Large(nbytes)
        kind = max(nbytes - 1, ALIGNMENT - 1).bit_length()
        try:
            address, streams = self.free[kind].pop()
        except IndexError:
            return _Block(self, kind, self._carved(1 << kind))
        for stream in streams:  # those that used the block before
            order(self.stream, stream)
        return _Block(self, kind, address)

    def _carved(self, nbytes: int) -> int:
        with self._lock:
            if self._end - self._next < nbytes:
                size = max(ARENA_BYTES, nbytes)
                self._next = _taken(size)
                self._end = self._next + size
            found, self._next = self._next, self._next + nbytes
            return found


class _Large(Memory):
    """The memory of a table too large for an arena."""

    def used_on(self, stream: Any) -> None:
        """Do nothing: freeing the memory waits for all streams."""


_arenas: dict[int, _Arena] = {}


class Table:
    """An array on the GPU in C order, which kernels take as an argument."""

    def __init__(self, block: Any, address: int, shape: tuple[int, ...], dtype: Any) -> None:
        self._block, self.address, self.shape, self.dtype = block, address, shape, np.dtype(dtype)
        self.size = math.prod(shape)
        self.launches: dict[Any, Any] = {}

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return int(self.size * self.dtype.itemsize)

    def __getitem__(self, at: int | slice) -> Table:
        """Return a view of the row with an index, or of the consecutive rows of a slice."""
        rest = self.shape[1:]
        if isinstance(at, slice):
            first, last, _ = at.indices(self.shape[0])
            shape: tuple[int, ...] = (max(last - first, 0), *rest)
        else:
            first, shape = at, rest
        address = self.address + first * math.prod(rest) * self.dtype.itemsize
        return Table(self._block, address, shape, self.dtype)

    def used_on(self, stream: Any) -> None:
        """Note that `stream` uses the table's block."""
        self._block.used_on(stream)

    def words(self) -> list[int]:
        """Return numba's array struct: two nulls, size, itemsize, address, shape, strides."""
        lengths = itertools.accumulate(self.shape[:0:-1], int.__mul__, initial=self.dtype.itemsize)
        steps = list(lengths)[::-1]
        return [0, 0, self.size, self.dtype.itemsize, self.address, *self.shape, *steps]


def scratch(shape: tuple[int, ...], stream: Any = 0, dtype: Any = np.float64) -> Table:
    """Return an uninitialised table on the GPU, for kernels on `stream` to fill."""
    handle = handle_of(stream)
    if handle not in _arenas:
        _arenas.setdefault(handle, _Arena(stream))
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    block = _arenas[handle].block(nbytes)
    return Table(block, block.address, shape, dtype)


def table(array: Array, stream: Any) -> Table:
    """Return a table on the GPU with the content of a host array, sent in stream order."""
    made = scratch(array.shape, stream, array.dtype)
    update(made, array, stream)
    return made


def update(to: Table, array: Array, stream: Any) -> None:
    """Overwrite a table on the GPU with a host array, in stream order."""
    to.used_on(stream)
    write(to.address, np.ascontiguousarray(array, to.dtype).reshape(-1).view(np.uint8), stream)


def read_table(array: Table, stream: Any) -> Array:
    """Return a copy of a table on the host, after waiting for all work queued on the stream."""
    copy: Array = read(array.address, array.nbytes, stream).view(array.dtype).reshape(array.shape)
    return copy


def _pinned(nbytes: int) -> tuple[int, Array]:
    """Return the address of new pinned memory of the host, and its bytes."""
    with _beside_captures():
        address = int(checked(cu.cuMemHostAlloc(nbytes, 0)))
    memory: Any = (ctypes.c_char * nbytes).from_address(address)
    return address, np.frombuffer(memory, np.uint8)


class _Landing:
    """Pinned memory of the host that one table is copied to at a time."""

    def __init__(self, nbytes: int) -> None:
        self._address, self._bytes = _pinned(nbytes)
        self._event = checked(cu.cuEventCreate(NO_TIMING))
        weakref.finalize(self, _unpin, self._address, self._event).atexit = False

    def take(self, table: Table, stream: Any) -> None:
        """Queue a copy of a table on the stream, without waiting."""
        handle = handle_of(stream)
        checked(cu.cuMemcpyDtoHAsync(self._address, table.address, table.nbytes, handle))
        checked(cu.cuEventRecord(self._event, handle))

    def wait(self) -> Array:
        """Wait for the copy that `take` queued, and return its bytes."""
        gpu()
        checked(cu.cuEventSynchronize(self._event))
        return self._bytes.copy()


def _unpin(address: int, event: Any) -> None:
    """Free pinned memory once the copy to it is done; do nothing in a forked process."""
    if not forked():
        gpu()
        with _beside_captures():
            checked(cu.cuEventSynchronize(event))
            checked(cu.cuMemFreeHost(address))
            checked(cu.cuEventDestroy(event))


_landings: dict[int, list[_Landing]] = {}
"""The free landings, by their size in bytes."""


def read_later(array: Table, stream: Any) -> Callable[[], Array]:
    """Queue a copy of a table to the host; return a function that waits for it and returns it.

    The function is to be called once.
    """
    gpu()
    free = _landings.setdefault(array.nbytes, [])
    landing = free.pop() if free else _Landing(array.nbytes)
    landing.take(array, stream)
    shape, dtype = array.shape, array.dtype

    def read() -> Array:
        found: Array = landing.wait().view(dtype).reshape(shape)
        free.append(landing)
        return found

    return read


class _Ring:
    """Pinned memory of the host from which one stream copies; one half is filled at a time."""

    def __init__(self, stream: int, nbytes: int) -> None:
        self._stream, self.half = stream, nbytes
        self._address, self._bytes = _pinned(2 * nbytes)
        self._events = [checked(cu.cuEventCreate(NO_TIMING)) for _ in range(2)]
        self._side, self._used = 0, 0

    def send(self, target: int, source: Array) -> None:
        """Copy bytes to the ring, when its half is free, and queue their copy to the GPU."""
        if self._used + source.size > self.half:
            checked(cu.cuEventRecord(self._events[self._side], self._stream))
            self._side, self._used = 1 - self._side, 0
            event = self._events[self._side]
            if cu.cuEventQuery(event)[0]:
                checked(cu.cuEventSynchronize(event))
        start = self._side * self.half + self._used
        self._bytes[start : start + source.size] = source
        address = self._address + start
        checked(cu.cuMemcpyHtoDAsync(target, address, source.size, self._stream))
        self._used += -(-source.size // ALIGNMENT) * ALIGNMENT

    def close(self) -> None:
        """Free the memory once all copies from it are done."""
        synchronize(self._stream)
        checked(cu.cuMemFreeHost(self._address))


_rings: dict[int, _Ring] = {}
_sending = threading.Lock()


def write(address: int, source: Array, stream: Any) -> None:
    """Copy bytes of the host to the GPU, in stream order; `source` may change on return."""
    if not source.size:
        return
    gpu()
    handle = handle_of(stream)
    if is_captured(handle):  # each replay of a graph would read the host's memory, as it is then
        raise RuntimeError(
            "stream: expected one that is not captured, as something changed on the host (a bound, "
            "a rate, the loss scale, rows) and is to be sent; take a step with it first"
        )
    if source.size > MOST_PINNED:
        checked(cu.cuMemcpyHtoDAsync(address, source.ctypes.data, source.size, handle))
        synchronize(stream)
        return
    with _sending:
        ring = _rings.get(handle)
        if ring is None or ring.half < source.size:
            if ring is not None:
                ring.close()
            size = max(RING_BYTES, 1 << (2 * source.size - 1).bit_length())
            ring = _rings[handle] = _Ring(handle, size)
        ring.send(address, source)


def read(address: int, nbytes: int, stream: Any) -> Array:
    """Return a copy of GPU memory on the host, after waiting for all work queued on the stream."""
    made = np.empty(nbytes, np.uint8)
    if nbytes:
        gpu()
        checked(cu.cuMemcpyDtoHAsync(made.ctypes.data, address, nbytes, handle_of(stream)))
        synchronize(stream)
    return made


def copy(target: int, source: int, nbytes: int, stream: Any) -> None:
    """Copy bytes within the GPU."""
    if nbytes:
        gpu()
        checked(cu.cuMemcpyDtoDAsync(target, source, nbytes, handle_of(stream)))


def clear(address: int, nbytes: int, stream: Any) -> None:
    """Set bytes of the GPU to 0."""
    if nbytes:
        gpu()
        checked(cu.cuMemsetD8Async(address, 0, nbytes, handle_of(stream)))

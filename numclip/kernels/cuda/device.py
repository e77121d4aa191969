"""numba-cuda: the one place that knows its import, its options, its streams and its faults.

Importing this module starts no driver. With ``NUMBA_ENABLE_CUDASIM=1`` kernels run as plain
Python on the memory of the host, in tiny blocks.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import warnings
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from numclip.kernels.missing import INSTALL, DeviceError

Function = TypeVar("Function", bound=Callable[..., Any])

if importlib.util.find_spec("numba_cuda") is None:
    raise DeviceError(f'device: "cuda" needs the package numba-cuda, which is missing: {INSTALL}')
if not hasattr(np, "row_stack"):  # numba-cuda 0.30 asks for it at its first compilation
    setattr(np, "row_stack", np.vstack)  # noqa: B010 - no attribute that type checkers know

import numba.cuda  # noqa: E402
from numba.core import config  # noqa: E402

SIMULATED = bool(vars(config)["ENABLE_CUDASIM"])
cuda: Any = numba.cuda
if SIMULATED:
    from numba.cuda.simulator.cudadrv.devicearray import FakeCUDAArray
    from numba.cuda.simulator.kernel import _get_kernel_context

    class _Simulator:
        """numba.cuda for kernels and what they call; the simulator mends only a kernel's module."""

        def __getattr__(self, name: str) -> Any:
            return getattr(_get_kernel_context() or numba.cuda, name)

    cuda = _Simulator()

# A power of two: the block's sums are added in a tree. Not measured on hardware yet.
THREADS = 4 if SIMULATED else 256
# Bytes a partial sum covers, and how many blocks a multiprocessor is given.
CHUNK_BYTES = 512 if SIMULATED else 1 << 17
BLOCKS_PER_MULTIPROCESSOR = 8
# In how many shares the rows of a tensor are summed, from how many rows on a sum is shared by the
# lanes of a block, and the bytes that memory is read in. Reasoned, not measured yet.
ROW_SHARES = 4 if SIMULATED else 512
LONG_GROUP = 2 if SIMULATED else 16
SECTOR = 8 if SIMULATED else 32


def kernel(function: Function) -> Function:
    """Compile `function` for the GPU at its first launch."""
    return cuda.jit(function)  # type: ignore[no-any-return]


def inline(function: Function) -> Function:
    """Compile `function` as a part of the kernels that call it."""
    if SIMULATED:
        return function
    return cuda.jit(device=True, forceinline=True)(function)  # type: ignore[no-any-return]


_blocks = 0


def require() -> None:
    """Refuse to go on where there is no GPU, and say what is missing."""
    global _blocks
    if _blocks:
        return
    if SIMULATED:
        _blocks = 3
        return
    try:
        found = cuda.is_available()
        count = cuda.get_current_device().MULTIPROCESSOR_COUNT if found else 0
    except Exception as error:  # the driver's own errors, of many types
        raise DeviceError(f'device: "cuda" failed to start: {error}; {INSTALL}') from error
    if not found:
        reason = " ".join(str(cuda.cuda_error() or "no driver or no GPU was found").split())
        raise DeviceError(
            f'device: "cuda" needs an NVIDIA GPU and its driver: {reason}; see nvidia-smi, '
            f"then {INSTALL}"
        )
    _blocks = BLOCKS_PER_MULTIPROCESSOR * count


@functools.cache
def ordinal() -> int:
    """Return the number of the GPU that this process uses: the one that is current at first."""
    return 0 if SIMULATED else int(cuda.get_current_device().id)


@functools.lru_cache(maxsize=512)
def _configured(kernel: Any, blocks: int, stream: Any) -> Any:
    """Return a kernel with its grid, made once: numba warns of every small one."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kernel[blocks, THREADS, stream]


def launch(kernel: Any, count: int, stream: Any, *arguments: Any) -> None:
    """Start a kernel whose blocks share `count` pieces of work, if any; return at once."""
    if not count:  # the driver refuses a grid of no blocks
        return
    if SIMULATED:
        kernel[min(count, _blocks), THREADS](*arguments)
    else:
        _configured(kernel, min(count, _blocks), stream)(*arguments)


def table(array: Any, stream: Any) -> Any:
    """Return a copy of a table on the GPU, as kernels take it, sent in the order of the stream.

    A copy on the default stream can still be under way when the host goes on, and streams of
    other libraries do not wait for it.
    """
    made = cuda.device_array(array.shape, array.dtype)
    update(made, array, stream)
    return made


def scratch(shape: tuple[int, ...]) -> Any:
    """Return a table of float64 on the GPU that kernels are to fill."""
    return cuda.device_array(shape, np.float64)


def update(to: Any, array: Any, stream: Any) -> None:
    """Write a table that is on the GPU, in the order of the stream."""
    to.copy_to_device(np.ascontiguousarray(array), stream=_queue(stream))


def _queue(stream: Any) -> Any:
    """Return a stream as copies take it: the default one as an object.

    With 0 a copy from the host would first wait for all that this stream still has to do.
    """
    return stream if SIMULATED or stream else cuda.default_stream()


class Room:
    """Memory of the GPU that grows to what is asked for; what was in it is lost then."""

    def __init__(self) -> None:
        self._memory: Any = None

    def address(self, nbytes: int) -> int:
        """Return the address of so many bytes, or more; aligned to 64 of them."""
        if self._memory is None or self._memory.size < nbytes:
            self._memory = allocate(2 * nbytes)
        return int(interface_of(self._memory)["data"][0])


class Tables:
    """Tables of 64-bit integers that are sent again and again, into memory that grows with them.

    Each call sends the next one; `begin` starts over. All are sent on one stream.
    """

    def __init__(self) -> None:
        self._memory: list[Any] = []
        self._used = 0

    def begin(self) -> None:
        """Let the next table be the first one again."""
        self._used = 0

    def __call__(self, array: Any, stream: Any) -> Any:
        """Return a copy of a table on the GPU, as `table` does; of an empty one, a row of zeros."""
        if not array.size:
            array = np.zeros((1, *array.shape[1:]), np.int64)
        if self._used == len(self._memory):
            self._memory.append(None)
        memory = self._memory[self._used]
        if memory is None or memory.size < array.size:
            memory = cuda.device_array(max(2 * array.size, 64), np.int64)
            self._memory[self._used] = memory
        self._used += 1
        made = memory[: array.size].reshape(*array.shape)
        update(made, array, stream)
        return made


def read_table(array: Any, stream: Any) -> Any:
    """Return a copy of a table, after what the stream still has to do."""
    copy = array.copy_to_host(stream=stream)
    synchronize(stream)
    return copy


def synchronize(stream: Any) -> None:
    """Wait for a stream; 0 is the default one, None means all there are."""
    if SIMULATED:
        return
    if stream is None:
        cuda.synchronize()
    else:
        (stream or cuda.default_stream()).synchronize()


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[Any]:
    """Do something on a stream; where it is None, after all others and before what follows.

    Streams of PyTorch and CuPy do not wait for the default one, nor it for them.
    """
    if stream is not None:
        yield stream
        return
    synchronize(None)
    yield 0
    synchronize(None)


@functools.lru_cache(maxsize=64)
def stream_at(handle: int) -> Any:
    """Return the stream of a handle, as other libraries tell it; 0 is the default one."""
    return 0 if SIMULATED or handle == 0 else cuda.external_stream(handle)


def held(stream: Any, owner: Any) -> Any:
    """Return a stream that keeps the one it is made of: CuPy destroys one that nobody holds.

    A norm can be read, and so waited for on its stream, long after.
    """
    if stream:
        stream.owner = owner
    return stream


def handle_of(stream: Any) -> int:
    """Return the handle of a stream, as other libraries take it."""
    return 0 if SIMULATED or not stream else int(stream.handle or 0)


def order(after: Any, before: Any) -> None:
    """Let a stream go on only after what another one was given; the host does not wait."""
    if not SIMULATED and handle_of(after) != handle_of(before):
        event = cuda.event(timing=False)
        event.record(before)
        event.wait(after)


_waiting: deque[tuple[Any, Callable[[], object]]] = deque()


def after_default(action: Callable[[], object]) -> None:
    """Do something after what the default stream was given; looked at when next called.

    The default stream does not wait for those that were made to wait for no other.
    """
    if SIMULATED:
        action()
        return
    event = cuda.event(timing=False)
    event.record(0)
    _waiting.append((event, action))
    while _waiting:
        first = _waiting.popleft()  # before asking: another thread, or the action, may come here
        if not first[0].query():
            _waiting.appendleft(first)
            return
        first[1]()


def allocate(nbytes: int) -> Any:
    """Return memory of the GPU, as bytes; aligned to 64 of them."""
    if SIMULATED:
        room = np.empty(nbytes + 64, np.uint8)
        return FakeCUDAArray(room[-room.ctypes.data % 64 :][:nbytes])
    return cuda.device_array(max(nbytes, 1), np.uint8)


def as_array(array: Any, shape: Any, dtype: Any, strides: Any) -> Any:
    """Return an array of ours as one of numba's, without a copy."""
    if SIMULATED:
        raw = _bytes_at(array.address, array.nbytes)._ary
        made: Any = FakeCUDAArray(np.ndarray(shape, dtype, raw, strides=strides))
        made.owner = array
        return made
    return cuda.as_cuda_array(array, sync=False)


def interface_of(array: Any) -> Any:
    """Return the description of an array of the GPU, None where it is none."""
    if SIMULATED and hasattr(array, "__cuda_ndarray__"):
        return array._ary.__array_interface__
    return getattr(array, "__cuda_array_interface__", None)


def _bytes_at(address: int, nbytes: int) -> Any:
    """Return memory of the GPU that belongs to someone else, as bytes."""
    if SIMULATED:
        buffer: Any = (ctypes.c_char * nbytes).from_address(address)
        return FakeCUDAArray(np.ndarray(nbytes, np.uint8, buffer))
    description = {"shape": (nbytes,), "typestr": "|u1", "data": (address, False), "version": 2}
    return cuda.from_cuda_array_interface(description, sync=False)


def read(address: int, nbytes: int, stream: Any) -> Any:
    """Return a copy of memory of the GPU on the host, after what the stream still has to do."""
    if not nbytes:
        return np.empty(0, np.uint8)
    return read_table(_bytes_at(address, nbytes), stream)


def write(address: int, source: Any, stream: Any) -> None:
    """Copy bytes of the host to the GPU."""
    if source.size:
        _bytes_at(address, source.size).copy_to_device(source, stream=_queue(stream))


def copy(target: int, source: int, nbytes: int, stream: Any) -> None:
    """Copy bytes within the GPU."""
    if nbytes:
        made = _bytes_at(source, nbytes)
        _bytes_at(target, nbytes).copy_to_device(made, stream=_queue(stream))


def clear(address: int, nbytes: int, stream: Any) -> None:
    """Set bytes of the GPU to 0."""
    if not nbytes:
        return
    if SIMULATED:
        write(address, np.zeros(nbytes, np.uint8), stream)
    else:
        cuda.cudadrv.driver.device_memset(_bytes_at(address, nbytes), 0, nbytes, _queue(stream))


_pinned: dict[Any, list[Any]] = {}


def read_later(array: Any, stream: Any) -> Callable[[], Any]:
    """Return what waits for a copy of a table as it is now; the copy itself begins at once."""
    if SIMULATED:
        copy = array.copy_to_host()
        return lambda: copy
    free = _pinned.setdefault((array.shape, array.dtype), [])
    pinned = free.pop() if free else cuda.pinned_array(array.shape, array.dtype)
    array.copy_to_host(pinned, stream=_queue(stream))
    event = cuda.event(timing=False)
    event.record(stream)

    def read() -> Any:
        event.synchronize()
        found = pinned.copy()
        free.append(pinned)
        return found

    return read


def is_capturing(stream: Any) -> bool:
    """Tell whether what a stream is given is only written down, for a graph."""
    if SIMULATED or not handle_of(stream):
        return False
    return bool(int(cuda.cudadrv.driver.driver.cuStreamIsCapturing(stream.handle)))

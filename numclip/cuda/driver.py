"""CUDA's driver: the GPU in use, streams and the order between them, and errors.

Everything here is a call or two of ``cuda.bindings``. A stream is its handle, an int; 0 is the
default one.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from cuda.bindings import driver as cu

from numclip.errors import INSTALL, DeviceError

BLOCKS_PER_MULTIPROCESSOR = 8
NO_TIMING = cu.CUevent_flags.CU_EVENT_DISABLE_TIMING
CAPTURING = cu.CUstreamCaptureStatus.CU_STREAM_CAPTURE_STATUS_ACTIVE
OUT_OF_MEMORY = cu.CUresult.CUDA_ERROR_OUT_OF_MEMORY
MULTIPROCESSORS = cu.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT


def checked(result: tuple[Any, ...]) -> Any:
    """Return the results of a driver call; raise DeviceError with its error's name and text."""
    if result[0]:
        name, text = (cu.cuGetErrorName(result[0])[1], cu.cuGetErrorString(result[0])[1])
        raise DeviceError(f"CUDA: {bytes(name).decode()}: {bytes(text).decode()}")
    return result[1] if len(result) == 2 else result[1:]


class _Gpu:
    """The GPU of this process, the current one at first use, and its primary context."""

    def __init__(self) -> None:
        error, device = cu.cuCtxGetDevice()
        self.ordinal = 0 if error else int(device)
        own = checked(cu.cuDeviceGet(self.ordinal))
        self.context = checked(cu.cuDevicePrimaryCtxRetain(own))
        self.address = int(self.context)
        count = checked(cu.cuDeviceGetAttribute(MULTIPROCESSORS, own))
        self.blocks, self.process = BLOCKS_PER_MULTIPROCESSOR * count, os.getpid()


_gpu: _Gpu | None = None
_starting = threading.Lock()


def _missing() -> str | None:
    """Return what is missing to use a GPU, None if nothing is."""
    try:
        checked(cu.cuInit(0))
        count = checked(cu.cuDeviceGetCount())
    except Exception as error:  # without a driver, of many types
        return " ".join(str(error).split())
    return None if count else "no GPU was found"


def _start() -> _Gpu:
    """Set up and return the GPU; where there is none, raise DeviceError on what is missing."""
    global _gpu
    with _starting:
        if _gpu is None:
            reason = _missing()
            if reason is not None:
                raise DeviceError(
                    f'device: "cuda" needs an NVIDIA GPU and its driver: {reason}; see nvidia-smi, '
                    f"then {INSTALL}"
                )
            _gpu = _Gpu()
        return _gpu


def gpu() -> _Gpu:
    """Return the GPU and make its context current in this thread, which can have none or another.

    Raise DeviceError on what is missing where there is no GPU, and in a forked process.
    """
    found = _gpu or _start()
    if int(cu.cuCtxGetCurrent()[1]) != found.address:
        if os.getpid() != found.process:
            raise DeviceError("CUDA: cannot be used in a forked process; start it by spawn")
        checked(cu.cuCtxSetCurrent(found.context))
    return found


def forked() -> bool:
    """Tell whether this process is a fork of the one that set up the GPU, and so cannot use it."""
    return _gpu is not None and os.getpid() != _gpu.process


class Stream(int):
    """A stream's handle, 0 for the default one; `owner` keeps the stream alive.

    CuPy destroys a stream that is no longer referenced, but a norm can be read, and so its stream
    waited for, long after.
    """

    owner: Any = None


def handle_of(stream: Any) -> int:
    """Return the handle of a stream as an int, 0 for None."""
    return int(stream or 0)


def is_captured(stream: Any) -> bool:
    """Tell whether a stream is captured for a graph; the default one never is."""
    handle = handle_of(stream)
    return bool(handle and checked(cu.cuStreamIsCapturing(handle)) == CAPTURING)


def synchronize(stream: Any) -> None:
    """Wait for a stream; 0 is the default one, None means all streams."""
    gpu()
    checked(cu.cuCtxSynchronize() if stream is None else cu.cuStreamSynchronize(handle_of(stream)))


@contextlib.contextmanager
def on_stream(stream: Any) -> Iterator[Any]:
    """Yield the stream to work on; for None the default one, waiting for all before and after.

    Streams of PyTorch and CuPy do not wait for the default one, nor does it for them.
    """
    if stream is not None:
        yield stream
        return
    synchronize(None)
    yield 0
    synchronize(None)


_events = threading.local()


def order(after: Any, before: Any) -> None:
    """Make stream `after` wait for the work queued on `before`; the host does not wait."""
    if handle_of(after) == handle_of(before):
        return
    gpu()
    if not hasattr(_events, "own"):  # can be reused: a queued wait is for the record at that time
        _events.own = checked(cu.cuEventCreate(NO_TIMING))
    checked(cu.cuEventRecord(_events.own, handle_of(before)))
    checked(cu.cuStreamWaitEvent(handle_of(after), _events.own, 0))


_waiting: deque[tuple[Any, Callable[[], object]]] = deque()


def after_default(action: Callable[[], object]) -> None:
    """Have this call or a later one call `action` once the default stream's queued work is done.

    The default stream does not wait for non-blocking streams.
    """
    gpu()
    event = checked(cu.cuEventCreate(NO_TIMING))
    checked(cu.cuEventRecord(event, 0))
    _waiting.append((event, action))
    while _waiting:
        first = _waiting.popleft()  # before the query: another thread, or action, may come here
        if cu.cuEventQuery(first[0])[0]:
            _waiting.appendleft(first)
            return
        checked(cu.cuEventDestroy(first[0]))
        first[1]()

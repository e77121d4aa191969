"""CUDA's driver: the GPU in use, streams and the order between them, and what errors say.

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
    """Return what a call of the driver gave, raise what it says of an error."""
    if result[0]:
        name, text = (cu.cuGetErrorName(result[0])[1], cu.cuGetErrorString(result[0])[1])
        raise DeviceError(f"CUDA: {bytes(name).decode()}: {bytes(text).decode()}")
    return result[1] if len(result) == 2 else result[1:]


class _Gpu:
    """The GPU of this process, the one that was current at first, and its primary context."""

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
    """Say what is missing for a GPU, None where nothing is."""
    try:
        checked(cu.cuInit(0))
        count = checked(cu.cuDeviceGetCount())
    except Exception as error:  # cuda.bindings' own where there is no driver, of many types
        return " ".join(str(error).split())
    return None if count else "no GPU was found"


def _start() -> _Gpu:
    """Take up the GPU; refuse where there is none, and say what is missing."""
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
    """Return the GPU, its context current in this thread: a new one has none, or another's.

    Refuses to go on where there is no GPU, and says what is missing.
    """
    found = _gpu or _start()
    if int(cu.cuCtxGetCurrent()[1]) != found.address:
        if os.getpid() != found.process:
            raise DeviceError("CUDA: cannot be used in a forked process; start it by spawn")
        checked(cu.cuCtxSetCurrent(found.context))
    return found


def forked() -> bool:
    """Tell whether this process is a fork of the one that took up the GPU, and cannot use it."""
    return _gpu is not None and os.getpid() != _gpu.process


class Stream(int):
    """A stream's handle, 0 for the default one, and what keeps the stream.

    CuPy destroys one that nobody holds, and a norm can be read, and so waited for on its stream,
    long after.
    """

    owner: Any = None


def handle_of(stream: Any) -> int:
    """Return the handle of a stream, as other libraries take it."""
    return int(stream or 0)


def is_captured(stream: Any) -> bool:
    """Tell whether what a stream is given is kept for a graph; the default one never is."""
    handle = handle_of(stream)
    return bool(handle and checked(cu.cuStreamIsCapturing(handle)) == CAPTURING)


def synchronize(stream: Any) -> None:
    """Wait for a stream; 0 is the default one, None means all there are."""
    gpu()
    checked(cu.cuCtxSynchronize() if stream is None else cu.cuStreamSynchronize(handle_of(stream)))


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


_events = threading.local()


def order(after: Any, before: Any) -> None:
    """Let a stream go on only after what another one was given; the host does not wait."""
    if handle_of(after) == handle_of(before):
        return
    gpu()
    if not hasattr(_events, "own"):  # can be recorded anew: who waits, waits for what was then
        _events.own = checked(cu.cuEventCreate(NO_TIMING))
    checked(cu.cuEventRecord(_events.own, handle_of(before)))
    checked(cu.cuStreamWaitEvent(handle_of(after), _events.own, 0))


_waiting: deque[tuple[Any, Callable[[], object]]] = deque()


def after_default(action: Callable[[], object]) -> None:
    """Do something after what the default stream was given; looked at when next called.

    The default stream does not wait for those that were made to wait for no other.
    """
    gpu()
    event = checked(cu.cuEventCreate(NO_TIMING))
    checked(cu.cuEventRecord(event, 0))
    _waiting.append((event, action))
    while _waiting:
        first = _waiting.popleft()  # before asking: another thread, or the action, may come here
        if cu.cuEventQuery(first[0])[0]:
            _waiting.appendleft(first)
            return
        checked(cu.cuEventDestroy(first[0]))
        first[1]()

"""DLPack: the facts of a GPU array from its capsule, by the structs of dlpack.h.

The `StridedMemoryView` of cuda.core 1.2 is no replacement. It accepts structs of another major
version, does not report copies, writes to which are lost, nor names the array in errors; it frees
memory at once; and of ``__cuda_array_interface__`` it accepts version 3 alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
import weakref
from typing import Any, NamedTuple

import numpy as np

from numclip.cuda import driver
from numclip.libraries import bfloat16

VERSION = 1, 0
LEGACY_STREAM = 1  # the default stream, as DLPack names it
READ_ONLY, COPIED = 1, 2  # flags
INT, UINT, FLOAT, BFLOAT, COMPLEX = 0, 1, 2, 4, 5  # codes of dtypes
KINDS = {INT: "int", UINT: "uint", FLOAT: "float", COMPLEX: "complex"}


class _Tensor(NamedTuple):
    """DLTensor."""

    data: int
    device_type: int
    device: int
    ndim: int
    code: int
    bits: int
    lanes: int
    shape: int
    strides: int
    offset: int


TENSOR = "QiiiBBHQQQ"
HEAD = "IIQQQ"  # of DLManagedTensorVersioned, before the above: version, context, deleter, flags
VERSIONED, OLDER = b"dltensor_versioned", b"dltensor"
_USED = {name: b"used_" + name for name in (VERSIONED, OLDER)}  # capsules keep their addresses
_deleter = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_capsule, _name = ctypes.py_object, ctypes.c_char_p
_is_valid = ctypes.PYFUNCTYPE(ctypes.c_int, _capsule, _name)(
    ("PyCapsule_IsValid", ctypes.pythonapi)
)
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, _capsule, _name)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)
_rename = ctypes.PYFUNCTYPE(ctypes.c_int, _capsule, _name)(("PyCapsule_SetName", ctypes.pythonapi))


class Lease:
    """A hold on an array's memory, which its library does not free while this object exists.

    It lasts until work then queued on the default stream and on `streams` is done: the library's
    deleter is called when this or a later lease ends.
    """

    def __init__(self, pointer: int, deleter: int | None) -> None:
        self.streams: list[Any] = []
        if deleter:
            give_back = weakref.finalize(self, _give_back, deleter, pointer, self.streams)
            give_back.atexit = False


def _give_back(deleter: int, pointer: int, streams: list[Any]) -> None:
    for stream in streams:  # the default stream does not wait for non-blocking ones by itself
        driver.order(0, stream)
    driver.after_default(lambda: _deleter(deleter)(pointer))


class Exported(NamedTuple):
    """The facts of an array: strides in bytes, None in C order; `native` None if NumPy lacks it.

    `lease` is to be held while the array is used.
    """

    native: np.dtype[Any] | None
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    read_only: bool = False
    gpu: int | None = None
    lease: Lease | None = None


def read(name: str, array: Any) -> Exported:
    """Return an array's facts; the default stream, not the host, waits for the array's library."""
    capsule = _capsule_of(array)
    kind = next((kind for kind in _USED if _is_valid(capsule, kind)), None)
    if kind is None:
        raise TypeError(f"{name}: expected a DLPack capsule, got {capsule!r}")
    pointer = _pointer_of(capsule, kind)
    _rename(capsule, _USED[kind])
    if kind == VERSIONED:
        major, minor, _, deleter, flags = _unpacked(HEAD, pointer)
        address = pointer + struct.calcsize(HEAD)
    else:  # the older struct has no flags: treat the array as read-only
        (major, minor), flags, address = VERSION, READ_ONLY, pointer
        deleter = _unpacked(TENSOR + "QQ", pointer)[-1]
    lease = Lease(pointer, deleter)
    if major != VERSION[0]:
        got = f"{major}.{minor}"
        raise TypeError(f"{name}: expected DLPack of version {VERSION[0]}, got {got}")
    tensor = _Tensor(*_unpacked(TENSOR, address))
    native = _native(name, tensor)
    return Exported(
        native,
        _numbers(tensor.shape, tensor.ndim),
        _strides(tensor, native),
        tensor.data + tensor.offset,
        bool(flags & (READ_ONLY | COPIED)),  # writes to a copy are lost
        tensor.device,
        lease,
    )


def _unpacked(form: str, address: int) -> tuple[Any, ...]:
    return struct.unpack(form, ctypes.string_at(address, struct.calcsize(form)))


def _numbers(address: int, count: int) -> tuple[int, ...]:
    return tuple((ctypes.c_int64 * count).from_address(address)) if count else ()


def _capsule_of(array: Any) -> Any:
    """Return an array's capsule, of the newest version that both sides know."""
    with contextlib.suppress(TypeError):  # the older protocol takes the stream alone
        return array.__dlpack__(stream=LEGACY_STREAM, max_version=VERSION)
    return array.__dlpack__(stream=LEGACY_STREAM)


def _native(name: str, tensor: _Tensor) -> np.dtype[Any] | None:
    """Return the dtype of a tensor, None where NumPy has no such dtype."""
    if tensor.lanes != 1:
        return None
    if (tensor.code, tensor.bits) == (BFLOAT, 16):
        return bfloat16(name)
    with contextlib.suppress(TypeError):
        return np.dtype(f"{KINDS.get(tensor.code)}{tensor.bits}")
    return None


def _strides(tensor: _Tensor, native: np.dtype[Any] | None) -> tuple[int, ...] | None:
    if not tensor.strides or native is None:
        return None
    return tuple(step * native.itemsize for step in _numbers(tensor.strides, tensor.ndim))

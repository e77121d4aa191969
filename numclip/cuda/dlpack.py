"""DLPack: what libraries tell of an array on the GPU by a capsule, in the structs of dlpack.h."""

from __future__ import annotations

import contextlib
import ctypes
import weakref
from typing import Any, NamedTuple

import numpy as np

from numclip.cuda import device
from numclip.libraries import bfloat16

VERSION = 1, 0
LEGACY_STREAM = 1  # the default stream, as DLPack names it
READ_ONLY, COPIED = 1, 2  # flags
INT, UINT, FLOAT, BFLOAT, COMPLEX = 0, 1, 2, 4, 5  # codes of dtypes
KINDS = {INT: "int", UINT: "uint", FLOAT: "float", COMPLEX: "complex"}


class _Tensor(ctypes.Structure):
    """DLTensor."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


class _Managed(ctypes.Structure):
    """DLManagedTensor, of the versions before 1, which cannot tell what may be written."""

    _fields_ = (
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )
    flags = READ_ONLY


class _Versioned(ctypes.Structure):
    """DLManagedTensorVersioned."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    )


_STRUCTS = {b"dltensor_versioned": _Versioned, b"dltensor": _Managed}
_USED = {name: b"used_" + name for name in _STRUCTS}  # capsules keep the addresses of names
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
    """The memory of an array, which its library keeps as long as this object is there.

    And for what the default stream, and `streams` beside it, still have to do with it. The
    library is told at the next time that some memory is given back.
    """

    def __init__(self, pointer: int, deleter: int | None) -> None:
        self.streams: list[Any] = []
        if deleter:
            give_back = weakref.finalize(self, _give_back, deleter, pointer, self.streams)
            give_back.atexit = False


def _give_back(deleter: int, pointer: int, streams: list[Any]) -> None:
    for stream in streams:  # the default one waits for none that was made to wait for no other
        device.order(0, stream)
    device.after_default(lambda: _deleter(deleter)(pointer))


class Told(NamedTuple):
    """What an array tells of itself; strides in bytes, None in C order, `native` None if unknown.

    `lease` is to be held while the array is used.
    """

    native: np.dtype[Any] | None
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    read_only: bool = False
    gpu: int | None = None
    lease: Lease | None = None


def read(name: str, array: Any) -> Told:
    """Return what an array tells of itself, its library's work done before the default stream's.

    The host does not wait for that.
    """
    capsule = _capsule_of(array)
    kind = next((kind for kind in _STRUCTS if _is_valid(capsule, kind)), None)
    if kind is None:
        raise TypeError(f"{name}: expected a DLPack capsule, got {capsule!r}")
    pointer = _pointer_of(capsule, kind)
    managed: Any = _STRUCTS[kind].from_address(pointer)
    _rename(capsule, _USED[kind])
    lease = Lease(pointer, managed.deleter)
    if kind == b"dltensor_versioned" and managed.major != VERSION[0]:
        version = f"{managed.major}.{managed.minor}"
        raise TypeError(f"{name}: expected DLPack of version {VERSION[0]}, got {version}")
    tensor = managed.tensor
    native = _native(name, tensor)
    return Told(
        native,
        tuple(tensor.shape[: tensor.ndim]),
        _strides(tensor, native),
        (tensor.data or 0) + tensor.byte_offset,
        bool(managed.flags & (READ_ONLY | COPIED)),  # what is written to a copy is lost
        tensor.device_id,
        lease,
    )


def _capsule_of(array: Any) -> Any:
    """Return an array's capsule, of the newest version that both sides know."""
    with contextlib.suppress(TypeError):  # the older protocol knows the stream alone
        return array.__dlpack__(stream=LEGACY_STREAM, max_version=VERSION)
    return array.__dlpack__(stream=LEGACY_STREAM)


def _native(name: str, tensor: Any) -> np.dtype[Any] | None:
    """Return the dtype, None where NumPy has no such."""
    if tensor.lanes != 1:
        return None
    if (tensor.code, tensor.bits) == (BFLOAT, 16):
        return bfloat16(name)
    with contextlib.suppress(TypeError):
        return np.dtype(f"{KINDS.get(tensor.code)}{tensor.bits}")
    return None


def _strides(tensor: Any, native: np.dtype[Any] | None) -> tuple[int, ...] | None:
    if not tensor.strides or native is None:
        return None
    return tuple(step * native.itemsize for step in tensor.strides[: tensor.ndim])

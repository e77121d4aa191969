"""Arrays of other libraries on the GPU, as far as numclip asks them."""

from __future__ import annotations

import ctypes
import gc
import struct
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from numclip.cuda import driver
from tests.cuda.devices import fetch, send

CODES = {"i": 0, "u": 1, "f": 2, "V": 4, "c": 5}
TENSOR = "QiiiBBHQQQ"  # of dlpack.h: DLTensor
new_capsule = ctypes.PYFUNCTYPE(
    ctypes.py_object, ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p
)(("PyCapsule_New", ctypes.pythonapi))
NAMES = {True: b"dltensor_versioned", False: b"dltensor"}


class Tensor:
    """What numclip asks of PyTorch's tensors."""

    __module__ = "torch"
    is_cuda = True

    def __init__(self, array: np.ndarray) -> None:
        self.sent, self.shape, self.device = send(array), array.shape, "cuda"
        self.dtype = f"torch.{array.dtype.name}"
        self.steps = tuple(step // array.itemsize for step in array.strides)

    def data_ptr(self) -> int:
        return self.sent.address

    def stride(self) -> tuple[int, ...]:
        return self.steps

    def is_conj(self) -> bool:
        return False

    is_neg = is_conj

    def get_device(self) -> int:
        return 0

    def is_contiguous(self) -> bool:
        return self.sent._strides is None


@pytest.fixture
def torch(monkeypatch):
    """A module that stands for PyTorch."""
    stream = SimpleNamespace(cuda_stream=0)
    cuda = SimpleNamespace(current_stream=lambda _: stream)
    like = lambda tensor: Tensor(fetch(tensor.sent))  # noqa: E731
    nn = SimpleNamespace(Parameter=Tensor)
    made = SimpleNamespace(cuda=cuda, Tensor=Tensor, nn=nn, empty_like=like)
    monkeypatch.setitem(sys.modules, "torch", made)
    return made


class Foreign:
    """What another library's array tells of itself."""

    def __init__(self, array: np.ndarray, sent: Any = None, **other: Any) -> None:
        sent = send(np.ascontiguousarray(array)) if sent is None else sent
        self.kept, self.dtype = sent, array.dtype
        interface = {**sent.__cuda_array_interface__, "strides": array.strides, **other}
        self.__cuda_array_interface__ = interface


PRODUCERS: list[Any] = []


class Producer:
    """An array of a library that speaks DLPack alone, of the newer protocol or the older one."""

    def __init__(self, array: np.ndarray, *, versioned: bool = True, **told: Any) -> None:
        self.sent, self.array, self.versioned, self.told = send(array), array, versioned, told
        self.asked: list[dict[str, Any]] = []
        self.returned: list[int] = []
        self.kept: list[Any] = []
        PRODUCERS.append(self)  # whose deleters are called when the GPU is done

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, self.told.get("gpu", 0)

    def tensor(self) -> bytes:
        dtype = self.array.dtype
        steps = [step // dtype.itemsize for step in self.array.strides]
        both = (ctypes.c_int64 * (2 * len(steps)))(*self.array.shape, *steps)
        self.kept.append(both)
        shape, offset = ctypes.addressof(both), self.told.get("offset", 0)
        strides = shape + 8 * len(steps) if self.told.get("strides", True) else 0
        code = self.told.get("code", CODES[dtype.kind])
        kind = code, self.told.get("bits", 8 * dtype.itemsize), self.told.get("lanes", 1)
        place = self.sent.address - offset, 2, self.told.get("gpu", 0), len(steps)
        return struct.pack(TENSOR, *place, *kind, shape, strides, offset)

    def __dlpack__(self, *, stream: Any, **newer: Any) -> Any:
        if newer and not self.versioned:
            raise TypeError("__dlpack__() got an unexpected keyword argument 'max_version'")
        self.asked.append({"stream": stream, **newer})
        back = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(self.returned.append)
        deleter = ctypes.cast(back, ctypes.c_void_p).value
        if self.versioned:
            version = self.told.get("major", 1), 0
            head = struct.pack("IIQQQ", *version, 0, deleter, self.told.get("flags", 0))
            content = head + self.tensor()
        else:
            content = self.tensor() + struct.pack("QQ", 0, deleter)
        managed = ctypes.create_string_buffer(content, len(content))
        self.kept += [back, managed]
        self.pointer = ctypes.addressof(managed)
        return new_capsule(self.pointer, NAMES[self.versioned], None)


def settle() -> None:
    """Let memory that is no longer used be given back."""
    gc.collect()
    driver.synchronize(None)
    driver.after_default(lambda: None)


@pytest.fixture(autouse=True)
def settled() -> Iterator[None]:
    """Have memory given back before its producers go."""
    yield
    settle()
    PRODUCERS.clear()

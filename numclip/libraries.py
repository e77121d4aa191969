"""Whose an array is, and where: the one place that asks. Imports nothing of CUDA."""

from __future__ import annotations

import functools
import sys
from typing import Any

import numpy as np

from numclip.dtypes import Array

CUDA = 2  # DLPack's code of the device


@functools.cache
def library(kind: type) -> str:
    """Return the package that a type of arrays comes from: "torch", for its subclasses too."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return "torch" if "torch" in packages else packages[0]


def on_device(array: Any) -> bool:
    """Tell whether an array lies on a GPU."""
    if type(array) is np.ndarray or isinstance(array, (np.ndarray, np.generic)):
        return False
    # That of PyTorch, whose other attributes can raise, and of IndexedSlices.
    is_cuda = getattr(array, "is_cuda", None)
    if isinstance(is_cuda, bool):
        return is_cuda
    if hasattr(array, "__cuda_array_interface__") or hasattr(array, "__cuda_ndarray__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == CUDA


def is_array(value: Any) -> bool:
    """Tell whether a value is one array, of NumPy or of another library."""
    own = isinstance(value, (np.ndarray, np.generic))
    return own or hasattr(value, "__dlpack__") or hasattr(value, "__cuda_array_interface__")


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def bfloat16(name: str) -> np.dtype[Any]:
    """Return NumPy's dtype for bfloat16, which another package makes."""
    try:
        return _bfloat16()
    except ImportError:
        raise TypeError(
            f"{name}: expected ml_dtypes for an array of bfloat16, which NumPy knows by it, got "
            "no such package; pip install ml_dtypes"
        ) from None


def refuse_lazy(name: str, tensor: Any) -> None:
    """Refuse a tensor of PyTorch whose memory does not hold its values."""
    if tensor.is_conj() or tensor.is_neg():
        raise ValueError(
            f"{name}: expected a tensor whose memory has its values, got one to be conjugated "
            "or negated when read; pass tensor.resolve_conj().resolve_neg()"
        )


def as_numpy(name: str, array: Any) -> Array | None:
    """Return another library's array of the host's memory as NumPy's; None if it has no DLPack.

    Memory is shared. What NumPy does not take that way, as bfloat16 of JAX, is read through
    ``__array__``, which can copy: what is returned then is read-only.
    """
    if isinstance(array, np.ndarray) or not hasattr(array, "__dlpack__"):
        return None
    if library(array.__class__) == "torch":
        return _tensor_as_numpy(name, array)
    where = getattr(array, "__dlpack_device__", None)  # what JAX traces has no memory
    if where is None:
        return None
    if int(where()[0]) == CUDA:
        raise elsewhere(name, array)
    try:
        return np.from_dlpack(array)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        if not hasattr(array, "__array__"):
            raise _unreadable(name, array, error) from error
    read = np.asarray(array).view()
    read.flags.writeable = False
    return read


def to_numpy(name: str, value: Any) -> Array:
    """Return an array of any library, or what `numpy.asarray` takes, as NumPy's."""
    found = as_numpy(name, value)
    return np.asarray(value) if found is None else found


def _tensor_as_numpy(name: str, tensor: Any) -> Array:
    """Return a tensor of PyTorch as an array that shares its memory, with or without a graph."""
    torch: Any = sys.modules["torch"]
    is_bfloat16 = tensor.dtype == torch.bfloat16
    plain = tensor.detach() if tensor.requires_grad else tensor
    try:
        found: Array = (plain.view(torch.int16) if is_bfloat16 else plain).numpy()
    except (RuntimeError, TypeError) as error:
        _refuse_tensor(name, tensor)
        raise _unreadable(name, tensor, error) from error
    return found.view(bfloat16(name)) if is_bfloat16 else found


def _refuse_tensor(name: str, tensor: Any) -> None:
    """Say why NumPy cannot view a tensor, where that is known."""
    if tensor.is_cuda:
        raise elsewhere(name, tensor)
    if str(tensor.layout).startswith("torch.sparse"):
        raise TypeError(
            f"{name}: expected a dense tensor or IndexedSlices, got {tensor.layout}; pass "
            "IndexedSlices(t.values(), t.indices()[0], t.shape) of t = tensor.coalesce()"
        )
    refuse_lazy(name, tensor)


def elsewhere(name: str, array: Any) -> TypeError:
    """Return the error for an array on the GPU where one of the host's memory is wanted."""
    return TypeError(
        f"{name}: expected an array or IndexedSlices in the host's memory, got "
        f"{type(array).__name__} on the GPU; copy it to the host, or pass arrays of the GPU alone"
    )


def _unreadable(name: str, array: Any, error: Exception) -> TypeError:
    kind = type(array).__name__
    return TypeError(f"{name}: expected an array that NumPy can view, got {kind}: {error}")

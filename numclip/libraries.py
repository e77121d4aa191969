"""The library and the device of an array: only found out here. Imports nothing of CUDA."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array

CUDA = 2  # DLPack's code of the device
REFUSALS = AttributeError, BufferError, LookupError, RuntimeError, TypeError, ValueError
"""The errors that objects of other libraries raise where they cannot be read."""


def attribute(value: Any, name: str) -> Any:
    """Return an attribute of a user's object, or None; None for any attribute of a dict."""
    if isinstance(value, dict):
        return None
    try:
        return getattr(value, name, None)
    except REFUSALS:
        return None


@functools.cache
def library(kind: type) -> str:
    """Return the package that a type of arrays comes from: "torch", for its subclasses too."""
    packages = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return "torch" if "torch" in packages else packages[0]


def on_device(array: Any) -> bool:
    """Tell whether an array lies on a GPU."""
    if type(array) is np.ndarray or isinstance(array, (np.ndarray, np.generic)):
        return False
    # Tensors of PyTorch, whose other attributes can raise, and IndexedSlices have this one.
    is_cuda = attribute(array, "is_cuda")
    if isinstance(is_cuda, bool):
        return is_cuda
    interfaces = "__cuda_array_interface__", "__cuda_ndarray__"
    if any(attribute(array, name) is not None for name in interfaces):
        return True
    device = attribute(array, "__dlpack_device__")
    try:
        return device is not None and int(device()[0]) == CUDA
    except REFUSALS:
        return False


def is_array(value: Any) -> bool:
    """Tell whether a value is one array, of NumPy or of another library."""
    if isinstance(value, (np.ndarray, np.generic)):
        return True
    interfaces = "__dlpack__", "__cuda_array_interface__"
    return any(attribute(value, name) is not None for name in interfaces)


@functools.cache
def _bfloat16() -> np.dtype[Any]:
    import ml_dtypes

    found: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
    return found


def bfloat16(name: str) -> np.dtype[Any]:
    """Return the NumPy dtype for bfloat16, which ml_dtypes provides."""
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
    """Return another library's host array as a NumPy array; None if it does not support DLPack.

    Memory is shared. An array that NumPy cannot import so, such as JAX's bfloat16, is read through
    ``__array__``, which can copy: the result is then read-only.
    """
    if isinstance(array, np.ndarray) or attribute(array, "__dlpack__") is None:
        return None
    if library(array.__class__) == "torch":
        return _tensor_as_numpy(name, array)
    if attribute(array, "__dlpack_device__") is None:  # a traced array of JAX has no memory
        return None
    if on_device(array):
        raise elsewhere(name, array)
    try:
        return np.from_dlpack(array)
    except REFUSALS as error:
        if attribute(array, "__array__") is None:
            raise _unreadable(name, array, error) from error
    read = _converted(name, array).view()
    read.flags.writeable = False
    return read


def to_numpy(name: str, value: Any) -> Array:
    """Return an array of any library, or any argument of `numpy.asarray`, as a NumPy array."""
    found = as_numpy(name, value)
    return _converted(name, value) if found is None else found


def _converted(name: str, value: Any) -> Array:
    """Return `numpy.asarray` of a value; raise a TypeError that names the argument if it fails."""
    try:
        return np.asarray(value)
    except REFUSALS as error:
        raise _unreadable(name, value, error) from error


def _tensor_as_numpy(name: str, tensor: Any) -> Array:
    """Return a tensor of PyTorch as an array that shares its memory, with or without a graph."""
    torch: Any = sys.modules["torch"]
    is_bfloat16 = tensor.dtype == torch.bfloat16
    detached = tensor.detach() if tensor.requires_grad else tensor
    try:
        found: Array = (detached.view(torch.int16) if is_bfloat16 else detached).numpy()
    except (RuntimeError, TypeError) as error:
        _refuse_tensor(name, tensor)
        raise _unreadable(name, tensor, error) from error
    return found.view(bfloat16(name)) if is_bfloat16 else found


def _refuse_tensor(name: str, tensor: Any) -> None:
    """Raise the error that says why NumPy cannot view a tensor, if the reason is known."""
    if tensor.is_cuda:
        raise elsewhere(name, tensor)
    if str(tensor.layout).startswith("torch.sparse"):
        raise _of_layout(name, tensor)
    refuse_lazy(name, tensor)


def _of_layout(name: str, tensor: Any) -> TypeError:
    return TypeError(
        f"{name}: expected a dense tensor, got one of layout {tensor.layout}; pass "
        "tensor.to_dense()"
    )


class SparseParts(NamedTuple):
    """The parts of a sparse gradient; its first `axes` axes make axis 0 of `dense_shape`."""

    values: Any
    indices: Any
    dense_shape: tuple[int, ...]
    axes: int


def sparse_parts(name: str, value: Any) -> SparseParts | None:
    """Return the parts of another library's sparse gradient; None for other objects.

    It is a sparse tensor of PyTorch, or has the attributes of ``tf.IndexedSlices`` or
    ``tf.SparseTensor``. Indices of several axes become those of one: the axes are flattened.
    """
    if isinstance(value, np.ndarray):
        return None
    if library(value.__class__) == "torch":
        return _parts_of_tensor(name, value)
    values, indices = attribute(value, "values"), attribute(value, "indices")
    if values is None or indices is None or not hasattr(value, "dense_shape"):
        return None
    if value.dense_shape is None:
        raise TypeError(
            f"{name}: expected slices with a dense_shape, got None; pass "
            "numclip.IndexedSlices(g.values, g.indices, shape)"
        )
    indices = to_numpy(f"{name}.indices", indices)
    shape = tuple(map(int, value.dense_shape))
    return _flattened(values, indices.T if indices.ndim == 2 else [indices], shape)


def _parts_of_tensor(name: str, tensor: Any) -> SparseParts | None:
    layout = str(attribute(tensor, "layout"))
    if not layout.startswith("torch.sparse"):
        return None
    detached = tensor.detach()
    if layout == "torch.sparse_coo" and detached.sparse_dim():
        return _flattened(detached._values(), detached._indices(), tuple(detached.shape))
    if layout not in ("torch.sparse_csr", "torch.sparse_csc") or detached.values().ndim != 1:
        raise _of_layout(name, tensor)
    by_row = layout.endswith("csr")
    starts = detached.crow_indices() if by_row else detached.ccol_indices()
    inner = detached.col_indices() if by_row else detached.row_indices()
    lengths = starts[1:] - starts[:-1]
    outer = (lengths.new_ones(len(lengths)).cumsum(0) - 1).repeat_interleave(lengths)
    both = [outer, inner] if by_row else [inner, outer]
    return _flattened(detached.values(), both, tuple(detached.shape))


def _flattened(values: Any, indices: Any, shape: tuple[int, ...]) -> SparseParts:
    """Return the parts, with an array of indices for each of the first axes flattened to one."""
    axes, flat = len(indices), indices[0]
    for length, more in zip(shape[1:axes], indices[1:], strict=True):
        flat = flat * length + more
    return SparseParts(values, flat, (math.prod(shape[:axes]), *shape[axes:]), axes)


def is_parameter(value: Any) -> bool:
    """Tell whether a tensor is a parameter of a model, which has its gradient in `.grad`."""
    if type(value) is np.ndarray or library(value.__class__) != "torch":
        return False
    return bool(attribute(value, "requires_grad") and attribute(value, "is_leaf"))


def refuse_parameter(name: str, value: Any) -> None:
    """Refuse to clip a parameter in place of its gradient."""
    if is_parameter(value):
        raise TypeError(
            f"{name}: expected a gradient, got a parameter (a leaf tensor that requires grad); "
            "pass its .grad, or its .detach() to clip the parameter itself"
        )


def note_writing(items: Iterable[Any]) -> None:
    """Increment the versions of written tensors: PyTorch's backward pass checks those it saved."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "autograd"):
        return
    tensors = [item for item in items if isinstance(item, torch.Tensor)]
    written = [tensor for tensor in tensors if not tensor.is_inference()]
    if written:
        torch.autograd.graph.increment_version(written)


def elsewhere(name: str, array: Any) -> TypeError:
    """Return the error for an array on the GPU where one of the host's memory is wanted."""
    return TypeError(
        f"{name}: expected an array or IndexedSlices in the host's memory, got "
        f"{type(array).__name__} on the GPU; copy it to the host, or pass arrays of the GPU alone"
    )


def _unreadable(name: str, array: Any, error: Exception) -> TypeError:
    kind, reason = type(array).__name__, str(error) or type(error).__name__
    return TypeError(f"{name}: expected an array that NumPy can view, got {kind}: {reason}")

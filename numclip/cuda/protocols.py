"""The facts of GPU arrays: by PyTorch's methods, ``__cuda_array_interface__``, or DLPack."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np

from numclip.cuda import dlpack, driver
from numclip.cuda.dlpack import Exported
from numclip.dtypes import NAMES, lookup
from numclip.errors import expected
from numclip.facts import Facts
from numclip.libraries import bfloat16, library, refuse_lazy
from numclip.memory import is_c_order


def facts_of(name: str, array: Any) -> Facts:
    """Return the facts of an array on the GPU; raise an error if it cannot be used."""
    native, shape, strides, address, read_only, _, lease = exported(name, array)
    if native is None:
        unknown = getattr(array, "dtype", type(array).__name__)
        raise TypeError(expected(name, f"an array of {NAMES}", unknown))
    if strides is not None and is_c_order(shape, strides, native.itemsize):
        strides = None
    row = lookup(native)
    if row is None:  # no gradient's dtype: callers refuse or convert it
        return Facts(native, shape, strides, address, False, array, "", lease)
    if not address and 0 not in shape:
        got = f"{type(array).__name__} at address 0; pass its local part"
        raise ValueError(expected(name, "an array with memory on the GPU", got))
    if any(step % row.storage.itemsize for step in (address, *(strides or ()))):
        got = f"address {address:#x}, strides {strides}"
        raise ValueError(expected(name, "an aligned CUDA array", got))
    return Facts(native, shape, strides, address, not read_only, array, "", lease)


def exported(name: str, array: Any) -> Exported:
    """Return the facts of an array; raise ValueError if they name a GPU that is not in use."""
    if library_of(array) == "torch":
        found = _tensor(name, array)
    else:
        found = (None if _prefers_dlpack(array) else _interface(array)) or dlpack.read(name, array)
    own = driver.gpu().ordinal
    if found.gpu is not None and found.gpu != own:
        raise ValueError(
            f"{name}: expected an array on GPU {own}, got one on GPU {found.gpu}; a "
            "process uses one GPU, which CUDA_VISIBLE_DEVICES or torch.cuda.set_device chooses"
        )
    return found


def library_of(array: Any) -> str:
    """Return the name of the package that defines an array's class."""
    return library(array.__class__)


def _prefers_dlpack(array: Any) -> bool:
    """Tell whether to read an array by DLPack, which alone waits for its library's work.

    JAX's ``__cuda_array_interface__`` names no stream, and does not wait.
    """
    known = library_of(array) in ("cupy", "numba", "numclip")
    return not known and hasattr(array, "__dlpack__") and hasattr(array, "__dlpack_device__")


def _tensor(name: str, array: Any) -> Exported:
    """Return a PyTorch tensor's facts by its methods: its interface fails if it requires grad."""
    refuse_lazy(name, array)
    native = _torch_dtype(array.dtype)
    strides = None if array.is_contiguous() else array.stride()
    if strides is not None and native is not None:
        strides = tuple(step * native.itemsize for step in strides)
    shape, address, gpu = tuple(array.shape), array.data_ptr(), array.get_device()
    return Exported(native, shape, strides, address, gpu=gpu)


@functools.cache
def _torch_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Return a dtype of PyTorch's as NumPy's, None where NumPy has no such dtype."""
    name = str(dtype).removeprefix("torch.")
    try:
        return bfloat16("dtype") if name == "bfloat16" else np.dtype(name)
    except TypeError:
        return None


def _interface(array: Any) -> Exported | None:
    """Return the facts in ``__cuda_array_interface__``, None where the array has none."""
    interface = getattr(array, "__cuda_array_interface__", None)
    if interface is None:
        return None
    address, read_only = interface["data"]
    native, shape = _native(interface, array), tuple(interface["shape"])
    gpu = array.device.id if library_of(array) == "cupy" else None
    return Exported(native, shape, interface.get("strides"), address or 0, bool(read_only), gpu)


def _native(interface: Any, array: Any) -> np.dtype[Any]:
    """Return an interface's dtype; bfloat16 is two bytes there, and recognised by its name."""
    if interface["typestr"] == "<V2" and str(getattr(array, "dtype", "")).endswith("bfloat16"):
        return bfloat16("dtype")
    return np.dtype(str(interface["typestr"]))

"""Arrays in the host's memory: their facts, and new arrays."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip import libraries
from numclip.dtypes import Array, lookup
from numclip.errors import expected
from numclip.facts import Facts

ALIGNMENT = 64  # a cache line, and the widest vector


def facts_of(name: str, array: Any) -> Facts:
    """Return the facts of an array of NumPy, or of a library that shares its memory with it."""
    values = array if type(array) is np.ndarray else as_array(name, array)
    dtype, swapped, writable = values.dtype, "", values.flags.writeable
    if not dtype.isnative and dtype.kind in "fc" and lookup(dtype.newbyteorder("=")):
        swapped = dtype.str
        values = values.astype(dtype.newbyteorder("="), order="C")
    strides = None if values.flags.c_contiguous else values.strides
    address = values.__array_interface__["data"][0]
    return Facts(values.dtype, values.shape, strides, address, writable, values, swapped)


def as_array(name: str, values: Any) -> Array:
    """Return a subclass, a NumPy scalar or another library's array as an ndarray.

    The memory is shared. Masked arrays are refused.
    """
    if isinstance(values, np.ma.MaskedArray):
        advice = "a masked array; fill it first with .filled(0)"
        raise TypeError(expected(name, "an array", advice))
    if isinstance(values, (np.ndarray, np.floating, np.complexfloating)) or (
        isinstance(values, np.generic) and lookup(values.dtype)  # bfloat16
    ):
        return np.asarray(values)
    found = libraries.as_numpy(name, values)
    if found is None:
        kind = f"{type(values).__name__}{_advice(values)}"
        raise TypeError(expected(name, "an array or IndexedSlices", kind))
    return found


def _advice(values: Any) -> str:
    """Name the call that makes a gradient of `values`, if there is one, for a message."""
    if hasattr(values, "tocsr"):
        return "; convert it with numclip.IndexedSlices.from_scipy"
    try:
        dtype = np.asarray(values).dtype
    except libraries.REFUSALS:
        return ""
    if lookup(dtype):
        return "; convert it with numpy.asarray"
    return "; convert it with numpy.asarray(..., float)" if dtype.kind in "iub" else ""


def empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a new array of zeros in C order whose address is a multiple of 64."""
    nbytes = math.prod(shape) * dtype.itemsize
    raw = np.zeros(nbytes + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + nbytes].view(dtype).reshape(shape)


def new_like(like: Facts) -> Array:
    """Return a new array in the memory order of another one if that is dense, else in C order."""
    return np.empty_like(like.array, order="K" if like.dense else "C", subok=False)


def new_of_shape(like: Facts, shape: tuple[int, ...]) -> Array:
    """Return a new array in C order of the dtype of another one."""
    return np.empty(shape, like.native)


def share_no_memory(arrays: Sequence[Any]) -> bool:
    """Tell whether arrays share no memory with one another; False if that is not certain."""
    owners = [type(array) is np.ndarray and array.flags.owndata for array in arrays]
    if all(owners) and len({*map(id, arrays)}) == len(arrays):
        return True
    if not all(type(array) is np.ndarray and array.flags.forc for array in arrays):
        return False
    begins = [(array.__array_interface__["data"][0], array.nbytes) for array in arrays]
    begins.sort()
    return all(a + size <= b for (a, size), (b, _) in itertools.pairwise(begins))

"""Copies in the host's memory of what lies on the GPU; making one waits for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda.entries import DeviceEntry, describe, is_c_order
from numclip.cuda.protocols import told
from numclip.cuda.streams import current_stream, stream_of
from numclip.dtypes import Array
from numclip.inputs import Entry
from numclip.kernels.cuda import device
from numclip.placement import on_device
from numclip.slices import IndexedSlices


def host_copy(entry: DeviceEntry, stream: Any = 0) -> Array:
    """Return a copy of an array in the host's memory."""
    begin, end = entry.extent
    memory = device.read(begin, end - begin, stream)
    offset, strides = entry.address - begin, entry.strides
    return np.ndarray(entry.shape, entry.native, memory, offset, strides)


def on_host(name: str, array: Any) -> Any:
    """Return an array on the GPU as a copy in the host's memory, any other as it is."""
    if not on_device(array):
        return array
    entry = describe(name, name, array)
    return host_copy(entry, stream_of([entry]))


def host_entry(entry: DeviceEntry, stream: Any) -> Entry:
    """Return the description of a copy in the host's memory."""
    copy: Any = host_copy(entry, stream)
    if entry.slices is not None:
        copy = IndexedSlices(copy, entry.slices.indices, entry.slices.dense_shape)
    return inputs.entry(entry.name, entry.key, copy)


def host_indices(indices: Any) -> Array:
    """Return a copy of a 1-d CUDA array in the host's memory, after waiting for it."""
    found = told("indices", indices)
    native, shape, strides = found.native, found.shape, found.strides
    if native is None or native.hasobject:
        raise TypeError(f"indices: expected integers, got {indices.dtype}")
    if len(shape) != 1 or not is_c_order(shape, strides or (native.itemsize,), native.itemsize):
        raise ValueError(
            f"indices: expected a contiguous 1-d CUDA array, got strides {strides} for shape "
            f"{shape}; pass a contiguous copy"
        )
    nbytes = math.prod(shape) * native.itemsize
    copy: Array = device.read(found.address, nbytes, current_stream(indices)).view(native)
    return copy

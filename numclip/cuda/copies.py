"""Copies in the host's memory of what lies on the GPU; making one waits for it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numclip.cuda import memory
from numclip.cuda.protocols import told
from numclip.cuda.streams import current_stream
from numclip.dtypes import Array
from numclip.errors import expected
from numclip.facts import Facts
from numclip.memory import is_c_order


def host_copy(source: Facts, stream: Any = 0) -> Array:
    """Return a copy of an array in the host's memory."""
    begin, end = source.extent
    copied = memory.read(begin, end - begin, stream)
    offset, strides = source.address - begin, source.strides
    return np.ndarray(source.shape, source.native, copied, offset, strides)


def host_indices(indices: Any) -> Array:
    """Return a copy of a 1-d CUDA array in the host's memory, after waiting for it."""
    found = told("indices", indices)
    native, shape, strides = found.native, found.shape, found.strides
    if native is None or native.hasobject:
        raise TypeError(expected("indices", "integers", indices.dtype))
    if len(shape) != 1 or not is_c_order(shape, strides or (native.itemsize,), native.itemsize):
        got = f"strides {strides} for shape {shape}; pass a contiguous copy"
        raise ValueError(expected("indices", "a contiguous 1-d CUDA array", got))
    nbytes = math.prod(shape) * native.itemsize
    copy: Array = memory.read(found.address, nbytes, current_stream(indices)).view(native)
    return copy

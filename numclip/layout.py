"""Where tensors lie in flat buffers: one aligned, contiguous buffer for each dtype."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from numclip.dtypes import Array

ALIGNMENT = 64  # a cache line, and the widest vector


def aligned(size: int, dtype: np.dtype[Any]) -> Array:
    """Return a 1-d array of zeros that begins at a multiple of 64 bytes."""
    raw = np.zeros(size * dtype.itemsize + ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size * dtype.itemsize].view(dtype)


def flat_buffers(
    tensors: Mapping[str, Array],
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Return a buffer for each dtype by its name, and each tensor's view into one of them.

    Views follow one another in the order of the tensors, in C order and without gaps.
    """
    flat: dict[str, Array] = {}
    views: dict[str, Array] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        members = [name for name, tensor in tensors.items() if tensor.dtype == dtype]
        buffer = aligned(sum(tensors[name].size for name in members), dtype)
        flat[dtype.name] = buffer
        start = 0
        for name in members:
            shape = tensors[name].shape
            size = math.prod(shape)
            views[name] = buffer[start : start + size].reshape(shape)
            start += size
    return flat, {name: views[name] for name in tensors}

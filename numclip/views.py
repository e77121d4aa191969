"""NumPy arrays at given addresses; only the host's engine reads or writes their elements."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.memory import Memory


def view_of(memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return a writeable array of some shape and dtype at an address."""
    kind = dtype.str if dtype.kind in "iufc" else f"|V{dtype.itemsize}"
    others = {"shape": shape, "typestr": kind, "data": (memory.address, False)}
    described = {"version": 3, "strides": memory.steps, **others}
    return np.asarray(SimpleNamespace(__array_interface__=described)).view(dtype)

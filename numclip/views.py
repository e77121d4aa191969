"""Arrays of NumPy at given addresses, of which only the engine of the host reads or writes."""

from __future__ import annotations

from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.memory import Memory


class _Interface:
    """What NumPy makes an array of; it does not keep the memory."""

    def __init__(self, **description: Any) -> None:
        self.__array_interface__ = {"version": 3, **description}


def view_of(memory: Memory, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Return the array of some shape and dtype at an address, which can be written."""
    kind = dtype.str if dtype.kind in "iufc" else f"|V{dtype.itemsize}"
    interface = _Interface(
        shape=shape, typestr=kind, data=(memory.address, False), strides=memory.steps
    )
    return np.asarray(interface).view(dtype)

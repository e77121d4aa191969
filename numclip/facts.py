"""The facts of an array, on any device: its dtype, its shape and its memory."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from numclip.memory import Memory, is_dense, strides_of


class Facts(NamedTuple):
    """The memory, shape and native dtype of an array.

    `strides`, in bytes, are None in C order. `array` holds the memory: a NumPy array on the host,
    the user's own array on a GPU. `swapped` is the dtype string of a byte-swapped array, of which
    `array` is a native copy; else it is empty. A `lease` must be held while the memory is used; it
    is None for memory that needs none.
    """

    native: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    writable: bool
    array: Any
    swapped: str = ""
    lease: Any = None

    @property
    def nbytes(self) -> int:
        """The number of bytes of all elements."""
        return math.prod(self.shape) * self.native.itemsize

    @property
    def c_order(self) -> bool:
        """Whether the elements lie in C order."""
        return self.strides is None

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory without gaps, in any order of the axes."""
        return self.strides is None or is_dense(self.shape, self.strides, self.native.itemsize)

    @property
    def memory(self) -> Memory:
        """The address of the first element, and the strides in bytes, in C order too."""
        steps = self.strides or strides_of(self.shape, self.native.itemsize)
        return Memory(self.address, steps)

    @property
    def extent(self) -> tuple[int, int]:
        """The first address of the elements, and the one after their last byte."""
        if self.strides is None or not self.nbytes:
            return self.address, self.address + self.nbytes
        ways = [step * (n - 1) for n, step in zip(self.shape, self.strides, strict=True)]
        least, most = (sum(pick(way, 0) for way in ways) for pick in (min, max))
        return self.address + least, self.address + most + self.native.itemsize

    def lies_as(self, other: Facts) -> bool:
        """Tell whether `other`, of the same shape and dtype, has the same address and strides."""
        return self.address == other.address and self.strides == other.strides

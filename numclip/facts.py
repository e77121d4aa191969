"""What an array tells of itself, whatever device it is on."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from numclip.memory import Memory, is_dense, strides_of


class Facts(NamedTuple):
    """Where an array lies and what it holds.

    `strides`, in bytes, are None in C order. `array` holds the memory: an array of NumPy in the
    host's memory, the user's own on a GPU. `swapped` is the dtype of an array of the other byte
    order, of which `array` is a copy; else it is empty. `lease` is to be held while the memory is
    used, where there is one.
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
        """Whether the elements fill their memory, in any order of the axes."""
        return self.strides is None or is_dense(self.shape, self.strides, self.native.itemsize)

    @property
    def memory(self) -> Memory:
        """The address and the steps."""
        steps = self.strides or strides_of(self.shape, self.native.itemsize)
        return Memory(self.address, steps)

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses between which the elements lie."""
        if self.strides is None or not self.nbytes:
            return self.address, self.address + self.nbytes
        ways = [step * (n - 1) for n, step in zip(self.shape, self.strides, strict=True)]
        least, most = (sum(pick(way, 0) for way in ways) for pick in (min, max))
        return self.address + least, self.address + most + self.native.itemsize

    def lies_as(self, other: Facts) -> bool:
        """Tell whether an array of the same shape and dtype has the same memory."""
        return self.address == other.address and self.strides == other.strides

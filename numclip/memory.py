"""The memory of tensors, on the host or on a GPU: what an engine's plans are made of."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import DType


class Memory(NamedTuple):
    """The memory of an array: the address of its first element, and its strides in bytes."""

    address: int
    steps: tuple[int, ...]


class Span(NamedTuple):
    """`size` contiguous stored numbers: the addresses to read them at and write them to."""

    dtype: DType
    source: int
    target: int
    size: int


class Strided(NamedTuple):
    """An array of any strides: the memory it is read from, and the memory it is written to.

    `axes` are those a unit's norm is taken over; with None, the array is one unit.
    """

    dtype: DType
    shape: tuple[int, ...]
    read: Memory
    written: Memory
    axes: tuple[int, ...] | None = None

    @property
    def size(self) -> int:
        """The stored numbers, two for each complex element."""
        return math.prod(self.shape) * self.dtype.components

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that a unit's norm is not taken over."""
        every = range(len(self.shape))
        return () if self.axes is None else tuple(k for k in every if k not in self.axes)

    @property
    def units(self) -> int:
        """How many units there are."""
        return math.prod(self.shape[k] for k in self.kept)

    @property
    def itemsize(self) -> int:
        """The bytes of an element."""
        return self.dtype.storage.itemsize * self.dtype.components


class RowSpan(NamedTuple):
    """Rows of `length` stored numbers, `size` numbers in all; rows of one index are added up.

    They are contiguous unless `strided` is given, which only the host's engine supports.
    """

    dtype: DType
    source: int
    target: int
    size: int
    length: int
    strided: Strided | None = None


AnySpan = Span | Strided | RowSpan


def strides_of(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Return the strides of C order."""
    sizes = [max(length, 1) for length in shape]
    return tuple(math.prod(sizes[k + 1 :]) * itemsize for k in range(len(sizes)))


def is_dense(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether elements fill their memory, in any order of the axes."""
    for step, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and step != itemsize:
            return False
        itemsize *= length
    return True


def is_c_order(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether elements lie in C order; axes of one element lie in any."""
    wanted = zip(shape, strides, strides_of(shape, itemsize), strict=True)
    return 0 in shape or all(n == 1 or step == own for n, step, own in wanted)


def owner_of(array: Any) -> Any:
    """Return the NumPy array that owns an array's memory, or the other object it is a view of."""
    while isinstance(array, np.ndarray) and array.base is not None:
        array = array.base
    return array


def is_nested(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Tell whether each stride exceeds the reach of all smaller ones: no elements overlap then."""
    reach = itemsize
    for step, length in sorted((abs(s), n) for s, n in zip(strides, shape, strict=True) if n > 1):
        if step < reach:
            return False
        reach += step * (length - 1)
    return True

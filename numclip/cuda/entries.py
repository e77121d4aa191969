"""The border of the GPU: arrays of numba, CuPy, PyTorch and others, described and checked."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import inputs
from numclip.cuda.dlpack import Lease, Told
from numclip.cuda.protocols import told
from numclip.dtypes import NAMES, DType, lookup, refusal
from numclip.inputs import Gradients, Key
from numclip.kernels.cuda.tiling import Memory
from numclip.placement import on_device
from numclip.slices import IndexedSlices


class DeviceEntry(NamedTuple):
    """One gradient on the GPU: `size` stored numbers from `address` on.

    `strides` is None in C order. `lease` is to be held while the array is used, where there is
    one. Of `slices`, if it is that, shape and memory are the values'.
    """

    name: str
    key: Key
    dtype: DType
    native: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    writable: bool
    array: Any
    lease: Lease | None = None
    slices: IndexedSlices | None = None

    @property
    def result(self) -> Any:
        """What the user has, or is given: an array or slices."""
        return self.array if self.slices is None else self.slices

    @property
    def repeated(self) -> bool:
        """Whether rows of the dense array are stored more than once."""
        return self.slices is not None and self.slices.has_duplicates

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.shape if self.slices is None else self.slices.dense_shape

    @property
    def size(self) -> int:
        """The stored numbers, two for each complex element."""
        return math.prod(self.shape) * self.dtype.components

    @property
    def dense_size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.dense_shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.storage.itemsize

    @property
    def c_order(self) -> bool:
        """Whether the elements lie in C order."""
        return self.strides is None

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in any order of the axes."""
        return self.strides is None or _is_dense(self.shape, self.strides, self.native.itemsize)

    def lies_as(self, other: DeviceEntry) -> bool:
        """Tell whether an array of the same shape and dtype has the same memory."""
        return self.address == other.address and self.strides == other.strides

    @property
    def memory(self) -> Memory:
        """The address and the steps."""
        return Memory(self.address, self.strides or _strides(self.shape, self.native.itemsize))

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses between which the elements lie."""
        if self.strides is None or not self.size:
            return self.address, self.address + self.nbytes
        ways = [step * (n - 1) for n, step in zip(self.shape, self.strides, strict=True)]
        least, most = (sum(pick(way, 0) for way in ways) for pick in (min, max))
        return self.address + least, self.address + most + self.native.itemsize


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides of C order."""
    sizes = [max(length, 1) for length in shape]
    return tuple(math.prod(sizes[k + 1 :]) * itemsize for k in range(len(sizes)))


def _is_dense(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether elements fill their memory, in any order of the axes."""
    for step, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and step != itemsize:
            return False
        itemsize *= length
    return True


def is_c_order(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether elements lie in C order; axes of one element lie in any."""
    wanted = zip(shape, strides, _strides(shape, itemsize), strict=True)
    return 0 in shape or all(n == 1 or step == own for n, step, own in wanted)


def describe(name: str, key: Key, array: Any) -> DeviceEntry:
    """Return the description of one gradient on the GPU, or say why it cannot be taken."""
    if not on_device(array):
        kind = type(array).__name__
        raise TypeError(f"{name}: expected a CUDA array, as the others are, got {kind}")
    if isinstance(array, IndexedSlices):
        return describe_rows(name, key, array.values)._replace(slices=array)
    return _checked(name, key, array, told(name, array))


def describe_rows(name: str, key: Key, values: Any) -> DeviceEntry:
    """Return the description of the values of slices, whose rows are contiguous."""
    entry = describe(name, key, values)
    if not entry.c_order:
        raise ValueError(
            f"{name}: expected rows in C order on the GPU, got strides {entry.strides} for shape "
            f"{entry.shape}; pass a contiguous copy"
        )
    return entry


def gradients(grads: Any, name: str = "grads") -> Gradients:
    """Return the description of several gradients on the GPU."""
    keys, items, rebuild = inputs.structure(grads, name)
    entries: list[Any] = [
        describe(f"{name}[{key!r}]", key, item)
        for key, item in zip(keys, items, strict=True)
        if item is not None
    ]
    return Gradients(entries, items, keys, rebuild)


def _checked(name: str, key: Key, array: Any, found: Told) -> DeviceEntry:
    """Return the description of an array that kernels can take, refuse any other."""
    native, shape, strides, address, *_ = found
    row = None if native is None else lookup(native)
    if native is None or row is None:
        unknown = getattr(array, "dtype", type(array).__name__)
        got = unknown if native is None else refusal(native)
        raise TypeError(f"{name}: expected an array of {NAMES}, got {got}")
    if strides is not None and is_c_order(shape, strides, native.itemsize):
        strides = None
    if not address and 0 not in shape:
        raise ValueError(
            f"{name}: expected an array with memory on the GPU, got {type(array).__name__} at "
            "address 0; pass its local part"
        )
    if any(step % row.storage.itemsize for step in (address, *(strides or ()))):
        raise ValueError(
            f"{name}: expected an aligned CUDA array, got address {address:#x}, strides {strides}"
        )
    writable, lease = not found.read_only, found.lease
    return DeviceEntry(name, key, row, native, shape, strides, address, writable, array, lease)

"""A parameter group on the GPU whose gradients are rows of its parameters."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from numclip.cuda.arrays import DeviceArray, empty
from numclip.cuda.entries import DeviceEntry, describe
from numclip.cuda.group import DeviceGroupState
from numclip.dtypes import Array
from numclip.group import Group
from numclip.inputs import Entry
from numclip.kernels.cuda import device
from numclip.slices import IndexedSlices


class SparseGroupState(DeviceGroupState):
    """One sparse group at run time: for each parameter the rows of its gradient, one by one."""

    sparse = True

    def __init__(self, group: Group) -> None:
        super().__init__(group)
        self._rows = {name: HeldRows(param) for name, param in self.params.items()}

    def entries(self) -> list[DeviceEntry]:
        """Return the descriptions of the gradients, of no rows where there is none."""
        return [
            describe(f"{self.name}.{name}", name, rows.slices) for name, rows in self._rows.items()
        ]

    def merged(self, name: str) -> IndexedSlices | None:
        """Return a parameter's gradient as one object, None where there is none."""
        rows = self._rows[name]
        return rows.slices if rows.indices else None

    def put(self, name: str, grad: Any, stream: Any) -> None:
        """Let slices that fit be a parameter's gradient; None means none."""
        self._rows[name].clear()
        if grad is not None:
            self._rows[name].append(grad, stream)

    def add(self, name: str, grad: Any, stream: Any) -> None:
        """Append the rows of slices that fit."""
        self._rows[name].append(grad, stream)

    def zero(self, _stream: Any = 0) -> None:
        """Forget the rows."""
        for rows in self._rows.values():
            rows.clear()

    def _cast(self, described: Entry, dtype: Any) -> Any:
        assert described.slices is not None
        return described.slices.with_values(np.array(described.values, dtype, order="C"))


class HeldRows:
    """The rows of one parameter's gradient, in memory that grows with them.

    `indices` has those of each part, in the order they were appended.
    """

    def __init__(self, param: DeviceArray) -> None:
        self._shape = param.shape
        self._length = math.prod(param.shape[1:])
        self.indices: list[Array] = []
        self._count = 0
        self._memory = empty((0,), param.dtype)
        self._slices: IndexedSlices | None = None

    def clear(self) -> None:
        """Forget all rows; the memory is kept."""
        self.indices, self._count, self._slices = [], 0, None

    def append(self, grad: IndexedSlices, stream: Any) -> None:
        """Copy rows in, from the host or the GPU."""
        first, count = self._count, grad.indices.size
        self._grow(first + count, stream)
        place = self._memory.part(first * self._length, (count, *self._shape[1:]))
        place.copy_from(grad.values, stream)
        self.indices.append(grad.indices)
        self._count, self._slices = first + count, None

    def _grow(self, rows: int, stream: Any) -> None:
        """Have memory for so many rows; those there are stay."""
        if rows * self._length <= self._memory.size:
            return
        size = 2 * rows * self._length
        dtype, kept = self._memory.dtype, self._count * self._length
        made = empty((size,), dtype)
        device.copy(made.address, self._memory.address, kept * dtype.itemsize, stream)
        self._memory = made

    @property
    def slices(self) -> IndexedSlices:
        """The rows as one object, whose values are a view; the same one while they stay."""
        if self._slices is None:
            values = self._memory.part(0, (self._count, *self._shape[1:]))
            joined = np.concatenate([np.empty(0, np.int64), *self.indices])
            self._slices = IndexedSlices(values, joined, self._shape)
        return self._slices

"""IndexedSlices whose values lie on the GPU."""

from __future__ import annotations

from typing import Any, Never

import numpy as np

from numclip.cuda import outputs
from numclip.cuda.copies import host_indices
from numclip.cuda.entries import DeviceEntry, describe_rows
from numclip.cuda.streams import stream_of
from numclip.dtypes import Array
from numclip.kernels.cuda import device
from numclip.kernels.cuda.grouping import RowSpan, sum_rows
from numclip.placement import on_device
from numclip.slices import IndexedSlices


class DeviceSlices(IndexedSlices):
    """`IndexedSlices` on the GPU; made by ``IndexedSlices(values, ...)`` of a CUDA array.

    The indices are in the host's memory, where rows that repeat are found; the values stay where
    they are. Sums of rows are arrays of the library that the values are of.

    Only in one case does the GPU give up where the host does not: for norms of an order other than
    2, a sum of float64 rows that exceeds float64 counts as not finite.

    Raises
    ------
    TypeError, ValueError
        As `IndexedSlices`, and where the values are not in C order.
    """

    is_cuda = True

    def _take(self, values: Any) -> tuple[int, ...]:
        entry = _entry(values)
        self._values, self._dtype = values, entry.native
        return tuple(entry.shape)

    def _on_host(self, indices: Any) -> Array:
        return host_indices(indices) if on_device(indices) else np.asarray(indices)

    def coalesce(self) -> IndexedSlices:
        """Return the slices with repeated rows summed and the indices in ascending order.

        Returns
        -------
        IndexedSlices
            New arrays on the GPU, of which nothing is waited for.
        """
        first = self.distinct_indices
        ascending = np.argsort(first, kind="stable")
        places = np.empty_like(ascending)
        places[ascending] = np.arange(first.size)
        sums = self._summed((first.size, *self.dense_shape[1:]), places)
        return DeviceSlices(sums, first[ascending], self.dense_shape)

    def to_dense(self) -> Any:
        """Return the dense array of shape `dense_shape` that the slices stand for, on the GPU."""
        return self._summed(self.dense_shape, self.distinct_indices)

    def _summed(self, shape: tuple[int, ...], places: Array) -> Any:
        """Return a new array of zeros but for the sums of rows, each in its place."""
        entry = _entry(self._values)
        made = outputs.new_of_shape(entry, shape)
        self.sum_into(made, places)
        return made.array

    def sum_into(self, made: DeviceEntry, places: Array) -> None:
        """Write the sums of rows to their places in an array, and 0 elsewhere."""
        device.require()
        entry = _entry(self._values)
        stream = stream_of([entry])
        length = entry.size // max(entry.shape[0], 1)
        device.clear(made.address, made.nbytes, stream)
        span = RowSpan(entry.dtype, entry.address, made.address, entry.size, length)
        sum_rows(span, self.grouping, places, stream)

    def to_scipy(self) -> Never:
        """Refuse: SciPy's matrices are in the host's memory."""
        raise TypeError(
            "to_scipy: expected values in the host's memory, got a CUDA array; make slices of a "
            "copy there"
        )


def _entry(values: Any) -> DeviceEntry:
    """Return the description of values, whose rows are contiguous."""
    return describe_rows("values", 0, values)

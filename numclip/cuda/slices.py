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
        return self.coalesced_on(self._stream)

    def coalesced_on(self, stream: Any) -> DeviceSlices:
        """Return the coalesced slices, whose values are summed on a stream."""
        indices = np.sort(self.distinct_indices)
        shape = indices.size, *self.dense_shape[1:]
        return DeviceSlices(self._summed(shape, self.ranks, stream), indices, self.dense_shape)

    @property
    def ranks(self) -> Array:
        """Where the distinct indices, in the order they first appear, are in ascending order."""
        return np.argsort(np.argsort(self.distinct_indices))

    def to_dense(self) -> Any:
        """Return the dense array of shape `dense_shape` that the slices stand for, on the GPU."""
        return self.dense_on(self._stream)

    def dense_on(self, stream: Any) -> Any:
        """Return the dense array, which is made on a stream."""
        return self._summed(self.dense_shape, self.distinct_indices, stream)

    @property
    def _stream(self) -> Any:
        return stream_of([_entry(self._values)])

    def _summed(self, shape: tuple[int, ...], places: Array, stream: Any) -> Any:
        """Return a new array of zeros but for the sums of rows, each in its place."""
        made = outputs.new_of_shape(_entry(self._values), shape)
        self.sum_into(made, places, stream)
        return made.array

    def sum_into(self, made: DeviceEntry, places: Array, stream: Any) -> None:
        """Write the sums of rows to their places in an array, of any precision; 0 elsewhere."""
        device.require()
        entry = _entry(self._values)
        length = entry.size // max(entry.shape[0], 1)
        device.clear(made.address, made.nbytes, stream)
        span = RowSpan(entry.dtype, entry.address, made.address, entry.size, length)
        sum_rows(span, made.dtype, self.grouping, places, stream)

    def to_scipy(self) -> Never:
        """Refuse: SciPy's matrices are in the host's memory."""
        raise TypeError(
            "to_scipy: expected values in the host's memory, got a CUDA array; make slices of a "
            "copy there"
        )


def _entry(values: Any) -> DeviceEntry:
    """Return the description of values, whose rows are contiguous."""
    return describe_rows("values", 0, values)

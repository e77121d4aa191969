"""Strided arrays, for which kernels work on contiguous copies."""

from __future__ import annotations

import numpy as np

from numclip.dtypes import Array, DType, as_stored
from numclip.memory import Memory, Span, Strided, strides_of
from numclip.views import view_of


def elements(dtype: DType, shape: tuple[int, ...], memory: Memory) -> Array:
    """Return a view of the elements of an array."""
    return view_of(memory, shape, dtype.native)


class Copied:
    """A contiguous copy of an array in C order, and the target of its result.

    Attributes
    ----------
    span : Span
        The memory that kernels read and write instead: the copy, and the copy or the target.
    """

    def __init__(self, array: Strided) -> None:
        self._array = array
        self._copy = np.ascontiguousarray(elements(array.dtype, array.shape, array.read))
        if self._copy.ctypes.data == array.read.address:
            self._copy = self._copy.copy()
        stored = as_stored(self._copy.reshape(-1))
        source = target = stored.ctypes.data
        written = array.written
        direct = written.steps == strides_of(array.shape, array.itemsize)
        self._back = not direct or array.read == written
        self._back |= bool(written.address % array.dtype.storage.itemsize)
        if not self._back:
            target = written.address
        self.span = Span(array.dtype, source, target, array.size)

    @property
    def in_place(self) -> bool:
        """Whether the result is written to the array itself."""
        return self._array.read == self._array.written

    def write_back(self) -> None:
        """Copy the result from the copy to the target, if kernels wrote it to the copy."""
        if self._back:
            array = self._array
            elements(array.dtype, array.shape, array.written)[...] = self._copy

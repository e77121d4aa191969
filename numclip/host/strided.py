"""Arrays that are no contiguous memory, worked on in copies that are."""

from __future__ import annotations

import numpy as np

from numclip.dtypes import Array, DType, as_stored
from numclip.memory import Memory, Span, Strided, strides_of
from numclip.views import view_of


def elements(dtype: DType, shape: tuple[int, ...], memory: Memory) -> Array:
    """Return the elements of an array where they are."""
    return view_of(memory, shape, dtype.native)


class Copied:
    """A contiguous copy of an array in C order, and where its result goes.

    Attributes
    ----------
    span : Span
        What is read and written in place of the array: the copy, and the copy or the result.
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
        """Whether the result goes where the array is."""
        return self._array.read == self._array.written

    def write_back(self) -> None:
        """Bring what was written to the copy to where the result goes."""
        if self._back:
            array = self._array
            elements(array.dtype, array.shape, array.written)[...] = self._copy

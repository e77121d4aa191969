"""Arrays on the GPU that are numclip's own, and copies of arrays in the host's memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.cuda import contiguous, driver, memory
from numclip.cuda.protocols import exported, facts_of
from numclip.cuda.streams import current_stream, in_order
from numclip.dtypes import Array, lookup
from numclip.errors import expected
from numclip.facts import Facts
from numclip.libraries import on_device, to_numpy
from numclip.memory import Span, is_c_order


class DeviceArray:
    """An array on the GPU in a buffer of numclip's.

    CuPy (``cupy.asarray``), PyTorch (``torch.as_tensor(..., device="cuda")``) and numba
    (``numba.cuda.as_cuda_array``) take it without a copy, by ``__cuda_array_interface__``.

    Parameters
    ----------
    memory : Memory
        The buffer, which the array keeps alive.
    offset : int
        Where in the buffer the array begins, in bytes.
    shape : tuple of int
        The shape.
    dtype : dtype
        The dtype.
    strides : tuple of int, optional
        The strides in bytes; C order by default.
    """

    def __init__(
        self,
        memory: Any,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.dtype, self._strides = shape, np.dtype(dtype), strides
        self._memory = memory
        self.address = memory.address + offset

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def ndim(self) -> int:
        """The number of axes."""
        return len(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The description that other libraries read, in which bfloat16 is two bytes, "V2"."""
        address = self.address if self.size else 0
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (address, False),
            "strides": self._strides,
            "version": 2,
        }

    def copy_to_host(self, stream: Any = None) -> Array:
        """Return a copy on the host, after all work queued on `stream`, or on all streams."""
        with driver.on_stream(stream) as own:
            return host_copy(facts_of("array", self), own)

    def copy_from(self, source: Any, stream: Any = None) -> None:
        """Copy in an array of the same shape and dtype, from the host or the GPU.

        Parameters
        ----------
        source : array
            A NumPy array, or one on the GPU; C order.
        stream : stream, optional
            The stream to copy on; by default the copy follows all work queued on the GPU.

        Raises
        ------
        TypeError, ValueError
            Where `source` does not fit.
        """
        if on_device(source):
            entry = self._fitting(source)
            with driver.on_stream(stream) as own, in_order(own, [entry]):
                memory.copy(self.address, entry.address, self.nbytes, own)
            return
        source = to_numpy("source", source)
        self._check(source.shape, source.dtype)
        flat = np.ascontiguousarray(source).reshape(-1)
        with driver.on_stream(stream) as own:
            memory.write(self.address, flat.view(np.uint8), own)

    def add(self, source: Any, stream: Any = None) -> None:
        """Add an array of the same shape and dtype, from the host or the GPU.

        Parameters
        ----------
        source : array
            A NumPy array, or one on the GPU; C order.
        stream : stream, optional
            The stream to add on, as in `copy_from`. An array of the host is first sent to
            temporary memory.

        Raises
        ------
        TypeError, ValueError
            Where `source` does not fit.
        """
        if on_device(source):
            entry = self._fitting(source)
            with driver.on_stream(stream) as own, in_order(own, [entry]):
                contiguous.add(self._span(entry.address, entry.native), own)
            return
        source = to_numpy("source", source)
        self._check(source.shape, source.dtype)
        with driver.on_stream(stream) as own:
            sent = memory.table(np.ascontiguousarray(source).reshape(-1).view(np.uint8), own)
            contiguous.add(self._span(sent.address, self.dtype), own)

    def _span(self, source: int, dtype: np.dtype[Any]) -> Span:
        """Return the `Span` that reads `dtype` from address `source` and writes this array."""
        row: Any = lookup(dtype)
        return Span(row, source, self.address, self.size * row.components)

    def _fitting(self, source: Any, *, widens: bool = False) -> Facts:
        """Return the facts of a GPU array that fits this one, or does once widened if `widens`."""
        entry = facts_of("source", source)
        row = lookup(entry.native)
        widened = widens and self.dtype == np.float32 and row is not None and row.is_half
        self._check(entry.shape, self.dtype if widened else entry.native, c_order=entry.c_order)
        return entry

    def _check(self, shape: Any, dtype: Any, *, c_order: bool = True) -> None:
        if self._strides is not None:
            raise ValueError(
                f"array: expected one in C order to copy to, got strides {self._strides}; "
                "copy to a new one"
            )
        if shape != self.shape or dtype != self.dtype or not c_order:
            raise ValueError(
                f"source: expected {self.dtype} of shape {self.shape} in C order, "
                f"got {dtype} of {shape}"
            )

    def part(self, start: int, shape: tuple[int, ...]) -> DeviceArray:
        """Return a view of the given shape of a 1-d array, from element `start` on."""
        offset = self.address - self._memory.address + start * self.dtype.itemsize
        return DeviceArray(self._memory, offset, shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return a copy in the host's memory."""
        if copy is False:
            raise ValueError("copy: expected True or None, as the array is on the GPU")
        return self.copy_to_host().astype(dtype or self.dtype, copy=False)

    def __setitem__(self, key: Any, source: Any) -> None:
        if key is not Ellipsis:
            raise TypeError("index: expected ..., as a whole array is copied to the GPU")
        source = source if on_device(source) else np.asarray(source, self.dtype)
        self.copy_from(source)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}, shape={self.shape})"


def move_all(pairs: Sequence[tuple[DeviceArray, Any]], stream: Any, *, adds: bool) -> None:
    """Copy each pair's GPU array into its `DeviceArray`, or add it; a launch for each dtype pair.

    16-bit arrays are widened where the `DeviceArray` is of float32.
    """
    if not pairs:
        return
    entries = [own._fitting(source, widens=True) for own, source in pairs]
    both = [(own, entry) for (own, _), entry in zip(pairs, entries, strict=True)]
    spans = [own._span(entry.address, entry.native) for own, entry in both]
    targets: list[Any] = [lookup(own.dtype) for own, _ in both]
    with in_order(stream, entries):
        contiguous.move_all(spans, targets, stream, adds=adds)


def empty(
    shape: tuple[int, ...], dtype: Any, strides: tuple[int, ...] | None = None
) -> DeviceArray:
    """Return a new uninitialised array, in C order unless strides are given."""
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    return DeviceArray(memory.Memory(nbytes), 0, shape, dtype, strides)


def host_copy(source: Facts, stream: Any = 0) -> Array:
    """Return a copy in the host's memory of an array on the GPU."""
    begin, end = source.extent
    copied = memory.read(begin, end - begin, stream)
    offset, strides = source.address - begin, source.strides
    return np.ndarray(source.shape, source.native, copied, offset, strides)


def host_indices(indices: Any) -> Array:
    """Return a copy of a 1-d CUDA array in the host's memory, after waiting for it."""
    found = exported("indices", indices)
    native, shape, strides = found.native, found.shape, found.strides
    if native is None or native.hasobject:
        raise TypeError(expected("indices", "integers", indices.dtype))
    if len(shape) != 1 or not is_c_order(shape, strides or (native.itemsize,), native.itemsize):
        got = f"strides {strides} for shape {shape}; pass a contiguous copy"
        raise ValueError(expected("indices", "a contiguous 1-d CUDA array", got))
    nbytes = math.prod(shape) * native.itemsize
    copy: Array = memory.read(found.address, nbytes, current_stream(indices)).view(native)
    return copy

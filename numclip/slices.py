"""IndexedSlices: the gradient of rows taken from a large array."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from numclip import foreign
from numclip.dtypes import NAMES, Array, as_stored, lookup, refusal
from numclip.kernels import backend
from numclip.placement import on_device


class Grouping(NamedTuple):
    """Rows that share an index: ``order[starts[g]:starts[g + 1]]`` for the group g."""

    order: Array
    starts: Array

    @property
    def distinct(self) -> int:
        """How many distinct indices there are."""
        return int(self.starts.size) - 1


class IndexedSlices:
    """A sparse gradient: row ``indices[k]`` of a dense array receives ``values[k]``.

    Rows that repeat add up. Every function of numclip treats it as the dense array it stands
    for, and allocates nothing of that size (but `clip_per_example` on a GPU).

    Parameters
    ----------
    values : array, shape (n, ...)
        The rows: float16, bfloat16, float32, float64, complex64 or complex128. Kept, not
        copied (those of PyTorch or DLPack in the host's memory as a view); written by in-place
        calls. A CUDA array (in C order) makes slices that lie on the GPU, see `DeviceSlices`.
    indices : array of int, shape (n,)
        The row of the dense array that each row of `values` belongs to, in
        ``[0, dense_shape[0])``, in any order, repeated or not. Copied, as int64, read-only, to
        the host's memory. Those on a GPU are waited for; they can be so where `values` are.
    dense_shape : sequence of int
        The shape of the dense array; ``dense_shape[1:]`` is that of a row.

    Raises
    ------
    TypeError
        Where `values` are of another dtype or `indices` are not integers.
    ValueError
        Where the shapes do not fit or an index is out of range.

    Notes
    -----
    **Source**: TensorFlow's ``tf.IndexedSlices``, whose clip ops take the repeated rows as they
    lie (here ``duplicates="raw"``).

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> g = nc.IndexedSlices(np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([7, 7]), (1000, 2))
    >>> nc.global_norm([g])
    7.0
    """

    is_cuda = False
    """Whether the values lie on a GPU."""

    def __new__(cls, values: Any = None, *_others: Any, **_named: Any) -> IndexedSlices:
        """Return slices of the kind that the values want."""
        if cls is IndexedSlices and on_device(values):
            from numclip.cuda.slices import DeviceSlices

            return object.__new__(DeviceSlices)
        return object.__new__(cls)

    def __init__(self, values: Any, indices: Any, dense_shape: Sequence[int]) -> None:
        shape = self._take(values)
        try:
            self._dense_shape = tuple(operator.index(size) for size in dense_shape)
        except TypeError:
            raise TypeError(
                f"dense_shape: expected a sequence of integers, got {dense_shape!r}"
            ) from None
        given = self._on_host(indices)
        self._check(shape, given)
        self._indices = given.astype(np.int64)
        self._indices.setflags(write=False)

    def _take(self, values: Any) -> tuple[int, ...]:
        """Keep the values, if they are of a type and dtype that gradients have; tell the shape."""
        if isinstance(values, np.ma.MaskedArray):
            raise TypeError("values: expected an array, got a masked array; use .filled(0)")
        array = self._values = foreign.to_numpy("values", values)
        dtype = self._dtype = array.dtype
        if dtype.kind not in "fcV" or lookup(dtype.newbyteorder("=")) is None:
            raise TypeError(f"values: expected one of {NAMES}, got {refusal(dtype)}")
        return array.shape

    def _on_host(self, indices: Any) -> Array:
        """Return indices in the host's memory."""
        return foreign.to_numpy("indices", indices)

    @property
    def values(self) -> Any:
        """The rows."""
        return self._values

    @property
    def indices(self) -> Array:
        """The dense array's row that each row belongs to; int64, read-only."""
        return self._indices

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self._dense_shape

    def _check(self, values: tuple[int, ...], indices: Array) -> None:
        """Refuse indices and a dense shape that do not fit the shape of the values."""
        shape = self.dense_shape
        if indices.dtype.kind not in "iu" and indices.size:
            raise TypeError(f"indices: expected integers, got {indices.dtype}")
        if not shape or min(shape) < 0:
            raise ValueError(
                f"dense_shape: expected at least one dimension, none negative, got {shape}"
            )
        if indices.ndim != 1 or not values or values[0] != indices.shape[0]:
            raise ValueError(
                "indices: expected one for each row of values, "
                f"got shape {indices.shape} for values of shape {values}"
            )
        if values[1:] != shape[1:]:
            raise ValueError(
                f"values: expected rows of shape {shape[1:]} as in dense_shape {shape}, "
                f"got {values[1:]}"
            )
        if indices.size and not (indices.min() >= 0 and indices.max() < shape[0]):
            raise ValueError(
                f"indices: expected rows in [0, {shape[0]}), "
                f"got values from {indices.min()} to {indices.max()}"
            )

    def __repr__(self) -> str:
        rows = f"{self.indices.size} rows of {self.dtype}"
        return f"IndexedSlices({rows}, dense_shape={self.dense_shape})"

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values, as NumPy knows it."""
        return self._dtype

    @cached_property
    def grouping(self) -> Grouping:
        """The rows by index, in the order the indices first appear; made at first use."""
        order, starts = backend.group(self.indices)
        return Grouping(order, starts)

    @property
    def distinct_indices(self) -> Array:
        """The distinct indices, in the order they first appear."""
        return self.indices[self.grouping.order[self.grouping.starts[:-1]]]

    @property
    def has_duplicates(self) -> bool:
        """Whether an index appears more than once."""
        return self.grouping.distinct < self.indices.size

    def with_values(self, values: Any) -> IndexedSlices:
        """Return slices with the same indices and other values of the same shape."""
        other = object.__new__(type(self))
        other._take(values)
        other._indices, other._dense_shape = self._indices, self._dense_shape
        if "grouping" in self.__dict__:
            other.__dict__["grouping"] = self.grouping
        return other

    def summed(self, values: Array) -> Array:
        """Return the sums of the rows of contiguous `values` that share an index, 2-d."""
        rows = values.reshape(self.indices.size, math.prod(self.dense_shape[1:]))
        sums = np.empty((self.grouping.distinct, rows.shape[1]), rows.dtype)
        backend.merge_rows(*self.grouping, as_stored(rows), as_stored(sums))
        return sums

    def coalesce(self) -> IndexedSlices:
        """Return the slices with repeated rows summed and the indices in ascending order.

        Returns
        -------
        IndexedSlices
            New arrays. Sums are exact but for one rounding to the dtype of the values (and
            for what two float64 cannot hold).
        """
        return self.coalesced(self.values.dtype.newbyteorder("="))

    def coalesced(self, dtype: Any) -> IndexedSlices:
        """Return the coalesced slices in a dtype that holds the values."""
        first = self.distinct_indices
        ascending = np.argsort(first, kind="stable")
        values = self.summed(np.ascontiguousarray(self.values, dtype))[ascending]
        rows = values.reshape(first.size, *self.dense_shape[1:])
        return IndexedSlices(rows, first[ascending], self.dense_shape)

    def to_dense(self) -> Array:
        """Return the dense array of shape `dense_shape` that the slices stand for."""
        merged = self.coalesce()
        dense = np.zeros(self.dense_shape, self.values.dtype)
        dense[merged.indices] = merged.values
        return dense

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.coo_array`` with the same rows, repeated ones as they are.

        Raises
        ------
        ValueError
            Where the slices do not stand for a matrix.
        """
        from scipy.sparse import coo_array  # optional

        if len(self.dense_shape) != 2:
            raise ValueError(
                f"to_scipy: expected a dense_shape of two dimensions, got {self.dense_shape}"
            )
        rows, columns = self.values.shape
        positions = np.repeat(self.indices, columns), np.tile(np.arange(columns), rows)
        return coo_array((self.values.reshape(-1), positions), shape=self.dense_shape)

    @classmethod
    def from_scipy(cls, m: Any) -> IndexedSlices:
        """Return the rows of a ``scipy.sparse`` matrix that have stored elements.

        Parameters
        ----------
        m : scipy.sparse array or matrix
            Two-dimensional, of any format; repeated elements add up.

        Returns
        -------
        IndexedSlices
            Each stored row once, in ascending order, dense along its columns.
        """
        if not hasattr(m, "tocsr"):
            raise TypeError(f"m: expected a scipy.sparse matrix, got {type(m).__name__}")
        if len(m.shape) != 2:
            raise ValueError(f"m: expected two dimensions, got shape {m.shape}")
        csr = m.tocsr()
        rows = np.flatnonzero(np.diff(csr.indptr))
        return cls(csr[rows].toarray(), rows.astype(np.int64), csr.shape)

"""IndexedSlices: the gradient of rows taken from a large array."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple, Never

import numpy as np

from numclip import engine as engines
from numclip import libraries
from numclip.dtypes import NAMES, Array, lookup, refusal
from numclip.engine import Engine
from numclip.errors import entries, expected
from numclip.facts import Facts
from numclip.host.rows import are_within, group

MOST_ROWS = 2**63 - 1  # of which int64 tells one
MOST_BYTES, MOST_FILLING = 2**30, 1000
"""How much is made of a sparse matrix, in bytes and over what it stores: the greater of both."""


class Grouping(NamedTuple):
    """Rows that share an index: ``order[starts[g]:starts[g + 1]]`` for the group g."""

    order: Array
    starts: Array

    @property
    def distinct(self) -> int:
        """How many distinct indices there are."""
        return int(self.starts.size) - 1


class Parts:
    """Takes sparse gradients apart into arrays, which one native call reads.

    `shapes` maps the index of each sparse gradient among all gradients to its dense shape.
    """

    def __init__(self, shapes: Mapping[int, tuple[int, ...]]) -> None:
        self._shapes = list(shapes.items())

    def of(self, items: Sequence[Any], kept: Any = None) -> tuple[Any, ...] | None:
        """Return `items` with slices replaced by their values, followed by all slices' indices.

        A sparse entry that is None or `kept` stays, and takes the slot of its indices as well.
        Return None if a sparse entry is of another type or another dense shape.
        """
        found = [*items]
        for k, shape in self._shapes:
            item = found[k]
            if type(item) is IndexedSlices:
                if item._dense_shape != shape:
                    return None
                found[k] = item._values
                found.append(item._indices)
            elif item is None or item is kept:
                found.append(item)
            else:
                return None
        return tuple(found)


def _shape_of(dense_shape: Any) -> tuple[int, ...]:
    """Return `dense_shape` as a tuple of int; raise TypeError unless it has integers only."""
    if type(dense_shape) is tuple and {*map(type, dense_shape)} == {int}:
        return dense_shape
    try:
        made = tuple(operator.index(size) for size in dense_shape)
        if any(isinstance(size, (bool, np.bool_)) for size in dense_shape):
            raise TypeError
    except TypeError:
        wanted = "a sequence of integers"
        raise TypeError(expected("dense_shape", wanted, repr(dense_shape))) from None
    return made


def _refuse_masked(name: str, array: Any) -> None:
    if isinstance(array, np.ma.MaskedArray):
        raise TypeError(expected(name, "an array", "a masked array; use .filled(0)"))


def slices_of(name: str, gradient: Any) -> IndexedSlices | None:
    """Return a sparse gradient of any library as slices that share its values; None for others."""
    if isinstance(gradient, IndexedSlices):
        return gradient
    parts = libraries.sparse_parts(name, gradient)
    if parts is None:
        return None
    try:
        made = IndexedSlices(parts.values, parts.indices, parts.dense_shape)
    except TypeError as error:
        raise TypeError(f"{name}.{error}") from error
    except ValueError as error:
        raise ValueError(f"{name}.{error}") from error
    made.axes = parts.axes
    return made


class IndexedSlices:
    """A sparse gradient: row ``indices[k]`` of a dense array receives ``values[k]``.

    Rows that repeat add up. Every function of numclip treats it as the dense array it stands
    for, and allocates nothing of that size (but `clip_per_example` on a GPU).

    Parameters
    ----------
    values : array, shape (n, ...)
        The rows: float16, bfloat16, float32, float64, complex64 or complex128. Kept, not
        copied (those of PyTorch or DLPack in the host's memory as a view); written by in-place
        calls. A CUDA array (in C order) makes slices that lie on the GPU.
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
    **On a GPU** rows that repeat are found on the host, the values stay where they are, and sums of
    rows are arrays of the library that the values are of. For norms of an order other than 2, a sum
    of float64 rows that exceeds float64 counts there as not finite.

    **Source**: TensorFlow's ``tf.IndexedSlices``, whose clip ops take the repeated rows as they
    lie (here ``duplicates="raw"``).

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> g = nc.IndexedSlices(np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([7, 7]), (1000, 2))
    >>> nc.global_norm([g])
    7.0
    """

    _values: Any
    _dtype: np.dtype[Any]
    _device: str

    axes = 1  # of another library's sparse array that are the first axis here

    def __init__(self, values: Any, indices: Any, dense_shape: Sequence[int]) -> None:
        shape = self._take(values)
        self._dense_shape = _shape_of(dense_shape)
        given = self._on_host(indices)
        self._check(shape, given)
        self._indices = given.astype(np.int64)
        if not are_within(self._indices, self._dense_shape[0]):
            raise ValueError(
                f"indices: expected rows in [0, {self._dense_shape[0]}), "
                f"got values from {given.min()} to {given.max()}"
            )
        self._indices.setflags(write=False)

    def _take(self, values: Any) -> tuple[int, ...]:
        """Store `values`, their dtype and device; return their shape. Raise if unsupported."""
        if type(values) is np.ndarray and lookup(values.dtype) is not None:
            self._device, self._values, self._dtype = "cpu", values, values.dtype
            shape: tuple[int, ...] = values.shape
            return shape
        _refuse_masked("values", values)
        if not libraries.on_device(values):
            values = libraries.to_numpy("values", values)
        engine = engines.of(values)
        facts = engine.facts("values", values)
        if lookup(facts.native) is None:
            raise TypeError(expected("values", f"one of {NAMES}", refusal(facts.native)))
        if not (facts.c_order or engine.takes_any_rows):
            got = f"strides {facts.strides} for shape {facts.shape}; pass a contiguous copy"
            raise ValueError(expected("values", "rows in C order on the GPU", got))
        self._device = engine.name
        self._values = values if facts.swapped else facts.array
        self._dtype = np.dtype(facts.swapped) if facts.swapped else facts.native
        return facts.shape

    def _on_host(self, indices: Any) -> Array:
        """Return `indices` as a NumPy array; wait for those on a GPU."""
        if type(indices) is np.ndarray:
            return indices
        _refuse_masked("indices", indices)
        if libraries.on_device(indices) and self.is_cuda:
            found: Array = self._engine.indices_on_host(indices)
            return found
        return libraries.to_numpy("indices", indices)

    @property
    def is_cuda(self) -> bool:
        """Whether the values lie on a GPU."""
        return self._device == "cuda"

    @property
    def _engine(self) -> Engine:
        return engines.named(self._device)

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
        """Raise if `indices` or the dense shape do not fit `values`, the shape of the values."""
        shape = self.dense_shape
        if indices.dtype.kind not in "iu" and indices.size:
            raise TypeError(f"indices: expected integers, got {indices.dtype}")
        if not shape or min(shape) < 0 or max(shape) > MOST_ROWS:
            wanted = "at least one dimension, none negative or above 2**63 - 1"
            raise ValueError(expected("dense_shape", wanted, shape))
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

    def __repr__(self) -> str:
        rows = f"{self.indices.size} rows of {self.dtype}"
        return f"IndexedSlices({rows}, dense_shape={self.dense_shape})"

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Never:
        """Refuse the implicit conversion to a NumPy array, which can be too large to make."""
        raise TypeError(
            f"IndexedSlices stand for an array of shape {self.dense_shape}; make it by .to_dense()"
        )

    def __add__(self, other: Any) -> IndexedSlices:
        if not isinstance(other, IndexedSlices):
            return NotImplemented
        return self.concatenate([self, other])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The dtype of the values, as NumPy knows it."""
        return self._dtype

    @cached_property
    def grouping(self) -> Grouping:
        """The rows by index, in the order the indices first appear; made at first use."""
        order, starts = group(self.indices)
        return Grouping(order, starts)

    @property
    def distinct_indices(self) -> Array:
        """The distinct indices, in the order they first appear."""
        return self.indices[self.grouping.order[self.grouping.starts[:-1]]]

    @property
    def has_duplicates(self) -> bool:
        """Whether an index appears more than once."""
        return self.grouping.distinct < self.indices.size

    @property
    def ranks(self) -> Array:
        """Where the distinct indices, in the order they first appear, are in ascending order."""
        return np.argsort(np.argsort(self.distinct_indices))

    def with_values(self, values: Any) -> IndexedSlices:
        """Return slices with the same indices and other values of the same shape."""
        other = object.__new__(type(self))
        other._take(values)
        if tuple(other.values.shape) != tuple(self._values.shape):
            wanted = f"shape {tuple(self._values.shape)}"
            raise ValueError(expected("values", wanted, tuple(other.values.shape)))
        other._indices, other._dense_shape = self._indices, self._dense_shape
        if "grouping" in self.__dict__:
            other.__dict__["grouping"] = self.grouping
        return other

    @classmethod
    def concatenate(cls, parts: Iterable[Any]) -> IndexedSlices:
        """Return the rows of several slices as one object, which stands for their sum.

        Parameters
        ----------
        parts : iterable of IndexedSlices
            At least one; of one dtype and dense shape, all in the host's memory or on one GPU.

        Returns
        -------
        IndexedSlices
            New arrays; rows that repeat are added up when they are used, or by `coalesce`.

        Raises
        ------
        TypeError, ValueError
            Where they do not fit; the message names the first that does not.

        Examples
        --------
        >>> import numpy as np, numclip as nc
        >>> g = nc.IndexedSlices(np.array([[3.0, 4.0]]), [7], (1000, 2))
        >>> both = nc.IndexedSlices.concatenate([g, g])  # or g + g
        >>> both, nc.global_norm([both])
        (IndexedSlices(2 rows of float64, dense_shape=(1000, 2)), 10.0)
        """
        members = list(entries("parts", "an iterable of IndexedSlices", parts))
        if not members:
            raise ValueError(expected("parts", "at least one IndexedSlices", "none"))
        first = members[0]
        for k, part in enumerate(members):
            if not isinstance(part, IndexedSlices):
                kind = type(part).__name__
                raise TypeError(expected(f"parts[{k}]", "IndexedSlices", kind))
            wanted, got = (
                f"{own.dtype} of dense_shape {own.dense_shape} on {own._device!r}"
                for own in (first, part)
            )
            if wanted != got:
                raise ValueError(expected(f"parts[{k}]", f"{wanted}, as in parts[0]", got))
        indices = np.concatenate([part.indices for part in members])
        engine, facts = first._engine, [part._facts for part in members]
        stream = engine.stream_of(facts)
        made = engine.new_of_shape(facts[0], (indices.size, *first.dense_shape[1:]))
        target = engine.facts("values", made)
        start = 0
        for own in facts:
            rows = slice(start, start + own.shape[0])
            array = target.array[rows] if engine.takes_any_rows else target.array
            address = target.address + start * (target.nbytes // max(indices.size, 1))
            engine.copy(target._replace(address=address, shape=own.shape, array=array), own, stream)
            start = rows.stop
        engine.give_back(stream, [*facts, target])
        return cls(made, indices, first.dense_shape)

    def coalesce(self) -> IndexedSlices:
        """Return the slices with repeated rows summed and the indices in ascending order.

        Returns
        -------
        IndexedSlices
            New arrays, on a GPU where the values are there. Sums are exact but for one rounding to
            the dtype of the values (and for what two float64 cannot hold).
        """
        stream = self._stream
        made: IndexedSlices = self._given_back(self.coalesced_on(stream), stream)
        return made

    def coalesced_on(self, stream: Any) -> IndexedSlices:
        """Return the coalesced slices, whose values are summed on a stream."""
        indices = np.sort(self.distinct_indices)
        shape = indices.size, *self.dense_shape[1:]
        return IndexedSlices(self._summed(shape, self.ranks, stream), indices, self.dense_shape)

    def to_dense(self) -> Any:
        """Return the dense array of shape `dense_shape` that the slices stand for."""
        stream = self._stream
        return self._given_back(self.dense_on(stream), stream)

    def dense_on(self, stream: Any) -> Any:
        """Return the dense array, which is made on a stream."""
        return self._summed(self.dense_shape, self.distinct_indices, stream)

    @property
    def _facts(self) -> Facts:
        return self._engine.facts("values", self._values)

    @property
    def _stream(self) -> Any:
        return self._engine.stream_of([self._facts])

    def _summed(self, shape: tuple[int, ...], target_rows: Array, stream: Any) -> Any:
        """Return a new array: row ``target_rows[g]`` has the sum of group g, the others zeros."""
        self._engine.require()
        facts = self._facts
        made = self._engine.new_of_shape(facts, shape)
        target = self._engine.facts("values", made)
        self._engine.sum_rows(facts, target, self.grouping, target_rows, stream)
        return made

    def _given_back(self, made: Any, stream: Any) -> Any:
        """Return `made`, after its library's stream was made to wait for the work on `stream`."""
        own = made._facts if isinstance(made, IndexedSlices) else self._engine.facts("values", made)
        self._engine.give_back(stream, [self._facts, own])
        return made

    def to_scipy(self) -> Any:
        """Return a ``scipy.sparse.coo_array`` with the same rows, repeated ones as they are.

        Raises
        ------
        TypeError
            Where the values are on a GPU.
        ValueError
            Where the slices do not stand for a matrix, or have a dtype that SciPy's have not:
            float16 and bfloat16.
        """
        from scipy.sparse import coo_array  # optional

        if self.is_cuda:
            got = "a CUDA array; make slices of a copy there"
            raise TypeError(expected("to_scipy", "values in the host's memory", got))
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

        Raises
        ------
        TypeError, ValueError
            Where `m` is no such matrix, or its stored rows would take more than 1 GiB and 1000
            times what is stored; ``m.reshape(-1, 1)`` then gives slices of its elements.
        """
        if not hasattr(m, "tocsr"):
            raise TypeError(f"m: expected a scipy.sparse matrix, got {type(m).__name__}")
        if len(m.shape) != 2:
            raise ValueError(f"m: expected two dimensions, got shape {m.shape}")
        from scipy.sparse import csr_array

        coo = m.tocoo()
        rows, numbers = np.unique(coo.row, return_inverse=True)
        shape = rows.size, m.shape[1]
        nbytes = math.prod(shape) * coo.dtype.itemsize
        if nbytes > max(MOST_BYTES, MOST_FILLING * coo.data.nbytes):
            got = f"rows that take {nbytes / 2**30:.1f} GiB; pass m.reshape(-1, 1) for its elements"
            raise ValueError(expected("m", f"{coo.nnz} elements in rows that are not so wide", got))
        return cls(csr_array((coo.data, (numbers, coo.col)), shape).toarray(), rows, m.shape)

"""Plain arrays, contiguous ndarrays of one dtype: their facts for kernels, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType, lookup
from numclip.host.batches import Batch
from numclip.host.kernels import arrays, cpu, plain
from numclip.host.nests import Items
from numclip.host.runtime.jit import entry
from numclip.memory import is_dense

READABLE = arrays.layout_holds()
POINTERS = tuple.__basicsize__  # the offset of the first pointer in a tuple object


class Kind:
    """A dtype, and the facts that `kernels.arrays` demands of arrays to read or to write."""

    def __init__(self, row: DType, readable: Array, writeable: Array) -> None:
        self.row, self.readable, self.writeable = row, readable, writeable

    @cached_property
    def in_c_order(self) -> tuple[Array, Array]:
        """The facts (readable, writeable) that demand C order as well."""
        facts = np.array([self.readable, self.writeable])
        facts[:, arrays.NEEDS] |= arrays.C_ORDER
        return facts[0], facts[1]

    @cached_property
    def clip(self) -> Callable[..., tuple[int, float]]:
        """The entry of `plain.clip`, for readable or writeable facts."""
        return entry(plain.clip, 0, 0, self.readable, self.row.limits, 1.0, 0, self.row.like)

    @cached_property
    def clamp(self) -> Callable[..., int]:
        """The entry of `plain.clamp`."""
        return entry(plain.clamp, 0, 0, self.readable, 1.0, 1.0, self.row.like)


_KINDS: dict[np.dtype[Any], Kind] = {}


def kind_of(items: Items) -> Kind | None:
    """Return the `Kind` of the first item that is not None; None if it is no gradient ndarray."""
    for item in items:
        if item is not None:
            break
    else:
        return None
    if type(item) is not np.ndarray or not READABLE:
        return None
    known = _KINDS.get(item.dtype)
    return known if known is not None else _made(item.dtype)


def _made(dtype: np.dtype[Any]) -> Kind | None:
    row = lookup(dtype)
    if row is None:
        return None
    dtype = np.dtype(dtype.type)  # equal ones (unpickled, with metadata) are other objects
    names = id(np.ndarray), id(None), id(dtype)
    facts = [object.__basicsize__, *names, row.storage.itemsize, row.components, arrays.ALIGNED]
    readable, writeable = np.array([facts, facts], np.int64)
    writeable[arrays.NEEDS] |= arrays.WRITEABLE
    kind = _KINDS[dtype] = Kind(row, readable, writeable)
    return kind


def pointers_of(items: Items) -> int:
    """Return the address of a tuple's pointers, valid as long as the caller holds the tuple."""
    return id(items) + POINTERS


def plain_batch(items: Items, *, write: bool) -> Batch | None:
    """Return contiguous arrays of one dtype as a batch; None if an item is another.

    With `write`, also None if an array is read-only or two share memory.
    """
    kind = kind_of(items)
    if kind is None:
        return None
    batch, apart = batch_of(items, kind, kind.writeable if write else kind.readable)
    if batch is None or (write and not (apart or are_apart(batch))):
        return None
    return batch


def batch_of(items: Items, kind: Kind, facts: Array) -> tuple[Batch | None, bool]:
    """Return (batch or None, apart): None if an array breaks `facts`; if all own their memory."""
    chunks = np.empty((0, 4), np.int64)
    needed = len(items)
    while needed > len(chunks):
        chunks = np.empty((needed, 4), np.int64)
        arguments = pointers_of(items), len(items), facts, chunks
        needed, elements, apart = arrays.table(*arguments)
    if needed < 0:
        return None, False
    nbytes = elements * kind.row.storage.itemsize
    return Batch(kind.row, chunks[:needed], nbytes), apart


def are_apart(batch: Batch) -> bool:
    """Tell whether no chunks overlap: sorted, each ends before the next begins."""
    begins = batch.chunks[:, cpu.SOURCE]
    ends = begins + batch.chunks[:, cpu.LENGTH] * batch.dtype.storage.itemsize
    return bool((np.sort(ends)[:-1] <= np.sort(begins)[1:]).all())


def copy(array: Array) -> Array:
    """Return a copy in the memory order of `array`, or in C order if `array` has gaps."""
    if array.flags.forc or is_dense(array.shape, array.strides, array.itemsize):
        return array.copy("K")
    return array.copy("C")

"""Pairs of a gradient and the array it updates, where all are ordinary NumPy arrays.

Arrays are in C order, so that elements correspond, and share no memory, so that none is written
before it is read. If some gradients are sparse, all have one dtype, and rows are summed at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, as_stored
from numclip.facts import Facts
from numclip.host import plain_arrays
from numclip.host.arrays import share_no_memory
from numclip.host.batches import Batch
from numclip.host.given import merged, wanted_table
from numclip.host.kernels import arrays, cpu, given, grouping
from numclip.host.kernels.arrays import WRITEABLE
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime.jit import entry

_UNUSED = np.empty((0, 4), np.int64)


class Reader:
    """Finds the gradients for the arrays of some updates, if those arrays did not move or change.

    `chunks` are the updates, whose gradient addresses it sets; `distances` are the chunks' byte
    offsets in their arrays.
    """

    def __init__(self, arrays: Sequence[Facts], chunks: Array, distances: Array) -> None:
        dtypes = [np.dtype(facts.native.type) for facts in arrays]
        shapes = [facts.shape for facts in arrays]
        known = np.array([facts.address for facts in arrays], np.int64)
        of_arrays = wanted_table(dtypes, shapes, needs=given.C_ARRAY | WRITEABLE)
        of_gradients = wanted_table(dtypes, shapes, merged(facts.extent for facts in arrays))
        self._count, found = len(arrays), np.empty_like(known)
        self._tables = of_gradients, of_arrays, known, found, chunks, distances
        self._read = entry(given.read_pairs, 0, *self._tables)

    def read(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Let updates read `gradients`; return False and change no update if an array differs."""
        if len(variables) != self._count:
            return False
        held = (*gradients, *variables)
        return self._read(plain_arrays.pointers_of(held), *self._tables)  # type: ignore[no-any-return]


class Sources(NamedTuple):
    """The addresses of dense gradients' chunks; (indices, sums of rows) of each sparse one."""

    starts: Array
    sums: Sequence[tuple[Array, Array]]


def key_of_pairs(
    gradients: list[Any], variables: list[Any], _kernel: str, rows: Mapping[int, Array]
) -> tuple[Any, Sources | None]:
    """Return (key, sources): a key of the memory to update, and where the gradients are.

    `rows` has the row indices of each sparse gradient by its number. (None, None) if there are no
    sparse ones, if an array does not fit, or if there are many bytes. No array is described.
    """
    if not rows:
        return None, None
    sparse = [(gradients[k], variables[k], rows[k]) for k in rows]
    dense = [k for k in range(len(variables)) if k not in rows]
    gradients, variables = [gradients[k] for k in dense], [variables[k] for k in dense]
    held = tuple(array for values, variable, _ in sparse for array in (values, variable))
    kind = plain_arrays.kind_of((*gradients, *held))
    if kind is None or not _are_plain(held, kind) or not all(map(_fit, sparse)):
        return None, None
    batch = _batch_of(gradients, variables, kind)
    if batch is None or sum(values.nbytes for values, _, _ in sparse) >= PARALLEL_BYTES:
        return None, None
    half = len(batch.chunks) // 2
    variables_at = tuple([(variable.ctypes.data, variable.size) for _, variable, _ in sparse])
    others = [variable for _, variable, _ in sparse]
    if not share_no_memory([*gradients, *variables, *others]):
        extents = [
            (address, address, size * kind.row.components, 0) for address, size in variables_at
        ]
        every = np.concatenate([batch.chunks, np.array(extents, np.int64)])
        if not plain_arrays.are_apart(batch._replace(chunks=every)):
            return None, None
    sums = []
    for values, variable, indices in sparse:
        stored = as_stored(values.reshape(len(values), variable.size // len(variable)))
        found = np.empty_like(indices), np.empty_like(stored)
        count = grouping.sum_rows(indices, stored, len(variable), *found)
        if count < 0:
            return None, None
        sums.append((found[0][:count], found[1][:count]))
    key = kind.row.name, *rows, variables_at, batch.chunks[half:].tobytes()
    return key, Sources(batch.chunks[:half, cpu.SOURCE], sums)


def _batch_of(gradients: list[Any], variables: list[Any], kind: plain_arrays.Kind) -> Batch | None:
    """Return dense pairs as a batch, gradients first; None if an array does not fit."""
    held, count = (*gradients, *variables), len(variables)
    if not held:
        return Batch(kind.row, _UNUSED, 0)
    readable, writeable = kind.in_c_order
    batch, _ = plain_arrays.batch_of(held, kind, readable)
    if batch is None or [own.shape for own in gradients] != [own.shape for own in variables]:
        return None
    pointers = plain_arrays.pointers_of(held) + count * arrays.WORD
    found, _, _ = arrays.table(pointers, count, writeable, _UNUSED)
    return None if found < 0 else batch


def _are_plain(held: tuple[Any, ...], kind: plain_arrays.Kind) -> bool:
    """Tell whether `held`, values and variable of each pair, are in C order and of `kind`."""
    for k, facts in enumerate(kind.in_c_order):
        own = held[k::2]  # keeps the tuple alive while its pointers are read
        if arrays.table(plain_arrays.pointers_of(own), len(own), facts, _UNUSED)[0] < 0:
            return False
    return True


def _fit(sparse: tuple[Any, Any, Array]) -> bool:
    """Tell whether the values are one row of a nonempty variable's shape for each index."""
    values, variable, indices = sparse
    rows = values.ndim > 0 and values.shape == (indices.size, *variable.shape[1:])
    return bool(rows and variable.size)

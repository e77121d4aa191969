"""The stored rows of sparse gradients, and takers that copy many gradients in by one call."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from numclip import tables
from numclip.border.gradients import Gradient
from numclip.dtypes import Array
from numclip.engine import Engine, Given
from numclip.slices import IndexedSlices, Parts


class HeldRows:
    """The rows of one parameter's gradient, in memory that grows with them.

    `words` are their addresses and counts, see `numclip.tables`; kernels of the host append rows.
    """

    def __init__(self, param: Any, engine: Engine) -> None:
        self.shape, self._engine, self._dtype = param.shape, engine, param.dtype
        self._length = math.prod(param.shape[1:])
        self.words = np.zeros(tables.HELD_COLUMNS, np.int64)
        self.words[tables.HEIGHT] = param.shape[0]
        self._own(0)

    def _own(self, rows: int) -> None:
        """Allocate memory for `rows` rows, of which none is filled."""
        self.words[: tables.HEIGHT] = 0  # an interrupt leaves no rows rather than wrong ones
        self._memory = self._engine.empty((rows * self._length,), self._dtype)
        self._indices = np.empty(rows, np.int64)
        address = self._engine.facts("rows", self._memory).address
        self.words[: tables.HEIGHT] = address, self._indices.ctypes.data, 0, rows
        self.forget()

    def forget(self) -> None:
        """Drop the cached slices and description: the rows have changed."""
        self._slices: IndexedSlices | None = None
        self._gradient: Gradient | None = None

    @property
    def is_present(self) -> bool:
        """Whether there is a gradient, even one without rows."""
        return bool(self.words[tables.PRESENT])

    @property
    def _count(self) -> int:
        return int(self.words[tables.FILLED])

    @property
    def indices(self) -> Array:
        """The index of each row."""
        return self._indices[: self._count]

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses between which the memory lies."""
        return self._engine.facts("rows", self._memory).extent

    def clear(self) -> None:
        """Forget all rows; the memory is kept."""
        self.words[tables.FILLED] = self.words[tables.PRESENT] = 0
        self.forget()

    def give_away(self) -> tuple[Any, Array, Array]:
        """Return the rows with their memory, and go on without any."""
        given = self._memory, self._indices, self.words.copy()
        self._own(0)
        self.words[tables.PRESENT] = 0
        return given

    def take_back(self, given: tuple[Any, Array, Array]) -> None:
        """Go on with rows that were given away."""
        self.words[: tables.HEIGHT] = 0
        self._memory, self._indices, self.words[:] = given
        self.forget()

    def append(self, grad: IndexedSlices, stream: Any) -> None:
        """Append the rows of slices, which lie on the host or on the engine's device."""
        first, count = self._count, grad.indices.size
        if first + count > self.words[tables.CAPACITY]:
            self._grow(2 * (first + count), stream)
        self._engine.put(self._part(first, count), grad.values, stream)
        self._indices[first : first + count] = grad.indices
        self.words[tables.FILLED], self.words[tables.PRESENT] = first + count, 1
        self.forget()

    def _part(self, first: int, count: int) -> Any:
        shape = count, *self.shape[1:]
        return self._engine.part(self._memory, first * self._length, shape)

    def _grow(self, rows: int, stream: Any) -> None:
        """Allocate memory for `rows` rows, and copy the present rows to it."""
        count, kept, indices = self._count, self._part(0, self._count), self.indices
        self._own(rows)
        if count:
            self._engine.put(self._part(0, count), kept, stream)
            self._indices[:count] = indices

    @property
    def slices(self) -> IndexedSlices:
        """The rows as `IndexedSlices` on a view; the same object until the rows change."""
        if self._slices is None:
            self._slices = IndexedSlices(self._part(0, self._count), self.indices, self.shape)
        return self._slices

    def gradient(self, describe: Callable[[str, Any], Gradient], name: str) -> Gradient:
        """Return the description of the rows, the same object until the rows change."""
        if self._gradient is None:
            self._gradient = describe(name, self.slices)
        return self._gradient


class RowTaker:
    """Takes gradients in by one call, as `Given`, where some are sparse.

    Nothing is taken if the memory of some rows is too small.
    """

    def __init__(self, given: Given, rows: Mapping[int, HeldRows], parts: Parts) -> None:
        self._given, self._rows, self._parts = given, rows, parts
        self.kept, self.copies = given.kept, given.copies

    def take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Do what `Given.take` does, with slices among the items."""
        flat = self._parts.of(items, self.kept)
        if flat is None or not self._given.take(flat, adds=adds):
            return False
        for k, rows in self._rows.items():
            if not (items[k] is self.kept or (adds and items[k] is None)):
                rows.forget()
        return True


def takers_of(groups: Sequence[Any], engine: Engine) -> list[Any]:
    """Return the takers of gradients of the buffers' dtypes and, with masters, the parameters'."""
    own = [(group, name) for group in groups for name in group.names]
    targets = [group.updated[name] if group.sparse else group.seen(name) for group, name in own]
    facts = [engine.facts("gradient", target) for target in targets]
    taken = [extent for group in groups for extent in group.extents]
    rows = rows_of(groups)
    held = {k: each.words for k, each in rows.items()}
    made = [engine.given(facts, taken, None, held)]
    if any(group.masters for group in groups):
        natives = [group.params[name].dtype for group, name in own]
        made.append(engine.given(facts, taken, natives, held))
    takers = [taker for taker in made if taker is not None]
    if not rows:
        return takers
    parts = Parts({k: each.shape for k, each in rows.items()})
    return [RowTaker(taker, rows, parts) for taker in takers]


def rows_of(groups: Sequence[Any]) -> dict[int, HeldRows]:
    """Return the rows of sparse gradients, by their indices among all gradients of the groups."""
    own = [(group, name) for group in groups for name in group.names]
    return {k: group.rows[name] for k, (group, name) in enumerate(own) if group.sparse}

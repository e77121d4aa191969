"""Arrays that a user passes for others of ours, in a fixed order: read where they lie.

Every method does its whole job, or says that it cannot and has written nothing: what is no
ordinary array of the very shape and dtype, or overlaps memory that is to be written, goes the
general way.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType, lookup
from numclip.facts import Facts
from numclip.host import batches
from numclip.host.batches import Batch
from numclip.host.kernels import cpu, given, given_rows
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.plain_arrays import pointers_of
from numclip.host.runtime import threads
from numclip.host.runtime.jit import entry
from numclip.memory import Span

INDEX = np.dtype(np.int64)
Extents = Sequence[tuple[int, int]]
KEPT = object()
"""Stands for an array that stays as it is."""


class Given:
    """Reads arrays for the targets that some facts describe.

    `taken` are addresses between which none of them may lie. Arrays have the dtypes `natives`,
    where these are told, of 16 bits for others of float32. Of what is read last, `addresses`
    are where it is, 0 for None.

    Some targets take rows, the values of any number of them, and after all arrays their indices;
    `held` are the words that say where rows go, see `numclip.tables`, by the targets' numbers.
    """

    kept = KEPT

    def __init__(
        self,
        targets: Sequence[Facts],
        taken: Extents,
        natives: Sequence[np.dtype[Any]] | None = None,
        held: Mapping[int, Array] | None = None,
    ) -> None:
        self.targets, self._held = list(targets), held or {}
        self.addresses = np.zeros(len(targets) + len(self._held), np.int64)
        natives = natives or [facts.native for facts in targets]
        self._dtypes = [np.dtype(native.type) for native in natives]  # whose ids are compared
        shapes = [facts.shape for facts in self.targets]
        self.wanted = wanted_table(self._dtypes, shapes, merged(taken), self._held)
        self._batches = self._made_batches(natives)
        self.is_little = sum(batch.nbytes for batch, _ in self._batches) < PARALLEL_BYTES
        self._rows = self._row_table()
        self._only = self._batches[0] if len(self._batches) == 1 and self.is_little else None
        self._takes = {adds: self._taking(adds=adds) for adds in (False, True)}

    def _row_table(self) -> Array:
        """Return what `kernels.given_rows` is told of the targets that take rows."""
        rows = rows_table(self._held)
        for row, t in zip(rows, self._held, strict=True):
            own = lookup(self.targets[t].native)
            assert own is not None
            row[given_rows.LENGTH] = math.prod(self.targets[t].shape[1:]) * own.components
        return rows

    def _made_batches(self, natives: Sequence[np.dtype[Any]]) -> list[tuple[Batch, Array]]:
        """Return the batches of each dtype, and as what it is written; no chunks are of rows.

        Their sources are distances from the beginnings of arrays.
        """
        starts = np.array([facts.address for facts in self.targets], np.int64)
        spans: dict[DType, dict[int, Span]] = {}
        for k, (facts, native) in enumerate(zip(self.targets, natives, strict=True)):
            row, written = lookup(native), lookup(facts.native)
            assert row is not None
            assert written is not None
            size = 0 if k in self._held else math.prod(facts.shape) * row.components
            spans.setdefault(written, {})[k] = Span(row, facts.address, facts.address, size)
        found = []
        for written, own in spans.items():
            for batch in batches.batches(own):
                home = starts[batch.chunks[:, cpu.OWNER]]
                batch.chunks[:, cpu.SOURCE] -= home
                ratio = written.storage.itemsize // batch.dtype.storage.itemsize
                batch.chunks[:, cpu.TARGET] = home + ratio * batch.chunks[:, cpu.SOURCE]
                found.append((batch, written.like))
        return found

    def read(self, items: tuple[Any, ...]) -> bool:
        """Find where arrays lie; tell whether all are as they are wanted."""
        self.check(items)
        return given.find(pointers_of(items), self.wanted, self.addresses)  # type: ignore[no-any-return]

    def check(self, items: tuple[Any, ...]) -> None:
        """Assert that there is an array for each of ours: kernels read so many pointers."""
        if len(items) != self.addresses.size:
            raise AssertionError(f"{len(items)} arrays for {self.addresses.size}")

    def take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Copy arrays into ours or add them; tell whether all are as they are wanted.

        None stands for zeros, `KEPT` for what is there.
        """
        self.check(items)
        if self._only is not None:
            batch, wide = self._only
            how = adds, batch.dtype.like, wide, self.addresses
            if self._held:
                tables = self.wanted, batch.chunks, self._rows
                return given_rows.take(pointers_of(items), *tables, *how)  # type: ignore[no-any-return]
            return self._take(pointers_of(items), self.wanted, batch.chunks, *how)
        if self._held or not self.read(items):
            return False
        self._takes[adds]()
        return True

    @cached_property
    def _take(self) -> Callable[..., bool]:
        assert self._only is not None
        batch, wide = self._only
        how = False, batch.dtype.like, wide, self.addresses
        return entry(given.take, 0, self.wanted, batch.chunks, *how)

    def copies(self, items: tuple[Any, ...], *, adds: bool) -> tuple[Any, ...] | None:
        """Return little arrays as copies that can be taken, with the same bits as a result.

        None where one is no array of NumPy, or of another shape, or would be added in its own
        dtype, and where an element becomes infinite.
        """
        found = [*items]
        for k, facts in enumerate(self.targets):
            item = items[k]
            if item is not None and item is not KEPT and k not in self._held:
                plain = type(item) is np.ndarray or isinstance(item, np.floating)  # sums are that
                if not (self.is_little and plain and item.shape == facts.shape):
                    return None
                found[k] = copy = _copy(np.asarray(item), self._dtypes[k], adds=adds)
                if copy is None:
                    return None
        return tuple(found)

    def _taking(self, *, adds: bool) -> Callable[[], object]:
        """Return what copies or adds arrays that were found."""
        how = [(batch, (adds, batch.dtype.like, wide)) for batch, wide in self._batches]
        return threads.kept(
            [batch.call(given.take_found, *own, self.addresses) for batch, own in how]
        )


def _copy(array: Array, native: np.dtype[Any], *, adds: bool) -> Array | None:
    """Return an array in C order and of a dtype; None where that loses more than digits."""
    row = lookup(array.dtype)
    if row is None or (row.components == 2 and native.kind != "c"):
        return None
    exact = array.dtype == native or np.can_cast(array.dtype, native)
    if adds and not exact:
        return None
    copy = array.astype(native, order="C")
    return copy if exact or np.isfinite(copy).all() else None


def wanted_table(
    dtypes: Sequence[np.dtype[Any]],
    shapes: Sequence[tuple[int, ...]],
    taken: Extents = (),
    held: Container[int] = (),
    needs: int = given.PLAIN,
) -> Array:
    """Return what `kernels.given` is told of arrays; `held` are those that take rows.

    `needs` are the flags that NumPy's arrays must have.
    """
    free = [k for k in range(len(shapes)) if k in held]
    rows: list[int] = []
    axes: list[int] = []
    first = given.HEAD + given.ROW * (len(shapes) + len(free))
    for k, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=True)):
        own = int(k in held)
        nbytes = math.prod(shape[own:]) * dtype.itemsize
        rows += [id(dtype), len(shape), first + len(axes), nbytes, own]
        axes += shape
    rows += [id(INDEX), 1, first, INDEX.itemsize, 1] * len(free)
    ids = id(np.ndarray), id(None), id(KEPT)
    head = [object.__basicsize__, *ids, first + len(axes), len(taken), needs]
    ends = *(low for low, _ in taken), *(high for _, high in taken)
    return np.array([*head, *rows, *axes, *ends], np.int64)


def merged(extents: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return extents in ascending order, those that touch as one."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(extents):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        elif low < high:
            merged.append((low, high))
    return merged


def rows_table(held: Mapping[int, Array]) -> Array:
    """Return a row of `kernels.given_rows` for each sparse tensor, by its number."""
    table = np.zeros((len(held), given_rows.ROW_COLUMNS), np.int64)
    table[:, given_rows.TENSOR] = [*held]
    table[:, given_rows.HELD] = [own.ctypes.data for own in held.values()]
    return table

"""Arrays that a user passes in a fixed order, each for one of our targets: read where they lie.

Each method either finishes its job, or returns False or None and writes no target. Arrays that are
not ordinary ndarrays of the target's shape and dtype in C order, or that overlap memory that is
written, are left to the general path.
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
"""Passed instead of an array whose target is to stay as it is."""


class Given:
    """Reads arrays for `targets`, which are described by their facts.

    `taken` are extents (begin, end) that no array may overlap. `natives`, if given, are the
    arrays' dtypes; a 16-bit one can be read for a target of float32. `addresses` are those of the
    arrays that were read last, 0 for None.

    A target in `held` takes rows: the values of any number of them, and after all arrays their
    indices. `held` has, by targets' numbers, words on where rows go, see `numclip.tables`.
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
        self._dtypes = [np.dtype(native.type) for native in natives]  # kernels compare their ids
        shapes = [facts.shape for facts in self.targets]
        self.wanted = wanted_table(self._dtypes, shapes, merged(taken), self._held)
        self._batches = self._made_batches(natives)
        self.is_little = sum(batch.nbytes for batch, _ in self._batches) < PARALLEL_BYTES
        self._rows = self._row_table()
        self._only = self._batches[0] if len(self._batches) == 1 and self.is_little else None
        self._takes = {adds: self._taking(adds=adds) for adds in (False, True)}

    def _row_table(self) -> Array:
        """Return the table of `kernels.given_rows` for the targets that take rows."""
        rows = rows_table(self._held)
        for row, t in zip(rows, self._held, strict=True):
            own = lookup(self.targets[t].native)
            assert own is not None
            row[given_rows.LENGTH] = math.prod(self.targets[t].shape[1:]) * own.components
        return rows

    def _made_batches(self, natives: Sequence[np.dtype[Any]]) -> list[tuple[Batch, Array]]:
        """Return (batch, storage sample of the targets) for each dtype, without targets of rows.

        The sources of the chunks are byte offsets in the arrays.
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
        """Write the arrays' addresses to `addresses`; return False if one is not as wanted."""
        self.check(items)
        return given.find(pointers_of(items), self.wanted, self.addresses)  # type: ignore[no-any-return]

    def check(self, items: tuple[Any, ...]) -> None:
        """Assert that there is an item for each address: kernels read so many pointers."""
        if len(items) != self.addresses.size:
            raise AssertionError(f"{len(items)} arrays for {self.addresses.size}")

    def take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Copy arrays to the targets, or add them; return False if one is not as wanted.

        None stands for zeros; the target of `KEPT` stays as it is.
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
        """Return items with copies of arrays in the wanted dtype and order, which `take` accepts.

        The result has the same bits. None if there are many bytes, if an item is no ndarray of the
        target's shape, if adding it would round in another dtype, or if an element overflows.
        """
        found = [*items]
        for k, facts in enumerate(self.targets):
            item = items[k]
            if item is not None and item is not KEPT and k not in self._held:
                # Sums over all axes are numbers of NumPy's.
                is_numpy = type(item) is np.ndarray or isinstance(item, np.floating)
                if not (self.is_little and is_numpy and item.shape == facts.shape):
                    return None
                found[k] = copy = _copy(np.asarray(item), self._dtypes[k], adds=adds)
                if copy is None:
                    return None
        return tuple(found)

    def _taking(self, *, adds: bool) -> Callable[[], object]:
        """Return the function that copies or adds the arrays at `addresses`."""
        how = [(batch, (adds, batch.dtype.like, wide)) for batch, wide in self._batches]
        return threads.kept(
            [batch.call(given.take_found, *own, self.addresses) for batch, own in how]
        )


def _copy(array: Array, native: np.dtype[Any], *, adds: bool) -> Array | None:
    """Return a copy in C order and of a dtype; None if the cast loses more than digits."""
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
    needs: int = given.C_ARRAY,
) -> Array:
    """Return the table `wanted` of `kernels.given` for arrays, those in `held` of any row count.

    `needs` are the flags that the ndarrays must have, `taken` extents that they must not overlap.
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
    """Return extents in ascending order, with those that overlap or touch merged."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(extents):
        if merged and low <= merged[-1][1]:
            merged[-1] = merged[-1][0], max(high, merged[-1][1])
        elif low < high:
            merged.append((low, high))
    return merged


def rows_table(held: Mapping[int, Array]) -> Array:
    """Return the table of `kernels.given_rows`: a row for each sparse tensor in `held`."""
    table = np.zeros((len(held), given_rows.ROW_COLUMNS), np.int64)
    table[:, given_rows.TENSOR] = [*held]
    table[:, given_rows.HELD] = [own.ctypes.data for own in held.values()]
    return table

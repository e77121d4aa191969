"""Steps of little data by one native call each, or by two where bounds follow the norms.

Each call finds the gradients, measures, decides and writes; of two, the first one measures alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.host.batches import Batch
from numclip.host.given import Given
from numclip.host.kernels import cpu, given, ranks, row_steps
from numclip.host.plain_arrays import POINTERS
from numclip.host.runtime.jit import entry

BOUNDS = np.zeros(1)
"""Has the type of the bounds of pools, for which kernels are entered."""


class ClipsAtOnce:
    """Clips one batch in place; see `numclip.engine.AtOnce`.

    `tables` are what kernels work on beside the chunks, by their numbers in `kernels.given`; those
    of rows are there where gradients are sparse.
    """

    def __init__(self, batch: Batch, tables: dict[int, Array]) -> None:
        self._like, self._chunks = batch.dtype.like, batch.chunks.copy()
        self._kernels: Any = row_steps if given.ROWS in tables else given
        self._held = [*tables.values()]
        self._own = np.zeros((given.TABLES, 3), np.int64)
        for k, table in {given.CHUNKS: self._chunks, **tables}.items():
            point(self._own, k, table)
        self._outcomes: Sequence[Array] = ()

    @cached_property
    def _decide(self) -> Callable[..., bool]:
        return entry(self._kernels.decide, True, 0, 1.0, self._own, BOUNDS, self._like)

    @cached_property
    def _clip(self) -> Callable[..., bool]:
        return entry(self._kernels.clip, True, 0, 1.0, self._own, BOUNDS, self._like)

    def _turn_to(self, outcomes: Sequence[Array]) -> None:
        """Let what is found be written to some tables; an interrupt leaves it to the next call."""
        self._outcomes = ()
        self._point_to(outcomes)
        self._outcomes = outcomes

    def _point_to(self, outcomes: Sequence[Array]) -> None:
        """Write the words of these tables."""
        point(self._own, given.SUMS, outcomes[0][0])
        point(self._own, given.DECISIONS, outcomes[1][0])

    def measure(
        self, _items: Any, place: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Measure and decide alone."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return self._decide(True, place, unscale, self._own, bounds, self._like)

    def take(
        self,
        _items: Any,
        place: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,
    ) -> bool:
        """Clip; without `measures`, by what was measured before."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return self._clip(measures, place, unscale, self._own, bounds, self._like)


class ValuesAtOnce(ClipsAtOnce):
    """Holds elements between limits, rows of two for each tensor; and measures what is left.

    `later` is the plan that measures again, and its tables for that.
    """

    def __init__(
        self,
        batch: Batch,
        tables: dict[int, Array],
        limits: Array,
        later: tuple[Any, dict[int, Array]],
    ) -> None:
        super().__init__(batch, tables)
        self._limits, (self._later, after) = limits, later
        self._held += after.values()
        self._after = self._own.copy()
        for k, table in after.items():
            point(self._after, k, table)

    def _point_to(self, outcomes: Sequence[Array]) -> None:
        super()._point_to(outcomes)
        point(self._after, given.SUMS, outcomes[2][0])
        point(self._after, given.DECISIONS, outcomes[3][0])

    def take(
        self,
        _items: Any,
        place: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,  # noqa: ARG002
    ) -> bool:
        """Measure and clip."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        tables = self._own, self._after, self._limits
        done, right = given.hold(place, unscale, *tables, bounds, self._like)
        if done and not right:  # what was in the safe range is so no more
            self._later.measure(2.0)
            self._later.decide((outcomes[2][place], outcomes[3][place]))
        return done  # type: ignore[no-any-return]


class RanksAtOnce(ClipsAtOnce):
    """Clips by the sums of all ranks: by a call before they are exchanged, and one after.

    `told` are the tables that `kernels.ranks` names, `exchanged` the heads and the rows of all.
    """

    def __init__(
        self,
        batch: Batch,
        tables: dict[int, Array],
        told: Sequence[Array],
        exchanged: tuple[Array, Array],
    ) -> None:
        super().__init__(batch, tables)
        self._held += told
        self._told = np.zeros((ranks.TABLES, 3), np.int64)
        for k, table in enumerate(told):
            point(self._told, k, table)
        self._heads, self._every = exchanged

    def tell(self, place: int, outcomes: Sequence[Array]) -> bool:
        """Measure, and write the rows to tell; tell whether that was right."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return ranks.tell(place, self._own, self._told, self._like)  # type: ignore[no-any-return]

    def clip(self, place: int, unscale: float, bounds: Array) -> bool:
        """Clip by the rows of all; tell likewise."""
        return ranks.clip(  # type: ignore[no-any-return]
            place, unscale, self._own, bounds, self._heads, self._every, self._told, self._like
        )


class StepsAtOnce(ClipsAtOnce):
    """Takes steps of one batch, by its gradients or by given ones.

    `starts` are where its tensors begin.
    """

    def __init__(
        self, kernel: str, batch: Batch, starts: Array, reader: Given, tables: dict[int, Array]
    ) -> None:
        self._factors = tables.pop(given.FACTORS)
        distances = batch.chunks[:, cpu.SOURCE] - starts[batch.chunks[:, cpu.OWNER]]
        tables |= {given.DISTANCES: distances, given.LENGTHS: batch.chunks[:, cpu.LENGTH].copy()}
        super().__init__(batch, tables)
        self._kernel = getattr(self._kernels, kernel)
        self._starts, self._addresses = starts, starts.copy()
        self._count = reader.addresses.size
        point(self._own, given.ADDRESSES, self._addresses)
        point(self._own, given.WANTED, reader.wanted)
        self._given = self._own.copy()
        point(self._given, given.ADDRESSES, reader.addresses)

    @cached_property
    def _measure(self) -> Callable[..., bool]:
        return entry(self._kernels.measure, 0, 0, 1.0, self._own, BOUNDS, self._like)

    @cached_property
    def _step(self) -> Callable[..., bool]:
        told = 0, 0, 1.0, self._own, BOUNDS, self._factors, self._like
        return entry(self._kernel, *told)

    def leave(self, numbers: Sequence[int]) -> None:
        """Let some tensors have no gradient of the batch's in the next step, all others one."""
        self._addresses[:] = self._starts
        self._addresses[numbers] = given.ABSENT

    def _point_to(self, outcomes: Sequence[Array]) -> None:
        super()._point_to(outcomes)
        for k in (given.SUMS, given.DECISIONS):
            self._given[k] = self._own[k]

    def _read(self, items: Any) -> tuple[int, Array]:
        """Return where kernels find gradients, and by which tables."""
        if items is None:
            return given.OWN, self._own
        if len(items) != self._count:  # as `Given.check`, in a third of the time
            raise AssertionError(f"{len(items)} arrays for {self._count}")
        return id(items) + POINTERS, self._given

    def measure(
        self, items: Any, place: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Find gradients, measure and decide alone."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        pointers, tables = self._read(items)
        return self._measure(pointers, place, unscale, tables, bounds, self._like)

    def take(
        self,
        items: Any,
        place: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,
    ) -> bool:
        """Clip and update, likewise."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        pointers, tables = self._read(items)
        if not measures:
            pointers = given.AGAIN
        return self._step(pointers, place, unscale, tables, bounds, self._factors, self._like)


def point(tables: Array, k: int, table: Array) -> None:
    """Write the words of a table."""
    rows, columns = table.shape if table.ndim == 2 else (1, table.size)
    tables[k] = table.ctypes.data, rows, columns

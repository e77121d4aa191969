"""Steps of few bytes by one native call each, or by two where bounds depend on the norms.

A single call finds the gradients, measures, decides and writes. Of two calls, the first one writes
no gradients and no parameters.
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
"""Has the type of the bounds of pools, with which `entry` specialises kernels."""


class ClipsAtOnce:
    """Clips one batch in place; see `numclip.engine.AtOnce`.

    `tables` are the kernels' tables other than the chunks, by their numbers in `kernels.given`.
    If gradients are sparse, those of rows are among them.
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
        """Let kernels write to the tables `outcomes`; after an interrupt the next call does it."""
        self._outcomes = ()
        self._point_to(outcomes)
        self._outcomes = outcomes

    def _point_to(self, outcomes: Sequence[Array]) -> None:
        """Write the words (address, rows, columns) of these tables."""
        point(self._own, given.SUMS, outcomes[0][0])
        point(self._own, given.DECISIONS, outcomes[1][0])

    def measure(
        self, _items: Any, slot: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Measure and decide, writing no gradient; return False if these need another path."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return self._decide(True, slot, unscale, self._own, bounds, self._like)

    def take(
        self,
        _items: Any,
        slot: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,
    ) -> bool:
        """Clip; without `measures`, by the sums of the call before. Return False as `measure`."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return self._clip(measures, slot, unscale, self._own, bounds, self._like)


class ValuesAtOnce(ClipsAtOnce):
    """Clamps elements to `limits`, a row (low, high) for each tensor, then measures the results.

    `later` is (plan, tables): the plan that measures the results, and its tables.
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
        slot: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,  # noqa: ARG002
    ) -> bool:
        """Measure, clamp and measure the results."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        tables = self._own, self._after, self._limits
        done, right = given.hold(slot, unscale, *tables, bounds, self._like)
        if done and not right:  # clamped squares left the safe range
            self._later.measure(2.0)
            self._later.decide((outcomes[2][slot], outcomes[3][slot]))
        return done  # type: ignore[no-any-return]


class RanksAtOnce(ClipsAtOnce):
    """Clips by the sums of all ranks: one call before the ranks exchange rows, one after.

    `row_tables` are the tables that `kernels.ranks` names, `received` the heads and rows of all
    ranks.
    """

    def __init__(
        self,
        batch: Batch,
        tables: dict[int, Array],
        row_tables: Sequence[Array],
        received: tuple[Array, Array],
    ) -> None:
        super().__init__(batch, tables)
        self._held += row_tables
        self._row_tables = np.zeros((ranks.TABLES, 3), np.int64)
        for k, table in enumerate(row_tables):
            point(self._row_tables, k, table)
        self._heads, self._every = received

    def publish(self, slot: int, outcomes: Sequence[Array]) -> bool:
        """Measure, and write the rows to send; return False if these need another path."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        return ranks.publish(slot, self._own, self._row_tables, self._like)  # type: ignore[no-any-return]

    def clip(self, slot: int, unscale: float, bounds: Array) -> bool:
        """Clip by the rows of all ranks; return False likewise."""
        return ranks.clip(  # type: ignore[no-any-return]
            slot, unscale, self._own, bounds, self._heads, self._every, self._row_tables, self._like
        )


class StepsAtOnce(ClipsAtOnce):
    """Takes optimizer steps of one batch, by its own gradients or by those that a user passes.

    `starts` are the addresses of its tensors.
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
        arguments = 0, 0, 1.0, self._own, BOUNDS, self._factors, self._like
        return entry(self._kernel, *arguments)

    def leave(self, numbers: Sequence[int]) -> None:
        """Let exactly the tensors `numbers` have no gradient in the next step of own gradients."""
        self._addresses[:] = self._starts
        self._addresses[numbers] = given.ABSENT

    def _point_to(self, outcomes: Sequence[Array]) -> None:
        super()._point_to(outcomes)
        for k in (given.SUMS, given.DECISIONS):
            self._given[k] = self._own[k]

    def _read(self, items: Any) -> tuple[int, Array]:
        """Return (pointers, tables) by which kernels find the gradients."""
        if items is None:
            return given.OWN, self._own
        if len(items) != self._count:  # as `Given.check`, but in a third of its time
            raise AssertionError(f"{len(items)} arrays for {self._count}")
        return id(items) + POINTERS, self._given

    def measure(
        self, items: Any, slot: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Find the gradients, measure and decide, without writing; return False as `take`."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        pointers, tables = self._read(items)
        return self._measure(pointers, slot, unscale, tables, bounds, self._like)

    def take(
        self,
        items: Any,
        slot: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,
    ) -> bool:
        """Clip and update; return False, with no parameter written, if this needs another path."""
        if outcomes is not self._outcomes:
            self._turn_to(outcomes)
        pointers, tables = self._read(items)
        if not measures:
            pointers = given.AGAIN
        return self._step(pointers, slot, unscale, tables, bounds, self._factors, self._like)


def point(tables: Array, k: int, table: Array) -> None:
    """Write the words of a table, (address, rows, columns), to row `k` of `tables`."""
    rows, columns = table.shape if table.ndim == 2 else (1, table.size)
    tables[k] = table.ctypes.data, rows, columns

"""Operations of the GPU on tensors: their tables, scratch memory, launches.

A plan is made once for some tensors and used for many steps. None of its operations waits for
the GPU, and only new laws, rows and totals are sent over the bus.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip import tables
from numclip.cuda import device, memory
from numclip.cuda.contiguous import Chunks
from numclip.cuda.kernels import deciding, norms
from numclip.cuda.rows import Rows
from numclip.cuda.strided import Tiles
from numclip.cuda.work import Shared, Work, measure
from numclip.dtypes import Array
from numclip.engine import Groups
from numclip.law import Law, Laws, Pool, whole_pools
from numclip.memory import AnySpan, RowSpan, Span, Strided


class HostTable:
    """A table on the GPU, zeros at first, that the host overwrites; only changes are sent."""

    def __init__(self, shape: tuple[int, int], stream: Any) -> None:
        self.sent = np.zeros(shape)
        self.table = memory.table(self.sent, stream)

    def write(self, table: Array, stream: Any) -> None:
        """Write a table for the later launches of the stream, if it differs from the last one."""
        if not np.array_equal(table, self.sent, equal_nan=True):
            memory.update(self.table, table, stream)
            self.sent = table


WORKS: dict[type, Any] = {Span: Chunks, Strided: Tiles, RowSpan: Rows}
"""The `Work` class of each kind of tensor."""


class Plan:
    """What the kernels need to measure and scale some tensors.

    Its partial sums and its law serve one use at a time: threads that share a plan hold `lock`
    from writing the law to the last launch that reads a decision.
    """

    def __init__(self, spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any) -> None:
        self.lock = threading.RLock()
        self.spans: list[Any] = list(spans)
        self.pools = list(pools)
        firsts = self._set_works(stream)
        self.tensors = memory.table(self._tensor_table(firsts), stream)
        partial = memory.table(np.zeros((max(int(firsts[-1]), 1), tables.SUM_COLUMNS)), stream)
        self._shared = Shared(self.tensors, partial)
        self._facts = Laws(self.spans, self.pools)
        self._pools = memory.table(self._facts.pool_table(self.pools), stream)
        groups = 1 + max(pool.group for pool in pools)
        self._tickets = memory.table(np.zeros(len(pools) + groups + 1, np.uint32), stream)
        self._laws = self._own_laws = HostTable((len(pools), tables.LAW_COLUMNS), stream)
        self._leaving: HostTable | None = None
        self._groupings: list[Groups] = []
        self._order = np.float64(2.0)  # of the partial sums
        # Maxima are over real and imaginary parts; complex magnitudes take a second read.
        whole = [span for span in spans if not isinstance(span, Span)]
        self._hypotenuses = any(span.dtype.components == 2 for span in whole)

    def _set_works(self, stream: Any) -> Array:
        """Make a `Work` for each kind of tensor; return where each one's partial sums begin."""
        members: dict[type, dict[int, Any]] = {}
        for k, span in enumerate(self.spans):
            members.setdefault(type(span), {})[k] = span
        self._works: list[Work] = [WORKS[kind](own) for kind, own in members.items()]
        self._rows = next((work for work in self._works if isinstance(work, Rows)), None)
        numbers = [list(own) for own in members.values()]
        counts = np.zeros(len(self.spans), np.int64)
        for work, own in zip(self._works, numbers, strict=True):
            counts[own] = work.counts
        firsts = np.concatenate([[0], np.cumsum(counts)])
        for work, own in zip(self._works, numbers, strict=True):
            work.send(firsts[own], stream)
        return firsts

    def _tensor_table(self, firsts: Array) -> Array:
        table = np.zeros((len(self.spans), 5), np.int64)
        table[:, tables.FIRST], table[:, tables.LAST] = firsts[:-1], firsts[1:]
        for p, pool in enumerate(self.pools):
            table[pool.first : pool.last, tables.POOL] = p
            table[pool.first : pool.last, tables.ZEROING] = pool.policy == "zero"
        table[:, tables.REPEATS] = [WORKS[type(span)].repeats for span in self.spans]
        return table

    def take_rows(self, spans: Sequence[RowSpan], groupings: Sequence[Groups], stream: Any) -> None:
        """Set the spans and groupings of the tensors whose rows can share an index, if changed."""
        numbers = [k for k, span in enumerate(self.spans) if isinstance(span, RowSpan)]
        known = [self.spans[k] for k in numbers] == list(spans)
        if known and list(map(id, groupings)) == list(map(id, self._groupings)):
            return
        for k, span in zip(numbers, spans, strict=True):
            self.spans[k] = span
        self._groupings = list(groupings)
        self._facts = Laws(self.spans, self.pools)
        if self._rows is not None:
            self._rows.take(spans, groupings, stream)

    def keep_sums(self) -> None:
        """Have the next `take_rows` allocate the sums of rows, which `sum_scaled` writes."""
        self._groupings = []
        if self._rows is not None:
            self._rows.keep_sums()

    def row_sums(self) -> list[tuple[int, RowSpan, int]]:
        """Return (number, span, address of sums) of each tensor whose rows can share an index."""
        found = [(k, span) for k, span in enumerate(self.spans) if isinstance(span, RowSpan)]
        sums = [] if self._rows is None else self._rows.sums
        return [(*own, address) for own, address in zip(found, sums, strict=True)]

    def sum_scaled(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Write the sums of rows times the decided factor, for pools that are not skipped."""
        if self._rows is not None:
            self._rows.sum_scaled(self._shared, outcome[1], stream)

    def outcome(self, stream: Any) -> tuple[Any, Any]:
        """Return tables for the sums of the tensors and the decisions for the pools."""
        sums = np.zeros((len(self.spans), tables.SUM_COLUMNS))
        decisions = np.zeros((len(self.pools) + 1, tables.DECISION_COLUMNS))
        return memory.table(sums, stream), memory.table(decisions, stream)

    def write_laws(self, law: Law, stream: Any) -> None:
        """Set the law of the following decisions; its numbers may be arrays, an entry a pool."""
        self._laws = self._own_laws
        self._laws.write(self._facts.table(law), stream)

    def at_once(self, _divisors: Array, _held: Any) -> None:
        """Return None: on the GPU a clip takes several launches."""

    def values_at_once(self, _later: Any, _limits: Array) -> None:
        """Return None, as `at_once` does."""

    def leave(self, stream: Any) -> None:
        """Have decisions leave tensors as they are, by a law with no bound that is sent once."""
        if self._leaving is None:
            self._leaving = HostTable(self._own_laws.sent.shape, stream)
        self._laws = self._leaving
        self._laws.write(self._facts.table(Law(math.inf)), stream)

    def measure(self, ord: float, stream: Any) -> None:
        """Write the partial sums: one read, or two, see `work.measure`."""
        self._order = np.float64(ord)
        inputs = ord, self._shared, self._laws.table, self._find, stream
        measure(self._works, *inputs, hypotenuses=self._hypotenuses)

    def _find(self, column: int, stream: Any) -> None:
        """Write the largest of each pool's partial maxima to a column of the law."""
        arguments = self.tensors, self._pools, self._shared.partial, np.int64(column)
        device.launch(norms.find_peaks, len(self.pools), stream, *arguments, self._laws.table)

    def decide(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Add up the partial sums, and decide for every pool."""
        laid = self.tensors, self._pools, self._order, self._laws.table
        tables = *laid, self._shared.partial, self._tickets, *outcome
        device.launch(deciding.decide_pools, len(self.spans), stream, *tables)

    add = decide  # one launch does both

    def decide_by(self, totals: Array, outcome: tuple[Any, Any], stream: Any) -> None:
        """Decide by `totals`, one row of sums for each pool, in place of the plan's own sums."""
        law, pools = self._laws.sent, whole_pools(self._facts.pool_table(self.pools))
        tensors = np.zeros((len(pools), 5), np.int64)
        tensors[:, [tables.FIRST, tables.LAST]] = pools[:, [tables.FIRST, tables.LAST]]
        tensors[:, tables.POOL], tensors[:, tables.REPEATS] = pools[:, tables.FIRST], 1
        laid = [memory.table(table, stream) for table in (tensors, pools)]
        sent = [memory.table(table, stream) for table in (law, totals)]
        spare = memory.table(np.zeros_like(totals), stream)
        arguments = *laid, law[0, tables.ORD], *sent, self._tickets, spare, outcome[1]
        device.launch(deciding.decide_pools, len(pools), stream, *arguments)

    def scale(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Write each tensor times the decided factor; one read, one write, or none."""
        for work in self._works:
            work.scale(self._shared, outcome[1], stream)

    def write_exceptional(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Scale in place the tensors whose mode is TRUNCATE or CLEAN; rarely any."""
        for work in self._works:
            work.scale(self._shared, outcome[1], stream, tables.TRUNCATE)

    def clamp(
        self, outcome: tuple[Any, Any], low: float, high: float, stream: Any, members: range
    ) -> None:
        """Clamp the tensors with numbers in `members` between two bounds, unless skipped."""
        bounds = np.float64(low), np.float64(high)
        for work in self._works:
            work.clamp(self._shared, outcome[1], bounds, members, stream)

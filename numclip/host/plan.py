"""Plans of the host, which measure, decide and write tensors of one norm or of several."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.engine import AtOnce, Groups, Outcome
from numclip.host import batches, orders, rows
from numclip.host.at_once import ClipsAtOnce, RanksAtOnce, ValuesAtOnce
from numclip.host.batches import Batch
from numclip.host.given import rows_table
from numclip.host.kernels import cpu, given, given_rows, row_steps
from numclip.host.kernels import pools as kernels
from numclip.host.kernels.powers import decide_by_powers
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime import threads
from numclip.host.several import SeveralClips
from numclip.host.strided import Copied
from numclip.law import Law, Laws, Pool, whole_pools
from numclip.memory import AnySpan, RowSpan, Span, Strided
from numclip.tables import (
    BAD,
    CLAMPED,
    CLEAN,
    DECISION_COLUMNS,
    LAW_COLUMNS,
    LEAVE,
    MODE,
    MULTIPLY,
    RARE,
    SKIPPED,
    SUM_COLUMNS,
)


class Plan:
    """See `numclip.engine.Plan`; streams are ignored, and no two threads share a plan.

    Strided arrays are copied when the plan is made, and their results copied to the targets.
    """

    lock = contextlib.nullcontext()

    def __init__(
        self, spans: Sequence[AnySpan], pools: Sequence[Pool], _stream: Any = None
    ) -> None:
        self.spans: list[Any] = list(spans)
        self.pools = list(pools)
        self.pool_of = np.repeat(np.arange(len(pools)), [pool.last - pool.first for pool in pools])
        self._zeroing = any(pool.policy == "zero" for pool in pools)
        self._law = np.zeros((len(pools), LAW_COLUMNS))
        self._groupings: dict[int, Groups] = {}
        self._fits = True  # whether the tables belong to the spans and groupings
        self._order: float | None = None  # of the norms that the next decision measures
        self._lay_out()

    def _lay_out(self) -> None:
        """Make the tables that depend on the addresses of the tensors."""
        self._laws = Laws(self.spans, self.pools)
        self.pool_table = self._laws.pool_table(self.pools)
        self._whole_pools: Array | None = None
        self._sums = np.zeros((len(self.spans), SUM_COLUMNS))
        self._copied = {
            t: Copied(strided)
            for t, span in enumerate(self.spans)
            if (strided := span if isinstance(span, Strided) else getattr(span, "strided", None))
        }
        self._own = {
            t: self._copied[t].span if t in self._copied else Span(*span[:4])
            for t, span in enumerate(self.spans)
        }
        self._starts = np.array([span.source for span in self._own.values()], np.int64)
        self._sources: Sequence[int] | None = None
        self._in_place = all(span.source == span.target for span in self._own.values())
        self._in_place &= all(copied.in_place for copied in self._copied.values())
        self._lay_out_batches()

    def _lay_out_batches(self) -> None:
        """Make the tables of chunks."""
        self._written = batches.batches(self._own)
        self._measured = self._plain(self._own)
        self._at_home = self._written, self._measured
        self._find_fused()

    def _find_fused(self) -> None:
        """Set `fused` to the only batch if it is small enough for the fused call, else None."""
        small = len(self._measured) == 1 and self._measured[0].nbytes < PARALLEL_BYTES
        self.fused = self._measured[0] if small and not self._groupings else None
        self._real = all(span.dtype.components == 1 for span in self.spans)

    def _plain(self, spans: Mapping[int, Span]) -> list[Batch]:
        """Return the batches of those tensors in which no rows repeat."""
        if spans is self._own and not self._groupings:
            return self._written
        return batches.batches({t: s for t, s in spans.items() if t not in self._groupings})

    @property
    def little(self) -> list[Batch]:
        """The dense tensors as batches, if one call can take these and the sparse tensors.

        Else an empty list: if they are not few bytes, or differ in dtype while some are sparse.
        """
        dense = {t: own for t, own in self._own.items() if not isinstance(self.spans[t], RowSpan)}
        dtypes = {span.dtype for span in self.spans}
        if not dtypes or (len(dtypes) > 1 and len(dense) < len(self.spans)):
            return []
        empty = Batch(dtypes.pop(), np.empty((0, 4), np.int64), 0)
        found = batches.batches(dense) or [empty]
        return found if sum(batch.nbytes for batch in found) < PARALLEL_BYTES else []

    def tables_at_once(
        self, divisors: Array, held: Sequence[Array] = (), size: Array | None = None
    ) -> dict[int, Array]:
        """Return the tables of `kernels.given`, which writes bounds and loss scales to the laws.

        `held` has a row of words for each sparse tensor that say where its rows are.
        """
        tables = {
            given.POOLS: self.pool_table,
            given.LAWS: self._laws.table(Law(math.inf, divisors, size=size)),
            given.POOL_OF: self.pool_of,
        }
        return {**tables, **self._row_tables(held)} if held else tables

    def _row_tables(self, held: Sequence[Array]) -> dict[int, Array]:
        """Return the tables that `kernels.row_steps` needs in addition."""
        sparse = {t: span for t, span in enumerate(self.spans) if isinstance(span, RowSpan)}
        sizes = np.zeros((len(self.pools), 2))
        for pool, size in zip(self.pools, sizes, strict=True):
            own = self.spans[pool.first : pool.last]
            size[row_steps.DENSE] = sum(span.size for span in own if not isinstance(span, RowSpan))
            size[row_steps.UNIT] = max([span.dtype.truncate_below for span in own], default=0.0)
        rows = rows_table(dict(zip(sparse, held, strict=True)))
        rows[:, given_rows.LENGTH] = [span.length for span in sparse.values()]
        rows[:, given_rows.LOWEST] = [span.dtype.precision[1] for span in sparse.values()]
        return {
            given.ROWS: rows,
            given.LOCATIONS: np.zeros((len(rows), given_rows.LOCATION_FIELDS), np.int64),
            given.LOSSES: np.zeros(len(self.pools)),
            given.SIZES: sizes,
        }

    @property
    def _at_once(self) -> list[Batch]:
        """The batches `little` if all are clipped in place and none is strided, else []."""
        return [] if self._copied or not self._in_place else self.little

    def at_once(self, divisors: Array, held: Sequence[Array]) -> AtOnce | None:
        """Return an object that clips by one or two native calls; None if those cannot do it."""
        found, tables = self._at_once, self.tables_at_once(divisors, held)
        if len(found) > 1:
            return SeveralClips(found, tables)
        return ClipsAtOnce(found[0], tables) if found else None

    def values_at_once(self, later: Plan, limits: Array) -> ValuesAtOnce | None:
        """Return an object that clamps elements to `limits` by one native call each, or None."""
        found, ones = self._at_once, np.ones(len(self.pools))
        if len(found) != 1:
            return None
        after = later, later.tables_at_once(ones)
        return ValuesAtOnce(found[0], self.tables_at_once(ones), limits, after)

    def ranks_at_once(
        self,
        divisors: Array,
        size: Array | None,
        row_tables: Sequence[Array],
        received: tuple[Array, Array],
    ) -> RanksAtOnce | None:
        """Return an object that clips by the sums of all ranks; None without a fused batch."""
        if self.fused is None:
            return None
        tables = {
            **self.tables_at_once(divisors, size=size),
            given.POOLS: whole_pools(self.pool_table),
        }
        return RanksAtOnce(self.fused, tables, row_tables, received)

    def read_at(self, sources: Sequence[int] | None, _stream: Any = None) -> None:
        """Let tensors be read at `sources`, 0 for one without elements; None resets this.

        Nothing is scaled meanwhile. Targets stay as they are.
        """
        self._sources = sources
        self._written, self._measured = self._at_home
        if sources is not None:
            self._written = [batch.read_at(self._starts, sources) for batch in self._written]
            self._measured = self._written  # no rows repeat
        self._find_fused()

    def take_rows(
        self, spans: Sequence[RowSpan], groupings: Sequence[Groups], _stream: Any = None
    ) -> None:
        """Set the spans and groupings of the sparse tensors; make new tables if that is needed."""
        numbers = [t for t, span in enumerate(self.spans) if isinstance(span, RowSpan)]
        pairs = zip(numbers, groupings, strict=True)
        found = {t: own for t, own in pairs if rows.repeats(own)}
        same = self._fits and found.keys() == self._groupings.keys()
        if same and not self._copied and [self.spans[t] for t in numbers] == list(spans):
            self._groupings = found
            return  # as many rows as before, in the same memory
        self._fits = False  # until all is laid out: after an interrupt the next call does it
        self._groupings = found
        for t, span in zip(numbers, spans, strict=True):
            self.spans[t] = span
        self._lay_out()
        self._fits = True

    def outcome(self, _stream: Any = None) -> Outcome:
        """Return new tables: the sums of the tensors and the decisions for the pools."""
        decisions = np.zeros((len(self.pools) + 1, DECISION_COLUMNS))
        return np.zeros((len(self.spans), SUM_COLUMNS)), decisions

    def write_laws(self, law: Law, _stream: Any = None) -> None:
        """Set the law that the next decisions obey."""
        self._law = self._laws.table(law)

    def leave(self, _stream: Any = None) -> None:
        """Set a law by which decisions leave tensors as they are."""
        self._law = self._laws.table(Law(math.inf))

    def measure(self, ord: float, _stream: Any = None) -> None:
        """Let the next `decide` or `add` first measure the norms of order `ord`."""
        self._order = ord

    def decide(self, outcome: Outcome, _stream: Any = None) -> None:
        """Measure, if `measure` was called, and decide for every pool."""
        self._decide(self.pool_table, outcome)

    def add(self, outcome: Outcome, _stream: Any = None) -> None:
        """Measure, if `measure` was called, and decide nothing."""
        self._decide(self.pool_table[:0], outcome)

    def _decide(self, pools: Array, outcome: Outcome) -> None:
        sums, decisions = outcome
        order, self._order = self._order, None
        if self.fused is not None and self._decide_at_once(self.fused, order, pools, *outcome):
            self._sums = sums
            return
        if order is not None:
            self._measure(order)
        sums[:] = self._sums
        kernels.decide_all(pools, self._law, sums, decisions)

    def decide_by(self, totals: Array, outcome: Outcome, _stream: Any = None) -> None:
        """Decide by `totals`, one row of sums for each pool, instead of the tensors' sums."""
        if self._whole_pools is None:
            self._whole_pools = whole_pools(self.pool_table)
        kernels.decide_all(self._whole_pools, self._law, totals, outcome[1])

    def _decide_at_once(
        self, batch: Batch, order: float | None, pools: Array, sums: Array, decisions: Array
    ) -> bool:
        """Measure and decide by the fused call; return False if its result cannot be used."""
        if order is None or (order != 2.0 and not self._real):
            return False
        sums[:] = 0.0  # some may have no chunks: no elements, or none this time
        tables, safe = (pools, self._law, sums, decisions), True
        if order == 2.0:
            safe = kernels.measure_and_decide(batch.chunks, batch.dtype.like, *tables)
        else:
            decide_by_powers(batch.chunks, batch.dtype.like, order, *tables)
        if self._zeroing and sums[:, BAD].any():
            return False
        return safe or batch.dtype.digits < 53

    def _measure(self, order: float) -> None:
        """Measure all tensors; with the policy "zero", non-finite elements count as 0."""
        self._sums = np.zeros_like(self._sums)
        self._take_sums(order, self._own)
        if not self._zeroing:
            return
        bad = self._sums[:, BAD] != 0.0
        zeroing = np.array([pool.policy == "zero" for pool in self.pools], np.bool_)[self.pool_of]
        if (bad & zeroing).any():
            numbers = np.flatnonzero(bad & zeroing).tolist()
            copies = {t: orders.values_of(self._own[t]).copy() for t in numbers}
            spans = dict(self._own)
            for t, copy in copies.items():
                copy[~np.isfinite(copy)] = 0
                spans[t] = spans[t]._replace(source=copy.ctypes.data)
            self._take_sums(order, spans)
            self._sums[bad, BAD] = 1.0

    def _take_sums(self, order: float, spans: Mapping[int, Span]) -> None:
        """Measure tensors, each read at the source of its span."""
        summed = {t: RowSpan(*spans[t], self.spans[t].length) for t in self._groupings}
        if order != 2.0:
            known: dict[int, Span | RowSpan] = {**spans, **summed}
            if self._sources is not None:
                known = {
                    t: span._replace(source=source, size=span.size if source else 0)
                    for (t, span), source in zip(spans.items(), self._sources, strict=True)
                }
            orders.write_powers(known, self._groupings, order, self._sums)
            return
        for batch in self._plain(spans) if spans is not self._own else self._measured:
            batches.write_squares(batch, self._sums)
        for t, span in summed.items():
            rows.write_squares(span, self._groupings[t], self._sums[t])

    def scale(self, outcome: Outcome, _stream: Any = None) -> None:
        """Write each tensor times its factor in one pass, or in none if all stay as they are."""
        decisions = outcome[1]
        if self._in_place and decisions[-1, MODE] == LEAVE:
            return
        alone = self._in_place and not self._copied and decisions[-1, RARE] == 0.0
        if self.fused is not None and alone:
            tables = self.pool_of, decisions, self.fused.column
            kernels.scale_decided(self.fused.chunks, *tables, self.fused.dtype.like)
            return
        modes = decisions[self.pool_of, MODE]
        written = [t for t, own in self._copied.items() if modes[t] != LEAVE or not own.in_place]
        self._write(self._scaling(decisions, self._written), written)

    def write_exceptional(self, outcome: Outcome, _stream: Any = None) -> None:
        """Scale in place the tensors of the modes TRUNCATE and CLEAN; there are rarely any."""
        decisions = outcome[1]
        if decisions[-1, RARE] != 0.0:
            chosen = decisions[self.pool_of, MODE] > MULTIPLY
            written = [batch.of(chosen) for batch in self._written]
            self._write(self._scaling(decisions, written), ())

    def _scaling(self, decisions: Array, written: Sequence[Batch]) -> list[threads.Call]:
        """Return the calls that clean tensors of the mode CLEAN, then multiply by the factors."""
        own = decisions[self.pool_of]
        if decisions[-1, RARE] == 0.0:
            return [batches.scaling(batch, own[:, batch.column]) for batch in written]
        cleaned = own[:, MODE] == CLEAN
        calls = [self._cleaning(self._own[t]) for t in np.flatnonzero(cleaned).tolist()]
        return calls + [
            batches.truncating(batch.in_place(cleaned), own, batch.column) for batch in written
        ]

    def _cleaning(self, span: Span) -> threads.Call:
        """Return the call that copies a tensor to its target, with 0 for non-finite elements."""
        (batch,) = batches.batches({0: span})
        return batch.call(cpu.clean, span.dtype.components, span.dtype.like)

    def _write(self, calls: Sequence[threads.Call], copied: Sequence[int]) -> None:
        """Make calls and write copies back, completely even if a signal handler raises."""
        threads.run_then(calls, [self._copied[t].write_back for t in copied])

    def clamp(
        self, outcome: Outcome, low: float, high: float, _stream: Any, members: range
    ) -> None:
        """Clamp the tensors `members` to [low, high], except those of skipped pools."""
        decisions = outcome[1]
        if self.fused is not None and not self._copied:
            tables = self.pool_of, decisions, (members.start, members.stop)
            bounds = float(low), float(high), self.fused.dtype.like
            kernels.clamp_decided(self.fused.chunks, *tables, *bounds)
            return
        chosen = np.zeros(len(self.spans), np.bool_)
        chosen[members.start : members.stop] = True
        chosen &= decisions[self.pool_of, SKIPPED] == 0.0
        own = [batch.of(chosen) for batch in self._written]
        flags = [np.zeros(len(batch.chunks), np.bool_) for batch in own]
        calls = [batches.clamping(*each, low, high) for each in zip(own, flags, strict=True)]
        self._write(calls, [t for t in self._copied if chosen[t]])
        for batch, beyond in zip(own, flags, strict=True):
            tensors = batch.chunks[beyond, cpu.OWNER]
            decisions[self.pool_of[tensors], CLAMPED] = 1.0

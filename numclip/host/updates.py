"""Updates of the host, which take an optimizer's step by one kernel call for each dtype."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType, as_stored
from numclip.engine import Outcome
from numclip.facts import Facts
from numclip.host import batches, plain_arrays, rows
from numclip.host.at_once import StepsAtOnce
from numclip.host.given import Given
from numclip.host.kernels import cpu, given, given_rows, updates
from numclip.host.kernels.tuning import CHUNK, PARALLEL_BYTES
from numclip.host.pairs import Reader
from numclip.host.runtime import threads
from numclip.host.runtime.threads import Call
from numclip.host.several import SeveralSteps
from numclip.memory import RowSpan, Span
from numclip.methods import SETTINGS_COLUMNS
from numclip.tables import DECISION_COLUMNS, FACTOR, FINE, MODE, MULTIPLY, SKIPPED

KERNELS = {
    "descend": (updates.advance, updates.descend),
    "descend_with_momentum": (updates.advance, updates.descend_with_momentum),
    "adam": (updates.advance_adam, updates.adam),
}
"""(prepare, update): the kernels of a step, by the name that an optimizer gives it."""


class Layout:
    """The addresses of parameters and their states, from which tables of updates are made.

    Gradients are read at the sources of `spans`, parameters written at the targets. `states` has
    for each state the addresses for all tensors. `each` has for each tensor the addresses of the
    parameter and two states, 0 for a state that is not there.
    """

    def __init__(self, spans: Sequence[Span | RowSpan], states: Sequence[Sequence[int]]) -> None:
        self.spans = list(spans)
        self._addresses = [[span.target for span in spans], *map(list, states)]
        none = [0] * len(spans)
        every = [*self._addresses, none, none][:3]
        self.each = list(zip(*every, strict=True))

    @property
    def starts(self) -> Array:
        """The address of each gradient."""
        return np.array([span.source for span in self.spans], np.int64)

    def whole(self, numbers: Sequence[int]) -> tuple[Array, Array]:
        """Return (chunks, tensors): updates of whole tensors of a dtype, the tensor of each."""
        dtype = self.spans[numbers[0]].dtype
        extents = np.array([self.spans[k][1:4] for k in numbers], np.int64)
        pieces = batches.of_table(dtype, extents).chunks
        own = pieces[:, cpu.OWNER]
        starts = (pieces[:, cpu.SOURCE] - extents[own, 0]) // dtype.storage.itemsize
        tensors, chunks = np.array(numbers)[own], np.zeros((len(own), 6), np.int64)
        chunks[:, updates.GRAD] = pieces[:, cpu.SOURCE]
        chunks[:, updates.LENGTH] = pieces[:, cpu.LENGTH]
        for k, addresses in enumerate(self._addresses):
            size = (dtype.compute if k else dtype.storage).itemsize
            chunks[:, updates.PARAM + k] = np.array(addresses, np.int64)[tensors] + starts * size
        return chunks, tensors

    def of_rows(self, number: int, owner: int, sums: Array, indices: Array) -> Array:
        """Return the updates of the rows `indices` of a tensor by `sums`, which are contiguous."""
        count, length = sums.shape
        chunks = np.zeros((count * -(-length // CHUNK), 6), np.int64)
        addresses = np.array([sums.ctypes.data, *self.each[number]], np.int64)
        itemsizes = sums.itemsize, self.spans[number].dtype.compute.itemsize
        updates.write_row_updates(indices, length, addresses, itemsizes, owner, chunks)
        return chunks


class Numbers:
    """The factors and settings of pools, in the dtype in which updates are computed."""

    def __init__(self, pools: int, compute: np.dtype[Any]) -> None:
        self.factors = np.zeros(pools, compute)
        self.settings = np.zeros((pools, SETTINGS_COLUMNS), compute)
        self.column = FINE if compute == np.float64 else FACTOR


class Updates:
    """Updates parameters; each pool has a row of settings and a count of steps."""

    def __init__(
        self,
        kernel: str,
        spans: Sequence[Span | RowSpan],
        states: Sequence[Sequence[int]],
        pool_of: Array,
    ) -> None:
        self._advance, self._kernel = KERNELS[kernel]
        self._layout, self._pool_of = Layout(spans, states), pool_of
        pools = int(pool_of.max(initial=-1)) + 1
        self._counts = np.zeros(pools, np.int64)
        self._given = np.zeros((pools, SETTINGS_COLUMNS))
        self._dtypes = dict.fromkeys(span.dtype for span in spans)
        self._numbers = {dtype.compute: Numbers(pools, dtype.compute) for dtype in self._dtypes}
        self._passes = 2 + 2 * len(states)
        self._dense: list[tuple[DType, Array]] = []  # the updates of dense tensors
        self._tensors: list[Array] = []  # the tensor of each chunk of these
        for dtype in self._dtypes:
            every = enumerate(self._layout.spans)
            members = [k for k, own in every if isinstance(own, Span) and own.dtype is dtype]
            if members:
                chunks, tensors = self._layout.whole(members)
                chunks[:, updates.OWNER] = pool_of[tensors]
                self._dense.append((dtype, chunks))
                self._tensors.append(tensors)

    def write_settings(self, settings: Array, _stream: Any = None) -> None:
        """Set the settings of the next steps, a row for each pool."""
        self._given[:] = settings

    def _prepare(self, decisions: Array, *, counted: bool = False) -> None:
        """Write factors and settings of the pools, and count a step for each that is not skipped.

        With `counted`, the step is counted already.
        """
        for own in self._numbers.values():
            tables = self._counts, counted, self._given, own.factors, own.settings
            self._advance(decisions, own.column, *tables)
            counted = True

    def _call(self, dtype: DType, chunks: Array, keep: Any = None) -> Call:
        """Return the call that performs the updates `chunks`."""
        own = self._numbers[dtype.compute]
        elements = int(chunks[:, updates.LENGTH].sum())
        nbytes = elements * self._passes * dtype.storage.itemsize
        arguments = chunks, own.factors, own.settings, dtype.like
        return Call(self._kernel, len(chunks), nbytes, arguments, keep)


class GroupUpdates(Updates):
    """Updates parameters by the gradients of a plan times the decided factors.

    With sparse gradients, `take_rows` has to be called before each step.
    """

    def __init__(
        self,
        kernel: str,
        plan: Any,
        spans: Sequence[Span | RowSpan],
        states: Sequence[Sequence[int]],
        _stream: Any = None,
    ) -> None:
        super().__init__(kernel, spans, states, plan.pool_of)
        self._plan, self._name = plan, kernel
        self._sparse = [k for k, span in enumerate(spans) if isinstance(span, RowSpan)]
        self._rows: Sequence[Any] = ()
        self._left = set[int]()
        self._calls = self._own_calls = [self._call(*dense) for dense in self._dense]
        self._update = self._own_update = threads.kept(self._calls)

    def counts(self) -> Array:
        """Return how often each pool was updated."""
        return self._counts.copy()

    def set_counts(self, counts: Array) -> None:
        """Set how often each pool was updated."""
        self._counts[:] = counts

    def read_at(self, sources: Sequence[int] | None, _stream: Any = None) -> None:
        """Let gradients be read at `sources`, none for 0; None means those of the plan."""
        self._calls, self._update = self._own_calls, self._own_update
        if sources is not None:
            starts = self._layout.starts
            self._calls = [
                self._call(dtype, batches.moved(chunks, tensors, starts, sources))
                for (dtype, chunks), tensors in zip(self._dense, self._tensors, strict=True)
            ]
            self._update = functools.partial(threads.run_all, self._calls)
        self._left = set() if sources is None else {k for k, own in enumerate(sources) if not own}

    def at_once(
        self, reader: Given | None, divisors: Array, held: Sequence[Array]
    ) -> StepsAtOnce | SeveralSteps | None:
        """Return an object that takes steps by one or two native calls; None if those cannot."""
        found = self._plan.little
        much = any(call.nbytes >= PARALLEL_BYTES for call in self._own_calls)
        if not found or much or reader is None:
            return None
        numbers = [self._numbers[batch.dtype.compute] for batch in found]
        pieces = [chunks.copy() for _, chunks in self._dense] or [np.zeros((0, 6), np.int64)]
        tables = {
            **self._plan.tables_at_once(divisors, held),
            given.COUNTS: self._counts,
            given.GIVEN: self._given,
        }
        starts = np.array([span.source for span in self._plan.spans], np.int64)
        if len(found) > 1:
            pairs = zip(pieces, numbers, strict=True)
            each = [(updated, own.factors, own.settings) for updated, own in pairs]
            kernel = self._name, self._kernel
            return SeveralSteps(kernel, found, starts, reader, tables, each)
        tables[given.PIECES], own = pieces[0], numbers[0]
        tables[given.SETTINGS], tables[given.FACTORS] = own.settings, own.factors
        if held:
            params = [self._layout.each[k] for k in self._sparse]
            tables[given.ROWS][:, given_rows.PARAM :] = params
        starts[self._sparse] = 1  # sparse gradients have no address here, but are not ABSENT
        return StepsAtOnce(self._name, found[0], starts, reader, tables)

    def take_rows(self, slices: Sequence[Any], _stream: Any = None) -> None:
        """Set the slices whose rows the next step updates."""
        self._rows = slices

    def step(self, outcome: Outcome, _stream: Any = None) -> None:
        """Take a step by the decisions of `outcome`."""
        decisions = outcome[1]
        self._prepare(decisions)
        if not self._sparse:
            self._update()
            return
        calls = [*self._calls]
        for k, slices in zip(self._sparse, self._rows, strict=True):
            calls += self._row_calls(k, slices, decisions[self._pool_of[k]])
        threads.run_all(calls)

    def _row_calls(self, k: int, slices: Any, decision: Array) -> list[Call]:
        """Return the calls, one or none, that update rows by their sums, scaled on the way.

        Rows are scaled before they are summed only if the sums overflow: rows that cancel would
        leave the rounding error of each.
        """
        span = self._plan.spans[k]
        if decision[SKIPPED] or not span.size or k in self._left:
            return []
        values = rows.rows_of(span)
        sums = rows.summed(values, slices.grouping)
        overflows = decision[MODE] == MULTIPLY and not np.isfinite(sums).all()
        if overflows:
            values = values.copy()
            address = values.ctypes.data
            own: Mapping[int, Span] = {0: Span(span.dtype, address, address, span.size)}
            for batch in batches.batches(own):
                column = self._numbers[span.dtype.compute].column
                threads.run_all([batches.scaling(batch, decision[column : column + 1])])
            sums = rows.summed(values, slices.grouping)
        sums = as_stored(sums)
        owner = int(self._pool_of[k])
        chunks = self._layout.of_rows(k, owner, sums, slices.distinct_indices)
        call = self._call(span.dtype, chunks, sums)
        if overflows:
            chunks, factors, *rest = call.arguments
            call = call._replace(arguments=(chunks, np.ones_like(factors), *rest))
        return [call]


class ArrayUpdates(Updates):
    """Updates arrays by gradients that are not clipped.

    `indices` has the distinct indices of the rows of each `RowSpan`, `arrays` the facts of the
    arrays to update.
    """

    def __init__(
        self,
        kernel: str,
        spans: Sequence[Span | RowSpan],
        states: Sequence[Sequence[int]],
        indices: Sequence[Array],
        arrays: Sequence[Facts],
        _stream: Any = None,
    ) -> None:
        super().__init__(kernel, spans, states, np.arange(len(spans)))
        self._chunks = self._together()
        owners = self._chunks[:, updates.OWNER]
        self._distances = self._chunks[:, updates.GRAD] - self._layout.starts[owners]
        self._decisions = np.zeros((len(spans), DECISION_COLUMNS))  # to leave gradients as they are
        self._sparse = [k for k, span in enumerate(spans) if isinstance(span, RowSpan)]
        found = [as_stored(rows.rows_of(span)) for span in spans if isinstance(span, RowSpan)]
        self._take_rows(list(zip(indices, found, strict=True)))
        reads = plain_arrays.READABLE and not self._sparse
        self._reader = Reader(arrays, self._chunks, self._distances) if reads else None

    def _together(self) -> Array:
        """Return one table of the updates of dense tensors; that of each dtype is part of it."""
        chunks = np.concatenate([np.zeros((0, 6), np.int64), *(own for _, own in self._dense)])
        first = 0
        for k, (dtype, own) in enumerate(self._dense):
            self._dense[k] = dtype, chunks[first : first + len(own)]
            first += len(own)
        return chunks

    def _take_rows(self, sums: Sequence[tuple[Array, Array]]) -> None:
        """Make the calls of the next steps, one for each dtype; `sums` update rows."""
        tables = {dtype: [chunks] for dtype, chunks in self._dense}
        for k, (indices, stored) in zip(self._sparse, sums, strict=True):
            chunks = self._layout.of_rows(k, k, stored, indices)
            tables.setdefault(self._layout.spans[k].dtype, []).append(chunks)
        self._calls = [
            self._call(dtype, np.concatenate(own) if len(own) > 1 else own[0], sums)
            for dtype, own in tables.items()
        ]
        self._update = threads.kept(self._calls)

    def read_pairs(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Let the next steps read gradients of pairs; return False if an array does not fit."""
        return self._reader is not None and self._reader.read(gradients, variables)

    def read_from(self, sources: Any) -> None:
        """Let the next steps read gradients, all of one dtype, at `sources` of `key_of_pairs`."""
        self._chunks[:, updates.GRAD] = sources.starts
        self._take_rows(sources.sums)

    def read_at(self, sources: Sequence[int]) -> None:
        """Let the next steps read gradients, none of which is sparse, at `sources`."""
        starts = np.array(sources, np.int64)
        self._chunks[:, updates.GRAD] = starts[self._chunks[:, updates.OWNER]] + self._distances

    def step(self, settings: Sequence[float], counts: Sequence[int], _stream: Any = None) -> None:
        """Update each array; its count is the number of this step."""
        self._given[:, : len(settings)] = settings
        self._counts[:] = counts
        self._prepare(self._decisions, counted=True)
        self._update()

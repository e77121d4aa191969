"""Optimizer steps on the GPU: tables of updates, settings and counts, and launches."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip import methods
from numclip.cuda import device, driver, memory
from numclip.cuda.contiguous import split
from numclip.cuda.kernels import updates
from numclip.cuda.plan import HostTable, Plan
from numclip.cuda.work import Tables, launch
from numclip.dtypes import Array
from numclip.engine import Outcome
from numclip.facts import Facts
from numclip.memory import RowSpan, Span
from numclip.methods import SETTINGS_COLUMNS
from numclip.tables import DECISION_COLUMNS, LENGTH, OWNER, POOL, SOURCE

KERNELS = {
    "descend": updates.descend,
    "descend_with_momentum": updates.descend,
    "adam": updates.adam,
}
"""The kernels that take a step, by the name that an optimizer has for it."""


class Layout:
    """The addresses of parameters and their states, from which tables of updates are made.

    `spans` have the addresses of gradients (source) and parameters (target); each entry of
    `states` has the addresses of one kind of state, tensor by tensor.
    """

    def __init__(self, spans: Sequence[Span | RowSpan], states: Sequence[Sequence[int]]) -> None:
        self._spans = list(spans)
        self._addresses = np.array([[span.target for span in spans], *states], np.int64)

    def whole(self) -> Array:
        """Return the updates of the tensors without shared rows, chunk by chunk."""
        whole = {k: span for k, span in enumerate(self._spans) if isinstance(span, Span)}
        chunks, _, starts = split(list(whole.values()))
        rows = self.filled(np.array(list(whole), np.int64)[chunks[:, OWNER]], starts)
        rows[:, updates.GRAD], rows[:, updates.LENGTH] = chunks[:, SOURCE], chunks[:, LENGTH]
        return rows

    def filled(self, owners: Array, starts: Array) -> Array:
        """Return updates of the owners' parameters and states from element offsets `starts` on."""
        rows = np.zeros((owners.size, 6), np.int64)
        for k, addresses in enumerate(self._addresses):
            kinds = [span.dtype.compute if k else span.dtype.storage for span in self._spans]
            sizes = np.array([kind.itemsize for kind in kinds], np.int64)
            rows[:, updates.PARAM + k] = addresses[owners] + starts * sizes[owners]
        rows[:, updates.OWNER] = owners
        return rows

    def rows(self, owner: int, sums: int, indices: Array) -> Array:
        """Return updates of a tensor's rows `indices` by the sums at address `sums`, in chunks."""
        span: Any = self._spans[owner]
        itemsize = span.dtype.storage.itemsize
        limit = device.CHUNK_BYTES // itemsize
        starts = np.arange(0, span.length, limit)
        begins = (indices[:, None] * span.length + starts).reshape(-1)
        rows = self.filled(np.full(begins.size, owner), begins)
        firsts = np.arange(indices.size)[:, None] * span.length + starts
        rows[:, updates.GRAD] = sums + firsts.reshape(-1) * itemsize
        rows[:, updates.LENGTH] = np.tile(np.minimum(limit, span.length - starts), indices.size)
        return rows

    def by_dtype(self, rows: Array, stream: Any) -> Tables:
        """Send a table of updates for each dtype that occurs; return the tables."""
        dtypes = np.array([span.dtype for span in self._spans], object)[rows[:, updates.OWNER]]
        return {
            dtype: [memory.table(rows[dtypes == dtype], stream)]
            for dtype in dict.fromkeys(dtypes.tolist())
        }


class GroupUpdates:
    """What the kernels need to update parameters by the gradients of a plan.

    Each pool has a row of settings and a count of steps. Where rows can share an index, call
    `take_rows` before each step.
    """

    def __init__(
        self,
        kernel: str,
        plan: Plan,
        spans: Sequence[Span | RowSpan],
        states: Sequence[Sequence[int]],
        stream: Any,
    ) -> None:
        self._name, self._kernel = kernel, KERNELS[kernel]
        self._plan, self._layout = plan, Layout(spans, states)
        self._own = self._updates = self._layout.by_dtype(self._layout.whole(), stream)
        self._row_updates: Tables = {}
        self._left: set[int] = set()  # of tensors that are not updated
        self._counts = memory.table(np.zeros(len(plan.pools), np.int64), stream)
        shape = len(plan.pools), SETTINGS_COLUMNS
        self._given = HostTable(shape, stream)
        self._settings = memory.table(np.zeros(shape), stream)
        self._sparse = any(isinstance(span, RowSpan) for span in spans)
        if self._sparse:
            plan.keep_sums()

    def counts(self) -> Array:
        """Return how often each pool was updated, after waiting for it."""
        with driver.on_stream(None) as stream:
            counts: Array = memory.read_table(self._counts, stream)
        return counts

    def set_counts(self, counts: Array) -> None:
        """Set how often each pool was updated."""
        with driver.on_stream(None) as stream:
            memory.update(self._counts, counts, stream)

    def read_at(self, sources: Sequence[int] | None, stream: Any) -> None:
        """Leave parameters whose address in `sources` is 0; others use the plan's gradients."""
        self._updates = self._own
        self._left = set() if sources is None else {k for k, own in enumerate(sources) if not own}
        if sources is not None:
            rows = self._layout.whole()
            present = np.array(sources, np.int64) != 0
            self._updates = self._layout.by_dtype(rows[present[rows[:, updates.OWNER]]], stream)

    def at_once(self, _given: Any, _divisors: Array, _held: Any) -> None:
        """Return None: on the GPU a step takes several launches."""

    def take_rows(self, slices: Sequence[Any], stream: Any) -> None:
        """Have the next step update the distinct rows of each sparse gradient in `slices`."""
        made = [
            self._layout.rows(owner, sums, own.distinct_indices)
            for (owner, _, sums), own in zip(self._plan.row_sums(), slices, strict=True)
            if owner not in self._left
        ]
        self._row_updates = self._layout.by_dtype(np.concatenate(made), stream) if made else {}

    def write_settings(self, settings: Array, stream: Any) -> None:
        """Set the settings of the following steps, a row for each pool."""
        self._given.write(settings, stream)

    def step(self, outcome: Outcome, stream: Any) -> None:
        """Take a step: one launch to count it, one for each dtype; more for shared rows."""
        if self._sparse:
            self._plan.sum_scaled(outcome, stream)
        settings = self._given.table
        if self._name == "adam":
            settings = self._settings
            tables = outcome[1], self._given.table, self._counts, settings
            device.launch(updates.advance_adam, 1, stream, *tables)
        else:
            device.launch(updates.advance, 1, stream, outcome[1], self._counts)
        for found in (self._updates, self._row_updates):
            launch(self._kernel, found, stream, self._plan.tensors, outcome[1], settings)


class ArrayUpdates:
    """What the kernels need to update arrays by gradients that are not clipped.

    `spans` and `states` are as in `Layout`; `indices` has, for each `RowSpan`, the distinct
    indices of its rows. Each array has a row of numbers.
    """

    def __init__(
        self,
        kernel: str,
        spans: Sequence[Span | RowSpan],
        states: Sequence[Sequence[int]],
        indices: Sequence[Array],
        _arrays: Sequence[Facts],
        stream: Any,
    ) -> None:
        self._name, self._kernel = kernel, KERNELS[kernel]
        layout = Layout(spans, states)
        sparse = [k for k, span in enumerate(spans) if isinstance(span, RowSpan)]
        pairs = zip(sparse, indices, strict=True)
        rows = [layout.rows(k, spans[k].source, own) for k, own in pairs]
        everything = np.concatenate([layout.whole(), *rows])
        self._updates = layout.by_dtype(everything, stream)
        tensors = np.zeros((len(spans), POOL + 1), np.int64)
        tensors[:, POOL] = np.arange(len(spans))
        self._tensors = memory.table(tensors, stream)
        decisions = np.zeros((len(spans), DECISION_COLUMNS))  # LEAVE: gradients stay as they are
        self._decisions = memory.table(decisions, stream)
        self._numbers = HostTable((len(spans), SETTINGS_COLUMNS), stream)

    def read_pairs(self, _gradients: list[Any], _variables: list[Any]) -> bool:
        """Return False: updates of other pairs are found by `engine.key_of_pairs`."""
        return False

    def read_from(self, _sources: None) -> None:
        """Do nothing: updates are kept for gradients at fixed addresses."""

    def read_at(self, _sources: Sequence[int]) -> None:
        """Do nothing, as `read_from` does."""

    def step(self, settings: Sequence[float], counts: Sequence[int], stream: Any) -> None:
        """Update each array, as its step of number `counts`; one launch for each dtype."""
        found = {count: methods.numbers(self._name, settings, count) for count in set(counts)}
        table = np.zeros((len(counts), SETTINGS_COLUMNS))
        for row, count in zip(table, counts, strict=True):
            row[: len(found[count])] = found[count]
        self._numbers.write(table, stream)
        inputs = self._tensors, self._decisions, self._numbers.table
        launch(self._kernel, self._updates, stream, *inputs)

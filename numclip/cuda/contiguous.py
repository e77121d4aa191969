"""Contiguous memory, cut into chunks that are read in 16-byte packets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numclip import tables
from numclip.cuda import device, memory
from numclip.cuda.kernels import halves, norms, scaling
from numclip.cuda.kernels.packets import WORD
from numclip.cuda.work import Kernels, OwnWork, Tables, launch, like
from numclip.dtypes import Array, DType
from numclip.memory import Span

MOST_CHUNKS = 8192
"""Chunks of a tensor, whose sums one block adds: from 1 GB on, chunks are longer. Reasoned, not
measured yet: 32 turns of a block's threads take some 20 us, where 4 GB are read in 1000."""

PIECE_BYTES = device.CHUNK_BYTES >> 2
"""What a block adds at a time, where it has no sum to write."""


def split(spans: Sequence[Span]) -> tuple[Array, Array, Array]:
    """Return the table of chunks, how many are before each tensor, and where each one starts.

    Chunks begin at multiples of 16 bytes where source and target can both do so: a first, short
    one goes up to there.
    """
    itemsizes = np.array([span.dtype.storage.itemsize for span in spans], np.int64)
    return cut(itemsizes, np.array([span[1:] for span in spans], np.int64).reshape(-1, 3))


def cut(itemsizes: Array, places: Array) -> tuple[Array, Array, Array]:
    """Return the same of tensors by their itemsizes, sources, targets and sizes."""
    sources, targets, sizes = places.T
    heads = -sources % WORD // np.maximum(itemsizes, 1)
    heads = np.where((sources - targets) % WORD == 0, np.minimum(heads, sizes), 0)
    longer = -(-sizes * itemsizes // (MOST_CHUNKS * device.CHUNK_BYTES))
    limits = np.maximum(longer, 1) * (device.CHUNK_BYTES // np.maximum(itemsizes, 1))
    counts = (heads > 0) + -(-(sizes - heads) // limits)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    owners = np.repeat(np.arange(len(places)), counts)
    turns = np.arange(owners.size) - firsts[owners] - (heads[owners] > 0)
    starts = np.where(turns < 0, 0, heads[owners] + turns * limits[owners])
    stops = np.where(turns < 0, heads[owners], starts + limits[owners])
    chunks = np.empty((owners.size, 5), np.int64)
    chunks[:, tables.SOURCE] = sources[owners] + starts * itemsizes[owners]
    chunks[:, tables.TARGET] = targets[owners] + starts * itemsizes[owners]
    chunks[:, tables.LENGTH] = np.minimum(stops, sizes[owners]) - starts
    chunks[:, tables.OWNER] = owners
    chunks[:, tables.PART] = np.arange(owners.size)
    return chunks, firsts, starts


def copied_first(table: Array) -> Array:
    """Return a table with what is in place last: there a block without work is done."""
    in_place = table[:, tables.SOURCE] == table[:, tables.TARGET]
    return table[np.argsort(in_place, kind="stable")]


class Chunks(OwnWork):
    """The work on tensors that lie in contiguous memory."""

    kernels = Kernels(
        norms.sum_squares, norms.max_magnitude, norms.sum_powers, scaling.scale, scaling.clamp
    )

    def __init__(self, spans: Mapping[int, Span]) -> None:
        self._spans, self._numbers = list(spans.values()), np.array(list(spans), np.int64)
        self._chunks, self._firsts, _ = split(self._spans)
        self.counts = np.diff(self._firsts)

    def send(self, parts: Array, stream: Any) -> None:
        """Make the tables; `parts` says where the partial sums of each tensor begin."""
        owners = self._chunks[:, tables.OWNER].copy()
        self._chunks[:, tables.PART] += (parts - self._firsts[:-1])[owners]
        self._chunks[:, tables.OWNER] = self._numbers[owners]
        self._dtypes = np.array([span.dtype for span in self._spans], object)[owners]
        self._tables = self._by_dtype(np.ones(owners.size, bool), stream)
        self._some: dict[range | None, Tables] = {None: self._tables}

    def _by_dtype(self, chosen: Array, stream: Any) -> Tables:
        """Return tables of the chosen chunks (a mask) of each dtype that has some."""
        dtypes = dict.fromkeys(self._dtypes[chosen])
        rows = {dtype: self._chunks[chosen & (self._dtypes == dtype)] for dtype in dtypes}
        return {dtype: [memory.table(copied_first(own), stream)] for dtype, own in rows.items()}

    def _written(self, members: range | None, stream: Any) -> Tables:
        if members not in self._some:
            inside = np.isin(self._chunks[:, tables.OWNER], np.array(members))
            self._some[members] = self._tables if inside.all() else self._by_dtype(inside, stream)
        return self._some[members]


def move_all(spans: Sequence[Span], to: Sequence[DType], stream: Any, *, adds: bool) -> None:
    """Copy what is read to what is written to, or add it; a launch for each pair of dtypes.

    `to` has those of what is written: the same, or float32 for 16 bits.
    """
    kinds = [(span.dtype, own) for span, own in zip(spans, to, strict=True)]
    for dtype, own in dict.fromkeys(kinds):
        places = [span[1:] for span, kind in zip(spans, kinds, strict=True) if kind == (dtype, own)]
        sizes = dtype.storage.itemsize, own.storage.itemsize
        found = {dtype: [memory.table(_moved(np.array(places, np.int64), *sizes), stream)]}
        if adds:
            launch(scaling.add_chunks, found, stream, after=[like(own)])
        else:
            launch(scaling.copy_chunks if dtype is own else halves.widen_chunks, found, stream)


def _moved(table: Array, itemsize: int, target_itemsize: int) -> Array:
    """Return the chunks of rows of (source, target, length), which begin where sources can."""
    places = table[:, [tables.SOURCE, tables.SOURCE, tables.LENGTH]]
    found, _, starts = cut(np.full(len(table), itemsize), places)
    targets = table[found[:, tables.OWNER], tables.TARGET]
    found[:, tables.TARGET] = targets + target_itemsize * starts
    return found


class HalfCopies:
    """Copies of float32 numbers; `tables` have rows of (copies, numbers, length) by dtypes."""

    def __init__(self, tables: Mapping[DType, Array], stream: Any) -> None:
        made = {dtype: [memory.table(_moved(own, 2, 4), stream)] for dtype, own in tables.items()}
        self._tables: Tables = made

    def round_all(self, stream: Any) -> None:
        """Let copies be the nearest ones to their numbers."""
        launch(halves.round_chunks, self._tables, stream)

    def take_over(self, stream: Any) -> None:
        """Let numbers be those of the copies that are none of theirs."""
        launch(halves.take_over_chunks, self._tables, stream)


def add(span: Span, stream: Any) -> None:
    """Add what is read to what is written to; no table is needed.

    Pieces but the first begin at multiples of 16 bytes where source and target can both do so.
    """
    itemsize = span.dtype.storage.itemsize
    skew, limit = span.source % WORD // itemsize, PIECE_BYTES // itemsize
    count = -(-(span.size + skew) // limit) if span.size else 0
    numbers = [np.int64(number) for number in (*span[1:], skew, limit)]
    device.launch(scaling.add, count, stream, *numbers, like(span.dtype))

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
"""The most chunks of a tensor, as one block adds up their sums: from 1 GB on, chunks are longer.
Reasoned, not measured yet: 32 turns of a block's threads take some 20 us, reading 4 GB 1000."""

PIECE_BYTES = device.CHUNK_BYTES >> 2
"""The bytes of a piece of `add`, which has no partial sum to write."""


def split(spans: Sequence[Span]) -> tuple[Array, Array, Array]:
    """Return (chunks, firsts, starts): a table, each tensor's first row and the end, and offsets.

    `starts` are the chunks' first elements. Chunks begin at multiples of 16 bytes where source
    and target both can: then a short first one ends at such a multiple.
    """
    itemsizes = np.array([span.dtype.storage.itemsize for span in spans], np.int64)
    return cut(itemsizes, np.array([span[1:] for span in spans], np.int64).reshape(-1, 3))


def cut(itemsizes: Array, extents: Array) -> tuple[Array, Array, Array]:
    """Return what `split` does, from itemsizes and rows of (source, target, size)."""
    sources, targets, sizes = extents.T
    heads = -sources % WORD // np.maximum(itemsizes, 1)
    heads = np.where((sources - targets) % WORD == 0, np.minimum(heads, sizes), 0)
    longer = -(-sizes * itemsizes // (MOST_CHUNKS * device.CHUNK_BYTES))
    limits = np.maximum(longer, 1) * (device.CHUNK_BYTES // np.maximum(itemsizes, 1))
    counts = (heads > 0) + -(-(sizes - heads) // limits)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    owners = np.repeat(np.arange(len(extents)), counts)
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
    """Return a table with in-place rows last: a block without work returns at its first one."""
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
        """Send the tables; `parts` has the index of each tensor's first partial sum."""
        owners = self._chunks[:, tables.OWNER].copy()
        self._chunks[:, tables.PART] += (parts - self._firsts[:-1])[owners]
        self._chunks[:, tables.OWNER] = self._numbers[owners]
        self._dtypes = np.array([span.dtype for span in self._spans], object)[owners]
        self._tables = self._by_dtype(np.ones(owners.size, bool), stream)
        self._some: dict[range | None, Tables] = {None: self._tables}

    def _by_dtype(self, chosen: Array, stream: Any) -> Tables:
        """Send the tables of the chunks in the mask `chosen`, by dtype; return them."""
        dtypes = dict.fromkeys(self._dtypes[chosen])
        rows = {dtype: self._chunks[chosen & (self._dtypes == dtype)] for dtype in dtypes}
        return {dtype: [memory.table(copied_first(own), stream)] for dtype, own in rows.items()}

    def _written(self, members: range | None, stream: Any) -> Tables:
        if members not in self._some:
            inside = np.isin(self._chunks[:, tables.OWNER], np.array(members))
            self._some[members] = self._tables if inside.all() else self._by_dtype(inside, stream)
        return self._some[members]


def move_all(spans: Sequence[Span], to: Sequence[DType], stream: Any, *, adds: bool) -> None:
    """Copy each source to its target, or add it; a launch for each pair of dtypes.

    `to` has the targets' dtypes: those of the sources, or float32 for 16-bit sources.
    """
    kinds = [(span.dtype, own) for span, own in zip(spans, to, strict=True)]
    for dtype, own in dict.fromkeys(kinds):
        extents = [
            span[1:] for span, kind in zip(spans, kinds, strict=True) if kind == (dtype, own)
        ]
        sizes = dtype.storage.itemsize, own.storage.itemsize
        found = {dtype: [memory.table(_moved(np.array(extents, np.int64), *sizes), stream)]}
        if adds:
            launch(scaling.add_chunks, found, stream, after=[like(own)])
        else:
            launch(scaling.copy_chunks if dtype is own else halves.widen_chunks, found, stream)


def _moved(table: Array, itemsize: int, target_itemsize: int) -> Array:
    """Return the chunks of rows of (source, target, length), aligned where sources can be."""
    extents = table[:, [tables.SOURCE, tables.SOURCE, tables.LENGTH]]
    found, _, starts = cut(np.full(len(table), itemsize), extents)
    targets = table[found[:, tables.OWNER], tables.TARGET]
    found[:, tables.TARGET] = targets + target_itemsize * starts
    return found


class HalfCopies:
    """16-bit copies of float32 numbers; `tables` has rows (copies, numbers, length) by dtype."""

    def __init__(self, tables: Mapping[DType, Array], stream: Any) -> None:
        made = {dtype: [memory.table(_moved(own, 2, 4), stream)] for dtype, own in tables.items()}
        self._tables: Tables = made

    def round_all(self, stream: Any) -> None:
        """Set each copy to its number, rounded to nearest."""
        launch(halves.round_chunks, self._tables, stream)

    def take_over(self, stream: Any) -> None:
        """Set each number to its copy where the copy is not the rounded number."""
        launch(halves.take_over_chunks, self._tables, stream)


def add(span: Span, stream: Any) -> None:
    """Add a span's source to its target, without a table.

    Pieces after the first begin at multiples of 16 bytes where source and target both can.
    """
    itemsize = span.dtype.storage.itemsize
    skew, limit = span.source % WORD // itemsize, PIECE_BYTES // itemsize
    count = -(-(span.size + skew) // limit) if span.size else 0
    numbers = [np.int64(number) for number in (*span[1:], skew, limit)]
    device.launch(scaling.add, count, stream, *numbers, like(span.dtype))

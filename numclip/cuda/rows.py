"""Rows that share an index: how their sums are divided among the blocks of the GPU.

The tables are made on the host, from a grouping of the rows, and sent whenever that changes.
How many shares a tensor has follows from the length of its rows alone, so that its plan stays
valid.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.cuda import device, memory
from numclip.cuda.contiguous import Chunks
from numclip.cuda.kernels import rows
from numclip.cuda.strided import Tiles, bits_of
from numclip.cuda.work import Kernels, Shared, Work, launch, like
from numclip.dtypes import Array, DType
from numclip.engine import Groups
from numclip.memory import Memory, RowSpan, Span, Strided

ALIGNMENT = 64  # bytes between the sums of tensors


class _Mapped(NamedTuple):
    """The tables of some tensors of one dtype, see `rows`."""

    shares: Array
    groups: Array
    order: Array


def _flat(span: RowSpan) -> Strided:
    """Return complex rows as a 1-d array of their elements."""
    itemsize = span.dtype.storage.itemsize * span.dtype.components
    memories = Memory(span.source, (itemsize,)), Memory(span.target, (itemsize,))
    return Strided(span.dtype, (span.size // span.dtype.components,), *memories)


def _columns(span: RowSpan) -> int:
    """Return how many elements a row has, but at least 1."""
    return max(span.length // span.dtype.components, 1)


def count(span: RowSpan) -> int:
    """Return how many shares a tensor has: one at least for each strip of columns."""
    return max(device.ROW_SHARES, -(-_columns(span) // device.THREADS))


def _widths(span: RowSpan) -> tuple[int, int]:
    """Return (wide, narrow): a block's columns, powers of two, for groups of few and of many rows.

    Lanes share a group of many rows: the narrower a block, the more lanes it has. It is no
    narrower than a sector of memory, unless the rows are.
    """
    wide = min(1 << bits_of(_columns(span)), device.THREADS)
    itemsize = span.dtype.storage.itemsize * span.dtype.components
    narrow = max(device.SECTOR // itemsize, 8 * _columns(span) // count(span))
    return wide, min(wide, 1 << bits_of(narrow))


def _shares(counts: Array, columns: int, width: int, lanes: int, most: int) -> Array:
    """Return at most `most` shares of groups of `counts` rows, in strips of `width` columns."""
    strips = -(-columns // width)
    parts, ends = max(most // strips, 1), np.concatenate([[0], np.cumsum(counts)])
    cuts = np.searchsorted(ends, ends[-1] * np.arange(parts + 1) // parts)  # about equal numbers
    shares = np.zeros((strips * (cuts.size - 1), tables.SHARE_COLUMNS), np.int64)
    shares[:, tables.BEGIN], shares[:, tables.END] = np.tile([cuts[:-1], cuts[1:]], strips)
    shares[:, tables.COLUMN] = np.repeat(width * np.arange(strips), cuts.size - 1)
    shares[:, tables.WIDTH], shares[:, tables.LANES] = bits_of(width), bits_of(lanes)
    return shares


def _mapped(span: RowSpan, grouping: Groups, owner: int, part: int, target_rows: Array) -> _Mapped:
    """Return the tables of one tensor; groups of many rows, which lanes share, come first."""
    order, starts = grouping
    sizes, columns, most = np.diff(starts), _columns(span), count(span)
    wide, narrow = _widths(span)
    lanes, least = device.THREADS // narrow, -(-columns // narrow)
    long = sizes > device.LONG_GROUP if lanes > 1 and 2 * least <= most else sizes < 0
    groups = np.stack([starts[:-1], sizes, target_rows], axis=1)[np.argsort(~long, kind="stable")]
    many = int(np.count_nonzero(long))
    own = 0
    if many:
        share = most * int(sizes[long].sum()) // order.size
        own = min(max(share, least), most - least * (many < sizes.size))
    parts = [_shares(groups[:many, 1], columns, narrow, lanes, own)] if many else []
    if many < sizes.size:
        parts.append(_shares(groups[many:, 1], columns, wide, 1, most - own))
        parts[-1][:, [tables.BEGIN, tables.END]] += many
    found = np.concatenate([np.zeros((0, tables.SHARE_COLUMNS), np.int64), *parts])
    shares = np.zeros((most, tables.SHARE_COLUMNS), np.int64)
    shares[: len(found)] = found
    shares[:, tables.SOURCE], shares[:, tables.TARGET] = span.source, span.target
    shares[:, tables.LENGTH], shares[:, tables.OWNER] = span.length, owner
    shares[:, tables.PART] = part + np.arange(most)
    shares[:, tables.COMPONENTS] = span.dtype.components
    return _Mapped(shares, groups, order)


def _concatenated(parts: Sequence[_Mapped]) -> _Mapped:
    """Return the tables of several tensors as one of each kind."""
    groups = list(itertools.accumulate((len(part.groups) for part in parts), initial=0))
    orders = list(itertools.accumulate((part.order.size for part in parts), initial=0))
    for part, group, order in zip(parts, groups, orders, strict=False):
        part.shares[:, [tables.BEGIN, tables.END]] += group
        part.groups[:, tables.START] += order
    return _Mapped(*(np.concatenate(column) for column in zip(*parts, strict=True)))


class Rows(Work):
    """The work on tensors whose rows can share an index.

    `take` sets where the rows are, and `sums`, the addresses of their sums (0 without
    `keep_sums`). Other works scale and clamp the rows one by one, without summing them.
    """

    repeats = True
    kernels = Kernels(rows.sum_row_squares, rows.max_row_magnitude, rows.sum_row_powers)

    def __init__(self, spans: Mapping[int, RowSpan]) -> None:
        self._numbers = list(spans)
        self.counts = np.array([count(span) for span in spans.values()], np.int64)
        self._keeps = False

    def send(self, parts: Array, _stream: Any) -> None:
        """Note the index of each tensor's first partial sum; `take` sends the tables."""
        self._parts = parts

    def keep_sums(self) -> None:
        """Allocate memory for the sums from the next `take` on."""
        self._keeps = True

    def take(self, spans: Sequence[RowSpan], groupings: Sequence[Groups], stream: Any) -> None:
        """Send where the rows of each tensor are, and which of them share an index."""
        counts = [grouping[1].size - 1 for grouping in groupings]
        self.sums = self._sums(spans, counts, stream)
        numbers = zip(self._numbers, map(int, self._parts), strict=True)
        mapped = [
            _mapped(span._replace(target=target), grouping, *own, np.arange(count))
            for span, grouping, count, target, own in zip(
                spans, groupings, counts, self.sums, numbers, strict=True
            )
        ]
        made: dict[DType, list[Any]] = {}
        for dtype in dict.fromkeys(span.dtype for span in spans):
            own = [m for m, span in zip(mapped, spans, strict=True) if span.dtype is dtype]
            made[dtype] = [memory.table(array, stream) for array in _concatenated(own)]
        self._tables = made
        self._works = self._writers(dict(zip(self._numbers, spans, strict=True)))
        for work in self._works:
            work.send(np.zeros(len(work.counts), np.int64), stream)

    def _sums(self, spans: Sequence[RowSpan], counts: Sequence[int], stream: Any) -> list[int]:
        """Return the address of each tensor's sums in new memory; 0 without `keep_sums`."""
        if not self._keeps:
            return [0] * len(spans)
        sizes = [
            -(-count * span.length * span.dtype.storage.itemsize // ALIGNMENT) * ALIGNMENT
            for span, count in zip(spans, counts, strict=True)
        ]
        self._memory: Any = memory.scratch((sum(sizes),), stream, np.uint8)
        starts = itertools.accumulate(sizes[:-1], initial=self._memory.address)
        return list(starts)

    def _writers(self, spans: Mapping[int, RowSpan]) -> list[Work]:
        """Return the works that write single rows: chunks of real, tiles of complex numbers."""
        real = {k: Span(*s[:4]) for k, s in spans.items() if s.dtype.components == 1}
        flat = {k: _flat(s) for k, s in spans.items() if s.dtype.components == 2}
        writers: list[Work] = [Chunks(real)] if real else []
        return [*writers, Tiles(flat)] if flat else writers

    def sum_scaled(self, shared: Shared, decisions: Any, stream: Any) -> None:
        """Write the sums of rows times the decided factor: one read."""
        launch(rows.sum_scaled_rows, self._tables, stream, shared.tensors, decisions)

    def scale(self, *given: Any) -> None:
        """Write each single row times the decided factor."""
        for work in self._works:
            work.scale(*given)

    def clamp(self, *given: Any) -> None:
        """Clamp each single row between two bounds, unless its tensor is skipped."""
        for work in self._works:
            work.clamp(*given)


def sum_rows(span: RowSpan, to: DType, grouping: Groups, target_rows: Array, stream: Any) -> None:
    """Write the sum of each group of rows to the target row whose number `target_rows` has.

    `to` is the dtype of the target, real or complex as that of the rows.
    """
    if not span.size:
        return
    made = [memory.table(array, stream) for array in _mapped(span, grouping, 0, 0, target_rows)]
    launch(rows.sum_rows, {span.dtype: made}, stream, after=[like(to)])

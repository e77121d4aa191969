"""Operations of the GPU: tables of pointers and chunks, scratch memory, launches.

A plan is made once for some tensors and used for many steps. None of its operations waits for
the GPU, and none but `write_laws` with new laws moves anything over the bus.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType
from numclip.kernels import formulas
from numclip.kernels.cuda import device, norms, scaling, tables, verdict
from numclip.kernels.cuda.packets import WORD

ABSENT = -1.0  # a norm that was not given
POLICIES = {
    "propagate": tables.PROPAGATE,
    "raise": tables.RAISE,
    "skip": tables.SKIP,
    "zero": tables.ZERO,
}


class Span(NamedTuple):
    """Contiguous memory of `size` stored numbers: where it is read, and where written."""

    dtype: DType
    source: int
    target: int
    size: int


class Pool(NamedTuple):
    """Tensors ``[first, last)`` of one norm; pools of one `group` are skipped together."""

    first: int
    last: int
    group: int
    policy: str


class Law(NamedTuple):
    """How a pool is clipped: by ``bound / (norm / divisor / unscale)``, at most 1."""

    bound: float | Array
    divisor: float | Array = 1.0
    given: float = ABSENT
    unscale: float = 1.0
    ord: float = 2.0


class HostTable:
    """A table of zeros that the host may write to; it is sent only where it differs."""

    def __init__(self, shape: tuple[int, int], stream: Any) -> None:
        self._sent = np.zeros(shape)
        self.table = device.table(self._sent, stream)

    def write(self, table: Array, stream: Any) -> None:
        """Let what follows in the stream see a table."""
        if not np.array_equal(table, self._sent, equal_nan=True):
            device.update(self.table, table, stream)
            self._sent = table


def like(dtype: DType) -> Any:
    """Return what tells a kernel how elements are stored."""
    return dtype.storage.type(0)


def split(spans: Sequence[Span]) -> tuple[Array, Array, Array]:
    """Return the table of chunks, how many are before each tensor, and where each one starts.

    Chunks begin at multiples of 16 bytes where source and target can both do so: a first, short
    one goes up to there.
    """
    itemsizes = np.array([span.dtype.storage.itemsize for span in spans], np.int64)
    places = np.array([span[1:] for span in spans], np.int64).reshape(-1, 3)
    sources, targets, sizes = places.T
    heads = -sources % WORD // np.maximum(itemsizes, 1)
    heads = np.where((sources - targets) % WORD == 0, np.minimum(heads, sizes), 0)
    limits = device.CHUNK_BYTES // np.maximum(itemsizes, 1)
    counts = (heads > 0) + -(-(sizes - heads) // limits)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    owners = np.repeat(np.arange(len(spans)), counts)
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


class Plan:
    """What the kernels need to measure and scale some tensors."""

    def __init__(self, spans: Sequence[Span], pools: Sequence[Pool], stream: Any) -> None:
        self.spans, self.pools = list(spans), list(pools)
        chunks, firsts, _ = split(spans)
        self.chunks = self._by_dtype(chunks, stream)
        self._parts: dict[range, dict[DType, Any]] = {}
        self.tensors = device.table(self._tensor_table(firsts), stream)
        self._pools = device.table(self._pool_table(), stream)
        groups = 1 + max(pool.group for pool in pools)
        self._tickets = device.table(np.zeros(len(pools) + groups + 1, np.uint32), stream)
        self._partial = device.table(np.zeros((max(len(chunks), 1), 3)), stream)
        self._laws = HostTable((len(pools), tables.LAW_COLUMNS), stream)
        self._set_facts()
        self.in_place = all(span.source == span.target for span in spans)

    def _tensor_table(self, firsts: Array) -> Array:
        table = np.zeros((len(self.spans), 4), np.int64)
        table[:, tables.FIRST], table[:, tables.LAST] = firsts[:-1], firsts[1:]
        for p, pool in enumerate(self.pools):
            table[pool.first : pool.last, tables.POOL] = p
            table[pool.first : pool.last, tables.ZEROING] = pool.policy == "zero"
        return table

    def _pool_table(self) -> Array:
        table = np.zeros((len(self.pools), 5), np.int64)
        for p, pool in enumerate(self.pools):
            digits = min(row.digits for row in self._dtypes(pool))
            table[p] = pool.first, pool.last, pool.group, POLICIES[pool.policy], digits
        return table

    def _set_facts(self) -> None:
        """Find out what the laws say of each pool's elements."""
        dtypes = [self._dtypes(pool) for pool in self.pools]
        members = [self.spans[pool.first : pool.last] for pool in self.pools]
        self._sizes = [sum(span.size for span in spans) for spans in members]
        self._roundoffs = np.array([max(row.roundoff for row in rows) for rows in dtypes])
        self._tiny = np.array([max(row.tiny for row in rows) for rows in dtypes])
        self._coarse = np.array([max(row.coarse for row in rows) for rows in dtypes])
        self._roots_of: dict[float, Array] = {}

    def _dtypes(self, pool: Pool) -> set[DType]:
        return {span.dtype for span in self.spans[pool.first : pool.last]}

    def outcomes(self, count: int, stream: Any) -> list[tuple[Any, Any]]:
        """Return memory for the sums of the tensors and the decisions for the pools, so often."""
        shape = count, len(self.pools) + 1, tables.DECISION_COLUMNS
        sums, decisions = np.zeros((count, len(self.spans), 3)), np.zeros(shape)
        both = device.table(sums, stream), device.table(decisions, stream)
        return [(both[0][k], both[1][k]) for k in range(count)]

    def write_laws(self, law: Law, stream: Any, laws: HostTable | None = None) -> None:
        """Let decisions obey a law, whose numbers may be arrays with one for each pool.

        It is written to the plan's own table, or to another one for `judge` to be given.
        """
        table = np.empty((len(self.pools), tables.LAW_COLUMNS))
        coarse = self._roots(law.ord) / law.divisor * self._coarse
        numbers = [law.bound, law.divisor, law.given, self._roundoffs, coarse, self._tiny]
        for column, number in enumerate([*numbers, law.unscale, law.ord, 0.0]):
            table[:, column] = number
        (laws or self._laws).write(table, stream)

    def _roots(self, ord: float) -> Array:
        """Return the norm of each pool's vector of ones; found once for each order."""
        if ord not in self._roots_of:
            roots = [formulas.root(float(size), ord) for size in self._sizes]
            self._roots_of[ord] = np.array(roots)
        return self._roots_of[ord]

    def measure(self, ord: float, stream: Any) -> None:
        """Sum the chunks: one read, two where `ord` is neither 2 nor infinite."""
        if ord == 2.0:
            self._each(norms.sum_squares, stream, self.tensors, after=[self._partial])
            return
        self._each(norms.max_magnitude, stream, self.tensors, after=[self._partial])
        arguments = self.tensors, self._pools, self._partial, self._laws.table
        device.launch(norms.find_peaks, len(self.pools), stream, *arguments)
        if ord != math.inf:
            laws = self.tensors, self._laws.table
            self._each(norms.sum_powers, stream, *laws, after=[self._partial])

    def _each(self, kernel: Any, stream: Any, *before: Any, after: Sequence[Any] = ()) -> None:
        """Launch a kernel for each dtype."""
        for dtype, chunks in self.chunks.items():
            count = chunks.shape[0]
            device.launch(kernel, count, stream, chunks, *before, like(dtype), *after)

    def judge(self, outcome: tuple[Any, Any], stream: Any, laws: HostTable | None = None) -> None:
        """Add the sums up, and decide for every pool."""
        table = (laws or self._laws).table
        tables = self.tensors, self._pools, table, self._partial, self._tickets
        device.launch(verdict.judge, len(self.spans), stream, *tables, *outcome)

    def scale(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Write each tensor times the factor that was decided; one read, one write, or none."""
        self._scale(scaling.scale, outcome, stream)

    def scale_rare(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Scale, in place, those tensors whose factor is no plain number; rarely any."""
        self._scale(scaling.scale_rare, outcome, stream)

    def _scale(self, kernel: Any, outcome: tuple[Any, Any], stream: Any) -> None:
        for dtype, chunks in self.chunks.items():
            precision = [np.int64(number) for number in dtype.precision]
            arguments = self.tensors, outcome[1], *precision, like(dtype)
            device.launch(kernel, chunks.shape[0], stream, chunks, *arguments)

    def clamp(
        self, outcome: tuple[Any, Any], low: float, high: float, stream: Any, members: range
    ) -> None:
        """Write the elements of some tensors held between two bounds, but of those skipped."""
        bounds = np.float64(low), np.float64(high)
        for dtype, chunks in self._chunks_of(members, stream).items():
            arguments = self.tensors, outcome[1], *bounds, like(dtype)
            device.launch(scaling.clamp, chunks.shape[0], stream, chunks, *arguments)

    def _chunks_of(self, members: range, stream: Any) -> dict[DType, Any]:
        """Return the tables of the chunks of some tensors; made once."""
        if len(members) == len(self.spans):
            return self.chunks
        if members not in self._parts:
            chunks, _, _ = split(self.spans)
            inside = np.isin(chunks[:, tables.OWNER], np.array(members))
            self._parts[members] = self._by_dtype(chunks[inside], stream)
        return self._parts[members]

    def _by_dtype(self, chunks: Array, stream: Any) -> dict[DType, Any]:
        """Return tables of the chunks of each dtype that has some."""
        dtypes = [self.spans[k].dtype for k in chunks[:, tables.OWNER]]
        return {
            dtype: device.table(chunks[[own is dtype for own in dtypes]], stream)
            for dtype in dict.fromkeys(dtypes)
        }


def add(span: Span, stream: Any) -> None:
    """Add what is read to what is written to."""
    chunks = device.table(split([span])[0], stream)
    device.launch(scaling.add, chunks.shape[0], stream, chunks, like(span.dtype))

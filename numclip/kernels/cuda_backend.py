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
from numclip.kernels import cuda, device, formulas

ABSENT = -1.0  # a norm that was not given
POLICIES = {
    "propagate": cuda.PROPAGATE,
    "raise": cuda.RAISE,
    "skip": cuda.SKIP,
    "zero": cuda.ZERO,
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

    bound: float
    divisor: float = 1.0
    given: float = ABSENT
    unscale: float = 1.0
    ord: float = 2.0


def like(dtype: DType) -> Any:
    """Return what tells a kernel how elements are stored."""
    return dtype.storage.type(0)


def split(spans: Sequence[Span]) -> tuple[Array, Array]:
    """Return the table of chunks, and the number of chunks before each tensor and after all.

    Chunks begin at multiples of 16 bytes where source and target can both do so: a first, short
    one goes up to there.
    """
    itemsizes = np.array([span.dtype.storage.itemsize for span in spans], np.int64)
    places = np.array([span[1:] for span in spans], np.int64).reshape(-1, 3)
    sources, targets, sizes = places.T
    heads = -sources % cuda.WORD // np.maximum(itemsizes, 1)
    heads = np.where((sources - targets) % cuda.WORD == 0, np.minimum(heads, sizes), 0)
    limits = device.CHUNK_BYTES // np.maximum(itemsizes, 1)
    counts = (heads > 0) + -(-(sizes - heads) // limits)
    firsts = np.concatenate([[0], np.cumsum(counts)])
    owners = np.repeat(np.arange(len(spans)), counts)
    turns = np.arange(owners.size) - firsts[owners] - (heads[owners] > 0)
    starts = np.where(turns < 0, 0, heads[owners] + turns * limits[owners])
    stops = np.where(turns < 0, heads[owners], starts + limits[owners])
    chunks = np.empty((owners.size, 5), np.int64)
    chunks[:, cuda.SOURCE] = sources[owners] + starts * itemsizes[owners]
    chunks[:, cuda.TARGET] = targets[owners] + starts * itemsizes[owners]
    chunks[:, cuda.LENGTH] = np.minimum(stops, sizes[owners]) - starts
    chunks[:, cuda.OWNER] = owners
    chunks[:, cuda.PART] = np.arange(owners.size)
    return chunks, firsts


class Plan:
    """What the kernels need to measure and scale some tensors."""

    def __init__(self, spans: Sequence[Span], pools: Sequence[Pool]) -> None:
        self.spans, self.pools = list(spans), list(pools)
        chunks, firsts = split(spans)
        self.chunks = {
            dtype: device.table(chunks[[spans[k].dtype is dtype for k in chunks[:, cuda.OWNER]]])
            for dtype in dict.fromkeys(span.dtype for span in spans)
            if any(span.dtype is dtype and span.size for span in spans)
        }
        self._tensors = device.table(self._tensor_table(firsts))
        self._pools = device.table(self._pool_table())
        groups = 1 + max(pool.group for pool in pools)
        self._tickets = device.table(np.zeros(len(pools) + groups + 1, np.uint32))
        self._partial = device.table(np.zeros((max(len(chunks), 1), 3)))
        self._written: Array | None = None
        self._laws = device.table(np.zeros((len(pools), cuda.LAW_COLUMNS)))
        self.in_place = all(span.source == span.target for span in spans)

    def _tensor_table(self, firsts: Array) -> Array:
        table = np.zeros((len(self.spans), 4), np.int64)
        table[:, cuda.FIRST], table[:, cuda.LAST] = firsts[:-1], firsts[1:]
        for p, pool in enumerate(self.pools):
            table[pool.first : pool.last, cuda.POOL] = p
            table[pool.first : pool.last, cuda.ZEROING] = pool.policy == "zero"
        return table

    def _pool_table(self) -> Array:
        table = np.zeros((len(self.pools), 5), np.int64)
        for p, pool in enumerate(self.pools):
            digits = min(row.digits for row in self._dtypes(pool))
            table[p] = pool.first, pool.last, pool.group, POLICIES[pool.policy], digits
        return table

    def _dtypes(self, pool: Pool) -> set[DType]:
        return {span.dtype for span in self.spans[pool.first : pool.last]}

    def outcome(self) -> tuple[Any, Any]:
        """Return memory for the sums of the tensors and the decisions for the pools."""
        decisions = np.zeros((len(self.pools) + 1, cuda.DECISION_COLUMNS))
        return device.table(np.zeros((len(self.spans), 3))), device.table(decisions)

    def write_laws(self, laws: Sequence[Law], stream: Any) -> None:
        """Let the following decisions obey some laws, one for each pool."""
        table = np.array([self._row(*pair) for pair in zip(self.pools, laws, strict=True)])
        if self._written is None or not np.array_equal(table, self._written, equal_nan=True):
            device.update(self._laws, table, stream)
            self._written = table

    def _row(self, pool: Pool, law: Law) -> list[float]:
        rows = self._dtypes(pool)
        elements = float(sum(span.size for span in self.spans[pool.first : pool.last]))
        finest = max(row.grain for row in rows) / (2.0 * formulas.GRAIN_LIMIT)
        coarse = formulas.root(elements, law.ord) / law.divisor * finest
        roundoff, tiny = max(row.roundoff for row in rows), max(row.tiny for row in rows)
        start = [law.bound, law.divisor, law.given, roundoff, coarse, tiny]
        return [*start, law.unscale, law.ord, 0.0]

    def measure(self, ord: float, stream: Any) -> None:
        """Sum the chunks: one read, two where `ord` is neither 2 nor infinite."""
        if ord == 2.0:
            self._each(cuda.sum_squares, stream, self._tensors, after=[self._partial])
            return
        self._each(cuda.max_magnitude, stream, self._tensors, after=[self._partial])
        arguments = self._tensors, self._pools, self._partial, self._laws
        device.launch(cuda.find_peaks, len(self.pools), stream, *arguments)
        if ord != math.inf:
            self._each(cuda.sum_powers, stream, self._tensors, self._laws, after=[self._partial])

    def _each(self, kernel: Any, stream: Any, *before: Any, after: Sequence[Any] = ()) -> None:
        """Launch a kernel for each dtype."""
        for dtype, chunks in self.chunks.items():
            count = chunks.shape[0]
            device.launch(kernel, count, stream, chunks, *before, like(dtype), *after)

    def judge(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Add the sums up, and decide for every pool."""
        tables = self._tensors, self._pools, self._laws, self._partial, self._tickets
        device.launch(cuda.judge, len(self.spans), stream, *tables, *outcome)

    def scale(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Write each tensor times the factor that was decided; one read, one write, or none."""
        for dtype, chunks in self.chunks.items():
            precision = [np.int64(number) for number in dtype.precision]
            arguments = self._tensors, outcome[1], *precision, like(dtype)
            device.launch(cuda.scale, chunks.shape[0], stream, chunks, *arguments)

    def clamp(self, low: float, high: float, stream: Any) -> None:
        """Write each element held between two bounds."""
        self._each(cuda.clamp, stream, np.float64(low), np.float64(high))

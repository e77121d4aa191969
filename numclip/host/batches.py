"""Contiguous tensors of one dtype, cut into chunks, on which all threads work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType
from numclip.formulas import LOWEST, is_product, is_safe
from numclip.host.kernels import cpu, pools
from numclip.host.kernels import powers as kernels
from numclip.host.kernels.tuning import CHUNK, PARALLEL_BYTES
from numclip.host.runtime import threads
from numclip.host.runtime.threads import Call
from numclip.memory import Span
from numclip.tables import BAD, ERROR, EXPONENT, FACTOR, FINE, TERMS, TERMS_EXPONENT, TOTAL


class Batch(NamedTuple):
    """The chunks of some of a plan's tensors; their owners are the tensors' numbers there."""

    dtype: DType
    chunks: Array
    nbytes: int

    @property
    def column(self) -> int:
        """The column of decisions that has the factors for this dtype."""
        return FINE if self.dtype.digits == 53 else FACTOR

    def of(self, chosen: Array) -> Batch:
        """Return the chunks of the chosen tensors alone (a mask over all)."""
        return self._replace(chunks=self.chunks[chosen[self.chunks[:, cpu.OWNER]]])

    def read_at(self, starts: Array, sources: Sequence[int]) -> Batch:
        """Return the batch with tensors read at `sources`, not `starts`; without those at 0."""
        return self._replace(chunks=moved(self.chunks, self.chunks[:, cpu.OWNER], starts, sources))

    def in_place(self, chosen: Array) -> Batch:
        """Return the batch with the chosen tensors read where they are written."""
        own = chosen[self.chunks[:, cpu.OWNER]]
        if not own.any():
            return self
        chunks = self.chunks.copy()
        chunks[own, cpu.SOURCE] = chunks[own, cpu.TARGET]
        return self._replace(chunks=chunks)

    def call(self, kernel: Any, *arguments: Any) -> Call:
        """Return the call of a kernel on all chunks."""
        return Call(kernel, len(self.chunks), self.nbytes, (self.chunks, *arguments))

    def run(self, kernel: Any, *arguments: Any) -> None:
        """Call a kernel on shares of the chunks."""
        if self.nbytes < PARALLEL_BYTES:
            kernel(0, len(self.chunks), self.chunks, *arguments)
        else:
            threads.run_all([self.call(kernel, *arguments)])


def moved(chunks: Array, tensors: Array, starts: Array, sources: Sequence[int]) -> Array:
    """Return chunks with the addresses in column 0 moved from `starts` to `sources`.

    Chunks of tensors whose source is 0 are left out; `tensors` has the tensor of each chunk.
    """
    addresses = np.array(sources, np.int64)
    made = chunks.copy()
    made[:, 0] += (addresses - starts)[tensors]
    return made if addresses.all() else made[addresses[tensors] != 0]


def batches(spans: Mapping[int, Span]) -> list[Batch]:
    """Return tensors by their numbers as a batch for each dtype."""
    members: dict[DType, list[int]] = {}
    for number, span in spans.items():
        members.setdefault(span.dtype, []).append(number)
    return [_batch(dtype, numbers, spans) for dtype, numbers in members.items()]


def _batch(dtype: DType, numbers: list[int], spans: Mapping[int, Span]) -> Batch:
    batch = of_table(dtype, np.array([spans[number][1:4] for number in numbers], np.int64))
    if numbers[-1] != len(numbers) - 1:
        batch.chunks[:, cpu.OWNER] = np.array(numbers)[batch.chunks[:, cpu.OWNER]]
    return batch


def of_table(dtype: DType, table: Array) -> Batch:
    """Return tensors, rows of (source, target, length), as a batch; owners are rows."""
    itemsize = dtype.storage.itemsize
    count, elements = cpu.count_chunks(table, CHUNK)
    chunks = np.empty((count, 4), np.int64)
    cpu.split(table, itemsize, CHUNK, chunks)
    return Batch(dtype, chunks, elements * itemsize)


def write_squares(batch: Batch, sums: Array) -> None:
    """Write each tensor's sum of squares, as ``total * 4**exponent``.

    One pass. Only float64 can leave the safe range; such tensors are summed again, divided by
    a power of two near their largest element.
    """
    if batch.nbytes < PARALLEL_BYTES:
        safe = pools.measure(batch.chunks, batch.dtype.like, sums)
    else:
        partial = np.empty(len(batch.chunks))
        batch.run(cpu.sum_squares, batch.dtype.like, partial)
        safe = pools.add_chunks(batch.chunks, partial, False, sums)
    if not safe and batch.dtype.digits == 53:
        _rescue(batch, sums)


def _rescue(batch: Batch, sums: Array) -> None:
    """Write again the sums of tensors whose squares leave the safe range."""
    unsafe = np.zeros(len(sums), np.bool_)
    owners = batch.chunks[:, cpu.OWNER]
    unsafe[owners] = ~is_safe(sums[owners, TOTAL])
    peaks = largest(batch.of(unsafe), len(sums))
    unsafe &= np.isfinite(peaks) & (peaks > 0.0)
    exponents = np.where(unsafe, np.maximum(np.frexp(peaks)[1] - 1, LOWEST), 0)
    totals = powers(batch.of(unsafe), np.ldexp(1.0, exponents), 2.0, len(sums))
    sums[unsafe, TOTAL] = sums[unsafe, TERMS] = totals[unsafe]
    sums[unsafe, EXPONENT] = sums[unsafe, TERMS_EXPONENT] = exponents[unsafe]
    sums[unsafe, BAD] = sums[unsafe, ERROR] = 0.0


def largest(batch: Batch, count: int) -> Array:
    """Return the largest magnitude of each of `count` tensors; NaN if it has a NaN."""
    mask = batch.dtype.mask
    partial = np.empty(len(batch.chunks), mask.dtype)
    batch.run(cpu.max_magnitude, mask, partial)
    bits = np.zeros(count, mask.dtype)
    np.maximum.at(bits, batch.chunks[:, cpu.OWNER], partial)
    if batch.dtype.name == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(f"f{bits.itemsize}").astype(np.float64)


def powers(batch: Batch, scales: Array, ord: float, count: int) -> Array:
    """Return each of `count` tensors' sum of ``(|x| / scale) ** ord``, a finite order."""
    partial = np.empty(len(batch.chunks))
    batch.run(cpu.sum_powers, scales, ord, batch.dtype.like, partial)
    totals = np.zeros(count)
    cpu.merge(batch.chunks, partial, totals)
    return totals


def power_sums(parts: Sequence[Batch], ord: float, shifts: Array) -> Array:
    """Return sums of powers of tensors with their exponents, as `kernels.spans.sum_of` does.

    The numbers of the batches stand for ``2**shift`` times as much.
    """
    count = len(shifts)
    totals, scales, found = np.zeros(count), np.ones(count), np.empty((count, 2))
    unsafe = np.ones(count, np.bool_)
    if is_product(ord):
        for batch in parts:
            totals += powers(batch, scales, ord, count)
        unsafe = ~is_safe(totals) | (shifts != 0)
    left = [batch.of(unsafe) for batch in parts] if unsafe.any() else []
    peaks = np.zeros(count)
    for batch in left:
        peaks = np.maximum(peaks, largest(batch, count))
    if ord == np.inf:
        return np.stack([peaks, shifts / 2], axis=1)
    totals[unsafe] = 0.0
    kernels.write_scales(peaks, ord, scales)
    for batch in left:
        totals += powers(batch, scales, ord, count)
    kernels.write_power_sums(totals, scales, shifts, ord, found)
    return found


def scaling(batch: Batch, factors: Array) -> Call:
    """Return the call that writes each tensor times its factor; those of factor 1 are copied."""
    return batch.call(cpu.scale, factors.astype(batch.dtype.compute), batch.dtype.like)


def truncating(batch: Batch, decided: Array, column: int) -> Call:
    """Return the slow call that scales by decisions, a row for each tensor; some truncate."""
    precision, like = np.array(batch.dtype.precision, np.int64), batch.dtype.like
    return batch.call(cpu.scale_truncating, decided.copy(), column, precision, like)


def clamping(batch: Batch, beyond: Array, low: float, high: float) -> Call:
    """Return the call that clamps elements, and sets `beyond` for chunks with some beyond."""
    return batch.call(cpu.clamp, float(low), float(high), batch.dtype.like, beyond)

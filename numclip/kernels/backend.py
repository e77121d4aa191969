"""Operations of the CPU: kernels over batches of tensors, with their scratch and threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType
from numclip.kernels import columns, cpu, grouping, joint, threads, updates
from numclip.kernels.formulas import is_safe as is_safe
from numclip.kernels.tuning import (
    CHUNK,
    COLUMN_ROWS,
    COLUMNS,
    EXAMPLE_COLUMNS,
    PARALLEL_BYTES,
)

CANCELLATION = 2.0**20
"""How often the rows' magnitudes may exceed their sums for sums of four rows to be rounded: their
norm is then right to 2**-32."""

TERMS_MARGIN = 1.0 + 2.0**-25
"""What the magnitudes are multiplied by then, see `grouped_squares`."""

_BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


class Batch(NamedTuple):
    """Tensors of one element type, cut into chunks; `places` are the tensors' among all.

    The table of chunks holds addresses: `arrays` keeps the memory alive.
    """

    dtype: DType
    places: Array
    chunks: Array
    nbytes: int
    arrays: Any

    def share(self, chosen: Array) -> Batch:
        """Return the batch with the chunks of the chosen tensors alone (a mask)."""
        return self._replace(chunks=self.chunks[chosen[self.chunks[:, cpu.OWNER]]])


def batch(dtype: DType, places: Array, spans: Array, arrays: Any) -> Batch:
    """Return a batch of contiguous tensors: `spans` has their (source, target, length)."""
    itemsize = dtype.storage.itemsize
    count, elements = cpu.count_chunks(spans, CHUNK)
    chunks = np.empty((count, 4), np.int64)
    cpu.split(spans, itemsize, CHUNK, chunks)
    return Batch(dtype, places, chunks, elements * itemsize, arrays)


def rows_of(dtype: DType, source: Array, target: Array, rows: int) -> Batch:
    """Return a batch whose tensors are the rows of contiguous 1-d storage."""
    length = source.size // max(rows, 1)
    spans = np.empty((rows, 3), np.int64)
    spans[:, 0] = spans[:, 1] = np.arange(rows) * (length * source.itemsize)
    spans[:, 0] += source.ctypes.data
    spans[:, 1] += target.ctypes.data
    spans[:, 2] = length
    return batch(dtype, np.arange(rows), spans, (source, target))


def _merged(batch: Batch, partial: Array) -> Array:
    totals = np.zeros(batch.places.size)
    cpu.merge(batch.chunks, partial, totals)
    return totals


def largest(batch: Batch) -> Array:
    """Return the largest magnitude of each tensor's stored elements; NaN where there is one."""
    itemsize = batch.dtype.storage.itemsize
    mask = np.array([(1 << (8 * itemsize - 1)) - 1], _BITS[itemsize])
    partial = np.empty(len(batch.chunks), mask.dtype)
    threads.run(
        cpu.max_magnitude,
        partial.size,
        batch.nbytes,
        batch.chunks,
        mask,
        partial,
        keep=batch.arrays,
    )
    bits = np.zeros(batch.places.size, mask.dtype)
    np.maximum.at(bits, batch.chunks[:, cpu.OWNER], partial)
    if batch.dtype.name == "bfloat16":
        return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return bits.view(f"f{itemsize}").astype(np.float64)


def powers(batch: Batch, scales: Array, ord: float) -> Array:
    """Return each tensor's sum of ``(|x| / scale) ** ord``, a finite order."""
    partial = np.empty(len(batch.chunks))
    arguments = batch.chunks, scales, ord, batch.dtype.like, partial
    threads.run(cpu.sum_powers, partial.size, batch.nbytes, *arguments, keep=batch.arrays)
    return _merged(batch, partial)


def chunk_squares(batch: Batch) -> Array:
    """Return the sum of squares of each chunk."""
    partial = np.empty(len(batch.chunks))
    arguments = batch.chunks, batch.dtype.like, partial
    threads.run(cpu.sum_squares, partial.size, batch.nbytes, *arguments, keep=batch.arrays)
    return partial


def squares(batch: Batch) -> tuple[Array, Array]:
    """Return each tensor's sum of squares as ``total * 4**exponent``.

    One pass. Only float64 can leave the safe range; such tensors are summed again, divided by
    a power of two near their largest element.
    """
    totals = _merged(batch, chunk_squares(batch))
    exponents = np.zeros(totals.size, np.int64)
    if batch.dtype.digits < 53:
        return totals, exponents
    unsafe = ~is_safe(totals)
    if unsafe.any():
        suspects = batch.share(unsafe)
        peaks = largest(suspects)
        unsafe &= np.isfinite(peaks) & (peaks > 0.0)
        exponents[unsafe] = np.frexp(peaks[unsafe])[1] - 1
        scales = np.ldexp(1.0, exponents)
        totals[unsafe] = powers(batch.share(unsafe), scales, 2.0)[unsafe]
    return totals, exponents


def joint_norm(batch: Batch) -> tuple[float, bool, Array]:
    """Return the L2 norm of all tensors, if it is right (see `joint`), and each one's squares."""
    totals = np.zeros(batch.places.size)
    limits = batch.dtype.limits
    if batch.nbytes < PARALLEL_BYTES:
        norm, right = joint.norm_of(batch.chunks, batch.dtype.like, limits, totals)
    else:
        norm, right = joint.joined(batch.chunks, chunk_squares(batch), limits, totals)
    return norm, right, totals


def joint_factor(
    batch: Batch, norm: float, bound: float, divisor: float = 1.0
) -> tuple[float, bool]:
    """Return the factor for a norm over `divisor`, and whether results must be truncated."""
    if norm <= bound:
        return 1.0, False
    elements = batch.nbytes // batch.dtype.storage.itemsize
    return joint.judge(norm, bound, elements, divisor, batch.dtype.limits)  # type: ignore[no-any-return]


def join(
    totals: Array, exponents: Array, groups: Array, count: int, ord: float
) -> tuple[Array, Array]:
    """Return the norms of groups of tensors as ``root * 2**exponent``, added in their order."""
    roots = np.zeros(count)
    powers = np.zeros(count, np.int64)
    cpu.join(totals, exponents, groups, ord, roots, powers)
    return roots, powers


def factors(
    norms: tuple[Array, Array], bounds: tuple[Array, Array, Array], roundoffs: Array, limits: Array
) -> tuple[Array, Array, bool, bool]:
    """Return factors ``mantissa * 2**power``, whether one changes something, and truncates."""
    mantissas = np.ones(roundoffs.size)
    powers = np.zeros(roundoffs.size, np.int64)
    flags = cpu.factors(norms, bounds, roundoffs, limits, mantissas, powers)
    return mantissas, powers, *flags


def divided_factors(
    mantissas: Array, powers: Array, scale: float, digits: Array
) -> tuple[Array, Array]:
    """Return factors over a loss scale, each rounded down to its digits."""
    mantissas, powers = mantissas.copy(), powers.copy()
    cpu.divide_factors(mantissas, powers, scale, digits)
    return mantissas, powers


def scale(batch: Batch, factors: Array) -> None:
    """Write each tensor times its factor, in one pass."""
    threads.run_all([scaling(batch, factors)])


def scaling(batch: Batch, factors: Array) -> threads.Call:
    """Return the call that writes each tensor times its factor, in one pass."""
    arguments = batch.chunks, factors, batch.dtype.like
    return threads.Call(cpu.scale, len(batch.chunks), batch.nbytes, arguments, batch.arrays)


def truncating(batch: Batch, mantissas: Array, powers: Array) -> threads.Call:
    """Return the call that rounds subnormal results toward zero; slow."""
    precision = np.array(batch.dtype.precision, np.int64)
    arguments = batch.chunks, mantissas, powers, precision, batch.dtype.like
    count = len(batch.chunks)
    return threads.Call(cpu.scale_truncating, count, batch.nbytes, arguments, batch.arrays)


def make(calls: Sequence[threads.Call]) -> None:
    """Make calls, all of them or none, whatever exception comes from outside."""
    threads.run_all(calls)


def ready(calls: Sequence[threads.Call]) -> Callable[[], None]:
    """Return a function that makes calls, each once however often it is called."""
    return threads.ready(calls)


def whole(write: Callable[[], None]) -> None:
    """Call what may be repeated until it ended, then let an exception from outside through."""
    threads.whole(write)


def clamp(batch: Batch, low: float, high: float) -> None:
    """Write each element held between two bounds."""
    as_computed = batch.dtype.compute.type
    beyond = np.zeros(len(batch.chunks), np.bool_)
    arguments = batch.chunks, as_computed(low), as_computed(high), batch.dtype.like, beyond
    threads.run(cpu.clamp, len(batch.chunks), batch.nbytes, *arguments, keep=batch.arrays)


def column_squares(x: Array) -> Array:
    """Return the sums of squares over the middle axis of a 3-d array of storage."""
    outer, reduced, inner = x.shape
    parts = max(1, -(-reduced // COLUMN_ROWS))
    out = np.empty((outer, parts, inner))
    count = outer * parts * -(-inner // COLUMNS)
    threads.run(columns.column_squares, count, x.nbytes, x, COLUMN_ROWS, out)
    if parts > 1:
        columns.add_parts(out)
    return out[:, 0]


def scaling_columns(x: Array, factors: Array, out: Array) -> threads.Call:
    """Return the call that writes `x` times factors of the shape (outer, inner)."""
    count = x.shape[0] * x.shape[1]
    return threads.Call(columns.scale_columns, count, x.nbytes, (x, factors, out))


def sum_examples(x: Array, factors: Array, out: Array) -> None:
    """Write the sum over the first axis of `x`, each example times its factor."""
    count = -(-x.shape[1] // EXAMPLE_COLUMNS)
    threads.run(columns.sum_examples, count, x.nbytes, x, factors, EXAMPLE_COLUMNS, out)


def group(indices: Array) -> tuple[Array, Array]:
    """Return the order that brings equal indices together, and where each group starts."""
    row = np.uint32 if indices.size < 1 << 32 else np.int64
    table = np.zeros(1 << (2 * indices.size - 1).bit_length(), row)
    order = np.empty(indices.size, np.int64)
    starts = np.empty(indices.size + 1, np.int64)
    count = grouping.group_rows(indices, table, order, starts)
    return order, starts[: count + 1]


def grouped_squares(order: Array, starts: Array, values: Array) -> tuple[float, float]:
    """Return the squared norms of the summed rows and of the rows' summed magnitudes.

    Of elements under 64 bits the sums of four rows are rounded to float64, by at most
    ``2 * 2**-53`` of their magnitudes each: with ``M`` the norm of all, the norm is right to
    ``2 * 2**-53 M``. `TERMS_MARGIN` adds 16 such units to ``u M``, the allowance for rounding
    the terms of a result (see `formulas`): 2 for the norm, 2 for that of the result measured
    again, and M's own. Where ``M`` exceeds `CANCELLATION` times the norm, nothing is rounded.
    """
    if values.dtype != np.float64:
        total, terms = _grouped_squares(order, starts, values, exact=False)
        if terms <= CANCELLATION**2 * total:
            return total, terms * TERMS_MARGIN**2
    return _grouped_squares(order, starts, values, exact=True)


def _grouped_squares(
    order: Array, starts: Array, values: Array, *, exact: bool
) -> tuple[float, float]:
    rows = max(1, CHUNK // max(values.shape[1], 1))  # of a share, but for longer groups
    count = -(-order.size // rows)
    partial = np.empty((count, 2))
    arguments = rows, order, starts, values, exact, partial
    threads.run(grouping.grouped_squares, count, values.nbytes, *arguments)
    return grouping.total(partial)  # type: ignore[no-any-return]


def merge_rows(order: Array, starts: Array, values: Array, out: Array) -> None:
    """Write the sum of each group of rows to a row of `out`; both are 2-d storage."""
    arguments = order, starts, values, out
    threads.run(grouping.merge_rows, starts.size - 1, values.nbytes, *arguments)


class Update(NamedTuple):
    """Tensors of one element type with their gradients and optimizer states, in chunks."""

    dtype: DType
    chunks: Array
    nbytes: int
    arrays: Any


def update(dtype: DType, columns: Sequence[Array], lengths: Array, arrays: Any) -> Update:
    """Return tensors cut into chunks, from their addresses: gradient, parameter, two states."""
    counts = -(-lengths // CHUNK)
    owners = np.repeat(np.arange(lengths.size), counts)
    starts = CHUNK * (np.arange(owners.size) - np.repeat(np.cumsum(counts) - counts, counts))
    chunks = np.zeros((owners.size, 6), np.int64)
    sizes = [dtype.storage.itemsize] * 2 + [dtype.compute.itemsize] * 2
    for k, (column, itemsize) in enumerate(zip(columns, sizes, strict=False)):
        chunks[:, k] = column[owners] + starts * itemsize
    chunks[:, updates.LENGTH] = np.minimum(CHUNK, lengths[owners] - starts)
    chunks[:, updates.OWNER] = owners
    nbytes = int(lengths.sum()) * (2 * sizes[0] + 2 * sizes[2])
    return Update(dtype, chunks, nbytes, arrays)


def descend(update: Update, factors: Array, settings: Sequence[float], *, momentum: bool) -> None:
    """Take a step of gradient descent, see `updates`."""
    operation = updates.descend_with_momentum if momentum else updates.descend
    _take(operation, update, factors, settings)


def adam(update: Update, factors: Array, settings: Sequence[float]) -> None:
    """Take a step of Adam, see `updates`."""
    _take(updates.adam, update, factors, settings)


def _take(operation: Any, update: Update, factors: Array, settings: Sequence[float]) -> None:
    compute = update.dtype.compute
    arguments = update.chunks, factors.astype(compute), np.array(settings, compute)
    threads.run(
        operation,
        len(update.chunks),
        update.nbytes,
        *arguments,
        update.dtype.like,
        keep=update.arrays,
    )

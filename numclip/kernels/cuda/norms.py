"""Norms of chunks: sums of squares, largest magnitudes, sums of powers.

Kernels work on a table of chunks as those of ``cpu`` do: address read, address written, number
of elements, the tensor that owns it, and the place of its partial sum. A thousand tensors take
as many launches as one. Sums are in float64 with their rounding errors kept, and depend on the
chunks alone, not on the grid.
"""

import math

import numpy as np

from numclip.kernels.cuda.blocks import (
    NOTHING,
    block_max,
    block_sum,
    lane_squares,
    with_square,
)
from numclip.kernels.cuda.device import THREADS, cuda, inline, kernel
from numclip.kernels.cuda.packets import (
    PACKET,
    WORD,
    load,
    load_packet,
    size_of,
    whole_packets,
)
from numclip.kernels.cuda.scalars import (
    is_safe,
    larger,
    power_term,
    two_sum,
    usable,
)
from numclip.kernels.cuda.tables import (
    BAD,
    EXPONENT,
    FIRST,
    LAST,
    LENGTH,
    ORD,
    OWNER,
    PART,
    PEAK,
    POOL,
    SOURCE,
    TERMS,
    TERMS_PEAK,
    TOTAL,
    ZEROING,
)


@inline
def packet_squares(x):
    """Return the sum of the squares of a packet."""
    total = 0.0
    for k in range(len(x)):
        value = np.float64(x[k])
        total += value * value
    return total


@inline
def chunk_squares(address, length, like, room):
    """Return a chunk's sum of squares; two packets a turn, to have more loads in flight."""
    total, error = 0.0, 0.0
    packets = whole_packets(address, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        x = load_packet(address + p * WORD, stride, like)
        y = load_packet(address + (p + THREADS) * WORD, stride, like)
        total, rest = two_sum(total, packet_squares(x) + packet_squares(y))
        error += rest
        p += 2 * THREADS
    if p < packets:
        total, rest = two_sum(total, packet_squares(load_packet(address + p * WORD, stride, like)))
        error += rest
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        value = np.float64(load(address + i * size_of(like), like))
        total, rest = two_sum(total, value * value)
        error += rest
        i += THREADS
    return block_sum(total, error, room)


@inline
def careful_squares(address, length, masked, like, room):
    """Return a chunk's sum of squares in bins, and how many elements are not finite.

    Those count as 0 where `masked`.
    """
    bins, bad = NOTHING, 0.0
    i = np.int64(cuda.threadIdx.x)
    while i < length:
        value = np.float64(load(address + i * size_of(like), like))
        if not math.isfinite(value):
            bad += 1.0
            value = 0.0 if masked else value
        bins = with_square(bins, value, like)
        i += THREADS
    total, exponent = lane_squares(bins, np.int64(cuda.threadIdx.x), 1, room)
    return total, exponent, block_sum(bad, 0.0, room)


@inline
def is_lossless(total, like):
    """Tell whether a plain sum of squares lost nothing; only float64 can."""
    if size_of(like) == 8:
        return is_safe(total)
    return math.isfinite(total)


@kernel
def sum_squares(chunks, tensors, like, out):
    """Write each chunk's sum of squares. Reads every element once, rare chunks twice."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        address, length = chunks[c, SOURCE], chunks[c, LENGTH]
        total, exponent, bad = chunk_squares(address, length, like, room), 0, 0.0
        if not is_lossless(total, like):
            masked = tensors[chunks[c, OWNER], ZEROING] != 0
            total, exponent, bad = careful_squares(address, length, masked, like, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = total
            out[chunks[c, PART], EXPONENT] = exponent
            out[chunks[c, PART], BAD] = bad
        c += cuda.gridDim.x


@inline
def finite_magnitude(element, masked):
    """Return an element's magnitude, 0 for one that is masked; and 1 for one not finite."""
    value = abs(np.float64(element))
    if math.isfinite(value):
        return value, 0.0
    return (0.0 if masked else value), 1.0


@inline
def packet_max(x, masked, largest, bad):
    """Return the largest magnitude with those of a packet, and how many are not finite."""
    for k in range(len(x)):
        value, odd = finite_magnitude(x[k], masked)
        largest = larger(largest, value)
        bad += odd
    return largest, bad


@inline
def chunk_max(address, length, masked, like):
    """Return a thread's largest magnitude of a chunk, and how many elements are not finite."""
    largest, bad = 0.0, 0.0
    packets = whole_packets(address, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        x = load_packet(address + p * WORD, stride, like)
        y = load_packet(address + (p + THREADS) * WORD, stride, like)
        largest, bad = packet_max(x, masked, largest, bad)
        largest, bad = packet_max(y, masked, largest, bad)
        p += 2 * THREADS
    if p < packets:
        x = load_packet(address + p * WORD, stride, like)
        largest, bad = packet_max(x, masked, largest, bad)
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        value, odd = finite_magnitude(load(address + i * size_of(like), like), masked)
        largest = larger(largest, value)
        bad += odd
        i += THREADS
    return largest, bad


@kernel
def max_magnitude(chunks, tensors, like, out):
    """Write each chunk's largest magnitude. Reads every element once."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        masked = tensors[chunks[c, OWNER], ZEROING] != 0
        largest, bad = chunk_max(chunks[c, SOURCE], chunks[c, LENGTH], masked, like)
        largest, bad = block_max(largest, room), block_sum(bad, 0.0, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = largest
            out[chunks[c, PART], EXPONENT] = 0.0
            out[chunks[c, PART], BAD] = bad
        c += cuda.gridDim.x


@kernel
def find_peaks(tensors, pools, partial, column, out):
    """Write the largest of each pool's partial maxima to a column; a block for each.

    That of the terms of sums goes to the column which belongs to it.
    """
    room = cuda.shared.array((2, THREADS), np.float64)
    p = np.int64(cuda.blockIdx.x)
    while p < pools.shape[0]:
        largest, terms = 0.0, 0.0
        part = tensors[pools[p, FIRST], FIRST] + cuda.threadIdx.x
        while part < tensors[pools[p, LAST] - 1, LAST]:
            largest = larger(largest, partial[part, TOTAL])
            terms = larger(terms, partial[part, TERMS])
            part += THREADS
        largest, terms = block_max(largest, room), block_max(terms, room)
        if cuda.threadIdx.x == 0:
            out[p, column], out[p, column + TERMS_PEAK - PEAK] = largest, larger(largest, terms)
        p += cuda.gridDim.x


@inline
def with_power(element, masked, peak, ord, total, error):
    """Return a sum of powers and its error with an element's; of infinite order, a ratio."""
    value, _ = finite_magnitude(element, masked)
    if ord == math.inf:
        return larger(total, value / peak), error
    total, rest = two_sum(total, power_term(value / peak, ord))
    return total, error + rest


@inline
def chunk_powers(address, length, masked, peak, ord, like):
    """Return a thread's sum of powers of a chunk and its error."""
    total, error = 0.0, 0.0
    packets = whole_packets(address, length)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(address + p * WORD, packets * WORD, like)
        for k in range(len(x)):
            total, error = with_power(x[k], masked, peak, ord, total, error)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        element = load(address + i * size_of(like), like)
        total, error = with_power(element, masked, peak, ord, total, error)
        i += THREADS
    return total, error


@kernel
def sum_powers(chunks, tensors, laws, like, out):
    """Write each chunk's sum of ``(|x| / peak) ** ord``; of infinite order, the largest ratio."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        tensor = tensors[chunks[c, OWNER]]
        peak, ord = usable(laws[tensor[POOL], PEAK]), laws[tensor[POOL], ORD]
        address, length, masked = chunks[c, SOURCE], chunks[c, LENGTH], tensor[ZEROING] != 0
        total, error = chunk_powers(address, length, masked, peak, ord, like)
        total = block_max(total, room) if ord == math.inf else block_sum(total, error, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = total
        c += cuda.gridDim.x

"""Norms of chunks: sums of squares, largest magnitudes, sums of powers.

Kernels work on a table of chunks as those of the host do: address read, address written, number
of elements, the tensor that owns the chunk, and the row of its partial sum. A thousand tensors
take as many launches as one. Sums are in float64 with their rounding errors kept, and depend on
the chunks alone, not on the grid.
"""

import math

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import BINS, EMPTY, block_max, block_sum, lane_bins, with_square
from numclip.cuda.kernels.packets import (
    PACKET,
    fold_packets,
    load,
    load_at,
    packet_at,
    size_of,
    whole_packets,
)
from numclip.cuda.kernels.scalars import (
    is_safe,
    larger,
    power_term,
    two_sum,
    usable,
)


@inline
def sum_of_squares(x):
    """Return the sum of the squares of one packet, or two."""
    first, second = 0.0, 0.0
    for k in range(len(x)):
        value = np.float64(x[k])
        if k < PACKET:
            first += value * value
        else:
            second += value * value
    return first + second


@inline
def with_squares(state, x):
    """Return a sum of squares and its error after adding the squares of some elements."""
    total, rest = two_sum(state[0], sum_of_squares(x))
    return total, state[1] + rest


@inline
def lane_squares_of(address, length, lane, lanes, like):
    """Return a lane's share of a sum of squares and its error."""
    return fold_packets(with_squares, (0.0, 0.0), (), address, length, lane, lanes, like)


@inline
def parts_of(address, masked, components, like):
    """Return an element's parts, 0 if masked and not finite, and 1.0 if not finite, else 0.0."""
    x, y = np.float64(load(address, like)), 0.0
    if components == 2:
        y = np.float64(load(address + size_of(like), like))
    if math.isfinite(x) and math.isfinite(y):
        return x, y, 0.0
    return (0.0 if masked else x), (0.0 if masked else y), 1.0


@inline
def careful_squares(line, masked, lane, lanes, like):
    """Return a lane's share of the squares of a line in bins, non-finite elements counted.

    `line` is (address, step in bytes, number of elements, components).
    """
    address, step, length, components = line
    bins, i = EMPTY, lane
    while i < length:
        x, y, odd = parts_of(address + i * step, masked, components, like)
        bins = with_square(with_square(bins, x, odd, like), y, 0.0, like)
        i += lanes
    return bins


@inline
def is_lossless(total, like):
    """Tell whether a sum of squares is finite and, in float64, surely free of underflow."""
    if size_of(like) == 8:
        return is_safe(total)
    return math.isfinite(total)


@kernel
def sum_squares(chunks, tensors, like, out):
    """Write each chunk's sum of squares. Reads every element once, rare chunks twice."""
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    c, i = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
    while c < chunks.shape[0]:
        address, length = chunks[c, col.SOURCE], chunks[c, col.LENGTH]
        total, error = lane_squares_of(address, length, i, THREADS, like)
        total, exponent, bad = block_sum(total, error, scratch), 0, 0.0
        if not is_lossless(total, like):
            masked = tensors[chunks[c, col.OWNER], col.ZEROING] != 0
            line = address, size_of(like), length, 1
            bins = careful_squares(line, masked, i, THREADS, like)
            total, exponent, bad = lane_bins(bins, i, 1, scratch)
        if cuda.threadIdx.x == 0:
            out[chunks[c, col.PART], col.TOTAL] = total
            out[chunks[c, col.PART], col.EXPONENT] = exponent
            out[chunks[c, col.PART], col.BAD] = bad
        c += cuda.gridDim.x


@inline
def finite_magnitude(element, masked):
    """Return a magnitude, 0 if masked and not finite, and 1.0 if it is not finite, else 0.0."""
    value = abs(np.float64(element))
    if math.isfinite(value):
        return value, 0.0
    return (0.0 if masked else value), 1.0


@inline
def with_largest(state, x, masked):
    """Return the largest magnitude and the number of non-finite elements after some more."""
    largest, bad = state
    for k in range(len(x)):
        value, odd = finite_magnitude(x[k], masked)
        largest = larger(largest, value)
        bad += odd
    return largest, bad


@inline
def lane_max_of(address, length, masked, lane, lanes, like):
    """Return the largest magnitude of a lane's share, and how many elements are not finite."""
    state = 0.0, 0.0
    return fold_packets(with_largest, state, (masked,), address, length, lane, lanes, like)


@kernel
def max_magnitude(chunks, tensors, like, out):
    """Write each chunk's largest magnitude. Reads every element once."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    c, i = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
    while c < chunks.shape[0]:
        masked = tensors[chunks[c, col.OWNER], col.ZEROING] != 0
        address, length = chunks[c, col.SOURCE], chunks[c, col.LENGTH]
        largest, bad = lane_max_of(address, length, masked, i, THREADS, like)
        largest, bad = block_max(largest, scratch), block_sum(bad, 0.0, scratch)
        if cuda.threadIdx.x == 0:
            out[chunks[c, col.PART], col.TOTAL] = largest
            out[chunks[c, col.PART], col.EXPONENT] = 0.0
            out[chunks[c, col.PART], col.BAD] = bad
        c += cuda.gridDim.x


@kernel
def find_peaks(tensors, pools, partial, column, out):
    """Write the largest of each pool's partial maxima to a column; a block for each pool.

    The largest of the terms of sums goes to the matching column, TERMS_PEAK for PEAK.
    """
    scratch = cuda.shared.array((2, THREADS), np.float64)
    p = np.int64(cuda.blockIdx.x)
    while p < pools.shape[0]:
        largest, terms = 0.0, 0.0
        part = tensors[pools[p, col.FIRST], col.FIRST] + cuda.threadIdx.x
        while part < tensors[pools[p, col.LAST] - 1, col.LAST]:
            largest = larger(largest, partial[part, col.TOTAL])
            terms = larger(terms, partial[part, col.TERMS])
            part += THREADS
        largest, terms = block_max(largest, scratch), block_max(terms, scratch)
        if cuda.threadIdx.x == 0:
            out[p, column], out[p, column + col.TERMS_PEAK - col.PEAK] = (
                largest,
                larger(largest, terms),
            )
        p += cuda.gridDim.x


@inline
def with_ratio(ratio, ord, total, error):
    """Return a sum of powers and its error after adding a ratio's; for order inf, the maximum."""
    if ord == math.inf:
        return larger(total, ratio), error
    total, rest = two_sum(total, power_term(ratio, ord))
    return total, error + rest


@inline
def lane_powers_of(address, length, law, lane, lanes, like):
    """Return a lane's share of a sum of powers and its error; `law` is (masked, scale, ord)."""
    masked, scale, ord = law
    total, error = 0.0, 0.0
    packets = whole_packets(address, length)
    p = lane
    while p < packets:
        x = load_at(address, (packet_at(p, packets, like),), like)
        for k in range(len(x)):
            value, _ = finite_magnitude(x[k], masked)
            total, error = with_ratio(value / scale, ord, total, error)
        p += lanes
    i = packets * PACKET + lane
    while i < length:
        value, _ = finite_magnitude(load(address + i * size_of(like), like), masked)
        total, error = with_ratio(value / scale, ord, total, error)
        i += lanes
    return total, error


@kernel
def sum_powers(chunks, tensors, laws, like, out):
    """Write each chunk's sum of ``(|x| / scale) ** ord``; for order inf, the largest ratio."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    c, i = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
    while c < chunks.shape[0]:
        tensor, chunk = tensors[chunks[c, col.OWNER]], chunks[c]
        ord = laws[tensor[col.POOL], col.ORD]
        scale = usable(laws[tensor[col.POOL], col.PEAK], ord)
        law = tensor[col.ZEROING] != 0, scale, ord
        total, error = lane_powers_of(chunk[col.SOURCE], chunk[col.LENGTH], law, i, THREADS, like)
        total = block_max(total, scratch) if ord == math.inf else block_sum(total, error, scratch)
        if cuda.threadIdx.x == 0:
            out[chunks[c, col.PART], col.TOTAL] = total
        c += cuda.gridDim.x

"""Norms of strided memory, tile by tile: sums of squares, maxima, sums of powers.

A tile is a patch of LENGTH elements a STEP apart and COUNT neighbouring such lines a UNIT_STEP
apart, in bytes; an element is one or two stored numbers (COMPONENTS). The threads of a block are
``2**BITS`` neighbours times lanes, which share a line. Line n has its own sum in the row
``PART + n * NUMBER_STEP``, or (with a NUMBER_STEP of 0) all lines have one sum together.
`peaks` has a row for each unit, or for each pool. Sums are as exact as those of `norms`, and
depend on the tiles alone.
"""

import math

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import BINS, EMPTY, lane_bins, lane_max, lane_sum
from numclip.cuda.kernels.norms import (
    careful_squares,
    is_lossless,
    lane_max_of,
    lane_powers_of,
    lane_squares_of,
    parts_of,
    sum_of_squares,
    with_ratio,
)
from numclip.cuda.kernels.packets import PACKET, WORD, load, load_apart, size_of
from numclip.cuda.kernels.scalars import larger, two_sum, usable

ALL_BITS = THREADS.bit_length() - 1


@inline
def seat(tile):
    """Return the thread's neighbour and lane, and how many lanes there are.

    Consecutive threads read the elements that are closest in memory.
    """
    i, bits = np.int64(cuda.threadIdx.x), tile[col.BITS]
    lanes = np.int64(THREADS) >> bits
    if abs(tile[col.STEP]) < abs(tile[col.UNIT_STEP]):
        return i >> (ALL_BITS - bits), i & (lanes - 1), lanes
    return i & ((1 << bits) - 1), i >> bits, lanes


@inline
def in_packets(tile, addresses, components, like):
    """Tell whether lines can be read in packets: contiguous ones at multiples of 16 bytes."""
    contiguous = tile[col.STEP] == components * size_of(like) and tile[col.COMPONENTS] == components
    return contiguous and addresses % WORD == 0


@inline
def line_squares(tile, n, lane, lanes, like):
    """Return a thread's share of the sum of squares of line `n`; eight loads in flight, or so."""
    step, length, components = tile[col.STEP], tile[col.LENGTH], tile[col.COMPONENTS]
    line = tile[col.SOURCE] + n * tile[col.UNIT_STEP]
    if in_packets(tile, tile[col.SOURCE] | tile[col.UNIT_STEP], components, like):
        return lane_squares_of(line, components * length, lane, lanes, like)
    total, error, k = 0.0, 0.0, 0
    while k < components:
        address, i = line + lane * step + k * size_of(like), lane
        while i + (PACKET - 1) * lanes < length:
            x = load_apart(address, lanes * step, like)
            total, rest = two_sum(total, sum_of_squares(x))
            error += rest
            address += PACKET * lanes * step
            i += PACKET * lanes
        while i < length:
            x = np.float64(load(address, like))
            total, rest = two_sum(total, x * x)
            error += rest
            address += lanes * step
            i += lanes
        k += 1
    return total, error


@inline
def write_sums(tile, n, thread, total, exponent, bad, out):
    """Write the sums of a line, or of all lines together."""
    if thread < sums_apart(tile) and n < tile[col.COUNT]:
        row = tile[col.PART] + n * tile[col.NUMBER_STEP]
        out[row, col.TOTAL], out[row, col.EXPONENT], out[row, col.BAD] = total, exponent, bad


@inline
def sums_apart(tile):
    """Return how many of the lines that are read at a time have a sum of their own."""
    return np.int64(1) << tile[col.BITS] if tile[col.NUMBER_STEP] != 0 else np.int64(1)


@inline
def squares_of_lines(tile, first, tensor, like, scratch, out):
    """Write the sums of squares of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, thread, apart = first + neighbour, (lane << tile[col.BITS]) + neighbour, sums_apart(tile)
    total, error, bad, exponent = 0.0, 0.0, 0.0, 0
    if n < tile[col.COUNT]:
        total, error = line_squares(tile, n, lane, lanes, like)
    total = lane_sum(total, error, thread, apart, scratch)
    lossy = n < tile[col.COUNT] and not is_lossless(total, like)
    if cuda.syncthreads_or(1 if lossy else 0):
        bins = EMPTY
        if n < tile[col.COUNT]:
            start = tile[col.SOURCE] + n * tile[col.UNIT_STEP]
            line = start, tile[col.STEP], tile[col.LENGTH], tile[col.COMPONENTS]
            bins = careful_squares(line, tensor[col.ZEROING] != 0, lane, lanes, like)
        careful = lane_bins(bins, thread, apart, scratch)
        if lossy:  # only such a line has non-finite elements
            total, exponent, bad = careful
    write_sums(tile, n, thread, total, exponent, bad, out)


@inline
def over_lines(turn, tiles, tensors, arguments):
    """Call a function for the lines of each tile that a block reads at a time."""
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        tensor, first = tensors[tiles[t, col.OWNER]], np.int64(0)
        while first < tiles[t, col.COUNT]:
            turn(tiles[t], first, tensor, *arguments)
            first += np.int64(1) << tiles[t, col.BITS]
        t += cuda.gridDim.x


@kernel
def sum_tile_squares(tiles, tensors, like, out):
    """Write the sums of squares of each tile. Reads every element once, rare lines twice."""
    scratch = cuda.shared.array((BINS, THREADS), np.float64)
    over_lines(squares_of_lines, tiles, tensors, (like, scratch, out))


@inline
def line_max(tile, n, masked, lane, lanes, like):
    """Return the largest part of a lane's share of a line, and how many elements are not finite."""
    line, step = tile[col.SOURCE] + n * tile[col.UNIT_STEP], tile[col.STEP]
    if in_packets(tile, tile[col.SOURCE] | tile[col.UNIT_STEP], 1, like):
        return lane_max_of(line, tile[col.LENGTH], masked, lane, lanes, like)
    largest, bad, i = 0.0, 0.0, lane
    while i < tile[col.LENGTH]:
        x, y, odd = parts_of(line + i * step, masked, tile[col.COMPONENTS], like)
        largest = larger(larger(largest, abs(x)), abs(y))
        bad += odd
        i += lanes
    return largest, bad


@inline
def max_of_lines(tile, first, tensor, like, scratch, out):
    """Write the largest parts of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, thread, apart = first + neighbour, (lane << tile[col.BITS]) + neighbour, sums_apart(tile)
    largest, bad = 0.0, 0.0
    if n < tile[col.COUNT]:
        largest, bad = line_max(tile, n, tensor[col.ZEROING] != 0, lane, lanes, like)
    largest = lane_max(largest, thread, apart, scratch)
    bad = lane_sum(bad, 0.0, thread, apart, scratch)
    write_sums(tile, n, thread, largest, 0.0, bad, out)


@kernel
def max_tile_magnitude(tiles, tensors, like, out):
    """Write each tile's largest real or imaginary parts. Reads every element once."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    over_lines(max_of_lines, tiles, tensors, (like, scratch, out))


@inline
def line_powers(tile, n, law, lane, lanes, like):
    """Return a thread's share of a line's sum of powers; for infinite order, the largest ratio.

    `law` is (masked, scale, ord).
    """
    line, step = tile[col.SOURCE] + n * tile[col.UNIT_STEP], tile[col.STEP]
    if in_packets(tile, tile[col.SOURCE] | tile[col.UNIT_STEP], 1, like):
        return lane_powers_of(line, tile[col.LENGTH], law, lane, lanes, like)
    masked, scale, ord = law
    total, error, i = 0.0, 0.0, lane
    while i < tile[col.LENGTH]:
        x, y, _ = parts_of(line + i * step, masked, tile[col.COMPONENTS], like)
        ratio = math.hypot(x / scale, y / scale) if tile[col.COMPONENTS] == 2 else abs(x / scale)
        total, error = with_ratio(ratio, ord, total, error)
        i += lanes
    return total, error


@inline
def powers_of_lines(tile, first, tensor, peaks, like, scratch, out):
    """Write the sums of powers of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, thread, apart = first + neighbour, (lane << tile[col.BITS]) + neighbour, sums_apart(tile)
    total, error, ord = 0.0, 0.0, peaks[tensor[col.POOL], col.ORD]
    if n < tile[col.COUNT]:
        row = tensor[col.POOL] + tile[col.NUMBER] + n * tile[col.NUMBER_STEP]
        law = tensor[col.ZEROING] != 0, usable(peaks[row, col.PEAK], ord), ord
        total, error = line_powers(tile, n, law, lane, lanes, like)
    if ord == math.inf:
        total = lane_max(total, thread, apart, scratch)
    else:
        total = lane_sum(total, error, thread, apart, scratch)
    if thread < apart and n < tile[col.COUNT]:
        out[tile[col.PART] + n * tile[col.NUMBER_STEP], col.TOTAL] = total


@kernel
def sum_tile_powers(tiles, tensors, peaks, like, out):
    """Write each tile's sums of ``(|x| / scale) ** ord``; for order inf, the largest ratios."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    over_lines(powers_of_lines, tiles, tensors, (peaks, like, scratch, out))

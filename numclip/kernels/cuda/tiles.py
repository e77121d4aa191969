"""Norms of memory of any steps, tile by tile: sums of squares, maxima, sums of powers.

A tile is a patch of LENGTH elements a STEP apart and COUNT neighbouring such lines a UNIT_STEP
apart, in bytes; an element is one or two stored numbers (COMPONENTS). The threads of a block are
``2**BITS`` neighbours times lanes, which share a line. Either every line has a sum of its own,
at PART and every NUMBER_STEP rows on, or (with a NUMBER_STEP of 0) all lines have one together.
`peaks` has a row for each unit, or for each pool. Sums are as exact as those of `norms`, and
depend on the tiles alone.
"""

import math

import numpy as np

from numclip.kernels.cuda.blocks import NOTHING, lane_max, lane_squares, lane_sum, with_square
from numclip.kernels.cuda.device import THREADS, cuda, inline, kernel
from numclip.kernels.cuda.norms import is_lossless, usable
from numclip.kernels.cuda.packets import load, size_of
from numclip.kernels.cuda.scalars import larger, power_term, two_sum
from numclip.kernels.cuda.tables import (
    BAD,
    BITS,
    COMPONENTS,
    COUNT,
    EXPONENT,
    LENGTH,
    NUMBER,
    NUMBER_STEP,
    ORD,
    OWNER,
    PART,
    PEAK,
    POOL,
    SOURCE,
    STEP,
    TOTAL,
    UNIT_STEP,
    ZEROING,
)

ALL_BITS = THREADS.bit_length() - 1


@inline
def seat(tile):
    """Return the thread's neighbour and lane, and how many lanes there are.

    Threads that follow one another read what lies closest.
    """
    i, bits = np.int64(cuda.threadIdx.x), tile[BITS]
    lanes = np.int64(THREADS) >> bits
    if abs(tile[STEP]) < abs(tile[UNIT_STEP]):
        return i >> (ALL_BITS - bits), i & (lanes - 1), lanes
    return i & ((1 << bits) - 1), i >> bits, lanes


@inline
def line_squares(tile, n, lane, lanes, like):
    """Return a thread's share of the sum of squares of line `n`; four loads in flight."""
    total, error = 0.0, 0.0
    far, length = lanes * tile[STEP], tile[LENGTH]
    k = 0
    while k < tile[COMPONENTS]:
        place = tile[SOURCE] + n * tile[UNIT_STEP] + lane * tile[STEP] + k * size_of(like)
        i = lane
        while i + 3 * lanes < length:
            a, b = load(place, like), load(place + far, like)
            c, d = load(place + 2 * far, like), load(place + 3 * far, like)
            a, b, c, d = np.float64(a), np.float64(b), np.float64(c), np.float64(d)
            total, rest = two_sum(total, (a * a + b * b) + (c * c + d * d))
            error += rest
            place += 4 * far
            i += 4 * lanes
        while i < length:
            a = np.float64(load(place, like))
            total, rest = two_sum(total, a * a)
            error += rest
            place += far
            i += lanes
        k += 1
    return total, error


@inline
def parts_of(place, masked, components, like):
    """Return an element's parts, 0 for one that is masked; and 1 for one that is not finite."""
    x, y = np.float64(load(place, like)), 0.0
    if components == 2:
        y = np.float64(load(place + size_of(like), like))
    if math.isfinite(x) and math.isfinite(y):
        return x, y, 0.0
    return (0.0 if masked else x), (0.0 if masked else y), 1.0


@inline
def careful_line(tile, n, masked, lane, lanes, like):
    """Return a thread's share of the squares of a line in bins, and of what is not finite."""
    bins, bad = NOTHING, 0.0
    i = lane
    while i < tile[LENGTH]:
        place = tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP]
        x, y, odd = parts_of(place, masked, tile[COMPONENTS], like)
        bins = with_square(with_square(bins, x, like), y, like)
        bad += odd
        i += lanes
    return bins, bad


@inline
def write_sums(tile, n, place, total, exponent, bad, out):
    """Write the sums of a line, or of all lines together."""
    if place < sums_apart(tile) and n < tile[COUNT]:
        row = tile[PART] + n * tile[NUMBER_STEP]
        out[row, TOTAL], out[row, EXPONENT], out[row, BAD] = total, exponent, bad


@inline
def sums_apart(tile):
    """Return how many of the lines that are read at a time have a sum of their own."""
    return np.int64(1) << tile[BITS] if tile[NUMBER_STEP] != 0 else np.int64(1)


@inline
def squares_of_lines(tile, first, masked, like, room, out):
    """Write the sums of squares of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, place, apart = first + neighbour, (lane << tile[BITS]) + neighbour, sums_apart(tile)
    total, error, bad, exponent = 0.0, 0.0, 0.0, 0
    if n < tile[COUNT]:
        total, error = line_squares(tile, n, lane, lanes, like)
    total = lane_sum(total, error, place, apart, room)
    lossy = n < tile[COUNT] and not is_lossless(total, like)
    if cuda.syncthreads_or(1 if lossy else 0):
        bins = NOTHING
        if n < tile[COUNT]:
            bins, bad = careful_line(tile, n, masked, lane, lanes, like)
        careful = lane_squares(bins, place, apart, room)
        bad = lane_sum(bad, 0.0, place, apart, room)
        if lossy:
            total, exponent = careful
    write_sums(tile, n, place, total, exponent, bad, out)


@kernel
def sum_tile_squares(tiles, tensors, like, out):
    """Write the sums of squares of each tile. Reads every element once, rare lines twice."""
    room = cuda.shared.array((2, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        masked = tensors[tiles[t, OWNER], ZEROING] != 0
        first = np.int64(0)
        while first < tiles[t, COUNT]:
            squares_of_lines(tiles[t], first, masked, like, room, out)
            first += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x


@inline
def max_of_lines(tile, first, masked, like, room, out):
    """Write the largest parts of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, place, apart = first + neighbour, (lane << tile[BITS]) + neighbour, sums_apart(tile)
    largest, bad = 0.0, 0.0
    i = lane if n < tile[COUNT] else tile[LENGTH]
    while i < tile[LENGTH]:
        address = tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP]
        x, y, odd = parts_of(address, masked, tile[COMPONENTS], like)
        largest = larger(larger(largest, abs(x)), abs(y))
        bad += odd
        i += lanes
    largest = lane_max(largest, place, apart, room)
    bad = lane_sum(bad, 0.0, place, apart, room)
    write_sums(tile, n, place, largest, 0.0, bad, out)


@kernel
def max_tile_magnitude(tiles, tensors, like, out):
    """Write each tile's largest real or imaginary parts. Reads every element once."""
    room = cuda.shared.array((2, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        masked = tensors[tiles[t, OWNER], ZEROING] != 0
        first = np.int64(0)
        while first < tiles[t, COUNT]:
            max_of_lines(tiles[t], first, masked, like, room, out)
            first += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x


@inline
def line_powers(tile, n, masked, peak, ord, like):
    """Return a thread's share of a line's sum of powers; of infinite order, the largest ratio."""
    _, lane, lanes = seat(tile)
    total, error = 0.0, 0.0
    i = lane
    while i < tile[LENGTH]:
        address = tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP]
        x, y, _ = parts_of(address, masked, tile[COMPONENTS], like)
        ratio = math.hypot(x / peak, y / peak) if tile[COMPONENTS] == 2 else abs(x / peak)
        if ord == math.inf:
            total = larger(total, ratio)
        else:
            total, rest = two_sum(total, power_term(ratio, ord))
            error += rest
        i += lanes
    return total, error


@inline
def powers_of_lines(tile, first, tensor, peaks, like, room, out):
    """Write the sums of powers of the lines that a block reads at a time."""
    neighbour, lane, _ = seat(tile)
    n, place, apart = first + neighbour, (lane << tile[BITS]) + neighbour, sums_apart(tile)
    total, error, ord = 0.0, 0.0, peaks[tensor[POOL], ORD]
    if n < tile[COUNT]:
        peak = usable(peaks[tensor[POOL] + tile[NUMBER] + n * tile[NUMBER_STEP], PEAK])
        total, error = line_powers(tile, n, tensor[ZEROING] != 0, peak, ord, like)
    if ord == math.inf:
        total = lane_max(total, place, apart, room)
    else:
        total = lane_sum(total, error, place, apart, room)
    if place < apart and n < tile[COUNT]:
        out[tile[PART] + n * tile[NUMBER_STEP], TOTAL] = total


@kernel
def sum_tile_powers(tiles, tensors, peaks, like, out):
    """Write each tile's sums of ``(|x| / peak) ** ord``, of infinite order the largest ratios."""
    room = cuda.shared.array((2, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        first = np.int64(0)
        while first < tiles[t, COUNT]:
            powers_of_lines(tiles[t], first, tensors[tiles[t, OWNER]], peaks, like, room, out)
            first += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x

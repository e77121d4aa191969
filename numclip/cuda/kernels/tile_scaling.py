"""What is written tile by tile, see `tiles`: elements times factors, or held between bounds.

Or sums of weighted examples: their lines go from example to example.
"""

import numpy as np

from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import lane_sum
from numclip.cuda.kernels.packets import as_computed, copy_element, load, rounded, size_of, store
from numclip.cuda.kernels.scalars import clamped, truncated_product
from numclip.cuda.kernels.tiles import parts_of, seat, sums_apart
from numclip.tables import (
    BITS,
    CLEAN,
    COMPONENTS,
    COUNT,
    FACTOR,
    HIGH,
    HIGH_STEP,
    HIGH_UNIT_STEP,
    LEAVE,
    LENGTH,
    LOW,
    LOW_STEP,
    LOW_UNIT_STEP,
    MANTISSA,
    MODE,
    MULTIPLY,
    NUMBER,
    NUMBER_STEP,
    OWNER,
    POOL,
    POWER,
    RARE,
    SKIPPED,
    SOURCE,
    STEP,
    TARGET,
    TARGET_STEP,
    TARGET_UNIT_STEP,
    UNIT_STEP,
)


@inline
def multiply_line(tile, n, factor, like):
    """Write a line times a factor, each product rounded once; four loads in flight."""
    _, lane, lanes = seat(tile)
    far, away = lanes * tile[STEP], lanes * tile[TARGET_STEP]
    k = 0
    while k < tile[COMPONENTS]:
        source = tile[SOURCE] + n * tile[UNIT_STEP] + lane * tile[STEP] + k * size_of(like)
        target = tile[TARGET] + n * tile[TARGET_UNIT_STEP] + lane * tile[TARGET_STEP]
        target += k * size_of(like)
        i = lane
        while i + 3 * lanes < tile[LENGTH]:
            a, b = load(source, like), load(source + far, like)
            c, d = load(source + 2 * far, like), load(source + 3 * far, like)
            store(target, a * factor, like)
            store(target + away, b * factor, like)
            store(target + 2 * away, c * factor, like)
            store(target + 3 * away, d * factor, like)
            source, target, i = source + 4 * far, target + 4 * away, i + 4 * lanes
        while i < tile[LENGTH]:
            store(target, load(source, like) * factor, like)
            source, target, i = source + far, target + away, i + lanes
        k += 1


@inline
def multiply_line_carefully(tile, n, decision, digits, lowest, like):
    """Write a line times its factor, subnormal results rounded toward zero; slow.

    In the mode CLEAN, an element that is not finite becomes 0.
    """
    _, lane, lanes = seat(tile)
    mantissa, power, cleans = decision[MANTISSA], int(decision[POWER]), decision[MODE] == CLEAN
    source = tile[SOURCE] + n * tile[UNIT_STEP]
    target = tile[TARGET] + n * tile[TARGET_UNIT_STEP]
    i = lane
    while i < tile[LENGTH]:
        x, y, _ = parts_of(source + i * tile[STEP], cleans, tile[COMPONENTS], like)
        place = target + i * tile[TARGET_STEP]
        x = truncated_product(x, mantissa, power, int(digits), int(lowest))
        store(place, x, like)
        if tile[COMPONENTS] == 2:
            y = truncated_product(y, mantissa, power, int(digits), int(lowest))
            store(place + size_of(like), y, like)
        i += lanes


@inline
def copy_line(tile, n, like):
    """Copy a line bit by bit."""
    _, lane, lanes = seat(tile)
    i = lane
    while i < tile[LENGTH]:
        source = tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP]
        target = tile[TARGET] + n * tile[TARGET_UNIT_STEP] + i * tile[TARGET_STEP]
        copy_element(source, target, like)
        if tile[COMPONENTS] == 2:
            copy_element(source + size_of(like), target + size_of(like), like)
        i += lanes


@kernel
def scale_tiles(tiles, tensors, decisions, least, digits, lowest, like):
    """Multiply each line by the factor of its unit or pool, where its mode is at least `least`.

    Reads and writes every element once. In place it leaves at once where there is nothing to
    do, and touches no line whose factor is 1; out of place such a line is copied.
    """
    idle = decisions[decisions.shape[0] - 1, MODE if least == MULTIPLY else RARE] == 0.0
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        tile = tiles[t]
        apart = tile[SOURCE] != tile[TARGET]
        if idle and not apart:
            return
        n, _, _ = seat(tile)
        while n < tile[COUNT]:
            row = tensors[tile[OWNER], POOL] + tile[NUMBER] + n * tile[NUMBER_STEP]
            if decisions[row, MODE] == MULTIPLY and least == MULTIPLY:
                multiply_line(tile, n, as_computed(decisions[row, FACTOR], like), like)
            elif decisions[row, MODE] > MULTIPLY:
                multiply_line_carefully(tile, n, decisions[row], digits, lowest, like)
            elif decisions[row, MODE] == LEAVE and apart:
                copy_line(tile, n, like)
            n += np.int64(1) << tile[BITS]
        t += cuda.gridDim.x


@inline
def clamp_line(tile, n, low, high, like):
    """Write a line held between two bounds."""
    _, lane, lanes = seat(tile)
    i = lane
    while i < tile[LENGTH]:
        source = tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP]
        target = tile[TARGET] + n * tile[TARGET_UNIT_STEP] + i * tile[TARGET_STEP]
        store(target, clamped(load(source, like), low, high), like)
        i += lanes


@kernel
def clamp_tiles(tiles, tensors, decisions, low, high, like):
    """Hold each element between two bounds, but what is skipped. Reads and writes it once."""
    low, high = rounded(low, like), rounded(high, like)
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        if decisions[tensors[tiles[t, OWNER], POOL], SKIPPED] == 0.0:
            n, _, _ = seat(tiles[t])
            while n < tiles[t, COUNT]:
                clamp_line(tiles[t], n, low, high, like)
                n += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x


@inline
def clamp_line_between(tile, n, like):
    """Write a line held between two bounds for each element."""
    _, lane, lanes = seat(tile)
    i = lane
    while i < tile[LENGTH]:
        value = load(tile[SOURCE] + n * tile[UNIT_STEP] + i * tile[STEP], like)
        low = load(tile[LOW] + n * tile[LOW_UNIT_STEP] + i * tile[LOW_STEP], like)
        high = load(tile[HIGH] + n * tile[HIGH_UNIT_STEP] + i * tile[HIGH_STEP], like)
        target = tile[TARGET] + n * tile[TARGET_UNIT_STEP] + i * tile[TARGET_STEP]
        store(target, clamped(value, low, high), like)
        i += lanes


@kernel
def clamp_tiles_between(tiles, like):
    """Hold each element between two of its own. Reads three arrays, writes one."""
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        n, _, _ = seat(tiles[t])
        while n < tiles[t, COUNT]:
            clamp_line_between(tiles[t], n, like)
            n += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x


@inline
def weighted_sum(place, step, length, lane, lanes, row, units, like):
    """Return a thread's share of a sum over examples times their factors; two loads in flight."""
    total = 0.0
    i = lane
    while i + lanes < length:
        x, y = load(place + i * step, like), load(place + (i + lanes) * step, like)
        total += np.float64(x) * units[row + i, FACTOR]
        total += np.float64(y) * units[row + i + lanes, FACTOR]
        i += 2 * lanes
    if i < length:
        total += np.float64(load(place + i * step, like)) * units[row + i, FACTOR]
    return total


@inline
def sum_lines(tile, first, row, units, like, room):
    """Write the sums of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, place, apart = first + neighbour, (lane << tile[BITS]) + neighbour, sums_apart(tile)
    k = 0
    while k < tile[COMPONENTS]:
        total = 0.0
        if n < tile[COUNT]:
            source = tile[SOURCE] + n * tile[UNIT_STEP] + k * size_of(like)
            total = weighted_sum(source, tile[STEP], tile[LENGTH], lane, lanes, row, units, like)
        total = lane_sum(total, 0.0, place, apart, room)
        if place < apart and n < tile[COUNT]:
            store(tile[TARGET] + n * tile[TARGET_UNIT_STEP] + k * size_of(like), total, like)
        k += 1


@kernel
def sum_examples(tiles, tensors, units, like):
    """Write the sums over examples, each times its factor, added in float64. One read."""
    room = cuda.shared.array((2, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        first, row = np.int64(0), tensors[tiles[t, OWNER], POOL]
        while first < tiles[t, COUNT]:
            sum_lines(tiles[t], first, row, units, like, room)
            first += np.int64(1) << tiles[t, BITS]
        t += cuda.gridDim.x

"""Kernels that write tile by tile, see `tiles`: elements times factors, or clamped.

Or the sums of weighted examples, whose lines go from example to example.
"""

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.blocks import lane_sum
from numclip.cuda.kernels.packets import (
    PACKET,
    as_computed,
    copy_at,
    each,
    load,
    load_apart,
    rounded,
    size_of,
    store,
    store_apart,
)
from numclip.cuda.kernels.scalars import clamped, truncated_product
from numclip.cuda.kernels.scaling import copy, multiply, multiply_carefully, product
from numclip.cuda.kernels.tiles import in_packets, over_lines, seat, sums_apart
from numclip.dtypes import FLOAT64

TINY, DIGITS, LOWEST = FLOAT64.tiny, *FLOAT64.precision


@inline
def line_of(tile, n):
    """Return (source, target, step, target step, elements, components) of line `n`."""
    source = tile[col.SOURCE] + n * tile[col.UNIT_STEP]
    target = tile[col.TARGET] + n * tile[col.TARGET_UNIT_STEP]
    steps = tile[col.STEP], tile[col.TARGET_STEP]
    return source, target, steps[0], steps[1], tile[col.LENGTH], tile[col.COMPONENTS]


@inline
def are_packed(tile, like):
    """Tell whether lines can be read and written in packets."""
    steps = tile[col.UNIT_STEP] | tile[col.TARGET_UNIT_STEP]
    addresses = tile[col.SOURCE] | tile[col.TARGET] | steps
    alike = tile[col.STEP] == tile[col.TARGET_STEP]
    return alike and in_packets(tile, addresses, tile[col.COMPONENTS], like)


@inline
def multiply_line(tile, n, factor, lane, lanes, like):
    """Write a line times a factor, each product rounded once; eight loads in flight, or so."""
    line, line_target, step, target_step, length, components = line_of(tile, n)
    if are_packed(tile, like):
        multiply(line, line_target, components * length, factor, lane, lanes, like)
        return
    far, away, k = lanes * step, lanes * target_step, 0
    while k < components:
        source = line + lane * step + k * size_of(like)
        target = line_target + lane * target_step + k * size_of(like)
        i = lane
        while i + (PACKET - 1) * lanes < length:
            x = load_apart(source, far, like)
            store_apart(target, away, each(product, (x,), (factor,)), like)
            source, target = source + PACKET * far, target + PACKET * away
            i += PACKET * lanes
        while i < length:
            store(target, load(source, like) * factor, like)
            source, target, i = source + far, target + away, i + lanes
        k += 1


@inline
def copy_line(tile, n, lane, lanes, like):
    """Copy a line bit by bit."""
    source, target, step, target_step, length, components = line_of(tile, n)
    if are_packed(tile, like):
        copy(source, target, components * length, lane, lanes, like)
        return
    i, first = lane, np.int64(0)
    while i < length:
        address, other = source + i * step, target + i * target_step
        copy_at((first,), address, other, like)
        if components == 2:
            copy_at((first + 1,), address, other, like)
        i += lanes


@kernel
def scale_tiles(tiles, tensors, decisions, least, digits, lowest, like):
    """Multiply each line by the factor of its unit or pool, where its mode is at least `least`.

    Reads and writes every element once. In place the kernel returns at once if there is no work,
    and touches no line whose factor is 1; out of place such a line is copied.
    """
    idle = decisions[decisions.shape[0] - 1, col.MODE if least == col.MULTIPLY else col.RARE] == 0.0
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        tile = tiles[t]
        apart = tile[col.SOURCE] != tile[col.TARGET]
        if idle and not apart:
            return
        n, lane, lanes = seat(tile)
        while n < tile[col.COUNT]:
            row = tensors[tile[col.OWNER], col.POOL] + tile[col.NUMBER] + n * tile[col.NUMBER_STEP]
            decision, line = decisions[row], line_of(tile, n)
            if decision[col.MODE] == col.MULTIPLY and least == col.MULTIPLY:
                factor = as_computed(decision[col.FACTOR], like)
                multiply_line(tile, n, factor, lane, lanes, like)
            elif decision[col.MODE] > col.MULTIPLY:
                multiply_carefully(line, decision, (digits, lowest), lane, lanes, like)
            elif decision[col.MODE] == col.LEAVE and apart:
                copy_line(tile, n, lane, lanes, like)
            n += np.int64(1) << tile[col.BITS]
        t += cuda.gridDim.x


@inline
def clamp_line(tile, n, low, high, like):
    """Write line `n` clamped between two bounds."""
    _, lane, lanes = seat(tile)
    i = lane
    while i < tile[col.LENGTH]:
        source = tile[col.SOURCE] + n * tile[col.UNIT_STEP] + i * tile[col.STEP]
        target = tile[col.TARGET] + n * tile[col.TARGET_UNIT_STEP] + i * tile[col.TARGET_STEP]
        store(target, clamped(load(source, like), low, high), like)
        i += lanes


@kernel
def clamp_tiles(tiles, tensors, decisions, low, high, like):
    """Clamp each element between two bounds, except in skipped pools. Reads and writes it once."""
    bounds = rounded(low, like), rounded(high, like)
    over_lines(clamp_lines, tiles, tensors, (decisions, *bounds, like))


@inline
def clamp_lines(tile, first, tensor, decisions, low, high, like):
    """Clamp the lines that a block reads at a time between two bounds, unless skipped."""
    neighbour, _, _ = seat(tile)
    n = first + neighbour
    if n < tile[col.COUNT] and decisions[tensor[col.POOL], col.SKIPPED] == 0.0:
        clamp_line(tile, n, low, high, like)


@inline
def clamp_line_between(tile, n, like):
    """Write line `n` with each element clamped between its own two bounds."""
    _, lane, lanes = seat(tile)
    i = lane
    while i < tile[col.LENGTH]:
        value = load(tile[col.SOURCE] + n * tile[col.UNIT_STEP] + i * tile[col.STEP], like)
        low = load(tile[col.LOW] + n * tile[col.LOW_UNIT_STEP] + i * tile[col.LOW_STEP], like)
        high = load(tile[col.HIGH] + n * tile[col.HIGH_UNIT_STEP] + i * tile[col.HIGH_STEP], like)
        target = tile[col.TARGET] + n * tile[col.TARGET_UNIT_STEP] + i * tile[col.TARGET_STEP]
        store(target, clamped(value, low, high), like)
        i += lanes


@kernel
def clamp_tiles_between(tiles, like):
    """Clamp each element between its own two bounds. Reads three arrays, writes one."""
    t = np.int64(cuda.blockIdx.x)
    while t < tiles.shape[0]:
        n, _, _ = seat(tiles[t])
        while n < tiles[t, col.COUNT]:
            clamp_line_between(tiles[t], n, like)
            n += np.int64(1) << tiles[t, col.BITS]
        t += cuda.gridDim.x


@inline
def weighted(x, decision):
    """Return an element times its factor, in float64, which holds factors under TINY inexactly."""
    value, factor = np.float64(x), decision[col.FACTOR]
    if factor < TINY:
        mantissa, power = decision[col.MANTISSA], int(decision[col.POWER])
        return truncated_product(value, mantissa, power, DIGITS, LOWEST)
    return value * factor


@inline
def weighted_sum(tile, address, lane, lanes, row, units, like):
    """Return a thread's share of a sum over examples times their factors; two loads in flight."""
    step, length = tile[col.STEP], tile[col.LENGTH]
    total, i = 0.0, lane
    while i + lanes < length:
        x, y = load(address + i * step, like), load(address + (i + lanes) * step, like)
        total += weighted(x, units[row + i])
        total += weighted(y, units[row + i + lanes])
        i += 2 * lanes
    if i < length:
        total += weighted(load(address + i * step, like), units[row + i])
    return total


@inline
def sum_lines(tile, first, tensor, units, like, scratch):
    """Write the sums of the lines that a block reads at a time."""
    neighbour, lane, lanes = seat(tile)
    n, thread, apart = first + neighbour, (lane << tile[col.BITS]) + neighbour, sums_apart(tile)
    k = 0
    while k < tile[col.COMPONENTS]:
        total = 0.0
        if n < tile[col.COUNT]:
            source = tile[col.SOURCE] + n * tile[col.UNIT_STEP] + k * size_of(like)
            total = weighted_sum(tile, source, lane, lanes, tensor[col.POOL], units, like)
        total = lane_sum(total, 0.0, thread, apart, scratch)
        if thread < apart and n < tile[col.COUNT]:
            target = tile[col.TARGET] + n * tile[col.TARGET_UNIT_STEP] + k * size_of(like)
            store(target, rounded(total, like), like)
        k += 1


@kernel
def sum_examples(tiles, tensors, units, like):
    """Write the sums over examples, each times its factor, added in float64. One read."""
    scratch = cuda.shared.array((2, THREADS), np.float64)
    over_lines(sum_lines, tiles, tensors, (units, like, scratch))

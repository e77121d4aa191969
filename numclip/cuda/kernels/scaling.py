"""Kernels that write chunks: times the decided factor, copied, clamped, or added."""

import numpy as np

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.norms import parts_of
from numclip.cuda.kernels.packets import (
    as_computed,
    copy_at,
    each,
    load_at,
    over_chunks,
    over_more_packets,
    over_packets,
    rounded,
    size_of,
    store,
    store_at,
)
from numclip.cuda.kernels.scalars import clamped, truncated_product


@inline
def product(value, factor):
    """Return an element times a factor."""
    return value * factor


@inline
def multiply_at(spots, source, target, factor, like):
    """Write the elements at some spots times a factor, each product rounded once."""
    store_at(target, spots, each(product, (load_at(source, spots, like),), (factor,)), like)


@inline
def multiply(source, target, length, factor, lane, lanes, like):
    """Write a lane's share of contiguous memory times a factor."""
    arguments = source, target, factor, like
    over_more_packets(multiply_at, arguments, source | target, length, lane, lanes, like)


@inline
def copy(source, target, length, lane, lanes, like):
    """Copy a lane's share of contiguous memory bit by bit."""
    arguments = source, target, like
    over_more_packets(copy_at, arguments, source | target, length, lane, lanes, like)


@inline
def multiply_carefully(line, decision, precision, lane, lanes, like):
    """Write a lane's share of a line times its factor, subnormal results truncated; slow.

    `line` is (source, target, source step, target step, number of elements, components). In the
    mode CLEAN, an element that is not finite becomes 0.
    """
    source, target, step, target_step, length, components = line
    mantissa, power = decision[col.MANTISSA], int(decision[col.POWER])
    digits, lowest = int(precision[0]), int(precision[1])
    cleans, i = decision[col.MODE] == col.CLEAN, lane
    while i < length:
        x, y, _ = parts_of(source + i * step, cleans, components, like)
        address = target + i * target_step
        store(address, truncated_product(x, mantissa, power, digits, lowest), like)
        if components == 2:
            y = truncated_product(y, mantissa, power, digits, lowest)
            store(address + size_of(like), y, like)
        i += lanes


@kernel
def scale(chunks, tensors, decisions, least, digits, lowest, like):
    """Multiply each chunk by the factor of its pool, where its mode is at least `least`.

    Reads and writes every element once. In place the kernel returns at once if no pool has work,
    and touches no chunk of a pool without work; out of place such a chunk is copied.
    """
    whole = least == col.MULTIPLY
    idle = decisions[decisions.shape[0] - 1, col.MODE if whole else col.RARE] == 0.0
    c, i = np.int64(cuda.blockIdx.x), np.int64(cuda.threadIdx.x)
    while c < chunks.shape[0]:
        chunk, decision = chunks[c], decisions[tensors[chunks[c, col.OWNER], col.POOL]]
        source, target, length = chunk[col.SOURCE], chunk[col.TARGET], chunk[col.LENGTH]
        copies = whole and source != target
        if idle and not copies:
            return
        if decision[col.MODE] == col.MULTIPLY and whole:
            factor = as_computed(decision[col.FACTOR], like)
            multiply(source, target, length, factor, i, THREADS, like)
        elif decision[col.MODE] > col.MULTIPLY:
            line = source, target, size_of(like), size_of(like), length, 1
            multiply_carefully(line, decision, (digits, lowest), i, THREADS, like)
        elif decision[col.MODE] == col.LEAVE and copies:
            copy(source, target, length, i, THREADS, like)
        c += cuda.gridDim.x


@kernel
def copy_chunks(chunks, like):
    """Copy each chunk bit by bit. One read, one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        source, target, length = chunks[c, col.SOURCE], chunks[c, col.TARGET], chunks[c, col.LENGTH]
        copy(source, target, length, np.int64(cuda.threadIdx.x), THREADS, like)
        c += cuda.gridDim.x


@kernel
def clamp(chunks, tensors, decisions, low, high, like):
    """Clamp each element between two bounds, except in skipped pools. Reads and writes it once.

    Sets CLAMPED in the decision for a pool if one of its elements was beyond them.
    """
    low, high = rounded(low, like), rounded(high, like)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        pool = tensors[chunks[c, col.OWNER], col.POOL]
        source, target = chunks[c, col.SOURCE], chunks[c, col.TARGET]
        if decisions[pool, col.SKIPPED] == 0.0:
            arguments = source, target, low, high, decisions[pool], like
            over_packets(clamp_at, arguments, source | target, chunks[c, col.LENGTH], like)
        c += cuda.gridDim.x


@inline
def clamp_at(spots, source, target, low, high, decision, like):
    """Clamp the elements at some spots; set CLAMPED if one was beyond, once a block or so."""
    x = load_at(source, spots, like)
    store_at(target, spots, each(clamped, (x,), (low, high)), like)
    if any_beyond(x, low, high) and decision[col.CLAMPED] == 0.0:
        decision[col.CLAMPED] = 1.0


@inline
def any_beyond(x, low, high):
    """Tell whether one of some elements is beyond two bounds."""
    found = False
    for k in range(len(x)):
        found |= x[k] > high or x[k] < low
    return found


@inline
def added(value, other):
    """Return the sum of two elements."""
    return value + other


@inline
def add_at(spots, source, target, like, to):
    """Add the source's elements at some spots to the target's."""
    x, y = load_at(source, spots, like), load_at(target, spots, to)
    store_at(target, spots, each(added, (x, y), ()), to)


@kernel
def add_chunks(chunks, like, to):
    """Add the source of each chunk to its target, which is stored in the type of `to`.

    That is the type of the source, or float32 for 16 bits. Two reads, one write.
    """
    over_chunks(add_at, (like, to), chunks, like)


@kernel
def add(source, target, length, skew, limit, like):
    """Add `length` source elements to the target's. Two reads, one write; no table.

    Blocks take pieces of `limit` elements, the first piece shorter by `skew`.
    """
    c = np.int64(cuda.blockIdx.x)
    while c * limit < length + skew:
        first, last = max(c * limit - skew, 0), min((c + 1) * limit - skew, length)
        address = first * size_of(like)
        arguments = source + address, target + address, like, like
        over_packets(add_at, arguments, arguments[0] | arguments[1], last - first, like)
        c += cuda.gridDim.x

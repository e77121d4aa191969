"""What is written: elements times the factor decided, held between bounds, or added."""

import math

import numpy as np

from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.packets import (
    PACKET,
    WORD,
    as_computed,
    copy_element,
    copy_elements,
    copy_packet,
    copy_packets,
    each,
    load,
    load_packet,
    rounded,
    size_of,
    store,
    store_packet,
    whole_packets,
)
from numclip.cuda.kernels.scalars import clamped, truncated_product
from numclip.tables import (
    CLAMPED,
    CLEAN,
    FACTOR,
    LEAVE,
    LENGTH,
    MANTISSA,
    MODE,
    MULTIPLY,
    OWNER,
    POOL,
    POWER,
    RARE,
    SKIPPED,
    SOURCE,
    TARGET,
)


@inline
def product(value, factor):
    """Return an element times a factor."""
    return value * factor


@inline
def multiply(source, target, length, factor, like):
    """Write a chunk times a factor, each product rounded once; two packets a turn."""
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        q = p + THREADS
        x = load_packet(source + p * WORD, stride, like)
        y = load_packet(source + q * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(product, (x,), (factor,)), like)
        store_packet(target + q * WORD, stride, each(product, (y,), (factor,)), like)
        p += 2 * THREADS
    if p < packets:
        x = load_packet(source + p * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(product, (x,), (factor,)), like)
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        place = i * size_of(like)
        store(target + place, load(source + place, like) * factor, like)
        i += THREADS


@inline
def multiply_carefully(chunk, decision, digits, lowest, like):
    """Write a chunk times its factor, subnormal results rounded toward zero; slow.

    In the mode CLEAN, what is not finite becomes 0.
    """
    cleans = decision[MODE] == CLEAN
    mantissa, power = decision[MANTISSA], int(decision[POWER])
    i = np.int64(cuda.threadIdx.x)
    while i < chunk[LENGTH]:
        place = i * size_of(like)
        value = np.float64(load(chunk[SOURCE] + place, like))
        if cleans and not math.isfinite(value):
            value = 0.0
        result = truncated_product(value, mantissa, power, int(digits), int(lowest))
        store(chunk[TARGET] + place, result, like)
        i += THREADS


@inline
def copy(source, target, length, like):
    """Copy a chunk bit by bit; two packets a turn, or four elements."""
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        copy_packets(source + p * WORD, target + p * WORD, THREADS * WORD, stride, like)
        p += 2 * THREADS
    if p < packets:
        copy_packet(source + p * WORD, target + p * WORD, stride, like)
    i = packets * PACKET + cuda.threadIdx.x
    while i + 3 * THREADS < length:
        place = i * size_of(like)
        copy_elements(source + place, target + place, THREADS * size_of(like), like)
        i += 4 * THREADS
    while i < length:
        place = i * size_of(like)
        copy_element(source + place, target + place, like)
        i += THREADS


@kernel
def scale(chunks, tensors, decisions, digits, lowest, like):
    """Multiply each chunk by the factor of its pool. Reads and writes every element once.

    In place it leaves at once where no pool has anything to do, and touches no chunk of a pool
    that has nothing to do; out of place such a chunk is copied.
    """
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        chunk = chunks[c]
        decision = decisions[tensors[chunk[OWNER], POOL]]
        if decision[MODE] == MULTIPLY:
            factor = as_computed(decision[FACTOR], like)
            multiply(chunk[SOURCE], chunk[TARGET], chunk[LENGTH], factor, like)
        elif decision[MODE] != LEAVE:
            multiply_carefully(chunk, decision, digits, lowest, like)
        elif chunk[SOURCE] != chunk[TARGET]:
            copy(chunk[SOURCE], chunk[TARGET], chunk[LENGTH], like)
        elif decisions[decisions.shape[0] - 1, MODE] == 0.0:
            return
        c += cuda.gridDim.x


@kernel
def copy_chunks(chunks, like):
    """Copy each chunk bit by bit. One read, one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        copy(chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH], like)
        c += cuda.gridDim.x


@kernel
def scale_rare(chunks, tensors, decisions, digits, lowest, like):
    """Multiply, in place, the chunks of pools whose factor is no plain one, as `scale` does."""
    if decisions[decisions.shape[0] - 1, RARE] == 0.0:
        return
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        decision = decisions[tensors[chunks[c, OWNER], POOL]]
        if decision[MODE] > MULTIPLY:
            multiply_carefully(chunks[c], decision, digits, lowest, like)
        c += cuda.gridDim.x


@kernel
def clamp(chunks, tensors, decisions, low, high, like):
    """Hold each element between two bounds, but what is skipped. Reads and writes it once.

    Tells in the decision for a pool whether one of its elements was beyond them.
    """
    low, high = rounded(low, like), rounded(high, like)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        pool = tensors[chunks[c, OWNER], POOL]
        if decisions[pool, SKIPPED] == 0.0 and clamp_chunk(chunks[c], low, high, like):
            decisions[pool, CLAMPED] = 1.0
        c += cuda.gridDim.x


@inline
def clamp_chunk(chunk, low, high, like):
    """Hold a chunk between two bounds; tell whether an element of this thread was beyond them."""
    source, target, length = chunk[SOURCE], chunk[TARGET], chunk[LENGTH]
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    beyond = False
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(source + p * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(clamped, (x,), (low, high)), like)
        beyond |= any_beyond(x, low, high)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        value = load(source + i * size_of(like), like)
        store(target + i * size_of(like), clamped(value, low, high), like)
        beyond |= value > high or value < low
        i += THREADS
    return beyond


@inline
def any_beyond(x, low, high):
    """Tell whether an element of a packet is beyond two bounds."""
    found = False
    for k in range(len(x)):
        found |= x[k] > high or x[k] < low
    return found


@inline
def added(value, other):
    """Return the sum of two elements."""
    return value + other


@inline
def add_piece(source, target, length, like):
    """Add what is read to what is written to."""
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(source + p * WORD, stride, like)
        y = load_packet(target + p * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(added, (x, y), ()), like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        place = i * size_of(like)
        total = added(load(source + place, like), load(target + place, like))
        store(target + place, total, like)
        i += THREADS


@kernel
def add_chunks(chunks, like):
    """Add what is read of each chunk to what is written to. Two reads, one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        add_piece(chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH], like)
        c += cuda.gridDim.x


@kernel
def add(source, target, length, skew, limit, like):
    """Add `length` elements read to those written to. Two reads, one write.

    They are taken in pieces of `limit`, the first of them shorter by `skew`.
    """
    c = np.int64(cuda.blockIdx.x)
    while c * limit < length + skew:
        first, last = max(c * limit - skew, 0), min((c + 1) * limit - skew, length)
        place = first * size_of(like)
        add_piece(source + place, target + place, last - first, like)
        c += cuda.gridDim.x

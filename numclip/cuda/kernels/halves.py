"""Float32 numbers and their 16-bit copies, and 16-bit gradients of float32 ones.

Of each chunk, the source is where elements of 16 bits are, the target where those of float32 are.
"""

import numpy as np

from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.packets import (
    PACKET,
    WORD,
    differ,
    each,
    load,
    load_packet,
    nearest,
    store,
    store_packet,
    whole_packets,
)
from numclip.cuda.kernels.scaling import added
from numclip.tables import LENGTH, SOURCE, TARGET

WIDE = np.float32(0.0)


@kernel
def round_chunks(chunks, like):
    """Write the nearest copies. One read, one write of half the size."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        round_chunk(chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH], like)
        c += cuda.gridDim.x


@inline
def round_chunk(copies, numbers, length, like):
    """Write the copies of a chunk."""
    packets = whole_packets(copies | numbers, length)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(numbers + 2 * p * WORD, np.int64(WORD), WIDE)
        store_packet(copies + p * WORD, np.int64(0), each(nearest, (x,), (like,)), like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        store(copies + 2 * i, nearest(load(numbers + 4 * i, WIDE), like), like)
        i += THREADS


@kernel
def take_over_chunks(chunks, like):
    """Let numbers be those of the copies that are none of theirs. Two reads, rarely a write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        take_over_chunk(chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH], like)
        c += cuda.gridDim.x


@inline
def take_over_chunk(copies, numbers, length, like):
    """Do so for a chunk."""
    packets = whole_packets(copies | numbers, length)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        own = load_packet(copies + p * WORD, np.int64(0), like)
        x = load_packet(numbers + 2 * p * WORD, np.int64(WORD), WIDE)
        if any_differs(x, own, like):
            x = each(taken, (x, own), (like,))
            store_packet(numbers + 2 * p * WORD, np.int64(WORD), x, WIDE)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        own = load(copies + 2 * i, like)
        if differ(load(numbers + 4 * i, WIDE), own, like):
            store(numbers + 4 * i, own, WIDE)
        i += THREADS


@inline
def any_differs(x, copies, like):
    """Tell whether a copy of a packet is none of its number."""
    found = False
    for k in range(len(x)):
        found |= differ(x[k], copies[k], like)
    return found


@inline
def taken(number, copy, like):
    """Return the number, or the copy if it is none of it."""
    return copy if differ(number, copy, like) else number


@kernel
def widen_chunks(chunks, adds, like):
    """Copy each chunk, or add it. One read of half the size, or two, and one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        widen_chunk(chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH], adds, like)
        c += cuda.gridDim.x


@inline
def widen_chunk(source, target, length, adds, like):
    """Copy a chunk, or add it."""
    packets = whole_packets(source | target, length)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(source + p * WORD, np.int64(0), like)
        place = target + 2 * p * WORD
        if adds:
            x = each(added, (x, load_packet(place, np.int64(WORD), WIDE)), ())
        store_packet(place, np.int64(WORD), x, WIDE)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        value = load(source + 2 * i, like)
        place = target + 4 * i
        store(place, added(value, load(place, WIDE)) if adds else value, WIDE)
        i += THREADS

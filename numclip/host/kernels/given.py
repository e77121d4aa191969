"""Gradients that a user passes for parameters: read in place, copied in, or applied.

A tuple is read as in `arrays`, but each array must fit its parameter: have its dtype and shape, C
order, and memory apart from what is to be written. Every array is checked before anything is
written; if one does not fit, kernels return False and write nothing.

`wanted` is one array of words: a head, a row for each array, the shapes, and the extents of memory
that is taken, as the first addresses in ascending order followed by the ends.
"""

import numpy as np

from numclip.host.kernels import updates
from numclip.host.kernels.arrays import (
    ALIGNED,
    C_ORDER,
    DATA,
    DESCR,
    FLAGS,
    NDIM,
    SHAPE,
    WORD,
    are_equal,
)
from numclip.host.kernels.cpu import LENGTH, OWNER, SOURCE, TARGET
from numclip.host.kernels.elements import array_at, narrow, table_at, widen, word_at, zeros
from numclip.host.kernels.pools import decide_squares, hold_chunk, scale_decided
from numclip.host.kernels.pools import measure as measure_chunks
from numclip.host.kernels.updates import GRAD
from numclip.host.runtime.jit import inline, kernel, kernel_with_gil
from numclip.tables import (
    AIM,
    BOUND,
    BROKEN,
    DIGITS,
    FACTOR,
    FINE,
    FIRST,
    LAST,
    LEAVE,
    MODE,
    POLICY,
    RAISE,
    RARE,
    SET,
    UNSCALE,
    ZERO,
)

HEADER, NDARRAY, NONE, KEPT, EXTENTS, EXTENT_COUNT, NEEDS, HEAD = range(8)
# Columns of an array's row. FIRST_AXIS is the index of its shape in `wanted`. If FREE is 1, the
# first axis may have any length, and NBYTES are those of each row.
DTYPE, AXES, FIRST_AXIS, NBYTES, FREE, ROW = range(6)
# Instead of an array's address: None, an array that stays as it is, one that does not fit.
ABSENT, STAYS, ELSEWHERE = 0, -1, -2
C_ARRAY = C_ORDER | ALIGNED
# The tables of a step, each given by three words: address, rows, columns.
WANTED, ADDRESSES, DISTANCES, LENGTHS, CHUNKS, PIECES, POOLS, LAWS = range(8)
SUMS, DECISIONS, POOL_OF, COUNTS, GIVEN, SETTINGS = range(8, 14)
# Where gradients are sparse, see `given_rows`.
ROWS, LOCATIONS, LOSSES, SIZES, TABLES = range(15, 20)
FACTORS = TABLES  # a key of the host alone: kernels take factors as an array
# Instead of a tuple's pointers: arrays are the plan's, or sums are those of the call before.
OWN, AGAIN = 0, -1


@inline
def is_taken(begin, end, wanted):
    """Tell whether the bytes from `begin` to `end` overlap an extent that is taken."""
    first, count = wanted[EXTENTS], wanted[EXTENT_COUNT]
    low, high = np.int64(0), count  # the first extent that begins at `end` or later
    while low < high:
        middle = (low + high) // 2
        if wanted[first + middle] < end:
            low = middle + 1
        else:
            high = middle
    return low > 0 and begin < end and wanted[first + count + low - 1] > begin


@inline
def address_of(item, row, wanted):
    """Return an array's address, ABSENT, STAYS or ELSEWHERE; its row begins at ``wanted[row]``."""
    if item == wanted[NONE]:
        return np.int64(ABSENT)
    if item == wanted[KEPT]:
        return np.int64(STAYS)
    fields = item + wanted[HEADER]
    if word_at(fields - WORD) != wanted[NDARRAY]:
        return np.int64(ELSEWHERE)
    axes, needs = wanted[row + AXES], wanted[NEEDS]
    fits = word_at(fields + FLAGS) & needs == needs and word_at(fields + NDIM) & 0xFFFF_FFFF == axes
    dtype, like = word_at(fields + DESCR), wanted[row + DTYPE]
    fits &= dtype == like or are_equal(dtype + wanted[HEADER], like + wanted[HEADER])
    if not fits:
        return np.int64(ELSEWHERE)
    shape, own = word_at(fields + SHAPE), wanted[row + FIRST_AXIS]
    free = wanted[row + FREE]
    for k in range(free, axes):
        if word_at(shape + k * WORD) != wanted[own + k]:
            return np.int64(ELSEWHERE)
    nbytes = wanted[row + NBYTES] * (word_at(shape) if free else 1)
    address = word_at(fields + DATA)
    if (free and address == ABSENT) or is_taken(address, address + nbytes, wanted):
        return np.int64(ELSEWHERE)
    return address


@kernel_with_gil
def find(items, wanted, addresses):
    """Write the addresses of a tuple's arrays (pointers at `items`); return whether all fit."""
    for t in range(addresses.size):
        address = address_of(word_at(items + t * WORD), HEAD + t * ROW, wanted)
        addresses[t] = address
        if address == ELSEWHERE:
            return False
    return True


@kernel_with_gil
def read_pairs(items, wanted, arrays, known, addresses, chunks, distances):
    """Write the addresses of the gradients of pairs to the updates; return whether all fit.

    `items` points to the gradients, then to the arrays they update. `wanted` describes the
    gradients, `arrays` the others in the same form; `known` are the addresses these must have.
    """
    count = known.size
    for t in range(count):
        row = HEAD + t * ROW
        own = address_of(word_at(items + (count + t) * WORD), row, arrays)
        addresses[t] = address_of(word_at(items + t * WORD), row, wanted)
        if own != known[t] or addresses[t] in (ABSENT, STAYS, ELSEWHERE):
            return False
    for c in range(distances.size):
        chunks[c, GRAD] = addresses[chunks[c, updates.OWNER]] + distances[c]
    return True


@inline
def length_at(items, t, wanted):
    """Return the length of the first axis of array `t` of a tuple."""
    return word_at(word_at(word_at(items + t * WORD) + wanted[HEADER] + SHAPE))


@inline
def copy(source, target):
    """Copy an array to one of its dtype, or a 16-bit array to one of float32."""
    if source.itemsize == target.itemsize:
        for i in range(source.size):
            target[i] = source[i]
    else:
        for i in range(source.size):
            target[i] = widen(source[i])


@inline
def add(source, target):
    """Add an array to `target`, rounded as by NumPy."""
    for i in range(source.size):
        target[i] = narrow(widen(target[i]) + widen(source[i]), target[i])


@inline
def clear(target):
    """Set an array to zeros."""
    for i in range(target.size):
        target[i] = 0


@kernel
def take_found(begin, end, chunks, adds, like, wide, addresses):
    """Copy arrays at `addresses` to the targets of chunks, or add them, as `take` does."""
    for c in range(begin, end):
        address = addresses[chunks[c, OWNER]]
        if address == STAYS:
            continue
        target = array_at(chunks[c, TARGET], chunks[c, LENGTH], wide)
        if address == ABSENT:
            if not adds:
                clear(target)
            continue
        source = array_at(address + chunks[c, SOURCE], chunks[c, LENGTH], like)
        if adds:
            add(source, target)
        else:
            copy(source, target)


@kernel_with_gil
def take(items, wanted, chunks, adds, like, wide, addresses):
    """Copy arrays to the targets of chunks, or add them; return whether all fit.

    The source of a chunk is its distance from its array's beginning. An array that is absent
    counts as zeros.
    """
    if not find(items, wanted, addresses):
        return False
    take_found(0, chunks.shape[0], chunks, adds, like, wide, addresses)
    return True


@inline
def found(tables, k, like):
    """Return table `k` as a 2-d array with the dtype of `like`."""
    return table_at(tables[k, 0], tables[k, 1], tables[k, 2], like)


@inline
def found_row(tables, k, like):
    """Return table `k`, of one row, as a 1-d array with the dtype of `like`."""
    return array_at(tables[k, 0], tables[k, 2], like)


@inline
def found_slot(tables, k, slot, like):
    """Return item `slot` of table `k`, a stack of tables that follow one another in memory."""
    rows, columns = tables[k, 1], tables[k, 2]
    return table_at(tables[k, 0] + slot * rows * columns * WORD, rows, columns, like)


@inline
def locate(items, tables):
    """Write addresses (length 0 if absent) to chunks and updates; return whether all fit."""
    addresses, chunks = found_row(tables, ADDRESSES, tables), found(tables, CHUNKS, tables)
    if items != OWN and not find(items, found_row(tables, WANTED, tables), addresses):
        return False
    distances = found_row(tables, DISTANCES, tables)
    lengths = found_row(tables, LENGTHS, tables)
    pieces = found(tables, PIECES, tables)
    for c in range(distances.size):
        address = addresses[chunks[c, OWNER]]
        length = lengths[c] if address != ABSENT else 0
        chunks[c, LENGTH] = pieces[c, updates.LENGTH] = length
        chunks[c, SOURCE] = pieces[c, GRAD] = address + distances[c]
    return True


@inline
def uncount(tables, counts, factors):
    """Take back the step counted for pools of a SET in which all gradients are absent."""
    addresses, pools = found_row(tables, ADDRESSES, tables), found(tables, POOLS, tables)
    present = zeros(pools.shape[0], pools)
    for p in range(pools.shape[0]):
        for t in range(pools[p, FIRST], pools[p, LAST]):
            present[pools[p, SET]] |= addresses[t] != ABSENT
    for p in range(pools.shape[0]):
        if present[pools[p, SET]] == 0 and factors[p] != updates.LEFT:
            counts[p] -= 1


@inline
def obey(tables, unscale, bounds):
    """Write bounds and loss scale to the laws of pools without repeated rows; return the laws."""
    laws = found(tables, LAWS, bounds)
    for p in range(bounds.size):
        laws[p, BOUND] = laws[p, AIM] = bounds[p]
        laws[p, UNSCALE] = unscale
    return laws


@inline
def needs_care(pools, decisions, safe):
    """Tell whether the general path must sum again, truncate, clean or raise an error."""
    care = decisions[pools.shape[0], RARE] != 0.0
    for p in range(pools.shape[0]):
        policy = pools[p, POLICY]
        care |= not safe and pools[p, DIGITS] == 53
        care |= decisions[p, BROKEN] != 0.0 and policy in (RAISE, ZERO)
    return care


@kernel
def decide(measures, slot, unscale, tables, bounds, like):
    """Measure chunks if `measures`, and decide; return False if the general path is needed."""
    laws, pools = obey(tables, unscale, bounds), found(tables, POOLS, tables)
    sums = found_slot(tables, SUMS, slot, bounds)
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    safe = True
    if measures:
        chunks = found(tables, CHUNKS, tables)
        safe = measure_chunks(chunks, like, sums)
    right = decide_squares(pools, laws, sums, decisions)
    return right and not needs_care(pools, decisions, safe)


@inline
def column_of(like):
    """Return the column of decisions with the factors for elements of the dtype of `like`."""
    return FINE if like.itemsize == 8 else FACTOR


@inline
def scale(decisions, tables, like):
    """Multiply arrays in place by their factors, unless all decisions are to leave them."""
    if decisions[decisions.shape[0] - 1, MODE] != LEAVE:
        chunks, pool_of = found(tables, CHUNKS, tables), found_row(tables, POOL_OF, tables)
        scale_decided(chunks, pool_of, decisions, column_of(like), like)


@kernel
def clip(measures, slot, unscale, tables, bounds, like):
    """Return what `decide` does; if that is True, multiply arrays in place by their factors."""
    if not decide(measures, slot, unscale, tables, bounds, like):
        return False
    scale(found_slot(tables, DECISIONS, slot, bounds), tables, like)
    return True


@kernel
def hold(slot, unscale, tables, after, limits, bounds, like):
    """Call `decide`; if it returns True, multiply, clamp tensors to their limits and decide again.

    The second decision is about the results, by the tables `after`. Return what both returned.
    """
    if not decide(True, slot, unscale, tables, bounds, like):
        return False, False
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    scale(decisions, tables, like)
    chunks, pool_of = found(tables, CHUNKS, tables), found_row(tables, POOL_OF, tables)
    for c in range(chunks.shape[0]):
        owner = chunks[c, OWNER]
        low, high = limits[owner, 0], limits[owner, 1]
        hold_chunk(chunks[c], pool_of[owner], decisions, low, high, like)
    return True, decide(True, slot, 1.0, after, bounds, like)


@kernel_with_gil
def measure(items, slot, unscale, tables, bounds, like):
    """Find the arrays, measure them and decide; return False if the general path is needed."""
    return locate(items, tables) and decide(True, slot, unscale, tables, bounds, like)


@inline
def step(advance, update, items, slot, unscale, tables, bounds, factors, like):
    """Take an optimizer's step; return False, with no update, if the general path is needed."""
    if items != AGAIN and not locate(items, tables):
        return False
    if not decide(items != AGAIN, slot, unscale, tables, bounds, like):
        return False
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    counts, given = found_row(tables, COUNTS, tables), found(tables, GIVEN, bounds)
    settings, pieces = found(tables, SETTINGS, factors), found(tables, PIECES, tables)
    advance(decisions, column_of(factors), counts, False, given, factors, settings)
    uncount(tables, counts, factors)
    update(0, pieces.shape[0], pieces, factors, settings, like)
    return True


@kernel_with_gil
def descend(items, slot, unscale, tables, bounds, factors, like):
    """Take a step of `updates.descend` as `step` does."""
    advance, update = updates.advance, updates.descend
    return step(advance, update, items, slot, unscale, tables, bounds, factors, like)


@kernel_with_gil
def descend_with_momentum(items, slot, unscale, tables, bounds, factors, like):
    """Take a step of `updates.descend_with_momentum` as `step` does."""
    advance, update = updates.advance, updates.descend_with_momentum
    return step(advance, update, items, slot, unscale, tables, bounds, factors, like)


@kernel_with_gil
def adam(items, slot, unscale, tables, bounds, factors, like):
    """Take a step of `updates.adam` as `step` does."""
    advance, update = updates.advance_adam, updates.adam
    return step(advance, update, items, slot, unscale, tables, bounds, factors, like)

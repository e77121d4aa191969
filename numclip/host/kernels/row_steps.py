"""Clips and steps with small sparse gradients, by one native call each, as in `given`.

Every call groups rows by their indices, and sums all of them before anything is written. `groups`
are three arrays for all sparse gradients, one after another: the row numbers in the order of their
groups, where each group starts, and how many groups each gradient has.
"""

import math

import numpy as np

from numclip.host.kernels import updates
from numclip.host.kernels.cpu import multiply, parts_of_squares
from numclip.host.kernels.elements import (
    array_at,
    as_computed,
    empty,
    empty_table,
    table_at,
    widen,
    zeros,
)
from numclip.host.kernels.given import (
    AGAIN,
    CHUNKS,
    COUNTS,
    DECISIONS,
    GIVEN,
    LOCATIONS,
    LOSSES,
    OWN,
    PIECES,
    POOL_OF,
    POOLS,
    ROWS,
    SETTINGS,
    SIZES,
    SUMS,
    column_of,
    found,
    found_row,
    found_slot,
    needs_care,
    obey,
    scale,
    uncount,
)
from numclip.host.kernels.given_rows import (
    LENGTH,
    LOWEST,
    PARAM,
    TENSOR,
    locate_all,
    locate_rows,
)
from numclip.host.kernels.grouping import (
    SLOTS,
    group_rows,
    merge_rows,
    slots_for,
    squares_of_groups,
)
from numclip.host.kernels.pools import decide_squares, has_vanished, write_sum
from numclip.host.kernels.pools import measure as measure_chunks
from numclip.host.kernels.scalars import is_safe
from numclip.host.kernels.tuning import CHUNK
from numclip.host.runtime.jit import expanded, inline, kernel, kernel_with_gil
from numclip.tables import (
    AIM,
    BAD,
    DIVISOR,
    ERROR,
    EXPONENT,
    FILLED,
    INDICES,
    MODE,
    MULTIPLY,
    SKIPPED,
    TERMS,
    TERMS_EXPONENT,
    TOTAL,
    TRUNCATE_BELOW,
    VALUES,
)

# Columns of SIZES, of pools: the numbers in dense tensors, the largest `DType.truncate_below`.
DENSE, UNIT = range(2)


@inline
def grouped(locations):
    """Return the `groups` of all sparse gradients."""
    count = 0
    for s in range(locations.shape[0]):
        count += locations[s, FILLED]
    order, starts = empty(count, locations), empty(count + locations.shape[0], locations)
    distinct = empty(locations.shape[0], locations)
    first = 0
    for s in range(locations.shape[0]):
        count = locations[s, FILLED]
        indices = array_at(locations[s, INDICES], count, locations)
        own = order[first : first + count], starts[first + s : first + s + count + 1]
        distinct[s] = group_rows(indices, zeros(slots_for(count), SLOTS), *own)
        first += count
    return order, starts, distinct


@inline
def groups_of(s, first, count, groups):
    """Return (order, starts) of sparse gradient `s`; `first` rows belong to those before it."""
    order, starts, distinct = groups
    begin = first + s
    return order[first : first + count], starts[begin : begin + distinct[s] + 1]


@inline
def loss_of(starts, row):
    """Return the norm of the most that rounding subnormal terms can add to sums of rows."""
    squares = 0.0
    for g in range(starts.size - 1):
        squares += float((starts[g + 1] - starts[g]) ** 2)
    return math.ldexp(1.0, int(row[LOWEST])) * math.sqrt(squares * row[LENGTH])


@inline
def write_sums(total, terms, out):
    """Write squared norms of summed rows and summed magnitudes; return whether both are safe."""
    out[TOTAL], out[EXPONENT] = total, 0.0
    out[TERMS], out[TERMS_EXPONENT], out[ERROR] = terms, 0.0, 0.0
    out[BAD] = 0.0 if math.isfinite(total) else 1.0
    return is_safe(total) and is_safe(terms)


@inline
def measure_rows(tables, groups, like, sums, losses):
    """Write sums of sparse gradients and the losses of pools; return whether all sums are safe."""
    rows, locations = found(tables, ROWS, tables), found(tables, LOCATIONS, tables)
    pool_of = found_row(tables, POOL_OF, tables)
    safe, first = True, 0
    for p in range(losses.size):
        losses[p] = 0.0
    for s in range(rows.shape[0]):
        t, length, count = rows[s, TENSOR], rows[s, LENGTH], locations[s, FILLED]
        order, starts = groups_of(s, first, count, groups)
        first += count
        values = array_at(locations[s, VALUES], count * length, like)
        if starts.size - 1 == count:
            total, error = parts_of_squares(values)
            write_sum(sums[t], total, error)
            right = is_safe(sums[t, TOTAL])
        else:
            rows_of_groups = order, starts, values.reshape((count, length))
            right = write_sums(*squares_of_groups(*rows_of_groups), sums[t])
        safe &= right or (sums[t, TERMS] == 0.0 and not has_vanished(0.0, values))
        if starts.size - 1 < count:
            losses[pool_of[t]] += loss_of(starts, rows[s])
    return safe


@inline
def obey_rows(tables, unscale, bounds):
    """Return the laws as `obey` does, AIM less the losses, TRUNCATE_BELOW for present rows."""
    laws, losses = obey(tables, unscale, bounds), found_row(tables, LOSSES, bounds)
    sizes, rows = found(tables, SIZES, bounds), found(tables, ROWS, tables)
    locations, pool_of = found(tables, LOCATIONS, tables), found_row(tables, POOL_OF, tables)
    for p in range(bounds.size):
        laws[p, AIM] = max(bounds[p] - losses[p] / laws[p, DIVISOR], 0.0)
        laws[p, TRUNCATE_BELOW] = sizes[p, DENSE]
    for s in range(rows.shape[0]):
        laws[pool_of[rows[s, TENSOR]], TRUNCATE_BELOW] += locations[s, FILLED] * rows[s, LENGTH]
    for p in range(bounds.size):
        norm_of_ones = math.sqrt(laws[p, TRUNCATE_BELOW])
        laws[p, TRUNCATE_BELOW] = norm_of_ones / laws[p, DIVISOR] * sizes[p, UNIT]
    return laws


@inline
def decide_located(measures, slot, unscale, tables, bounds, groups, like):
    """Do what `given.decide` does, with the rows and chunks that are located."""
    pools = found(tables, POOLS, tables)
    sums = found_slot(tables, SUMS, slot, bounds)
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    safe = True
    if measures:
        losses = found_row(tables, LOSSES, bounds)
        safe = measure_chunks(found(tables, CHUNKS, tables), like, sums)
        safe &= measure_rows(tables, groups, like, sums, losses)
    laws = obey_rows(tables, unscale, bounds)
    right = decide_squares(pools, laws, sums, decisions)
    return right and not needs_care(pools, decisions, safe)


@kernel
def decide(measures, slot, unscale, tables, bounds, like):
    """Do what `given.decide` does, with the held rows, or with those of the call before."""
    if measures and not locate_rows(OWN, tables, like):
        return False
    groups = grouped(found(tables, LOCATIONS, tables))
    return decide_located(measures, slot, unscale, tables, bounds, groups, like)


@kernel
def clip(measures, slot, unscale, tables, bounds, like):
    """Return what `decide` does; if that is True, multiply gradients in place by their factors."""
    if not decide(measures, slot, unscale, tables, bounds, like):
        return False
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    scale(decisions, tables, like)
    scale_rows(decisions, tables, like)
    return True


@inline
def scale_rows(decisions, tables, like):
    """Multiply rows in place by the factors of their pools."""
    rows, locations = found(tables, ROWS, tables), found(tables, LOCATIONS, tables)
    pool_of = found_row(tables, POOL_OF, tables)
    for s in range(rows.shape[0]):
        decided = decisions[pool_of[rows[s, TENSOR]], column_of(like)]
        factor = as_computed(decided, like)
        if factor != 1.0:
            count = locations[s, FILLED] * rows[s, LENGTH]
            multiply(array_at(locations[s, VALUES], count, like), factor)


@kernel_with_gil
def measure(items, slot, unscale, tables, bounds, like):
    """Find the gradients, measure and decide; return False if the general path is needed."""
    if not locate_all(items, tables, like):
        return False
    groups = grouped(found(tables, LOCATIONS, tables))
    return decide_located(True, slot, unscale, tables, bounds, groups, like)


@inline
def are_finite(x):
    """Tell whether all elements of an array are finite."""
    finite = True
    for i in range(x.size):
        finite &= math.isfinite(widen(x[i]))
    return finite


@inline
def sum_rows(tables, groups, decisions, like, sums):
    """Write the summed rows of all gradients; return whether those to be scaled are finite."""
    rows, locations = found(tables, ROWS, tables), found(tables, LOCATIONS, tables)
    pool_of = found_row(tables, POOL_OF, tables)
    address, first, finite = np.int64(sums.ctypes.data), 0, True
    for s in range(rows.shape[0]):
        length, count, distinct = rows[s, LENGTH], locations[s, FILLED], groups[2][s]
        order, starts = groups_of(s, first, count, groups)
        out = table_at(address, distinct, length, like)
        if length > 0:
            merge_rows(
                0, distinct, order, starts, table_at(locations[s, VALUES], count, length, like), out
            )
        decision = decisions[pool_of[rows[s, TENSOR]]]
        scales = decision[SKIPPED] == 0.0 and decision[MODE] == MULTIPLY
        finite &= not scales or are_finite(array_at(address, distinct * length, like))
        first += count
        address += distinct * length * like.itemsize
    return finite


@inline
def numbers_in(tables, groups):
    """Return how many numbers the summed rows of all gradients have."""
    rows, count = found(tables, ROWS, tables), 0
    for s in range(rows.shape[0]):
        count += groups[2][s] * rows[s, LENGTH]
    return count


@inline
def update_rows(update, tables, groups, sums, factors, settings, like):
    """Update parameters at the rows that have sums; the caller keeps the memory of `sums`."""
    rows, locations = found(tables, ROWS, tables), found(tables, LOCATIONS, tables)
    pool_of = found_row(tables, POOL_OF, tables)
    itemsizes = like.itemsize, factors.itemsize
    addresses, first = empty(4, locations), 0
    addresses[updates.GRAD] = sums.ctypes.data
    for s in range(rows.shape[0]):
        length, count = rows[s, LENGTH], locations[s, FILLED]
        order, starts = groups_of(s, first, count, groups)
        given = array_at(locations[s, INDICES], count, locations)
        indices = empty(starts.size - 1, locations)
        for g in range(indices.size):
            indices[g] = given[order[starts[g]]]
        chunks = empty_table(indices.size * -(-length // CHUNK), 6, locations)
        for k in range(updates.PARAM, addresses.size):
            addresses[k] = rows[s, PARAM + k - updates.PARAM]
        owner = pool_of[rows[s, TENSOR]]
        updates.write_row_updates(indices, length, addresses, itemsizes, owner, chunks)
        update(0, chunks.shape[0], chunks, factors, settings, like)
        addresses[updates.GRAD] += indices.size * length * like.itemsize
        first += count


@expanded
def step(advance, update, items, slot, unscale, tables, bounds, factors, like):
    """Take a step of an optimizer as `given.step` does."""
    if items != AGAIN and not locate_all(items, tables, like):
        return False
    groups = grouped(found(tables, LOCATIONS, tables))
    if not decide_located(items != AGAIN, slot, unscale, tables, bounds, groups, like):
        return False
    decisions = found_slot(tables, DECISIONS, slot, bounds)
    sums = empty(numbers_in(tables, groups), like)
    if not sum_rows(tables, groups, decisions, like, sums):
        return False
    counts, given = found_row(tables, COUNTS, tables), found(tables, GIVEN, bounds)
    settings, pieces = found(tables, SETTINGS, factors), found(tables, PIECES, tables)
    advance(decisions, column_of(factors), counts, False, given, factors, settings)
    uncount(tables, counts, factors)
    update(0, pieces.shape[0], pieces, factors, settings, like)
    update_rows(update, tables, groups, sums, factors, settings, like)
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

"""Rows of sums that ranks exchange, those of all ranks merged to one; see `clipping.ranks`."""

import math

import numpy as np

from numclip.host.kernels import given as steps
from numclip.host.kernels.pools import add_pools, decide_all, measure_and_decide, write_total
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import BAD, EXPONENT, POLICY, SUM_COLUMNS, TOTAL, ZERO

LOSS = SUM_COLUMNS  # of an exchanged row; sums of powers follow if the order is not 2
WIDTH = LOSS + 1
SPANS, OWN, SHARDED, POOLS, SOURCE, GIVEN, TABLES = range(7)
"""Tables of exchanged and merged rows, of three words each, see `kernels.given`.

In order: the tensors of each row that this rank sends, these rows, which of them are of shards,
the rows of each pool, the merged rows (and after them sums of tensors), the sums of each pool.
"""
ALIKE = 2.0**-46
"""The relative difference that sums of copies may have: other processors add in another order."""


@inline
def first_bad(rows):
    """Return the first rank whose row is non-finite, 0 if none is."""
    for r in range(rows.shape[0]):
        if rows[r, BAD] > 0.0:
            return r
    return 0


@inline
def first_differing(rows):
    """Return the first rank whose sum differs from that of rank 0 by more than rounding, or 0."""
    total, exponent = rows[0, TOTAL], rows[0, EXPONENT]
    for r in range(1, rows.shape[0]):
        own = rows[r, TOTAL]
        other = own != 0.0 and rows[r, EXPONENT] != exponent
        if other or abs(own - total) > ALIKE * abs(total):
            return r
    return 0


@inline
def merge(every, sharded, merged):
    """Write sums of shards, and of copies the first non-finite row or that of rank 0.

    Return (bad, row, rank) as `merge_ranks` does.
    """
    bad, row, rank = 0.0, 0, 0
    for k in range(every.shape[0]):
        rows, out = every[k], merged[k]
        if sharded[k]:
            write_total((0, rows.shape[0]), rows, out)
            out[LOSS] = rows[:, LOSS].sum()
        else:
            out[:] = rows[first_bad(rows)]
            if rank == 0 and math.isfinite(out[TOTAL]):
                row, rank = k, first_differing(rows)
        bad += out[BAD]
    return bad, row, rank


@kernel
def merge_ranks(every, sharded, pools, source, given):
    """Merge the rows of all ranks to the first rows of `source`, and add up those of each pool.

    `every` is (rows, ranks, columns). Return (bad, row, rank, scaled): how many tensors are
    non-finite, row and rank of the first copy that differs (rank 0 if none does), and what
    `add_pools` returns.
    """
    bad, row, rank = merge(every, sharded, source)
    return bad, row, rank, add_pools(pools, source, given)


@kernel
def publish(slot, tables, exchange, like):
    """Measure chunks and write the rows to send; return False if the general path is needed.

    Sums of tensors are written, too, where `SOURCE` has room for them. Nothing is decided.
    `exchange` are the words of the tables from `SPANS` to `GIVEN`.
    """
    floats = np.empty(0)
    chunks = steps.found(tables, steps.CHUNKS, tables)
    pools, laws = steps.found(tables, steps.POOLS, tables), steps.found(tables, steps.LAWS, floats)
    sums = steps.found_slot(tables, steps.SUMS, slot, floats)
    decisions = steps.found_slot(tables, steps.DECISIONS, slot, floats)
    safe = measure_and_decide(chunks, like, pools[:0], laws, sums, decisions)
    own, source = steps.found(exchange, OWN, floats), steps.found(exchange, SOURCE, floats)
    add_pools(steps.found(exchange, SPANS, exchange), sums, own)
    for t in range(source.shape[0] - own.shape[0]):
        for k in range(sums.shape[1]):
            source[own.shape[0] + t, k] = sums[t, k]
    zeroing = (pools[:, POLICY] == ZERO).any() and (own[:, BAD] > 0.0).any()
    return not zeroing and (safe or like.itemsize < 8)


@inline
def are_alike(heads):
    """Tell whether the heads of all messages are equal, so that all ranks take the same step."""
    for r in range(1, heads.shape[0]):
        for k in range(heads.shape[1]):
            if heads[r, k] != heads[0, k]:
                return False
    return True


@kernel
def clip(slot, unscale, tables, bounds, heads, every, exchange, like):
    """Clip by the rows of all ranks; return False if the general path is needed."""
    if not are_alike(heads):
        return False
    rows, given = steps.found(exchange, POOLS, exchange), steps.found(exchange, GIVEN, bounds)
    sharded = steps.found_row(exchange, SHARDED, exchange)
    source = steps.found(exchange, SOURCE, bounds)
    bad, _, rank, scaled = merge_ranks(every, sharded, rows, source, given)
    if bad > 0.0 or rank > 0 or scaled:
        return False
    laws, pools = steps.obey(tables, unscale, bounds), steps.found(tables, steps.POOLS, tables)
    decisions = steps.found_slot(tables, steps.DECISIONS, slot, bounds)
    decide_all(pools, laws, given, decisions)
    if steps.needs_care(pools, decisions, True):
        return False
    steps.scale(decisions, tables, like)
    return True

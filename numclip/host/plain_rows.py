"""Plain arrays of one dtype, some of which are rows that repeat, clipped without describing each.

As in `lists`: a function does the whole job with the bits of the general way, or returns None and
has touched nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from numclip.dtypes import Array, DType, as_stored
from numclip.engine import Groups
from numclip.formulas import is_safe
from numclip.host import batches, lists, rows
from numclip.host.batches import Batch
from numclip.host.kernels.pools import decide_pools
from numclip.host.nests import Items
from numclip.law import Law, Laws, Pool
from numclip.memory import Span
from numclip.tables import (
    AIM,
    BAD,
    BOUND,
    COARSE,
    DECISION_COLUMNS,
    FACTOR,
    FINE,
    LEAVE,
    MODE,
    MULTIPLY,
    NORM,
    PROPAGATE,
    SUM_COLUMNS,
    TERMS,
    TOTAL,
)


class Decided(NamedTuple):
    """Arrays as a batch, their norm, and the factor that brings it to a bound."""

    batch: Batch
    norm: float
    factor: float


def norm_of(items: Items, groupings: Mapping[int, Groups]) -> float | None:
    """Return the L2 norm of the arrays of a tuple.

    `groupings` say of some arrays, by their numbers, which rows are to be summed.
    """
    found = _decided(items, groupings, math.inf, write=False)
    return None if found is None else found.norm


def clip_items(
    items: Items, groupings: Mapping[int, Groups], bound: float, *, in_place: bool
) -> tuple[Items, float] | None:
    """Clip such arrays by their norm, in place or into new ones; return both."""
    found = _decided(items, groupings, bound, write=in_place)
    if found is None:
        return None
    return lists.scaled(found.batch, items, found.factor, in_place=in_place), found.norm


def _decided(
    items: Items, groupings: Mapping[int, Groups], bound: float, *, write: bool
) -> Decided | None:
    """Measure and decide."""
    batch = lists.plain_batch(items, write=write)
    sums = np.zeros((len(items), SUM_COLUMNS))
    if batch is None or not _measure(batch, items, groupings, sums):
        return None
    smallest = math.ldexp(1.0, batch.dtype.precision[1])
    if bound - smallest * sum(items[t].size for t in groupings) != bound:
        return None  # what rounding subnormal terms adds counts
    law = _law_of(batch.dtype).copy()
    law[0, [BOUND, AIM]] = bound
    law[0, COARSE] *= math.sqrt(batch.nbytes // batch.dtype.storage.itemsize)
    pool = np.array([[0, len(items), 0, PROPAGATE, batch.dtype.digits, 1]])
    decisions = np.empty((2, DECISION_COLUMNS))
    decide_pools(pool, law, sums, decisions)
    if decisions[0, MODE] not in (LEAVE, MULTIPLY):
        return None
    factor = decisions.item(0, FINE if batch.dtype.digits == 53 else FACTOR)
    return Decided(batch, decisions.item(0, NORM), factor)


@functools.cache
def _law_of(dtype: DType) -> Array:
    """Return the law of one number."""
    pool = Pool(0, 1, 0, "propagate")
    return Laws([Span(dtype, 0, 0, 1)], [pool]).table(Law(math.inf))


def _measure(batch: Batch, items: Items, groupings: Mapping[int, Groups], sums: Array) -> bool:
    """Write the sum of each array; tell whether all are finite, and squares lose nothing."""
    dense = np.ones(len(items), np.bool_)
    dense[[*groupings]] = False
    if dense.any():
        batches.write_squares(batch.of(dense), sums)
    for t, grouping in groupings.items():
        if not items[t].size or not items[t].flags.c_contiguous:
            return False
        values = as_stored(items[t])
        total, terms = rows.grouped_squares(*grouping, values.reshape(values.shape[0], -1))
        if not (is_safe(total) and is_safe(terms)):
            return False
        sums[t, TOTAL], sums[t, TERMS] = total, terms
    return not sums[:, BAD].any()

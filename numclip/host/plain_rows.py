"""Ordinary arrays of one dtype, some of repeated rows, measured and clipped without a plan.

As in `lists`, a function either finishes the job, with the same bits as the general path, or
returns None and writes nothing. `groupings` has the groups of rows to sum, by arrays' numbers.
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
from numclip.host import batches, lists, plain_arrays, rows
from numclip.host.batches import Batch
from numclip.host.kernels.pools import decide_all
from numclip.host.nests import Items
from numclip.law import Law, Laws, Pool, loss_of_rows
from numclip.memory import RowSpan
from numclip.tables import (
    AIM,
    BAD,
    BOUND,
    DECISION_COLUMNS,
    LAST,
    LEAVE,
    MODE,
    MULTIPLY,
    NORM,
    SUM_COLUMNS,
    TERMS,
    TOTAL,
    TRUNCATE_BELOW,
)

Groupings = Mapping[int, Groups]


class Decided(NamedTuple):
    """Arrays as a batch, their norm, and the factor that brings it to a bound."""

    batch: Batch
    norm: float
    factor: float


def norm_of(items: Items, groupings: Groupings) -> float | None:
    """Return the L2 norm of the arrays of a tuple, or None."""
    found = _decided(items, groupings, math.inf, write=False)
    return None if found is None else found.norm


def clip_items(
    items: Items, groupings: Groupings, bound: float, *, in_place: bool
) -> tuple[Items, float] | None:
    """Clip arrays by their L2 norm, in place or into new ones; return (arrays, norm) or None."""
    found = _decided(items, groupings, bound, write=in_place)
    if found is None:
        return None
    return lists.scaled(found.batch, items, found.factor, in_place=in_place), found.norm


def sums_of(items: Items, groupings: Groupings) -> tuple[Array, int, float] | None:
    """Return (sums, size, loss) of the arrays of a tuple, or None.

    `sums` has a row of sums of squares for each array, as engines' tables have; `size` counts the
    stored numbers, `loss` is what rounding subnormal terms can add to the norm.
    """
    found = _measured(items, groupings, write=False)
    if found is None:
        return None
    batch, sums = found
    present = [t for t, item in enumerate(items) if item is not None]
    return sums[present], _numbers_of(batch), _loss_of(batch.dtype, items, groupings)


def _decided(items: Items, groupings: Groupings, bound: float, *, write: bool) -> Decided | None:
    """Measure arrays and decide; return None if more than a multiplication is needed."""
    found = _measured(items, groupings, write=write)
    if found is None or found[1][:, BAD].any():
        return None
    batch, sums = found
    pool, law = (table.copy() for table in _tables_of_one(batch.dtype))
    pool[0, LAST] = len(items)
    law[0, TRUNCATE_BELOW] *= math.sqrt(_numbers_of(batch))
    law[0, BOUND], law[0, AIM] = bound, _aim(batch.dtype, items, groupings, bound)
    decisions = np.empty((2, DECISION_COLUMNS))
    decide_all(pool, law, sums, decisions)
    if decisions[0, MODE] not in (LEAVE, MULTIPLY):
        return None
    return Decided(batch, decisions.item(0, NORM), decisions.item(0, batch.column))


def _measured(items: Items, groupings: Groupings, *, write: bool) -> tuple[Batch, Array] | None:
    """Return the arrays as a batch, and a row of sums for each.

    None if arrays or rows are not plain, or if the squares of summed rows under- or overflow.
    """
    if not all(items[t].size and items[t].flags.c_contiguous for t in groupings):
        return None
    batch = plain_arrays.plain_batch(items, write=write)
    if batch is None:
        return None
    sums, dense = np.zeros((len(items), SUM_COLUMNS)), np.ones(len(items), np.bool_)
    dense[[*groupings]] = False
    if dense.any():
        batches.write_squares(batch.of(dense) if groupings else batch, sums)
    for t, grouping in groupings.items():
        values = as_stored(items[t].reshape(len(items[t]), -1))
        total, terms = rows.grouped_squares(*grouping, values)
        if not (is_safe(total) and is_safe(terms)):
            return None
        sums[t, TOTAL], sums[t, TERMS] = total, terms
    return batch, sums


def _numbers_of(batch: Batch) -> int:
    """Return how many numbers a batch has, two for each complex element."""
    return batch.nbytes // batch.dtype.storage.itemsize


@functools.cache
def _tables_of_one(dtype: DType) -> tuple[Array, Array]:
    """Return (pools, laws): the tables of a pool of one sparse row with a single number."""
    pools = [Pool(0, 1, 0, "propagate")]
    laws = Laws([RowSpan(dtype, 0, 0, 1, 1)], pools)
    return laws.pool_table(pools), laws.table(Law(math.inf))


def _aim(dtype: DType, items: Items, groupings: Groupings, bound: float) -> float:
    """Return the norm to aim at: the bound less what rounding subnormal terms can add."""
    most = dtype.smallest * dtype.components * sum(items[t].size for t in groupings)
    if bound - most == bound:  # the usual case
        return bound
    return max(bound - _loss_of(dtype, items, groupings), 0.0)


def _loss_of(dtype: DType, items: Items, groupings: Groupings) -> float:
    """Return what rounding subnormal terms can add to the norm."""
    return sum(
        [
            loss_of_rows(starts, items[t].size // len(items[t]), dtype, 2.0)
            for t, (_, starts) in groupings.items()
        ]
    )

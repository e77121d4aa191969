"""Gradients per example in ordinary arrays of one dtype, clipped without a plan.

As in `lists`, a function either finishes the job, with the same bits as the general path, or
returns None and writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from numclip.dtypes import FLOAT64, Array
from numclip.host import nests, plain_arrays
from numclip.host.kernels import examples
from numclip.host.kernels.tuning import EXAMPLE_COLUMNS, PARALLEL_BYTES
from numclip.host.nests import Items
from numclip.host.plain_arrays import Kind
from numclip.host.runtime import threads
from numclip.host.runtime.jit import entry
from numclip.host.units import LONG_ROW
from numclip.law import Family, unit_laws
from numclip.memory import Memory, Strided
from numclip.tables import BOUND

_UNIT = Strided(FLOAT64, (1, 1), Memory(0, (0, 0)), Memory(0, (0, 0)), (1,))
_LAW = unit_laws([Family((_UNIT,), rounded=False)], 2.0, 0.0)[0]


def clip(grads: Any, bound: float) -> tuple[Any, int] | None:
    """Clip each example by its norm over all arrays; return (sums, number clipped) or None."""
    held = nests.held_still(grads)
    items = nests.items_of(held)
    kind = plain_arrays.kind_of(items)
    if kind is None or not _are_examples(items):
        return None
    results = tuple([np.empty(item.shape[1:], item.dtype) for item in items])
    law: Array = _LAW.copy()
    law[BOUND] = bound
    factors, clipped = np.empty(len(items[0])), np.empty(len(items[0]), np.bool_)
    arguments = law, kind.row.like, factors, clipped
    if sum([item.nbytes for item in items]) < PARALLEL_BYTES:
        pointers = plain_arrays.pointers_of(items), plain_arrays.pointers_of(results)
        facts = kind.in_c_order[0]
        found = _little(kind)(*pointers, len(items), facts, EXAMPLE_COLUMNS, *arguments)
    else:
        found = _clip_much(items, results, kind, *arguments)
    return None if found < 0 else (nests.rebuilt(held, results, None), found)


@functools.cache
def _little(kind: Kind) -> Callable[..., int]:
    """Return the entry of `examples.clip_little`."""
    arguments = kind.in_c_order[0], EXAMPLE_COLUMNS, _LAW, kind.row.like
    return entry(examples.clip_little, 0, 0, 1, *arguments, np.empty(1), np.empty(1, bool))


def _clip_much(
    items: Items, results: Items, kind: Kind, law: Array, like: Array, *found: Array
) -> int:
    """Clip by all threads; return how many examples are clipped, -1 if this is not possible."""
    factors, clipped = found
    nbytes, table = sum([item.nbytes for item in items]), np.empty((len(items), 4), np.int64)
    pointers = plain_arrays.pointers_of(items), plain_arrays.pointers_of(results)
    blocks = examples.find(*pointers, kind.in_c_order[0], EXAMPLE_COLUMNS, table)
    if blocks < 0:
        return -1
    read = table, law, like, factors, clipped
    threads.run(examples.find_factors, factors.size, nbytes, *read, keep=items)
    if (factors == examples.UNKNOWN).any():
        return -1
    arguments = table, factors, EXAMPLE_COLUMNS, like
    threads.run(examples.sum_blocks, blocks, nbytes, *arguments, keep=results)
    return int(np.count_nonzero(clipped))


def _are_examples(items: Items) -> bool:
    """Tell whether all are ndarrays of equally many examples, each short enough for one thread."""
    first = items[0]
    if type(first) is not np.ndarray or first.ndim == 0 or not first.shape[0]:
        return False
    count = first.shape[0]
    return all(
        type(x) is np.ndarray and x.ndim and x.shape[0] == count and x.size < count * LONG_ROW
        for x in items
    )

"""Gradients per example that are plain arrays of one dtype, clipped without describing each.

As in `lists`: a function does the whole job with the bits of the general way, or returns None and
has touched nothing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numclip.dtypes import FLOAT64, Array
from numclip.host import nests, plain_arrays
from numclip.host.kernels import arrays, examples
from numclip.host.kernels.tuning import EXAMPLE_COLUMNS
from numclip.host.nests import Items
from numclip.host.runtime import threads
from numclip.host.units import LONG_ROW
from numclip.law import Family, unit_laws
from numclip.memory import Memory, Strided
from numclip.tables import BOUND

_UNIT = Strided(FLOAT64, (1, 1), Memory(0, (0, 0)), Memory(0, (0, 0)), (1,))
_LAW = unit_laws([Family((_UNIT,), rounded=False)], 2.0, 0.0)[0]


def clip(grads: Any, bound: float) -> tuple[Any, int] | None:
    """Clip each example by its norm over all arrays; return the sums, and how many are clipped."""
    held = nests.held_still(grads)
    items = nests.items_of(held)
    kind = plain_arrays.kind_of(items)
    if kind is None or not _are_examples(items):
        return None
    results = tuple([np.empty(item.shape[1:], item.dtype) for item in items])
    facts = kind.readable.copy()
    facts[arrays.NEEDS] |= arrays.C_ORDER
    table = np.empty((len(items), 4), np.int64)
    pointers = plain_arrays.pointers_of(items), plain_arrays.pointers_of(results)
    blocks = examples.find(*pointers, facts, EXAMPLE_COLUMNS, table)
    if blocks < 0:
        return None
    like, nbytes = kind.row.like, sum([item.nbytes for item in items])
    factors, clipped = np.empty(len(items[0])), np.empty(len(items[0]), np.bool_)
    law: Array = _LAW.copy()
    law[BOUND] = bound
    threads.run(
        examples.find_factors, factors.size, nbytes, table, law, like, factors, clipped, keep=items
    )
    if like.itemsize == 8 and (factors == examples.UNKNOWN).any():
        return None
    threads.run(
        examples.sum_blocks, blocks, nbytes, table, factors, EXAMPLE_COLUMNS, like, keep=results
    )
    return nests.rebuilt(held, results, None), int(np.count_nonzero(clipped))


def _are_examples(items: Items) -> bool:
    """Tell whether all are arrays of as many examples, each short enough for one thread."""
    first = items[0]
    if type(first) is not np.ndarray or first.ndim == 0 or not first.shape[0]:
        return False
    count = first.shape[0]
    return all(
        type(x) is np.ndarray and x.ndim and x.shape[0] == count and x.size < count * LONG_ROW
        for x in items
    )

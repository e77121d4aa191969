"""Pairs of a gradient and the array it updates, where all are plain arrays of one dtype.

In C order, so that their elements lie alike; and apart, so that none is written before it is read.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.host import lists
from numclip.host.kernels import arrays, cpu

_UNUSED = np.empty((0, 4), np.int64)
_FACTS: dict[str, tuple[Array, Array]] = {}


def plain(gradients: list[Any], variables: list[Any]) -> tuple[Any, Any]:
    """Return a key for which memory is updated, and where each chunk of the gradients is.

    Nothing where an array is not plain; no array is described.
    """
    held = *gradients, *variables
    kind = lists.kind_of(held)
    if kind is None:
        return None, None
    name, count = kind.row.name, len(variables)
    if name not in _FACTS:
        facts = np.array([kind.readable, kind.writeable])
        facts[:, arrays.NEEDS] |= arrays.C_ORDER
        _FACTS[name] = facts[0], facts[1]
    readable, writeable = _FACTS[name]
    batch, apart = lists.batch_of(held, kind, readable)
    if batch is None or not (apart or lists.are_apart(batch)):
        return None, None
    if [grad.shape for grad in gradients] != [variable.shape for variable in variables]:
        return None, None
    places = lists.pointers_of(held) + count * arrays.WORD
    found, _, _ = arrays.table(places, count, writeable, _UNUSED)
    if found < 0:
        return None, None
    chunks = batch.chunks
    half = len(chunks) // 2
    return (name, chunks[half:].tobytes()), chunks[:half, cpu.SOURCE]

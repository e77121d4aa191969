"""Clipping of nested or sparse gradients made of NumPy arrays, as in `numclip.host.lists`.

As there, each function either finishes the job, with the same bits as the general path, or
returns None and writes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.border.structures import Structure, structure
from numclip.host import lists, outs, plain_rows
from numclip.host.kernels.spans import GIVEN
from numclip.host.nests import Items
from numclip.isolation import isolated
from numclip.slices import Grouping, IndexedSlices
from numclip.tables import PROPAGATE

_norm_of_rows, _clip_rows = isolated(plain_rows.norm_of), isolated(plain_rows.clip_items)


def global_norm(found: Structure, ord: float, duplicates: str) -> float | None:
    """Return the norm of gradients."""
    values = values_of(found.items, duplicates)
    if values is None:
        return None
    if not values.groupings:
        return lists.norm_of(values.arrays, ord)
    return _norm_of_rows(*values) if ord == 2.0 else None


def clip_by_global_norm(
    found: Structure,
    bound: float,
    out: Any,
    ord: float,
    options: int,
    given: float,
    duplicates: str,
) -> tuple[Any, float] | None:
    """Clip gradients by their global norm, in place or into new ones; return (results, norm)."""
    if not outs.takes(found.source, out):
        return None
    in_place = out is not None
    values = values_of(found.items, duplicates)
    if values is None:
        return None
    if not values.groupings:
        clipped = lists.clip_items(values.arrays, in_place, bound, ord, options, given)
    elif ord == 2.0 and not options & GIVEN:
        clipped = _clip_rows(*values, bound, in_place=in_place)
    else:
        return None
    if clipped is None:
        return None
    results = found.items if in_place else _with_values(found.items, clipped[0])
    return found.rebuild(results), clipped[1]


def clip_slices(grad: Any, bound: float, out: Any, ord: float) -> Any:
    """Clip slices by their norm, in place or into new ones; return the results."""
    if type(grad) is not IndexedSlices or not (out is None or out is grad):
        return None
    grads = [grad]
    target = None if out is None else grads
    found = clip_by_global_norm(structure(grads), bound, target, ord, PROPAGATE, 0.0, "sum")
    return None if found is None else found[0][0]


def clamp_slices(grad: Any, low: Any, high: Any, out: Any) -> Any:
    """Clamp slices of distinct rows between two numbers, in place or into new ones; return them."""
    if type(grad) is not IndexedSlices or not (out is None or out is grad):
        return None
    low, high = lists.number(low), lists.number(high)
    values = values_of([grad], "sum") if low <= 0.0 <= high else None
    if values is None or values.groupings:
        return None
    own = values.arrays[0]
    clamped = lists.clamp(own, low, high, None if out is None else own)
    if clamped is None or out is not None:
        return None if clamped is None else grad
    return grad.with_values(clamped)


class Values(NamedTuple):
    """The arrays of gradients, and by index the groupings of those whose rows are to be summed."""

    arrays: Items
    groupings: dict[int, Grouping]


def values_of(items: Sequence[Any], duplicates: str) -> Values | None:
    """Return the `Values`; None if values of slices are not NumPy's or have another shape."""
    arrays, groupings = [], {}
    for t, item in enumerate(items):
        if type(item) is not IndexedSlices:
            arrays.append(item)
            continue
        shape = item.indices.size, *item.dense_shape[1:]
        if type(item.values) is not np.ndarray or item.values.shape != shape:
            return None
        if duplicates == "sum" and item.has_duplicates:
            groupings[t] = item.grouping
        arrays.append(item.values)
    return Values(tuple(arrays), groupings)


def _with_values(items: Sequence[Any], values: Items) -> list[Any]:
    """Return `values` as results, wrapped in slices where the gradient is one."""
    return [
        item.with_values(own) if type(item) is IndexedSlices else own
        for item, own in zip(items, values, strict=True)
    ]

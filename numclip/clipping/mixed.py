"""Gradients that are plain arrays, sparse or nested, clipped as `numclip.host.lists` does.

As there: a function does the whole job with the bits of the general way, or returns None and
has touched nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numclip.border.structures import structure
from numclip.host import lists, outs, plain_rows
from numclip.host.kernels.spans import GIVEN
from numclip.host.nests import Items
from numclip.isolation import isolated
from numclip.slices import Grouping, IndexedSlices
from numclip.tables import PROPAGATE


def global_norm(grads: Any, ord: float, duplicates: str) -> float | None:
    """Return the norm of gradients."""
    if not isinstance(grads, (list, tuple, dict)):
        return None
    taken = _taken(structure(grads).items, duplicates)
    if taken is None:
        return None
    if not taken.groupings:
        return lists.norm_of(taken.values, ord)
    return _norm_of_rows(*taken) if ord == 2.0 else None


def clip_by_global_norm(
    grads: Any, bound: float, out: Any, ord: float, what: int, given: float, duplicates: str
) -> tuple[Any, float] | None:
    """Clip gradients by their joint norm, in place or into new ones; return both."""
    if not outs.takes(grads, out) or not isinstance(grads, (list, tuple, dict)):
        return None
    found = structure(grads)
    taken = _taken(found.items, duplicates)
    if taken is None:
        return None
    if not taken.groupings:
        clipped = lists.clip_items(taken.values, out is not None, bound, ord, what, given)
    elif ord == 2.0 and not what & GIVEN:
        clipped = _clip_rows(*taken, bound, in_place=out is not None)
    else:
        return None
    if clipped is None:
        return None
    results = found.items if out is not None else _with_values(found.items, clipped[0])
    return found.rebuild(results), clipped[1]


def clip_slices(grad: Any, bound: float, out: Any, ord: float) -> Any:
    """Clip slices by their norm, in place or into new ones; return these."""
    if type(grad) is not IndexedSlices or not (out is None or out is grad):
        return None
    place = None if out is None else [grad]
    found = clip_by_global_norm([grad], bound, place, ord, PROPAGATE, 0.0, "sum")
    return None if found is None else found[0][0]


class _Taken(NamedTuple):
    """Gradients with the values of slices for these, and which of their rows are to be summed."""

    values: Items
    groupings: dict[int, Grouping]


def _taken(items: Sequence[Any], duplicates: str) -> _Taken | None:
    """Return gradients taken so; None where there is not one row for each index."""
    values, groupings = [], {}
    for t, item in enumerate(items):
        if type(item) is not IndexedSlices:
            values.append(item)
            continue
        if item.values.shape[0] != item.indices.size:
            return None
        if duplicates == "sum" and item.has_duplicates:
            groupings[t] = item.grouping
        values.append(item.values)
    return _Taken(tuple(values), groupings)


_norm_of_rows, _clip_rows = isolated(plain_rows.norm_of), isolated(plain_rows.clip_items)


def _with_values(items: Sequence[Any], values: Items) -> list[Any]:
    """Return results, as slices where gradients are."""
    return [
        item.with_values(own) if type(item) is IndexedSlices else own
        for item, own in zip(items, values, strict=True)
    ]

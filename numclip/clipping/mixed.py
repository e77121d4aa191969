"""Gradients that are plain arrays, sparse or nested, clipped as `numclip.host.lists` does.

As there: a function does the whole job with the bits of the general way, or returns None and
has touched nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numclip.border.structures import structure
from numclip.host import lists, outs
from numclip.host.nests import Items
from numclip.slices import IndexedSlices


def global_norm(grads: Any, ord: float) -> float | None:
    """Return the norm of gradients."""
    if not isinstance(grads, (list, tuple, dict)):
        return None
    values = _values(structure(grads).items)
    return None if values is None else lists.norm_of(values, ord)


def clip_by_global_norm(
    grads: Any, bound: float, out: Any, ord: float, what: int, given: float
) -> tuple[Any, float] | None:
    """Clip gradients by their joint norm, in place or into new ones; return both."""
    if not outs.takes(grads, out) or not isinstance(grads, (list, tuple, dict)):
        return None
    found = structure(grads)
    values = _values(found.items)
    if values is None:
        return None
    clipped = lists.clip_items(values, out is not None, bound, ord, what, given)
    if clipped is None:
        return None
    results = found.items if out is not None else _with_values(found.items, clipped[0])
    return found.rebuild(results), clipped[1]


def _values(items: Sequence[Any]) -> Items | None:
    """Return gradients with the values of slices for these; None where their rows repeat.

    And where there is not one row for each index, which the general way refuses.
    """
    sparse = [item for item in items if type(item) is IndexedSlices]
    if any(own.has_duplicates or own.values.shape[0] != own.indices.size for own in sparse):
        return None
    return tuple([item.values if type(item) is IndexedSlices else item for item in items])


def _with_values(items: Sequence[Any], values: Items) -> list[Any]:
    """Return results, as slices where gradients are."""
    return [
        item.with_values(own) if type(item) is IndexedSlices else own
        for item, own in zip(items, values, strict=True)
    ]

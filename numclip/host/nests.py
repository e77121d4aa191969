"""Plain lists, tuples and dicts of arrays, nested or not: opened, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = frozenset((dict, list, tuple))

Items = tuple[Any, ...]


class Opened(NamedTuple):
    """What a level was: its type, its keys, and for each of its items a level, None for others.

    The items are elsewhere, those of all levels in one list.
    """

    kind: type
    keys: Any
    parts: list[Opened | None]


def opened(level: Any, items: list[Any]) -> Opened | None:
    """Add the arrays of a nest to `items`; return how it was made, None where it has others."""
    kind = type(level)
    held: Any = level.copy() if kind is dict else tuple(level)  # another thread may change it
    parts: list[Opened | None] = []
    for item in held.values() if kind is dict else held:
        inner = None
        if type(item) in KINDS:
            inner = opened(item, items)
            if inner is None:
                return None
        elif item is None or type(item) is np.ndarray:
            items.append(item)
        else:
            return None
        parts.append(inner)
    return Opened(kind, held, parts)


def closed(nest: Opened, results: Iterator[Any]) -> Any:
    """Return a nest made like another, of results."""
    kind, keys, parts = nest
    made = [next(results) if part is None else closed(part, results) for part in parts]
    if kind is dict:
        return dict(zip(keys, made, strict=True))
    return made if kind is list else tuple(made)


def items_of(grads: Any) -> Items:
    """Return the entries of a plain list, tuple or dict, which stay while the tuple does."""
    of = type(grads)
    if of is list or of is tuple:
        return tuple(grads)
    return tuple(grads.values()) if of is dict else ()


def is_nest(items: Items) -> bool:
    """Tell whether an entry is a list, tuple or dict."""
    return not KINDS.isdisjoint(map(type, items))


def taken(grads: Any, *, is_nested: bool = False) -> tuple[Items, Any]:
    """Return the arrays of a list, tuple or dict, nested or not, and what `rebuilt` makes one of.

    No arrays where it is none, or has other entries deep in it. One whose first entry is none of
    these is not opened without `is_nested`: to look at each takes 40 ns.
    """
    held = held_still(grads)
    items = items_of(held)
    if not items or not (is_nested or type(items[0]) in KINDS):
        return items, held
    found: list[Any] = []
    try:
        nest = opened(held, found)
    except RecursionError:  # the general way says so
        nest = None
    return ((), held) if nest is None else (tuple(found), nest)


def held_still(grads: Any) -> Any:
    """Return a structure whose keys no other thread changes."""
    return grads.copy() if type(grads) is dict else grads


def rebuilt(held: Any, results: Items, out: Any) -> Any:
    """Return results in the structure of a list, tuple or dict, nested or not."""
    if type(held) is Opened:
        return closed(held, iter(results))
    if type(held) is dict:
        return held if out is not None else dict(zip(held, results, strict=True))
    return [*results] if type(held) is list else results

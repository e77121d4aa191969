"""Lists, tuples and dicts of arrays, nested or not: flattened to a tuple and rebuilt from it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = frozenset((dict, list, tuple))

Items = tuple[Any, ...]


class Opened(NamedTuple):
    """A level of a nested structure: its type, a copy of it, and an `Opened` for each container.

    `parts` has None for each other item. The items of all levels are in one list, outside.
    """

    kind: type
    keys: Any
    parts: list[Opened | None]


def opened(level: Any, items: list[Any]) -> Opened | None:
    """Append a nested structure's arrays to `items`; return its `Opened`.

    None if an entry is neither None, an ndarray nor a container.
    """
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
    """Return the results in the nested structure that `nest` describes."""
    kind, keys, parts = nest
    made = [next(results) if part is None else closed(part, results) for part in parts]
    if kind is dict:
        return dict(zip(keys, made, strict=True))
    return made if kind is list else tuple(made)


def items_of(grads: Any) -> Items:
    """Return a tuple of the entries of a list, tuple or dict, which it keeps alive; else ()."""
    of = type(grads)
    if of is list or of is tuple:
        return tuple(grads)
    return tuple(grads.values()) if of is dict else ()


def is_nest(items: Items) -> bool:
    """Tell whether an entry is a list, tuple or dict."""
    return not KINDS.isdisjoint(map(type, items))


def taken(grads: Any, *, is_nested: bool = False) -> tuple[Items, Any]:
    """Return (items, held): the entries of a structure, and the structure for `rebuilt`.

    No items if `grads` is no list, tuple or dict, or if `opened` returns None. Without `is_nested`
    entries are flattened only if the first one is a container: a look at each takes 40 ns.
    """
    held = held_still(grads)
    items = items_of(held)
    if not items or not (is_nested or type(items[0]) in KINDS):
        return items, held
    found: list[Any] = []
    try:
        nest = opened(held, found)
    except RecursionError:  # the general path raises it
        nest = None
    return ((), held) if nest is None else (tuple(found), nest)


def held_still(grads: Any) -> Any:
    """Return a copy of a dict, whose keys other threads could change, else `grads` itself."""
    return grads.copy() if type(grads) is dict else grads


def rebuilt(held: Any, results: Items, out: Any) -> Any:
    """Return results in the structure `held`; in place, return `held` itself if it is a dict."""
    if type(held) is Opened:
        return closed(held, iter(results))
    if type(held) is dict:
        return held if out is not None else dict(zip(held, results, strict=True))
    return [*results] if type(held) is list else results

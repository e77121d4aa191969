"""Plain lists, tuples and dicts of arrays, nested in one another: opened, and closed again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

KINDS = dict, list, tuple


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

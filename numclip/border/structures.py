"""Lists, tuples and dicts of gradients, nested or not: taken apart, and made again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from numclip import libraries
from numclip.errors import expected
from numclip.slices import IndexedSlices

Key = int | str | tuple[Any, ...]
"""A position or a key, or the path of them where structures are nested."""

Rebuild = Callable[[list[Any]], Any]


class Structure(NamedTuple):
    """The items of a structure by their keys, and what makes such a one of other items."""

    name: str
    keys: list[Key]
    items: list[Any]
    rebuild: Rebuild

    def named(self, name: str) -> Structure:
        """Return the structure under another name."""
        return self._replace(name=name)

    def name_of(self, key: Key) -> str:
        """Return what errors call an item."""
        path = key if isinstance(key, tuple) else (key,)
        return self.name + "".join(f"[{step!r}]" for step in path)


def structure(grads: Any, name: str = "grads") -> Structure:
    """Return the items of a list, tuple, dict or iterator, of what is nested in it likewise."""
    single = isinstance(grads, (IndexedSlices, str, bytes)) or libraries.is_array(grads)
    if single or not isinstance(grads, Iterable):
        advice = f"{type(grads).__name__}; pass a single gradient as [gradient]"
        raise TypeError(expected(name, "a list, tuple or dict of gradients", advice))
    keys, items, rebuild = _level(grads)
    if not any(map(_is_nested, items)):
        return Structure(name, keys, items, rebuild)
    return _flattened(name, keys, items, rebuild)


def _is_nested(item: Any) -> bool:
    """Tell whether an item holds gradients; a list of numbers is one that is no array yet."""
    if isinstance(item, (list, tuple)):
        return not any(isinstance(inner, (int, float, complex)) for inner in item)
    return isinstance(item, Mapping)


def _level(grads: Any) -> tuple[list[Key], list[Any], Rebuild]:
    """Return the keys and items of one level, and what makes one like it."""
    if isinstance(grads, Mapping):
        keys = list(grads.keys())
        return keys, list(grads.values()), lambda results: _mapping_like(grads, keys, results)
    items = list(grads)
    if isinstance(grads, tuple):
        return list(range(len(items))), items, getattr(type(grads), "_make", tuple)
    return list(range(len(items))), items, list


def _mapping_like(given: Mapping[Any, Any], keys: list[Any], results: list[Any]) -> Any:
    """Return a mapping of the same type with other values."""
    made = dict(zip(keys, results, strict=True))
    if type(given) is dict:
        return made
    if isinstance(given, dict):
        other = copy.copy(given)  # with its attributes, a default factory for instance
        other.update(made)
        return other
    try:
        return type(given)(made)  # type: ignore[call-arg]
    except TypeError:
        return made


def _flattened(name: str, keys: list[Any], items: list[Any], rebuild: Rebuild) -> Structure:
    """Return the items of all levels as those of one."""
    paths: list[Key] = []
    flat: list[Any] = []
    parts: list[tuple[int, Rebuild | None]] = []
    for key, item in zip(keys, items, strict=True):
        if not _is_nested(item):
            paths.append(key)
            flat.append(item)
            parts.append((1, None))
            continue
        inner = _flattened(name, *_level(item))
        paths += [(key, *path) if type(path) is tuple else (key, path) for path in inner.keys]
        flat += inner.items
        parts.append((len(inner.items), inner.rebuild))

    def rebuilt(results: list[Any]) -> Any:
        remaining = iter(results)
        return rebuild([_part(remaining, *part) for part in parts])

    return Structure(name, paths, flat, rebuilt)


def _part(remaining: Iterator[Any], count: int, rebuild: Rebuild | None) -> Any:
    """Return the next item of a level, made of the next results."""
    if rebuild is None:
        return next(remaining)
    return rebuild([next(remaining) for _ in range(count)])

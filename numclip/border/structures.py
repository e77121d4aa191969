"""Lists, tuples and dicts of gradients, nested or not: flattened, and rebuilt."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableSequence
from typing import Any, NamedTuple

import numpy as np

from numclip import libraries
from numclip.errors import expected
from numclip.slices import IndexedSlices

Key = int | str | tuple[Any, ...]
"""A position or a key; in nested structures, the path of them."""

Rebuild = Callable[[list[Any]], Any]


class Structure(NamedTuple):
    """The keys and items of a structure, what rebuilds it from other items, and the source."""

    name: str
    keys: list[Key]
    items: list[Any]
    rebuild: Rebuild
    source: Any

    def named(self, name: str) -> Structure:
        """Return the structure under another name."""
        return self._replace(name=name)

    def name_of(self, key: Key) -> str:
        """Return an item's name in error messages."""
        path = key if isinstance(key, tuple) else (key,)
        return self.name + "".join(f"[{step!r}]" for step in path)

    def item(self, key: Key) -> tuple[str, Any]:
        """Return the name of a key's item in error messages, and the item."""
        name = self.name_of(key)
        if key not in self.keys:
            raise ValueError(expected(self.name, f"an entry {name}", f"only {self.keys[:5]}"))
        return name, self.items[self.keys.index(key)]


def structure(grads: Any, name: str = "grads") -> Structure:
    """Return the `Structure` of a list, tuple, dict or iterator, flattened if it is nested."""
    if type(grads) not in (list, tuple, dict) and not _has_items(grads):
        advice = f"{type(grads).__name__}; pass a single gradient as [gradient]"
        raise TypeError(expected(name, "a list, tuple or dict of gradients", advice))
    keys, items, rebuild = _level(grads)
    if not any(map(_is_nested, items)):
        return Structure(name, keys, items, rebuild, grads)
    with _depth_checked(name):
        return _flattened(name, grads, keys, items, rebuild)


@contextlib.contextmanager
def _depth_checked(name: str) -> Iterator[None]:
    """Name the argument in the error for a structure that is nested too deeply or holds itself."""
    try:
        yield
    except RecursionError:
        got = "a structure that holds itself, or of too many levels"
        raise ValueError(expected(name, "gradients, nested or not", got)) from None


def is_structure(grads: Any) -> bool:
    """Tell whether an argument that may be a single gradient is a structure of them."""
    if isinstance(grads, (list, tuple)):
        return _is_nested(grads)
    return isinstance(grads, (Mapping, MutableSequence, Iterator))


def _has_items(grads: Any) -> bool:
    """Tell whether an object of another type can be taken as a list, tuple or dict."""
    many = isinstance(grads, Iterable) and not isinstance(grads, (IndexedSlices, str, bytes))
    return many and (isinstance(grads, Mapping) or not libraries.is_array(grads))


def _is_nested(item: Any) -> bool:
    """Tell whether an item is a container of gradients; a list of numbers is one gradient."""
    kind = type(item)
    if kind is np.ndarray or item is None:  # most often; a check for Mapping takes 0.5 us
        return False
    if isinstance(item, (list, tuple)):
        return not any(isinstance(inner, (int, float, complex)) for inner in item)
    return kind is dict or isinstance(item, Mapping)


def _level(grads: Any) -> tuple[list[Key], list[Any], Rebuild]:
    """Return the keys and items of one level, and a function that rebuilds it."""
    if type(grads) is dict or isinstance(grads, Mapping):
        keys = list(grads.keys())
        return keys, list(grads.values()), lambda results: _mapping_like(grads, keys, results)
    items = list(grads)
    if isinstance(grads, tuple):
        return list(range(len(items))), items, getattr(type(grads), "_make", tuple)
    if isinstance(grads, MutableSequence) and type(grads) is not list:
        return list(range(len(items))), items, lambda results: _sequence_like(grads, results)
    return list(range(len(items))), items, list


def _mapping_like(given: Mapping[Any, Any], keys: list[Any], results: list[Any]) -> Any:
    """Return a mapping of the same type with other values."""
    made = dict(zip(keys, results, strict=True))
    if type(given) is dict:
        return made
    other: Any
    try:
        # A copy keeps attributes, a default factory for instance; in some dicts they are the keys.
        if isinstance(given, dict) and getattr(given, "__dict__", None) is not given:
            other = copy.copy(given)
            other.update(made)
        else:
            other = type(given)(made)  # type: ignore[call-arg]
    except libraries.REFUSALS:
        return made
    return other if type(other) is type(given) and list(other.keys()) == keys else made


def _sequence_like(given: MutableSequence[Any], results: list[Any]) -> Any:
    """Return a sequence of the same type with other items."""
    try:
        other = copy.copy(given)
        other[:] = results
    except libraries.REFUSALS:
        return results
    return other if type(other) is type(given) and other is not given else results


def _flattened(
    name: str, source: Any, keys: list[Any], items: list[Any], rebuild: Rebuild
) -> Structure:
    """Return the `Structure` whose items are those of all levels."""
    paths: list[Key] = []
    flat: list[Any] = []
    parts: list[tuple[int, Rebuild | None]] = []
    for key, item in zip(keys, items, strict=True):
        if not _is_nested(item):
            paths.append(key)
            flat.append(item)
            parts.append((1, None))
            continue
        inner = _flattened(name, item, *_level(item))
        paths += [(key, *path) if type(path) is tuple else (key, path) for path in inner.keys]
        flat += inner.items
        parts.append((len(inner.items), inner.rebuild))

    def rebuilt(results: list[Any]) -> Any:
        remaining = iter(results)
        return rebuild([_part(remaining, *part) for part in parts])

    return Structure(name, paths, flat, rebuilt, source)


def _part(remaining: Iterator[Any], count: int, rebuild: Rebuild | None) -> Any:
    """Return the next item of a level, rebuilt from the next results."""
    if rebuild is None:
        return next(remaining)
    return rebuild([next(remaining) for _ in range(count)])


def dotted(tree: Any, name: str) -> dict[str, Any]:
    """Return the items of a mapping, list or tuple, nested or not, by their keys joined with dots.

    Keys of mappings are strings; an item of a list or tuple has its position.
    """
    if not isinstance(tree, (Mapping, list, tuple)):
        raise TypeError(expected(name, "a mapping by name, nested or not", type(tree).__name__))
    found: dict[str, Any] = {}
    with _depth_checked(name):
        _add_dotted(tree, name, "", found)
    return found


def _add_dotted(level: Any, name: str, prefix: str, found: dict[str, Any]) -> None:
    """Add the items of one level, and of those below."""
    is_mapping = isinstance(level, Mapping)
    for key, item in level.items() if is_mapping else enumerate(level):
        if is_mapping and not isinstance(key, str):
            raise TypeError(f"{name}: expected str names, got {key!r}")
        if _is_nested(item):
            _add_dotted(item, name, f"{prefix}{key}.", found)
        elif f"{prefix}{key}" in found:
            raise ValueError(f"{name}: two items have the name {prefix + str(key)!r}")
        else:
            found[f"{prefix}{key}"] = item


class Outline:
    """The types and keys of a structure of dicts, lists and tuples, by which others are compared.

    `names` are those of its items, as `dotted` has them. An entry that is an item in the
    structure is taken as an item in the others.
    """

    def __init__(self, tree: Any, prefix: str = "") -> None:
        self.names: list[str] = []
        self._kind, self._is_mapping = type(tree), isinstance(tree, Mapping)
        self._keys: Any = tuple(tree) if self._is_mapping else range(len(tree))
        self._parts: list[Outline | None] = []
        for key, item in zip(self._keys, self._values(tree), strict=True):
            part = Outline(item, f"{prefix}{key}.") if _is_nested(item) else None
            self.names += [f"{prefix}{key}"] if part is None else part.names
            self._parts.append(part)
        self._flat = all(part is None for part in self._parts)

    def items(self, tree: Any) -> list[Any] | None:
        """Return a structure's items in the order of `names`; None if types or keys differ."""
        if type(tree) is not self._kind:
            return None
        held = dict(tree) if self._is_mapping else tuple(tree)  # another thread may change it
        if len(held) != len(self._keys) or (self._is_mapping and tuple(held) != self._keys):
            return None
        values = list(self._values(held))
        if self._flat:
            return values
        found: list[Any] = []
        for part, item in zip(self._parts, values, strict=True):
            if part is None:
                found.append(item)
                continue
            inner = part.items(item)
            if inner is None:
                return None
            found += inner
        return found

    def _values(self, tree: Any) -> Any:
        return tree.values() if self._is_mapping else tree

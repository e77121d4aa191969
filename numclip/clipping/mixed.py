"""Gradients that hold little, of several dtypes, strided, sparse or nested, without a plan.

As in `numclip.host.lists`: a function does the whole job with the bits of the general way, or
returns None and has touched nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.border.structures import Structure, structure
from numclip.dtypes import Array
from numclip.host import batches, lists
from numclip.host.batches import Batch
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.lists import Measure
from numclip.host.runtime import threads
from numclip.memory import is_nested, owner_of
from numclip.slices import IndexedSlices


class Values(NamedTuple):
    """The values of gradients, contiguous; `backs` are strided arrays and the copies of these."""

    arrays: list[Array | None]
    backs: list[tuple[Array, Array]]


def global_norm(grads: Any, ord: float) -> float | None:
    """Return the norm of gradients, of the order 2 or infinite."""
    if not isinstance(grads, (list, tuple, dict)):
        return None
    found = structure(grads)
    if _is_flattened(found, grads):
        norm = lists.global_norm(found.items, ord)
        if norm is not None:
            return norm
    values = _values(found.items, in_place=False)
    parts = None if values is None else _parts(values.arrays, write=False)
    known = lists.decided(parts, len(found.items), math.inf, Measure(ord)) if parts else None
    return None if known is None else known[0]


def clip_by_global_norm(grads: Any, bound: float, out: Any, ord: float) -> tuple[Any, float] | None:
    """Clip gradients by their joint norm, in place or into new ones; return both."""
    if not (out is None or out is grads) or not isinstance(grads, (list, tuple, dict)):
        return None
    found = structure(grads)
    if _is_flattened(found, grads):
        target = None if out is None else found.items
        done = lists.clip_by_global_norm(found.items, bound, target, ord)
        if done is not None:
            return found.rebuild(done[0]), done[1]
    clipped = _clip(found.items, bound, ord, in_place=out is not None)
    return None if clipped is None else (found.rebuild(clipped[0]), clipped[1])


def _is_flattened(found: Structure, grads: Any) -> bool:
    """Tell whether gradients are nested, or in no plain list, tuple or dict."""
    nested = any(type(key) is tuple for key in found.keys)
    return nested or type(grads) not in (list, tuple, dict)


def _clip(
    items: list[Any], bound: float, ord: float, *, in_place: bool
) -> tuple[list[Any], float] | None:
    values = _values(items, in_place=in_place)
    if values is None:
        return None
    results = items
    if not in_place:  # copies stay in the cache: a third faster than to read and write apart
        copied = {id(copy) for _, copy in values.backs}
        arrays = [
            own if own is None or id(own) in copied else own.copy("K") for own in values.arrays
        ]
        values = Values(arrays, [])
        results = [
            item.with_values(array) if type(item) is IndexedSlices else array
            for item, array in zip(items, arrays, strict=True)
        ]
    parts = _parts(values.arrays, write=True)
    found = lists.decided(parts, len(items), bound, Measure(ord)) if parts else None
    if parts is None or found is None:
        return None
    norm, factor = found
    if factor != 1.0:
        _write(parts, np.full(len(items), factor), values.backs)
    return results, norm


def _values(items: Sequence[Any], *, in_place: bool) -> Values | None:
    """Return the values of gradients, copies of strided ones; None where there are others."""
    arrays: list[Array | None] = []
    strided = []
    nbytes = 0
    for k, item in enumerate(items):
        values = item.values if type(item) is IndexedSlices else item
        arrays.append(values)
        if item is None:
            continue
        if type(values) is not np.ndarray or lists.kind_of((values,)) is None:
            return None
        nbytes += values.nbytes
        if nbytes >= PARALLEL_BYTES or (values is not item and item.has_duplicates):
            return None
        if not (values.flags.forc and values.flags.aligned):
            strided.append((k, values))
    if in_place and not (all(_is_writeable(own) for _, own in strided) and _are_apart(arrays)):
        return None
    backs = []
    for k, own in strided:
        arrays[k] = copy = own.copy("C")
        backs.append((own, copy))
    return Values(arrays, backs) if arrays else None


def _parts(arrays: Sequence[Array | None], *, write: bool) -> list[Batch] | None:
    """Return the arrays of each dtype as a batch; None where one cannot be read or written."""
    kinds: dict[Any, list[Array | None]] = {}
    for number, array in enumerate(arrays):
        if array is not None:
            key = array.dtype
            if key not in kinds:
                kinds[key] = [None] * len(arrays)
            kinds[key][number] = array
    parts = []
    for own in kinds.values():
        held = tuple(own)
        kind = lists.kind_of(held)
        assert kind is not None
        batch, _ = lists.batch_of(held, kind, kind.writeable if write else kind.readable)
        if batch is None:
            return None
        parts.append(batch)
    return parts


def _is_writeable(array: Array) -> bool:
    return array.flags.writeable and is_nested(array.shape, array.strides, array.itemsize)


def _are_apart(arrays: Sequence[Array | None]) -> bool:
    """Tell whether each array is in memory that is owned by an array of its own."""
    every = [array for array in arrays if array is not None]
    owners = {id(owner): owner for owner in map(owner_of, every)}
    plain = all(type(own) is np.ndarray and own.flags.owndata for own in owners.values())
    return plain and len(owners) == len(every)


def _write(parts: Sequence[Batch], factors: Array, backs: Sequence[tuple[Array, Array]]) -> None:
    """Multiply gradients by their factor, and bring copies back: all of it, or nothing."""
    calls = [batches.scaling(part, factors) for part in parts]
    if not backs:
        threads.run_all(calls)
        return

    def bring_back() -> None:
        for array, copy in backs:
            array[...] = copy

    threads.run_then(calls, bring_back)

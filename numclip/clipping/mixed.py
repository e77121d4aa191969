"""Gradients that hold little, of several dtypes, strided or sparse, clipped without a plan.

As in `numclip.host.lists`: a function does the whole job with the bits of the general way, or
returns None and has touched nothing.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType
from numclip.host import batches, lists
from numclip.host.batches import Batch
from numclip.kernels import cpu, joint, threads
from numclip.kernels.tuning import PARALLEL_BYTES
from numclip.memory import is_nested, owner_of
from numclip.slices import IndexedSlices


class Values(NamedTuple):
    """The values of gradients, contiguous; `backs` are strided arrays and the copies of these."""

    arrays: list[Array | None]
    backs: list[tuple[Array, Array]]


def global_norm(grads: Any) -> float | None:
    """Return the L2 norm of gradients."""
    values = _values(lists.items_of(grads), in_place=False)
    found = None if values is None else _decided(values, math.inf, write=False)
    return None if found is None else found[0]


def clip_by_global_norm(grads: Any, bound: float, out: Any) -> tuple[Any, float] | None:
    """Clip gradients by their joint L2 norm, in place or into new ones; return both."""
    if not (out is None or out is grads):
        return None
    held = grads.copy() if type(grads) is dict else grads  # another thread may change its keys
    items = lists.items_of(held)
    values = _values(items, in_place=out is grads)
    if values is None:
        return None
    results: Sequence[Any] = items
    if out is None:
        copied = {id(copy) for _, copy in values.backs}
        arrays = [
            own if own is None or id(own) in copied else own.copy("K") for own in values.arrays
        ]
        values = Values(arrays, [])
        results = [
            item.with_values(array) if type(item) is IndexedSlices else array
            for item, array in zip(items, arrays, strict=True)
        ]
    found = _decided(values, bound, write=True)
    if found is None:
        return None
    norm, factor, parts = found
    if factor != 1.0:
        _write(parts, np.full(len(items), factor), values.backs)
    if type(held) is dict:
        return held if out is grads else dict(zip(held, results, strict=True)), norm
    return type(held)(results), norm


def _values(items: Sequence[Any], *, in_place: bool) -> Values | None:
    """Return the values of gradients, copies of strided ones; None where there are others."""
    arrays: list[Array | None] = []
    backs = []
    nbytes = 0
    for item in items:
        values = item
        if type(item) is IndexedSlices:
            values = None if item.has_duplicates else item.values
        if values is None and item is None:
            arrays.append(None)
            continue
        if type(values) is not np.ndarray or lists.kind_of((values,)) is None:
            return None
        nbytes += values.nbytes
        if nbytes >= PARALLEL_BYTES:
            return None
        if not (values.flags.forc and values.flags.aligned):
            if in_place and not _is_writeable(values):
                return None
            backs.append((values, values.copy("C")))
            values = backs[-1][1]
        arrays.append(values)
    if in_place and not _are_apart(arrays, backs):
        return None
    return Values(arrays, backs) if arrays else None


def _is_writeable(array: Array) -> bool:
    return array.flags.writeable and is_nested(array.shape, array.strides, array.itemsize)


def _are_apart(arrays: Sequence[Array | None], backs: Sequence[tuple[Array, Array]]) -> bool:
    """Tell whether each array is in memory that is owned by an array of its own."""
    every = [*(array for array in arrays if array is not None), *(array for array, _ in backs)]
    owners = {id(owner): owner for owner in map(owner_of, every)}
    plain = all(type(own) is np.ndarray and own.flags.owndata for own in owners.values())
    return plain and len(owners) == len(every)


def _decided(
    values: Values, bound: float, *, write: bool
) -> tuple[float, float, list[Batch]] | None:
    """Return the norm, the factor, and the gradients of each dtype; None if they need care."""
    kinds: dict[Any, list[Array | None]] = {}
    for number, array in enumerate(values.arrays):
        if array is not None:
            key = array.dtype
            if key not in kinds:
                kinds[key] = [None] * len(values.arrays)
            kinds[key][number] = array
    parts, partials = [], []
    for arrays in kinds.values():
        held = tuple(arrays)
        kind = lists.kind_of(held)
        assert kind is not None
        batch, _ = lists.batch_of(held, kind, kind.writeable if write else kind.readable)
        if batch is None:
            return None
        partial = np.empty(len(batch.chunks))
        cpu.sum_squares(0, len(partial), batch.chunks, batch.dtype.like, partial)
        parts.append(batch)
        partials.append(partial)
    if not parts:
        return None
    chunks, partial = np.concatenate([part.chunks for part in parts]), np.concatenate(partials)
    strict, limits = _limits(tuple(part.dtype for part in parts))
    norm, right = joint.joined(chunks, partial, strict, np.zeros(len(values.arrays)))
    if not right:
        return None
    elements = sum(part.nbytes // part.dtype.storage.itemsize for part in parts)
    factor, truncate = joint.decide(norm, bound, math.sqrt(elements), 1.0, limits)
    return None if truncate else (norm, factor, parts)


@functools.lru_cache(maxsize=64)
def _limits(rows: tuple[DType, ...]) -> tuple[Array, Array]:
    """Return what `joint.joined` and `joint.decide` are told of gradients of some dtypes."""
    every = np.array([row.limits for row in rows])
    strict, limits = every.max(axis=0), every.max(axis=0)
    limits[joint.DIGITS] = every[:, joint.DIGITS].min()
    return strict, limits


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

"""Where results go: new arrays, the gradients themselves, or arrays the user gives.

Everything is checked before anything is written.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import foreign
from numclip.dtypes import Array
from numclip.inputs import Entry, Gradients, flat_view, gradients
from numclip.slices import IndexedSlices


class Place(NamedTuple):
    """Where one result goes: contiguous storage, and the array it is copied to if `staged`.

    `fortran` says that a staged copy is in Fortran order, as the gradient it is made from.
    """

    result: Any
    flat: Array
    array: Array
    in_place: bool
    staged: bool
    fortran: bool = False

    def finish(self) -> None:
        """Bring what was written to a copy into the user's array."""
        if self.staged:
            written = self.flat.view(self.array.dtype)
            shape = self.array.shape
            ordered = written.reshape(shape[::-1]).T if self.fortran else written.reshape(shape)
            self.array[...] = ordered


def in_place(entry: Entry) -> Place:
    """Return the place of a gradient that is contiguous storage itself."""
    return Place(entry.values, entry.flat, entry.values, in_place=True, staged=False)


def _new(entry: Entry) -> Place:
    """Return a place in a new array; a private copy of the gradient serves as one."""
    if entry.private:
        dtype = entry.values.dtype.newbyteorder("=")
        array = entry.flat.view(dtype).reshape(entry.values.shape)
        flat = entry.flat
    else:
        flat = np.empty_like(entry.flat)
        shape, native = entry.values.shape, flat.view(entry.values.dtype)
        fortran = not entry.values.flags.c_contiguous
        array = native.reshape(shape[::-1]).T if fortran else native.reshape(shape)
    result = array if entry.slices is None else entry.slices.with_values(array)
    return Place(result, flat, array, in_place=False, staged=False)


def _written_array(entry: Entry, out: Any, name: str) -> Array:
    """Return the array to write where the user gives `out`, after checking that it fits."""
    if entry.slices is not None:
        if not isinstance(out, IndexedSlices):
            raise TypeError(f"{name}: expected IndexedSlices, got {type(out).__name__}")
        same = (out.dense_shape, out.indices.shape) == (
            entry.slices.dense_shape,
            entry.slices.indices.shape,
        )
        # Not `numpy.array_equal`, which takes a signal's exception for a difference.
        if not (same and bool((out.indices == entry.slices.indices).all())):
            raise ValueError(f"{name}: expected the indices and dense_shape of {entry.name}")
        out = out.values
    array = out if isinstance(out, np.ndarray) else foreign.as_numpy(name, out)
    if array is None or isinstance(array, np.ma.MaskedArray):
        raise TypeError(f"{name}: expected an array to write to, got {type(out).__name__}")
    if array is not entry.values:
        _check_fit(entry, array, name)
    check_writeable(array, name)
    return array


def check_writeable(out: Array, name: str) -> None:
    """Refuse an array that cannot be written element by element."""
    if not out.dtype.isnative:
        raise TypeError(f"{name}: expected native byte order, got {out.dtype.str}")
    if not out.flags.writeable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    if (
        out.size
        and 0 in out.strides
        and any(n > 1 and not step for n, step in zip(out.shape, out.strides, strict=True))
    ):
        raise ValueError(f"{name}: expected distinct elements, got strides {out.strides}")


def _check_fit(entry: Entry, out: Array, name: str) -> None:
    if out.shape != entry.values.shape:
        raise ValueError(f"{name}: expected shape {entry.values.shape}, got {out.shape}")
    if out.dtype != entry.native.dtype:
        raise TypeError(f"{name}: expected dtype {entry.native.dtype}, got {out.dtype}")


def _same_memory(a: Array, b: Array) -> bool:
    return bool(a.ctypes.data == b.ctypes.data and a.strides == b.strides)


def _given(entry: Entry, out: Any, name: str) -> Place:
    """Return a place in the array the user gives."""
    array = _written_array(entry, out, name)
    if array is entry.values or _same_memory(array, entry.values):
        return Place(out, entry.flat, array, in_place=True, staged=entry.private)
    like_order = entry.private or entry.values.flags.c_contiguous
    ordered = array.flags.c_contiguous if like_order else array.flags.f_contiguous
    flat = flat_view(array) if ordered else None
    if flat is None:
        staging = np.empty_like(entry.flat)
        return Place(out, staging, array, in_place=False, staged=True, fortran=not like_order)
    return Place(out, flat, array, in_place=False, staged=False)


def _span(array: Array) -> tuple[int, int]:
    """Return the addresses between which an array lies."""
    if array.size == 0:
        return 0, 0
    if array.flags.forc:
        begin: int = array.ctypes.data
        return begin, begin + array.nbytes
    return np.lib.array_utils.byte_bounds(array)


def _refuse_overlaps(entries: Sequence[Entry], places: Sequence[Place], names: list[str]) -> None:
    """Refuse results that would be written over one another or over a gradient still to read."""
    spans = []
    for source, place in zip(entries, places, strict=True):
        spans.append(_span(place.array))
        if not place.in_place:
            spans.append(_span(source.values))
    spans.sort()
    if all(begin >= end for (_, end), (begin, _) in itertools.pairwise(spans)):
        return
    for k, place in enumerate(places):
        for j in range(len(places)):
            if j < k and np.shares_memory(place.array, places[j].array):
                raise ValueError(f"{names[k]}: shares memory with {names[j]}")
            reads_itself = j == k and place.in_place
            if not reads_itself and np.shares_memory(place.array, entries[j].values):
                raise ValueError(
                    f"{names[k]}: shares memory with {entries[j].name}; "
                    "pass out= the gradients themselves to work in place"
                )


def place_one(entry: Entry, out: Any) -> Place:
    """Return where the result of a single gradient goes."""
    if out is None:
        return _new(entry)
    place = _given(entry, out, "out")
    _refuse_overlaps([entry], [place], ["out"])
    return place


def check_keys(grads: Gradients, keys: Sequence[Any], items: Sequence[Any]) -> None:
    """Refuse results that are not, key for key, where the gradients are."""
    if keys != grads.keys:
        differing = [key for key in (*grads.keys, *keys) if (key in keys) != (key in grads.keys)]
        raise ValueError(
            f"out: expected the {len(grads.keys)} keys of grads in their order, "
            f"got {len(keys)}; only one has {differing[:5]}"
        )
    for key, target, source in zip(keys, items, grads.items, strict=True):
        if (target is None) != (source is None):
            wanted = "None" if source is None else f"an array, as in grads[{key!r}]"
            raise ValueError(f"out[{key!r}]: expected {wanted}, got {type(target).__name__}")


def places(grads: Gradients, given: Any, out: Any) -> list[Place]:
    """Return where the results of several gradients go; `given` is what the user passed."""
    if out is None:
        return [_new(entry) for entry in grads.entries]
    items, keys = grads.items, grads.keys
    if out is not given:
        other = gradients(out, "out")
        items, keys = other.items, other.keys
    check_keys(grads, keys, items)
    names = [f"out[{key!r}]" for key, item in zip(keys, items, strict=True) if item is not None]
    targets = [item for item in items if item is not None]
    found = [
        _given(entry, target, name)
        for entry, target, name in zip(grads.entries, targets, names, strict=True)
    ]
    _refuse_overlaps(grads.entries, found, names)
    return found

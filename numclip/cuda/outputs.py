"""Where results go on the GPU, as `numclip.outputs` says it for the host's memory."""

from __future__ import annotations

import bisect
import itertools
import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda.arrays import DeviceArray
from numclip.cuda.entries import DeviceEntry, describe
from numclip.cuda.protocols import library_of
from numclip.dtypes import Array
from numclip.inputs import Gradients
from numclip.kernels.cuda import device
from numclip.outputs import check_keys


def place(entry: DeviceEntry, out: Any) -> DeviceEntry:
    """Return where the result of a single gradient goes."""
    device.require()
    if out is None:
        return new_like(entry)
    found = target(entry, out, "out")
    refuse_overlaps([entry], [found])
    return found


def targets(grads: Gradients, given: Any, out: Any) -> list[DeviceEntry]:
    """Return where the results of several gradients go; `given` is what the user passed."""
    entries: Sequence[Any] = grads.entries
    if out is None:
        return [new_like(entry) for entry in entries]
    keys, items = grads.keys, grads.items
    if out is not given:
        keys, items, _ = inputs.structure(out, "out")
    check_keys(grads, keys, items)
    pairs = [(key, item) for key, item in zip(keys, items, strict=True) if item is not None]
    found = [
        target(entry, item, f"out[{key!r}]")
        for entry, (key, item) in zip(entries, pairs, strict=True)
    ]
    refuse_overlaps(entries, found)
    return found


def target(entry: DeviceEntry, out: Any, name: str) -> DeviceEntry:
    """Return where a result goes that the user gives, after checking that it fits."""
    if out is entry.result:
        found = entry._replace(name=name)
    else:
        found = describe(name, entry.key, out)
        _check_slices(entry, found)
        if found.shape != entry.shape:
            raise ValueError(f"{name}: expected shape {entry.shape}, got {found.shape}")
        if found.native != entry.native:
            raise TypeError(f"{name}: expected dtype {entry.native}, got {found.native}")
        steps = zip(found.shape, found.strides or (), strict=False)
        if found.size and any(length > 1 and not step for length, step in steps):
            raise ValueError(f"{name}: expected distinct elements, got strides {found.strides}")
    if not found.writable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    return found


def _check_slices(entry: DeviceEntry, found: DeviceEntry) -> None:
    """Refuse a result that is slices where the gradient is none, or has other indices."""
    if (entry.slices is None) != (found.slices is None):
        wanted = "an array" if entry.slices is None else "IndexedSlices"
        raise TypeError(f"{found.name}: expected {wanted}, got {type(found.result).__name__}")
    if entry.slices is not None and found.slices is not None:
        same = np.array_equal(found.slices.indices, entry.slices.indices)
        if not same or found.dense_shape != entry.dense_shape:
            raise ValueError(f"{found.name}: expected the indices and dense_shape of {entry.name}")


def new_like(entry: DeviceEntry) -> DeviceEntry:
    """Return a new array of the library that another one is from, and in memory like that one.

    One that does not fill its memory gives one in C order.
    """
    package, strides = library_of(entry.array), entry.strides if entry.dense else None
    if package == "torch":
        torch = sys.modules[package]
        options = {} if entry.dense else {"memory_format": torch.contiguous_format}
        made = torch.empty_like(entry.array, **options)
    elif package == "cupy":
        made = sys.modules[package].empty_like(entry.array, order="K" if entry.dense else "C")
    else:
        made = _new(entry, entry.shape, strides)
    if entry.slices is not None:
        made = entry.slices.with_values(made)
    return describe("out", 0, made)


def new_of_shape(entry: DeviceEntry, shape: tuple[int, ...]) -> DeviceEntry:
    """Return a new array in C order of the dtype and the library of another one."""
    package = library_of(entry.array)
    if package == "torch":
        made = entry.array.new_empty(shape)
    elif package == "cupy":
        made = sys.modules["cupy"].empty(shape, entry.array.dtype)
    else:
        made = _new(entry, shape, None)
    return describe("out", 0, made)


def _new(entry: DeviceEntry, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Any:
    """Return a new array of ours, or of numba's where another one is of numba."""
    memory = device.allocate(math.prod(shape) * entry.native.itemsize)
    made = DeviceArray(memory, 0, shape, entry.native, strides)
    if library_of(entry.array) == "numba" and entry.native.name != "bfloat16":
        return device.as_array(made)
    return made


def refuse_overlaps(
    entries: Sequence[DeviceEntry],
    targets: Sequence[DeviceEntry],
    advice: str = "pass out= the gradients themselves to work in place",
) -> None:
    """Refuse results that would be written over one another or over a gradient still to read."""
    if not all(entry.dense for entry in (*entries, *targets)):
        _refuse_interleaved(entries, targets, advice)
        return
    spans = sorted((t.address, t.address + t.nbytes, t.name) for t in targets if t.nbytes)
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise _shared(second, first)
    for entry, target in zip(entries, targets, strict=True):
        before = bisect.bisect_left(spans, (entry.address + entry.nbytes,))
        if entry.lies_as(target) or not entry.nbytes or not before:
            continue
        _, end, name = spans[before - 1]
        if entry.address < end:
            raise _shared(name, entry.name, advice)


def _refuse_interleaved(
    entries: Sequence[DeviceEntry], targets: Sequence[DeviceEntry], advice: str
) -> None:
    """Refuse what `refuse_overlaps` does, of arrays that can lie between another's elements."""
    views = {id(entry): _addresses(entry) for entry in (*entries, *targets)}
    for k, target in enumerate(targets):
        for other in targets[:k]:
            if np.shares_memory(views[id(target)], views[id(other)]):
                raise _shared(target.name, other.name)
        for j, entry in enumerate(entries):
            reads_itself = j == k and entry.lies_as(target)
            if not reads_itself and np.shares_memory(views[id(target)], views[id(entry)]):
                raise _shared(target.name, entry.name, advice)


def _shared(name: str, other: str, advice: str = "") -> ValueError:
    return ValueError(f"{name}: shares memory with {other}{advice and '; '}{advice}")


def _addresses(entry: DeviceEntry) -> Array:
    """Return an array of NumPy's at the same addresses, which cannot be read."""

    class Addresses:
        __array_interface__ = {  # noqa: RUF012 - of one object
            "shape": entry.shape,
            "typestr": f"|V{entry.native.itemsize}",
            "data": (entry.address, True),
            "strides": entry.memory.steps,
            "version": 3,
        }

    return np.asarray(Addresses())

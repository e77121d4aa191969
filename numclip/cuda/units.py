"""Clipping arrays on the GPU part by part, as `numclip.units` does on the CPU."""

from __future__ import annotations

import functools
import math
import weakref
from typing import Any, NamedTuple

import numpy as np

from numclip import inputs
from numclip.cuda import outputs
from numclip.cuda.arrays import empty
from numclip.cuda.clipping import with_rows_summed
from numclip.cuda.entries import DeviceEntry, describe, gradients
from numclip.cuda.plans import kept
from numclip.cuda.streams import give_back, stream_of
from numclip.cuda.values import DeviceInt
from numclip.dtypes import Array
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.grouping import RowSpan, sum_rows
from numclip.kernels.cuda.tiling import Strided, Sums
from numclip.kernels.cuda.unit_plan import Family, UnitPlan
from numclip.units import example_bounds


class Limit(NamedTuple):
    """What units are held to: a bound on the norm over some axes, or that over the owner's norm."""

    axes: tuple[int, ...]
    bound: float
    ord: float = 2.0
    owner: DeviceEntry | None = None
    eps: float = 0.0


def clip_by_norm(grad: Any, bound: float, axes: Any, ord: float, out: Any) -> Any:
    """Hold the norm of each unit to a bound, as `functional.clip_by_norm` with axes."""
    entry = describe("grad", 0, grad)
    reduced = inputs.axes_of(axes, len(entry.shape)) or ()
    return _clip(entry, out, Limit(reduced, bound, ord))


def adaptive_clip(grad: Any, param: Any, factor: float, eps: float, axes: Any, out: Any) -> Any:
    """Hold the norm of each unit to a fraction of its parameters', as `functional`'s."""
    entry, owner = describe("grad", 0, grad), describe("param", 0, param)
    if owner.slices is not None or owner.shape != entry.dense_shape:
        raise ValueError(
            f"param: expected an array of the gradient's shape {entry.dense_shape}, "
            f"got {'IndexedSlices' if owner.slices is not None else owner.shape}"
        )
    reduced = inputs.adaptive_axes(axes, len(entry.shape))
    return _clip(entry, out, Limit(reduced, factor, owner=owner, eps=eps))


def _clip(entry: DeviceEntry, out: Any, limit: Limit) -> Any:
    """Scale each unit of a gradient by a factor of its own, rows that repeat as their sums."""
    target = outputs.place(entry, out)
    used = [each for each in (entry, target, limit.owner) if each is not None]
    stream = stream_of(used)
    if not entry.repeated:
        _clip_units(entry, target, limit, stream)
        give_back(stream, used)
        return target.result

    def clip_sums(sums: DeviceEntry) -> bool:
        return _clip_units(sums, sums, limit, stream, _unrounded(entry, sums.shape, stream))

    found = with_rows_summed(entry, target, out, stream, clip_sums)
    give_back(stream, used)
    return found


def _clip_units(
    entry: DeviceEntry,
    target: DeviceEntry,
    limit: Limit,
    stream: Any,
    unrounded: DeviceEntry | None = None,
) -> bool:
    """Scale units, in a plan of their own where it is not of the user's arrays alone.

    What a gradient was `unrounded` is measured, and waited for: tells if any unit is scaled.
    """
    owner = _owner_of(entry, limit, stream)
    strided = functools.partial(_strided, axes=limit.axes)
    family = Family(
        (strided(entry, target),),
        None if owner is None else strided(owner, owner),
        measured=() if unrounded is None else (strided(unrounded, unrounded),),
    )
    make = functools.partial(UnitPlan, [family], limit.ord, stream)
    passing = unrounded is not None or owner is not limit.owner
    key = device.handle_of(stream), limit.ord, family
    plan = make() if passing else kept(key, make)[0]
    with plan.lock:
        plan.write_laws(limit.bound, stream, limit.eps)
        plan.measure(stream)
        plan.decide(stream)
        if unrounded is not None and not plan.changes(stream):
            return False
        plan.scale(stream)
    return True


def _unrounded(entry: DeviceEntry, shape: tuple[int, ...], stream: Any) -> DeviceEntry:
    """Return the sums of rows, by ascending indices, in float64."""
    slices: Any = entry.slices
    dtype = np.result_type(entry.native, np.float64)
    made = describe(entry.name, entry.key, empty(shape, dtype))
    slices.sum_into(made, slices.ranks, stream)
    return made


def _owner_of(entry: DeviceEntry, limit: Limit, stream: Any) -> DeviceEntry | None:
    """Return the parameter whose units are a gradient's: of slices with units in rows, its rows."""
    owner, slices = limit.owner, entry.slices
    if owner is None or slices is None or 0 in limit.axes:
        return owner
    if not owner.c_order:
        copy = outputs.new_of_shape(owner, owner.shape)
        _clip_units(owner, copy, Limit(limit.axes, math.inf), stream)
        owner = copy
    made = outputs.new_of_shape(owner, entry.shape)
    length = math.prod(owner.shape[1:]) * owner.dtype.components
    span = RowSpan(owner.dtype, owner.address, made.address, made.size, length)
    turns = np.arange(slices.indices.size + 1)
    sum_rows(span, owner.dtype, (slices.indices, turns), turns[:-1], stream)  # of one row each
    return made


def _strided(entry: DeviceEntry, target: DeviceEntry, axes: tuple[int, ...]) -> Strided:
    return Strided(entry.dtype, entry.shape, entry.memory, target.memory, axes)


def clip_per_example(grads: Any, bound: float, layerwise: str | None) -> tuple[Any, Any]:
    """Add up examples, each clipped by its norm, as `functional.clip_per_example`."""
    described: Any = gradients(grads)
    inputs.check_examples(described.entries)
    device.require()
    stream = stream_of(described.entries)
    entries = [_dense(entry, stream) for entry in described.entries]
    sums = [_new_sum(entry) for entry in entries]
    parts = [_strided(entry, entry, tuple(range(1, len(entry.shape)))) for entry in entries]
    shared = [tuple(parts)] if layerwise is None else [(part,) for part in parts]
    families = tuple(Family(own, rounded=False) for own in shared)
    handle = device.handle_of(stream)
    plan, free = kept((handle, families), lambda: UnitPlan(families, 2.0, stream))
    pairs = list(zip(entries, sums, strict=True))
    added = tuple(_strided(entry, _along_examples(total), (0,)) for entry, total in pairs)
    adding, _ = kept((handle, added), lambda: Sums(dict(enumerate(added)), stream))
    with plan.lock:
        plan.write_laws(example_bounds(entries, bound, layerwise), stream)
        plan.measure(stream)
        plan.decide(stream)
        counts = _counts(plan, free, stream)
        adding.write(plan.shared.tensors, plan.units, stream)
    give_back(stream, [*described.entries, *sums])
    summed = described.with_results([total.array for total in sums])
    return summed, described.with_results(counts) if layerwise else counts[0]


def _dense(entry: DeviceEntry, stream: Any) -> DeviceEntry:
    """Return a gradient as an array: slices as a dense one."""
    slices: Any = entry.slices
    if slices is None:
        return entry
    return describe(entry.name, entry.key, slices.dense_on(stream))


def _new_sum(entry: DeviceEntry) -> DeviceEntry:
    """Return a new array for the sum over a gradient's examples."""
    return outputs.new_of_shape(entry, entry.shape[1:])


def _along_examples(total: DeviceEntry) -> DeviceEntry:
    """Return a sum as an array in which all examples are at one place."""
    return total._replace(shape=(1, *total.shape), strides=(0, *total.memory.steps))


def _counts(plan: UnitPlan, free: list[Any], stream: Any) -> list[DeviceInt]:
    """Return how many units of each family are clipped, to be waited for by whoever asks."""
    out = free.pop() if free else plan.summaries(1, stream)[0]
    plan.summarize(out, stream)

    @functools.cache
    def summaries() -> Array:
        found: Array = device.read_table(out, stream)
        return found

    def count(family: int) -> float:
        return float(summaries()[family, tables.CLIPPED_COUNT])

    weakref.finalize(summaries, free.append, out).atexit = False
    return [DeviceInt(functools.partial(count, k)) for k in range(len(plan.families))]

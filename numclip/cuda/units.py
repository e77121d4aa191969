"""Clipping arrays on the GPU part by part, as `numclip.units` does on the CPU."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Sequence
from typing import Any

from numclip import inputs
from numclip.cuda import outputs
from numclip.cuda.entries import DeviceEntry, describe, gradients
from numclip.cuda.plans import kept
from numclip.cuda.streams import stream_of
from numclip.cuda.values import DeviceInt
from numclip.dtypes import Array
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.tiling import Strided, Sums
from numclip.kernels.cuda.unit_plan import Family, UnitPlan
from numclip.units import example_bounds


def clip_by_norm(grad: Any, bound: float, axes: Any, ord: float, out: Any) -> Any:
    """Hold the norm of each unit to a bound, as `functional.clip_by_norm` with axes."""
    entry = describe("grad", 0, grad)
    reduced = inputs.axes_of(axes, len(entry.shape)) or ()
    target = outputs.place(entry, out)
    family = Family((_strided(entry, target, reduced),))
    _clip([entry], family, ord, bound)
    return target.array


def adaptive_clip(grad: Any, param: Any, factor: float, eps: float, axes: Any, out: Any) -> Any:
    """Hold the norm of each unit to a fraction of its parameters', as `functional`'s."""
    entry, owner = describe("grad", 0, grad), describe("param", 0, param)
    if owner.shape != entry.shape:
        raise ValueError(
            f"param: expected an array of the gradient's shape {entry.shape}, got {owner.shape}"
        )
    reduced = inputs.adaptive_axes(axes, len(entry.shape))
    target = outputs.place(entry, out)
    family = Family((_strided(entry, target, reduced),), _strided(owner, owner, reduced))
    _clip([entry, owner], family, 2.0, factor, eps)
    return target.array


def _strided(entry: DeviceEntry, target: DeviceEntry, axes: tuple[int, ...]) -> Strided:
    return Strided(entry.dtype, entry.shape, entry.memory, target.memory, axes)


def _clip(
    entries: Sequence[DeviceEntry], family: Family, ord: float, bound: float, eps: float = 0.0
) -> None:
    """Scale each unit of a family by a factor of its own."""
    stream = stream_of(entries)
    plan, _ = kept((device.handle_of(stream), ord, family), lambda: UnitPlan([family], ord, stream))
    plan.write_laws(bound, stream, eps)
    plan.measure(stream)
    plan.decide(stream)
    plan.scale(stream)


def clip_per_example(grads: Any, bound: float, layerwise: str | None) -> tuple[Any, Any]:
    """Add up examples, each clipped by its norm, as `functional.clip_per_example`."""
    described: Any = gradients(grads)
    entries: list[DeviceEntry] = described.entries
    inputs.check_examples(described.entries)
    device.require()
    stream, sums = stream_of(entries), [_new_sum(entry) for entry in entries]
    parts = [_strided(entry, entry, tuple(range(1, len(entry.shape)))) for entry in entries]
    shared = [tuple(parts)] if layerwise is None else [(part,) for part in parts]
    families = tuple(Family(own, rounded=False) for own in shared)
    handle = device.handle_of(stream)
    plan, free = kept((handle, families), lambda: UnitPlan(families, 2.0, stream))
    plan.write_laws(example_bounds(entries, bound, layerwise), stream)
    plan.measure(stream)
    plan.decide(stream)
    counts = _counts(plan, free, stream)
    pairs = list(zip(entries, sums, strict=True))
    added = tuple(_strided(entry, _along_examples(total), (0,)) for entry, total in pairs)
    adding, _ = kept((handle, added), lambda: Sums(dict(enumerate(added)), stream))
    adding.write(plan.shared.tensors, plan.units, stream)
    summed = described.with_results([total.array for total in sums])
    return summed, described.with_results(counts) if layerwise else counts[0]


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

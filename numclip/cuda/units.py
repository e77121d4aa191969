"""Clipping arrays on the GPU part by part, as `numclip.units` does on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numclip import inputs
from numclip.cuda import arrays
from numclip.cuda.arrays import DeviceEntry
from numclip.cuda.plans import kept
from numclip.kernels.cuda import device
from numclip.kernels.cuda.tiling import Strided
from numclip.kernels.cuda.unit_plan import Family, UnitPlan


def clip_by_norm(grad: Any, bound: float, axes: Any, ord: float, out: Any) -> Any:
    """Hold the norm of each unit to a bound, as `functional.clip_by_norm` with axes."""
    entry = arrays.describe("grad", 0, grad)
    reduced = inputs.axes_of(axes, len(entry.shape)) or ()
    target = arrays.place(entry, out)
    family = Family((_strided(entry, target, reduced),))
    _clip([entry], family, ord, bound)
    return target.array


def adaptive_clip(grad: Any, param: Any, factor: float, eps: float, axes: Any, out: Any) -> Any:
    """Hold the norm of each unit to a fraction of its parameters', as `functional`'s."""
    entry, owner = arrays.describe("grad", 0, grad), arrays.describe("param", 0, param)
    if owner.shape != entry.shape:
        raise ValueError(
            f"param: expected an array of the gradient's shape {entry.shape}, got {owner.shape}"
        )
    reduced = inputs.adaptive_axes(axes, len(entry.shape))
    target = arrays.place(entry, out)
    family = Family((_strided(entry, target, reduced),), _strided(owner, owner, reduced))
    _clip([entry, owner], family, 2.0, factor, eps)
    return target.array


def _strided(entry: DeviceEntry, target: DeviceEntry, axes: tuple[int, ...]) -> Strided:
    return Strided(entry.dtype, entry.shape, entry.memory, target.memory, axes)


def _clip(
    entries: Sequence[DeviceEntry], family: Family, ord: float, bound: float, eps: float = 0.0
) -> None:
    """Scale each unit of a family by a factor of its own."""
    stream = arrays.stream_of(entries)
    plan, _ = kept((device.handle_of(stream), ord, family), lambda: UnitPlan([family], ord, stream))
    plan.write_laws(bound, stream, eps)
    plan.measure(stream)
    plan.decide(stream)
    plan.scale(stream)

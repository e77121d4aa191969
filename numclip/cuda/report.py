"""The report of a step on the GPU, from what its kernels have left in memory."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.kernels import formulas
from numclip.kernels.cuda import device, tables
from numclip.report import ClipReport, GroupReport, TensorReport
from numclip.rules import ByValue


@dataclass(eq=False)
class Found:
    """What a step has decided, on the GPU, and by what bounds; `after` it clamped elements."""

    step: int
    outcome: tuple[Any, Any]
    bounds: dict[str, Array]
    unscale: float
    after: tuple[Any, Any] | None = None

    def read(self, stream: Any) -> tuple[Array, Array]:
        """Return the sums and the decisions, after waiting for them."""
        sums, decisions = (device.read_table(table, stream) for table in self.outcome)
        return sums, decisions


def build(
    found: Found,
    groups: Sequence[Any],
    tensors: Mapping[str, range],
    pools: Mapping[str, range],
    stream: Any,
) -> ClipReport:
    """Return the report of a step, after waiting for the GPU."""
    sums, decisions = found.read(stream)
    after = None if found.after is None else device.read_table(found.after[0], stream)
    made: dict[str, GroupReport] = {}
    reports: dict[str, TensorReport] = {}
    for group in groups:
        rows, own = tensors[group.name], decisions[pools[group.name]]
        bounds = found.bounds[group.name]
        if own[:, tables.SKIPPED].any():
            bounds = np.full_like(bounds, math.inf)
        norms = np.array([_norm(sums[t]) / found.unscale for t in rows])
        held = isinstance(group.clip, ByValue) and after is not None
        later = np.array([_norm(after[t]) for t in rows]) if held and after is not None else None
        parts = _tensor_reports(group, norms, own, bounds, later)
        nonfinite = bool(sums[rows, tables.BAD].any())
        made[group.name] = _group_report(group, parts, own, bounds, nonfinite)
        reports.update(zip(group.params, parts, strict=True))
    thresholds = {pools[group.name]: made[group.name].threshold for group in groups}
    return ClipReport(
        step=found.step,
        norm=math.hypot(*(tensor.norm for tensor in reports.values())),
        clipped_norm=math.hypot(*(tensor.clipped_norm for tensor in reports.values())),
        scale=_smallest([group.scale for group in made.values()]),
        clipped=any(group.clipped for group in made.values()),
        skipped=any(group.skipped for group in made.values()),
        threshold=thresholds.popitem()[1] if len(thresholds) == 1 else None,
        nonfinite=any(group.nonfinite for group in made.values()),
        groups=made,
        tensors=reports,
    )


def _norm(row: Array) -> float:
    """Return the norm that belongs to a sum of squares."""
    return formulas.scale_by_power(math.sqrt(row[tables.TOTAL]), int(row[tables.EXPONENT]))


def _tensor_reports(
    group: Any, norms: Array, decisions: Array, bounds: Array, later: Array | None
) -> list[TensorReport]:
    """Return what became of each tensor of a group; `later` has the norms of clamped ones."""
    scales = np.broadcast_to(decisions[:, tables.SCALE], norms.shape)
    sizes = [math.prod(param.shape) for param in group.params.values()]
    divisors = np.array([1.0 if group.clip is None else group.clip.divisor(n) for n in sizes])
    thresholds = np.broadcast_to(bounds, norms.shape) * divisors
    with np.errstate(invalid="ignore", divide="ignore"):
        clipped = norms * scales
        if later is not None:
            clipped = later
            scales = np.where(later == norms, 1.0, later / np.where(norms == 0.0, 1.0, norms))
    columns = zip(norms, clipped, scales, thresholds, strict=True)
    return [TensorReport(*map(float, row)) for row in columns]


def _group_report(
    group: Any, parts: Sequence[TensorReport], decisions: Array, bounds: Array, nonfinite: bool
) -> GroupReport:
    scale = _smallest([part.scale for part in parts])
    norm = math.hypot(*(part.norm for part in parts))
    clipped = math.hypot(*(part.clipped_norm for part in parts))
    skipped = bool(decisions[:, tables.SKIPPED].any())
    jointly = group.clip is not None and group.clip.scope == "group" and not skipped
    if jointly:
        norm, clipped = float(decisions[0, tables.NORM]), float(decisions[0, tables.CLIPPED])
    clamps = isinstance(group.clip, ByValue)
    return GroupReport(
        norm=norm,
        clipped_norm=clipped,
        scale=scale,
        clipped=any(part.scale != 1.0 for part in parts) if clamps else scale < 1.0,
        skipped=skipped,
        threshold=float(bounds[0]) if jointly else None,
        nonfinite=nonfinite,
    )


def _smallest(scales: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, scales)) else min(scales, default=1.0)

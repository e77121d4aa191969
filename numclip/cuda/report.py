"""The report of a step on the GPU, from what its kernels have left in memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array
from numclip.group import shared_key
from numclip.kernels import formulas
from numclip.kernels.cuda import tables
from numclip.report import ClipReport, GroupReport, TensorReport
from numclip.step import smallest


class Columns(NamedTuple):
    """For each tensor of a group: norms before and after, the smallest factor, the bound."""

    norms: Array
    clipped: Array
    scales: Array
    thresholds: Array


class Told(NamedTuple):
    """What became of a group and of its tensors; the L2 norms are of its own gradients."""

    group: Any
    report: GroupReport
    norm: float
    clipped_norm: float
    columns: Columns


def norms_of(sums: Array) -> Array:
    """Return the norms that belong to some sums of squares."""
    rows = zip(np.sqrt(sums[:, tables.TOTAL]), sums[:, tables.EXPONENT], strict=True)
    return np.array([formulas.scale_by_power(float(root), int(power)) for root, power in rows])


def scaled(norms: Array, scales: Array) -> Array:
    """Return norms times factors, either of which can be infinite or NaN."""
    with np.errstate(invalid="ignore"):
        return norms * scales


def tell(group: Any, norms: Array, columns: Columns, decisions: Array, bad: bool) -> Told:
    """Return what became of a group: `norms` are the L2 norms of its tensors."""
    skipped = bool(decisions[:, tables.SKIPPED].any())
    clamped = bool(decisions[:, tables.CLAMPED].any())
    scale = smallest(columns.scales.tolist())
    norm = shown = total(norms)
    clipped = after = math.hypot(*columns.clipped)
    threshold = None
    if group.clip is None and not skipped:
        clipped = after = norm
    elif not skipped and group.clip.scope == "group":
        shown, after = float(decisions[0, tables.NORM]), float(decisions[0, tables.CLIPPED])
        threshold = float(columns.thresholds[0])
    changed = scale < 1.0 or clamped
    report = GroupReport(shown, after, scale, changed, skipped, threshold, bad)
    return Told(group, report, norm, clipped, columns)


def build(step: int, found: Sequence[Told]) -> ClipReport:
    """Return the report of a step from those of its groups."""
    groups = {one.group.name: one.report for one in found}
    bounds = {shared_key(one.group.name, one.group.clip): one.report.threshold for one in found}
    return ClipReport(
        step=step,
        norm=total([one.norm for one in found]),
        clipped_norm=math.hypot(*(one.clipped_norm for one in found)),
        scale=smallest([report.scale for report in groups.values()]),
        clipped=any(report.clipped for report in groups.values()),
        skipped=any(report.skipped for report in groups.values()),
        threshold=bounds.popitem()[1] if len(bounds) == 1 else None,
        nonfinite=any(report.nonfinite for report in groups.values()),
        groups=groups,
        tensors={name: row for one in found for name, row in _rows(one)},
    )


def _rows(found: Told) -> Iterable[tuple[str, TensorReport]]:
    """Return the reports of a group's tensors by name."""
    for name, row in zip(found.group.params, zip(*found.columns, strict=True), strict=True):
        yield name, TensorReport(*map(float, row))


def total(norms: Iterable[float]) -> float:
    """Return the norm of all together; NaN where one is, also beside infinity."""
    values = [float(norm) for norm in norms]
    return math.nan if any(map(math.isnan, values)) else math.hypot(*values)

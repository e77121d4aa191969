"""What a step of one group answers, however it was taken, and the report of several."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from numclip.dtypes import Array
from numclip.group import GroupState, shared_key
from numclip.measuring import Norms, Sums
from numclip.report import ClipReport, GroupReport, Rows, TensorReports


class Findings(NamedTuple):
    """What became of a group: its report, the L2 norm of what it holds now, and the tensors'.

    `rows` makes the fields of each gradient's `TensorReport`, if they are asked for, which may
    be after the gradients have changed.
    """

    report: GroupReport
    clipped_norm: float
    rows: Rows


class Step(ABC):
    """What was found out about one group's gradients, and what is going to happen to them.

    `unscale` is the loss scale they carry; norms are those without it. `skipped` says that the
    group is left as it is.
    """

    group: GroupState
    unscale: float
    skipped: bool
    threshold: float | None

    @property
    @abstractmethod
    def sums(self) -> Sums:
        """The sums of squares of the gradients, the loss scale left in."""

    @property
    @abstractmethod
    def norm(self) -> float:
        """The L2 norm of the group's own gradients."""

    @abstractmethod
    def apply(self) -> None:
        """Write the gradients, clipped, in place."""

    @abstractmethod
    def update_factors(self) -> Array:
        """Return the factor that each gradient is to be taken times, after writing any other."""

    @abstractmethod
    def findings(self, *, written: bool) -> Findings:
        """Return what was found and done."""

    @abstractmethod
    def observe(self, number: int) -> dict[str, Array]:
        """Return the state of the group's rule after this step."""

    @property
    def shared_key(self) -> tuple[str, object]:
        """What is the same for groups that are clipped by one norm."""
        return shared_key(self.group.name, self.group.clip)


def together(steps: Sequence[Step]) -> Norms:
    """Return the L2 norm of several groups."""
    sums = Sums(*map(np.concatenate, zip(*(step.sums for step in steps), strict=True)))
    return sums.norms(np.zeros(sums.totals.size, np.int64), 1).divided(steps[0].unscale)


def smallest(scales: Sequence[float]) -> float:
    """Return the smallest factor, NaN where one is, 1 where there is none."""
    return math.nan if any(map(math.isnan, scales)) else min(scales, default=1.0)


def report(steps: Sequence[Step], number: int, *, written: bool) -> ClipReport:
    """Return what a step found and did."""
    found = [step.findings(written=written) for step in steps]
    names = [step.group.name for step in steps]
    groups = dict(zip(names, [one.report for one in found], strict=True))
    parts = [(step.group.names, one.rows) for step, one in zip(steps, found, strict=True)]
    whole = _of_one(steps[0], found[0]) if len(steps) == 1 else _of_several(steps, found)
    return ClipReport(*whole, number, groups, TensorReports(parts))


Whole = tuple[float, float, float, bool, bool, float | None, bool]


def _of_one(step: Step, found: Findings) -> Whole:
    """Return the first fields of the report where there is one group."""
    own = found.report
    flags = own.clipped, own.skipped, own.threshold, own.nonfinite
    return step.norm, found.clipped_norm, own.scale, *flags


def _of_several(steps: Sequence[Step], found: Sequence[Findings]) -> Whole:
    """Return the first fields of the report, from those of several groups."""
    groups = [one.report for one in found]
    bounds = {step.shared_key: step.threshold for step in steps}
    return (
        float(together(steps).values()[0]),
        math.hypot(*(one.clipped_norm for one in found)),
        smallest([group.scale for group in groups]),
        any(group.clipped for group in groups),
        any(group.skipped for group in groups),
        bounds.popitem()[1] if len(bounds) == 1 else None,
        any(group.nonfinite for group in groups),
    )

"""A step of a group that one norm clips, where nothing is out of the ordinary: little overhead.

It is taken for dense gradients of one dtype with no loss scale and no norm shared with other
groups. Where the norm is not finite or the results need care, `attempt` leaves the group, as it
was, to `GeneralStep`; the bits are the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import final

import numpy as np

from numclip.dtypes import Array
from numclip.group import GroupState
from numclip.kernels import backend
from numclip.kernels.backend import Batch
from numclip.measuring import Sums
from numclip.report import GroupReport
from numclip.step import Findings, Step


def attempt(group: GroupState, unscale: float, number: int) -> Step | None:
    """Measure and judge a group; return None where it takes a `GeneralStep`. Nothing is written."""
    batch = group.joint_batch
    if batch is None or unscale != 1.0:
        return None
    norm, right, totals = backend.joint_norm(batch)
    if not right:
        return None
    bound = math.inf
    if group.clip is not None:
        bound = float(group.clip.thresholds(np.array([norm]), norm, number, group.rule_state)[0])
    factor, truncate = backend.joint_factor(batch, norm, bound)
    return None if truncate else JointStep(group, batch, norm, totals, bound, factor)


@final
class JointStep(Step):
    """What was found out about such a group: its norm, the bound, the factor."""

    unscale = 1.0
    skipped = False

    def __init__(
        self,
        group: GroupState,
        batch: Batch,
        norm: float,
        totals: Array,
        bound: float,
        factor: float,
    ) -> None:
        self.group, self.batch, self.totals = group, batch, totals
        self._norm, self.bound, self.factor = norm, bound, factor
        self.threshold = None if group.clip is None else bound

    @property
    def norm(self) -> float:
        """The L2 norm of the group's own gradients."""
        return self._norm

    @property
    def sums(self) -> Sums:
        """The sums of squares of the gradients."""
        return Sums(self.totals, self.totals, np.zeros(self.totals.size, np.int64))

    def update_factors(self) -> Array:
        """Return the factor that each gradient is to be taken times."""
        return np.full(self.totals.size, self.factor)

    def apply(self) -> None:
        """Write the gradients, clipped, in place."""
        if self.factor != 1.0:
            backend.scale(self.batch, self.update_factors().astype(self.batch.dtype.compute))

    def findings(self, *, written: bool) -> Findings:  # noqa: ARG002 - nothing depends on it
        """Return what was found and done."""
        totals, factor, bound = self.totals, self.factor, self.bound

        def rows() -> Iterable[tuple[float, float, float, float]]:
            norms = np.sqrt(totals)
            return ((norm, norm * factor, factor, bound) for norm in norms.tolist())

        clipped = self._norm * factor
        report = GroupReport(
            self._norm, clipped, factor, factor < 1.0, False, self.threshold, False
        )
        return Findings(report, clipped, rows)

    def observe(self, number: int) -> dict[str, Array]:
        """Return the state of the group's rule after this step."""
        rule, state = self.group.clip, self.group.rule_state
        if not state or rule is None:
            return state
        norms = np.array([self._norm])
        return rule.observe(norms, norms * self.factor, self._norm, number, state)

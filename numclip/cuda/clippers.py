"""The kinds of clippers on the GPU: what each kind of rule needs beside a factor of an L2 norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda.arrays import DeviceArray, empty
from numclip.cuda.clipper import Clipper, Found, Outcome
from numclip.cuda.entries import DeviceEntry, describe
from numclip.cuda.report import Columns, build, norms_of
from numclip.dtypes import Array
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.plan import HostTable
from numclip.law import Law
from numclip.kernels.cuda.tiling import Strided
from numclip.kernels.cuda.unit_plan import Family, UnitPlan
from numclip.rules import Adaptive, Rule
from numclip.running_rules import AdaGC, AutoClip, ZClip


class FollowingClipper(Clipper):
    """Clips by rules whose bounds follow the norms, for which the host waits."""

    def _bound(self, _rule: Rule | None, _step: int) -> float:
        return math.inf

    def decide(self, found: Found, stream: Any) -> None:
        """Decide again, by the bounds that the rules make of the norms."""
        report = build(found.step, self.tell(found, stream))
        for group in self.groups:
            norms, _, total = _observed(group, report)
            rule, state = group.clip, group.rule_state
            found.bounds[group.name] = rule.thresholds(norms, total, found.step, state)
        self.plan.write_laws(self.law(found), stream)
        self.plan.decide(self.outcomes[found.turn], stream)

    def observe(self, found: Found, report: Any) -> None:
        """Let the rules know the norms before and after."""
        for group in self.groups:
            if not report.groups[group.name].nonfinite:
                seen = _observed(group, report)
                group.rule_state = group.clip.observe(*seen, found.step, group.rule_state)


class OrderClipper(Clipper):
    """Clips by norms of one order other than 2; L2 norms are told beside them."""

    def __init__(self, groups: Sequence[Any], ord: float, kept: int) -> None:
        super().__init__(groups, ord, kept)
        ((self._powers, _),) = self.plan.outcomes(1, 0)

    def decide(self, found: Found, stream: Any) -> None:
        """Measure by the order, and decide again by that."""
        self.plan.measure(self.ord, stream)
        self.plan.decide((self._powers, self.outcomes[found.turn][1]), stream)

    def _columns(
        self, group: Any, norms: Array, decisions: Array, found: Found, stream: Any
    ) -> Columns:
        if group.clip.scope == "tensor" and not decisions[:, tables.SKIPPED].any():
            norms = decisions[:, tables.NORM]
        return super()._columns(group, norms, decisions, found, stream)


class ValueClipper(Clipper):
    """Holds elements between bounds, and measures what that makes of the norms."""

    def __init__(self, groups: Sequence[Any], ord: float, kept: int) -> None:
        super().__init__(groups, ord, kept)
        self._after = self.plan.outcomes(kept, 0)
        self._laws_after = HostTable((len(self.plan.pools), tables.LAW_COLUMNS), 0)
        self._kept_grads: list[DeviceArray] = []

    def write(self, found: Found, stream: Any) -> None:
        """Take the loss scale out, hold the elements, and measure."""
        super().write(found, stream)
        for group in self.groups:
            bounds, members = (group.clip.min, group.clip.max), self.tensors[group.name]
            self.plan.clamp(self.outcomes[found.turn], *bounds, stream, members)
        law = self.law(found)._replace(unscale=1.0)
        self.plan.write_laws(law, stream, self._laws_after)
        self.plan.measure(2.0, stream)
        self.plan.decide(self._after[found.turn], stream, self._laws_after)

    def write_rare(self, found: Found, stream: Any) -> Outcome:
        """Write all: an update has no factor to take."""
        self.write(found, stream)
        return self._after[found.turn]

    def foresee(self, found: Found, stream: Any) -> None:
        """Hold the elements, measure, and put the gradients back from copies."""
        flats = [flat for group in self.groups for flat in group.flat_grads.values()]
        if not self._kept_grads:
            self._kept_grads = [empty(flat.shape, flat.dtype) for flat in flats]
        for flat, kept in zip(flats, self._kept_grads, strict=True):
            device.copy(kept.address, flat.address, flat.nbytes, stream)
        try:
            self.write(found, stream)
        finally:
            for flat, kept in zip(flats, self._kept_grads, strict=True):
                device.copy(flat.address, kept.address, flat.nbytes, stream)

    def _columns(
        self, group: Any, norms: Array, decisions: Array, found: Found, stream: Any
    ) -> Columns:
        """Return the norms that were measured: there is no factor."""
        columns = super()._columns(group, norms, decisions, found, stream)
        if decisions[:, tables.SKIPPED].any():
            return columns
        sums = device.read_table(self._after[found.turn][0], stream)
        later = norms_of(sums[self.tensors[group.name]])
        with np.errstate(invalid="ignore"):
            ratios = later / np.where(norms == 0.0, 1.0, norms)
        clamped = decisions[:, tables.CLAMPED] != 0.0
        return columns._replace(clipped=later, scales=np.where(clamped, ratios, 1.0))


class UnitClipper(Clipper):
    """Clips the units of tensors, each by a norm of its own.

    What is not finite, and whether a group is skipped, is found for whole tensors as elsewhere.
    """

    def __init__(self, groups: Sequence[Any], ord: float, kept: int) -> None:
        super().__init__(groups, 2.0, kept)
        bases = iter(range(len(self.plan.pools)))
        families = [
            _family(group, entry, base)
            for group in self.groups
            for entry, base in zip(group.entries(), bases, strict=False)
        ]
        self._units = UnitPlan(families, ord, 0)
        self._summaries = self._units.summaries(kept, 0)

    def law(self, _found: Found) -> Law:
        """Return a law by which whole tensors are left as they are."""
        return Law(math.inf)

    def decide(self, found: Found, stream: Any) -> None:
        """Measure units and parameters, and find a factor for each unit."""
        rules = [(group.clip, self.tensors[group.name]) for group in self.groups]
        eps = np.concatenate([np.full(len(own), getattr(rule, "eps", 0.0)) for rule, own in rules])
        bounds = np.concatenate([found.bounds[group.name] for group in self.groups])
        self._units.write_laws(bounds, stream, eps, found.unscale)
        self._units.measure(stream)
        self._units.decide(stream, self.outcomes[found.turn][1])
        self._units.summarize(self._summaries[found.turn], stream)

    def write(self, found: Found, stream: Any) -> None:
        """Write each unit times its factor; what is not finite is cleaned after that."""
        self._units.scale(stream)
        super().write(found, stream)

    def write_rare(self, found: Found, stream: Any) -> Outcome:
        """Write all: an update takes one factor for a tensor."""
        self._units.scale(stream)
        return super().write_rare(found, stream)

    def _columns(
        self, group: Any, norms: Array, decisions: Array, found: Found, stream: Any
    ) -> Columns:
        """Return the norms of what all units have become, and the smallest factors."""
        columns = super()._columns(group, norms, decisions, found, stream)
        if decisions[:, tables.SKIPPED].any():
            return columns
        rows = device.read_table(self._summaries[found.turn], stream)[self.tensors[group.name]]
        return Columns(
            norms, rows[:, tables.AFTER], rows[:, tables.LEAST], np.full_like(norms, math.inf)
        )


def _family(group: Any, entry: DeviceEntry, base: int) -> Family:
    """Return the units of a gradient, and with `Adaptive` those of its parameter."""
    rule, ndim, owner = group.clip, len(entry.shape), None
    if isinstance(rule, Adaptive):
        axes = inputs.adaptive_axes(rule.axes, ndim)
        param = group.params[entry.key]
        owner = _strided(describe(entry.name, entry.key, param), axes)
    else:
        axes = inputs.axes_of(rule.axes, ndim) or ()
    zeroing = group.nonfinite == "zero"
    return Family((_strided(entry, axes),), owner, zeroing, base)


def _strided(entry: DeviceEntry, axes: tuple[int, ...]) -> Strided:
    return Strided(entry.dtype, entry.shape, entry.memory, entry.memory, axes)


FOLLOWING = AutoClip, ZClip, AdaGC


def _kind(rule: Rule | None) -> tuple[type[Clipper], float]:
    """Return what clips by a rule, and the order of its norm: what one clipper's groups share."""
    if isinstance(rule, FOLLOWING):
        return FollowingClipper, 2.0
    if rule is not None and rule.scope in ("unit", "element"):
        return (UnitClipper if rule.scope == "unit" else ValueClipper), rule.ord
    if rule is None or rule.ord == 2.0:
        return Clipper, 2.0
    return OrderClipper, rule.ord


def clippers(groups: Iterable[Any], kept: int) -> list[Clipper]:
    """Return what clips some groups; what is found is kept for so many steps."""
    found: dict[tuple[type[Clipper], float], list[Any]] = {}
    for group in groups:
        found.setdefault(_kind(group.clip), []).append(group)
    return [kind(members, ord, kept) for (kind, ord), members in found.items()]


def _observed(group: Any, report: Any) -> tuple[Array, Array, float]:
    """Return the norms a rule is told, before and after clipping, and the group's."""
    total = np.array([report.groups[group.name].norm])
    if group.clip.scope == "group":
        norms, scales = total, np.array([report.groups[group.name].scale])
    else:
        norms = np.array([report.tensors[name].norm for name in group.params])
        scales = np.array([report.tensors[name].scale for name in group.params])
    return _finite(norms), _finite(norms * scales), float(_finite(total)[0])


def _finite(values: Array) -> Array:
    """Return norms as rules take them: NaN as 0, what exceeds float64 as its largest."""
    return np.nan_to_num(values, nan=0.0)

"""Clipping on the GPU, rule by rule: what is measured, decided, written and told.

A *clipper* serves the groups of one kind of rule, by tables and launches of its own: kinds do
not depend on one another. Nothing here waits for the GPU but rules that follow the norms, and
whoever asks what was found.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from numclip.cuda.arrays import DeviceArray
from numclip.cuda.clipping import span
from numclip.cuda.report import Columns, Told, build, norms_of, scaled, tell
from numclip.dtypes import Array
from numclip.group import shared_key
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.plan import HostTable, Law, Plan, Pool
from numclip.kernels.cuda.tiling import Strided
from numclip.rules import Rule
from numclip.running_rules import AdaGC, AutoClip, ZClip

Outcome = tuple[Any, Any]  # sums of the tensors and decisions for the pools, on the GPU


@dataclass(eq=False)
class Found:
    """What a step has found, in memory numbered `turn` on the GPU, and by what bounds."""

    step: int
    turn: int
    bounds: dict[str, Array]
    unscale: float


class Clipper:
    """Scales tensors or groups by a factor of their L2 norms, or only measures them."""

    def __init__(self, groups: Sequence[Any], ord: float, kept: int) -> None:
        """Make tables, and memory for what is found in so many steps."""
        sharing = _sharing(groups)
        self.ord, self.groups = ord, [group for members in sharing for group in members]
        self.tensors: dict[str, range] = {}
        self.pools: dict[str, range] = {}
        spans: list[Span | Strided] = []
        pools: list[Pool] = []
        for turn, members in enumerate(sharing):
            first, own = len(spans), len(pools)
            for group in members:
                start = len(spans)
                spans += [span(e, e, group.nonfinite, ord) for e in group.entries()]
                self.tensors[group.name] = range(start, len(spans))
            policy, rule = members[0].nonfinite, members[0].clip
            if rule is not None and rule.scope == "group":
                pools.append(Pool(first, len(spans), turn, policy))
            else:
                pools += [Pool(k, k + 1, turn, policy) for k in range(first, len(spans))]
            self.pools |= {group.name: range(own, len(pools)) for group in members}
        self.plan = Plan(spans, pools, 0)
        self.outcomes = self.plan.outcomes(kept, 0)
        self._divisors = self._found_divisors()

    def _found_divisors(self) -> Array:
        """Return by what each pool's norm is divided."""
        divisors = np.ones(len(self.plan.pools))
        for group in self.groups:
            params = group.params.values()
            if group.clip is not None:  # a group that has one pool has a divisor of 1
                for pool, param in zip(self.pools[group.name], params, strict=False):
                    divisors[pool] = group.clip.divisor(math.prod(param.shape))
        return divisors

    def ask(self, step: int, turn: int, unscale: float) -> Found:
        """Return a step to come, with the bound of each pool; refuse a bad one."""
        bounds = {
            group.name: np.full(len(self.pools[group.name]), self._bound(group.clip, step))
            for group in self.groups
        }
        return Found(step, turn, bounds, unscale)

    def _bound(self, rule: Rule | None, step: int) -> float:
        return math.inf if rule is None else rule.bound(step)

    def measure(self, found: Found, stream: Any) -> None:
        """Take the L2 norms and find what is not finite; decide."""
        self.plan.write_laws(self.law(found), stream)
        self.plan.measure(2.0, stream)
        self.plan.judge(self.outcomes[found.turn], stream)

    def law(self, found: Found) -> Law:
        """Return the law of a step."""
        bounds = np.full(len(self.plan.pools), math.inf)
        for group in self.groups:
            bounds[self.pools[group.name]] = found.bounds[group.name]
        return Law(bounds, self._divisors, unscale=found.unscale, ord=self.ord)

    def refused(self, found: Found, stream: Any) -> list[Any]:
        """Return the groups whose policy is "raise" that hold NaN or Inf; waits where one could."""
        strict = [group for group in self.groups if group.nonfinite == "raise"]
        if not strict:
            return []
        sums = device.read_table(self.outcomes[found.turn][0], stream)
        return [group for group in strict if sums[self.tensors[group.name], tables.BAD].any()]

    def decide(self, found: Found, stream: Any) -> None:
        """Decide where more is needed than `measure` took."""

    def write(self, found: Found, stream: Any) -> None:
        """Write the gradients, clipped."""
        self.plan.scale(self.outcomes[found.turn], stream)

    def write_rare(self, found: Found, stream: Any) -> Outcome:
        """Write what an update cannot do on its way; return what it is to obey."""
        self.plan.scale_rare(self.outcomes[found.turn], stream)
        return self.outcomes[found.turn]

    def foresee(self, found: Found, stream: Any) -> None:
        """Find out what `write` would make of the norms; the gradients stay as they are."""

    def tell(self, found: Found, stream: Any) -> list[Told]:
        """Return what became of each group, after waiting for it."""
        sums, decisions = (device.read_table(t, stream) for t in self.outcomes[found.turn])
        norms = norms_of(sums) / found.unscale
        made = []
        for group in self.groups:
            members, own = self.tensors[group.name], decisions[self.pools[group.name]]
            bad = bool(sums[members, tables.BAD].any())
            columns = self._columns(group, norms[members], own, found, stream)
            made.append(tell(group, norms[members], columns, own, bad))
        return made

    def _columns(
        self, group: Any, norms: Array, decisions: Array, found: Found, _stream: Any
    ) -> Columns:
        """Return what became of each tensor of a group."""
        scales = np.broadcast_to(decisions[:, tables.SCALE], norms.shape)
        bounds = np.full_like(norms, math.inf)
        if not decisions[:, tables.SKIPPED].any():
            own = self.pools[group.name]
            bounds[:] = found.bounds[group.name] * self._divisors[own.start : own.stop]
        return Columns(norms, scaled(norms, scales), scales, bounds)

    def observe(self, found: Found, report: Any) -> None:
        """Let rules know what a step has come to."""


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
        self.plan.judge(self.outcomes[found.turn], stream)

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
        self.plan.judge((self._powers, self.outcomes[found.turn][1]), stream)

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
        self.plan.judge(self._after[found.turn], stream, self._laws_after)

    def write_rare(self, found: Found, stream: Any) -> Outcome:
        """Write all: an update has no factor to take."""
        self.write(found, stream)
        return self._after[found.turn]

    def foresee(self, found: Found, stream: Any) -> None:
        """Hold the elements, measure, and put the gradients back from copies."""
        flats = [flat for group in self.groups for flat in group.flat_grads.values()]
        if not self._kept_grads:
            self._kept_grads = [
                DeviceArray(device.allocate(flat.nbytes), 0, flat.shape, flat.dtype)
                for flat in flats
            ]
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


FOLLOWING = AutoClip, ZClip, AdaGC


def _kind(rule: Rule | None) -> tuple[type[Clipper], float]:
    """Return what clips by a rule, and the order of its norm: what one clipper's groups share."""
    if isinstance(rule, FOLLOWING):
        return FollowingClipper, 2.0
    if rule is None or (rule.scope != "element" and rule.ord == 2.0):
        return Clipper, 2.0
    return (ValueClipper, 2.0) if rule.scope == "element" else (OrderClipper, rule.ord)


def clippers(groups: Iterable[Any], kept: int) -> list[Clipper]:
    """Return what clips some groups; what is found is kept for so many steps."""
    found: dict[tuple[type[Clipper], float], list[Any]] = {}
    for group in groups:
        found.setdefault(_kind(group.clip), []).append(group)
    return [kind(members, ord, kept) for (kind, ord), members in found.items()]


def _sharing(groups: Iterable[Any]) -> list[list[Any]]:
    """Return the groups, those that share a norm together."""
    found: dict[Any, list[Any]] = {}
    for group in groups:
        found.setdefault(shared_key(group.name, group.clip), []).append(group)
    return list(found.values())


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

"""The kinds of clippers: what each kind of rule needs beside a factor of an L2 norm."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.border.arguments import LARGEST
from numclip.border.gradients import Gradient, describe
from numclip.clipping.asking import check
from numclip.clipping.clipper import Clipper
from numclip.clipping.outcome import GroupOutcome, norms_of, norms_together
from numclip.dtypes import Array
from numclip.engine import AtOnce, Engine, Outcome
from numclip.host.kernels.pools import write_norms
from numclip.isolation import isolated
from numclip.law import Family, Law
from numclip.memory import Strided


class Followed(NamedTuple):
    """A group whose bounds follow norms, its rule and its pools ``[first, last)``.

    `jointly` says that the group has one norm.
    """

    group: Any
    rule: Any
    first: int
    last: int
    jointly: bool


class FollowingClipper(Clipper):
    """Clips by rules some of whose bounds follow the norms, for which the host waits."""

    follows = decides_again = True

    def _set_bounds(self) -> None:
        """Leave bounds that follow norms infinite: `decide` finds them from the measured norms.

        Norms do not depend on bounds.
        """
        super()._set_bounds()
        self._unbounded = self.bounds
        self._seen: list[tuple[Array, float, bool]] = []  # norms that rules have not observed yet
        own = [(group, self.rules[group.name], self.pools[group.name]) for group in self.groups]
        self._following = [
            Followed(group, rule, pools.start, pools.stop, rule.scope == "group")
            for group, rule, pools in own
            if rule is not None and rule.follows_norms
        ]

    def take_step(self, step: int) -> None:
        """Set the bounds of a step that do not follow norms; refuse an invalid one."""
        self._unbounded = self._bounds_at(step)

    @isolated
    def decide(self, step: int, stream: Any) -> None:
        """Decide again, by the bounds that the rules find from the norms."""
        read = self.engine.read
        self._follow(step, read(self.found[0], stream), read(self.found[1], stream))
        self._write_law(self.unscale, stream)
        self._decide_again(stream)

    @isolated
    def take_at_once(self, native: AtOnce, turn: Any, items: Any) -> bool:
        """Measure by one call and clip by another, see `Clipper`; then let the rules observe it.

        Isolating the whole method takes 1 us less than isolating its two parts of Python.
        """
        slot, step, unscale = turn.slot, turn.step, turn.stretch.unscale
        if not native.measure(items, slot, unscale, self._unbounded, self.tables):
            return False
        self.unscale, self.found, self.merged = unscale, self._outcome(slot), None
        self._follow(step, *self.found)
        turn.decide_by([self.bounds])
        if not native.take(items, slot, unscale, self.bounds, self.tables, measures=False):
            return False
        self._observe(step, self.found[1])
        return True

    def _follow(self, step: int, sums: Array, decisions: Array) -> None:
        """Set the bounds that the rules find from the norms."""
        bounds, self._seen = self._unbounded.copy(), []
        for own in self._following:
            seen = self._norms_of(own, sums, decisions)
            self._seen.append(seen)
            if not decisions.item(own.first, tables.SKIPPED):
                norms, total, _ = seen
                found = own.rule.thresholds(norms, total, step, own.group.remembered)
                bounds[own.first : own.last] = found
        if bounds.tobytes() != self.bounds.tobytes():
            self.bounds = bounds

    def _norms_of(self, own: Followed, sums: Array, decisions: Array) -> tuple[Array, float, bool]:
        """Return (norms, total, bad): a rule's norms, the group's, and if one is not finite.

        NaN is replaced by 0, Inf by the largest float64.
        """
        if own.jointly:
            total = decisions.item(own.first, tables.NORM) * self.divisors.item(own.first)
            total = _finite(total)
            return np.array([total]), total, decisions.item(own.first, tables.BROKEN) != 0.0
        tensors = self.tensors[own.group.name]
        if self.merged is not None:
            sums, tensors = self.merged, self.merged_rows[own.group.name]
        sums = np.ascontiguousarray(sums[tensors.start : tensors.stop])
        norms, divisors = np.empty(len(sums)), self.divisors[own.first : own.last]
        total, bad, no_exponents = write_norms(sums, self.unscale, divisors, norms)
        if not no_exponents:
            norms = np.nan_to_num(norms_of(sums, self.unscale) / divisors, posinf=LARGEST)
            total = _finite(float(norms_together(sums, self.unscale)))
        return norms, total, bad

    @isolated
    def _observe_after(self, step: int, stream: Any) -> None:
        """Read the decisions and do what `_observe` does."""
        self._observe(step, self.engine.read(self.found[1], stream))

    def observe(self, step: int, stream: Any) -> None:
        """Let the rules observe the norms before and after clipping, if they have not yet."""
        if self._seen:
            self._observe_after(step, stream)

    def _observe(self, step: int, decisions: Array) -> None:
        """Let the rules observe the norms before and after clipping."""
        seen, self._seen = self._seen, []
        for own, (norms, total, bad) in zip(self._following, seen, strict=True):
            group = own.group
            absent = self.absent and self.absent.intersection(group.names)
            if bad or len(absent) == len(group.names):
                continue
            if own.jointly:
                clipped = np.array([total * decisions.item(own.first, tables.SCALE)])
            else:
                clipped = norms * decisions[own.first : own.last, tables.SCALE]
            arguments = norms, clipped, total, step, group.remembered
            if absent and norms.size > 1:
                missing = np.array([name in absent for name in group.names])
                group.remembered = _but(missing, group.remembered, own.rule.observe(*arguments))
            else:
                group.remembered = own.rule.renew(*arguments)


def _but(absent: Array, before: dict[str, Array], after: dict[str, Array]) -> dict[str, Array]:
    """Return the state after a step; for tensors that were absent, the state before it."""
    return {
        name: np.where(absent, before[name], own) if own.shape == absent.shape else own
        for name, own in after.items()
    }


def _finite(norm: float) -> float:
    return 0.0 if norm != norm else min(norm, LARGEST)


class OrderClipper(Clipper):
    """Clips by norms of one order other than 2; reports have L2 norms beside them."""

    by_norms = False
    decides_again = True

    def __init__(self, groups: Sequence[Any], ord: float, engine: Engine, stream: Any) -> None:
        super().__init__(groups, ord, engine, stream)
        self._powers, _ = self.plan.outcome(stream)

    def decide(self, step: int, stream: Any) -> None:  # noqa: ARG002
        """Measure by the order and decide again, unless the sums of all ranks have decided."""
        if self.given is None:
            self.take_powers(stream)

    @property
    def powers(self) -> Outcome:
        """The sums of powers, and the decisions."""
        return self._powers, self.found[1]

    def take_powers(self, stream: Any) -> None:
        """Measure the sums of powers of the order, and decide by them."""
        self.plan.measure(self.ord, stream)
        self.plan.decide(self.powers, stream)

    def norms(self, own: GroupOutcome) -> Array:
        """Return the norms of the order if each tensor has its own norm, else L2 norms."""
        return self._powers_of(own, tables.NORM, super().norms(own))

    def clipped_norms(self, own: GroupOutcome) -> Array:
        """Return the same after clipping."""
        return self._powers_of(own, tables.CLIPPED, super().clipped_norms(own))

    @staticmethod
    def _powers_of(own: GroupOutcome, column: int, squares: Array) -> Array:
        return squares if own.member.jointly else own.decisions[..., column] * own.divisors


class ValueClipper(Clipper):
    """Clamps elements between bounds, and measures the norms before and after."""

    by_norms = False
    writes_within = writes_all = True

    def __init__(self, groups: Sequence[Any], ord: float, engine: Engine, stream: Any) -> None:
        super().__init__(groups, ord, engine, stream)
        self._later = self._plan(stream)
        self._later.write_laws(Law(math.inf), stream)
        self._copies: _Copies | None = None

    def _shapes(self) -> list[tuple[int, ...]]:
        own = super()._shapes()
        return [*own, *own]

    def at_once(self) -> AtOnce | None:
        """Return an `AtOnce` that clamps small gradients by one native call, None if none can."""
        limits = np.zeros((len(self._pool_list), 2))
        for group in self.groups:
            own = self.tensors[group.name]
            limits[own.start : own.stop] = self.rules[group.name].element_bounds
        return self.plan.values_at_once(self._later, limits)  # type: ignore[no-any-return]

    @isolated
    def take_at_once(self, native: AtOnce, turn: Any, items: Any) -> bool:
        """Measure, clamp and measure again by one native call; return True on success."""
        self.turn_to(turn.slot)
        return super().take_at_once(native, turn, items)

    def outcome_after(self) -> Outcome:
        """Return the rows of the tables for the sums and decisions after clamping."""
        return self.tables[2][self.slot], self.tables[3][self.slot]

    def write(self, stream: Any) -> None:
        """Divide by the loss scale, clamp the elements, and measure again."""
        self._write(self.plan, self._later, stream)

    def _write(self, plan: Any, later: Any, stream: Any) -> None:
        outcome = self.found
        plan.scale(outcome, stream)
        for group in self.groups:
            bounds = self.rules[group.name].element_bounds
            plan.clamp(outcome, *bounds, stream, self.tensors[group.name])
        later.measure(2.0, stream)
        later.decide(self.outcome_after(), stream)
        if self.given is not None:  # pools that all ranks skip are skipped here
            later.decide_by(self.given, self.outcome_after(), stream)

    def write_exceptional(self, stream: Any) -> Outcome:
        """Write all tensors: clamping has no factor that an update could apply."""
        self.write(stream)
        return self.outcome_after()

    def preview(self, stream: Any) -> None:
        """Clamp the elements of copies of the gradients, and measure these."""
        if self._copies is None:
            self._copies = _Copies(self, stream)
        self._copies.take(stream)
        self._write(self._copies.plan, self._copies.later, stream)

    def clipped_norms(self, own: GroupOutcome) -> Array:
        """Return the norms measured after clamping: no factor gives them."""
        return np.where(own.skipped_tensors, own.tensor_norms, norms_of(own.rows(2), 1.0))

    def scales(self, own: GroupOutcome) -> Array:
        """Return the ratio of the norms after and before, 1 where nothing was clamped."""
        norms, clamped = own.tensor_norms, own.decisions[..., tables.CLAMPED] != 0.0
        ratios = own.tensor_clipped_norms / np.where(norms == 0.0, 1.0, norms)
        return np.where(clamped & ~own.skipped_tensors, ratios, 1.0)

    def clipped(self, own: GroupOutcome) -> Any:
        """Tell whether some element was clamped."""
        return own.decisions[..., tables.CLAMPED].any(axis=-1)


class _Copies:
    """Copies of the gradients of a clipper, and plans for these."""

    def __init__(self, clipper: ValueClipper, stream: Any) -> None:
        self._engine = engine = clipper.engine
        grads = [grad for group in clipper.groups for grad in group.gradients()]
        made = [engine.empty(grad.shape, grad.native) for grad in grads]
        copies = [describe(g.name, g.key, m, engine) for g, m in zip(grads, made, strict=True)]
        self._pairs = list(zip(copies, grads, strict=True))
        spans = [
            span._replace(source=copy.address, target=copy.address)
            for span, copy in zip(clipper.plan.spans, copies, strict=True)
        ]
        self.plan, self.later = (engine.plan(spans, clipper.plan.pools, stream) for _ in range(2))
        self.later.write_laws(Law(math.inf), stream)

    def take(self, stream: Any) -> None:
        """Copy the present gradients."""
        for copy, grad in self._pairs:
            self._engine.copy(copy.facts, grad.facts, stream)


class UnitClipper(Clipper):
    """Clips the units of tensors, each by a norm of its own.

    Non-finite gradients, and groups to be skipped, are found by tensors as in other clippers.
    """

    by_norms = False
    decides_again = writes_within = writes_all = True

    def __init__(self, groups: Sequence[Any], ord: float, engine: Engine, stream: Any) -> None:
        super().__init__(groups, 2.0, engine, stream)
        families = [
            _family(group, entry, self.tensors[group.name][k])
            for group in self.groups
            for k, entry in enumerate(group.gradients())
        ]
        self._units = engine.unit_plan(families, ord, stream)
        self._counts = np.array([family.units for family in families])
        floors = [[_floor(group.clip)] * len(group.names) for group in self.groups]
        self._floors = np.concatenate(floors)
        self._obeyed: tuple[Array, float] | None = None
        self.plan.write_laws(Law(math.inf), stream)

    def _shapes(self) -> list[tuple[int, ...]]:
        own = super()._shapes()
        return [*own, (own[0][0], tables.SUMMARY_COLUMNS)]

    def _write_law(self, unscale: float, stream: Any) -> None:
        """Write the law with the present bounds for units; tensors have infinite bounds."""
        obeyed = self._obeyed
        if obeyed is None or obeyed[0] is not self.bounds or obeyed[1] != unscale:
            self._obeyed = None  # if an interrupt comes now, the law is written again
            self._units.write_laws(self.bounds, stream, self._floors, unscale)
            self._obeyed = self.bounds, unscale

    def decide(self, step: int, stream: Any) -> None:  # noqa: ARG002
        """Measure units and parameters, and find a factor for each unit."""
        self._units.measure(stream)
        self._units.decide(stream, self.found[1])
        self._units.summarize(self.tables[2][self.slot], stream)

    def write(self, stream: Any) -> None:
        """Write each unit times its factor, then zero non-finite elements as the policy says."""
        self._units.scale(stream)
        super().write(stream)

    def write_exceptional(self, stream: Any) -> Outcome:
        """Write all units: an update can apply only one factor to a tensor."""
        self._units.scale(stream)
        return super().write_exceptional(stream)

    def has_spoilt(self, stream: Any) -> bool:
        """Tell whether a unit has become NaN, as the norm of its parameters can make it."""
        if all(group.clip.floor is None for group in self.groups):
            return False
        found = self.engine.read(self.tables[2][self.slot], stream)
        return bool(np.isnan(found[:, tables.AFTER]).any())

    def clipped_norms(self, own: GroupOutcome) -> Array:
        """Return the norms of tensors after their units were scaled."""
        return np.where(own.skipped_tensors, own.tensor_norms, own.rows(2)[..., tables.AFTER])

    def scales(self, own: GroupOutcome) -> Array:
        """Return the smallest factor of a tensor's units."""
        left = own.skipped_tensors | (self._counts[own.member.tensors] == 0)
        return np.where(left, 1.0, own.rows(2)[..., tables.LEAST])

    def thresholds(self, own: GroupOutcome) -> Array:
        """Return infinite bounds: units have bounds, tensors have none."""
        return np.full_like(own.tensor_norms, math.inf)


def _family(group: Any, entry: Gradient, base: int) -> Family:
    """Return the units of a gradient, and those of its parameter where the bound is relative."""
    rule, owner = group.clip, None
    axes = rule.reduced_axes(len(entry.shape))
    if rule.floor is not None:
        param = describe(entry.name, entry.key, group.updated[entry.key], entry.engine)
        owner = _strided(param, axes)
    return Family((_strided(entry, axes),), owner, group.nonfinite == "zero", base)


def _strided(entry: Gradient, axes: tuple[int, ...]) -> Strided:
    memory = entry.facts.memory
    return Strided(entry.dtype, entry.shape, memory, memory, axes)


def _floor(rule: Any) -> float:
    return 0.0 if rule.floor is None else float(rule.floor)


def _kind(rule: Any) -> tuple[type[Clipper], float]:
    """Return a rule's clipper class and order; groups with the same pair share one clipper."""
    if rule is None:
        return Clipper, 2.0
    check(rule)
    if rule.follows_norms:
        return FollowingClipper, 2.0
    if rule.scope in ("unit", "element"):
        return (UnitClipper if rule.scope == "unit" else ValueClipper), float(rule.ord)
    return (Clipper if rule.ord == 2.0 else OrderClipper), float(rule.ord)


def clippers(groups: Iterable[Any], engine: Engine, stream: Any) -> list[Clipper]:
    """Return the clippers of groups, one for each kind of rule."""
    found: dict[tuple[type[Clipper], float], list[Any]] = {}
    kinds = [(group, _kind(group.clip)) for group in groups]
    follows = any(kind is FollowingClipper for _, (kind, _) in kinds)
    for group, own in kinds:
        if follows and own == (Clipper, 2.0):  # only one clipper can take a step by one native call
            own = FollowingClipper, 2.0
        found.setdefault(own, []).append(group)
    return [kind(own, ord, engine, stream) for (kind, ord), own in found.items()]

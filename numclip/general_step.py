"""A step of any group: all are read, all judged, and only then written.

An error thus changes nothing, and groups can share a norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from numclip import inputs
from numclip import old_clipping as clipping
from numclip.old_clipping import Factors
from numclip.dtypes import FLOAT64, Array
from numclip.group import GroupState
from numclip.inputs import LARGEST, Entry
from numclip.kernels import formulas
from numclip.measuring import Norms, Sums, batches, measure, sum_squares
from numclip.nonfinite import first_error
from numclip.outputs import Place, in_place
from numclip.report import GroupReport
from numclip.rules import Adaptive, ByNorm, ByValue, Rule
from numclip.step import Findings, Step, smallest, together
from numclip.units import Units


class GeneralStep(Step):
    """A step of a group of any kind, clipped by any rule; `factors` take the loss scale out."""

    def __init__(self, group: GroupState, unscale: float) -> None:
        """Read the group's gradients once."""
        self.group, self.unscale = group, unscale
        self.entries, self.batches = group.gradients()
        self.measure()
        self.nonfinite = not math.isfinite(self.total.roots[0])
        self.skipped = False
        self.threshold: float | None = None
        count = len(self.entries)
        self.thresholds = np.full(count, np.inf)
        self.clamped = np.zeros(count, np.bool_)
        self.decide(Factors(np.ones(count), np.zeros(count, np.int64), False, False))
        self.within: list[tuple[Units, Norms, Factors]] = []

    def measure(self) -> None:
        """Take the norms of the tensors and of all together."""
        count = len(self.entries)
        self._sums = sum_squares(self.entries, made=self.batches)
        self.norms = self.sums.norms(np.arange(count), count).divided(self.unscale)
        self.own_total = self.sums.norms(np.zeros(count, np.int64), 1).divided(self.unscale)
        self.total = self.own_total  # until the rule finds another, of several groups or order

    @property
    def sums(self) -> Sums:
        """The sums of squares of the gradients, the loss scale left in."""
        return self._sums

    @property
    def norm(self) -> float:
        """The L2 norm of the group's own gradients."""
        return float(self.own_total.values()[0])

    def decide(self, factors: Factors) -> None:
        """Take a factor for each tensor, and the loss scale out with it."""
        self.plain = factors
        self.scales = factors.values(FLOAT64)
        self.factors = factors.over(self.unscale, [entry.dtype for entry in self.entries])

    def apply(self) -> None:
        """Write the gradients, clipped, in place."""
        if self.skipped:
            return
        for units, _, factors in self.within:
            own = [units.entry.dtype] * units.count
            units.write(in_place(units.entry), factors.over(self.unscale, own))
        if not self.within and self.factors.active:
            clipping.apply(self.batches, self.factors)
        if isinstance(self.group.clip, ByValue):
            for k, entry in enumerate(self.entries):
                self.clamped[k] = _clamp(entry, self.group.clip)

    def update_factors(self) -> Array:
        """Return the factor that each gradient is to be taken times, after writing any other."""
        if self.within or isinstance(self.group.clip, ByValue):
            self.apply()
            return np.ones(len(self.entries))
        values = self.factors.values(FLOAT64)
        tiny = max((entry.dtype.tiny for entry in self.entries), default=0.0)
        if np.any((np.abs(values) < tiny) & (self.factors.mantissas != 0.0)):
            clipping.apply(self.batches, self.factors)  # no single number is so small
            return np.ones(len(self.entries))
        return values

    def scaled_copies(self) -> list[Entry]:
        """Return copies of the gradients, times their factors."""
        copies = [np.empty_like(entry.flat) for entry in self.entries]
        clipping.apply(batches(self.entries, copies), self.factors)
        made = []
        for entry, flat in zip(self.entries, copies, strict=True):
            values = flat.view(entry.native.dtype).reshape(entry.values.shape)
            slices = None if entry.slices is None else entry.slices.with_values(values)
            made.append(entry._replace(flat=flat, values=values, slices=slices))
        return made

    def findings(self, *, written: bool) -> Findings:
        """Return what was found and done."""
        norms, clipped, scales = self._columns(written=written)
        rows = [*zip(norms, clipped, scales, self.thresholds.copy(), strict=True)]
        report = self._report(math.hypot(*clipped), smallest(scales.tolist()))
        own = report.clipped_norm
        if self.total is not self.own_total:
            own = math.hypot(*clipped)
        return Findings(report, own, lambda: rows)

    def _report(self, clipped: float, scale: float) -> GroupReport:
        rule = self.group.clip
        if (rule is None or rule.scope == "group") and not self.skipped:
            one = self.plain.take(np.zeros(1, np.int64))
            clipped = float(_scaled_norms(self.total, one)[0])
        return GroupReport(
            norm=float(self.total.values()[0]),
            clipped_norm=clipped,
            scale=scale,
            clipped=scale < 1.0 or bool(self.clamped.any()),
            skipped=self.skipped,
            threshold=self.threshold,
            nonfinite=self.nonfinite,
        )

    def _columns(self, *, written: bool) -> tuple[Array, Array, Array]:
        """Return the norm before, the norm after, and the smallest factor of each tensor."""
        norms, scales = self.norms.values(), self.scales
        clipped = _scaled_norms(self.norms, self.plain)
        rule = self.group.clip
        if self.skipped:
            scales, clipped = np.ones_like(norms), norms
        elif self.within:
            values = [factors.values(FLOAT64) for _, _, factors in self.within]
            scales = np.array([smallest(own.tolist()) for own in values])
            own_norms = [_scaled_norms(norms, factors) for _, norms, factors in self.within]
            clipped = np.array([math.hypot(*own) for own in own_norms])
        elif isinstance(rule, ByValue):
            clipped = self._clamped_norms(rule, written=written)
            with np.errstate(invalid="ignore"):
                ratios = clipped / np.where(norms == 0.0, 1.0, norms)
            scales = np.where(self.clamped, ratios, 1.0)
        return norms, clipped, scales

    def _clamped_norms(self, rule: ByValue, *, written: bool) -> Array:
        """Return the norms after `ByValue`, which has no factor: measured, on copies if need be."""
        entries = self.entries
        if not written:
            entries = self.scaled_copies()
            self.clamped[:] = [_clamp(entry, rule) for entry in entries]
        count = len(entries)
        return sum_squares(entries).norms(np.arange(count), count).values()

    def observe(self, number: int) -> dict[str, Array]:
        """Return the state of the group's rule after this step."""
        rule = self.group.clip
        if rule is None or self.nonfinite:
            return self.group.rule_state
        jointly = rule.scope == "group"
        norms = self.total.values() if jointly else self.norms.values()
        clipped = norms * (self.scales[:1] if jointly else self.scales)
        total = float(self.total.values()[0])
        state = self.group.rule_state
        return rule.observe(_finite(norms), _finite(clipped), total, number, state)


def judge(steps: Sequence[GeneralStep], number: int, *, write: bool) -> None:
    """Apply the policies for NaN and Inf, and find the factor of every tensor."""
    for step in steps:
        if step.nonfinite and step.group.nonfinite == "raise":
            raise first_error(step.entries, None)
    for step in steps:
        if step.group.clip is not None:
            step.group.clip.bound(number)  # refuses a bad one before anything is written
    for step in steps:
        if step.nonfinite and step.group.nonfinite == "zero":
            _zero(step, write=write)
        skips = step.group.nonfinite == "skip"
        step.skipped = skips and any(other.nonfinite for other in _sharing(step, steps))
    joints: dict[tuple[str, object], Norms] = {}  # groups that share a norm read it once
    for step in steps:
        rule = step.group.clip
        if rule is None or step.skipped or not step.entries:
            continue
        if rule.scope == "group":
            key, sharing = step.shared_key, _sharing(step, steps)
            if key not in joints:
                joints[key] = _joint_norm(sharing, rule)
            _judge_jointly(step, sharing, joints[key], rule, number)
        elif rule.scope == "tensor":
            _judge_tensors(step, rule, number)
        elif rule.scope == "unit":
            _judge_units(step, rule, number)


def _zero(step: GeneralStep, *, write: bool) -> None:
    """Measure again with 0 for what is not finite, which is written if asked."""
    if not write:
        step.entries = [e._replace(flat=e.flat.copy()) for e in step.entries]
    for entry in step.entries:
        entry.native[~np.isfinite(entry.native)] = 0
    step.batches = batches(step.entries)
    step.measure()


def _finite(values: Array) -> Array:
    """Return norms as rules take them: NaN as 0, what exceeds float64 as its largest."""
    return np.nan_to_num(values, nan=0.0, posinf=LARGEST)


def _total(step: GeneralStep) -> float:
    return float(_finite(step.total.values())[0])


def _sharing(step: GeneralStep, steps: Sequence[GeneralStep]) -> list[GeneralStep]:
    """Return the steps that are clipped by one norm with this one."""
    return [other for other in steps if other.shared_key == step.shared_key]


def _joint_norm(sharing: Sequence[GeneralStep], rule: Rule) -> Norms:
    """Return the norm of all gradients that are clipped by one norm."""
    unscale = sharing[0].unscale
    if rule.ord != 2.0:
        entries = [entry for step in sharing for entry in step.entries]
        return measure(entries, rule.ord).divided(unscale)
    if len(sharing) == 1:
        return sharing[0].own_total
    return together(sharing)


def _judge_jointly(
    step: GeneralStep, sharing: Sequence[GeneralStep], joint: Norms, rule: Rule, number: int
) -> None:
    """Find the one factor of a group, by its own norm or by that of all that share it."""
    entries = [entry for other in sharing for entry in other.entries]
    step.total = joint
    norms = _finite(joint.values())
    bounds = rule.thresholds(norms, float(norms[0]), number, step.group.rule_state)
    step.threshold = float(bounds[0])
    step.thresholds[:] = bounds[0]
    elements = sum(entry.flat.size for entry in entries)
    ones = formulas.root(float(elements), rule.ord)
    dtypes = {entry.dtype for entry in entries}
    loss = clipping.repeated_loss(entries, rule.ord)
    factors = clipping.decide(joint, bounds, dtypes, ones, loss)
    step.decide(factors.take(np.zeros(len(step.entries), np.int64)))


def _judge_tensors(step: GeneralStep, rule: Rule, number: int) -> None:
    """Find the factor of each tensor by its own norm."""
    if rule.ord != 2.0:
        own = [measure([entry], rule.ord).divided(step.unscale) for entry in step.entries]
        step.norms = Norms(*map(np.concatenate, zip(*own, strict=True)))
    divisors = np.array([rule.divisor(entry.dense_size) for entry in step.entries])
    norms = step.norms.divided(divisors)
    bounds = rule.thresholds(_finite(norms.values()), _total(step), number, step.group.rule_state)
    step.thresholds[:] = bounds * divisors
    parts = []
    for k, entry in enumerate(step.entries):
        norm = Norms(*(column[k : k + 1] for column in norms))
        ones = formulas.root(float(entry.flat.size), rule.ord) / divisors[k]
        loss = clipping.repeated_loss([entry], rule.ord) / divisors[k]
        parts.append(clipping.decide(norm, bounds[k : k + 1], [entry.dtype], ones, loss))
    step.decide(clipping.together(parts))


def _judge_units(step: GeneralStep, rule: Rule, number: int) -> None:
    """Find the factors of each tensor's units."""
    bound = rule.bound(number)
    for entry in step.entries:
        ndim = entry.values.ndim
        if isinstance(rule, Adaptive):
            units = Units(entry, inputs.adaptive_axes(rule.axes, ndim))
            owner = inputs.entry(entry.name, entry.key, step.group.params[str(entry.key)])
            norms = units.norms().divided(step.unscale)
            factors = units.decide_relative(norms, Units(owner, units.axes), bound, rule.eps)
        elif isinstance(rule, ByNorm):
            units = Units(entry, inputs.axes_of(rule.axes, ndim) or ())
            norms = units.norms(rule.ord).divided(step.unscale)
            factors = units.decide(norms, bound, rule.ord)
        step.within.append((units, norms, factors))


def _clamp(entry: Entry, rule: ByValue) -> bool:
    """Hold a gradient's elements between the bounds; tell whether one was beyond them."""
    values = entry.native
    beyond = values.size > 0 and bool(
        np.fmin.reduce(values) < rule.min or np.fmax.reduce(values) > rule.max
    )
    place = Place(None, entry.flat, values, in_place=True, staged=False)
    clipping.clamp(entry, place, rule.min, rule.max)
    return beyond


def _scaled_norms(norms: Norms, factors: Factors) -> Array:
    """Return the norms times the factors, which need not exist without them."""
    return norms._replace(
        roots=norms.roots * factors.mantissas, exponents=norms.exponents + factors.powers
    ).values()

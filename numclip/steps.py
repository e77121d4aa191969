"""One step of parameter groups: read every group, judge all, and only then write.

An error thus changes nothing, and groups can share a norm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from numclip import clipping, inputs
from numclip.clipping import Factors
from numclip.dtypes import FLOAT64, Array
from numclip.group import GroupState
from numclip.inputs import Entry
from numclip.kernels import formulas
from numclip.measuring import Norms, Sums, batches, measure, sum_squares
from numclip.nonfinite import first_error
from numclip.outputs import Place, in_place
from numclip.report import ClipReport, GroupReport, TensorReport
from numclip.rules import Adaptive, ByGlobalNorm, ByNorm, ByValue, Rule
from numclip.units import Units

LARGEST = float(np.finfo(np.float64).max)


class Step:
    """What a step found out about one group, and what it is going to do to each tensor.

    Norms are those of the gradients over the loss scale; `factors` take the loss scale out.
    """

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
        self.sums = sum_squares(self.entries, made=self.batches)
        self.norms = self.sums.norms(np.arange(count), count).divided(self.unscale)
        self.total = self.sums.norms(np.zeros(count, np.int64), 1).divided(self.unscale)

    def decide(self, factors: Factors) -> None:
        """Take a factor for each tensor, and the loss scale out with it."""
        self.plain = factors
        self.scales = factors.values(FLOAT64)
        self.factors = factors.over(self.unscale, [entry.dtype for entry in self.entries])


def judge(steps: Sequence[Step], number: int, *, write: bool) -> None:
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
            key, sharing = _shared_key(step), _sharing(step, steps)
            if key not in joints:
                joints[key] = _joint_norm(sharing, rule)
            _judge_jointly(step, sharing, joints[key], rule, number)
        elif rule.scope == "tensor":
            _judge_tensors(step, rule, number)
        elif rule.scope == "unit":
            _judge_units(step, rule, number)


def _zero(step: Step, *, write: bool) -> None:
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


def _total(step: Step) -> float:
    return float(_finite(step.total.values())[0])


def _sharing(step: Step, steps: Sequence[Step]) -> list[Step]:
    """Return the steps that are clipped by one norm with this one."""
    return [other for other in steps if _shared_key(other) == _shared_key(step)]


def _joint_norm(sharing: Sequence[Step], rule: Rule) -> Norms:
    """Return the norm of all gradients that are clipped by one norm."""
    unscale = sharing[0].unscale
    if rule.ord != 2.0:
        entries = [entry for step in sharing for entry in step.entries]
        return measure(entries, rule.ord).divided(unscale)
    if len(sharing) == 1:
        return sharing[0].total
    return _together(sharing).divided(unscale)


def _together(steps: Sequence[Step]) -> Norms:
    """Return the L2 norm of several groups, the loss scale left in."""
    sums = Sums(*map(np.concatenate, zip(*(step.sums for step in steps), strict=True)))
    return sums.norms(np.zeros(sums.totals.size, np.int64), 1)


def _judge_jointly(
    step: Step, sharing: Sequence[Step], joint: Norms, rule: Rule, number: int
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


def _judge_tensors(step: Step, rule: Rule, number: int) -> None:
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


def _judge_units(step: Step, rule: Rule, number: int) -> None:
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


def acts_within(rule: Rule | None) -> bool:
    """Tell whether a rule has no factor for a whole tensor."""
    return rule is not None and rule.scope in ("element", "unit")


def apply(step: Step) -> None:
    """Write the group's gradients, clipped, in place."""
    if step.skipped:
        return
    for units, _, factors in step.within:
        units.write(
            in_place(units.entry), factors.over(step.unscale, [units.entry.dtype] * units.count)
        )
    if not step.within and step.factors.active:
        clipping.apply(step.batches, step.factors)
    if isinstance(step.group.clip, ByValue):
        for k, entry in enumerate(step.entries):
            step.clamped[k] = _clamp(entry, step.group.clip)


def _clamp(entry: Entry, rule: ByValue) -> bool:
    """Hold a gradient's elements between the bounds; tell whether one was beyond them."""
    values = entry.native
    beyond = values.size > 0 and bool(
        np.fmin.reduce(values) < rule.min or np.fmax.reduce(values) > rule.max
    )
    place = Place(None, entry.flat, values, in_place=True, staged=False)
    clipping.clamp(entry, place, rule.min, rule.max)
    return beyond


def scaled_copies(step: Step) -> list[Entry]:
    """Return copies of the gradients, times their factors."""
    copies = [np.empty_like(entry.flat) for entry in step.entries]
    clipping.apply(batches(step.entries, copies), step.factors)
    made = []
    for entry, flat in zip(step.entries, copies, strict=True):
        values = flat.view(entry.native.dtype).reshape(entry.values.shape)
        slices = None if entry.slices is None else entry.slices.with_values(values)
        made.append(entry._replace(flat=flat, values=values, slices=slices))
    return made


def report(steps: Sequence[Step], number: int, *, written: bool) -> ClipReport:
    """Return what the step found and did."""
    groups: dict[str, GroupReport] = {}
    tensors: dict[str, TensorReport] = {}
    for step in steps:
        own = _tensor_reports(step, written=written)
        groups[step.group.name] = _group_report(step, own)
        tensors.update(zip(step.group.params, own, strict=True))
    joint = _together(steps).divided(steps[0].unscale)
    bounds = {_shared_key(step): step.threshold for step in steps}
    return ClipReport(
        step=number,
        norm=float(joint.values()[0]),
        clipped_norm=math.hypot(*(tensor.clipped_norm for tensor in tensors.values())),
        scale=_smallest([group.scale for group in groups.values()]),
        clipped=any(group.clipped for group in groups.values()),
        skipped=any(group.skipped for group in groups.values()),
        threshold=bounds.popitem()[1] if len(bounds) == 1 else None,
        nonfinite=any(group.nonfinite for group in groups.values()),
        groups=groups,
        tensors=tensors,
    )


def _shared_key(step: Step) -> tuple[str, object]:
    """Return what is the same for groups that are clipped by one norm."""
    rule = step.group.clip
    if isinstance(rule, ByGlobalNorm) and rule.shared is not None:
        return "shared", rule.shared
    return "group", step.group.name


def _group_report(step: Step, own: Sequence[TensorReport]) -> GroupReport:
    scale = _smallest([tensor.scale for tensor in own])
    rule = step.group.clip
    clipped = math.hypot(*(tensor.clipped_norm for tensor in own))
    if rule is not None and rule.scope == "group" and not step.skipped:
        clipped = float(_scaled_norms(step.total, step.plain.take(np.zeros(1, np.int64)))[0])
    return GroupReport(
        norm=float(step.total.values()[0]),
        clipped_norm=clipped,
        scale=scale,
        clipped=scale < 1.0 or bool(step.clamped.any()),
        skipped=step.skipped,
        threshold=step.threshold,
        nonfinite=step.nonfinite,
    )


def _smallest(scales: Sequence[float]) -> float:
    return math.nan if any(map(math.isnan, scales)) else min(scales, default=1.0)


def _tensor_reports(step: Step, *, written: bool) -> list[TensorReport]:
    """Return what became of each tensor."""
    norms, scales = step.norms.values(), step.scales
    clipped = _scaled_norms(step.norms, step.plain)
    rule = step.group.clip
    if step.skipped:
        scales, clipped = np.ones_like(norms), norms
    elif step.within:
        values = [factors.values(FLOAT64) for _, _, factors in step.within]
        scales = np.array([_smallest(own.tolist()) for own in values])
        own_norms = [_scaled_norms(norms, factors) for _, norms, factors in step.within]
        clipped = np.array([math.hypot(*own) for own in own_norms])
    elif isinstance(rule, ByValue):
        clipped = _clamped_norms(step, rule, written=written)
        with np.errstate(invalid="ignore"):
            ratios = clipped / np.where(norms == 0.0, 1.0, norms)
        scales = np.where(step.clamped, ratios, 1.0)
    columns = zip(norms, clipped, scales, step.thresholds, strict=True)
    return [TensorReport(*map(float, row)) for row in columns]


def _scaled_norms(norms: Norms, factors: Factors) -> Array:
    """Return the norms times the factors, which need not exist without them."""
    return norms._replace(
        roots=norms.roots * factors.mantissas, exponents=norms.exponents + factors.powers
    ).values()


def _clamped_norms(step: Step, rule: ByValue, *, written: bool) -> Array:
    """Return the norms after `ByValue`, which has no factor: measured, on copies if need be."""
    entries = step.entries
    if not written:
        entries = scaled_copies(step)
        step.clamped[:] = [_clamp(entry, rule) for entry in entries]
    count = len(entries)
    return sum_squares(entries).norms(np.arange(count), count).values()


def observe(step: Step, number: int) -> dict[str, Array]:
    """Return the state of the group's rule after this step."""
    rule = step.group.clip
    if rule is None or step.nonfinite:
        return step.group.rule_state
    jointly = rule.scope == "group"
    norms = step.total.values() if jointly else step.norms.values()
    clipped = norms * (step.scales[:1] if jointly else step.scales)
    total = float(step.total.values()[0])
    return rule.observe(_finite(norms), _finite(clipped), total, number, step.group.rule_state)

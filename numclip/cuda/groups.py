"""Parameter groups on the GPU: a fixed number of launches a step, and no waiting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from numclip import inputs
from numclip.cuda import arrays
from numclip.cuda.group import DeviceGroupState, Slots
from numclip.cuda.report import Found, build
from numclip.cuda.values import DeviceReport
from numclip.dtypes import Array
from numclip.group import Group
from numclip.groups import ParamGroups
from numclip.history import History
from numclip.kernels.cuda import tables
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.device import clear, on_stream, require
from numclip.kernels.cuda.plan import HostTable, Law, Plan, Pool
from numclip.kernels.cuda.update_plan import Updates
from numclip.nonfinite import first_error
from numclip.report import ClipReport
from numclip.rules import ByGlobalNorm, ByValue
from numclip.running_rules import AdaGC, AutoClip, ZClip

if TYPE_CHECKING:
    from numclip.optim import Optimizer

KEPT = 64
"""How many steps' reports are kept on the GPU."""

FOLLOWING = AutoClip, ZClip, AdaGC


class DeviceParamGroups(ParamGroups):
    """`ParamGroups` on an NVIDIA GPU; made by ``ParamGroups(..., device="cuda")``.

    Nothing here waits for the GPU, but what reads values: a report's attributes, `history`,
    `state_dict`, ``copy_to_host()``; a group whose policy is ``"raise"``; rules that follow the
    norms (`AutoClip`, `ZClip`, `AdaGC`), whose bounds are found on the host. A report must be
    read within 64 steps; `history` takes up the steps whose reports are still there when it is
    looked at.

    After the first step nothing is allocated, so that a step (with rules and policies that do
    not wait, and bounds and rates that are no functions) can be captured in a CUDA graph: set
    `stream` to the one that is captured. What is captured writes its report to the memory of
    that step.

    Attributes
    ----------
    params, grads : mapping of str to DeviceArray
        Views into the groups' buffers, which CuPy, PyTorch and numba take without a copy.
    stream : stream
        Where in order everything is done. May be set, to streams of numba, CuPy or PyTorch,
        once what was started on the stream before is done: the new one does not wait for it.

    Raises
    ------
    DeviceError
        Where there is no GPU, no driver or no numba-cuda; the message says which.
    ValueError
        For sparse groups, rules with axes or of an order other than 2.
    """

    device = "cuda"
    _pending: list[DeviceReport]
    _history: History

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        history: int = 10_000,
        device: str = "cuda",
        stream: Any = None,
    ) -> None:
        require()
        self.stream = stream
        with on_stream(None):
            self._build(groups, history, device)

    def _build(self, groups: Sequence[Group], history: int, device: str) -> None:
        """Fill the buffers and tables, on the default stream."""
        super().__init__(groups, history=history, device=device)
        self._spans: list[Span] = []
        self._pools: list[Pool] = []
        self._pools_of: dict[str, range] = {}
        self._tensors: dict[str, range] = {}
        for turn, members in enumerate(_sharing(self)):
            self._add(turn, members)
        self._plan = Plan(self._spans, self._pools, 0)
        self._outcomes = self._plan.outcomes(KEPT, 0)
        self._after = self._plan.outcomes(KEPT if self._by_value() else 1, 0)
        self._laws_after = HostTable((len(self._pools), tables.LAW_COLUMNS), 0)
        self._find_divisors()
        self._reports: list[DeviceReport | None] = [None] * KEPT
        self._judged = 0

    def _state_of(self, group: Group) -> Any:
        return DeviceGroupState(group)

    def _add(self, turn: int, members: Sequence[Any]) -> None:
        """Add the tensors and pools of one group, or of groups that share a norm."""
        first, pool = len(self._spans), len(self._pools)
        for group in members:
            start = len(self._spans)
            self._spans += group.spans()
            self._tensors[group.name] = range(start, len(self._spans))
        policy, rule = members[0].nonfinite, members[0].clip
        if rule is not None and rule.scope == "group":
            self._pools.append(Pool(first, len(self._spans), turn, policy))
        else:
            self._pools += [Pool(k, k + 1, turn, policy) for k in range(first, len(self._spans))]
        own = range(pool, len(self._pools))
        self._pools_of |= {group.name: own for group in members}

    def _by_value(self) -> list[Any]:
        return [group for group in self if isinstance(group.clip, ByValue)]

    @property
    def stream(self) -> Any:
        """The stream on which everything is done, in order."""
        return self._stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._stream = arrays.stream_from(stream)
        self._held = stream  # some libraries destroy a stream that nobody holds

    @property
    def history(self) -> History:
        """The record of the steps; asking for it waits for the GPU."""
        pending, self._pending = self._pending, []
        for report in pending:
            if not report.expired:
                self._history.record(report.report)
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        self._pending, self._history = [], history

    def set_grads(self, grads: Mapping[str, Any]) -> None:
        """Copy gradients in, from the host or the GPU.

        Parameters
        ----------
        grads : mapping of str to array or None
            Gradients by parameter, of its shape; those on the GPU of its dtype and in C order.
            None means zero. Parameters that are not named keep the gradients they have.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is copied then.
        """
        fitting: list[Any] = self._fitting(grads)
        for group, name, grad in fitting:
            own = group.grads[name]
            if grad is None:
                clear(own.address, own.nbytes, self.stream)
            else:
                own.copy_from(grad, self.stream)

    def accumulate(self, grads: Mapping[str, Any]) -> None:
        """Add gradients to those there are.

        Parameters
        ----------
        grads : mapping of str to array or None
            As in `set_grads`; None adds nothing.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is added then.
        """
        fitting: list[Any] = self._fitting(grads)
        for group, name, grad in fitting:
            if grad is not None:
                group.grads[name].add(grad, self.stream)

    def zero_grads(self) -> None:
        """Set every gradient to zero."""
        states: Any = iter(self)
        for group in states:
            group.zero(self.stream)

    def clip(self, *, unscale: float = 1.0, apply: bool = True) -> Any:
        """Clip the gradients of every group by its rule, in place; the host does not wait.

        Parameters
        ----------
        unscale : float, default 1.0
            The loss scale that the gradients carry, > 0.
        apply : bool, default True
            False measures and decides, but writes no gradient and counts no step. Not with
            `ByValue`, which has to write what it measures.

        Returns
        -------
        DeviceReport
            What was found and done, as a `ClipReport` for whoever reads it.

        Raises
        ------
        NonFiniteGradientError
            Where a group's policy is "raise", for which the host waits. Nothing is modified.
        TypeError, ValueError
            Where an argument does not fit, or a bound that is a function gives no bound.
        """
        scale = inputs.positive("unscale", unscale)
        if self._by_value() and not apply:
            raise ValueError("apply: expected True on the GPU with a rule ByValue, got False")
        found = self._judge(scale)
        if apply:
            self._plan.scale(found.outcome, self.stream)
            self._clamp(found)
        return self._report(found, counts=apply)

    def _judge(self, unscale: float) -> Found:
        """Measure and decide; refuse before anything is written."""
        bounds = {group.name: self._bounds(group) for group in self}
        turn = self._judged % KEPT
        if (report := self._reports[turn]) is not None:
            report.expire(KEPT)
        self._reports[turn] = None
        found = Found(self.step, self._outcomes[turn], bounds, unscale)
        self._plan.write_laws(self._law(found), self.stream)
        self._plan.measure(2.0, self.stream)
        self._plan.judge(found.outcome, self.stream)
        if any(group.nonfinite == "raise" for group in self):
            self._refuse_nonfinite(found)
        if any(isinstance(group.clip, FOLLOWING) for group in self):
            self._follow_norms(found)
        return found

    def _bounds(self, group: Any) -> Array:
        """Return the bound of each of a group's pools, as the rule has it at this step."""
        rule = group.clip
        free = rule is None or isinstance(rule, FOLLOWING)
        return np.full(len(self._pools_of[group.name]), math.inf if free else rule.bound(self.step))

    def _law(self, found: Found) -> Law:
        """Return the law of a step."""
        bounds = np.full(len(self._pools), math.inf)
        for group in self:
            bounds[self._pools_of[group.name]] = found.bounds[group.name]
        return Law(bounds, self._divisors, unscale=found.unscale)

    def _find_divisors(self) -> None:
        """Find out by what each pool's norm is divided."""
        self._divisors = np.ones(len(self._pools))
        for group in self:
            params = group.params.values()
            if group.clip is not None:  # a group that has one pool has a divisor of 1
                for pool, param in zip(self._pools_of[group.name], params, strict=False):
                    self._divisors[pool] = group.clip.divisor(math.prod(param.shape))

    def _refuse_nonfinite(self, found: Found) -> None:
        """Raise the error of the first bad gradient of a group whose policy says so."""
        sums, _ = found.read(self.stream)
        for group in self:
            bad = sums[self._tensors[group.name], tables.BAD].any()
            if group.nonfinite == "raise" and bad:
                entries = [
                    arrays.describe(f"{group.name}.{name}", name, grad)
                    for name, grad in group.grads.items()
                ]
                copies = [arrays.host_entry(entry, self.stream) for entry in entries]
                raise first_error(copies, None)

    def _follow_norms(self, found: Found) -> None:
        """Decide again by the rules that follow the norms, which are read for that."""
        report = self._built(found)
        for group in self:
            if isinstance(group.clip, FOLLOWING):
                norms, _, total = _told(group, report)
                state = group.rule_state
                found.bounds[group.name] = group.clip.thresholds(norms, total, self.step, state)
        self._plan.write_laws(self._law(found), self.stream)
        self._plan.judge(found.outcome, self.stream)

    def _clamp(self, found: Found) -> None:
        """Hold the elements of groups by value, and measure what that makes of the norms."""
        groups = self._by_value()
        if not groups:
            return
        for group in groups:
            bounds = group.clip.min, group.clip.max
            members = self._tensors[group.name]
            self._plan.clamp(found.outcome, *bounds, self.stream, members)
        found.after = self._after[self._judged % KEPT]
        law = self._law(found)._replace(unscale=1.0)
        self._plan.write_laws(law, self.stream, self._laws_after)
        self._plan.measure(2.0, self.stream)
        self._plan.judge(found.after, self.stream, self._laws_after)

    def _built(self, found: Found) -> ClipReport:
        return build(found, list(self), self._tensors, self._pools_of, self.stream)

    def _report(self, found: Found, *, counts: bool) -> DeviceReport:
        """Return the report to come; where it counts, let rules and history know."""
        report = DeviceReport(self.step, lambda: self._built(found))
        self._reports[self._judged % KEPT] = report
        self._judged += 1
        if counts:
            self._observe(report)
            self._pending = [*self._pending[1 - KEPT :], report]
            self.step += 1
        return report

    def _observe(self, report: DeviceReport) -> None:
        """Let the rules that follow the norms know."""
        for group in self:
            if isinstance(group.clip, FOLLOWING) and not report.groups[group.name].nonfinite:
                norms, clipped, total = _told(group, report)
                group.rule_state = group.clip.observe(
                    norms, clipped, total, self.step, group.rule_state
                )

    def optimizer_slots(self, states: int) -> dict[str, Any]:
        """Return an optimizer's states and counts for each group; for `optim.Optimizer`."""
        with on_stream(None):
            return self._slots(states)

    def _slots(self, states: int) -> dict[str, Any]:
        """Make an optimizer's states and counts, on the default stream."""
        members: Any = iter(self)
        slots = {group.name: Slots(group, states) for group in members}
        params: list[int] = []
        kept: list[list[int]] = [[] for _ in range(states)]
        for name in self._tensors:
            params += [param.address for param in slots[name].params]
            for k in range(states):
                kept[k] += [own[k].address for own in slots[name].views]
        updates = Updates(self._plan, params, kept)
        for name, own in slots.items():
            own.attach(updates, self._pools_of[name])
        return slots

    def update(self, optimizer: Optimizer, rates: Mapping[str, float], unscale: float) -> Any:
        """Clip and update in one pass more than measuring takes; for `optim.Optimizer`."""
        found = self._judge(unscale)
        slots: dict[str, Any] = optimizer._slots
        updates: Updates = next(iter(slots.values())).updates
        settings = np.zeros((len(self._pools), 5))
        for group in self:
            settings[self._pools_of[group.name]] = optimizer.settings(rates[group.name])
        updates.write_settings(settings, self.stream)
        if self._by_value():
            self._plan.scale(found.outcome, self.stream)
            self._clamp(found)
        else:
            self._plan.scale_rare(found.outcome, self.stream)
        outcome = found.after or found.outcome
        if len(optimizer.state_names) == 2:
            updates.adam(outcome, self.stream)
        else:
            updates.descend(outcome, len(optimizer.state_names) == 1, self.stream)
        return self._report(found, counts=True)


def _sharing(groups: ParamGroups) -> list[list[Any]]:
    """Return the groups, those that share a norm together."""
    found: dict[Any, list[Any]] = {}
    for group in groups:
        rule = group.clip
        shares = isinstance(rule, ByGlobalNorm) and rule.shared is not None
        key = ("shared", rule.shared) if shares else ("group", group.name)  # type: ignore[union-attr]
        found.setdefault(key, []).append(group)
    return list(found.values())


def _told(group: Any, report: Any) -> tuple[Array, Array, float]:
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

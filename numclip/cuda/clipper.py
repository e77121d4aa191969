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

from numclip.old_clipping import repeated_loss
from numclip.cuda.clipping import row_span, span
from numclip.cuda.report import Columns, Told, norms_of, scaled, tell
from numclip.dtypes import Array
from numclip.group import shared_key
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.plan import Plan
from numclip.law import Law, Pool
from numclip.memory import AnySpan
from numclip.rules import Rule
from numclip.slices import IndexedSlices

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
        spans: list[AnySpan] = []
        pools: list[Pool] = []
        for turn, members in enumerate(sharing):
            first, own = len(spans), len(pools)
            for group in members:
                start = len(spans)
                spans += _spans(group, ord)
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
        self.rows: list[IndexedSlices] = []

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
        self._take_rows(stream)
        self.plan.write_laws(self.law(found), stream)
        self.plan.measure(2.0, stream)
        self.plan.decide(self.outcomes[found.turn], stream)

    def _take_rows(self, stream: Any) -> None:
        """Let the plan know the rows that the sparse groups have at present."""
        entries = [e for group in self.groups if group.sparse for e in group.entries()]
        self.rows = [entry.slices for entry in entries]
        if entries:
            groupings = [slices.grouping for slices in self.rows]
            self.plan.take_rows([row_span(entry) for entry in entries], groupings, stream)

    def law(self, found: Found) -> Law:
        """Return the law of a step."""
        bounds, losses = (np.full(len(self.plan.pools), number) for number in (math.inf, 0.0))
        for group in self.groups:
            pools = self.pools[group.name]
            bounds[pools] = found.bounds[group.name]
            for k, entry in enumerate(group.entries() if group.sparse else []):
                losses[pools[min(k, len(pools) - 1)]] += repeated_loss([entry], self.ord)
        return Law(bounds, self._divisors, unscale=found.unscale, ord=self.ord, loss=losses)

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
        self.plan.write_exceptional(self.outcomes[found.turn], stream)
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


def _sharing(groups: Iterable[Any]) -> list[list[Any]]:
    """Return the groups, those that share a norm together."""
    found: dict[Any, list[Any]] = {}
    for group in groups:
        found.setdefault(shared_key(group.name, group.clip), []).append(group)
    return list(found.values())


def _spans(group: Any, ord: float) -> list[AnySpan]:
    """Return where a group's gradients are, which are written in place."""
    if group.sparse:
        return [row_span(entry) for entry in group.entries()]
    return [span(entry, entry, group.nonfinite, ord) for entry in group.entries()]

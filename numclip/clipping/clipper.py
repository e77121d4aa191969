"""Clipping of groups by one kind of rule: what is measured, decided and written.

A *clipper* serves the groups of one kind of rule, with tables and kernel launches of its own, so
that kinds do not depend on one another. Only rules that follow the norms and the policy "raise"
wait for the engine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numclip import tables
from numclip.clipping.clip import repeated_loss, row_span, span_of
from numclip.clipping.held_rows import rows_of
from numclip.clipping.outcome import GroupOutcome, norms_of, scaled_norms
from numclip.dtypes import Array
from numclip.engine import AtOnce, Engine, Outcome
from numclip.law import Law, Pool
from numclip.memory import AnySpan
from numclip.slices import IndexedSlices


class Clipper:
    """Scales tensors or groups by a factor of their L2 norms, or only measures them.

    Attributes
    ----------
    ord : float
        The order of the norms.
    groups : list of GroupState
        The groups; those that share a norm are adjacent.
    rules, keys : dict of str
        The rule of each group, and the key that groups sharing a norm have in common.
    tensors, pools : dict of str to range
        The indices of each group's tensors and pools in the plan.
    bounds, divisors : array
        The present bound on the norm of each pool, and the divisor of that norm.
    slot, found : int, pair of tables
        The row of the present step in the tables, and the sums and decisions in that row.
    tables : list
        The results, a row for each step: sums, decisions, and tables that subclasses add.
    given, merged : array or None
        The sums over all ranks: one row for each pool, and the rows that reports use.
    merged_rows : dict of str to range
        The rows of `merged` that belong to each group: one, or one for each tensor.
    scheduled : list
        The rules whose bounds depend on the step, one for each norm, each with its pools.
    strict, follows, decides_again : bool
        Whether the policy of a group is "raise", whether rules follow the norms, and whether
        `decide` has to follow `measure`.
    absent : frozenset of str
        The parameters that have no gradient at the present step, where rules follow norms.
    writes_within : bool
        Whether elements of one tensor can have different factors, or are set to 0 if not finite.
    by_norms, writes_all : bool
        Whether L2 norms and bounds alone decide; whether updates read gradients that are written.
    """

    by_norms = True

    follows = decides_again = writes_within = writes_all = False
    absent: frozenset[str] = frozenset()
    slot: int
    found: Outcome
    tables: list[Any]
    given: Array | None = None
    merged: Array | None = None
    merged_rows: dict[str, range]
    _leaves = False

    def __init__(self, groups: Sequence[Any], ord: float, engine: Engine, stream: Any) -> None:
        """Make plans."""
        self.ord, self.engine = ord, engine
        self.rules = {group.name: group.clip for group in groups}
        self.keys = {group.name: shared_key(group) for group in groups}
        self.strict = any(group.nonfinite == "raise" for group in groups)
        self.writes_within |= any(group.nonfinite == "zero" for group in groups)
        self.tensors: dict[str, range] = {}
        self.pools: dict[str, range] = {}
        self._lay_out(groups)
        self.plan = self._plan(stream)
        self.divisors = self._found_divisors(self._sizes_of({}))
        self.rows: list[IndexedSlices] = []
        self._sparse = any(group.sparse for group in groups)
        self._losses: float | Array = 0.0
        self._own_losses: float | Array = 0.0
        self.losses_of_tensors: Array | None = None
        self._sizes: Array | None = None
        self.unscale = 1.0
        self.bounds = np.full(len(self._pool_list), math.inf)
        self.scheduled: list[Any] = []
        self._found: tuple[list[float], Array] = [], self.bounds
        self._written: tuple[Array, float, Any] | None = None
        self._as_they_are: Outcome | None = None
        self._set_bounds()

    @property
    def nbytes(self) -> int:
        """The bytes that a step takes in the tables."""
        return sum(8 * math.prod(shape) for shape in self._shapes())

    def keep(self, steps: int, stream: Any) -> None:
        """Allocate the tables with a row for each of `steps` steps."""
        self.tables = [self.engine.table((steps, *shape), stream) for shape in self._shapes()]

    def _lay_out(self, groups: Sequence[Any]) -> None:
        """Assign numbers to tensors and pools; groups that share a norm get consecutive ones."""
        sharing: dict[Any, list[Any]] = {}
        for group in groups:
            sharing.setdefault(self.keys[group.name], []).append(group)
        self.groups = [group for members in sharing.values() for group in members]
        self._pool_list: list[Pool] = []
        count = 0
        for number, members in enumerate(sharing.values()):
            first, own = count, len(self._pool_list)
            for group in members:
                self.tensors[group.name] = range(count, count + len(group.names))
                count += len(group.names)
            rule, policy = members[0].clip, members[0].nonfinite
            if rule is not None and rule.scope == "group":
                self._pool_list.append(Pool(first, count, number, policy))
            else:
                self._pool_list += [Pool(k, k + 1, number, policy) for k in range(first, count)]
            pools = range(own, len(self._pool_list))
            self.pools |= {group.name: pools for group in members}

    def _plan(self, stream: Any) -> Any:
        """Return a new plan for the gradients, which are written in place."""
        spans = [one for group in self.groups for one in _spans(group, self.ord)]
        return self.engine.plan(spans, self._pool_list, stream)

    def _sizes_of(self, known: Mapping[str, list[int]]) -> list[int]:
        """Return each tensor's number of elements, which `known` has for some groups."""
        return [
            size
            for group in self.groups
            for size in known.get(group.name)
            or [math.prod(param.shape) for param in group.params.values()]
        ]

    def _found_divisors(self, sizes: Sequence[int]) -> Array:
        """Return the divisor of each pool's norm, from the sizes of all tensors."""
        divisors = np.ones(len(self._pool_list))
        for group in self.groups:
            rule = self.rules[group.name]
            for p in self.pools[group.name] if rule is not None else ():
                pool = self._pool_list[p]
                divisors[p] = rule.divisor(sum(sizes[pool.first : pool.last]))
        return divisors

    def take_sizes(self, known: Mapping[str, list[int]]) -> None:
        """Set the sizes of some groups' tensors to those over all ranks, and find the divisors."""
        if known.keys().isdisjoint(self.rules):
            return
        sizes = self._sizes_of(known)
        self.divisors = self._found_divisors(sizes)
        pairs = zip(self.plan.spans, sizes, strict=True)
        stored = [size * span.dtype.components for span, size in pairs]
        self._sizes = np.array([sum(stored[pool.first : pool.last]) for pool in self._pool_list])
        self._written = None

    def _set_bounds(self) -> None:
        """Set the bounds that do not depend on the step, and list the rules whose bounds do."""
        asked: set[int] = set()
        for group in self.groups:
            rule, pools = self.rules[group.name], self.pools[group.name]
            if rule is None or rule.follows_norms:
                continue
            if not rule.scheduled:
                self.bounds[pools.start : pools.stop] = rule.bound(0)
            elif pools.start not in asked:  # for groups of one norm once
                asked.add(pools.start)
                self.scheduled.append((rule, pools))

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the tables that a step fills."""
        pools, tensors = len(self._pool_list), sum(map(len, self.tensors.values()))
        return [(tensors, tables.SUM_COLUMNS), (pools + 1, tables.DECISION_COLUMNS)]

    def _outcome(self, slot: int) -> Outcome:
        """Return the rows of the tables for the sums and decisions of a step."""
        tables = self.tables
        return tables[0][slot], tables[1][slot]

    def take_step(self, step: int) -> None:
        """Set the bounds of a step; refuse an invalid one."""
        self.bounds = self._bounds_at(step)

    def _bounds_at(self, step: int) -> Array:
        """Return the bounds of a step: the last array, or a changed copy of it."""
        found = [rule.bound(step) for rule, _ in self.scheduled]
        last, bounds = self._found
        if found != last:
            bounds = bounds.copy()
            for bound, (_, pools) in zip(found, self.scheduled, strict=True):
                bounds[pools.start : pools.stop] = bound
            self._found = found, bounds  # both at once: after an interrupt the next step does it
        return bounds

    def obey(self, unscale: float, stream: Any) -> None:
        """Write the law of a step: its bounds, the loss scale, and the rows of sparse groups."""
        if self._sparse:
            self._take_rows(stream)
            self._losses = self._own_losses
        self.unscale = unscale
        self._write_law(unscale, stream)

    def _take_rows(self, stream: Any) -> None:
        """Pass the plan the present rows of the sparse groups, and find their losses."""
        entries = [(group, e) for group in self.groups if group.sparse for e in group.gradients()]
        rows = [entry.slices for _, entry in entries]
        if list(map(id, rows)) == list(map(id, self.rows)):
            return
        self.rows = []  # until the plan has them: after an interrupt the next step passes them
        groupings = [slices.grouping for slices in rows]
        self.plan.take_rows([row_span(entry, entry) for _, entry in entries], groupings, stream)
        losses = np.zeros(len(self._pool_list))
        pools_left = {group.name: iter(self.pools[group.name]) for group in self.groups}
        pool = 0
        tensors = {group.name: iter(self.tensors[group.name]) for group in self.groups}
        self.losses_of_tensors = np.zeros(len(self.plan.spans))
        for group, entry in entries:
            pool = next(pools_left[group.name], pool)  # the last pool takes all remaining tensors
            loss = repeated_loss([entry], self.ord)
            losses[pool] += loss
            self.losses_of_tensors[next(tensors[group.name])] = loss
        self._own_losses, self.rows = losses, rows

    def _write_law(self, unscale: float, stream: Any) -> None:
        """Write the law with the present bounds, unless the plan has it already."""
        written = self._written
        if (
            written is None
            or written[0] is not self.bounds
            or written[1] != unscale
            or written[2] is not self._losses
        ):
            law = Law(
                self.bounds,
                self.divisors,
                unscale=unscale,
                ord=self.ord,
                loss=self._losses,
                size=self._sizes,
            )
            self._written = None  # if an interrupt comes now, the law is written again
            self.plan.write_laws(law, stream)
            self._written = self.bounds, unscale, self._losses

    def measure(self, slot: int, stream: Any, *, decides: bool = True) -> None:
        """Measure L2 norms and count non-finite tensors; decide, unless `decide_given` follows."""
        self.plan.measure(2.0, stream)
        self.turn_to(slot)
        (self.plan.decide if decides else self.plan.add)(self.found, stream)

    def turn_to(self, slot: int) -> None:
        """Write results to row `slot` of the tables from now on."""
        self.slot, self.found = slot, self._outcome(slot)
        self.given = self.merged = None
        self._leaves = False

    def at_once(self) -> AtOnce | None:
        """Return an `AtOnce` that clips small gradients by one native call, None if none can."""
        if not self.by_norms:
            return None
        held = [rows.words for rows in rows_of(self.groups).values()]
        return self.plan.at_once(self.divisors, held)  # type: ignore[no-any-return]

    def take_at_once(self, native: AtOnce, turn: Any, items: Any) -> bool:
        """Clip by one native call, or two where bounds follow norms; return True on success.

        If not, nothing but results was written.
        """
        return native.take(items, turn.slot, turn.stretch.unscale, self.bounds, self.tables)

    def ranks_at_once(self, row_tables: Sequence[Array], received: tuple[Array, Array]) -> Any:
        """Return a `RanksAtOnce` that clips by the sums of all ranks in two calls, or None."""
        return self.plan.ranks_at_once(self.divisors, self._sizes, row_tables, received)

    def decide_given(self, given: Array, merged: Array, losses: float | Array, stream: Any) -> None:
        """Decide by the sums over all ranks, a row for each pool; reports use `merged`."""
        self.given, self.merged = given, merged
        if not self._leaves:
            if self._sparse:
                self._losses = losses
            self._write_law(self.unscale, stream)
        self._decide_again(stream)

    def _decide_again(self, stream: Any) -> None:
        """Decide by the sums over all ranks if there are any, else by those of this rank."""
        if self.given is None:
            self.plan.decide(self.found, stream)
        else:
            self.plan.decide_by(self.given, self.found, stream)

    def leave(self, stream: Any) -> None:
        """Decide to leave gradients unscaled; the policies for non-finite ones still apply."""
        if self._sparse:
            self._take_rows(stream)
        if self._as_they_are is None:
            self._as_they_are = self.plan.outcome(stream)
        self.plan.leave(stream)
        self._written = None
        self.plan.measure(2.0, stream)
        self.found = self._as_they_are
        self.given = self.merged = None
        self._leaves = True
        self.plan.decide(self.found, stream)

    def write_left(self, stream: Any) -> Outcome:
        """After `leave`, zero non-finite elements if the policy says so; return the outcome."""
        self.plan.write_exceptional(self.found, stream)
        return self.found

    def refused(self, stream: Any) -> list[Any]:
        """Return the groups whose policy is "raise" that hold NaN or Inf, after waiting."""
        sums = self.engine.read(self.found[0], stream)
        return [
            group
            for group in self.groups
            if group.nonfinite == "raise" and sums[self.tensors[group.name], tables.BAD].any()
        ]

    def decide(self, step: int, stream: Any) -> None:
        """Decide again where a kind of rule needs more than `measure` has found."""

    def write(self, stream: Any) -> None:
        """Write the clipped gradients."""
        self.plan.scale(self.found, stream)

    def has_spoilt(self, stream: Any) -> bool:  # noqa: ARG002
        """Tell whether clipping has turned finite gradients into NaN."""
        return False

    def write_exceptional(self, stream: Any) -> Outcome:
        """Write the tensors that an update cannot scale itself; return the outcome it follows."""
        self.plan.write_exceptional(self.found, stream)
        return self.found

    def preview(self, stream: Any) -> None:
        """Find the norms that `write` would lead to; the gradients stay as they are."""

    def observe(self, step: int, stream: Any) -> None:
        """Pass the norms before and after clipping to the rules that follow them."""

    @property
    def names(self) -> list[str]:
        """The names of the tensors, in the order of their numbers."""
        return [name for group in self.groups for name in group.names]

    @property
    def in_order(self) -> bool:
        """Whether the groups are in the order the user gave them."""
        numbers = [group.number for group in self.groups]
        return numbers == sorted(numbers)

    def norms(self, own: GroupOutcome) -> Array:
        """Return the norms of a group's tensors in some steps, before clipping."""
        return norms_of(own.sums, own.unscale)

    def clipped_norms(self, own: GroupOutcome) -> Array:
        """Return the norms after clipping."""
        return scaled_norms(own.sums, own.decisions, own.unscale)

    def scales(self, own: GroupOutcome) -> Array:
        """Return the smallest factors of the tensors, or one for all."""
        return own.decisions[..., tables.SCALE]  # type: ignore[no-any-return]

    def clipped(self, own: GroupOutcome) -> Any:
        """Tell whether some tensor was scaled or clamped."""
        return own.scale < 1.0

    def thresholds(self, own: GroupOutcome) -> Array:
        """Return the bounds on the norms of the tensors, or one for all."""
        return np.where(own.skipped_tensors, math.inf, own.bounds * own.divisors)


def shared_key(group: Any) -> tuple[str, Any]:
    """Return the key that groups clipped by one norm have in common."""
    if group.clip is not None and group.clip.shared is not None:
        return "shared", group.clip.shared
    return "group", group.name


def _spans(group: Any, ord: float) -> list[AnySpan]:
    """Return the spans of a group's gradients, which are written in place."""
    if group.sparse:
        return [row_span(entry, entry) for entry in group.gradients()]
    return [span_of(entry, entry, group.nonfinite, ord) for entry in group.gradients()]

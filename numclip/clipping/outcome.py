"""Outcomes of groups in several steps, or in one, computed when they are read.

For several steps values are arrays with the steps along axis 0, from which the history makes
rows. For one step they are scalars, from which a report is made. Callers are isolated, so that
NumPy does not warn of non-finite values.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.dtypes import Array

SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)
OF_ALL = {"norm": tables.NORM, "clipped_norm": tables.CLIPPED, "scale": tables.SCALE}


class kept:  # noqa: N801 - a decorator, as functools.cached_property, which takes a lock first
    """A property that is computed once and stored in the instance."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self._find, self.__doc__ = find, find.__doc__

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, _owner: type | None = None) -> Any:
        value = instance.__dict__[self._name] = self._find(instance)
        return value


class Read(NamedTuple):
    """A clipper's results of some steps: its tables, the bounds of pools, the loss scales.

    `merged` are the sums over all ranks if these have decided together, else None.
    """

    tables: Sequence[Array]
    bounds: Array
    unscale: Any
    merged: Array | None = None

    @property
    def totals(self) -> Array:
        """The sums over all ranks if these have decided together, else this rank's."""
        return self.tables[0] if self.merged is None else self.merged


class Member:
    """The facts of a group that its outcomes need and that are the same at all steps.

    Attributes
    ----------
    name, number, names
        The group's name, its index in the user's order, and the names of its tensors.
    number_of_clipper, clipper : int, Clipper
        The index of the group's clipper, and the clipper.
    has_rule : bool
        Whether it is clipped, and not only measured.
    jointly : bool
        Whether the rule clips the group as one vector.
    key : tuple
        The key that groups clipped by one norm have in common.
    decides : bool
        Whether its decision is about the L2 norm of this group alone.
    tensors, pools : slice
        The rows of its tensors and of its pools in the clipper's tables.
    """

    def __init__(self, number_of_clipper: int, clipper: Any, group: Any) -> None:
        self.number_of_clipper, self.clipper = number_of_clipper, clipper
        self.name, self.number, self.names = group.name, group.number, group.names
        rule = clipper.rules[group.name]
        self.has_rule = rule is not None
        self.jointly = rule is not None and rule.scope == "group"
        self.key = clipper.keys[group.name]
        self.decides = self.jointly and clipper.ord == 2.0 and self.key[0] == "group"
        tensors, pools = clipper.tensors[group.name], clipper.pools[group.name]
        self.tensors = slice(tensors.start, tensors.stop)
        self.pools = slice(pools.start, pools.stop)


class Members:
    """The groups of some clippers, in the user's order.

    Attributes
    ----------
    clippers, groups : list
        The clippers and the groups.
    alike : bool
        Whether one norm clips all groups.
    decider : Member or None
        A group whose decision is that of all groups together, by one L2 norm.
    """

    def __init__(self, clippers: Sequence[Any]) -> None:
        self.clippers = clippers
        every = enumerate(clippers)
        found = [Member(k, own, group) for k, own in every for group in own.groups]
        self.groups = sorted(found, key=lambda own: own.number)
        first = self.groups[0]
        self.alike = len({own.key for own in self.groups}) == 1
        jointly = self.alike and first.jointly and first.clipper.ord == 2.0
        self.decider = first if jointly else None
        self._alone = jointly and len(clippers) == 1

    @property
    def columns(self) -> dict[str, int]:
        """The columns of the first decision that hold for all groups; empty if it does not hold.

        They are not cached: ranks that agree on sizes change the divisors.
        """
        return OF_ALL if self._alone and self.clippers[0].divisors.item(0) == 1.0 else {}


class GroupOutcome:
    """The outcome of a group, from which a `GroupReport` is made.

    `threshold` is NaN where there is no single bound. `unscale` is the loss scale, an array for
    several steps.
    """

    def __init__(self, member: Member, read: Read) -> None:
        self.member, self._read = member, read
        self.name, self.names, self.unscale = member.name, member.names, read.unscale

    def rows(self, k: int) -> Array:
        """Return the rows of the group's tensors in one of the clipper's tables."""
        return self._read.tables[k][..., self.member.tensors, :]

    @kept
    def sums(self) -> Array:
        """The sums of the group's tensors, over all ranks if each tensor has its own norm."""
        if self._read.merged is not None and not self.member.jointly and self.member.has_rule:
            return self.totals  # type: ignore[no-any-return]
        return self.rows(0)

    @kept
    def totals(self) -> Array:
        """The rows of sums that add up to the group's own sum, over all ranks."""
        if self._read.merged is None:
            return self.sums  # type: ignore[no-any-return]
        own = self.member.clipper.merged_rows[self.name]
        return self._read.merged[..., own.start : own.stop, :]

    @kept
    def decisions(self) -> Array:
        """The decisions for the group's pools."""
        return self._read.tables[1][..., self.member.pools, :]

    @kept
    def _decision(self) -> Array:
        """The decision of the group's first pool, columns first."""
        return self._read.tables[1][..., self.member.pools.start, :].T

    def decided(self, column: int) -> Any:
        """Return a column of the group's one decision, times the divisor of its norm."""
        return self._decision[column] * self.divisors[0]

    @property
    def bounds(self) -> Array:
        """The bounds on the norms of the group's pools."""
        return self._read.bounds[..., self.member.pools]

    @property
    def divisors(self) -> Array:
        """The divisors of these norms."""
        return self.member.clipper.divisors[self.member.pools]  # type: ignore[no-any-return]

    @kept
    def tensor_norms(self) -> Array:
        """The norm of each tensor before clipping."""
        return self.member.clipper.norms(self)  # type: ignore[no-any-return]

    @kept
    def tensor_clipped_norms(self) -> Array:
        """The norm of each tensor after clipping."""
        return self.member.clipper.clipped_norms(self)  # type: ignore[no-any-return]

    @kept
    def tensor_scales(self) -> Array:
        """The smallest factor of each tensor, or one for all."""
        return self.member.clipper.scales(self)  # type: ignore[no-any-return]

    @property
    def tensor_rows(self) -> list[tuple[float, ...]]:
        """The fields of each tensor's `TensorReport` in one step, a row for each."""
        bounds = self.member.clipper.thresholds(self)
        columns = self.tensor_norms, self.tensor_clipped_norms, self.tensor_scales, bounds
        count = len(self.names)  # repeating lists takes a third of the time of broadcasting arrays
        return list(zip(*[own.tolist() * (count // own.size) for own in columns], strict=True))

    @kept
    def skipped(self) -> Any:
        """Whether the group was left as it is."""
        if self.member.jointly:
            return self._decision[tables.SKIPPED] != 0.0
        return self.decisions[..., tables.SKIPPED].any(axis=-1)

    @property
    def skipped_tensors(self) -> Any:
        """`skipped` with an axis added, to be broadcast over the tensors."""
        return self.skipped[..., None]

    @kept
    def nonfinite(self) -> Any:
        """Whether a gradient held NaN or Inf."""
        if self.member.decides:
            return self._decision[tables.BROKEN] != 0.0
        return self.totals[..., tables.BAD].any(axis=-1)

    @kept
    def scale(self) -> Any:
        """The smallest factor, NaN if one of them is."""
        if self.member.jointly:
            return self._decision[tables.SCALE]
        return self.tensor_scales.min(axis=-1)

    @kept
    def clipped(self) -> Any:
        """Whether anything was scaled or clamped."""
        return self.member.clipper.clipped(self)

    @kept
    def own_norm(self) -> Any:
        """The L2 norm of the group's own gradients."""
        if self.member.decides:
            return self.decided(tables.NORM)
        return norms_together(self.totals, self.unscale)

    @kept
    def norm(self) -> Any:
        """The norm that the rule bounds, before clipping; without one, the group's own."""
        if not self.member.jointly or self.member.decides:
            return self.own_norm
        return self._or_own(self.decided(tables.NORM))

    def _or_own(self, decided: Any) -> Any:
        """Return a norm that was decided; where the group was skipped, its own, if that is known.

        Of orders other than 2 it is not, and the norm of the groups that share it stays.
        """
        if self.member.clipper.ord != 2.0:
            return decided
        return np.where(self.skipped, self.own_norm, decided)

    @kept
    def clipped_norm(self) -> Any:
        """That norm after clipping."""
        if not self.member.has_rule:
            return self.norm
        if not self.member.jointly:
            return hypotenuses(self.tensor_clipped_norms)
        left = self.decided(tables.CLIPPED)
        return left if self.member.decides else self._or_own(left)

    @kept
    def own_clipped_norm(self) -> Any:
        """The L2 norm of the group's own gradients after clipping."""
        if not self.member.jointly or self.member.decides:
            return self.clipped_norm
        if self._read.merged is not None:
            return self.own_norm * self.scale
        return hypotenuses(self.tensor_clipped_norms)

    @kept
    def threshold(self) -> Any:
        """The one bound on the group's norm."""
        if not self.member.jointly:
            return np.full(self.decisions.shape[:-2], math.nan)
        return np.where(self.skipped, math.nan, self.bounds[..., 0] * self.divisors[0])


class Outcome:
    """The outcome of all groups together, from which a `ClipReport` is made."""

    def __init__(self, members: Members, reads: Sequence[Read], unscale: Any) -> None:
        self._members, self._reads, self._unscale = members, reads, unscale

    def _of(self, member: Member) -> GroupOutcome:
        return GroupOutcome(member, self._reads[member.number_of_clipper])

    @kept
    def groups(self) -> list[GroupOutcome]:
        """The outcome of each group, in the order that the user gave them."""
        return [self._of(member) for member in self._members.groups]

    @kept
    def norm(self) -> Any:
        """The L2 norm of all gradients before clipping."""
        if self._members.decider is not None:
            return self._of(self._members.decider).decided(tables.NORM)
        if len(self._members.groups) == 1:
            return self.groups[0].own_norm
        sums = [read.totals for read in self._reads]
        every = sums[0] if len(sums) == 1 else np.concatenate(sums, axis=-2)
        return norms_together(every, self._unscale)

    @kept
    def clipped_norm(self) -> Any:
        """That norm after clipping."""
        if self._members.decider is not None:
            return self._of(self._members.decider).decided(tables.CLIPPED)
        if len(self.groups) == 1:
            return self.groups[0].own_clipped_norm
        return hypotenuses(np.stack([own.own_clipped_norm for own in self.groups], axis=-1))

    @kept
    def threshold(self) -> Any:
        """The bound, where one norm clips all groups."""
        if self._members.alike:
            return self.groups[0].threshold
        return np.full(np.shape(self._unscale), math.nan)

    @property
    def scale(self) -> Any:
        """The smallest factor, NaN if one of them is."""
        return self._reduced("scale", np.minimum)

    @property
    def clipped(self) -> Any:
        """Whether any group was clipped."""
        return self._reduced("clipped", np.logical_or)

    @property
    def skipped(self) -> Any:
        """Whether any group was left as it is."""
        return self._reduced("skipped", np.logical_or)

    @property
    def nonfinite(self) -> Any:
        """Whether any group held NaN or Inf."""
        return self._reduced("nonfinite", np.logical_or)

    def _reduced(self, name: str, operation: Any) -> Any:
        return functools.reduce(operation, [getattr(own, name) for own in self.groups])


def hypotenuses(norms: Array) -> Any:
    """Return the norm of tensors' norms, which lie along the last axis."""
    if norms.ndim == 1:
        return np.float64(math.hypot(*norms.tolist()))
    return np.array([math.hypot(*row) for row in norms.tolist()])


def norms_together(sums: Array, unscale: Any) -> Any:
    """Return the norm of all tensors together, from their sums of squares."""
    if sums.ndim == 2:
        columns = sums.T.tolist()
        if not any(columns[tables.EXPONENT]):
            parts = columns[tables.TOTAL] + columns[tables.ERROR]
            return np.float64(math.sqrt(math.fsum(parts)) / unscale)
        return norms_together(sums[None], unscale)[0]
    totals, exponents = sums[:, :, [tables.TOTAL, tables.ERROR]], sums[:, :, tables.EXPONENT]
    peaks = np.zeros(len(sums))
    if exponents.any():
        peaks = np.where(totals[:, :, 0] == 0.0, -np.inf, exponents).max(axis=1, initial=-np.inf)
        peaks[np.isinf(peaks)] = 0.0
        totals = np.ldexp(totals, 2 * (exponents - peaks[:, None]).astype(np.intc)[:, :, None])
    roots = np.sqrt([math.fsum(row) for row in totals.reshape(len(sums), -1).tolist()])
    return np.ldexp(roots / unscale, peaks.astype(np.intc))


def _of_each(unscale: Any) -> Any:
    """Return loss scales in a shape to be broadcast over tensors."""
    return unscale[:, None] if isinstance(unscale, np.ndarray) else unscale


def norms_of(sums: Array, unscale: Any) -> Array:
    """Return the norm of each tensor, from its sum of squares."""
    roots: Array = np.sqrt(sums[..., tables.TOTAL])
    roots /= _of_each(unscale)
    exponents = sums[..., tables.EXPONENT]
    # A list takes a third of the time of an array in the usual case, one step of few tensors.
    scaled = any(exponents.tolist()) if exponents.ndim == 1 else exponents.any()
    return np.ldexp(roots, exponents.astype(np.intc)) if scaled else roots


def scaled_norms(sums: Array, decisions: Array, unscale: Any) -> Array:
    """Return the norm of each tensor times its factor, where the norm alone may exceed float64."""
    scales, divisors = decisions[..., tables.SCALE], _of_each(unscale)
    fractions, powers = np.frexp(scales)
    subnormal = (scales > 0.0) & (scales < SMALLEST_NORMAL)
    if subnormal.any():  # the mantissa has all digits, and is divided by the loss scale
        fractions = np.where(subnormal, decisions[..., tables.MANTISSA] * divisors, fractions)
        powers = np.where(subnormal, decisions[..., tables.POWER], powers)
    roots = np.sqrt(sums[..., tables.TOTAL]) / divisors * fractions
    exponents = sums[..., tables.EXPONENT] + powers
    return np.ldexp(roots, exponents.astype(np.intc))  # type: ignore[no-any-return]

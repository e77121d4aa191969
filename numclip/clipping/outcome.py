"""What became of groups in some steps, or in one, made when asked for.

Of some steps there are arrays, with steps along their first axis, and of one there are numbers:
the history's rows are made of the former, a report of the latter. Whoever asks is isolated, so
that NumPy says nothing of what is not finite.
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


class kept:  # noqa: N801 - a decorator, as functools.cached_property, which takes a lock first
    """A property that is found once."""

    def __init__(self, find: Callable[[Any], Any]) -> None:
        self._find, self.__doc__ = find, find.__doc__

    def __set_name__(self, _owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, _owner: type | None = None) -> Any:
        value = instance.__dict__[self._name] = self._find(instance)
        return value


class Read(NamedTuple):
    """What a clipper has left of some steps: its tables, the bounds of pools, the loss scales.

    `told` are the sums of all ranks, where these have decided together.
    """

    tables: Sequence[Array]
    bounds: Array
    unscale: Any
    told: Array | None = None

    @property
    def totals(self) -> Array:
        """The sums of which all is made, of all ranks."""
        return self.tables[0] if self.told is None else self.told


class Columns(NamedTuple):
    """For each step and tensor: norms before and after, the smallest factor, the bound."""

    norms: Array
    clipped: Array
    scales: Array
    thresholds: Array


class GroupOutcome:
    """What became of a group, as a `GroupReport` tells it.

    `threshold` is NaN where there is no single bound.
    """

    def __init__(self, clipper: Any, group: Any, read: Read) -> None:
        self._clipper, self._group, self._read = clipper, group, read
        self.name, self.number, self._rule = group.name, group.number, clipper.rules[group.name]
        self.jointly = self._rule is not None and self._rule.scope == "group"

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the group's tensors."""
        return self._group.names  # type: ignore[no-any-return]

    @property
    def key(self) -> tuple[str, Any]:
        """What is the same for groups that are clipped by one norm."""
        return self._clipper.keys[self.name]  # type: ignore[no-any-return]

    @kept
    def _own(self) -> bool:
        """Whether the decision is for the L2 norm of this group alone."""
        return self.jointly and self._clipper.ord == 2.0 and self.key[0] == "group"

    @kept
    def sums(self) -> Array:
        """The sums of the group's tensors, each of all ranks where it has a norm of its own."""
        if self._read.told is not None and not self.jointly and self._rule is not None:
            return self.totals  # type: ignore[no-any-return]
        own = self._clipper.tensors[self.name]
        sums: Array = self._read.tables[0][..., own.start : own.stop, :]
        return sums

    @kept
    def totals(self) -> Array:
        """Sums that belong to the group as a whole, of all ranks."""
        if self._read.told is None:
            return self.sums  # type: ignore[no-any-return]
        own = self._clipper.told_rows[self.name]
        return self._read.told[..., own.start : own.stop, :]

    @property
    def _pools(self) -> slice:
        own = self._clipper.pools[self.name]
        return slice(own.start, own.stop)

    @kept
    def decisions(self) -> Array:
        """The decisions for the group's pools."""
        return self._read.tables[1][..., self._pools, :]

    @kept
    def _decision(self) -> Array:
        """The one decision for the group, columns first."""
        return self._read.tables[1][..., self._pools.start, :].T

    @property
    def bounds(self) -> Array:
        """The bounds on the norms of the group's pools."""
        return self._read.bounds[..., self._pools]

    @property
    def divisors(self) -> Array:
        """What these norms are divided by."""
        return self._clipper.divisors[self._pools]  # type: ignore[no-any-return]

    @kept
    def columns(self) -> Columns:
        """What became of each tensor."""
        return self._clipper.columns(self._group, self, self._read)  # type: ignore[no-any-return]

    @property
    def tensor_rows(self) -> list[list[float]]:
        """What became of each tensor in one step, a row for each."""
        return np.stack(self.columns, axis=1).tolist()  # type: ignore[no-any-return]

    @kept
    def skipped(self) -> Any:
        """Whether the group was left as it is."""
        if self.jointly:
            return self._decision[tables.SKIPPED] != 0.0
        return self.decisions[..., tables.SKIPPED].any(axis=-1)

    @kept
    def nonfinite(self) -> Any:
        """Whether a gradient held NaN or Inf."""
        if self._own:
            return self._decision[tables.BROKEN] != 0.0
        return self.totals[..., tables.BAD].any(axis=-1)

    @kept
    def scale(self) -> Any:
        """The smallest factor, NaN where one is."""
        if self.jointly:
            return self._decision[tables.SCALE]
        return self.columns.scales.min(axis=-1)

    @kept
    def clipped(self) -> Any:
        """Whether anything was scaled or clamped."""
        if self.jointly:
            return self.scale < 1.0
        return (self.scale < 1.0) | self.decisions[..., tables.CLAMPED].any(axis=-1)

    @kept
    def own_norm(self) -> Any:
        """The L2 norm of the group's own gradients."""
        if self._own:
            return self.decided(tables.NORM)
        return joined(self.totals, self._read.unscale)

    @kept
    def norm(self) -> Any:
        """The norm that the rule is about, before clipping; the group's own where there is none."""
        if not self.jointly or self._own:
            return self.own_norm
        return np.where(self.skipped, self.own_norm, self.decided(tables.NORM))

    @kept
    def clipped_norm(self) -> Any:
        """That norm after clipping."""
        if self._rule is None:
            return self.norm
        if not self.jointly:
            return hypotenuses(self.columns.clipped)
        left = self.decided(tables.CLIPPED)
        return left if self._own else np.where(self.skipped, self.own_norm, left)

    @kept
    def own_clipped_norm(self) -> Any:
        """The L2 norm of the group's own gradients after clipping."""
        if self.jointly and not self._own and self._read.told is not None:
            return self.own_norm * self.scale
        if self.jointly and not self._own:
            return hypotenuses(self.columns.clipped)
        return self.clipped_norm

    @kept
    def threshold(self) -> Any:
        """The one bound on the group's norm."""
        if not self.jointly:
            return np.full(self.decisions.shape[:-2], math.nan)
        return np.where(self.skipped, math.nan, self.bounds[..., 0] * self.divisors[0])

    def decided(self, column: int) -> Any:
        """Return a column of the one decision for the group, in units of its norm."""
        return self._decision[column] * self.divisors[0]


class Outcome:
    """What became of all groups together, as a `ClipReport` tells it."""

    def __init__(self, clippers: Sequence[Any], reads: Sequence[Read], unscale: Any) -> None:
        self._clippers, self._reads, self._unscale = clippers, reads, unscale

    @kept
    def groups(self) -> list[GroupOutcome]:
        """What became of each group, in the order that the user gave them."""
        made = [
            GroupOutcome(clipper, group, read)
            for clipper, read in zip(self._clippers, self._reads, strict=True)
            for group in clipper.groups
        ]
        return sorted(made, key=lambda own: own.number)

    @kept
    def _decided(self) -> GroupOutcome | None:
        """A group whose decision is that of all, by their L2 norm; None where there is none."""
        first = self.groups[0]
        alike = first.jointly and self._clippers[0].ord == 2.0
        return first if alike and len({own.key for own in self.groups}) == 1 else None

    @kept
    def norm(self) -> Any:
        """The L2 norm of all gradients before clipping."""
        if self._decided is not None:
            return self._decided.decided(tables.NORM)
        if len(self.groups) == 1:
            return self.groups[0].own_norm
        sums = [read.totals for read in self._reads]
        return joined(sums[0] if len(sums) == 1 else np.concatenate(sums, axis=-2), self._unscale)

    @kept
    def clipped_norm(self) -> Any:
        """That norm after clipping."""
        if self._decided is not None:
            return self._decided.decided(tables.CLIPPED)
        if len(self.groups) == 1:
            return self.groups[0].own_clipped_norm
        return hypotenuses(np.stack([own.own_clipped_norm for own in self.groups], axis=-1))

    @kept
    def threshold(self) -> Any:
        """The bound, where one norm clips all groups."""
        alike = len({own.key for own in self.groups}) == 1
        return self.groups[0].threshold if alike else np.full(np.shape(self._unscale), math.nan)

    @property
    def scale(self) -> Any:
        """The smallest factor, NaN where one is."""
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
        if len(self.groups) == 1:
            return getattr(self.groups[0], name)
        return functools.reduce(operation, [getattr(own, name) for own in self.groups])


def hypotenuses(norms: Array) -> Any:
    """Return the norm of tensors' norms, which are along the last axis."""
    if norms.ndim == 1:
        return np.float64(math.hypot(*norms.tolist()))
    return np.array([math.hypot(*row) for row in norms.tolist()])


def joined(sums: Array, unscale: Any) -> Any:
    """Return the norm that belongs to tensors' sums of squares together."""
    if sums.ndim == 2:
        columns = sums.T.tolist()
        if not any(columns[tables.EXPONENT]):
            parts = columns[tables.TOTAL] + columns[tables.ERROR]
            return np.float64(math.sqrt(math.fsum(parts)) / unscale)
        return joined(sums[None], unscale)[0]
    totals, exponents = sums[:, :, [tables.TOTAL, tables.ERROR]], sums[:, :, tables.EXPONENT]
    peaks = np.zeros(len(sums))
    if exponents.any():
        peaks = np.where(totals[:, :, 0] == 0.0, -np.inf, exponents).max(axis=1, initial=-np.inf)
        peaks[np.isinf(peaks)] = 0.0
        totals = np.ldexp(totals, 2 * (exponents - peaks[:, None]).astype(np.intc)[:, :, None])
    roots = np.sqrt([math.fsum(row) for row in totals.reshape(len(sums), -1).tolist()])
    return np.ldexp(roots / unscale, peaks.astype(np.intc))


def norms_of(sums: Array, unscale: Any) -> Array:
    """Return the norm of each tensor, from its sum of squares."""
    roots: Array = np.sqrt(sums[..., tables.TOTAL])
    roots /= np.expand_dims(unscale, -1) if isinstance(unscale, np.ndarray) else unscale
    exponents = sums[..., tables.EXPONENT]
    # A list is asked in a third of the time, which one step of few tensors takes most often.
    scaled = any(exponents.tolist()) if exponents.ndim == 1 else exponents.any()
    return np.ldexp(roots, exponents.astype(np.intc)) if scaled else roots


def scaled_norms(sums: Array, decisions: Array, unscale: Any) -> Array:
    """Return the norm of each tensor times its factor, where the norm alone may exceed float64."""
    scales, divisors = decisions[..., tables.SCALE], np.expand_dims(unscale, -1)
    fractions, powers = np.frexp(scales)
    coarse = (scales > 0.0) & (scales < SMALLEST_NORMAL)
    if coarse.any():  # the mantissa has all digits; it is over the loss scale
        fractions = np.where(coarse, decisions[..., tables.MANTISSA] * divisors, fractions)
        powers = np.where(coarse, decisions[..., tables.POWER], powers)
    roots = np.sqrt(sums[..., tables.TOTAL]) / divisors * fractions
    exponents = sums[..., tables.EXPONENT] + powers
    return np.ldexp(roots, exponents.astype(np.intc))  # type: ignore[no-any-return]

"""What became of groups in some steps: arrays of a number for each step, made when asked for.

One step's report and the history's rows are both made of these.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.dtypes import Array

SMALLEST_NORMAL = float(np.finfo(np.float64).tiny)


class Read(NamedTuple):
    """What a clipper has left of some steps: its tables, the bounds of pools, the loss scales."""

    tables: Sequence[Array]
    bounds: Array
    unscale: Array


class Columns(NamedTuple):
    """For each step and tensor: norms before and after, the smallest factor, the bound."""

    norms: Array
    clipped: Array
    scales: Array
    thresholds: Array


class GroupOutcome:
    """What became of a group in some steps, as a `GroupReport` tells it of one.

    `threshold` is NaN where there is no single bound.
    """

    def __init__(self, clipper: Any, group: Any, read: Read) -> None:
        self._clipper, self._group, self._read = clipper, group, read
        self.name, self.names = group.name, group.names
        rule = clipper.rules[group.name]
        self._measures_only = rule is None
        self.jointly = rule is not None and rule.scope == "group"
        self.key = clipper.keys[group.name]
        self._own = self.key[0] == "group" and clipper.ord == 2.0  # the decision's norm is its own
        tensors, pools = clipper.tensors[group.name], clipper.pools[group.name]
        self.sums = read.tables[0][:, tensors.start : tensors.stop]
        self.decisions = read.tables[1][:, pools.start : pools.stop]
        self.bounds = read.bounds[:, pools.start : pools.stop]
        self.divisors = clipper.divisors[pools.start : pools.stop]

    @cached_property
    def columns(self) -> Columns:
        """What became of each tensor."""
        return self._clipper.columns(self._group, self, self._read)  # type: ignore[no-any-return]

    @property
    def tensor_rows(self) -> list[list[float]]:
        """The columns of the first step, a row for each tensor."""
        return np.stack([column[0] for column in self.columns], axis=1).tolist()  # type: ignore[no-any-return]

    @cached_property
    def skipped(self) -> Array:
        """Whether the group was left as it is."""
        return self.decisions[:, :, tables.SKIPPED].any(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def nonfinite(self) -> Array:
        """Whether a gradient held NaN or Inf."""
        return self.sums[:, :, tables.BAD].any(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def scale(self) -> Array:
        """The smallest factor, NaN where one is."""
        if self.jointly:
            return self.decisions[:, 0, tables.SCALE]
        return self.columns.scales.min(axis=1)  # type: ignore[no-any-return]

    @cached_property
    def clipped(self) -> Array:
        """Whether anything was scaled or clamped."""
        return (self.scale < 1.0) | self.decisions[:, :, tables.CLAMPED].any(axis=1)

    @cached_property
    def own_norm(self) -> Array:
        """The L2 norm of the group's own gradients."""
        if self.jointly and self._own:
            return self._decided(tables.NORM)
        return joined(self.sums, self._read.unscale)

    @cached_property
    def norm(self) -> Array:
        """The norm that the rule is about, before clipping; the group's own where there is none."""
        if not self.jointly or self._own:
            return self.own_norm
        return np.where(self.skipped, self.own_norm, self._decided(tables.NORM))

    @cached_property
    def clipped_norm(self) -> Array:
        """That norm after clipping."""
        if self._measures_only:
            return self.norm
        if not self.jointly:
            return hypotenuses(self.columns.clipped)
        left = self._decided(tables.CLIPPED)
        return left if self._own else np.where(self.skipped, self.own_norm, left)

    @cached_property
    def own_clipped_norm(self) -> Array:
        """The L2 norm of the group's own gradients after clipping."""
        if self.jointly and not self._own:
            return hypotenuses(self.columns.clipped)
        return self.clipped_norm

    @cached_property
    def threshold(self) -> Array:
        """The one bound on the group's norm."""
        if not self.jointly:
            return np.full(len(self.decisions), math.nan)
        return np.where(self.skipped, math.nan, self.bounds[:, 0] * self.divisors[0])

    def _decided(self, column: int) -> Array:
        return self.decisions[:, 0, column] * self.divisors[0]  # type: ignore[no-any-return]


class Outcome:
    """What became of all groups together in some steps, as a `ClipReport` tells it of one."""

    def __init__(self, groups: Sequence[GroupOutcome], unscale: Array) -> None:
        self.groups, self._unscale = groups, unscale

    @cached_property
    def norm(self) -> Array:
        """The L2 norm of all gradients before clipping."""
        if len(self.groups) == 1:
            return self.groups[0].own_norm
        sums = np.concatenate([own.sums for own in self.groups], axis=1)
        return joined(sums, self._unscale)

    @cached_property
    def clipped_norm(self) -> Array:
        """That norm after clipping."""
        if len(self.groups) == 1:
            return self.groups[0].own_clipped_norm
        return hypotenuses(np.stack([own.own_clipped_norm for own in self.groups], axis=1))

    @cached_property
    def scale(self) -> Array:
        """The smallest factor, NaN where one is."""
        return np.min([own.scale for own in self.groups], axis=0)  # type: ignore[no-any-return]

    @cached_property
    def threshold(self) -> Array:
        """The bound, where one norm clips all groups."""
        alike = len({own.key for own in self.groups}) == 1
        return self.groups[0].threshold if alike else np.full(len(self._unscale), math.nan)

    @property
    def clipped(self) -> Array:
        """Whether any group was clipped."""
        return self._any("clipped")

    @property
    def skipped(self) -> Array:
        """Whether any group was left as it is."""
        return self._any("skipped")

    @property
    def nonfinite(self) -> Array:
        """Whether any group held NaN or Inf."""
        return self._any("nonfinite")

    def _any(self, name: str) -> Array:
        return np.any([getattr(own, name) for own in self.groups], axis=0)  # type: ignore[no-any-return]


def hypotenuses(norms: Array) -> Array:
    """Return for each step the norm of its tensors' norms."""
    return np.array([math.hypot(*row) for row in norms.tolist()])


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def joined(sums: Array, unscale: Array) -> Array:
    """Return for each step the norm that belongs to its tensors' sums of squares together."""
    totals, exponents = sums[:, :, tables.TOTAL], sums[:, :, tables.EXPONENT]
    peaks = np.zeros(len(sums))
    if exponents.any():
        peaks = np.where(totals == 0.0, -np.inf, exponents).max(axis=1, initial=-np.inf)
        peaks[np.isinf(peaks)] = 0.0
        totals = np.ldexp(totals, 2 * (exponents - peaks[:, None]).astype(np.intc))
    roots = np.sqrt([math.fsum(row) for row in totals.tolist()])
    return np.ldexp(roots / unscale, peaks.astype(np.intc))  # type: ignore[no-any-return]


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def norms_of(sums: Array, unscale: Array) -> Array:
    """Return the norm of each tensor, from its sum of squares."""
    roots = np.sqrt(sums[:, :, tables.TOTAL]) / unscale[:, None]
    return np.ldexp(roots, sums[:, :, tables.EXPONENT].astype(np.intc))  # type: ignore[no-any-return]


@np.errstate(over="ignore", under="ignore", invalid="ignore")
def scaled_norms(sums: Array, decisions: Array, unscale: Array) -> Array:
    """Return the norm of each tensor times its factor, where the norm alone may exceed float64."""
    scales = decisions[:, :, tables.SCALE]
    fractions, powers = np.frexp(scales)
    coarse = (scales > 0.0) & (scales < SMALLEST_NORMAL)
    if coarse.any():  # the mantissa has all digits; it is over the loss scale
        exact = decisions[:, :, tables.MANTISSA] * unscale[:, None]
        fractions = np.where(coarse, exact, fractions)
        powers = np.where(coarse, decisions[:, :, tables.POWER], powers)
    roots = np.sqrt(sums[:, :, tables.TOTAL]) / unscale[:, None] * fractions
    exponents = sums[:, :, tables.EXPONENT] + powers
    return np.ldexp(roots, exponents.astype(np.intc))  # type: ignore[no-any-return]

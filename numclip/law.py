"""The law of a pool: how the tensors of one norm are clipped."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import formulas, tables
from numclip.dtypes import FLOAT64, Array, DType
from numclip.memory import RowSpan, Strided

silent = np.errstate(all="ignore")  # a value that over- or underflows is far enough from norms

ABSENT = -1.0  # `Law.given` where the user gives no norm
POLICIES = {
    "propagate": tables.PROPAGATE,
    "raise": tables.RAISE,
    "skip": tables.SKIP,
    "zero": tables.ZERO,
}


class Pool(NamedTuple):
    """Tensors ``[first, last)`` that share a norm; pools of one `group` are skipped together."""

    first: int
    last: int
    group: int
    policy: str


class Law(NamedTuple):
    """How a pool is clipped: by ``bound / (norm / divisor / unscale)``, at most 1.

    `loss` is what rounding subnormal terms can add to the sums of repeated rows, see `formulas`,
    `size` how many stored numbers a norm is of, if not of the pool's tensors alone. Scalars are
    for all pools, arrays have an element for each.
    """

    bound: float | Array
    divisor: float | Array = 1.0
    given: float = ABSENT
    unscale: float = 1.0
    ord: float = 2.0
    loss: float | Array = 0.0
    size: float | Array | None = None


class Family(NamedTuple):
    """Arrays with the same units: the parts of a unit in all of them have one norm.

    With `param`, units are bounded by a fraction of the norms of its units. With `zeroing`,
    non-finite elements count as 0. `base` is the row of a plan's decisions that can skip the
    family. Without `rounded`, factors are for sums in float64. `measured` are arrays to measure
    instead of `arrays`, where these are their rounded copies. `numbers` are the unit of each row
    of an array that lacks some units, and `known` is then the number of units; only the host's
    engine supports these.
    """

    arrays: tuple[Strided, ...]
    param: Strided | None = None
    zeroing: bool = False
    base: int = 0
    rounded: bool = True
    measured: tuple[Strided, ...] = ()
    numbers: tuple[Array | None, ...] = ()
    known: int | None = None

    @property
    def units(self) -> int:
        """How many units there are."""
        return self.arrays[0].units if self.known is None else self.known

    @property
    def dtypes(self) -> set[DType]:
        """The dtypes whose rounding factors have to allow for."""
        return {array.dtype for array in self.arrays} if self.rounded else {FLOAT64}

    @property
    def digits(self) -> int:
        """The number of binary digits that a factor may have."""
        return min(dtype.digits for dtype in self.dtypes)

    def facts(self, ord: float) -> tuple[float, float, float]:
        """Return the family's ROUNDOFF, TRUNCATE_BELOW and TINY, see `numclip.tables`."""
        size = sum(array.size // max(array.units, 1) for array in self.arrays)
        norm_of_ones = formulas.root(float(size), ord) if self.rounded else 1.0
        roundings = 2.0 if self.measured else 1.0
        roundoff = roundings * max(row.roundoff for row in self.dtypes)
        truncate_below = norm_of_ones * max(row.truncate_below for row in self.dtypes)
        return roundoff, truncate_below, max(row.tiny for row in self.dtypes)


@silent
def unit_laws(
    families: Sequence[Family], ord: float, bound: Any, eps: Any = 0.0, unscale: float = 1.0
) -> Array:
    """Return the table of laws for units, a row for each family."""
    table = np.zeros((len(families), tables.LAW_COLUMNS))
    table[:, tables.BOUND], table[:, tables.EPS] = bound, eps
    table[:, tables.UNSCALE], table[:, tables.ORD] = unscale, ord
    facts = np.array([family.facts(ord) for family in families])
    table[:, [tables.ROUNDOFF, tables.TRUNCATE_BELOW, tables.TINY]] = facts
    return table


def loss_of_rows(starts: Array, length: int, dtype: DType, ord: float) -> float:
    """Return the norm of what rounding subnormal terms can add to the sums of repeated rows.

    `starts` are those of the groups of rows, `length` how many elements a row has. Each term is
    off by at most the smallest subnormal of the dtype.
    """
    counts = np.diff(starts).astype(np.float64)
    largest = float(counts.max())
    if ord == math.inf:
        return dtype.smallest * largest
    with np.errstate(under="ignore"):
        powers = float(((counts / largest) ** ord).sum()) * (length * dtype.components)
        return dtype.smallest * (largest * formulas.root(powers, ord))


class Laws:
    """Makes the tables of laws for some pools, from the dtypes and sizes of their tensors."""

    def __init__(self, spans: Sequence[Any], pools: Sequence[Pool]) -> None:
        self._members = [spans[pool.first : pool.last] for pool in pools]
        self._dtypes: list[set[DType]] = [{span.dtype for span in own} for own in self._members]
        self._roundoffs, self._tiny, self._truncate_below = (
            np.array(
                [max([getattr(row, name) for row in own], default=0.0) for own in self._dtypes]
            )
            for name in ("roundoff", "tiny", "truncate_below")
        )
        self._sizes = [sum(span.size for span in own) for own in self._members]
        self._norms_of_ones: dict[float, Array] = {}
        self._rest: tuple[Any, ...] | None = None

    def pool_table(self, pools: Sequence[Pool]) -> Array:
        """Return the table of pools."""
        table = np.zeros((len(pools), 6), np.int64)
        for p, pool in enumerate(pools):
            digits = min((dtype.digits for dtype in self._dtypes[p]), default=53)
            repeated = any(isinstance(span, RowSpan) for span in self._members[p])
            table[p] = pool.first, pool.last, pool.group, POLICIES[pool.policy], digits, repeated
        return table

    @silent
    def table(self, law: Law) -> Array:
        """Return the table of a law, a row for each pool."""
        rest = law._replace(bound=0.0, loss=0.0)
        if self._rest is None or not all(map(operator.is_, rest, self._rest)):
            self._rest, self._base = rest, self._unbounded(law)
        table = self._base.copy()
        table[:, tables.BOUND] = law.bound
        table[:, tables.AIM] = np.maximum(law.bound - law.loss / law.divisor, 0.0)
        return table

    def _unbounded(self, law: Law) -> Array:
        """Return the table without bounds and losses, which is cached while only these change."""
        table = np.zeros((len(self._members), tables.LAW_COLUMNS))
        table[:, tables.DIVISOR] = law.divisor
        table[:, tables.GIVEN], table[:, tables.ORD] = law.given, law.ord
        table[:, tables.ROUNDOFF], table[:, tables.TINY] = self._roundoffs, self._tiny
        ones = self._roots(law.ord) if law.size is None else self._roots_of(law.size, law.ord)
        table[:, tables.TRUNCATE_BELOW] = ones / law.divisor * self._truncate_below
        table[:, tables.UNSCALE] = law.unscale
        table[:, [tables.RATIO, tables.TERMS_RATIO]] = 1.0
        return table

    def _roots(self, ord: float) -> Array:
        """Return the norm of each pool's vector of ones, cached for each order."""
        if ord not in self._norms_of_ones:
            self._norms_of_ones[ord] = self._roots_of(np.array(self._sizes), ord)
        return self._norms_of_ones[ord]

    def _roots_of(self, sizes: float | Array, ord: float) -> Array:
        every = np.broadcast_to(sizes, len(self._members)).tolist()
        return np.array([formulas.root(float(n), ord) for n in every])


def whole_pools(pools: Array) -> Array:
    """Return a table of pools for sums with one row for each pool, which has sums of terms too."""
    made = pools.copy()
    made[:, tables.FIRST] = np.arange(len(pools))
    made[:, tables.LAST] = made[:, tables.FIRST] + 1
    made[:, tables.REPEATED] = 1
    return made

"""The law of a pool: how the tensors of one norm are clipped."""

from __future__ import annotations

from typing import NamedTuple

from numclip import tables
from numclip.dtypes import Array

ABSENT = -1.0  # a norm that was not given
POLICIES = {
    "propagate": tables.PROPAGATE,
    "raise": tables.RAISE,
    "skip": tables.SKIP,
    "zero": tables.ZERO,
}


class Pool(NamedTuple):
    """Tensors ``[first, last)`` of one norm; pools of one `group` are skipped together."""

    first: int
    last: int
    group: int
    policy: str


class Law(NamedTuple):
    """How a pool is clipped: by ``bound / (norm / divisor / unscale)``, at most 1.

    `loss` is what rounding subnormal terms can add to the sums of repeated rows, see `formulas`.
    Numbers are for all pools, arrays have one for each.
    """

    bound: float | Array
    divisor: float | Array = 1.0
    given: float = ABSENT
    unscale: float = 1.0
    ord: float = 2.0
    loss: float | Array = 0.0

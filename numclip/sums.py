"""Sums of float64 numbers that are exact, and so do not depend on any order: integers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from numclip import tables
from numclip.dtypes import Array
from numclip.formulas import BIN_EXPONENT, power_term, root, scale_by_power

GRID = 3400
"""Sums are multiples of ``2**-GRID``: ``4**exponent`` times the smallest number is, of any sum."""

LEAST_BITS, MOST_BITS = -900, 900
"""Between which powers of two a sum is told with the exponent 0."""


class Whole(NamedTuple):
    """What one norm is of, where the gradients at hand are a part of it.

    `row` is a row of sums; for orders other than 2 its TOTAL and EXPONENT are the norm itself,
    ``TOTAL * 2**EXPONENT``, and so are those of terms. `size` is how many stored numbers there are,
    `loss` as in `Law`.
    """

    row: Array
    size: int
    loss: float

    def norm(self, ord: float) -> float:
        """Return the norm, of an order."""
        total, exponent = float(self.row[tables.TOTAL]), int(self.row[tables.EXPONENT])
        return scale_by_power(math.sqrt(total) if ord == 2.0 else total, exponent)


def exact(values: Iterable[float], exponent: int = 0) -> int:
    """Return the sum of finite numbers times ``4**exponent``, in units of ``2**-GRID``."""
    terms = list(values)
    found = 0
    while part := math.fsum(terms):
        numerator, denominator = part.as_integer_ratio()
        found += (numerator << (GRID + 2 * exponent)) // denominator
        terms.append(-part)
    return found


def exact_columns(sums: Array, total: int, exponent: int, *others: int) -> int:
    """Return the exact sum of some columns of rows of sums, which share a column of exponents."""
    powers = sums[:, exponent]
    return sum(
        exact(sums[powers == power][:, [total, *others]].ravel().tolist(), int(power))
        for power in np.unique(powers)
    )


def rounded(units: int) -> tuple[float, float, int]:
    """Return a sum as ``total * 4**exponent``, rounded once, and what rounding has taken.

    The exponent is one that both engines know.
    """
    bits = units.bit_length() - GRID
    exponent = 0
    if units and not LEAST_BITS < bits < MOST_BITS:
        exponent = BIN_EXPONENT if bits > 0 else -BIN_EXPONENT
    one = 1 << (GRID + 2 * exponent)
    total = units / one  # Python rounds a quotient of integers once
    return total, (units - exact([total], exponent)) / one, exponent


def joined_norms(parts: Iterable[tuple[float, int]], ord: float) -> tuple[float, int]:
    """Return the norm of vectors together, from the norm of each; as ``root * 2**exponent``."""
    known = list(parts)
    special = [norm for norm, _ in known if not math.isfinite(norm)]
    if special:
        return sum(special), 0
    split = [(*math.frexp(norm), power) for norm, power in known if norm]
    if not split:
        return 0.0, 0
    highest = max(own + power for _, own, power in split)
    norms = [math.ldexp(fraction, own + power - highest) for fraction, own, power in split]
    if ord == math.inf:
        return max(norms), highest
    return root(math.fsum(power_term(norm, ord) for norm in norms), ord), highest

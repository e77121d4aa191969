"""Sums of float64 numbers that are exact, and so do not depend on any order: integers."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from numclip import tables
from numclip.dtypes import Array
from numclip.formulas import BIN_EXPONENT, norm_of, scale_by_power

ALL = [tables.TOTAL, tables.EXPONENT, tables.ERROR]
TERMS = [tables.TERMS, tables.TERMS_EXPONENT]

GRID = 3400
"""Sums are multiples of ``2**-GRID``: ``4**exponent`` times the smallest number is, of any sum."""

LEAST_BITS, MOST_BITS = -900, 900
"""Between which powers of two a sum is told with the exponent 0."""


HALF = 1024
"""Exact sums are kept under the multiple of ``4**2048`` that is nearest to their exponent."""

Sums = dict[int, int]
"""Exact sums of parts, in units of ``2**-GRID`` times ``4**2048`` to the power of the key."""


Found = tuple[float, int, float]
"""A sum ``total * 4**exponent`` as total and exponent, and what rounding has taken from it."""


class Whole(NamedTuple):
    """What one norm is of, where the gradients at hand are a part of it.

    `row` is a row of sums, `size` how many stored numbers there are, `loss` as in `Law`.
    """

    row: Array
    size: int
    loss: float


def norm(total: float, exponent: int, ord: float) -> float:
    """Return the norm that belongs to a sum of powers ``total * 4**exponent``."""
    root, power = norm_of(total, exponent, ord)
    return scale_by_power(root, int(power))


def exact(values: Iterable[float], exponent: int = 0) -> int:
    """Return the sum of finite numbers times ``4**exponent``, in units of ``2**-GRID``."""
    terms = list(values)
    found = 0
    while part := math.fsum(terms):
        numerator, denominator = part.as_integer_ratio()
        found += (numerator << (GRID + 2 * exponent)) // denominator
        terms.append(-part)
    return found


def exact_sums(rows: Array, column: int, ord: float, *others: int) -> Sums:
    """Return the sums of a column of rows of finite sums, exact; of infinite order the largest.

    The exponents are in the next column; `others` share them.
    """
    found: Sums = {}
    powers = {*rows[:, column + 1].tolist()}
    for power in powers:
        own = rows if len(powers) == 1 else rows[rows[:, column + 1] == power]
        own = own[:, [column, *others]]
        key, rest = divmod(int(power) + HALF, 2 * HALF)
        values = [float(own[:, 0].max())] if ord == math.inf else own.ravel().tolist()
        add_sums(found, {key: exact(values, rest - HALF)}, ord)
    return found


def add_sums(found: Sums, more: Sums, ord: float) -> None:
    """Add exact sums to others; of infinite order, keep the larger."""
    for key, units in more.items():
        own = found.get(key, 0)
        found[key] = max(own, units) if ord == math.inf else own + units


def joined(found: Sums) -> Found:
    """Return what `rounded` does of exact sums; of infinite order, these have one key, 0."""
    key = max((key for key, units in found.items() if units), default=0)
    units = found.get(key, 0)
    units += found.get(key - 1, 0) >> 4 * HALF  # those further down are less than it is rounded by
    total, exponent, error = rounded(units)
    return total, exponent + 2 * HALF * key, error


def total_of(rows: Array, column: int, ord: float, *others: int) -> Found:
    """Return the sum of a column of rows of sums as `rounded` does, see `exact_sums`."""
    values = rows[:, column]
    special = values[~np.isfinite(values)]
    if special.size:
        with np.errstate(invalid="ignore"):
            return float(special.sum()), 0, 0.0
    return joined(exact_sums(rows, column, ord, *others))


def row_of(rows: Array, ord: float) -> Array:
    """Return the sum of rows of sums as such a row."""
    row = np.zeros(tables.SUM_COLUMNS)
    row[ALL] = total_of(rows, tables.TOTAL, ord, tables.ERROR)
    row[TERMS] = row[ALL[:2]]
    if (rows[:, TERMS] != rows[:, ALL[:2]]).any():  # some tensors' terms are not their elements
        row[TERMS] = total_of(rows, tables.TERMS, ord)[:2]
    row[tables.BAD] = rows[:, tables.BAD].sum()
    return row


def rounded(units: int) -> Found:
    """Return a sum in units of ``2**-GRID``, rounded once; the exponent is one that GPUs know."""
    bits = units.bit_length() - GRID
    exponent = 0
    if units and not LEAST_BITS < bits < MOST_BITS:
        exponent = BIN_EXPONENT if bits > 0 else -BIN_EXPONENT
    one = 1 << (GRID + 2 * exponent)
    total = units / one  # Python rounds a quotient of integers once
    return total, exponent, _to_odd(units - exact([total], exponent), one, exponent)


def _to_odd(units: int, one: int, exponent: int) -> float:
    """Return an integer over another, rounded to the odd one of two numbers.

    So a sum with it is rounded as if nothing had been: what is near a tie is taken for none.
    """
    found = units / one
    rest = units - exact([found], exponent)
    if rest and math.ldexp(math.frexp(found)[0], 53) % 2.0 == 0.0:
        return math.nextafter(found, math.inf if rest > 0 else -math.inf)
    return found

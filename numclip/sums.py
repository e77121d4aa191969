"""Exact sums of float64 numbers, kept as integers: they do not depend on the order of terms."""

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
"""Sums are multiples of ``2**-GRID``, as is ``4**exponent`` times the smallest float64."""

LEAST_BITS, MOST_BITS = -900, 900
"""Sums between these powers of two have the exponent 0."""


HALF = 1024
"""Exact sums are stored under a key: their exponent over ``2 * HALF``, rounded to nearest."""

Sums = dict[int, int]
"""Exact sums by key, in units of ``2**-GRID * 4**(2048 * key)``."""


Found = tuple[float, int, float]
"""(total, exponent, error) of a sum ``total * 4**exponent``; rounding took `error` from total."""


class Whole(NamedTuple):
    """The sums of all gradients of a norm, where the gradients at hand are only a part of them.

    `row` is a row of sums, `size` the number of stored numbers, `loss` as in `Law`.
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
    """Return the exact sums, by key, of a column of finite sums; for infinite order, the largest.

    The exponents are in the next column; columns in `others` have the same ones, and are added.
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
    """Add exact sums to those in `found`; for infinite order, keep the larger."""
    for key, units in more.items():
        own = found.get(key, 0)
        found[key] = max(own, units) if ord == math.inf else own + units


def rounded_sum(found: Sums) -> Found:
    """Return exact sums added up, as `rounded` does; for infinite order, they have only key 0."""
    key = max((key for key, units in found.items() if units), default=0)
    units = found.get(key, 0)
    units += found.get(key - 1, 0) >> 4 * HALF  # smaller keys are below the rounding
    total, exponent, error = rounded(units)
    return total, exponent + 2 * HALF * key, error


def total_of(rows: Array, column: int, ord: float, *others: int) -> Found:
    """Return the sum of a column of sums, as `rounded` does; arguments are as in `exact_sums`."""
    values = rows[:, column]
    special = values[~np.isfinite(values)]
    if special.size:
        with np.errstate(invalid="ignore"):
            return float(special.sum()), 0, 0.0
    return rounded_sum(exact_sums(rows, column, ord, *others))


def row_of(rows: Array, ord: float) -> Array:
    """Return the row of sums that is the sum of all rows."""
    row = np.zeros(tables.SUM_COLUMNS)
    row[ALL] = total_of(rows, tables.TOTAL, ord, tables.ERROR)
    row[TERMS] = row[ALL[:2]]
    if (rows[:, TERMS] != rows[:, ALL[:2]]).any():  # some tensors' terms are not their elements
        row[TERMS] = total_of(rows, tables.TERMS, ord)[:2]
    row[tables.BAD] = rows[:, tables.BAD].sum()
    return row


def rounded(units: int) -> Found:
    """Return a sum in units of ``2**-GRID``, rounded once; GPUs support its exponent."""
    bits = units.bit_length() - GRID
    exponent = 0
    if units and not LEAST_BITS < bits < MOST_BITS:
        exponent = BIN_EXPONENT if bits > 0 else -BIN_EXPONENT
    one = 1 << (GRID + 2 * exponent)
    total = units / one  # Python rounds a quotient of integers once
    return total, exponent, _to_odd(units - exact([total], exponent), one, exponent)


def _to_odd(units: int, one: int, exponent: int) -> float:
    """Return ``units / one``, rounded to odd: of two neighbours the one with an odd mantissa.

    A sum with it is then rounded as the exact sum: a value near a tie does not become a tie.
    """
    found = units / one
    rest = units - exact([found], exponent)
    if rest and math.ldexp(math.frexp(found)[0], 53) % 2.0 == 0.0:
        return math.nextafter(found, math.inf if rest > 0 else -math.inf)
    return found

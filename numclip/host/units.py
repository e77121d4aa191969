"""Plans of the host for arrays with units, which measure, decide and write unit by unit."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import FLOAT64, Array, DType, as_stored
from numclip.formulas import is_safe
from numclip.host import batches, columns, orders
from numclip.host.kernels import unit_loops
from numclip.host.kernels.tuning import CHUNK, PARALLEL_BYTES
from numclip.host.runtime import threads
from numclip.host.runtime.threads import Call
from numclip.host.strided import elements
from numclip.law import Family, unit_laws
from numclip.memory import Span, Strided, strides_of
from numclip.tables import (
    EXPONENT,
    FACTOR,
    LEAST,
    LEAVE,
    MANTISSA,
    MODE,
    MULTIPLY,
    PEAK,
    RARE,
    SUM_COLUMNS,
    TOTAL,
)

LONG_ROW = 4 * CHUNK
"""Rows of at least so many elements are shared among threads."""


def lengths_about(shape: Sequence[int], axes: Sequence[int]) -> tuple[int, int, int] | None:
    """Return how many elements are before, in and after axes; None if axes are not adjacent."""
    first, last = min(axes, default=0), max(axes, default=-1) + 1
    if last - first != len(axes):
        return None
    return math.prod(shape[:first]), math.prod(shape[first:last]), math.prod(shape[last:])


class Cut:
    """An array cut into units: rows of contiguous memory, or columns of it.

    Every operation can be done on rows. Reduced axes in the middle or in front can also be summed
    in place, column by column; where that is not possible, rows are a transposed copy.
    """

    def __init__(self, array: Strided, *, zeroing: bool = False) -> None:
        self.array = array
        self._values = elements(array.dtype, array.shape, array.read)
        held = np.ascontiguousarray(self._values)
        if zeroing and not np.isfinite(held).all():
            held = np.where(np.isfinite(held), held, held.dtype.type(0))
        aligned = held.flags.aligned
        self._held = (held if aligned else held.copy()).reshape(array.shape)
        self.size = math.prod(array.shape[k] for k in self.axes)

    @property
    def axes(self) -> tuple[int, ...]:
        """The reduced axes."""
        axes = self.array.axes
        return tuple(range(len(self.array.shape))) if axes is None else axes

    @property
    def _order(self) -> tuple[int, ...]:
        return (*self.array.kept, *self.axes)

    def rows(self) -> Array:
        """Return contiguous rows, one for each unit: the array's memory or a transposed copy."""
        rows = np.ascontiguousarray(self._held.transpose(self._order))
        return rows.reshape(self.array.units, self.size)

    def columns(self) -> Array | None:
        """Return the storage as (outer, reduced, inner); None for rows or axes not adjacent."""
        lengths = lengths_about(self._held.shape, self.axes) if self.axes else None
        if lengths is None or lengths[2] == 1:
            return None
        return as_stored(self._held.reshape(lengths))

    def in_memory(self) -> Array | None:
        """Return the array's own storage likewise, `inner` being 1 for rows; None if copied."""
        lengths = lengths_about(self._held.shape, self.axes)
        if lengths is None or not np.may_share_memory(self._held, self._values):
            return None
        return as_stored(self._held.reshape(lengths))

    @property
    def in_order(self) -> bool:
        """Whether the rows have the array's order of axes."""
        return self._order == tuple(range(len(self.array.shape)))

    def write(self, stored: Array) -> None:
        """Write stored numbers in C order to the target."""
        array = self.array
        values = stored.reshape(-1).view(array.dtype.native).reshape(array.shape)
        elements(array.dtype, array.shape, array.written)[...] = values

    def result(self, values: Array) -> None:
        """Write rows of elements to the target."""
        shape = [self.array.shape[k] for k in self._order]
        back = values.reshape(shape).transpose(np.argsort(self._order))
        elements(self.array.dtype, self.array.shape, self.array.written)[...] = back

    def target(self) -> Array | None:
        """Return the target's memory as stored numbers; None if it is not aligned in C order."""
        array = self.array
        steps = strides_of(array.shape, array.itemsize)
        if array.written.steps != steps or array.written.address % array.dtype.storage.itemsize:
            return None
        return as_stored(elements(array.dtype, array.shape, array.written).reshape(-1))


class _Little(NamedTuple):
    """Families of one array of few bytes: their units are measured by one native call.

    `numbers` are the families' numbers, `arrays` their table for `unit_loops`; `held` keeps alive
    the arrays and parameters whose addresses the table has.
    """

    dtype: DType
    numbers: Sequence[int]
    arrays: Array
    right: Array
    held: Any

    def measure(self, sums: Array, params: Array) -> list[int]:
        """Write totals and exponents of units; return the families that must be summed again."""
        arguments = self.arrays, self.dtype.digits, self.dtype.like, sums, params, self.right
        if unit_loops.measure_little(*arguments):
            return []
        return [f for f, right in zip(self.numbers, self.right.tolist(), strict=True) if not right]

    def scaling(self, units: Array) -> Call:
        """Return the call that multiplies units in place by their decided factors."""
        arguments = self.arrays, units, self.dtype.like
        nbytes = sum(x.nbytes for x, _ in self.held)
        return Call(unit_loops.scale_little, len(self.numbers), nbytes, arguments)


def _little_of(
    family: Family, cuts: Sequence[Cut], ord: float
) -> tuple[Array, Array | None] | None:
    """Return (array, parameter or None) of a family that `_Little` can measure, else None."""
    first, owner = family.arrays[0], family.param
    other = family.zeroing or family.measured or family.numbers or len(cuts) != 1
    if ord != 2.0 or other or first.dtype.components == 2:
        return None
    if not 0 < first.size * first.itemsize < PARALLEL_BYTES:
        return None
    x = cuts[0].in_memory()
    if x is None or owner is None:
        return None if x is None else (x, None)
    param = Cut(owner).in_memory() if owner.dtype == first.dtype else None
    if param is None or param.shape != x.shape:  # slices have fewer rows than their parameter
        return None
    return x, param


def _littles(
    families: Sequence[Family], cuts: Sequence[Sequence[Cut]], firsts: Sequence[int], ord: float
) -> list[_Little]:
    """Return a `_Little` for each dtype, of the families that `_little_of` accepts."""
    members: dict[DType, list[tuple[int, list[int], Any]]] = {}
    for f, (family, own) in enumerate(zip(families, cuts, strict=True)):
        held = _little_of(family, own, ord)
        if held is not None:
            x, param = held
            owner = 0 if param is None else param.ctypes.data
            row = [x.ctypes.data, *x.shape, owner, firsts[f]]
            members.setdefault(family.arrays[0].dtype, []).append((f, row, held))
    made = []
    for dtype, every in members.items():
        numbers, arrays, kept = zip(*every, strict=True)
        right = np.zeros(len(numbers), np.bool_)
        made.append(_Little(dtype, numbers, np.array(arrays, np.int64), right, kept))
    return made


def squares(cut: Cut) -> tuple[Array, Array]:
    """Return the sum of squares of each unit as ``total * 4**exponent``."""
    dtype, held = cut.array.dtype, cut.columns()
    if held is not None:
        sums = columns.column_squares(held)
        totals = sums.reshape(cut.array.units, dtype.components).sum(axis=1)
        if dtype.digits < 53 or _are_right(sums, held).all():
            return totals, np.zeros(totals.size)
    return _row_squares(dtype, as_stored(cut.rows()))


def _row_squares(dtype: DType, rows: Array) -> tuple[Array, Array]:
    """Return the sums of squares of contiguous rows."""
    count, length = rows.shape
    if length >= LONG_ROW:
        return _summed(dtype, rows)
    totals = np.zeros(count)
    threads.run(unit_loops.row_squares, count, rows.nbytes, rows, totals)
    exponents = np.zeros(count)
    unsafe = np.zeros(count, np.bool_)
    if dtype.digits == 53:
        unsafe = ~_are_right(totals, rows[:, :, None])
    if unsafe.any():
        totals[unsafe], exponents[unsafe] = _summed(dtype, np.ascontiguousarray(rows[unsafe]))
    return totals, exponents


def _are_right(sums: Array, x: Array) -> Array:
    """Tell which sums of squares over the middle axis are safe in float64, or of zeros alone."""
    right: Array = is_safe(sums.reshape(-1))
    if not right.all():
        right |= ~x.any(axis=1).reshape(-1)
    return right


def _summed(dtype: DType, rows: Array) -> tuple[Array, Array]:
    """Return the sums of squares of rows by chunks, rescaled where they leave the safe range."""
    sums = np.zeros((len(rows), SUM_COLUMNS))
    for batch in batches.batches(_spans(dtype, rows, rows)):
        batches.write_squares(batch, sums)
    return sums[:, TOTAL], sums[:, EXPONENT]


def _spans(dtype: DType, source: Array, target: Array) -> dict[int, Span]:
    """Return the rows of 2-d storage as spans, by their numbers."""
    length, step = source.shape[1], source.shape[1] * source.itemsize
    begin, end = source.ctypes.data, target.ctypes.data
    return {r: Span(dtype, begin + r * step, end + r * step, length) for r in range(len(source))}


def _add(parts: Sequence[tuple[Array, Array]], numbers: Sequence[Array | None], out: Array) -> None:
    """Write the sums of arrays, added unit by unit in order, with the rounding errors kept.

    `numbers` has, for each array that lacks some units, the units of its rows.
    """
    if len(parts) == 1 and not numbers:
        out[:] = parts[0]
        return
    chosen = [slice(None) if own is None else own for own in numbers] or [slice(None)] * len(parts)
    out[1] = -np.inf
    for units, (totals, exponents) in zip(chosen, parts, strict=True):
        own = np.where(totals != 0.0, exponents, -np.inf)
        out[1, units] = np.maximum(out[1, units], own)
    out[1] = np.where(np.isfinite(out[1]), out[1], 0.0)
    if len(parts) == 1:
        out[0, chosen[0]] = parts[0][0]
        return
    errors = np.zeros(out.shape[1])
    with np.errstate(all="ignore"):
        for units, (totals, exponents) in zip(chosen, parts, strict=True):
            shifts = (2.0 * (exponents - out[1, units])).astype(np.intc)
            before, added = out[0, units], np.ldexp(totals, shifts)
            total = before + added
            rest = total - before
            errors[units] += (before - (total - rest)) + (added - rest)
            out[0, units] = total
        out[0] += np.where(np.isfinite(out[0]), errors, 0.0)


def _scaling(cut: Cut, decided: Array) -> tuple[Call, Callable[[], None] | None]:
    """Return the call that scales each unit, and the function that writes copies back or None."""
    truncates = bool((decided[:, MODE] > MULTIPLY).any())
    held, target = cut.columns(), cut.target()
    if held is not None and not truncates:
        factors = decided[:, FACTOR].astype(cut.array.dtype.compute)
        factors = np.repeat(factors, cut.array.dtype.components).reshape(held.shape[0], -1)
        out = np.empty_like(held) if target is None else target.reshape(held.shape)
        call = columns.scaling_columns(held, factors, out)
        return call, None if target is not None else functools.partial(cut.write, out)
    rows = as_stored(cut.rows())
    direct = target is not None and cut.in_order
    out = target.reshape(rows.shape) if target is not None and direct else np.empty_like(rows)
    call = _scaling_rows(cut.array.dtype, rows, decided, out, truncates=truncates)
    values = out.view(cut.array.dtype.native)
    return call, None if direct else functools.partial(cut.result, values)


def _scaling_rows(
    dtype: DType, rows: Array, decided: Array, out: Array, *, truncates: bool
) -> Call:
    """Return the call that multiplies contiguous rows by their factors."""
    factors = decided[:, FACTOR].astype(dtype.compute)
    if not truncates and rows.shape[1] < LONG_ROW:
        return Call(unit_loops.scale_rows, len(rows), rows.nbytes, (rows, factors, out))
    (batch,) = batches.batches(_spans(dtype, rows, out))
    keep = rows, out
    if not truncates:
        return batches.scaling(batch, factors)._replace(keep=keep)
    return batches.truncating(batch, decided, FACTOR)._replace(keep=keep)


class UnitPlan:
    """See `numclip.engine.UnitPlan`; `units` has a row for each unit, in the order of families."""

    lock = contextlib.nullcontext()

    def __init__(self, families: Sequence[Family], ord: float, _stream: Any = None) -> None:
        self.families, self._ord = list(families), ord
        ends = np.cumsum([family.units for family in families])
        self._rows = [slice(end - f.units, end) for end, f in zip(ends, families, strict=True)]
        count = int(ends[-1]) if len(ends) else 0
        self.units = np.zeros((count + 1, PEAK))
        self._table = np.zeros((len(families), unit_loops.FAMILY_COLUMNS), np.int64)
        self._table[:, unit_loops.END] = ends
        for own, family in zip(self._table, families, strict=True):
            own[unit_loops.END + 1 :] = family.digits, family.param is not None, family.base
        # Totals and exponents of units, and of their parameters.
        self._sums, self._params = np.zeros((2, count)), np.zeros((2, count))
        self._cuts = [[Cut(array) for array in family.arrays] for family in families]
        self._little = _littles(families, self._cuts, [own.start for own in self._rows], ord)
        little = {f for own in self._little for f in own.numbers}
        self._others = [f for f in range(len(families)) if f not in little]
        arrays = [array for family in families for array in family.arrays]
        self._in_place = all(array.read == array.written for array in arrays)

    def write_laws(
        self, bound: Any, _stream: Any = None, eps: Any = 0.0, unscale: float = 1.0
    ) -> None:
        """Set bounds, one or one for each family, on norms or on ratios to those of parameters."""
        self._laws = unit_laws(self.families, self._ord, bound, eps, unscale)

    def measure(self, _stream: Any = None) -> None:
        """Measure the units of gradients and parameters."""
        left = [f for own in self._little for f in own.measure(self._sums, self._params)]
        for f in [*self._others, *left]:
            self._measure(self.families[f], self._cuts[f], self._rows[f])

    def _measure(self, family: Family, cuts: Sequence[Cut], rows: slice) -> None:
        """Measure the units of one family."""
        sums = self._sums[:, rows]
        sums[:] = 0.0
        if family.zeroing or family.measured:
            arrays = family.measured or family.arrays
            cuts = [Cut(array, zeroing=family.zeroing) for array in arrays]
        if self._ord == 2.0:
            _add([squares(cut) for cut in cuts], family.numbers, sums)
        else:
            self._measure_powers(cuts, sums)
        if family.param is not None:
            self._params[:, rows] = squares(Cut(family.param))

    def _measure_powers(self, cuts: Sequence[Cut], sums: Array) -> None:
        """Write the sums of powers of the units of a family with one array."""
        (cut,) = cuts
        flat, dtype, shift = orders.real_rows(cut.array.dtype, cut.rows())
        parts = batches.batches(_spans(dtype, flat, flat))
        sums[:] = batches.power_sums(parts, self._ord, np.full(len(flat), shift)).T

    def decide(self, _stream: Any = None, base: Any = None) -> None:
        """Find the factor of every unit; `base` are decisions of a plan that can skip families."""
        skips = self.units[:0] if base is None else base
        tables = self._table, self._sums, self._params, self._laws, skips, self.units
        unit_loops.decide_units(*tables)

    def changes(self, _stream: Any = None) -> bool:
        """Tell whether some unit is scaled."""
        return bool(self.units[-1, MODE])

    def scale(self, _stream: Any = None) -> None:
        """Write each unit times its factor in one pass, or in none if all stay as they are."""
        if self._in_place and not self.changes():
            return
        calls: list[Call] = []
        others: Sequence[int] = range(len(self.families))
        if self._in_place and self.units[-1, RARE] == 0.0:
            calls, others = [own.scaling(self.units) for own in self._little], self._others
        made = []
        for cuts, rows in ((self._cuts[f], self._rows[f]) for f in others):
            decided = self.units[rows]
            active = bool((decided[:, MODE] != LEAVE).any())
            made += [
                _scaling(cut, decided)
                for cut in cuts
                if cut.array.size and (active or cut.array.read != cut.array.written)
            ]
        calls += [call for call, _ in made]
        threads.run_then(calls, [back for _, back in made if back is not None])

    def summary(self, _stream: Any = None) -> Array:
        """Return a new table for `summarize`."""
        table = np.zeros((len(self.families), 3))
        table[:, LEAST] = 1.0
        return table

    def summarize(self, out: Any, _stream: Any = None) -> None:
        """Write the norm of each family after clipping, its least factor and clipped units."""
        unit_loops.summarize(self._table, self.units, self._laws, out)

    def decisions_of(self, k: int) -> Array:
        """Return the decisions for the rows of array `k`, counted over all families."""
        for family, rows in zip(self.families, self._rows, strict=True):
            if k < len(family.arrays):
                numbers = family.numbers[k] if family.numbers else None
                decisions: Array = self.units[rows]
                return decisions if numbers is None else decisions[numbers]
            k -= len(family.arrays)
        raise IndexError(k)


def sum_examples(arrays: Sequence[Strided], units: UnitPlan, _stream: Any = None) -> None:
    """Write the sums over the first axis of arrays, in float64, each row times its factor."""
    for k, array in enumerate(arrays):
        values = np.ascontiguousarray(elements(array.dtype, array.shape, array.read))
        shape = array.shape[1:]
        steps = strides_of(shape, array.itemsize)
        out = elements(array.dtype, shape, array.written._replace(steps=steps))
        rows = as_stored(values.reshape(array.shape[0], math.prod(shape)))
        decisions = units.decisions_of(k)
        factors = decisions[:, FACTOR].copy()
        under = (decisions[:, MANTISSA] > 0.0) & (factors < array.dtype.tiny)
        if array.dtype.digits == 53 and rows.size and under.any():
            rows, factors[under] = _truncated(rows, decisions, under), 1.0
        columns.sum_examples(rows, factors, as_stored(out.reshape(-1)))


def _truncated(values: Array, decisions: Array, chosen: Array) -> Array:
    """Return a copy of rows, the chosen ones times factors below the normal float64 numbers."""
    made, length = values.copy(), values.shape[1]
    first, step = made.ctypes.data, made.strides[0]
    starts = {e: first + e * step for e in np.flatnonzero(chosen).tolist()}
    spans = {e: Span(FLOAT64, start, start, length) for e, start in starts.items()}
    every = batches.batches(spans)
    threads.run_all([batches.truncating(batch, decisions, FACTOR) for batch in every])
    return made

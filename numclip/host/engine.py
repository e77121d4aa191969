"""The engine of the host's memory, see `numclip.engine`."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType
from numclip.engine import Outcome
from numclip.errors import expected
from numclip.facts import Facts
from numclip.host import arrays, halves, pairs, plain_arrays, rows, units, updates
from numclip.host.given import Extents, Given
from numclip.host.plan import Plan
from numclip.host.strided import elements
from numclip.host.units import UnitPlan
from numclip.law import Pool
from numclip.memory import AnySpan, Memory, Span, Strided

name = "cpu"
takes_any_rows = True
updates_read_anywhere = True
facts = arrays.facts_of
empty = arrays.empty
new_like = arrays.new_like
new_of_shape = arrays.new_of_shape
plan = Plan
half_copies = halves.HalfCopies
unit_plan = UnitPlan
sum_rows = rows.sum_rows
key_of_pairs = pairs.key_of_pairs
kernels = updates.KERNELS
sum_examples = units.sum_examples
updates_of_groups = updates.GroupUpdates
updates_of_arrays = updates.ArrayUpdates


def require() -> None:
    """Raise nothing: a host is always there."""


def span(dtype: DType, source: Facts, target: Facts, *, parts: bool) -> Span | Strided:  # noqa: ARG001
    """Return a `Span` if both are dense, aligned and of the same strides; else `Strided`."""
    step = dtype.storage.itemsize
    aligned = not (source.address % step or target.address % step)
    if source.strides == target.strides and source.dense and aligned:
        size = source.nbytes // step
        return Span(dtype, source.address, target.address, size)
    return Strided(dtype, source.shape, source.memory, target.memory)


def stream_of(_facts: Sequence[Facts]) -> None:
    """Return None: the host has no streams."""


def give_back(_stream: None, _facts: Sequence[Facts]) -> None:
    """Do nothing: the host has no streams."""


def stream_from(stream: Any) -> None:
    """Refuse a stream."""
    if stream is not None:
        raise ValueError(expected("stream", 'None for device="cpu"', "a stream"))


def kept_plan(
    spans: Sequence[AnySpan], pools: Sequence[Pool], _stream: Any
) -> tuple[Plan, list[Outcome]]:
    """Return a new plan and no outcomes: a new one costs as little as finding an old one."""
    return Plan(spans, pools), []


def kept_unit_plan(families: Sequence[Any], ord: float, _stream: Any) -> tuple[UnitPlan, list[Any]]:
    """Return a new plan of units and no tables, as `kept_plan` does."""
    return UnitPlan(families, ord), []


def read(table: Array, _stream: Any = None) -> Array:
    """Return the table."""
    return table


def number(table: Array, column: int, _stream: Any, _release: Callable[[], object]) -> float:
    """Return a float of a table's first row."""
    return float(table[0, column])


def numbers(
    table: Array, column: int, count: int, _stream: Any, _release: Callable[[], object]
) -> list[int]:
    """Return the integers of a column, in the first `count` rows."""
    return [int(number) for number in table[:count, column]]


def key_of(items: Sequence[Any], ord: float, policy: str, *, written: bool) -> None:
    """Return None: plans of the host are not kept."""


def find_plan(_key: Any) -> None:
    """Return None: plans of the host are not kept."""


def keep_plan(_key: Any, _plan: Plan, _free: list[Outcome]) -> None:
    """Do nothing: plans of the host are not kept."""


def sent(array: Array, _stream: Any = None) -> Array:
    """Return the array, which kernels of the host read where it is."""
    return array


def copy(target: Facts, source: Facts, _stream: Any = None) -> None:
    """Copy an array into one of the same shape and dtype."""
    np.copyto(target.array, source.array)


def clear(array: Array, _stream: Any = None) -> None:
    """Set an array to zeros."""
    array.fill(0)


def on_host(source: Facts, _stream: Any = None) -> Array:
    """Return the array itself."""
    array: Array = source.array
    return array


def clamp_between(array: Strided, low: Memory, high: Memory, _stream: Any = None) -> None:
    """Write an array clamped between two others of its shape and dtype."""
    own, least, most, target = (
        elements(array.dtype, array.shape, memory)
        for memory in (array.read, low, high, array.written)
    )
    # NumPy's minimum and maximum may exchange zeros of different signs.
    target[...] = np.where(own > most, most, np.where(own < least, least, own))


def part(array: Array, start: int, shape: tuple[int, ...]) -> Array:
    """Return the view of some elements of a 1-d array, from the one numbered `start`."""
    return array[start : start + math.prod(shape)].reshape(shape)


def put(array: Array, source: Array, _stream: Any = None) -> None:
    """Copy an array into one of the same shape, cast to its dtype."""
    array[...] = source


def given(
    targets: Sequence[Facts],
    taken: Extents,
    natives: Sequence[np.dtype[Any]] | None = None,
    held: Mapping[int, Array] | None = None,
) -> Given | None:
    """Return a `Given` for `targets`; None if kernels cannot read this NumPy's array objects."""
    return Given(targets, taken, natives, held) if plain_arrays.READABLE else None


def put_all(pairs: Sequence[tuple[Array, Array]], _stream: Any = None, *, adds: bool) -> None:
    """Copy the second array of each pair into the first, or add it."""
    for array, source in pairs:
        if adds:
            np.add(array, source, out=array, casting="same_kind")
        else:
            put(array, source)


def table(shape: tuple[int, ...], _stream: Any = None) -> Array:
    """Return a new table of zeros."""
    return np.zeros(shape)


def hand_over(table: Array, _stream: Any = None) -> tuple[Callable[[], Array], Array]:
    """Return a function that returns `table`, and a new table to write to from now on."""
    return lambda: table, np.zeros_like(table)


def on_stream(stream: Any) -> contextlib.AbstractContextManager[Any]:
    """Return a context that does nothing: the host works in the order of the calls."""
    return contextlib.nullcontext(stream)


def is_capturing(_stream: Any) -> bool:
    """Return False: the host records no graphs."""
    return False

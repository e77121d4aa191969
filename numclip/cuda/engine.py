"""The engine for NVIDIA GPUs, see `numclip.engine`.

Launches and small copies return without waiting for the GPU; reading values waits.
"""

from __future__ import annotations

import functools
import math
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from numclip.cuda import (
    arrays,
    device,
    driver,
    memory,
    plans,
    rows,
    streams,
    strided,
    tensors,
    updates,
)
from numclip.cuda.arrays import DeviceArray, empty
from numclip.cuda.contiguous import HalfCopies
from numclip.cuda.plan import Plan
from numclip.cuda.protocols import facts_of, library_of
from numclip.cuda.strided import Sums
from numclip.cuda.units import UnitPlan
from numclip.cuda.values import DeviceFloat, DeviceInt
from numclip.dtypes import Array, DType, lookup
from numclip.engine import Groups, Outcome
from numclip.facts import Facts
from numclip.law import Pool
from numclip.libraries import on_device
from numclip.memory import AnySpan, RowSpan, Span, Strided

takes_any_rows = False
updates_read_anywhere = False
require = device.require
facts = facts_of
stream_of = streams.stream_of
stream_from = streams.stream_from
give_back = streams.give_back
plan = Plan
unit_plan = UnitPlan
half_copies = HalfCopies
clamp_between = strided.clamp_between
name = "cuda"


def span(dtype: DType, source: Facts, target: Facts, *, parts: bool) -> Span | Strided:
    """Return a `Span` if both arrays are dense and have the same strides, else a `Strided`.

    With `parts`, the two numbers of a complex element count together: always a `Strided`, as a
    `Span` is one of stored numbers.
    """
    if source.strides == target.strides and source.dense and not parts:
        size = source.nbytes // dtype.storage.itemsize
        return Span(dtype, source.address, target.address, size)
    return Strided(dtype, source.shape, source.memory, target.memory)


def new_like(like: Facts) -> Any:
    """Return a new array of the library of `like`, with its strides if dense, else in C order."""
    package, strides = library_of(like.array), like.strides if like.dense else None
    if package == "torch":
        torch = sys.modules[package]
        options = {} if like.dense else {"memory_format": torch.contiguous_format}
        return torch.empty_like(like.array, **options)
    if package == "cupy":
        order = "K" if like.dense else "C"
        return sys.modules[package].empty_like(like.array, order=order)
    return _new(like, like.shape, strides)


def new_of_shape(like: Facts, shape: tuple[int, ...]) -> Any:
    """Return a new array of `shape` in C order, of the dtype and the library of `like`."""
    package = library_of(like.array)
    if package == "torch":
        return like.array.new_empty(shape)
    if package == "cupy":
        return sys.modules["cupy"].empty(shape, like.array.dtype)
    return _new(like, shape, None)


def _new(like: Facts, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Any:
    """Return a new `DeviceArray`, as a numba array if `like` is one and its dtype not bfloat16."""
    made = empty(shape, like.native, strides)
    if library_of(like.array) == "numba" and like.native.name != "bfloat16":
        return device.cuda.as_cuda_array(made, sync=False)
    return made


def kept_plan(
    spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any
) -> tuple[Any, list[Outcome]]:
    """Return (plan, free): the kept plan of these arguments, or a new one, and its free outcomes.

    Each stream has its own plan, as two streams could use a plan's memory at the same time.
    """
    key = (driver.handle_of(stream), *pools, *spans)
    return plans.kept(key, lambda: Plan(spans, pools, stream))


def kept_unit_plan(families: Sequence[Any], ord: float, stream: Any) -> tuple[Any, list[Any]]:
    """Return (plan, free) for units, as `kept_plan` does, and the plan's free summary tables."""
    key = (driver.handle_of(stream), ord, *families)
    return plans.kept(key, lambda: UnitPlan(families, ord, stream))


def number(table: Any, column: int, stream: Any, release: Callable[[], object]) -> DeviceFloat:
    """Return a float of a table's first row; the first use of its value waits for the GPU.

    `release` is called when the float is no longer referenced.
    """
    made = DeviceFloat(lambda: read(table, stream)[0, column], lambda: table.address + 8 * column)
    weakref.finalize(made, release).atexit = False
    return made


def numbers(
    table: Any, column: int, count: int, stream: Any, release: Callable[[], object]
) -> list[DeviceInt]:
    """Return the first `count` entries of a column; the first use of a value waits for all.

    `release` is called when no unread entry is referenced any more.
    """

    @functools.cache
    def found() -> Array:
        return read(table, stream)

    def number(row: int) -> float:
        return float(found()[row, column])

    weakref.finalize(found, release).atexit = False
    return [DeviceInt(functools.partial(number, row)) for row in range(count)]


def key_of(items: Sequence[Any], ord: float, policy: str, *, written: bool) -> Any:
    """Return the key by which the plan for PyTorch tensors is found without describing them.

    Return None if `tensors.facts` does, and for the policy "raise", whose error names an array.
    `written` is in the key, as arrays that were only measured were not checked to be writable.
    """
    held = None if policy == "raise" else tensors.facts(items)
    if not held:
        return None
    stream = streams.current_stream(next(item for item in items if item is not None))
    return driver.handle_of(stream), policy, ord, written, held


def key_of_pairs(
    gradients: list[Any], variables: list[Any], kernel: str, rows: Mapping[int, Array]
) -> tuple[Any, None]:
    """Return (key, None): the key of updates by both sides' tensors, None if `rows` are given."""
    if rows:
        return None, None
    items = [item for pair in zip(gradients, variables, strict=True) for item in pair]
    return key_of(items, 2.0, kernel, written=True), None


def find_plan(key: Any) -> tuple[Any, list[Outcome], Any] | None:
    """Return (plan, free outcomes, stream) kept under a key, or None."""
    found = None if key is None else plans.find(key)
    return None if found is None else (*found, driver.Stream(key[0]))


def keep_plan(key: Any, plan: Any, free: list[Outcome]) -> None:
    """Keep a plan and its free outcomes under a key, unless that is None."""
    if key is not None:
        plans.keep(key, (plan, free))


def sent(array: Array, stream: Any) -> DeviceArray:
    """Return a copy on the GPU of an array of the host."""
    made = empty(array.shape, array.dtype)
    memory.write(made.address, array.reshape(-1).view(np.uint8), stream)
    return made


def sum_rows(
    source: Facts, target: Facts, grouping: Groups, target_rows: Array, stream: Any
) -> None:
    """Write the sum of each group of rows to its row in `target_rows`, 0 to the others."""
    row, to = lookup(source.native), lookup(target.native)
    assert row is not None
    assert to is not None
    memory.clear(target.address, target.nbytes, stream)
    length = math.prod(source.shape[1:]) * row.components
    size = source.nbytes // row.storage.itemsize
    span = RowSpan(row, source.address, target.address, size, length)
    rows.sum_rows(span, to, grouping, target_rows, stream)


read = memory.read_table
part = DeviceArray.part
indices_on_host = arrays.host_indices
on_host = arrays.host_copy


def copy(target: Facts, source: Facts, stream: Any) -> None:
    """Copy the memory of an array to one of the same shape, dtype and strides."""
    memory.copy(target.address, source.address, source.nbytes, stream)


def clear(array: Any, stream: Any) -> None:
    """Set an array made by `empty` to zeros."""
    memory.clear(array.address, array.nbytes, stream)


def sum_examples(arrays: Sequence[Strided], units: Any, stream: Any) -> None:
    """Write the sum over each array's first axis, added in float64, each row times its factor."""
    tensors, table = units.shared.tensors, units.units
    key = (driver.handle_of(stream), "examples", *arrays)
    adding, _ = plans.kept(key, lambda: Sums(dict(enumerate(arrays)), stream))
    adding.write(tensors, table, stream)


def put(array: DeviceArray, source: Any, stream: Any) -> None:
    """Copy `source`, of the same shape, into `array`; cast it on the host, on the GPU widen it."""
    if on_device(source) and facts_of("source", source).native != array.dtype:
        arrays.move_all([(array, source)], stream, adds=False)
    else:
        array.copy_from(_sendable(array, source), stream)


def given(_targets: Sequence[Facts], _taken: Any, _natives: Any = None, _held: Any = None) -> None:
    """Return None: arrays that a user passes for those of the GPU are copied into them instead."""


def put_all(pairs: Sequence[tuple[DeviceArray, Any]], stream: Any, *, adds: bool) -> None:
    """Copy each source into its pair's array, or add it; sources on the GPU share launches."""
    arrays.move_all([pair for pair in pairs if on_device(pair[1])], stream, adds=adds)
    for array, source in pairs:
        if not on_device(source):
            (array.add if adds else array.copy_from)(_sendable(array, source), stream)


@np.errstate(all="ignore")
def _sendable(array: DeviceArray, source: Any) -> Any:
    return source if on_device(source) else source.astype(array.dtype, copy=False)


def table(shape: tuple[int, ...], stream: Any) -> Any:
    """Return a new table of zeros."""
    return memory.table(np.zeros(shape), stream)


def hand_over(table: Any, stream: Any) -> tuple[Callable[[], Array], Any]:
    """Return (read, table): `read` waits for and returns the table's present content."""
    return memory.read_later(table, stream), table


on_stream = driver.on_stream
is_capturing = driver.is_captured
updates_of_groups = updates.GroupUpdates
updates_of_arrays = updates.ArrayUpdates
kernels = updates.KERNELS

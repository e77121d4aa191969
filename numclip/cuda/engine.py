"""The engine of NVIDIA GPUs, see `numclip.engine`; nothing here waits but what reads values."""

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
    """Return where an array is and goes: contiguous memory where it is that, in one order.

    Contiguous memory is taken as stored numbers; tiles know the parts of a complex one, where
    these count together.
    """
    if source.strides == target.strides and source.dense and not parts:
        size = source.nbytes // dtype.storage.itemsize
        return Span(dtype, source.address, target.address, size)
    return Strided(dtype, source.shape, source.memory, target.memory)


def new_like(like: Facts) -> Any:
    """Return a new array of the library of another, in memory as that one if it is dense."""
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
    """Return a new array in C order of the dtype and the library of another one."""
    package = library_of(like.array)
    if package == "torch":
        return like.array.new_empty(shape)
    if package == "cupy":
        return sys.modules["cupy"].empty(shape, like.array.dtype)
    return _new(like, shape, None)


def _new(like: Facts, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Any:
    """Return a new array of ours, or of numba's where another one is of numba."""
    made = empty(shape, like.native, strides)
    if library_of(like.array) == "numba" and like.native.name != "bfloat16":
        return device.cuda.as_cuda_array(made, sync=False)
    return made


def kept_plan(
    spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any
) -> tuple[Any, list[Outcome]]:
    """Return a plan for a stream, one there was if there was one like it, and its free memory.

    Each stream has its own: two could use a plan's memory at the same time.
    """
    key = (driver.handle_of(stream), *pools, *spans)
    return plans.kept(key, lambda: Plan(spans, pools, stream))


def kept_unit_plan(families: Sequence[Any], ord: float, stream: Any) -> tuple[Any, list[Any]]:
    """Return a plan of units likewise."""
    key = (driver.handle_of(stream), ord, *families)
    return plans.kept(key, lambda: UnitPlan(families, ord, stream))


def number(table: Any, column: int, stream: Any, release: Callable[[], object]) -> DeviceFloat:
    """Return a float of a table's first row to come, which is waited for by who asks for it.

    `release` is called when nobody can ask any more.
    """
    made = DeviceFloat(lambda: read(table, stream)[0, column], lambda: table.address + 8 * column)
    weakref.finalize(made, release).atexit = False
    return made


def numbers(
    table: Any, column: int, count: int, stream: Any, release: Callable[[], object]
) -> list[DeviceInt]:
    """Return the numbers of a column to come; the first one asked for waits for all."""

    @functools.cache
    def found() -> Array:
        return read(table, stream)

    def number(row: int) -> float:
        return float(found()[row, column])

    weakref.finalize(found, release).atexit = False
    return [DeviceInt(functools.partial(number, row)) for row in range(count)]


def key_of(items: Sequence[Any], ord: float, policy: str, *, written: bool) -> Any:
    """Return by what the plan for tensors of PyTorch is found without describing them.

    None where there are others among the arrays, and where an error would have to name one. What
    was only measured was not checked for writing.
    """
    told = None if policy == "raise" else tensors.facts(items)
    if not told:
        return None
    stream = streams.current_stream(next(item for item in items if item is not None))
    return driver.handle_of(stream), policy, ord, written, told


def key_of_pairs(
    gradients: list[Any], variables: list[Any], kernel: str, rows: Mapping[int, Array]
) -> tuple[Any, None]:
    """Return by what updates of tensors of PyTorch are found: where both are, and what is kept."""
    if rows:
        return None, None
    items = [item for pair in zip(gradients, variables, strict=True) for item in pair]
    return key_of(items, 2.0, kernel, written=True), None


def find_plan(key: Any) -> tuple[Any, list[Outcome], Any] | None:
    """Return the plan of a key, its free memory for outcomes and its stream, if there is one."""
    found = None if key is None else plans.find(key)
    return None if found is None else (*found, driver.Stream(key[0]))


def keep_plan(key: Any, plan: Any, free: list[Outcome]) -> None:
    """Let a plan be found by a key."""
    if key is not None:
        plans.keep(key, (plan, free))


def sent(array: Array, stream: Any) -> DeviceArray:
    """Return a copy of an array of the host on the GPU."""
    made = empty(array.shape, array.dtype)
    memory.write(made.address, array.reshape(-1).view(np.uint8), stream)
    return made


def sum_rows(source: Facts, target: Facts, grouping: Groups, places: Array, stream: Any) -> None:
    """Write the sum of each group of rows to the row that is its place, and 0 to the others."""
    row, to = lookup(source.native), lookup(target.native)
    assert row is not None
    assert to is not None
    memory.clear(target.address, target.nbytes, stream)
    length = math.prod(source.shape[1:]) * row.components
    size = source.nbytes // row.storage.itemsize
    span = RowSpan(row, source.address, target.address, size, length)
    rows.sum_rows(span, to, grouping, places, stream)


read = memory.read_table
part = DeviceArray.part
indices_on_host = arrays.host_indices
on_host = arrays.host_copy


def copy(target: Facts, source: Facts, stream: Any) -> None:
    """Copy memory to an array that lies as another one does."""
    memory.copy(target.address, source.address, source.nbytes, stream)


def clear(array: Any, stream: Any) -> None:
    """Set an array of `empty` to zeros."""
    memory.clear(array.address, array.nbytes, stream)


def sum_examples(arrays: Sequence[Strided], units: Any, stream: Any) -> None:
    """Write the sums over the first axis of arrays, in float64, each row times its factor."""
    tensors, table = units.shared.tensors, units.units
    key = (driver.handle_of(stream), "examples", *arrays)
    adding, _ = plans.kept(key, lambda: Sums(dict(enumerate(arrays)), stream))
    adding.write(tensors, table, stream)


def put(array: DeviceArray, source: Any, stream: Any) -> None:
    """Copy an array into one of the same shape: of the GPU, or of the host, which is cast."""
    if on_device(source) and facts_of("source", source).native != array.dtype:
        arrays.move_all([(array, source)], stream, adds=False)
    else:
        array.copy_from(_sendable(array, source), stream)


def given(_targets: Sequence[Facts], _taken: Any, _natives: Any = None, _held: Any = None) -> None:
    """Return nothing: what is passed for arrays of the GPU is copied into them."""


def put_all(pairs: Sequence[tuple[DeviceArray, Any]], stream: Any, *, adds: bool) -> None:
    """Copy arrays likewise, each into the one before it, or add them: those of the GPU together."""
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
    """Return what reads a table as it is now, without waiting yet, and the one to write to."""
    return memory.read_later(table, stream), table


on_stream = driver.on_stream
is_capturing = driver.is_captured
updates_of_groups = updates.GroupUpdates
updates_of_arrays = updates.ArrayUpdates
kernels = updates.KERNELS

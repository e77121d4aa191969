"""Strided memory, cut into tiles: the directions of tiles, and tables of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.cuda import device, memory
from numclip.cuda.contiguous import copied_first
from numclip.cuda.kernels import tile_scaling, tiles
from numclip.cuda.kernels.packets import PACKET, WORD
from numclip.cuda.work import Kernels, OwnWork, Tables, launch
from numclip.dtypes import Array, DType
from numclip.memory import Memory, Strided

LINE = 128  # bytes that a warp best reads at a time
# Bytes of a tile: the more there are, the fewer sums are written; the fewer, the more blocks.
LEAST_BYTES, MOST_BYTES = device.CHUNK_BYTES >> 3, device.CHUNK_BYTES
TILES = 2048  # of an array, where these limits allow it
TURNS = 16  # elements a thread reads before lanes are added up, where a line has so many


class Direction(NamedTuple):
    """An axis, or several merged into one: steps in bytes by memory, and that of unit numbers."""

    length: int
    steps: tuple[int, ...]
    number: int = 0
    kept: bool = False

    @property
    def extent(self) -> int:
        """The bytes from the first element to the last in the first memory, plus one step."""
        return abs(self.steps[0]) * self.length


def directions(array: Strided, memories: Sequence[Memory]) -> list[Direction]:
    """Return an array's directions, from the longest step in the first memory to the shortest."""
    number, numbers = 1, {}
    for k in reversed(array.kept):
        numbers[k] = number
        number *= array.shape[k]
    found = [
        Direction(n, tuple(m.steps[k] for m in memories), numbers.get(k, 0), k in numbers)
        for k, n in enumerate(array.shape)
        if n != 1
    ]
    found.sort(key=lambda direction: -abs(direction.steps[0]))
    merged: list[Direction] = []
    for inner in found:
        if merged and _continues(merged[-1], inner):
            outer = merged.pop()
            inner = inner._replace(length=outer.length * inner.length)
        merged.append(inner)
    return merged


def _continues(outer: Direction, inner: Direction) -> bool:
    """Tell whether one outer step is as long as all inner steps together, so that both merge."""
    pairs = zip((*outer.steps, outer.number), (*inner.steps, inner.number), strict=True)
    return outer.kept == inner.kept and all(far == near * inner.length for far, near in pairs)


def patch(found: Sequence[Direction], none: Direction) -> tuple[Direction, Direction]:
    """Return (along, across), the directions of a tile's lines and of their neighbours, or `none`.

    Lines go along reduced axes. One of the two is the direction of the smallest step, unless its
    extent is below a sector, or the tile would have fewer elements than a block has threads:
    there could be a tile for every few elements. The other is the longest.
    """
    kept = [direction for direction in found if direction.kept]
    reduced = [direction for direction in found if not direction.kept]
    wide = [direction for direction in found if direction.extent >= device.SECTOR]
    closest = (wide or found or [none])[-1]
    along = _longest(reduced, none)
    if kept:
        longest = along, _longest(kept, none)
        chosen = (along, closest) if closest.kept else (closest, longest[1])
        return longest if chosen[0].length * chosen[1].length < device.THREADS else chosen
    others = [direction for direction in reduced if direction is not along]
    return along, closest if closest in others else _longest(others, none)


def _longest(found: Sequence[Direction], none: Direction) -> Direction:
    return max(found, key=lambda direction: direction.length, default=none)


def bits_of(number: int) -> int:
    """Return the exponent of the smallest power of two that is at least `number`."""
    return max(number - 1, 0).bit_length()


def width_bits(along: Direction, across: Direction, itemsize: int) -> int:
    """Return the exponent of the power of two of neighbours read at a time; the rest are lanes.

    Lines are read in packets where they can be: then two lanes read a sector.
    """
    lanes = bits_of(-(-along.length // TURNS))
    least = 0
    if abs(along.steps[0]) < abs(across.steps[0]) or across.length == 1:
        packets = along.length // PACKET if across.steps[0] % WORD == 0 else 0
        read = WORD if packets > 1 and along.steps[0] == itemsize else itemsize
        lanes = max(lanes, min(bits_of(device.SECTOR // read), bits_of(along.length)))
    else:
        least = min(bits_of(LINE // itemsize), tiles.ALL_BITS)
    return min(max(tiles.ALL_BITS - lanes, least, 0), bits_of(across.length))


def _offsets(rest: Sequence[Direction], steps: Sequence[int]) -> Array:
    """Return the sum of index times step for each combination of indices along `rest`."""
    total = np.zeros(1, np.int64)
    for direction, step in zip(rest, steps, strict=True):
        offsets = np.arange(direction.length, dtype=np.int64) * step
        total = (total[:, None] + offsets).reshape(-1)
    return total


MEMORY_COLUMNS = (
    (tables.SOURCE, tables.STEP, tables.UNIT_STEP),
    (tables.TARGET, tables.TARGET_STEP, tables.TARGET_UNIT_STEP),
    (tables.LOW, tables.LOW_STEP, tables.LOW_UNIT_STEP),
    (tables.HIGH, tables.HIGH_STEP, tables.HIGH_UNIT_STEP),
)


class Pieces(NamedTuple):
    """How an array is cut: into tiles of `lines` lines of `length`, at each index of `rest`."""

    along: Direction
    across: Direction
    rest: list[Direction]
    length: int
    lines: int
    bits: int


def pieces(array: Strided, memories: Sequence[Memory], *, whole: bool) -> Pieces:
    """Return how an array is cut; an array without elements gets tiles of empty lines."""
    none = Direction(1, (0,) * len(memories))
    found = directions(array, memories)
    if 0 in array.shape:
        found = [direction for direction in found if direction.kept]
    along, across = patch(found, none)
    rest = [direction for direction in found if direction is not along and direction is not across]
    if 0 in array.shape:
        along = none._replace(length=0)
    bits = width_bits(along, across, array.itemsize)
    nbytes = array.size * array.dtype.storage.itemsize
    most = min(max(nbytes // TILES, LEAST_BYTES), MOST_BYTES) // array.itemsize
    longest = max(most >> bits, PACKET) // PACKET * PACKET  # next one begins at a word
    length, lines = max(along.length if whole else min(longest, along.length), 1), 1 << bits
    if across.kept and along.length <= length:
        lines *= max(most // (length << bits), 1)
    return Pieces(along, across, rest, length, lines, bits)


def cut(array: Strided, memories: Sequence[Memory], *, whole: bool = False) -> tuple[Array, int]:
    """Return the table of an array's tiles, and how many partial sums each unit has.

    `memories` fill the columns of SOURCE, TARGET, LOW and HIGH in this order, as many as are
    given. The column PART counts from the array's first sum. With `whole`, lines are not cut.
    """
    along, across, rest, length, lines, bits = pieces(array, memories, whole=whole)
    starts, firsts = np.arange(0, max(along.length, 1), length), np.arange(0, across.length, lines)
    reduced = [1 if direction.kept else direction.length for direction in rest]
    radix = [math.prod(reduced[k + 1 :]) * (n > 1) for k, n in enumerate(reduced)]
    turns = _offsets(rest, radix)[:, None, None]
    if not across.kept:
        turns = turns * len(firsts) + np.arange(len(firsts))[:, None]
    turns = turns * len(starts) + np.arange(len(starts))
    numbers = _offsets(rest, [direction.number for direction in rest])[:, None, None]
    numbers = numbers + (firsts * across.number)[:, None]
    table = np.zeros((len(turns), len(firsts), len(starts), tables.TILE_COLUMNS), np.int64)
    table[..., tables.LENGTH] = np.minimum(length, along.length - starts)
    table[..., tables.COUNT] = np.minimum(lines, across.length - firsts)[:, None]
    table[..., tables.BITS], table[..., tables.COMPONENTS] = bits, array.dtype.components
    table[..., tables.NUMBER], table[..., tables.NUMBER_STEP] = numbers, across.number
    table[..., tables.PART] = turns * array.units + numbers
    for k, own in enumerate(memories):
        address, step, unit_step = MEMORY_COLUMNS[k]
        offsets = _offsets(rest, [direction.steps[k] for direction in rest])[:, None, None]
        offsets = offsets + (firsts * across.steps[k])[:, None] + starts * along.steps[k]
        table[..., address] = own.address + offsets
        table[..., step], table[..., unit_step] = along.steps[k], across.steps[k]
    sums = math.prod(reduced) * len(starts) * (1 if across.kept else len(firsts))
    return table.reshape(-1, tables.TILE_COLUMNS), sums


class Tiles(OwnWork):
    """The work on strided tensors.

    All units of a tensor have as many partial sums: first one of each unit, then another of each.
    """

    kernels = Kernels(
        tiles.sum_tile_squares,
        tiles.max_tile_magnitude,
        tiles.sum_tile_powers,
        tile_scaling.scale_tiles,
        tile_scaling.clamp_tiles,
    )

    def __init__(self, arrays: Mapping[int, Strided]) -> None:
        self._arrays = dict(arrays)
        self._cut = {k: cut(array, [array.read] * 2) for k, array in arrays.items()}
        sums = [self._cut[k][1] * array.units for k, array in arrays.items()]
        self.counts = np.array(sums, np.int64)
        self._made: dict[range | None, Tables] = {}

    def send(self, parts: Array, stream: Any) -> None:
        """Send the tables; `parts` has the index of each tensor's first partial sum."""
        found = {}
        for (k, (table, _)), part in zip(self._cut.items(), parts, strict=True):
            table[:, tables.PART] += part
            found[k] = table
        self._tables = _by_dtype(self._arrays, found, stream)
        if all(array.read == array.written for array in self._arrays.values()):
            self._made[None] = self._tables

    def _written(self, members: range | None, stream: Any) -> Tables:
        if members not in self._made:
            chosen = [k for k in self._arrays if members is None or k in members]
            found = {k: cut(self._arrays[k], self._arrays[k][2:4])[0] for k in chosen}
            self._made[members] = _by_dtype(self._arrays, found, stream)
        return self._made[members]


def _by_dtype(arrays: Mapping[int, Strided], found: Mapping[int, Array], stream: Any) -> Tables:
    """Send one table of tiles for each dtype that occurs; return the tables."""
    rows: dict[DType, list[Array]] = {}
    for k, table in found.items():
        table[:, tables.OWNER] = k
        rows.setdefault(arrays[k].dtype, []).append(table)
    concatenated = {dtype: copied_first(np.concatenate(own)) for dtype, own in rows.items()}
    return {dtype: [memory.table(own, stream)] for dtype, own in concatenated.items() if len(own)}


def clamp_between(array: Strided, low: Memory, high: Memory, stream: Any) -> None:
    """Clamp an array between `low` and `high`, arrays of the same shape and dtype."""
    table = memory.table(cut(array, [array.read, array.written, low, high])[0], stream)
    launch(tile_scaling.clamp_tiles_between, {array.dtype: [table]}, stream)


class Sums:
    """Sums over the first axis of tensors, keyed by their numbers, each row times its factor."""

    def __init__(self, arrays: Mapping[int, Strided], stream: Any) -> None:
        found = {k: cut(a, [a.read, a.written], whole=True)[0] for k, a in arrays.items()}
        self._tables = _by_dtype(arrays, found, stream)

    def write(self, tensors: Any, units: Any, stream: Any) -> None:
        """Write the sums, added in float64, to each array's `written`, whose first step is 0."""
        launch(tile_scaling.sum_examples, self._tables, stream, tensors, units)

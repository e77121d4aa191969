"""Gradients as a user passes them, checked and described once; no other code checks them again."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numclip import engine as engines
from numclip import libraries
from numclip.border.structures import Key, Structure
from numclip.dtypes import NAMES, DType, lookup, refusal
from numclip.engine import Engine
from numclip.errors import expected
from numclip.facts import Facts
from numclip.slices import IndexedSlices, slices_of


class Gradient(NamedTuple):
    """One gradient, in the host's memory or on a GPU.

    `source` is the user's object: an array, or `slices`, where shape and memory are those of
    the values.
    """

    name: str
    key: Key
    dtype: DType
    facts: Facts
    source: Any
    engine: Engine
    slices: IndexedSlices | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array, or of the values of slices."""
        return self.facts.shape

    @property
    def native(self) -> np.dtype[Any]:
        """The NumPy dtype."""
        return self.facts.native

    @property
    def address(self) -> int:
        """The address of the first element."""
        return self.facts.address

    @property
    def repeated(self) -> bool:
        """Whether rows of the dense array are stored more than once."""
        return self.slices is not None and self.slices.has_duplicates

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.shape if self.slices is None else self.slices.dense_shape

    @property
    def size(self) -> int:
        """The stored numbers, two for each complex element."""
        return math.prod(self.shape) * self.dtype.components

    @property
    def dense_size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.dense_shape)

    @property
    def row_length(self) -> int:
        """The stored numbers of a row."""
        return math.prod(self.shape[1:]) * self.dtype.components

    def lies_as(self, other: Gradient) -> bool:
        """Tell whether an array of the same shape and dtype has the same memory."""
        return self.facts.lies_as(other.facts)


def describe(name: str, key: Key, gradient: Any, engine: Engine | None = None) -> Gradient:
    """Check and describe one gradient; it has to be on the device of `engine`, if given."""
    slices = slices_of(name, gradient)
    values = gradient if slices is None else slices.values
    if engine is not None and (engine.name == "cuda") != libraries.on_device(values):
        raise _elsewhere(name, gradient, engine)
    own = engines.of(values) if engine is None else engine
    facts = own.facts(name, values)
    dtype = lookup(facts.native)
    if dtype is None:
        raise TypeError(expected(name, f"an array of {NAMES}", refusal(facts.native)))
    if slices is not None and facts.shape != (slices.indices.size, *slices.dense_shape[1:]):
        wanted = (
            f"a row of shape {slices.dense_shape[1:]} for each of {slices.indices.size} indices"
        )
        raise ValueError(expected(f"{name}.values", wanted, f"shape {facts.shape}"))
    if slices is not None and not (facts.c_order or own.takes_any_rows):
        got = f"strides {facts.strides} for shape {facts.shape}; pass a contiguous copy"
        raise ValueError(expected(name, "rows in C order on the GPU", got))
    return Gradient(name, key, dtype, facts, gradient, own, slices)


def _elsewhere(name: str, gradient: Any, engine: Engine) -> TypeError:
    """Return the error for a gradient that is not on the device of the others."""
    if engine.name == "cpu":
        return libraries.elsewhere(name, gradient)
    kind = type(gradient).__name__
    return TypeError(expected(name, "a CUDA array, as the others are", kind))


@dataclass(frozen=True, eq=False)
class Gradients:
    """Several gradients of one engine: those that are not None, and the user's structure."""

    entries: list[Gradient]
    structure: Structure

    @property
    def engine(self) -> Engine:
        """The engine of the gradients; the host's if there are none."""
        return self.entries[0].engine if self.entries else engines.named("cpu")

    def with_results(self, results: Sequence[Any]) -> Any:
        """Return the user's structure with a result for each gradient, None where None was."""
        remaining = iter(results)
        items = [None if item is None else next(remaining) for item in self.structure.items]
        return self.structure.rebuild(items)


def gradients(found: Structure) -> Gradients:
    """Return the description of a structure of gradients, which must be on one device."""
    entries: list[Gradient] = []
    for key, item in zip(found.keys, found.items, strict=True):
        if item is not None:
            engine = entries[0].engine if entries else None
            entries.append(describe(found.name_of(key), key, item, engine))
    return Gradients(entries, found)


def check_axes(entry: Gradient) -> None:
    """Refuse a sparse gradient whose axes were flattened."""
    if entry.slices is not None and entry.slices.axes > 1:
        kind = type(entry.source).__name__
        got = f"{kind} with {entry.slices.axes} sparse axes; convert it to a dense array"
        raise TypeError(expected(entry.name, "a gradient of which at most axis 0 is sparse", got))


def check_examples(entries: Sequence[Gradient]) -> None:
    """Refuse gradients whose numbers of examples, the lengths of axis 0, differ."""
    for entry in entries:
        check_axes(entry)
        if not entry.dense_shape:
            raise ValueError(expected(entry.name, "examples along axis 0", "a 0-d array"))
        wanted = entries[0].dense_shape[0]
        if entry.dense_shape[0] != wanted:
            text = f"{wanted} examples along axis 0, as in {entries[0].name}"
            raise ValueError(expected(entry.name, text, entry.dense_shape[0]))

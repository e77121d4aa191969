"""The targets of results: new arrays, the gradients themselves, or arrays the user passes.

Everything is checked before anything is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from numclip import libraries
from numclip.border.gradients import Gradient, Gradients, describe
from numclip.border.structures import Structure, structure
from numclip.errors import expected
from numclip.memory import is_nested
from numclip.slices import slices_of
from numclip.views import view_of

ADVICE = "pass out= the gradients themselves to work in place"
MOST_COUNTED = 1 << 20
"""Up to this many elements, an array whose strides do not nest is searched for overlaps."""


def target_of(gradient: Gradient, out: Any) -> Gradient:
    """Return the target of a single gradient's result."""
    gradient.engine.require()
    libraries.refuse_parameter(gradient.name, gradient.source)
    if out is None:
        return new_like(gradient)
    found = _given(gradient, out, "out")
    refuse_overlaps([gradient], [found])
    return found


def targets_of(grads: Gradients, out: Any) -> list[Gradient]:
    """Return the targets of several gradients' results."""
    grads.engine.require()
    for gradient in grads.entries:
        libraries.refuse_parameter(gradient.name, gradient.source)
    if out is None:
        return [new_like(gradient) for gradient in grads.entries]
    other = grads.structure if out is grads.structure.source else structure(out, "out")
    _check_keys(grads.structure, other)
    named = zip(map(other.named("out").name_of, other.keys), other.items, strict=True)
    pairs = [(name, item) for name, item in named if item is not None]
    found = [
        _given(gradient, item, name)
        for gradient, (name, item) in zip(grads.entries, pairs, strict=True)
    ]
    refuse_overlaps(grads.entries, found)
    return found


def _check_keys(grads: Structure, out: Structure) -> None:
    """Refuse an `out` whose keys, or whose keys with None, differ from those of the gradients."""
    if out.keys != grads.keys:
        both = (*grads.keys, *out.keys)
        differing = [key for key in both if (key in out.keys) != (key in grads.keys)]
        wanted = f"the {len(grads.keys)} keys of grads in their order"
        got = f"{len(out.keys)}; only one has {differing[:5]}"
        raise ValueError(expected("out", wanted, got))
    for key, target, source in zip(out.keys, out.items, grads.items, strict=True):
        if (target is None) != (source is None):
            where = grads.name_of(key)
            wanted = "None" if source is None else f"an array, as in {where}"
            name = out.named("out").name_of(key)
            raise ValueError(expected(name, wanted, type(target).__name__))


def new_like(gradient: Gradient) -> Gradient:
    """Return a new array of the gradient's library, or slices of one with the same indices.

    It has the strides of the gradient if that is dense, else C order.
    """
    made = gradient.engine.new_like(gradient.facts)
    facts = gradient.engine.facts("out", made)
    if gradient.slices is None:
        return gradient._replace(name="out", facts=facts, source=made)
    slices = gradient.slices.with_values(made)
    return gradient._replace(name="out", facts=facts, source=slices, slices=slices)


def new_of_shape(gradient: Gradient, shape: tuple[int, ...]) -> Gradient:
    """Return a new array in C order of the dtype and the library of a gradient."""
    made = gradient.engine.new_of_shape(gradient.facts, shape)
    return describe("out", gradient.key, made, gradient.engine)


def _given(gradient: Gradient, out: Any, name: str) -> Gradient:
    """Return the target that a user passes for a result, after checking that it fits."""
    if out is gradient.source:
        found = gradient._replace(name=name)
    elif not (slices_of(name, out) or libraries.is_array(out)):
        raise TypeError(expected(name, "an array to write to", type(out).__name__))
    else:
        found = describe(name, gradient.key, out, gradient.engine)
        _check_slices(gradient, found)
        if found.shape != gradient.shape:
            raise ValueError(expected(name, f"shape {gradient.shape}", found.shape))
        if found.native != gradient.native:
            raise TypeError(expected(name, f"dtype {gradient.native}", found.native))
    check_writable(found)
    return found


def check_writable(found: Gradient) -> None:
    """Refuse an array that cannot be written element by element."""
    if found.facts.swapped:
        raise TypeError(expected(found.name, "native byte order", found.facts.swapped))
    if not found.facts.writable:
        raise ValueError(expected(found.name, "a writeable array", "a read-only one"))
    if _overlaps_itself(found):
        got = f"strides {found.facts.strides} for shape {found.shape}"
        raise ValueError(expected(found.name, "distinct elements", got))


def _overlaps_itself(found: Gradient) -> bool:
    """Tell whether two elements share memory; assume it of large arrays with unnested strides."""
    if found.facts.dense or not found.size:
        return False
    steps, shape, itemsize = found.facts.memory.steps, found.shape, found.native.itemsize
    if is_nested(shape, steps, itemsize):
        return False
    if found.size > MOST_COUNTED:
        return True
    offsets = np.zeros(1, np.int64)
    for step, length in zip(steps, shape, strict=True):
        offsets = (offsets[:, None] + abs(step) * np.arange(length)).reshape(-1)
    offsets.sort()
    return bool((np.diff(offsets) < itemsize).any())


def _check_slices(gradient: Gradient, found: Gradient) -> None:
    """Refuse slices with other indices or shape, an array for slices, and slices for an array."""
    if (gradient.slices is None) != (found.slices is None):
        wanted = "an array" if gradient.slices is None else "IndexedSlices"
        raise TypeError(expected(found.name, wanted, type(found.source).__name__))
    if gradient.slices is not None and found.slices is not None:
        # Not `numpy.array_equal`, which returns False if a signal handler raises in it.
        known = found.slices.indices, gradient.slices.indices
        same = known[0].size == known[1].size and bool((known[0] == known[1]).all())
        if not same or found.dense_shape != gradient.dense_shape:
            wanted = f"the indices and dense_shape of {gradient.name}"
            raise ValueError(expected(found.name, wanted, repr(found.slices)))


def refuse_overlaps(
    gradients: Sequence[Gradient], targets: Sequence[Gradient], advice: str = ADVICE
) -> None:
    """Refuse results that would be written over one another or over a gradient still to read."""
    pairs = list(zip(gradients, targets, strict=True))
    read = [gradient for gradient, target in pairs if not gradient.lies_as(target)]
    members = [(*own.facts.extent, True, own) for own in targets]
    members += [(*own.facts.extent, False, own) for own in read]
    for first, second in _touching(members):
        if first[2] and second[2]:
            raise ValueError(f"{second[3].name}: shares memory with {first[3].name}")
        target, gradient = (first, second) if first[2] else (second, first)
        own = f"{target[3].name}: shares memory with {gradient[3].name}"
        raise ValueError(f"{own}; {advice}")


Member = tuple[int, int, bool, Gradient]


def _touching(members: Iterable[Member]) -> Iterator[tuple[Member, Member]]:
    """Yield the pairs of arrays that share memory and of which at least one is a target."""
    held = sorted((member for member in members if member[0] < member[1]), key=lambda m: m[:2])
    woven = _woven([member[3] for member in held])
    open_ones: dict[int, list[Member]] = {}
    for number, own in zip(woven, held, strict=True):
        for other_number, others in open_ones.items():
            others[:] = [other for other in others if other[1] > own[0]]
            for other in others if other_number != number else ():
                if (own[2] or other[2]) and _share_memory(own[3], other[3]):
                    yield other, own
        open_ones.setdefault(number, []).append(own)


def _woven(gradients: Sequence[Gradient]) -> list[int]:
    """Return the number of each array's set; arrays of one set share no memory.

    Columns of one matrix are such a set: their strides are equal, and modulo these their addresses
    do not overlap. An array that overlaps those before it is a set of its own.
    """
    sets: dict[Any, list[int]] = {}
    for k, own in enumerate(gradients):
        key = k if own.facts.dense else (own.facts.memory.steps, own.native.itemsize)
        sets.setdefault(key, []).append(k)
    numbers = list(range(len(gradients)))
    for members in sets.values():
        if len(members) > 1:
            first = gradients[members[0]]
            step, itemsize = math.gcd(*first.facts.memory.steps), first.native.itemsize
            begins = sorted((gradients[k].address % step if step else 0, k) for k in members)
            end, owner = begins[0]
            last = end + step - itemsize
            for address, k in begins:
                if end <= address <= last:
                    numbers[k], end = owner, address + itemsize
    return numbers


def _share_memory(a: Gradient, b: Gradient) -> bool:
    """Tell whether two arrays whose extents overlap have an element in common."""
    return (a.facts.dense and b.facts.dense) or bool(np.shares_memory(_addresses(a), _addresses(b)))


def _addresses(gradient: Gradient) -> Any:
    """Return a NumPy array at the same addresses, whose elements are not read."""
    return view_of(gradient.facts.memory, gradient.shape, np.dtype(f"V{gradient.native.itemsize}"))

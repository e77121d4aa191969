"""Clipping part by part: by units of an array (its reduced axes), and by examples."""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import libraries
from numclip.border import arguments
from numclip.border.gradients import Gradient, check_axes, check_examples, describe, gradients
from numclip.border.results import new_of_shape
from numclip.border.structures import is_structure, structure
from numclip.clipping.clip import with_rows_summed
from numclip.clipping.each import clip_each
from numclip.dtypes import Array
from numclip.engine import UnitPlan
from numclip.errors import expected
from numclip.isolation import isolated
from numclip.law import Family
from numclip.memory import Strided
from numclip.tables import CLIPPED_COUNT


class Limit(NamedTuple):
    """The bound on units' norms over `axes` or, with an owner, on the ratio to its norms."""

    axes: tuple[int, ...]
    bound: float
    ord: float = 2.0
    owner: Gradient | None = None
    eps: float = 0.0


@isolated
def clip_by_norm(grad: Any, bound: float, axes: Any, ord: float, out: Any) -> Any:
    """Clip each unit by a bound on its norm."""

    def limit_of(entry: Gradient) -> Limit:
        check_axes(entry)
        return Limit(arguments.axes_of(axes, len(entry.dense_shape)) or (), bound, ord)

    return clip_each(grad, out, limit_of, _clip)


@isolated
def adaptive_clip(grad: Any, param: Any, factor: float, eps: float, axes: Any, out: Any) -> Any:
    """Clip each unit by a bound on its norm that is a fraction of its parameters' norm."""
    params = structure(param, "param") if is_structure(grad) else None

    def limit_of(entry: Gradient) -> Limit:
        check_axes(entry)
        name, own = ("param", param) if params is None else params.item(entry.key)
        owner = describe(name, 0, own, entry.engine)
        if owner.slices is not None or owner.shape != entry.dense_shape:
            wanted = f"an array of the gradient's shape {entry.dense_shape}"
            got = "IndexedSlices" if owner.slices is not None else owner.shape
            raise ValueError(expected(name, wanted, got))
        reduced = arguments.adaptive_axes(axes, len(entry.dense_shape))
        return Limit(reduced, factor, owner=owner, eps=eps)

    return clip_each(grad, out, limit_of, _clip, operator.attrgetter("owner"))


def _clip(entry: Gradient, target: Gradient, limit: Limit, new: bool) -> Any:
    """Scale each unit of a gradient by its own factor; where rows repeat, scale their sums."""
    used = [each.facts for each in (entry, target, limit.owner) if each is not None]
    stream = entry.engine.stream_of(used)

    def clip_sums(sums: Gradient) -> bool:
        _refuse_overflow(entry, sums)
        return _clip_units(sums, sums, limit, stream, _unrounded(entry, sums.shape, stream))

    if entry.repeated:
        result = with_rows_summed(entry, target, clip_sums, stream, new=new)
    else:
        _clip_units(entry, target, limit, stream)
        result = target.source
    entry.engine.give_back(stream, used)
    return result


def _refuse_overflow(entry: Gradient, sums: Gradient) -> None:
    """Refuse slices whose sums of repeated rows overflow their dtype; only on the host."""
    host = entry.engine.name == "cpu"
    if host and np.isinf(sums.facts.array).any() and not np.isinf(entry.facts.array).any():
        got = "sums beyond its range; pass values of a wider dtype"
        raise ValueError(
            expected(entry.name, f"repeated rows whose sums {entry.native} holds", got)
        )


def _clip_units(
    entry: Gradient,
    target: Gradient,
    limit: Limit,
    stream: Any,
    unrounded: Gradient | None = None,
) -> bool:
    """Scale units; the plan is new, not a kept one, unless it is of the user's arrays alone.

    If `unrounded` sums are given they are measured in place of the gradient; False is returned,
    after waiting for the decisions, if no unit needs scaling.
    """
    engine = entry.engine
    owner = _owner_of(entry, limit, stream)
    strided = functools.partial(_strided, axes=limit.axes)
    family = Family(
        (strided(entry, target),),
        None if owner is None else strided(owner, owner),
        measured=() if unrounded is None else (strided(unrounded, unrounded),),
    )
    passing = unrounded is not None or owner is not limit.owner
    plan: UnitPlan
    if passing:
        plan = engine.unit_plan([family], limit.ord, stream)
    else:
        plan, _ = engine.kept_unit_plan([family], limit.ord, stream)
    with plan.lock:
        plan.write_laws(limit.bound, stream, limit.eps)
        plan.measure(stream)
        plan.decide(stream)
        if unrounded is not None and not plan.changes(stream):
            return False
        plan.scale(stream)
    return True


def _unrounded(entry: Gradient, shape: tuple[int, ...], stream: Any) -> Gradient:
    """Return the sums of rows, by ascending indices, in double precision."""
    slices: Any = entry.slices
    engine = entry.engine
    made = describe(entry.name, entry.key, engine.empty(shape, entry.dtype.wide.native), engine)
    engine.sum_rows(entry.facts, made.facts, slices.grouping, slices.ranks, stream)
    return made


def _owner_of(entry: Gradient, limit: Limit, stream: Any) -> Gradient | None:
    """Return the parameter with a gradient's units: of slices with units in rows, its rows."""
    owner, slices = limit.owner, entry.slices
    if owner is None or slices is None or 0 in limit.axes:
        return owner
    if not owner.facts.c_order and not entry.engine.takes_any_rows:
        copy = new_of_shape(owner, owner.shape)
        _clip_units(owner, copy, Limit(limit.axes, math.inf), stream)
        owner = copy
    made = new_of_shape(owner, entry.shape)
    turns = np.arange(slices.indices.size + 1)
    each = slices.indices, turns  # groups of one row each
    entry.engine.sum_rows(owner.facts, made.facts, each, turns[:-1], stream)
    return made


def _strided(entry: Gradient, target: Gradient, axes: tuple[int, ...]) -> Strided:
    return Strided(entry.dtype, entry.shape, entry.facts.memory, target.facts.memory, axes)


@np.errstate(invalid="ignore")  # an infinite bound on no elements
def example_bounds(
    shapes: Sequence[tuple[int, ...]], clip_norm: float, layerwise: str | None
) -> Array:
    """Return the bound on an example's norm, or with `layerwise` that of each layer."""
    sizes = np.array([math.prod(shape[1:]) for shape in shapes], np.float64)
    shares: Array = {
        None: np.ones(1),
        "uniform": np.full(len(shapes), 1.0 / math.sqrt(len(shapes))),
        "proportional": np.sqrt(sizes / max(sizes.sum(), 1.0)),
    }[layerwise]
    return np.where(np.isinf(clip_norm), np.inf, clip_norm * shares)


@isolated
def clip_per_example(grads: Any, bound: float, layerwise: str | None) -> tuple[Any, Any]:
    """Sum examples, each clipped by its norm; return the sums and the number of clipped ones."""
    described = gradients(structure(grads))
    entries = described.entries
    check_examples(entries)
    for entry in entries:
        libraries.refuse_parameter(entry.name, entry.source)
    if not entries:
        return described.with_results([]), described.with_results([]) if layerwise else 0
    engine = described.engine
    engine.require()
    stream = engine.stream_of([entry.facts for entry in entries])
    rows = [_by_example(entry, stream) for entry in entries]
    sums = [new_of_shape(entry, entry.dense_shape[1:]) for entry in entries]
    parts = [_strided(entry, entry, tuple(range(1, len(entry.shape)))) for entry, _ in rows]
    numbers = [own for _, own in rows]
    families = _families(parts, numbers, entries[0].dense_shape[0], shared=layerwise is None)
    plan, free = engine.kept_unit_plan(families, 2.0, stream)
    bounds = example_bounds([entry.dense_shape for entry in entries], bound, layerwise)
    added = [_added(entry, total) for (entry, _), total in zip(rows, sums, strict=True)]
    with plan.lock:
        plan.write_laws(bounds, stream)
        plan.measure(stream)
        plan.decide(stream)
        out = free.pop() if free else plan.summary(stream)
        plan.summarize(out, stream)
        engine.sum_examples(added, plan, stream)
    engine.give_back(stream, [gradient.facts for gradient in (*entries, *sums)])
    counts = engine.numbers(out, CLIPPED_COUNT, len(families), stream, lambda: free.append(out))
    summed = described.with_results([total.source for total in sums])
    return summed, described.with_results(counts) if layerwise else counts[0]


def _families(
    parts: Sequence[Strided], numbers: Sequence[Array | None], examples: int, *, shared: bool
) -> list[Family]:
    """Return families with examples as units: one of all gradients, or one of each."""
    sets = [range(len(parts))] if shared else [range(k, k + 1) for k in range(len(parts))]
    made = []
    for members in sets:
        own = [numbers[k] for k in members]
        some = any(number is not None for number in own)
        arrays = tuple(parts[k] for k in members)
        gaps = (tuple(own), examples) if some else ((), None)
        made.append(Family(arrays, rounded=False, numbers=gaps[0], known=gaps[1]))
    return made


def _by_example(entry: Gradient, stream: Any) -> tuple[Gradient, Array | None]:
    """Return a gradient as an array of examples, and their indices if some can be missing."""
    slices: Any = entry.slices
    if slices is None:
        return entry, None
    if not entry.engine.takes_any_rows:
        return describe(entry.name, entry.key, slices.dense_on(stream)), None
    merged = slices.coalesced_on(stream) if entry.repeated else slices
    found = describe(entry.name, entry.key, merged.values)
    _refuse_overflow(entry, found)
    return found, np.asarray(merged.indices)


def _added(entry: Gradient, total: Gradient) -> Strided:
    """Return the `Strided` for a sum over examples: all have the same target address."""
    target = total.facts.memory
    written = target._replace(steps=(0, *target.steps))
    return Strided(entry.dtype, entry.shape, entry.facts.memory, written, (0,))

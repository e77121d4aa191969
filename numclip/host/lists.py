"""Gradients that are plain arrays of one dtype, clipped without describing each.

Arrays of other libraries are plain if their views by NumPy are.

Every function does the whole job, with the bits that the general way gives, or returns None and
has touched nothing: what is not plain, not finite or in need of care goes the general way.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import formulas
from numclip.dtypes import Array, DType, lookup
from numclip.host import batches
from numclip.host.batches import Batch
from numclip.host.kernels import arrays, cpu, joint
from numclip.host.runtime import environment, threads
from numclip.libraries import as_numpy, attribute, is_parameter, note_writing

Items = tuple[Any, ...]
READABLE = arrays.layout_holds()
_POINTERS = tuple.__basicsize__  # where in a tuple they begin


class Kind(NamedTuple):
    """A dtype, and what `kernels.arrays` is told of arrays to read and of arrays to write."""

    row: DType
    readable: Array
    writeable: Array


class Measure(NamedTuple):
    """A norm of order 2 over a divisor, or one of order ``inf``."""

    ord: float
    divisor: float = 1.0


L2, PEAK = Measure(2.0), Measure(math.inf)  # to make one takes 0.4 us


_KINDS: dict[np.dtype[Any], Kind] = {}


def kind_of(items: Items) -> Kind | None:
    """Return the kind of the first array, None where there is none."""
    for item in items:
        if item is not None:
            break
    else:
        return None
    if type(item) is not np.ndarray or not READABLE:
        return None
    known = _KINDS.get(item.dtype)
    return known if known is not None else _made(item.dtype)


def _made(dtype: np.dtype[Any]) -> Kind | None:
    row = lookup(dtype)
    if row is None:
        return None
    dtype = np.dtype(dtype.type)  # equal ones (unpickled, with metadata) are other objects
    names = id(np.ndarray), id(None), id(dtype)
    facts = [object.__basicsize__, *names, row.storage.itemsize, row.components, arrays.ALIGNED]
    readable, writeable = np.array([facts, facts], np.int64)
    writeable[arrays.NEEDS] |= arrays.WRITEABLE
    kind = _KINDS[dtype] = Kind(row, readable, writeable)
    return kind


def pointers_of(items: Items) -> int:
    """Return where the pointers to the items are."""
    return id(items) + _POINTERS


def items_of(grads: Any) -> Items:
    """Return the entries of a plain list, tuple or dict, which stay while the tuple does."""
    of = type(grads)
    if of is list or of is tuple:
        return tuple(grads)
    return tuple(grads.values()) if of is dict else ()


def _views(items: Items) -> Items:
    """Return arrays of other libraries as NumPy's; the items as they are where one is neither."""
    views: list[Array | None] = []
    for item in items:
        if item is None or type(item) is np.ndarray:
            views.append(item)
            continue
        if isinstance(item, (list, tuple, dict)):  # which are nested gradients
            return items
        if attribute(item, "is_cuda") or is_parameter(item):  # no norm of its own is wanted
            return items
        try:
            view = as_numpy("", item)
        except (TypeError, ValueError):  # the general way says what is wrong
            view = None
        if view is None:
            return items
        views.append(view)
    return tuple(views)


def global_norm(grads: Any, ord: float = 2.0) -> float | None:
    """Return the norm of arrays."""
    items = items_of(grads)
    kind = kind_of(items)
    if kind is None:
        items = _views(items)
        kind = kind_of(items)
        if kind is None:
            return None
    return _clip_items(items, kind, kind.readable, math.inf, L2 if ord == 2.0 else PEAK)


def clip_by_global_norm(
    grads: Any, bound: float, out: Any, ord: float = 2.0
) -> tuple[Any, float] | None:
    """Clip arrays by their joint norm, in place or into new ones; return them and the norm."""
    if not _takes(grads, out):
        return None
    held = held_still(grads)
    found = _clip(items_of(held), bound, L2 if ord == 2.0 else PEAK, in_place=out is grads)
    if found is None:
        return None
    items, norm = found
    return rebuilt(held, items, out), norm


def clip(grad: Array, bound: float, out: Any, divisor: float, ord: float) -> Any:
    """Clip an array by its norm over `divisor`, in place or into a new one; return that."""
    if not _takes(grad, out):
        return None
    found = _clip((grad,), bound, Measure(ord, divisor), in_place=out is grad)
    return None if found is None else found[0][0]


def clamp(grads: Any, low: Any, high: Any, out: Any) -> Any:
    """Hold the elements of arrays between two floats, in place or in copies; return these.

    `grads` is a list, tuple or dict of arrays, or an array.
    """
    if type(grads) is np.ndarray:
        results = _clamp((grads,), low, high, in_place=out is grads) if _takes(grads, out) else None
        return None if results is None else results[0]
    if not _takes(grads, out):
        return None
    held = held_still(grads)
    items = items_of(held)
    if out is grads and not _can_be_written(items):
        return None
    results = _clamp(items, low, high, in_place=out is grads)
    return None if results is None else rebuilt(held, results, out)


def _clamp(items: Items, low: Any, high: Any, *, in_place: bool) -> Items | None:
    low, high = _number(low), _number(high)
    kind = kind_of(items) if low <= high else None
    if kind is None or kind.row.components == 2 or (not in_place and not _are_arrays(items)):
        return None
    results = items if in_place else _copied(items)
    count, facts, like = len(items), kind.writeable, kind.row.like
    state = arrays.clamp_little(pointers_of(results), count, facts, low, high, like)
    if state != arrays.MUCH:
        return results if state == arrays.DONE else None
    batch, _ = batch_of(results, kind, facts)
    assert batch is not None
    beyond = np.empty(len(batch.chunks), np.bool_)
    with np.errstate(all="ignore"):  # a bound out of range is infinite or 0
        call = environment.run(batches.clamping, (batch, beyond, low, high), {})
    threads.run_all([call._replace(keep=results)])
    return results


def _number(value: Any) -> float:
    """Return a bound as a float, NaN where the general way has to look at it."""
    exact = type(value) is int and abs(value) <= 1 << 53
    return float(value) if exact or type(value) in (float, np.float64, np.float32) else math.nan


def each(
    grads: Any,
    out: Any,
    one: Callable[..., Any],
    prepare: Callable[[Array], Any],
    owners: Any = None,
) -> Any:
    """Clip an array, or each of a list, tuple or dict of arrays, by itself; return the results.

    `one` takes an array, where to write, what `prepare` returned for it and its owner, if there
    are owners: it does all, or returns None, and the general way does all of it again, which
    leaves what is clipped as it is. `prepare` raises where an argument does not fit.
    """
    if type(grads) is np.ndarray:
        return one(grads, out, prepare(grads), owners)
    if not _takes(grads, out) or type(owners) not in (type(grads), type(None)):
        return None
    held = held_still(grads)
    items = items_of(held)
    own = items_of(owners) if owners is not None else (None,) * len(items)
    if not _are_arrays(items) or (out is grads and not _can_be_written(items)):
        return None
    if owners is not None and not _fit(held, items, owners, own, in_place=out is grads):
        return None
    every = [None if item is None else prepare(item) for item in items]
    results = []
    for item, wanted, owner in zip(items, every, own, strict=True):
        result = None if item is None else one(item, None if out is None else item, wanted, owner)
        if result is None and item is not None:
            return None
        results.append(result)
    return rebuilt(held, tuple(results), out)


def held_still(grads: Any) -> Any:
    """Return a structure whose keys no other thread changes."""
    return grads.copy() if type(grads) is dict else grads


def rebuilt(held: Any, results: Items, out: Any) -> Any:
    """Return results in the structure of a list, tuple or dict."""
    if type(held) is dict:
        return held if out is not None else dict(zip(held, results, strict=True))
    return [*results] if type(held) is list else results


def _are_arrays(items: Items) -> bool:
    """Tell whether all are arrays of gradients, or None, and there is one."""
    kinds = [kind_of((item,)) for item in items if item is not None]
    return None not in kinds and bool(kinds)


def _can_be_written(items: Items) -> bool:
    """Tell whether arrays can be written, each being in memory of its own."""
    given = [item for item in items if item is not None]
    return own_memory(given) and all(item.flags.writeable for item in given)


def own_memory(arrays: Sequence[Any]) -> bool:
    """Tell whether arrays are different ones, each the owner of its memory."""
    plain = all(type(array) is np.ndarray and array.flags.owndata for array in arrays)
    return plain and len({*map(id, arrays)}) == len(arrays)


def _fit(held: Any, items: Items, owners: Any, own: Items, *, in_place: bool) -> bool:
    """Tell whether there is an array of the same shape for each, that is not written before."""
    if len(own) != len(items) or (type(held) is dict and [*held] != [*owners]):
        return False
    pairs = [(item, owner) for item, owner in zip(items, own, strict=True) if item is not None]
    fit = all(kind_of((b,)) is not None and a.shape == b.shape for a, b in pairs)
    return fit and (not in_place or own_memory([array for pair in pairs for array in pair]))


def _takes(grads: Any, out: Any) -> bool:
    return out is grads or out is None


def _clip(
    items: Items, bound: float, measure: Measure, *, in_place: bool
) -> tuple[Items, float] | None:
    plain, kind = items, kind_of(items)
    if kind is None:
        plain = _views(items)
        kind = kind_of(plain)
        if kind is None:
            return None
    if not in_place:
        return _copies(plain, kind, bound, measure)
    norm = _clip_items(plain, kind, kind.writeable, bound, measure)
    if norm is None:
        return None
    if plain is not items:
        note_writing(items)
    return items, norm


def _clip_items(
    items: Items, kind: Kind, facts: Array, bound: float, measure: Measure
) -> float | None:
    """Clip the arrays in place, if the facts ask for arrays that can be written."""
    state, norm = _clip_little(items, kind, facts, bound, measure)
    if state == arrays.DONE:
        return norm
    if state == arrays.ELSEWHERE:
        return None
    return _clip_much(items, kind, facts, bound, measure)


def _clip_little(
    items: Items, kind: Kind, facts: Array, bound: float, measure: Measure
) -> tuple[int, float]:
    """Clip the arrays as `_clip_items` does where they hold little; say whether that was so."""
    row = kind.row
    if measure.ord == 2.0:
        return arrays.clip_little(  # type: ignore[no-any-return]
            pointers_of(items), len(items), facts, row.limits, bound, measure.divisor, row.like
        )
    if row.components == 2:  # the magnitudes are not those of the parts
        return arrays.ELSEWHERE, 0.0
    return arrays.clip_little_by_peak(  # type: ignore[no-any-return]
        pointers_of(items), len(items), facts, row.limits, bound, row.mask, row.like
    )


def _copied(items: Items) -> Items:
    return tuple(None if item is None else item.copy("K") for item in items)


def _clip_much(
    items: Items, kind: Kind, facts: Array, bound: float, measure: Measure
) -> float | None:
    """Clip arrays that hold much, or do not own it: over a table of chunks, by all threads."""
    batch, apart = batch_of(items, kind, facts)
    if batch is None or (facts is kind.writeable and not (apart or are_apart(batch))):
        return None
    found = decided([batch], len(items), bound, measure)
    if found is None:
        return None
    norm, factor = found
    if factor != 1.0:
        _scale(batch, items, factor)
    return norm


def batch_of(items: Items, kind: Kind, facts: Array) -> tuple[Batch | None, bool]:
    """Return arrays as a batch, None where one is not plain, and if all own their memory."""
    chunks = np.empty((0, 4), np.int64)
    needed = len(items)
    while needed > len(chunks):
        chunks = np.empty((needed, 4), np.int64)
        arguments = pointers_of(items), len(items), facts, chunks
        needed, elements, apart = arrays.table(*arguments)
    if needed < 0:
        return None, False
    nbytes = elements * kind.row.storage.itemsize
    return Batch(kind.row, chunks[:needed], nbytes), apart


def are_apart(batch: Batch) -> bool:
    """Tell whether no chunks overlap: in sorted order each ends before the next begins."""
    begins = batch.chunks[:, cpu.SOURCE]
    ends = begins + batch.chunks[:, cpu.LENGTH] * batch.dtype.storage.itemsize
    return bool((np.sort(ends)[:-1] <= np.sort(begins)[1:]).all())


def decided(
    parts: Sequence[Batch], count: int, bound: float, measure: Measure
) -> tuple[float, float] | None:
    """Return the norm of `count` arrays, and the factor; None if they need care."""
    strict, limits = _limits(tuple([batch.dtype for batch in parts]))
    if measure.ord == 2.0:
        norm, right = _joined(parts, strict, count)
    elif any(batch.dtype.components == 2 for batch in parts):
        return None  # the magnitudes are not those of the parts
    else:
        norm = float(np.max([batches.largest(batch, count).max(initial=0.0) for batch in parts]))
        right = math.isfinite(norm)
    norm /= measure.divisor
    if not right or norm <= bound:
        return (norm, 1.0) if right else None
    elements = sum([batch.nbytes / batch.dtype.storage.itemsize for batch in parts])
    ones = formulas.root(elements, measure.ord)
    factor, truncate = joint.decide(norm, bound, ones, measure.divisor, limits)
    return None if truncate else (norm, factor)


def _joined(parts: Sequence[Batch], limits: Array, count: int) -> tuple[float, bool]:
    """Return the L2 norm of `count` arrays, and if it is right."""
    partials = [np.empty(len(batch.chunks)) for batch in parts]
    for batch, partial in zip(parts, partials, strict=True):
        batch.run(cpu.sum_squares, batch.dtype.like, partial)
    chunks, partial = parts[0].chunks, partials[0]
    if len(parts) > 1:
        chunks, partial = np.concatenate([own.chunks for own in parts]), np.concatenate(partials)
    return joint.joined(chunks, partial, limits, np.zeros(count))  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=64)
def _limits(rows: tuple[DType, ...]) -> tuple[Array, Array]:
    """Return what `joint.joined` and `joint.decide` are told of gradients of some dtypes."""
    every = np.array([row.limits for row in rows])
    strict, limits = every.max(axis=0), every.max(axis=0)
    limits[joint.DIGITS] = every[:, joint.DIGITS].min()
    return strict, limits


def _scale(batch: Batch, items: Items, factor: float) -> None:
    """Write arrays, which live as long as the items, times a factor."""
    factors = np.full(len(items), factor)
    threads.run_all([batches.scaling(batch, factors)._replace(keep=items)])


def _copies(items: Items, kind: Kind, bound: float, measure: Measure) -> tuple[Items, float] | None:
    """Return new arrays, clipped by their joint norm, and that norm."""
    state, norm = _clip_little(items, kind, kind.readable, math.inf, measure)
    if state == arrays.ELSEWHERE:
        return None
    if state == arrays.DONE:  # copies stay in the cache, where they are then clipped
        results = _copied(items)
        if norm > bound:
            state, _ = _clip_little(results, kind, kind.writeable, bound, measure)
        return (results, norm) if state == arrays.DONE else None
    batch, _ = batch_of(items, kind, kind.readable)
    found = None if batch is None else decided([batch], len(items), bound, measure)
    if batch is None or found is None:
        return None
    norm, factor = found
    if factor == 1.0:
        return _copied(items), norm
    results = tuple(None if item is None else np.empty_like(item) for item in items)
    targets, _ = batch_of(results, kind, kind.writeable)
    assert targets is not None
    batch.chunks[:, cpu.TARGET] = targets.chunks[:, cpu.SOURCE]
    _scale(batch, results, factor)
    return results, norm

"""The list path: ordinary NumPy arrays, clipped without making `Facts` of each.

Arrays of other libraries are read through NumPy views. Arrays of few bytes can have any dtypes and
strides; many bytes must be contiguous, of one dtype and finite.

Each function either finishes the job, with the same bits as the general path, or returns None and
writes nothing (but see `each`).
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from numclip import formulas
from numclip.dtypes import Array, lookup
from numclip.host import batches, nests, outs, plain_arrays
from numclip.host.arrays import share_no_memory
from numclip.host.batches import Batch
from numclip.host.kernels import cpu, little, one_norm, plain
from numclip.host.kernels.spans import (
    AVERAGE,
    GIVEN,
    NONFINITE,
    POLICY,
    RARE,
    ROOT_MEAN,
    WRITTEN,
)
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.nests import Items
from numclip.host.plain_arrays import (
    POINTERS,
    copy,
    kind_of,
    plain_batch,
    pointers_of,
)
from numclip.host.runtime import environment, threads
from numclip.libraries import as_numpy, attribute, is_parameter, note_writing
from numclip.tables import PROPAGATE

_KNOWN = [np.dtype(name) if name != "bfloat16" else None for name in little.NAMES]
_CONSTANTS = np.zeros(little.DTYPES + len(_KNOWN), np.int64)
_CONSTANTS[: little.DTYPES] = object.__basicsize__, id(np.ndarray), id(None), POINTERS
_CONSTANTS[little.DTYPES :] = [0 if dtype is None else id(dtype) for dtype in _KNOWN]
CONSTANTS: int = _CONSTANTS.__array_interface__["data"][0]
"""The address of the facts `_CONSTANTS`, which `kernels.little` reads."""


def _are_met(items: Items) -> bool:
    """Register ml_dtypes' bfloat16 with the kernels if an item has it; return True if done."""
    number = little.NAMES.index("bfloat16")
    if _KNOWN[number] is not None:
        return False
    for item in items:  # `dtype.name` takes 2 us
        if type(item) is np.ndarray and item.itemsize == 2 and item.dtype.name == "bfloat16":
            own = np.dtype(item.dtype.type)
            if lookup(own) is not None:
                _KNOWN[number] = own
                _CONSTANTS[little.DTYPES + number] = id(own)
                return True
    return False


def _views(items: Items) -> Items | None:
    """Return the items with NumPy views of other libraries' arrays.

    None if there are no such arrays, or if an item has no view that may be clipped.
    """
    views: list[Array | None] = []
    for item in items:
        if item is None or type(item) is np.ndarray:
            views.append(item)
            continue
        if isinstance(item, (list, tuple, dict)):  # nested gradients
            return None
        if attribute(item, "is_cuda") or is_parameter(item):  # left to the general path
            return None
        try:
            view = as_numpy("", item)
        except (TypeError, ValueError):  # the general path raises it
            view = None
        if view is None:
            return None
        views.append(view)
    return None if all(map(operator.is_, views, items)) else tuple(views)


def global_norm(grads: Any, ord: float = 2.0) -> float | None:
    """Return the norm of an array structure, or None if the general path has to find it."""
    return norm_of(nests.taken(grads)[0], ord)


def norm_of(items: Items, ord: float) -> float | None:
    """Return the norm of the arrays of a tuple, or None as `global_norm` does."""
    if not items:
        return None
    norm, state = _clip_little(items, 0, math.inf, ord, PROPAGATE, 0.0)
    if state <= WRITTEN:
        return norm
    views = _views(items)
    if views is not None:
        return norm_of(views, ord)
    batch = plain_batch(items, write=False)
    found = None if batch is None else _decided(batch, len(items), math.inf, ord, 1.0)
    return None if found is None else found[0]


def clip_by_global_norm(
    grads: Any,
    bound: float,
    out: Any,
    ord: float = 2.0,
    options: int = PROPAGATE,
    given: float = 0.0,
) -> tuple[Any, float] | None:
    """Clip arrays by their global norm, in place or into new ones; return (arrays, norm).

    `options` is a policy of `tables`, with the bit `spans.GIVEN` if the norm is `given`.
    """
    if out is grads and type(grads) is list:  # as below, but faster
        items = tuple(grads)
        if items and type(items[0]) not in nests.KINDS:
            found = clip_items(items, True, bound, ord, options, given)
            if found is not None:
                return [*found[0]], found[1]
            return _clip_nest(items, grads, out, bound, ord, options, given)
    if not outs.takes(grads, out):
        targets = outs.of(grads, out)
        if targets is None:
            return None
        found = clip_by_global_norm(grads, bound, None, ord, options, given)
        return None if found is None else (outs.filled(targets, found[0]), found[1])
    items, held = nests.taken(grads)
    found = clip_items(items, out is not None, bound, ord, options, given)
    if found is None:
        return _clip_nest(items, grads, out, bound, ord, options, given)
    return nests.rebuilt(held, found[0], out), found[1]


def _clip_nest(
    items: Items, grads: Any, out: Any, bound: float, ord: float, options: int, given: float
) -> tuple[Any, float] | None:
    """Clip nested gradients as `clip_by_global_norm` does; return None if no item is nested."""
    if not nests.is_nest(items):
        return None
    items, held = nests.taken(grads, is_nested=True)
    found = clip_items(items, out is not None, bound, ord, options, given)
    return None if found is None else (nests.rebuilt(held, found[0], out), found[1])


def clip_each(grads: Any, bound: float, out: Any, ord: float, options: int) -> Any:
    """Clip an array, or each of a list, tuple or dict of arrays, by its own norm; return them.

    A bit `AVERAGE` or `ROOT_MEAN` of `options` divides the norm by the size or by its root.
    """
    if not outs.takes(grads, out):
        return outs.put(grads, out, lambda: clip_each(grads, bound, None, ord, options))
    if type(grads) is np.ndarray:
        if grads.nbytes < PARALLEL_BYTES:  # 1 us faster than the code below
            result = grads if out is not None else copy(grads)
            _, state = _clip_little((result,), little.WRITES, bound, ord, options, 0.0)
            if state <= WRITTEN:
                return result
        found = clip_items((grads,), out is not None, bound, ord, options)
        return None if found is None else found[0][0]
    items, held = nests.taken(grads)
    found = clip_items(items, out is not None, bound, ord, options, each=little.EACH)
    if found is not None:
        return nests.rebuilt(held, found[0], out)
    return each(
        grads, out, lambda own, to, *_: clip_each(own, bound, to, ord, options), lambda _: None
    )


def clip_items(
    items: Items,
    in_place: bool,
    bound: float,
    ord: float,
    options: int,
    given: float = 0.0,
    each: int = 0,
) -> tuple[Items, float] | None:
    """Clip the arrays of a tuple, in place or into new ones; return (arrays, norm).

    With `each`, `little.EACH`, each array is clipped by its own norm.
    """
    results = items if in_place else _copied(items, PARALLEL_BYTES)
    if results:
        norm, state = _clip_little(results, little.WRITES | each, bound, ord, options, given)
        if state <= WRITTEN:
            return results, norm
        if state == NONFINITE:
            return None
    views = _views(items)
    if views is None:
        return None if each or options & GIVEN else _clip_much(items, in_place, bound, ord, options)
    found = clip_items(views, in_place, bound, ord, options, given, each)
    if found is not None and in_place:
        note_writing(items)
        return items, found[1]
    return found


def _clip_little(
    items: Items, access: int, bound: float, ord: float, options: int, given: float
) -> tuple[float, int]:
    """Clip arrays of few bytes in place by one native call; return (norm, state).

    `kernels.plain` clips contiguous arrays of one dtype by their global L2 norm if non-finite
    values are to propagate, `kernels.little` all others. The state is one of theirs.
    """
    if not plain_arrays.READABLE:
        return 0.0, little.ELSEWHERE
    kind = None
    if ord == 2.0 and not options & (POLICY | GIVEN) and not access & little.EACH:
        kind = kind_of(items)
    if kind is not None:
        facts, row = kind.writeable if access & little.WRITES else kind.readable, kind.row
        pointers, count = id(items) + POINTERS, len(items)
        state, norm = kind.clip(pointers, count, facts, row.limits, bound, options, row.like)
        if state != plain.ELSEWHERE:
            return norm, WRITTEN if state == plain.DONE else little.MUCH
    usual = ord == 2.0 or ord == math.inf
    if ord != 2.0:  # complex magnitudes are not those of the parts
        access |= little.REAL
    arguments = id(items), CONSTANTS, access, bound, given, ord, options
    norm, state = little.clip(*arguments) if usual else little.clip_rare(*arguments)
    if state == RARE:
        norm, state = little.clip_rare(*arguments)
    elif state == little.ELSEWHERE and _are_met(items):
        return _clip_little(items, access, bound, ord, options, given)
    return norm, state


def _copied(items: Items, limit: float = math.inf) -> Items | None:
    """Return copies of arrays; None if they have `limit` bytes or more, or one is no ndarray."""
    copies: list[Array | None] = []
    nbytes = 0
    for item in items:
        if item is None:
            copies.append(None)
            continue
        if type(item) is not np.ndarray:
            return None
        nbytes += item.nbytes
        if nbytes >= limit:
            return None
        copies.append(copy(item))
    return tuple(copies)


def clamp(grads: Any, low: Any, high: Any, out: Any) -> Any:
    """Clamp the elements of arrays to [low, high], in place or in copies; return the arrays.

    `grads` is an array, or a list, tuple or dict of arrays.
    """
    if type(low) is not float or type(high) is not float:
        low, high = number(low), number(high)
    if not low <= high:
        return None
    if not outs.takes(grads, out):
        return outs.put(grads, out, lambda: clamp(grads, low, high, None))
    if type(grads) is np.ndarray:
        results = clamp_items((grads,), low, high, in_place=out is not None)
        return None if results is None else results[0]
    items, held = nests.taken(grads)
    results = clamp_items(items, low, high, in_place=out is not None)
    return None if results is None else nests.rebuilt(held, results, out)


def clamp_items(items: Items, low: float, high: float, *, in_place: bool) -> Items | None:
    """Clamp the arrays of a tuple to [low, high], in place or in copies; return them or None."""
    results = items if in_place else _copied(items)
    if results and plain_arrays.READABLE and _clamp(results, low, high):
        return results
    views = _views(items)
    found = None if views is None else clamp_items(views, low, high, in_place=in_place)
    if found is None or not in_place:
        return found
    note_writing(items)
    return items


def _clamp(items: Items, low: float, high: float) -> bool:
    """Clamp arrays in place; return False, with nothing written, if the list path cannot."""
    kind = kind_of(items)
    if kind is not None and kind.row.components == 1:
        bounds = low, high, kind.row.like
        if kind.clamp(pointers_of(items), len(items), kind.writeable, *bounds) == plain.DONE:
            return True
    arguments = id(items), CONSTANTS, little.WRITES | little.REAL, low, high
    state = little.clamp(*arguments)
    if state == little.ELSEWHERE and _are_met(items):
        state = little.clamp(*arguments)
    if state <= WRITTEN:
        return True
    batch = plain_batch(items, write=True)
    if batch is None or batch.dtype.components == 2:
        return False
    beyond = np.empty(len(batch.chunks), np.bool_)
    with np.errstate(all="ignore"):  # a bound beyond the dtype becomes infinite or 0
        call = environment.run(batches.clamping, (batch, beyond, low, high), {})
    threads.run_all([call._replace(keep=items)])
    return True


def number(value: Any) -> float:
    """Return a bound as a float, NaN if the general path has to check it."""
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

    `out` is None or passes `outs.takes`. `prepare(array)` raises if an argument does not fit it.
    ``one(array, to, prepared, owner)`` clips an array into `to` (None: a new one) or returns None.
    Then `each` returns None as well: some arrays may be clipped already, but the general path,
    which clips all again, does not change those.
    """
    if type(grads) is np.ndarray:
        return one(grads, out, prepare(grads), owners)
    if type(owners) not in (type(grads), type(None)):
        return None
    held = nests.held_still(grads)
    items = nests.items_of(held)
    own = nests.items_of(owners) if owners is not None else (None,) * len(items)
    if not _are_arrays(items) or (out is not None and not _can_be_written(items)):
        return None
    if owners is not None and not _fit(held, items, owners, own, in_place=out is not None):
        return None
    every = [None if item is None else prepare(item) for item in items]
    results = []
    for item, wanted, owner in zip(items, every, own, strict=True):
        result = None if item is None else one(item, None if out is None else item, wanted, owner)
        if result is None and item is not None:
            return None
        results.append(result)
    return nests.rebuilt(held, tuple(results), out)


def _are_arrays(items: Items) -> bool:
    """Tell whether all items are None or ndarrays of gradient dtypes, and one is an array."""
    kinds = [kind_of((item,)) for item in items if item is not None]
    return None not in kinds and bool(kinds)


def _can_be_written(items: Items) -> bool:
    """Tell whether all arrays are writeable and share no memory with one another."""
    given = [item for item in items if item is not None]
    return share_no_memory(given) and all(item.flags.writeable for item in given)


def are_alike(held: Any, items: Items, owners: Any, own: Items) -> bool:
    """Tell whether two flat structures of one type have as many items and the same keys."""
    alike = len(own) == len(items) and type(held) is not nests.Opened
    return alike and (type(held) is not dict or [*held] == [*owners])


def _fit(held: Any, items: Items, owners: Any, own: Items, *, in_place: bool) -> bool:
    """Tell whether each item has an owner of its shape; in place, all must share no memory."""
    if not are_alike(held, items, owners, own):
        return False
    pairs = [(item, owner) for item, owner in zip(items, own, strict=True) if item is not None]
    fit = all(kind_of((b,)) is not None and a.shape == b.shape for a, b in pairs)
    return fit and (not in_place or share_no_memory([array for pair in pairs for array in pair]))


def _clip_much(
    items: Items, in_place: bool, bound: float, ord: float, options: int
) -> tuple[Items, float] | None:
    """Clip arrays of many bytes over a table of chunks by all threads; return (arrays, norm)."""
    batch = plain_batch(items, write=in_place)
    divisor = _divisor_of(items[0], options) if batch is not None else 1.0
    found = None if batch is None else _decided(batch, len(items), bound, ord, divisor)
    if batch is None or found is None:
        return None
    return scaled(batch, items, found[1], in_place=in_place), found[0]


def scaled(batch: Batch, items: Items, factor: float, *, in_place: bool) -> Items:
    """Return the arrays of a batch times `factor`, in place or as new arrays.

    Where new arrays are written, the batch's chunks get these as targets.
    """
    if factor == 1.0 or in_place:
        results = items if in_place else _copied(items)
        assert results is not None
    else:
        results = tuple(None if item is None else np.empty_like(item) for item in items)
        targets = plain_batch(results, write=True)
        assert targets is not None
        batch.chunks[:, cpu.TARGET] = targets.chunks[:, cpu.SOURCE]
    if factor != 1.0:
        call = batches.scaling(batch, np.full(len(items), factor))
        threads.run_all([call._replace(keep=(items, results))])
    return results


def _divisor_of(array: Any, options: int) -> float:
    """Return the divisor of an array's norm: 1, its size, or the root of its size."""
    if not options & (AVERAGE | ROOT_MEAN):
        return 1.0
    size = float(max(array.size, 1))
    return size if options & AVERAGE else environment.run(math.sqrt, (size,), {})


def _decided(
    batch: Batch, count: int, bound: float, ord: float, divisor: float
) -> tuple[float, float] | None:
    """Return (norm, factor) of `count` arrays; None if norm or factor need the general path."""
    row = batch.dtype
    if ord == 2.0:
        partial = np.empty(len(batch.chunks))
        batch.run(cpu.sum_squares, row.like, partial)
        norm, right = one_norm.norm_of_chunks(batch.chunks, partial, row.limits, np.zeros(count))
    elif ord == math.inf and row.components == 1:  # complex magnitudes are not those of the parts
        norm = float(batches.largest(batch, count).max(initial=0.0))
        right = math.isfinite(norm)
    else:
        return None
    norm /= divisor
    if not right or norm <= bound:
        return (norm, 1.0) if right else None
    norm_of_ones = formulas.root(batch.nbytes / row.storage.itemsize, ord)
    factor, truncate = one_norm.decide(norm, bound, norm_of_ones, divisor, row.limits)
    return None if truncate else (norm, factor)

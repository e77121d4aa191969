"""Units of ordinary arrays, clipped without a plan; those of few bytes by one native call.

As in `lists`, a function either finishes the job, with the same bits as the general path, or
returns None. Then some arrays may be clipped already; clipping these again does not change them.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType, as_stored, lookup
from numclip.host import columns, lists, nests, outs, plain_arrays
from numclip.host.given import wanted_table
from numclip.host.kernels import plain_units, unit_loops
from numclip.host.kernels.examples import UNKNOWN
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime import threads
from numclip.host.units import LONG_ROW, lengths_about
from numclip.law import Family, unit_laws
from numclip.memory import Memory, Strided, strides_of
from numclip.tables import BOUND, EPS
from numclip.views import view_of

FEW_ROWS = 16
"""Fewer rows or outer blocks than this, if they are long, are too few to give each a thread."""


Reduce = Callable[[Any, int], "tuple[int, ...] | None"]
"""Returns, for `axes` as passed and a number of dimensions, the axes in ascending order."""


def clip(
    grads: Any,
    bound: float,
    axes: Any,
    reduce: Reduce,
    out: Any,
    params: Any = None,
    eps: float = 0.0,
    ord: float = 2.0,
) -> Any:
    """Clip each unit of an array, or of each of a list, tuple or dict of arrays; return these.

    `bound` is on the norm, or with `params` on its ratio to the L2 norm of the same unit of the
    parameter, which counts as `eps` at least.
    """
    if not outs.takes(grads, out):
        how = axes, reduce, None, params, eps, ord
        return outs.put(grads, out, lambda: clip(grads, bound, *how), params)
    native = ord == 2.0 and plain_arrays.READABLE
    if native:
        result = _clip_little(grads, bound, axes, reduce, out, params, eps)
        if result is not None:
            return result

    def one(own: Array, to: Any, over: tuple[int, ...], param: Any) -> Any:
        found = _clip_copied(own, bound, axes, reduce, to, param, eps) if native else None
        return _clip_one(own, bound, over, to, param, eps, ord) if found is None else found

    return lists.each(grads, out, one, lambda own: reduce(axes, own.ndim) or (), params)


def _clip_little(
    grads: Any, bound: float, axes: Any, reduce: Reduce, out: Any, params: Any, eps: float
) -> Any:
    """Clip units as `clip` does by one native call, or return None."""
    kind = type(grads)
    if params is not None and type(params) is not kind:
        return None
    if kind is np.ndarray:
        items, held, owners = (grads,), None, () if params is None else (params,)
    else:
        (items, held), owners = nests.taken(grads), nests.items_of(params)
        if params is not None and not lists.are_alike(held, items, params, owners):
            return None
    every: nests.Items = items + owners
    if {*map(type, every)} != {np.ndarray} or not _can_be_kept(axes):
        return None
    shapes = tuple([item.shape for item in every])
    known = _prepared(every[0].dtype, shapes, len(items), axes, reduce)
    if known is None or known[0] >= PARALLEL_BYTES:
        return None
    results: nests.Items = items
    if out is None:
        if len({item.dtype for item in every}) > 1:
            return None
        results = tuple([plain_arrays.copy(item) for item in items])
    _, tables, like = known
    every = results + owners  # which kernels read as long as it is held
    if not plain_units.clip(plain_arrays.pointers_of(every), *tables, bound, eps, like):
        return None
    return results[0] if held is None else nests.rebuilt(held, results, out)


def _clip_copied(
    grad: Array, bound: float, axes: Any, reduce: Reduce, out: Any, param: Any, eps: float
) -> Any:
    """Clip one array by one native call, on a copy in C order if it has another order."""
    if grad.nbytes >= PARALLEL_BYTES or (out is not None and out is not grad):
        return None
    if type(param) is np.ndarray and not param.flags.carray:
        param = param.copy("C")
    if grad.flags.carray or (grad.flags.c_contiguous and out is None):
        return _clip_little(grad, bound, axes, reduce, out, param, eps)
    if out is not None and not (grad.flags.f_contiguous and grad.flags.writeable):
        return None
    copy = grad.copy("C")
    before = copy.tobytes()
    if _clip_little(copy, bound, axes, reduce, copy, param, eps) is None:
        return None
    result = plain_arrays.copy(grad) if out is None else grad
    if copy.tobytes() != before:
        result[...] = copy
    return result


def _can_be_kept(axes: Any) -> bool:
    """Tell whether `axes` can be a cache key, which True cannot: it is equal to 1."""
    return (
        axes is None or type(axes) is int or (type(axes) is tuple and {*map(type, axes)} == {int})
    )


def _clip_one(
    grad: Any,
    bound: float,
    axes: tuple[int, ...],
    out: Any,
    owner: Any,
    eps: float,
    ord: float,
) -> Any:
    """Clip one ordinary array by all threads, or return None."""
    kind = plain_arrays.kind_of((grad,)) if out is None or out is grad else None
    if kind is None or not axes or not grad.nbytes or not (out is None or grad.flags.writeable):
        return None
    if owner is not None and (type(owner) is not np.ndarray or owner.shape != grad.shape):
        return None
    x = _cut(grad, kind.row, axes)
    param = x if owner is None else _cut(owner, kind.row, axes)
    if x is None or param is None:
        return None
    if ord != 2.0 and kind.row.components == 2:  # complex magnitudes are not those of the parts
        return None
    result, y = grad, x
    if out is None:
        result = np.empty_like(grad)
        y = as_stored(result).reshape(x.shape)
    law = _law(kind.row, x.shape[1] // kind.row.components, ord).copy()
    law[BOUND], law[EPS] = bound, eps
    digits = kind.row.digits
    if ord == 2.0:
        factors = _factors(x, param if owner is not None else x[:0], law, digits)
    else:
        factors = _factors_by_order(x, ord, law, digits)
    return result if _scale(x, factors, y) else None


def _factors(x: Array, params: Array, law: Array, digits: int) -> Array:
    """Return the factor of each unit, UNKNOWN where the general path has to find it."""
    sums, owners = _sums(x, digits), _sums(params, digits)
    found = np.empty(sums.size)
    threads.run(unit_loops.unit_factors, found.size, x.nbytes, sums, owners, law, digits, found)
    return found


def _factors_by_order(x: Array, ord: float, law: Array, digits: int) -> Array:
    """Return the factors by norms of an order other than 2."""
    outer, reduced, inner = x.shape
    rows = np.ascontiguousarray(x.transpose(0, 2, 1)).reshape(-1, reduced)
    found = np.empty(outer * inner)
    threads.run(unit_loops.row_factors, found.size, x.nbytes, rows, ord, law, digits, found)
    return found


def _scale(x: Array, found: Array, out: Array) -> bool:
    """Write units times their factors; return False and write nothing if one is UNKNOWN."""
    if (found == UNKNOWN).any():
        return False
    if x is not out or (found != 1.0).any():
        factors = found.astype(np.float64 if x.itemsize == 8 else np.float32)
        if x.shape[2] == 1:
            rows = x.reshape(x.shape[:2]), factors, out.reshape(x.shape[:2])
            threads.run(unit_loops.scale_rows, x.shape[0], x.nbytes, *rows)
        else:
            threads.run_all([columns.scaling_columns(x, factors.reshape(-1, x.shape[2]), out)])
    return True


def _sums(x: Array, digits: int) -> Array:
    """Return the sums of squares of units, UNKNOWN where squares under- or overflow."""
    if x.shape[2] == 1:
        sums = np.empty(x.shape[0])
        threads.run(unit_loops.row_squares, sums.size, x.nbytes, x.reshape(x.shape[:2]), sums)
    else:
        sums = columns.column_squares(x).reshape(-1)
    if digits == 53:
        unit_loops.mark_lossy(x, sums)
    return sums


def _cut(array: Any, row: DType, axes: tuple[int, ...]) -> Array | None:
    """Return storage as (outer, reduced, inner), with `inner` 1 for rows; None if it cannot be."""
    if type(array) is not np.ndarray or array.dtype != row.native:
        return None
    shape = _lengths(array.shape, axes, row)
    if shape is None or not (array.flags.c_contiguous and array.flags.aligned):
        return None
    if array.flags.writeable:
        return as_stored(array).reshape(shape)
    # Read-only arrays would need one more specialisation of each kernel: five seconds each.
    memory = Memory(array.ctypes.data, strides_of(shape, row.storage.itemsize))
    return view_of(memory, shape, row.storage)


def _lengths(shape: Sequence[int], axes: tuple[int, ...], row: DType) -> Any:
    """Return (outer, reduced, inner) of the storage; None if units are no rows or columns.

    Also None if these are complex columns, or too few and too long, see `FEW_ROWS`.
    """
    lengths = lengths_about(shape, axes)
    if lengths is None:
        return None
    outer, reduced, inner = lengths[0], lengths[1] * row.components, lengths[2]
    if (inner > 1 and row.components == 2) or (reduced >= LONG_ROW and outer < FEW_ROWS):
        return None
    return outer, reduced, inner


@functools.lru_cache(maxsize=64)  # 200 bytes for each array of each list
def _prepared(
    dtype: np.dtype[Any], shapes: tuple[tuple[int, ...], ...], count: int, axes: Any, reduce: Reduce
) -> tuple[int, tuple[Array, Array, Array], Array] | None:
    """Return (bytes, tables of `kernels.plain_units`, storage sample) of arrays, or None.

    The shapes after the first `count` are those of the parameters, if there are any.
    """
    row = lookup(dtype)
    own, others = shapes[:count], shapes[count:]
    if row is None or (others and others != own):
        return None
    arrays, laws = [], []
    for k, shape in enumerate(own):
        over = reduce(axes, len(shape))
        lengths = _lengths(shape, over, row) if over else None
        if lengths is None or 0 in shape:
            return None
        arrays.append((*lengths, row.digits, count + k if others else 0))
        laws.append(_law(row, lengths[1] // row.components, 2.0))
    native = np.dtype(row.native.type)  # whose id is compared
    wanted = wanted_table([native] * len(shapes), shapes)
    nbytes = sum(map(math.prod, own)) * native.itemsize
    return nbytes, (wanted, np.array(arrays, np.int64), np.array(laws)), row.like


@functools.lru_cache(maxsize=256)
def _law(row: DType, size: int, ord: float) -> Array:
    """Return the row of laws for units of `size` elements, without a bound."""
    unit = Strided(row, (1, size), Memory(0, (0, 0)), Memory(0, (0, 0)), (1,))
    law: Array = unit_laws([Family((unit,))], ord, 0.0)[0]
    return law

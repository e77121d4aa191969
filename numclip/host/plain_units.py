"""Units of one plain array that holds little, clipped by one native call.

As in `lists`: a function does the whole job with the bits of the general way, or returns None and
has touched nothing.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType, as_stored
from numclip.host import lists
from numclip.host.kernels import unit_loops
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.units import LONG_ROW
from numclip.law import Family, unit_laws
from numclip.memory import Memory, Strided
from numclip.tables import BOUND, EPS


def clip(
    grad: Any,
    bound: float,
    axes: tuple[int, ...],
    out: Any,
    owner: Any = None,
    eps: float = 0.0,
) -> Any:
    """Hold the L2 norm of each unit to a bound, or to a fraction of its owner's; return the result.

    Axes are in ascending order.
    """
    kind = lists.kind_of((grad,)) if out is None or out is grad else None
    if kind is None or not axes or not 0 < grad.nbytes < PARALLEL_BYTES:
        return None
    x = _cut(grad, kind.row, axes)
    if x is None or (owner is not None and owner.shape != grad.shape):
        return None
    param = x[:0] if owner is None else _cut(owner, kind.row, axes)
    if param is None:
        return None
    result, y = grad, x
    if out is None:
        result = np.empty_like(grad)
        y = as_stored(result).reshape(x.shape)
    law = _law(kind.row, x.shape[1] // kind.row.components).copy()
    law[BOUND], law[EPS] = bound, eps
    done = unit_loops.clip_little(x, param, law, kind.row.digits, y)
    return result if done else None


def _cut(array: Any, row: DType, axes: tuple[int, ...]) -> Array | None:
    """Return storage as (outer, reduced, inner), units being rows where `inner` is 1."""
    first, last = axes[0], axes[-1] + 1
    if type(array) is not np.ndarray or array.dtype != row.native or last - first != len(axes):
        return None
    if not array.flags.carray:  # in C order, aligned and writeable
        return None
    inner = math.prod(array.shape[last:])
    reduced = math.prod(array.shape[first:last]) * row.components
    if reduced >= LONG_ROW or (inner > 1 and row.components == 2):
        return None
    return as_stored(array).reshape(-1, reduced, inner)


@functools.lru_cache(maxsize=256)
def _law(row: DType, size: int) -> Array:
    """Return what a law says of units of so many elements, but for its bound."""
    unit = Strided(row, (1, size), Memory(0, (0, 0)), Memory(0, (0, 0)), (1,))
    law: Array = unit_laws([Family((unit,))], 2.0, 0.0)[0]
    return law

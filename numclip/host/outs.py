"""Where results go: to new arrays, in place, or to other ones.

Those are clipped in new memory, then copied. The general way writes them at once, but takes 200 us
to see that it may.
"""

from __future__ import annotations

import operator
from typing import Any

import numpy as np

from numclip.host.arrays import share_no_memory
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.nests import Items, items_of, rebuilt


def takes(grads: Any, out: Any) -> bool:
    """Tell whether results are new, or in place: the same arrays, if not in the same list."""
    if out is grads or out is None:
        return True
    if type(out) is not type(grads) or type(out) is np.ndarray:
        return False
    read, written = items_of(grads), items_of(out)
    same = len(read) == len(written) and all(map(operator.is_, read, written))
    return same and bool(read) and (type(out) is not dict or [*grads] == [*out])


def of(grads: Any, out: Any, owners: Any = None) -> Items | None:
    """Return the arrays to write, one for each gradient; None where the general way is to look.

    All are plain arrays that hold little, alike in dtype and shape, and share no memory.
    """
    if type(out) is not type(grads):
        return None
    kind = type(grads)
    read, written, others = (
        (item,) if kind is np.ndarray else items_of(item) for item in (grads, out, owners)
    )
    if not read or len(read) != len(written) or (kind is dict and [*grads] != [*out]):
        return None
    if sum(map(_nbytes, read)) >= PARALLEL_BYTES or not all(map(_fit, read, written)):
        return None
    every = [item for item in (*read, *written, *others) if item is not None]
    return written if share_no_memory(every) else None


def written(arrays: Items | None, results: Any) -> Any:
    """Copy results to arrays, if there are some; return these in the structure of the results."""
    if results is None or arrays is None:
        return None
    if type(results) is np.ndarray:
        arrays[0][...] = results
        return arrays[0]
    for array, result in zip(arrays, items_of(results), strict=True):
        if result is not None:
            array[...] = result
    return rebuilt(results, arrays, None)


def _nbytes(item: Any) -> int:
    return item.nbytes if type(item) is np.ndarray else 0


def _fit(read: Any, out: Any) -> bool:
    """Tell whether an array is there to write another one's result."""
    if read is None or out is None:
        return read is out
    if type(read) is not np.ndarray or type(out) is not np.ndarray:
        return False
    return read.dtype == out.dtype and read.shape == out.shape and out.flags.writeable

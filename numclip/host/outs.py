"""The `out` of the list path: new arrays, the gradients' own (in place), or other arrays.

Results for other arrays are computed in new memory, then copied. The general path writes them
directly, but takes 200 us to check that it may.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from numclip.host.arrays import share_no_memory
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.nests import Items, items_of, rebuilt


def takes(grads: Any, out: Any) -> bool:
    """Tell whether `out` is None, `grads`, or a container of its type with the same arrays."""
    if out is grads or out is None:
        return True
    if type(out) is not type(grads) or type(out) is np.ndarray:
        return False
    read, targets = items_of(grads), items_of(out)
    same = len(read) == len(targets) and all(map(operator.is_, read, targets))
    return same and bool(read) and (type(out) is not dict or [*grads] == [*out])


def of(grads: Any, out: Any, owners: Any = None) -> Items | None:
    """Return the arrays of `out`, one for each gradient; None if the general path has to check.

    They are contiguous ndarrays of few bytes that share no memory with one another, with the
    gradients or with the gradients' owners.
    """
    kind = type(grads)
    if type(out) is not kind:
        return None
    if kind is np.ndarray:
        read, targets, others = (grads,), (out,), (owners,)
    else:
        read, targets, others = items_of(grads), items_of(out), items_of(owners)
    if not read or len(read) != len(targets) or (kind is dict and [*grads] != [*out]):
        return None
    if sum(map(_nbytes, read)) >= PARALLEL_BYTES or not all(map(_can_take, targets, read)):
        return None
    every = [item for item in (*read, *targets, *others) if item is not None]
    return targets if share_no_memory(every) else None


def put(grads: Any, out: Any, make: Callable[[], Any], owners: Any = None) -> Any:
    """Copy the results of `make()` to the arrays of `out`; return None if `of` or `make` does."""
    targets = of(grads, out, owners)
    results = None if targets is None else make()
    return None if targets is None or results is None else filled(targets, results)


def filled(targets: Items, results: Any) -> Any:
    """Copy results to the target arrays; return these in the structure of the results."""
    if type(results) is np.ndarray:
        targets[0][...] = results
        return targets[0]
    for target, result in zip(targets, items_of(results), strict=True):
        if result is not None:
            target[...] = result
    return rebuilt(results, targets, None)


def _nbytes(item: Any) -> int:
    return item.nbytes if type(item) is np.ndarray else 0


def _can_take(target: Any, read: Any) -> bool:
    """Tell whether `target` is writeable, contiguous, and of the dtype and shape of `read`."""
    if read is None or target is None:
        return read is target
    if type(read) is not np.ndarray or type(target) is not np.ndarray:
        return False
    alike = read.dtype == target.dtype and read.shape == target.shape
    return alike and target.flags.writeable and target.flags.forc

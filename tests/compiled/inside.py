"""numclip's functions as a suite of all targets calls them, from within `@njit`."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import pytest

from tests.compiled import wrappers
from tests.oracle.targets import Host

WHOLE = ["clip_by_norm", "clip_by_average_norm", "clip_by_block_rms"]
DTYPES = ("float32", "float64", "complex64", "complex128")
MOST_IN_TUPLE = 8  # its code is as long


def is_taken(grad: Any) -> bool:
    return type(grad) is np.ndarray and grad.dtype.name in DTYPES and grad.dtype.isnative


def refuse() -> None:
    pytest.skip("not taken within @njit, or tried elsewhere")


def accepted(grads: Any) -> Any:
    """The gradients as compiled code takes them: a typed list where they are of one type."""
    arrays = [] if isinstance(grads, dict) else [grad for grad in grads if grad is not None]
    kinds = len(set(map(numba.typeof, arrays))) if all(map(is_taken, arrays)) else 0
    if kinds == 0 or (kinds > 1 and len(arrays) > MOST_IN_TUPLE):
        refuse()
    if type(grads) is not list:
        return grads
    return numba.typed.List(grads) if kinds == 1 and len(arrays) == len(grads) else tuple(grads)


class WithinNjit(Host):
    """numclip's functions, called from within functions that numba compiles."""

    def global_norm(self, grads: Any, ord: float = 2, duplicates: str = "sum") -> float:
        taken = accepted(grads)
        if ord == 2:
            return wrappers.global_norm(taken)
        if duplicates != "sum" or any(grad.dtype.kind == "c" for grad in taken):
            refuse()
        return wrappers.global_norm_of_order(taken, float(ord))

    def clip_by_global_norm(
        self, grads: Any, clip_norm: float, *, out: Any = None, **options: Any
    ) -> tuple[Any, float]:
        if options or out is not (None if out is None else grads):
            refuse()
        if out is not None:
            return out, wrappers.clip_in_place(accepted(grads), clip_norm)[1]
        clipped, norm = wrappers.clip(accepted(grads), clip_norm)
        return list(clipped) if type(grads) is list else clipped, norm

    def _one(self, name: str, grad: Any, *numbers: Any, out: Any = None) -> Any:
        if not is_taken(grad):
            refuse()
        if out is None:
            return getattr(wrappers, name)(grad, *numbers)
        if name == "clip_by_value":
            wrappers.clip_by_value_in_place(grad, *numbers)
        else:
            wrappers.all_in_place(grad, WHOLE.index(name), *numbers)
        return out

    def clip_by_norm(self, grad: Any, clip_norm: float, axes: Any = None, **out: Any) -> Any:
        if axes is not None:
            refuse()
        return self._one("clip_by_norm", grad, clip_norm, **out)

    def clip_by_average_norm(self, grad: Any, clip_norm: float, **out: Any) -> Any:
        return self._one("clip_by_average_norm", grad, clip_norm, **out)

    def clip_by_block_rms(self, grad: Any, threshold: float, **out: Any) -> Any:
        return self._one("clip_by_block_rms", grad, threshold, **out)

    def clip_by_value(self, grad: Any, low: Any, high: Any, **out: Any) -> Any:
        if grad.dtype.kind == "c":
            refuse()  # not by the error that Python raises
        return self._one("clip_by_value", grad, low, high, **out)

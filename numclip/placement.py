"""Where gradients are: in the host's memory, or on a GPU. Imports nothing of CUDA."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from numclip.foreign import CUDA, is_array


def on_device(array: Any) -> bool:
    """Tell whether an array lies on a GPU."""
    if type(array) is np.ndarray or isinstance(array, (np.ndarray, np.generic)):
        return False
    # That of PyTorch, whose other attributes can raise, and of IndexedSlices.
    is_cuda = getattr(array, "is_cuda", None)
    if isinstance(is_cuda, bool):
        return is_cuda
    if hasattr(array, "__cuda_array_interface__") or hasattr(array, "__cuda_ndarray__"):
        return True
    device = getattr(array, "__dlpack_device__", None)
    return device is not None and int(device()[0]) == CUDA


def any_on_device(grads: Any) -> bool:
    """Tell whether the first of some gradients lies on a GPU."""
    if isinstance(grads, Mapping):
        grads = grads.values()
    elif not isinstance(grads, (list, tuple)) and (on_device(grads) or not _is_collection(grads)):
        return False  # for the border to refuse
    return on_device(next((item for item in grads if item is not None), None))


def _is_collection(grads: Any) -> bool:
    """Tell whether an object holds gradients, and can be gone through more than once."""
    others = (str, bytes, Iterator)
    return isinstance(grads, Iterable) and not isinstance(grads, others) and not is_array(grads)


def listed(grads: Any) -> Any:
    """Return gradients that can be gone through more than once: an iterator's in a list."""
    return list(grads) if isinstance(grads, Iterator) else grads

"""What an array tells of itself, whatever device it is on."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


class Facts(NamedTuple):
    """Where an array lies and what it holds.

    `strides`, in bytes, are None in C order. `array` holds the memory: an array of NumPy in the
    host's memory, the user's own on a GPU. `swapped` is the dtype of an array of the other byte
    order, of which `array` is a copy; else it is empty. `lease` is to be held while the memory is
    used, where there is one.
    """

    native: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    writable: bool
    array: Any
    swapped: str = ""
    lease: Any = None

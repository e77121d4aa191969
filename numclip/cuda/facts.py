"""What arrays on the GPU tell of themselves, checked as kernels take them."""

from __future__ import annotations

from typing import Any

from numclip.cuda.protocols import told
from numclip.dtypes import NAMES, lookup
from numclip.errors import expected
from numclip.facts import Facts
from numclip.memory import is_c_order


def facts_of(name: str, array: Any) -> Facts:
    """Return the facts of an array on the GPU, or say why it cannot be taken."""
    native, shape, strides, address, read_only, _, lease = told(name, array)
    if native is None:
        unknown = getattr(array, "dtype", type(array).__name__)
        raise TypeError(expected(name, f"an array of {NAMES}", unknown))
    if strides is not None and is_c_order(shape, strides, native.itemsize):
        strides = None
    row = lookup(native)
    if row is None:  # for the border to refuse, or the host to convert
        return Facts(native, shape, strides, address, False, array, "", lease)
    if not address and 0 not in shape:
        got = f"{type(array).__name__} at address 0; pass its local part"
        raise ValueError(expected(name, "an array with memory on the GPU", got))
    if any(step % row.storage.itemsize for step in (address, *(strides or ()))):
        got = f"address {address:#x}, strides {strides}"
        raise ValueError(expected(name, "an aligned CUDA array", got))
    return Facts(native, shape, strides, address, not read_only, array, "", lease)

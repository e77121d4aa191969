"""PyTorch tensors, recognised by facts that they give in half a microsecond."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from typing import Any

from numclip.cuda import driver


def facts(items: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return each tensor's address, dtype, shape and strides, from which a plan follows.

    Return None if an item is not None and is no `Tensor` or `Parameter`, is sparse or nested, is
    lazily conjugated or negated, or is not on the GPU in use: then the items are to be described.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    kinds, gpu = (torch.Tensor, torch.nn.Parameter), driver.gpu().ordinal
    found: list[Any] = []
    with contextlib.suppress(RuntimeError):  # sparse and nested ones have no address or shape
        for item in items:
            if type(item) in kinds:
                if item.get_device() != gpu or item.is_neg() or item.is_conj():
                    return None
                found += item.data_ptr(), item.dtype, item.shape, item.stride()
            elif item is not None:
                return None
        return tuple(found)
    return None

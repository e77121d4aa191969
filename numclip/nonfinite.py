"""The error that says where a gradient is NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from numclip.errors import NonFiniteGradientError as NonFiniteGradientError
from numclip.inputs import Entry


def first_error(entries: Sequence[Entry], use_norm: float | None) -> NonFiniteGradientError:
    """Return the error that names the first bad element, or what else is not finite."""
    for entry in entries:
        bad = ~np.isfinite(entry.values.reshape(-1))
        if bad.any():
            index = int(np.argmax(bad))
            value = entry.values.reshape(-1)[index]
            number = complex(value) if entry.dtype.components == 2 else float(value)
            count = int(np.count_nonzero(bad))
            message = (
                f"{entry.name} is not finite: {number} at flat index {index}, "
                f"{count} of {bad.size} elements; nothing was modified"
            )
            return NonFiniteGradientError(message, entry.key, index, number, count)
    norm = math.nan if use_norm is None else use_norm
    what = "the sum of repeated rows" if use_norm is None else "use_norm"
    message = f"{what} is not finite: {norm}; nothing was modified"
    return NonFiniteGradientError(message, None, 0, norm, 0)

"""The error that says where a gradient is NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.border.gradients import Gradient
from numclip.errors import NonFiniteGradientError


def first_error(
    gradients: Sequence[Gradient], use_norm: float | None, stream: Any
) -> NonFiniteGradientError:
    """Return the error that names the first non-finite element, else `use_norm` or row sums."""
    for gradient in gradients:
        values = gradient.engine.on_host(gradient.facts, stream).reshape(-1)
        bad = ~np.isfinite(values)
        if bad.any():
            index = int(np.argmax(bad))
            value = values[index]
            number = complex(value) if gradient.dtype.components == 2 else float(value)
            count = int(np.count_nonzero(bad))
            message = (
                f"{gradient.name} is not finite: {number} at flat index {index}, "
                f"{count} of {bad.size} elements; nothing was modified"
            )
            return NonFiniteGradientError(message, gradient.key, index, number, count)
    norm = math.nan if use_norm is None else use_norm
    what = "the sum of repeated rows" if use_norm is None else "use_norm"
    message = f"{what} is not finite: {norm}; nothing was modified"
    return NonFiniteGradientError(message, None, 0, norm, 0)

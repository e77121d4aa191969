"""The error that says where a gradient is NaN or Inf."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from numclip.inputs import Entry, Key


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or Inf, and the policy is ``"raise"``.

    Attributes
    ----------
    name : int, str or None
        The position or key of the first bad gradient; None where ``use_norm`` is what is bad.
    index : int
        The flat index of its first bad element, in C order (among the values, if sparse).
    value : float or complex
        That element.
    count : int
        How many of that gradient's elements are not finite.
    """

    def __init__(
        self, message: str, name: Key | None, index: int, value: float | complex, count: int
    ) -> None:
        super().__init__(message)
        self.name, self.index, self.value, self.count = name, index, value, count

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        arguments = (str(self), self.name, self.index, self.value, self.count)
        return type(self), arguments


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

"""Every exception of ours, and how messages say what they expected."""

from __future__ import annotations

from typing import Any

INSTALL = 'pip install "numclip[cuda12]" (or cuda13, as the driver wants)'
"""How to get what a GPU needs."""


def expected(name: str, wanted: str, got: Any) -> str:
    """Return what an error says of an argument that does not fit."""
    return f"{name}: expected {wanted}, got {got}"


class DeviceError(RuntimeError):
    """CUDA was asked for where it cannot be used; the message says why."""


class NonFiniteGradientError(ArithmeticError):
    """A gradient holds NaN or Inf, and the policy is ``"raise"``.

    Attributes
    ----------
    name : int, str, tuple or None
        The position or key of the first bad gradient, the path of them where gradients are
        nested; None where ``use_norm`` is what is bad.
    index : int
        The flat index of its first bad element, in C order (among the values, if sparse).
    value : float or complex
        That element.
    count : int
        How many of that gradient's elements are not finite.
    """

    def __init__(
        self, message: str, name: Any, index: int, value: float | complex, count: int
    ) -> None:
        super().__init__(message)
        self.name, self.index, self.value, self.count = name, index, value, count

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        arguments = (str(self), self.name, self.index, self.value, self.count)
        return type(self), arguments

"""Every exception of ours, and how messages say what they expected."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

INSTALL = 'pip install "numba-cuda[cu12]>=0.30" "numpy<2.6" (or cu13, as the driver wants)'
"""How to get what a GPU needs."""


def expected(name: str, wanted: str, got: Any) -> str:
    """Return what an error says of an argument that does not fit."""
    return f"{name}: expected {wanted}, got {got}"


def entries(name: str, wanted: str, value: Any) -> Iterator[Any]:
    """Return an iterator over an argument; a TypeError names one that cannot be iterated."""
    try:
        return iter(value)
    except TypeError:
        raise TypeError(expected(name, wanted, type(value).__name__)) from None


def entries_by_name(name: str, value: Any) -> dict[str, Any]:
    """Return an argument that is a mapping as a dict; a TypeError names one that is none."""
    if not isinstance(value, Mapping):
        raise TypeError(expected(name, "a mapping", type(value).__name__))
    return dict(value)


class DeviceError(RuntimeError):
    """CUDA was asked for where it cannot be used; the message says why."""


class RankError(RuntimeError):
    """The ranks of a communicator differ, or one of them raised; every rank raises an error."""


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
    rank : int or None
        The rank that has the gradient, where a communicator was given.
    """

    def __init__(
        self,
        message: str,
        name: Any,
        index: int,
        value: float | complex,
        count: int,
        rank: int | None = None,
    ) -> None:
        super().__init__(message)
        self.name, self.index, self.value, self.count = name, index, value, count
        self.rank = rank

    def __reduce__(self) -> tuple[type, tuple[object, ...]]:
        arguments = (str(self), self.name, self.index, self.value, self.count, self.rank)
        return type(self), arguments

"""Numbers that stay on the GPU until their value is used."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from numclip.dtypes import Array


def _on_host(other: Any) -> Any:
    return other.item() if isinstance(other, DeviceNumber) else other


def _one(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return a method that applies `of` to the number."""
    return lambda self: of(self.item())


def _two(of: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return a method that applies `of` to the number and another one."""
    return lambda self, other: of(self.item(), _on_host(other))


@functools.total_ordering
class DeviceNumber:
    """A number that the GPU may still be computing, and that can be used as a plain one.

    The first use of its value waits for the GPU: converting it, comparing, formatting, printing,
    arithmetic. Passing it on does not wait.

    Parameters
    ----------
    read : function
        Waits for the number and returns it.
    """

    kind: type[float] | type[int]

    def __init__(self, read: Callable[[], Any]) -> None:
        self._read: Callable[[], Any] | None = read
        self._value: Any = None

    def item(self) -> Any:
        """Return the number as a float or an int of Python."""
        if self._read is not None:
            self._value = self.kind(self._read())
            self._read = None  # and with it, the reference to the table
        return self._value

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return the number as a 0-d array."""
        if copy is False:
            raise ValueError("copy: expected True or None, as the number is on the GPU")
        return np.array(self.item(), dtype)

    def __format__(self, spec: str) -> str:
        return format(self.item(), spec)

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.item(), digits)

    __float__, __int__, __bool__ = _one(float), _one(int), _one(bool)
    __repr__, __hash__, __neg__, __abs__ = _one(repr), _one(hash), _one(operator.neg), _one(abs)
    __eq__, __lt__ = _two(operator.eq), _two(operator.lt)
    __add__, __sub__, __mul__ = _two(operator.add), _two(operator.sub), _two(operator.mul)
    __truediv__, __pow__ = _two(operator.truediv), _two(operator.pow)
    __radd__, __rmul__ = __add__, __mul__
    __rsub__ = _two(lambda own, other: other - own)
    __rtruediv__ = _two(lambda own, other: other / own)


class DeviceFloat(DeviceNumber):
    """A number that the GPU may still be computing, and that can be used as a float.

    See `DeviceNumber`. Functions that take arrays by ``__cuda_array_interface__``
    (``torch.as_tensor(..., device="cuda")``, ``cupy.asarray``) take it as a 0-d float64 array,
    without waiting.

    Parameters
    ----------
    read : function
        Waits for the number and returns it.
    locate : function, optional
        Returns the number's address on the GPU, which is valid as long as this object lives.
    """

    kind = float

    def __init__(self, read: Callable[[], Any], locate: Callable[[], int] | None = None) -> None:
        super().__init__(read)
        self._locate = locate

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The description that other libraries read."""
        if self._locate is None:
            raise AttributeError("__cuda_array_interface__: the number has no address")
        data = self._locate(), False  # PyTorch takes no read-only array
        return {"shape": (), "typestr": "<f8", "data": data, "strides": None, "version": 2}


class DeviceInt(DeviceNumber):
    """A count that the GPU may still be computing, and that can be used as an int.

    See `DeviceNumber`.
    """

    kind = int

    def __index__(self) -> int:
        return int(self.item())


numbers.Real.register(DeviceFloat)  # so that it is accepted wherever a number is
numbers.Integral.register(DeviceInt)

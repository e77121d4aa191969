"""Numbers that stay on the GPU until someone asks for them."""

from __future__ import annotations

import functools
import numbers
import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from numclip.dtypes import Array


def _plain(other: Any) -> Any:
    return other.item() if isinstance(other, DeviceNumber) else other


def _one(of: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """Return the method that does something with the number."""
    return lambda self: of(self.item())


def _two(of: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """Return the method that does something with the number and another one."""
    return lambda self, other: of(self.item(), _plain(other))


@functools.total_ordering
class DeviceNumber:
    """A number that the GPU still works on, and that is a plain one to whoever asks.

    Asking waits for the GPU, the first time: converting it, comparing, formatting, printing,
    arithmetic. Handing it on does not.

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
        """Return the number as a plain one."""
        if self._read is not None:
            self._value = self.kind(self._read())
            self._read = None  # and with it the memory
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
    """A number that the GPU still works on, and that is a float to whoever asks.

    See `DeviceNumber`. What takes arrays by ``__cuda_array_interface__`` (``torch.as_tensor(...,
    device="cuda")``, ``cupy.asarray``) takes it as a 0-d float64 array, and waits for nothing.

    Parameters
    ----------
    read : function
        Waits for the number and returns it.
    locate : function, optional
        Returns the address on the GPU where it is, as long as this object lives.
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
        data = self._locate(), False  # PyTorch takes no array that is only to be read
        return {"shape": (), "typestr": "<f8", "data": data, "strides": None, "version": 2}


class DeviceInt(DeviceNumber):
    """A count that the GPU still works on, and that is an int to whoever asks.

    See `DeviceNumber`.
    """

    kind = int

    def __index__(self) -> int:
        return int(self.item())


numbers.Real.register(DeviceFloat)  # so that it is taken wherever a number is
numbers.Integral.register(DeviceInt)

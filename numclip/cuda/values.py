"""Numbers that stay on the GPU until someone asks for them."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable
from typing import Any

from numclip.report import ClipReport

Reader = Callable[[], float]


@functools.total_ordering
class DeviceFloat:
    """A number that the GPU still works on, and that is a float to whoever asks.

    Asking waits for the GPU, the first time: ``float(norm)``, comparing, formatting, printing,
    arithmetic. Handing it on does not.

    Parameters
    ----------
    read : function
        Waits for the number and returns it.
    """

    def __init__(self, read: Reader) -> None:
        self._read: Reader | None = read
        self._value = 0.0

    def __float__(self) -> float:
        if self._read is not None:
            self._value = float(self._read())
            self._read = None  # and with it the memory
        return self._value

    def item(self) -> float:
        """Return the number as a float."""
        return float(self)

    def __repr__(self) -> str:
        return repr(float(self))

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __bool__(self) -> bool:
        return bool(float(self))

    def __hash__(self) -> int:
        return hash(float(self))

    def __eq__(self, other: object) -> bool:
        return float(self) == (float(other) if isinstance(other, DeviceFloat) else other)

    def __lt__(self, other: Any) -> bool:
        return float(self) < float(other)

    def __add__(self, other: Any) -> float:
        return float(self) + float(other)

    def __sub__(self, other: Any) -> float:
        return float(self) - float(other)

    def __mul__(self, other: Any) -> float:
        return float(self) * float(other)

    def __truediv__(self, other: Any) -> float:
        return float(self) / float(other)

    def __pow__(self, other: Any) -> float:
        return float(float(self) ** float(other))

    def __neg__(self) -> float:
        return -float(self)

    def __abs__(self) -> float:
        return abs(float(self))

    def __round__(self, digits: int | None = None) -> float:
        return round(float(self), digits)

    __radd__ = __add__
    __rmul__ = __mul__

    def __rsub__(self, other: Any) -> float:
        return float(other) - float(self)

    def __rtruediv__(self, other: Any) -> float:
        return float(other) / float(self)


numbers.Real.register(DeviceFloat)  # so that it is taken wherever a number is


class DeviceReport:
    """A `ClipReport` that the GPU still works on, and that is there for whoever asks.

    Its attributes and methods are the report's. The first one asked for waits for the GPU.

    Parameters
    ----------
    step : int
        The number of the step.
    read : function
        Waits for the report and returns it.

    Raises
    ------
    ValueError
        Where the report was not asked for before its memory was needed again; the message
        says within how many steps to ask.
    """

    def __init__(self, step: int, read: Callable[[], ClipReport]) -> None:
        self.step, self.expired = step, False
        self._read: Callable[[], ClipReport] | None = read
        self._report: ClipReport | None = None

    @property
    def report(self) -> ClipReport:
        """The report, after waiting for it."""
        if self._report is None:
            assert self._read is not None
            self._report = self._read()
            self._read = None
        return self._report

    def expire(self, kept: int) -> None:
        """Give the memory up, where nobody has asked."""
        if self._report is not None:
            return
        self.expired, step = True, self.step

        def refuse() -> ClipReport:
            raise ValueError(
                f"report: that of step {step} is gone; read a report, or the history, "
                f"within {kept} steps"
            )

        self._read = refuse

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self.report, name)

    def __repr__(self) -> str:
        return repr(self.report)

"""The work of a plan on tensors of one kind: measure, scale, clamp."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.cuda import device
from numclip.dtypes import Array, DType


class Shared(NamedTuple):
    """The tables that all works of a plan share."""

    tensors: Any
    partial: Any


class Kernels(NamedTuple):
    """The kernels that measure and write tensors of one kind; None if other works write them."""

    squares: Any
    maxima: Any
    powers: Any
    scale: Any = None
    clamp: Any = None


Tables = Mapping[DType, Sequence[Any]]
"""For each dtype that occurs, the tables that kernels take as their first arguments."""


def like(dtype: DType) -> Any:
    """Return a 0 of the dtype's storage type, from which a kernel takes that type."""
    return dtype.storage.type(0)


def launch(
    kernel: Any, found: Tables, stream: Any, *before: Any, after: Sequence[Any] = ()
) -> None:
    """Launch a kernel for each dtype, on its tables, `before`, its storage type, and `after`."""
    for dtype, own in found.items():
        device.launch(kernel, own[0].shape[0], stream, *own, *before, like(dtype), *after)


class Work(ABC):
    """The work on some of a plan's tensors, which it knows by their numbers in the plan.

    `counts` has the number of partial sums of each tensor; `repeats` is True for tensors whose
    rows can share an index.
    """

    repeats = False
    kernels: Kernels
    counts: Array
    _tables: Tables

    @abstractmethod
    def send(self, parts: Array, stream: Any) -> None:
        """Send the tables; `parts` has the index of each tensor's first partial sum."""

    def sum(self, kernel: Any, shared: Shared, stream: Any, *peaks: Any) -> None:
        """Write partial sums, or maxima, by one of the kernels: one read.

        `peaks`, for sums of powers, is a table of the peaks of pools, or of units.
        """
        launch(kernel, self._tables, stream, shared.tensors, *peaks, after=[shared.partial])

    @abstractmethod
    def scale(
        self, shared: Shared, decisions: Any, stream: Any, least: int = tables.MULTIPLY
    ) -> None:
        """Write each tensor times the decided factors; one read, one write, or none.

        If `least` is TRUNCATE, scale only tensors of the modes TRUNCATE and CLEAN, in place.
        """

    @abstractmethod
    def clamp(
        self, shared: Shared, decisions: Any, bounds: Sequence[Any], members: range, stream: Any
    ) -> None:
        """Clamp the tensors with numbers in `members` between two bounds, unless skipped."""


class OwnWork(Work):
    """Work that writes tensors by kernels of its own."""

    @abstractmethod
    def _written(self, members: range | None, stream: Any) -> Tables:
        """Return the tables for writing the tensors with numbers in `members`, or all if None."""

    def scale(
        self, shared: Shared, decisions: Any, stream: Any, least: int = tables.MULTIPLY
    ) -> None:
        """Write each tensor times the decided factors."""
        for dtype, own in self._written(None, stream).items():
            numbers = [np.int64(number) for number in (least, *dtype.precision)]
            inputs = shared.tensors, decisions, *numbers
            launch(self.kernels.scale, {dtype: own}, stream, *inputs)

    def clamp(
        self, shared: Shared, decisions: Any, bounds: Sequence[Any], members: range, stream: Any
    ) -> None:
        """Clamp the tensors with numbers in `members` between two bounds, unless skipped."""
        inputs = shared.tensors, decisions, *bounds
        launch(self.kernels.clamp, self._written(members, stream), stream, *inputs)


def measure(
    works: Sequence[Work],
    ord: float,
    shared: Shared,
    peaks: Any,
    find: Callable[[int, Any], None],
    stream: Any,
    *,
    hypotenuses: bool,
) -> None:
    """Write the partial sums: one read for `ord` 2, and for inf without `hypotenuses`, else two.

    `find` writes the largest partial maxima to a column of `peaks`. They are of real and imaginary
    parts; `hypotenuses` says that the magnitudes of complex numbers are needed.
    """
    if ord == 2.0:
        for work in works:
            work.sum(work.kernels.squares, shared, stream)
        return
    for work in works:
        work.sum(work.kernels.maxima, shared, stream)
    find(tables.PEAK, stream)
    if ord != math.inf or hypotenuses:
        for work in works:
            work.sum(work.kernels.powers, shared, stream, peaks)
    if ord == math.inf and hypotenuses:
        find(tables.RATIO, stream)

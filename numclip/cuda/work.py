"""What a plan has done to tensors of one kind: measured, scaled, held between bounds."""

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
    """The kernels that measure and write tensors of one kind, `None` where others do it."""

    squares: Any
    maxima: Any
    powers: Any
    scale: Any = None
    clamp: Any = None


Tables = Mapping[DType, Sequence[Any]]
"""Of each dtype that has some: the tables that kernels take first."""


def like(dtype: DType) -> Any:
    """Return what tells a kernel how elements are stored."""
    return dtype.storage.type(0)


def launch(
    kernel: Any, found: Tables, stream: Any, *before: Any, after: Sequence[Any] = ()
) -> None:
    """Launch a kernel for each dtype; how elements are stored is told between the arguments."""
    for dtype, own in found.items():
        device.launch(kernel, own[0].shape[0], stream, *own, *before, like(dtype), *after)


class Work(ABC):
    """The work on some of a plan's tensors, by their numbers.

    `counts` says how many partial sums each of them takes, `repeats` whether they are rows that
    can share an index.
    """

    repeats = False
    kernels: Kernels
    counts: Array
    _tables: Tables

    @abstractmethod
    def send(self, parts: Array, stream: Any) -> None:
        """Make the tables; `parts` says where the partial sums of each tensor begin."""

    def sum(self, kernel: Any, shared: Shared, stream: Any, *peaks: Any) -> None:
        """Write the partial sums, or maxima, of one of the kernels: one read.

        Sums of powers are over the peaks of pools, or of units.
        """
        launch(kernel, self._tables, stream, shared.tensors, *peaks, after=[shared.partial])

    @abstractmethod
    def scale(
        self, shared: Shared, decisions: Any, stream: Any, least: int = tables.MULTIPLY
    ) -> None:
        """Write each tensor times the factors decided; one read, one write, or none.

        From TRUNCATE on, what has a factor that is no plain number is scaled alone, in place.
        """

    @abstractmethod
    def clamp(
        self, shared: Shared, decisions: Any, bounds: Sequence[Any], members: range, stream: Any
    ) -> None:
        """Write the elements of some tensors held between two bounds, but of those skipped."""


class OwnWork(Work):
    """Work that writes tensors by kernels of its own."""

    @abstractmethod
    def _written(self, members: range | None, stream: Any) -> Tables:
        """Return the tables by which some tensors, or all, are written."""

    def scale(
        self, shared: Shared, decisions: Any, stream: Any, least: int = tables.MULTIPLY
    ) -> None:
        """Write each tensor times the factors decided."""
        for dtype, own in self._written(None, stream).items():
            numbers = [np.int64(number) for number in (least, *dtype.precision)]
            inputs = shared.tensors, decisions, *numbers
            launch(self.kernels.scale, {dtype: own}, stream, *inputs)

    def clamp(
        self, shared: Shared, decisions: Any, bounds: Sequence[Any], members: range, stream: Any
    ) -> None:
        """Write the elements of some tensors held between two bounds."""
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
    """Write the partial sums: one read, two where `ord` is neither 2 nor infinite.

    `find` takes the largest partial maxima to a column of `peaks`. These are of real and imaginary
    parts; `hypotenuses` says that magnitudes are to be found.
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

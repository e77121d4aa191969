"""What a plan has done to tensors of one kind: measured, scaled, held between bounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
    """What measures and writes tensors of a kind, and which are `None` where others do it."""

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


class Work:
    """The work on some of a plan's tensors, by their numbers.

    `counts` says how many partial sums each of them takes, `repeats` whether they are rows that
    can share an index.
    """

    repeats = False
    kernels: Kernels
    counts: Array
    _tables: Tables

    def send(self, parts: Array, stream: Any) -> None:
        """Make the tables; `parts` says where the partial sums of each tensor begin."""
        raise NotImplementedError

    def _written(self, members: range | None, stream: Any) -> Tables:
        """Return the tables by which some tensors, or all, are written."""
        raise NotImplementedError

    def sum_squares(self, shared: Shared, stream: Any) -> None:
        """Write the partial sums of squares: one read."""
        launch(self.kernels.squares, self._tables, stream, shared.tensors, after=[shared.partial])

    def max_magnitude(self, shared: Shared, stream: Any) -> None:
        """Write the partial maxima, of real and imaginary parts: one read."""
        launch(self.kernels.maxima, self._tables, stream, shared.tensors, after=[shared.partial])

    def sum_powers(self, shared: Shared, peaks: Any, stream: Any) -> None:
        """Write the partial sums of powers of magnitudes over the peaks of pools, or of units.

        One read. Of infinite order, they are the largest magnitudes over the peaks.
        """
        inputs = shared.tensors, peaks
        launch(self.kernels.powers, self._tables, stream, *inputs, after=[shared.partial])

    def scale(self, shared: Shared, decisions: Any, stream: Any) -> None:
        """Write each tensor times the factors decided; one read, one write, or none."""
        self._scale(tables.MULTIPLY, shared, decisions, stream)

    def scale_rare(self, shared: Shared, decisions: Any, stream: Any) -> None:
        """Scale, in place, what has a factor that is no plain number; rarely any."""
        self._scale(tables.TRUNCATE, shared, decisions, stream)

    def _scale(self, least: int, shared: Shared, decisions: Any, stream: Any) -> None:
        for dtype, own in self._written(None, stream).items():
            numbers = [np.int64(number) for number in (least, *dtype.precision)]
            inputs = shared.tensors, decisions, *numbers
            launch(self.kernels.scale, {dtype: own}, stream, *inputs)

    def clamp(
        self, shared: Shared, decisions: Any, bounds: Sequence[Any], members: range, stream: Any
    ) -> None:
        """Write the elements of some tensors held between two bounds, but of those skipped."""
        inputs = shared.tensors, decisions, *bounds
        launch(self.kernels.clamp, self._written(members, stream), stream, *inputs)

"""Steps of little data: gradients found, measured, decided and applied by one native call."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.host.batches import Batch
from numclip.host.given import Given
from numclip.host.kernels import cpu, given
from numclip.host.lists import READABLE, pointers_of

KERNELS = {
    "descend": given.descend,
    "descend_with_momentum": given.descend_with_momentum,
    "adam": given.adam,
}


class AtOnce:
    """What takes steps of one batch by one call each.

    `starts` are where its tensors begin, `tables` the rest of what a kernel works on, by their
    numbers in `kernels.given`.
    """

    def __init__(
        self, kernel: str, batch: Batch, starts: Array, reader: Given, tables: dict[int, Array]
    ) -> None:
        self._kernel, self._batch, self._reader = KERNELS[kernel], batch, reader
        self._factors, self._like = tables.pop(given.FACTORS), batch.dtype.like
        chunks = batch.chunks.copy()
        distances = chunks[:, cpu.SOURCE] - starts[chunks[:, cpu.OWNER]]
        tables |= {given.CHUNKS: chunks, given.DISTANCES: distances}
        tables |= {given.LENGTHS: chunks[:, cpu.LENGTH].copy()}
        self._held = [*tables.values(), reader]
        self._own = np.zeros((given.TABLES, 3), np.int64)
        for k, table in tables.items():
            _point(self._own, k, table)
        self._starts, self._addresses = starts, starts.copy()
        _point(self._own, given.ADDRESSES, self._addresses)
        _point(self._own, given.WANTED, reader.wanted)
        self._given = self._own.copy()
        _point(self._given, given.ADDRESSES, reader.addresses)
        self._outcomes: Sequence[Array] = ()

    def leave(self, numbers: Sequence[int]) -> None:
        """Let some tensors have no gradient of the plan's in the next step, all others one."""
        self._addresses[:] = self._starts
        self._addresses[numbers] = given.ABSENT

    def step(
        self, items: Any, place: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Take a step by the gradients of the plan, or those given; tell whether that was right.

        It is not where sums are to be taken again or gradients written.

        What was found is a row of the outcomes. If it was not right, nothing else is written.
        """
        if items is not None and not READABLE:
            return False
        if outcomes is not self._outcomes:
            self._outcomes = outcomes
            for tables in (self._own, self._given):
                _point(tables, given.SUMS, outcomes[0][0])
                _point(tables, given.DECISIONS, outcomes[1][0])
        tables, address = self._own, 0
        if items is not None:
            self._reader.check(items)
            tables, address = self._given, pointers_of(items)
        return self._kernel(  # type: ignore[no-any-return]
            address, place, unscale, tables, bounds, self._factors, self._like
        )


def _point(tables: Array, k: int, table: Array) -> None:
    """Write the words of a table."""
    rows, columns = table.shape if table.ndim == 2 else (1, table.size)
    tables[k] = table.ctypes.data, rows, columns

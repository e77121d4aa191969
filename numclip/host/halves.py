"""Float32 numbers of the host and their 16-bit copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numclip.dtypes import FLOAT32, Array, DType
from numclip.host import batches
from numclip.kernels import cpu, halves, threads
from numclip.kernels.threads import Call


class HalfCopies:
    """Copies of float32 numbers; `tables` have rows of (copies, numbers, length) by dtypes."""

    def __init__(self, tables: Mapping[DType, Array], _stream: Any = None) -> None:
        self._batches = []
        for dtype, table in tables.items():
            batch = batches.of_table(dtype, table)
            distances = batch.chunks[:, cpu.SOURCE] - table[batch.chunks[:, cpu.OWNER], 0]
            batch.chunks[:, cpu.TARGET] += distances  # which are half of those in float32
            self._batches.append(batch)

    def round_all(self, _stream: Any = None) -> None:
        """Let copies be the nearest ones to their numbers."""
        threads.run_all(self._calls(halves.round_all))

    def take_over(self, _stream: Any = None) -> None:
        """Let numbers be those of the copies that are none of theirs."""
        threads.run_all(self._calls(halves.take_over))

    def _calls(self, kernel: Any) -> list[Call]:
        return [batch.call(kernel, batch.dtype.like, FLOAT32.like) for batch in self._batches]

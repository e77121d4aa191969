"""Float32 numbers of the host and their 16-bit copies."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numclip.dtypes import FLOAT32, Array, DType
from numclip.host import batches
from numclip.host.kernels import cpu, halves
from numclip.host.kernels.tuning import PARALLEL_BYTES


class HalfCopies:
    """Copies of float32 numbers; `tables` have rows of (copies, numbers, length) by dtypes."""

    def __init__(self, tables: Mapping[DType, Array], _stream: Any = None) -> None:
        self._batches = []
        for dtype, table in tables.items():
            batch = batches.of_table(dtype, table)
            batch = batch._replace(nbytes=3 * batch.nbytes)  # those of the numbers, too
            distances = batch.chunks[:, cpu.SOURCE] - table[batch.chunks[:, cpu.OWNER], 0]
            batch.chunks[:, cpu.TARGET] += distances  # 16-bit offsets are half of those in float32
            likes = dtype.like, FLOAT32.like
            self._batches.append((batch, likes, (0, len(batch.chunks), batch.chunks, *likes)))

    def round_all(self, _stream: Any = None) -> None:
        """Round each number to nearest and write it to its copy."""
        self._each(halves.round_all)

    def take_over(self, _stream: Any = None) -> None:
        """Set each number that does not round to its copy to the copy's value."""
        self._each(halves.take_over)

    def _each(self, kernel: Any) -> None:
        for batch, likes, arguments in self._batches:
            if batch.nbytes < PARALLEL_BYTES:
                kernel(*arguments)
            else:
                batch.run(kernel, *likes)

"""Ranks as threads of one process: a communicator with the calls of mpi4py that numclip makes."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np

TIMEOUT = 60.0


class Comm:
    """One rank's end of a communicator. All ranks must make the same calls, of the same size."""

    def __init__(self, rank: int, size: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self._rank, self._size, self._slots, self._barrier = rank, size, slots, barrier
        self.calls: list[tuple[str, int]] = []

    def Get_rank(self) -> int:  # noqa: N802 - mpi4py's names
        return self._rank

    def Get_size(self) -> int:  # noqa: N802
        return self._size

    def Is_inter(self) -> bool:  # noqa: N802
        return False

    def _exchanged(self, name: str, length: int, value: Any) -> list[Any]:
        self.calls.append((name, length))
        self._slots[self._rank] = (name, length if name == "Allgather" else 0), value
        self._barrier.wait(TIMEOUT)
        found = list(self._slots)
        self._barrier.wait(TIMEOUT)
        kinds = {kind for kind, _ in found}
        assert len(kinds) == 1, f"ranks make different calls: {kinds}"
        return [own for _, own in found]

    def Allgather(self, values: np.ndarray, out: np.ndarray) -> None:  # noqa: N802
        assert out.shape == (self._size, values.size)
        assert out.dtype == values.dtype == np.float64
        out[...] = self._exchanged("Allgather", values.nbytes, values.copy())

    def allgather(self, value: Any) -> list[Any]:
        packed = pickle.dumps(value)
        return [pickle.loads(own) for own in self._exchanged("allgather", len(packed), packed)]


def run(size: int, program: Callable[[Comm], Any]) -> list[Any]:
    """Run a program on `size` ranks; return what each rank returned or raised."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size)
    results: list[Any] = [None] * size

    def start(rank: int) -> None:
        try:
            results[rank] = program(Comm(rank, size, slots, barrier))
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * TIMEOUT)
        assert not thread.is_alive(), "a rank waits for ever"
    return results


class Mirror:
    """A communicator in one thread, whose other ranks send the values that this one sends."""

    def __init__(self, size: int) -> None:
        self._size = size

    def Get_rank(self) -> int:  # noqa: N802
        return 0

    def Get_size(self) -> int:  # noqa: N802
        return self._size

    def Is_inter(self) -> bool:  # noqa: N802
        return False

    def Allgather(self, values: np.ndarray, out: np.ndarray) -> None:  # noqa: N802
        out[...] = values

    def allgather(self, value: Any) -> list[Any]:
        return [value] * self._size

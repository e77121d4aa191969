"""Threads of our own: kernels release the GIL, each thread takes a share of the chunks.

No thread is started before the first large call, none survives a fork, and a call that finds
the threads at work for another caller does its work alone. numba's threading layers are not
used: they are global to the process, and each fails after a fork or in concurrent calls.
"""

import contextlib
import os
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

from numclip.kernels.tuning import PARALLEL_BYTES


class _Worker:
    """A thread that waits for a share, runs it, and says so.

    `_finished` says so for certain; the lock only wakes the one who waits, so that a signal's
    exception at any point of the waiting loses nothing.
    """

    def __init__(self) -> None:
        self._go = threading.Lock()
        self._wake = threading.Lock()
        self._go.acquire()
        self._wake.acquire()
        self._work: Callable[[], Any] | None = None
        self._error: BaseException | None = None
        self._finished = True
        threading.Thread(target=self._loop, name="numclip", daemon=True).start()

    def _loop(self) -> None:
        while True:
            self._go.acquire()
            try:
                if self._work is not None:
                    self._work()
            except BaseException as error:  # handed to the caller by `join`
                self._error = error
            self._work = None  # holds the caller's arrays
            self._finished = True
            with contextlib.suppress(RuntimeError):  # still released from an interrupted wait
                self._wake.release()

    def start(self, work: Callable[[], Any]) -> None:
        self._finished = False
        self._work = work
        self._go.release()

    def join(self) -> BaseException | None:
        """Wait for the share to end; an exception meanwhile counts as its error."""
        interrupt: BaseException | None = None
        while not self._finished:
            try:
                self._wake.acquire()
            except BaseException as signal:  # memory is still being written: wait on
                interrupt = interrupt or signal
        error, self._error = self._error or interrupt, None
        return error


CGROUP_QUOTA = "/sys/fs/cgroup/cpu.max"

_limit: int | None = None
_workers: list[_Worker] = []
_free = threading.Lock()


def _forget() -> None:
    """Drop the threads, which a forked child does not have, and the lock that it may copy held."""
    global _free
    _workers.clear()
    _free = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _cgroup_cores() -> int | None:
    """Return the processor quota of this process's control group, if there is one."""
    try:
        with open(CGROUP_QUOTA) as file:
            quota, period = file.read().split()
        return max(1, int(quota) // int(period))
    except (OSError, ValueError):
        return None


def default_threads() -> int:
    """Return NUMCLIP_NUM_THREADS, else the cores this process may use."""
    wish = os.environ.get("NUMCLIP_NUM_THREADS", "").strip()
    if wish.isdecimal() and int(wish) > 0:
        return int(wish)
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(cores, _cgroup_cores() or cores)


def get_limit() -> int:
    """Return how many threads a call may use."""
    global _limit
    if _limit is None:
        _limit = default_threads()
    return _limit


def set_limit(count: int | None) -> None:
    """Bound the threads a call may use; None restores the default."""
    global _limit
    _limit = count


def run(
    kernel: Callable[..., Any], count: int, nbytes: int, *arguments: Any, keep: Any = None
) -> None:
    """Call ``kernel(begin, end, *arguments)`` on shares that make up ``range(count)``.

    `keep` is the memory that the arguments hold addresses of.
    """
    threads = min(get_limit(), count) if nbytes >= PARALLEL_BYTES else 1
    if threads <= 1 or not _free.acquire(blocking=False):
        kernel(0, count, *arguments)
        return
    free = _free
    started: list[_Worker] = []
    errors: list[BaseException] = []
    clean = False
    try:
        while len(_workers) < threads - 1:
            _workers.append(_Worker())
        bounds = [count * k // threads for k in range(threads + 1)]
        for worker, begin, end in zip(_workers, bounds[1:], bounds[2:], strict=False):
            worker.start(partial(_share, keep, kernel, begin, end, *arguments))
            started.append(worker)
        try:
            kernel(0, bounds[1], *arguments)
        finally:
            errors = [error for worker in started if (error := worker.join())]
            clean = True
    finally:
        if not clean:  # interrupted while threads were being started: they are not used again
            _workers.clear()
        free.release()
    if errors:
        raise errors[0]


def _share(_keep: Any, kernel: Callable[..., Any], *arguments: Any) -> None:
    kernel(*arguments)

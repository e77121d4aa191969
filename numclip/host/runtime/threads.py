"""numclip's own threads: the caller and a team of threads compute the items of each call.

No thread is started before the first large call, none survives a fork, and a call works alone
where the team works for another caller or no thread can be started. numba's threading layers are
not used: they are global to the process, and each fails after a fork or in concurrent calls.
"""

import _thread
import ctypes
import functools
import os
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime import limits, team
from numclip.host.runtime.entries import COUNT, FAILED, JOB_WORDS, NEXT, PACK, SIZE
from numclip.host.runtime.jit import INTERPRETED

MOST = 1024
"""Threads that a team has room for, beside the caller."""

SHARES = 8
"""Shares for each thread: a thread that is late or slow leaves more of them to others."""

RETRY_SECONDS = 10.0
"""How long calls work alone after a thread could not be started."""

ATTEMPTS = 8
"""How often writing is tried again after an exception."""


class Call(NamedTuple):
    """A call ``kernel(0, items, *arguments)`` of a kernel, over `nbytes` of memory.

    `keep` is the memory that the arguments hold addresses of.
    """

    kernel: Callable[..., Any]
    items: int
    nbytes: int
    arguments: tuple[Any, ...]
    keep: Any = None


class _Team:
    """The block of words that threads share, see `team`, and the number of threads started."""

    def __init__(self) -> None:
        python = ctypes.pythonapi
        python.PyMem_RawCalloc.restype = ctypes.c_void_p
        python.PyMem_RawCalloc.argtypes = [ctypes.c_size_t] * 2
        python.PyThread_allocate_lock.restype = ctypes.c_void_p
        python.PyThread_acquire_lock.argtypes = [ctypes.c_void_p, ctypes.c_int]
        # Neither is ever freed: threads use them to the end of the process.
        self.words = python.PyMem_RawCalloc(team.HEAD + MOST * team.SLOT, team.WORD) or 0
        lock = python.PyThread_allocate_lock()
        if not self.words or not lock:
            raise MemoryError("no memory for the team of threads")
        python.PyThread_acquire_lock(lock, 0)
        ctypes.c_int64.from_address(self.words + team.WAKE * team.WORD).value = lock
        self.started = 0
        self.generation = 0
        self.retry = 0.0
        team.serve(self.words, 0, -1)  # compile or load it here: generation -1 returns at once

    def grow(self, threads: int) -> bool:
        """Start threads until `threads` run beside the caller; return False if they cannot.

        After a signal handler's exception a thread can be started twice; the second ends at once.
        """
        if self.started >= threads:
            return True
        if time.monotonic() < self.retry:
            return False
        try:
            while self.started < threads:
                _thread.start_new_thread(team.serve, (self.words, self.started, self.generation))
                self.started += 1
        except (RuntimeError, MemoryError):  # no more threads, or the interpreter ends
            team.dismiss(self.words, self.started)
            self.started = 0
            self.generation += 1
            self.retry = time.monotonic() + RETRY_SECONDS
            return False
        return True


_limit: int | None = None
_team: _Team | None = None


def _forget() -> None:
    """Drop the team, whose threads a forked child does not have."""
    global _team
    _team = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def get_limit() -> int:
    """Return how many threads a call may use."""
    global _limit
    if _limit is None:
        _limit = limits.default_threads()
    return _limit


def set_limit(count: int | None) -> None:
    """Bound the threads a call may use; None restores the default."""
    global _limit
    _limit = count


def run(
    kernel: Callable[..., Any], count: int, nbytes: int, *arguments: Any, keep: Any = None
) -> None:
    """Call ``kernel(begin, end, *arguments)`` on shares that make up ``range(count)``."""
    if nbytes < PARALLEL_BYTES:  # 1.5 us faster than `run_all`
        kernel(0, count, *arguments)
    else:
        run_all([Call(kernel, count, nbytes, arguments, keep)])


def run_all(calls: Sequence[Call]) -> None:
    """Make calls one after another, all of them or none even if a signal handler raises.

    Several calls are first packed as jobs and then performed by one native call.
    """
    threads = max((_threads_for(call) for call in calls), default=1)
    if INTERPRETED or (threads <= 1 and len(calls) == 1):
        for call in calls:
            call.kernel(0, call.items, *call.arguments)
        return
    Jobs(calls).perform()


def ready(calls: Sequence[Call]) -> Callable[[], None]:
    """Return a function that makes calls, each once however often it is called."""
    if INTERPRETED:
        remaining = list(calls)

        def make() -> None:
            while remaining:
                run_all([remaining.pop(0)])

        return make
    return Jobs(calls).perform


def kept(calls: Sequence[Call]) -> Callable[[], object]:
    """Return a function that makes calls as `run_all` does, whenever it is called.

    The jobs of calls on few bytes are packed once.
    """
    if any(call.nbytes >= PARALLEL_BYTES for call in calls) or (INTERPRETED and len(calls) > 1):
        return functools.partial(run_all, calls)
    if len(calls) == 1:
        return functools.partial(calls[0].kernel, 0, calls[0].items, *calls[0].arguments)
    jobs = functools.cache(lambda: Jobs(calls))  # packed at the first call: it compiles kernels
    return lambda: jobs().perform_again()


def whole(write: Callable[[], None]) -> None:
    """Call `write`, which may be repeated; if an exception ends it early, call it again.

    A signal handler's exception is raised again after all is written. An exception of `write`
    itself comes at each attempt, and is raised after the last one.
    """
    try:
        write()
    except BaseException:
        for _ in range(ATTEMPTS):
            try:
                write()
                break
            except BaseException:
                continue
        raise


def run_then(calls: Sequence[Call], bring_back: Sequence[Callable[[], None]]) -> None:
    """Make calls, then copy their results back by the functions `bring_back`, see `whole`."""
    if not bring_back:
        run_all(calls)
        return
    make = ready(calls)

    def write() -> None:
        make()
        for back in bring_back:
            back()

    whole(write)


class Jobs:
    """Calls of kernels that are packed as jobs, see `entries`; `perform` makes each once."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = calls  # keeps the memory alive
        self._threads = np.array([_threads_for(call) for call in calls], np.int64)
        self._jobs = np.zeros((len(calls), JOB_WORDS), np.int64)
        # Not `ctypes.data`, which imports: that fails while the interpreter ends.
        address = self._jobs.__array_interface__["data"][0]
        for k, call in enumerate(calls):
            call.kernel(address + k * JOB_WORDS * team.WORD, PACK, *call.arguments)
            self._jobs[k, COUNT] = call.items
            self._jobs[k, SIZE] = max(1, call.items // (SHARES * int(self._threads[k])))

    def perform(self) -> None:
        """Make the calls, except those that were made already."""
        self._perform(_words(int(self._threads.max(initial=1))))

    def perform_again(self) -> None:
        """Make all calls again, by this thread alone."""
        self._jobs[:, NEXT : FAILED + 1] = 0
        self._perform(0)

    def _perform(self, words: int) -> None:
        if team.perform(words, self._jobs, self._threads):
            raise MemoryError("a kernel found no memory for its sums")


def _threads_for(call: Call) -> int:
    return min(get_limit(), max(call.items, 1), MOST + 1) if call.nbytes >= PARALLEL_BYTES else 1


def _words(threads: int) -> int:
    """Return the address of a team of `threads` with the caller; 0 for the caller alone."""
    global _team
    if threads <= 1:
        return 0
    if _team is None:
        _team = _Team()
    return _team.words if _team.grow(threads - 1) else 0

"""Threads that meet at every other instruction."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence


def errors_of_race(works: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Run each work in a thread of its own, all at once; return what they raised."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(work,)) for work in works]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    return errors

"""Run threads that switch every microsecond, to provoke races."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Sequence


def errors_of_race(works: Sequence[Callable[[], object]]) -> list[BaseException]:
    """Run each of `works` in a thread of its own, all at once; return the exceptions raised."""
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

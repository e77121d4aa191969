"""A progress bar, lines printed above it, and Ctrl-C that waits for the step to end."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


def progress_bar(total: int, unit: str, *, quiet: bool, initial: int = 0) -> Any:
    """Return tqdm's bar on stderr; it is disabled if `quiet` or if stderr is no terminal."""
    from tqdm import tqdm

    disable = True if quiet else None  # None: tqdm shows a bar only in a terminal
    return tqdm(total=total, unit=unit, initial=initial, leave=False, disable=disable)


def say(bar: Any, line: str) -> None:
    """Print a line above the bar."""
    with bar.external_write_mode():
        print(line, flush=True)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns True once Ctrl-C was pressed; a second Ctrl-C raises."""
    pressed = False

    def note(_signal: int, _frame: FrameType | None) -> None:
        nonlocal pressed
        if pressed:
            raise KeyboardInterrupt
        pressed = True

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, previous)

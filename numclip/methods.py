"""The update kernels that an optimizer can name: the states and the numbers of each.

An engine has a kernel for each; a new one needs a row here, a formula, and a kernel in an engine.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

from numclip import formulas
from numclip.errors import expected

SETTINGS_COLUMNS = 5
"""The columns of the user's settings for a step, a table with a row for each pool."""

STATES = {"descend": 0, "descend_with_momentum": 1, "adam": 2}
"""How many states of a parameter each kernel reads and writes: the first of an optimizer's."""

MOST_STATES = 2  # tables of updates have columns for so many


def check(kernel: str, states: Sequence[str], kernels: Collection[str], device: str) -> None:
    """Refuse, with a ValueError, a kernel that an engine does not have, or has no states for."""
    if kernel not in kernels:
        wanted = f"one of {', '.join(map(repr, kernels))}, which device={device!r} has"
        raise ValueError(expected("kernel", wanted, repr(kernel)))
    least = STATES[kernel]
    if not least <= len(states) <= MOST_STATES:
        wanted = f"from {least} to {MOST_STATES} names for the kernel {kernel!r}"
        raise ValueError(expected("state_names", wanted, repr(tuple(states))))


def numbers(kernel: str, settings: Sequence[float], count: int) -> Sequence[float]:
    """Return the numbers that a kernel takes in the `count`-th step, from the user's settings."""
    if kernel == "adam":
        lr, decay, first, second, eps = settings
        return formulas.adam_numbers(lr, decay, first, second, eps, float(count))
    return settings

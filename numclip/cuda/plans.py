"""Plans that are kept: gradients at the same addresses as before find theirs again."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

PLANS = 32
"""How many plans are kept, at most."""

MOST_BYTES = 1 << 28
"""How many bytes of the GPU's memory the kept plans of units may hold, but for one alone."""

_plans: OrderedDict[Any, tuple[Any, list[Any]]] = OrderedDict()


def find(key: Any) -> tuple[Any, list[Any]] | None:
    """Return the plan of a key and its free memory for outcomes, None where there is none."""
    found = _plans.get(key)
    if found is not None:
        with contextlib.suppress(KeyError):  # another thread can have let it go by now
            _plans.move_to_end(key)
    return found


def keep(key: Any, found: tuple[Any, list[Any]]) -> None:
    """Keep a plan as the one used last, and forget the one not used for longest."""
    _plans.pop(key, None)
    _plans[key] = found
    while len(_plans) > PLANS or (len(_plans) > 1 and _nbytes() > MOST_BYTES):
        _plans.popitem(last=False)


def kept(key: Any, make: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Return the plan of a key, made where there is none, and its free memory for outcomes."""
    found = find(key)
    if found is None:
        found = make(), []
        keep(key, found)
    return found


def _nbytes() -> int:
    return sum(getattr(plan, "nbytes", 0) for plan, _ in _plans.values())

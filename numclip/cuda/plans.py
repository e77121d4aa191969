"""The cache of plans: gradients at the same addresses as before use their plan again."""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

PLANS = 32
"""How many plans are kept, at most."""

MOST_BYTES = 1 << 28
"""How many bytes of GPU memory the kept plans of units may hold; a single one may hold more."""

_plans: OrderedDict[Any, tuple[Any, list[Any]]] = OrderedDict()


def find(key: Any) -> tuple[Any, list[Any]] | None:
    """Return (plan, free outcomes) kept under a key, or None."""
    found = _plans.get(key)
    if found is not None:
        with contextlib.suppress(KeyError):  # another thread can have removed it by now
            _plans.move_to_end(key)
    return found


def keep(key: Any, found: tuple[Any, list[Any]]) -> None:
    """Keep (plan, free outcomes) as the last used; over a limit, drop the least recently used."""
    _plans.pop(key, None)
    _plans[key] = found
    while len(_plans) > PLANS or (len(_plans) > 1 and _nbytes() > MOST_BYTES):
        _plans.popitem(last=False)


def kept(key: Any, make: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Return (plan, free outcomes) of a key; if none are kept, call `make` and keep its plan."""
    found = find(key)
    if found is None:
        found = make(), []
        keep(key, found)
    return found


def _nbytes() -> int:
    return sum(getattr(plan, "nbytes", 0) for plan, _ in _plans.values())

"""Plans that are kept: gradients at the same addresses as before find theirs again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

PLANS = 32
"""How many plans are kept."""

_plans: OrderedDict[Any, tuple[Any, list[Any]]] = OrderedDict()


def kept(key: Any, make: Callable[[], Any]) -> tuple[Any, list[Any]]:
    """Return the plan of a key, made where there is none, and its free memory for outcomes."""
    if key not in _plans:
        _plans[key] = make(), []
        while len(_plans) > PLANS:
            _plans.popitem(last=False)
    _plans.move_to_end(key)
    return _plans[key]

"""Checks of a rule's scope, order and bound: a rule that no clipper supports is refused."""

from __future__ import annotations

from typing import Any

SCOPES = "element", "unit", "tensor", "group"


def check(rule: Any) -> None:
    """Refuse, with a ValueError, a rule that no clipper supports."""
    scope, wanted = rule.scope, None
    if scope not in SCOPES:
        wanted = f"a scope of {', '.join(map(repr, SCOPES))}"
    elif rule.follows_norms and scope not in ("tensor", "group"):
        wanted = "the scope 'tensor' or 'group' where the bound follows the norms"
    elif rule.follows_norms and (rule.ord != 2.0 or rule.shared is not None):
        wanted = "ord=2 and a norm that is not shared where the bound follows the norms"
    elif rule.shared is not None and scope != "group":
        wanted = "the scope 'group' where a norm is shared"
    elif rule.floor is not None and (scope != "unit" or rule.ord != 2.0):
        wanted = "the scope 'unit' and ord=2 where the bound is relative to parameters"
    elif scope == "element" and rule.ord != 2.0:
        wanted = "ord=2 where elements are held between bounds"
    elif scope in ("element", "unit") and rule.divisor(2) != 1.0:
        wanted = "a divisor of 1 where a norm is not of a tensor or a group"
    if wanted is not None:
        raise ValueError(f"clip: expected {wanted}, got {rule!r} of the scope {scope!r}")

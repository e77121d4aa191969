"""The types of arguments that compiled code takes, and the errors for others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from numba import types
from numba.core.errors import TypingError

ELEMENTS = (types.float32, types.float64, types.complex64, types.complex128)
CONTAINERS = (types.List, types.ListType)
TUPLES = (types.BaseTuple, types.LiteralList)


def refuse(name: str, wanted: str, got: Any) -> TypingError:
    """Return the error for an argument of a type that is not taken."""
    return TypingError(f"numclip in compiled code: {name}: expected {wanted}, got {got}")


def is_nothing(kind: Any) -> bool:
    """Tell whether an argument is left out or None."""
    if isinstance(kind, types.Omitted):
        return kind.value is None
    return kind is None or isinstance(kind, types.NoneType)


def value_of(kind: Any) -> Any:
    """Return the value of a literal or a default; raise ValueError if a type has none."""
    if isinstance(kind, types.Omitted):
        return kind.value
    if isinstance(kind, types.BaseTuple):
        return tuple(value_of(part) for part in kind)
    if isinstance(kind, types.NoneType):
        return None
    if isinstance(kind, types.Literal):
        return kind.literal_value
    if not isinstance(kind, types.Type):
        return kind
    raise ValueError(kind)


def check_number(name: str, kind: Any) -> None:
    """Refuse a type that is no real number, nor a 0-d array of one."""
    known = types.unliteral(kind)
    if isinstance(known, types.Array) and known.ndim == 0:
        known = known.dtype
    if not isinstance(known, (types.Integer, types.Float)):
        raise refuse(name, "a real number", kind)


def check_bound(name: str, kind: Any) -> bool:
    """Return True for an array with axes and False for a real number; refuse other types."""
    if isinstance(kind, types.Array) and isinstance(kind.dtype, (types.Integer, types.Float)):
        return kind.ndim > 0
    check_number(name, kind)
    return False


def require_two(order: Any, where: str) -> None:
    """Refuse an order other than 2, which compiled code does not take there."""
    wanted = f"2 {where}"
    try:
        given = value_of(order)
    except ValueError:
        raise refuse("ord", wanted, order) from None
    if given != 2:
        raise refuse("ord", wanted, given)


def check_order(kind: Any, gradients: Sequence[Any]) -> None:
    """Refuse an order that is no number, and others than 2 for complex gradients."""
    if isinstance(kind, types.Type) and not isinstance(kind, types.Omitted):
        check_number("ord", kind)
    if any(isinstance(part.dtype, types.Complex) for part in gradients):
        require_two(kind, "for complex gradients (other orders are taken outside compiled code)")


def choice(name: str, kind: Any, allowed: Sequence[str]) -> str:
    """Return the word of a literal argument; refuse others than those in `allowed`."""
    words = ", ".join(repr(word) for word in allowed)
    try:
        word = value_of(kind)
    except ValueError:
        raise refuse(name, f"one of {words}, written in the call", kind) from None
    if word not in allowed:
        raise refuse(name, f"one of {words}", repr(word))
    return str(word)


def check_gradient(name: str, kind: Any) -> None:
    """Refuse a type that is no array of a gradient dtype."""
    if not isinstance(kind, types.Array) or kind.dtype not in ELEMENTS:
        names = ", ".join(str(element) for element in ELEMENTS)
        raise refuse(name, f"an array of {names}", kind)


def members(name: str, kind: Any) -> list[Any]:
    """Return the types of the gradients in a tuple or list, without None."""
    if isinstance(kind, CONTAINERS):
        check_gradient(f"every entry of {name}", kind.dtype)
        return [kind.dtype]
    if not isinstance(kind, TUPLES):
        advice = "; pass a single gradient as (gradient,)" if isinstance(kind, types.Array) else ""
        raise refuse(name, "a tuple, list or typed list of arrays", f"{kind}{advice}")
    found = [(k, part) for k, part in enumerate(kind) if not isinstance(part, types.NoneType)]
    for k, part in found:
        check_gradient(f"{name}[{k}]", part)
    return [part for _, part in found]


def check_out(name: str, kind: Any, grads: Any, gradients: Sequence[Any]) -> bool:
    """Tell whether to work in place; refuse an `out` of another type or of read-only arrays."""
    if is_nothing(kind):
        return False
    if kind != grads:
        wanted = f"{name} itself, to work in place, or None"
        raise refuse("out", wanted, kind)
    for part in gradients:
        if not part.mutable:
            raise refuse("out", "arrays that can be written", f"read-only {part}")
    return True

"""Arguments other than gradients: numbers, orders, axes, choices; checked, as Python objects."""

from __future__ import annotations

import contextlib
import math
import numbers
import operator
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from numclip import libraries
from numclip.dtypes import lookup
from numclip.errors import expected
from numclip.formulas import MOST_ORDER, capped_order

POLICIES = ("propagate", "raise", "skip", "zero")
DUPLICATES = ("sum", "raw")
_NUMBERS = (float, int, np.float64)
LARGEST = float(np.finfo(np.float64).max)


def real(name: str, value: Any) -> float:
    """Return a real number, or a 0-d array of one, as a float."""
    if type(value) is float:
        return value
    if not isinstance(value, (np.ndarray, np.generic, int)):
        view = libraries.as_numpy(name, value)
        value = value if view is None else view
    known = value
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        real = _are_real(value.dtype) and not np.ma.is_masked(value)
        known = (float(value) if value.dtype.kind == "V" else value.item()) if real else None
    if isinstance(known, (bool, np.bool_)) or not isinstance(known, numbers.Real):
        kind = f"{type(value).__name__} {value!r}"
        raise TypeError(expected(name, "a real number", kind))
    with contextlib.suppress(OverflowError):
        number = float(known)
        if math.isfinite(number) or known != known or abs(known) == math.inf:
            return number
    wanted = "a number in the range of float64"
    raise ValueError(expected(name, wanted, f"one of {len(str(value))} characters"))


def _are_real(dtype: np.dtype[Any]) -> bool:
    """Tell whether the numbers of a dtype are real."""
    row = lookup(dtype)
    return dtype.kind in "iuf" or (row is not None and row.components == 1)


def _broadcasts(own: tuple[int, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether one shape broadcasts to another; `numpy.broadcast_shapes` ends at 32 axes."""
    pairs = zip(reversed(own), reversed(shape), strict=False)
    return len(own) <= len(shape) and all(length in (1, other) for length, other in pairs)


def bound(name: str, value: Any) -> float:
    """Return a bound on a norm: a real number >= 0, infinity included."""
    number = real(name, value)
    if not number >= 0.0:
        raise ValueError(expected(name, "a number >= 0 (inf never clips)", value))
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite real number > 0."""
    number = value if type(value) is float else real(name, value)
    if not 0.0 < number < math.inf:
        raise ValueError(expected(name, "a finite number > 0", value))
    return number


def finite_bound(name: str, value: Any) -> float:
    """Return a finite real number >= 0."""
    number = real(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(expected(name, "a finite number >= 0", value))
    return number


def fractions(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Return `count` numbers in [0, 1)."""
    if not isinstance(values, Sequence) or len(values) != count:
        raise TypeError(expected(name, f"{count} numbers in [0, 1)", repr(values)))
    numbers = tuple(real(f"{name}[{k}]", value) for k, value in enumerate(values))
    if not all(0.0 <= number < 1.0 for number in numbers):
        raise ValueError(expected(name, "numbers in [0, 1)", repr(values)))
    return numbers


def order(value: Any) -> float:
    """Return the order of a norm: a real number >= 1 or infinity."""
    number = real("ord", value)
    if not number >= 1.0:
        raise ValueError(expected("ord", "a number >= 1 or inf", value))
    return capped_order(number)


def given_norm(value: Any) -> float:
    """Return a norm the user has computed: a real number >= 0, infinity or NaN."""
    number = real("use_norm", value)
    if number < 0.0:
        raise ValueError(expected("use_norm", "a norm, which is >= 0", value))
    return number


def choice(name: str, value: Any, allowed: Sequence[str | None]) -> Any:
    """Return `value` if it is one of the allowed words."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(expected(name, f"one of {words}", repr(value)))
    return value


def are_usual(
    ord: Any,
    bound: Any = 0.0,
    nonfinite: Any = POLICIES[0],
    duplicates: Any = DUPLICATES[0],
    norm: Any = None,
) -> bool:
    """Tell whether arguments are valid and of the commonest types; `norm` is `use_norm`."""
    return (
        type(bound) in _NUMBERS
        and (0 <= bound <= LARGEST or bound == math.inf)
        and type(ord) in _NUMBERS
        and (1 <= ord < MOST_ORDER or ord == math.inf)
        and (norm is None or (type(norm) in _NUMBERS and 0 <= norm <= LARGEST))
        and (nonfinite is POLICIES[0] or (type(nonfinite) is str and nonfinite in POLICIES))
        and (duplicates is DUPLICATES[0] or (type(duplicates) is str and duplicates in DUPLICATES))
    )


def value_bounds(low: Any, high: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return both bounds of `clip_by_value`: floats, or arrays if one of them is an array."""
    given = {"clip_value_min": low, "clip_value_max": high}
    for name, value in given.items():
        if isinstance(value, np.ma.MaskedArray):
            got = "a masked array; fill it first with .filled()"
            raise TypeError(expected(name, "real numbers", got))
    bounds = {name: libraries.to_numpy(name, value) for name, value in given.items()}
    if any(value.ndim for value in bounds.values()):
        given = bounds
    else:
        given = {name: real(name, value) for name, value in given.items()}
        bounds = {name: np.asarray(value) for name, value in given.items()}
    for name, value in bounds.items():
        if not _are_real(value.dtype):
            raise TypeError(expected(name, "real numbers", value.dtype))
        if np.isnan(value).any():
            raise ValueError(expected(name, "numbers", "NaN"))
        if not _broadcasts(value.shape, shape):
            wanted = f"a shape that broadcasts to the gradient's {shape}"
            raise ValueError(expected(name, wanted, value.shape))
    if (bounds["clip_value_min"] > bounds["clip_value_max"]).any():
        wanted = f"at most clip_value_max = {high}"
        raise ValueError(expected("clip_value_min", wanted, low))
    low, high = given.values()
    return low, high


def refuse_excluding_zero(low: Any, high: Any) -> None:
    """Refuse bounds that would change the rows, of zeros, that slices do not store."""
    if np.any(np.asarray(low) > 0) or np.any(np.asarray(high) < 0):
        got = f"{low} and {high}"
        raise ValueError(
            expected("clip_value_min, clip_value_max", "bounds that include 0 for slices", got)
        )


def adaptive_axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """Return the reduced axes of `adaptive_clip`: by default all but the last, or the only one."""
    found = axes_of(axes, ndim)
    return tuple(range(max(ndim - 1, min(ndim, 1)))) if found is None else found


def axes_of(axes: Any, ndim: int) -> tuple[int, ...] | None:
    """Return reduced axes in ascending order, None for all of them."""
    if axes is None:
        return None
    if type(axes) is int and 0 <= axes < ndim:
        return (axes,)
    wanted = axes if isinstance(axes, Iterable) and getattr(axes, "ndim", True) else (axes,)
    try:
        found = [axis + ndim if -ndim <= axis < 0 else axis for axis in map(_index, wanted)]
    except TypeError:
        raise TypeError(expected("axes", "integers or None", repr(axes))) from None
    if any(not 0 <= axis < ndim for axis in found) or len(set(found)) < len(found):
        wanted_text = f"different axes of an array of {ndim} dimensions"
        raise ValueError(expected("axes", wanted_text, repr(axes)))
    return tuple(sorted(found))


def _index(value: Any) -> int:
    if isinstance(value, (bool, np.bool_)):
        raise TypeError
    return operator.index(value)


def count(name: str, value: Any, least: int = 1, *, alternative: str = "") -> int:
    """Return an integer of at least `least`; messages also name the `alternative`."""
    wanted = f"an integer >= {least}{alternative}"
    try:
        number = _index(value)
    except TypeError:
        raise TypeError(expected(name, wanted, repr(value))) from None
    if number < least:
        raise ValueError(expected(name, wanted, number))
    return number

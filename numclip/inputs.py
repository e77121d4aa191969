"""The border: what a user passes, checked and described; nothing behind it checks again."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from numclip import foreign
from numclip.dtypes import NAMES, Array, DType, as_stored, lookup, refusal
from numclip.placement import on_device
from numclip.slices import IndexedSlices

Key = int | str
POLICIES = ("propagate", "raise", "skip", "zero")
DUPLICATES = ("sum", "raw")
_NUMBERS = (float, int, np.float64)
LARGEST = float(np.finfo(np.float64).max)


def _expect(name: str, wanted: str, got: Any) -> str:
    return f"{name}: expected {wanted}, got {got}"


def real(name: str, value: Any) -> float:
    """Return a real number, or a 0-d array of one, as a float."""
    if type(value) is float:
        return value
    if not isinstance(value, (np.ndarray, np.generic, int)):
        view = foreign.as_numpy(name, value)
        value = value if view is None else view
    if isinstance(value, (np.ndarray, np.generic)) and value.ndim == 0:
        narrow = value.dtype.kind == "V" and lookup(value.dtype) is not None  # bfloat16
        if value.dtype.kind in "iuf" or narrow:
            value = float(value)
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, numbers.Real):
        kind = f"{type(value).__name__} {value!r}"
        raise TypeError(_expect(name, "a real number", kind))
    try:
        return float(value)
    except OverflowError:
        wanted = "a number in the range of float64"
        raise ValueError(_expect(name, wanted, f"one of {len(str(value))} characters")) from None


def bound(name: str, value: Any) -> float:
    """Return a bound on a norm: a real number >= 0, infinity included."""
    number = real(name, value)
    if not number >= 0.0:
        raise ValueError(_expect(name, "a number >= 0 (inf never clips)", value))
    return number


def positive(name: str, value: Any) -> float:
    """Return a finite real number > 0."""
    number = real(name, value)
    if not 0.0 < number < math.inf:
        raise ValueError(_expect(name, "a finite number > 0", value))
    return number


def finite_bound(name: str, value: Any) -> float:
    """Return a finite real number >= 0."""
    number = real(name, value)
    if not 0.0 <= number < math.inf:
        raise ValueError(_expect(name, "a finite number >= 0", value))
    return number


def fractions(name: str, values: Any, count: int) -> tuple[float, ...]:
    """Return some numbers in [0, 1)."""
    if not isinstance(values, Sequence) or len(values) != count:
        raise TypeError(_expect(name, f"{count} numbers in [0, 1)", repr(values)))
    numbers = tuple(real(f"{name}[{k}]", value) for k, value in enumerate(values))
    if not all(0.0 <= number < 1.0 for number in numbers):
        raise ValueError(_expect(name, "numbers in [0, 1)", repr(values)))
    return numbers


def order(value: Any) -> float:
    """Return the order of a norm: a real number >= 1 or infinity."""
    number = real("ord", value)
    if not number >= 1.0:
        raise ValueError(_expect("ord", "a number >= 1 or inf", value))
    return number


def given_norm(value: Any) -> float:
    """Return a norm the user has computed: a real number >= 0, infinity or NaN."""
    number = real("use_norm", value)
    if number < 0.0:
        raise ValueError(_expect("use_norm", "a norm, which is >= 0", value))
    return number


def choice(name: str, value: Any, allowed: Sequence[str | None]) -> Any:
    """Return one of some words."""
    if not (value is None or isinstance(value, str)) or value not in allowed:
        words = ", ".join(repr(word) for word in allowed)
        raise ValueError(_expect(name, f"one of {words}", repr(value)))
    return value


def are_usual(
    ord: Any, bound: Any = 0.0, nonfinite: Any = POLICIES[0], duplicates: Any = DUPLICATES[0]
) -> bool:
    """Tell whether arguments are right and of the commonest types, with the order 2."""
    return (
        type(bound) in _NUMBERS
        and (0 <= bound <= LARGEST or bound == math.inf)
        and type(ord) in _NUMBERS
        and ord == 2
        and type(nonfinite) is str
        and nonfinite in POLICIES
        and type(duplicates) is str
        and duplicates in DUPLICATES
    )


def value_bounds(low: Any, high: Any, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Return both bounds of `clip_by_value`: floats, or arrays if one of them is an array."""
    given = {"clip_value_min": low, "clip_value_max": high}
    bounds = {name: foreign.to_numpy(name, value) for name, value in given.items()}
    if any(value.ndim for value in bounds.values()):
        given = bounds
    else:
        given = {name: real(name, value) for name, value in given.items()}
        bounds = {name: np.asarray(value) for name, value in given.items()}
    for name, value in bounds.items():
        if value.dtype.kind not in "iuf" and lookup(value.dtype) is None:
            raise TypeError(_expect(name, "real numbers", value.dtype))
        if np.isnan(value).any():
            raise ValueError(_expect(name, "numbers", "NaN"))
        try:
            fits = np.broadcast_shapes(value.shape, shape) == shape
        except ValueError:
            fits = False
        if not fits:
            wanted = f"a shape that broadcasts to the gradient's {shape}"
            raise ValueError(_expect(name, wanted, value.shape))
    if (bounds["clip_value_min"] > bounds["clip_value_max"]).any():
        wanted = f"at most clip_value_max = {high}"
        raise ValueError(_expect("clip_value_min", wanted, low))
    low, high = given.values()
    return low, high


def refuse_excluding_zero(low: Any, high: Any) -> None:
    """Refuse bounds that would change the rows that slices do not store."""
    if np.any(np.asarray(low) > 0) or np.any(np.asarray(high) < 0):
        got = f"{low} and {high}"
        raise ValueError(
            _expect("clip_value_min, clip_value_max", "bounds that include 0 for slices", got)
        )


def check_examples(entries: Sequence[Entry]) -> None:
    """Refuse gradients whose first axes, the examples, differ."""
    for entry in entries:
        if not entry.dense_shape:
            raise ValueError(_expect(entry.name, "examples along axis 0", "a 0-d array"))
        wanted = entries[0].dense_shape[0]
        if entry.dense_shape[0] != wanted:
            text = f"{wanted} examples along axis 0, as in {entries[0].name}"
            raise ValueError(_expect(entry.name, text, entry.dense_shape[0]))


def adaptive_axes(axes: Any, ndim: int) -> tuple[int, ...]:
    """Return the reduced axes of `adaptive_clip`: by default all but the last, or the only one."""
    found = axes_of(axes, ndim)
    return tuple(range(max(ndim - 1, min(ndim, 1)))) if found is None else found


def axes_of(axes: Any, ndim: int) -> tuple[int, ...] | None:
    """Return reduced axes in ascending order, None for all of them."""
    if axes is None:
        return None
    wanted = axes if isinstance(axes, Iterable) and getattr(axes, "ndim", True) else (axes,)
    try:
        found = [axis + ndim if -ndim <= axis < 0 else axis for axis in map(_index, wanted)]
    except TypeError:
        raise TypeError(_expect("axes", "integers or None", repr(axes))) from None
    if any(not 0 <= axis < ndim for axis in found) or len(set(found)) < len(found):
        wanted_text = f"different axes of an array of {ndim} dimensions"
        raise ValueError(_expect("axes", wanted_text, repr(axes)))
    return tuple(sorted(found))


def _index(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return operator.index(value)


def count(name: str, value: Any, least: int = 1, *, alternative: str = "") -> int:
    """Return an integer of at least some size; messages add the `alternative` to it."""
    wanted = f"an integer >= {least}{alternative}"
    try:
        number = _index(value)
    except TypeError:
        raise TypeError(_expect(name, wanted, repr(value))) from None
    if number < least:
        raise ValueError(_expect(name, wanted, number))
    return number


class Entry(NamedTuple):
    """One gradient: its values as the user has them and as contiguous storage.

    `private` says that `flat` is a copy: the values were strided, misaligned or byte-swapped.
    """

    name: str
    key: Key
    dtype: DType
    values: Array
    slices: IndexedSlices | None
    flat: Array
    private: bool

    @property
    def native(self) -> Array:
        """The storage as numbers of the gradient's dtype, 1-d, in the order of memory."""
        return self.flat.view(self.values.dtype.newbyteorder("="))

    @property
    def repeated(self) -> bool:
        """Whether rows of the dense array are stored more than once."""
        return self.slices is not None and self.slices.has_duplicates

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.values.shape if self.slices is None else self.slices.dense_shape

    @property
    def dense_size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.dense_shape)


def flat_view(array: Array) -> Array | None:
    """Return contiguous storage as a 1-d view in the order of memory, None where there is none."""
    flags = array.flags
    if not (flags.aligned and array.dtype.isnative):
        return None
    if flags.c_contiguous:
        return as_stored(array if array.ndim == 1 else array.reshape(-1))
    if flags.f_contiguous:
        return as_stored(array.T.reshape(-1))
    return None


def entry(name: str, key: Key, gradient: Any) -> Entry:
    """Return the description of one gradient."""
    slices = gradient if isinstance(gradient, IndexedSlices) else None
    values = gradient.values if slices is not None else gradient
    if type(values) is not np.ndarray:
        values = as_array(name, values)
    dtype = lookup(values.dtype)
    if dtype is None and values.dtype.kind in "fc":
        dtype = lookup(values.dtype.newbyteorder("="))
    if dtype is None:
        raise TypeError(_expect(name, f"an array of {NAMES}", refusal(values.dtype)))
    flat = flat_view(values)
    if slices is not None and not values.flags.c_contiguous:
        flat = None  # whole rows are needed
    private = flat is None
    if flat is None:
        native = np.array(values, values.dtype.newbyteorder("="), order="C")
        flat = as_stored(native.reshape(-1))
    return Entry(name, key, dtype, values, slices, flat, private)


def as_array(name: str, values: Any) -> Array:
    """Return what is no plain array as one: subclasses, NumPy's scalars, other libraries' arrays.

    Their memory is shared. Masked arrays are refused.
    """
    if isinstance(values, np.ma.MaskedArray):
        advice = "a masked array; fill it first with .filled(0)"
        raise TypeError(_expect(name, "an array", advice))
    if isinstance(values, (np.ndarray, np.floating, np.complexfloating)):
        return np.asarray(values)
    found = foreign.as_numpy(name, values)
    if found is None and on_device(values):
        raise foreign.elsewhere(name, values)
    if found is None:
        kind = f"{type(values).__name__}; {_advice(values)}"
        raise TypeError(_expect(name, "an array or IndexedSlices", kind))
    return found


def _advice(values: Any) -> str:
    """Say how to mend what is no gradient."""
    if isinstance(values, Mapping):
        return "nested structures are not taken: pass one flat list or dict"
    if hasattr(values, "tocsr"):
        return "convert it with numclip.IndexedSlices.from_scipy"
    return "convert it with numpy.asarray"


@dataclass(frozen=True, eq=False)
class Gradients:
    """Several gradients: the entries that are not None, and how to put results in their place."""

    entries: list[Entry]
    items: list[Any]
    keys: list[Key]
    rebuild: Callable[[list[Any]], Any]

    def with_results(self, results: Sequence[Any]) -> Any:
        """Return the user's structure with a result for each entry, None where None was."""
        remaining = iter(results)
        return self.rebuild([None if item is None else next(remaining) for item in self.items])


def structure(
    grads: Any, name: str = "grads"
) -> tuple[list[Key], list[Any], Callable[[list[Any]], Any]]:
    """Return the keys and items of a list, tuple, dict or iterator, and how to make one again."""
    single = isinstance(grads, (IndexedSlices, str, bytes)) or foreign.is_array(grads)
    if single or not isinstance(grads, Iterable):
        advice = f"{type(grads).__name__}; pass a single gradient as [gradient]"
        raise TypeError(_expect(name, "a list, tuple or dict of gradients", advice))
    rebuild: Callable[[list[Any]], Any] = list
    if isinstance(grads, Mapping):
        keys, items = list(grads.keys()), list(grads.values())
        rebuild = lambda results: dict(zip(keys, results, strict=True))  # noqa: E731
    else:
        items = list(grads)
        keys = list(range(len(items)))
        if isinstance(grads, tuple):
            rebuild = getattr(type(grads), "_make", tuple)
    return keys, items, rebuild


def gradients(grads: Any, name: str = "grads") -> Gradients:
    """Return the description of a list, tuple, dict or iterator of gradients."""
    keys, items, rebuild = structure(grads, name)
    entries = [
        entry(f"{name}[{key!r}]", key, item)
        for key, item in zip(keys, items, strict=True)
        if item is not None
    ]
    return Gradients(entries, items, keys, rebuild)


def coalesced(described: Entry, *, wide: bool = False) -> Entry:
    """Return the entry with repeated rows summed, if there are any, in double precision or not."""
    if described.slices is None or not described.repeated:
        return described
    dtype = described.native.dtype
    sums = described.slices.coalesced(np.result_type(dtype, np.float64) if wide else dtype)
    return entry(described.name, described.key, sums)

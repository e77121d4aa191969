"""Oracles in exact or correctly rounded arithmetic: slow, obviously right, independent of numclip.

A sparse gradient is anything with `values`, `indices` and `dense_shape`. Exact sums of squares are
`Fraction`s, so that no statement about a bound depends on rounding, overflow or underflow.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
# Digits of the significand, the hidden one included, by the name of the dtype.
PRECISION = {
    "float16": 11,
    "bfloat16": 8,
    "float32": 24,
    "float64": 53,
    "complex64": 24,
    "complex128": 53,
}
DTYPES = {name: BFLOAT16 if name == "bfloat16" else np.dtype(name) for name in PRECISION}
REAL_DTYPES = {name: dtype for name, dtype in DTYPES.items() if not name.startswith("complex")}


# ---- facts about dtypes


def real_dtype(dtype: Any) -> np.dtype:
    """The dtype of one component."""
    dtype = np.dtype(dtype)
    return np.empty(0, dtype).real.dtype if dtype.kind == "c" else dtype


def float_info(dtype: Any) -> Any:
    return ml_dtypes.finfo(real_dtype(dtype))


def nearest(values: np.ndarray, dtype: Any) -> np.ndarray:
    """Round float64 numbers once, ties to even; ml_dtypes rounds to float32 first."""
    dtype = np.dtype(dtype)
    lowest = round(math.log2(float_info(dtype).smallest_subnormal))
    power = np.maximum(np.frexp(values)[1] - PRECISION[dtype.name], lowest)
    with np.errstate(over="ignore"):
        return np.ldexp(np.rint(np.ldexp(values, -power)), power).astype(dtype)


def unit_roundoff(dtype: Any) -> Fraction:
    return Fraction(1, 2 ** PRECISION[np.dtype(dtype).name])


def roundoff_units(dtypes: Iterable[Any]) -> Fraction:
    """How far, relative to the bound, a clipped norm may fall short of it."""
    names = [np.dtype(dtype).name for dtype in dtypes]
    units = 64 if all(PRECISION[name] == 53 for name in names) else 4
    return units * max(unit_roundoff(name) for name in names)


# ---- exact values


def is_sparse(gradient: Any) -> bool:
    return hasattr(gradient, "dense_shape")


def leaves(grads: Any) -> list[Any]:
    """The gradients of a list, tuple or dict, without the None entries."""
    entries = grads.values() if isinstance(grads, dict) else grads
    return [entry for entry in entries if entry is not None]


def stored(gradient: Any) -> np.ndarray:
    """The array that holds a gradient's numbers."""
    return np.asarray(gradient.values if is_sparse(gradient) else gradient)


def components(array: Any) -> np.ndarray:
    """All real numbers of an array in C order, as float64; a complex one counts as two."""
    flat = np.asarray(array).ravel()
    if flat.dtype.kind == "c":
        flat = np.stack([flat.real, flat.imag], axis=-1).ravel()
    return flat.astype(np.float64)


def all_finite(grads: Any) -> bool:
    return all(bool(np.isfinite(components(stored(g))).all()) for g in leaves(grads))


def summed_rows(slices: Any, *, absolute: bool = False) -> dict[int, list[Fraction]]:
    """The exact sums of the dense array's touched rows by index; of magnitudes if `absolute`."""
    values = np.asarray(slices.values)
    rows: dict[int, list[Fraction]] = {}
    for row, value in zip(np.asarray(slices.indices).tolist(), values, strict=True):
        exact = [Fraction(c) for c in components(value).tolist()]
        exact = [abs(c) for c in exact] if absolute else exact
        rows[row] = [a + b for a, b in zip(rows[row], exact, strict=True)] if row in rows else exact
    return rows


def densify(slices: Any) -> np.ndarray:
    """The dense array, each exact sum rounded to float64 (complex128)."""
    values = np.asarray(slices.values)
    wide = np.complex128 if values.dtype.kind == "c" else np.float64
    dense = np.zeros(slices.dense_shape, wide)
    for row, exact in summed_rows(slices).items():
        rounded = np.array([float(c) for c in exact], np.float64)
        dense[row] = rounded.view(wide).reshape(values.shape[1:])
    return dense


def dense_squares(slices: Any, *, absolute: bool = False) -> np.ndarray:
    """The exact |x|^2 of every element of the dense array."""
    shape = tuple(slices.dense_shape)
    squares = np.full(shape, Fraction(0), object)
    parts = 2 if np.asarray(slices.values).dtype.kind == "c" else 1
    for row, exact in summed_rows(slices, absolute=absolute).items():
        elements = [sum(c * c for c in exact[i : i + parts]) for i in range(0, len(exact), parts)]
        squares[row] = np.array(elements, object).reshape(shape[1:])
    return squares


def array_square_sum(array: Any) -> Fraction:
    mantissas, exponents = np.frexp(components(array))
    integers = np.ldexp(mantissas, 53).astype(np.int64)
    lowest = int(exponents.min(initial=1024, where=integers != 0))
    shifts = np.where(integers, exponents - lowest, 0).tolist()
    total = sum((m << shift) ** 2 for m, shift in zip(integers.tolist(), shifts, strict=True))
    return times_power(total, 2 * (lowest - 53))


def times_power(value: int, exponent: int) -> Fraction:
    """value * 2**exponent"""
    if exponent >= 0:
        return Fraction(value << exponent)
    return Fraction(value, 1 << -exponent)


def rows_square_sum(rows: dict[int, list[Fraction]]) -> Fraction:
    return sum((c * c for row in rows.values() for c in row), Fraction(0))


def square_sum(grads: Any, duplicates: str = "sum") -> Fraction:
    """The exact sum of |x|^2 over finite gradients; repeated rows summed first if "sum"."""
    total = Fraction(0)
    for gradient in leaves(grads):
        if is_sparse(gradient) and duplicates == "sum":
            total += rows_square_sum(summed_rows(gradient))
        else:
            total += array_square_sum(stored(gradient))
    return total


def uncancelled_square_sum(grads: Any) -> Fraction:
    """What the sum of squares would be if no repeated rows cancelled."""
    total = Fraction(0)
    for gradient in leaves(grads):
        if is_sparse(gradient):
            total += rows_square_sum(summed_rows(gradient, absolute=True))
        else:
            total += array_square_sum(gradient)
    return total


# ---- norms


def to_float(value: Fraction) -> float:
    """Round to the nearest float; return inf beyond the range."""
    try:
        return value.numerator / value.denominator
    except OverflowError:
        return math.inf


def root(square: Fraction) -> float:
    """The square root, correctly rounded to float64, whatever the size of the square."""
    if square == 0:
        return 0.0
    # Shifted by 2 * shift bits, the square has an integer root of 120 bits or more.
    shift = max(0, 120 + (square.denominator.bit_length() - square.numerator.bit_length()) // 2)
    scaled, remainder = divmod(square.numerator << (2 * shift), square.denominator)
    digits = math.isqrt(scaled)
    inexact = remainder != 0 or digits * digits != scaled
    # A last bit of 1 stands for a cut-off remainder, so that the next rounding is correct.
    return to_float(Fraction(2 * digits + inexact, 2 ** (shift + 1)))


def moduli(gradient: Any, duplicates: str) -> Iterator[Decimal]:
    """|x| of every element, to the precision of the current decimal context."""
    array = stored(gradient)
    if is_sparse(gradient) and duplicates == "sum":
        exact = [c for row in summed_rows(gradient).values() for c in row]
    else:
        exact = [Fraction(c) for c in components(array).tolist()]
    numbers = [Decimal(c.numerator) / Decimal(c.denominator) for c in exact]
    if array.dtype.kind != "c":
        yield from map(abs, numbers)
    else:
        for re, im in zip(numbers[::2], numbers[1::2], strict=True):
            yield (re * re + im * im).sqrt()


def norm(grads: Any, ord: float = 2, duplicates: str = "sum") -> float:
    """The norm of all gradients as one vector, rounded to float64."""
    parts = [components(stored(g)) for g in leaves(grads)]
    if any(np.isnan(part).any() for part in parts):
        return math.nan
    if any(np.isinf(part).any() for part in parts):
        return math.inf
    if ord == 2:
        return root(square_sum(grads, duplicates))
    with localcontext() as context:
        context.prec = 60
        numbers = [m for g in leaves(grads) for m in moduli(g, duplicates)]
        if ord == math.inf:
            return float(max(numbers, default=Decimal(0)))
        exponent = Decimal(ord)
        total = sum((m**exponent for m in numbers if m), Decimal(0))
        return float(total ** (1 / exponent)) if total else 0.0


def ulp(size: float, precision: int) -> Fraction:
    """The spacing of floats of `precision` bits at `size`; inf counts as 2**1024."""
    exponent = 1025 if math.isinf(size) else max(math.frexp(size)[1], -1021)
    return Fraction(2) ** (exponent - precision)


def norm_within(measured: float, square: Fraction, slack: Fraction) -> bool:
    """Whether a measured norm is within `slack` of the root of `square`."""
    if math.isinf(measured):
        return root(square) == math.inf
    if math.isnan(measured):
        return False
    low, high = max(Fraction(measured) - slack, Fraction(0)), Fraction(measured) + slack
    return low * low <= square <= high * high


def ulp_distance(a: Any, b: Any) -> np.ndarray:
    """The number of ulp steps from a to b in their common real dtype, element by element."""

    def ordered(array: Any) -> np.ndarray:
        array = np.ascontiguousarray(array)
        bits = array.view(f"i{array.dtype.itemsize}").astype(object)
        lowest = -(2 ** (8 * array.dtype.itemsize - 1))
        return np.where(bits < 0, lowest - bits, bits)

    return abs(ordered(a) - ordered(b))


# ---- clips, in float64 or complex128


def wide(array: Any) -> np.ndarray:
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def clip_to(grads: Sequence[Any], squared_bound: Fraction) -> list[np.ndarray]:
    """Dense gradients times the one factor that clips their norm; all NaN if one is non-finite."""
    if not all_finite(grads):
        nan = complex(math.nan, math.nan)
        return [wide(g) * 0 + (nan if wide(g).dtype.kind == "c" else nan.real) for g in grads]
    square = square_sum(grads)
    factor = 1.0 if square <= squared_bound else root(squared_bound / square)
    return [wide(g) * factor for g in grads]


def units(shape: tuple[int, ...], axes: Any) -> list[tuple[Any, ...]]:
    """Indices of the parts that have a norm of their own when `axes` are reduced."""
    if axes is None:
        return [(...,)]
    axes = [axes] if isinstance(axes, int) else axes
    reduced = {axis % len(shape) for axis in axes}
    kept = [1 if axis in reduced else length for axis, length in enumerate(shape)]
    return [
        tuple(slice(None) if axis in reduced else i for axis, i in enumerate(index))
        for index in np.ndindex(*kept)
    ]


def clip_by_value(grad: Any, low: Any, high: Any) -> np.ndarray:
    low, high = (np.asarray(bound).astype(grad.dtype) for bound in (low, high))
    return np.maximum(np.minimum(grad, high), low)


def clip_by_norm(grad: Any, clip_norm: float, axes: Any = None) -> np.ndarray:
    result = wide(grad)
    for unit in units(grad.shape, axes):
        result[unit] = clip_to([grad[unit]], Fraction(clip_norm) ** 2)[0]
    return result


def average_norm_bound(grad: Any, clip_norm: float) -> Fraction:
    """The square of the norm at which norm / size reaches clip_norm."""
    return (Fraction(clip_norm) * math.prod(np.shape(grad))) ** 2


def block_rms_bound(grad: Any, threshold: float) -> Fraction:
    return Fraction(threshold) ** 2 * math.prod(np.shape(grad))


def adaptive_bound(param_unit: Any, clip_factor: float, eps: float) -> Fraction:
    return Fraction(clip_factor) ** 2 * max(array_square_sum(param_unit), Fraction(eps) ** 2)


def adaptive_axes(shape: tuple[int, ...], axes: Any = None) -> Any:
    """The reduced axes: those given, or all but the last; None means the whole array."""
    return axes if axes is not None else (tuple(range(len(shape) - 1)) or None)


def clip_by_average_norm(grad: Any, clip_norm: float) -> np.ndarray:
    return clip_to([grad], average_norm_bound(grad, clip_norm))[0]


def clip_by_block_rms(grad: Any, threshold: float) -> np.ndarray:
    return clip_to([grad], block_rms_bound(grad, threshold))[0]


def adaptive_clip(
    grad: Any, param: Any, clip_factor: float = 0.01, eps: float = 1e-3, axes: Any = None
) -> np.ndarray:
    result = wide(grad)
    for unit in units(grad.shape, adaptive_axes(grad.shape, axes)):
        bound = adaptive_bound(param[unit], clip_factor, eps)
        result[unit] = clip_to([grad[unit]], bound)[0]
    return result


def clip_by_global_norm(grads: Sequence[Any], clip_norm: float) -> list[np.ndarray]:
    return clip_to(grads, Fraction(clip_norm) ** 2)


def layer_bounds(grads: Sequence[Any], clip_norm: float, layerwise: str) -> list[Fraction]:
    """The square of each layer's share of the bound."""
    sizes = [math.prod(g.shape[1:]) for g in grads]
    square = Fraction(clip_norm) ** 2
    if layerwise == "uniform":
        return [square / len(grads) for _ in grads]
    return [square * Fraction(size, sum(sizes)) for size in sizes]


def clip_per_example(
    grads: Sequence[Any], clip_norm: float, layerwise: str | None = None
) -> tuple[list[np.ndarray], Any]:
    """Sums over axis 0 of the clipped examples, and how many were clipped."""
    if layerwise is None:
        groups, bounds = [list(range(len(grads)))], [Fraction(clip_norm) ** 2]
    else:
        groups, bounds = [[k] for k in range(len(grads))], layer_bounds(grads, clip_norm, layerwise)
    sums = [np.zeros_like(wide(g[0])) for g in grads]
    counts = [0 for _ in groups]
    for example in range(len(grads[0])):
        for which, (group, bound) in enumerate(zip(groups, bounds, strict=True)):
            members = [grads[k][example] for k in group]
            counts[which] += square_sum(members) > bound
            for k, clipped in zip(group, clip_to(members, bound), strict=True):
                sums[k] = sums[k] + clipped
    return sums, counts[0] if layerwise is None else counts

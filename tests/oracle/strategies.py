"""Hypothesis strategies for gradients and bounds."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

import numclip as nc
from tests.oracle import reference
from tests.oracle.reference import DTYPES


def drawn(*strategies: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Like hypothesis.given, for a test of a target: run `target.examples` examples.

    The strategies give the last arguments of the test; the others are `target` and pytest's
    parameters.
    """

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(test)
        own = list(signature.parameters.values())[: -len(strategies)]
        names = list(signature.parameters)[-len(strategies) :]

        @functools.wraps(test)
        def for_every_example(target: Any, **fixed: Any) -> None:
            def example(values: Any) -> None:
                test(target=target, **fixed, **dict(zip(names, values, strict=True)))

            example.__name__ = test.__name__  # seeds the random numbers
            settings(max_examples=target.examples)(given(st.tuples(*strategies))(example))()

        for_every_example.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
        for_every_example.is_property = True  # type: ignore[attr-defined]
        return for_every_example

    return decorate


names = st.sampled_from(sorted(DTYPES))
seeds = st.integers(0, 2**32 - 1)


def from_bits(rng: np.random.Generator, size: int, dtype: np.dtype) -> np.ndarray:
    """Floats of random bits, so of every magnitude alike, subnormals included; 1 if non-finite."""
    real = reference.real_dtype(dtype)
    count = size * dtype.itemsize // real.itemsize
    values = rng.integers(0, 256, (count, real.itemsize), np.uint8).view(real).reshape(count)
    with np.errstate(invalid="ignore"):  # signalling NaNs
        finite = np.isfinite(values.astype(np.float64))
    values = np.where(finite, values, np.ones((), real))
    return np.ascontiguousarray(values).view(dtype)


def in_band(
    rng: np.random.Generator, size: int, dtype: np.dtype, exponent: int, width: int
) -> np.ndarray:
    """Floats whose binary exponents lie within a band; overflow is clamped to the largest."""
    info = reference.float_info(dtype)
    real = reference.real_dtype(dtype)
    count = size * dtype.itemsize // real.itemsize
    mantissas = rng.uniform(1, 2, count) * rng.choice([-1.0, 1.0], count)
    with np.errstate(over="ignore", under="ignore"):
        values = np.ldexp(mantissas, exponent + rng.integers(0, width + 1, count))
        values = np.clip(values, -float(info.max), float(info.max)).astype(real)
    return values.view(dtype)


@st.composite
def arrays(draw: st.DrawFn, name: str | None = None, *, wild: bool = True, most: int = 40) -> Any:
    """A 1-d gradient: random bits, or a band of exponents, or a few chosen numbers."""
    dtype = DTYPES[draw(names) if name is None else name]
    info = reference.float_info(dtype)
    kind = draw(st.sampled_from(["band", "bits", "chosen"] if wild else ["band"]))
    if kind == "chosen":
        real = reference.real_dtype(dtype)
        chosen = [0.0, -0.0, 1.0, -1.0, float(info.max), float(info.tiny)]
        chosen += [float(info.smallest_subnormal), 1 + float(info.eps), 1 - float(info.eps) / 2]
        per_element = dtype.itemsize // real.itemsize
        numbers = draw(st.lists(st.sampled_from(chosen), max_size=8))
        return np.array(numbers * per_element).astype(real).view(dtype)
    rng = np.random.default_rng(draw(seeds))
    size = draw(st.integers(0, most))
    if kind == "bits":
        return from_bits(rng, size, dtype)
    lowest, highest = (math.frexp(float(x))[1] for x in (info.smallest_subnormal, info.max))
    if not wild:  # far enough from both ends for no result to be subnormal and no norm infinite
        lowest, highest = lowest // 3, highest // 3
    exponent = draw(st.integers(lowest, highest))
    return in_band(rng, size, dtype, exponent, draw(st.sampled_from([0, 1, 4, 30 if wild else 4])))


def lists(*, wild: bool = True) -> Any:
    return st.lists(arrays(wild=wild), min_size=1, max_size=4)


@st.composite
def sparse(draw: st.DrawFn, *, wild: bool = True) -> Any:
    """IndexedSlices with repeated rows; sometimes a row and its negative, which cancel."""
    flat = draw(arrays(wild=wild, most=36))
    columns = draw(st.sampled_from([1, 3]))
    rows = flat.size // columns
    values = flat[: rows * columns].reshape(rows, columns)
    indices = np.array(draw(st.lists(st.integers(0, 5), min_size=rows, max_size=rows)), np.int64)
    if rows > 2 and draw(st.booleans()):
        values[1] = -values[0]
        indices[1] = indices[0]
    return nc.IndexedSlices(values, indices, (6, columns))


@st.composite
def bounds(draw: st.DrawFn, norm: float) -> float:
    """Bounds near the norm, far from it on both sides, and at the ends of float64."""
    largest = 1.7976931348623157e308
    ratio = draw(
        st.sampled_from(
            [1.0, 1 - 2**-53, 1 + 2**-52, 1 - 2**-24, 0.999, 0.5, 1 / 3, 1e-3, 1e-9, 2.0]
        )
        | st.floats(0.01, 1.0)
    )
    fixed = draw(st.sampled_from([None, None, None, 5e-324, 1e-310, 1e-45, 1e-40, 1e-8, 1.0, 1e30]))
    return min(fixed or norm * ratio, largest)

"""The parts of every kind of measured work: its bound, its ways, its exact result."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

# A call returns the arrays it made or changed, and the norm (or the count) it found.
Call = Callable[[], tuple[Any, Any]]
FALL = 1 - 1e-4


class Bound:
    """Twice the norm; or half of it, falling by each call, so that clipped arrays clip again."""

    def __init__(self, norm: float, clips: bool) -> None:
        self.clips = clips
        self.value, self._fall = (norm / 2, FALL) if clips else (norm * 2, 1.0)

    def __call__(self, _step: int = 0) -> float:
        self.value *= self._fall
        return self.value


@dataclass(frozen=True)
class Workload:
    """One kind of work, and the ways to do it.

    `norm` returns the number that sets the bounds. `exact` returns the float64 results and the
    norm for a bound. `ways` maps a name to a function of the data and a bound; it returns a call
    that does not modify the data. `passes` are the least passes over the bytes: where nothing is
    clipped, and where something is. `arrays` returns the arrays in a call's results; `follows`
    says that they are proportional to the bound.
    """

    exact: Callable[[Any, float], tuple[Iterable[np.ndarray], float]]
    ways: dict[str, Callable[[Any, Bound], Call]]
    passes: tuple[int, int]
    norm: Callable[[Any], float] = lambda data: norm_of(data)
    arrays: Callable[[Any], Iterable[Any]] = lambda results: results
    follows: bool = True


def library(name: str) -> Any:
    """Import a peer without the warnings of its import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return importlib.import_module(name)


def copied(arrays: Iterable[np.ndarray]) -> list[np.ndarray]:
    return [array.copy() for array in arrays]


def norm_of(arrays: Iterable[np.ndarray]) -> float:
    """Return the L2 norm of all arrays, in float64."""
    wide = (array.reshape(-1).astype(np.float64) for array in arrays)
    return float(np.sqrt(sum(np.dot(x, x) for x in wide)))


def error_of(results: Iterable[Any], exact: Iterable[np.ndarray]) -> float:
    """Return the relative error of results in the L2 norm."""
    off = norm = 0.0
    for result, right in zip(results, exact, strict=True):
        off = np.hypot(off, norm_of([np.asarray(result) - right]))
        norm = np.hypot(norm, norm_of([right]))
    return float(off / norm)

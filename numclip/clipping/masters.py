"""Float32 masters of 16-bit parameters: optimizers update masters, models read rounded ones."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from numclip.dtypes import Array, DType, lookup
from numclip.engine import Engine, HalfCopies

Rows = Mapping[str, Array | None]
"""The indices of some rows of some parameters, None for all rows of one."""


class _Pair(NamedTuple):
    """The addresses of a parameter and its master; `length` is the size of a row."""

    dtype: DType
    param: int
    master: int
    size: int
    length: int


class Masters:
    """The masters of some parameters.

    A value that is written to a parameter is found by comparing it with its rounded master.
    """

    def __init__(
        self, params: Mapping[str, Any], arrays: Mapping[str, Any], engine: Engine, stream: Any
    ) -> None:
        """Make `arrays`, zero before, the masters of the parameters of the same names."""
        self.arrays, self._engine = arrays, engine
        self._pairs = {name: _pair_of(params[name], own, engine) for name, own in arrays.items()}
        self._all = engine.half_copies(_runs(self._pairs.values()), stream)
        self.take_over(stream)

    def take_over(self, stream: Any, rows: Rows | None = None) -> None:
        """Copy values written to parameters to their masters, at all or some rows."""
        self._copies(rows, stream).take_over(stream)

    def round(self, stream: Any, rows: Rows | None = None) -> None:
        """Set parameters to their masters, rounded to nearest even, at all or some rows."""
        self._copies(rows, stream).round_all(stream)

    def _copies(self, rows: Rows | None, stream: Any) -> HalfCopies:
        if rows is None:
            return self._all
        found: dict[DType, list[Array]] = {}
        for name, indices in rows.items():
            pair = self._pairs.get(name)
            if pair is not None:
                found.setdefault(pair.dtype, []).append(_table(pair, indices))
        tables = {dtype: np.concatenate(own) for dtype, own in found.items()}
        return self._engine.half_copies(tables, stream)


def _pair_of(param: Any, master: Any, engine: Engine) -> _Pair:
    own, wide = engine.facts("param", param), engine.facts("master", master)
    dtype = lookup(own.native)
    assert dtype is not None
    return _Pair(dtype, own.address, wide.address, param.size, math.prod(own.shape[1:]))


def _table(pair: _Pair, indices: Array | None) -> Array:
    """Return a table for `Engine.half_copies` of rows of a parameter, or of all of it."""
    if indices is None:
        return np.array([pair[1:4]], np.int64)
    table = np.empty((indices.size, 3), np.int64)
    table[:, 0] = pair.param + 2 * pair.length * indices
    table[:, 1] = pair.master + 4 * pair.length * indices
    table[:, 2] = pair.length
    return table


def _runs(pairs: Iterable[_Pair]) -> dict[DType, Array]:
    """Return tables like that of `_table` by dtype; adjacent parameters make one row."""
    found: dict[DType, list[list[int]]] = {}
    for pair in pairs:
        rows = found.setdefault(pair.dtype, [[pair.param, pair.master, 0]])
        param, master, size = rows[-1]
        if pair[1:3] == (param + 2 * size, master + 4 * size):
            rows[-1][2] += pair.size
        else:
            rows.append(list(pair[1:4]))
    return {dtype: np.array(rows, np.int64) for dtype, rows in found.items()}

"""Clipping part by part: by units of an array (its reduced axes), and by examples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from numclip.clipping import Factors, apply, decide
from numclip.dtypes import FLOAT64, Array, as_stored
from numclip.inputs import Entry
from numclip.isolation import isolated
from numclip.kernels import backend, formulas
from numclip.kernels.backend import Batch
from numclip.measuring import HEADROOM, Norms, may_overflow, norms_of, over_power
from numclip.outputs import Place


@dataclass(frozen=True, eq=False)
class Units:
    """An array cut into units: ``stored[outer, :, inner]``, or ``stored[unit]`` as rows.

    Rows serve every operation. Reduced axes in the middle or in front can be summed where
    they stand, column by column; what that cannot do is done on transposed copies.
    """

    entry: Entry
    axes: tuple[int, ...]
    unrounded: Entry | None = None  # what is measured, where the entry holds rounded sums

    @property
    def kept(self) -> tuple[int, ...]:
        """The axes that tell the units apart."""
        return tuple(k for k in range(self.entry.values.ndim) if k not in self.axes)

    @property
    def count(self) -> int:
        """How many units there are."""
        return math.prod(self.entry.values.shape[k] for k in self.kept)

    @property
    def size(self) -> int:
        """How many elements a unit has."""
        return math.prod(self.entry.values.shape[k] for k in self.axes)

    def _contiguous(self) -> Array:
        """Return the values in C order, the user's own where they are so."""
        values = self.entry.values
        if self.entry.private or values.flags.c_contiguous:
            return self.entry.native.reshape(values.shape)
        return np.ascontiguousarray(values)

    def rows(self) -> Array:
        """Return contiguous rows, a unit each: the values themselves or a transposed copy."""
        values = self._contiguous().transpose(*self.kept, *self.axes)
        return np.ascontiguousarray(values).reshape(self.count, self.size)

    def columns(self) -> Array | None:
        """Return the storage as (outer, reduced, inner) where the axes lie so, else None."""
        if not self.axes:
            return None
        first, last = self.axes[0], self.axes[-1]
        if last - first + 1 != len(self.axes) or last == self.entry.values.ndim - 1:
            return None
        values = self._contiguous()
        shape = values.shape
        outer, inner = math.prod(shape[:first]), math.prod(shape[last + 1 :])
        return as_stored(values.reshape(outer, self.size, inner))

    def norms(self, ord: float = 2.0) -> Norms:
        """Return the norm of each unit."""
        if self.unrounded is not None:
            norms = Units(self.unrounded, self.axes).norms(ord)
            return norms._replace(spread=2.0 * norms.spread)  # the sums are rounded once more
        if ord == 2.0 and (columns := self.columns()) is not None:
            totals = backend.column_squares(columns)
            totals = totals.reshape(self.count, self.entry.dtype.components).sum(axis=1)
            if self.entry.dtype.digits < 53 or backend.is_safe(totals).all():
                zeros = np.zeros(self.count, np.int64)
                return Norms(np.sqrt(totals), zeros, np.ones(self.count))
        rows, shift = self.rows(), 0
        dtype, stored = self.entry.dtype, as_stored(rows.reshape(-1))
        if ord != 2.0 and dtype.components == 2:
            shift = HEADROOM if may_overflow(self.entry, summed=False) else 0
            dtype, stored = FLOAT64, np.abs(over_power(rows, shift)).reshape(-1)
        batch = backend.rows_of(dtype, stored, stored, self.count)
        norms = norms_of([batch], np.arange(self.count), self.count, ord)
        return norms._replace(exponents=norms.exponents + shift)

    def decide(self, norms: Norms, bound: float, ord: float) -> Factors:
        """Return the factors that hold the norms of the units to a bound."""
        ones = formulas.root(float(self.size), ord)
        return decide(norms, np.full(self.count, bound), [self.entry.dtype], ones)

    def decide_relative(self, norms: Norms, params: Units, factor: float, eps: float) -> Factors:
        """Return those that hold the norm of each to `factor` times the parameters' or `eps`.

        Ratios of norms are compared, as a product of both could be subnormal, and coarse.
        """
        measured = params.norms()
        scales, exponents, _ = measured
        small = measured.values() < eps
        floor, floor_exponent = math.frexp(eps)
        scales = np.where(small, floor, scales)
        exponents = np.where(small, floor_exponent, exponents)
        bounds = np.where((scales == 0.0) & (factor < math.inf), 0.0, factor)
        scales = np.where(scales == 0.0, 1.0, scales)
        with np.errstate(over="ignore", under="ignore"):  # then the grain is too coarse, or 0
            ones = np.ldexp(math.sqrt(self.size) / scales, -exponents.astype(np.intc))
        ratios = norms.divided(scales, exponents)
        return decide(ratios, bounds, [self.entry.dtype], ones)

    def write(self, place: Place, factors: Factors) -> bool:
        """Write each unit times its factor; tell whether one changed anything."""
        if not factors.active:
            if not place.in_place:
                place.array[...] = self.entry.values
            return False
        columns = self.columns()
        if columns is None or factors.truncate:
            self._scale_rows(place, factors)
        else:
            self._scale_columns(place, columns, factors)
        return True

    def _scale_rows(self, place: Place, factors: Factors) -> None:
        rows = self.rows()
        stored = as_stored(rows.reshape(-1))
        writes = place.array.flags.c_contiguous and not place.staged
        direct = writes and self.kept + self.axes == tuple(range(place.array.ndim))
        target = place.flat if direct else stored
        if not direct and np.may_share_memory(stored, self.entry.values):
            target = np.empty_like(stored)
        apply([backend.rows_of(self.entry.dtype, stored, target, self.count)], factors)
        if not direct:
            shape = [place.array.shape[k] for k in (*self.kept, *self.axes)]
            result = target.view(rows.dtype).reshape(shape)
            place.array[...] = result.transpose(np.argsort((*self.kept, *self.axes)))

    def _scale_columns(self, place: Place, columns: Array, factors: Factors) -> None:
        direct = place.array.flags.c_contiguous and not place.staged
        target = place.flat.reshape(columns.shape) if direct else np.empty_like(columns)
        values = factors.values(self.entry.dtype)
        values = np.repeat(values, self.entry.dtype.components)  # both parts of a complex number
        backend.scale_columns(columns, values.reshape(columns.shape[0], -1), target)
        if not direct:
            dtype = self.entry.native.dtype
            place.array[...] = target.view(dtype).reshape(place.array.shape)


class Layer(Protocol):
    """The gradients of one layer, whose first axis is the example."""

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape."""


@np.errstate(invalid="ignore")  # an infinite bound on no elements
def example_bounds(layers: Sequence[Layer], clip_norm: float, layerwise: str | None) -> Array:
    """Return the bound on an example's norm, or with `layerwise` that of each layer."""
    sizes = np.array([math.prod(layer.dense_shape[1:]) for layer in layers], np.float64)
    shares: Array = {
        None: np.ones(1),
        "uniform": np.full(len(layers), 1.0 / math.sqrt(len(layers))),
        "proportional": np.sqrt(sizes / max(sizes.sum(), 1.0)),
    }[layerwise]
    return np.where(np.isinf(clip_norm), np.inf, clip_norm * shares)


@isolated
def clip_examples(
    entries: Sequence[Entry], clip_norm: float, layerwise: str | None
) -> tuple[list[Array], list[int]]:
    """Return the sums over examples of clipped gradients, and how many were clipped.

    One number for all gradients, or with `layerwise` one for each. Reads everything twice.
    """
    stored = [_by_example(entry) for entry in entries]
    examples = entries[0].dense_shape[0]
    layers = np.arange(len(entries)) if layerwise else np.zeros(len(entries), np.int64)
    layer_bounds = example_bounds(entries, clip_norm, layerwise)
    tensors: list[Batch] = []
    groups: list[Array] = []
    for (rows, positions), entry, layer in zip(stored, entries, layers, strict=True):
        flat = rows.reshape(-1)
        batch = backend.rows_of(entry.dtype, flat, flat, positions.size)
        tensors.append(batch._replace(places=batch.places + sum(part.size for part in groups)))
        groups.append(layer * examples + positions)
    bounds = np.repeat(layer_bounds, examples)
    norms = norms_of(tensors, np.concatenate(groups), bounds.size, 2.0)
    factors = decide(norms, bounds, [FLOAT64], 1.0)
    weights = factors.values(FLOAT64).reshape(layer_bounds.size, examples)
    sums = []
    for (rows, positions), entry, layer in zip(stored, entries, layers, strict=True):
        out = np.empty(entry.dense_shape[1:], entry.native.dtype)
        backend.sum_examples(rows, weights[layer, positions], as_stored(out.reshape(-1)))
        sums.append(out)
    clipped = (norms.values() > bounds).reshape(weights.shape).sum(axis=1)
    return sums, [int(number) for number in clipped]


def _by_example(entry: Entry) -> tuple[Array, Array]:
    """Return the storage as a row for each example that has one, and the examples' numbers."""
    values = entry.values
    if entry.private:
        values = entry.native.reshape(values.shape)
    values = np.ascontiguousarray(values)
    positions = np.arange(values.shape[0])
    if entry.slices is not None:
        positions = np.asarray(entry.slices.indices, np.int64)
    rows = values.reshape(positions.size, math.prod(entry.dense_shape[1:]))
    return as_stored(rows), positions

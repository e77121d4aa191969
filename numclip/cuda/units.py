"""Operations of the GPU on arrays with units: their tables, scratch memory, launches."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip import tables
from numclip.cuda import device, memory
from numclip.cuda.kernels import units
from numclip.cuda.kernels.tiles import ALL_BITS
from numclip.cuda.plan import HostTable
from numclip.cuda.strided import Tiles, bits_of
from numclip.cuda.work import Shared, measure
from numclip.dtypes import Array
from numclip.law import Family, unit_laws

PARTS = 8
"""How many partial sums of a unit one thread adds up, where a unit has so many."""


class UnitPlan:
    """What the kernels need to measure and scale the units of some families.

    A plan is made once and used for many steps. `changes` alone waits for the GPU; only new laws
    and summary tables are sent over the bus. `units` has the decision for each unit, in the order
    of families. That takes 56 bytes a unit, or 80 for orders other than 2, and 24 for each of its
    partial sums: `nbytes` in all.
    Threads that share a plan hold `lock` from writing the law to the last launch.
    """

    def __init__(self, families: Sequence[Family], ord: float, stream: Any) -> None:
        self.families, self._ord = list(families), ord
        self.lock = threading.RLock()
        arrays = [array for family in families for array in family.arrays]
        params = [family.param for family in families if family.param is not None]
        measured = [array for family in families for array in family.measured or family.arrays]
        self._works = Tiles(dict(enumerate(measured))), Tiles(dict(enumerate(params, len(arrays))))
        counts = np.concatenate([work.counts for work in self._works])
        tensors = _tensor_table(self.families, counts)
        for work, rows in zip(self._works, np.split(tensors, [len(arrays)]), strict=True):
            work.send(rows[:, tables.FIRST], stream)
        self._written = self._works[0]
        if measured != arrays:
            self._written = Tiles(dict(enumerate(arrays)))
            self._written.send(np.zeros(len(arrays), np.int64), stream)
        slabs, families_of = _slabs(_family_table(self.families), tensors)
        self._slabs, self._families = (memory.table(t, stream) for t in (slabs, families_of))
        self._summed = memory.table(np.zeros((len(slabs), tables.SUM_COLUMNS)), stream)
        self._arrived = memory.table(np.zeros(len(families), np.uint32), stream)
        partial = memory.scratch((max(int(counts.sum()), 1), 3), stream)
        self.shared = Shared(memory.table(tensors, stream), partial)
        count = sum(family.units for family in families) + 1
        columns = tables.PEAK if ord == 2.0 else tables.UNIT_COLUMNS
        self.units = memory.scratch((count, columns), stream)
        self.nbytes = 8 * (partial.size + self.units.size)
        self._tickets = memory.table(np.zeros(3, np.uint32), stream)
        self._unskipped = memory.table(np.zeros((1, tables.DECISION_COLUMNS)), stream)
        self._laws = HostTable((len(families), tables.LAW_COLUMNS), stream)

    def write_laws(self, bound: Any, stream: Any, eps: Any = 0.0, unscale: float = 1.0) -> None:
        """Set the bounds of the following decisions, one for all or one for each family.

        For families with a `param`, they bound the ratio to its norm, which counts as `eps` where
        it is smaller: one number for all, or one for each family.
        """
        table = unit_laws(self.families, self._ord, bound, eps, unscale)
        self._laws.write(table, stream)

    def measure(self, stream: Any) -> None:
        """Write the partial sums of gradients and parameters: one read of each, or two."""
        grads, params = self._works
        params.sum(params.kernels.squares, self.shared, stream)
        hypotenuses = any(a.dtype.components == 2 for f in self.families for a in f.arrays)
        inputs = self._ord, self.shared, self.units, self._find, stream
        measure([grads], *inputs, hypotenuses=hypotenuses)

    def _find(self, column: int, stream: Any) -> None:
        """Write the largest of each unit's partial maxima to a column of `units`."""
        tensors, partial = self.shared
        arguments = self._slabs, tensors, self._laws.table, partial, np.int64(column), self.units
        device.launch(units.find_unit_peaks, self._slabs.shape[0], stream, *arguments)

    def decide(self, stream: Any, base: Any = None) -> None:
        """Decide the factor of every unit; `base` are decisions that can skip whole families."""
        base = self._unskipped if base is None else base
        inputs = self._slabs, self.shared.tensors, self._laws.table, self.shared.partial, base
        arguments = *inputs, self._tickets, self.units
        device.launch(units.decide_units, max(self._slabs.shape[0], 1), stream, *arguments)

    def changes(self, stream: Any) -> bool:
        """Tell whether some unit is scaled, after waiting for the decisions."""
        last = memory.read_table(self.units[self.units.shape[0] - 1], stream)
        return bool(last[tables.MODE])

    def scale(self, stream: Any) -> None:
        """Write each unit times its factor; one read, one write, or none."""
        self._written.scale(self.shared, self.units, stream)

    def summary(self, stream: Any) -> Any:
        """Return a table for `summarize` to write."""
        table = np.zeros((len(self.families), 3))
        table[:, tables.LEAST] = 1.0  # of families without units
        return memory.table(table, stream)

    def summarize(self, out: Any, stream: Any) -> None:
        """Write each family's norm after clipping, least factor, and number of clipped units."""
        inputs = self._slabs, self._families, self._laws.table, self.units
        arguments = *inputs, self._arrived, self._summed, out
        device.launch(units.summarize_units, self._slabs.shape[0], stream, *arguments)


def _tensor_table(families: Sequence[Family], counts: Array) -> Array:
    """Return the table of tensors: the arrays of all families, then the parameters."""
    table = np.zeros((len(counts), 4), np.int64)
    table[:, tables.LAST] = np.cumsum(counts)
    table[:, tables.FIRST] = table[:, tables.LAST] - counts
    first, row = 0, 0
    for family in families:
        own = table[first : first + len(family.arrays)]
        own[:, tables.POOL], own[:, tables.ZEROING] = row, family.zeroing
        first, row = first + len(family.arrays), row + family.units
    return table


def _family_table(families: Sequence[Family]) -> Array:
    """Return a row for each family, with the columns of slabs."""
    table = np.zeros((len(families), tables.SLAB_COLUMNS), np.int64)
    first, row, param = 0, 0, sum(len(family.arrays) for family in families)
    for f, family in enumerate(families):
        own = table[f]
        own[tables.FIRST], own[tables.LAST] = first, first + len(family.arrays)
        own[tables.LAW], own[tables.UNITS], own[tables.ROW] = f, family.units, row
        own[tables.PARAM] = -1 if family.param is None else param
        own[tables.BASE] = family.base
        own[tables.PRECISION] = family.digits
        first, row = first + len(family.arrays), row + family.units
        param += family.param is not None
    return table


def _slabs(families: Array, tensors: Array) -> tuple[Array, Array]:
    """Return the table of slabs, and the first and the end of the slabs of each family.

    Slabs have fewer units where a unit has many partial sums.
    """
    counts = tensors[:, tables.LAST] - tensors[:, tables.FIRST]
    slabs = []
    for row in families:
        units = int(row[tables.UNITS])
        own = counts[row[tables.FIRST] : row[tables.LAST]]
        parts = int(own.max(initial=0)) // max(units, 1)
        bits = max(ALL_BITS - bits_of(-(-parts // PARTS)), 0)
        own = np.repeat(row[None], -(-units >> bits), axis=0)
        own[:, tables.NUMBER] = np.arange(len(own)) << bits
        own[:, tables.COUNT] = np.minimum(1 << bits, units - own[:, tables.NUMBER])
        own[:, tables.BITS] = bits
        slabs.append(own)
    ends = np.cumsum([len(own) for own in slabs])
    return np.concatenate(slabs), np.stack([ends - [len(own) for own in slabs], ends], axis=1)

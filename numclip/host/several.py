"""Clips and steps of few bytes of several dtypes: one native call measures, another writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.dtypes import FLOAT64, Array
from numclip.host.at_once import point
from numclip.host.batches import Batch
from numclip.host.given import Given
from numclip.host.kernels import cpu, given, several
from numclip.host.runtime import threads
from numclip.host.runtime.threads import Call

SETTLES = {
    "descend": several.settle_descent,
    "descend_with_momentum": several.settle_descent,
    "adam": several.settle_adam,
}


class SeveralClips:
    """Clips batches of several dtypes in place, see `host.at_once.ClipsAtOnce`."""

    def __init__(self, batches: Sequence[Batch], tables: dict[int, Array]) -> None:
        self._words, self._unscale = np.zeros(several.WORDS, np.int64), np.ones(1)
        self._bounds = np.zeros(len(tables[given.POOLS]))
        self._held = [*tables.values()]
        self._batches = [(batch, batch.chunks.copy()) for batch in batches]
        self._own = [np.zeros((given.TABLES, 3), np.int64) for _ in batches]
        for own, (_, chunks) in zip(self._own, self._batches, strict=True):
            for k, table in {given.CHUNKS: chunks, **tables}.items():
                point(own, k, table)
        self._outcomes: Sequence[Array] = ()
        self._measure, self._write = map(threads.kept, (self._measuring(), self._writing()))

    def _each(self, kernel: Any) -> list[Call]:
        """Return the calls of a kernel, one for each dtype."""
        return [
            Call(kernel, 1, batch.nbytes, (self._words, own, self._bounds, batch.dtype.like))
            for (batch, _), own in zip(self._batches, self._own, strict=True)
        ]

    def _measuring(self) -> list[Call]:
        return [*self._each(several.measure), self._deciding]

    @property
    def _deciding(self) -> Call:
        any_like = FLOAT64.like  # no element is read: one specialisation serves all dtypes
        arguments = self._words, self._unscale, self._own[0], self._bounds, any_like
        return Call(several.decide, 1, 0, arguments)

    def _writing(self) -> list[Call]:
        return [self._deciding, *self._each(several.scale)]

    def _turn_to(self, slot: int, unscale: float, bounds: Array, outcomes: Sequence[Array]) -> None:
        """Set the arguments of the next calls: bounds, loss scale and the tables they write to."""
        if outcomes is not self._outcomes:
            self._outcomes = ()  # until all is done: an interrupt may come in between
            for own in self._own:
                point(own, given.SUMS, outcomes[0][0])
                point(own, given.DECISIONS, outcomes[1][0])
            self._outcomes = outcomes
        self._words[:] = slot, 1, 0
        self._unscale[0], self._bounds[:] = unscale, bounds

    def _found(self, _items: Any) -> bool:
        """Find the gradients; return True if all are as wanted, which the batches' own are."""
        return True

    def measure(
        self, items: Any, slot: int, unscale: float, bounds: Array, outcomes: Sequence[Array]
    ) -> bool:
        """Measure and decide, without writing; return False if this needs another path."""
        if not self._found(items):
            return False
        self._turn_to(slot, unscale, bounds, outcomes)
        self._measure()
        return bool(self._words[several.RIGHT])

    def take(
        self,
        items: Any,
        slot: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Array],
        measures: bool = True,
    ) -> bool:
        """Clip, or step; without `measures`, by the sums of the call before."""
        if not measures:
            self._turn_to(slot, unscale, bounds, outcomes)
        elif not self.measure(items, slot, unscale, bounds, outcomes):
            return False
        self._write()
        return bool(self._words[several.RIGHT])


class SeveralSteps(SeveralClips):
    """Takes steps of batches of several dtypes, see `host.at_once.StepsAtOnce`.

    `own` has (pieces, factors, settings) of each batch; pieces are the chunks to update.
    """

    def __init__(
        self,
        kernel: tuple[str, Any],
        batches: Sequence[Batch],
        starts: Array,
        reader: Given,
        tables: dict[int, Array],
        own: Sequence[tuple[Array, Array, Array]],
    ) -> None:
        self._kernel, self._reader, self._updated = kernel, reader, own
        self._starts, self._addresses = starts, starts.copy()
        self._left = starts.copy()
        super().__init__(batches, tables)

    def _measuring(self) -> list[Call]:
        calls = []
        tables = zip(self._own, self._batches, self._updated, strict=True)
        for words, (batch, chunks), (pieces, _, settings) in tables:
            distances = chunks[:, cpu.SOURCE] - self._starts[chunks[:, cpu.OWNER]]
            made = {
                given.DISTANCES: distances,
                given.LENGTHS: chunks[:, cpu.LENGTH].copy(),
                given.PIECES: pieces,
                given.SETTINGS: settings,
                given.ADDRESSES: self._addresses,
            }
            self._held += made.values()
            for k, table in made.items():
                point(words, k, table)
            calls.append(Call(several.locate, 1, batch.nbytes, (words,)))
        return [*calls, *super()._measuring()]

    def _writing(self) -> list[Call]:
        name, update = self._kernel
        every = list(zip(self._batches, self._own, self._updated, strict=True))
        settles = [
            Call(SETTLES[name], 1, 0, (self._words, words, self._bounds, factors))
            for _, words, (_, factors, _) in every
        ]
        uncounts = Call(several.uncount, 1, 0, (self._words, self._own[0], self._updated[0][1]))
        writes = [
            Call(update, len(pieces), batch.nbytes, (pieces, factors, settings, batch.dtype.like))
            for (batch, _), _, (pieces, factors, settings) in every
        ]
        return [self._deciding, *settles, uncounts, *writes]

    def leave(self, numbers: Sequence[int]) -> None:
        """Let exactly the tensors `numbers` have no gradient in the next step of own gradients."""
        self._left[:] = self._starts
        self._left[numbers] = given.ABSENT

    def _found(self, items: Any) -> bool:
        if items is None:
            self._addresses[:] = self._left
        elif self._reader.read(items):
            self._addresses[:] = self._reader.addresses
        else:
            return False
        return True

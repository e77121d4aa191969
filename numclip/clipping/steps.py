"""The steps of groups: each reads, decides, writes; what it has found is kept until it is told.

What clippers find stays where the engine put it, in blocks of memory for some steps each. A block
that is full is handed over: it is brought to the host without waiting for it, and becomes rows of
the history when the next one is full, or earlier for whoever asks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from numclip.clipping.kinds import clippers
from numclip.clipping.nonfinite import first_error
from numclip.clipping.outcome import GroupOutcome, Outcome, Read
from numclip.dtypes import Array
from numclip.engine import Engine

KEPT = 64
"""How many steps a block has memory for."""


class Block:
    """What clippers found in some steps, one after another.

    `turns` are the steps; `told` of them have become rows of the history.
    """

    def __init__(self, clippers: Sequence[Any], engine: Engine, stream: Any) -> None:
        self.clippers, self._engine, self.stream = clippers, engine, stream
        self.turns: list[Turn] = []
        self.told = 0
        self._tables = [clipper.tables for clipper in clippers]
        self._readers: list[list[Any]] | None = None

    def hand_over(self) -> None:
        """Begin to bring the tables to the host; clippers go on with free ones."""
        pairs = [
            [self._engine.hand_over(table, self.stream) for table in own] for own in self._tables
        ]
        self._readers = [[read for read, _ in own] for own in pairs]
        for clipper, own in zip(self.clippers, pairs, strict=True):
            clipper.tables = [table for _, table in own]

    @cached_property
    def _handed(self) -> list[list[Array]]:
        """The tables in the host's memory, after waiting for them."""
        assert self._readers is not None
        return [[read() for read in own] for own in self._readers]

    def _read(self, k: int, first: int, last: int) -> list[Array]:
        """Return the rows of some steps of a clipper's tables."""
        if self._readers is not None:
            return [table[first:last] for table in self._handed[k]]
        return [self._engine.read(table[first:last], self.stream) for table in self._tables[k]]

    def outcome(self, turns: Sequence[Turn], first: int) -> Outcome:
        """Return what became of the groups in some turns, after waiting for it."""
        last = first + len(turns)
        unscale = np.array([turn.unscale for turn in turns])
        found: dict[str, GroupOutcome] = {}
        for k, clipper in enumerate(self.clippers):
            bounds = np.stack([turn.bounds[k] for turn in turns])
            read = Read(self._read(k, first, last), bounds, unscale)
            for group in clipper.groups:
                found[group.name] = GroupOutcome(clipper, group, read)
        return Outcome([found[name] for name in self._names], unscale)

    @cached_property
    def _names(self) -> list[str]:
        """The names of the groups, in the order that the user gave them."""
        groups = [group for clipper in self.clippers for group in clipper.groups]
        return [group.name for group in sorted(groups, key=lambda group: group.number)]


class Turn:
    """One step: its number, the bounds of each clipper's pools, and where its outcome is."""

    __slots__ = ("_outcome", "block", "bounds", "counts", "place", "step", "unscale")

    def __init__(self, block: Block, place: int, step: int, unscale: float) -> None:
        self.block, self.place, self.step, self.unscale = block, place, step, unscale
        self.bounds: list[Array] = []
        self.counts = False
        self._outcome: Outcome | None = None

    @property
    def outcome(self) -> Outcome:
        """What became of the groups, after waiting for it."""
        if self._outcome is None:
            self._outcome = self.block.outcome([self], self.place)
        return self._outcome


class Told(NamedTuple):
    """What became of the groups in some steps that count."""

    steps: Array
    outcome: Outcome
    counts: Array


class Steps:
    """What takes the steps of some groups.

    Attributes
    ----------
    clippers : list of Clipper
        What clips the groups, by the kinds of their rules.
    stream : stream
        Where in order everything is done.
    """

    def __init__(self, groups: Sequence[Any], engine: Engine, stream: Any) -> None:
        self.engine, self.stream = engine, stream
        tensors = sum(len(group.names) for group in groups)
        self._kept = KEPT if engine.name != "cpu" else max(1, min(KEPT, 16384 // tensors))
        self.clippers = clippers(groups, engine, stream, self._kept)
        self._strict = [clipper for clipper in self.clippers if clipper.strict]
        self._following = [clipper for clipper in self.clippers if clipper.follows]
        self._full: Block | None = None
        self._block = Block(self.clippers, engine, stream)

    def decided(self, step: int, unscale: float) -> Turn:
        """Measure and decide; refuse before anything is written."""
        block, stream = self._block, self.stream
        block.stream = stream
        place = min(len(block.turns), self._kept - 1)
        for clipper in self.clippers:
            clipper.obey(step, unscale, stream)
        for clipper in self.clippers:
            clipper.measure(place, stream)
        for clipper in self._strict:
            self._refuse(clipper, place)
        turn = Turn(block, place, step, unscale)
        for clipper in self.clippers:
            clipper.decide(place, step, stream)
            turn.bounds.append(clipper.bounds)
        return turn

    def _refuse(self, clipper: Any, place: int) -> None:
        """Raise the error of the first bad gradient of a group whose policy says so."""
        for group in clipper.refused(place, self.stream):
            raise first_error(group.gradients(), None, self.stream)

    def write(self, turn: Turn) -> None:
        """Write the gradients, clipped."""
        for clipper in self.clippers:
            clipper.write(turn.place, self.stream)

    def preview(self, turn: Turn) -> None:
        """Find out what `write` would make of the norms; the gradients stay as they are."""
        for clipper in self.clippers:
            clipper.preview(turn.place, self.stream)

    def take(self, turn: Turn, *, counts: bool) -> None:
        """Keep a step; if it counts, let the rules that follow norms know, and the history."""
        turn.counts = counts
        if counts:
            for clipper in self._following:
                clipper.observe(turn.place, turn.step, self.stream)
        del self._block.turns[turn.place :]
        self._block.turns.append(turn)

    def full(self) -> bool:
        """Tell whether the block is to be handed over, and can be."""
        full = len(self._block.turns) >= self._kept
        return full and not self.engine.is_capturing(self.stream)

    def turn_over(self) -> Iterator[Told]:
        """Go on with an empty block; yield what the one before that is to tell the history."""
        before, self._full = self._full, self._block
        self._full.hand_over()
        self._block = Block(self.clippers, self.engine, self.stream)
        if before is not None:
            yield from self._told_last(before)

    def told(self) -> Iterator[Told]:
        """Yield what the history does not have yet, after waiting for it."""
        if self._full is not None:
            before, self._full = self._full, None
            yield from self._told_last(before)
        yield from _told(self._block)

    def _told_last(self, block: Block) -> Iterator[Told]:
        yield from _told(block)
        block.turns.clear()  # which refer to it


def _told(block: Block) -> Iterator[Told]:
    """Yield the steps of a block that the history does not have yet, if there are some."""
    first, turns = block.told, block.turns[block.told :]
    block.told += len(turns)
    if any(turn.counts for turn in turns):
        steps = np.array([turn.step for turn in turns])
        counts = np.array([turn.counts for turn in turns])
        yield Told(steps, block.outcome(turns, first), counts)

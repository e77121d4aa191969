"""The steps of groups: each reads, decides, writes; its results are kept for the history.

Results stay in the engine's memory, in blocks of some steps each. A full block is handed over: its
copy to the host starts without waiting, and becomes rows of the history when the next block is
full, or earlier when the history is read.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.border.gradients import Gradient
from numclip.clipping.kinds import clippers
from numclip.clipping.nonfinite import first_error
from numclip.clipping.outcome import Members, Outcome, Read
from numclip.clipping.ranks import Ranks
from numclip.dtypes import Array
from numclip.engine import AtOnce, Engine
from numclip.engine import Outcome as EngineOutcome
from numclip.host.runtime import threads
from numclip.views import view_of

KEPT = 1024
"""The number of steps in a block; fewer where they would take more than `MOST_BYTES`.

Handing a block over takes 0.3 ms, which is 0.3 us for each of 1024 steps.
"""

NOBODY: frozenset[str] = frozenset()

MOST_BYTES = 3 << 20
"""The bytes of a block's tables at most, if one step takes no more. Reports keep blocks alive."""


class Block:
    """The results of clippers in consecutive steps.

    `stretches` cover `size` steps, each up to where the next one begins; the first `flushed` of
    them are rows of the history already. The next step may extend the stretch `open`, if not None.
    """

    def __init__(self, members: Members, engine: Engine, stream: Any) -> None:
        self.members, self.clippers = members, members.clippers
        self._engine, self.stream = engine, stream
        self.stretches: list[Stretch] = []
        self.size = self.flushed = 0
        self.open: Stretch | None = None
        self._tables = [clipper.tables for clipper in self.clippers]
        self._readers: list[list[Any]] | None = None
        self._decisions = self._tables[0][1]

    def hand_over(self) -> None:
        """Start to copy the tables to the host, and give the clippers free ones."""
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

    def _read(self, k: int, at: Any) -> list[Array]:
        """Return some rows of a clipper's tables."""
        if self._readers is not None:
            return [table[at] for table in self._handed[k]]
        return [self._engine.read(table[at], self.stream) for table in self._tables[k]]

    def decided(self, turn: Turn, column: int) -> float:
        """Return a column of the first decision in one step, after waiting for it."""
        if self._readers is not None:
            return self._handed[0][1].item(turn.slot, 0, column)  # type: ignore[no-any-return]
        row = self._engine.read(self._decisions[turn.slot], self.stream)
        return row.item(0, column)  # type: ignore[no-any-return]

    def outcome_of(self, turn: Turn) -> Outcome:
        """Return the groups' outcome in one step, after waiting for it."""
        own = turn.stretch
        reads = [
            Read(self._read(k, turn.slot), bounds, own.unscale, own.merged and own.merged[k])
            for k, bounds in enumerate(own.bounds)
        ]
        return Outcome(self.members, reads, own.unscale)

    def pending(self) -> Iterator[Recorded]:
        """Yield the steps that the history does not have yet, if there are some."""
        self.open = None
        new = self.stretches[self.flushed :]
        lengths = np.diff([*[own.first for own in new], self.size])
        pairs = zip(new, lengths.tolist(), strict=True)
        for _, alike in itertools.groupby(pairs, key=lambda pair: pair[0].merged is None):
            found, counts = zip(*alike, strict=True)
            if any(counts) and any(own.counts for own in found):
                yield self._recorded(found, counts)
            self.flushed += len(found)

    def _recorded(self, stretches: Sequence[Stretch], lengths: Sequence[int]) -> Recorded:
        """Return the groups' outcome in consecutive stretches."""
        first, count = stretches[0].first, sum(lengths)
        at = slice(first, first + count)
        unscale = np.repeat([own.unscale for own in stretches], lengths)
        reads = [
            Read(
                self._read(k, at),
                _repeated([own.bounds[k] for own in stretches], lengths),
                unscale,
                _repeated([own.merged[k] for own in stretches], lengths)
                if stretches[0].merged
                else None,
            )
            for k in range(len(self.clippers))
        ]
        steps = np.repeat([own.ahead for own in stretches], lengths)
        counts = np.repeat([own.counts for own in stretches], lengths)
        outcome = Outcome(self.members, reads, unscale)
        return Recorded(steps + np.arange(first, first + count), outcome, counts)


def _repeated(arrays: Sequence[Array], lengths: Sequence[int]) -> Array:
    """Return arrays of one shape stacked, each repeated as often as `lengths` says."""
    every = np.concatenate(arrays).reshape(len(arrays), *arrays[0].shape)  # faster than np.stack
    return np.repeat(every, lengths, axis=0)


class Stretch:
    """Consecutive steps that differ in nothing but their numbers.

    Attributes
    ----------
    block, first : Block, int
        The block of their outcomes, and the row of the first one in it.
    ahead : int
        The number of a step minus its row in the block.
    bounds : list of array
        The bounds of each clipper's pools.
    unscale : float
        The loss scale that gradients were divided by.
    counts : bool
        Whether the history, and the rules that follow norms, take them up.
    merged : list of array or None
        The sums over all ranks that reports use, if these have decided together.
    """

    __slots__ = ("ahead", "block", "bounds", "counts", "first", "merged", "unscale")

    def __init__(
        self,
        block: Block,
        first: int,
        ahead: int,
        bounds: list[Array],
        unscale: float,
        counts: bool,
    ) -> None:
        self.block, self.first, self.ahead, self.bounds = block, first, ahead, bounds
        self.unscale, self.counts = unscale, counts
        self.merged: Any = None


class Turn:
    """One step: its stretch, and the row of its outcome in the block."""

    __slots__ = ("slot", "stretch")

    def __init__(self, stretch: Stretch, slot: int) -> None:
        self.stretch, self.slot = stretch, slot

    @property
    def step(self) -> int:
        """The step's number."""
        return self.slot + self.stretch.ahead

    def decide_by(self, bounds: list[Array], merged: list[Any] | None = None) -> None:
        """Set other bounds, or the sums over all ranks, in a stretch that begins at this step."""
        own = self.stretch
        if own.first != self.slot:
            kept = own.unscale, own.counts
            own = self.stretch = Stretch(own.block, self.slot, own.ahead, bounds, *kept)
        own.bounds, own.merged = bounds, merged

    def outcome(self) -> Outcome:
        """Return the groups' outcome, after waiting for it."""
        return self.stretch.block.outcome_of(self)


class Recorded(NamedTuple):
    """The numbers of some steps, the groups' outcome in them, and which of them count."""

    steps: Array
    outcome: Outcome
    counts: Array


class Steps:
    """Takes the steps of some groups.

    Attributes
    ----------
    clippers : list of Clipper
        The clippers of the groups, one for each kind of rule.
    stream : stream
        The stream that all work is submitted to.
    follows : bool
        Whether some rules follow the norms.
    absent : frozenset of str
        The parameters that the last step has left out.
    """

    def __init__(self, groups: Sequence[Any], engine: Engine, stream: Any) -> None:
        self.engine, self.stream = engine, stream
        self._sources: Mapping[str, int] | None = None  # the addresses gradients are read at
        self.clippers = clippers(groups, engine, stream)
        nbytes = sum(clipper.nbytes for clipper in self.clippers)
        self._kept = max(1, min(KEPT, MOST_BYTES // nbytes))
        for clipper in self.clippers:
            clipper.keep(self._kept, stream)
        self._strict = [clipper for clipper in self.clippers if clipper.strict]
        self._following = [clipper for clipper in self.clippers if clipper.follows]
        self.follows, self.absent = bool(self._following), NOBODY
        self._scheduled = [clipper for clipper in self.clippers if clipper.scheduled]
        self._varies = self.follows or bool(self._scheduled)  # bounds may differ at each step
        self._again = [clipper for clipper in self.clippers if clipper.decides_again]
        self._only = self.clippers[0] if len(self.clippers) == 1 else None
        self._native: AtOnce | None = None  # clips by one call
        if self._only is not None:
            self._native = self._only.at_once()
        self._facts: dict[str, str] = {}  # the same on all ranks; without bounds
        self._facts_of: tuple[str, float] | None = None
        self._slot = 0
        self._full: Block | None = None
        self._members = Members(self.clippers)
        self._block = Block(self._members, engine, stream)

    def taken(self, step: int, unscale: float, *, counts: bool = True) -> Turn:
        """Set the bounds of a step, refusing invalid ones; return the step."""
        for clipper in self._scheduled:
            clipper.take_step(step)
        block, slot = self._block, self._slot
        own, ahead = block.open, step - slot
        if own is None or not (
            own.ahead == ahead and own.unscale == unscale and own.counts is counts
        ):
            if self._only is None:
                bounds = [clipper.bounds for clipper in self.clippers]
            else:
                bounds = [self._only.bounds]
            own = Stretch(block, slot, ahead, bounds, unscale, counts)
        return Turn(own, slot)

    def leave_out(self, absent: frozenset[str]) -> None:
        """Hide some parameters from rules that follow norms in the step that begins."""
        self.absent = absent
        for clipper in self._following:
            clipper.absent = absent

    def decide(self, turn: Turn, ranks: Ranks | None = None, call: str = "") -> None:
        """Measure and decide, with all `ranks` if given; raise before anything is written.

        `call` describes the operation in words, which must be the same on all ranks.
        """
        stream, slot = self.stream, self._slot

        def measure() -> None:
            for clipper in self.clippers:
                clipper.obey(turn.stretch.unscale, stream)
            for clipper in self.clippers:
                clipper.measure(slot, stream, decides=ranks is None)

        self._together(measure, turn, ranks, call)
        for clipper in self._again:
            clipper.decide(turn.step, stream)
        self._block.stream = stream
        if self.follows or ranks is not None:
            merged = None if ranks is None else [clipper.merged for clipper in self.clippers]
            turn.decide_by([clipper.bounds for clipper in self.clippers], merged)

    @property
    def clips_at_once(self) -> bool:
        """Whether one native call clips by norms, and all gradients are dense."""
        sparse = any(group.sparse for clipper in self.clippers for group in clipper.groups)
        return self._native is not None and self.clippers[0].by_norms and not sparse

    def clip_at_once(self, turn: Turn, ranks: Ranks | None, call: str) -> bool:
        """Clip by one native call; return True on success, else no gradient is written.

        With ranks, which must have clipped together before, clip by two calls.
        """
        if self._native is None:
            return False
        if ranks is not None:
            return ranks.clip_at_once(self, turn, lambda: self._to_agree(turn, call))
        return self.clippers[0].take_at_once(self._native, turn, None)

    def written_at_once(self, turn: Turn) -> EngineOutcome | None:
        """Clip likewise if updates need written gradients; return their outcome, or None."""
        only: Any = self._only
        if only is None or not only.writes_all or not self.clip_at_once(turn, None, ""):
            return None
        return only.outcome_after()  # type: ignore[no-any-return]

    def leave(self, turn: Turn, ranks: Ranks | None, call: str) -> list[EngineOutcome]:
        """Return outcomes that leave clipped gradients as they are; raise as `decide` does."""

        def measure() -> None:
            for clipper in self.clippers:
                clipper.leave(self.stream)

        self._together(measure, turn, ranks, call)
        return [clipper.write_left(self.stream) for clipper in self.clippers]

    def _together(
        self, measure: Callable[[], None], turn: Turn, ranks: Ranks | None, call: str
    ) -> None:
        """Measure, with all ranks if given; raise if a gradient is not finite under "raise"."""
        if ranks is not None:
            ranks.decide(self, measure, lambda: self._to_agree(turn, call), self.stream)
            return
        measure()
        for clipper in self._strict:
            self._refuse(clipper)

    def _to_agree(self, turn: Turn, call: str) -> tuple[dict[str, str], int]:
        """Return the facts of a step that must be the same on all ranks, and its number."""
        if self._facts_of != (call, turn.stretch.unscale):
            self._facts_of = call, turn.stretch.unscale
            self._facts = {"call": call, "unscale": repr(turn.stretch.unscale)}
        if not self._scheduled:
            return self._facts, turn.step
        bounds = {}
        for clipper in self._scheduled:
            for name, rule in clipper.rules.items():
                if rule is not None and rule.scheduled:
                    bounds[f"group {name!r}, bound"] = repr(rule.bound(turn.step))
        return {**self._facts, **bounds}, turn.step

    def _refuse(self, clipper: Any) -> None:
        """Raise the error of the first non-finite gradient of a group whose policy is "raise"."""
        for group in clipper.refused(self.stream):
            raise first_error(self.gradients(group), None, self.stream)

    def gradients(self, group: Any) -> list[Gradient]:
        """Return a group's gradients, except absent ones, at the addresses they are read at."""
        every = [self._as_read(own) for own in group.gradients()]
        return [own for own in every if own is not None]

    def _as_read(self, own: Gradient) -> Gradient | None:
        """Return a gradient at the address it was read at; None if it was absent."""
        if self._sources is None:
            return own
        address = self._sources[str(own.key)]
        if not address:
            return None
        memory = own.facts.memory._replace(address=address)
        array = view_of(memory, own.shape, own.native)
        return own._replace(facts=own.facts._replace(address=address, array=array))

    def read_at(self, sources: Mapping[str, int] | None) -> None:
        """Read gradients at other addresses, 0 for absent ones; None is for the groups' own."""
        self._sources = sources
        for clipper in self.clippers:
            own = None if sources is None else [sources[name] for name in clipper.names]
            clipper.plan.read_at(own, self.stream)

    def is_exceptional(self, clipper: Any) -> bool:
        """Tell, after waiting, whether a clipper has tensors that updates cannot scale."""
        return bool(self.engine.read(clipper.found[1], self.stream)[-1, tables.RARE])

    @property
    def writes_all(self) -> bool:
        """Whether there is one clipper only, and updates read gradients that it has written."""
        return self._only is not None and self._only.writes_all

    @property
    def writes_within(self) -> bool:
        """Whether a clipper writes gradients before they are applied."""
        return any(clipper.writes_within for clipper in self.clippers)

    def write(self) -> None:
        """Write the clipped gradients."""
        for clipper in self.clippers:
            clipper.write(self.stream)

    def preview(self) -> None:
        """Find the norms that `write` would lead to; the gradients stay as they are."""
        for clipper in self.clippers:
            clipper.preview(self.stream)

    def take(self, turn: Turn) -> bool:
        """Record a step; if it counts, let the rules that follow norms observe it.

        Return True if the block is full and no graph is being captured: it can be handed over.
        """
        own, block = turn.stretch, self._block
        if self._following and own.counts:
            for clipper in self._following:
                clipper.observe(turn.step, self.stream)
        if own is not block.open:
            block.open = None  # first: after an interrupt the open stretch is never an earlier one
            block.stretches.append(own)
        block.size = size = turn.slot + 1  # unchanged if the last step was captured
        if size < self._kept:
            self._slot = size
            block.open = own if own.merged is None and not self._varies else None
            return False
        self._slot, block.open = self._kept - 1, None
        return not self.engine.is_capturing(self.stream)

    def turn_over(self) -> Iterator[Recorded]:
        """Yield what is left of the block handed over last, then hand over the full one."""
        yield from self._pending_last()
        threads.whole(self._go_on)

    def _go_on(self) -> None:
        """Hand over the full block and begin an empty one; can be repeated after an interrupt."""
        if self._full is None:
            self._full = self._block
        self._full.hand_over()
        self._block, self._slot = Block(self._members, self.engine, self.stream), 0

    def pending(self) -> Iterator[Recorded]:
        """Yield the steps that the history does not have yet, after waiting for them.

        An item counts as flushed when the next one is requested: an interrupt loses nothing.
        """
        yield from self._pending_last()
        yield from self._block.pending()

    def _pending_last(self) -> Iterator[Recorded]:
        """Yield what is left of the block that was handed over last, and release it."""
        block = self._full
        if block is not None:
            yield from block.pending()
            self._full = None
            block.stretches.clear()  # they refer to the block

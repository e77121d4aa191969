"""Clips and updates of parameter groups: which gradients, by which calls, and the step count."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

from numclip.border.communicator import communicator
from numclip.clipping.buffers import GroupState, SparseGroupState
from numclip.clipping.intake import Intake
from numclip.clipping.ranks import Ranks
from numclip.clipping.steps import NOBODY, Recorded, Steps, Turn
from numclip.clipping.updating import GroupUpdater, Method
from numclip.engine import Engine
from numclip.errors import expected
from numclip.isolation import isolated


class Manager:
    """Takes the gradients of some groups, clips them, and updates parameters by them.

    Attributes
    ----------
    groups : dict of str to GroupState
        The groups, in the order that the user gave them.
    intake : Intake
        Copies gradients in.
    stream : stream
        The stream that all work is submitted to.
    step : int
        How many times the gradients were clipped.
    record : function of Recorded
        Receives the outcomes of finished steps.
    """

    def __init__(
        self,
        members: Sequence[Any],
        engine: Engine,
        stream: Any,
        record: Callable[[Recorded], None],
        *,
        copies: bool,
    ) -> None:
        """Copy the parameters of checked groups or, without `copies`, use the user's arrays."""
        self._engine, self.stream, self.record = engine, stream, record
        with engine.on_stream(None) as own:
            self.groups = {
                member.name: (SparseGroupState if member.sparse else GroupState)(
                    member, number, engine, own, self._change, copies=copies
                )
                for number, member in enumerate(members)
            }
        self._lock = threading.RLock()  # threads take their steps one after another
        self._states = tuple(self.groups.values())
        for group in self._states:
            group.neighbours, group.lock = self._states, self._lock
        self.intake = Intake(self._states, engine)
        self._mastered = [group for group in self._states if group.masters]
        self._behind = False  # whether parameters may not be their rounded masters yet
        self._steps: Steps | None = None
        self._ranks: Ranks | None = None
        self._sharded = next((member.name for member in members if member.sharded), None)
        self.step = 0
        self.made_steps()

    def flush(self) -> None:
        """Pass all steps to `record` that it has not had yet, after waiting for them."""
        with self._lock:
            for recorded in self._steps.pending() if self._steps is not None else ():
                self.record(recorded)

    def take_over(self, *, whole: bool = False) -> None:
        """Copy what was written to parameters to masters; if `whole`, all rows of sparse ones."""
        for group in self._mastered:
            if self._behind:  # an update was interrupted
                group.round(self.stream)
            else:
                group.take_over(self.stream, whole=whole)
        self._behind = False

    def restart(self, step: int) -> None:
        """Continue at a step with parameters that were loaded."""
        self._behind, self.step = False, step
        self.take_over(whole=True)
        if self._ranks is not None:
            self._ranks.forget()

    def _round(self) -> None:
        """Set parameters to their rounded masters; sparse ones only at rows with gradients."""
        for group in self._mastered:
            group.round(self.stream, whole=False)
        self._behind = False

    def _change(self) -> None:
        """Drop the clippers, which the next step makes anew: a group's rule or policy was set."""
        self.intake.clipped = None
        self.flush()
        self._steps = None

    def made_steps(self) -> Steps:
        """Return the `Steps` of the groups, made anew after a rule or policy was set."""
        steps = self._steps
        if steps is None:
            with self._engine.on_stream(None) as own:
                steps = self._steps = Steps(self._states, self._engine, own)
            steps.stream = self.stream  # not always the one they were made on
        return steps

    def use_stream(self, stream: Any) -> None:
        """Submit all work to a stream from now on."""
        self.stream = stream
        if self._steps is not None:
            self._steps.stream = stream

    def clip(self, scale: float, apply: bool, grads: Any, ranks: Ranks | None) -> Turn:
        """Clip the gradients over a loss scale, or without `apply` measure them or `grads`."""
        with self._lock:
            if self._mastered:
                self.take_over()
            steps = self.made_steps()
            if grads is not None:
                return self._measured(steps, self.intake.ordered(grads), scale, ranks)
            turn = steps.taken(self.step, scale, counts=apply)
            absent = self.intake.stale()
            if absent or steps.absent:
                self._leave_out(steps, absent)
            call = "" if ranks is None else f"clip(apply={apply}){self._without(absent)}"
            if not (apply and steps.clip_at_once(turn, ranks, call)):
                self._clip_by_parts(steps, turn, call, apply, ranks)
            if apply:
                self.intake.clipped = turn
            if steps.take(turn):
                self._turn_over(steps)
            self.step += apply
            return turn

    @isolated
    def _clip_by_parts(
        self, steps: Steps, turn: Turn, call: str, apply: bool, ranks: Ranks | None
    ) -> None:
        """Measure and decide; then write the gradients or, without `apply`, find the norms."""
        steps.decide(turn, ranks, call)
        if apply:
            steps.write()
        else:
            steps.preview()

    def _without(self, absent: frozenset[str]) -> str:
        """Return words that name the absent parameters that all ranks have, or an empty string."""
        left = absent and sorted(name for name in absent if not self.intake.owner(name).sharded)
        return f" without {left}" if left else ""

    def _leave_out(self, steps: Steps, absent: frozenset[str]) -> None:
        """Leave parameters out of the step that begins: their gradients were applied before."""
        steps.leave_out(absent)
        self._clear(absent)

    def _clear(self, absent: frozenset[str]) -> None:
        """Set gradients that were applied to zero: others may be added to them."""
        for name in absent:
            self.intake.owner(name).clear(name, self.stream)

    @isolated
    def _measured(
        self, steps: Steps, items: tuple[Any, ...], scale: float, ranks: Ranks | None
    ) -> Turn:
        """Return the step of measuring `items`, which replace the groups' gradients meanwhile."""
        turn = steps.taken(self.step, scale, counts=False)
        held = [group.hold(self.stream) for group in self._states]
        try:
            self.intake.put_all(items, self.stream)
            steps.decide(turn, ranks, "clip(apply=False, grads=...)")
            steps.preview()
            if steps.take(turn):
                self._turn_over(steps)
            return turn
        finally:
            for group, own in zip(self._states, held, strict=True):
                group.restore(own, self.stream)

    @isolated
    def _turn_over(self, steps: Steps) -> None:
        """Begin an empty block, and pass the steps of the block before the full one to `record`."""
        for recorded in steps.turn_over():
            self.record(recorded)

    def updater(self, method: Method) -> GroupUpdater:
        """Return a `GroupUpdater` of the parameters for an optimizer's method."""
        return GroupUpdater(self.made_steps(), self._states, method)

    def ranks_of(self, comm: Any) -> Ranks | None:
        """Return the `Ranks` of a communicator; None for None or if it has one rank only."""
        if comm is None:
            if self._sharded is None:
                return None
            raise ValueError(
                "comm: expected the communicator of the ranks that share group "
                f"{self._sharded!r}, got None"
            )
        known = self._ranks
        if known is None or known.communicator.comm is not comm or not comm:
            found = communicator(comm)
            if found is None:
                return None
            if known is None or known.communicator.comm != comm:
                self._ranks = known = Ranks(found)
        return known

    def update(
        self, updater: GroupUpdater, unscale: float, grads: Any = None, ranks: Ranks | None = None
    ) -> Turn:
        """Clip every group and update it at its rate, in one pass more than measuring takes."""
        intake = self.intake
        items = None if grads is None else intake.ordered(grads)
        with self._lock:
            if self._mastered:
                self.take_over()
                self._behind = True
            try:
                steps = self.made_steps()
                if items is None and intake.clipped is not None:
                    return self._update_clipped(updater, steps, intake.clipped, unscale, ranks)
                turn = steps.taken(self.step, unscale)
                settings = updater.settings(self.step)
                absent = NOBODY
                if items is None:
                    absent = intake.stale()
                elif steps.follows:
                    absent = intake.missing(items)
                at_once = ranks is None and updater.step_at_once(
                    steps, turn, settings, items, absent
                )
                if not at_once:
                    self._update(updater, steps, turn, settings, absent, items, ranks)
                elif absent and items is None:
                    self._clear(absent)
                intake.forget(applied=True)
                if steps.take(turn):
                    self._turn_over(steps)
                self.step += 1
                return turn
            finally:
                if self._behind:
                    self._round()

    @isolated
    def _update(
        self,
        updater: GroupUpdater,
        steps: Steps,
        turn: Turn,
        settings: list[list[float]],
        absent: frozenset[str],
        items: tuple[Any, ...] | None,
        ranks: Ranks | None,
    ) -> None:
        """Take a step by the general path."""
        if items is None:
            self._leave_out(steps, absent)
            updater.step(steps, turn, settings, absent, ranks)
            return
        absent = self.intake.missing(items)
        steps.leave_out(absent)

        def copy() -> None:
            self.intake.put_all(items, self.stream)
            for group in self._mastered:
                if group.sparse:
                    group.take_over(self.stream, whole=False)  # the rows are new
            self.intake.clipped = None  # even if an exception follows: the gradients are new

        sources = updater.sources(steps, self.intake.names, items)
        if sources is None:
            copy()
            if ranks is None and updater.step_at_once(steps, turn, settings, None, absent):
                return
        updater.step(steps, turn, settings, absent, ranks, sources, copy)

    @isolated
    def _update_clipped(
        self,
        updater: GroupUpdater,
        steps: Steps,
        turn: Turn,
        unscale: float,
        ranks: Ranks | None,
    ) -> Turn:
        """Update by gradients that `clip` has written; return the step of that clip."""
        if unscale not in (1.0, turn.stretch.unscale):
            own = turn.stretch.unscale
            wanted = f"{own}, by which clip() has divided the gradients, or nothing"
            raise ValueError(expected("unscale", wanted, unscale))
        updater.apply(steps, turn, updater.settings(turn.step), self.intake.stale(), ranks)
        self.intake.forget(applied=True)
        return turn

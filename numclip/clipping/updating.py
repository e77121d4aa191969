"""Updates of the parameters of groups by gradients that are clipped in the same pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from numclip.border.gradients import Gradient
from numclip.clipping.buffers import flat_buffers
from numclip.clipping.clip import row_span
from numclip.clipping.held_rows import rows_of
from numclip.clipping.ranks import Ranks
from numclip.clipping.steps import NOBODY, Steps, Turn
from numclip.dtypes import Array, lookup
from numclip.engine import Engine, Outcome, StepsAtOnce
from numclip.memory import RowSpan, Span
from numclip.methods import SETTINGS_COLUMNS, check
from numclip.slices import Parts

Rounds = list[tuple[Any, frozenset[str]]]
"""Groups to update one after another, None for all, each with the parameters to leave out."""

AT_ONCE: Rounds = [(None, NOBODY)]


class Method(Protocol):
    """The interface of an optimizer."""

    @property
    def kernel(self) -> str:
        """The name of the update kernel."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of each parameter's states."""

    def settings(self, lr: float) -> list[float]:
        """Return the user's settings for a step with a learning rate."""

    def rate(self, own: float | None, number: int) -> float:
        """Return the learning rate at a step, a group's own where there is one."""


class Slots:
    """An optimizer's states for a group, and how often the group was updated.

    `views` has for each parameter the views of its states, 1-d arrays of stored numbers.
    """

    def __init__(self, group: Any, states: int, engine: Engine, stream: Any) -> None:
        self.params = list(group.updated.values())
        self.views: list[list[Any]] = [[] for _ in self.params]
        kinds = {name: _state_like(param) for name, param in group.updated.items()}
        for _ in range(states):
            _, views = flat_buffers(kinds, engine, stream)
            for own, view in zip(self.views, views.values(), strict=True):
                own.append(view)
        self.updates: Any = None
        self.pools = range(0)

    @property
    def steps(self) -> int:
        """How often the group was updated; reading it waits for the engine."""
        return int(self.updates.counts()[self.pools.start])

    @steps.setter
    def steps(self, steps: int) -> None:
        counts = self.updates.counts()
        counts[self.pools.start : self.pools.stop] = steps
        self.updates.set_counts(counts)


def _state_like(param: Any) -> tuple[tuple[int], np.dtype[Any]]:
    """Return the shape and dtype of a parameter's state: stored numbers, 1-d."""
    row = lookup(param.dtype)
    assert row is not None
    return (param.size * row.components,), row.compute


class GroupUpdater:
    """Updates the parameters of groups.

    Attributes
    ----------
    slots : dict of str to Slots
        The states of each group.
    """

    def __init__(self, steps: Steps, groups: Sequence[Any], method: Method) -> None:
        self._method, self._groups = method, groups
        engine = steps.engine
        check(method.kernel, method.state_names, engine.kernels, engine.name)
        states = len(method.state_names)
        with engine.on_stream(None) as stream:
            self.slots = {group.name: Slots(group, states, engine, stream) for group in groups}
            self._attach(steps, stream, {group.name: 0 for group in groups})

    def _attach(self, steps: Steps, stream: Any, counts: Mapping[str, int]) -> None:
        """Make the update tables of the present clippers, which are new after a rule was set."""
        engine, self._updates = steps.engine, []
        for clipper in steps.clippers:
            own = [self.slots[group.name] for group in clipper.groups]
            grads = [grad for group in clipper.groups for grad in group.gradients()]
            params = [param for slots in own for param in slots.params]
            addresses = [engine.facts("param", param).address for param in params]
            spans = [update_span(*pair) for pair in zip(grads, addresses, strict=True)]
            views = [view for slots in own for view in slots.views]
            kept = [
                [engine.facts("state", view[k]).address for view in views]
                for k in range(len(self._method.state_names))
            ]
            made = engine.updates_of_groups(self._method.kernel, clipper.plan, spans, kept, stream)
            for group, slots in zip(clipper.groups, own, strict=True):
                slots.updates, slots.pools = made, clipper.pools[group.name]
                slots.steps = counts[group.name]
            self._updates.append(made)
        self._written: list[list[float]] | None = None
        self._differs = False  # whether groups that share a norm differ in settings
        params = [
            engine.facts(name, param)
            for group in self._groups
            for name, param in group.updated.items()
        ]
        rows = rows_of(self._groups)
        held = {k: own.words for k, own in rows.items()}
        self._parts = Parts({k: own.shape for k, own in rows.items()}) if rows else None
        self._sparse = {name for group in self._groups if group.sparse for name in group.names}
        self._holds_masters = any(group.sparse and group.masters for group in self._groups)
        self.given = engine.given(params, self._taken(engine), None, held)
        self._at_once: StepsAtOnce | None = None  # only for small data
        (clipper, *others), (updates, *_) = steps.clippers, self._updates
        self._clips_at_once = clipper.by_norms
        writes = clipper.writes_all and not self._sparse
        if not others and clipper.in_order and (clipper.by_norms or writes):
            self._at_once = updates.at_once(self.given, clipper.divisors, [*held.values()])
            self._unbounded = np.full(len(clipper.bounds), np.inf)
            self._unclipped = [engine.table((1, *own.shape[1:]), stream) for own in clipper.tables]
        self._steps = steps  # last: after an interrupt the next step does it all again

    def _taken(self, engine: Engine) -> list[tuple[int, int]]:
        """Return the extents of the memory that a step writes: parameters and states."""
        slots = self.slots.values()
        params = [param for own in slots for param in own.params]
        states = [state for own in slots for views in own.views for state in views]
        return [engine.facts("memory", array).extent for array in (*params, *states)]

    def settings(self, number: int) -> list[list[float]]:
        """Return the settings of each group at a step."""
        method = self._method
        return [method.settings(method.rate(group.lr, number)) for group in self._groups]

    def sources(self, steps: Steps, names: Sequence[str], items: Any) -> dict[str, int] | None:
        """Return gradients' addresses if all can be read in place and are large, else None."""
        if items is None or self.given is None or steps.writes_within or self.given.is_little:
            return None
        if self._sparse:
            return None
        if not self.given.read(items):
            return None
        return dict(zip(names, self.given.addresses.tolist(), strict=True))

    def step_at_once(
        self,
        steps: Steps,
        turn: Turn,
        settings: list[list[float]],
        items: Any,
        absent: frozenset[str],
    ) -> bool:
        """Take a step by one native call, by `items` or, if None, by the groups' own gradients.

        `absent` are the parameters without one. Return True if that was possible; if not, no
        parameter has been changed.
        """
        left = absent if items is None else NOBODY  # absent among the groups' own
        native = self._ready(steps, settings, left)
        if native is None or not self._clips_at_once:
            return False
        given = items
        if self._parts is not None and items is not None:
            given = self._parts.of(items)
            if given is None or self._holds_masters:  # `take_over` needs the rows stored first
                return False
        clipper = steps.clippers[0]
        if absent or steps.absent:
            steps.leave_out(absent)
        if not left:
            return clipper.take_at_once(native, turn, given)
        with self._leaving(native, left):
            return clipper.take_at_once(native, turn, given)

    def _ready(
        self, steps: Steps, settings: list[list[float]], absent: frozenset[str]
    ) -> StepsAtOnce | None:
        """Return what takes steps by one native call, with its settings written, or None.

        It cannot leave out sparse parameters, as it does not forget rows applied before.
        """
        if steps is not self._steps or self._at_once is None:
            return None
        if absent and not absent.isdisjoint(self._sparse):
            return None
        if settings != self._written:
            self._write_settings(steps, settings)
        return None if self._differs else self._at_once

    @contextlib.contextmanager
    def _leaving(self, native: StepsAtOnce, absent: frozenset[str]) -> Iterator[None]:
        """Treat some parameters' own gradients as absent in native calls within the context."""
        names = self._steps.clippers[0].names
        try:
            native.leave([k for k, name in enumerate(names) if name in absent])
            yield
        finally:
            native.leave([])

    def step(
        self,
        steps: Steps,
        turn: Turn,
        settings: list[list[float]],
        absent: frozenset[str],
        ranks: Ranks | None,
        sources: Mapping[str, int] | None = None,
        copy: Callable[[], None] | None = None,
    ) -> None:
        """Clip every group, and update it by its settings; leave parameters that are absent.

        Gradients are read at `sources` if given; if they have to be written, `copy` copies them to
        the groups first. Ranks may differ in this: all take the same decisions.
        """
        self._attach_again(steps)
        if sources is not None:
            steps.read_at(sources)
        try:
            written = steps.written_at_once(turn) if ranks is None else None
            if written is not None:
                if not self._apply_at_once(steps, settings, absent, ranks):
                    self._update(steps, settings, [written], absent, None)
                return
            steps.decide(turn, ranks, "" if ranks is None else self._call(settings, absent))
            if sources is not None and any(map(steps.is_exceptional, steps.clippers)):
                assert copy is not None
                sources = None
                steps.read_at(None)
                copy()
            stream = steps.stream
            if sources is None:
                outcomes = [clipper.write_exceptional(stream) for clipper in steps.clippers]
                at_once = self._at_once is not None and steps.writes_all
                if at_once and steps.clippers[0].has_spoilt(stream):
                    at_once = False  # it would skip a group whose gradients were finite
                if at_once and self._apply_at_once(steps, settings, absent, ranks):
                    return
            else:
                outcomes = [clipper.found for clipper in steps.clippers]
            self._update(steps, settings, outcomes, absent, sources)
        finally:
            if sources is not None:
                steps.read_at(None)

    def _call(self, settings: list[list[float]], absent: frozenset[str]) -> str:
        """Return words for a step's kernel, settings and absent copies: the same on all ranks."""
        copies = {name for group in self._groups if not group.sharded for name in group.names}
        left = sorted(absent & copies)
        return f"{self._method.kernel} of {settings}" + (f" without {left}" if left else "")

    def apply(
        self,
        steps: Steps,
        turn: Turn,
        settings: list[list[float]],
        absent: frozenset[str],
        ranks: Ranks | None = None,
    ) -> None:
        """Update every group, by its settings, with gradients that are clipped already."""
        self._attach_again(steps)
        if self._apply_at_once(steps, settings, absent, ranks):
            return
        call = "" if ranks is None else f"clipped before, {self._call(settings, absent)}"
        self._update(steps, settings, steps.leave(turn, ranks, call), absent, None)

    def _apply_at_once(
        self,
        steps: Steps,
        settings: list[list[float]],
        absent: frozenset[str],
        ranks: Ranks | None,
    ) -> bool:
        """Update by gradients as they are, by one native call; return True if that was possible.

        It never is with `ranks`: the call would decide by this rank's gradients alone.
        """
        native = self._ready(steps, settings, absent)
        if native is None or ranks is not None:
            return False
        with self._leaving(native, absent) if absent else contextlib.nullcontext():
            return native.take(None, 0, 1.0, self._unbounded, self._unclipped)

    def _attach_again(self, steps: Steps) -> None:
        """Make new update tables if there are new clippers."""
        if steps is not self._steps:
            counts = {name: slots.steps for name, slots in self.slots.items()}
            with steps.engine.on_stream(None) as stream:
                self._attach(steps, stream, counts)

    def _write_settings(self, steps: Steps, settings: list[list[float]]) -> None:
        """Write the settings of all groups to the update tables, if they differ."""
        if settings != self._written:
            self._written = None  # if an interrupt comes now, they are written again
            for clipper, updates in zip(steps.clippers, self._updates, strict=True):
                updates.write_settings(self._table(clipper, settings), steps.stream)
            self._differs = any(len(_rounds(own, settings)) > 1 for own in steps.clippers)
            self._written = settings

    def _update(
        self,
        steps: Steps,
        settings: list[list[float]],
        outcomes: Sequence[Outcome],
        absent: frozenset[str],
        sources: Mapping[str, int] | None,
    ) -> None:
        """Update every group by the outcomes, one for each clipper."""
        stream = steps.stream
        self._write_settings(steps, settings)
        every = zip(steps.clippers, self._updates, outcomes, strict=True)
        for clipper, updates, outcome in every:
            rounds = _rounds(clipper, settings) if self._differs else AT_ONCE
            waits = len(rounds) > 1 or not absent.isdisjoint(clipper.names)
            kept = updates.counts() if waits else None
            for group, others in rounds:
                if group is not None and kept is not None:
                    own = [settings[group.number]] * len(settings)
                    updates.write_settings(self._table(clipper, own), stream)
                    updates.set_counts(kept)
                left = absent | others
                if left or sources is not None:
                    updates.read_at(_sources(clipper, left, sources), stream)
                try:
                    if clipper.rows:
                        updates.take_rows(clipper.rows, stream)
                    updates.step(outcome, stream)
                finally:
                    if left or sources is not None:
                        updates.read_at(None, stream)
            if kept is not None:
                _keep_counts(clipper, updates, absent, kept)
            if len(rounds) > 1:
                self._written = None

    def _table(self, clipper: Any, settings: Sequence[Sequence[float]]) -> Array:
        """Return the settings of each of a clipper's pools."""
        table = np.zeros((len(clipper.plan.pools), SETTINGS_COLUMNS))
        for group in clipper.groups:
            pools = clipper.pools[group.name]
            table[pools.start : pools.stop, : len(settings[group.number])] = settings[group.number]
        return table


def _sources(clipper: Any, absent: frozenset[str], sources: Mapping[str, int] | None) -> list[int]:
    """Return the address of the gradient of each of a clipper's tensors; 0 if it is absent."""
    names = clipper.names
    if sources is None:
        homes = [span.source for span in clipper.plan.spans]
    else:
        homes = [sources[name] for name in names]
    if absent:
        pairs = zip(names, homes, strict=True)
        homes = [0 if name in absent else home for name, home in pairs]
    return homes


def _rounds(clipper: Any, settings: Sequence[Sequence[float]]) -> Rounds:
    """Return the rounds of an update: one, unless groups that share a norm differ in settings.

    Groups that share a norm also share a row of settings.
    """
    shared: dict[int, list[Sequence[float]]] = {}
    for group in clipper.groups:
        shared.setdefault(clipper.pools[group.name].start, []).append(settings[group.number])
    if all(own.count(own[0]) == len(own) for own in shared.values()):
        return AT_ONCE
    every = frozenset(clipper.names)
    return [(group, every.difference(group.names)) for group in clipper.groups]


def _keep_counts(clipper: Any, updates: Any, absent: frozenset[str], kept: Array) -> None:
    """Restore the step counts, from `kept`, of pools whose groups had no gradient at all."""
    counts, present = updates.counts(), np.zeros(len(kept), np.bool_)
    for group in clipper.groups:
        pools = clipper.pools[group.name]
        present[pools.start : pools.stop] |= not absent.issuperset(group.names)
    updates.set_counts(np.where(present, counts, kept))


def update_span(grad: Gradient, param: int) -> Span | RowSpan:
    """Return the span that reads a gradient and writes its parameter."""
    if grad.slices is None:
        return Span(grad.dtype, grad.address, param, grad.size)
    return row_span(grad, grad)._replace(target=param)

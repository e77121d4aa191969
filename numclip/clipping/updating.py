"""Updates of the parameters of groups, clipped on the way."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from numclip.border.gradients import Gradient
from numclip.clipping.buffers import flat_buffers
from numclip.clipping.clip import row_span
from numclip.clipping.steps import Steps, Turn
from numclip.dtypes import Array, lookup
from numclip.engine import Engine
from numclip.memory import RowSpan, Span
from numclip.methods import SETTINGS_COLUMNS


class Method(Protocol):
    """What is asked of an optimizer."""

    @property
    def kernel(self) -> str:
        """The name of the update kernel."""

    @property
    def state_names(self) -> tuple[str, ...]:
        """The names of what is kept for each parameter."""

    def settings(self, lr: float) -> list[float]:
        """Return the numbers that the user has chosen for a step."""


class Slots:
    """What an optimizer keeps for a group: its states, and how often it was updated.

    `views` has for each parameter its part of each state, 1-d stored numbers.
    """

    def __init__(self, group: Any, states: int, engine: Engine, stream: Any) -> None:
        self.params = list(group.params.values())
        self.views: list[list[Any]] = [[] for _ in self.params]
        kinds = {name: _state_like(param) for name, param in group.params.items()}
        for _ in range(states):
            _, views = flat_buffers(kinds, engine, stream)
            for own, view in zip(self.views, views.values(), strict=True):
                own.append(view)
        self.updates: Any = None
        self.pools = range(0)

    @property
    def steps(self) -> int:
        """How often the group was updated; asking waits for the engine."""
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
        What is kept for each group.
    """

    def __init__(self, steps: Steps, groups: Sequence[Any], method: Method) -> None:
        self._method, self._groups = method, groups
        engine = steps.engine
        engine.check_kernel(method.kernel, method.state_names)
        states = len(method.state_names)
        with engine.on_stream(None) as stream:
            self.slots = {group.name: Slots(group, states, engine, stream) for group in groups}
            self._attach(steps, stream, {group.name: 0 for group in groups})

    def _attach(self, steps: Steps, stream: Any, counts: Mapping[str, int]) -> None:
        """Make tables for the clippers that there are, which have others after a rule changed."""
        self._steps, engine = steps, steps.engine
        self._updates = []
        for clipper in steps.clippers:
            own = [self.slots[group.name] for group in clipper.groups]
            grads = [grad for group in clipper.groups for grad in group.gradients()]
            params = [param for slots in own for param in slots.params]
            places = [engine.facts("param", param).address for param in params]
            spans = [update_span(*pair) for pair in zip(grads, places, strict=True)]
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
        self._written: list[Any] = [None] * len(self._updates)

    def step(self, steps: Steps, number: int, rates: Sequence[float], unscale: float) -> Turn:
        """Clip every group, and update it at its rate; return what became of it."""
        if steps is not self._steps:
            counts = {name: slots.steps for name, slots in self.slots.items()}
            with steps.engine.on_stream(None) as stream:
                self._attach(steps, stream, counts)
        stream = steps.stream
        turn = steps.decided(number, unscale)
        settings = [self._method.settings(rate) for rate in rates]
        for k, (clipper, updates) in enumerate(zip(steps.clippers, self._updates, strict=True)):
            if self._written[k] != settings:
                updates.write_settings(self._table(clipper, settings), stream)
                self._written[k] = settings
            outcome = clipper.write_exceptional(stream)
            if clipper.rows:
                updates.take_rows(clipper.rows, stream)
            updates.step(outcome, stream)
        return turn

    def _table(self, clipper: Any, settings: Sequence[Sequence[float]]) -> Array:
        """Return the settings of each of a clipper's pools."""
        table = np.zeros((len(clipper.plan.pools), SETTINGS_COLUMNS))
        for group in clipper.groups:
            pools = clipper.pools[group.name]
            table[pools.start : pools.stop, : len(settings[group.number])] = settings[group.number]
        return table


def update_span(grad: Gradient, param: int) -> Span | RowSpan:
    """Return where a gradient is read and its parameter written."""
    if grad.slices is None:
        return Span(grad.dtype, grad.address, param, grad.size)
    return row_span(grad, grad)._replace(target=param)

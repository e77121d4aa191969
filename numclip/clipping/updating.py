"""Updates: of the parameters of groups, clipped on the way, and of arrays of a user's own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from numclip import engine as engines
from numclip.border.gradients import Gradient, describe
from numclip.border.results import check_writable, refuse_overlaps
from numclip.clipping.buffers import copied, flat_buffers
from numclip.clipping.clip import row_span
from numclip.clipping.steps import Steps, Turn
from numclip.dtypes import Array, lookup
from numclip.engine import Engine
from numclip.errors import expected
from numclip.memory import RowSpan, Span
from numclip.methods import SETTINGS_COLUMNS
from numclip.slices import IndexedSlices

KEPT = 8
"""How many sets of arrays are kept: the same at the same addresses are not described again."""


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
            spans = [_span(*pair) for pair in zip(grads, places, strict=True)]
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


def _span(grad: Gradient, param: int) -> Span | RowSpan:
    """Return where a gradient is read and its parameter written."""
    if grad.slices is None:
        return Span(grad.dtype, grad.address, param, grad.size)
    return row_span(grad, grad)._replace(target=param)


class Pair(NamedTuple):
    """A gradient, the array it updates, and what errors call them."""

    name: str
    gradient: Any
    variable: Any


class Kept:
    """What is kept for an array: the array itself, its states, and how often it was updated."""

    def __init__(self, param: Gradient, states: int, stream: Any) -> None:
        self.variable, self.kind = param.source, _kind_of(param)
        self.steps, engine = 0, param.engine
        self.states = [engine.empty((param.size,), param.dtype.compute) for _ in range(states)]
        for state in self.states:
            engine.clear(state, stream)


def _kind_of(param: Gradient) -> tuple[Any, int]:
    """Return what an array's states follow from."""
    return param.dtype, param.size


class Planned(NamedTuple):
    """Pairs that are known: where to work in order, what is kept for each array, and tables."""

    stream: Any
    kept: list[Kept]
    updates: Any


class ArrayUpdater:
    """Updates arrays of a user's own, which it keeps together with their states."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: dict[int, Kept] = {}
        self._planned: OrderedDict[Any, Planned] = OrderedDict()
        self._held: list[Any] = []  # whose memory is used until the update is under way

    def describe(self, pairs: Sequence[Pair]) -> list[Planned]:
        """Return what updates pairs in rounds of different arrays, after checking each."""
        if not pairs:
            return []
        engine = engines.of(pairs[0].variable)
        engine.require()
        engine.check_kernel(self._method.kernel, self._method.state_names)
        items = [item for pair in pairs for item in (pair.gradient, pair.variable)]
        told = engine.key_of(items, 2.0, self._method.kernel, written=True)
        key = None if told is None else (told, *map(id, items[1::2]))
        if key in self._planned:
            return [self._kept_planned(key, self._planned[key])]
        described = [_described(number, pair, engine) for number, pair in enumerate(pairs)]
        rounds = [self._plan(engine, own) for own in _rounds(described)]
        self._held = described
        if key is not None and len(rounds) == 1:
            self._kept_planned(key, rounds[0])
        return rounds

    def _kept_planned(self, key: Any, planned: Planned) -> Planned:
        """Keep what was used last, and forget what was not used for longest."""
        self._planned[key] = planned
        self._planned.move_to_end(key)
        while len(self._planned) > KEPT:
            self._planned.popitem(last=False)
        return planned

    def _plan(self, engine: Engine, pairs: Sequence[tuple[Gradient, Gradient]]) -> Planned:
        """Return what updates described pairs."""
        grads, params = map(list, zip(*pairs, strict=True))
        refuse_overlaps(grads, params, "update one of them in a call of its own")
        kept = self._kept_of(engine, params)
        stream = engine.stream_of([own.facts for own in (*params, *grads)])
        spans = [_span(grad, param.address) for grad, param in pairs]
        indices = [grad.slices.indices for grad in grads if grad.slices is not None]
        key = None if indices else (id(stream), *map(id, kept), *spans)
        if key in self._planned:
            return self._kept_planned(key, self._planned[key])
        addresses = [
            [engine.facts("state", own.states[k]).address for own in kept]
            for k in range(len(self._method.state_names))
        ]
        updates = engine.updates_of_arrays(self._method.kernel, spans, addresses, indices, stream)
        made = Planned(stream, kept, updates)
        return made if key is None else self._kept_planned(key, made)

    def _kept_of(self, engine: Engine, params: Sequence[Gradient]) -> list[Kept]:
        """Return what is kept for each array, made anew where it is not as it was."""
        known, states = self._known, len(self._method.state_names)
        fresh = {
            id(param.source): param
            for param in params
            if id(param.source) not in known or known[id(param.source)].kind != _kind_of(param)
        }
        if fresh:
            self._planned.clear()  # some could be of what was kept before
            with engine.on_stream(None) as stream:  # so that whatever stream is used finds zeros
                known |= {key: Kept(param, states, stream) for key, param in fresh.items()}
        return [known[id(param.source)] for param in params]

    def update(self, rounds: Sequence[Planned], lr: float) -> None:
        """Update the arrays."""
        settings = self._method.settings(lr)
        for planned in rounds:
            for kept in planned.kept:
                kept.steps += 1
            counts = [kept.steps for kept in planned.kept]
            planned.updates.step(settings, counts, planned.stream)
        self._held = []


def _rounds(
    pairs: Sequence[tuple[Gradient, Gradient]],
) -> list[list[tuple[Gradient, Gradient]]]:
    """Return pairs in their order, in lists in which no array comes twice."""
    rounds: list[list[tuple[Gradient, Gradient]]] = []
    seen: set[int] = set()
    for pair in pairs:
        own = id(pair[1].source)
        if not rounds or own in seen:
            rounds.append([])
            seen.clear()
        rounds[-1].append(pair)
        seen.add(own)
    return rounds


def _described(number: int, pair: Pair, engine: Engine) -> tuple[Gradient, Gradient]:
    """Return the gradient and the array of a pair, after checking that they fit.

    Slices are coalesced: each row is updated once, by the sum of its gradients.
    """
    name, gradient, variable = pair
    param, grad = (_taken(name, number, array, engine) for array in (variable, gradient))
    if param.slices is not None or isinstance(variable, np.generic):
        raise TypeError(expected(name, "an array to update", type(variable).__name__))
    check_writable(param)
    if grad.dense_shape != param.shape or grad.native != param.native:
        wanted = f"a gradient of shape {param.shape} and dtype {param.native}"
        raise ValueError(expected(name, wanted, f"{grad.dense_shape} and {grad.native}"))
    if not param.facts.c_order or not (grad.facts.c_order or engine.takes_any_rows):
        strides = f"strides {grad.facts.strides} of the gradient and {param.facts.strides}"
        got = f"{strides} of the array; pass contiguous ones"
        raise ValueError(expected(name, f"C order for device={engine.name!r}", got))
    if grad.slices is not None:
        grad = describe(name, number, grad.slices.coalesce(), engine)
    if not grad.facts.c_order or grad.address % grad.dtype.storage.itemsize:
        grad = describe(name, number, copied(grad, None), engine)
    return grad, param


def _taken(name: str, number: int, array: Any, engine: Engine) -> Gradient:
    """Return the description of an array, which is where the first one to be updated is."""
    values = array.values if isinstance(array, IndexedSlices) else array
    if engines.of(values) is not engine:
        where = "in the host's memory" if engine.name == "cpu" else "on the GPU"
        wanted = f"a gradient and an array {where}, as the first array is"
        raise TypeError(expected(name, wanted, f"{type(array).__name__} elsewhere"))
    return describe(name, number, array, engine)

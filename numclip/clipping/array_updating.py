"""Updates of arrays of a user's own, which are kept together with their states."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import engine as engines
from numclip.border.gradients import Gradient, describe
from numclip.border.results import check_writable, refuse_overlaps
from numclip.clipping.buffers import copied
from numclip.clipping.updating import Method, update_span
from numclip.engine import Engine
from numclip.errors import expected
from numclip.slices import IndexedSlices

KEPT = 8
"""How many sets of arrays are kept: the same at the same addresses are not described again."""


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
    """Updates arrays, which it keeps together with their states."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: dict[int, Kept] = {}
        self._planned: OrderedDict[Any, Planned] = OrderedDict()
        self._held: list[Gradient] = []  # whose memory is used until the update is under way

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
        self._held = [own for both in described for own in both]
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
        spans = [update_span(grad, param.address) for grad, param in pairs]
        indices = [grad.slices.indices for grad in grads if grad.slices is not None]
        key = None if indices else (stream, *map(id, kept), *spans)
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
            if self._held:
                engine = self._held[0].engine
                engine.give_back(planned.stream, [own.facts for own in self._held])
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

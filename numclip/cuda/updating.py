"""Updates of arrays of a user's own on the GPU: one launch a dtype, whatever their number."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip.cuda import outputs, tensors
from numclip.cuda.arrays import empty
from numclip.cuda.entries import DeviceEntry, describe
from numclip.cuda.streams import current_stream, give_back, stream_of
from numclip.kernels.cuda import device
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.grouping import RowSpan
from numclip.kernels.cuda.update_plan import PlainUpdates
from numclip.slices import IndexedSlices
from numclip.updating import Method, Pair

KEPT = 8
"""How many sets of arrays are kept: the same at the same addresses are not described again."""


def _kind_of(entry: DeviceEntry) -> tuple[Any, int]:
    """Return what an array's states follow from."""
    return entry.dtype, entry.size


class Slot:
    """What is kept for an array: the array itself, its states, and how often it was updated."""

    def __init__(self, entry: DeviceEntry, states: int) -> None:
        self.variable, self.kind = entry.array, _kind_of(entry)
        self.steps = 0
        dtype = entry.dtype.compute
        self.states = [empty((entry.size,), dtype) for _ in range(states)]
        for state in self.states:
            device.clear(state.address, state.nbytes, 0)


class Planned(NamedTuple):
    """Pairs that are known: where to work in order, what is kept for each array, and tables."""

    stream: Any
    slots: list[Slot]
    updates: PlainUpdates


class DeviceArrayEngine:
    """Updates arrays of a user's own, as `updating.ArrayEngine` does in the host's memory."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: dict[int, Slot] = {}
        self._planned: OrderedDict[Any, Planned] = OrderedDict()
        self._held: list[Any] = []  # whose memory is used until the update is under way

    def describe(self, pairs: Sequence[Pair]) -> Planned:
        """Return what updates pairs, after checking that each fits."""
        device.require()
        name = _name_of(pairs)
        found = None if name is None else self._planned.get(name)
        if found is None:
            self._held = [_described(number, pair) for number, pair in enumerate(pairs)]
            found, key = self._plan(*map(list, zip(*self._held, strict=True)))
            name = name or key
        if not any(isinstance(pair.gradient, IndexedSlices) for pair in pairs):
            self._keep(name, found)
        return found

    def _keep(self, name: Any, planned: Planned) -> None:
        """Keep what was used last, and forget what was not used for longest."""
        self._planned[name] = planned
        self._planned.move_to_end(name)
        while len(self._planned) > KEPT:
            self._planned.popitem(last=False)

    def _plan(self, grads: list[Any], params: list[Any]) -> tuple[Planned, Any]:
        """Return what updates described pairs, and by what it is found again."""
        advice = "update one of them in a call of its own"
        outputs.refuse_overlaps(grads, params, advice)
        slots = self._slots_of(params)
        stream = stream_of([*params, *grads])
        spans = [_span(grad, param) for grad, param in zip(grads, params, strict=True)]
        key = device.handle_of(stream), tuple(map(id, slots)), *spans
        if key in self._planned:  # where there are no rows
            return self._planned[key], key
        kept = range(len(self._method.state_names))
        states = [[slot.states[k].address for slot in slots] for k in kept]
        indices = [grad.slices.indices for grad in grads if grad.slices is not None]
        return Planned(stream, slots, PlainUpdates(spans, states, indices, stream)), key

    def _slots_of(self, params: Sequence[DeviceEntry]) -> list[Slot]:
        """Return what is kept for each array, made anew where it is not as it was."""
        known, states = self._known, len(self._method.state_names)
        fresh = {
            id(param.array): param
            for param in params
            if id(param.array) not in known or known[id(param.array)].kind != _kind_of(param)
        }
        if fresh:
            self._planned.clear()  # some could be of what was kept before
            with device.on_stream(None):  # so that whatever stream is used finds zeros
                known |= {key: Slot(param, states) for key, param in fresh.items()}
        return [known[id(param.array)] for param in params]

    def update(self, planned: Planned, lr: float) -> None:
        """Update the arrays."""
        for slot in planned.slots:
            slot.steps += 1
        counts = [slot.steps for slot in planned.slots]
        numbers = {count: self._method.numbers(lr, count) for count in set(counts)}
        planned.updates.take(np.array([numbers[count] for count in counts]), planned.stream)
        give_back(planned.stream, [entry for pair in self._held for entry in pair if entry])
        self._held = []


def _name_of(pairs: Sequence[Pair]) -> Any:
    """Return by what tensors of PyTorch are known again without describing them, if they are."""
    variables = [pair.variable for pair in pairs]
    told = tensors.facts([*(pair.gradient for pair in pairs), *variables])
    if told is None:
        return None
    stream = current_stream(variables[0])
    return device.handle_of(stream), tuple(map(id, variables)), told


def _span(grad: DeviceEntry, param: DeviceEntry) -> Span | RowSpan:
    """Return where a gradient is read and its array written."""
    places = grad.dtype, grad.address, param.address, grad.size
    if grad.slices is None:
        return Span(*places)
    return RowSpan(*places, math.prod(grad.shape[1:]) * grad.dtype.components)


def _described(number: int, pair: Pair) -> tuple[DeviceEntry, DeviceEntry]:
    """Return the gradient and the array of a pair, after checking that they fit.

    Slices are coalesced: each row is updated once, by the sum of its gradients.
    """
    name, gradient, variable = pair
    param = describe(name, number, variable)
    grad = describe(name, number, gradient)
    if param.slices is not None:
        raise TypeError(f"{name}: expected an array to update, got IndexedSlices")
    if not param.writable:
        raise ValueError(f"{name}: expected a writeable array to update, got a read-only one")
    if grad.dense_shape != param.shape or grad.native != param.native:
        raise ValueError(
            f"{name}: expected a gradient of shape {param.shape} and dtype {param.native}, "
            f"got {grad.dense_shape} and {grad.native}"
        )
    if not (grad.c_order and param.c_order):
        raise ValueError(
            f"{name}: expected C order on the GPU, got strides {grad.strides} of the gradient "
            f"and {param.strides} of the array; pass contiguous ones"
        )
    if grad.slices is not None:
        grad = describe(name, number, grad.slices.coalesce())
    return grad, param

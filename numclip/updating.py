"""Updates in the host's memory: of the parameters of groups, and of arrays of a user's own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from numclip import foreign, inputs
from numclip.dtypes import Array, DType, as_stored
from numclip.general_step import GeneralStep
from numclip.inputs import Entry
from numclip.isolation import isolated
from numclip.kernels import backend
from numclip.layout import aligned
from numclip.outputs import check_writeable
from numclip.report import ClipReport
from numclip.step import Step

if TYPE_CHECKING:
    from numclip.groups import ParamGroups


class Method(Protocol):
    """What the engines ask of an optimizer."""

    state_names: tuple[str, ...]

    def settings(self, lr: float) -> list[float]:
        """Return the numbers that the user has chosen for a step."""

    def numbers(self, lr: float, count: int) -> list[float]:
        """Return the numbers of the `count`-th step, as kernels take them."""

    def take(self, update: backend.Update, factors: Array, lr: float, count: int) -> None:
        """Update parameters and states in the host's memory, for the `count`-th time."""


class Slots:
    """What an optimizer keeps for some parameters: a flat buffer for each state, and a count.

    `params` are 1-d storage; `views` has for each of them its part of each state.
    """

    def __init__(self, params: Sequence[Array], dtypes: Sequence[DType], states: int) -> None:
        self.params, self.dtypes, self.steps = params, dtypes, 0
        self.views: list[list[Array]] = [[] for _ in params]
        for dtype in dict.fromkeys(dtypes):
            members = [k for k, other in enumerate(dtypes) if other is dtype]
            for _ in range(states):
                start = 0
                flat = aligned(sum(params[k].size for k in members), dtype.compute)
                for k in members:
                    self.views[k].append(flat[start : start + params[k].size])
                    start += params[k].size

    def dense(self, entries: Sequence[Entry]) -> list[tuple[Any, backend.Update]]:
        """Return an update for each dtype, with the places of its parameters."""
        made: list[tuple[Any, backend.Update]] = []
        kinds = dict.fromkeys(self.dtypes)
        for dtype in kinds:
            places = [k for k, other in enumerate(self.dtypes) if other is dtype]
            tensors = [[entries[k].flat, self.params[k], *self.views[k]] for k in places]
            columns = list(np.array([[array.ctypes.data for array in row] for row in tensors]).T)
            lengths = np.array([row[0].size for row in tensors])
            where = slice(None) if len(kinds) == 1 else np.array(places)
            made.append((where, backend.update(dtype, columns, lengths, tensors)))
        return made

    def rows(self, k: int, entry: Entry) -> backend.Update:
        """Return an update of the rows that a sparse gradient touches, each a tensor."""
        assert entry.slices is not None
        merged = entry.slices.coalesce()
        values = as_stored(merged.values.reshape(-1))
        count, length = merged.indices.size, values.size // max(merged.indices.size, 1)
        rows = np.asarray(merged.indices, np.int64)
        columns = [values.ctypes.data + np.arange(count) * (length * values.itemsize)]
        columns += [
            array.ctypes.data + rows * (length * array.itemsize)
            for array in (self.params[k], *self.views[k])
        ]
        arrays = values, self.params[k], self.views[k]
        return backend.update(entry.dtype, columns, np.full(count, length), arrays)


class GroupEngine:
    """Updates the parameters of groups.

    Attributes
    ----------
    slots : dict of str to Slots
        What is kept for each group.
    """

    def __init__(self, groups: ParamGroups, method: Method) -> None:
        self._groups, self._method = groups, method
        self.slots: dict[str, Slots] = {}
        self._dense: dict[str, list[tuple[Any, backend.Update]]] = {}
        for group in groups:
            entries = [inputs.entry(name, name, param) for name, param in group.params.items()]
            params, dtypes = [entry.flat for entry in entries], [entry.dtype for entry in entries]
            slots = self.slots[group.name] = Slots(params, dtypes, len(method.state_names))
            if not group.sparse:
                self._dense[group.name] = slots.dense(group.gradients()[0])

    @isolated
    def step(self, rates: Mapping[str, float], unscale: float) -> ClipReport:
        """Clip every group, and update it at its rate."""
        found = self._groups.judged(unscale, write=True)
        for one in found:
            if not one.skipped:
                self._update(one, rates[one.group.name])
        return self._groups.commit(found)

    def _update(self, step: Step, lr: float) -> None:
        group, slots = step.group, self.slots[step.group.name]
        slots.steps += 1
        if isinstance(step, GeneralStep) and group.sparse:
            for k, entry in enumerate(step.scaled_copies()):
                rows = slots.rows(k, entry)  # scaled first: sums of raw rows could overflow
                self._method.take(rows, np.ones(len(rows.chunks)), lr, slots.steps)
            return
        factors = step.update_factors()
        for places, update in self._dense[group.name]:
            self._method.take(update, factors[places], lr, slots.steps)


class Pair(NamedTuple):
    """A gradient, the array it updates, and what errors call them."""

    name: str
    gradient: Any
    variable: Any


class Described(NamedTuple):
    """A pair in the host's memory: the gradient, and the array as 1-d storage."""

    entry: Entry
    param: Array
    variable: Any


class ArrayEngine:
    """Updates arrays of a user's own, which it keeps together with their states."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: dict[int, tuple[Any, Slots]] = {}

    def describe(self, pairs: Iterable[Pair]) -> list[Described]:
        """Return pairs as they are updated, after checking that each fits."""
        return [_described(number, pair) for number, pair in enumerate(pairs)]

    @isolated
    def update(self, pairs: Sequence[Described], lr: float) -> None:
        """Update the array of each pair."""
        for pair in pairs:
            slots = self._slots_of(pair)
            slots.steps += 1
            if pair.entry.slices is not None:
                rows = slots.rows(0, pair.entry)
                self._method.take(rows, np.ones(len(rows.chunks)), lr, slots.steps)
            else:
                self._method.take(slots.dense([pair.entry])[0][1], np.ones(1), lr, slots.steps)

    def _slots_of(self, pair: Described) -> Slots:
        """Return the states of an array, new ones if it is not as it was."""
        (dtype, param, variable) = pair.entry.dtype, pair.param, pair.variable
        known, slots = self._known.get(id(variable), (None, None))
        fits = slots is not None and slots.dtypes == [dtype] and slots.params[0].size == param.size
        if slots is None or known is not variable or not fits:
            slots = Slots([param], [dtype], len(self._method.state_names))
            self._known[id(variable)] = variable, slots
        slots.params = [param]  # the memory may have moved
        return slots


def _described(number: int, pair: Pair) -> Described:
    name, gradient, variable = pair
    known = isinstance(variable, np.ndarray)
    param = variable if known else foreign.as_numpy(name, variable)
    if param is None or not param.flags.c_contiguous:
        raise TypeError(f"{name}: expected a C-contiguous array to update, got {type(variable)}")
    entry = inputs.entry(name, number, gradient)
    check_writeable(param, name)
    if entry.dense_shape != param.shape or entry.values.dtype != param.dtype:
        raise ValueError(
            f"{name}: expected a gradient of shape {param.shape} and dtype {param.dtype}, "
            f"got {entry.dense_shape} and {entry.values.dtype}"
        )
    if entry.values.flags.f_contiguous and not entry.values.flags.c_contiguous:
        entry = inputs.entry(name, number, np.ascontiguousarray(entry.values))
    return Described(entry, as_stored(param.reshape(-1)), variable)

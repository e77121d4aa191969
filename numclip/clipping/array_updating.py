"""Updates of a user's own arrays; states and tables are kept for arrays that come again."""

from __future__ import annotations

import bisect
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from numclip import engine as engines
from numclip.border.gradients import Gradient, describe
from numclip.border.results import check_writable, refuse_overlaps
from numclip.clipping.buffers import copied, refuse_beyond
from numclip.clipping.updating import Method, update_span
from numclip.engine import Engine
from numclip.errors import expected
from numclip.memory import owner_of
from numclip.methods import check
from numclip.slices import IndexedSlices

KEPT = 32
"""How many sets of arrays are kept: the same arrays, by address, are not described again."""


class Kept:
    """The states of an array and its number of updates, kept while its memory lives.

    `held` returns None once the memory is freed: only a weak reference to the owner of a NumPy
    array's memory is kept. Arrays of other libraries are kept alive.
    """

    def __init__(self, param: Gradient, states: int, stream: Any) -> None:
        array, owner = param.facts.array, owner_of(param.facts.array)
        is_numpy = isinstance(owner, np.ndarray)
        self.held: Callable[[], Any] = weakref.ref(owner) if is_numpy else lambda: array
        self.kind, self.steps, engine = _kind_of(param), 0, param.engine
        self.states = [engine.empty((param.size,), param.dtype.compute) for _ in range(states)]
        for state in self.states:
            engine.clear(state, stream)


Pair = tuple[Gradient, Gradient]
"""A gradient and the array it updates."""


def _kind_of(param: Gradient) -> tuple[Any, int]:
    """Return the dtype and size of an array, which determine its states."""
    return param.dtype, param.size


class Planned(NamedTuple):
    """An update of pairs that can be repeated: its stream, each array's `Kept`, and its tables."""

    stream: Any
    kept: list[Kept]
    updates: Any

    @property
    def lives(self) -> bool:
        """Whether the memory of all arrays still exists."""
        for kept in self.kept:  # noqa: SIM110, all() takes three times as long
            if kept.held() is None:
                return False
        return True


class ArrayUpdater:
    """Updates arrays; it keeps the states of each array by the array's address."""

    def __init__(self, method: Method) -> None:
        self._method = method
        self._known: dict[int, Kept] = {}
        self._planned: dict[Any, Planned] = {}
        self._held: list[Gradient] = []  # kept alive until the update was submitted

    def describe(self, numbers: list[int], grads: list[Any], variables: list[Any]) -> list[Planned]:
        """Check pairs; return their updates in rounds, in each of which arrays are distinct."""
        if not grads:
            return []
        known = self._of_pairs(grads, variables) or self._of_pairs(*_filled(grads, variables))
        if known is not None:
            return [known]
        engine = engines.of(variables[0])
        arrays, rows = _parted(grads, variables)
        key, sources = engine.key_of_pairs(arrays, variables, self._method.kernel, rows)
        planned = self._find(key)
        if planned is None:
            engine.require()
            method = self._method
            check(method.kernel, method.state_names, engine.kernels, engine.name)
            pairs = zip(numbers, grads, variables, strict=True)
            made = self._plans(engine, [_described(*pair, engine) for pair in pairs], key is None)
            if key is None or len(made) != 1:
                return made
            planned = self._keep(key, made[0])
        planned.updates.read_from(sources)
        return [planned]

    def _of_pairs(self, grads: list[Any], variables: list[Any]) -> Planned | None:
        """Return the kept update of these arrays, set to read the gradients, or None.

        The update used last is tried first, then the others from the one not used for longest,
        which is the right one where sets of arrays take turns.
        """
        known = [*self._planned.items()]  # a copy: other threads may add to the dict
        for key, planned in known[-1:] + known[:-1]:
            if planned.updates.read_pairs(grads, variables) and planned.lives:
                if planned is not known[-1][1]:  # hashing a key takes microseconds
                    self._keep(key, planned)
                return planned
        return None

    def _find(self, key: Any) -> Planned | None:
        """Return the update kept under a key; None if the memory of one of its arrays is freed."""
        planned = self._planned.get(key)
        return self._keep(key, planned) if planned is not None and planned.lives else None

    def _keep(self, key: Any, planned: Planned) -> Planned:
        """Keep an update as the one used last; beyond `KEPT`, drop the least recently used."""
        self._planned.pop(key, None)
        self._planned[key] = planned
        for oldest in [*self._planned][:-KEPT]:
            self._planned.pop(oldest, None)
        return planned

    def _plans(self, engine: Engine, pairs: Sequence[Pair], keeps: bool) -> list[Planned]:
        """Return the updates of described pairs in rounds; refuse arrays that share memory."""
        rounds = _rounds(pairs)
        stays = len(rounds) == 1  # else the update of an earlier round could change a gradient
        arrays = [own for _, own in pairs]
        if not stays:
            arrays = [*{(own.address, _kind_of(own)): own for own in arrays}.values()]
        refuse_overlaps(arrays, arrays)
        extents = sorted(own.facts.extent for own in arrays)
        apart = partial(_apart, extents=extents, stays=stays)
        keeps &= stays  # else rounds of the same arrays would have one key
        return [self._plan(engine, own, apart, keeps=keeps) for own in rounds]

    def _plan(
        self, engine: Engine, pairs: Sequence[Pair], apart: Callable[..., Any], *, keeps: bool
    ) -> Planned:
        """Return the update of one round, from the kept ones if `keeps` and it is there."""
        params = [param for _, param in pairs]
        kept = self._kept_of(engine, params)
        stream = engine.stream_of([own.facts for pair in pairs for own in pair])
        grads = [apart(*pair, stream) for pair in pairs]
        self._held += [own for pair in pairs for own in pair] + grads
        pairs = list(zip(grads, params, strict=True))
        spans = [update_span(grad, param.address) for grad, param in pairs]
        indices = [grad.slices.indices for grad in grads if grad.slices is not None]
        sources = [span.source for span in spans]
        read = () if engine.updates_read_anywhere else sources
        key = (stream, *map(id, kept), *read) if keeps and not indices else None
        planned = self._find(key)
        if planned is not None:
            planned.updates.read_at(sources)
            return planned
        addresses = [
            [engine.facts("state", own.states[k]).address for own in kept]
            for k in range(len(self._method.state_names))
        ]
        arrays = [param.facts for param in params]
        arguments = spans, addresses, indices, arrays, stream
        updates = engine.updates_of_arrays(self._method.kernel, *arguments)
        made = Planned(stream, kept, updates)
        return made if key is None else self._keep(key, made)

    def _kept_of(self, engine: Engine, params: Sequence[Gradient]) -> list[Kept]:
        """Return each array's `Kept`, new if the array is new or its dtype or size has changed."""
        known = {address: kept for address, kept in self._known.items() if kept.held() is not None}
        fresh = [
            param
            for param in params
            if param.address not in known or known[param.address].kind != _kind_of(param)
        ]
        if fresh:
            self._planned.clear()  # some could refer to a `Kept` that is replaced
            states = len(self._method.state_names)
            with engine.on_stream(None) as stream:  # every stream finds zeros
                known |= {param.address: Kept(param, states, stream) for param in fresh}
            self._known = known
        return [known[param.address] for param in params]

    def update(self, rounds: Sequence[Planned], lr: float) -> None:
        """Update the arrays, one round after another."""
        settings = self._method.settings(lr)
        for planned in rounds:
            counts = []
            for kept in planned.kept:
                kept.steps += 1
                counts.append(kept.steps)
            planned.updates.step(settings, counts, planned.stream)
            if self._held:
                engine = self._held[0].engine
                engine.give_back(planned.stream, [own.facts for own in self._held])
        self._held = []


def not_a_pair(number: int, got: Any) -> str:
    """Return the error message for an entry that is no pair."""
    wanted = "a pair of a gradient and an array"
    return expected(f"grads_and_vars[{number}]", wanted, type(got).__name__)


def _parted(grads: list[Any], variables: list[Any]) -> tuple[list[Any], dict[int, Any]]:
    """Return gradients with slices that fit replaced by their values, and the slices' indices."""
    arrays, rows = grads, {}
    for k, grad in enumerate(grads):
        if type(grad) is IndexedSlices and grad.dense_shape == getattr(variables[k], "shape", None):
            arrays = [*arrays]
            arrays[k], rows[k] = grad.values, grad.indices
    return arrays, rows


def _filled(grads: list[Any], variables: list[Any]) -> tuple[list[Any], list[Any]]:
    """Return gradients and variables without pairs of empty NumPy arrays, which need no update."""
    kept = [pair for pair in zip(grads, variables, strict=True) if not _is_empty(*pair)]
    return [grad for grad, _ in kept], [own for _, own in kept]


def _is_empty(grad: Any, own: Any) -> bool:
    """Tell whether a pair is two NumPy arrays without elements that fit each other."""
    if type(grad) is not np.ndarray or type(own) is not np.ndarray or own.size:
        return False
    alike = grad.dtype == own.dtype and grad.shape == own.shape
    return alike and own.flags.writeable


def _rounds(pairs: Sequence[Pair]) -> list[list[Pair]]:
    """Return pairs in order, in lists without the same array twice; empty arrays are left out."""
    rounds: list[list[Pair]] = []
    seen: set[int] = set()
    for pair in pairs:
        own = pair[1].address
        if not pair[1].size:
            continue
        if not rounds or own in seen:
            rounds.append([])
            seen.clear()
        rounds[-1].append(pair)
        seen.add(own)
    return rounds


def _apart(
    grad: Gradient,
    param: Gradient,
    stream: Any,
    extents: Sequence[tuple[int, int]],
    stays: bool,
) -> Gradient:
    """Return a gradient, or a copy of it if an update could overwrite it before it is read.

    `extents` are those of the updated arrays, in ascending order. `stays` says that an array is
    written only after its own gradient is read.
    """
    begin, end = grad.facts.extent
    first = bisect.bisect_right(extents, begin, key=lambda extent: extent[1])
    met = first < len(extents) and extents[first][0] < end
    return (
        _with(grad, copied(grad, stream)) if met and not (stays and grad.lies_as(param)) else grad
    )


def _with(grad: Gradient, array: Any) -> Gradient:
    """Return the description of a gradient with another array of its values."""
    source = array if grad.slices is None else grad.slices.with_values(array)
    return describe(grad.name, grad.key, source, grad.engine)


def _described(
    number: int, gradient: Any, variable: Any, engine: Engine
) -> tuple[Gradient, Gradient]:
    """Check that a pair fits; return the descriptions of its gradient and its array.

    Slices are coalesced: each row is updated once, by the sum of its gradients. On the host
    gradients are cast as `ParamGroups.set_grads` casts them.
    """
    name = f"grads_and_vars[{number}]"
    param, grad = (_taken(name, number, array, engine) for array in (variable, gradient))
    if param.slices is not None or isinstance(variable, np.generic):
        raise TypeError(expected(name, "an array to update", type(variable).__name__))
    check_writable(param)
    casts = engine.name == "cpu" and grad.dtype.components <= param.dtype.components
    if grad.dense_shape != param.shape or not (casts or grad.native == param.native):
        wanted = f"a gradient of shape {param.shape} and dtype {param.native}"
        raise ValueError(expected(name, wanted, f"{grad.dense_shape} and {grad.native}"))
    if not param.facts.c_order or not (grad.facts.c_order or engine.takes_any_rows):
        steps = grad.facts.memory.steps, param.facts.memory.steps
        strides = "strides {} of the gradient and {}".format(*steps)
        got = f"{strides} of the array; pass contiguous ones"
        raise ValueError(expected(name, f"C order for device={engine.name!r}", got))
    if grad.slices is not None:
        grad = describe(name, number, grad.slices.coalesce(), engine)
    refuse_beyond(name, grad, param.native)
    aligned = grad.address % grad.dtype.storage.itemsize == 0
    if not grad.facts.c_order or not aligned or grad.native != param.native:
        grad = _with(grad, copied(grad, None, param.native))
    return grad, param


def _taken(name: str, number: int, array: Any, engine: Engine) -> Gradient:
    """Return the description of an array; refuse one on another device than the first array's."""
    values = array.values if isinstance(array, IndexedSlices) else array
    if engines.of(values) is not engine:
        where = "in the host's memory" if engine.name == "cpu" else "on the GPU"
        wanted = f"a gradient and an array {where}, as the first array is"
        raise TypeError(expected(name, wanted, f"{type(array).__name__} elsewhere"))
    return describe(name, number, array, engine)

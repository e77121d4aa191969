"""A group's parameters and gradients in flat buffers, on the group's engine.

Buffers are aligned and contiguous, one for each dtype; tensors follow one another in them, in C
order and without gaps.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import Any

import numpy as np

from numclip import engine as engines
from numclip.border.gradients import Gradient, describe
from numclip.border.results import check_writable
from numclip.clipping.held_rows import HeldRows
from numclip.clipping.masters import Masters, Rows
from numclip.dtypes import Array
from numclip.engine import Engine
from numclip.errors import expected
from numclip.slices import IndexedSlices


def flat_buffers(
    kinds: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], engine: Engine, stream: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return a buffer of zeros for each dtype by its name, and each tensor's view into one.

    `kinds` are the tensors' shapes and dtypes.
    """
    flat: dict[str, Any] = {}
    views: dict[str, Any] = {}
    for dtype in dict.fromkeys(dtype for _, dtype in kinds.values()):
        members = {name: shape for name, (shape, own) in kinds.items() if own == dtype}
        buffer = engine.empty((sum(map(math.prod, members.values())),), dtype)
        engine.clear(buffer, stream)
        flat[dtype.name] = buffer
        start = 0
        for name, shape in members.items():
            views[name] = engine.part(buffer, start, shape)
            start += math.prod(shape)
    return flat, {name: views[name] for name in kinds}


class GroupState:
    """One group at run time: its buffers, its gradients, its rule and the rule's state.

    Attributes
    ----------
    name, clip, nonfinite, lr
        As in `Group`. A new rule or policy takes effect at the next step.
    sparse, sharded : bool
        Whether gradients are rows of parameters, and whether each rank has a part of these.
    names : tuple of str
        The names of the parameters.
    neighbours : sequence of GroupState
        The groups whose gradients are written together with this one's, itself included.
    lock : context manager
        Held by a thread that takes a step.
    params, grads : mapping of str to array
        Views into the flat buffers; parameters that are not copied are the user's own arrays. For
        a sparse group `grads` is empty.
    master : {"float32"} or None
        The dtype of 16-bit parameters' masters and gradients; None if there are no masters.
    masters : mapping of str to array
        The masters, only to be read: the next step copies what was written to `params` to them.
    updated : mapping of str to array
        The arrays an optimizer updates: masters, and parameters without one.
    exposed : set of str
        The parameters whose gradient views the user may have, and write to at any time.
    flat_params, flat_grads : dict of str to array
        The whole group as one 1-d array for each dtype, by the dtype's name. 64-byte aligned.
        Parameters that are not copied are not in `flat_params`, and masters are in neither.
    """

    sparse = False
    lock: AbstractContextManager[Any] = contextlib.nullcontext()

    def __init__(
        self,
        group: Any,
        number: int,
        engine: Engine,
        stream: Any,
        changed: Callable[[], None],
        *,
        copies: bool = True,
    ) -> None:
        """Copy the parameters or use the user's arrays; a new rule or policy calls `changed`."""
        self.name, self.number, self.lr = group.name, number, group.lr
        self.sharded = group.sharded
        self._clip, self._nonfinite = group.clip, str(group.nonfinite)
        self._changed = changed
        self.neighbours: Sequence[GroupState] = [self]
        self._engine = engine
        given = {
            name: _given(f"params[{name!r}]", name, value, engine)
            for name, value in group.params.items()
        }
        self.names = tuple(given)
        kinds = {name: (own.shape, own.native) for name, own in given.items()}
        self.flat_params, params = flat_buffers(kinds if copies else {}, engine, stream)
        for name, own in given.items():
            if copies:
                engine.put(params[name], readable(own, engine), stream)
            else:
                params[name] = _taken(own)
        self.params = MappingProxyType(params)
        self.master = group.master
        halves = {name: own for name, own in given.items() if self.master and own.dtype.is_half}
        wide = {name: (own.shape, np.dtype(np.float32)) for name, own in halves.items()}
        _, masters = flat_buffers(wide, engine, stream)
        self._masters = Masters(params, masters, engine, stream) if wide else None
        self.updated = MappingProxyType(params | masters)
        self._flat_grads, grads = flat_buffers({} if self.sparse else kinds | wide, engine, stream)
        self._grads = MappingProxyType(grads)
        self.exposed: set[str] = set()
        self.remembered = group.clip.initial_state(len(given)) if group.clip else {}
        self._dense = [self._gradient(name, grad) for name, grad in grads.items()]
        self._facts = {name: own.facts for name, own in zip(grads, self._dense, strict=True)}
        flats = [engine.facts(name, flat) for name, flat in self._flat_grads.items()]
        self.extents = [facts.extent for facts in flats]

    @property
    def clip(self) -> Any:
        """The rule."""
        return self._clip

    @clip.setter
    def clip(self, rule: Any) -> None:
        self._clip = rule
        self.remembered = self._state_for(rule)
        self._changed()

    @property
    def rule_state(self) -> dict[str, Array]:
        """Copies of the rule's state arrays: a step can write to the arrays themselves."""
        with self.lock:
            return {name: own.copy() for name, own in self.remembered.items()}

    def _state_for(self, rule: Any) -> dict[str, Array]:
        """Return the present state if it is valid for a rule, else the rule's initial state."""
        if rule is None:
            return {}
        try:
            rule.check_state(self.remembered, len(self.names))
        except ValueError:
            made: dict[str, Array] = rule.initial_state(len(self.names))
            return made
        return self.remembered

    @property
    def nonfinite(self) -> str:
        """The policy for NaN and Inf."""
        return self._nonfinite

    @nonfinite.setter
    def nonfinite(self, policy: str) -> None:
        self._nonfinite = policy
        self._changed()

    @property
    def masters(self) -> Mapping[str, Any]:
        """The masters; those of NumPy are read-only views."""
        arrays = {} if self._masters is None else self._masters.arrays
        return MappingProxyType({name: _read_only(own) for name, own in arrays.items()})

    @property
    def grads(self) -> Mapping[str, Any]:
        """The gradients, views into the flat buffers."""
        self.exposed.update(self.names)
        return self._grads

    @property
    def flat_grads(self) -> dict[str, Any]:
        """The gradients of each dtype as one array."""
        self.exposed.update(self.names)
        return self._flat_grads

    def __repr__(self) -> str:
        size = sum(param.size for param in self.params.values())
        kind = "sparse" if self.sparse else "dense"
        master = f", master={self.master!r}" if self.master else ""
        return (
            f"{self.name}: {len(self.params)} {kind} tensors, {size} elements, "
            f"clip={self.clip!r}, nonfinite={self.nonfinite!r}{master}"
        )

    def _gradient(self, name: str, grad: Any) -> Gradient:
        return describe(f"{self.name}.{name}", name, grad, self._engine)

    def gradients(self) -> list[Gradient]:
        """Return the gradient of each parameter."""
        return self._dense

    def gradient_of(self, name: str) -> Any:
        """Return a parameter's gradient for the user, and note it in `exposed`."""
        found = self.seen(name)
        if found is not None:
            self.exposed.add(name)
        return found

    def seen(self, name: str) -> Any:
        """Return a parameter's gradient without noting it in `exposed`."""
        return self._grads[name]

    def clear(self, name: str, stream: Any) -> None:
        """Set a parameter's gradient to zero."""
        self._engine.clear(self._grads[name], stream)

    def zero(self, stream: Any) -> None:
        """Set the gradients to zero."""
        for flat in self._flat_grads.values():
            self._engine.clear(flat, stream)

    def hold(self, stream: Any) -> Any:
        """Return copies of the present gradients for `restore`."""
        return [copied(own, stream) for own in self._dense]

    def restore(self, held: Any, stream: Any) -> None:
        """Copy the gradients back that `hold` has returned."""
        for own, copy in zip(self._dense, held, strict=True):
            self._engine.put(own.facts.array, copy, stream)

    def set_param(self, name: str, value: Any, stream: Any) -> None:
        """Check values and copy them to a parameter; one with a master gets the rounded master."""
        label, param = f"params[{name!r}]", self.params[name]
        own = _given(label, name, value, self._engine)
        self._check(label, own, name)
        refuse_beyond(label, own, param.dtype)
        self._engine.put(self.updated[name], readable(own, self._engine), stream)
        if self._masters is not None:
            self._masters.round(stream, {name: None})

    def take_over(self, stream: Any, *, whole: bool = True) -> None:
        """Copy what was written to parameters to masters; unless `whole`, at rows with gradients.

        In a sparse group these are all the rows whose masters an update changes.
        """
        if self._masters is not None:
            self._masters.take_over(stream, None if whole else self._touched())

    def round(self, stream: Any, *, whole: bool = True) -> None:
        """Set parameters to their rounded masters; unless `whole`, at rows with gradients."""
        if self._masters is not None:
            self._masters.round(stream, None if whole else self._touched())

    def _touched(self) -> Rows | None:
        """Return the indices of each parameter's rows that have gradients; None means all rows."""
        return None

    def fitting(self, name: str, grad: Any, stream: Any) -> Any:
        """Check that a gradient fits; return the array or slices to copy in, None for None."""
        if grad is None:
            return None
        label, param = f"grads[{name!r}]", self.updated[name]
        own = _given(label, name, grad, self._engine)
        if self.sparse != (own.slices is not None):
            wanted = "IndexedSlices, as its group is sparse" if self.sparse else "an array"
            raise TypeError(expected(label, wanted, type(grad).__name__))
        self._check(label, own, name)
        if self._nonfinite not in ("skip", "raise"):
            refuse_beyond(label, own, param.dtype)
        return self._apart(name, own, stream)

    def _check(self, label: str, own: Gradient, name: str) -> None:
        """Refuse values whose shape or dtype fits neither a parameter nor its master."""
        param = self.params[name]
        if own.dense_shape != param.shape:
            raise ValueError(expected(label, f"shape {param.shape}", own.dense_shape))
        elsewhere = own.engine.name != "cpu"  # only the host's engine casts
        dtypes = dict.fromkeys([param.dtype, self.updated[name].dtype])
        if elsewhere and not (own.native in dtypes and own.facts.c_order):
            wanted = f"dtype {' or '.join(map(str, dtypes))} in C order"
            raise TypeError(expected(label, wanted, own.native))
        if own.dtype.components == 2 and param.dtype.kind != "c":
            raise TypeError(expected(label, f"dtype {param.dtype}", own.native))

    def _apart(self, name: str, own: Gradient, stream: Any) -> Any:
        """Return a gradient's array; a copy if it overlaps gradients and is not its own target."""
        begin, end = own.facts.extent
        for first, last in (extent for group in self.neighbours for extent in group.extents):
            if begin < last and first < end and own.engine is self._engine:
                alike = own.facts.lies_as(self._facts[name])
                return own.facts.array if alike else copied(own, stream)
        return own.facts.array


def _given(label: str, name: str, grad: Any, engine: Engine) -> Gradient:
    """Return the description of an array, which lies on the engine's device or on the host."""
    if engine.name != "cpu":
        values = grad.values if isinstance(grad, IndexedSlices) else grad
        engine = engines.of(values)
    return describe(label, name, grad, engine)


def refuse_beyond(label: str, own: Gradient, dtype: np.dtype[Any]) -> None:
    """Refuse a gradient with finite elements that become infinite when cast to a dtype."""
    if np.can_cast(own.native, dtype):
        return
    values = own.facts.array
    parts = (values.real, values.imag) if own.dtype.components == 2 else (values,)
    largest = max(np.max(np.abs(part), where=np.isfinite(part), initial=0) for part in parts)
    if np.isinf(largest.astype(np.empty(0, dtype).real.dtype)):
        wanted = f"elements that {dtype} holds, to which they are cast"
        got = f"{own.native} up to {largest}; clip them first, or take a wider dtype"
        raise ValueError(expected(label, wanted, got))


def copied(own: Gradient, stream: Any, dtype: Any = None) -> Any:
    """Return a copy of a gradient's array in C order, on its own engine, cast to `dtype`."""
    made = own.engine.empty(own.shape, own.native if dtype is None else dtype)
    own.engine.put(made, own.facts.array, stream)
    return made


def _read_only(array: Any) -> Any:
    """Return a read-only view of a NumPy array, and other arrays as they are."""
    if isinstance(array, np.ndarray):
        array = array.view()
        array.flags.writeable = False
    return array


def _taken(own: Gradient) -> Any:
    """Return a parameter's own array, after checking that it can be updated in place."""
    if isinstance(own.source, np.generic):
        wanted = "an array, which can be updated where it is, for copy=False"
        raise TypeError(expected(own.name, wanted, type(own.source).__name__))
    check_writable(own)
    if not own.facts.c_order or own.address % own.dtype.storage.itemsize:
        lies = "a misaligned array" if own.facts.c_order else f"strides {own.facts.strides}"
        got = f"{lies}; pass a contiguous copy"
        raise ValueError(expected(own.name, "C order for copy=False", got))
    return own.facts.array


def readable(own: Gradient, engine: Engine) -> Any:
    """Return an array that `engine` can copy: one of its own in C order, or one on the host."""
    if own.engine is engine and own.facts.c_order:
        return own.facts.array
    return own.engine.on_host(own.facts, own.engine.stream_of([own.facts]))


class SparseGroupState(GroupState):
    """One sparse group at run time: each gradient is rows of its parameter and their indices."""

    sparse = True

    def __init__(self, group: Any, *arguments: Any, copies: bool = True) -> None:
        super().__init__(group, *arguments, copies=copies)
        self.rows = {name: HeldRows(param, self._engine) for name, param in self.updated.items()}

    def gradients(self) -> list[Gradient]:
        """Return the gradient of each parameter; one that is not there has no rows."""
        return [rows.gradient(self._gradient, name) for name, rows in self.rows.items()]

    def seen(self, name: str) -> IndexedSlices | None:
        """Return a parameter's gradient as `IndexedSlices`, None if there is none."""
        rows = self.rows[name]
        return rows.slices if rows.is_present else None

    def clear(self, name: str, stream: Any) -> None:  # noqa: ARG002
        """Forget the rows of a parameter."""
        self.rows[name].clear()

    def append(self, name: str, grad: IndexedSlices, stream: Any) -> None:
        """Append the rows of slices, which were checked, to a parameter's."""
        self.rows[name].append(grad, stream)

    def hold(self, stream: Any) -> Any:  # noqa: ARG002
        """Return the rows with their memory; the group has none after that."""
        return [rows.give_away() for rows in self.rows.values()]

    def restore(self, held: Any, stream: Any) -> None:  # noqa: ARG002
        """Take the rows back that `hold` has returned."""
        for rows, own in zip(self.rows.values(), held, strict=True):
            rows.take_back(own)

    def _touched(self) -> Rows:
        return {name: rows.indices for name, rows in self.rows.items()}

    def zero(self, stream: Any) -> None:  # noqa: ARG002
        """Forget the rows."""
        for rows in self.rows.values():
            rows.clear()

    def _apart(self, name: str, own: Gradient, stream: Any) -> Any:
        """Return slices; their values are a copy if they overlap another parameter's gradient."""
        assert own.slices is not None
        begin, end = own.facts.extent
        values = own.facts.array
        if own.engine is self._engine:
            held = [extent for group in self.neighbours for extent in group.extents]
            rows = [group.rows for group in self.neighbours if isinstance(group, SparseGroupState)]
            held += [one.extent for each in rows for key, one in each.items() if key != name]
            if any(begin < last and first < end for first, last in held):
                values = copied(own, stream)
        return own.slices.with_values(values)

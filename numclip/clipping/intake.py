"""Intake of groups' gradients: copied in or added; notes which were set since the last step."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import compress, repeat
from operator import is_, itemgetter
from typing import Any

from numclip.border.structures import Outline, dotted
from numclip.clipping.buffers import GroupState, SparseGroupState
from numclip.clipping.held_rows import takers_of
from numclip.clipping.steps import NOBODY, Turn
from numclip.engine import Engine
from numclip.isolation import isolated


def _picker(names: Sequence[str]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return a function that makes a tuple of a dict's values, in the order of `names`."""
    if len(names) > 1:
        return itemgetter(*names)
    (name,) = names
    return lambda grads: (grads[name],)


class Intake:
    """Takes gradients for the parameters of some groups.

    Attributes
    ----------
    names : tuple of str
        The parameters, in order.
    clipped : Turn or None
        The step that has clipped the present gradients; None if they are not clipped.
    applied : bool
        Whether the last update has applied all gradients that were there before it.
    fresh : set of str
        The parameters whose gradients were set since that update.
    """

    def __init__(self, groups: Sequence[GroupState], engine: Engine) -> None:
        self._groups, self._engine = groups, engine
        self._owners = {name: group for group in groups for name in group.names}
        self.names = tuple(self._owners)
        self._takers = takers_of(groups, engine)
        self._picked = _picker(self.names)
        self._outline: tuple[Outline, list[int]] | None = None  # the last seen, and its order
        self.clipped: Turn | None = None
        self.applied = False
        self.fresh: set[str] = set()

    def owner(self, name: str) -> GroupState:
        """Return the group of a parameter."""
        if name not in self._owners:
            raise KeyError(f"{name!r} is no parameter; there are {', '.join(self._owners)}")
        return self._owners[name]

    def put(self, grads: Any, stream: Any, *, adds: bool) -> None:
        """Check all gradients, then copy them in or add them."""
        items = self.known(grads)
        if items is not None and self._take(items, adds=adds):
            self._note(self.names)
            return
        named = self.named(grads)
        kept = self._takers[0].kept if self._takers else None
        items = tuple([named.get(name, kept) for name in self.names])
        if not self._take(items, adds=adds):
            self._put_each(named, stream, adds=adds)
        self._note(named)

    def put_all(self, items: tuple[Any, ...], stream: Any) -> None:
        """Copy in gradients of all parameters in their order, with None for missing ones.

        They are not noted in `fresh`, and `clipped` stays as it is.
        """
        if not self._take(items, adds=False):
            self._put_each(dict(zip(self.names, items, strict=True)), stream)

    def ordered(self, grads: Any) -> tuple[Any, ...]:
        """Return gradients in the order of their parameters, with None for missing ones."""
        items = self.known(grads)
        return tuple(map(self.named(grads).get, self.names)) if items is None else items

    def known(self, grads: Any) -> tuple[Any, ...] | None:
        """Return the same for a complete flat dict or the structure seen last, else None."""
        if type(grads) is dict:
            grads = grads.copy()  # another thread may change its keys
            if len(grads) == len(self.names):
                try:
                    return self._picked(grads)
                except KeyError:  # it is nested
                    pass
        if self._outline is None:
            return None
        outline, order = self._outline
        items = outline.items(grads)
        return None if items is None else tuple([items[k] for k in order])

    def named(self, grads: Any) -> Mapping[str, Any]:
        """Return gradients by the names of their parameters, and remember their structure."""
        flat = isinstance(grads, Mapping) and grads.keys() <= self._owners.keys()
        named: Mapping[str, Any] = grads
        if not flat:
            named = dotted(grads, "grads")
            for name in named:
                self.owner(name)
        reads = self._engine.name == "cpu" and isinstance(grads, (dict, list, tuple))
        if reads and len(named) == len(self.names) and not (flat and type(grads) is dict):
            outline = Outline(grads)
            numbers = {name: k for k, name in enumerate(outline.names)}
            if numbers.keys() == self._owners.keys():
                self._outline = outline, [numbers[name] for name in self.names]
        return named

    def _take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Copy arrays in by one call, or add them; return True if that was possible."""
        for taker in self._takers:
            if taker.take(items, adds=adds):
                return True
        return bool(self._takers) and self._take_copies(self._takers[0], items, adds=adds)

    @isolated
    def _take_copies(self, taker: Any, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Do so with copies of small arrays of other dtypes or orders: they take microseconds."""
        copies = taker.copies(items, adds=adds)
        return copies is not None and taker.take(copies, adds=adds)

    @isolated
    def _put_each(self, named: Mapping[str, Any], stream: Any, *, adds: bool = False) -> None:
        """Check each gradient, then copy them in or add them one by one."""
        fitting = [(self.owner(name), name, grad) for name, grad in named.items()]
        fitting = [(own, name, own.fitting(name, grad, stream)) for own, name, grad in fitting]
        dense = [
            (own.seen(name), grad)
            for own, name, grad in fitting
            if grad is not None and not own.sparse
        ]
        self._engine.put_all(dense, stream, adds=adds)
        for own, name, grad in fitting:
            if not adds and (grad is None or own.sparse):
                own.clear(name, stream)
        for own, name, grad in fitting:
            if isinstance(own, SparseGroupState) and grad is not None:
                own.append(name, grad, stream)

    def _note(self, named: Iterable[str]) -> None:
        """Note the parameters whose gradients were set."""
        self.clipped = None
        if self.applied:
            self.fresh.update(named)
            if len(self.fresh) == len(self.names):
                self.forget()

    def forget(self, *, applied: bool = False) -> None:
        """Mark all gradients as not clipped, and as applied or set for the next step."""
        self.clipped, self.applied = None, applied
        if self.fresh:
            self.fresh.clear()

    def stale(self) -> frozenset[str]:
        """Return the parameters whose gradients were applied by the last update and not set since.

        There are none if no gradient was set since. Parameters in `exposed` are left out: the user
        may have written to the views of their gradients.
        """
        if not self.fresh:
            return NOBODY
        seen = {name for group in self._groups for name in group.exposed}
        return frozenset(self.names) - self.fresh - seen

    def missing(self, items: Iterable[Any]) -> frozenset[str]:
        """Return the parameters whose entry in `items`, one for each in order, is None."""
        if not any(map(is_, items, repeat(None))):
            return NOBODY
        return frozenset(compress(self.names, map(is_, items, repeat(None))))

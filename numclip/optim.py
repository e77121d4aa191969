"""Optimizers that clip and update in one pass."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Never

import numpy as np

from numclip import foreign, inputs, state
from numclip.dtypes import Array, DType, as_stored
from numclip.general_step import GeneralStep
from numclip.groups import ParamGroups
from numclip.inputs import Entry
from numclip.kernels import backend, formulas
from numclip.layout import aligned
from numclip.outputs import check_writeable
from numclip.report import ClipReport
from numclip.step import Step

Rate = float | Callable[[int], float]


class _Slots:
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


class Optimizer(state.Saved):
    """What the optimizers share: groups, learning rates, states and steps."""

    state_names: tuple[str, ...]

    def __init__(self, groups: ParamGroups | None, lr: Rate) -> None:
        if groups is not None and not isinstance(groups, ParamGroups):
            raise TypeError(f"groups: expected ParamGroups or None, got {type(groups).__name__}")
        if not callable(lr):
            inputs.finite_bound("lr", lr)
        self.groups, self.lr = groups, lr
        self._slots: dict[str, _Slots] = {}
        self._dense: dict[str, list[tuple[Any, backend.Update]]] = {}
        self._own: dict[int, tuple[Array, _Slots]] = {}
        self._applied = 0
        if groups is not None and groups.device == "cuda":
            self._slots = groups.optimizer_slots(len(self.state_names))  # type: ignore[attr-defined]
            return
        for group in groups or ():
            entries = [inputs.entry(name, name, param) for name, param in group.params.items()]
            params, dtypes = [entry.flat for entry in entries], [entry.dtype for entry in entries]
            slots = self._slots[group.name] = _Slots(params, dtypes, len(self.state_names))
            if not group.sparse:
                self._dense[group.name] = slots.dense(group.gradients()[0])

    @abstractmethod
    def settings(self, lr: float) -> list[float]:
        """Return the numbers of a step."""

    @abstractmethod
    def _take(self, update: backend.Update, factors: Array, lr: float, count: int) -> None:
        """Update parameters and states, for the `count`-th time."""

    def _rate(self, own: float | None, number: int) -> float:
        if own is not None:
            return inputs.finite_bound("lr", own)
        if callable(self.lr):
            return inputs.finite_bound(f"lr(step={number})", self.lr(number))
        return inputs.finite_bound("lr", self.lr)

    def step(self, *, unscale: float = 1.0) -> ClipReport:
        """Clip every group by its rule and update its parameters.

        Each gradient is read once for the norms and once for the update, and not written
        (but by rules that act within tensors, `ByValue`, `Adaptive` and `ByNorm` with axes,
        where ``nonfinite="zero"`` finds something, and where a factor is subnormal). A skipped
        group changes nothing.

        Parameters
        ----------
        unscale : float, default 1.0
            The loss scale that the gradients carry, > 0.

        Returns
        -------
        ClipReport
            As `ParamGroups.clip` returns it.

        Raises
        ------
        NonFiniteGradientError
            Where a group's policy is "raise". Nothing is changed in any group.
        """
        groups = self._managed()
        number = groups.step
        scale = inputs.positive("unscale", unscale)
        rates = {group.name: self._rate(group.lr, number) for group in groups}
        if groups.device == "cuda":
            return groups.update(self, rates, scale)  # type: ignore[attr-defined, no-any-return]
        found = groups.judged(scale, write=True)
        for one in found:
            if not one.skipped:
                self._update(one, rates[one.group.name])
        return groups.commit(found)

    def _managed(self) -> ParamGroups:
        if self.groups is None:
            raise ValueError("groups: expected ParamGroups to step, got None; see apply_gradients")
        return self.groups

    def _update(self, step: Step, lr: float) -> None:
        group, slots = step.group, self._slots[step.group.name]
        slots.steps += 1
        if isinstance(step, GeneralStep) and group.sparse:
            for k, entry in enumerate(step.scaled_copies()):
                rows = slots.rows(k, entry)  # scaled first: sums of raw rows could overflow
                self._take(rows, np.ones(len(rows.chunks)), lr, slots.steps)
            return
        factors = step.update_factors()
        for places, update in self._dense[group.name]:
            self._take(update, factors[places], lr, slots.steps)

    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Array]]) -> None:
        """Update arrays of the user's own, in place; nothing is clipped.

        Parameters
        ----------
        grads_and_vars : iterable of (gradient, array)
            Gradients of the arrays' shapes and dtypes, `IndexedSlices` or None, which leaves
            its array as it is. Arrays (of NumPy, PyTorch or with DLPack) are C-contiguous; the
            optimizer keeps a state for each that it has met, and the array with it: a new view
            is a new array. These states are not in `state_dict`.

        Raises
        ------
        TypeError, ValueError
            Where a pair does not fit; the message names it. Nothing is updated then.
        """
        pairs = [
            (entry, param, variable)
            for number, (grad, variable) in enumerate(grads_and_vars)
            if grad is not None
            for entry, param in [_pair(number, grad, variable)]
        ]
        lr = self._rate(None, self._applied)
        self._applied += 1
        for entry, param, variable in pairs:
            slots = self._slots_of(variable, param, entry.dtype)
            slots.steps += 1
            if entry.slices is not None:
                rows = slots.rows(0, entry)
                self._take(rows, np.ones(len(rows.chunks)), lr, slots.steps)
            else:
                self._take(slots.dense([entry])[0][1], np.ones(1), lr, slots.steps)

    def _slots_of(self, variable: Array, param: Array, dtype: DType) -> _Slots:
        """Return the states of an array of the user's, new ones if it is not as it was."""
        known, slots = self._own.get(id(variable), (None, None))
        fits = slots is not None and slots.dtypes == [dtype] and slots.params[0].size == param.size
        if slots is None or known is not variable or not fits:
            slots = _Slots([param], [dtype], len(self.state_names))
            self._own[id(variable)] = variable, slots
        slots.params = [param]  # the memory may have moved
        return slots

    def __reduce__(self) -> Never:
        raise TypeError("optimizers cannot be copied; make a new one and load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the groups' optimizer states, and how often each was updated."""
        groups = {}
        for group in self._managed():
            slots = self._slots[group.name]
            views = [dict(zip(self.state_names, own, strict=True)) for own in slots.views]
            copies = [{name: np.array(array) for name, array in own.items()} for own in views]
            params = dict(zip(group.params, copies, strict=True))
            groups[group.name] = {"steps": slots.steps, "states": params}
        return {"optimizer": type(self).__name__, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take up states from `state_dict`.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer of the same kind, for groups with the same parameters.

        Raises
        ------
        StateError
            Where it does not fit; the message says where. Nothing is changed then.
        """
        expected = self.state_dict()
        state.matches(expected, state_dict)
        if expected["optimizer"] != state_dict["optimizer"]:
            raise state.StateError(
                f"optimizer: expected {expected['optimizer']}, got {state_dict['optimizer']}"
            )
        if any(saved["steps"] < 0 for saved in state_dict["groups"].values()):
            raise state.StateError("steps: expected numbers >= 0")
        for name, saved in state_dict["groups"].items():
            slots = self._slots[name]
            slots.steps = saved["steps"]
            for param, own in zip(self._managed()[name].params, slots.views, strict=True):
                for label, array in zip(self.state_names, own, strict=True):
                    array[...] = saved["states"][param][label]


def _pair(number: int, grad: Any, variable: Any) -> tuple[Entry, Array]:
    """Return a gradient and its variable's storage, after checking that they fit."""
    name = f"grads_and_vars[{number}]"
    known = isinstance(variable, np.ndarray)
    param = variable if known else foreign.as_numpy(name, variable)
    if param is None or not param.flags.c_contiguous:
        raise TypeError(f"{name}: expected a C-contiguous array to update, got {type(variable)}")
    entry = inputs.entry(name, number, grad)
    check_writeable(param, name)
    if entry.dense_shape != param.shape or entry.values.dtype != param.dtype:
        raise ValueError(
            f"{name}: expected a gradient of shape {param.shape} and dtype {param.dtype}, "
            f"got {entry.dense_shape} and {entry.values.dtype}"
        )
    if entry.values.flags.f_contiguous and not entry.values.flags.c_contiguous:
        entry = inputs.entry(name, number, np.ascontiguousarray(entry.values))
    return entry, as_stored(param.reshape(-1))


class SGD(Optimizer):
    """Gradient descent, with momentum or Nesterov's.

    ``v = momentum * v + g`` and ``p -= lr * v`` (Nesterov: ``p -= lr * (g + momentum * v)``),
    where ``g`` is the clipped gradient plus ``weight_decay * p``.

    Parameters
    ----------
    groups : ParamGroups or None
        The parameters; None for `apply_gradients` alone.
    lr : float or function of the step
        The learning rate, >= 0. A group's own `lr` goes before it.
    momentum : float, default 0.0
        At least 0.
    nesterov : bool, default False
        Whether to look ahead; needs a momentum.
    weight_decay : float, default 0.0
        The L2 penalty, added to the gradient after it is clipped, >= 0.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.

    Notes
    -----
    States are float64 for float64 parameters, else float32. Sparse parameters, their velocity
    and decay are updated at the rows their gradient has. **Source.** ``torch.optim.SGD``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> groups = nc.ParamGroups([nc.Group("model", {"w": np.ones(2)}, clip=nc.ByGlobalNorm(1.0))])
    >>> optimizer = nc.SGD(groups, lr=0.5)
    >>> groups.set_grads({"w": np.array([3.0, 4.0])})
    >>> optimizer.step().norm
    5.0
    >>> groups.params["w"].round(12)
    array([0.7, 0.6])
    """

    def __init__(
        self,
        groups: ParamGroups | None,
        lr: Rate,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: float = 0.0,
    ) -> None:
        self.momentum = inputs.finite_bound("momentum", momentum)
        self.nesterov = bool(nesterov)
        self.weight_decay = inputs.finite_bound("weight_decay", weight_decay)
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("momentum: expected a number > 0 for nesterov=True, got 0")
        self.state_names = ("velocity",) if self.momentum else ()
        super().__init__(groups, lr)

    def settings(self, lr: float) -> list[float]:
        """Return the numbers of a step, as kernels take them."""
        weights = (1.0, self.momentum) if self.nesterov else (0.0, 1.0)
        return [lr, self.weight_decay, self.momentum, *weights]

    def _take(self, update: backend.Update, factors: Array, lr: float, _count: int) -> None:
        settings = self.settings(lr)
        backend.descend(update, factors, settings, momentum=self.momentum > 0.0)


class Adam(Optimizer):
    """Adam with decoupled weight decay.

    ``m = b1 m + (1 - b1) g``, ``v = b2 v + (1 - b2) g**2`` and
    ``p -= lr * (m / (1 - b1**t) / (sqrt(v / (1 - b2**t)) + eps) + weight_decay * p)``, where
    ``g`` is the clipped gradient.

    Parameters
    ----------
    groups : ParamGroups or None
        The parameters; None for `apply_gradients` alone.
    lr : float or function of the step, default 1e-3
        The learning rate, >= 0. A group's own `lr` goes before it.
    betas : pair of float, default (0.9, 0.999)
        The decay of both averages, in [0, 1).
    eps : float, default 1e-8
        Added to the root, >= 0.
    weight_decay : float, default 0.0
        The share of each parameter that goes with a step, times `lr`, >= 0.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.

    Notes
    -----
    States are float64 for float64 parameters, else float32. Sparse parameters, their averages
    and decay are updated at the rows their gradient has. **Source.** Kingma and Ba 2015 (arXiv
    1412.6980, algorithm 1); Loshchilov and Hutter 2019 (arXiv 1711.05101, algorithm 2);
    ``torch.optim.AdamW``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> groups = nc.ParamGroups([nc.Group("model", {"w": np.ones(2)}, clip=nc.ByGlobalNorm(1.0))])
    >>> optimizer = nc.Adam(groups, lr=0.1)
    >>> groups.set_grads({"w": np.array([3.0, -4.0])})
    >>> optimizer.step().clipped
    True
    >>> groups.params["w"].round(6)
    array([0.9, 1.1])
    """

    state_names = ("mean", "square")

    def __init__(
        self,
        groups: ParamGroups | None,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas = inputs.fractions("betas", betas, 2)
        self.eps = inputs.finite_bound("eps", eps)
        self.weight_decay = inputs.finite_bound("weight_decay", weight_decay)
        super().__init__(groups, lr)

    def settings(self, lr: float) -> list[float]:
        """Return the numbers of a step, before the corrections of the moments' biases."""
        return [lr, self.weight_decay, *self.betas, self.eps]

    def _take(self, update: backend.Update, factors: Array, lr: float, count: int) -> None:
        first, second = self.betas
        rate, root_bias = formulas.adam_rate(lr, count, first, second)
        shares = lr * self.weight_decay, 1.0 - first, 1.0 - second
        settings = *shares, rate, self.eps * root_bias
        backend.adam(update, factors, settings)

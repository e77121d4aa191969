"""Optimizers that clip and update in one pass."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Never

import numpy as np

from numclip import state
from numclip.border import arguments
from numclip.clipping.array_updating import ArrayUpdater, not_a_pair
from numclip.clipping.updating import GroupUpdater
from numclip.dtypes import Array
from numclip.errors import entries, entries_by_name
from numclip.groups import ParamGroups
from numclip.isolation import isolated
from numclip.report import ClipReport
from numclip.running_rules import MOST

Rate = float | Callable[[int], float]


class Optimizer(state.Saved):
    """What the optimizers share: groups, learning rates, states and steps."""

    state_names: tuple[str, ...] = ()

    def __init__(self, groups: ParamGroups | None, lr: Rate) -> None:
        if groups is not None and not isinstance(groups, ParamGroups):
            raise TypeError(f"groups: expected ParamGroups or None, got {type(groups).__name__}")
        if not callable(lr):
            arguments.finite_bound("lr", lr)
        self.groups, self.lr = groups, lr
        self._updater = None if groups is None else groups._manager.updater(self)
        self._arrays = ArrayUpdater(self)
        self._applied = 0

    @property
    @abstractmethod
    def kernel(self) -> str:
        """The name of the update kernel, of those in `numclip.methods`."""

    @abstractmethod
    def settings(self, lr: float) -> list[float]:
        """Return the numbers that the user has chosen for a step."""

    def rate(self, own: float | None, number: int) -> float:
        """Return the learning rate at a step, a group's own where there is one."""
        rate = self.lr if own is None else own
        if type(rate) is float and 0.0 <= rate < math.inf:
            return rate
        if callable(rate):
            return arguments.finite_bound(f"lr(step={number})", rate(number))
        return arguments.finite_bound("lr", rate)

    def step(self, grads: Any = None, *, unscale: float = 1.0, comm: Any = None) -> ClipReport:
        """Clip every group by its rule and update its parameters.

        Each gradient is read once for the norms and once for the update, and not written
        (but the groups' own by rules that act within tensors, `ByValue`, `Adaptive` and `ByNorm`
        with axes, where ``nonfinite="zero"`` finds something, and where a factor is subnormal).
        A skipped group changes nothing.

        Parameters
        ----------
        grads : mapping of str to array, IndexedSlices or None, optional
            The gradients of the step, by parameter or nested as the parameters are, as
            `ParamGroups.set_grads` takes them; the groups' own otherwise. They are never
            written. A parameter without one, or with None, is left as it is, its states too; a
            group without any does not count the step, but groups that share a norm count
            together.
        unscale : float, default 1.0
            The loss scale that the gradients carry, > 0.
        comm : intra-communicator of mpi4py, optional
            The ranks that step together, see `ParamGroups.clip`. Rates and settings must be the
            same on all.

        Returns
        -------
        ClipReport
            As `ParamGroups.clip` returns it.

        Raises
        ------
        NonFiniteGradientError
            Where a group's policy is "raise". Nothing is changed in any group.
        RankError
            On all ranks, as from `ParamGroups.clip`. Nothing is changed on any.
        KeyError, TypeError, ValueError
            Where an argument does not fit; the message names it. Nothing is changed then.

        Notes
        -----
        **Where gradients are read.** Ordinary arrays of NumPy, of their parameters' (or masters')
        dtypes and in C order, are read where they are, and so are the rows of `IndexedSlices` (of
        few megabytes, and whose parameters have no masters). Others are copied to ``groups.grads``
        first, as by `set_grads`: those of another dtype, order or library, those that overlap
        parameters or states, all of a group whose rule acts within tensors or whose policy is
        "zero", and those on a GPU. So what ``groups.grads`` holds after ``step(grads)`` is not
        defined.

        **After clip().** A step without `grads` after `ParamGroups.clip` applies what it has
        written, as it is: the step is counted once, at the clip, whose report is returned, and
        `unscale` need not be repeated. Gradients that are set after the clip are clipped.

        **Applied once.** Gradients that a step has applied are not applied again if others are
        set: after `set_grads` of some parameters, those without a new gradient are left as they
        are, as by ``step(grads)``. Where nothing was set since, or a view of a gradient was asked
        for (``groups.grads[name]``, ``flat_grads``), it may have been written without our
        knowing, and is applied as it is. After `zero_grads` all are zero, and are applied.
        """
        groups, updater = self.groups, self._updater
        if groups is None or updater is None:
            groups, updater = self._managed()
        manager = groups._manager
        ranks = manager.ranks_of(comm)
        if ranks is None:  # a block that does nothing would take 0.4 us
            scale = arguments.positive("unscale", unscale)
            return ClipReport.of(manager.update(updater, scale, grads))
        with ranks.communicator:
            scale = arguments.positive("unscale", unscale)
            return ClipReport.of(manager.update(updater, scale, grads, ranks))

    def _managed(self) -> tuple[ParamGroups, GroupUpdater]:
        if self.groups is None or self._updater is None:
            raise ValueError("groups: expected ParamGroups to step, got None; see apply_gradients")
        return self.groups, self._updater

    @isolated
    def apply_gradients(self, grads_and_vars: Iterable[tuple[Any, Array]]) -> None:
        """Update arrays of the user's own, in place; nothing is clipped.

        Parameters
        ----------
        grads_and_vars : iterable of (gradient, array)
            Gradients of the arrays' shapes and dtypes, `IndexedSlices` or None, which leaves
            its array as it is. Arrays (of NumPy, PyTorch or with DLPack) are C-contiguous; the
            optimizer keeps a state for the memory of each, by its address, while that lives (other
            libraries' arrays are kept, too): views of it may be made anew. One of another dtype or
            length at that address gets a new state. These states are not in `state_dict`. An array
            that comes twice is updated twice; apart from that, arrays share no memory with one
            another. Gradients are read as they are before the call: what an update would write over
            is copied first. Those of other dtypes are cast as `ParamGroups.set_grads` casts them,
            in the host's memory. CUDA arrays are taken with gradients that are CUDA arrays in C
            order or slices of them: one launch for each dtype, whatever their number, on the stream
            of the first array's library, after slices are coalesced.

        Raises
        ------
        TypeError, ValueError
            Where a pair does not fit; the message names it. Nothing is updated then.

        Notes
        -----
        Arrays are described once, also where 32 sets of them take turns, layers for instance.
        Plain gradients are found for them anew, wherever they lie.
        """
        numbers, grads, variables = [], [], []
        pairs = entries("grads_and_vars", "pairs of a gradient and an array", grads_and_vars)
        for number, pair in enumerate(pairs):
            try:
                gradient, variable = pair
            except (TypeError, ValueError):
                raise TypeError(not_a_pair(number, pair)) from None
            if gradient is not None:
                numbers.append(number)
                grads.append(gradient)
                variables.append(variable)
        lr = self.rate(None, self._applied)  # which may apply gradients itself
        rounds = self._arrays.describe(numbers, grads, variables)
        self._applied += 1
        self._arrays.update(rounds, lr)

    def __repr__(self) -> str:
        own = {name: value for name, value in vars(self).items() if not name.startswith("_")}
        settings = {"lr": own.pop("lr"), **own}
        shown = [f"{k}={v!r}" for k, v in settings.items() if k not in ("groups", "state_names")]
        return f"{type(self).__name__}({', '.join(shown)})"

    def __reduce__(self) -> Never:
        raise TypeError("optimizers cannot be copied; make a new one and load_state_dict")

    def state_dict(self) -> dict[str, Any]:
        """Return copies of the groups' optimizer states, and how often each was updated."""
        managed, updater = self._managed()
        groups = {}
        for group in managed:
            slots = updater.slots[group.name]
            views = [dict(zip(self.state_names, own, strict=True)) for own in slots.views]
            copies = [{name: np.array(array) for name, array in own.items()} for own in views]
            params = dict(zip(group.params, copies, strict=True))
            groups[group.name] = {"steps": slots.steps, "states": params}
        return {"optimizer": type(self).__name__, "groups": groups}

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> list[str]:
        """Take up states from `state_dict`.

        Parameters
        ----------
        state_dict : mapping
            From an optimizer of the same kind, for groups with the same parameters.
        strict : bool, default True
            False takes up the states of parameters that fit by name and size, and the count of
            steps of groups of which any does. All else stays as it is. Rates, betas and decay are
            no state: they are those of this optimizer.

        Returns
        -------
        list of str
            What was left out and why; empty where all fits.

        Raises
        ------
        StateError
            Where it does not fit and is to; the message says where. Nothing is changed then.
        """
        groups, updater = self._managed()
        fit, expected = state.Fit(strict=strict), self.state_dict()
        loaded = entries_by_name("state_dict", state_dict)
        kinds = expected["optimizer"], loaded.get("optimizer")
        if kinds[0] != kinds[1]:
            fit.leave_out(f"optimizer: expected {kinds[0]}, got {kinds[1]}")
            return fit.left_out
        found = fit.tree(expected, loaded)
        for name, saved in found["groups"].items():
            own = expected["groups"][name]
            pairs = [
                (array, own["states"][param][label])
                for param, arrays in saved["states"].items()
                for label, array in arrays.items()
            ]
            fits = not pairs or any(array is not present for array, present in pairs)
            if not 0 <= saved["steps"] <= MOST:
                fit.leave_out(
                    f"steps of {name!r}: expected a count from 0 to {MOST}, got {saved['steps']}"
                )
                fits = False
            if not fits:
                saved["steps"] = own["steps"]
        for name, saved in found["groups"].items():
            slots = updater.slots[name]
            slots.steps = saved["steps"]
            for param, own in zip(groups[name].params, slots.views, strict=True):
                for label, array in zip(self.state_names, own, strict=True):
                    array[...] = saved["states"][param][label]
        return fit.left_out


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
        self.momentum = arguments.finite_bound("momentum", momentum)
        self.nesterov = bool(nesterov)
        self.weight_decay = arguments.finite_bound("weight_decay", weight_decay)
        if self.nesterov and self.momentum == 0.0:
            raise ValueError("momentum: expected a number > 0 for nesterov=True, got 0")
        self.state_names = ("velocity",) if self.momentum else ()
        super().__init__(groups, lr)

    def settings(self, lr: float) -> list[float]:
        """Return the rate, the decay, the momentum, and the weights of gradient and velocity."""
        momentum = self.momentum
        own, kept = (1.0, momentum) if self.nesterov else (0.0, 1.0)
        return [lr, self.weight_decay, momentum, own, kept]

    @property
    def kernel(self) -> str:
        """The name of the update kernel."""
        return "descend_with_momentum" if self.momentum else "descend"


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

    kernel = "adam"
    state_names = ("mean", "square")

    def __init__(
        self,
        groups: ParamGroups | None,
        lr: Rate = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        self.betas = arguments.fractions("betas", betas, 2)
        self.eps = arguments.finite_bound("eps", eps)
        self.weight_decay = arguments.finite_bound("weight_decay", weight_decay)
        super().__init__(groups, lr)

    def settings(self, lr: float) -> list[float]:
        """Return the rate, the decay, both betas and eps."""
        first, second = self.betas
        return [lr, self.weight_decay, first, second, self.eps]

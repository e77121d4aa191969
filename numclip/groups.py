"""Parameter groups: parameters and gradients in flat buffers, clipped group by group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, Never

from numclip import state
from numclip.border import arguments
from numclip.border.gradients import describe
from numclip.border.results import refuse_overlaps
from numclip.clipping.buffers import GroupState
from numclip.clipping.manager import Manager
from numclip.clipping.ranks import Ranks
from numclip.engine import named
from numclip.errors import entries_by_name, expected
from numclip.group import Group, checked
from numclip.history import History
from numclip.isolation import isolated
from numclip.report import ClipReport
from numclip.resuming import (
    arrays_on_host,
    copied,
    fitting_history,
    fitting_rules,
    load_arrays,
)
from numclip.running_rules import MOST


class _Named(MutableMapping[str, Any]):
    """Arrays of all groups by the names of parameters; assignment copies in."""

    def __init__(self, groups: ParamGroups) -> None:
        self._groups = groups

    def __delitem__(self, name: str) -> None:
        raise TypeError(f"{name!r}: parameters and gradients cannot be deleted, only overwritten")

    def __iter__(self) -> Iterator[str]:
        return iter(self._groups._manager.intake.names)

    def __len__(self) -> int:
        return len(self._groups._manager.intake.names)


class _Params(_Named):
    """The parameters."""

    def __getitem__(self, name: str) -> Any:
        return self._groups._manager.intake.owner(name).params[name]

    @isolated
    def __setitem__(self, name: str, value: Any) -> None:
        if value is not self[name]:  # as it is after ``params[name] -= step``
            self._groups._manager.intake.owner(name).set_param(name, value, self._groups.stream)

    def __repr__(self) -> str:
        return repr(dict(self))


class _Grads(_Named):
    """The gradients."""

    def __getitem__(self, name: str) -> Any:
        return self._groups._manager.intake.owner(name).gradient_of(name)

    def __setitem__(self, name: str, grad: Any) -> None:
        self._groups.set_grads({name: grad})

    def __repr__(self) -> str:
        return repr({name: self._groups._manager.intake.owner(name).seen(name) for name in self})


class ParamGroups(state.Saved):
    """Parameters and their gradients in flat buffers, clipped group by group.

    Parameters
    ----------
    groups : sequence of Group
        The groups. Names of groups, and of parameters over all groups, are unique.
    history : int, default 10_000
        How many steps `history` remembers.
    device : {"cpu", "cuda"}, default "cpu"
        Where parameters and gradients are: in the host's memory or on an NVIDIA GPU.
    stream : stream, optional
        The CUDA stream to work on, of numba, CuPy or PyTorch; the default stream otherwise.
    copy : bool, default True
        False leaves the parameters where they are, in the host's memory alone: writeable arrays in
        C order of which no two share memory are updated in place, whoever else reads them.

    Attributes
    ----------
    params : mapping of str to array
        Each parameter, a view into its group's buffer: of NumPy, to be written to in place, or
        a `DeviceArray`, which CuPy, PyTorch and numba take without a copy. Assigning copies in.
        With ``copy=False`` the array that was passed, or NumPy's view of another library's.
        Where a group has masters, see `Group`, these are rounded to it.
    grads : mapping of str to array or IndexedSlices
        Each gradient, a view likewise; a sparse parameter's is `IndexedSlices`, whose values are
        a view until the next ones are copied in, or None. Assigning copies in.
    history : History
        What the clips did, see `History`. On a GPU, asking what it holds waits.
    stream : stream or None
        Where in order everything is done. May be set, once what was started on the stream
        before is done: the new one does not wait for it.
    step : int
        How many times the gradients were clipped.

    Raises
    ------
    TypeError, ValueError
        Where a name appears twice or a group does not fit; the message names it.
    DeviceError
        Where there is no GPU, no driver or no numba-cuda; the message says which.

    Notes
    -----
    **Guarantees.** The same gradients give the same bits as the functions. Every group is read
    before any is written: an error leaves all as they were. A dense group allocates no memory
    of its gradients' size after it is made (unless its rule reduces axes in the middle, and
    for the first ``clip(apply=False)`` by `ByValue`). Reports stay valid, and the history holds
    as many steps, whatever the device.

    **Threads.** One manager is for one thread at a time; different ones are independent.

    **CUDA.** Nothing waits for the GPU but what reads values: a report's attributes, what the
    history holds, `state_dict`, ``copy_to_host()``; a group whose policy is ``"raise"``; rules
    that follow the norms (`AutoClip`, `ZClip`, `AdaGC`), whose bounds are found on the host.
    After the first step nothing is allocated, so that a step (with rules and policies that do
    not wait, and bounds and rates that are no functions) can be captured in a CUDA graph: set
    `stream` to the one that is captured. What is captured writes its report to the memory of
    that step. Sparse groups send tables of their rows in each step, and have memory that grows
    with the rows: steps with them cannot be captured.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> weights, bias, table = np.ones((2, 2)), np.zeros(2), np.ones((9, 2))
    >>> groups = nc.ParamGroups([
    ...     nc.Group("encoder", {"W": weights, "b": bias}, clip=nc.ByGlobalNorm(1.0)),
    ...     nc.Group("embedding", {"E": table}, clip=nc.ByNorm(1.0), sparse=True),
    ... ])
    >>> groups.set_grads({"W": np.full((2, 2), 1.5), "b": np.array([4.0, 0.0])})
    >>> groups.grads["E"] = nc.IndexedSlices(np.array([[0.3, 0.4]]), [7], (9, 2))
    >>> report = groups.clip()
    >>> report.groups["encoder"].norm, report.groups["embedding"].clipped
    (5.0, False)
    >>> groups.grads["W"].round(12)
    array([[0.3, 0.3],
           [0.3, 0.3]])
    """

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        history: int = 10_000,
        device: str = "cpu",
        stream: Any = None,
        copy: bool = True,
    ) -> None:
        if not copy and device != "cpu":
            wanted = f"True for device={device!r}; apply_gradients updates CUDA arrays in place"
            raise ValueError(expected("copy", wanted, copy))
        self._engine = engine = named(arguments.choice("device", device, ("cpu", "cuda")))
        engine.require()
        self._history = History(history)
        where, record = engine.stream_from(stream), self._history.take
        self._manager = Manager(checked(groups), engine, where, record, copies=bool(copy))
        self._history.follow(self._manager.flush)
        self._held = stream  # some libraries destroy a stream that nobody holds
        self.params, self.grads = _Params(self), _Grads(self)
        if not copy:
            self._refuse_tied()

    @property
    def device(self) -> str:
        """Where parameters and gradients are, "cpu" or "cuda"."""
        return self._engine.name

    @property
    def stream(self) -> Any:
        """The stream on which everything is done, in order; None in the host's memory."""
        return self._manager.stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._manager.use_stream(self._engine.stream_from(stream))
        self._held = stream

    @property
    def step(self) -> int:
        """How many times the gradients were clipped."""
        return self._manager.step

    @step.setter
    def step(self, step: int) -> None:
        self._manager.step = arguments.count("step", step, 0)

    @property
    def history(self) -> History:
        """The record of the steps; what it holds is waited for when it is asked."""
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        manager = self._manager
        manager.flush()  # what was found before is of the record before
        self._history.follow(None)
        self._history, manager.record = history, history.take
        history.follow(manager.flush)

    def _refuse_tied(self) -> None:
        """Refuse parameters that share memory."""
        every = self.params.items()
        params = [describe(f"params[{name!r}]", name, own, self._engine) for name, own in every]
        try:
            refuse_overlaps(params, params)
        except ValueError as error:
            advice = "pass tied weights under one name, and the sum of their gradients"
            raise ValueError(f"{error}; {advice}") from None

    def __getitem__(self, name: str) -> GroupState:
        groups = self._manager.groups
        if name not in groups:
            raise KeyError(f"{name!r} is no group; there are {', '.join(groups)}")
        return groups[name]

    def __iter__(self) -> Iterator[GroupState]:
        return iter(self._manager.groups.values())

    def __len__(self) -> int:
        return len(self._manager.groups)

    def __repr__(self) -> str:
        title = f"ParamGroups({len(self)} groups, step {self.step})"
        return "\n  ".join([title, *map(repr, self)])

    def __reduce__(self) -> Never:
        raise TypeError(
            "ParamGroups cannot be copied or pickled; make new ones, and let them "
            "load_state_dict(groups.state_dict())"
        )

    def set_grads(self, grads: Any) -> None:
        """Copy gradients in.

        Parameters
        ----------
        grads : mapping of str to array, IndexedSlices or None
            Gradients by parameter, or nested as the parameters are, of their shapes and dtypes that
            cast to their kinds, of any library that `global_norm` takes in the host's memory; on
            the GPU also CUDA arrays of the very dtypes in C order (of parameters or masters).
            `IndexedSlices` are for sparse groups. None means zero. Parameters that are not named
            keep the gradients they have; those they had at the last step are not applied again, see
            `SGD.step`. Finite elements that a cast makes infinite are refused, unless the group's
            policy is "skip" or "raise", which then find them.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is copied then.
        """
        self._manager.intake.put(grads, self.stream, adds=False)

    def accumulate(self, grads: Any) -> None:
        """Add gradients to those there are; sparse ones are appended.

        Parameters
        ----------
        grads : mapping of str to array, IndexedSlices or None
            As in `set_grads`; None adds nothing.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is added then.
        """
        self._manager.intake.put(grads, self.stream, adds=True)

    def zero_grads(self) -> None:
        """Set every gradient to zero; sparse ones lose their rows."""
        for group in self:
            group.zero(self.stream)
        self._manager.intake.forget()

    def clip(
        self,
        *,
        unscale: float = 1.0,
        apply: bool = True,
        grads: Any = None,
        comm: Any = None,
    ) -> ClipReport:
        """Clip the gradients of every group by its rule, in place.

        An optimizer's `step` after this applies the gradients as they are then: they are not
        clipped, counted or divided by the loss scale a second time.

        Parameters
        ----------
        unscale : float, default 1.0
            The loss scale that the gradients carry, > 0: they are divided by it, checked and
            clipped in the same pass. Norms are those without it.
        apply : bool, default True
            False measures and decides, but writes no gradient and counts no step.
        grads : mapping of str to array, IndexedSlices or None, optional
            With ``apply=False``: gradients to measure in place of the groups' own, as
            `SGD.step` takes them. Neither they nor the groups' own are written.
        comm : intra-communicator of mpi4py, optional
            The ranks that clip together, all of which make this call. Groups that are not sharded
            count once, sharded ones with the parts of all ranks; what one rank holds that is not
            finite is judged on all. Needed where a group is sharded. See Notes.

        Returns
        -------
        ClipReport
            What was found and done, read when asked for: on a GPU the host does not wait.

        Raises
        ------
        NonFiniteGradientError
            Where a group's policy is "raise", for which the host waits; the message names
            group, parameter and index, and the rank with `comm`. Nothing is modified in any group.
        RankError
            On all ranks, where they differ in groups, rules, dtypes, bounds or steps, where
            gradients of a group that is not sharded have different norms, and where another rank
            raised.
        TypeError, ValueError
            Where `unscale` or `grads` do not fit, or a bound that is a function gives no bound.

        Notes
        -----
        **Ranks.** Each call makes one ``Allgather`` of 16 bytes and 56 for each group (for each
        tensor of a sharded group that is clipped tensor by tensor; 72 where the order is not 2),
        the first one more to agree on groups and rules, and again where a rule was changed. Norms,
        factors and decisions have the same bits on all ranks. A tensor's norm in a report is that
        of this rank's part where the group is clipped as a whole. On a GPU the sums cross by way of
        the host, which waits for them. A program in which one rank raises elsewhere leaves the
        others waiting: run it by ``python -m mpi4py``, which ends all.

        **Copies.** Ranks compare the norms of groups that are not sharded, to a relative 2**-47:
        copies that were never averaged differ in them. Elements in another order or of other signs
        have the same norm, and are not noticed: to see them takes one more read of all gradients.

        **Cost.** With a latency L, a tree gathers from R ranks in about ``L log2(R)``, a ring in
        ``L (R - 1)``; each receives ``R`` rows. At 1e3 ranks and 1 us that is 10 us and 72 kB for
        one group, at 1e5 ranks 17 us and 7 MB, which take a millisecond to add up: less than
        reading the gradients once. ``bench/ranks.py`` prints this for the latencies it measures.
        """
        ranks = self._manager.ranks_of(comm)
        if ranks is None:  # a block that does nothing would take 0.4 us
            return self._clip(unscale, apply, grads, None)
        with ranks.communicator:
            return self._clip(unscale, apply, grads, ranks)

    def _clip(self, unscale: Any, apply: Any, grads: Any, ranks: Ranks | None) -> ClipReport:
        scale = arguments.positive("unscale", unscale)
        if grads is not None and apply:
            raise ValueError(
                "grads: expected None for apply=True, which clips the groups' own gradients, got "
                "gradients; pass them to an optimizer's step(grads), or to clip_by_global_norm"
            )
        return ClipReport.of(self._manager.clip(scale, bool(apply), grads, ranks))

    def state_dict(self) -> dict[str, Any]:
        """Return copies of parameters, their masters, the rules' state, the history and the step.

        ``state_dict()["masters"]`` is there if any group has masters.
        """
        self._manager.take_over(whole=True)
        return {
            "step": self.step,
            **arrays_on_host(self),
            "rules": {group.name: {"rule": repr(group.clip), **group.rule_state} for group in self},
            "history": self.history.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> list[str]:
        """Take up a state; gradients are set to zero.

        Parameters
        ----------
        state_dict : mapping
            From `state_dict` of groups with the same parameters and rules.
        strict : bool, default True
            False takes up what fits: parameters and masters of the same name, shape and dtype, the
            state of a rule of the same class, the history of groups there are, and the step. All
            else stays as it is, but for masters whose parameters alone are taken up: they are
            these.

        Returns
        -------
        list of str
            What was left out and why, the bound of a rule for instance; empty where all fits.

        Raises
        ------
        StateError
            Where it does not fit and is to; the message says where. Nothing is changed then.
        """
        fit, loaded = state.Fit(strict=strict), entries_by_name("state_dict", state_dict)
        rules = fitting_rules(self, loaded.pop("rules", None), fit)
        history = fitting_history(self, loaded.pop("history", None), fit)
        own = {"step": self.step, **arrays_on_host(self)}
        found = fit.tree(own, loaded)
        if not 0 <= found["step"] <= MOST:
            fit.leave_out(f"step: expected a count from 0 to {MOST}, got {found['step']}")
            found["step"] = self.step
        load_arrays(self, own, found)
        self._manager.restart(found["step"])
        for group in self:
            group.remembered = copied(rules[group.name])
        self.history = history
        self.zero_grads()
        return fit.left_out

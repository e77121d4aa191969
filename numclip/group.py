"""One parameter group: what the user asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from numclip.border import arguments
from numclip.border.gradients import describe
from numclip.border.structures import dotted
from numclip.clipping.asking import check
from numclip.errors import entries, expected
from numclip.report import WHOLE
from numclip.rules import Rule
from numclip.slices import IndexedSlices


@dataclass(frozen=True, eq=False)
class Group:
    """Some parameters that are clipped by one rule.

    Parameters
    ----------
    name : str
        The group's name, of which no other group has the same.
    params : mapping of str to array, or nested
        The initial parameters by name, or in lists, tuples and mappings of them, which name them
        by their keys and positions joined with dots (``enc.0.W``). Of float16, bfloat16, float32,
        float64, complex64 or complex128, of NumPy, PyTorch or with DLPack; for ``device="cuda"``
        also CUDA arrays. Copied into the group's buffers when `ParamGroups` is made.
    clip : rule, optional
        How to clip, for instance ``ByGlobalNorm(5.0)``; None measures only.
    nonfinite : {"propagate", "raise", "skip", "zero"}, default "propagate"
        What to do where a gradient holds NaN or Inf, see `clip_by_global_norm`. "skip" leaves
        this group's gradients as they are and says so in the report.
    sparse : bool, default False
        Whether the gradients are `IndexedSlices` in place of arrays.
    lr : float, optional
        The group's own learning rate, in place of the optimizer's.
    sharded : bool, default False
        Whether the ranks of a communicator hold different parts of the parameters, whose norms are
        those of all parts together; see `ParamGroups.clip`. A part can be empty. Rules that act on
        elements or units need no other ranks: give them groups that are not sharded, a part each.
    master : {"float32"} or None, default None
        The dtype of masters, which an optimizer updates in place of float16 and bfloat16
        parameters, see Notes.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.

    Notes
    -----
    **Masters.** A 16-bit number has 8 or 11 digits: small steps do not move it, and sums of many
    small gradients stand still. With ``master="float32"`` each 16-bit parameter has a master, and
    its gradient is of float32: gradients of 16 bits are widened, wider ones are not cast to 16
    before they are clipped. Norms, bounds (those relative to parameters too), decay and updates
    are those of a group of float32; after a step ``params`` are the masters, rounded to the
    nearest, of two to the even one. What is written to ``params`` in place is found by the next
    step or `state_dict`, where it is not what was there, and is the master of those elements then;
    assigning sets the master itself, without rounding. Other parameters of the group, and
    `apply_gradients`, are as without. An element takes 10 bytes (parameter, master, gradient) in
    place of 4, and 4 more for each state of an optimizer, as ever. A dense group is read and
    rounded once more in each step, a sparse one at the rows of its gradients.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> half = np.ones(2, np.float16)
    >>> groups = nc.ParamGroups([nc.Group("model", {"w": half}, master="float32")])
    >>> for _ in range(4000):
    ...     groups.accumulate({"w": half})
    >>> groups.grads["w"]
    array([4000., 4000.], dtype=float32)
    >>> report = nc.SGD(groups, lr=1e-8).step()
    >>> groups["model"].masters["w"], groups.params["w"]
    (array([0.99996, 0.99996], dtype=float32), array([1., 1.], dtype=float16))
    """

    name: str
    params: Any
    clip: Rule | None = None
    nonfinite: str = "propagate"
    sparse: bool = False
    lr: float | None = None
    sharded: bool = False
    master: str | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name: expected a non-empty str, got {self.name!r}")
        if self.name == WHOLE:
            raise ValueError(f"name: {WHOLE!r} stands for all groups in reports; take another")
        params = dotted(self.params, "params")
        if not params:
            raise TypeError(expected("params", "at least one parameter", repr(self.params)))
        object.__setattr__(self, "params", params)
        dtypes = {}
        for key, value in params.items():
            name = f"params[{key!r}]"
            if isinstance(value, IndexedSlices):
                raise TypeError(f"{name}: expected an array, got IndexedSlices")
            param: Any = describe(name, key, value)
            if param.shape == () and self.sparse:
                raise ValueError(f"{name}: expected rows for a sparse group, got a 0-d array")
            dtypes[param.dtype.name] = param.dtype
        arguments.choice("nonfinite", self.nonfinite, arguments.POLICIES)
        if self.master is not None:
            arguments.choice("master", self.master, ("float32",))
            if not any(dtype.is_half for dtype in dtypes.values()):
                wanted = "None for a group without float16 or bfloat16 parameters"
                got = f"{self.master!r} for parameters of {', '.join(dtypes)}"
                raise ValueError(expected("master", wanted, got))
        if self.lr is not None:
            arguments.finite_bound("lr", self.lr)
        if self.clip is not None:
            self._check_rule(self.clip)

    def _check_rule(self, rule: Rule) -> None:
        """Refuse an object that is no rule, and a rule that does not fit the parameters."""
        if not isinstance(rule, Rule):
            raise TypeError(f"clip: expected a rule or None, got {rule!r}")
        if self.sparse and rule.scope in ("element", "unit"):
            raise ValueError(f"clip: expected a rule that scales for a sparse group, got {rule!r}")
        if self.sharded and rule.scope in ("element", "unit"):
            raise ValueError(f"clip: expected a rule that scales for a sharded group, got {rule!r}")
        check(rule)
        for key, value in self.params.items():
            param: Any = describe(f"params[{key!r}]", key, value)
            if rule.scope == "unit":
                rule.reduced_axes(len(param.shape))
            if rule.scope == "element" and param.dtype.components == 2:
                wanted = f"real numbers for {rule!r}"
                raise TypeError(expected(param.name, wanted, param.dtype.name))


def checked(groups: Sequence[Group]) -> list[Group]:
    """Return the groups, after refusing those whose names or shared norms do not fit."""
    if isinstance(groups, Group):
        raise TypeError("groups: expected a sequence of Group objects, got Group; pass [group]")
    members = list(entries("groups", "a sequence of Group objects", groups))
    for member in members:
        if not isinstance(member, Group):
            raise TypeError(f"groups: expected Group objects, got {type(member).__name__}")
    if not members:
        raise ValueError("groups: expected at least one group")
    names: set[str] = set()
    owners: dict[str, str] = {}
    for member in members:
        if member.name in names:
            raise ValueError(f"groups: the name {member.name!r} appears twice")
        names.add(member.name)
        for name in member.params:
            other = owners.setdefault(name, member.name)
            if other != member.name:
                raise ValueError(
                    f"groups: the parameter {name!r} is in {other!r} and {member.name!r}"
                )
    _check_shared(members)
    return members


def _check_shared(groups: Sequence[Group]) -> None:
    """Refuse groups that share a norm but not the bound or the policy."""
    first: dict[Any, Group] = {}
    for group in groups:
        if group.clip is not None and group.clip.shared is not None:
            other = first.setdefault(group.clip.shared, group)
            if (other.clip, other.nonfinite) != (group.clip, group.nonfinite):
                raise ValueError(
                    f"groups: {other.name!r} and {group.name!r} share the norm "
                    f"{group.clip.shared!r}, but not clip= and nonfinite="
                )

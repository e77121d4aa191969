"""One parameter group: what the user asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from numclip.border import arguments
from numclip.border.gradients import describe
from numclip.clipping.asking import check
from numclip.errors import expected
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
    params : mapping of str to array
        The initial parameters by name, of float16, bfloat16, float32, float64, complex64 or
        complex128, of NumPy, PyTorch or with DLPack; for ``device="cuda"`` also CUDA arrays.
        Copied into the group's buffers when `ParamGroups` is made.
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

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.
    """

    name: str
    params: Mapping[str, Any]
    clip: Rule | None = None
    nonfinite: str = "propagate"
    sparse: bool = False
    lr: float | None = None
    sharded: bool = False

    def __post_init__(self) -> None:
        """Check each field."""
        if not isinstance(self.name, str) or not self.name:
            raise TypeError(f"name: expected a non-empty str, got {self.name!r}")
        if self.name == WHOLE:
            raise ValueError(f"name: {WHOLE!r} stands for all groups in reports; take another")
        if not isinstance(self.params, Mapping) or not self.params:
            raise TypeError(
                f"params: expected a mapping of names to arrays, got {type(self.params).__name__}"
            )
        for key, value in self.params.items():
            if not isinstance(key, str):
                raise TypeError(f"params: expected str names, got {key!r}")
            name = f"params[{key!r}]"
            if isinstance(value, IndexedSlices):
                raise TypeError(f"{name}: expected an array, got IndexedSlices")
            if describe(name, key, value).shape == () and self.sparse:
                raise ValueError(f"{name}: expected rows for a sparse group, got a 0-d array")
        arguments.choice("nonfinite", self.nonfinite, arguments.POLICIES)
        if self.lr is not None:
            arguments.finite_bound("lr", self.lr)
        if self.clip is not None:
            self._check_rule(self.clip)

    def _check_rule(self, rule: Rule) -> None:
        """Refuse what is no rule, and one that does not fit the parameters."""
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
    members = list(groups)
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

"""The saved state of parameter groups: which of it fits other groups, and what does not."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from numclip.clipping.buffers import GroupState
from numclip.dtypes import Array
from numclip.history import History
from numclip.report import WHOLE
from numclip.state import Fit

if TYPE_CHECKING:
    from numclip.groups import ParamGroups


def fitting_rules(groups: ParamGroups, saved: Any, fit: Fit) -> dict[str, dict[str, Array]]:
    """Return the state of each group's rule: the saved one if it is of the same kind of rule."""
    named = fit.tree({group.name: {} for group in groups}, _without_leaves(saved), ("rules",))
    known = saved if isinstance(saved, dict) else {}
    return {name: _fitting_rule(groups[name], known.get(name), fit) for name in named}


def _without_leaves(saved: Any) -> Any:
    """Return the saved names of groups with empty dicts, for comparison; other objects as is."""
    if not isinstance(saved, dict):
        return saved
    return {name: {} if isinstance(own, dict) else own for name, own in saved.items()}


def _fitting_rule(group: GroupState, saved: Any, fit: Fit) -> dict[str, Array]:
    own, rule = group.rule_state, repr(group.clip)
    if not isinstance(saved, dict):
        return own  # `fit` has noted it
    arrays = {name: value for name, value in saved.items() if name != "rule"}
    other = str(saved.get("rule"))
    if other != rule:
        fit.leave_out(f"rule of {group.name!r}: expected {rule}, got {other}")
        if other.partition("(")[0] != rule.partition("(")[0]:
            return own
    try:
        Fit().tree(own, arrays)
        if group.clip is not None:
            group.clip.check_state(arrays, len(group.params))
    except ValueError as error:
        fit.leave_out(f"state of the rule {rule} of {group.name!r}: {error}")
        return own
    return arrays


def fitting_history(groups: ParamGroups, saved: Any, fit: Fit) -> History:
    """Return the saved history of the present groups, or their own if that cannot be loaded."""
    if isinstance(saved, Mapping):
        names = {WHOLE, *(group.name for group in groups)}
        for name in sorted(set(saved) - names, key=str):
            fit.leave_out(f"history: unknown group {name!r}")
        saved = {name: own for name, own in saved.items() if name in names}
    made = History(groups.history.capacity)
    try:
        made.load_state_dict(saved)
    except ValueError as error:
        fit.leave_out(str(error))
        return groups.history
    return made


def arrays_on_host(groups: ParamGroups) -> dict[str, Any]:
    """Return copies of the parameters on the host, and of the masters if there are any."""
    masters = {name: own for group in groups for name, own in group.masters.items()}
    every = {"params": groups.params, "masters": masters} if masters else {"params": groups.params}
    return {kind: {key: np.array(a) for key, a in own.items()} for kind, own in every.items()}


def load_arrays(groups: ParamGroups, own: Mapping[str, Any], found: Mapping[str, Any]) -> None:
    """Load parameters and masters; an array that is the same object in `own` is not loaded."""
    new = {
        kind: {key: a for key, a in found[kind].items() if a is not own[kind][key]}
        for kind in own.keys() - {"step"}
    }
    for group in groups:
        for name in group.masters:
            value = new["masters"].get(name, new["params"].get(name))
            if value is not None:
                group.updated[name][...] = value
        if group.masters:
            group.round(groups.stream)
    for name, value in new["params"].items():
        groups.params[name][...] = value


def copied(arrays: Mapping[str, Array]) -> dict[str, Array]:
    """Return copies of arrays by their names."""
    return {name: array.copy() for name, array in arrays.items()}

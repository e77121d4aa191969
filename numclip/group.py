"""One parameter group: what the user asks for, and its buffers at run time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from numclip import inputs
from numclip.dtypes import Array, lookup
from numclip.inputs import POLICIES, Entry
from numclip.kernels.backend import Batch
from numclip.layout import flat_buffers
from numclip.measuring import batches
from numclip.placement import on_device
from numclip.report import WHOLE
from numclip.rules import Adaptive, ByNorm, Rule
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

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.
    """

    name: str
    params: Mapping[str, Array]
    clip: Rule | None = None
    nonfinite: str = "propagate"
    sparse: bool = False
    lr: float | None = None

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
            ndim = len(_described(key, value).dense_shape)
            if self.sparse and ndim == 0:
                raise ValueError(f"{name}: expected rows for a sparse group, got a 0-d array")
        inputs.choice("nonfinite", self.nonfinite, POLICIES)
        if self.lr is not None:
            inputs.finite_bound("lr", self.lr)
        if self.clip is not None:
            self._check_rule(self.clip)

    def _check_rule(self, rule: Rule) -> None:
        """Refuse what is no rule, and one that does not fit the parameters."""
        if not isinstance(rule, Rule):
            raise TypeError(f"clip: expected a rule or None, got {rule!r}")
        if self.sparse and rule.scope in ("element", "unit"):
            raise ValueError(f"clip: expected a rule that scales for a sparse group, got {rule!r}")
        for key, value in self.params.items():
            entry = _described(key, value)
            if isinstance(rule, (ByNorm, Adaptive)):
                inputs.axes_of(rule.axes, len(entry.dense_shape))
            if rule.scope == "element" and entry.dtype.components == 2:
                wanted = f"real numbers for {rule!r}"
                raise TypeError(f"{entry.name}: expected {wanted}, got {entry.dtype.name}")


def _described(key: str, value: Any) -> Any:
    """Return the description of a parameter, in the host's memory or on the GPU."""
    if on_device(value):
        from numclip.cuda.entries import describe

        return describe(f"params[{key!r}]", key, value)
    return inputs.entry(f"params[{key!r}]", key, value)


def shared_key(name: str, rule: Rule | None) -> tuple[str, object]:
    """Return what is the same for groups that are clipped by one norm."""
    if rule is not None and rule.shared is not None:
        return "shared", rule.shared
    return "group", name


class GroupState:
    """One group at run time: its buffers, its gradients, its rule and the rule's state.

    Attributes
    ----------
    name, clip, nonfinite, sparse, lr
        As in `Group`.
    params, grads : mapping of str to array
        Views into the flat buffers; for a sparse group `grads` is empty.
    flat_params, flat_grads : dict of str to array
        The whole group as one 1-d array for each dtype, by the dtype's name. 64-byte aligned.
    slices : dict of str to list of IndexedSlices
        A sparse group's gradients, in the order they were accumulated.
    """

    def __init__(self, group: Group) -> None:
        self.name, self.clip = group.name, group.clip
        self.nonfinite, self.sparse, self.lr = group.nonfinite, group.sparse, group.lr
        arrays = {k: inputs.as_array(f"params[{k!r}]", value) for k, value in group.params.items()}
        native = {k: a.astype(a.dtype.newbyteorder("="), copy=False) for k, a in arrays.items()}
        self.flat_params, params = flat_buffers(native)
        self.params = MappingProxyType(params)
        for name, array in native.items():
            self.params[name][...] = array
        self.flat_grads, grads = flat_buffers({} if self.sparse else native)
        self.grads = MappingProxyType(grads)
        self.slices: dict[str, list[IndexedSlices]] = {name: [] for name in native}
        self.rule_state = group.clip.initial_state(len(native)) if group.clip else {}
        self.names = tuple(native)
        self._dense = [self._entry(name, grad) for name, grad in self.grads.items()]
        self._batches = batches(self._dense)

    def _entry(self, name: str, grad: Any) -> Entry:
        return inputs.entry(f"{self.name}.{name}", name, grad)

    @property
    def joint_batch(self) -> Batch | None:
        """The gradients, where they are one batch and the rule needs their own L2 norm alone."""
        rule = self.clip
        if rule is not None and (rule.scope, rule.ord, rule.shared) != ("group", 2.0, None):
            return None
        return self._batches[0] if len(self._batches) == 1 else None

    def gradients(self) -> tuple[list[Entry], list[Batch]]:
        """Return the gradient of each parameter, and the batches they make."""
        if not self.sparse:
            return self._dense, self._batches
        entries = [self._entry(name, self._slices(name)) for name in self.params]
        for entry, param in zip(entries, self.params.values(), strict=True):
            if entry.dense_shape != param.shape or entry.values.dtype != param.dtype:
                wanted = f"{param.dtype} rows of {param.shape}; set gradients by set_grads"
                raise ValueError(f"slices[{entry.key!r}]: expected {wanted}")
        return entries, batches(entries)

    def merged(self, name: str) -> IndexedSlices | None:
        """Return a sparse parameter's gradient as one object, None where there is none."""
        return self._slices(name) if self.slices[name] else None

    def _slices(self, name: str) -> IndexedSlices:
        parts = self.slices[name]
        if len(parts) == 1:
            return parts[0]
        param = self.params[name]
        values = [np.empty((0, *param.shape[1:]), param.dtype), *(part.values for part in parts)]
        indices = [np.empty(0, np.int64), *(part.indices for part in parts)]
        joined = IndexedSlices(np.concatenate(values), np.concatenate(indices), param.shape)
        self.slices[name] = [joined] if parts else []
        return joined

    def zero(self) -> None:
        """Set the gradients to zero; a sparse group forgets its rows."""
        for flat in self.flat_grads.values():
            flat.fill(0)
        for parts in self.slices.values():
            parts.clear()

    def fitting(self, name: str, grad: Any) -> Any:
        """Return a gradient of the parameter as it is copied in, after checking that it fits."""
        param = self.params[name]
        if grad is None:
            return None
        described = inputs.entry(f"grads[{name!r}]", name, grad)
        if self.sparse != (described.slices is not None):
            wanted = "IndexedSlices, as its group is sparse" if self.sparse else "an array"
            raise TypeError(f"grads[{name!r}]: expected {wanted}, got {type(grad).__name__}")
        if described.dense_shape != param.shape:
            raise ValueError(
                f"grads[{name!r}]: expected shape {param.shape}, got {described.dense_shape}"
            )
        source, target = lookup(described.native.dtype), lookup(param.dtype)
        if source is None or target is None or source.components > target.components:
            raise TypeError(
                f"grads[{name!r}]: expected dtype {param.dtype}, got {described.values.dtype}"
            )
        if described.slices is None:
            values = described.values
            own = np.may_share_memory(values, self.grads[name])
            held = any(np.may_share_memory(values, flat) for flat in self.flat_grads.values())
            return values.copy() if held and not own else values
        values = np.array(described.values, param.dtype, order="C")  # to be clipped in place
        return IndexedSlices(values, np.array(described.slices.indices), param.shape)

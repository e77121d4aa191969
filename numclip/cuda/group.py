"""One parameter group on the GPU: its buffers, and what is copied into them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda.arrays import DeviceArray, empty
from numclip.cuda.copies import on_host
from numclip.cuda.entries import DeviceEntry, describe
from numclip.dtypes import Array, DType, lookup
from numclip.group import Group
from numclip.inputs import Entry
from numclip.kernels.cuda import device
from numclip.kernels.cuda.update_plan import Updates
from numclip.placement import on_device


def flat_buffers(
    tensors: Mapping[str, Array],
) -> tuple[dict[str, DeviceArray], dict[str, DeviceArray]]:
    """Return buffers of zeros as `layout.flat_buffers` does, on the GPU."""
    flat: dict[str, DeviceArray] = {}
    views: dict[str, DeviceArray] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors.values()):
        members = {name: tensor for name, tensor in tensors.items() if tensor.dtype == dtype}
        size = sum(tensor.size for tensor in members.values())
        buffer = empty((size,), dtype)
        device.clear(buffer.address, buffer.nbytes, 0)
        flat[dtype.name] = buffer
        start = 0
        for name, tensor in members.items():
            views[name] = buffer.part(start, tensor.shape)
            start += math.prod(tensor.shape)
    return flat, {name: views[name] for name in tensors}


class DeviceGroupState:
    """One group at run time, as `group.GroupState`, on the GPU.

    Attributes
    ----------
    name, clip, nonfinite, lr
        As in `Group`.
    params, grads : mapping of str to DeviceArray
        Views into the flat buffers; for a sparse group `grads` is empty.
    flat_params, flat_grads : dict of str to DeviceArray
        The whole group as one 1-d array for each dtype, by the dtype's name.
    """

    sparse = False

    def __init__(self, group: Group) -> None:
        self.name, self.clip = group.name, group.clip
        self.nonfinite, self.lr = group.nonfinite, group.lr
        given = {k: inputs.as_array(k, on_host(k, value)) for k, value in group.params.items()}
        native = {k: a.astype(a.dtype.newbyteorder("="), copy=False) for k, a in given.items()}
        self.flat_params, params = flat_buffers(native)
        self.flat_grads, grads = flat_buffers({} if self.sparse else native)
        self.params, self.grads = MappingProxyType(params), MappingProxyType(grads)
        for name, array in native.items():
            self.params[name][...] = array
        self.rule_state = group.clip.initial_state(len(native)) if group.clip else {}

    def entries(self) -> list[DeviceEntry]:
        """Return the descriptions of the gradients."""
        return [describe(f"{self.name}.{name}", name, grad) for name, grad in self.grads.items()]

    def put(self, name: str, grad: Any, stream: Any) -> None:
        """Let a gradient that fits be a parameter's; None means zero."""
        own = self.grads[name]
        if grad is None:
            device.clear(own.address, own.nbytes, stream)
        else:
            own.copy_from(grad, stream)

    def add(self, name: str, grad: Any, stream: Any) -> None:
        """Add a gradient that fits to a parameter's."""
        self.grads[name].add(grad, stream)

    def zero(self, stream: Any = 0) -> None:
        """Set the gradients to zero."""
        for flat in self.flat_grads.values():
            device.clear(flat.address, flat.nbytes, stream)

    def fitting(self, name: str, grad: Any) -> Any:
        """Return a gradient of the parameter as it is copied in, after checking that it fits."""
        if grad is None:
            return None
        param, label, there = self.params[name], f"grads[{name!r}]", on_device(grad)
        described: Any = (describe if there else inputs.entry)(label, name, grad)
        if self.sparse != (described.slices is not None):
            wanted = "IndexedSlices, as its group is sparse" if self.sparse else "an array"
            raise TypeError(f"{label}: expected {wanted}, got {type(grad).__name__}")
        if described.dense_shape != param.shape:
            raise ValueError(f"{label}: expected shape {param.shape}, got {described.dense_shape}")
        dtype = described.native if there else described.values.dtype
        if there and not (dtype == param.dtype and described.c_order):
            raise TypeError(f"{label}: expected dtype {param.dtype} in C order, got {dtype}")
        if described.dtype.components > _dtype_of(param).components:
            raise TypeError(f"{label}: expected dtype {param.dtype}, got {dtype}")
        return grad if there else self._cast(described, param.dtype)

    def _cast(self, described: Entry, dtype: Any) -> Any:
        """Return a gradient in the host's memory in the dtype of a parameter."""
        return described.values.astype(dtype)


class Slots:
    """What an optimizer keeps for a group on the GPU, as `optim._Slots`: states, and a count."""

    def __init__(self, group: DeviceGroupState, states: int) -> None:
        self.params = list(group.params.values())
        self.views: list[list[DeviceArray]] = [[] for _ in self.params]
        for _ in range(states):
            shapes = {name: _state_like(param) for name, param in group.params.items()}
            for own, view in zip(self.views, flat_buffers(shapes)[1].values(), strict=True):
                own.append(view)

    def attach(self, updates: Updates, pools: range) -> None:
        """Take up what steps are done with, and which of the counts are the group's."""
        self.updates, self._pools = updates, pools

    @property
    def steps(self) -> int:
        """How often the group was updated; asking waits for the GPU."""
        return int(self._counts()[self._pools[0]])

    @steps.setter
    def steps(self, steps: int) -> None:
        counts = self._counts()
        counts[self._pools.start : self._pools.stop] = steps
        with device.on_stream(None) as stream:
            device.update(self.updates.counts, counts, stream)

    def _counts(self) -> Array:
        """Return the counts of all groups, after waiting for the GPU."""
        with device.on_stream(None) as stream:
            counts: Array = device.read_table(self.updates.counts, stream)
        return counts


def _dtype_of(param: DeviceArray) -> DType:
    """Return how a parameter's elements are stored."""
    row = lookup(param.dtype)
    assert row is not None
    return row


def _state_like(param: DeviceArray) -> Array:
    """Return what tells size and dtype of a parameter's state: stored numbers, 1-d."""
    row = _dtype_of(param)
    return np.broadcast_to(np.zeros((), row.compute), (param.size * row.components,))

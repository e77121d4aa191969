"""One parameter group on the GPU: its buffers, and what is copied into them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda import arrays
from numclip.cuda.arrays import DeviceArray, DeviceEntry
from numclip.dtypes import Array, lookup
from numclip.group import Group
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
        buffer = DeviceArray(device.allocate(size * dtype.itemsize), 0, (size,), dtype)
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
        Views into the flat buffers.
    flat_params, flat_grads : dict of str to DeviceArray
        The whole group as one 1-d array for each dtype, by the dtype's name.
    """

    sparse = False

    def __init__(self, group: Group) -> None:
        if group.sparse:
            raise ValueError('sparse: expected False for device="cuda", got True; use device="cpu"')
        self.name, self.clip = group.name, group.clip
        self.nonfinite, self.lr = group.nonfinite, group.lr
        given = {name: inputs.as_array(name, value) for name, value in group.params.items()}
        native = {k: a.astype(a.dtype.newbyteorder("="), copy=False) for k, a in given.items()}
        self.flat_params, params = flat_buffers(native)
        self.flat_grads, grads = flat_buffers(native)
        self.params, self.grads = MappingProxyType(params), MappingProxyType(grads)
        for name, array in native.items():
            self.params[name][...] = array
        self.rule_state = group.clip.initial_state(len(native)) if group.clip else {}

    def entries(self) -> list[DeviceEntry]:
        """Return the descriptions of the gradients."""
        return [
            arrays.describe(f"{self.name}.{name}", name, grad) for name, grad in self.grads.items()
        ]

    def zero(self, stream: Any = 0) -> None:
        """Set the gradients to zero."""
        for flat in self.flat_grads.values():
            device.clear(flat.address, flat.nbytes, stream)

    def fitting(self, name: str, grad: Any) -> Any:
        """Return a gradient of the parameter as it is copied in, after checking that it fits."""
        param = self.params[name]
        label = f"grads[{name!r}]"
        if grad is None:
            return None
        if not on_device(grad):
            described = inputs.entry(label, name, grad)
            values = described.values
            if described.slices is not None:
                raise TypeError(f"{label}: expected an array, got IndexedSlices")
            source, target = lookup(described.native.dtype), lookup(param.dtype)
            assert source is not None
            assert target is not None
            fits = source.components <= target.components
            shape, dtype = described.dense_shape, values.dtype
        else:
            entry = arrays.describe(label, name, grad)
            fits = entry.native == param.dtype and entry.c_order
            shape, dtype = entry.shape, entry.native
        if shape != param.shape:
            raise ValueError(f"{label}: expected shape {param.shape}, got {shape}")
        if not fits:
            order = " in C order" if on_device(grad) else ""
            raise TypeError(f"{label}: expected dtype {param.dtype}{order}, got {dtype}")
        return grad if on_device(grad) else values.astype(param.dtype)


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


def _state_like(param: DeviceArray) -> Array:
    """Return what tells size and dtype of a parameter's state: stored numbers, 1-d."""
    row = lookup(param.dtype)
    assert row is not None
    return np.broadcast_to(np.zeros((), row.compute), (param.size * row.components,))

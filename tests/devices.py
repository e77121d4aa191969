"""Gradients on the GPU, or on the simulated one: sending them there, and numclip called on them."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numclip as nc

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from conftest import EMULATED
from gpu import ready as ready

from numclip.kernels.cuda import device

if EMULATED:
    import emulator

    emulator.install()

from numclip.cuda.arrays import DeviceArray

HARDWARE = not device.SIMULATED
COMPILED = HARDWARE or EMULATED  # the simulator takes a tenth of a second a call

if not HARDWARE:
    from numba.cuda.simulator.kernelapi import FakeCUDAShared

    make_shared, one_at_a_time = FakeCUDAShared.array, threading.Lock()

    def shared_array(self: Any, shape: Any, dtype: Any) -> Any:
        """Make a block's shared array once: two threads of the simulator could each make one.

        It tells arrays apart by the line that makes them, which is one line now: a kernel can
        have one array.
        """
        with one_at_a_time:
            return make_shared(self, shape, dtype)

    FakeCUDAShared.array = shared_array


hardware = pytest.mark.skipif(
    not HARDWARE, reason="the simulator cannot: run it with -m gpu on a machine that has one"
)


def send(array: np.ndarray, offset: int = 0) -> DeviceArray:
    """A copy on the device, in C or Fortran order as the array is, some bytes off alignment."""
    fortran = array.flags.f_contiguous and not array.flags.c_contiguous
    native = array.astype(array.dtype.newbyteorder("="), order="F" if fortran else "C")
    memory = device.allocate(native.nbytes + offset)
    strides = native.strides if fortran else None
    made = DeviceArray(memory, offset, native.shape, native.dtype, strides)
    flat = native.reshape(-1, order="A").copy()
    device.write(made.address, flat.view(np.uint8), 0)
    return made


def fetch(array: Any) -> np.ndarray:
    """A copy in the host's memory of an array on the device."""
    return array.copy_to_host()


def each(change: Callable[[Any], Any], grads: Any) -> Any:
    """The same structure with every gradient changed."""
    if isinstance(grads, dict):
        return {key: None if g is None else change(g) for key, g in grads.items()}
    made = [None if g is None else change(g) for g in grads]
    return getattr(type(grads), "_make", type(grads))(made)


def leaves(grads: Any) -> list[Any]:
    return [g for g in (grads.values() if isinstance(grads, dict) else grads) if g is not None]


class OnDevice:
    """numclip's functions for gradients of the host, carried out on the device."""

    def __getattr__(self, name: str) -> Any:
        return getattr(nc, name)

    def global_norm(self, grads: Any, *arguments: Any, **options: Any) -> float:
        return float(nc.global_norm(each(send, grads), *arguments, **options))

    def clip_by_global_norm(
        self, grads: Any, *arguments: Any, out: Any = None, **options: Any
    ) -> tuple[Any, float]:
        sent = each(send, grads)
        given = sent if out is grads else None if out is None else each(send, out)
        results, norm = nc.clip_by_global_norm(sent, *arguments, out=given, **options)
        if out is None:
            return each(fetch, results), float(norm)
        for result, there, here in zip(leaves(results), leaves(given), leaves(out), strict=True):
            assert result is there
            here[...] = fetch(result)
        return each(lambda array: array, out), float(norm)

    def _one(self, name: str, grad: Any, *arguments: Any, out: Any, **options: Any) -> Any:
        sent = send(grad)
        given = sent if out is grad else None if out is None else send(out)
        result = getattr(nc, name)(sent, *arguments, out=given, **options)
        if out is None:
            return fetch(result)
        assert result is given
        out[...] = fetch(result)
        return out

    def clip_by_norm(self, grad: Any, *arguments: Any, out: Any = None, **options: Any) -> Any:
        return self._one("clip_by_norm", grad, *arguments, out=out, **options)

    def clip_by_average_norm(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_average_norm", grad, *arguments, out=out)

    def clip_by_block_rms(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_block_rms", grad, *arguments, out=out)

    def clip_by_value(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_value", grad, *arguments, out=out)

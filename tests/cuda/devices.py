"""Gradients on the GPU, or its stand-in: sending them there, and numclip called on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

import numclip as nc

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numclip.cuda import memory
from numclip.cuda.arrays import DeviceArray
from tests.cuda.gpu import HARDWARE
from tests.cuda.gpu import ready as ready
from tests.rings import EXAMPLES_ON_GPU, gpu

hardware = pytest.mark.skipif(not HARDWARE, reason="asks for a GPU: run it with -m gpu on one")


def laid_out(array: np.ndarray, like: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
    """A copy in native byte order with the steps of another array; its memory, and where it is."""
    begin, end = np.lib.array_utils.byte_bounds(like) if like.size else (0, 0)
    start = like.ctypes.data - begin if like.size else 0
    room = np.zeros(end - begin, np.uint8)
    copy = np.ndarray(like.shape, array.dtype.newbyteorder("="), room, start, like.strides)
    copy[...] = array
    return copy, room, start


def send(array: Any, offset: int = 0) -> Any:
    """A copy on the device, with the steps of the array, some bytes off alignment."""
    if isinstance(array, nc.IndexedSlices):
        return nc.IndexedSlices(send(array.values, offset), array.indices, array.dense_shape)
    copy, room, start = laid_out(array, array)
    own = memory.Memory(room.size + offset)
    strides = None if array.flags.c_contiguous else array.strides
    made = DeviceArray(own, offset + start, array.shape, copy.dtype, strides)
    memory.write(made.address - start, room, 0)
    return made


def fetch(array: Any) -> Any:
    """A copy in the host's memory of an array on the device, or of slices."""
    if isinstance(array, nc.IndexedSlices):
        return nc.IndexedSlices(fetch(array.values), array.indices, array.dense_shape)
    return array.copy_to_host()


def write(here: Any, there: Any) -> None:
    """Write what a result on the device holds to one on the host."""
    stored = here.values if isinstance(here, nc.IndexedSlices) else here
    found = fetch(there)
    stored[...] = found.values if isinstance(found, nc.IndexedSlices) else found


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

    device = "cuda"
    examples = EXAMPLES_ON_GPU[gpu()]

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
            write(here, result)
        return each(lambda array: array, out), float(norm)

    def _one(self, name: str, grad: Any, *arguments: Any, out: Any = None, **options: Any) -> Any:
        sent = send(grad)
        given = sent if out is grad else None if out is None else send(out)
        result = getattr(nc, name)(sent, *arguments, out=given, **options)
        if out is None:  # sums depend on the steps, in the last bit: with them it is clipped again
            found = fetch(result)
            return found if isinstance(grad, nc.IndexedSlices) else laid_out(found, grad)[0]
        assert result is given
        write(out, result)
        return out

    def clip_by_norm(self, grad: Any, *arguments: Any, out: Any = None, **options: Any) -> Any:
        return self._one("clip_by_norm", grad, *arguments, out=out, **options)

    def clip_by_average_norm(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_average_norm", grad, *arguments, out=out)

    def clip_by_block_rms(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_block_rms", grad, *arguments, out=out)

    def adaptive_clip(self, grad: Any, param: Any, *arguments: Any, **options: Any) -> Any:
        return self._one("adaptive_clip", grad, send(param), *arguments, **options)

    def clip_per_example(self, grads: Any, *arguments: Any, **options: Any) -> tuple[Any, Any]:
        summed, counts = nc.clip_per_example(each(send, grads), *arguments, **options)
        counts = each(int, counts) if options.get("layerwise") else int(counts)
        return each(fetch, summed), counts

    def clip_by_value(self, grad: Any, *arguments: Any, out: Any = None) -> Any:
        return self._one("clip_by_value", grad, *arguments, out=out)

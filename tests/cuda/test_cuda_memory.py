"""What happens where other libraries hold all of the GPU's memory."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import memory
from tests.cuda import standin
from tests.cuda.devices import fetch, ready, send
from tests.cuda.foreign import Tensor, torch
from tests.cuda.gpu import HARDWARE, new_stream
from tests.oracle.checks import assert_same_bits

__all__ = ["ready", "torch"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(HARDWARE, reason="fills the memory of the stand-in"),
]
LARGE = np.full(memory.MOST_KEPT // 4 + 1, 2.0, "f")  # no table as large is kept
NEEDED = LARGE.nbytes + 2 * memory.ARENA_BYTES


def test_tables_are_made_of_what_pytorch_keeps_unused(torch: Any) -> None:
    """On a stream of its own, whose first table asks the driver for memory."""
    torch.cuda.current_stream(None).cuda_stream = new_stream()
    items, kept, asked = [Tensor(np.array([3.0, 4.0]))], [memory.Memory(NEEDED)], []

    def empty_cache() -> None:
        asked.append(len(kept))
        kept.clear()

    torch.cuda.empty_cache = empty_cache
    with standin.room(0):
        clipped, norm = nc.clip_by_global_norm(items, 1.0, out=items)
        assert norm == 5.0
    assert asked == [1]
    np.testing.assert_allclose(fetch(clipped[0].sent), [0.6, 0.8], rtol=1e-14)


def test_arrays_are_made_of_what_cupy_keeps_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    grad, kept = send(LARGE), [memory.Memory(NEEDED)]
    pool = SimpleNamespace(free_all_blocks=kept.clear)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(get_default_memory_pool=lambda: pool))
    with standin.room(0):
        clipped = nc.clip_by_norm(grad, 1.0)
    assert not kept
    assert nc.global_norm([clipped]) <= 1.0


@pytest.mark.parametrize("out", [True, False])
def test_too_little_memory_is_an_error_that_changes_nothing(torch: Any, out: bool) -> None:
    torch.cuda.empty_cache = lambda: None
    torch.cuda.current_stream(None).cuda_stream = new_stream()
    first = Tensor(np.array([3.0, 4.0])) if out else send(LARGE)
    grads = [first, send(LARGE)]
    given = {"out": grads} if out else {}
    with standin.room(0), pytest.raises(nc.DeviceError, match=r"expected [0-9,]+ bytes of the GPU"):
        nc.clip_by_global_norm(grads, 1.0, **given)
    assert_same_bits(fetch(grads[1]), LARGE)
    _, norm = nc.clip_by_global_norm(grads, 1.0, **given)
    sizes = (4.0 * LARGE.size, 25.0 if out else 4.0 * LARGE.size)
    assert norm == pytest.approx(sum(sizes) ** 0.5)

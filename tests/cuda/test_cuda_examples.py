"""clip_per_example on the GPU: what only a GPU has."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import numclip as nc
from numclip.cuda import memory
from tests.cuda.devices import fetch, ready, send
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]
layerwise = pytest.mark.parametrize("layerwise", [None, "uniform", "proportional"])


@layerwise
def test_as_on_the_cpu_in_any_layout(layerwise):
    rng = np.random.default_rng(4)
    grads = [normal(rng, (6, 5, 3)).transpose(0, 2, 1), normal(rng, (12, 4), "float16")[::-2]]
    wanted, counts = nc.clip_per_example(grads, 1.3, layerwise=layerwise)
    found, same = nc.clip_per_example([send(g) for g in grads], 1.3, layerwise=layerwise)
    assert same == counts
    for new, old in zip(found, wanted, strict=True):
        assert_same_bits(fetch(new), old)


def test_a_count_is_read_when_it_is_asked_for(monkeypatch):
    read, reads = memory.read, []
    monkeypatch.setattr(memory, "read", lambda *a: reads.append(a) or read(*a))
    grads = [send(np.ones((3, 2), "f")), send(np.full((3, 1), 9.0))]
    _, first = nc.clip_per_example(grads, 4.0, layerwise="uniform")
    _, second = nc.clip_per_example(grads, 99.0, layerwise="uniform")
    assert not reads
    assert (first, second) == ([0, 3], [0, 0])
    assert len(reads) == 2
    count = first[1]
    assert (count + 1, count * 2, count / 2, repr(count), f"{count}") == (4, 6, 1.5, "3", "3")
    assert list(range(count)) == [0, 1, 2]
    assert type(count + 1) is type(int(count)) is int
    del first, second, count
    gc.collect()
    assert nc.clip_per_example(grads, 2.0)[1] == 3

"""How tensors on the GPU are cut into chunks; nothing is read, so that sizes can be any."""

from __future__ import annotations

import numpy as np
import pytest

from numclip import tables
from numclip.cuda import contiguous as chunks
from numclip.cuda import device
from numclip.dtypes import lookup
from tests.cuda.devices import ready

__all__ = ["ready"]
pytestmark = pytest.mark.gpu
SIZES = [0, 1, 3, 127, 128, 129, 5000, 1 << 30, (1 << 33) + 1]


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize("offset", [0, 8])
def test_chunks_are_whole_aligned_and_not_too_many(name, offset):
    dtype = lookup(np.dtype(name))
    itemsize = dtype.storage.itemsize
    spans = [
        chunks.Span(dtype, (k << 40) + offset, (k << 40) + offset, n) for k, n in enumerate(SIZES)
    ]
    table, firsts, starts = chunks.split(spans)
    for k, size in enumerate(SIZES):
        own = table[firsts[k] : firsts[k + 1]]
        ends = own[:, tables.SOURCE] + own[:, tables.LENGTH] * itemsize
        assert own[:, tables.LENGTH].sum() == size
        assert (own[1:, tables.SOURCE] == ends[:-1]).all()  # one follows the other
        assert (own[1:, tables.SOURCE] % 16 == 0).all()
        assert len(own) <= chunks.MOST_CHUNKS + 1
        if size * itemsize <= chunks.MOST_CHUNKS * device.CHUNK_BYTES:
            assert (own[:, tables.LENGTH] * itemsize <= device.CHUNK_BYTES).all()
        assert (
            starts[firsts[k] : firsts[k + 1]] * itemsize + spans[k].source == own[:, tables.SOURCE]
        ).all()

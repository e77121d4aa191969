"""The memory's own speed: streams over flat arrays, with numclip's threads."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from bench.workload import Bound, Call
from numclip.host.runtime import threads
from numclip.host.runtime.jit import block_sum, kernel

SHARE = 16_384


@block_sum
def total(x):
    result = np.float32(0)
    for i in range(x.size):
        result += x[i]
    return result


@kernel
def read(begin, end, x, out):
    for share in range(begin, end):
        out[share] = total(x[share * SHARE : (share + 1) * SHARE])


@kernel
def scale(begin, end, x):
    y = x[begin * SHARE : end * SHARE]
    for i in range(y.size):
        y[i] *= np.float32(-1)


@kernel
def descend(begin, end, g, p):
    g, p = g[begin * SHARE : end * SHARE], p[begin * SHARE : end * SHARE]
    for i in range(p.size):
        p[i] -= g[i]


@kernel
def adam(begin, end, g, p, m, v):
    g, p = g[begin * SHARE : end * SHARE], p[begin * SHARE : end * SHARE]
    m, v = m[begin * SHARE : end * SHARE], v[begin * SHARE : end * SHARE]
    for i in range(p.size):
        m[i] -= g[i]
        v[i] += g[i]
        p[i] -= m[i] - v[i]


def streams(kernel: Callable[..., None] | None, count: int, size: int) -> Call:
    """Return a call that reads `size` float32, then runs a kernel over `count` such arrays."""
    # Small integers: sums and products of any number of rounds stay finite and normal.
    arrays = [np.ones(size, np.float32) for _ in range(count)]
    shares = -(-size // SHARE)
    out = np.empty(shares, np.float32)
    nbytes = 4 * size

    def call() -> tuple[None, None]:
        threads.run(read, shares, nbytes, arrays[0], out)
        if kernel is not None:
            threads.run(kernel, shares, nbytes * count, *arrays)
        return None, None

    return call


def read_and(kernel: Callable[..., None] | None, count: int) -> Callable[..., Call]:
    """Return a way that reads, then runs a kernel whether or not something is clipped."""
    return lambda source, _: streams(kernel, count, sum(x.size for x in source))


def clip(source: list[np.ndarray], bound: Bound) -> Call:
    """Return a call that reads the memory, and scales it if `bound.clips`."""
    kernel = scale if bound.clips else None
    return streams(kernel, 1, sum(x.size for x in source))

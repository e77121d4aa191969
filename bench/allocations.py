"""Print the bytes that a clip in place allocates: ``python -m bench.allocations WAY NBYTES``.

Two figures: the growth of the process's peak memory, and Python's own count.
"""

from __future__ import annotations

import resource
import sys
import tracemalloc
from collections.abc import Callable

import numpy as np

import numclip as nc

Work = Callable[[], object]


def clip_by_global_norm(grads: list[np.ndarray]) -> Work:
    return lambda: nc.clip_by_global_norm(grads, 1.0, out=grads)


def groups_clip(grads: list[np.ndarray]) -> Work:
    named = {str(k): grad for k, grad in enumerate(grads)}
    groups = nc.ParamGroups([nc.Group("model", named, clip=nc.ByGlobalNorm(1e-9))])
    groups.set_grads(named)
    return groups.clip


WAYS = {"clip_by_global_norm": clip_by_global_norm, "groups.clip": groups_clip}


def peak() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main(way: str, nbytes: int) -> None:
    # The small call compiles. np.full makes no temporaries: the large arrays alone are the peak.
    for size in (1 << 21, nbytes // 4):
        grads = [np.full(size // 8, 1.0, np.float32) for _ in range(8)]
        work = WAYS[way](grads)
        before = peak()
        work()
        grown = peak() - before
    for grad in grads:
        grad[...] = 1.0
    tracemalloc.start()
    work()
    print(grown, tracemalloc.get_traced_memory()[1])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))

"""A clip of ranks against a bare Allreduce: ``mpiexec -n 4 python -m mpi4py -m bench.ranks``.

The rank's own clip is timed beside both, in turns: what is left is what the other ranks cost.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import numclip as nc

TENSORS, LENGTH, ROUNDS = 1000, 256, 300


def groups_of(*, sharded: bool) -> nc.ParamGroups:
    params = {f"p{k}": np.zeros(LENGTH, np.float32) for k in range(TENSORS)}
    group = nc.Group("g", params, nc.ByGlobalNorm(1e9), sharded=sharded)
    groups = nc.ParamGroups([group])
    groups.set_grads({name: np.full(LENGTH, 0.5, np.float32) for name in params})
    return groups


def measured(comm: Any) -> dict[str, float]:
    """Median microseconds of each way, from the call to its return on the slowest rank."""
    shared, own = groups_of(sharded=True), groups_of(sharded=False)
    one, total = np.ones(1), np.ones(1)
    ways: dict[str, Callable[[], Any]] = {
        "Allreduce of 8 bytes": lambda: comm.Allreduce(one, total),
        "clip of this rank alone": own.clip,
        "clip of all ranks": lambda: shared.clip(comm=comm),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            comm.Barrier()
            start = time.perf_counter()
            way()
            times[name].append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
    return {name: round(1e6 * float(np.median(own)), 1) for name, own in times.items()}


if __name__ == "__main__":
    world = MPI.COMM_WORLD
    found = measured(world)
    if world.rank == 0:
        print(json.dumps({"ranks": world.size, **found}, indent=2))

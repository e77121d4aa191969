"""A clip of ranks against a bare Allreduce: ``mpiexec -n 4 python -m mpi4py -m bench.ranks``.

The rank's own clip is timed in turns with both: the difference is the cost of the other ranks. The
latencies measured here then give the costs at more ranks, see `modelled`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from mpi4py import MPI

import numclip as nc
from numclip.clipping.ranks import COLUMNS, WIDTH, add_pools

TENSORS, LENGTH, ROUNDS = 1000, 256, 300
QUIET = 0.05  # quantile of the times: other processes slow most rounds
MESSAGE = 72  # bytes that a rank sends: 16, and 56 for the only group
SIZES = [10**k for k in range(1, 6)]


def groups_of(*, sharded: bool) -> nc.ParamGroups:
    params = {f"p{k}": np.zeros(LENGTH, np.float32) for k in range(TENSORS)}
    group = nc.Group("g", params, nc.ByGlobalNorm(1e9), sharded=sharded)
    groups = nc.ParamGroups([group])
    groups.set_grads({name: np.full(LENGTH, 0.5, np.float32) for name in params})
    return groups


def timed(comm: Any, ways: dict[str, Callable[[], Any]]) -> dict[str, float]:
    """Return the microseconds of each way, from the call to its return on the slowest rank.

    An untimed call of the same way precedes each timed one, and leaves the data where it does.
    """
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS):
        for name, way in ways.items():
            way()
            comm.Barrier()
            start = time.perf_counter()
            way()
            times[name].append(comm.allreduce(time.perf_counter() - start, MPI.MAX))
    return {name: 1e6 * float(np.quantile(own, QUIET)) for name, own in times.items()}


def measured(comm: Any) -> dict[str, float]:
    """Return the microseconds of clips with and without other ranks, and of a lower bound.

    The lower bound is an Allreduce after the rank's own clip: it waits for the slowest rank, too.
    """
    shared, own = groups_of(sharded=True), groups_of(sharded=False)
    one, total = np.ones(1), np.ones(1)

    def allreduce() -> None:
        comm.Allreduce(one, total)

    def clip_and_allreduce() -> None:
        own.clip()
        comm.Allreduce(one, total)

    return timed(
        comm,
        {
            "Allreduce of 8 bytes": allreduce,
            "clip of this rank alone": own.clip,
            "the same and an Allreduce": clip_and_allreduce,
            "the same with comm=MPI.COMM_SELF": lambda: own.clip(comm=MPI.COMM_SELF),
            "clip of all ranks": lambda: shared.clip(comm=comm),
        },
    )


def message_costs(comm: Any) -> tuple[float, float]:
    """Measure between two ranks the microseconds of a small message, and of each further byte."""
    costs = []
    for length in (MESSAGE, 1 << 20):
        data = np.zeros(length, np.uint8)

        def there_and_back(data: Any = data) -> None:
            if comm.rank == 0:
                comm.Send(data, 1)
                comm.Recv(data, 1)
            elif comm.rank == 1:
                comm.Recv(data, 0)
                comm.Send(data, 0)

        costs.append(timed(comm, {"": there_and_back})[""] / 2)
    latency, large = costs
    return latency, (large - latency) / (1 << 20)


def merging(ranks: int) -> float:
    """Measure the microseconds that a rank takes to add up the rows of `ranks` ranks."""
    span, every, merged = np.array([[0, ranks]]), np.ones((ranks, WIDTH)), np.zeros((1, COLUMNS))
    times = []
    for _ in range(5):
        start = time.perf_counter()
        add_pools(span, every, merged)
        times.append(time.perf_counter() - start)
    return 1e6 * min(times)


def modelled(ranks: int, message: float, byte: float) -> dict[str, tuple[float, float, float]]:
    """Return (sequential steps, bytes that a rank receives, microseconds) of some collectives.

    A *tree* is recursive doubling: with each step a rank has twice as many rows. In a *ring* each
    rank passes on a row a step. Both bring all rows to all ranks, which add them up in one order.
    A *sum* goes up a tree and down again (MPI's Allreduce): less to receive, but the order, and so
    the bits, are the MPI library's choice.
    """
    deep, rows = math.ceil(math.log2(ranks)), MESSAGE * (ranks - 1)
    received = byte * rows + merging(ranks)
    tree = deep, rows, message * deep + received
    return {
        "a tree": tree,
        "a ring": (ranks - 1, rows, message * (ranks - 1) + received),
        "a sum": (2 * deep, 2 * deep * MESSAGE, 2 * deep * (message + byte * MESSAGE)),
        "a tree for each tensor": (TENSORS * tree[0], TENSORS * tree[1], TENSORS * tree[2]),
    }


def print_model(message: float, byte: float) -> None:
    print(f"a message takes {message:.2f} us, and {1e3 * byte:.3f} us for each 1000 bytes")
    print(f"{'ranks':>7} {'one collective by':22} {'steps':>9} {'bytes':>11} {'us':>11}")
    for ranks in SIZES:
        for way, (steps, received, us) in modelled(ranks, message, byte).items():
            print(f"{ranks:7} {way:22} {steps:9} {received:11} {us:11.0f}")


if __name__ == "__main__":
    world = MPI.COMM_WORLD
    found = measured(world)
    costs = message_costs(world) if world.size > 1 else None
    if world.rank == 0:
        times = {name: round(us, 1) for name, us in found.items()}
        print(json.dumps({"ranks": world.size, **times}, indent=2))
        if costs is not None:
            print_model(*costs)

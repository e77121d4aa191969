"""Programs for the ranks of MPI: ``mpiexec -n 3 python -m mpi4py -m tests.oracle.on_ranks NAME``.

The first rank prints a line for each rank: the result of the program there.
"""

from __future__ import annotations

import math
import os
import signal
import sys
from typing import Any

import numpy as np
from mpi4py import MPI

import numclip as nc
from tests.oracle.shares import (
    CHUNK,
    REPLICATED,
    RULES,
    assert_told_alike,
    shards,
    trained,
)


def whole_chunks(comm: Any) -> str:
    """Shards of whole chunks are clipped to the same bits as the whole array."""
    whole = np.random.default_rng(1).standard_normal(9 * CHUNK + 5).astype(np.float32)
    own = shards(whole, comm.size, aligned=True)[comm.rank]
    clipped, norm = nc.clip_by_global_norm([own], 3.0, out=[own], comm=comm)
    expected, same_norm = nc.clip_by_global_norm([whole], 3.0)
    assert norm == same_norm
    assert np.array_equal(clipped[0], shards(expected[0], comm.size, aligned=True)[comm.rank])
    return repr(norm)


def sharded(comm: Any) -> str:
    """Ranks with shards take the steps of one process with whole arrays, to rounding."""
    for name, rule in RULES.items():
        found = trained(rule, comm, comm.size, comm.rank)
        results = comm.allgather(found)
        assert_told_alike(results)
        expected, reports, _ = trained(rule, MPI.COMM_SELF)
        told = np.array(results[0][1], float), np.array(reports, float)
        np.testing.assert_allclose(*told, rtol=2e-14, atol=1e-300, err_msg=name)
        for key, param in expected.items():
            parts = [own[key] for own, *_ in results]
            joined = parts[0] if key == "c" else np.concatenate(parts)
            np.testing.assert_allclose(joined, param, rtol=1e-13, atol=1e-15, err_msg=name)
    return "ok"


def copies(comm: Any) -> str:
    """Ranks with copies take the steps of one process, bit for bit."""
    for rule in REPLICATED.values():
        found = trained(rule, comm, sharded=False)
        assert_told_alike(comm.allgather(found))
        expected = trained(rule, sharded=False)[0]
        assert all(np.array_equal(found[0][key], param) for key, param in expected.items())
    return "ok"


def split(comm: Any) -> str:
    """A clip in one half of a split communicator does not depend on the other half."""
    half = comm.Split(comm.rank % 2)
    _, norm = nc.clip_by_global_norm([np.full(1, 3.0 + comm.rank % 2)], 1.0, comm=half)
    assert norm == math.sqrt(half.size) * (3.0 + comm.rank % 2) or half.size not in (1, 4)
    return f"{norm / math.sqrt(half.size):.12g}"


def groups(**changes: Any) -> tuple[nc.ParamGroups, nc.SGD]:
    clip = changes.get("clip", nc.ByGlobalNorm(1.0))
    made = nc.ParamGroups([nc.Group("g", {"w": np.zeros(2)}, clip, "raise", sharded=True)])
    made.set_grads({"w": np.full(2, changes.get("value", 1.0))})
    return made, nc.SGD(made, lr=changes.get("lr", 0.5))


def refused(comm: Any, **changes: Any) -> str:
    """Take a step that must fail on all ranks and modify nothing; return the error."""
    made, optimizer = groups(**(changes if comm.rank == 1 else {}))
    try:
        optimizer.step(comm=comm)
    except Exception as error:
        assert not made.params["w"].any()
        return f"{type(error).__name__}: {error}"
    raise AssertionError("no error")


def not_finite(comm: Any) -> str:
    return refused(comm, value=math.nan)


def mismatched(comm: Any) -> str:
    return refused(comm, clip=nc.ByGlobalNorm(2.0))


def raising(comm: Any) -> str:
    def rate(step: int) -> float:
        raise KeyError(f"no rate at step {step}")

    return refused(comm, lr=rate)


def killed(comm: Any) -> str:
    """A rank that dies ends the run."""
    _, optimizer = groups()
    optimizer.step(comm=comm)
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    optimizer.step(comm=comm)
    return "went on"


def uncaught(comm: Any) -> str:
    """An exception that one rank raises outside of numclip ends the run."""
    _, optimizer = groups()
    optimizer.step(comm=comm)
    if comm.rank == 1:
        raise RuntimeError("outside of numclip")
    optimizer.step(comm=comm)
    return "went on"


if __name__ == "__main__":
    world = MPI.COMM_WORLD
    lines = world.gather(globals()[sys.argv[1]](world))
    if lines is not None:  # the first rank alone prints: lines of several could interleave
        print(*lines, sep="\n", flush=True)

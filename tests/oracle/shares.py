"""Training with sharded or copied parameters, for ranks that are threads or MPI processes."""

from __future__ import annotations

import itertools
import math

import numpy as np

import numclip as nc

CHUNK = 16_384  # elements of a partial sum on the host


def shards(array, size, aligned=False):
    """Cut an array into `size` parts, between chunks if `aligned`; some parts may be empty."""
    step = CHUNK if aligned else 1
    pieces = -(-len(array) // step)
    ends = [min(len(array), step * (pieces * k // size)) for k in range(size + 1)]
    return [array[begin:end].copy() for begin, end in itertools.pairwise(ends)]


def gradient(step, n, seed=0):
    rng = np.random.default_rng((seed, step))
    return rng.standard_normal(n) * 10.0 ** rng.uniform(-1, 1)


RULES = {
    "none": None,
    "global": nc.ByGlobalNorm(1.5),
    "global of order 1": nc.ByGlobalNorm(3.0, ord=1),
    "global of order inf": nc.ByGlobalNorm(0.5, ord=math.inf),
    "shared": nc.ByGlobalNorm(lambda step: 1.0 + step, shared="both"),
    "tensors": nc.ByNorm(0.7),
    "tensors of order 3": nc.ByNorm(0.7, ord=3),
    "average": nc.ByAverageNorm(0.02),
    "rms": nc.ByBlockRMS(0.1),
    "percentile": nc.AutoClip(percentile=50),
    "deviations": nc.ZClip(warmup=2, z=0.5),
    "averages": nc.AdaGC(warmup=2),
}
REPLICATED = {
    **RULES,
    "values": nc.ByValue(-0.1, 0.1),
    "units": nc.ByNorm(0.2, axes=0),
    "adaptive": nc.Adaptive(0.1),
}
NUMBERS = ("norm", "clipped_norm", "scale", "clipped", "skipped", "threshold", "nonfinite")


def numbers(report):
    """Return the fields `NUMBERS` of a report and of each of its groups."""
    reports = [report, *report.groups.values()]
    return [[getattr(own, name) for name in NUMBERS] for own in reports]


def trained(rule, comm=None, size=1, rank=0, sharded=True, steps=5):
    """Train sharded or copied groups; return the parameters, all reports and the history."""
    lengths = {"w": 37, "b": 3, "v": 20}
    cut = (lambda x: shards(x, size)[rank]) if sharded else (lambda x: x)
    params = {name: cut(np.linspace(-1, 1, n)) for name, n in lengths.items()}
    groups = nc.ParamGroups(
        [
            nc.Group("one", {"w": params["w"], "b": params["b"]}, clip=rule, sharded=sharded),
            nc.Group("two", {"v": params["v"]}, clip=rule, sharded=sharded),
            nc.Group("copies", {"c": np.ones(4)}, clip=nc.ByGlobalNorm(1.0)),
        ]
    )
    optimizer = nc.SGD(groups, lr=0.1, momentum=0.9)
    reports = []
    for step in range(steps):
        grads = {name: cut(gradient(step, n, seed=n)) for name, n in lengths.items()}
        groups.set_grads({**grads, "c": gradient(step, 4)})
        reports.append(numbers(groups.clip(apply=False, comm=comm)))
        reports.append(numbers(optimizer.step(comm=comm)))
        reports.append(numbers(groups.clip(unscale=2.0, comm=comm)))
    history = groups.history.to_dict()
    found = {name: np.array(param) for name, param in groups.params.items()}
    return found, reports, history


def assert_told_alike(results):
    """Assert that the reports and the history are the same on all ranks."""
    for _, reports, history in results[1:]:
        np.testing.assert_equal(reports, results[0][1])
        np.testing.assert_equal(history, results[0][2])

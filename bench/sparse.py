"""Clipping a sparse gradient with repeated rows: numclip and its peers.

Peers that sum the repeated rows first return new arrays of sums; numclip scales the rows in place.

The limit, one read in order, is not what bounds numclip. One thread of an idle Zen 3 takes 2.5 ms
for the sums: 1.2 for additions in float64 (18 ns for a row of 64) and 0.8 to 1.1 for reading the
rows group by group. A core has few cache lines in flight, 15 GB/s, and takes twice as long where
other processes use the memory. Grouping the indices takes 0.45 ms. Reading frequent groups' rows
in memory order, into a sum of each group, was no faster: sums are loaded and stored more often.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np

import numclip as nc
from bench import memory_speed
from bench.clips import tensorflow
from bench.workload import Bound, Call, Workload, library, norm_of

Rows = tuple[np.ndarray, np.ndarray]
ROWS = 1_000_000


def summed(rows: Rows) -> np.ndarray:
    """Return the sums of the rows that share an index, in the order of the indices."""
    values, indices = (np.asarray(x) for x in rows)
    distinct, places = np.unique(indices, return_inverse=True)
    sums = np.zeros((distinct.size, values.shape[1]))
    np.add.at(sums, places, values)
    return sums


def exact(source: Rows, bound: float) -> tuple[Any, float]:
    sums = summed(source)
    norm = norm_of([sums])
    return [sums * min(1.0, bound / norm)], norm


def numclip(source: Rows, bound: Bound) -> Call:
    values, indices = source[0].copy(), source[1]

    def call() -> tuple[Any, Any]:
        grad = nc.IndexedSlices(values, indices, (ROWS, values.shape[1]))
        return (values, indices), nc.clip_by_global_norm([grad], bound(), out=[grad])[1]

    return call


def clip_sums(sums: np.ndarray, indices: np.ndarray, bound: float) -> tuple[Rows, float]:
    norm = float(np.linalg.norm(sums))
    if norm > bound:
        sums *= bound / norm
    return (sums, indices), norm


def numpy_add_at(source: Rows, bound: Bound) -> Call:
    values, indices = source

    def call() -> tuple[Any, Any]:
        distinct, places = np.unique(indices, return_inverse=True)
        sums = np.zeros((distinct.size, values.shape[1]), np.float32)
        np.add.at(sums, places, values)
        return clip_sums(sums, distinct, bound())

    return call


def numpy_reduceat(source: Rows, bound: Bound) -> Call:
    values, indices = source

    def call() -> tuple[Any, Any]:
        order = np.argsort(indices, kind="stable")
        distinct, starts = np.unique(indices[order], return_index=True)
        return clip_sums(np.add.reduceat(values[order], starts), distinct, bound())

    return call


def scipy_csr(source: Rows, bound: Bound) -> Call:
    scipy = library("scipy.sparse")
    values, indices = source
    ones, places = np.ones(indices.size, np.float32), np.arange(indices.size)

    def call() -> tuple[Any, Any]:
        distinct, rows = np.unique(indices, return_inverse=True)
        shape = distinct.size, indices.size
        sums = scipy.csr_matrix((ones, (rows, places)), shape) @ values
        return clip_sums(sums, distinct, bound())

    return call


def torch_coalesce(source: Rows, bound: Bound) -> Call:
    torch = library("torch")
    torch.set_num_threads(nc.get_num_threads())
    values, indices = torch.from_numpy(source[0]), torch.from_numpy(source[1])[None]

    def call() -> tuple[Any, Any]:
        size = (ROWS, values.shape[1])
        grad = torch.sparse_coo_tensor(indices, values, size, check_invariants=False).coalesce()
        sums = grad.values()
        norm = torch.linalg.vector_norm(sums)
        sums.mul_(torch.clamp(bound() / norm, max=1.0))
        return (sums, grad.indices()[0]), norm

    return call


@cache
def tf_compiled() -> Any:
    tf = tensorflow()

    def clip(values: Any, indices: Any, bound: Any) -> Any:
        distinct, places = tf.unique(indices)
        sums = tf.math.unsorted_segment_sum(values, places, tf.size(distinct))
        (clipped,), norm = tf.clip_by_global_norm([sums], bound)
        return (clipped, distinct), norm

    return tf.function(clip)


def tf_unique(source: Rows, bound: Bound) -> Call:
    clip = tf_compiled()
    values, indices = (tensorflow().constant(x) for x in source)
    return lambda: clip(values, indices, np.float32(bound()))


@cache
def tf_unmerged_compiled() -> Any:
    tf = tensorflow()

    def clip(values: Any, indices: Any, bound: Any) -> Any:
        (clipped,), norm = tf.clip_by_global_norm([tf.IndexedSlices(values, indices)], bound)
        return (clipped.values, clipped.indices), norm

    return tf.function(clip)


def tf_unmerged(source: Rows, bound: Bound) -> Call:
    clip = tf_unmerged_compiled()
    values, indices = (tensorflow().constant(x) for x in source)
    return lambda: clip(values, indices, np.float32(bound()))


SPARSE = Workload(
    exact,
    {
        "limit": lambda source, bound: memory_speed.clip([source[0]], bound),
        "numclip": numclip,
        "NumPy add.at": numpy_add_at,
        "NumPy reduceat": numpy_reduceat,
        "SciPy CSR": scipy_csr,
        "torch coalesce": torch_coalesce,
        "tf unique": tf_unique,
        "tf unmerged": tf_unmerged,
    },
    passes=(1, 3),
    norm=lambda rows: norm_of([summed(rows)]),
    arrays=lambda rows: [summed(rows)],
)

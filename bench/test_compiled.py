"""Calls from users' compiled code: their run time, and the compile time that they add."""

import argparse
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from numba import njit

import numclip as nc
from numclip.examples import matrix_factorization

CALLS = 100_000
SHAPES = {"4 x 32": 32, "4 x 4096": 4096}

COMPILED = """
import time, numpy as np, numclip as nc
from numba import njit
@njit
def other(grads):
    return np.sqrt(grads[0][0]), np.empty(3)
grads = tuple(np.ones(8, np.float32) for _ in range(4))
other(grads)
@njit
def clip(grads):
    return nc.clip_by_global_norm(grads, 1.0, out=grads)[1]
begin = time.process_time()
clip(grads)
print(time.process_time() - begin)
"""


@njit
def numclip_calls(grads, bound, calls):
    total = 0.0
    for _ in range(calls):
        total += nc.clip_by_global_norm(grads, bound, out=grads)[1]
    return total


@njit
def lines_by_hand(grads, bound, calls):
    total = 0.0
    for _ in range(calls):
        squares = 0.0
        for grad in grads:
            squares += np.sum(grad * grad)
        norm = math.sqrt(squares)
        if norm > bound:
            for grad in grads:
                grad *= np.float32(bound / norm)
        total += norm
    return total


WAYS = {"numclip": numclip_calls, "by hand": lines_by_hand}


@pytest.mark.parametrize("shape", SHAPES)
def test_call(benchmark, shape):
    """Time both ways in turns, where nothing is clipped: nanoseconds a call, and their ratio."""
    calls = 10 if benchmark.disabled else CALLS
    grads = tuple(np.full(SHAPES[shape], 1e-3, np.float32) for _ in range(4))
    found = {name: [] for name in WAYS}
    for way in WAYS.values():
        way(grads, 1.0, 1)

    def run():
        for name, way in WAYS.items():
            begin = time.process_time()
            way(grads, 1.0, calls)
            found[name].append((time.process_time() - begin) / calls * 1e9)

    benchmark.pedantic(run, rounds=1 if benchmark.disabled else 11)
    medians = {name: float(np.median(times)) for name, times in found.items()}
    benchmark.extra_info.update(shape=shape, nanoseconds=medians)
    assert all(math.isfinite(median) for median in medians.values())


def test_compilation(benchmark, cache):
    """Time the compilation of a function with one call, after a first turn fills the cache."""
    command = [sys.executable, "-c", COMPILED]
    environment = os.environ | {"NUMBA_CACHE_DIR": cache}
    turns = 1 if benchmark.disabled else 6

    def run():
        return [float(subprocess.check_output(command, env=environment)) for _ in range(turns)]

    seconds = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(first=seconds[0], median=float(np.median(seconds[1:] or seconds)))


@njit
def train_by_hand(left, right, ratings, rate, max_norm):
    """Do what the example's `train_epoch` does, with the clip written by hand."""
    by_user = np.empty(left.shape[1], left.dtype)
    by_item = np.empty(left.shape[1], left.dtype)
    clipped = 0
    for k in range(ratings.values.size):
        user, item = left[ratings.users[k]], right[ratings.items[k]]
        predicted = np.float32(0.0)
        for j in range(user.size):
            predicted += user[j] * item[j]
        error = predicted - ratings.values[k]
        squares = np.float32(0.0)
        for j in range(user.size):
            by_user[j] = error * item[j]
            by_item[j] = error * user[j]
            squares += by_user[j] * by_user[j] + by_item[j] * by_item[j]
        norm = math.sqrt(squares)
        factor = np.float32(1.0)
        if norm > max_norm:
            clipped += 1
            factor = np.float32(max_norm / norm)
        for j in range(user.size):
            user[j] -= rate * factor * by_user[j]
            item[j] -= rate * factor * by_item[j]
    return clipped


def test_example(benchmark):
    """Time an epoch of the example, with our clip and with lines written by hand, in turns."""
    size = 1000 if benchmark.disabled else 200_000
    args = argparse.Namespace(users=2000, items=1000, ratings=size, rank=8, wild=0.001, seed=0)
    ratings = matrix_factorization.make_ratings(args)
    ways = {"numclip": matrix_factorization.train_epoch, "by hand": train_by_hand}
    found = {name: [] for name in ways}

    def run():
        for name, way in ways.items():
            left = np.full((args.users, args.rank), 0.3, np.float32)
            right = np.full((args.items, args.rank), 0.3, np.float32)
            begin = time.process_time()
            way(left, right, ratings, np.float32(0.02), 2.0)
            found[name].append(time.process_time() - begin)

    run()
    for times in found.values():
        times.clear()
    benchmark.pedantic(run, rounds=1 if benchmark.disabled else 11)
    medians = {name: float(np.median(times)) for name, times in found.items()}
    benchmark.extra_info.update(seconds=medians)
    assert all(median > 0 for median in medians.values())

"""Time several ways in turns of milliseconds: what slows the machine slows all of them alike."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import median
from typing import Any

import numpy as np

from bench.cases import CASES, data
from bench.workload import Bound, Call, Workload, error_of

BLOCK = 4e-3  # seconds, as WARM and BUDGET are
# PyTorch's OpenMP threads spin for 10 ms after their work, on cores that others are timed on.
# Sleeping as long does not help: threads that are woken then share a core for some milliseconds.
WARM = 12e-3
TURNS = 31
BUDGET = 15.0


@dataclass
class Runner:
    """A way to do a case's work: its call, its times, and checks that they are of real work.

    `fallen` has the changes of log(bound) and log(result) from the first call to the last.
    """

    call: Call
    bound: Bound
    times: list[float] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    fallen: tuple[float, float] = (0.0, 0.0)
    iterations: int = 1

    def block(self, warm: float) -> None:
        """Call for `warm` seconds, to fill caches and wake threads, then time a block of calls."""
        start = time.perf_counter()
        while time.perf_counter() < start + warm:
            self.call()
        start = time.perf_counter()
        for _ in range(self.iterations):
            self.call()
        self.times.append((time.perf_counter() - start) / self.iterations)


@dataclass(frozen=True)
class Times:
    """The runner of each installed way, and the reason why each other one is missing."""

    nbytes: int
    runners: dict[str, Runner]
    missing: dict[str, str]

    def time(self, way: str) -> float:
        return median(self.runners[way].times)

    def ratio(self, way: str, to: str) -> float:
        """Return the median over the turns of one way's time to another's."""
        pairs = zip(self.runners[way].times, self.runners[to].times, strict=True)
        return median(one / other for one, other in pairs)


def level(kind: Workload, result: Any) -> float:
    """Return the logarithm of the magnitude of a result's first element."""
    return math.log(abs(np.asarray(next(iter(kind.arrays(result)))).flat[0]))


def errors_of(kind: Workload, made: Any, bound: float, result: Any, norm: Any) -> dict[str, float]:
    exact, right = kind.exact(made, bound)
    error = error_of(kind.arrays(result), exact)
    return {"norm error": abs(float(norm) / right - 1) if right else 0.0, "result error": error}


def prepared(kind: Workload, made: Any, norm: float, clips: bool) -> tuple[dict[str, Runner], Any]:
    """Return the runners of installed ways, and the reasons why other ways are missing."""
    runners, missing = {}, {}
    for way, prepare in kind.ways.items():
        bound = Bound(norm, clips)
        try:
            runners[way] = Runner(prepare(made, bound), bound)
        except ImportError as error:
            missing[way] = f"{error.name} is not installed"
    return runners, missing


def take_turns(runners: Iterable[Runner], turns: int, warm: float = WARM) -> None:
    for _ in range(turns):
        for runner in runners:
            runner.block(warm)


def fill_time(runners: Iterable[Runner]) -> None:
    """Set blocks to `BLOCK` seconds, then take 7 to `TURNS` turns, as `BUDGET` allows."""
    for runner in runners:
        runner.block(WARM)
        runner.iterations = math.ceil(BLOCK / runner.times[-1])
    start = time.perf_counter()
    take_turns(runners, 1)
    turns = BUDGET / (time.perf_counter() - start)
    for runner in runners:
        runner.times.clear()
    take_turns(runners, int(max(7, min(TURNS, turns))))


@lru_cache(maxsize=1)
def time_in_turns(name: str, clips: bool, small: bool) -> Times:
    """Time a case's ways in turns; in a single turn, on little data, if `small`."""
    kind = next(case.kind for case in CASES if case.name == name)
    made, nbytes, norm = data(name, small)
    runners, missing = prepared(kind, made, norm, clips)
    before = {}
    for way, runner in runners.items():
        result, found = runner.call()
        if way != "limit":
            runner.errors = errors_of(kind, made, runner.bound.value, result, found)
            before[way] = math.log(runner.bound.value), level(kind, result)
        del result
    take_turns(runners.values(), 1, warm=0.0)
    if not small:
        fill_time(runners.values())
    for way, (bound, first) in before.items():
        last = level(kind, runners[way].call()[0])
        runners[way].fallen = math.log(runners[way].bound.value) - bound, last - first
    return Times(nbytes, runners, missing)

"""The time before a process's first step: importing, then compiling or loading kernels."""

import os
import subprocess
import sys

FIRST = "import numpy as np; g = [np.full(9, 9.0, np.float32)]; nc.clip_by_global_norm(g, 1.0)"
TIMED = "import time; import numclip as nc; a = time.perf_counter(); {}; b = time.perf_counter()"
WAYS = {
    "import numba": "import time; a = time.perf_counter(); import numba; b = time.perf_counter()",
    "import numclip": "import time; a = time.perf_counter(); import numclip; "
    "b = time.perf_counter()",
    "first call, full cache": TIMED.format(FIRST),
    "first call, empty cache": TIMED.format(FIRST),
    "warmup, full cache": TIMED.format("nc.warmup()"),
    "first call after warmup": TIMED.replace("; a", "; nc.warmup(); a").format(FIRST),
}


def pytest_generate_tests(metafunc):
    turns = 1 if metafunc.config.getoption("benchmark_disable") else 5
    ways = list(WAYS)[:3] if turns == 1 else WAYS
    cases = [(way, turn) for turn in range(turns) for way in ways]
    metafunc.parametrize(("way", "turn"), cases, ids=[f"{way}-{turn}" for way, turn in cases])


def test_startup(benchmark, tmp_path, cache, way, turn):
    folder = str(tmp_path) if "empty" in way else cache
    environment = os.environ | {"NUMBA_CACHE_DIR": folder}
    command = [sys.executable, "-c", f"{WAYS[way]}; print(b - a)"]

    def run():
        return float(subprocess.check_output(command, env=environment))

    if turn == 0 and "full" in way:
        run()
    benchmark.group = "start-up"
    seconds = benchmark.pedantic(run, rounds=1)
    benchmark.extra_info.update(way=way, turn=turn, seconds=seconds)
    assert seconds < 60

"""What a clip in place allocates: under 1 MB, whatever the size."""

import subprocess
import sys
from pathlib import Path

import pytest

from bench.allocations import WAYS

ROOT = Path(__file__).parents[1]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows does not tell a process's peak")
@pytest.mark.parametrize("way", WAYS)
def test_memory(benchmark, way):
    nbytes = 64 << 20 if benchmark.disabled else 1 << 30
    command = [sys.executable, "-m", "bench.allocations", way, str(nbytes)]
    benchmark.group = "memory"
    printed = benchmark.pedantic(subprocess.check_output, (command,), {"cwd": ROOT}, rounds=1)
    peak, traced = map(int, printed.split())
    benchmark.extra_info.update(way=way, nbytes=nbytes, peak=peak, traced=traced)
    assert peak < 1e6
    assert traced < 1e6

"""Users' compiled code that numba keeps on disk: what a new process makes of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import numclip as nc

pytestmark = [pytest.mark.full, pytest.mark.jit_only]

# What the lines before ask for is done before anything is compiled or loaded.
PROGRAM = """
import sys
import numpy as np
import numba
import numclip as nc
from numba import njit
if "changed" in sys.argv:
    from numclip.host.kernels import spans
    spans.FIELD_THAT_WAS_ADDED = 5

@njit(cache=True)
def inner(grads):
    return nc.clip_by_global_norm(grads, 1.0, out=grads)[1]

@njit(cache=True)
def nested(grads):
    return inner(grads)

@njit(cache=True, fastmath=True, boundscheck=True, error_model="numpy", nogil=True)
def flagged(grads):
    return nc.clip_by_global_norm(grads, 1.0, out=grads)[1]

@njit(cache=True, parallel=True, fastmath=True)
def parallel(grads):
    norms = np.zeros(8)
    for k in numba.prange(8):
        own = grads[0] * np.float32(k), grads[1] * k
        norms[k] = nc.clip_by_global_norm(own, 1.0, out=own)[1]
    return norms.sum()

def vectorized(grad, out):
    out[:] = nc.clip_by_norm(grad, 1.0)

if not numba.config.DISABLE_JIT:
    compiler = numba.guvectorize("void(float32[:], float32[:])", "(n)->(n)", cache=True)
    vectorized = compiler(vectorized)

def gradients():
    rng = np.random.default_rng(3)
    return rng.standard_normal(40_000).astype(np.float32), rng.standard_normal((3, 5))

def bits(*arrays):
    return " ".join(str(hash(array.tobytes()) & 0xFFFFFFFF) for array in arrays)

if __name__ == "__main__":
    for function in (nested, flagged, parallel):
        grads = gradients()
        norm = function(grads)
        print(function.__name__, norm.hex() if function is not parallel else "", bits(*grads))
    out = np.empty(40_000, np.float32)
    vectorized(gradients()[0], out)
    print("vectorized", bits(out))
    if not numba.config.DISABLE_JIT:
        found = [*map(sum, (f.stats.cache_hits.values() for f in (nested, flagged, parallel)))]
        print("hits", *found)
"""


def run(folder: Path, *argv: str, **variables: str) -> list[str]:
    program = folder / "program.py"
    program.write_text(PROGRAM)
    os.utime(program, (1e9, 1e9))  # numba asks when it was written
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(folder / "cache"),
        "PYTHONPATH": str(Path(nc.__file__).parents[1]),
        "PYTHONHASHSEED": "0",
        "NUMCLIP_QUIET": "1",
        **variables,
    }
    command = [sys.executable, "-W", "ignore", str(program), *argv]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout.splitlines()


def test_code_from_another_process(tmp_path):
    """It runs, with the bits of Python's, whatever became of our kernels since."""
    own = tmp_path / "cache" / "numclip"
    own.mkdir(parents=True, mode=0o700)
    for kernel in Path(os.environ["NUMBA_CACHE_DIR"], "numclip").glob("clip-*.nbc"):
        shutil.copy(kernel, own)  # which other tests have compiled, it may be
    *expected, hits = run(tmp_path)
    assert hits == "hits 0 0 0"
    assert run(tmp_path) == [*expected, "hits 1 1 1"]
    shutil.rmtree(own)
    assert run(tmp_path) == [*expected, "hits 1 1 1"]
    assert run(tmp_path, "changed") == [*expected, "hits 0 0 0"], "other kernels, other code"
    # Sums of interpreted kernels round otherwise: the norms of float64 differ, no element does.
    interpreted = run(tmp_path, NUMBA_DISABLE_JIT="1")
    assert [re.sub("0x.*? ", "", line) for line in interpreted] == [
        re.sub("0x.*? ", "", line) for line in expected
    ]


def test_code_that_cannot_have_its_kernels():
    """Where numba did not ask whether code is outdated, the code does; the reason is told."""
    program = """
import numpy as np, numclip as nc
from numba import njit
from numclip.compiled import calls
@njit
def clip(grad):
    return nc.clip_by_norm(grad, 0.123)
original, calls.version = calls.version, lambda: "of another release"
clip.compile("float64[:](float64[::1])")
calls.version = original
try:
    clip(np.ones(3))
except RuntimeError as error:
    print(error)
"""
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("numclip was updated since")
    assert "OutdatedCodeError" in done.stderr

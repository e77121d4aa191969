"""Start MPI processes from tests."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TIMEOUT = 300
BESIDE = Path(sys.executable).with_name("mpiexec")
MPIEXEC = str(BESIDE) if BESIDE.exists() else shutil.which("mpiexec")

MARKS = [
    pytest.mark.full,
    pytest.mark.skipif(MPIEXEC is None, reason="no mpiexec; pip install mpich"),
    pytest.mark.skipif(
        importlib.util.find_spec("mpi4py") is None, reason="no mpi4py; pip install mpi4py"
    ),
]


def start(size: int, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python on `size` ranks; raise TimeoutExpired after `TIMEOUT` seconds."""
    # Open MPI starts more ranks than cores only if told to oversubscribe.
    environment = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe", **os.environ}
    environment |= {"NUMCLIP_NUM_THREADS": "1", "NUMCLIP_QUIET": "1"}
    return subprocess.run(
        [str(MPIEXEC), "-n", str(size), sys.executable, "-m", "mpi4py", *argv],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )

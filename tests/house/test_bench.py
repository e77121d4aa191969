"""The benches run, and the README's figures are those that were measured."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[2]


def run(*command):
    done = subprocess.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.jit_only
@pytest.mark.parametrize("half", [0, 1])
def test_every_bench_once_on_little_data(half):
    benches = sorted(map(str, Path(ROOT, "bench").glob("test_*.py")))[half::2]
    assert benches
    run("-m", "pytest", "-q", *benches, "--benchmark-disable", "-p", "no:cacheprovider")


def test_readme_has_the_measured_figures():
    run("-m", "bench.tables", "--check")

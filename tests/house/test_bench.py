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
def test_every_bench_once_on_little_data():
    run("-m", "pytest", "-q", "bench", "--benchmark-disable", "-p", "no:cacheprovider")


def test_readme_has_the_measured_figures():
    run("-m", "bench.tables", "--check")

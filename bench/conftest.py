"""Fixtures of the benches: random arrays of a size in bytes, and timing with rates in GB/s."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from pytest_benchmark.fixture import BenchmarkFixture

import numclip as nc

# Peers measured here run on the CPU, and print no start-up messages.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

PACKAGES = ["numpy", "numba", "scipy", "torch", "jax", "optax", "tensorflow", "tensorflow-cpu"]

# The smoke run (--benchmark-disable) calls everything once, on little data.
SMALL = 1 << 14


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--case", action="append", help="measure this case of cases.py alone")


def pytest_benchmark_update_machine_info(machine_info: dict[str, object]) -> None:
    versions: dict[str, object] = {"threads": nc.get_num_threads(), "numclip": nc.__version__}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    machine_info["versions"] = versions


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs an NVIDIA GPU; skipped where there is none")


@pytest.fixture
def one_thread() -> Iterator[None]:
    nc.set_num_threads(1)
    yield
    nc.set_num_threads(None)


@pytest.fixture(scope="module")
def cache(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an empty kernel cache for child processes; in the smoke run the one in use."""
    smoke = request.config.getoption("benchmark_disable")
    in_use = os.environ.get("NUMBA_CACHE_DIR") if smoke else None
    return in_use or str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def normal(benchmark: BenchmarkFixture) -> Callable[[int, str], np.ndarray]:
    """Return a function that makes so many bytes of normal numbers, few in the smoke run."""

    def make(nbytes: int, dtype: str) -> np.ndarray:
        size = SMALL if benchmark.disabled else nbytes // np.dtype(dtype).itemsize
        return np.random.default_rng(os.getpid()).standard_normal(size).astype(dtype)

    return make


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[..., None]:
    """Return a function that times a call after a warm-up, and records its rate in GB/s."""

    def run(call: Callable[[], object], nbytes: int, **info: object) -> None:
        call()
        benchmark.extra_info.update(info, nbytes=nbytes)
        benchmark(call)
        if not benchmark.disabled:
            benchmark.extra_info["GB/s"] = round(nbytes / benchmark.stats.stats.median / 1e9, 2)

    return run

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

TESTS = Path(__file__).parent


def kernel_digest() -> str:
    """A hash of the kernels' sources, without importing them."""
    spec = importlib.util.find_spec("numclip")
    assert spec is not None
    assert spec.submodule_search_locations
    digest = hashlib.sha256()
    for root in spec.submodule_search_locations:
        ground = (
            Path(root, f"{name}.py") for name in ("decisions", "formulas", "halves", "tables")
        )
        for path in (*ground, *sorted(Path(root).glob("host/*/*.py"))):
            digest.update(path.name.encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


# numba does not notice an edit in a module whose functions were inlined into a cached kernel, so
# every state of the sources gets a cache of its own. Set before anything imports numba.
USER = getattr(os, "getuid", int)()
CACHE = Path(tempfile.gettempdir(), f"numclip-tests-{USER}-{kernel_digest()}")
CACHE.mkdir(mode=0o700, exist_ok=True)
os.environ["NUMBA_CACHE_DIR"] = str(CACHE)

from hypothesis import HealthCheck, settings  # noqa: E402

from tests import rings  # noqa: E402
from tests.oracle.targets import Host  # noqa: E402

INSIDE = "tests.compiled.inside"  # imported where it is needed
# The items of a run before the ring chose among them.
COLLECTED = pytest.StashKey[list[pytest.Item]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--full",
        action="store_true",
        help="all products of parameters, child processes, whole programs, a stand-in for a GPU",
    )
    parser.addoption(
        "--rest", action="store_true", help="what --full has and the first ring has not tried"
    )


def pytest_configure(config: pytest.Config) -> None:
    ring = rings.ring_of(config)
    # What is marked gpu runs on a stand-in for one, unless -m gpu asks for the GPU there is. One of
    # the two is there before numba asks for a driver, at its import.
    if ring == "gpu":
        os.environ.setdefault("NUMCLIP_ASK_FOR_GPU", "1")
    if ring != "first" and not rings.INTERPRETED:
        importlib.import_module("tests.cuda.gpu")
    for name, meaning in rings.MARKERS.items():
        config.addinivalue_line("markers", f"{name}: {meaning}")
    settings.register_profile(
        ring,
        derandomize=True,
        deadline=None,
        max_examples=rings.examples(ring),
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
    settings.load_profile(ring)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = collection_path.parent == TESTS and collection_path.name in rings.FULL_FOLDERS
    return True if is_left_out and rings.ring_of(config) == "first" else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "target" in metafunc.fixturenames:
        is_of_gpu = TESTS / "cuda" in metafunc.definition.path.parents
        within_njit = metafunc.definition.get_closest_marker("within_njit") is not None
        names = rings.targets(rings.ring_of(metafunc.config), is_of_gpu, within_njit)
        targets = [pytest.param(name, marks=rings.TARGETS[name]) for name in names]
        metafunc.parametrize("target", targets, indirect=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[COLLECTED] = items[:]
    kept = rings.chosen(items, rings.ring_of(config))
    left_out = set(items).difference(kept)
    if left_out:
        config.hook.pytest_deselected(items=[item for item in items if item in left_out])
        items[:] = kept
    if hasattr(config, "workerinput"):
        items[:] = rings.for_workers(items)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker one stretch of the suites, see `rings.for_workers`."""
    from xdist.scheduler import WorkStealingScheduling  # there, where this is called

    return WorkStealingScheduling(config, log) if config.getoption("dist") == "load" else None


@pytest.fixture
def target(request: pytest.FixtureRequest) -> Iterator[Any]:
    """numclip's functions on the gradients of a suite: where they are, or on the GPU."""
    if request.param != "cuda":
        kind = Host if request.param == "host" else importlib.import_module(INSIDE).WithinNjit
        yield kind(rings.examples(rings.ring_of(request.config)))
        return
    from tests.cuda import devices, gpu  # imported where there is a GPU, or its stand-in, alone

    gpu.require()
    yield devices.OnDevice()
    gpu.check()


@pytest.fixture
def tries(request: pytest.FixtureRequest) -> Callable[[int], int]:
    """How many tries of so many the ring has time for: a quarter in the first."""
    ring = rings.ring_of(request.config)
    return lambda count: count * rings.EXAMPLES[ring] // rings.EXAMPLES["full"]


@pytest.fixture(autouse=True)
def no_children(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no test of the first ring start a process: it is to be marked ``full``."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("a child process in the first ring; mark the test with pytest.mark.full")

    if rings.ring_of(request.config) == "first":
        importlib.import_module("numpy.testing")  # which starts one, to know the processor
        monkeypatch.setattr(subprocess, "Popen", refuse)

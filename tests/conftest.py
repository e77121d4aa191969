from __future__ import annotations

import hashlib
import importlib.util
import os
import tempfile
from pathlib import Path

import pytest

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")


def kernel_digest() -> str:
    """A hash of the kernels' sources, without importing them."""
    spec = importlib.util.find_spec("numclip")
    assert spec is not None
    assert spec.submodule_search_locations
    digest = hashlib.sha256()
    for root in spec.submodule_search_locations:
        for path in sorted(Path(root, "kernels").rglob("*.py")):
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

settings.register_profile(
    "numclip",
    derandomize=True,
    deadline=None,
    max_examples=8 if INTERPRETED else 100,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.load_profile("numclip")


def pytest_configure(config: pytest.Config) -> None:
    # What is marked gpu runs on a stand-in for one, unless -m gpu asks for the GPU there is.
    if config.option.markexpr == "gpu":
        os.environ.setdefault("NUMCLIP_ASK_FOR_GPU", "1")
    config.addinivalue_line("markers", "gpu: runs on the GPU with -m gpu, or on a stand-in for one")
    config.addinivalue_line(
        "markers", "jit_only: too much data for kernels run as plain Python (NUMBA_DISABLE_JIT=1)"
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not INTERPRETED:
        return
    skip = pytest.mark.skip(reason="interpreted kernels are too slow for this size")
    for item in items:
        if item.get_closest_marker("jit_only") or item.get_closest_marker("gpu"):
            item.add_marker(skip)

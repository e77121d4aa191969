"""The GPU to work on, or the stand-in for one; for tests and benches."""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

import pytest

import numclip as nc
from tests.cuda import standin


def has_gpu() -> bool:
    """Whether there is a driver that knows a GPU."""
    count = ctypes.c_int()
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        failed = driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count))
        return not failed and count.value > 0
    except (OSError, AttributeError):
        return False


def asked(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


HARDWARE = asked("NUMCLIP_REQUIRE_GPU") or (asked("NUMCLIP_ASK_FOR_GPU") and has_gpu())
MISSING = None if HARDWARE else standin.missing()
if not HARDWARE and MISSING is None:
    standin.install()


def new_stream() -> int:
    """The handle of a stream that waits for no other, as PyTorch's and JAX's do."""
    from cuda.bindings import driver

    from numclip.cuda import device

    device.require()
    error, stream = driver.cuStreamCreate(1)
    assert not error
    return int(stream)


def late() -> contextlib.AbstractContextManager[None]:
    """What a GPU is given is done as late as can be, where it is the stand-in."""
    return contextlib.nullcontext() if HARDWARE else standin.as_late_as_can_be()


def require() -> None:
    """Have a GPU, or a stand-in for one; say so where there is none though one is asked for."""
    if MISSING is not None:
        pytest.skip(MISSING)
    try:
        from numclip.cuda import device

        device.require()
    except nc.DeviceError as error:
        if HARDWARE:
            pytest.fail(f"NUMCLIP_REQUIRE_GPU is set, or a GPU was found: {error}")
        pytest.skip(f"no GPU: {error}")


def check() -> None:
    """See that all threads of a block came to each barrier, which the stand-in alone can tell."""
    assert HARDWARE or not standin.divergences()


@pytest.fixture(autouse=True)
def ready() -> Iterator[None]:
    require()
    yield
    check()

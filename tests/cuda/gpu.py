"""Whether there is a GPU to work on, or one that is simulated; for tests and benches."""

from __future__ import annotations

import os
import sys

import pytest

import numclip as nc


@pytest.fixture(autouse=True)
def ready() -> None:
    """Have a GPU, or simulate one; say so where there is none though one is asked for."""
    try:
        from numclip.kernels.cuda import device

        if device.SIMULATED:
            sys.setswitchinterval(1e-5)  # the simulator waits for its threads by polling
        else:
            device.require()
    except nc.DeviceError as error:
        if os.environ.get("NUMCLIP_REQUIRE_GPU", "0") not in ("", "0"):
            pytest.fail(f"NUMCLIP_REQUIRE_GPU is set: {error}")
        pytest.skip(f"no GPU: {error}")

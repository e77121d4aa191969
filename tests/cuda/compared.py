"""Groups on the GPU beside the same on the host, and how results of both are compared."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import numclip as nc
from numclip.cuda import driver, memory
from tests.oracle import reference
from tests.oracle.checks import assert_same_bits

FOLLOWING = nc.AutoClip, nc.ZClip, nc.AdaGC
# What waits for the GPU, and what moves or makes memory there.
WAITING = "synchronize", "read_table", "read"
MOVING = "table", "Memory", "update", "write", "copy", "clear"


def pair(*groups: nc.Group) -> tuple[nc.ParamGroups, Any]:
    return nc.ParamGroups(groups), nc.ParamGroups(groups, device="cuda")


def numbers(report: Any) -> dict[str, Any]:
    """A report, its norms rounded to what two ways of adding agree on."""

    def rounded(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: rounded(part) for key, part in value.items()}
        if isinstance(value, float) and math.isfinite(value):
            return float(f"{value:.11g}")
        return repr(value)

    return rounded(report.to_dict())


def assert_as_on_the_cpu(found: np.ndarray, wanted: np.ndarray) -> None:
    """The same bits, but for float64, whose norms may differ in the last ones."""
    assert found.shape == wanted.shape
    assert found.dtype == wanted.dtype
    if reference.PRECISION[wanted.dtype.name] < 53:
        assert_same_bits(found, wanted)
        return
    pair = (np.ascontiguousarray(a).reshape(-1).view(np.float64) for a in (found, wanted))
    assert reference.ulp_distance(*pair).max(initial=0) <= 4


def forbid(monkeypatch, names=WAITING):
    """Let whatever waits for the device fail, or whatever is named."""

    def refuse(*_):
        raise AssertionError("the host waits for the device, or moves something")

    for name in names:
        monkeypatch.setattr(driver if name == "synchronize" else memory, name, refuse)

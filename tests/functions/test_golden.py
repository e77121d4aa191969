"""The outputs of TensorFlow, PyTorch and optax, recorded in golden/."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference
from tests.oracle.recorded import CASES, load

RELATIVE = {"float32": 2e-6, "float64": 1e-12}


def run(op: str, args: dict[str, Any], inputs: list[Any]) -> list[Any]:
    """Call numclip as the case says; the outputs in the order of the case."""
    args = dict(args)
    if args.get("ord") == "inf":
        args["ord"] = np.inf
    if op == "global_norm":
        return [nc.global_norm(inputs, **args)]
    if op == "clip_by_global_norm":
        clipped, norm = nc.clip_by_global_norm(inputs, **args)
        return [*clipped, norm]
    if op == "clip_per_example":
        summed, count = nc.clip_per_example(inputs, **args)
        return [*summed, count]
    if args.pop("array_bounds", False):
        return [nc.clip_by_value(*inputs)]
    if "reduced_axes" in args:
        args["axes"] = args.pop("reduced_axes")
    return [getattr(nc, op)(*inputs, **args)]


def assert_equal(actual: Any, expected: Any, relative: float, floor: float) -> None:
    if expected is None:
        assert actual is None
        return
    if isinstance(expected, nc.IndexedSlices):
        np.testing.assert_array_equal(actual.indices, expected.indices)
        assert tuple(actual.dense_shape) == tuple(expected.dense_shape)
        actual, expected = actual.values, expected.values
    if isinstance(actual, nc.IndexedSlices):
        actual = actual.to_dense()
    if isinstance(actual, float | int):
        actual = np.asarray(actual, expected.dtype)
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, rtol=relative, atol=floor)


def tolerance(case: dict[str, Any], inputs: list[Any], expected: Any) -> tuple[float, float]:
    """How far a result may be from the peer's: relatively, and as a number."""
    if expected is None or case["op"] == "clip_by_value":
        return 0.0, 0.0  # nothing is rounded but the bounds, by both in the same way
    array = reference.stored(expected)
    relative = RELATIVE.get(array.dtype.name, 0.0)
    if case["source"].startswith("torch"):
        # PyTorch divides by norm + 1e-6.
        relative += 1e-6 / reference.norm(inputs, float(case["args"]["ord"]))
    if case["op"] == "clip_per_example":
        # Where the examples cancel, a sum is right relative to its terms, not to itself.
        return relative, relative * float(np.max(np.abs(array), initial=0))
    return relative, 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['id']}-{case['op']}")
def test_golden(case):
    inputs = [load(entry) for entry in case["inputs"]]
    expected = [load(entry) for entry in case["outputs"]]
    kept = [g if g is None else reference.stored(g).copy() for g in inputs]
    actual = run(case["op"], case["args"], inputs)
    assert len(actual) == len(expected)
    for result, wanted in zip(actual, expected, strict=True):
        assert_equal(result, wanted, *tolerance(case, inputs, wanted))
    for gradient, copy in zip(inputs, kept, strict=True):
        if gradient is not None:
            np.testing.assert_array_equal(reference.stored(gradient), copy)


def test_every_operation_is_covered():
    assert len(CASES) == 487
    assert Counter(case["op"] for case in CASES) == {
        "clip_by_value": 61,
        "clip_by_norm": 216,
        "clip_by_average_norm": 36,
        "clip_by_global_norm": 123,
        "global_norm": 18,
        "adaptive_clip": 12,
        "clip_by_block_rms": 18,
        "clip_per_example": 3,
    }

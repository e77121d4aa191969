"""Clips and steps with sparse gradients by one native call give what several calls give."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip.clipping.held_rows import RowTaker
from numclip.clipping.steps import Steps
from numclip.clipping.updating import GroupUpdater
from numclip.host.kernels import row_steps
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import frozen
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import from_bits, in_band

RULES = [
    None,
    nc.ByGlobalNorm(0.5),
    nc.ByGlobalNorm(2.0, shared="both"),
    nc.ByGlobalNorm(1e-40),
    nc.ByGlobalNorm(lambda step: 3.0 / (1 + step)),
    nc.ByNorm(0.4),
    nc.ByAverageNorm(0.05),
    nc.AutoClip(percentile=40),
    nc.AdaGC(warmup=1),
    nc.ZClip(warmup=1, max_norm=4.0),
]
OPTIMIZERS = {
    "SGD": lambda groups: nc.SGD(groups, lr=0.5, weight_decay=0.1),
    "momentum": lambda groups: nc.SGD(groups, lr=0.5, momentum=0.9, nesterov=True),
    "Adam": lambda groups: nc.Adam(groups, lr=0.1, weight_decay=0.1),
}
SPARSE = {"e": (6, 3), "f": (4,), "none": (3, 0, 2)}
OPERATIONS = ["set", "accumulate", "some", "zero", "measure", "clip", "step", "given", "given some"]


def members(dtype: str, rules: Any, policies: Any, masters: Any = None) -> list[nc.Group]:
    rng = np.random.default_rng(0)
    dense = {"w": normal(rng, (4, 2), dtype), "b": normal(rng, (3,), dtype)}
    rows = {name: normal(rng, shape, dtype) for name, shape in SPARSE.items()}
    return [
        nc.Group("dense", dense, rules[0], nonfinite=policies[0], master=masters),
        nc.Group("rows", rows, rules[1], nonfinite=policies[1], sparse=True, master=masters),
    ]


def numbers(rng: np.random.Generator, shape: Any, dtype: np.dtype, kind: str) -> np.ndarray:
    size = math.prod(shape)
    if kind == "any":
        return from_bits(rng, size, dtype).reshape(shape)
    array = in_band(rng, size, dtype, -200 if kind == "subnormal" else -2, 4)
    if kind == "bad" and size:
        array[rng.integers(size)] = rng.choice([np.nan, np.inf])
    return array.reshape(shape)


def gradients(rng: np.random.Generator, groups: Any, kind: str) -> dict[str, Any]:
    """Rows unsorted, repeated or not, or none at all; some gradients are absent."""
    found: dict[str, Any] = {}
    for group in groups:
        for name, param in group.updated.items():
            if rng.random() < 0.1:
                found[name] = None
                continue
            if not group.sparse:
                found[name] = numbers(rng, param.shape, param.dtype, kind)
                continue
            rows = int(rng.integers(0, 12)) if param.shape[0] else 0
            values = numbers(rng, (rows, *param.shape[1:]), param.dtype, kind)
            indices = rng.integers(0, param.shape[0], rows)
            if rng.random() < 0.3:  # that cancel
                values = np.concatenate([values, -values])
                indices = np.concatenate([indices, indices])
            found[name] = nc.IndexedSlices(values, indices, param.shape)
    return found


def done(groups: Any, optimizer: Any, operation: str, grads: Any, unscale: float) -> Any:
    """Do something; return what it tells."""
    some = dict(list(grads.items())[1:-1])
    if operation in ("set", "accumulate", "some"):
        method = groups.accumulate if operation == "accumulate" else groups.set_grads
        method(some if operation == "some" else grads)
        return None
    if operation == "zero":
        groups.zero_grads()
        return None
    report = {
        "measure": lambda: groups.clip(apply=False, unscale=unscale),
        "clip": lambda: groups.clip(unscale=unscale),
        "step": optimizer.step,
        "given": lambda: optimizer.step(grads, unscale=unscale),
        "given some": lambda: optimizer.step(some),
    }[operation]()
    return repr(report.to_dict())


def left(make: Any, optimizer: str, operations: Any, kinds: Any, unscale: float) -> list[Any]:
    """Do one thing after another; return all that is left after each."""
    groups = nc.ParamGroups(make())
    made = OPTIMIZERS[optimizer](groups)
    rng, found = np.random.default_rng(1), []
    for operation, kind in zip(operations, kinds, strict=True):
        grads = gradients(rng, groups, kind)
        before = frozen(grads)
        try:
            found.append(done(groups, made, operation, grads, unscale))
        except nc.NonFiniteGradientError as error:
            found.append(str(error))
        assert frozen(grads) == before
        if "given" in operation:
            groups.zero_grads()  # after which they are defined
        seen = {name: groups["rows"].seen(name) for name in SPARSE}
        found.append((frozen(seen), frozen(made.state_dict()), frozen(groups.state_dict())))
    return found


@contextmanager
def in_parts() -> Iterator[None]:
    """Let nothing be done by one call."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "take_at_once", lambda *_: False)
        patch.setattr(RowTaker, "take", lambda *_, **__: False)
        patch.setattr(GroupUpdater, "_ready", lambda *_: None)
        yield


def assert_same_both_ways(*case: Any) -> None:
    with np.errstate(all="ignore"):
        at_once = left(*case)
        with in_parts():
            for k, (found, wanted) in enumerate(zip(at_once, left(*case), strict=True)):
                assert found == wanted, (k, case)


@given(st.data())
def test_any_sequence(data):
    dtype = data.draw(st.sampled_from(sorted(DTYPES)))
    rules = [data.draw(st.sampled_from(RULES)) for _ in range(2)]
    policy = st.sampled_from(["propagate", "skip", "zero", "raise"])
    policies = [data.draw(policy)] * 2 if rules[0] is rules[1] else [data.draw(policy) for _ in "12"]
    masters = "float32" if dtype in ("float16", "bfloat16") and data.draw(st.booleans()) else None
    operations = data.draw(st.lists(st.sampled_from(OPERATIONS), min_size=1, max_size=6))
    kind = st.sampled_from(["plain", "plain", "any", "subnormal", "bad"])
    kinds = [data.draw(kind) for _ in operations]
    optimizer = data.draw(st.sampled_from(sorted(OPTIMIZERS)))
    unscale = data.draw(st.sampled_from([1.0, 1.0, 3.0, 1024.0]))

    def make():
        return members(dtype, rules, policies, masters)

    assert_same_both_ways(make, optimizer, operations, kinds, unscale)

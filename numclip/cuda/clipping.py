"""Clipping arrays on the GPU: what `functional` does with gradients that lie there.

Nothing here waits for the GPU but ``nonfinite="raise"`` and whoever reads a norm.
"""

from __future__ import annotations

import math
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

from numclip import inputs
from numclip.cuda import arrays, tensors
from numclip.cuda.arrays import DeviceEntry
from numclip.cuda.values import DeviceFloat
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.plan import ABSENT, Law, Plan, Pool
from numclip.nonfinite import first_error

PLANS = 32
"""How many plans are kept: gradients at the same addresses as before find theirs again."""

_plans: OrderedDict[Any, tuple[Plan, list[Any]]] = OrderedDict()


def _name_of(items: Sequence[Any], law: Law, policy: str, *, write: bool) -> tuple[Any, ...] | None:
    """Return by what the plan for tensors of PyTorch, in place, is found without describing them.

    None where there are others among the arrays, and where an error would have to name one. What
    was only measured was not checked for writing.
    """
    told = None if policy == "raise" else tensors.facts(items)
    if not told:
        return None
    stream = arrays.current_stream(next(item for item in items if item is not None))
    return device.handle_of(stream), policy, law.ord, write, told


def _keep(key: Any, found: tuple[Plan, list[Any]]) -> None:
    """Keep a plan as the one used last, and forget the one not used for longest."""
    _plans[key] = found
    _plans.move_to_end(key)
    while len(_plans) > PLANS:
        _plans.popitem(last=False)


def _plan(
    entries: Sequence[DeviceEntry], targets: Sequence[DeviceEntry], policy: str, stream: Any
) -> tuple[Plan, list[Any]]:
    """Return the plan for one norm of some tensors, and its free memory for outcomes.

    Each stream has its own: two could use a plan's memory at the same time.
    """
    spans = [
        Span(entry.dtype, entry.address, target.address, entry.size)
        for entry, target in zip(entries, targets, strict=True)
    ]
    key = (policy, device.handle_of(stream), *spans)
    found = _plans.get(key) or (Plan(spans, [Pool(0, len(spans), 0, policy)], stream), [])
    _keep(key, found)
    return found


def clip(
    entries: Sequence[DeviceEntry],
    targets: Sequence[DeviceEntry] | None,
    law: Law,
    policy: str = "propagate",
    name: Any = None,
) -> float | DeviceFloat:
    """Scale gradients by one factor where their norm exceeds a bound; return the norm.

    Without targets they are only measured. The plan is found again by the `name`, if it has one.
    """
    device.require()
    if not entries:
        return 0.0 if law.given == ABSENT else law.given
    stream = arrays.stream_of(entries)
    plan, free = _plan(entries, entries if targets is None else targets, policy, stream)
    outcome, norm = _judge(plan, free, law, policy, stream)
    if policy == "raise" and _decided(outcome, tables.BROKEN, stream):
        given = None if law.given == ABSENT else law.given
        raise first_error([arrays.host_entry(e, stream) for e in entries], given)
    if targets is not None:
        plan.scale(outcome, stream)
    if name is not None:
        _keep(name, (plan, free))
    return norm


def _judge(
    plan: Plan, free: list[Any], law: Law, policy: str, stream: Any
) -> tuple[tuple[Any, Any], DeviceFloat]:
    """Measure and decide by a law; return where the outcome is, and the norm of it."""
    outcome = free.pop() if free else plan.outcomes(1, stream)[0]
    plan.write_laws(law, stream)
    if law.given == ABSENT or policy != "propagate":
        plan.measure(law.ord, stream)
    plan.judge(outcome, stream)
    norm = DeviceFloat(lambda: _decided(outcome, tables.NORM, stream))
    weakref.finalize(norm, free.append, outcome).atexit = False
    return outcome, norm


def _again(name: Any, law: Law, policy: str, *, write: bool) -> DeviceFloat | None:
    """Do what `clip` does with tensors that have a plan; None, and nothing done, with others."""
    if name is None or name not in _plans:
        return None
    plan, free = _plans[name]
    _keep(name, (plan, free))
    stream = device.stream_at(name[0])
    outcome, norm = _judge(plan, free, law, policy, stream)
    if write:
        plan.scale(outcome, stream)
    return norm


def _decided(outcome: tuple[Any, Any], column: int, stream: Any) -> float:
    """Return what was decided, after waiting for it."""
    return float(device.read_table(outcome[1], stream)[0, column])


def global_norm(grads: Any, ord: float) -> float | DeviceFloat:
    """Return the norm of all gradients together, as `functional.global_norm`."""
    _, items, _ = inputs.structure(grads)
    law = Law(math.inf, ord=ord)
    name = _name_of(items, law, "propagate", write=False)
    norm = _again(name, law, "propagate", write=False)
    if norm is not None:
        return norm
    described: Any = arrays.gradients(grads)
    _refuse_complex(described.entries, ord)
    return clip(described.entries, None, law, name=name)


def clip_by_global_norm(
    grads: Any, bound: float, given: float | None, ord: float, policy: str, out: Any
) -> tuple[Any, float | DeviceFloat]:
    """Scale all gradients by one factor, as `functional.clip_by_global_norm`."""
    _, items, rebuild = inputs.structure(grads)
    law = Law(bound, given=ABSENT if given is None else given, ord=ord)
    name = _name_of(items, law, policy, write=True) if out is grads else None
    norm: float | DeviceFloat | None = _again(name, law, policy, write=True)
    if norm is not None:
        return rebuild(items), norm
    described: Any = arrays.gradients(grads)
    _refuse_complex(described.entries, ord)
    device.require()
    targets = arrays.targets(described, grads, out)
    norm = clip(described.entries, targets, law, policy, name)
    return described.with_results([target.array for target in targets]), norm


def clip_whole(
    grad: Any, bound: float, out: Any, divisor: Callable[[int], float], ord: float
) -> Any:
    """Clip one gradient by its norm over a divisor, which follows from how many elements it has."""
    entry = arrays.describe("grad", 0, grad)
    _refuse_complex([entry], ord)
    target = _place(entry, out)
    clip([entry], [target], Law(bound, divisor(max(entry.elements, 1)), ord=ord))
    return target.array


def clip_by_value(grad: Any, low: Any, high: Any, out: Any) -> Any:
    """Hold each element between two numbers, as `functional.clip_by_value`."""
    entry = arrays.describe("grad", 0, grad)
    if entry.dtype.components == 2:
        raise TypeError(f"grad: expected real numbers to hold between bounds, got {entry.native}")
    if getattr(low, "ndim", 0) or getattr(high, "ndim", 0):
        raise TypeError(
            "clip_value_min, clip_value_max: expected numbers for a gradient on the GPU, got "
            "arrays; clip a copy on the host"
        )
    low, high = inputs.value_bounds(low, high, entry.shape)
    target = _place(entry, out)
    stream = arrays.stream_of([entry])
    plan, free = _plan([entry], [target], "propagate", stream)  # by which nothing is skipped
    outcome = free.pop() if free else plan.outcomes(1, stream)[0]
    plan.clamp(outcome, low, high, stream, range(1))
    free.append(outcome)
    return target.array


def _place(entry: DeviceEntry, out: Any) -> DeviceEntry:
    device.require()
    if out is None:
        return arrays.new_like(entry)
    target = arrays.target(entry, out, "out")
    arrays.refuse_overlaps([entry], [target])
    return target


def _refuse_complex(entries: Sequence[DeviceEntry], ord: float) -> None:
    for entry in entries:
        if entry.dtype.components == 2 and ord != 2.0:
            raise TypeError(
                f"{entry.name}: expected real numbers on the GPU where ord is not 2, "
                f"got {entry.native}; clip a copy on the host"
            )

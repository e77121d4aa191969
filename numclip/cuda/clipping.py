"""Clipping arrays on the GPU: what `functional` does with gradients that lie there.

Nothing here waits for the GPU but ``nonfinite="raise"`` and whoever reads a norm.
"""

from __future__ import annotations

import math
import operator
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numclip import foreign, inputs
from numclip.clipping import repeated_loss
from numclip.cuda import outputs, plans, tensors
from numclip.cuda.arrays import empty
from numclip.cuda.copies import host_entry, on_host
from numclip.cuda.entries import DeviceEntry, describe, gradients
from numclip.cuda.streams import current_stream, give_back, stream_of
from numclip.cuda.values import DeviceFloat
from numclip.kernels.cuda import device, tables
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.grouping import RowSpan
from numclip.kernels.cuda.plan import ABSENT, Law, Plan, Pool
from numclip.kernels.cuda.tiling import Memory, Strided, clamp_between
from numclip.nonfinite import first_error
from numclip.slices import Grouping


def _plan(
    entries: Sequence[DeviceEntry],
    targets: Sequence[DeviceEntry],
    policy: str,
    duplicates: str,
    stream: Any,
    ord: float = 2.0,
) -> tuple[Plan, list[Any]]:
    """Return the plan for one norm of some tensors, and its free memory for outcomes.

    Each stream has its own: two could use a plan's memory at the same time.
    """
    pairs = zip(entries, targets, strict=True)
    spans = [span(entry, target, policy, ord, duplicates) for entry, target in pairs]
    key = (policy, device.handle_of(stream), *spans)
    kept_plan = plans.kept(key, lambda: Plan(spans, [Pool(0, len(spans), 0, policy)], stream))
    rows = [span for span in spans if isinstance(span, RowSpan)]
    if rows:
        kept_plan[0].take_rows(rows, _groupings(entries, spans), stream)
    return kept_plan


def _name_of(items: Sequence[Any], law: Law, policy: str, *, write: bool) -> tuple[Any, ...] | None:
    """Return by what the plan for tensors of PyTorch, in place, is found without describing them.

    None where there are others among the arrays, and where an error would have to name one. What
    was only measured was not checked for writing.
    """
    told = None if policy == "raise" else tensors.facts(items)
    if not told:
        return None
    stream = current_stream(next(item for item in items if item is not None))
    return device.handle_of(stream), policy, law.ord, write, told


def _again(name: Any, law: Law, policy: str, *, write: bool) -> DeviceFloat | None:
    """Do what `clip` does with tensors that have a plan; None, and nothing done, with others."""
    found = None if name is None else plans.find(name)
    if found is None:
        return None
    stream = device.stream_at(name[0])
    measure = law.given == ABSENT or policy != "propagate"
    with found[0].lock:
        outcome, norm = _judge(found, law, stream, measure=measure)
        if write:
            found[0].scale(outcome, stream)
    return norm


def _groupings(entries: Sequence[DeviceEntry], spans: Sequence[Any]) -> list[Grouping]:
    """Return which rows share an index, of the gradients whose rows are to be summed."""
    return [
        entry.slices.grouping
        for entry, span in zip(entries, spans, strict=True)
        if isinstance(span, RowSpan) and entry.slices is not None
    ]


def span(
    entry: DeviceEntry, target: DeviceEntry, policy: str, ord: float, duplicates: str = "raw"
) -> Span | Strided | RowSpan:
    """Return where a gradient is and goes: as contiguous memory where it is that.

    Contiguous memory is taken as stored numbers; tiles know the parts of a complex one, whose
    magnitude counts, or of which none stays where one is not finite.
    """
    if duplicates == "sum" and entry.repeated:
        return row_span(entry)._replace(target=target.address)
    parts = entry.dtype.components == 2 and (ord != 2.0 or policy == "zero")
    if entry.strides == target.strides and entry.dense and not parts:
        return Span(entry.dtype, entry.address, target.address, entry.size)
    return Strided(entry.dtype, entry.shape, entry.memory, target.memory)


def row_span(entry: DeviceEntry) -> RowSpan:
    """Return where the rows of slices are, in place, whose sums are to be measured."""
    length = math.prod(entry.shape[1:]) * entry.dtype.components
    return RowSpan(entry.dtype, entry.address, entry.address, entry.size, length)


def clip(
    entries: Sequence[DeviceEntry],
    targets: Sequence[DeviceEntry] | None,
    law: Law,
    policy: str = "propagate",
    duplicates: str = "sum",
    name: Any = None,
) -> float | DeviceFloat:
    """Scale gradients by one factor where their norm exceeds a bound; return the norm.

    Without targets they are only measured. The plan is found again by the `name`, if it has one.
    """
    device.require()
    if not entries:
        return 0.0 if law.given == ABSENT else law.given
    places = entries if targets is None else targets
    stream = stream_of([*entries, *places])
    summed = duplicates == "sum" and any(entry.repeated for entry in entries)
    if summed:
        law = law._replace(loss=repeated_loss(entries, law.ord))
    found = _plan(entries, places, policy, duplicates, stream, law.ord)
    measure = law.given == ABSENT or policy != "propagate" or summed
    with found[0].lock:
        outcome, norm = _judge(found, law, stream, measure=measure)
        if policy == "raise" and _decided(outcome, tables.BROKEN, stream):
            given = None if law.given == ABSENT else law.given
            raise first_error([host_entry(e, stream) for e in entries], given)
        if targets is not None:
            found[0].scale(outcome, stream)
    give_back(stream, [*entries, *places])
    if name is not None:
        plans.keep(name, found)
    return norm


def _judge(
    found: tuple[Plan, list[Any]], law: Law, stream: Any, *, measure: bool
) -> tuple[tuple[Any, Any], DeviceFloat]:
    """Decide by a law, after measuring or not; return where the outcome is, and its norm."""
    plan, free = found
    outcome = free.pop() if free else plan.outcomes(1, stream)[0]
    plan.write_laws(law, stream)
    if measure:
        plan.measure(law.ord, stream)
    plan.judge(outcome, stream)
    norm = DeviceFloat(lambda: _decided(outcome, tables.NORM, stream))
    weakref.finalize(norm, free.append, outcome).atexit = False
    return outcome, norm


def _decided(outcome: tuple[Any, Any], column: int, stream: Any) -> float:
    """Return what was decided, after waiting for it."""
    return float(device.read_table(outcome[1], stream)[0, column])


def global_norm(grads: Any, ord: float, duplicates: str) -> float | DeviceFloat:
    """Return the norm of all gradients together, as `functional.global_norm`."""
    _, items, _ = inputs.structure(grads)
    law = Law(math.inf, ord=ord)
    name = _name_of(items, law, "propagate", write=False)
    norm = _again(name, law, "propagate", write=False)
    if norm is not None:
        return norm
    described: Any = gradients(grads)
    return clip(described.entries, None, law, duplicates=duplicates, name=name)


def clip_by_global_norm(
    grads: Any,
    bound: float,
    given: float | None,
    *,
    ord: float,
    nonfinite: str,
    duplicates: str,
    out: Any,
) -> tuple[Any, float | DeviceFloat]:
    """Scale all gradients by one factor, as `functional.clip_by_global_norm`."""
    keys, items, rebuild = inputs.structure(grads)
    law = Law(bound, given=ABSENT if given is None else given, ord=ord)
    in_place = out is grads or _are_same(keys, items, out)
    name = _name_of(items, law, nonfinite, write=True) if in_place else None
    norm: float | DeviceFloat | None = _again(name, law, nonfinite, write=True)
    if norm is not None:
        return rebuild(items), norm
    described: Any = gradients(grads)
    device.require()
    targets = outputs.targets(described, grads, out)
    norm = clip(described.entries, targets, law, nonfinite, duplicates, name)
    return described.with_results([target.result for target in targets]), norm


def _are_same(keys: list[inputs.Key], items: list[Any], out: Any) -> bool:
    """Tell whether results go to the gradients themselves, in another list of them."""
    if not isinstance(out, (list, tuple, dict)):
        return False
    others, targets, _ = inputs.structure(out, "out")
    return others == keys and all(map(operator.is_, targets, items))


def clip_whole(
    grad: Any, bound: float, out: Any, divisor: Callable[[int], float], ord: float
) -> Any:
    """Clip one gradient by its norm over a divisor, which follows from how many elements it has."""
    entry = describe("grad", 0, grad)
    target = outputs.place(entry, out)
    clip([entry], [target], Law(bound, divisor(max(entry.dense_size, 1)), ord=ord))
    return target.result


def clip_by_value(grad: Any, low: Any, high: Any, out: Any) -> Any:
    """Hold each element between two bounds, as `functional.clip_by_value`.

    Arrays are rounded and checked on the host, which waits for those on the GPU.
    """
    entry = describe("grad", 0, grad)
    if entry.dtype.components == 2:
        raise TypeError(f"grad: expected real numbers to hold between bounds, got {entry.native}")
    low, high = on_host("clip_value_min", low), on_host("clip_value_max", high)
    low, high = inputs.value_bounds(low, high, entry.dense_shape)
    if entry.slices is not None:
        inputs.refuse_excluding_zero(low, high)
    target = outputs.place(entry, out)
    stream = stream_of([entry, target])
    if entry.repeated:

        def clamp_sums(sums: DeviceEntry) -> bool:
            _clamp(sums, sums, low, high, stream)
            return True

        found = with_rows_summed(entry, target, out, stream, clamp_sums)
    else:
        _clamp(entry, target, low, high, stream)
        found = target.result
    give_back(stream, [entry, target])
    return found


def _clamp(entry: DeviceEntry, target: DeviceEntry, low: Any, high: Any, stream: Any) -> None:
    """Write each element held between two numbers, or arrays of the host."""
    if np.ndim(low) or np.ndim(high):
        span = Strided(entry.dtype, entry.shape, entry.memory, target.memory)
        least, most = _sent(low, entry, stream), _sent(high, entry, stream)
        clamp_between(span, least[0], most[0], stream)
        return
    plan, free = _plan([entry], [target], "propagate", "raw", stream)  # nothing is skipped
    outcome = free.pop() if free else plan.outcomes(1, stream)[0]
    plan.clamp(outcome, low, high, stream, range(1))
    free.append(outcome)


def with_rows_summed(
    entry: DeviceEntry,
    target: DeviceEntry,
    out: Any,
    stream: Any,
    operate: Callable[[DeviceEntry], bool],
) -> Any:
    """Run an operation that is not linear on the sums of rows, in place.

    `operate` tells whether it changed anything. Returns new slices, or the target with the sums in
    the first row of each; a copy of the slices as they are where nothing changed.
    """
    slices: Any = entry.slices
    merged = slices.coalesced_on(stream)
    if not operate(describe(entry.name, entry.key, merged)):
        if target.address != entry.address:
            device.copy(target.address, entry.address, entry.nbytes, stream)
        return target.result
    if out is None:
        return merged
    order, starts = slices.grouping
    firsts = order[starts[:-1]]
    merged.sum_into(target, firsts[np.argsort(slices.indices[firsts])], stream)
    return target.result


def _sent(bound: Any, entry: DeviceEntry, stream: Any) -> tuple[Memory, Any]:
    """Return where a bound is after it is sent, broadcast to a gradient, and what holds it."""
    with np.errstate(over="ignore", under="ignore"):  # a bound out of range is infinite or 0
        values = foreign.to_numpy("bound", bound).astype(entry.native)
    if entry.slices is not None:
        values = np.broadcast_to(values, entry.dense_shape)[entry.slices.indices]
    values = np.ascontiguousarray(values)
    made = empty(values.shape, values.dtype)
    device.write(made.address, values.reshape(-1).view(np.uint8), stream)
    return Memory(made.address, np.broadcast_to(values, entry.shape).strides), made

"""Clipping of gradients by one norm and one factor, and of elements between two bounds."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from numclip import engine as engines
from numclip import libraries, tables
from numclip.border.arguments import refuse_excluding_zero
from numclip.border.gradients import Gradient, describe, gradients
from numclip.border.results import targets_of
from numclip.border.structures import Structure, structure
from numclip.clipping.each import clip_each
from numclip.clipping.nonfinite import first_error
from numclip.engine import Engine, Outcome, Plan
from numclip.errors import expected
from numclip.formulas import is_product
from numclip.host.kernels import powers
from numclip.isolation import isolated
from numclip.law import ABSENT, Law, Pool, loss_of_rows
from numclip.memory import AnySpan, Memory, RowSpan, Strided
from numclip.sums import Whole, norm


def span_of(
    gradient: Gradient, target: Gradient, policy: str, ord: float, duplicates: str = "raw"
) -> AnySpan:
    """Return the span of a gradient and its target; a `RowSpan` if repeated rows are summed."""
    if duplicates == "sum" and gradient.repeated:
        return row_span(gradient, target)
    parts = gradient.dtype.components == 2 and (ord != 2.0 or policy == "zero")
    found: AnySpan = gradient.engine.span(gradient.dtype, gradient.facts, target.facts, parts=parts)
    return found


def row_span(gradient: Gradient, target: Gradient) -> RowSpan:
    """Return the `RowSpan` of a sparse gradient and its target; plans measure the rows' sums."""
    own, to = gradient.facts, target.facts
    found = gradient.engine.span(gradient.dtype, own, to, parts=False)
    contiguous = own.c_order and to.c_order and not isinstance(found, Strided)
    strided = None if contiguous else Strided(gradient.dtype, own.shape, own.memory, to.memory)
    extent = own.address, to.address, gradient.size, gradient.row_length
    return RowSpan(gradient.dtype, *extent, strided)


def repeated_loss(entries: Sequence[Gradient], ord: float) -> float:
    """Return the norm of what rounding subnormal terms can add to the sums of repeated rows."""
    return sum([_loss_of(entry, ord) for entry in entries if entry.repeated])


def _loss_of(entry: Gradient, ord: float) -> float:
    assert entry.slices is not None
    length = math.prod(entry.dense_shape[1:])
    return loss_of_rows(entry.slices.grouping.starts, length, entry.dtype, ord)


def norm_of_sum(total: float, exponent: int, ord: float) -> float:
    """Return the norm of a sum of powers ``total * 4**exponent``, with the bits kernels give."""
    if ord == math.inf or is_product(ord):
        return norm(total, exponent, ord)
    return powers.norm_of_sum(total, exponent, ord)  # type: ignore[no-any-return]


def _norm_of_whole(whole: Whole, ord: float) -> float:
    row = whole.row
    return norm_of_sum(float(row[tables.TOTAL]), int(row[tables.EXPONENT]), ord)


@isolated
def norm_of(found: Structure, ord: float, duplicates: str) -> Any:
    """Return the norm of all gradients together."""
    engine = _engine_of(found)
    law = Law(math.inf, ord=ord)
    key = engine.key_of(found.items, ord, "propagate", written=False)
    norm = _clip_again(engine, key, law, "propagate", write=False)
    if norm is not None:
        return norm
    described = gradients(found)
    return clip(described.entries, None, law, duplicates=duplicates, key=key)


@isolated
def clip_together(
    found: Structure, law: Law, policy: str, duplicates: str, out: Any, whole: Whole | None = None
) -> tuple[Any, Any]:
    """Scale all gradients by one factor; return the results in their structure, and the norm."""
    engine = _engine_of(found)
    key = None
    if whole is None and (out is found.source or _are_same(found, out)):
        key = engine.key_of(found.items, law.ord, policy, written=True)
    norm = _clip_again(engine, key, law, policy, write=True)
    if norm is not None:
        libraries.note_writing(found.items)
        return found.rebuild(found.items), norm
    described = gradients(found)
    targets = targets_of(described, out)
    norm = clip(described.entries, targets, law, policy, duplicates, key, whole)
    if out is not None:
        libraries.note_writing(target.source for target in targets)
    return described.with_results([target.source for target in targets]), norm


@isolated
def clip_whole(
    grad: Any, bound: float, out: Any, divisor: Callable[[int], float], ord: float
) -> Any:
    """Clip each gradient by its norm over ``divisor(its number of elements)``."""

    def write(entry: Gradient, target: Gradient, law: Law, _: bool) -> Any:
        clip([entry], [target], law)
        return target.source

    def law_of(entry: Gradient) -> Law:
        return Law(bound, divisor(max(entry.dense_size, 1)), ord=ord)

    return clip_each(grad, out, law_of, write)


def clip(
    entries: Sequence[Gradient],
    targets: Sequence[Gradient] | None,
    law: Law,
    policy: str = "propagate",
    duplicates: str = "sum",
    key: Any = None,
    whole: Whole | None = None,
) -> Any:
    """Scale gradients by one factor where their norm exceeds a bound; return the norm.

    Without targets they are only measured. The plan is kept under `key` unless that is None. If
    `whole` is given, the norm is that of the whole, of which the gradients are a part.
    """
    if not entries:
        if whole is not None:
            return _norm_of_whole(whole, law.ord)
        return 0.0 if law.given == ABSENT else law.given
    engine = entries[0].engine
    engine.require()
    used = entries if targets is None else [*entries, *targets]
    stream = engine.stream_of([gradient.facts for gradient in used])
    summed = duplicates == "sum" and any(entry.repeated for entry in entries)
    if summed:
        law = law._replace(loss=repeated_loss(entries, law.ord))
    if whole is not None:
        if whole.size == 0 and any(entry.size for entry in entries):
            wanted = "an accumulator that the gradients were added to"
            raise ValueError(expected("use_norm", wanted, "one that nothing was added to"))
        law = law._replace(loss=whole.loss, size=whole.size)
    written = entries if targets is None else targets
    plan, free, rows = plan_of(entries, written, law, policy, duplicates, stream)
    measures = law.given == ABSENT or policy != "propagate" or summed
    if whole is not None:
        measures = policy != "propagate"
    with plan.lock:
        if rows:
            take_rows(plan, entries, rows, stream)
        outcome = decide(plan, free, law, stream, measures=measures)
        if whole is not None:
            row = whole.row.copy()
            if measures:
                row[tables.BAD] += engine.read(outcome[0], stream)[:, tables.BAD].sum()
            plan.decide_by(row[None], outcome, stream)
        if policy == "raise" and engine.read(outcome[1], stream)[0, tables.BROKEN]:
            free.append(outcome)
            given = None if law.given == ABSENT else law.given
            if whole is not None:
                given = _norm_of_whole(whole, law.ord)
            raise first_error(entries, given, stream)
        if targets is not None:
            plan.scale(outcome, stream)
    engine.give_back(stream, [gradient.facts for gradient in used])
    engine.keep_plan(key, plan, free)
    return _norm(engine, free, outcome, stream)


def plan_of(
    entries: Sequence[Gradient],
    targets: Sequence[Gradient],
    law: Law,
    policy: str,
    duplicates: str,
    stream: Any,
    *,
    apart: bool = False,
) -> tuple[Plan, list[Outcome], list[RowSpan]]:
    """Return (plan, free outcomes, row spans) for one norm of all gradients.

    With `apart`, the plan is for one norm of each gradient.
    """
    engine = entries[0].engine
    pairs = zip(entries, targets, strict=True)
    spans = [span_of(entry, target, policy, law.ord, duplicates) for entry, target in pairs]
    ends = range(1, len(spans) + 1) if apart else [len(spans)]
    pools = [Pool(end - 1 if apart else 0, end, 0, policy) for end in ends]
    plan, free = engine.kept_plan(spans, pools, stream)
    return plan, free, [span for span in spans if isinstance(span, RowSpan)]


def take_rows(
    plan: Plan, entries: Sequence[Gradient], rows: Sequence[RowSpan], stream: Any
) -> None:
    """Pass a plan the row spans and groupings of the gradients with repeated rows."""
    repeated = [entry.slices for entry in entries if entry.repeated]
    groupings = [slices.grouping for slices in repeated if slices is not None]
    plan.take_rows(rows, groupings, stream)


def _engine_of(found: Structure) -> Engine:
    """Return the engine of the first gradient."""
    return engines.of(next((item for item in found.items if item is not None), None))


def _clip_again(engine: Engine, key: Any, law: Law, policy: str, *, write: bool) -> Any:
    """Do as `clip` by the plan kept under `key`; return None and do nothing if there is none."""
    known = engine.find_plan(key)
    if known is None:
        return None
    plan, free, stream = known
    measures = law.given == ABSENT or policy != "propagate"
    with plan.lock:
        outcome = decide(plan, free, law, stream, measures=measures)
        if write:
            plan.scale(outcome, stream)
    return _norm(engine, free, outcome, stream)


def _are_same(found: Structure, out: Any) -> bool:
    """Tell whether `out` is another structure of the gradients themselves."""
    if not isinstance(out, (list, tuple, dict)):
        return False
    other = structure(out, "out")
    return other.keys == found.keys and all(map(operator.is_, other.items, found.items))


def decide(plan: Plan, free: list[Outcome], law: Law, stream: Any, *, measures: bool) -> Outcome:
    """Decide by a law, after measuring if `measures`; return the outcome."""
    outcome = free.pop() if free else plan.outcome(stream)
    plan.write_laws(law, stream)
    if measures:
        plan.measure(law.ord, stream)
    plan.decide(outcome, stream)
    return outcome


def _norm(engine: Engine, free: list[Outcome], outcome: Outcome, stream: Any) -> Any:
    """Return the norm of a decision; the outcome is freed once nothing can read it."""
    return engine.number(outcome[1], tables.NORM, stream, lambda: free.append(outcome))


@isolated
def clip_by_value(grad: Any, bounds: Callable[[tuple[int, ...]], Any], out: Any) -> Any:
    """Clamp each element between two bounds, which `bounds` checks and returns for a shape."""

    def check(entry: Gradient) -> tuple[Any, Any]:
        if entry.dtype.components == 2:
            wanted = "real numbers to hold between bounds"
            raise TypeError(expected(entry.name, wanted, entry.native))
        low, high = bounds(entry.dense_shape)
        if entry.slices is not None:
            refuse_excluding_zero(low, high)
        return low, high

    return clip_each(grad, out, check, _hold)


def _hold(entry: Gradient, target: Gradient, bounds: tuple[Any, Any], new: bool) -> Any:
    """Clamp each element between two bounds; where rows repeat, clamp their sums."""
    used = [entry.facts, target.facts]
    stream = entry.engine.stream_of(used)

    def clamp_sums(sums: Gradient) -> bool:
        _clamp(sums, sums, *bounds, stream)
        return True

    if entry.repeated:
        result = with_rows_summed(entry, target, clamp_sums, stream, new=new)
    else:
        _clamp(entry, target, *bounds, stream)
        result = target.source
    entry.engine.give_back(stream, used)
    return result


def _clamp(entry: Gradient, target: Gradient, low: Any, high: Any, stream: Any) -> None:
    """Write each element clamped between two numbers, or two arrays of the host."""
    engine = entry.engine
    if np.ndim(low) or np.ndim(high):
        array = Strided(entry.dtype, entry.shape, entry.facts.memory, target.facts.memory)
        least, most = _sent(low, entry, stream), _sent(high, entry, stream)
        engine.clamp_between(array, least[0], most[0], stream)
        return
    plan, free, _ = plan_of([entry], [target], Law(math.inf), "propagate", "raw", stream)
    with plan.lock:
        outcome = free.pop() if free else plan.outcome(stream)
        plan.clamp(outcome, low, high, stream, range(1))
        free.append(outcome)


def _sent(bound: Any, entry: Gradient, stream: Any) -> tuple[Memory, Any]:
    """Return (memory, array): a bound on the engine, broadcast to a gradient, and its array."""
    with np.errstate(over="ignore", under="ignore"):  # a bound out of range is infinite or 0
        values = libraries.to_numpy("bound", bound).astype(entry.native)
    if entry.slices is not None:
        values = np.broadcast_to(values, entry.dense_shape)[entry.slices.indices]
    values = np.ascontiguousarray(values)
    made = entry.engine.sent(values, stream)
    address = entry.engine.facts("bound", made).address
    return Memory(address, np.broadcast_to(values, entry.shape).strides), made


def with_rows_summed(
    entry: Gradient,
    target: Gradient,
    operate: Callable[[Gradient], bool],
    stream: Any,
    *,
    new: bool,
) -> Any:
    """Run a nonlinear operation in place on the sums of repeated rows; return the result.

    `operate` returns whether it changed anything. If not, the target gets the rows as they are.
    Else the result is the summed slices if `new`, or the target with each sum in the first row
    of its index and 0 in the others.
    """
    slices: Any = entry.slices
    engine = entry.engine
    merged = slices.coalesced_on(stream)
    described = describe(entry.name, entry.key, merged, engine)
    if not operate(described):
        if not entry.lies_as(target):
            engine.copy(target.facts, entry.facts, stream)
        return target.source
    if new:
        return merged
    order, starts = slices.grouping
    firsts = order[starts[:-1]]
    first_rows = firsts[np.argsort(slices.indices[firsts])]
    engine.sum_rows(described.facts, target.facts, merged.grouping, first_rows, stream)
    return target.source

"""The sums of gradients that are a piece of what one norm is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from numclip.border.gradients import Gradient, gradients
from numclip.border.structures import structure
from numclip.clipping.clip import repeated_loss, span_of
from numclip.clipping.mixed import values_of
from numclip.dtypes import Array
from numclip.host import plain_rows
from numclip.isolation import isolated
from numclip.law import Law, Pool
from numclip.memory import RowSpan


class Piece(NamedTuple):
    """Rows of sums, one for each tensor; `size` and `loss` are as in `numclip.sums.Whole`."""

    sums: Array
    size: int
    loss: float


@isolated
def piece(grads: Any, ord: float, duplicates: str) -> Piece | None:
    """Return the sums of gradients, for which a GPU is waited; None where there are none."""
    found = structure(grads)
    values = values_of(found.items, duplicates) if ord == 2.0 else None
    sums = None if values is None else plain_rows.sums_of(*values)
    if sums is not None:
        return Piece(*sums)
    entries = gradients(found).entries
    return piece_of(entries, ord, duplicates) if entries else None


def piece_of(
    entries: Sequence[Gradient], ord: float, duplicates: str, policy: str = "propagate"
) -> Piece:
    """Return the sums of described gradients likewise."""
    summed = [entry for entry in entries if entry.repeated and duplicates == "sum"]
    sums = _measured(entries, summed, ord, duplicates, policy)
    size = sum(entry.size for entry in entries)
    return Piece(sums, size, repeated_loss(summed, ord))


def _measured(
    entries: Sequence[Gradient],
    summed: Sequence[Gradient],
    ord: float,
    duplicates: str,
    policy: str,
) -> Array:
    """Return the rows of sums of some gradients, of which those of some are summed first."""
    engine = entries[0].engine
    engine.require()
    used = [entry.facts for entry in entries]
    stream = engine.stream_of(used)
    spans = [span_of(entry, entry, policy, ord, duplicates) for entry in entries]
    if ord == 2.0:
        pools = [Pool(0, len(spans), 0, policy)]
    else:
        pools = [Pool(t, t + 1, 0, policy) for t in range(len(spans))]
    plan, free = engine.kept_plan(spans, pools, stream)
    rows = [span for span in spans if isinstance(span, RowSpan)]
    with plan.lock:
        if rows:
            slices: list[Any] = [entry.slices for entry in summed]
            plan.take_rows(rows, [own.grouping for own in slices], stream)
        outcome = free.pop() if free else plan.outcomes(1, stream)[0]
        plan.write_laws(Law(float("inf"), ord=ord), stream)
        plan.measure(ord, stream)
        plan.decide(outcome, stream)
    sums = engine.read(outcome[0], stream).copy()
    engine.give_back(stream, used)
    free.append(outcome)
    return sums

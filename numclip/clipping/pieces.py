"""The sums of gradients that are one piece of the gradients that a norm is of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from numclip.border.gradients import Gradient, gradients
from numclip.border.structures import structure
from numclip.clipping.clip import decide, plan_of, repeated_loss, take_rows
from numclip.clipping.mixed import values_of
from numclip.dtypes import Array
from numclip.host import plain_rows
from numclip.isolation import isolated
from numclip.law import Law


class Piece(NamedTuple):
    """Rows of sums, one for each tensor; `size` and `loss` are as in `numclip.sums.Whole`."""

    sums: Array
    size: int
    loss: float


@isolated
def piece(grads: Any, ord: float, duplicates: str) -> Piece | None:
    """Return the sums of gradients, after waiting for a GPU; None if there are no gradients."""
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
    """Return the sums of described gradients, after waiting for a GPU."""
    engine = entries[0].engine
    engine.require()
    used = [entry.facts for entry in entries]
    stream = engine.stream_of(used)
    law = Law(math.inf, ord=ord)
    arguments = law, policy, duplicates, stream
    plan, free, rows = plan_of(entries, entries, *arguments, apart=ord != 2.0)
    with plan.lock:
        if rows:
            take_rows(plan, entries, rows, stream)
        outcome = decide(plan, free, law, stream, measures=True)
    sums = engine.read(outcome[0], stream).copy()
    engine.give_back(stream, used)
    free.append(outcome)
    loss = repeated_loss(entries, ord) if duplicates == "sum" else 0.0
    return Piece(sums, sum(entry.size for entry in entries), loss)

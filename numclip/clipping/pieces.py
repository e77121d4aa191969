"""The sums of gradients that are a piece of what one norm is of."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import tables
from numclip.border.gradients import Gradient, gradients
from numclip.border.structures import structure
from numclip.clipping.clip import repeated_loss, span_of
from numclip.dtypes import Array
from numclip.isolation import isolated
from numclip.law import Law, Pool
from numclip.memory import RowSpan
from numclip.slices import IndexedSlices


class Piece(NamedTuple):
    """Rows of sums, and of orders but 2 the norms, one for each tensor.

    Norms are told as ``root * 2**exponent``; those of terms, for rows that repeat, are of the sums
    of magnitudes. `size` and `loss` are as in `numclip.sums.Whole`.
    """

    sums: Array
    norms: Array
    terms: Array
    size: int
    loss: float


@isolated
def piece(grads: Any, ord: float, duplicates: str) -> Piece | None:
    """Return the sums of gradients, for which a GPU is waited; None where there are none."""
    entries = gradients(structure(grads)).entries
    return piece_of(entries, ord, duplicates) if entries else None


def piece_of(
    entries: Sequence[Gradient], ord: float, duplicates: str, policy: str = "propagate"
) -> Piece:
    """Return the sums of described gradients likewise."""
    repeated = [k for k, own in enumerate(entries) if own.repeated and duplicates == "sum"]
    sums, norms = _measured(entries, ord, duplicates, policy)
    terms = norms.copy()
    for k in repeated if ord != 2.0 else ():
        _, terms[k] = _measured(_magnitudes(entries[k]), ord, duplicates, policy)
        terms[k, 1] += 1.0
    size = sum(entry.size for entry in entries)
    return Piece(sums, norms, terms, size, repeated_loss([entries[k] for k in repeated], ord))


def _magnitudes(entry: Gradient) -> Sequence[Gradient]:
    """Return the description of slices of half the magnitudes, which do not overflow."""
    assert entry.slices is not None
    values = entry.engine.on_host(entry.facts, entry.engine.stream_of([entry.facts]))
    halves = np.abs(values.astype(entry.dtype.wide.native) * 0.5)
    own = entry.slices
    slices = IndexedSlices(halves, own.indices, own.dense_shape)
    return gradients(structure([slices])).entries


def _measured(
    entries: Sequence[Gradient], ord: float, duplicates: str, policy: str
) -> tuple[Array, Array]:
    """Return the rows of sums of some gradients, and their norms if the order is not 2."""
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
    summed = [entry for entry in entries if entry.repeated and duplicates == "sum"]
    with plan.lock:
        if rows:
            slices: list[Any] = [entry.slices for entry in summed]
            plan.take_rows(rows, [own.grouping for own in slices], stream)
        outcome = free.pop() if free else plan.outcomes(1, stream)[0]
        plan.write_laws(Law(float("inf"), ord=ord), stream)
        plan.measure(ord, stream)
        plan.decide(outcome, stream)
    sums, decisions = (engine.read(table, stream).copy() for table in outcome)
    engine.give_back(stream, used)
    free.append(outcome)
    return sums, decisions[:-1, [tables.ROOT, tables.ROOT_EXPONENT]]

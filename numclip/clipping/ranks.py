"""One norm for the ranks of a communicator, and one decision.

Every rank measures what it has, and tells the others a row of sums for each group (for each tensor
of a sharded group that is clipped tensor by tensor). Each adds all rows up in the order of the
ranks, so that all have the same bits, and decides by these as it does by its own.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from numclip import libraries, tables
from numclip.accumulator import NormAccumulator
from numclip.border.communicator import Communicator, Facts
from numclip.border.gradients import Gradient, gradients
from numclip.border.results import targets_of
from numclip.border.structures import structure
from numclip.clipping.clip import clip
from numclip.clipping.nonfinite import first_error
from numclip.clipping.pieces import piece_of
from numclip.dtypes import Array, lookup
from numclip.errors import NonFiniteGradientError, RankError
from numclip.isolation import isolated
from numclip.kernels import pools as kernels
from numclip.kernels.formulas import BIN_EXPONENT
from numclip.law import Law
from numclip.sums import Whole, exact, joined_norms, rounded

COLUMNS = tables.SUM_COLUMNS
LOSS = COLUMNS  # of a row that is told; after it the norm, where its order is not 2
WIDTH = COLUMNS + 1
ALIKE = 2.0**-46
"""How far the sums of replicas may differ: processors of other types add in another order."""


class Part:
    """What the groups of one clipper tell other ranks: rows, each of some tensors.

    Attributes
    ----------
    count : int
        How many rows there are.
    width : int
        How many numbers each has.
    """

    def __init__(self, clipper: Any) -> None:
        self.clipper = clipper
        self.rows: dict[str, range] = {}
        spans: list[tuple[int, int]] = []
        sharded: list[bool] = []
        for group in clipper.groups:
            own, first = clipper.tensors[group.name], len(spans)
            each = group.sharded and _scope(clipper, group) == "tensor"
            spans += [(t, t + 1) for t in own] if each else [(own.start, own.stop)]
            sharded += [group.sharded] * (len(spans) - first)
            self.rows[group.name] = range(first, len(spans))
        self._spans = np.array(spans, np.int64)
        self._copies = [k for k, own in enumerate(sharded) if not own]
        self.count = len(spans)
        self.width = WIDTH if clipper.ord == 2.0 else WIDTH + 2
        self._pools = np.array(list(self._pool_spans()), np.int64)
        self._told: list[int] = []
        clipper.told_rows = {}
        for group in clipper.groups:
            first, own, tensors = (
                len(self._told),
                self.rows[group.name],
                clipper.tensors[group.name],
            )
            of_rows = group.sharded or _scope(clipper, group) == "group"
            self._told += own if of_rows else [self.count + t for t in tensors]
            clipper.told_rows[group.name] = range(first, len(self._told))
        most = max(*self._told, *self._pools[:, 0].tolist())
        self._takes_tensors = most >= self.count

    def _pool_spans(self) -> Iterator[tuple[int, int]]:
        """Yield of which rows each pool is: of those that are told, or after them of tensors."""
        found: dict[int, tuple[int, int]] = {}
        for group in self.clipper.groups:
            pools, rows = self.clipper.pools[group.name], self.rows[group.name]
            if _scope(self.clipper, group) == "group":
                first, _ = found.get(pools.start, (rows.start, 0))
                found[pools.start] = first, rows.stop
            else:
                own = rows if len(rows) == len(pools) and group.sharded else None
                tensors = self.clipper.tensors[group.name]
                firsts = own or range(self.count + tensors.start, self.count + tensors.stop)
                found |= {p: (k, k + 1) for p, k in zip(pools, firsts, strict=True)}
        for p in range(len(found)):
            yield found[p]

    def local(self, stream: Any) -> Array:
        """Return the rows of this rank."""
        clipper = self.clipper
        sums = clipper.engine.read(clipper.found[0], stream)
        rows = np.zeros((self.count, self.width))
        rows[:, :COLUMNS] = _added(self._spans, sums)
        losses = clipper.losses_of_tensors
        if losses is not None:
            rows[:, LOSS] = [losses[first:last].sum() for first, last in self._spans.tolist()]
        if clipper.ord != 2.0:
            clipper.take_powers(stream)
            rows[:, WIDTH:] = self._norms(stream)
        return rows

    def _norms(self, stream: Any) -> list[tuple[float, int]]:
        """Return the norm of each row's tensors, of the clipper's order; see `joined_norms`."""
        clipper, found = self.clipper, []
        powers, decisions = (clipper.engine.read(table, stream) for table in clipper.powers)
        pool_of = clipper.pool_of
        for first, last in self._spans.tolist():
            parts = []
            for p in np.unique(pool_of[first:last]).tolist():
                own = np.flatnonzero(pool_of == p)
                norm = decisions[p, [tables.ROOT, tables.ROOT_EXPONENT]].tolist()
                inside = own[(own >= first) & (own < last)]
                share = _share(powers[own, tables.TOTAL], powers[inside, tables.TOTAL], clipper.ord)
                scale = clipper.unscale * clipper.divisors[p]
                parts.append((norm[0] * scale * share, int(norm[1])))
            found.append(joined_norms(parts, clipper.ord))
        return found

    def take(self, every: Array, stream: Any) -> None:
        """Decide by the rows of all ranks, (ranks, rows, numbers)."""
        merged = self._merged(every)
        clipper = self.clipper
        source = merged[:, :COLUMNS]
        if self._takes_tensors:
            source = np.concatenate([source, clipper.engine.read(clipper.found[0], stream)])
        given = _added(self._pools, source)
        _normalise(given)
        if clipper.ord != 2.0:
            norms = list(self._given_norms(merged, stream))
            for columns in NORM_COLUMNS:
                given[:, columns] = norms
        told, losses = source[self._told], np.zeros(len(given))
        bad = every[:, :, tables.BAD].any()
        for group in clipper.groups if bad or clipper.losses_of_tensors is not None else ():
            rows, pools = self.rows[group.name], clipper.pools[group.name]
            own = merged[rows.start : rows.stop]
            if clipper.losses_of_tensors is not None:
                losses[pools.start : pools.stop] += self._losses(group, own)
            if bad:
                given[pools.start, tables.BAD] += own[:, tables.BAD].sum()
                self._dispute(group, every[:, rows.start : rows.stop], own, given, told)
        clipper.decide_given(given, told, losses, stream)

    def _dispute(self, group: Any, every: Array, merged: Array, given: Array, told: Array) -> None:
        """Let copies that are not finite on some ranks alone be so on all."""
        if group.sharded or _scope(self.clipper, group) == "group":
            return
        pools, tellers = self.clipper.pools[group.name], self.clipper.told_rows[group.name]
        told[tellers.start, tables.BAD] += merged[0, tables.BAD]
        counts, totals = every[:, :, tables.BAD], every[:, :, tables.TOTAL]
        if (counts != counts[0]).any() and not np.isfinite(totals).all():
            given[pools.start : pools.stop, tables.TOTAL] = merged[0, tables.TOTAL]
            told[tellers.start : tellers.stop, tables.TOTAL] = merged[0, tables.TOTAL]

    def _losses(self, group: Any, merged: Array) -> Any:
        """Return what rounding subnormal terms can add to the sums of a group's pools."""
        if group.sharded or _scope(self.clipper, group) == "group":
            return merged[:, LOSS] if _scope(self.clipper, group) else 0.0
        tensors = self.clipper.tensors[group.name]
        return self.clipper.losses_of_tensors[tensors.start : tensors.stop]

    def _merged(self, every: Array) -> Array:
        """Return the rows of all ranks as one: of shards the sums, of replicas the first."""
        ranks, count = every.shape[:2]
        spans = np.arange(count)[:, None] * ranks + np.array([0, ranks])
        flat = every.transpose(1, 0, 2)[:, :, :COLUMNS].reshape(-1, COLUMNS)
        merged = np.empty((count, self.width))
        merged[:, :COLUMNS] = _added(spans, flat)
        merged[:, LOSS] = every[:, :, LOSS].sum(axis=0)
        if self.width > WIDTH:
            for k in range(count):
                parts = [(m, int(e)) for m, e in every[:, k, WIDTH:].tolist()]
                merged[k, WIDTH:] = joined_norms(parts, self.clipper.ord)
        for k in self._copies:
            worst = int((every[:, k, tables.BAD] > 0.0).argmax())
            merged[k] = every[worst, k]
            if math.isfinite(merged[k, tables.TOTAL]):
                self._refuse_differing(k, every[:, k])
        return merged

    def _refuse_differing(self, k: int, rows: Array) -> None:
        """Refuse replicas whose sums differ by more than rounding."""
        totals, exponents = rows[:, tables.TOTAL], rows[:, tables.EXPONENT]
        differs = abs(totals - totals[0]) > ALIKE * abs(totals[0])
        differs |= (exponents != exponents[0]) & (totals != 0.0)
        if differs.any():
            name = next(name for name, own in self.rows.items() if k in own)
            rank = int(differs.argmax())
            one, two = (math.sqrt(total) for total in totals[[0, rank]].tolist())
            raise RankError(
                f"group {name!r}: the gradients differ, of norm {one!r} on rank 0 and {two!r} on "
                f"rank {rank}, but the group is not sharded; nothing was modified on any rank"
            )

    def _given_norms(self, merged: Array, stream: Any) -> Iterator[tuple[float, int]]:
        """Yield the norm of each pool, of the clipper's order."""
        clipper = self.clipper
        decisions = clipper.engine.read(clipper.found[1], stream)
        for p, (first, last) in enumerate(self._pools.tolist()):
            scale = clipper.unscale * clipper.divisors[p]
            if first >= self.count:  # a tensor of this rank's own
                root, power = decisions[p, [tables.ROOT, tables.ROOT_EXPONENT]].tolist()
                yield root * scale, int(power)
            else:
                parts = [(m, int(e)) for m, e in merged[first:last, WIDTH:].tolist()]
                yield joined_norms(parts, clipper.ord)


def _added(spans: Array, rows: Array) -> Array:
    """Return the sum of each span of rows of sums, rounded once."""
    add: Any = kernels.add_pools
    out = np.zeros((len(spans), COLUMNS))
    add(spans, np.ascontiguousarray(rows), out)
    return out


def _scope(clipper: Any, group: Any) -> str | None:
    rule = clipper.rules[group.name]
    return None if rule is None else str(rule.scope)


def _share(every: Array, inside: Array, ord: float) -> float:
    """Return the norm of some of a pool's tensors over that of all, from sums over one peak."""
    if ord == math.inf:
        return float(inside.max(initial=0.0))
    total = math.fsum(every.tolist())
    if not math.isfinite(total) or inside.size == every.size:
        return 1.0
    return math.pow(math.fsum(inside.tolist()) / total, 1.0 / ord) if total > 0.0 else 0.0


def _normalise(rows: Array) -> None:
    """Bring rows of sums to the exponents that both engines know."""
    if not rows[:, tables.EXPONENT :: tables.TERMS_EXPONENT - tables.EXPONENT].any():
        return
    for total, exponent in ((tables.TOTAL, tables.EXPONENT), (tables.TERMS, tables.TERMS_EXPONENT)):
        size = abs(rows[:, exponent])
        odd = (size != 0.0) & (size != BIN_EXPONENT)
        for k in np.flatnonzero(odd & np.isfinite(rows[:, total])).tolist():
            parts = [rows[k, total]] + ([rows[k, tables.ERROR]] if total == tables.TOTAL else [])
            found = rounded(exact(parts, int(rows[k, exponent])))
            rows[k, total], error, rows[k, exponent] = found
            if total == tables.TOTAL:
                rows[k, tables.ERROR] = error


class Ranks:
    """The ranks that clip some groups together, and what they have agreed on."""

    def __init__(self, found: Communicator) -> None:
        self.communicator = found
        self._steps: Any = None
        self._parts: list[Part] = []

    def forget(self) -> None:
        """Agree again before the next step: a rule has another state."""
        self._steps = None

    def decide(
        self, steps: Any, measure: Callable[[], None], facts: Callable[[], Facts], stream: Any
    ) -> None:
        """Measure here, and decide by what all ranks have measured.

        Raises
        ------
        RankError
            On all ranks, where they differ or another one raised.
        NonFiniteGradientError
            On all ranks, where a group's policy says so.
        """
        if self.communicator.count is None:
            self._agree(steps)
        elif self._steps is not steps:
            self.communicator.ask()
            self._agree(steps)
        measure()
        every = self._exchanged(facts, stream)
        if every is None:  # another rank has asked
            self._agree(steps)
            measure()
            every = self._exchanged(facts, stream)
        assert every is not None
        start = 0
        for part in self._parts:
            stop = start + part.count * part.width
            rows = every[:, start:stop].reshape(len(every), part.count, part.width)
            start = stop
            self._refuse_bad(part, rows, stream)
            part.take(rows, stream)

    def _exchanged(self, facts: Callable[[], Facts], stream: Any) -> Array | None:
        """Return the rows of all ranks, of all parts; None where one asks whether all agree."""
        rows = [part.local(stream).ravel() for part in self._parts]
        return self.communicator.exchange(np.concatenate(rows), facts())

    def _refuse_bad(self, part: Part, rows: Array, stream: Any) -> None:
        """Raise, on all ranks, the error of the first one with a bad gradient that may not be."""
        if not part.clipper.strict:
            return
        for group in part.clipper.groups:
            own = part.rows[group.name]
            bad = rows[:, own.start : own.stop, tables.BAD].any(axis=1)
            if group.nonfinite == "raise" and bad.any():
                raise_of(self.communicator, int(bad.argmax()), group.gradients(), None, stream)

    def _agree(self, steps: Any) -> None:
        """Make sure that all ranks have the same groups; know how much all have of the shards."""
        groups = [group for clipper in steps.clippers for group in clipper.groups]
        self.communicator.agree(_description(steps.engine, groups))
        shards = [group for group in groups if group.sharded]
        sizes = [[math.prod(param.shape) for param in group.params.values()] for group in shards]
        every = self.communicator.everyones(sizes) if shards else []
        totals = {
            group.name: np.array([own[k] for own in every]).sum(axis=0).tolist()
            for k, group in enumerate(shards)
        }
        for clipper in steps.clippers:
            clipper.take_sizes(totals)
        self._parts = [Part(clipper) for clipper in steps.clippers]
        self._steps = steps
        self.communicator.agreed(sum(part.count * part.width for part in self._parts))


def telling(ranks: Ranks | None) -> contextlib.AbstractContextManager[None]:
    """Let other ranks know what is raised, where there are some."""
    return contextlib.nullcontext() if ranks is None else ranks.communicator.telling()


def _description(engine: Any, groups: Sequence[Any]) -> Facts:
    """Say of groups what must be the same on all ranks."""
    found = {"device": engine.name, "groups": ", ".join(group.name for group in groups)}
    for group in groups:
        name = f"group {group.name!r}"
        for fact in ("clip", "nonfinite", "sparse", "sharded", "lr", "master"):
            found[f"{name}, {fact}"] = repr(getattr(group, fact))
        for key, param in group.params.items():
            row: Any = lookup(param.dtype)
            shape = "" if group.sharded else f" of shape {tuple(param.shape)}"
            found[f"{name}, {key}"] = f"{row.name}{shape}"
        if group.rule_state:
            found[f"{name}, state of the rule"] = _state_digest(group.rule_state)
    return found


def _state_digest(state: Mapping[str, Array]) -> str:
    """Return a digest of what a rule remembers."""
    found = hashlib.blake2b(digest_size=8)
    for name, array in state.items():
        found.update(name.encode())
        found.update(np.ascontiguousarray(array).tobytes())
    return found.hexdigest()


def raise_of(
    communicator: Communicator,
    rank: int,
    entries: Sequence[Gradient],
    norm: float | None,
    stream: Any,
) -> None:
    """Raise, on all ranks, the error of the first bad gradient of one."""
    own = None
    if communicator.rank == rank:
        error = first_error(entries, norm, stream)
        own = str(error), error.name, error.index, error.value, error.count
    found = communicator.everyones(own)[rank]
    message, name, index, value, count = found
    raise NonFiniteGradientError(f"rank {rank}: {message}", name, index, value, count, rank)


NORM_COLUMNS = [tables.TOTAL, tables.EXPONENT], [tables.TERMS, tables.TERMS_EXPONENT]
"""Of sums: where norms of other orders than 2 are told, and those of terms."""

SIZE = WIDTH  # of what a function tells: a row, its loss and how many numbers it is of
TOLD = WIDTH + 1


@isolated
def clip_by_global_norm(
    found: Communicator,
    grads: Any,
    checked: Callable[[], Law],
    policy: str,
    duplicates: str,
    out: Any,
) -> tuple[Any, Any]:
    """Scale the gradients of all ranks by one factor; return this rank's, and the norm.

    `checked` checks the arguments and returns the law.
    """
    with found.telling():
        law = checked()
        held = structure(grads)
        described = gradients(held)
        targets = targets_of(described, grads, out)
        entries = described.entries
        own = piece_of(entries, law.ord, duplicates, policy) if entries else None
        whole = NormAccumulator.of(law.ord, own).whole
        facts = {
            "call": "clip_by_global_norm",
            "clip_norm": repr(law.bound),
            "ord": repr(law.ord),
            "nonfinite": repr(policy),
            "duplicates": repr(duplicates),
        }
        every = found.exchange(np.array([*whole.row, whole.loss, float(whole.size)]), facts)
        assert every is not None
        merged = _joined(every, law.ord)
        bad = every[:, tables.BAD] != 0.0
        if policy == "raise" and bad.any():
            stream = described.engine.stream_of([entry.facts for entry in entries])
            raise_of(found, int(bad.argmax()), entries, None, stream)
        norm = clip(entries, targets, law, policy, duplicates, None, merged)
        if out is not None:
            libraries.note_writing(target.source for target in targets)
        return described.with_results([target.source for target in targets]), norm


def _joined(every: Array, ord: float) -> Whole:
    """Return what all ranks have, each a row, its loss and its size."""
    row = _added(np.array([[0, len(every)]]), every[:, :COLUMNS])
    _normalise(row)
    for columns in NORM_COLUMNS if ord != 2.0 else ():
        norms = [(norm, int(power)) for norm, power in every[:, columns].tolist()]
        row[0, columns] = joined_norms(norms, ord)
    return Whole(row[0], int(every[:, SIZE].sum()), float(every[:, LOSS].sum()))

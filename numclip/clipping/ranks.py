"""One norm for the ranks of a communicator, and one decision.

Every rank measures its gradients, and sends the others a row of sums for each group (for each
tensor of a sharded group that is clipped tensor by tensor). Each adds up all rows in the order of
the ranks, so that all have the same bits, and decides by these sums as it does by its own.
"""

from __future__ import annotations

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
from numclip.formulas import BIN_EXPONENT
from numclip.host.kernels.pools import add_pools
from numclip.host.kernels.ranks import LOSS, WIDTH, merge_ranks
from numclip.isolation import isolated
from numclip.law import Law
from numclip.sums import Whole, norm, row_of, total_of

COLUMNS = tables.SUM_COLUMNS
POWERS = [k for k in range(COLUMNS) if k != tables.BAD]
"""The columns of a row of sums that depend on the order of the norm."""

Step = tuple[Facts, int]
"""The facts that must be the same on all ranks, and the number of the step."""


class Part:
    """The rows of sums that one clipper's groups send to other ranks, each of some tensors.

    Attributes
    ----------
    count : int
        The number of rows.
    width : int
        The number of columns.
    own, every : array
        The rows of this rank, (count, width), and of all, (count, ranks, width).
    """

    own: Array
    every: Array
    _powers: Array

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
        self._sharded = np.array(sharded, np.int64)
        self.count = len(spans)
        self.width = WIDTH if clipper.ord == 2.0 else WIDTH + COLUMNS
        self._pools = np.array(list(self._pool_spans()), np.int64)
        numbers: list[int] = []
        clipper.merged_rows = {}
        for group in clipper.groups:
            first, own = len(numbers), self.rows[group.name]
            of_rows = group.sharded or _scope(clipper, group) == "group"
            numbers += own if of_rows else [self.count + t for t in clipper.tensors[group.name]]
            clipper.merged_rows[group.name] = range(first, len(numbers))
        self._reported = np.array(numbers)
        takes_tensors = max(*numbers, *self._pools[:, 0].tolist()) >= self.count
        tensors = sum(map(len, clipper.tensors.values())) if takes_tensors else 0
        self._source = np.zeros((self.count + tensors, self.width))
        self._sums = self._source[:, :COLUMNS]
        self._tensors = self._sums[self.count :]
        self._given = np.zeros((len(self._pools), COLUMNS))

    def _pool_spans(self) -> Iterator[tuple[int, int]]:
        """Yield each pool's rows ``[first, last)``: rows that are sent, or tensors' after them."""
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

    def take_memory(self, own: Array, every: Array) -> None:
        """Use message buffers: this rank's rows are sent from `own`, `every` gets all ranks'."""
        self.own = own.reshape(self.count, self.width)
        self.every = every.reshape(len(every), self.count, self.width).transpose(1, 0, 2)

    def publish(self, stream: Any) -> None:
        """Write the rows that this rank sends."""
        clipper = self.clipper
        sums = clipper.engine.read(clipper.found[0], stream)
        if self._tensors.size:
            self._tensors[:] = sums
        add_pools(self._spans, sums, self.own)
        losses = clipper.losses_of_tensors
        if losses is not None:
            self.own[:, LOSS] = [losses[first:last].sum() for first, last in self._spans.tolist()]
        if clipper.ord != 2.0:
            clipper.take_powers(stream)
            self._powers = clipper.engine.read(clipper.powers[0], stream)
            for k, (first, last) in enumerate(self._spans.tolist()):
                self.own[k, WIDTH:] = row_of(self._powers[first:last], clipper.ord)

    def at_once(self, heads: Array) -> Any:
        """Return a `RanksAtOnce` of these rows, or None, see `numclip.host.at_once`."""
        tables = self._spans, self.own, self._sharded, self._pools, self._source, self._given
        return self.clipper.ranks_at_once(tables, (heads, self.every))

    def take_decided(self) -> None:
        """Pass the clipper the sums by which a native call has decided, for reports."""
        self.clipper.given, self.clipper.merged = self._given, self._sums.take(self._reported, 0)

    def take(self, steps: Any, communicator: Communicator, stream: Any) -> None:
        """Decide by the rows of all ranks."""
        clipper, every, source, given = self.clipper, self.every, self._source, self._given
        bad, row, rank, scaled = merge_ranks(every, self._sharded, self._pools, source, given)
        if bad and clipper.strict:
            self._refuse_bad(steps, communicator, stream)
        if rank:
            raise self._difference(row, rank)
        if scaled:
            _normalise(given)
        if clipper.ord != 2.0:
            self._take_powers()
        sparse = clipper.losses_of_tensors is not None
        reported: Any = self._sums.take(self._reported, 0)
        losses: Any = np.zeros(len(given)) if sparse else 0.0
        for group in clipper.groups if bad or sparse else ():
            rows, pools = self.rows[group.name], clipper.pools[group.name]
            own = source[rows.start : rows.stop]
            if sparse:
                losses[pools.start : pools.stop] += self._losses(group, own)
            if bad:
                given[pools.start, tables.BAD] += own[:, tables.BAD].sum()
                self._dispute(group, every[rows.start], own, given, reported)
        clipper.decide_given(given, reported, losses, stream)

    def _refuse_bad(self, steps: Any, communicator: Communicator, stream: Any) -> None:
        """Raise, on all ranks, the first rank's error where a policy "raise" meets NaN or Inf."""
        for group in self.clipper.groups:
            own = self.rows[group.name]
            bad = self.every[own.start : own.stop, :, tables.BAD].any(axis=0)
            if group.nonfinite == "raise" and bad.any():
                raise_of(communicator, int(bad.argmax()), steps.gradients(group), None, stream)

    def _dispute(self, group: Any, every: Array, own: Array, given: Array, reported: Array) -> None:
        """Count a gradient that is not finite on some ranks only as not finite on all."""
        if group.sharded or _scope(self.clipper, group) == "group":
            return
        pools, rows = self.clipper.pools[group.name], self.clipper.merged_rows[group.name]
        reported[rows.start, tables.BAD] += own[0, tables.BAD]
        counts, totals = every[:, tables.BAD], every[:, tables.TOTAL]
        if (counts != counts[0]).any() and not np.isfinite(totals).all():
            given[pools.start : pools.stop, tables.TOTAL] = own[0, tables.TOTAL]
            reported[rows.start : rows.stop, tables.TOTAL] = own[0, tables.TOTAL]

    def _losses(self, group: Any, merged: Array) -> Any:
        """Return the norms of what rounding subnormal terms can add to a group's sums of rows."""
        if group.sharded or _scope(self.clipper, group) == "group":
            return merged[:, LOSS] if _scope(self.clipper, group) else 0.0
        tensors = self.clipper.tensors[group.name]
        return self.clipper.losses_of_tensors[tensors.start : tensors.stop]

    def _difference(self, row: int, rank: int) -> RankError:
        """Return the error that says how a rank's gradients differ from those of rank 0."""
        name = next(name for name, own in self.rows.items() if row in own)
        rows = self.every[row, [0, rank]]
        one, two = (norm(own.item(tables.TOTAL), int(own[tables.EXPONENT]), 2.0) for own in rows)
        bad = rows[:, tables.BAD]
        cause = ""
        if bad[0] != bad[1]:
            cause = f" (without what is NaN or Inf on rank {(0, rank)[bad.argmax()]})"
        return RankError(
            f"group {name!r}: the gradients differ, of norm {one!r} on rank 0 and {two!r} on "
            f"rank {rank}{cause}, but the group is not sharded; nothing was modified on any rank"
        )

    def _take_powers(self) -> None:
        """Find each pool's sum of powers of the clipper's order."""
        ord, source = self.clipper.ord, self._source
        for k in np.flatnonzero(self._sharded).tolist():
            source[k, WIDTH:] = row_of(self.every[k, :, WIDTH:], ord)
        for p, (first, last) in enumerate(self._pools.tolist()):
            if first >= self.count:  # a tensor of this rank's own
                rows = self._powers[first - self.count : last - self.count]
            else:
                rows = source[first:last, WIDTH:]
            self._given[p, POWERS] = row_of(rows, ord)[POWERS]


def _scope(clipper: Any, group: Any) -> str | None:
    rule = clipper.rules[group.name]
    return None if rule is None else str(rule.scope)


def _normalise(rows: Array) -> None:
    """Rewrite rows of sums of squares with the exponents that both engines support."""
    for total, others in ((tables.TOTAL, [tables.ERROR]), (tables.TERMS, [])):
        columns, size = [total, total + 1, *others], abs(rows[:, total + 1])
        odd = (size != 0.0) & (size != BIN_EXPONENT)
        for k in np.flatnonzero(odd & np.isfinite(rows[:, total])).tolist():
            rows[k, columns] = total_of(rows[k : k + 1], total, 2.0, *others)[: len(columns)]


class Ranks:
    """The ranks that clip some groups together, and what they have agreed on."""

    def __init__(self, found: Communicator) -> None:
        self.communicator = found
        self._steps: Any = None
        self._native: Any = None  # a `RanksAtOnce`, see `Part.at_once`
        self._parts: list[Part] = []

    def forget(self) -> None:
        """Agree again before the next step: a rule's state was loaded."""
        self._steps = None

    def decide(
        self, steps: Any, measure: Callable[[], None], facts: Callable[[], Step], stream: Any
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
            self.communicator.request_agreement()
            self._agree(steps)
        if not self._exchanged(measure, facts, stream):  # another rank has asked
            self._agree(steps)
            self._exchanged(measure, facts, stream)
        for part in self._parts:
            part.take(steps, self.communicator, stream)

    def clip_at_once(self, steps: Any, turn: Any, facts: Callable[[], Step]) -> bool:
        """Clip by two native calls, before and after ranks exchange rows; return True on success.

        Each rank may use this path or the general one: both exchange the same messages.
        """
        native = self._native if self._steps is steps else None
        if native is None or not native.publish(turn.slot, steps.clippers[0].tables):
            return False
        found = facts()
        self.communicator.gather(*found)
        (part,) = self._parts
        if native.clip(turn.slot, turn.stretch.unscale, part.clipper.bounds):
            part.take_decided()
        elif self.communicator.heard(*found):
            self._clip_with_care(steps, part, turn)
        else:
            self._agree(steps)
            return False
        turn.decide_by(turn.stretch.bounds, [part.clipper.merged])
        return True

    @isolated
    def _clip_with_care(self, steps: Any, part: Part, turn: Any) -> None:
        """Clip by the general path with the rows that have been exchanged."""
        part.clipper.obey(turn.stretch.unscale, steps.stream)
        part.clipper.turn_to(turn.slot)
        part.take(steps, self.communicator, steps.stream)
        steps.write()

    def _exchanged(
        self, measure: Callable[[], None], facts: Callable[[], Step], stream: Any
    ) -> bool:
        """Measure, and exchange the rows of all parts; see `Communicator.exchange`."""
        measure()
        for part in self._parts:
            part.publish(stream)
        return self.communicator.exchange(*facts())

    def _agree(self, steps: Any) -> None:
        """Check that all ranks have the same groups; exchange the sizes of sharded parameters."""
        groups = [group for clipper in steps.clippers for group in clipper.groups]
        self.communicator.agree(_description(steps.engine, groups))
        shards = [group for group in groups if group.sharded]
        counts = [[math.prod(param.shape) for param in group.params.values()] for group in shards]
        every = self.communicator.everyones(counts) if shards else []
        totals = {
            group.name: np.array([own[k] for own in every]).sum(axis=0).tolist()
            for k, group in enumerate(shards)
        }
        for clipper in steps.clippers:
            clipper.take_sizes(totals)
        self._parts = [Part(clipper) for clipper in steps.clippers]
        self._native = None
        sizes = [part.count * part.width for part in self._parts]
        self.communicator.agreed(sum(sizes))
        gathered, end = self.communicator, 0
        for part, size in zip(self._parts, sizes, strict=True):
            start, end = end, end + size
            part.take_memory(gathered.values[start:end], gathered.every[:, start:end])
        if steps.clips_at_once and not steps.follows:
            self._native = self._parts[0].at_once(gathered.heads)
        self._steps = steps


def _description(engine: Any, groups: Sequence[Any]) -> Facts:
    """Return the facts of groups that must be the same on all ranks."""
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
    """Return a digest of a rule's state."""
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
    """Raise, on all ranks, the error of the first non-finite gradient of one rank."""
    own = None
    if communicator.rank == rank:
        error = first_error(entries, norm, stream)
        own = str(error), error.name, error.index, error.value, error.count
    found = communicator.everyones(own)[rank]
    message, name, index, value, count = found
    raise NonFiniteGradientError(f"rank {rank}: {message}", name, index, value, count, rank)


SIZE = WIDTH  # a message of a function: a row of sums, its loss, and the number of elements
EXCHANGED = WIDTH + 1


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
    with found:
        law = checked()
        held = structure(grads)
        described = gradients(held)
        targets = targets_of(described, out)
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
        found.values[:] = *whole.row, whole.loss, whole.size
        found.exchange(facts)
        merged = _merged(found.every, law.ord)
        bad = found.every[:, tables.BAD] != 0.0
        if policy == "raise" and bad.any():
            stream = described.engine.stream_of([entry.facts for entry in entries])
            raise_of(found, int(bad.argmax()), entries, None, stream)
        norm = clip(entries, targets, law, policy, duplicates, None, merged)
        if out is not None:
            libraries.note_writing(target.source for target in targets)
        return described.with_results([target.source for target in targets]), norm


def _merged(every: Array, ord: float) -> Whole:
    """Return the `Whole` of all ranks, from the row, the loss and the size of each."""
    size, loss = int(every[:, SIZE].sum()), float(every[:, LOSS].sum())
    return Whole(row_of(every[:, :COLUMNS], ord), size, loss)

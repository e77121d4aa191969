"""The interface of an engine, and the choice of one for an array: of the host, or of a GPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np

from numclip import libraries
from numclip.dtypes import Array, DType
from numclip.facts import Facts
from numclip.law import Law, Pool
from numclip.memory import AnySpan, Memory, Strided

Outcome = tuple[Any, Any]
"""The sums of a plan's tensors, and the decisions for its pools: tables of `numclip.tables`."""

Groups = tuple[Array, Array]
"""The order of rows that brings equal indices together, and the start of each group in it."""


class Plan(Protocol):
    """Measures and writes some tensors; made once, and used for many steps.

    `stream` is the stream to work on; the host's engine ignores it.
    """

    spans: list[Any]
    pools: list[Pool]
    lock: AbstractContextManager[Any]
    """To be held from `take_rows` or `write_laws` to the last use of the decisions: threads with
    the same arrays share a kept plan."""

    def outcome(self, stream: Any) -> Outcome:
        """Return memory for an outcome."""

    def take_rows(self, spans: Sequence[Any], groupings: Sequence[Groups], stream: Any) -> None:
        """Set the spans and groupings of the tensors whose rows can share an index."""

    def leave(self, stream: Any) -> None:
        """Decide with infinite bounds, which leave tensors unscaled, until a law is written."""

    def write_laws(self, law: Law, stream: Any) -> None:
        """Set the law that decisions follow."""

    def measure(self, ord: float, stream: Any) -> None:
        """Find the partial sums: one read, two where `ord` is neither 2 nor infinite."""

    def decide(self, outcome: Outcome, stream: Any) -> None:
        """Add the sums up, and decide for every pool."""

    def add(self, outcome: Outcome, stream: Any) -> None:
        """Add the sums up without deciding; `decide_by` has to follow."""

    def decide_by(self, totals: Array, outcome: Outcome, stream: Any) -> None:
        """Decide by one row of sums for each pool, see `numclip.sums.Whole`, in place of its own.

        The sums of the outcome stay as they are.
        """

    def at_once(self, divisors: Array, held: Sequence[Array]) -> AtOnce | None:
        """Return an `AtOnce` that clips small tensors by one call, or None if that is impossible.

        `held` are the words of each sparse tensor's rows, see `numclip.tables`.
        """

    def values_at_once(self, later: Any, limits: Array) -> AtOnce | None:
        """Return an `AtOnce` that clamps elements between limits for each tensor, or None.

        `later`, a plan of the same tensors, measures the results, to the tables that follow.
        """

    def read_at(self, sources: Sequence[int] | None, stream: Any) -> None:
        """Read tensors at other addresses, 0 for no elements; None is for where they are written.

        Only called if `Engine.given` has returned a reader; nothing is scaled meanwhile.
        """

    def scale(self, outcome: Outcome, stream: Any) -> None:
        """Write each tensor times the factor that was decided; one read, one write, or none."""

    def write_exceptional(self, outcome: Outcome, stream: Any) -> None:
        """Scale, in place, the tensors whose mode is TRUNCATE or CLEAN; rarely any."""

    def clamp(self, outcome: Outcome, low: float, high: float, stream: Any, members: range) -> None:
        """Write the elements of some tensors clamped between two bounds; leave skipped tensors."""


class UnitPlan(Protocol):
    """Measures and writes the units of some families of arrays."""

    lock: AbstractContextManager[Any]
    """As of `Plan`."""

    def write_laws(self, bound: Any, stream: Any, eps: Any = 0.0, unscale: float = 1.0) -> None:
        """Set the bounds, one or one for each family; where params are given, bounds on ratios."""

    def measure(self, stream: Any) -> None:
        """Find the partial sums of gradients and parameters."""

    def decide(self, stream: Any, base: Any = None) -> None:
        """Find the factor of every unit; `base` are decisions that can skip whole families."""

    def changes(self, stream: Any) -> bool:
        """Tell whether some unit is scaled, after waiting for the decisions."""

    def scale(self, stream: Any) -> None:
        """Write each unit times its factor; one read, one write, or none."""

    def summary(self, stream: Any) -> Any:
        """Return memory for `summarize` to write to."""

    def summarize(self, out: Any, stream: Any) -> None:
        """Write each family's norm after clipping, least factor and number of clipped units."""


class Given(Protocol):
    """Reads arrays that a user passes for target arrays, in a fixed order.

    An entry that is not an ordinary array of the exact dtype and shape in C order, or overlaps
    memory in `taken`, is not read. `addresses` are those of the arrays read last, 0 for None.
    Sparse gradients are passed as the values of their rows; their indices follow all entries.
    """

    kept: Any
    addresses: Array
    is_little: bool  # copying all arrays costs less than reading them in place

    def read(self, items: tuple[Any, ...]) -> bool:
        """Find the addresses of arrays; return True if all can be read."""

    def take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Copy arrays into the targets or add them; return True if all could be read.

        None stands for zeros, `kept` for the target's present values.
        """

    def copies(self, items: tuple[Any, ...], *, adds: bool) -> tuple[Any, ...] | None:
        """Return small arrays of other dtypes or orders as copies that `take` accepts, or None."""


class HalfCopies(Protocol):
    """Float32 numbers and their 16-bit copies."""

    def round_all(self, stream: Any) -> None:
        """Set copies to their numbers, rounded to nearest."""

    def take_over(self, stream: Any) -> None:
        """Set a number to its copy where the copy is not the number rounded."""


class AtOnce(Protocol):
    """Clips, or takes whole steps, by one call each, or by two: `measure`, then `take`.

    Results are written to row `slot` of the outcomes. If a call returns False, nothing else was
    written.
    """

    def measure(
        self, items: Any, slot: int, unscale: float, bounds: Array, outcomes: Sequence[Any]
    ) -> bool:
        """Measure the gradients of the plan, or `items`; return True on success."""

    def take(
        self,
        items: Any,
        slot: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Any],
        measures: bool = True,
    ) -> bool:
        """Clip by bounds, or clip and update, after measuring if `measures`; return likewise."""


class StepsAtOnce(AtOnce, Protocol):
    """Takes whole steps."""

    def leave(self, numbers: list[int]) -> None:
        """Mark the gradients of some of the plan's tensors as absent, all others as present."""


class GroupUpdates(Protocol):
    """Updates parameters by the gradients of a plan; each pool has settings and a count."""

    def counts(self) -> Array:
        """Return how often each pool was updated, after waiting for it."""

    def set_counts(self, counts: Array) -> None:
        """Set how often each pool was updated."""

    def write_settings(self, settings: Array, stream: Any) -> None:
        """Set the settings of the following steps, a row for each pool."""

    def take_rows(self, slices: Sequence[Any], stream: Any) -> None:
        """Set the slices whose rows the next step updates."""

    def read_at(self, sources: Sequence[int] | None, stream: Any) -> None:
        """Read gradients at other addresses; leave parameters whose address is 0 as they are.

        None is for the gradients of the plan.
        """

    def at_once(self, given: Any, divisors: Array, held: Sequence[Array]) -> StepsAtOnce | None:
        """Return a `StepsAtOnce` that takes whole steps of small data, or None."""

    def step(self, outcome: Outcome, stream: Any) -> None:
        """Update by the gradients times the factors that were decided."""


class ArrayUpdates(Protocol):
    """Updates arrays by gradients that are not clipped."""

    def read_pairs(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Let the following steps read the gradients of pairs in place.

        Return True if that is possible: if the variables are the arrays that are updated, and
        each gradient is an ordinary array of its variable's dtype and shape.
        """

    def read_from(self, sources: Any) -> None:
        """Let the following steps read gradients at the sources of `Engine.key_of_pairs`."""

    def read_at(self, sources: Sequence[int]) -> None:
        """Let the following steps read gradients, none of which is sparse, at some addresses."""

    def step(self, settings: Sequence[float], counts: Sequence[int], stream: Any) -> None:
        """Update each array; its count is the number of this update."""


class Engine(Protocol):
    """Operations on arrays: the module `numclip.host.engine` or `numclip.cuda.engine`.

    Neither decides anything: what is measured and written follows from plans and laws.
    """

    name: str
    kernels: Mapping[str, Any]  # the update kernels by name
    updates_read_anywhere: bool  # updates of known arrays need no new tables for other gradients
    takes_any_rows: bool  # accepts slices with values not in C order, and misaligned arrays

    def require(self) -> None:
        """Raise DeviceError where the engine cannot work."""

    def facts(self, name: str, array: Any) -> Facts:
        """Return the `Facts` of an array."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array of the engine's own, 64-byte aligned, in C order."""

    def span(self, dtype: DType, source: Facts, target: Facts, *, parts: bool) -> Any:
        """Return the `Span` or `Strided` that reads one array and writes another of its shape.

        With `parts`, both parts of a complex element are measured together.
        """

    def new_like(self, like: Facts) -> Any:
        """Return a new array of the library of another, with its strides if that one is dense."""

    def new_of_shape(self, like: Facts, shape: tuple[int, ...]) -> Any:
        """Return a new array in C order of the dtype and the library of another one."""

    def stream_of(self, facts: Sequence[Facts]) -> Any:
        """Return the stream to work on; it waits for what the arrays' libraries have submitted."""

    def give_back(self, stream: Any, facts: Sequence[Facts]) -> None:
        """Make the arrays' libraries wait for what was submitted to a stream."""

    def stream_from(self, stream: Any) -> Any:
        """Return the engine's stream for one that a user passes."""

    def plan(self, spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any) -> Plan:
        """Return a new plan."""

    def kept_plan(
        self, spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any
    ) -> tuple[Plan, list[Outcome]]:
        """Return (plan, free outcomes), from the cache if it has such a plan."""

    def unit_plan(self, families: Sequence[Any], ord: float, stream: Any) -> UnitPlan:
        """Return a new plan of units."""

    def kept_unit_plan(
        self, families: Sequence[Any], ord: float, stream: Any
    ) -> tuple[UnitPlan, list[Any]]:
        """Return (plan of units, free summaries) likewise."""

    def read(self, table: Any, stream: Any) -> Array:
        """Return a table in the host's memory, after waiting for it."""

    def number(self, table: Any, column: int, stream: Any, release: Callable[[], object]) -> Any:
        """Return a number of a table's first row: a float, or an object that reads it when used.

        An engine that returns such an object calls `release` once nothing can read it any more.
        """

    def numbers(
        self, table: Any, column: int, count: int, stream: Any, release: Callable[[], object]
    ) -> list[Any]:
        """Return the first `count` integers of a column likewise."""

    def key_of(self, items: Sequence[Any], ord: float, policy: str, *, written: bool) -> Any:
        """Return the key of the plan for arrays, without describing them, or None."""

    def key_of_pairs(
        self, gradients: list[Any], variables: list[Any], kernel: str, rows: Mapping[int, Array]
    ) -> tuple[Any, Any]:
        """Return (key, sources): the key of the update of pairs, or None, and its gradients.

        `rows` are the indices of those gradients that are the values of sparse ones.
        """

    def find_plan(self, key: Any) -> tuple[Plan, list[Outcome], Any] | None:
        """Return (plan, free outcomes, stream) of a key, or None."""

    def keep_plan(self, key: Any, plan: Plan, free: list[Outcome]) -> None:
        """Keep a plan under a key, for `find_plan`."""

    def sent(self, array: Array, stream: Any) -> Any:
        """Return an array of the host in memory that kernels can read."""

    def indices_on_host(self, indices: Any) -> Array:
        """Return a copy of a 1-d array of integers, after waiting for it."""

    def copy(self, target: Facts, source: Facts, stream: Any) -> None:
        """Copy an array into one of the same shape and dtype."""

    def clear(self, array: Any, stream: Any) -> None:
        """Set an array of `empty` to zeros."""

    def part(self, array: Any, start: int, shape: tuple[int, ...]) -> Any:
        """Return a view of a 1-d array of `empty`: the elements from `start` on, in a shape."""

    def put(self, array: Any, source: Any, stream: Any) -> None:
        """Copy an array (the engine's in C order, or any of the host) into one of `empty`."""

    def given(
        self,
        targets: Sequence[Facts],
        taken: Sequence[tuple[int, int]],
        natives: Sequence[np.dtype[Any]] | None = None,
        held: Mapping[int, Array] | None = None,
    ) -> Given | None:
        """Return a `Given` for some targets, or None; arrays must not overlap extents in `taken`.

        Arrays have the targets' dtypes or, if given, `natives`: 16-bit for targets of float32.
        Targets in `held` take rows, which go where its words say, see `numclip.tables`.
        """

    def half_copies(self, tables: Mapping[DType, Array], stream: Any) -> HalfCopies:
        """Return the `HalfCopies` of tables by dtype of copies, rows (copies, numbers, length)."""

    def put_all(self, pairs: Sequence[tuple[Any, Any]], stream: Any, *, adds: bool) -> None:
        """Copy arrays likewise, each into the first array of its pair, or add them."""

    def table(self, shape: tuple[int, ...], stream: Any) -> Any:
        """Return a new table of zeros."""

    def hand_over(self, table: Any, stream: Any) -> tuple[Callable[[], Array], Any]:
        """Return a function that reads a table as it is now, and the table to write to next.

        Nothing waits until the function is called.
        """

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Return a context for work on a stream or, for None, in order with all other work."""

    def is_capturing(self, stream: Any) -> bool:
        """Tell whether work on a stream is only captured, for a graph."""

    def updates_of_groups(
        self,
        kernel: str,
        plan: Plan,
        spans: Sequence[Any],
        states: Sequence[Sequence[int]],
        stream: Any,
    ) -> GroupUpdates:
        """Return the `GroupUpdates` of parameters by the gradients of a plan.

        `spans` say where gradients are read and parameters written; `states` has the address of
        every parameter's state, for each kind of state.
        """

    def updates_of_arrays(
        self,
        kernel: str,
        spans: Sequence[Any],
        states: Sequence[Sequence[int]],
        indices: Sequence[Array],
        arrays: Sequence[Facts],
        stream: Any,
    ) -> ArrayUpdates:
        """Return the `ArrayUpdates`; `indices` are the distinct row indices of each `RowSpan`."""

    def on_host(self, facts: Facts, stream: Any) -> Array:
        """Return a NumPy array with the same elements, a copy if they are on a GPU."""

    def sum_rows(
        self, source: Facts, target: Facts, grouping: Groups, target_rows: Array, stream: Any
    ) -> None:
        """Write the sum of each group of rows to its row in `target_rows`, 0 to the other rows."""

    def clamp_between(self, array: Strided, low: Memory, high: Memory, stream: Any) -> None:
        """Write an array clamped between two others of the same shape and dtype."""

    def sum_examples(self, arrays: Sequence[Strided], units: Any, stream: Any) -> None:
        """Write the sum over the first axis of each array, each row times its unit's factor."""


def of(array: Any) -> Engine:
    """Return the engine for an array."""
    if type(array) is np.ndarray:
        return named("cpu")
    return named("cuda" if libraries.on_device(array) else "cpu")


_named: dict[str, Engine] = {}


def named(device: str) -> Engine:
    """Return the engine of a device, which is loaded at the first call."""
    found = _named.get(device)
    if found is None:
        found = _named[device] = _loaded(device)
    return found


def _loaded(device: str) -> Engine:
    made: Any
    if device == "cuda":
        from numclip.cuda import engine as made
    else:
        from numclip.host import engine as made
    return made  # type: ignore[no-any-return]

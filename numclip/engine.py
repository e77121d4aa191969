"""What an engine must offer, and which one is for an array: in the host's memory, or on a GPU."""

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
"""The rows in an order that brings equal indices together, and where each group starts."""


class Plan(Protocol):
    """How some tensors are measured and written; made once, and used for many steps.

    `stream` is where in order an engine that has streams does it.
    """

    spans: list[Any]
    pools: list[Pool]
    lock: AbstractContextManager[Any]
    """To be held from `take_rows` or a law to the last use of what is decided by it: threads with
    the same arrays share a plan that is kept."""

    def outcome(self, stream: Any) -> Outcome:
        """Return memory for what is decided."""

    def take_rows(self, spans: Sequence[Any], groupings: Sequence[Groups], stream: Any) -> None:
        """Let the tensors whose rows can share an index be these."""

    def leave(self, stream: Any) -> None:
        """Let decisions leave tensors as they are, until a law is written."""

    def write_laws(self, law: Law, stream: Any) -> None:
        """Let decisions obey a law."""

    def measure(self, ord: float, stream: Any) -> None:
        """Take the partial sums: one read, two where `ord` is neither 2 nor infinite."""

    def decide(self, outcome: Outcome, stream: Any) -> None:
        """Add the sums up, and decide for every pool."""

    def add(self, outcome: Outcome, stream: Any) -> None:
        """Add the sums up; `decide_by` is to follow, and need not be preceded by a decision."""

    def decide_by(self, totals: Array, outcome: Outcome, stream: Any) -> None:
        """Decide by one row of sums for each pool, see `numclip.sums.Whole`, in place of its own.

        The sums of the outcome stay as they are.
        """

    def at_once(self, divisors: Array, held: Sequence[Array]) -> AtOnce | None:
        """Return what clips little data by one call each, None where it is not that.

        `held` say where the rows of sparse tensors are, see `numclip.tables`.
        """

    def values_at_once(self, later: Any, limits: Array) -> AtOnce | None:
        """Return what holds elements by one call each likewise, between limits for each tensor.

        What is left is measured by a plan of the same tensors, to tables that follow.
        """

    def read_at(self, sources: Sequence[int] | None, stream: Any) -> None:
        """Read tensors at some addresses, 0 for no elements; None for where they are written.

        Asked of an engine that has `given` alone; nothing is scaled meanwhile.
        """

    def scale(self, outcome: Outcome, stream: Any) -> None:
        """Write each tensor times the factor that was decided; one read, one write, or none."""

    def write_exceptional(self, outcome: Outcome, stream: Any) -> None:
        """Scale, in place, those tensors whose factor is no plain number; rarely any."""

    def clamp(self, outcome: Outcome, low: float, high: float, stream: Any, members: range) -> None:
        """Write the elements of some tensors held between two bounds, but of those skipped."""


class UnitPlan(Protocol):
    """How the units of some families of arrays are measured and written."""

    lock: AbstractContextManager[Any]
    """As of `Plan`."""

    def write_laws(self, bound: Any, stream: Any, eps: Any = 0.0, unscale: float = 1.0) -> None:
        """Let decisions obey bounds, one or one for each family; of ratios where params are."""

    def measure(self, stream: Any) -> None:
        """Take the partial sums of gradients and parameters."""

    def decide(self, stream: Any, base: Any = None) -> None:
        """Find the factor of every unit; `base` are decisions that can say to skip all."""

    def changes(self, stream: Any) -> bool:
        """Tell whether some unit is scaled, after waiting for the decisions."""

    def scale(self, stream: Any) -> None:
        """Write each unit times its factor; one read, one write, or none."""

    def summary(self, stream: Any) -> Any:
        """Return memory for what `summarize` tells."""

    def summarize(self, out: Any, stream: Any) -> None:
        """Write what clipping makes of each family: norm, least factor, how many are clipped."""


class Given(Protocol):
    """Reads arrays that a user passes for others, in a fixed order.

    What is no ordinary array of the very dtype and shape in C order, or overlaps memory that is
    taken, is not read. `addresses` are where the arrays were that were read last, 0 for None.
    Sparse gradients are passed as the values of their rows, and after all others their indices.
    """

    kept: Any
    addresses: Array
    is_little: bool  # copying it costs less than to read it elsewhere

    def read(self, items: tuple[Any, ...]) -> bool:
        """Find where arrays lie; tell whether all could be read."""

    def take(self, items: tuple[Any, ...], *, adds: bool) -> bool:
        """Copy arrays into the others or add them; tell whether all could be read.

        None stands for zeros, `kept` for what is there.
        """

    def copies(self, items: tuple[Any, ...], *, adds: bool) -> tuple[Any, ...] | None:
        """Return little arrays of other dtypes or orders as copies that can be taken, or None."""


class HalfCopies(Protocol):
    """Float32 numbers and their 16-bit copies."""

    def round_all(self, stream: Any) -> None:
        """Let copies be the nearest ones to their numbers."""

    def take_over(self, stream: Any) -> None:
        """Let numbers be those of the copies that are none of theirs."""


class AtOnce(Protocol):
    """What clips, or takes whole steps, by one call each, or by two: `measure`, then `take`.

    What is found goes to a row of the outcomes, numbered `place`. If a call says that this is not
    right, nothing else was written.
    """

    def measure(
        self, items: Any, place: int, unscale: float, bounds: Array, outcomes: Sequence[Any]
    ) -> bool:
        """Measure the gradients of the plan, or given ones; tell if that was right."""

    def take(
        self,
        items: Any,
        place: int,
        unscale: float,
        bounds: Array,
        outcomes: Sequence[Any],
        measures: bool = True,
    ) -> bool:
        """Clip by bounds, or clip and update; measure first, or use what was; tell likewise."""


class StepsAtOnce(AtOnce, Protocol):
    """Takes whole steps."""

    def leave(self, numbers: list[int]) -> None:
        """Let some tensors have no gradient of the plan's in the next step, all others one."""


class GroupUpdates(Protocol):
    """How parameters are updated by the gradients of a plan; pools have settings and counts."""

    def counts(self) -> Array:
        """Return how often each pool was updated, after waiting for it."""

    def set_counts(self, counts: Array) -> None:
        """Let pools have been updated so often."""

    def write_settings(self, settings: Array, stream: Any) -> None:
        """Let the following steps use some settings, a row for each pool."""

    def take_rows(self, slices: Sequence[Any], stream: Any) -> None:
        """Let the next step update the rows of some slices."""

    def read_at(self, sources: Sequence[int] | None, stream: Any) -> None:
        """Read gradients at some addresses, and leave parameters without one, 0, as they are.

        None is for the gradients of the plan.
        """

    def at_once(self, given: Any, divisors: Array, held: Sequence[Array]) -> StepsAtOnce | None:
        """Return what takes whole steps of little data likewise."""

    def step(self, outcome: Outcome, stream: Any) -> None:
        """Update by the gradients times the factors that were decided."""


class ArrayUpdates(Protocol):
    """How arrays are updated by gradients that are not clipped."""

    def read_pairs(self, gradients: list[Any], variables: list[Any]) -> bool:
        """Let the following steps read the gradients of pairs where they lie.

        Tell whether that is possible: whether the variables are the arrays that are updated, and
        each gradient is as it has to be.
        """

    def read_from(self, sources: Any) -> None:
        """Let the following steps read gradients where `Engine.key_of_pairs` found them."""

    def read_at(self, sources: Sequence[int]) -> None:
        """Let the following steps read gradients, none of which is sparse, at some addresses."""

    def step(self, settings: Sequence[float], counts: Sequence[int], stream: Any) -> None:
        """Update each array for the time that its count says."""


class Engine(Protocol):
    """A way to walk memory: the module `numclip.host.engine`, or `numclip.cuda.engine`.

    Neither decides anything: what is measured and written follows from plans and laws.
    """

    name: str
    kernels: Mapping[str, Any]  # of updates, by their names
    updates_read_anywhere: bool  # of arrays that are known, without new tables
    takes_any_rows: bool  # slices whose values are not in C order, and misaligned arrays

    def require(self) -> None:
        """Raise DeviceError where the engine cannot work."""

    def facts(self, name: str, array: Any) -> Facts:
        """Return what an array tells of itself."""

    def empty(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """Return a new array of the engine's own, 64-byte aligned, in C order."""

    def span(self, dtype: DType, source: Facts, target: Facts, *, parts: bool) -> Any:
        """Return where an array is read and written, a `Span` or `Strided`.

        `parts` says that the two of a complex element count together.
        """

    def new_like(self, like: Facts) -> Any:
        """Return a new array of the library of another, in memory as that one if it is dense."""

    def new_of_shape(self, like: Facts, shape: tuple[int, ...]) -> Any:
        """Return a new array in C order of the dtype and the library of another one."""

    def stream_of(self, facts: Sequence[Facts]) -> Any:
        """Return the stream to work on, after all that the arrays' libraries have begun."""

    def give_back(self, stream: Any, facts: Sequence[Facts]) -> None:
        """Let the arrays' libraries go on only after what a stream was given."""

    def stream_from(self, stream: Any) -> Any:
        """Return a stream that a user gives."""

    def plan(self, spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any) -> Plan:
        """Return a new plan."""

    def kept_plan(
        self, spans: Sequence[AnySpan], pools: Sequence[Pool], stream: Any
    ) -> tuple[Plan, list[Outcome]]:
        """Return a plan, one there was if there was one like it, and its free memory."""

    def unit_plan(self, families: Sequence[Any], ord: float, stream: Any) -> UnitPlan:
        """Return a new plan of units."""

    def kept_unit_plan(
        self, families: Sequence[Any], ord: float, stream: Any
    ) -> tuple[UnitPlan, list[Any]]:
        """Return a plan of units likewise."""

    def read(self, table: Any, stream: Any) -> Array:
        """Return a table in the host's memory, after waiting for it."""

    def number(self, table: Any, column: int, stream: Any, release: Callable[[], object]) -> Any:
        """Return a float to come, of a table's first row: itself, or what reads it when asked.

        `release` is called when nobody can ask any more, by an engine that waits.
        """

    def numbers(
        self, table: Any, column: int, count: int, stream: Any, release: Callable[[], object]
    ) -> list[Any]:
        """Return the integers of a column likewise."""

    def key_of(self, items: Sequence[Any], ord: float, policy: str, *, written: bool) -> Any:
        """Return by what the plan for arrays is found without describing them, or None."""

    def key_of_pairs(
        self, gradients: list[Any], variables: list[Any], kernel: str, rows: Mapping[int, Array]
    ) -> tuple[Any, Any]:
        """Return by what updates of pairs are found, or None, and where the gradients are.

        `rows` are the indices of gradients that are the values of sparse ones.
        """

    def find_plan(self, key: Any) -> tuple[Plan, list[Outcome], Any] | None:
        """Return the plan of a key, its free memory for outcomes and its stream, if any."""

    def keep_plan(self, key: Any, plan: Plan, free: list[Outcome]) -> None:
        """Let a plan be found by a key."""

    def sent(self, array: Array, stream: Any) -> Any:
        """Return an array of the host where kernels can read it."""

    def indices_on_host(self, indices: Any) -> Array:
        """Return a copy of a 1-d array of integers, after waiting for it."""

    def copy(self, target: Facts, source: Facts, stream: Any) -> None:
        """Copy an array into one of the same shape and dtype."""

    def clear(self, array: Any, stream: Any) -> None:
        """Set an array of `empty` to zeros."""

    def part(self, array: Any, start: int, shape: tuple[int, ...]) -> Any:
        """Return the view of some elements of a 1-d array of `empty`, from one of them on."""

    def put(self, array: Any, source: Any, stream: Any) -> None:
        """Copy an array, the engine's in C order or any of the host, into one of `empty`."""

    def given(
        self,
        targets: Sequence[Facts],
        taken: Sequence[tuple[int, int]],
        natives: Sequence[np.dtype[Any]] | None = None,
        held: Mapping[int, Array] | None = None,
    ) -> Given | None:
        """Return what reads arrays for some targets, if it can; none may lie in memory taken.

        They have the dtypes `natives` where these are told, of 16 bits for targets of float32.
        Targets that `held` has are for rows, which go where it says, see `numclip.tables`.
        """

    def half_copies(self, tables: Mapping[DType, Array], stream: Any) -> HalfCopies:
        """Return what rounds numbers; rows are of (copies, numbers, length), by copies' dtypes."""

    def put_all(self, pairs: Sequence[tuple[Any, Any]], stream: Any, *, adds: bool) -> None:
        """Copy arrays likewise, each into the one before it, or add them."""

    def table(self, shape: tuple[int, ...], stream: Any) -> Any:
        """Return a new table of zeros."""

    def hand_over(self, table: Any, stream: Any) -> tuple[Callable[[], Array], Any]:
        """Return what reads a table as it is now, and the one to write to from now on.

        Nothing waits until it is read.
        """

    def on_stream(self, stream: Any) -> AbstractContextManager[Any]:
        """Do something on a stream; without one, after all others and before what follows."""

    def is_capturing(self, stream: Any) -> bool:
        """Tell whether what is done on a stream is only written down, for a graph."""

    def updates_of_groups(
        self,
        kernel: str,
        plan: Plan,
        spans: Sequence[Any],
        states: Sequence[Sequence[int]],
        stream: Any,
    ) -> GroupUpdates:
        """Return what updates parameters by the gradients of a plan.

        `spans` say where gradients are read and parameters written, `states` where each state
        of every parameter is.
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
        """Return what updates arrays; `indices` are of the rows, each once, of each `RowSpan`."""

    def on_host(self, facts: Facts, stream: Any) -> Array:
        """Return an array of NumPy with the same elements, a copy if they are elsewhere."""

    def sum_rows(
        self, source: Facts, target: Facts, grouping: Groups, places: Array, stream: Any
    ) -> None:
        """Write the sum of each group of rows to the row that is its place, 0 to the others."""

    def clamp_between(self, array: Strided, low: Memory, high: Memory, stream: Any) -> None:
        """Write an array held between others, of the same shape and dtype."""

    def sum_examples(self, arrays: Sequence[Strided], units: Any, stream: Any) -> None:
        """Write the sum over the first axis of each array, each row times its unit's factor."""


def of(array: Any) -> Engine:
    """Return the engine for an array."""
    if type(array) is np.ndarray:
        return named("cpu")
    return named("cuda" if libraries.on_device(array) else "cpu")


_named: dict[str, Engine] = {}


def named(device: str) -> Engine:
    """Return the engine of a device, which is loaded when first asked for."""
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

"""What a step of parameter groups found and did."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import Field, dataclass, fields
from functools import cached_property
from typing import Any, NamedTuple, Self, TypeVar

from numclip.clipping.outcome import kept
from numclip.isolation import isolated

STATES = ("untouched", "clipped", "skipped", "not finite")
WHOLE = "all"
Report = TypeVar("Report")


def cell(value: float | None) -> str:
    """Return a number as tables show it."""
    return "-" if value is None else f"{value:.4g}"


def as_python(value: Any) -> Any:
    """Return a value as JSON has it: None for NaN and Inf."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def table(align: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return aligned lines, indented; `align` has ``<`` or ``>`` for each column."""
    lines = [header, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    formats = [f"{{:{side}{width}}}" for side, width in zip(align, widths, strict=True)]
    return "\n".join("  " + "  ".join(formats).format(*line).rstrip() for line in lines)


class TensorReport(NamedTuple):
    """What a step found and did to one gradient.

    Attributes
    ----------
    norm : float
        The norm before clipping.
    clipped_norm : float
        The norm after clipping.
    scale : float
        The smallest factor applied: 1.0 where untouched, NaN where the results are NaN.
    threshold : float
        The bound on the norm, ``inf`` where there was none.
    """

    norm: float
    clipped_norm: float
    scale: float
    threshold: float


class TensorReports(Mapping[str, TensorReport]):
    """The reports of many gradients by name, made when the first is looked up."""

    def __init__(self, groups: Iterable[Any]) -> None:
        """Take what became of groups, see `numclip.clipping.outcome`."""
        self._groups = groups

    @cached_property
    @isolated
    def _made(self) -> dict[str, TensorReport]:
        return {
            name: TensorReport(*row)
            for own in self._groups
            for name, row in zip(own.names, own.tensor_rows, strict=True)
        }

    def __getitem__(self, name: str) -> TensorReport:
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)

    def __repr__(self) -> str:
        return repr(self._made)

    def __reduce__(self) -> tuple[type, tuple[dict[str, TensorReport]]]:
        return dict, (self._made,)


class Asked(cached_property[Any]):
    """A field that a report asks its source for when it is first read, without taking a lock."""

    def __init__(self, field: Field[Any]) -> None:
        def ask(report: ToCome) -> Any:
            return report._asked(field.name)

        ask.__annotations__["return"] = field.type  # what documentation shows
        super().__init__(ask)
        self._name = field.name

    def __get__(self, report: Any, _owner: type | None = None) -> Any:
        if report is None:  # as a dataclass has it: a field without a default is none of the class
            raise AttributeError(self._name)
        value = report.__dict__[self._name] = report._asked(self._name)
        return value


def asked(report: type[Report]) -> type[Report]:
    """Let a dataclass be made before its fields are known."""
    for field in fields(report):  # type: ignore[arg-type]
        setattr(report, field.name, Asked(field))
    return report


class ToCome(ABC):
    """What can be made before its fields are known: each is asked of a source when it is read."""

    _source: Any

    @classmethod
    def of(cls, source: Any) -> Self:
        """Return one whose fields are the attributes of a source, which is kept."""
        made = object.__new__(cls)
        made.__dict__["_source"] = source
        return made

    @abstractmethod
    def _asked(self, name: str) -> Any:
        """Return a field from the source."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@isolated  # once for all that a field is found from
def _number(source: Any, name: str) -> Any:
    """Return a field of one step's outcome as a Python number; None for a threshold of NaN."""
    value = getattr(source, name).item()
    return None if name == "threshold" and value != value else value


@asked
@dataclass(frozen=True)
class Outcome(ToCome):
    """What a group and the whole have in common."""

    norm: float
    clipped_norm: float
    scale: float
    clipped: bool
    skipped: bool
    threshold: float | None
    nonfinite: bool

    @property
    @abstractmethod
    def state(self) -> str:
        """What happened, in a word."""


@dataclass(frozen=True)
class GroupReport(Outcome):
    """What a step found and did to one group.

    Attributes
    ----------
    norm : float
        The norm before clipping, that of all groups that share it. Of a skipped group whose rule
        is of order 2, its own.
    clipped_norm : float
        The norm after clipping.
    scale : float
        The smallest factor applied: 1.0 where untouched, NaN where the results are NaN.
    clipped : bool
        Whether anything was scaled or clamped.
    skipped : bool
        Whether the group was left as it was because it held NaN or Inf.
    threshold : float or None
        The bound on the norm, ``inf`` for a rule that did not clip at this step; None where
        there is no single bound.
    nonfinite : bool
        Whether a gradient held NaN or Inf.
    """

    def _asked(self, name: str) -> Any:
        return _number(self._source, name)

    @property
    def state(self) -> str:
        """One of "untouched", "clipped", "skipped", "not finite" (NaN or Inf, not skipped)."""
        if self.skipped:
            return "skipped"
        if self.nonfinite:
            return "not finite"
        return "clipped" if self.clipped else "untouched"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, ready for JSON: None stands for NaN and Inf."""
        return {field.name: as_python(getattr(self, field.name)) for field in fields(self)}


@asked
@dataclass(frozen=True, repr=False)
class ClipReport(Outcome):
    """What a step of parameter groups found and did.

    Attributes
    ----------
    norm, clipped_norm, scale, threshold : float
        As in `GroupReport`, for all gradients together.
    clipped, skipped, nonfinite : bool
        Whether any group was clipped, was skipped, held NaN or Inf.
    step : int
        The number of the step, from 0.
    groups : dict of str to GroupReport
        The same fields for each group.
    tensors : mapping of str to TensorReport
        Norms, factor and threshold of each gradient, by the name of its parameter.

    Examples
    --------
    >>> group = GroupReport(
    ...     norm=10.0, clipped_norm=5.0, scale=0.5, clipped=True, skipped=False, threshold=5.0,
    ...     nonfinite=False,
    ... )
    >>> tensors = {"W": TensorReport(8.0, 4.0, 0.5, 5.0), "b": TensorReport(6.0, 3.0, 0.5, 5.0)}
    >>> report = ClipReport(**group.to_dict(), step=7, groups={"encoder": group}, tensors=tensors)
    >>> report
    step 7: clipped
      group    norm before  norm after  threshold  scale  state
      encoder           10           5          5    0.5  clipped
      all               10           5          5    0.5  clipped
    >>> print(report.describe_tensors())
      tensor  norm before  norm after  threshold  scale
      W                 8           4          5    0.5
      b                 6           3          5    0.5
    """

    step: int
    groups: dict[str, GroupReport]
    tensors: Mapping[str, TensorReport]

    def _asked(self, name: str) -> Any:
        turn = self._source
        columns = turn.stretch.block.members.columns
        if name in columns:
            return turn.stretch.block.decided(turn, columns[name])
        if name == "step":
            return turn.step
        if name == "clipped" and columns:
            return self.scale < 1.0
        outcome = self._outcome
        if name == "groups":
            return {own.name: GroupReport.of(own) for own in outcome.groups}
        if name == "tensors":
            return TensorReports(outcome.groups)
        return _number(outcome, name)

    @kept
    def _outcome(self) -> Any:
        """The outcome of the groups; not stored in the turn, which lives longer."""
        return self._source.outcome()

    @property
    def state(self) -> str:
        """The gravest state of a group: "not finite", "skipped", "clipped" or "untouched"."""
        return max(
            (group.state for group in self.groups.values()), key=STATES.index, default="untouched"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return plain Python, ready for JSON.

        Returns
        -------
        dict
            The fields by name; "groups" and "tensors" hold a dict for each group and gradient.
            None stands for NaN and Inf.
        """
        nested = {
            "groups": {name: group.to_dict() for name, group in self.groups.items()},
            "tensors": {
                name: {key: as_python(value) for key, value in tensor._asdict().items()}
                for name, tensor in self.tensors.items()
            },
        }
        return {field.name: as_python(getattr(self, field.name)) for field in fields(self)} | nested

    def describe_tensors(self) -> str:
        """Return a table of the gradients, one a row.

        Returns
        -------
        str
            Lines to print.
        """
        header = ("tensor", "norm before", "norm after", "threshold", "scale")
        rows = [(name, *_numbers(tensor)) for name, tensor in self.tensors.items()]
        return table("<>>>>", header, rows)

    def __repr__(self) -> str:
        header = ("group", "norm before", "norm after", "threshold", "scale", "state")
        outcomes: dict[str, Outcome] = {**self.groups, WHOLE: self}
        rows = [(name, *_numbers(outcome), outcome.state) for name, outcome in outcomes.items()]
        return f"step {self.step}: {self.state}\n{table('<>>>><', header, rows)}"


def _numbers(report: TensorReport | Outcome) -> list[str]:
    return [
        cell(value) for value in (report.norm, report.clipped_norm, report.threshold, report.scale)
    ]

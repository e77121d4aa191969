"""The record of many steps of parameter groups."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from numclip.border import arguments
from numclip.dtypes import Array
from numclip.isolation import isolated
from numclip.report import WHOLE, ClipReport, Outcome, as_python, cell, table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# One step of one group. The names, in this order, are also the arrays of a saved history.
ROW = np.dtype(
    [
        ("step", np.int64),
        ("norm", np.float64),
        ("clipped_norm", np.float64),
        ("scale", np.float64),
        ("threshold", np.float64),
        ("clipped", np.bool_),
        ("skipped", np.bool_),
        ("nonfinite", np.bool_),
    ],
    align=True,
)
COLUMNS = ROW.names or ()
BYTES = np.dtype((np.void, ROW.itemsize))  # of which NumPy copies whole rows, ten times as fast
PERCENTILES = {"min": 0, "p5": 5, "p25": 25, "p50": 50, "p75": 75, "p95": 95, "p99": 99, "max": 100}
# The percentiles that a history's table shows.
NORMS = {"median norm": "p50", "95%": "p95", "max": "max"}


class _Ring:
    """The last rows of one group; its memory grows up to the capacity."""

    def __init__(self, capacity: int, rows: Array | None = None) -> None:
        """Start with the last of some rows, oldest first, where they are given."""
        held = np.empty(0, ROW) if rows is None else rows[-capacity:]
        self.capacity, self.total = capacity, held.size
        self.rows = np.zeros(min(capacity, max(held.size, 64)), ROW)
        self.rows[: held.size] = held

    def extend(self, added: Array) -> None:
        """Append rows in place of the oldest, where the ring is full."""
        added = added[-self.capacity :]
        last = self.total + added.size
        if last > self.rows.size and self.rows.size < self.capacity:
            self._grow(last)
        begin = self.total % self.capacity
        first = added[: self.capacity - begin]  # as far as there is room before the oldest
        rows = self.rows.view(BYTES)
        rows[begin : begin + first.size] = first.view(BYTES)
        rows[: added.size - first.size] = added[first.size :].view(BYTES)
        self.total = last

    def _grow(self, size: int) -> None:
        """Allocate memory for at least `size` rows, but for at most the capacity."""
        grown = np.zeros(min(self.capacity, max(2 * self.rows.size, size)), ROW)
        grown[: self.rows.size] = self.rows
        self.rows = grown

    def ordered(self) -> Array:
        """Return a copy of the rows, oldest first."""
        if self.total <= self.capacity:
            return self.rows[: self.total].copy()
        return np.roll(self.rows, -(self.total % self.capacity))


class History:
    """A bounded record of what steps found and did, for each group and for all together.

    Of each step: its number, norm, clipped norm, scale, threshold (NaN for none), and whether
    it was clipped, was skipped, and held NaN or Inf. ``len()`` tells how many steps it holds.

    Parameters
    ----------
    capacity : int, default 10_000
        How many of the last steps are kept, at least 1. A group takes 48 bytes a step, in
        memory that grows as steps are recorded.

    Raises
    ------
    TypeError, ValueError
        Where `capacity` is no such number.

    Examples
    --------
    >>> import numclip as nc
    >>> history = nc.History()
    >>> for step, norm in enumerate([3.0, 20.0]):
    ...     group = nc.GroupReport(
    ...         norm=norm, clipped_norm=min(norm, 5.0), scale=min(1.0, 5.0 / norm),
    ...         clipped=norm > 5.0, skipped=False, threshold=5.0, nonfinite=False,
    ...     )
    ...     history.record(
    ...         nc.ClipReport(**group.to_dict(), step=step, groups={"encoder": group}, tensors={})
    ...     )
    >>> history
    the last 2 steps, of 10,000 at most
      group    clipped  skipped  not finite  median norm    95%  max  threshold
      encoder    50.0%     0.0%        0.0%         11.5  19.15   20          5
      all        50.0%     0.0%        0.0%         11.5  19.15   20          5
    >>> history.summary()["encoder"]["clip_fraction"]
    0.5
    """

    def __init__(self, capacity: int = 10_000) -> None:
        self.capacity = arguments.count("capacity", capacity)
        self._rings: dict[str, _Ring] = {WHOLE: _Ring(self.capacity)}
        self._source: Callable[[], None] | None = None

    def follow(self, source: Callable[[], None] | None) -> None:
        """Let a source tell what it has, see `take`, whenever the record is asked for."""
        self._source = source

    def _caught_up(self) -> dict[str, _Ring]:
        """Return the rings, after the source has added its steps."""
        if self._source is not None:
            self._source()
        return self._rings

    def __getstate__(self) -> dict[str, Any]:
        return {"capacity": self.capacity, "_rings": self._caught_up(), "_source": None}

    @isolated
    def take(self, recorded: Any) -> None:
        """Append many steps, see `numclip.clipping.steps.Recorded`."""
        outcomes = {WHOLE: recorded.outcome, **{own.name: own for own in recorded.outcome.groups}}
        added = []
        for name, own in outcomes.items():
            rows = np.zeros(recorded.steps.size, ROW)
            rows["step"] = recorded.steps
            for column in COLUMNS[1:]:
                rows[column] = getattr(own, column)
            counted = rows if recorded.counts.all() else rows[recorded.counts]
            added.append((self._ring(name), counted))
        for ring, rows in added:  # in no time, for an interrupt before leaves all to be recorded
            ring.extend(rows)

    def _ring(self, name: str) -> _Ring:
        if name not in self._rings:
            self._rings[name] = _Ring(self.capacity)
        return self._rings[name]

    def record(self, report: ClipReport) -> None:
        """Append what a step found and did; where full, the oldest step goes.

        Parameters
        ----------
        report : ClipReport
            What `ParamGroups.clip` returned.

        Raises
        ------
        ValueError
            Where a group is called "all". Nothing is recorded then.
        """
        if WHOLE in report.groups:
            raise ValueError(f"groups: expected names other than {WHOLE!r}, which is all of them")
        self._caught_up()
        self._ring(WHOLE).extend(_row(report.step, report))
        for name, group in report.groups.items():
            self._ring(name).extend(_row(report.step, group))

    def __len__(self) -> int:
        return min(self._caught_up()[WHOLE].total, self.capacity)

    def _ordered(self) -> dict[str, Array]:
        """Return the rows of each group, oldest first, those of all together last."""
        rings = self._caught_up()
        names = [name for name in rings if name != WHOLE]
        return {name: rings[name].ordered() for name in [*names, WHOLE]}

    def summary(self) -> dict[str, dict[str, Any]]:
        """Return figures for each group, and for the whole under "all".

        Returns
        -------
        dict of str to dict
            "steps", how many are held; "clip_fraction", "skip_fraction", "nonfinite_fraction",
            of these; "norm", percentiles of the finite norms before clipping by the names
            "min", "p5", "p25", "p50", "p75", "p95", "p99", "max", NaN where there are none;
            "last_threshold", of the last step that had one, None where none had.
        """
        return {name: _summary(rows) for name, rows in self._ordered().items()}

    def suggest(self, clip_fraction: float = 0.1) -> dict[str, float]:
        """Return the bound on the norm that would have clipped a share of the steps.

        For a run that only measured (``clip=None``), to choose a bound by.

        Parameters
        ----------
        clip_fraction : float, default 0.1
            The share of the steps, in [0, 1].

        Returns
        -------
        dict of str to float
            For each group, and for the whole under "all", the quantile of the finite norms
            before clipping; NaN where there are none.

        Raises
        ------
        TypeError, ValueError
            Where `clip_fraction` is no such number.

        Examples
        --------
        >>> import numpy as np, numclip as nc
        >>> groups = nc.ParamGroups([nc.Group("model", {"w": np.zeros(1)})])  # clip=None
        >>> for norm in range(101):
        ...     groups.set_grads({"w": np.array([norm], float)})
        ...     report = groups.clip()
        >>> groups.history.suggest(0.25)["model"]
        75.0
        """
        share = arguments.real("clip_fraction", clip_fraction)
        if not 0.0 <= share <= 1.0:
            raise ValueError(f"clip_fraction: expected a number in [0, 1], got {clip_fraction}")
        found = {}
        for name, rows in self._ordered().items():
            finite = rows["norm"][np.isfinite(rows["norm"])]
            found[name] = float(np.quantile(finite, 1.0 - share)) if finite.size else math.nan
        return found

    def to_dict(self) -> dict[str, dict[str, list[Any]]]:
        """Return plain Python, ready for JSON.

        Returns
        -------
        dict of str to dict of str to list
            For each group, and for the whole under "all": "step", "norm", "clipped_norm",
            "scale", "threshold", "clipped", "skipped" and "nonfinite", oldest first. None stands
            for NaN and Inf, and for no threshold.
        """
        return {
            name: {column: list(map(as_python, rows[column].tolist())) for column in COLUMNS}
            for name, rows in self._ordered().items()
        }

    def plot(self, path: str | os.PathLike[str] | None = None) -> Figure:
        """Draw the norm before clipping and the threshold over the steps, a panel for each group.

        Clipped, skipped and non-finite steps are marked. Beyond some thousand steps a band shows
        the range of the norm, and a line its median, of neighbouring steps.

        Parameters
        ----------
        path : str or path, optional
            Where to save the picture; the suffix tells the format.

        Returns
        -------
        matplotlib.figure.Figure
            The figure, which pyplot does not know and nothing needs to close.

        Raises
        ------
        ImportError
            Where matplotlib is not installed.
        """
        try:
            from numclip.plotting import draw
        except ModuleNotFoundError as error:
            if (error.name or "").partition(".")[0] != "matplotlib":
                raise
            message = "plot() needs matplotlib: pip install matplotlib"
            raise ImportError(message) from error
        series = self._ordered()
        figure = draw({name: series[name] for name in series if name != WHOLE} or series)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def state_dict(self) -> dict[str, dict[str, Array]]:
        """Return a copy of the record as arrays.

        Returns
        -------
        dict of str to dict of str to array
            As `to_dict`: int64 steps, float64 numbers (NaN for no threshold), bool flags.
        """
        return {
            name: {column: rows[column].copy() for column in COLUMNS}
            for name, rows in self._ordered().items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Array]]) -> None:
        """Replace the record by a saved one, bit for bit.

        Parameters
        ----------
        state : mapping
            What `state_dict` returned. Only read. Where it holds more steps than fit, the last
            are kept.

        Raises
        ------
        ValueError
            Where it is anything else; the message names what. Nothing is changed then.
        """
        if not isinstance(state, Mapping) or WHOLE not in state:
            raise ValueError(f"history: expected a mapping of groups with {WHOLE!r} among them")
        self._caught_up()
        names = [WHOLE, *(name for name in state if name != WHOLE)]
        self._rings = {name: _Ring(self.capacity, _rows(name, state[name])) for name in names}

    def __repr__(self) -> str:
        steps = "1 step" if len(self) == 1 else f"{len(self):,} steps"
        title = f"the last {steps}, of {self.capacity:,} at most"
        header = ("group", "clipped", "skipped", "not finite", *NORMS, "threshold")
        rows = [_summary_cells(name, figures) for name, figures in self.summary().items()]
        return f"{title}\n{table('<>>>>>>>', header, rows)}" if len(self) else "no steps"


def _row(step: int, of: Outcome) -> Array:
    """Return a step as a row."""
    threshold = math.nan if of.threshold is None else of.threshold
    numbers = (step, of.norm, of.clipped_norm, of.scale, threshold)
    return np.array([(*numbers, of.clipped, of.skipped, of.nonfinite)], ROW)


def _rows(name: Any, columns: Any) -> Array:
    """Return a saved record of one group as rows, or say what is wrong with it."""
    where = f"history[{name!r}]"
    if not isinstance(name, str):
        raise ValueError(f"{where}: expected a str, the name of a group")
    if not isinstance(columns, Mapping) or set(columns) != set(COLUMNS):
        got = list(columns) if isinstance(columns, Mapping) else type(columns).__name__
        raise ValueError(f"{where}: expected arrays called {', '.join(COLUMNS)}, got {got}")
    for column in COLUMNS:
        array, wanted = columns[column], f"{where}[{column!r}]: expected"
        if not isinstance(array, np.ndarray) or array.dtype != ROW[column] or array.ndim != 1:
            got = f"{array.ndim}-d {array.dtype}" if isinstance(array, np.ndarray) else repr(array)
            raise ValueError(f"{wanted} a 1-d array of {ROW[column]}, got {got}")
        if array.size != columns["step"].size:
            raise ValueError(f"{wanted} {columns['step'].size} steps, got {array.size}")
        if array.dtype.kind in "if" and (array < 0).any():
            raise ValueError(f"{wanted} numbers >= 0, got {array[array < 0][0]}")
    rows = np.empty(columns["step"].size, ROW)
    for column in COLUMNS:
        rows[column] = columns[column]
    return rows


def _summary(rows: Array) -> dict[str, Any]:
    finite = rows["norm"][np.isfinite(rows["norm"])]
    some = finite if finite.size else np.array([np.nan])
    norms = np.percentile(some, list(PERCENTILES.values()))
    thresholds = rows["threshold"][~np.isnan(rows["threshold"])]
    return {
        "steps": rows.size,
        "clip_fraction": _fraction(rows["clipped"]),
        "skip_fraction": _fraction(rows["skipped"]),
        "nonfinite_fraction": _fraction(rows["nonfinite"]),
        "norm": dict(zip(PERCENTILES, map(float, norms), strict=True)),
        "last_threshold": float(thresholds[-1]) if thresholds.size else None,
    }


def _fraction(flags: Array) -> float:
    return float(flags.mean()) if flags.size else math.nan


def _summary_cells(name: str, figures: Mapping[str, Any]) -> tuple[str, ...]:
    fractions = [figures[f"{flag}_fraction"] for flag in ("clip", "skip", "nonfinite")]
    norms = [figures["norm"][key] for key in NORMS.values()]
    numbers = map(cell, [*norms, figures["last_threshold"]])
    return (name, *(f"{fraction:.1%}" for fraction in fractions), *numbers)

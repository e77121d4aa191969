"""Pictures, by matplotlib's objects alone: nothing global is touched, any backend will do."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from numclip.dtypes import Array

# From Paul Tol's qualitative schemes, which colour-blind readers tell apart.
BLUE, ORANGE, RED, PURPLE = "#4477AA", "#EE7733", "#CC3311", "#AA3377"
GREY, BLACK = "#777777", "#222222"

# Every label, in the legend's order.
LABELS = ("norm", "range of norms", "threshold", "clipped", "norm 0", "skipped", "not finite")

# Beyond a few points for each column of the picture a line hides what it shows: each bin of
# neighbouring steps then takes a column, with the range and the median of its norms.
BINS = 600
LONGEST_LINE = 3 * BINS

# Up to so many steps, each is seen as a dot on the line.
DOTTED = 60

# Marks at the panel's edges, in its own coordinates, where a norm has no place on the axis.
TOP, BOTTOM = 0.95, 0.05

# Norms beyond are drawn at the end: matplotlib's ticks overflow towards the ends of float64.
RANGE = (1e-100, 1e100)


def draw(series: Mapping[str, Array]) -> Figure:
    """Return a figure with a panel for each group; `series` has rows as in `report.ROW`.

    Groups that are clipped by one norm would be the same curve twice: they share a panel.
    """
    series = _together(series)
    panels = len(series)
    figure = Figure(figsize=(8.0, 1.8 * panels + 1.0), layout=ConstrainedLayoutEngine(w_pad=0.1))
    every_axes = figure.subplots(panels, 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, rows) in zip(every_axes, series.items(), strict=True):
        _draw_panel(axes, name, rows)
    steps = np.concatenate([rows["step"] for rows in series.values()])
    if steps.size:
        low, high = float(steps.min()), float(steps.max())
        room = max(0.015 * (high - low), 0.5)
        every_axes[-1].set_xlim(low - room, high + room)
    every_axes[-1].set_xlabel("step")
    every_axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    every_axes[-1].xaxis.set_major_formatter("{x:,.0f}")
    figure.supylabel("norm before clipping", fontsize="medium")
    _draw_legend(figure)
    return figure


def _together(series: Mapping[str, Array]) -> dict[str, Array]:
    """Return the series with one entry, under all their names, for those that look the same."""
    drawn = ("step", "norm", "threshold", "clipped", "skipped", "nonfinite")
    names: dict[bytes, list[str]] = {}
    for name, rows in series.items():
        names.setdefault(b"".join(rows[column].tobytes() for column in drawn), []).append(name)
    return {", ".join(group): series[group[0]] for group in names.values()}


def _draw_legend(figure: Figure) -> None:
    handles = {
        label: handle
        for axes in figure.axes
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    labels = [label for label in LABELS if label in handles]
    if not labels:
        return
    legend = figure.legend(
        [handles[label] for label in labels],
        labels,
        loc="outside upper center",
        ncols=len(labels),
        frameon=False,
        fontsize="small",
        handlelength=1.6,
        columnspacing=1.6,
    )
    for handle in legend.legend_handles:
        if isinstance(handle, Line2D):
            handle.set_markersize(5.0)


def _draw_panel(axes: Axes, name: str, rows: Array) -> None:
    """Draw one group."""
    steps = rows["step"]
    norms, thresholds = _drawable(rows["norm"]), _drawable(rows["threshold"])
    _scale(axes, np.concatenate([norms, thresholds]))
    axes.grid(axis="y", linewidth=0.5, alpha=0.4)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(name, loc="left", fontsize="medium", fontweight="bold", parse_math=False)
    axes.set_title(_caption(rows), loc="right", fontsize="small", color=GREY)
    if steps.size > LONGEST_LINE:
        _draw_bins(axes, steps, norms)
    else:
        dotted = steps.size <= DOTTED
        _draw_line(axes, steps, norms, "o", dotted, color=BLUE, linewidth=0.9, label="norm")
    style: dict[str, Any] = {"color": BLACK, "linewidth": 1.1, "zorder": 5, "label": "threshold"}
    _draw_line(axes, steps, thresholds, "_", **style)
    _draw_drops(axes, steps, norms, thresholds)
    _draw_marks(axes, rows, norms)


def _drawable(values: Array) -> Array:
    """Return values with NaN in place of what a logarithmic axis cannot show."""
    return np.where(np.isfinite(values) & (values > 0.0), np.clip(values, *RANGE), np.nan)


def _scale(axes: Axes, values: Array) -> None:
    """Give the panel a logarithmic axis with room for marks below and above all values."""
    logs = np.log10(values[~np.isnan(values)])
    low, high = (float(logs.min()), float(logs.max())) if logs.size else (0.0, 0.0)
    room = max(0.15 * (high - low), 0.2)
    low, high = low - room, high + room
    axes.set_yscale("log")
    axes.set_ylim(10.0**low, 10.0**high)
    # A label every few steps of the axis, however many decades it spans.
    digits = [1.0] if high - low > 2.5 else [1.0, 2.0, 5.0]
    if high - low < 0.8:
        digits = [1.0, 1.5, 2.0, 3.0, 5.0, 7.0]
    axes.yaxis.set_major_locator(LogLocator(subs=digits))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _caption(rows: Array) -> str:
    if not rows.size:
        return "no steps"
    parts = [f"{rows.size:,} {'step' if rows.size == 1 else 'steps'}"]
    parts.append(f"{rows['clipped'].mean():.1%} clipped")
    flags = {"skipped": rows["skipped"], "not finite": rows["nonfinite"] & ~rows["skipped"]}
    parts += [f"{flag.sum():,} {label}" for label, flag in flags.items() if flag.any()]
    return ", ".join(parts)


def _draw_line(
    axes: Axes, steps: Array, values: Array, marker: str, dotted: bool = False, **style: Any
) -> None:
    """Draw a line with gaps at NaN; mark each value, or those between two gaps alone."""
    known = ~np.isnan(values)
    if not known.any():
        return
    axes.plot(steps, values, **style)
    size = 4.0 if marker == "o" else 10.0
    marked = known if dotted else _alone(known)
    style |= {"linestyle": "none", "label": None, "marker": marker, "markersize": size}
    axes.plot(steps[marked], values[marked], markeredgewidth=1.6, **style)


def _alone(flags: Array) -> Array:
    """Return which flags are set between two that are not."""
    beside = np.concatenate([[False], flags, [False]])
    alone: Array = flags & ~beside[:-2] & ~beside[2:]
    return alone


def _draw_drops(axes: Axes, steps: Array, norms: Array, thresholds: Array) -> None:
    """Join the norms to the thresholds of rules that have one at some steps alone, as ZClip."""
    dropped = _alone(~np.isnan(thresholds)) & (norms > thresholds)
    if dropped.any():
        where = steps[dropped], thresholds[dropped], norms[dropped]
        axes.vlines(*where, color=ORANGE, linewidth=1.6, zorder=3)


def _draw_bins(axes: Axes, steps: Array, norms: Array) -> None:
    """Draw the range and the median of the norms in bins of neighbouring steps."""
    centers = np.array([part.mean() for part in np.array_split(steps, BINS)])
    known = [part[~np.isnan(part)] for part in np.array_split(norms, BINS)]
    quantiles = [np.quantile(p, [0.0, 0.5, 1.0]) if p.size else [np.nan] * 3 for p in known]
    low, middle, high = np.array(quantiles).T
    if not np.isnan(middle).all():
        label = "range of norms"
        axes.fill_between(centers, low, high, color=BLUE, alpha=0.3, linewidth=0.0, label=label)
    # Above the dots of clipped steps, which may cover all of a panel.
    _draw_line(axes, centers, middle, "o", color=BLUE, linewidth=1.2, zorder=4, label="norm")


def _draw_marks(axes: Axes, rows: Array, norms: Array) -> None:
    """Mark the steps at which something happened."""
    steps, norm, clipped, skipped = (rows[c] for c in ("step", "norm", "clipped", "skipped"))
    nonfinite = rows["nonfinite"] & ~skipped
    edge = axes.get_xaxis_transform()
    for label, flags, heights, marker, color, transform in (
        ("clipped", clipped & ~np.isnan(norms), norms, "o", ORANGE, axes.transData),
        ("clipped", clipped & np.isinf(norm) & ~nonfinite, TOP, "o", ORANGE, edge),
        ("norm 0", norm == 0.0, BOTTOM, "v", GREY, edge),
        ("skipped", skipped, TOP, "x", RED, edge),
        ("not finite", nonfinite, TOP, "^", PURPLE, edge),
    ):
        count = np.count_nonzero(flags)
        if count:
            axes.plot(
                steps[flags],
                np.broadcast_to(heights, steps.shape)[flags],
                marker,
                color=color,
                markersize=min(max(55.0 / math.sqrt(count), 1.5), 4.5),  # thousands need less
                transform=transform,
                clip_on=False,
                zorder=3,
                label=label,
            )

"""Draw every peer's time over the limit, as bars."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench import results

# By the first word of a way's name, which is its library.
# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = {
    "numclip": "#0072B2",
    "numclip,": "#56B4E9",
    "NumPy": "#E69F00",
    "SciPy": "#F0E442",
    "torch": "#D55E00",
    "optax": "#009E73",
    "tf": "#CC79A7",
    "tf.function": "#CC79A7",
}
LEGEND = {"numclip,": "numclip, flat buffers", "tf": "TensorFlow"}

EXPLANATION = (
    "1 is the limit: the time in which the memory can be read once, and written once where "
    "something is clipped.\nA bar at 10 takes ten times as long. Shorter is better."
)


def panel(axes: Axes, cases: list[dict[str, Any]], title: str) -> None:
    """Draw a group of bars for each case; a library's second is hatched, a wrong one is pale."""
    for place, case in enumerate(cases):
        ways = [way for way in case["ways"] if way != "limit"]
        width = 0.84 / max(len(ways), 1)
        libraries = [way.split()[0] for way in ways]
        for k, (way, library) in enumerate(zip(ways, libraries, strict=True)):
            axes.bar(
                place + (k + 0.5) * width - 0.42,
                case["ways"][way]["of the limit"],
                width,
                color=COLOURS[library],
                hatch="//" if library in libraries[:k] else None,
                alpha=0.35 if results.is_wrong(case, way) else 1.0,
                edgecolor="white",
                linewidth=0.5,
            )
    names = [textwrap.fill(case["case"], 13) for case in cases]
    axes.set_xticks(range(len(cases)), names)
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel("time, in units of the limit")
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.yaxis.set_major_formatter("{x:g}")


def draw(found: dict[str, Any], path: Path) -> None:
    """Write the picture of all cases."""
    cases = list(found["cases"].values())
    clip = [case for case in cases if "numclip, flat" in case["ways"]]
    panels = {
        "Clipping by the global norm, nothing clipped": [c for c in clip if not c["clips"]],
        "Clipping by the global norm, clipped": [c for c in clip if c["clips"]],
        "Other work, clipped": [c for c in cases if c not in clip and c["clips"]],
    }
    figure = Figure(figsize=(11, 10.5), layout="constrained")
    for axes, (title, chosen) in zip(figure.subplots(3), panels.items(), strict=True):
        panel(axes, chosen, title)
    handles = [
        Patch(color=colour, label=LEGEND.get(library, library))
        for library, colour in COLOURS.items()
        if library != "tf.function"
    ]
    handles += [
        Patch(facecolor="silver", edgecolor="white", hatch="//", label="its second way"),
        Patch(color="silver", alpha=0.35, label="wrong result"),
    ]
    figure.legend(handles=handles, ncols=5, loc="outside upper center", frameon=False)
    figure.supxlabel(EXPLANATION, fontsize=10)
    figure.savefig(path, dpi=110, metadata={"Software": None})

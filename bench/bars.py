"""Draw every peer's time over the limit, as bars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from bench import results

# The first word of a way's name tells the library.
COLOURS = {
    "numclip": "#1b3a6b",
    "numclip,": "#7fa7dc",
    "NumPy": "#e0a526",
    "SciPy": "#a3781a",
    "torch": "#d9532c",
    "optax": "#5b9a57",
    "tf": "#8c6bb1",
    "tf.function": "#8c6bb1",
}
LEGEND = {"numclip,": "numclip, flat buffers", "tf": "TensorFlow"}


def panel(axes: Axes, cases: list[dict[str, Any]], title: str) -> None:
    """Draw a group of bars for each case; the second of a library is hatched, who is wrong pale."""
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
    axes.set_xticks(range(len(cases)), [case["case"] for case in cases])
    axes.set_yscale("log")
    axes.axhline(1.0, color="black", linewidth=1.0)
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_ylabel("time over the limit")
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
    figure.savefig(path, dpi=110, metadata={"Software": None})

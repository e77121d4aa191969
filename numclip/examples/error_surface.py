"""Descend the error surface of a one-unit recurrent network, without and with clipping.

The network of Pascanu, Mikolov and Bengio 2013 (arXiv 1211.5063, figure 6) has one unit, two
parameters and no input: x starts at 0.5, and ``x = w * sigmoid(x) + b`` for 50 steps. The loss is
``(sigmoid(x) - 0.7) ** 2``. Over (w, b) it has a wall: on one side of it x comes to rest at a low
value, on the other at a high one, and the gradient on the wall is many times longer than beside
it. Plain gradient descent slides down to the wall, and one step on it throws it far off. Clipped
to a small norm, the same gradient is a small step in the right direction. Takes a second.

The picture shows the valley along the wall. Steps cross the valley from side to side, so that the
losses jump; the thick lines are their means over 10 steps.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

import numclip as nc
from numclip.examples.command_line import Parser, norm_bound, positive_float, positive_int
from numclip.examples.cross_entropy import Array
from numclip.examples.gru_network import sigmoid

STEPS = 50  # of the network
FIRST, TARGET = 0.5, 0.7
WIDTHS, BIASES = (3.7, 5.1), (-2.6, -1.4)  # of the picture
SMOOTHED = 10  # steps that a loss in the picture is averaged over


def loss_and_gradient(w: Array, b: Array) -> tuple[Array, Array, Array]:
    """Return the loss and its derivatives by w and b, of float64 arrays of one shape."""
    unit = [np.full_like(w, FIRST)]
    for _ in range(STEPS):
        unit.append(w * sigmoid(unit[-1]) + b)
    error = sigmoid(unit[-1]) - TARGET
    by_w, by_b = np.zeros_like(w), np.zeros_like(w)
    by_unit = 2 * error * _slope(unit[-1])
    for x in reversed(unit[:-1]):
        by_w += by_unit * sigmoid(x)
        by_b += by_unit
        by_unit = by_unit * w * _slope(x)
    return error**2, by_w, by_b


def _slope(x: Array) -> Array:
    return sigmoid(x) * (1 - sigmoid(x))


@dataclass(frozen=True)
class Path:
    """The points of gradient descent, with the loss and the gradient's norm at each."""

    points: Array  # (steps + 1, 2)
    losses: Array
    norms: Array

    @property
    def longest(self) -> float:
        """The length of the longest step."""
        return float(np.linalg.norm(np.diff(self.points, axis=0), axis=1).max())


def descend(start: tuple[float, float], rate: float, max_norm: float, steps: int) -> Path:
    """Descend by clipped gradients from a point (w, b)."""
    point = np.array(start)
    points, losses, norms = [point], [], []
    for _ in range(steps + 1):
        loss, *gradient = loss_and_gradient(*point)
        clipped, norm = nc.clip_by_global_norm(gradient, max_norm)
        losses.append(float(loss))
        norms.append(norm)
        point = point - rate * np.array(clipped)
        points.append(point)
    return Path(np.array(points[:-1]), np.array(losses), np.array(norms))


def row(label: str, cells: Sequence[str]) -> str:
    """Return one line of the table."""
    return f"{label:<16}" + "".join(f"{cell:>20}" for cell in cells)


def table(paths: dict[str, Path]) -> str:
    """Return the table of the paths side by side."""
    last = [path.points[-1] for path in paths.values()]
    return "\n".join(
        [
            row("", list(paths)),
            row("First loss", [f"{path.losses[0]:.5f}" for path in paths.values()]),
            row("Last loss", [f"{path.losses[-1]:.5f}" for path in paths.values()]),
            row("Lowest loss", [f"{path.losses.min():.5f}" for path in paths.values()]),
            row("Largest norm", [f"{path.norms.max():.4g}" for path in paths.values()]),
            row("Longest step", [f"{path.longest:.4g}" for path in paths.values()]),
            row("Last (w, b)", [f"({w:.4g}, {b:.4g})" for w, b in last]),
        ]
    )


def draw(paths: dict[str, Path], args: argparse.Namespace) -> None:
    """Draw the surface with both paths, and the losses along each."""
    from matplotlib.figure import Figure

    from numclip.plotting import BLUE, ORANGE

    figure = Figure(figsize=(10, 4.6), layout="constrained")
    mosaic = figure.subplot_mosaic(
        [["surface", "above"], ["surface", "below"]], width_ratios=(1.3, 1)
    )
    surface, above, below = mosaic["surface"], mosaic["above"], mosaic["below"]
    above.sharex(below)
    above.sharey(below)
    w, b = np.meshgrid(np.linspace(*WIDTHS, 400), np.linspace(*BIASES, 400))
    loss, _, _ = loss_and_gradient(w, b)
    shades = surface.pcolormesh(w, b, np.sqrt(loss), cmap="Greys", alpha=0.8, rasterized=True)
    figure.colorbar(shades, ax=surface, label="square root of the loss")
    looks = zip(paths.items(), (above, below), (ORANGE, BLUE), "so", strict=True)
    for (name, path), axes, color, marker in looks:
        line = marker + "-"
        surface.plot(*path.points.T, line, color=color, linewidth=1.2, markersize=4, label=name)
        _mark_end(surface, path, color)
        axes.plot(path.losses, color=color, linewidth=0.8, alpha=0.45)
        count = min(SMOOTHED, len(path.losses))
        means = np.convolve(path.losses, np.full(count, 1 / count), "valid")
        axes.plot(np.arange(count - 1, len(path.losses)), means, color=color, linewidth=2)
        axes.set_title(name, loc="left", fontsize="medium", color=color)
        axes.set(ylabel="loss", yscale="log")
        axes.grid(alpha=0.3)
    surface.plot(*args.start, "*", color="black", markersize=11, label="start")
    surface.set(xlim=WIDTHS, ylim=BIASES, xlabel="w", ylabel="b")
    surface.legend(loc="lower left")
    below.set_xlabel("step")
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


def _mark_end(surface: Any, path: Path, color: str) -> None:
    """Annotate the end of a path, if it lies outside the picture."""
    w, b = path.points[-1]
    if not (WIDTHS[0] <= w <= WIDTHS[1] and BIASES[0] <= b <= BIASES[1]):
        inside = [min(max(w, WIDTHS[0]), WIDTHS[1]), min(max(b, BIASES[0]), BIASES[1])]
        text = f"thrown off, to ({w:.3g}, {b:.3g})"
        surface.annotate(
            text, inside, (-8, -22), textcoords="offset points", ha="right", color=color
        )


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("error_surface", __doc__)
    option = parser.add_argument
    default = "default: %(default)s"
    option("--start", type=float, nargs=2, default=(5.0, -2.0), metavar=("W", "B"), help=default)
    option("--steps", type=positive_int, default=100, metavar="N", help=default)
    option("--learning-rate", type=positive_float, default=1.0, metavar="X", help=default)
    option("--max-norm", type=norm_bound, default=0.1, metavar="X", help=default)
    parser.add_picture("error_surface.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    parser.require(*(["matplotlib"] if args.picture else []))
    if not all(map(math.isfinite, args.start)):
        parser.error(f"argument --start: expected finite numbers, got {args.start}")
    names = {"without clipping": math.inf, f"clipped at {args.max_norm:g}": args.max_norm}
    paths = {
        name: descend(args.start, args.learning_rate, bound, args.steps)
        for name, bound in names.items()
    }
    print(table(paths))
    if args.picture:
        draw(paths, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Watch gradients explode: train a GRU on English twice, without and with clipping.

The network reads a text character by character and learns to tell the next one. Each step takes
one paragraph, propagates the error back through all its characters, and descends by the gradient
of their summed cost. Both runs start from the same parameters and read the same text in its order.

Without clipping the cost falls for more than a thousand paragraphs. Then come some of the longest,
whose gradients are many times as long as usual: a step throws the parameters far away, where
gradients are longer still, and the network does not recover. With clipping (the L2 norm of all
gradients against a threshold; above it, they are scaled by threshold / norm, as in Pascanu, Mikolov
and Bengio 2013, arXiv 1211.5063) such a step is as long as many others, and the cost keeps falling.

A run that has blown up goes on for 300 paragraphs, to be seen, and ends there: its columns of the
table end, too. Takes a minute; with --paragraphs 8000, three, and ends at a cost of 1.3.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import numclip as nc
from numclip.examples import gru_network
from numclip.examples.command_line import (
    Parser,
    norm_bound,
    positive_float,
    positive_int,
    whole_number,
)
from numclip.examples.corpus import MANUAL, Numbers, read_paragraphs
from numclip.examples.cross_entropy import Array
from numclip.examples.data import DataError
from numclip.examples.progress import interruptible, progress_bar, say

WINDOW = 100  # paragraphs over which the cost is averaged, to compare it with its lowest so far
BLOWN_UP = 10.0  # times the lowest average cost
AFTERMATH = 300  # paragraphs that a run goes on after it has blown up
LONGEST = 20_000  # characters of a paragraph, whose states are all in memory at once
ROWS = 20  # of the table
DRAWN = 25  # paragraphs per point of the picture


class Text:
    """Paragraphs as arrays of numbers, one for each character."""

    def __init__(self, name: str, paragraphs: Sequence[str]) -> None:
        long_enough = [paragraph for paragraph in paragraphs if len(paragraph) > 1]
        if not long_enough:
            raise DataError(f"{name}: expected a paragraph of 2 characters or more, found none")
        longest = max(map(len, long_enough))
        if longest > LONGEST:
            raise DataError(
                f"{name}: expected paragraphs of at most {LONGEST:,} characters, with blank lines "
                f"in between, got one of {longest:,}"
            )
        self.name = name
        self.characters = sorted(set("".join(long_enough)))
        numbers = {character: k for k, character in enumerate(self.characters)}
        self.paragraphs = [np.array([numbers[c] for c in text]) for text in long_enough]

    def __str__(self) -> str:
        length = sum(map(len, self.paragraphs))
        return (
            f"{self.name}: {len(self.paragraphs):,} paragraphs, {length:,} characters, "
            f"{len(self.characters)} different ones"
        )

    def log_frequencies(self) -> Array:
        """Return the logarithm of each character's share of the text."""
        counts = np.bincount(np.concatenate(self.paragraphs))
        logarithms: Array = np.log(counts / counts.sum())
        return logarithms


class Run:
    """A training run with its own parameters and its own bound on the norm."""

    def __init__(self, text: Text, args: argparse.Namespace, max_norm: float) -> None:
        rng = np.random.default_rng(args.seed)
        size = len(text.characters)
        params = gru_network.initial_params(rng, size, args.hidden, size)
        params["out_weight"][...] = 0.0  # at first it predicts the frequencies of characters
        params["out_bias"][...] = text.log_frequencies()
        model = nc.Group("model", params, clip=nc.ByGlobalNorm(max_norm))
        self.groups = nc.ParamGroups([model], history=args.paragraphs)
        self.optimizer = nc.SGD(self.groups, lr=args.learning_rate)
        self.start = np.zeros((1, args.hidden), np.float32)
        self.costs: list[float] = []  # per character
        self.lowest = math.inf
        self.blown_up: int | None = None
        self.shown: list[float] = []  # the costs in the table

    def step(self, x: Array, targets: Numbers) -> None:
        """Learn from one paragraph."""
        cost, gradients, _ = gru_network.cost_and_gradients(
            self.groups.params, x, targets, self.start, scale=len(targets)
        )
        self.groups.set_grads(gradients)
        self.optimizer.step()
        self.costs.append(cost)
        recent = float(np.mean(self.costs[-WINDOW:]))
        if len(self.costs) >= WINDOW:
            self.lowest = min(self.lowest, recent)
        if self.blown_up is None and not recent < BLOWN_UP * self.lowest:
            self.blown_up = len(self.costs)

    @property
    def finished(self) -> bool:
        """Whether the run has ended: `AFTERMATH` after blowing up, or at a non-finite cost."""
        ended = self.blown_up is not None and len(self.costs) >= self.blown_up + AFTERMATH
        return ended or not all(map(math.isfinite, self.costs[-1:]))

    @property
    def norms(self) -> Array:
        """The gradients' norms before clipping."""
        norms: Array = self.groups.history.state_dict()["model"]["norm"]
        return norms

    def cells(self, since: int) -> str:
        """Return table cells: mean cost and largest norm since a paragraph. Note the cost."""
        if len(self.costs) <= since:
            return f"{'-':>10}{'-':>14}"
        self.shown.append(float(np.mean(self.costs[since:])))
        return f"{self.shown[-1]:#10.4g}{np.max(self.norms[since:]):14.4g}"


def train(text: Text, args: argparse.Namespace) -> tuple[dict[str, Run], bool]:
    """Train without and with clipping side by side; return (runs, not interrupted)."""
    from threadpoolctl import threadpool_limits

    runs = {
        "without clipping": Run(text, args, math.inf),
        f"clipped at {args.max_norm:g}": Run(text, args, args.max_norm),
    }
    one_hot = np.eye(len(text.characters), dtype=np.float32)
    rows = {args.paragraphs * k // ROWS for k in range(ROWS + 1)}
    printed = done = 0
    print(text)
    print(" " * 10 + "".join(f"{name:>24}" for name in runs))
    print("paragraph " + "      cost  largest norm" * 2, flush=True)
    with (
        progress_bar(args.paragraphs, "paragraph", quiet=args.quiet) as bar,
        interruptible() as stopped,
        # Two threads gain 5 % on products this small, and take ten times as long on a busy machine.
        threadpool_limits(1),
        np.errstate(over="ignore", invalid="ignore"),  # this is what the example shows
    ):
        going = True
        while going:
            paragraph = text.paragraphs[done % len(text.paragraphs)]
            x, targets = one_hot[paragraph[:-1], np.newaxis], paragraph[1:, np.newaxis]
            for run in runs.values():
                if not run.finished:
                    run.step(x, targets)
            done += 1
            bar.update()
            going = done < args.paragraphs and not stopped()
            if done in rows or not going:
                say(bar, f"{done:9,} " + "".join(run.cells(printed) for run in runs.values()))
                printed = done
    return runs, done == args.paragraphs


def summary(name: str, run: Run) -> str:
    """Return a one-line summary of a run, with costs that the table has."""
    figures = run.groups.history.summary()["model"]
    costs = f"cost {run.shown[-1]:#.4g} in its last row"
    if run.blown_up is None:
        clipped = f"{figures['clip_fraction']:.1%} of the steps clipped"
        return f"{name}: {costs}, median norm {figures['norm']['p50']:.3g}, {clipped}"
    ended = f"blown up at paragraph {run.blown_up:,}, ended at {len(run.costs):,}"
    return f"{name}: {ended}, {costs}, {min(run.shown):#.4g} in its lowest"


def draw(runs: dict[str, Run], args: argparse.Namespace) -> None:
    """Draw the costs and the norms of both runs, one above the other."""
    from matplotlib.figure import Figure

    from numclip.plotting import BLACK, BLUE, RED

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True)
    for (name, run), color in zip(runs.items(), (RED, BLUE), strict=True):
        count = int(np.isfinite(run.costs).sum())  # a non-finite cost ends the run
        width = min(DRAWN, count)
        ends = np.arange(width, count + 1)
        recent = np.lib.stride_tricks.sliding_window_view
        costs, norms = recent(run.costs[:count], width), recent(run.norms[:count], width)
        above.plot(ends, costs.mean(axis=1), color=color, label=name)
        below.plot(ends, norms.max(axis=1), color=color, label=name)
    below.axhline(args.max_norm, color=BLACK, linewidth=1, label="threshold")
    above.set_ylabel(f"cost per character, mean of {DRAWN}")
    below.set_ylabel(f"largest norm of {DRAWN}, before clipping")
    below.set_xlabel("paragraph")
    for axes in (above, below):
        axes.set_yscale("log")
        axes.legend(loc="upper right")
        axes.grid(alpha=0.3)
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("gru", __doc__)
    option = parser.add_argument
    default = "default: %(default)s"
    option(
        "--paragraphs",
        type=positive_int,
        default=2500,
        metavar="N",
        help="how many to read; some 50 take a second (default: %(default)s)",
    )
    option("--hidden", type=positive_int, default=128, metavar="N", help=default)
    option("--learning-rate", type=positive_float, default=0.005, metavar="X", help=default)
    option(
        "--max-norm",
        type=norm_bound,
        default=100.0,
        metavar="X",
        help="threshold of the second run (default: %(default)s, a usual norm)",
    )
    option("--seed", type=whole_number, default=0, metavar="N", help=default)
    option(
        "--text",
        type=Path,
        metavar="FILE",
        help="a text whose paragraphs blank lines set apart (default: Python's manual)",
    )
    parser.add_picture("gru.png")
    option("--quiet", action="store_true", help="show no progress bar; none is shown in a log")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    parser.require("threadpoolctl", "tqdm", *(["matplotlib"] if args.picture else []))
    try:
        text = Text(str(args.text or MANUAL), read_paragraphs(args.text))
    except DataError as error:
        parser.error(str(error))
    runs, complete = train(text, args)
    for name, run in runs.items():
        print(summary(name, run))
    if args.picture:
        draw(runs, args)
    if not complete:
        print("interrupted", file=sys.stderr)
    return 0 if complete else 130


if __name__ == "__main__":
    sys.exit(main())

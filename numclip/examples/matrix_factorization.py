"""Learn a recommender inside compiled code, without and with clipping.

Users' ratings of items are made by a known model of low rank, with a little noise; a few are wild,
as real ratings are (a slip of the finger, a unit mistaken). Stochastic gradient descent goes
through them one by one: the error of a rating times the item's factors is the gradient of the
user's factors, and the other way round. One wild rating makes a gradient twenty times too long,
which throws both off, and their next ratings throw others off. Clipped, it is a step like any
other. The whole training is compiled by numba, and the clip is called from within it.

On one core a run takes some seconds, most of which numba compiles.
"""

import argparse
import math
import sys
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numba import njit

import numclip as nc
from numclip.examples.command_line import (
    Parser,
    fraction,
    norm_bound,
    positive_float,
    positive_int,
    whole_number,
)
from numclip.examples.cross_entropy import Array

NOISE = 0.1
WILD = 20.0  # times as large as other ratings


class Ratings(NamedTuple):
    """The user, item and value of each rating, and its value without noise and slips."""

    users: Array
    items: Array
    values: Array
    truth: Array


def make_ratings(args: argparse.Namespace) -> Ratings:
    """Return ratings in random order, some of them wild."""
    rng = np.random.default_rng(args.seed)
    users = rng.integers(0, args.users, args.ratings)
    items = rng.integers(0, args.items, args.ratings)
    left = rng.standard_normal((args.users, args.rank))
    right = rng.standard_normal((args.items, args.rank)) / math.sqrt(args.rank)
    truth = np.sum(left[users] * right[items], axis=1)
    values = truth + NOISE * rng.standard_normal(args.ratings)
    wild = rng.random(args.ratings) < args.wild
    values[wild] *= WILD
    return Ratings(users, items, values.astype(np.float32), truth.astype(np.float32))


@njit
def train_epoch(left, right, ratings, rate, max_norm):  # type: ignore[no-untyped-def]
    """Go once through the ratings; return how many gradients were clipped."""
    by_user = np.empty(left.shape[1], left.dtype)
    by_item = np.empty(left.shape[1], left.dtype)
    grads = (by_user, by_item)
    clipped = 0
    for k in range(ratings.values.size):
        user, item = left[ratings.users[k]], right[ratings.items[k]]
        predicted = np.float32(0.0)
        for j in range(user.size):
            predicted += user[j] * item[j]
        error = predicted - ratings.values[k]
        for j in range(user.size):
            by_user[j] = error * item[j]
            by_item[j] = error * user[j]
        _, norm = nc.clip_by_global_norm(grads, max_norm, out=grads)
        clipped += norm > max_norm
        for j in range(user.size):
            user[j] -= rate * by_user[j]
            item[j] -= rate * by_item[j]
    return clipped


@njit
def error_of(left, right, ratings):  # type: ignore[no-untyped-def]
    """Return the root mean square error against the ratings without noise and slips."""
    total = 0.0
    for k in range(ratings.truth.size):
        user, item = left[ratings.users[k]], right[ratings.items[k]]
        predicted = 0.0
        for j in range(user.size):
            predicted += user[j] * item[j]
        total += (predicted - ratings.truth[k]) ** 2
    return math.sqrt(total / ratings.truth.size)


@njit
def train_epochs(left, right, ratings, rate, max_norm, epochs):  # type: ignore[no-untyped-def]
    """Train `epochs` times; return the error before and after each epoch, and the clips."""
    errors = np.empty(epochs + 1)
    errors[0] = error_of(left, right, ratings)
    clipped = 0
    for k in range(epochs):
        clipped += train_epoch(left, right, ratings, rate, max_norm)
        errors[k + 1] = error_of(left, right, ratings)
    return errors, clipped


class Run(NamedTuple):
    """The error before and after each epoch, and the part of the gradients that was clipped."""

    errors: Array
    clipped: float


def train(ratings: Ratings, args: argparse.Namespace, max_norm: float) -> Run:
    """Train both factors from small random numbers."""
    rng = np.random.default_rng(args.seed + 1)
    left = (0.3 * rng.standard_normal((args.users, args.rank))).astype(np.float32)
    right = (0.3 * rng.standard_normal((args.items, args.rank))).astype(np.float32)
    rate = np.float32(args.learning_rate)
    errors, clipped = train_epochs(left, right, ratings, rate, max_norm, args.epochs)
    return Run(errors, clipped / (args.epochs * args.ratings))


def row(label: str, cells: Sequence[str]) -> str:
    """Return one line of the table."""
    return f"{label:<24}" + "".join(f"{cell:>20}" for cell in cells)


def table(runs: dict[str, Run]) -> str:
    """Return the table of the runs side by side."""
    return "\n".join(
        [
            row("", list(runs)),
            row("First error (RMSE)", [f"{run.errors[0]:.4g}" for run in runs.values()]),
            row("Last error (RMSE)", [f"{run.errors[-1]:.4g}" for run in runs.values()]),
            row("Gradients clipped", [f"{run.clipped:.2%}" for run in runs.values()]),
        ]
    )


def draw(runs: dict[str, Run], args: argparse.Namespace) -> None:
    """Draw the error after each epoch."""
    from matplotlib.figure import Figure

    from numclip.plotting import BLUE, RED

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for (name, run), color in zip(runs.items(), (RED, BLUE), strict=True):
        axes.plot(run.errors, ".-", color=color, label=name)
    axes.set(xlabel="epoch", ylabel="root mean square error", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("matrix_factorization", __doc__)
    option = parser.add_argument
    default = "default: %(default)s"
    option("--users", type=positive_int, default=2000, metavar="N", help=default)
    option("--items", type=positive_int, default=1000, metavar="N", help=default)
    option("--ratings", type=positive_int, default=200_000, metavar="N", help=default)
    option("--rank", type=positive_int, default=8, metavar="N", help=default)
    text = "part of the ratings that are wild (default: %(default)s)"
    option("--wild", type=fraction, default=0.001, metavar="X", help=text)
    option("--epochs", type=positive_int, default=20, metavar="N", help=default)
    option("--learning-rate", type=positive_float, default=0.02, metavar="X", help=default)
    option("--max-norm", type=norm_bound, default=2.0, metavar="X", help=default)
    option("--seed", type=whole_number, default=0, metavar="N", help=default)
    parser.add_picture("matrix_factorization.png")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    parser.require(*(["matplotlib"] if args.picture else []))
    ratings = make_ratings(args)
    names = {"without clipping": math.inf, f"clipped at {args.max_norm:g}": args.max_norm}
    runs = {name: train(ratings, args, bound) for name, bound in names.items()}
    print(table(runs))
    if args.picture:
        draw(runs, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

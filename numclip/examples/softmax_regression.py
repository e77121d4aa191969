"""Train softmax regression on handwritten digits in three ways, and print the costs.

The ways differ in where the gradient comes from and in who applies it:

optimizer  an optimizer's compute_gradients, clip_by_global_norm, apply_gradients
gradients  automatic differentiation; the parameters are assigned by hand
formula    the gradient worked out by hand: without a bias, and summed over the batch
           where the others take the mean, so its steps are longer

Training starts from zeros and takes the examples in file order; those that do not fill
a last batch are left out. An epoch's cost is the mean over its batches, each measured
before its step.

The sum's gradient is a hundred times as long as the mean's, and a learning rate that suits
one does not suit the other. Clipped at a norm of 0.5, all ways take steps of one length and
end at one cost; with --clip-norm inf they part. Takes a few seconds.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

import numclip as nc
from numclip.examples.command_line import Parser, norm_bound, positive_float, positive_int
from numclip.examples.data import CLASSES, DataError, Digits, Images, load_digits, load_mnist
from numclip.examples.progress import progress_bar, say

# autograd, matplotlib and tqdm are imported where they are used: without them --help works, and a
# run says what to install.

Array = npt.NDArray[np.floating[Any]]
Loss = Callable[[list[Array], Array, Array], float]


def log_softmax(logits: Array) -> Array:
    """Return the logarithm of each row's softmax; autograd can differentiate it."""
    import autograd.numpy as anp

    shifted = logits - anp.max(logits, axis=1, keepdims=True)  # exp cannot overflow
    result: Array = shifted - anp.log(anp.sum(anp.exp(shifted), axis=1, keepdims=True))
    return result


def average_cost(params: list[Array], x: Array, y: Array) -> float:
    """Return the cross entropy of ``softmax(x @ weights + bias)`` and the one-hot ``y``."""
    import autograd.numpy as anp

    weights, bias = params
    cost: float = -anp.mean(anp.sum(y * log_softmax(x @ weights + bias), axis=1))
    return cost


def automatic_gradients(
    loss: Loss, variables: list[Array], x: Array, y: Array
) -> tuple[float, list[Array]]:
    """Return the loss and its gradients by the variables, by automatic differentiation."""
    from autograd import value_and_grad

    cost, grads = value_and_grad(loss)(variables, x, y)
    return float(cost), grads


def formula_gradient(weights: Array, x: Array, y: Array) -> tuple[float, Array]:
    """Return the average cost without a bias, and the gradient of the batch's total cost."""
    log_probabilities = log_softmax(x @ weights)
    cost = -np.mean(np.sum(y * log_probabilities, axis=1))
    return float(cost), x.T @ (np.exp(log_probabilities) - y)


class GradientDescentOptimizer:
    """Gradient descent in two halves, so that gradients can be changed in between."""

    def __init__(self, learning_rate: float) -> None:
        self.learning_rate = learning_rate

    def compute_gradients(
        self, loss: Loss, variables: list[Array], x: Array, y: Array
    ) -> tuple[float, list[tuple[Array, Array]]]:
        """Return the loss, and a pair (gradient, variable) for each of ``variables``."""
        cost, grads = automatic_gradients(loss, variables, x, y)
        return cost, list(zip(grads, variables, strict=True))

    def apply_gradients(self, grads_and_variables: Iterable[tuple[Array, Array]]) -> None:
        """Take one step downhill: the variables change in place."""
        for grad, variable in grads_and_variables:
            variable -= self.learning_rate * grad


@dataclass
class Run:
    """One training run: its settings, its parameters, the norms of its gradients, its costs."""

    learning_rate: float
    clip_norm: float
    weights: Array
    bias: Array
    norms: list[float] = field(default_factory=list)  # of each step, before clipping
    costs: list[float] = field(default_factory=list)  # of each epoch

    def clip(self, grads: list[Array]) -> list[Array]:
        """Clip gradients by their global norm, and note the norm they had."""
        clipped: list[Array]
        clipped, norm = nc.clip_by_global_norm(grads, self.clip_norm)
        self.norms.append(norm)
        return clipped

    def accuracy(self, images: Images) -> float:
        """Return the fraction of ``images`` that are classified right."""
        guesses = np.argmax(images.pixels @ self.weights + self.bias, axis=1)
        return float(np.mean(guesses == images.labels))


def optimizer_step(run: Run, x: Array, y: Array) -> float:
    """Let the optimizer compute and apply the gradients, and clip them in between."""
    optimizer = GradientDescentOptimizer(run.learning_rate)
    cost, grads_and_variables = optimizer.compute_gradients(
        average_cost, [run.weights, run.bias], x, y
    )
    grads, variables = zip(*grads_and_variables, strict=True)
    optimizer.apply_gradients(zip(run.clip(list(grads)), variables, strict=True))
    return cost


def gradients_step(run: Run, x: Array, y: Array) -> float:
    """Differentiate the cost automatically, and assign the parameters by hand."""
    cost, grads = automatic_gradients(average_cost, [run.weights, run.bias], x, y)
    weights_grad, bias_grad = run.clip(grads)
    run.weights = run.weights - run.learning_rate * weights_grad
    run.bias = run.bias - run.learning_rate * bias_grad
    return cost


def formula_step(run: Run, x: Array, y: Array) -> float:
    """Use the formula for the gradient of the weights; the bias stays zero."""
    cost, grad = formula_gradient(run.weights, x, y)
    (weights_grad,) = run.clip([grad])
    run.weights = run.weights - run.learning_rate * weights_grad
    return cost


METHODS: dict[str, Callable[[Run, Array, Array], float]] = {
    "optimizer": optimizer_step,
    "gradients": gradients_step,
    "formula": formula_step,
}


def row(label: str, cells: Iterable[str]) -> str:
    """Return one line of the table."""
    return f"{label:<14}" + "".join(f" {cell:>14}" for cell in cells)


def train(digits: Digits, args: argparse.Namespace) -> dict[str, Run]:
    """Train with every method side by side, and print a row as soon as it is known."""
    pixels = digits.training.pixels.shape[1]
    runs = {
        method: Run(
            learning_rate=args.learning_rate,
            clip_norm=args.clip_norm,
            weights=np.zeros((pixels, CLASSES), dtype=np.float32),
            bias=np.zeros(CLASSES, dtype=np.float32),
        )
        for method in args.methods
    }
    examples = len(digits.training.labels)
    steps = examples // args.batch_size
    print(f"{digits.name}: {examples} to train, {len(digits.test.labels)} to test")
    print(row("Cost in epoch", runs), flush=True)
    with progress_bar(args.epochs * steps * len(runs), "step", quiet=args.quiet) as bar:
        for epoch in range(1, args.epochs + 1):
            costs = dict.fromkeys(runs, 0.0)
            for x, y in digits.training.batches(args.batch_size):
                for method, run in runs.items():
                    costs[method] += METHODS[method](run, x, y) / steps
                    bar.update()
            say(bar, row(f"{epoch:04d}", (f"{cost:.9f}" for cost in costs.values())))
            for method, run in runs.items():
                run.costs.append(costs[method])
    print(row("Accuracy", (f"{run.accuracy(digits.test):.4f}" for run in runs.values())))
    for line in clipping_statistics(list(runs.values())):
        print(line)
    return runs


def clipping_statistics(runs: Sequence[Run]) -> Iterator[str]:
    """Yield table rows: the gradients' norms, the clipped steps and the least factors."""
    for label, percent in (("Median norm", 50), ("95% norm", 95), ("Largest norm", 100)):
        yield row(label, (f"{np.percentile(run.norms, percent):.6g}" for run in runs))
    clipped = (sum(norm > run.clip_norm for norm in run.norms) for run in runs)
    yield row("Clipped steps", (f"{n} of {len(runs[0].norms)}" for n in clipped))
    largest = (max(run.norms) for run in runs)
    factors = (
        min(1.0, run.clip_norm / norm) if norm else 1.0
        for run, norm in zip(runs, largest, strict=True)
    )
    yield row("Least factor", (f"{factor:.6g}" for factor in factors))


def draw(runs: dict[str, Run], args: argparse.Namespace) -> None:
    """Draw each method's cost over the epochs."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from numclip.plotting import BLUE, ORANGE, PURPLE

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    # The first two methods have the same costs: the second line is drawn within the first.
    looks = zip((BLUE, ORANGE, PURPLE), (5.0, 1.5, 1.5), strict=True)
    for (method, run), (color, width) in zip(runs.items(), looks, strict=False):
        epochs = range(1, len(run.costs) + 1)
        axes.plot(epochs, run.costs, ".-", color=color, linewidth=width, label=method)
    axes.set(xlabel="epoch", ylabel="average cost")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(args.picture, dpi=100)
    print(f"picture: {args.picture}")


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("softmax_regression", __doc__)
    option = parser.add_argument
    default = "default: %(default)s"
    option("--epochs", type=positive_int, default=10, metavar="N", help=default)
    option("--batch-size", type=positive_int, default=100, metavar="N", help=default)
    option("--learning-rate", type=positive_float, default=0.01, metavar="X", help=default)
    option(
        "--clip-norm",
        type=norm_bound,
        default=0.5,
        metavar="X",
        help="bound on the gradients' global norm; inf measures it and clips nothing "
        "(default: %(default)s)",
    )
    option(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        metavar="METHOD",
        help=f"any of {', '.join(METHODS)} (default: all)",
    )
    option(
        "--mnist",
        type=Path,
        metavar="DIR",
        help="folder with MNIST's four IDX files, plain or .gz (default: scikit-learn's digits)",
    )
    parser.add_picture("softmax_regression.png")
    option("--quiet", action="store_true", help="show no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    args.methods = list(dict.fromkeys(args.methods))
    optional = {"sklearn": not args.mnist, "matplotlib": args.picture}
    parser.require("autograd", "tqdm", *(name for name, wanted in optional.items() if wanted))
    try:
        digits = load_mnist(args.mnist) if args.mnist else load_digits()
        examples = len(digits.training.labels)
        if args.batch_size > examples:
            raise DataError(f"--batch-size: expected at most {examples}, got {args.batch_size}")
        runs = train(digits, args)
    except DataError as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    if args.picture:
        draw(runs, args)
    return 0


if __name__ == "__main__":
    sys.exit(main())

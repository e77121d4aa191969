"""Train the LSTM language model of Zaremba et al. 2014 (arXiv 1409.2329), word by word.

The configurations and the course of training are those of TensorFlow's ptb_word_lm.py: gradient
descent, the gradients clipped by their global norm, at a rate that falls from some epoch on. The
state is carried from batch to batch. The cost is summed over the steps and averaged over the batch.

Without --data-path the text is Python's own manual, of which the Penn Treebank has fifteen times
as much: the model soon knows it by heart.

The picture has the norms of the last 10,000 steps before clipping, and the threshold. The groups of
parameters share one norm, and so one panel. With --duplicates raw there is no picture.

On two idle cores the configuration small reads 8,000 words a second or more: an epoch of the manual
takes 8 seconds and all 13 take two minutes; an epoch of the Penn Treebank takes two minutes. A word
takes medium 5 times as many multiplications, and large 20 times. Ctrl-C ends with the table so far.

``mpiexec -n 4 python -m mpi4py -m numclip.examples.ptb --data-parallel`` trains the same model by
four processes, to rounding. Each runs over a quarter of every batch's sequences; they add up their
gradients, and clip and descend by the same. A checkpoint goes on with any number of processes.
"""

import argparse
import math
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import numclip as nc
from numclip import state
from numclip.examples import lstm_network
from numclip.examples.command_line import Parser, output_file, positive_int, whole_number
from numclip.examples.corpus import Words, read_words
from numclip.examples.cross_entropy import Array
from numclip.examples.data import DataError
from numclip.examples.data_parallel import Ranks, all_ranks, refuse_unequal_shares
from numclip.examples.progress import interruptible, progress_bar, say
from numclip.examples.windows import Windows, cut

FIRST_LOSS_SCALE = 2.0**15  # of --use-fp16; halved whenever a gradient overflows
LINES_AN_EPOCH = 10


@dataclass(frozen=True)
class Config:
    """The sizes of a model and the course of its training, by the original's names."""

    init_scale: float
    learning_rate: float
    max_grad_norm: float
    num_layers: int
    num_steps: int
    hidden_size: int
    max_epoch: int  # the last one at the full rate
    max_max_epoch: int
    keep_prob: float
    lr_decay: float
    batch_size: int = 20
    vocab_size: int = 10_000

    def rate(self, epoch: int) -> float:
        """Return the learning rate of an epoch, the first being 1."""
        return self.learning_rate * self.lr_decay ** max(epoch - self.max_epoch, 0)


CONFIGS = {
    "small": Config(0.1, 1.0, 5, 2, 20, 200, 4, 13, 1.0, 0.5),
    "medium": Config(0.05, 1.0, 5, 2, 35, 650, 6, 39, 0.5, 0.8),
    "large": Config(0.04, 1.0, 10, 2, 35, 1500, 14, 55, 0.35, 1 / 1.15),
    "test": Config(0.1, 1.0, 1, 1, 2, 2, 1, 1, 1.0, 0.5),
}
# Perplexities on the Penn Treebank, as the original prints them: train, valid, test.
PUBLISHED = {
    "small": (37.99, 121.39, 115.91),
    "medium": (48.45, 86.16, 82.07),
    "large": (37.87, 82.62, 78.29),
}


@dataclass(frozen=True)
class Texts:
    """The windows of the three parts of a text; those of the test part hold one word each."""

    training: Windows
    validation: Windows
    test: Windows


def cut_texts(words: Words, config: Config) -> Texts:
    """Return the windows; raise DataError if a part of the text is too short for one."""
    sizes = config.batch_size, config.num_steps
    return Texts(
        cut(f"{words.name}, training part", words.training, *sizes),
        cut(f"{words.name}, validation part", words.validation, *sizes),
        cut(f"{words.name}, test part", words.test, 1, 1),
    )


def perplexity_of(cost: float, words: int) -> float:
    """Return the perplexity of words whose cross entropies add up to a cost."""
    return math.exp(min(cost / words, 700.0))  # e to the 710 overflows


class Training(state.Saved):
    """The training of a model; saved and loaded, it goes on with the same bits."""

    def __init__(self, texts: Texts, args: argparse.Namespace, ranks: Ranks | None = None) -> None:
        config = self.config = CONFIGS[args.config]
        self.ranks = ranks or Ranks()
        self.texts, self.args = texts, args
        self.rng = np.random.default_rng(args.seed)
        params = lstm_network.initial_params(
            self.rng, config.vocab_size, config.hidden_size, config.num_layers, config.init_scale
        )
        self.rnn_state = lstm_network.initial_state(params, config.batch_size)
        if args.use_fp16:
            params = {name: param.astype(np.float16) for name, param in params.items()}
        # Both groups are clipped by one norm, and skipped together. No rule has a norm of unsummed
        # repeated rows: with --duplicates raw `update` clips by it, and the rule only measures.
        bound = config.max_grad_norm if args.duplicates == "sum" else math.inf
        rule = nc.ByGlobalNorm(bound, shared="model")
        embedding = {"embedding": params.pop("embedding")}
        self.groups = nc.ParamGroups(
            [
                nc.Group("embedding", embedding, clip=rule, nonfinite="skip", sparse=True),
                nc.Group("layers", params, clip=rule, nonfinite="skip"),
            ]
        )
        self.optimizer = nc.SGD(self.groups, lr=self.rate)
        self.loss_scale = FIRST_LOSS_SCALE if args.use_fp16 else 1.0
        self.epoch, self.batch, self.cost = 1, 0, 0.0  # the next ones; the epoch's cost so far
        self.clipped = self.skipped = 0
        self.perplexities = np.full((config.max_max_epoch, 2), np.nan)  # train, valid
        self.seconds: list[tuple[float, float]] = []  # of steps in this process: all, numclip

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self.config.rate(1 + step // len(self.texts.training))

    def float32_params(self) -> dict[str, Array]:
        """Return the parameters in float32, in which the network computes."""
        return {name: p.astype(np.float32, copy=False) for name, p in self.groups.params.items()}

    def train_on_next_batch(self) -> None:
        """Take one step with the next batch, and advance to the batch after it."""
        start = time.perf_counter()
        config, text = self.config, self.texts.training
        words, targets = text.words[self.batch], text.targets[self.batch]
        shape = (config.num_layers + 1, *words.shape, config.hidden_size)
        masks = lstm_network.dropout_masks(self.rng, config.keep_prob, shape)
        if self.batch == 0:
            self.rnn_state[...] = 0
        cost, gradients, self.rnn_state = self.ranks.cost_and_gradients(
            self.float32_params(), words, targets, self.rnn_state, masks, self.loss_scale
        )
        before = time.perf_counter()
        self.update(gradients)
        end = time.perf_counter()
        self.seconds.append((end - start, end - before))
        self.cost += cost
        self.batch += 1

    def update(self, gradients: Mapping[str, Array | nc.IndexedSlices]) -> None:
        """Clip the sum of the ranks' gradients and descend, or skip a step that overflowed."""
        self.groups.set_grads(gradients)
        for flat in self.groups["layers"].flat_grads.values():
            self.ranks.add_up(flat)
        raw_norm = 0.0
        if self.args.duplicates == "raw":
            grads = dict(self.groups.grads)
            bound = self.config.max_grad_norm * self.loss_scale
            _, norm = nc.clip_by_global_norm(
                grads, bound, nonfinite="skip", duplicates="raw", out=grads
            )
            raw_norm = norm / self.loss_scale
        report = self.optimizer.step(unscale=self.loss_scale, comm=self.ranks.comm)
        if report.skipped:
            self.skipped += 1
            self.loss_scale /= 2
        elif report.clipped or raw_norm > self.config.max_grad_norm:
            self.clipped += 1

    @property
    def perplexity(self) -> float:
        """The perplexity of the epoch so far."""
        return perplexity_of(self.cost, self.batch * self.config.num_steps)

    def settings(self) -> dict[str, Any]:
        """Return the settings that another training must share to load this one's state."""
        text = zlib.crc32(self.texts.training.words.tobytes())
        names = ("config", "seed", "duplicates", "use_fp16")
        options = {name: vars(self.args)[name] for name in names}
        return {**options, "checksum of the text": text, **asdict(self.config)}

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all that the next steps depend on, and of the results so far."""
        counts = ("epoch", "batch", "cost", "loss_scale", "clipped", "skipped")
        return {
            "settings": self.settings(),
            "groups": self.groups.state_dict(),
            "rnn_state": self.rnn_state.copy(),
            "perplexities": self.perplexities.copy(),
            "rng": self.rng.bit_generator.state,
            "position": {name: getattr(self, name) for name in counts},
        }

    def load_state_dict(self, state_dict: Mapping[str, Any], *, strict: bool = True) -> list[str]:
        """Load a state; raise StateError if it does not match this training."""
        del strict  # a state is loaded as a whole or not at all
        settings = self.settings()
        found = state_dict.get("settings", {})
        state.matches({"settings": settings}, {"settings": found})
        for name, value in settings.items():
            if found[name] != value:
                raise nc.StateError(
                    f"{name}: expected {value!r}, got {found[name]!r}; go on with the options that "
                    "it was saved with"
                )
        groups = {"groups": state_dict.get("groups")}  # checked by the groups themselves
        state.matches(self.state_dict() | groups, dict(state_dict))
        self.groups.load_state_dict(state_dict["groups"])
        self.rnn_state = state_dict["rnn_state"].copy()
        self.perplexities = state_dict["perplexities"].copy()
        self.rng.bit_generator.state = state_dict["rng"]
        vars(self).update(state_dict["position"])
        return []


Stopped = Callable[[], bool]


def train_epoch(training: Training, stopped: Stopped) -> bool:
    """Train to the end of the epoch; return False if `stopped` ended it before."""
    config, count = training.config, len(training.texts.training)
    first, start = training.batch, time.perf_counter()
    with progress_bar(count, "batch", quiet=training.args.quiet, initial=first) as bar:
        while training.batch < count:
            if stopped():
                return False
            training.train_on_next_batch()
            bar.update()
            done = training.batch
            if done * LINES_AN_EPOCH // count > (done - 1) * LINES_AN_EPOCH // count:
                words = (done - first) * config.batch_size * config.num_steps
                rate = words / (time.perf_counter() - start)
                say(
                    bar,
                    f"  {done / count:.3f}  perplexity {training.perplexity:10.3f}  "
                    f"{rate:7,.0f} words/s",
                )
    return True


def evaluate(training: Training, windows: Windows, stopped: Stopped) -> float | None:
    """Return the perplexity of a text, None if it was not read to its end."""
    params = training.float32_params()
    rnn_state = lstm_network.initial_state(params, windows.words.shape[2])
    total, steps = 0.0, windows.words.shape[1]
    with progress_bar(len(windows), "batch", quiet=training.args.quiet) as bar:
        for words, targets in zip(windows.words, windows.targets, strict=True):
            if stopped():
                return None
            cost, rnn_state = lstm_network.cost(params, words, targets, rnn_state)
            total += cost
            bar.update()
    return perplexity_of(total, len(windows) * steps)


def run(training: Training, stopped: Stopped) -> float | None:
    """Train through all epochs; return the test perplexity, None where it was interrupted."""
    texts, args, ranks = training.texts, training.args, training.ranks
    while training.epoch <= min(args.epochs, training.config.max_max_epoch):
        start = time.perf_counter()
        rate = training.config.rate(training.epoch)
        print(f"Epoch {training.epoch}: learning rate {rate:.4g}", flush=True)
        if not train_epoch(training, lambda: ranks.of_first(stopped)):
            return None
        validation = ranks.of_first(lambda: evaluate(training, texts.validation, stopped))
        if validation is None:
            return None
        seconds = time.perf_counter() - start
        print(
            f"  train {training.perplexity:.3f}  valid {validation:.3f}  in {seconds:,.0f} s",
            flush=True,
        )
        training.perplexities[training.epoch - 1] = training.perplexity, validation
        training.epoch, training.batch, training.cost = training.epoch + 1, 0, 0.0
        if args.save:
            training.save(args.save)
    return ranks.of_first(lambda: evaluate(training, texts.test, stopped))


def table(training: Training, test: float | None) -> Iterator[str]:
    """Yield the lines of the results so far."""
    done = training.perplexities[: training.epoch - 1]
    yield f"{'Perplexity':<16}{'train':>10}{'valid':>10}{'test':>10}"
    for epoch, (train, valid) in enumerate(done, 1):
        last = f"{test:10.2f}" if test is not None and epoch == len(done) else ""
        yield f"{f'epoch {epoch}':<16}{train:10.2f}{valid:10.2f}{last}"
    if training.args.config in PUBLISHED:
        published = "".join(f"{value:10.2f}" for value in PUBLISHED[training.args.config])
        yield f"{'published':<16}{published}  (Penn Treebank)"
    steps = training.groups.step
    yield f"{steps:,} steps, {training.clipped:,} clipped, {training.skipped:,} skipped"
    if training.seconds[1:]:  # the first step compiles
        total, in_numclip = np.sum(training.seconds[1:], axis=0)
        where = "numclip" if training.ranks.size == 1 else "numclip and in sums over the ranks"
        yield f"{in_numclip / total:.1%} of the training time was spent in {where}"


def build_parser() -> Parser:
    """Describe the command line."""
    parser = Parser("ptb", __doc__)
    option = parser.add_argument
    option("--config", choices=CONFIGS, default="small", help="default: %(default)s")
    option(
        "--data-path",
        type=Path,
        metavar="DIR",
        help="folder with ptb.train.txt, ptb.valid.txt and ptb.test.txt (default: Python's manual)",
    )
    option(
        "--epochs",
        type=positive_int,
        default=math.inf,
        metavar="N",
        help="stop after so many (default: as many as the configuration has)",
    )
    option("--seed", type=whole_number, default=0, metavar="N", help="default: %(default)s")
    option(
        "--duplicates",
        choices=("sum", "raw"),
        default="sum",
        help="whether rows of a word that occurs more than once are summed before the norm is "
        "taken, or taken as they lie, which is TensorFlow's norm (default: %(default)s)",
    )
    option(
        "--use-fp16",
        action="store_true",
        help="keep parameters and gradients in float16; matrix products are in float32",
    )
    option(
        "--save",
        type=output_file,
        metavar="FILE",
        help="write a checkpoint after every epoch, and at Ctrl-C",
    )
    option("--resume", type=Path, metavar="FILE", help="go on from a checkpoint, bit for bit")
    option(
        "--data-parallel",
        action="store_true",
        help="share every batch among the processes that mpiexec has started; needs mpi4py",
    )
    parser.add_picture("ptb.png")
    option("--quiet", action="store_true", help="show no progress bar")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.duplicates == "raw":
        args.picture = None  # the groups' history has the norms of summed rows alone
    parser.require("tqdm", *(["matplotlib"] if args.picture else []))
    ranks = all_ranks(parser) if args.data_parallel else Ranks()
    if ranks.rank > 0:
        args.picture, args.save, args.quiet = None, None, True
    with ranks.only_first_prints():
        return train(parser, args, ranks)


def train(parser: Parser, args: argparse.Namespace, ranks: Ranks) -> int:
    """Train as the options say; return the exit code."""
    config = CONFIGS[args.config]
    refuse_unequal_shares(parser, ranks, config.batch_size)
    try:
        words = ranks.of_first(lambda: read_words(args.data_path, config.vocab_size))
        training = Training(cut_texts(words, config), args, ranks)
        if args.resume:
            training.load_state_dict(ranks.of_first(lambda: state.load(args.resume)))
    except DataError as error:
        parser.error(str(error))
    except OSError as error:
        parser.error(f"--resume: {args.resume}: {error.strerror}")
    except nc.StateError as error:
        parser.error(f"--resume: {error}")
    print(words)
    with interruptible() as stopped:
        test = run(training, stopped)
    print("\n".join(table(training, test)))
    if args.picture:
        training.groups.history.plot(args.picture)
        print(f"picture: {args.picture}")
    if test is None:
        if args.save:
            training.save(args.save)
        print("interrupted", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())

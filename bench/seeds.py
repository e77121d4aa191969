"""Run the exploding-gradients example on five seeds; exit with 1 unless all runs go as documented.

Run ``python -m bench.seeds`` (needs pip install '.[examples]'; a quarter of an hour).
"""

from __future__ import annotations

import sys
import time

import numpy as np

from numclip.examples import gru
from numclip.examples.corpus import MANUAL, read_paragraphs

SEEDS = range(5)
SATISFYING = 1.7  # nats per character, averaged over the last paragraphs


def main() -> int:
    """Train with each seed, and print a summary of both runs; return the exit code."""
    text = gru.Text(MANUAL, read_paragraphs(None))
    good = True
    for seed in SEEDS:
        options = "--no-picture", "--paragraphs", "8000", "--seed", str(seed)
        args = gru.build_parser().parse_args(options)
        start = time.perf_counter()
        runs, _ = gru.train(text, args)
        unclipped, clipped = runs.values()
        cost = float(np.mean(clipped.costs[-gru.WINDOW :]))
        went = unclipped.blown_up is not None and clipped.blown_up is None and cost < SATISFYING
        good = good and went
        for name, run in runs.items():
            print(gru.summary(name, run))
        print(
            f"seed {seed}: {'as it says' if went else 'NOT as it says'}, "
            f"{time.perf_counter() - start:.0f} s",
            flush=True,
        )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())

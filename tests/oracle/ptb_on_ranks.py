"""The LSTM language model, tiny, on ranks that must stay copies of one another, bit for bit.

``mpiexec -n 2 python -m mpi4py -m tests.oracle.ptb_on_ranks STEP --config test ...``: after that
step the first rank gets SIGINT, as by Ctrl-C; with a STEP of 0 no rank does.
"""

from __future__ import annotations

import signal
import sys

import numpy as np

from numclip.examples import ptb

TINY = ptb.Config(0.1, 1.0, 0.9, 2, 3, 4, 1, 2, 0.7, 0.5, batch_size=4, vocab_size=30)


class Training(ptb.Training):
    """A training that asserts after every step that all ranks have the same bits."""

    interrupted = 0

    def train_on_next_batch(self) -> None:
        super().train_on_next_batch()
        flat = [flat for group in self.groups for flat in group.flat_params.values()]
        bits = np.concatenate([*flat, self.rnn_state.ravel(), [self.cost]]).tobytes()
        assert len(set(self.ranks.comm.allgather(bits))) == 1
        if self.groups.step == self.interrupted and self.ranks.rank == 0:
            signal.raise_signal(signal.SIGINT)


if __name__ == "__main__":
    ptb.CONFIGS["test"], ptb.Training = TINY, Training
    Training.interrupted = int(sys.argv[1])
    sys.exit(ptb.main([*sys.argv[2:], "--data-parallel"]))

"""One model trained by the ranks of MPI, each of which reads its share of every batch."""

import contextlib
import os
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import numpy as np

from numclip import IndexedSlices
from numclip.examples import lstm_network
from numclip.examples.command_line import Parser
from numclip.examples.corpus import Numbers
from numclip.examples.cross_entropy import Array
from numclip.examples.lstm_network import Params

Result = TypeVar("Result")


class Ranks:
    """The processes that train a model together, each with a copy of all parameters.

    Parameters
    ----------
    comm : communicator of mpi4py, optional
        Connects them; without one this process is alone.
    """

    def __init__(self, comm: Any = None) -> None:
        self.comm = comm
        self.rank: int = 0 if comm is None else comm.Get_rank()
        self.size: int = 1 if comm is None else comm.Get_size()

    def gathered(self, own: Any, axis: int = 0) -> Any:
        """Return the ranks' equal shares concatenated along an axis, in the order of the ranks."""
        if self.comm is None:
            return own
        every = np.empty((self.size, *own.shape), own.dtype)
        self.comm.Allgather(np.ascontiguousarray(own), every)
        return np.concatenate(every, axis)

    def cost_and_gradients(
        self,
        params: Params,
        words: Numbers,
        targets: Numbers,
        state: Array,
        masks: Array | None,
        scale: float,
    ) -> tuple[float, dict[str, Array | IndexedSlices], Array]:
        """Run `lstm_network.cost_and_gradients` on this rank's share of a batch.

        The cost, the state and the embedding's gradient are those of the whole batch. The dense
        gradients are this rank's summands of the batch's.
        """
        count = words.shape[1] // self.size
        own = slice(self.rank * count, (self.rank + 1) * count)
        cost, gradients, end = lstm_network.cost_and_gradients(
            params,
            words[:, own],
            targets[:, own],
            state[:, :, own],
            None if masks is None else masks[:, :, own],
            scale / self.size,
        )
        rows: Any = gradients["embedding"]
        values, indices = self.gathered(rows.values), self.gathered(rows.indices)
        gradients["embedding"] = IndexedSlices(values, indices, rows.dense_shape)
        mean_cost = float(self.gathered(np.array([cost])).mean())
        return mean_cost, gradients, self.gathered(end, axis=2)

    def add_up(self, flat: Array) -> None:
        """Replace an array by the sum over all ranks, which has the same bits on each."""
        if self.comm is not None:
            total = np.empty(flat.shape, np.float32)  # MPI adds no float16
            self.comm.Allreduce(flat.astype(np.float32, copy=False), total)
            flat[...] = total

    def of_first(self, compute: Callable[[], Result]) -> Result:
        """Return on every rank what `compute` returns on the first, or raise its exception."""
        if self.comm is None:
            return compute()
        found: tuple[Any, Exception | None] = None, None
        if self.rank == 0:
            try:
                found = compute(), None
            except Exception as error:
                found = None, error
        result: Result
        result, raised = self.comm.bcast(found)
        if raised is not None:
            raise raised
        return result

    @contextlib.contextmanager
    def only_first_prints(self) -> Iterator[None]:
        """Silence all other ranks; hold SystemExit, which may end all, until all are done."""
        with contextlib.ExitStack() as stack:
            if self.rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            refusal = None
            try:
                yield
            except SystemExit as error:
                refusal = error
            if self.comm is not None:
                self.comm.Barrier()
            if refusal:
                raise refusal


def all_ranks(parser: Parser) -> Ranks:
    """Return the processes that mpiexec has started; exit with code 2 where there is no MPI."""
    parser.require("mpi4py")
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        parser.error(f"--data-parallel: cannot load an MPI, try pip install mpich: {error}")
    return Ranks(MPI.COMM_WORLD)


def refuse_unequal_shares(parser: Parser, ranks: Ranks, sequences: int) -> None:
    """Exit with code 2 unless the ranks can share a batch equally."""
    if sequences % ranks.size:
        fitting = [str(n) for n in range(1, sequences + 1) if sequences % n == 0]
        parser.error(
            f"--data-parallel: expected ranks that share a batch of {sequences} sequences equally, "
            f"got {ranks.size}; start {', '.join(fitting[:-1])} or {fitting[-1]} by mpiexec -n"
        )

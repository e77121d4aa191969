"""The ranks of an MPI communicator: they exchange values, and agree on facts."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.errors import RankError, expected

WELL, RAISED, ASKS = range(3)  # a rank's state: it has measured, has raised, asks to agree again
HEAD = 2  # numbers of a message before the values: the state, and a code of facts and step
NEEDED = "Allgather", "allgather", "Get_rank", "Get_size", "Is_inter"

Facts = dict[str, str]
"""Texts, by what they are about, that must be the same on all ranks."""


class Communicator:
    """An intra-communicator of mpi4py, of two ranks or more; all calls are collective.

    Attributes
    ----------
    comm : communicator
        As the user gave it.
    rank, size : int
        The rank of this process, and the number of ranks.
    count : int or None
        How many values ranks exchange; None where they have to agree first.
    values, every : array
        The values that this rank sends, (count,), and those of all ranks, (size, count).
    heads : array of int64
        The state and code that each rank sent with its values, (size, 2).
    """

    count: int | None = None
    values: Array
    every: Array
    heads: Array

    def __init__(self, comm: Any, count: int | None = None) -> None:
        self.comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self._awaited = False  # whether the other ranks wait for this one
        self._facts: Facts = {}
        self._code = digest({})
        if count is not None:
            self.agreed(count)

    def __enter__(self) -> None:
        """Report an error in the context to the other ranks, if they still wait for this one."""
        self._awaited = True

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and self._awaited:
            self._announce(error)

    def _announce(self, error: BaseException) -> None:
        """Send an error in place of an agreement or an exchange."""
        self._awaited = False
        text = f"{type(error).__name__}: {error}"
        if self.count is None:
            self.comm.allgather((RAISED, text))
        else:
            self._gather(RAISED, 0)
            self.comm.allgather(text)

    def exchange(self, facts: Facts, step: int = 0) -> bool:
        """Gather the values of all ranks; return and raise as `heard` does."""
        self.gather(facts, step)
        return self.heard(facts, step)

    def gather(self, facts: Facts, step: int) -> None:
        """Gather the values of all ranks, by one collective call.

        They are valid if all `heads` are the same.
        """
        if facts is not self._facts and facts != self._facts:  # they seldom change
            self._facts, self._code = facts, digest(facts)
        self._gather(WELL, self._code ^ step)

    def heard(self, facts: Facts, step: int) -> bool:
        """Return True if all values are valid; False, on all ranks, if one asks to agree again.

        Raises a RankError on all ranks if facts or steps differ, and on all others if one rank
        has raised.
        """
        if (self.heads == self._head).all():
            return True
        if self._asked():
            return False
        raise self._difference({**facts, "step": str(step)})

    def request_agreement(self) -> None:
        """Ask all ranks to agree again, in place of an exchange."""
        self._gather(ASKS, 0)
        self._asked()

    def _asked(self) -> bool:
        """Tell whether a rank asks to agree again; raise if one has raised."""
        states = self.heads[:, 0]
        if (states == RAISED).any():
            texts = self.comm.allgather(None)
            raise _raised({rank: text for rank, text in enumerate(texts) if text is not None})
        return bool((states == ASKS).any())

    def _gather(self, state: int, code: int) -> None:
        """Gather the messages of all ranks; this rank sends a state, a code and its values."""
        self._head[0], self._head[1] = state, code  # a third of the time of assigning a slice
        self._awaited = False
        self.comm.Allgather(self._message, self._messages)

    def agree(self, facts: Facts) -> None:
        """Raise, on all ranks, if facts are not the same on all."""
        self._awaited = False
        found = self.comm.allgather((WELL, digest(facts)))
        raised = {rank: text for rank, (state, text) in enumerate(found) if state == RAISED}
        if raised:
            raise _raised(raised)
        if any(other != found[0] for other in found):
            raise self._difference(facts)

    def agreed(self, count: int) -> None:
        """Exchange `count` values from now on."""
        self.count, self._awaited = count, True
        self._message = np.zeros(HEAD + count)
        self._messages = np.empty((self.size, HEAD + count))
        self._head, self.values = self._message[:HEAD].view(np.int64), self._message[HEAD:]
        self.heads = self._messages[:, :HEAD].view(np.int64)
        self.every = self._messages[:, HEAD:]

    def everyones(self, value: Any) -> list[Any]:
        """Return the values that all ranks pass, in the order of the ranks."""
        return self.comm.allgather(value)  # type: ignore[no-any-return]

    def _difference(self, facts: Facts) -> RankError:
        """Return the error that names the first fact of a rank that differs from rank 0's."""
        first, *others = self.everyones(facts)
        for rank, other in enumerate(others, 1):
            for key in [*first, *other]:
                one, two = first.get(key, "nothing"), other.get(key, "nothing")
                if one != two:
                    text = f"{key}: {one} on rank 0, but {two} on rank {rank}"
                    return RankError(f"{text}; nothing was modified on any rank")
        return RankError("the ranks differ; nothing was modified on any rank")


def _raised(texts: Mapping[int, str]) -> RankError:
    """Return the error for the ranks that have not raised, from the texts of those that have."""
    rank = min(texts)
    return RankError(f"rank {rank} raised {texts[rank]}; nothing was modified on any rank")


def communicator(comm: Any, count: int | None = None) -> Communicator | None:
    """Check `comm`; return a `Communicator`, or None for None or for a single rank."""
    if comm is None:
        return None
    if not all(hasattr(comm, name) for name in NEEDED):
        wanted = "an intra-communicator of mpi4py or None"
        raise TypeError(expected("comm", wanted, type(comm).__name__))
    if not comm:
        raise ValueError(expected("comm", "an intra-communicator", "COMM_NULL"))
    if comm.Is_inter():
        raise ValueError(expected("comm", "an intra-communicator", "an inter-communicator"))
    return Communicator(comm, count) if comm.Get_size() > 1 else None


def digest(facts: Facts) -> int:
    """Return a 64-bit digest of facts."""
    text = "\n".join([*facts, *facts.values()])
    found = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)

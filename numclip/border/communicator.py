"""The ranks of an MPI communicator: what they tell one another, and that they agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.errors import RankError, expected

WELL, RAISED, ASKS = range(3)  # what a rank says of itself: it measured, it raised, it asks
HEAD = 2  # numbers of a message before the values: that, and the digest of the facts
NEEDED = "Allgather", "allgather", "Get_rank", "Get_size", "Is_inter"

Facts = dict[str, str]
"""What must be the same on all ranks, in words."""


class Communicator:
    """An intra-communicator of mpi4py, of two ranks or more; all calls are collective.

    Attributes
    ----------
    comm : communicator
        As the user gave it.
    rank, size : int
        Which one this process is, and of how many.
    count : int or None
        How many values ranks exchange; None where they are to agree first.
    values, every : array
        What this rank is to tell, (count,), and what all have told, (size, count).
    heads : array of int64
        What each rank said of itself with its values, (size, 2).
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
        """Let the other ranks know what is raised before they have heard of this one."""
        self._awaited = True

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None and self._awaited:
            self._tell(error)

    def _tell(self, error: BaseException) -> None:
        """Tell an error in place of what is to be agreed on, or exchanged."""
        self._awaited = False
        text = f"{type(error).__name__}: {error}"
        if self.count is None:
            self.comm.allgather((RAISED, text))
        else:
            self._gather(RAISED, 0)
            self.comm.allgather(text)

    def exchange(self, facts: Facts, step: int = 0) -> bool:
        """Let every rank have the values of all; do what `heard` does."""
        self.gather(facts, step)
        return self.heard(facts, step)

    def gather(self, facts: Facts, step: int) -> None:
        """Gather the values of all ranks, by one collective call.

        They count where all `heads` are the same.
        """
        if facts is not self._facts and facts != self._facts:  # they seldom change
            self._facts, self._code = facts, digest(facts)
        self._gather(WELL, self._code ^ step)

    def heard(self, facts: Facts, step: int) -> bool:
        """Return True where the values of all count; False, on all ranks, where one asks to agree.

        Raises, on all ranks, a RankError where facts or steps differ, and on all others where one
        has raised.
        """
        if (self.heads == self._head).all():
            return True
        if self._asked():
            return False
        raise self._difference({**facts, "step": str(step)})

    def ask(self) -> None:
        """Let all ranks agree again, in place of an exchange."""
        self._gather(ASKS, 0)
        self._asked()

    def _asked(self) -> bool:
        """Tell whether a rank asks; raise where one has raised."""
        states = self.heads[:, 0]
        if (states == RAISED).any():
            texts = self.comm.allgather(None)
            raise _raised({rank: text for rank, text in enumerate(texts) if text is not None})
        return bool((states == ASKS).any())

    def _gather(self, state: int, code: int) -> None:
        """Gather the messages of all ranks, of which this one's is a state, a code and values."""
        self._head[0], self._head[1] = state, code  # in a third of the time of a slice
        self._awaited = False
        self.comm.Allgather(self._message, self._messages)

    def agree(self, facts: Facts) -> None:
        """Refuse, on all ranks, facts that are not the same on all."""
        self._awaited = False
        found = self.comm.allgather((WELL, digest(facts)))
        raised = {rank: text for rank, (state, text) in enumerate(found) if state == RAISED}
        if raised:
            raise _raised(raised)
        if any(other != found[0] for other in found):
            raise self._difference(facts)

    def agreed(self, count: int) -> None:
        """Exchange so many values from now on."""
        self.count, self._awaited = count, True
        self._message = np.zeros(HEAD + count)
        self._messages = np.empty((self.size, HEAD + count))
        self._head, self.values = self._message[:HEAD].view(np.int64), self._message[HEAD:]
        self.heads = self._messages[:, :HEAD].view(np.int64)
        self.every = self._messages[:, HEAD:]

    def everyones(self, value: Any) -> list[Any]:
        """Return a value of each rank."""
        return self.comm.allgather(value)  # type: ignore[no-any-return]

    def _difference(self, facts: Facts) -> RankError:
        """Return the error that says where the facts of a rank differ from those of the first."""
        first, *others = self.everyones(facts)
        for rank, other in enumerate(others, 1):
            for key in [*first, *other]:
                one, two = first.get(key, "nothing"), other.get(key, "nothing")
                if one != two:
                    text = f"{key}: {one} on rank 0, but {two} on rank {rank}"
                    return RankError(f"{text}; nothing was modified on any rank")
        return RankError("the ranks differ; nothing was modified on any rank")


def _raised(texts: Mapping[int, str]) -> RankError:
    """Return the error of the ranks that have none, from what the others have raised."""
    rank = min(texts)
    return RankError(f"rank {rank} raised {texts[rank]}; nothing was modified on any rank")


def communicator(comm: Any, count: int | None = None) -> Communicator | None:
    """Return the communicator of several ranks; None for one alone, which has no one to ask."""
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
    """Return 64 bits that facts have in common with no others."""
    text = "\n".join([*facts, *facts.values()])
    found = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)

"""What an optimizer's step on the GPU is done with: a table of updates, settings and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array, DType
from numclip.kernels.cuda import device, tables, updates
from numclip.kernels.cuda.chunks import Span, like, split
from numclip.kernels.cuda.plan import HostTable, Plan


def _tables(
    spans: Sequence[Span], states: Sequence[Sequence[int]], stream: Any
) -> dict[DType, Any]:
    """Return the table of updates of each dtype; spans go from gradients to parameters."""
    chunks, _, starts = split(spans)
    rows = np.zeros((len(chunks), 6), np.int64)
    owners = chunks[:, tables.OWNER]
    rows[:, updates.GRAD] = chunks[:, tables.SOURCE]
    rows[:, updates.PARAM] = chunks[:, tables.TARGET]
    sizes = np.array([span.dtype.compute.itemsize for span in spans], np.int64)
    for k, addresses in enumerate(states):
        places = np.array(addresses, np.int64)[owners] + starts * sizes[owners]
        rows[:, updates.FIRST + k] = places
    rows[:, updates.LENGTH], rows[:, updates.OWNER] = chunks[:, tables.LENGTH], owners
    dtypes = [spans[k].dtype for k in owners]
    return {
        dtype: device.table(rows[[own is dtype for own in dtypes]], stream)
        for dtype in dict.fromkeys(dtypes)
    }


def _kernel(states: int) -> Any:
    """Return the kernel of an optimizer that keeps so many states."""
    return (updates.descend, updates.descend_with_momentum, updates.adam)[states]


class Updates:
    """What the kernels need to update parameters by the gradients of a plan.

    `states` are the addresses of each tensor's states. A row of settings and a count of steps
    stand for each pool.
    """

    def __init__(self, plan: Plan, params: Sequence[int], states: Sequence[Sequence[int]]) -> None:
        self._plan = plan
        spans = [s._replace(target=t) for s, t in zip(plan.spans, params, strict=True)]
        self._updates = _tables(spans, states, 0)
        self.counts = device.table(np.zeros(len(plan.pools), np.int64), 0)
        shape = len(plan.pools), updates.SETTINGS_COLUMNS
        self._given = HostTable(shape, 0)
        self._settings = device.table(np.zeros(shape), 0)

    def write_settings(self, settings: Array, stream: Any) -> None:
        """Let the following steps use some settings, a row for each pool."""
        self._given.write(settings, stream)

    def descend(self, outcome: tuple[Any, Any], momentum: bool, stream: Any) -> None:
        """Take a step of gradient descent; one launch to count it, one for each dtype."""
        device.launch(updates.advance, 1, stream, outcome[1], self.counts)
        self._take(_kernel(int(momentum)), outcome, self._given.table, stream)

    def adam(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Take a step of Adam; one launch to prepare it, one for each dtype."""
        tables = outcome[1], self._given.table, self.counts, self._settings
        device.launch(updates.advance_adam, 1, stream, *tables)
        self._take(updates.adam, outcome, self._settings, stream)

    def _take(self, kernel: Any, outcome: tuple[Any, Any], settings: Any, stream: Any) -> None:
        for dtype, rows in self._updates.items():
            arguments = self._plan.tensors, outcome[1], settings, like(dtype)
            device.launch(kernel, rows.shape[0], stream, rows, *arguments)


class PlainUpdates:
    """What the kernels need to update parameters by gradients that are not clipped.

    `spans` go from gradients to parameters, `states` are the addresses of each one's states. A
    row of numbers stands for each parameter.
    """

    def __init__(self, spans: Sequence[Span], states: Sequence[Sequence[int]], stream: Any) -> None:
        self._kernel = _kernel(len(states))
        self._updates = _tables(spans, states, stream)
        tensors = np.zeros((len(spans), 4), np.int64)
        tensors[:, tables.POOL] = np.arange(len(spans))
        self._tensors = device.table(tensors, stream)
        decisions = np.zeros((len(spans), tables.DECISION_COLUMNS))  # to leave gradients alone
        self._decisions = device.table(decisions, stream)
        self._numbers = HostTable((len(spans), updates.SETTINGS_COLUMNS), stream)

    def take(self, numbers: Array, stream: Any) -> None:
        """Update by a row of numbers for each parameter; one launch for each dtype."""
        self._numbers.write(numbers, stream)
        for dtype, rows in self._updates.items():
            arguments = self._tensors, self._decisions, self._numbers.table, like(dtype)
            device.launch(self._kernel, rows.shape[0], stream, rows, *arguments)

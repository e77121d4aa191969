"""What an optimizer's step on the GPU is done with: a table of updates, settings and counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from numclip.dtypes import Array
from numclip.kernels.cuda import device, tables, updates
from numclip.kernels.cuda.chunks import Span, like, split
from numclip.kernels.cuda.plan import HostTable, Plan


class Updates:
    """What the kernels need to update parameters by the gradients of a plan.

    `spans` say where the gradients are read and the parameters written; `states` are the
    addresses of each tensor's states. A row of settings and a count of steps stand for each pool.
    """

    def __init__(self, plan: Plan, spans: Sequence[Span], states: Sequence[Sequence[int]]) -> None:
        self._plan = plan
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
        self._updates = {
            dtype: device.table(rows[[own is dtype for own in dtypes]], 0)
            for dtype in dict.fromkeys(dtypes)
        }
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
        kernel = updates.descend_with_momentum if momentum else updates.descend
        self._take(kernel, outcome, self._given.table, stream)

    def adam(self, outcome: tuple[Any, Any], stream: Any) -> None:
        """Take a step of Adam; one launch to prepare it, one for each dtype."""
        tables = outcome[1], self._given.table, self.counts, self._settings
        device.launch(updates.advance_adam, 1, stream, *tables)
        self._take(updates.adam, outcome, self._settings, stream)

    def _take(self, kernel: Any, outcome: tuple[Any, Any], settings: Any, stream: Any) -> None:
        for dtype, rows in self._updates.items():
            arguments = self._plan.tensors, outcome[1], settings, like(dtype)
            device.launch(kernel, rows.shape[0], stream, rows, *arguments)

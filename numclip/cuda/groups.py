"""Parameter groups on the GPU: a fixed number of launches a step, and no waiting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from numclip import inputs
from numclip.cuda.arrays import DeviceArray, add_all, copy_all
from numclip.cuda.clipper import Clipper, Found
from numclip.cuda.clippers import clippers
from numclip.cuda.clipping import row_span
from numclip.cuda.copies import host_entry
from numclip.cuda.entries import DeviceEntry
from numclip.cuda.group import DeviceGroupState, Slots
from numclip.cuda.report import build
from numclip.cuda.sparse_group import SparseGroupState
from numclip.cuda.streams import stream_from
from numclip.cuda.values import DeviceReport
from numclip.group import Group
from numclip.groups import ParamGroups
from numclip.history import History
from numclip.kernels.cuda.chunks import Span
from numclip.kernels.cuda.device import on_stream, require
from numclip.kernels.cuda.grouping import RowSpan
from numclip.kernels.cuda.update_plan import Updates
from numclip.kernels.cuda.updates import SETTINGS_COLUMNS
from numclip.nonfinite import first_error
from numclip.placement import on_device
from numclip.report import ClipReport
from numclip.updating import Method

KEPT = 64
"""How many steps' reports are kept on the GPU."""

Judged = list[tuple[Clipper, Found]]


class DeviceParamGroups(ParamGroups):
    """`ParamGroups` on an NVIDIA GPU; made by ``ParamGroups(..., device="cuda")``.

    Nothing here waits for the GPU, but what reads values: a report's attributes, `history`,
    `state_dict`, ``copy_to_host()``; a group whose policy is ``"raise"``; rules that follow the
    norms (`AutoClip`, `ZClip`, `AdaGC`), whose bounds are found on the host. A report must be
    read within 64 steps; `history` takes up the steps whose reports are still there when it is
    looked at.

    After the first step nothing is allocated, so that a step (with rules and policies that do
    not wait, and bounds and rates that are no functions) can be captured in a CUDA graph: set
    `stream` to the one that is captured. What is captured writes its report to the memory of
    that step. Sparse groups send tables of their rows in each step, and have memory that grows with
    the rows: steps with them cannot be captured.

    Attributes
    ----------
    params, grads : mapping of str to DeviceArray
        Views into the groups' buffers, which CuPy, PyTorch and numba take without a copy. The
        gradient of a sparse parameter is `IndexedSlices`, whose values are a view until the next
        ones are copied in, or None.
    stream : stream
        Where in order everything is done. May be set, to streams of numba, CuPy or PyTorch,
        once what was started on the stream before is done: the new one does not wait for it.

    Raises
    ------
    DeviceError
        Where there is no GPU, no driver or no numba-cuda; the message says which.
    """

    device = "cuda"
    _pending: list[DeviceReport]
    _history: History

    def __init__(
        self,
        groups: Sequence[Group],
        *,
        history: int = 10_000,
        device: str = "cuda",
        stream: Any = None,
    ) -> None:
        require()
        self.stream = stream
        with on_stream(None):
            self._build(groups, history, device)

    def _build(self, groups: Sequence[Group], history: int, device: str) -> None:
        """Fill the buffers and tables, on the default stream."""
        super().__init__(groups, history=history, device=device)
        self._clippers = clippers(self, KEPT)
        self._reports: list[DeviceReport | None] = [None] * KEPT
        self._judged = 0

    def _state_of(self, group: Group) -> Any:
        return SparseGroupState(group) if group.sparse else DeviceGroupState(group)

    @property
    def stream(self) -> Any:
        """The stream on which everything is done, in order."""
        return self._stream

    @stream.setter
    def stream(self, stream: Any) -> None:
        self._stream = stream_from(stream)
        self._held = stream  # some libraries destroy a stream that nobody holds

    @property
    def history(self) -> History:
        """The record of the steps; asking for it waits for the GPU."""
        pending, self._pending = self._pending, []
        for report in pending:
            if not report.expired:
                self._history.record(report.report)
        return self._history

    @history.setter
    def history(self, history: History) -> None:
        self._pending, self._history = [], history

    def set_grads(self, grads: Mapping[str, Any]) -> None:
        """Copy gradients in, from the host or the GPU.

        Parameters
        ----------
        grads : mapping of str to array, IndexedSlices or None
            Gradients by parameter, of its shape; those on the GPU of its dtype and in C order.
            None means zero. Parameters that are not named keep the gradients they have.
            `IndexedSlices` are for sparse groups.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is copied then.
        """
        fitting: list[Any] = self._fitting(grads)
        copy_all(self._pairs(fitting), self.stream)
        for group, name, grad in fitting:
            if not _lies_as_dense(group, grad):
                group.put(name, grad, self.stream)

    def accumulate(self, grads: Mapping[str, Any]) -> None:
        """Add gradients to those there are; rows of sparse ones are appended.

        Parameters
        ----------
        grads : mapping of str to array, IndexedSlices or None
            As in `set_grads`; None adds nothing.

        Raises
        ------
        KeyError, TypeError, ValueError
            Where one does not fit; the message names it. Nothing is added then.
        """
        fitting: list[Any] = self._fitting(grads)
        add_all(self._pairs(fitting), self.stream)
        for group, name, grad in fitting:
            if grad is not None and not _lies_as_dense(group, grad):
                group.add(name, grad, self.stream)

    def _pairs(self, fitting: list[Any]) -> list[tuple[DeviceArray, Any]]:
        """Return the gradients that lie on the GPU, each with the array of ours it is for."""
        return [
            (group.grads[name], grad)
            for group, name, grad in fitting
            if _lies_as_dense(group, grad)
        ]

    def zero_grads(self) -> None:
        """Set every gradient to zero."""
        states: Any = iter(self)
        for group in states:
            group.zero(self.stream)

    def clip(self, *, unscale: float = 1.0, apply: bool = True) -> Any:
        """Clip the gradients of every group by its rule, in place; the host does not wait.

        Parameters
        ----------
        unscale : float, default 1.0
            The loss scale that the gradients carry, > 0.
        apply : bool, default True
            False measures and decides, but counts no step; gradients are as they were. (Those of
            `ByValue` are written, measured and put back, from copies that are made once.)

        Returns
        -------
        DeviceReport
            What was found and done, as a `ClipReport` for whoever reads it.

        Raises
        ------
        NonFiniteGradientError
            Where a group's policy is "raise", for which the host waits. Nothing is modified.
        TypeError, ValueError
            Where an argument does not fit, or a bound that is a function gives no bound.
        """
        found = self._judge(inputs.positive("unscale", unscale))
        for clipper, own in found:
            if apply:
                clipper.write(own, self.stream)
            else:
                clipper.foresee(own, self.stream)
        return self._report(found, counts=apply)

    def _judge(self, unscale: float) -> Judged:
        """Measure and decide; refuse before anything is written."""
        turn = self._judged % KEPT
        found = [(each, each.ask(self.step, turn, unscale)) for each in self._clippers]
        if (report := self._reports[turn]) is not None:
            report.expire(KEPT)
        self._reports[turn] = None
        for clipper, own in found:
            clipper.measure(own, self.stream)
        self._refuse_nonfinite(found)
        for clipper, own in found:
            clipper.decide(own, self.stream)
        return found

    def _refuse_nonfinite(self, found: Judged) -> None:
        """Raise the error of the first bad gradient of a group whose policy says so."""
        refused = [group for clipper, own in found for group in clipper.refused(own, self.stream)]
        members: Any = iter(self)
        for group in members:
            if group in refused:
                entries = [host_entry(entry, self.stream) for entry in group.entries()]
                raise first_error(entries, None)

    def _built(self, step: int, found: Judged) -> ClipReport:
        """Return the report of a step, after waiting for it."""
        told = [one for clipper, own in found for one in clipper.tell(own, self.stream)]
        own = {one.group.name: one for one in told}
        return build(step, [own[group.name] for group in self])

    def _report(self, found: Judged, *, counts: bool) -> DeviceReport:
        """Return the report to come; where it counts, let rules and history know."""
        step = self.step
        report = DeviceReport(step, lambda: self._built(step, found))
        self._reports[self._judged % KEPT] = report
        self._judged += 1
        if counts:
            for clipper, own in found:
                clipper.observe(own, report)
            self._pending = [*self._pending[1 - KEPT :], report]
            self.step += 1
        return report

    def engine(self, method: Method) -> Any:
        """Return what updates the parameters by an optimizer's method."""
        return DeviceGroupEngine(self, method)

    def slots(self, states: int) -> dict[str, Any]:
        """Return an optimizer's states and counts for each group; for `DeviceGroupEngine`."""
        with on_stream(None):
            slots = {group.name: Slots(group, states) for group in self}  # type: ignore[arg-type]
            for clipper in self._clippers:
                entries = [entry for group in clipper.groups for entry in group.entries()]
                members = [slots[group.name] for group in clipper.groups]
                params = [param for own in members for param in own.params]
                pairs = zip(entries, params, strict=True)
                spans = [_updated(entry, param.address) for entry, param in pairs]
                views = [view for own in members for view in own.views]
                kept = [[view[k].address for view in views] for k in range(states)]
                updates = Updates(clipper.plan, spans, kept)
                for group, own in zip(clipper.groups, members, strict=True):
                    own.attach(updates, clipper.pools[group.name])
        return slots

    def update(
        self, method: Method, slots: Mapping[str, Any], rates: Mapping[str, float], unscale: float
    ) -> Any:
        """Clip and update in one pass more than measuring takes; for `DeviceGroupEngine`."""
        found = self._judge(unscale)
        for clipper, own in found:
            updates: Updates = slots[clipper.groups[0].name].updates
            settings = np.zeros((len(clipper.plan.pools), SETTINGS_COLUMNS))
            for group in clipper.groups:
                settings[clipper.pools[group.name]] = method.settings(rates[group.name])
            updates.write_settings(settings, self.stream)
            outcome = clipper.write_rare(own, self.stream)
            if clipper.rows:
                clipper.plan.sum_scaled(outcome, self.stream)
                indices = [slices.distinct_indices for slices in clipper.rows]
                updates.take_rows(indices, self.stream)
            if len(method.state_names) == 2:
                updates.adam(outcome, self.stream)
            else:
                updates.descend(outcome, len(method.state_names) == 1, self.stream)
        return self._report(found, counts=True)


def _lies_as_dense(group: Any, grad: Any) -> bool:
    """Tell whether a gradient is a dense array on the GPU, which is taken together with others."""
    return not group.sparse and grad is not None and on_device(grad)


class DeviceGroupEngine:
    """Updates the parameters of groups on the GPU, as `updating.GroupEngine` does on the CPU."""

    def __init__(self, groups: DeviceParamGroups, method: Method) -> None:
        self._groups, self._method = groups, method
        self.slots = groups.slots(len(method.state_names))

    def step(self, rates: Mapping[str, float], unscale: float) -> Any:
        """Clip every group, and update it at its rate."""
        return self._groups.update(self._method, self.slots, rates, unscale)


def _updated(entry: DeviceEntry, param: int) -> Span | RowSpan:
    """Return where a gradient is read and its parameter written."""
    if entry.slices is None:
        return Span(entry.dtype, entry.address, param, entry.size)
    return row_span(entry)._replace(target=param)

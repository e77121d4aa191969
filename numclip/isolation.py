"""Calls that neither use nor change the caller's floating-point settings.

NumPy's error state (`numpy.errstate`) decides what NumPy does where arithmetic overflows or is
invalid, and a thread's rounding mode and flush-to-zero how it rounds. numclip's arithmetic expects
infinities and subnormal numbers. It runs in a copy of the caller's context where nothing is
reported, and in the ordinary environment: the caller's is unchanged by an exception at any point.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import numpy as np

from numclip.host.runtime import environment

P = ParamSpec("P")
Result = TypeVar("Result")


_SILENT = contextvars.Context()
_SILENT.run(np.seterr, all="ignore")
((_STATE, _SILENCE),) = _SILENT.items()  # NumPy's variable, and its value for silence


def _silent_copy() -> contextvars.Context:
    """Return a copy of the caller's context where NumPy reports nothing."""
    context = contextvars.copy_context()
    if len(context) == (_STATE in context):
        return _SILENT.copy()  # no variables but NumPy's: setting one would take 1.5 us
    context.run(_STATE.set, _SILENCE)
    return context


def in_ordinary_environment(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a function in the ordinary rounding environment; NumPy's error state stays as it is."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        return environment.run(function, args, kwargs)

    return call


def isolated(function: Callable[P, Result]) -> Callable[P, Result]:
    """Run a function with numclip's floating-point settings, whatever the caller's are."""

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        return _silent_copy().run(environment.run, function, args, kwargs)

    return call

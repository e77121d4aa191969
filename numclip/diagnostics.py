"""Threads, warming up, and what is installed."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from typing import Any

import numpy as np

from numclip import functional
from numclip.border.arguments import count
from numclip.border.gradients import describe
from numclip.dtypes import Array
from numclip.errors import entries
from numclip.group import Group
from numclip.groups import ParamGroups
from numclip.host.runtime import cache, threads
from numclip.optim import SGD, Adam
from numclip.rules import ByGlobalNorm
from numclip.slices import IndexedSlices


def set_num_threads(n: int | None) -> None:
    """Set how many threads a call may use; results do not depend on it.

    Parameters
    ----------
    n : int or None
        At least 1; 1 starts no thread at all. None restores the default: the environment's
        ``NUMCLIP_NUM_THREADS``, else the cores that this process is bound to, at most the
        quotas of its control groups and ``OMP_NUM_THREADS``.

    Raises
    ------
    TypeError, ValueError
        Where `n` is no such number.
    """
    threads.set_limit(None if n is None else count("n", n, alternative=" or None"))


def get_num_threads() -> int:
    """Return how many threads a call may use, see `set_num_threads`.

    Returns
    -------
    int
        At least 1. Small calls use one in any case.
    """
    return threads.get_limit()


def warmup(dtypes: str | Iterable[Any] = ("float32", "float64")) -> None:
    """Compile, or load from the cache on disk, what clipping and updating these dtypes needs.

    Without it the first call of each function does so: seconds with an empty cache, a fraction
    of one with a full one.

    Parameters
    ----------
    dtypes : dtype name or iterable of dtype
        The dtypes of the gradients to come.

    Raises
    ------
    TypeError
        Where one is no gradient's dtype.
    """
    if isinstance(dtypes, str):
        dtypes = [dtypes]
    for number, wanted in enumerate(entries("dtypes", "a dtype name or dtypes", dtypes)):
        grad = np.ones((2, 2), np.dtype(wanted))
        describe(f"dtypes[{number}]", number, grad)
        _functions(grad)
        _groups(grad)


def _functions(grad: Array) -> None:
    """Call functions as they are called most: plain, strided and sparse gradients."""
    twice = IndexedSlices(grad.copy(), [0, 0], (1, 2))
    for bound in (0.5, 100.0):
        for grads in ([grad], [grad[:, ::-1]], [grad, twice]):
            functional.clip_by_global_norm(grads, bound)
        functional.clip_by_norm(grad, bound, axes=0)
    if grad.dtype.kind != "c":
        functional.clip_by_value(grad, -1.0, 1.0)


def _groups(grad: Array) -> None:
    """Take steps of groups with each optimizer."""
    groups = ParamGroups([Group("warm", {"w": grad}, clip=ByGlobalNorm(0.5))])
    groups.set_grads({"w": grad})
    for optimizer in (SGD(groups, 0.0), SGD(groups, 0.0, momentum=0.5), Adam(groups)):
        optimizer.step()
    groups.clip()


def show_versions() -> None:
    """Print the versions and settings that a report of a fault should tell.

    The last line says in which folder compiled code is kept, or why in none. It is never read
    from a folder, or written to one, that another user owns or can write, or that lies in one;
    see `numclip.host.runtime.cache` for which are looked at. ``NUMBA_CACHE_DIR`` names one.
    """
    from numclip import __version__

    print(f"numclip   {__version__}")
    for package in ("numpy", "numba", "llvmlite", "ml_dtypes", "scipy", "numba-cuda"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:<9} {version}")
    print(f"python    {platform.python_version()} ({platform.python_implementation()})")
    print(f"platform  {platform.platform()}")
    print(f"threads   {get_num_threads()}")
    print(f"cache     {cache.status()}")

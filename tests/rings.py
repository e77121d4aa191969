"""Three rings of tests, and how many of a test's parameters each ring tries.

The first ring (``pytest``) is the host alone, in one process: of a product of parameters it tries
a set in which every pair of values meets. ``--full`` tries the products, a stand-in for a GPU,
child processes and whole programs. ``-m gpu`` tries what runs on the GPU, or on its stand-in where
there is none.

A test says by its marks what it needs. A test or a folder that is named on the command line runs
as with ``--full``.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import is_hypothesis_test

INTERPRETED = os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0")

MARKERS = {
    "full": "runs with --full alone: child processes, whole programs, much data",
    "gpu": "runs on the GPU with -m gpu, on a stand-in for one with --full",
    "jit_only": "too much data for kernels run as plain Python",
    "each_value": "of a product, the first ring tries each value once, not each pair of values",
    "many_calls": "the stand-in for a GPU tries each value once",
    "within_njit": "--full tries it on the functions as called within @njit, too",
}
# Folders whose suites all belong to --full: importing them takes seconds.
FULL_FOLDERS = {"cuda", "programs"}
# A fixture `target` is each of these in turn: what a suite calls numclip's functions on.
TARGETS = {
    "host": [],
    # The references warn of overflow.
    "cuda": [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")],
    # Each type of arguments takes seconds to compile.
    "njit": [pytest.mark.full, pytest.mark.jit_only, pytest.mark.each_value],
}
# Examples of a property, by the ring and by what a GPU's code runs on.
EXAMPLES = {"first": 25, "full": 100, "rest": 100, "gpu": 25}
EXAMPLES_ON_GPU = {"hardware": 200, "standin": 25}
INTERPRETED_EXAMPLES = 8


def gpu() -> str:
    """Return what code for a GPU runs on in this process."""
    from tests.cuda.gpu import HARDWARE  # imported where there is one, or the stand-in, alone

    return "hardware" if HARDWARE else "standin"


def ring_of(config: pytest.Config) -> str:
    """Return the ring of a run; what is named on the command line runs in full."""
    if config.option.markexpr == "gpu":
        return "gpu"
    paths = [Path(argument.partition("::")[0]).parts for argument in config.args]
    named = any("::" in argument for argument in config.args)
    named = named or any(folder in parts for parts in paths for folder in FULL_FOLDERS)
    if config.getoption("--rest"):
        return "rest"
    return "full" if named or config.getoption("--full") else "first"


def targets(ring: str, is_of_gpu: bool, within_njit: bool) -> list[str]:
    """Return the targets that a ring tries a test on, one of the GPU alone or one of all."""
    names = ["cuda"] if is_of_gpu else ["host", "cuda", *["njit"] * within_njit]
    alone = {"first": "host", "gpu": "cuda"}.get(ring)
    return [name for name in names if alone in (name, None)]


def examples(ring: str) -> int:
    return INTERPRETED_EXAMPLES if INTERPRETED else EXAMPLES[ring]


# ---- which items a ring runs


def chosen(items: Iterable[pytest.Item], ring: str) -> list[pytest.Item]:
    """Return the items that a ring runs, in their order."""
    if ring == "rest":
        done = {id(item) for item in chosen(items, "first") if not is_property(item)}
        return [item for item in chosen(items, "full") if id(item) not in done]
    by_test: dict[Hashable, list[Any]] = {}
    for item in items:
        if runs(item, ring):
            by_test.setdefault(key_of(item), []).append(item)
    kept = {id(item) for same in by_test.values() for item in thinned(same, ring)}
    return [item for item in items if id(item) in kept]


def for_workers(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """Return items in an order for two workers, one of which begins in the middle: with groups.

    They take other kernels than the functions do. Two that began with functions would compile the
    same kernels at the same time, each for itself.
    """
    groups = [item for item in items if "groups" in item.path.parts]
    others = [item for item in items if "groups" not in item.path.parts]
    half = len(items) // 2
    return [*others[:half], *groups, *others[half:]]


def runs(item: pytest.Item, ring: str) -> bool:
    """Whether an item is of a kind that the ring runs."""
    marks = {mark.name for mark in item.iter_markers()}
    if "gpu" in marks:
        return ring != "first" and not INTERPRETED and fits_a_gpu(item)
    if "jit_only" in marks and INTERPRETED:
        return False
    return ring == "full" or (ring == "first" and "full" not in marks)


def is_property(item: Any) -> bool:
    """Whether a test is tried with random examples."""
    return is_hypothesis_test(item.obj) or hasattr(item.obj, "is_property")


def fits_a_gpu(item: Any) -> bool:
    case = getattr(item, "callspec", None) and item.callspec.params.get("case")
    return getattr(case, "fits_a_gpu", True)


def key_of(item: Any) -> Hashable:
    """Return what the items of one test on one target have in common."""
    parameters = getattr(getattr(item, "callspec", None), "params", {})
    return item.nodeid.partition("[")[0], parameters.get("target")


def thinned(items: list[Any], ring: str) -> list[Any]:
    """Return the items of one test whose parameters cover all pairs, where a ring has no more."""
    if not hasattr(items[0], "callspec") or not is_thinned(items[0], ring):
        return items
    marks = {mark.name for mark in items[0].iter_markers()}
    strength = 1 if "each_value" in marks or {"gpu", "many_calls"} <= marks else 2
    return [items[k] for k in covering([values_of(item) for item in items], strength)]


def is_thinned(item: Any, ring: str) -> bool:
    if item.get_closest_marker("gpu") is None:
        return ring == "first" or item.callspec.params.get("target") == "njit"
    # Suites of the GPU alone choose by themselves; those of all targets have the host's products.
    return "target" in item.callspec.params and gpu() != "hardware"


# ---- covering sets


def covering(rows: Sequence[Sequence[Hashable]], strength: int) -> list[int]:
    """Choose rows until every combination of `strength` values that is in one is in a chosen one.

    A greedy choice: the row with most combinations that are new, the first of several.
    """
    strength = min(strength, min(map(len, rows), default=0))
    combinations = [
        {tuple(zip(at, (row[k] for k in at), strict=True)) for at in axes(len(row), strength)}
        for row in rows
    ]
    missing = set().union(*combinations)
    chosen = []
    while missing:
        best = max(range(len(rows)), key=lambda k: len(combinations[k] & missing))
        missing -= combinations[best]
        chosen.append(best)
    return sorted(chosen)


def axes(count: int, strength: int) -> Iterable[tuple[int, ...]]:
    return itertools.combinations(range(count), strength)


def values_of(item: Any) -> tuple[Hashable, ...]:
    """Return what an item was parametrised with; a case counts by its shape, dtype and layout."""
    values: list[Hashable] = []
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0]
        names = [n.strip() for n in names.split(",")] if isinstance(names, str) else names
        given = [item.callspec.params[name] for name in names]
        # The values of one parametrization come together: they are one value.
        values += getattr(given[0], "facets", [tuple(map(id, given))])
    return tuple(values)

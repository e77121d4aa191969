"""Kernels that are kept on disk are made anew where a source of theirs has changed."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from pathlib import Path

import pytest

pytest.importorskip("numba_cuda", reason="numba-cuda is not installed")

from numclip import cuda
from numclip.cuda import device

KERNELS = Path(cuda.__file__).parent / "kernels"
CHECKS = {"numclip.dtypes"}  # for users' own kernels, which we do not keep


def imported(path: Path) -> Iterator[str]:
    """The modules of numclip that a file imports, or imports from."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("numclip"):
            for alias in node.names if node.module == "numclip" else []:
                yield f"numclip.{alias.name}"
            yield str(node.module)


def test_every_source_of_a_kernel_is_known() -> None:
    known = set(device.sources())
    kernels = set(KERNELS.glob("*.py"))
    assert kernels <= known
    shared = {path for path in known if path.parent == KERNELS.parent.parent}
    for path in kernels | shared:
        for name in set(imported(path)) - CHECKS - {"numclip"}:
            spec = importlib.util.find_spec(name)
            assert spec is not None
            assert Path(str(spec.origin)) in known, f"{path.name} imports {name}"


def test_a_kernel_is_kept_with_the_stamp_of_all_sources() -> None:
    from numclip.cuda.kernels.norms import sum_squares

    assert sum_squares._cache._cache_file._source_stamp == device._Cache.stamp

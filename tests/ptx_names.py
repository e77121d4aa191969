"""The names of the GPU's kernels, read from their source: importing them would need numba-cuda."""

from __future__ import annotations

import ast
from pathlib import Path

import numclip

FILES = ("cuda.py", "cuda_updates.py")


def kernel_names() -> set[str]:
    names = set()
    for file in FILES:
        tree = ast.parse(Path(numclip.__file__).parent.joinpath("kernels", file).read_text())
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
                names |= {node.name} if "kernel" in decorators else set()
    return names

"""The names of the GPU's kernels, read from their source: importing them would need numba-cuda."""

from __future__ import annotations

import ast
from pathlib import Path

import numclip


def kernel_names() -> set[str]:
    names = set()
    for path in Path(numclip.__file__).parent.joinpath("cuda", "kernels").glob("*.py"):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef):
                decorators = {d.id for d in node.decorator_list if isinstance(d, ast.Name)}
                names |= {node.name} if "kernel" in decorators else set()
    return names

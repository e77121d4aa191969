"""Compile every kernel of the GPU without one, and print the code, and NVVM's path, as JSON.

NUMBA_FORCE_CUDA_CC tells for which compute capability.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

from numba import cuda
from numba.core import config
from numba.cuda import cuda_paths, dispatcher, types

from numclip.cuda.kernels import (
    deciding,
    halves,
    norms,
    rows,
    scaling,
    tile_scaling,
    tiles,
    units,
    updates,
)

TABLE = types.Array(types.int64, 2, "C")
NUMBERS = types.Array(types.float64, 2, "C")
TICKETS = types.Array(types.uint32, 1, "C")
COUNTS = types.Array(types.int64, 1, "C")
STORAGE = {
    "float16": types.uint16,
    "bfloat16": types.int16,
    "float32": types.float32,
    "float64": types.float64,
}
LIKE = object()  # stands for each type of storage
HALF = object()  # stands for those of 16 bits
SIGNATURES: dict[Any, dict[str, tuple[Any, ...]]] = {
    norms: {
        "sum_squares": (TABLE, TABLE, LIKE, NUMBERS),
        "max_magnitude": (TABLE, TABLE, LIKE, NUMBERS),
        "find_peaks": (TABLE, TABLE, NUMBERS, types.int64, NUMBERS),
        "sum_powers": (TABLE, TABLE, NUMBERS, LIKE, NUMBERS),
    },
    rows: {
        "sum_row_squares": (TABLE, TABLE, COUNTS, TABLE, LIKE, NUMBERS),
        "max_row_magnitude": (TABLE, TABLE, COUNTS, TABLE, LIKE, NUMBERS),
        "sum_row_powers": (TABLE, TABLE, COUNTS, TABLE, NUMBERS, LIKE, NUMBERS),
        "sum_rows": (TABLE, TABLE, COUNTS, LIKE, types.float64),
        "sum_scaled_rows": (TABLE, TABLE, COUNTS, TABLE, NUMBERS, LIKE),
    },
    deciding: {"decide_pools": (TABLE, TABLE, NUMBERS, NUMBERS, TICKETS, NUMBERS, NUMBERS)},
    scaling: {
        "scale": (TABLE, TABLE, NUMBERS, types.int64, types.int64, types.int64, LIKE),
        "copy_chunks": (TABLE, LIKE),
        "add_chunks": (TABLE, LIKE, LIKE),
        "clamp": (TABLE, TABLE, NUMBERS, types.float64, types.float64, LIKE),
        "add": (types.int64,) * 5 + (LIKE,),
    },
    halves: {
        "round_chunks": (TABLE, HALF),
        "take_over_chunks": (TABLE, HALF),
        "widen_chunks": (TABLE, HALF),
    },
    tiles: {
        "sum_tile_squares": (TABLE, TABLE, LIKE, NUMBERS),
        "max_tile_magnitude": (TABLE, TABLE, LIKE, NUMBERS),
        "sum_tile_powers": (TABLE, TABLE, NUMBERS, LIKE, NUMBERS),
    },
    tile_scaling: {
        "scale_tiles": (TABLE, TABLE, NUMBERS, types.int64, types.int64, types.int64, LIKE),
        "clamp_tiles": (TABLE, TABLE, NUMBERS, types.float64, types.float64, LIKE),
        "clamp_tiles_between": (TABLE, LIKE),
        "sum_examples": (TABLE, TABLE, NUMBERS, LIKE),
    },
    units: {
        "find_unit_peaks": (TABLE, TABLE, NUMBERS, NUMBERS, types.int64, NUMBERS),
        "decide_units": (TABLE, TABLE, NUMBERS, NUMBERS, NUMBERS, TICKETS, NUMBERS),
        "summarize_units": (TABLE, TABLE, NUMBERS, NUMBERS, TICKETS, NUMBERS, NUMBERS),
    },
    updates: {
        "advance": (NUMBERS, COUNTS),
        "advance_adam": (NUMBERS, NUMBERS, COUNTS, NUMBERS),
        "descend": (TABLE, TABLE, NUMBERS, NUMBERS, LIKE),
        "adam": (TABLE, TABLE, NUMBERS, NUMBERS, LIKE),
    },
}


def code(kernel: Any, signature: tuple[Any, ...], capability: tuple[int, int]) -> str:
    made, _ = cuda.compile(kernel.py_func, signature, device=False, abi="numba", cc=capability)
    return made


def everything(capability: tuple[int, int]) -> dict[str, str]:
    found = {}
    for module, table in SIGNATURES.items():
        for name, signature in table.items():
            own_types = STORAGE.items() if LIKE in signature else [("", None)]
            if HALF in signature:
                own_types = list(STORAGE.items())[:2]
            for dtype, like in own_types:
                own = tuple(like if part in (LIKE, HALF) else part for part in signature)
                found[f"{name} {dtype}".strip()] = code(getattr(module, name), own, capability)
    return found


if __name__ == "__main__":
    cuda_paths._get_nvrtc_path = lambda: None  # NVVM is all that is needed
    capability = config.FORCE_CUDA_CC
    device = SimpleNamespace(compute_capability=capability)
    dispatcher.get_current_device = lambda: device
    kernels = everything(capability)
    print(json.dumps({"nvvm": cuda_paths.get_cuda_paths()["nvvm"].info, "kernels": kernels}))

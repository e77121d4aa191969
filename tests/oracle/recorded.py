"""Cases with the results of TensorFlow, PyTorch and optax, recorded in golden/."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

import numclip as nc

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "cases.json").read_text())
ARRAYS = dict(np.load(GOLDEN / "arrays.npz"))


def load(entry: Any) -> Any:
    if entry is None:
        return None
    if isinstance(entry, str):
        return ARRAYS[entry]
    if "dense" in entry:
        return ARRAYS[entry["dense"]]
    return nc.IndexedSlices(
        ARRAYS[entry["values"]], ARRAYS[entry["indices"]], tuple(entry["dense_shape"])
    )

"""The table of measured cases, from which the suite, the tables and the picture are made.

The tests' cases have the same models, cut small: see tests/oracle/cases.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from bench.clips import CLIP
from bench.each import COLUMNS, MIXED, RATIO, VALUE
from bench.per_example import PER_EXAMPLE
from bench.sparse import ROWS, SPARSE
from bench.steps import ADAM, ADAM_ROWS, SGD, SGD_ROWS, WORDS
from bench.workload import Workload
from tests.oracle.cases import cut, of_shapes
from tests.oracle.models import MODELS, Shape

EXAMPLES = 64
CHAR_RNN: list[Shape] = [(100, 80), (100, 100), (80, 100), (100, 1), (80, 1)]


@dataclass(frozen=True)
class Case:
    """Gradients of some shapes, the work done with them, and numclip's goals.

    The goals are to be `faster` times as fast as the fastest peer, and to take at most `limit`
    times as long as the limit, on flat buffers `flat` times.
    """

    name: str
    shapes: list[Shape]
    kind: Workload
    faster: float
    limit: float | None = None
    flat: float | None = None


CASES = [
    Case("4 small", MODELS["4 small"], CLIP, 1.3),
    Case("1000 x 256", MODELS["1000 x 256"], CLIP, 20, 2.0, 1.5),
    Case("PTB small", MODELS["PTB small"], CLIP, 1.4, 1.20, 1.10),
    Case("PTB medium", MODELS["PTB medium"], CLIP, 1.1, 1.15, 1.10),
    Case("ResNet-50", MODELS["ResNet-50"], CLIP, 1.25, 1.12, 1.10),
    Case("GPT-2 small", MODELS["GPT-2 small"], CLIP, 1.0, 1.10, 1.10),
    Case("flat 512 MB", [(1 << 27,)], CLIP, 1.0, 1.10, 1.10),
    Case("sparse rows", [(65_536, 64)], SPARSE, 3.0),
    Case("per example", [(1024, 1024), (1024,), (1024, 20), (20,)], PER_EXAMPLE, 1.5),
    Case("per example, small", [(64, 32), (32,), (32, 10), (10,)], PER_EXAMPLE, 1.5),
    Case("each by value, char RNN", CHAR_RNN, VALUE, 1.5),
    Case("each by columns, char RNN", CHAR_RNN, COLUMNS, 1.5),
    Case("each by its parameter, char RNN", CHAR_RNN, RATIO, 1.5),
    Case("two dtypes, char RNN", CHAR_RNN, MIXED, 1.5),
    Case("SGD, 4 small", MODELS["4 small"], SGD, 2.0),
    Case("SGD, ResNet-50", MODELS["ResNet-50"], SGD, 1.1, 1.15),
    Case("Adam, 4 small", MODELS["4 small"], ADAM, 6.0),
    Case("Adam, ResNet-50", MODELS["ResNet-50"], ADAM, 1.25, 1.15),
    Case("SGD, 20 rows and 4 small", [(20, 64), *MODELS["4 small"]], SGD_ROWS, 3.0),
    Case("Adam, 20 rows and 4 small", [(20, 64), *MODELS["4 small"]], ADAM_ROWS, 3.0),
]


@lru_cache(maxsize=1)
def data(case: str, small: bool) -> tuple[Any, int, float]:
    """Return a case's data, their bytes and the norm that sets bounds; cut shapes if `small`."""
    chosen = next(other for other in CASES if other.name == case)
    rng = np.random.default_rng(0)
    shapes = cut(chosen.shapes) if small else chosen.shapes
    if chosen.kind is PER_EXAMPLE:
        shapes = [(EXAMPLES, *shape) for shape in shapes]
    indices = rng.zipf(1.3, shapes[0][0]) % ROWS
    arrays = of_shapes(rng, shapes)
    # Rows with a mean of 1: a norm that does not sum repeated rows is far off.
    made = (arrays[0] + np.float32(1), indices) if chosen.kind is SPARSE else arrays
    if chosen.kind in (SGD_ROWS, ADAM_ROWS):
        made = (arrays, indices % WORDS)
    return made, sum(array.nbytes for array in arrays), chosen.kind.norm(made)

"""Arrays part by part: sums along columns, columns times factors, and sums over examples."""

from __future__ import annotations

import numpy as np

from numclip.dtypes import Array
from numclip.host.kernels import columns
from numclip.host.kernels.tuning import COLUMN_ROWS, COLUMNS, EXAMPLE_COLUMNS
from numclip.host.runtime import threads


def column_squares(x: Array) -> Array:
    """Return the sums of squares over the middle axis of a 3-d array of storage."""
    outer, reduced, inner = x.shape
    parts = max(1, -(-reduced // COLUMN_ROWS))
    out = np.empty((outer, parts, inner))
    count = outer * parts * -(-inner // COLUMNS)
    threads.run(columns.column_squares, count, x.nbytes, x, COLUMN_ROWS, out)
    if parts > 1:
        columns.add_parts(out)
    return out[:, 0]


def scaling_columns(x: Array, factors: Array, out: Array) -> threads.Call:
    """Return the call that writes `x` times factors of the shape (outer, inner)."""
    count = x.shape[0] * x.shape[1]
    return threads.Call(columns.scale_columns, count, x.nbytes, (x, factors, out))


def sum_examples(x: Array, factors: Array, out: Array) -> None:
    """Write the sum over the first axis of `x`, each example times its factor."""
    count = -(-x.shape[1] // EXAMPLE_COLUMNS)
    threads.run(columns.sum_examples, count, x.nbytes, x, factors, EXAMPLE_COLUMNS, out)

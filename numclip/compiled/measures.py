"""A table of tensors measured and clipped within compiled code, by each policy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from numclip.dtypes import Array, lookup
from numclip.kernels.jit import OWN_FLAGS, inline
from numclip.kernels.spans import clear_all, clip, narrow_norm, norm_of, scale_by_power
from numclip.nonfinite import NonFiniteGradientError


def limits_of(narrow: type, wide: type) -> Array:
    """Return what `kernels.joint` is told of two element types together."""
    rows = [lookup(np.dtype(narrow)), lookup(np.dtype(wide))]
    roundoff, digits, tiny, coarse = np.array([row.limits for row in rows if row]).T
    return np.array([roundoff.max(), digits.min(), tiny.max(), coarse.max()])


def measured(rows, count, narrow, wide):
    """Return the norm of all tensors as ``root * 2**exponent``."""


@overload(measured, jit_options=OWN_FLAGS)
def _measured(rows, count, narrow, wide):
    measure = narrow_norm if wide.dtype == types.float32 else norm_of
    return lambda rows, count, narrow, wide: measure(rows, count, narrow, wide)


@inline
def propagated(rows, count, narrow, wide, limits, bound, given, divisor):
    """Clip in place; return the norm, and whether anything was written."""
    root, exponent = (given, 0) if not given < 0.0 else measured(rows, count, narrow, wide)
    changed = clip(rows, count, narrow, wide, limits, root, exponent, bound, divisor)
    return scale_by_power(root, exponent), changed


@inline
def is_bad(root, given):
    """Tell whether the norm that was measured, or the one that was given, is not finite."""
    return not (math.isfinite(root) and (given < 0.0 or math.isfinite(given)))


@inline
def finished(rows, count, narrow, wide, limits, bound, given, divisor, root, exponent):
    """Clip in place by a norm that was given or measured; return as `propagated` does."""
    if not given < 0.0:
        root, exponent = given, 0
    changed = clip(rows, count, narrow, wide, limits, root, exponent, bound, divisor)
    return scale_by_power(root, exponent), changed


@inline
def raising(rows, count, narrow, wide, limits, bound, given, divisor):
    """Clip as `propagated` does; raise an error where anything is not finite."""
    root, exponent = measured(rows, count, narrow, wide)
    if is_bad(root, given):
        raise NonFiniteGradientError(
            "grads, or use_norm, are not finite; nothing was modified", None, 0, math.nan, 0
        )
    return finished(
        rows, count, narrow, wide, limits, bound, given, divisor, root, exponent
    )


@inline
def skipping(rows, count, narrow, wide, limits, bound, given, divisor):
    """Clip as `propagated` does; write nothing where anything is not finite."""
    root, exponent = measured(rows, count, narrow, wide)
    if is_bad(root, given):
        return (scale_by_power(root, exponent) if given < 0.0 else given), False
    return finished(
        rows, count, narrow, wide, limits, bound, given, divisor, root, exponent
    )


@inline
def zeroing(rows, count, narrow, wide, limits, bound, given, divisor):
    """Clip as `propagated` does; write 0 for what is not finite, clip by the norm of the rest."""
    root, exponent = measured(rows, count, narrow, wide)
    bad = is_bad(root, given)
    if bad:
        clear_all(rows, count, narrow, wide)
        root, exponent = measured(rows, count, narrow, wide)
        given = given if math.isfinite(given) else -1.0
    norm, changed = finished(
        rows, count, narrow, wide, limits, bound, given, divisor, root, exponent
    )
    return norm, changed or bad


POLICIES = {
    "propagate": propagated,
    "raise": raising,
    "skip": skipping,
    "zero": zeroing,
}

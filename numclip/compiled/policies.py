"""A table of tensors measured and clipped within compiled code, by each policy.

Each policy returns the norm before clipping, and whether anything was written.
"""

from __future__ import annotations

import math

from numba import types
from numba.extending import overload

from numclip.compiled.calls import call
from numclip.kernels.jit import OWN_FLAGS, inline
from numclip.kernels.spans import bring, clear_nonfinite, joint_norm, rescued_norm, scale_by_power
from numclip.nonfinite import NonFiniteGradientError


def measured(rows, count, narrow, wide):
    """Return the L2 norm of all tensors as ``root * 2**exponent``."""


@overload(measured, jit_options=OWN_FLAGS)
def _measured(rows, count, narrow, wide):
    if wide.dtype == types.float32:

        def measure(rows, count, narrow, wide):
            norm, _ = call(joint_norm, (rows, count, narrow, wide))
            return norm, 0

    else:

        def measure(rows, count, narrow, wide):
            norm, right = call(joint_norm, (rows, count, narrow, wide))
            if right:
                return norm, 0
            return call(rescued_norm, (rows, count, narrow))

    return measure


@inline
def is_bad(root, given):
    """Tell whether the norm that was measured, or the one that was given, is not finite."""
    return not (math.isfinite(root) and (given < 0.0 or math.isfinite(given)))


@inline
def propagated(rows, count, narrow, wide, bound, given, divisor):
    """Clip in place by a norm that is given, or measured where that is -1."""
    if given < 0.0:
        root, exponent = measured(rows, count, narrow, wide)
    else:
        root, exponent = given, 0
    arguments = rows, count, narrow, wide, root, exponent, bound, divisor
    return scale_by_power(root, exponent), call(bring, arguments)


@inline
def raising(rows, count, narrow, wide, bound, given, divisor):
    """Clip in place; raise an error where anything is not finite."""
    root, exponent = measured(rows, count, narrow, wide)
    if is_bad(root, given):
        raise NonFiniteGradientError(
            "grads, or use_norm: expected finite numbers; nothing was modified",
            None,
            0,
            math.nan,
            0,
        )
    if not given < 0.0:
        root, exponent = given, 0
    arguments = rows, count, narrow, wide, root, exponent, bound, divisor
    return scale_by_power(root, exponent), call(bring, arguments)


@inline
def skipping(rows, count, narrow, wide, bound, given, divisor):
    """Clip in place; write nothing where anything is not finite."""
    root, exponent = measured(rows, count, narrow, wide)
    bad = is_bad(root, given)
    if not given < 0.0:
        root, exponent = given, 0
    arguments = rows, count, narrow, wide, root, exponent, math.inf if bad else bound, divisor
    return scale_by_power(root, exponent), call(bring, arguments)


@inline
def zeroing(rows, count, narrow, wide, bound, given, divisor):
    """Clip in place; write 0 for what is not finite, and clip by the norm of the rest."""
    root, exponent = measured(rows, count, narrow, wide)
    bad = is_bad(root, given)
    if bad:
        call(clear_nonfinite, (rows, count, narrow, wide))
        root, exponent = measured(rows, count, narrow, wide)
    if given >= 0.0 and math.isfinite(given):
        root, exponent = given, 0
    arguments = rows, count, narrow, wide, root, exponent, bound, divisor
    return scale_by_power(root, exponent), call(bring, arguments) or bad


POLICIES = {
    "propagate": propagated,
    "raise": raising,
    "skip": skipping,
    "zero": zeroing,
}

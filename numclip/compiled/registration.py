"""Registers the functions that users' compiled code may call; implementations load on use."""

from __future__ import annotations

from numba.extending import overload

from numclip import functional
from numclip.host.runtime.jit import OWN_FLAGS


@overload(functional.global_norm, jit_options=OWN_FLAGS)
def _global_norm(grads, ord=2, duplicates="sum"):
    from numclip.compiled import functions

    return functions.global_norm(grads, ord, duplicates)


@overload(functional.clip_by_global_norm, jit_options=OWN_FLAGS)
def _clip_by_global_norm(
    grads,
    clip_norm,
    use_norm=None,
    ord=2,
    nonfinite="propagate",
    duplicates="sum",
    out=None,
):
    from numclip.compiled import functions

    return functions.clip_by_global_norm(
        grads, clip_norm, use_norm, ord, nonfinite, duplicates, out
    )


@overload(functional.clip_by_norm, jit_options=OWN_FLAGS)
def _clip_by_norm(grad, clip_norm, axes=None, ord=2, out=None):
    from numclip.compiled import functions

    return functions.clip_by_norm(grad, clip_norm, axes, ord, out)


@overload(functional.clip_by_average_norm, jit_options=OWN_FLAGS)
def _clip_by_average_norm(grad, clip_norm, out=None):
    from numclip.compiled import functions

    return functions.clip_by_average_norm(grad, clip_norm, out)


@overload(functional.clip_by_block_rms, jit_options=OWN_FLAGS)
def _clip_by_block_rms(grad, threshold, out=None):
    from numclip.compiled import functions

    return functions.clip_by_block_rms(grad, threshold, out)


@overload(functional.clip_by_value, jit_options=OWN_FLAGS)
def _clip_by_value(grad, clip_value_min, clip_value_max, out=None):
    from numclip.compiled import functions

    return functions.clip_by_value(grad, clip_value_min, clip_value_max, out)

"""Norms over whole arrays, and clips by them, within compiled code."""

from __future__ import annotations

import math
from typing import Any

from numclip.compiled.arrays import are_same
from numclip.compiled.containers import (
    all_copied,
    all_entered,
    all_left,
    check_apart,
    describe_all,
    keep,
    room_for,
    table_in,
)
from numclip.compiled.measures import POLICIES, limits_of, measured, propagated
from numclip.compiled.numbers import bound_of, given_norm, threshold_of
from numclip.compiled.types_taken import (
    check_default,
    check_gradient,
    check_number,
    check_out,
    choice,
    element_types,
    is_nothing,
    members,
)
from numclip.kernels.jit import inline
from numclip.kernels.spans import scale_by_power

OTHER_ORDERS = "other orders are taken outside compiled code"
NO_SLICES = "arrays have no rows that repeat"


def check_arguments(gradients: list[Any], ord: Any, duplicates: Any) -> None:
    """Refuse what compiled code does not take."""
    check_default("ord", ord, 2, OTHER_ORDERS)
    if duplicates is not None:
        choice("duplicates", duplicates, ("sum", "raw"))


@inline
def check_same(out, grads):
    """Refuse results that would go elsewhere."""
    if not are_same(out, grads):
        raise ValueError("out: expected the gradients themselves, to work in place, or None")


def global_norm(grads: Any, ord: Any, duplicates: Any) -> Any:
    """Return the implementation for these types."""
    gradients = members("grads", grads)
    check_arguments(gradients, ord, duplicates)
    narrow, wide = element_types(gradients)

    def norm(grads, ord=2, duplicates="sum"):
        works = all_entered(grads)
        room = room_for(grads)
        rows = table_in(room, grads)
        describe_all(rows, grads, works)
        root, exponent = measured(rows, len(grads), narrow, wide)
        keep(room)
        keep(works)
        return scale_by_power(root, exponent)

    return norm


def clip_by_global_norm(
    grads: Any, clip_norm: Any, use_norm: Any, ord: Any, nonfinite: Any, duplicates: Any, out: Any
) -> Any:
    """Return the implementation for these types."""
    gradients = members("grads", grads)
    check_arguments(gradients, ord, duplicates)
    check_number("clip_norm", clip_norm)
    if not is_nothing(use_norm):
        check_number("use_norm", use_norm)
    run = POLICIES[choice("nonfinite", nonfinite, tuple(POLICIES))]
    narrow, wide = element_types(gradients)
    limits = limits_of(narrow, wide)

    def into_new_arrays(
        grads, clip_norm, use_norm=None, ord=2, nonfinite="propagate", duplicates="sum", out=None
    ):
        bound, given = bound_of(clip_norm), given_norm(use_norm)
        works = all_copied(grads)
        room = room_for(grads)
        rows = table_in(room, works)
        describe_all(rows, works, works)
        norm, _ = run(rows, len(grads), narrow, wide, limits, bound, given, 1.0)
        keep(room)
        return works, norm

    def in_place(
        grads, clip_norm, use_norm=None, ord=2, nonfinite="propagate", duplicates="sum", out=None
    ):
        bound, given = bound_of(clip_norm), given_norm(use_norm)
        check_same(out, grads)
        works = all_entered(grads)
        room = room_for(grads)
        rows = table_in(room, grads)
        describe_all(rows, grads, works)
        check_apart(rows, len(grads))
        norm, changed = run(rows, len(grads), narrow, wide, limits, bound, given, 1.0)
        if changed:
            all_left(grads, works)
        keep(room)
        keep(works)
        return grads, norm

    return in_place if check_out("grads", out, grads, gradients) else into_new_arrays

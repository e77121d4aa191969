"""Numbers that users give in compiled code, checked when the code runs."""

from __future__ import annotations

from typing import Any

from numba import types
from numba.extending import overload

from numclip.compiled.types_taken import is_nothing
from numclip.kernels.jit import OWN_FLAGS, inline


def number_of(value):
    """Return a number, or a 0-d array of one, as a float; -1 where there is none."""


@overload(number_of, jit_options=OWN_FLAGS)
def _number_of(value):
    if is_nothing(value):
        return lambda value: -1.0
    if isinstance(value, types.Array):
        return lambda value: float(value[()])
    return lambda value: float(value)


@inline
def bound_of(clip_norm):
    """Return the bound on a norm."""
    bound = number_of(clip_norm)
    if not bound >= 0.0:
        raise ValueError("clip_norm: expected a number >= 0 (inf never clips)")
    return bound


@inline
def threshold_of(threshold):
    """Return the bound on a root mean square."""
    bound = number_of(threshold)
    if not bound >= 0.0:
        raise ValueError("threshold: expected a number >= 0 (inf never clips)")
    return bound


def given_norm(use_norm):
    """Return the norm the user gives, -1 where there is none."""


@overload(given_norm, jit_options=OWN_FLAGS)
def _given_norm(use_norm):
    if is_nothing(use_norm):
        return lambda use_norm: -1.0

    def given(use_norm):
        norm = number_of(use_norm)
        if norm < 0.0:
            raise ValueError("use_norm: expected a norm, which is >= 0")
        return norm

    return given

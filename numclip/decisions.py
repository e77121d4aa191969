"""The decision: from a norm and a law to a factor and a mode, in plain Python.

Each target compiles this source, as it does `formulas`. Laws and decisions are rows of tables, see
`tables`. Both engines decide by these functions alone.
"""

import math
from collections.abc import Callable, Sequence
from types import FunctionType, SimpleNamespace
from typing import Any

from numclip import formulas
from numclip.formulas import SAFE, clip_factor, factor_over, norm_of, scale_by_power
from numclip.tables import (
    AIM,
    BOUND,
    BROKEN,
    CANCELLATION,
    CLAMPED,
    CLEAN,
    CLIPPED,
    DIVISOR,
    EPS,
    FACTOR,
    FINE,
    GIVEN,
    LEAVE,
    MANTISSA,
    MODE,
    MULTIPLY,
    NORM,
    ORD,
    POWER,
    RAISE,
    ROOT,
    ROOT_EXPONENT,
    ROUNDOFF,
    SCALE,
    SKIP,
    SKIPPED,
    TINY,
    TRUNCATE,
    TRUNCATE_BELOW,
    UNSCALE,
    ZERO,
)

Parts = Sequence[Callable[..., Any]]


def compiled(functions: Parts, compiler: Callable[[Any], Any]) -> SimpleNamespace:
    """Return functions compiled for a target, each calling those before it as compiled there."""
    made: dict[str, Any] = {}
    for function in functions:
        own: Any = function
        names = own.__globals__ | made
        made[own.__name__] = compiler(FunctionType(own.__code__, names, own.__name__))
    return SimpleNamespace(**made)


def write_root(law, norm, power, bad, out):  # type: ignore[no-untyped-def]
    """Write a pool's norm, over the loss scale and the divisor, as ``root * 2**exponent``."""
    out[ROOT], out[ROOT_EXPONENT] = norm / law[UNSCALE] / law[DIVISOR], power
    given_badly = not law[GIVEN] < 0.0 and not math.isfinite(law[GIVEN])
    out[BROKEN] = bad + 1.0 if given_badly else bad
    out[CANCELLATION] = 0.0


def write_norm(law, total, exponent, bad, out):  # type: ignore[no-untyped-def]
    """Write the norm of a pool as ``root * 2**exponent``, from its sum of powers."""
    norm, power = norm_of(total, exponent, law[ORD])
    write_root(law, norm, power, bad, out)


def write_cancellation(law, sums, terms, out):  # type: ignore[no-untyped-def]
    """Write the cancellation: the norm of the rows' summed magnitudes over that of their sums.

    `sums` and `terms` are pairs of a total and its exponent.
    """
    if sums[0] > 0.0:
        norm, power = norm_of(sums[0], sums[1], law[ORD])
        upper, upper_power = norm_of(terms[0], terms[1], law[ORD])
        out[CANCELLATION] = scale_by_power(upper / norm, int(upper_power - power))


def factor_of(norm, power, bound, aim, truncate_below, roundoff, digits, tiny):  # type: ignore[no-untyped-def]
    """Return (mantissa, exponent, truncates): the factor for a norm ``norm * 2**power``.

    A norm above `bound` is brought to `aim`; a bound of 0 also scales norms that underflow.
    `truncates` says that subnormal results must be rounded toward zero: because their
    rounding counts (see `formulas`) if the aim is under `truncate_below`, or as the factor is
    inexact if it is under `tiny`.
    """
    if scale_by_power(norm, power) <= bound and (bound > 0.0 or norm == 0.0):
        return 1.0, 0, False
    mantissa, exponent = clip_factor(aim, norm, power, roundoff, digits)
    small = aim < truncate_below or scale_by_power(mantissa, exponent) < tiny
    return mantissa, exponent, small and 0.0 < mantissa < 1.0


def write_factor(law, limits, compared, reported, leaves, digits, out):  # type: ignore[no-untyped-def]
    """Write the factor that brings the norm `compared` to a bound, and the mode.

    `limits` are the bound, the aim, the aim under which to truncate, and the roundoff.
    The norm `reported` is written for reports, before and after clipping; both norms are pairs of a
    root and its exponent.
    """
    bound, aim, truncate_below, roundoff = limits
    mantissa, power, small = 1.0, 0, False
    if not leaves:
        mantissa, power, small = factor_of(
            compared[0], compared[1], bound, aim, truncate_below, roundoff, digits, law[TINY]
        )
    out[NORM] = scale_by_power(reported[0], reported[1])
    out[CLIPPED] = scale_by_power(reported[0] * mantissa, reported[1] + power)
    out[SCALE] = scale_by_power(mantissa, power)
    if law[UNSCALE] != 1.0 and not leaves:
        mantissa, power = factor_over(mantissa, power, law[UNSCALE], digits)
        small = small or (mantissa > 0.0 and scale_by_power(mantissa, power) < law[TINY])
    out[FACTOR] = scale_by_power(mantissa, power)
    out[MANTISSA], out[POWER] = mantissa, power
    if small:
        out[MODE] = TRUNCATE
    else:
        out[MODE] = MULTIPLY if mantissa != 1.0 or power != 0 else LEAVE


def decide(law, policy, digits, bad, out):  # type: ignore[no-untyped-def]
    """Write the factor of a pool, the mode of its tensors, and the values for reports."""
    norm, cancellation, given = (out[ROOT], int(out[ROOT_EXPONENT])), out[CANCELLATION], law[GIVEN]
    if not given < 0.0 and (policy != ZERO or math.isfinite(given)):
        upper = scale_by_power(cancellation * norm[0], norm[1])
        norm, cancellation = (given, 0), upper / given if given > 0.0 else 0.0
    roundoff = law[ROUNDOFF] * (cancellation if cancellation > 1.0 else 1.0)
    leaves = bad and (policy in (SKIP, RAISE))
    out[SKIPPED], out[CLAMPED] = (1.0 if leaves else 0.0), 0.0
    limits = law[BOUND], law[AIM], law[TRUNCATE_BELOW], roundoff
    write_factor(law, limits, norm, norm, leaves, digits, out)
    out[FINE] = out[FACTOR]
    if law[UNSCALE] != 1.0 and not leaves:
        mantissa, power = math.frexp(out[SCALE])
        mantissa, power = factor_over(mantissa, power, law[UNSCALE], 53)
        out[FINE] = scale_by_power(mantissa, power)
    if bad and policy == ZERO:
        out[MODE] = CLEAN


def relative(law, norm, param):  # type: ignore[no-untyped-def]
    """Return (bound, ratio, truncate_below) for the ratio of a norm to a parameter's norm.

    Ratios are compared, as a product of norms could over- or underflow. A bound near or below the
    normal numbers is scaled by a power of two, and all else with it, to keep the digits of ratios.
    """
    bound, root, power = law[BOUND], param[0], param[1]
    if scale_by_power(root, power) < law[EPS]:
        root, power = math.frexp(law[EPS])
    if root == 0.0:
        bound = 0.0 if bound < math.inf else bound
        root, power = 1.0, 0
    if 0.0 < bound < SAFE[0]:
        bound, shift = math.frexp(bound)
        power += shift
    truncate_below = scale_by_power(law[TRUNCATE_BELOW] / root, -power)
    return bound, (norm[0] / root, norm[1] - power), truncate_below


SCALARS: Parts = (
    formulas.two_sum,
    formulas.settled,
    formulas.is_settled,
    formulas.is_safe,
    formulas.binned_square,
    formulas.sum_of_bins,
    formulas.larger,
    formulas.capped_order,
    formulas.is_product,
    formulas.usable,
    formulas.power_term,
    formulas.root,
    formulas.scale_by_power,
    formulas.split_order,
    formulas.power_sum,
    formulas.norm_of,
    formulas.clip_factor,
    formulas.factor_over,
    formulas.truncated_product,
    formulas.clamped,
)
DECISIONS: Parts = (
    write_root,
    write_norm,
    write_cancellation,
    factor_of,
    write_factor,
    decide,
    relative,
)

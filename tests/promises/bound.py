"""The bound in exact arithmetic on random calls: ``python -m tests.promises.bound 1000000 [draw]``.

Small arrays of hostile magnitudes are clipped in new memory or in place: random bits, subnormals,
numbers next to the largest, tiny ones beside huge ones, all equal. The bound is the norm itself,
one next to it, a share of it, subnormal, or anything. What the contract promises of the result is
looked at: the bound, and how far it may be missed, in exact arithmetic; that one factor explains
every element; that no bit changed where nothing was clipped. Each draw of arrays, which is found
again by its number, serves some calls of one function with bounds of their own.

Sums of squares are compared in extended precision first, whose error is known, and as fractions
where that leaves it open.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np

import numclip as nc
from tests.oracle import checks, reference, strategies
from tests.oracle.reference import DTYPES, PRECISION, REAL_DTYPES

CALLS_A_DRAW = 8
MOST = 40  # elements
LARGEST = sys.float_info.max
SMALLEST = {name: float(reference.float_info(name).smallest_subnormal) for name in PRECISION}
# Binary exponents from the smallest number's to the largest's.
EXPONENTS = {
    name: (math.frexp(SMALLEST[name])[1], math.frexp(float(reference.float_info(name).max))[1])
    for name in PRECISION
}
# The measured norm's relative error and that of the law, as `numclip.formulas` has them, and a bit.
DOUBT = Fraction(1, 2**48)
# A sum of a hundred products in extended precision is nearer.
EXTENDED = np.longdouble
NEAR = 256 * np.finfo(EXTENDED).eps
SURE = np.finfo(EXTENDED).tiny * 1e6, np.finfo(EXTENDED).max / 1e6
TOLD = 20  # failures, after which there is no need to go on


class Limit(NamedTuple):
    """A bound, and what its square is to be multiplied by; also in extended precision."""

    bound: float
    times: Fraction = Fraction(1)
    wide_times: Any = EXTENDED(1)

    def square(self, slack: Fraction, grain: int = 0) -> Fraction:
        """The square of so much more, `grain` being in the smallest numbers of float64."""
        if self.bound == math.inf:
            return Fraction(4) ** 2000  # no norm comes near
        return (
            max(Fraction(self.bound) * (1 + slack) + grain * Fraction(5e-324), 0) ** 2 * self.times
        )


class Vector:
    """The numbers of arrays that are clipped together."""

    def __init__(self, *arrays: np.ndarray) -> None:
        self.arrays = arrays
        parts = [reference.components(array) for array in arrays]
        self.numbers = parts[0] if len(parts) == 1 else np.concatenate(parts)
        wide = self.numbers.astype(EXTENDED)
        self.wide_square = wide.dot(wide)

    @functools.cached_property
    def precision(self) -> np.ndarray:
        return self._of_each(PRECISION)

    @functools.cached_property
    def smallest(self) -> np.ndarray:
        return self._of_each(SMALLEST)

    def _of_each(self, facts: dict[str, Any]) -> np.ndarray:
        sizes = [array.size * (1 + (array.dtype.kind == "c")) for array in self.arrays]
        return np.repeat([facts[array.dtype.name] for array in self.arrays], sizes)

    @functools.cached_property
    def square(self) -> Fraction:
        return reference.array_square_sum(self.numbers)

    @property
    def norm(self) -> float:
        with np.errstate(over="ignore"):
            return min(float(np.sqrt(self.wide_square)), LARGEST)

    def at_most(self, limit: Limit, slack: Fraction = Fraction(0), grain: int = 0) -> bool:
        """Whether the norm is at most that much more than a bound: exactly."""
        bound = EXTENDED(limit.bound) * (1 + EXTENDED(slack.numerator) / slack.denominator)
        edge = bound * bound * limit.wide_times
        small = grain and limit.bound < 1e-280
        if not small and all(SURE[0] < x < SURE[1] for x in (self.wide_square, edge)):
            if self.wide_square < edge * (1 - NEAR):
                return True
            if self.wide_square > edge * (1 + NEAR):
                return False
        return self.square <= limit.square(slack, grain)


class Case:
    """The random choices of one case."""

    def __init__(self, number: int) -> None:
        self.rng = np.random.default_rng(number)

    def one(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def array(self, name: str, *shape: int) -> np.ndarray:
        """An array whose elements may lie backwards, apart or in Fortran order."""
        flat, layout = self.numbers(name, math.prod(shape)), self.rng.integers(8)
        if layout == 0:
            return flat.reshape(shape)[::-1]
        if layout == 1:
            return np.repeat(flat, 2)[::2].reshape(shape)
        return flat.reshape(shape, order="F" if layout == 2 else "C")

    def numbers(self, name: str, size: int) -> np.ndarray:
        kind = self.rng.integers(8)
        if kind == 0:
            return strategies.from_bits(self.rng, size, DTYPES[name])
        lowest, highest = EXPONENTS[name]
        top = {1: lowest, 2: highest - 3}.get(kind, int(self.rng.integers(lowest, highest)))
        near = self.band(name, size, top, self.one(0, 1, 2, 4, 30))
        if kind == 3:
            return np.resize(near[:1], size)
        if kind > 5:
            return near
        if kind == 4:
            others = near * 0
        else:  # terms, or their squares, that are just lost beside the others
            below = PRECISION[name] * self.one(1, 2) // self.one(1, 2) + self.one(-1, 0, 1)
            others = self.band(name, size, max(top - below, lowest), self.one(0, 1))
        return np.where(self.rng.random(size) < self.one(0.1, 0.5, 0.9), near, others)

    def band(self, name: str, size: int, exponent: int, width: int) -> np.ndarray:
        return strategies.in_band(self.rng, size, DTYPES[name], exponent, width)

    def slices(self, name: str) -> nc.IndexedSlices:
        rows, columns = int(self.rng.integers(1, 9)), self.one(1, 3)
        values = self.numbers(name, rows * columns).reshape(rows, columns)
        if rows > 1 and self.rng.integers(3) == 0:
            values[1] = -values[0]
        return nc.IndexedSlices(values, self.rng.integers(0, 6, rows), (6, columns))

    def bound(self, norm: float, name: str) -> float:
        """A bound for what has this norm."""
        kind = self.rng.integers(12)
        if kind < 3:
            to = self.one(0.0, LARGEST)
            for _ in range(self.rng.integers(4)):
                norm = math.nextafter(norm, to)
            return norm
        if kind == 3:
            return norm * (1 - 2.0 ** -int(self.rng.integers(1, 54)))
        if kind == 4:
            return self.one(0.0, math.inf, LARGEST, 5e-324, 1e-310, 1.0)
        if kind == 5:
            return min(SMALLEST[name] * int(self.rng.integers(1, 2000)), LARGEST)
        if kind == 6:
            return min(norm * self.rng.uniform(1, 2), LARGEST)
        if kind == 7:
            return norm * 10.0 ** -int(self.rng.integers(1, 40))
        return norm * float(self.rng.random())

    def call(self, function: Callable[..., Any], grad: Any, *arguments: Any) -> Any:
        """Call a function of a gradient, or of a list, or in place of a copy."""
        if self.rng.integers(2):
            given = [copied(g) for g in grad] if isinstance(grad, list) else copied(grad)
            return function(given, *arguments, out=given)
        return function(grad, *arguments)


def copied(grad: Any) -> Any:
    if reference.is_sparse(grad):
        return grad.with_values(grad.values.copy())
    copy = np.empty_like(grad)  # in the same order
    copy[...] = grad
    return copy


def same_bits(before: Any, after: Any) -> bool:
    return reference.stored(before).tobytes() == reference.stored(after).tobytes()


def check(before: Vector, after: Vector, limit: Limit, norm: float | None = None) -> bool:
    """Compare what was clipped together with what is promised; tell whether it was clipped."""
    untouched = all(map(same_bits, before.arrays, after.arrays))
    if norm is not None:
        checks_norm(norm, before)
        assert untouched or norm > limit.bound, "changed below the bound"
        assert not untouched or norm <= limit.bound or before.at_most(limit), "not clipped"
    if untouched:
        zeroed = limit.bound == 0
        assert before.at_most(limit, DOUBT * (not zeroed), not zeroed), "not clipped"
        return False
    assert not before.at_most(limit, -DOUBT, -1), "changed below the bound"
    assert after.at_most(limit), f"exceeds {limit.bound!r}"
    check_direction(before, after)
    normal = np.ldexp(before.smallest, before.precision - 1)
    if np.all((np.abs(after.numbers) >= normal) | (before.numbers == 0)):
        units = reference.roundoff_units(array.dtype for array in after.arrays)
        assert not after.at_most(limit, -units - Fraction(1, 2**80)), f"short of {limit.bound!r}"
    return True


def checks_norm(norm: float, of: Vector) -> None:
    doubt = 2.0**-51 if all(PRECISION[a.dtype.name] == 53 for a in of.arrays) else 2.0**-25
    if not (1e-290 < norm < LARGEST) or abs(EXTENDED(norm) / np.sqrt(of.wide_square) - 1) > doubt:
        checks.assert_norm(norm, of.arrays)  # in units in the last place, exactly


def check_direction(before: Vector, after: Vector) -> None:
    """No sign flips, and one factor explains all elements; both to the last bits but a few."""
    x, y = before.numbers, after.numbers
    assert not np.any((y != 0) & (np.signbit(y) != np.signbit(x))), "a sign flipped"
    spacing = np.ldexp(1.0, np.frexp(y)[1] - before.precision)
    ulps = np.maximum(np.where(y, spacing, 0), before.smallest)
    assert not y[x == 0].any()
    size, result, ulps = (abs(v[x != 0].astype(EXTENDED)) for v in (x, y, ulps))
    assert np.all(result <= size), "an element grew"
    lows, highs = (result - ulps) / size, (result + ulps) / size
    assert lows.max() <= highs.min() * (1 + NEAR), "no single factor"


# ---- calls: each draws arrays, and tells of call after call whether something was clipped

Calls = Iterator[bool]


def by_global_norm(case: Case) -> Calls:
    count, name = case.one(1, 1, 2, 3), case.one(*DTYPES)
    names = [case.one(*DTYPES) if case.rng.integers(6) == 0 else name for _ in range(count)]
    grads = [case.array(name, int(case.rng.integers(1, MOST // count))) for name in names]
    before = Vector(*grads)
    while True:
        bound = case.bound(before.norm, name)
        after, norm = case.call(nc.clip_by_global_norm, grads, bound)
        yield check(before, Vector(*after), Limit(bound), norm)


def of_rows(case: Case) -> Calls:
    """Rows that repeat, some of which cancel."""
    name = case.one(*DTYPES)
    grads = [case.slices(name), case.array(name, 3)]
    norm = min(reference.norm(grads), LARGEST)
    while True:
        bound = case.bound(norm, name)
        after, told = case.call(nc.clip_by_global_norm, grads, bound)
        checks.assert_norm(told, grads)
        checks.assert_clipped(grads, after, Limit(bound).square(Fraction(0)), told)
        yield not all(map(same_bits, grads, after))


def by_norm(case: Case) -> Calls:
    name, axes = case.one(*DTYPES), case.one(None, 0, 1, (0, 1))
    grad = case.array(name, int(case.rng.integers(1, 8)), int(case.rng.integers(1, 6)))
    units = reference.units(grad.shape, axes)
    before = [Vector(grad[unit]) for unit in units]
    while True:
        bound = case.bound(case.one(*before).norm, name)
        after = case.call(nc.clip_by_norm, grad, bound, axes)
        found = [
            check(b, Vector(after[u]), Limit(bound)) for b, u in zip(before, units, strict=True)
        ]
        yield any(found)


def by_size(case: Case) -> Calls:
    name, function = case.one(*DTYPES), case.one(nc.clip_by_average_norm, nc.clip_by_block_rms)
    grad = case.array(name, int(case.rng.integers(1, MOST)))
    before = Vector(grad)
    times = grad.size**2 if function is nc.clip_by_average_norm else grad.size
    while True:
        bound = case.bound(before.norm / math.sqrt(times), name)
        after = case.call(function, grad, bound)
        yield check(before, Vector(after), Limit(bound, Fraction(times), EXTENDED(times)))


def adaptive(case: Case) -> Calls:
    name, eps = case.one(*DTYPES), case.one(1e-3, 0.0, 1e-300, 1.0)
    grad, param = (case.array(name, 6, 4) for _ in range(2))
    units = reference.units(grad.shape, (0,))
    before = [Vector(grad[unit]) for unit in units]
    owners = [Vector(param[unit]) for unit in units]
    squares = [max(owner.square, Fraction(eps) ** 2) for owner in owners]
    wide = [max(owner.wide_square, EXTENDED(eps) ** 2) for owner in owners]
    while True:
        k = int(case.rng.integers(len(units)))
        ratio = before[k].norm / (float(np.sqrt(wide[k])) or 1.0)
        factor = case.one(0.01, 1.0, *[case.bound(min(ratio, LARGEST), name)] * 4)
        after = case.call(nc.adaptive_clip, grad, param, factor, eps)
        limits = [Limit(factor, *of) for of in zip(squares, wide, strict=True)]
        clips = 0
        for b, unit, limit in zip(before, units, limits, strict=True):
            if factor < math.inf or limit.times:
                clips += check(b, Vector(after[unit]), limit)
        yield clips > 0


def by_value(case: Case) -> Calls:
    name = case.one(*REAL_DTYPES)
    grad = case.array(name, int(case.rng.integers(1, MOST)))
    size = abs(float(grad[0]))
    while True:
        sides = case.one(-1.0, -1.0, 1.0), case.one(-1.0, 1.0, 1.0)
        low, high = sorted(math.copysign(case.bound(size, name), side) for side in sides)
        after = case.call(nc.clip_by_value, grad, low, high)
        with np.errstate(all="ignore"):
            wanted = reference.clip_by_value(grad, low, high)
        np.testing.assert_array_equal(after, wanted)
        inside = grad == wanted
        assert same_bits(grad[inside], after[inside])
        yield not inside.all()


def per_example(case: Case) -> Calls:
    """Each example adds at most the bound, but for its norm's error; the sum is rounded once."""
    name, examples = case.one(*REAL_DTYPES), case.one(1, 1, 2, 4)
    grads = [case.array(name, examples, int(case.rng.integers(1, 8))) for _ in range(2)]
    before = [Vector(*(g[k] for g in grads)) for k in range(examples)]
    grain = Fraction(SMALLEST[name]) / 2 * (math.isqrt(sum(g[0].size for g in grads)) + 1)
    # float64 rounds every addition, the others once at the end.
    times = examples if name == "float64" else 1
    while True:
        bound = case.bound(case.one(*before).norm, name)
        summed, count = nc.clip_per_example(grads, bound)
        limit = Limit(bound)
        assert count <= sum(not b.at_most(limit, -DOUBT, -1) for b in before)
        assert count >= sum(not b.at_most(limit, DOUBT, 1) for b in before)
        if bound < math.inf:
            most = examples * Fraction(bound) * (1 + DOUBT)
            most *= (1 + reference.unit_roundoff(name)) ** times
            if all(map(np.all, map(np.isfinite, summed))):
                assert Vector(*summed).square <= (most + times * grain) ** 2
            else:
                assert most > float(reference.float_info(name).max)
        yield count > 0


DRAWS = [
    *[by_global_norm] * 6,
    *[by_norm] * 4,
    *[by_size] * 4,
    *(of_rows, adaptive, adaptive, by_value, by_value, per_example, per_example),
]


def run(number: int, count: int = CALLS_A_DRAW) -> tuple[str, int]:
    """Make the calls of one draw; return what was called, and how many calls clipped."""
    case = Case(number)
    calls = case.one(*DRAWS)
    return calls.__name__, sum(itertools.islice(calls(case), count))


def main(count: int, first: int = 0) -> int:
    failures, begun = 0, time.monotonic()
    called, clipped = Counter[str](), Counter[str]()
    for number in range(first, first - (-count // CALLS_A_DRAW)):
        if called.total() % 100_000 == 0 and called:
            print(f"{called.total()} calls, {failures} draws failed", flush=True)
        try:
            name, clips = run(number)
        except Exception:
            failures += 1
            print(f"draw {number}: {traceback.format_exc()}", flush=True)
            if failures == TOLD:
                break
            continue
        called[name] += CALLS_A_DRAW
        clipped[name] += clips
    for name, calls in sorted(called.items()):
        print(f"{name}: {calls} calls, {clipped[name]} clipped")
    print(f"{called.total()} calls, {failures} draws failed, {time.monotonic() - begun:.0f} s")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

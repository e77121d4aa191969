"""Rules: what they refuse, and the three that remember against oracles of lists and loops."""

from __future__ import annotations

import copy
import dataclasses
import math
import pickle
import random
import re
import statistics
from collections.abc import Iterable
from decimal import Decimal, localcontext
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from numclip.rules import (
    Adaptive,
    ByAverageNorm,
    ByBlockRMS,
    ByGlobalNorm,
    ByNorm,
    ByValue,
    Rule,
)
from numclip.running_rules import AdaGC, AutoClip, ZClip

INF, NAN = math.inf, math.nan
LARGEST = np.finfo(np.float64).max


def halving(step):
    return 8.0 / 2**step


# ---- what is refused

NUMBER_FIELDS = [
    (ByValue, {"min": -1.0, "max": 1.0}, "min"),
    (ByValue, {"min": -1.0, "max": 1.0}, "max"),
    (ByNorm, {}, "max_norm"),
    (ByAverageNorm, {}, "max_norm"),
    (ByGlobalNorm, {}, "max_norm"),
    (ByBlockRMS, {}, "threshold"),
    (Adaptive, {}, "clip_factor"),
    (Adaptive, {}, "eps"),
    (AutoClip, {}, "percentile"),
    (ZClip, {}, "alpha"),
    (ZClip, {}, "z"),
    (ZClip, {}, "max_norm"),
    (AdaGC, {}, "relative"),
    (AdaGC, {}, "absolute"),
    (AdaGC, {}, "beta"),
    (ByNorm, {"max_norm": 1.0}, "ord"),
    (ByGlobalNorm, {"max_norm": 1.0}, "ord"),
]
FIELD_IDS = [f"{rule.__name__}-{name}" for rule, _, name in NUMBER_FIELDS]


@pytest.mark.each_value
@pytest.mark.parametrize(("rule", "rest", "name"), NUMBER_FIELDS, ids=FIELD_IDS)
@pytest.mark.parametrize("value", ["1", True, np.True_, 1j, [1.0], np.ones(2)], ids=repr)
def test_what_is_no_number_is_refused(rule, rest, name, value):
    message = f"{name}: expected a real number, got {type(value).__name__} {value!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rule(**{**rest, name: value})


BOUND = "a number >= 0 (inf never clips)"
OUT_OF_RANGE = [
    *((rule, name, BOUND, -1.0) for rule, _, name in NUMBER_FIELDS[2:8]),
    *((rule, name, BOUND, NAN) for rule, _, name in NUMBER_FIELDS[2:8]),
    *((ZClip, name, BOUND, value) for name in ("z", "max_norm") for value in (-1.0, NAN)),
    *((AdaGC, name, BOUND, value) for name in ("relative", "absolute") for value in (-1.0, NAN)),
    *((ZClip, "alpha", "a number in [0, 1)", value) for value in (-0.1, 1.0, NAN)),
    *((AdaGC, "beta", "a number in [0, 1)", value) for value in (-0.1, 1.0, NAN)),
    *((AutoClip, "percentile", "a number from 0 to 100", v) for v in (-0.1, 100.5, NAN, INF)),
]


@pytest.mark.parametrize(("rule", "name", "wanted", "value"), OUT_OF_RANGE)
def test_a_number_out_of_range_is_refused(rule, name, wanted, value):
    message = f"{name}: expected {wanted}, got {value}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        rule(**{name: value})


COUNTS = [(AutoClip, "window", 1), (AutoClip, "warmup", 0), (ZClip, "warmup", 0)]
COUNTS += [(AdaGC, "warmup", 0)]


@pytest.mark.parametrize(("rule", "name", "least"), COUNTS)
@pytest.mark.parametrize("value", [1.0, "1", None, True, np.True_, np.ones(2, int)], ids=repr)
def test_what_is_no_count_is_refused(rule, name, least, value):
    message = f"{name}: expected an integer >= {least}, got {value!r}"
    with pytest.raises(TypeError, match=f"^{re.escape(message)}$"):
        rule(**{name: value})


@pytest.mark.parametrize(("rule", "name", "least"), COUNTS)
def test_a_count_too_small_is_refused(rule, name, least):
    message = f"{name}: expected an integer >= {least}, got {least - 1}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        rule(**{name: least - 1})
    assert getattr(rule(**{name: np.int32(least)}), name) == least


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ByValue(NAN, 1), ValueError, "min: expected a number, got nan"),
        (lambda: ByValue(0, NAN), ValueError, "max: expected a number, got nan"),
        (lambda: ByValue(2, 1), ValueError, r"min: expected at most max = 1\.0, got 2\.0"),
        (lambda: ByNorm(1, ord=0.5), ValueError, r"ord: expected a number >= 1 or inf, got 0\.5"),
        (lambda: ByGlobalNorm(1, ord=NAN), ValueError, "ord: expected a number >= 1 or inf, got"),
        (lambda: ByNorm(1, axes="a"), TypeError, "axes: expected integers or None, got .*'a'"),
        (lambda: ByNorm(1, axes=1.0), TypeError, r"axes: expected integers or None, got .*1\.0"),
        (lambda: Adaptive(axes=True), TypeError, "axes: expected integers or None, got .*True"),
        (lambda: Adaptive(axes=(0, 0)), ValueError, r"axes: expected different axes.* \(0, 0\)"),
        (lambda: ByNorm(1, axes=64), ValueError, "axes: expected different axes of an array of 64"),
        (lambda: ByGlobalNorm(1, shared=[1]), TypeError, r"shared: expected a hashable .* \[1\]"),
        (lambda: Rule(), TypeError, "abstract"),
    ],
)
def test_other_refusals(make, error, message):
    with pytest.raises(error, match=message):
        make()


# ---- bounds

SCHEDULED = [ByNorm, ByAverageNorm, ByGlobalNorm, ByBlockRMS, Adaptive]
SCHEDULED += [lambda bound: ZClip(max_norm=bound)]


@pytest.mark.parametrize("make", SCHEDULED)
def test_bounds_are_numbers_or_functions_of_the_step(make):
    assert [make(halving).bound(step) for step in range(3)] == [8.0, 4.0, 2.0]
    norms = np.zeros(1)
    rule = make(halving)
    state = rule.initial_state(1)
    np.testing.assert_array_equal(rule.thresholds(norms, 0.0, 2, state), [2.0])
    for constant in (0, 3, INF, np.float32(0.5), np.array(2), Fraction(1, 4)):
        found = make(constant).bound(10**9)
        assert type(found) is float
        assert found == float(constant)


@pytest.mark.parametrize("make", SCHEDULED)
@pytest.mark.parametrize(
    ("value", "error", "wanted"),
    [
        (-1, ValueError, r"a number >= 0 \(inf never clips\), got -1$"),
        (NAN, ValueError, r"a number >= 0 \(inf never clips\), got nan$"),
        (None, TypeError, "a real number, got NoneType None$"),
        ("1", TypeError, "a real number, got str '1'$"),
    ],
)
def test_what_a_function_returns_is_checked_at_each_step(make, value, error, wanted):
    rule = make(lambda step: 1.0 if step < 3 else value)
    assert rule.bound(2) == 1.0
    with pytest.raises(error, match=rf"^\w+\(step=3\): expected {wanted}"):
        rule.bound(3)


def test_scopes_orders_divisors_and_the_names_of_bounds():
    named = {ByBlockRMS: "threshold", Adaptive: "clip_factor"}
    for rule in (ByNorm, ByAverageNorm, ByGlobalNorm, ByBlockRMS, Adaptive):
        with pytest.raises(ValueError, match=rf"^{named.get(rule, 'max_norm')}\(step=7\)"):
            rule(lambda _: -1).bound(7)
    scopes = {"element": [ByValue(0, 1)], "unit": [Adaptive(), ByNorm(1, axes=0), ByNorm(1, ())]}
    scopes["tensor"] = [ByNorm(1), ByAverageNorm(1), ByBlockRMS(1), AdaGC()]
    scopes["group"] = [ByGlobalNorm(1), AutoClip(), ZClip()]
    for scope, rules in scopes.items():
        assert [rule.scope for rule in rules] == [scope] * len(rules)
        divisors = {ByAverageNorm: [1.0, 1.0, 9.0], ByBlockRMS: [1.0, 1.0, 3.0]}
        for rule in rules:
            expected = divisors.get(type(rule), [1.0, 1.0, 1.0])
            assert [rule.divisor(size) for size in (0, 1, 9)] == expected
            assert rule.ord == 2.0
    assert (ByNorm(1, ord=INF).ord, ByGlobalNorm(1, ord=1).ord) == (INF, 1.0)
    assert [rule.bound(0) for rule in (ByValue(0, 1), AutoClip(), ZClip(), AdaGC())] == [INF] * 4


# ---- values

EXAMPLES = {
    "ByValue(min=-1.0, max=inf)": lambda: ByValue(-1, INF),
    "ByNorm(max_norm=2.0, axes=(0, -1), ord=1.0)": lambda: ByNorm(2, axes=[0, np.int8(-1)], ord=1),
    "ByNorm(max_norm=<function halving>, axes=(3,), ord=2.0)": lambda: ByNorm(halving, 3),
    "ByAverageNorm(max_norm=0.5)": lambda: ByAverageNorm(0.5),
    "ByGlobalNorm(max_norm=5.0, ord=inf, shared='a')": lambda: ByGlobalNorm(5, INF, "a"),
    "ByBlockRMS(threshold=1.0)": lambda: ByBlockRMS(np.array(1)),
    "Adaptive(clip_factor=0.01, eps=0.001, axes=None)": lambda: Adaptive(),
    "AutoClip(percentile=10.0, window=10000, warmup=0)": lambda: AutoClip(),
    "ZClip(alpha=0.97, z=2.5, warmup=25, max_norm=None)": lambda: ZClip(),
    "AdaGC(relative=1.05, absolute=1.0, beta=0.98, warmup=100)": lambda: AdaGC(),
}


@pytest.mark.parametrize(("text", "make"), EXAMPLES.items(), ids=EXAMPLES)
def test_rules_are_values(text, make):
    rule = make()
    assert repr(rule) == text
    assert rule == make()
    assert hash(rule) == hash(make())
    for same in (pickle.loads(pickle.dumps(rule)), copy.deepcopy(rule), dataclasses.replace(rule)):
        assert (same, repr(same), type(same)) == (rule, text, type(rule))
    assert sum(rule == other() for other in EXAMPLES.values()) == 1
    field = dataclasses.fields(rule)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError, match=field):
        setattr(rule, field, 1.0)
    assert rule == make()


def test_a_function_is_printed_without_its_address():
    class Schedule:
        def __call__(self, step):
            return float(step)

    assert repr(ByBlockRMS(Schedule())).endswith(".Schedule>)")
    assert repr(ByBlockRMS(lambda step: step)).endswith("<locals>.<lambda>>)")


# ---- series

REMEMBERING = [AutoClip(40, 50, 3), ZClip(warmup=10, max_norm=9.0), AdaGC(warmup=20, beta=0.9)]


def series(seed: int, length: int, scale: float = 1.0) -> list[float]:
    """Norms like those of training: noise, spikes, zeros, stretches without a change."""
    rng = random.Random(seed)
    norms: list[float] = []
    while len(norms) < length:
        kind = rng.random()
        if kind < 0.02:
            norms += [rng.choice([0.0, rng.lognormvariate(0.0, 1.0)])] * rng.randrange(2, 60)
        elif kind < 0.3:
            norms.append(rng.choice([0.0, 1e3, 30.0, 8.0]) * rng.random())
        else:
            norms += [rng.lognormvariate(0.5, 0.4) for _ in range(rng.randrange(1, 30))]
    return [norm * scale for norm in norms[:length]]


def columns(seeds: Iterable[int], length: int, scale: float = 1.0) -> list[list[float]]:
    """Rows of norms, a series for each tensor."""
    return [list(row) for row in zip(*(series(k, length, scale) for k in seeds), strict=True)]


def bits(state):
    return {name: (array.dtype, array.shape, array.tobytes()) for name, array in state.items()}


def feed(rule, state, rows, first=0):
    """Run a rule over rows of norms; the thresholds at each step and the last state."""
    found = []
    for step, row in enumerate(rows, first):
        norms, total, before = np.array(row), math.hypot(*row), bits(state)
        bounds = rule.thresholds(norms, total, step, state)
        assert (bounds.dtype, bounds.shape) == (np.float64, norms.shape)
        assert (bounds >= 0.0).all()
        after = rule.observe(norms, np.minimum(norms, bounds), total, step, state)
        assert bits(state) == before
        assert norms.tolist() == list(row)
        rule.check_state(after, len(row))
        state = after
        found.append(bounds.tolist())
    return found, state


def run(rule, rows):
    return feed(rule, rule.initial_state(len(rows[0])), rows)[0]


def same(found, expected):
    assert len(found) == len(expected)
    for step, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        pairs = zip(got, wanted, strict=True)
        assert all(math.isclose(*pair, rel_tol=1e-12) for pair in pairs), (step, got, wanted)


def autoclip_oracle(norms, percentile, window, warmup):
    expected = []
    for step, _ in enumerate(norms):
        known = sorted(norms[max(step + 1 - window, 0) : step + 1])
        position = Fraction(percentile) / 100 * (len(known) - 1)
        low, high = known[math.floor(position)], known[math.ceil(position)]
        between = Fraction(low) + (Fraction(high) - Fraction(low)) * (position % 1)
        expected.append([INF if step < warmup else float(between)])
    return expected


@given(
    st.lists(st.sampled_from([0.0, 1.0, 2.5]) | st.floats(0.0, LARGEST), min_size=1, max_size=40),
    st.integers(1, 9),
    st.floats(0.0, 100.0),
)
def test_autoclip_has_the_bits_of_numpy(norms, window, percentile):
    """Whether the window in order is at hand, or the state is one that was saved."""
    rule = AutoClip(percentile, window)
    state, saved = rule.initial_state(1), rule.initial_state(1)
    for step, norm in enumerate(norms):
        own = np.array([norm])
        bounds = rule.thresholds(own, norm, step, state), rule.thresholds(own, norm, step, saved)
        with np.errstate(over="ignore"):
            wanted = np.percentile(norms[max(step + 1 - window, 0) : step + 1], percentile)
        assert [bound.item() for bound in bounds] == [wanted, wanted]
        before = state
        state = rule.observe(own, own, norm, step, before)
        assert bits(rule.observe(own, own, norm, step, before)) == bits(state)
        saved = {name: array.copy() for name, array in state.items()}


def test_a_state_that_nobody_else_has_is_renewed_in_place():
    rule, norms = AutoClip(40, 5), series(5, 300)
    first = rule.initial_state(1)
    before, pure = bits(first), [first]
    own = rule.renew(np.array(norms[:1]), np.array(norms[:1]), norms[0], 0, first)
    assert bits(first) == before
    ring = own["norms"]
    for step, norm in enumerate(norms):
        told = np.array([norm]), np.array([norm]), norm, step
        pure.append(rule.observe(*told, pure[-1]))
        if step:
            assert rule.renew(*told, own) is own
        assert bits(own) == bits(pure[-1])
        assert rule.thresholds(told[0], norm, step, own) == rule.thresholds(
            told[0], norm, step, dict(own)
        )
    assert own["norms"] is ring
    known = [state["count"].item() for state in pure]
    assert known == list(range(301))  # none was written to


@pytest.mark.full
def test_a_shallow_copy_of_a_state_shares_nothing_that_steps_write_to():
    rule, two = AutoClip(50), np.array([2.0])
    state = rule.initial_state(1)
    for step, norm in enumerate([3.0, 1.0, 8.0]):
        state = rule.observe(np.array([norm]), np.array([norm]), norm, step, state)
    kept = copy.copy(state)
    rule.observe(np.array([0.5]), np.array([0.5]), 0.5, 3, state)
    assert rule.thresholds(two, 2.0, 3, kept).item() == np.percentile([3.0, 1.0, 8.0, 2.0], 50)
    assert type(kept) is type(pickle.loads(pickle.dumps(state))) is dict


@pytest.mark.each_value
@pytest.mark.parametrize("window", [1, 2, 37, 1000])
@pytest.mark.parametrize(("percentile", "warmup"), [(10, 0), (0, 1), (100, 3), (50, 60), (97.5, 0)])
def test_autoclip_against_an_oracle(percentile, window, warmup):
    norms = series(window, 400)
    found = run(AutoClip(percentile, window, warmup), [[norm] for norm in norms])
    same(found, autoclip_oracle(norms, percentile, window, warmup))


def zclip_oracle(norms, alpha, z, warmup, max_norm):
    """Mean and variance by the formulas, in decimals that no square overflows."""
    exact = [Decimal(norm) for norm in norms]
    alpha, z, most = Decimal(alpha), Decimal(z), Decimal(max_norm)
    start = exact[: max(warmup, 1)]
    expected, mean, variance = [[max_norm]] * len(start), sum(start) / len(start), Decimal(0)
    for norm in start:
        variance += (norm - mean) ** 2 / len(start)
    for norm in exact[len(start) :]:
        bound, deviation = most, variance.sqrt()
        score = (norm - mean) / (deviation + Decimal("1e-6"))
        if score > z and mean > 0:
            bound = min(bound, mean + z * deviation / (score / z))
        clipped = min(norm, bound)
        mean = alpha * mean + (1 - alpha) * clipped
        variance = alpha * variance + (1 - alpha) * (clipped - mean) ** 2
        expected.append([float(bound)])
    return expected


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-310, 1e8, 1e305])
@pytest.mark.parametrize(
    ("alpha", "z", "warmup", "max_norm"),
    [(0.97, 2.5, 25, INF), (0.9, 1.0, 3, INF), (0.0, 0.5, 1, INF), (0.97, 2.5, 0, 3.0)],
)
def test_zclip_against_an_oracle(alpha, z, warmup, max_norm, scale):
    norms = series(3, 1500, scale)
    limit = None if max_norm == INF else max_norm * scale
    found = run(ZClip(alpha, z, warmup, limit), [[norm] for norm in norms])
    with localcontext(prec=60):
        expected = zclip_oracle(norms, alpha, z, warmup, max_norm * scale)
    same(found, expected)
    bounds = [bound for (bound,) in found]
    clipped = sum(norm > bound for norm, bound in zip(norms, bounds, strict=True))
    assert (clipped > 30) == (scale > 1e-100 or limit is not None)


def test_zclip_warms_up_on_what_is_not_clipped():
    norms = [3.0, 1.0, 4.0, 1.0, 5.0, 9.0]
    rule = ZClip(warmup=6, max_norm=2.0)
    found, state = feed(rule, rule.initial_state(1), [[norm] for norm in norms])
    assert found == [[2.0]] * 6
    assert float(state["mean"]) == pytest.approx(statistics.fmean(norms), rel=1e-15)
    assert float(state["deviation"]) == pytest.approx(statistics.pstdev(norms), rel=1e-14)
    after = rule.observe(np.array([50.0]), np.array([2.0]), 50.0, 6, state)
    assert float(after["mean"]) == pytest.approx(0.97 * statistics.fmean(norms) + 0.03 * 2.0)


def test_zclip_does_not_lock_at_zero():
    found = run(ZClip(warmup=5), [[0.0]] * 8 + [[2.0]] + [[2.0]] * 200)
    assert found[8] == [INF]
    equal = run(ZClip(warmup=5), [[0.1]] * 200 + [[0.2]])
    assert equal == [[INF]] * 200 + [[0.1]]


def adagc_oracle(rows, relative, absolute, beta, warmup):
    gammas, expected = [INF] * len(rows[0]), []
    for step, row in enumerate(rows):
        total, bounds = math.hypot(*row), []
        for t, norm in enumerate(row):
            warming = step < warmup or gammas[t] == INF
            if warming:
                bound = norm * (absolute / total) if total > absolute else INF
            else:
                bound = relative * gammas[t]
            clipped = min(norm, bound)
            gamma = min(gammas[t], clipped)
            if not warming:
                gamma = beta * gammas[t] + (1 - beta) * clipped
            if gamma > 0:
                gammas[t] = gamma
            bounds.append(bound)
        expected.append(bounds)
    return expected


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [1.0, 1e-200, 1e304])
@pytest.mark.parametrize(
    ("relative", "absolute", "beta", "warmup"),
    [(1.05, 1.0, 0.98, 100), (1.5, 3.0, 0.9, 7), (1.0, INF, 0.0, 1), (2.0, 1.0, 0.5, 0)],
)
def test_adagc_against_an_oracle(relative, absolute, beta, warmup, scale):
    rows = columns(range(4), 1000, scale)
    for row in rows[: warmup + 20]:
        row[2] = 0.0
    found = run(AdaGC(relative, absolute * scale, beta, warmup), rows)
    same(found, adagc_oracle(rows, relative, absolute * scale, beta, warmup))
    clipped = np.minimum(rows, found)
    assert (clipped < rows).any(axis=0).all()
    assert (np.count_nonzero(clipped, axis=0) == np.count_nonzero(rows, axis=0)).all()


def test_adagc_at_extremes():
    endless = AdaGC(relative=10.0, absolute=INF, warmup=1)
    assert run(endless, [[LARGEST], [LARGEST]]) == [[INF], [INF]]
    assert run(AdaGC(0.0, warmup=1), [[3.0], [3.0]]) == [[1.0], [0.0]]
    assert run(AdaGC(absolute=0.0, warmup=1), [[3.0], [3.0]]) == [[0.0], [0.0]]


@pytest.mark.each_value
@pytest.mark.parametrize("rule", REMEMBERING, ids=repr)
@pytest.mark.parametrize("cut", [0, 2, 15, 700])
def test_a_copied_state_continues_bit_for_bit(rule, cut):
    rows = columns((5, 6), 900)
    rows = rows if rule.scope == "tensor" else [row[:1] for row in rows]
    begun, state = feed(rule, rule.initial_state(len(rows[0])), rows[:cut])
    copied = {name: array.copy() for name, array in state.items()}
    later, end = feed(rule, state, rows[cut:], cut)
    again, end_again = feed(pickle.loads(pickle.dumps(rule)), copied, rows[cut:], cut)
    assert np.array(again).tobytes() == np.array(later).tobytes()
    assert bits(end) == bits(end_again)
    assert run(rule, rows) == begun + later


# ---- state

LAYOUTS = [
    (AutoClip(window=4), {"norms": np.zeros(4), "count": np.array(0)}),
    (ZClip(), {"count": np.array(0), "mean": np.array(0.0), "deviation": np.array(0.0)}),
    (AdaGC(), {"count": np.array(0), "gamma": np.full(3, INF)}),
    *((make(), {}) for text, make in EXAMPLES.items() if text.startswith("By")),
]


@pytest.mark.parametrize(("rule", "expected"), LAYOUTS, ids=lambda value: repr(value)[:20])
def test_initial_states(rule, expected):
    state = rule.initial_state(3)
    assert bits(state) == bits(expected)
    rule.check_state(state, 3)
    if not expected:
        norms = np.ones(3)
        assert rule.observe(norms, norms, 2.0, 0, state) == {}
        assert rule.observe(norms, norms, 2.0, 0, state) is not state
    for wrong in ({**state, "other": np.zeros(3)}, dict(list(state.items())[1:])):
        if wrong != state:
            message = f"{type(rule).__name__} state: expected {list(expected)}, got {list(wrong)}"
            with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
                rule.check_state(wrong, 3)


@pytest.mark.parametrize(
    ("rule", "name", "value", "message"),
    [
        (AutoClip(window=4), "norms", np.zeros(5), "float64(4,), got float64(5,)"),
        (AutoClip(window=4), "norms", [0.0] * 4, "float64(4,), got list"),
        (AutoClip(window=4), "norms", np.zeros(4, ">f8"), "float64(4,), got >f8(4,)"),
        (AutoClip(window=4), "norms", np.float32([0] * 4), "float64(4,), got float32(4,)"),
        (AutoClip(window=4), "norms", np.array([1, NAN, 2, 3]), "finite numbers >= 0, got nan"),
        (AutoClip(window=4), "norms", np.array([1, INF, 2, 3]), "finite numbers >= 0, got inf"),
        (AutoClip(window=4), "norms", np.array([1, 2, 3, -4.0]), "finite numbers >= 0, got -4.0"),
        (AutoClip(), "count", np.array(-1), f"a count from 0 to {2**62}, got -1"),
        (AutoClip(), "count", np.array(2**63 - 1), f"a count from 0 to {2**62}, got {2**63 - 1}"),
        (AutoClip(), "count", np.array(0.0), "int64(), got float64()"),
        (ZClip(), "count", 0, "int64(), got int"),
        (ZClip(), "count", np.int64(0), "int64(), got int64"),
        (ZClip(), "count", np.array(26), "a count from 0 to 25, got 26"),
        (ZClip(warmup=0), "count", np.array(2), "a count from 0 to 1, got 2"),
        (ZClip(), "mean", np.array(NAN), "finite numbers >= 0, got nan"),
        (ZClip(), "mean", np.zeros(1), "float64(), got float64(1,)"),
        (ZClip(), "deviation", np.array(-1.0), "finite numbers >= 0, got -1.0"),
        (AdaGC(), "count", np.array(101), "a count from 0 to 100, got 101"),
        (AdaGC(), "gamma", np.ones(2), "float64(3,), got float64(2,)"),
        (AdaGC(), "gamma", np.array([1.0, 0.0, INF]), "numbers > 0, got 0.0"),
        (AdaGC(), "gamma", np.array([1.0, 2.0, NAN]), "numbers > 0, got nan"),
    ],
)
def test_impossible_states_are_refused(rule, name, value, message):
    state = {**rule.initial_state(3), name: value}
    expected = f"{type(rule).__name__} state, {name}: expected {message}"
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        rule.check_state(state, 3)


def test_a_percentile_half_way_between_two_norms_is_numpys():
    """There the sum from below and from above round differently."""
    rng = np.random.default_rng(0)
    pairs = [
        np.sort(rng.standard_normal(2) ** 2 * 10.0 ** rng.integers(-9, 9, 2)) for _ in range(200)
    ]
    differing = [(a, b) for a, b in pairs if a + (b - a) * 0.5 != b - (b - a) * 0.5]
    assert differing
    rule = AutoClip(50)
    for low, high in differing:
        state = rule.observe(np.array([low]), np.array([low]), low, 0, rule.initial_state(1))
        found = rule.thresholds(np.array([high]), high, 1, state)
        assert found.item() == np.percentile([low, high], 50)


def test_what_a_rule_says_of_axes_and_elements():
    assert ByNorm(1.0).reduced_axes(3) == (0, 1, 2)
    assert ByNorm(1.0, axes=[-1, 0]).reduced_axes(3) == (0, 2)
    assert ByBlockRMS(1.0).reduced_axes(2) == (0, 1)
    assert Adaptive().reduced_axes(3) == (0, 1)
    assert ByNorm(1.0).element_bounds == (-math.inf, math.inf)
    assert ByValue(-1, 2).element_bounds == (-1.0, 2.0)

"""Reports and the history: what they print, hold, save and draw."""

from __future__ import annotations

import importlib
import json
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError, dataclass
from functools import cached_property
from typing import Any, get_type_hints

import numpy as np
import pytest

from numclip.history import History
from numclip.report import ClipReport, GroupReport, TensorReport

COLUMNS = {
    "step": np.int64,
    "norm": np.float64,
    "clipped_norm": np.float64,
    "scale": np.float64,
    "threshold": np.float64,
    "clipped": np.bool_,
    "skipped": np.bool_,
    "nonfinite": np.bool_,
}


def clipped_at(norm: float, threshold: float | None = 5.0) -> GroupReport:
    """What a rule reports that holds a finite norm to a threshold."""
    bound = math.inf if threshold is None else threshold
    scale = bound / norm if norm > bound else 1.0
    return GroupReport(
        norm=norm,
        clipped_norm=min(norm, bound),
        scale=scale,
        clipped=scale < 1.0,
        skipped=False,
        threshold=threshold,
        nonfinite=False,
    )


SKIPPED = GroupReport(
    norm=math.nan,
    clipped_norm=math.nan,
    scale=1.0,
    clipped=False,
    skipped=True,
    threshold=None,
    nonfinite=True,
)
NOT_FINITE = GroupReport(
    norm=math.inf,
    clipped_norm=math.nan,
    scale=math.nan,
    clipped=True,
    skipped=False,
    threshold=5.0,
    nonfinite=True,
)


def whole(step: int, groups: dict[str, GroupReport]) -> ClipReport:
    """A report of a step; its own norm is that of the first group, to be told by."""
    first = next(iter(groups.values()))
    return ClipReport(
        norm=first.norm,
        clipped_norm=first.clipped_norm,
        scale=min(group.scale for group in groups.values()),
        clipped=any(group.clipped for group in groups.values()),
        skipped=any(group.skipped for group in groups.values()),
        threshold=None,
        nonfinite=any(group.nonfinite for group in groups.values()),
        step=step,
        groups=groups,
        tensors={"W": TensorReport(3.0, 1.5, 0.5, 2.5), "b": TensorReport(4.0, 2.0, 0.5, 2.5)},
    )


def recorded(groups: list[dict[str, GroupReport]], capacity: int = 10_000) -> History:
    history = History(capacity)
    for step, given in enumerate(groups):
        history.record(whole(step, given))
    return history


def random_steps(count: int, seed: int = 1) -> list[dict[str, GroupReport]]:
    """Steps of two groups in which everything happens now and then."""
    rng = np.random.default_rng(seed)
    kinds = [lambda: SKIPPED, lambda: NOT_FINITE, lambda: clipped_at(0.0)]
    steps = []
    for _ in range(count):
        kind = int(rng.integers(20))
        norm = float(np.exp(rng.normal(1.0, 1.0)))
        steps.append(
            {
                "encoder": kinds[kind]() if kind < 3 else clipped_at(norm),
                "head": clipped_at(norm / 3.0, None if kind % 2 else math.inf),
            }
        )
    return steps


# ---- reports


def test_repr_of_a_report():
    groups = {
        "encoder": clipped_at(12.5),
        "embedding": clipped_at(0.8, math.inf),
        "measured": clipped_at(123456.0, None),
        "spiky": SKIPPED,
        "broken": NOT_FINITE,
    }
    assert repr(whole(12, groups)).split("\n") == [
        "step 12: not finite",
        "  group      norm before  norm after  threshold  scale  state",
        "  encoder           12.5           5          5    0.4  clipped",
        "  embedding          0.8         0.8        inf      1  untouched",
        "  measured     1.235e+05   1.235e+05          -      1  untouched",
        "  spiky              nan         nan          -      1  skipped",
        "  broken             inf         nan          5    nan  not finite",
        "  all               12.5           5          -    0.4  not finite",
    ]


def test_table_of_tensors():
    assert whole(0, {"g": clipped_at(1.0)}).describe_tensors().split("\n") == [
        "  tensor  norm before  norm after  threshold  scale",
        "  W                 3         1.5        2.5    0.5",
        "  b                 4           2        2.5    0.5",
    ]


@pytest.mark.parametrize(
    ("groups", "state"),
    [
        ([clipped_at(1.0)], "untouched"),
        ([clipped_at(9.0), clipped_at(1.0)], "clipped"),
        ([SKIPPED, clipped_at(9.0)], "skipped"),
        ([SKIPPED, NOT_FINITE], "not finite"),
    ],
)
def test_state_is_the_gravest_of_the_groups(groups, state):
    report = whole(0, {str(k): group for k, group in enumerate(groups)})
    assert report.state == state
    assert groups[0].state in repr(report)


def test_state_without_groups():
    fields = clipped_at(0.0).to_dict()
    assert ClipReport(**fields, step=0, groups={}, tensors={}).state == "untouched"


def test_report_as_plain_python():
    report = whole(3, {"encoder": clipped_at(10.0), "spiky": SKIPPED})
    plain = report.to_dict()
    text = json.dumps(plain, allow_nan=False)
    assert json.dumps(json.loads(text)) == text
    assert list(plain) == [
        *list(COLUMNS)[1:4],
        *("clipped", "skipped", "threshold", "nonfinite", "step", "groups", "tensors"),
    ]
    assert plain["step"] == 3
    assert plain["threshold"] is None
    assert plain["groups"]["encoder"] == {
        "norm": 10.0,
        "clipped_norm": 5.0,
        "scale": 0.5,
        "clipped": True,
        "skipped": False,
        "threshold": 5.0,
        "nonfinite": False,
    }
    assert plain["groups"]["spiky"]["norm"] is None  # of NaN
    assert plain["tensors"]["b"] == {
        "norm": 4.0,
        "clipped_norm": 2.0,
        "scale": 0.5,
        "threshold": 2.5,
    }


def test_reports_are_values():
    report = whole(3, {"encoder": clipped_at(10.0)})
    assert report == whole(3, {"encoder": clipped_at(10.0)})
    assert report != whole(4, {"encoder": clipped_at(10.0)})
    assert pickle.loads(pickle.dumps(report)) == report
    with pytest.raises(FrozenInstanceError):
        report.norm = 1.0


@pytest.mark.full
def test_fields_are_those_of_any_dataclass():
    @dataclass(frozen=True)
    class Whole(ClipReport):
        norm: np.float64  # a field that comes again has no default
        rank: int = 0

    for name, kind in get_type_hints(GroupReport).items():
        if not name.startswith("_"):
            field = vars(ClipReport)[name]
            assert isinstance(field, cached_property)  # documentation takes others for methods
            assert get_type_hints(field.func)["return"] == kind
    own = {"a": clipped_at(10.0)}
    report = Whole(**clipped_at(10.0).to_dict(), step=1, groups=own, tensors={}, rank=3)
    assert (report.norm, report.rank) == (10.0, 3)


# ---- the record


@pytest.mark.each_value
@pytest.mark.parametrize("capacity", [1, 2, 7, 64, 65, 100, 200])
@pytest.mark.parametrize("count", [0, 1, 7, 63, 64, 65, 129, 200, 333])
def test_the_last_steps_are_kept(capacity, count):
    steps = random_steps(count)
    history = recorded(steps, capacity)
    kept = range(max(count - capacity, 0), count)
    assert len(history) == len(kept)
    plain = history.to_dict()
    assert list(plain) == (["encoder", "head", "all"] if count else ["all"])
    assert list(plain["all"]) == list(COLUMNS)
    for name in plain:
        assert plain[name]["step"] == list(kept)
        for column in list(COLUMNS)[1:]:
            values = [
                getattr(whole(k, steps[k]) if name == "all" else steps[k][name], column)
                for k in kept
            ]
            expected = [
                None if isinstance(value, float) and not math.isfinite(value) else value
                for value in values
            ]
            assert plain[name][column] == expected


def test_history_as_plain_python():
    text = json.dumps(recorded(random_steps(50)).to_dict(), allow_nan=False)
    assert json.dumps(json.loads(text)) == text


def test_a_group_may_come_later():
    history = History(4)
    for step in range(6):
        groups = {"a": clipped_at(float(step))}
        history.record(whole(step, groups | ({"b": clipped_at(9.0)} if step > 3 else {})))
    assert history.to_dict()["a"]["step"] == [2, 3, 4, 5]
    assert history.to_dict()["b"]["step"] == [4, 5]


def test_memory_grows_no_further_than_the_capacity():
    history = recorded(random_steps(300), capacity=100)
    assert {ring.rows.size for ring in history._rings.values()} == {100}
    assert {ring.rows.size for ring in recorded(random_steps(3))._rings.values()} == {64}


def test_a_group_called_all_is_refused():
    history = recorded(random_steps(3))
    before = history.to_dict()
    with pytest.raises(ValueError, match="groups: expected names other than 'all'"):
        history.record(whole(3, {"encoder": clipped_at(1.0), "all": clipped_at(1.0)}))
    assert repr(history.to_dict()) == repr(before)


@pytest.mark.parametrize(
    ("capacity", "error"),
    [(0, ValueError), (-3, ValueError), (True, TypeError), (2.0, TypeError), (None, TypeError)],
)
def test_bad_capacities(capacity, error):
    with pytest.raises(error, match=f"capacity: expected an integer >= 1, got {capacity}"):
        History(capacity)


def test_numpy_integers_are_capacities():
    assert type(History(np.int32(3)).capacity) is int


# ---- figures


def percentile(values: list[float], percent: float) -> float:
    """The percentile by linear interpolation between the sorted values."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def test_summary_against_plain_python():
    steps = random_steps(500)
    summary = recorded(steps, capacity=311).summary()
    kept = steps[-311:]
    assert list(summary) == ["encoder", "head", "all"]
    for name in ("encoder", "head"):
        groups = [step[name] for step in kept]
        finite = [group.norm for group in groups if math.isfinite(group.norm)]
        figures = summary[name]
        assert figures["steps"] == 311
        assert figures["clip_fraction"] == sum(group.clipped for group in groups) / 311
        assert figures["skip_fraction"] == sum(group.skipped for group in groups) / 311
        assert figures["nonfinite_fraction"] == sum(group.nonfinite for group in groups) / 311
        percents = (0, 5, 25, 50, 75, 95, 99, 100)
        assert list(figures["norm"]) == ["min", *(f"p{p}" for p in percents[1:-1]), "max"]
        expected = [percentile(finite, percent) for percent in percents]
        assert list(figures["norm"].values()) == pytest.approx(expected, rel=1e-14, abs=0.0)
        known = [group.threshold for group in groups if group.threshold is not None]
        assert figures["last_threshold"] == known[-1]
    assert summary["all"]["clip_fraction"] == sum(s["encoder"].clipped for s in kept) / 311
    assert summary["all"]["last_threshold"] is None
    text = json.dumps(summary)
    assert json.dumps(json.loads(text)) == text


def test_summary_of_nothing():
    figures = History().summary()["all"]
    assert figures["steps"] == 0
    assert math.isnan(figures["clip_fraction"])
    assert all(math.isnan(value) for value in figures["norm"].values())
    assert figures["last_threshold"] is None
    no_norms = recorded([{"g": SKIPPED}]).summary()["g"]
    assert no_norms["skip_fraction"] == 1.0
    assert math.isnan(no_norms["norm"]["p50"])


def test_repr_of_a_history():
    steps = [
        {"encoder": clipped_at(1.0), "measured": clipped_at(2.0, None)},
        {"encoder": clipped_at(20.0), "measured": clipped_at(2.0, None)},
        {"encoder": SKIPPED, "measured": clipped_at(2.0, None)},
    ]
    assert repr(History()) == "no steps"
    assert repr(recorded(steps[:1])).startswith("the last 1 step, of 10,000 at most\n")
    assert repr(recorded(steps)).split("\n") == [
        "the last 3 steps, of 10,000 at most",
        "  group     clipped  skipped  not finite  median norm    95%  max  threshold",
        "  encoder     33.3%    33.3%       33.3%         10.5  19.05   20          5",
        "  measured     0.0%     0.0%        0.0%            2      2    2          -",
        "  all         33.3%    33.3%       33.3%         10.5  19.05   20          -",
    ]


# ---- state


def assert_same_state(one: dict[str, dict[str, Any]], other: dict[str, dict[str, Any]]) -> None:
    assert list(one) == list(other)
    for name, columns in one.items():
        assert {key: array.dtype for key, array in columns.items()} == COLUMNS
        for key, array in columns.items():
            assert array.tobytes() == other[name][key].tobytes()


@pytest.mark.parametrize("count", [0, 5, 64, 100, 250])
def test_state_round_trip(count):
    history = recorded(random_steps(count), capacity=100)
    state = history.state_dict()
    copied = History(100)
    copied.load_state_dict(state)
    assert_same_state(copied.state_dict(), state)
    assert repr(copied) == repr(history)
    for step, groups in enumerate(random_steps(70, seed=2), start=count):
        history.record(whole(step, groups))
        copied.record(whole(step, groups))
    assert_same_state(copied.state_dict(), history.state_dict())


def test_state_shares_no_memory():
    history = recorded(random_steps(5))
    state = history.state_dict()
    before = repr(history.to_dict())
    state["all"]["norm"][:] = 7.0
    state["encoder"]["clipped"][:] = True
    assert repr(history.to_dict()) == before
    other = History()
    other.load_state_dict(state)
    state["all"]["norm"][:] = 8.0
    assert other.to_dict()["all"]["norm"] == [7.0] * 5


def test_payloads_of_nan_survive():
    state = recorded(random_steps(3)).state_dict()
    state["all"]["norm"].view(np.uint64)[:] = [0x7FF800000000BEEF, 0xFFF8000000000001, 1]
    history = History()
    history.load_state_dict(state)
    assert_same_state(history.state_dict(), state)


def test_load_keeps_the_last_steps_that_fit():
    history = recorded(random_steps(50))
    small = History(8)
    small.load_state_dict(history.state_dict())
    expected = {
        name: {key: array[-8:] for key, array in columns.items()}
        for name, columns in history.state_dict().items()
    }
    assert_same_state(small.state_dict(), expected)


def broken(change: Any) -> Any:
    """A saved history of two steps, with one change made to it."""
    state: Any = recorded(random_steps(2)).state_dict()
    result = change(state)
    return state if result is None else result


REFUSED = {
    "no mapping": (lambda s: [s], "history: expected a mapping of groups with 'all'"),
    "no whole": (lambda s: {"encoder": s["encoder"]}, "a mapping of groups with 'all'"),
    "a number for a name": (lambda s: s | {3: s["all"]}, r"history\[3\]: expected a str"),
    "no columns": (lambda s: s | {"head": None}, r"history\['head'\]: expected .*got NoneType"),
    "columns missing": (
        lambda s: s | {"head": {"norm": s["head"]["norm"]}},
        r"\['head'\]: expected arrays called step, norm, .*got \['norm'\]",
    ),
    "a column too many": (lambda s: s["all"].update(x=s["all"]["norm"]), r"\['all'\]: .*'x'"),
    "a list": (lambda s: s["all"].update(norm=[1.0, 2.0]), r"\['norm'\]: .*got \[1.0, 2.0\]"),
    "another dtype": (
        lambda s: s["all"].update(norm=np.ones(2, np.float32)),
        r"history\['all'\]\['norm'\]: expected a 1-d array of float64, got 1-d float32",
    ),
    "swapped bytes": (
        lambda s: s["all"].update(step=s["all"]["step"].astype(">i8")),
        r"\['step'\]: expected a 1-d array of int64, got 1-d >i8",
    ),
    "objects": (lambda s: s["all"].update(step=np.array([0, 1], object)), "got 1-d object"),
    "two axes": (lambda s: s["all"].update(norm=np.ones((2, 1))), "got 2-d float64"),
    "too short": (
        lambda s: s["encoder"].update(clipped=np.ones(1, bool)),
        r"history\['encoder'\]\['clipped'\]: expected 2 steps, got 1",
    ),
    "a negative norm": (
        lambda s: s["head"].update(norm=np.array([np.nan, -2.5])),
        r"\['head'\]\['norm'\]: expected numbers >= 0, got -2.5",
    ),
    "a negative step": (
        lambda s: s["head"].update(step=np.array([-1, 0])),
        r"\['head'\]\['step'\]: expected numbers >= 0, got -1",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_bad_state_changes_nothing(case):
    change, message = REFUSED[case]
    history = recorded(random_steps(9, seed=3), capacity=7)
    before = history.state_dict()
    with pytest.raises(ValueError, match=message):
        history.load_state_dict(broken(change))
    assert_same_state(history.state_dict(), before)


def test_suggested_bounds_would_have_clipped_the_share():
    norms = 1.0 + np.random.default_rng(8).permutation(300)
    steps = [clipped_at(float(norm), None) for norm in norms]
    overflowed = GroupReport(math.inf, math.nan, math.nan, False, True, None, True)
    history = recorded([{"g": step} for step in [*steps, overflowed]])
    for share in (0.0, 0.1, 0.5, 1.0):
        bound = history.suggest(share)["g"]
        assert abs(np.mean(norms > bound) - share) <= 1.01 / 300
    assert history.suggest(0.0)["g"] == 300.0
    assert history.suggest() == history.suggest(0.1)
    assert math.isnan(History().suggest()["all"])
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"clip_fraction: expected a number in \[0, 1\]"):
            history.suggest(wrong)


# ---- the picture


@pytest.fixture(scope="module", autouse=True)
def fonts() -> None:
    """Let matplotlib look for fonts first, for which it starts a process once in a home."""
    importlib.import_module("matplotlib.font_manager")


def marked(axes: Any, label: str) -> list[float]:
    """The steps that are marked with a label of the legend."""
    lines = [line for line in axes.get_lines() if line.get_label() == label]
    return [float(x) for line in lines for x in line.get_xdata()]


def test_picture_shows_every_group():
    steps = random_steps(300)
    figure = recorded(steps).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["encoder", "head"]
    for axes, name in zip(figure.axes, ("encoder", "head"), strict=True):
        groups = [step[name] for step in steps]
        assert axes.get_yscale() == "log"
        (line,) = (line for line in axes.get_lines() if line.get_label() == "norm")
        norms = [g.norm if 0.0 < g.norm < math.inf else math.nan for g in groups]
        np.testing.assert_array_equal(line.get_ydata(), norms)
        events = {
            "clipped": [k for k, g in enumerate(groups) if g.clipped and not g.nonfinite],
            "skipped": [k for k, g in enumerate(groups) if g.skipped],
            "not finite": [k for k, g in enumerate(groups) if g.nonfinite and not g.skipped],
            "norm 0": [k for k, g in enumerate(groups) if g.norm == 0.0],
        }
        assert {label: marked(axes, label) for label in events} == events
        assert any(events.values()) == (name == "encoder")
    assert figure.axes[-1].get_xlabel() == "step"
    assert figure.get_supylabel() == "norm before clipping"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == [
        *("norm", "threshold", "clipped", "norm 0", "skipped", "not finite"),
    ]


def thresholds_drawn(axes: Any) -> list[np.ndarray]:
    return [line.get_ydata() for line in axes.get_lines() if line.get_label() == "threshold"]


def test_picture_shows_thresholds_where_there_are_any():
    steps = [
        {"fixed": clipped_at(3.0), "spikes": clipped_at(3.0, 2.0 if k == 4 else math.inf)}
        for k in range(70)
    ]
    fixed, spikes = recorded(steps).plot().axes
    np.testing.assert_array_equal(thresholds_drawn(fixed), [[5.0] * 70])
    expected = [2.0 if k == 4 else math.nan for k in range(70)]
    np.testing.assert_array_equal(thresholds_drawn(spikes), [expected])
    # One point makes no line: a dash stands for it.
    dashes = [line for line in spikes.get_lines() if line.get_marker() == "_"]
    assert [(list(d.get_xdata()), list(d.get_ydata())) for d in dashes] == [([4], [2.0])]
    # And a drop joins it to the norm that was clipped to it.
    (drops,) = spikes.collections
    assert [drop.tolist() for drop in drops.get_segments()] == [[[4, 2], [4, 3]]]
    assert not fixed.collections


def test_groups_with_one_norm_are_drawn_once():
    joint = [clipped_at(float(norm)) for norm in range(1, 9)]
    steps = [{"a": one, "alone": clipped_at(7.0), "b": one} for one in joint]
    figure = recorded(steps).plot()
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["a, b", "alone"]
    steps[3]["b"] = clipped_at(77.0)
    assert len(recorded(steps).plot().axes) == 3


def test_steps_clipped_from_beyond_float64_are_marked_at_the_edge():
    overflowed = GroupReport(math.inf, 5.0, 0.0, True, False, 5.0, False)
    (axes,) = recorded([{"g": clipped_at(1.0)}, {"g": overflowed}]).plot().axes
    (dots,) = (line for line in axes.get_lines() if line.get_label() == "clipped")
    assert list(dots.get_xdata()) == [1]
    assert dots.get_transform() == axes.get_xaxis_transform()


def test_picture_of_many_steps():
    count = 20_000
    rng = np.random.default_rng(4)
    norms = np.exp(rng.normal(0.0, 1.0, count))
    norms[[77, 12_345]] = 1e4, 1e-4
    figure = recorded([{"g": clipped_at(float(norm))} for norm in norms], count).plot()
    (axes,) = figure.axes
    (line,) = (line for line in axes.get_lines() if line.get_label() == "norm")
    assert 100 <= line.get_xdata().size <= 2000
    np.testing.assert_allclose(np.exp(np.mean(np.log(line.get_ydata()))), 1.0, rtol=0.05)
    (band,) = axes.collections
    assert band.get_label() == "range of norms"
    heights = band.get_paths()[0].vertices[:, 1]
    assert (heights.min(), heights.max()) == (1e-4, 1e4)
    assert marked(axes, "clipped") == np.flatnonzero(norms > 5.0).tolist()


SERIES = {
    "one step": [3.0],
    "equal": [2.0] * 5,
    "zeros": [0.0] * 5,
    "NaN": [math.nan] * 5,
    "Inf": [math.inf] * 5,
    "all kinds": [0.0, math.nan, 1.0, math.inf, 0.0, 2.0],
    "extremes": [5e-324, 1.7e308, 1.0],
    "large": [1.7e308, 1.6e308],
    "small": [5e-324, 1e-323],
    "many of nothing": [math.nan, 0.0] * 1000,
}


@pytest.mark.full
@pytest.mark.parametrize("case", SERIES)
def test_any_series_can_be_drawn(case, tmp_path):
    path = tmp_path / "picture.png"
    figure = recorded([{"g": clipped_at(norm, None)} for norm in SERIES[case]]).plot(path)
    assert path.stat().st_size > 5000
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0.0 < low < high < math.inf
    for line in (line for line in axes.get_lines() if line.get_label() == "norm"):
        heights = line.get_ydata()
        assert np.all((low < heights) & (heights < high) | np.isnan(heights))
    left, right = axes.get_xlim()
    assert left < 0 <= len(SERIES[case]) - 1 < right


def test_picture_of_an_empty_history():
    figure = History().plot()
    assert [axes.get_title(loc="right") for axes in figure.axes] == ["no steps"]
    assert figure.legends == []


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "start"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.pdf", b"%PDF")]
)
def test_the_suffix_tells_the_format(tmp_path, name, start):
    history = recorded(random_steps(20))
    history.plot(str(tmp_path / name))
    assert (tmp_path / name).read_bytes().startswith(start)


def test_names_of_groups_are_no_formulas(tmp_path):
    figure = recorded([{"$x": clipped_at(1.0), "a$_b$": clipped_at(1.0)}]).plot(tmp_path / "a.png")
    assert not any(axes._left_title.get_parse_math() for axes in figure.axes)


def test_captions():
    steps = [{"g": clipped_at(9.0)}] * 2 + [{"g": SKIPPED}, {"g": clipped_at(1.0)}]
    (axes,) = recorded(steps).plot().axes
    assert axes.get_title(loc="right") == "4 steps, 50.0% clipped, 1 skipped"


@pytest.mark.full
def test_matplotlib_is_imported_only_to_draw_and_pyplot_never():
    program = """
import sys
from numclip.history import History
assert not any(name.startswith("matplotlib") for name in sys.modules)
History().plot()
assert "matplotlib" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("matplotlib.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "numclip.plotting", raising=False)
    with pytest.raises(ImportError, match="matplotlib: pip install matplotlib"):
        History().plot()


def test_other_modules_that_are_missing_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "numclip.plotting", None)
    with pytest.raises(ModuleNotFoundError, match=r"numclip\.plotting"):
        History().plot()

"""The GRU that explodes without clipping, on some of the manual's paragraphs."""

from __future__ import annotations

import signal
import sys

import numpy as np
import pytest

from numclip.examples import gru as program
from numclip.examples.corpus import read_paragraphs
from numclip.examples.progress import interruptible
from tests.oracle.programs import assert_drawn, error_line, help_text

SMALL = "--quiet", "--hidden", "64", "--learning-rate", "0.02", "--max-norm", "25"


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Write 250 short paragraphs of the manual, its six longest, and some more."""
    paragraphs = read_paragraphs(None)
    short = [paragraph for paragraph in paragraphs if len(paragraph) < 250]
    longest = sorted(paragraphs, key=len)[-6:]
    path = tmp_path_factory.mktemp("text") / "paragraphs"
    path.write_text("\n\n".join([*short[:250], *longest, *short[250:290]]), encoding="utf-8")
    return path


@pytest.mark.jit_only
@pytest.mark.parametrize("seed", ["0", "1"])
def test_blows_up_without_clipping_and_learns_with_it(capsys, tmp_path, text, seed):
    picture = tmp_path / "gru.svg"
    argv = *SMALL, "--seed", seed, "--text", str(text), "--picture", str(picture)
    assert program.main([*argv, "--paragraphs", "296"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{text}: 296 paragraphs, ")
    assert "without clipping" in lines[1]
    assert "clipped at 25" in lines[1]
    rows = np.array([line.replace(",", "").split() for line in lines[3:-3]], dtype=float)
    assert rows.shape == (20, 5)
    np.testing.assert_array_equal(rows[:, 0], 296 * np.arange(1, 21) // 20)
    _, unclipped, largest, clipped, _ = rows.T
    assert unclipped[-1] > 10 * unclipped.min()
    assert largest[-3:].max() > 100 * np.median(largest)
    assert clipped[-1] < clipped[0] - 0.5
    assert clipped.max() < 4.0
    assert "blown up at paragraph 25" in lines[-3]
    assert f"cost {lines[-4].split()[1]} in its last row" in lines[-3]
    assert f"{unclipped.min():#.4g} in its lowest" in lines[-3]
    assert f"cost {lines[-4].split()[3]} in its last row" in lines[-2]
    assert "of the steps clipped" in lines[-2]
    assert_drawn(picture, "without clipping", "clipped at 25", "threshold", "10^{3}")


def run_of(costs):
    """Return a run that had these costs, none of which it worked for."""
    text = program.Text("text", ["ab"])
    run = program.Run(
        text, program.build_parser().parse_args(["--hidden", "2", "--no-picture"]), 1.0
    )
    gradients = {name: np.zeros_like(param) for name, param in run.groups.params.items()}
    for cost in costs:
        with pytest.MonkeyPatch.context() as patch:
            result = cost, gradients, None
            patch.setattr(program.gru_network, "cost_and_gradients", lambda *_, r=result, **__: r)
            run.step(np.empty((1, 1, 2)), np.empty((1, 1)))
    return run


def test_blown_up_is_ten_times_the_lowest_mean():
    calm = run_of([3.0] * 100 + [29.0] * 150)
    assert calm.lowest == 3.0
    assert calm.blown_up is None
    assert not calm.finished
    wild = run_of([9.0] * 50 + [3.0] * 100 + [1000.0] * 3)
    assert wild.lowest == 3.0
    assert wild.blown_up == 153
    assert not wild.finished
    late = run_of([3.0] * 100 + [4000.0])
    assert late.blown_up == 101
    late.costs += [4000.0] * (program.AFTERMATH - 1)
    assert not late.finished
    late.costs.append(4000.0)
    assert late.finished
    broken = run_of([3.0, np.nan])
    assert broken.blown_up == 2
    assert broken.finished


def test_columns_of_a_run_that_ended_are_empty_and_its_last_row_is_named(capsys, text, monkeypatch):
    monkeypatch.setattr(program, "WINDOW", 5)
    monkeypatch.setattr(program, "AFTERMATH", 10)
    argv = "--quiet", "--no-picture", "--hidden", "8", "--paragraphs", "100", "--text", str(text)
    assert program.main([*argv, "--learning-rate", "3", "--max-norm", "0.1"]) == 0
    *table, first, second = [line.split() for line in capsys.readouterr().out.splitlines()[3:]]
    assert [cells[1:3] for cells in table[-3:]] == [["-", "-"]] * 3
    blown_up, ended = (int(first[k].rstrip(",")) for k in (6, 9))
    assert ended == blown_up + 10
    last = next(cells for cells in table if int(cells[0]) >= ended)
    assert last[1] == first[first.index("cost") + 1]
    assert table[-1][3] == second[second.index("cost") + 1]


def test_first_guess_is_how_frequent_each_character_is(text):
    read = program.Text("text", read_paragraphs(text))
    run = program.Run(read, program.build_parser().parse_args(["--no-picture"]), 1.0)
    paragraph = read.paragraphs[0]
    x = np.eye(len(read.characters), dtype=np.float32)[paragraph[:-1], np.newaxis]
    cost, _, _ = program.gru_network.cost_and_gradients(
        run.groups.params, x, paragraph[1:, np.newaxis], run.start
    )
    assert cost == pytest.approx(-read.log_frequencies()[paragraph[1:]].mean(), rel=1e-5)


def test_both_runs_are_one_below_the_threshold(capsys, text):
    argv = "--quiet", "--no-picture", "--hidden", "8", "--paragraphs", "30", "--text", str(text)
    assert program.main([*argv, "--max-norm", "inf"]) == 0
    for line in capsys.readouterr().out.splitlines()[3:-2]:
        _, *cells = line.split()
        assert cells[:2] == cells[2:]


def test_interrupt_ends_with_the_table_so_far(capsys, monkeypatch, tmp_path, text):
    steps = iter(range(100))
    step = program.Run.step

    def interrupted(run, x, targets):
        step(run, x, targets)
        if next(steps) == 80:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(program.Run, "step", interrupted)
    picture = tmp_path / "gru.png"
    argv = "--quiet", "--hidden", "8", "--text", str(text), "--paragraphs", "100"
    handler = signal.getsignal(signal.SIGINT)
    assert program.main([*argv, "--picture", str(picture)]) == 130
    assert signal.getsignal(signal.SIGINT) is handler
    out, err = capsys.readouterr()
    *rows, last = out.splitlines()[3:-3]
    assert [row.split()[0] for row in rows] == ["5", "10", "15", "20", "25", "30", "35", "40"]
    assert last.split()[0] == "41"
    assert picture.exists()
    assert err == "interrupted\n"


def test_second_interrupt_does_not_wait():
    with interruptible() as stopped:
        assert not stopped()
        signal.raise_signal(signal.SIGINT)
        assert stopped()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_runs_that_break_at_once_are_drawn(capsys, tmp_path, text):
    picture = tmp_path / "gru.png"
    argv = "--quiet", "--hidden", "4", "--text", str(text), "--paragraphs", "5"
    huge = "--learning-rate", "1e30", "--max-norm", "1e30"
    assert program.main([*argv, *huge, "--picture", str(picture)]) == 0
    assert capsys.readouterr().out.count("cost nan") == 2
    assert picture.exists()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--paragraphs", "0", "expected a whole number >= 1, got '0'"),
        ("--hidden", "-1", "expected a whole number >= 1, got '-1'"),
        ("--learning-rate", "0", "expected a finite number > 0, got '0'"),
        ("--max-norm", "-1", "expected a number >= 0, or inf, got '-1'"),
        ("--seed", "-1", "expected a whole number >= 0, got '-1'"),
        ("--seed", "one", "expected a whole number >= 0, got 'one'"),
        ("--picture", "gru", "expected a name that ends in .png, .svg, .pdf, got 'gru'"),
    ],
)
def test_options_out_of_range_are_refused(capsys, option, value, expected):
    assert error_line(capsys, program, option, value) == f"argument {option}: {expected}"


def test_texts_without_usable_paragraphs_are_refused(capsys, tmp_path):
    path = tmp_path / "text"
    missing = "expected a text in UTF-8, cannot be read: No such file or directory"
    argv = "--no-picture", "--text", str(path)
    assert error_line(capsys, program, *argv) == f"{path}: {missing}"
    path.write_text("")
    assert error_line(capsys, program, *argv) == f"{path}: expected a text, got an empty file"
    path.write_text("a\n\nb\n")
    message = "expected a paragraph of 2 characters or more, found none"
    assert error_line(capsys, program, *argv) == f"{path}: {message}"
    path.write_text("a line\n\n" + "a line\n" * 3000)
    assert error_line(capsys, program, *argv) == (
        f"{path}: expected paragraphs of at most 20,000 characters, with blank lines in between, "
        "got one of 20,999"
    )


@pytest.mark.parametrize("package", ["matplotlib", "threadpoolctl", "tqdm"])
def test_a_missing_package_is_named_with_the_cure(capsys, monkeypatch, tmp_path, package):
    monkeypatch.setitem(sys.modules, package, None)
    line = error_line(capsys, program, "--picture", str(tmp_path / "gru.png"))
    assert line == f"cannot import {package}: pip install {package}"


def test_help_shows_every_option(capsys):
    text = help_text(capsys, program)
    assert "--paragraphs N how many to read; some 50 take a second (default: 2500)" in text
    for option in ("--hidden N", "--learning-rate X", "--seed N"):
        assert f"{option} default: " in text
    assert "(default: 100.0, a usual norm)" in text
    for option in ("--text FILE", "--picture FILE", "--no-picture", "--quiet"):
        assert option in text

"""The recommender that is trained within compiled code."""

from __future__ import annotations

import pytest

from numclip.examples import matrix_factorization as program
from tests.oracle.programs import assert_drawn, error_line, help_text


@pytest.mark.jit_only
def test_wild_ratings_throw_descent_off_and_clipping_holds_it(capsys, tmp_path):
    picture = tmp_path / "errors.svg"
    assert program.main(["--picture", str(picture)]) == 0
    rows = {line[:24].rstrip(): line[24:].split() for line in capsys.readouterr().out.splitlines()}
    first, last = (list(map(float, rows[f"{which} error (RMSE)"])) for which in ("First", "Last"))
    assert first[0] == first[1]
    assert not last[0] < first[0] / 3
    assert last[1] < first[1] / 20
    assert rows["Gradients clipped"][0] == "0.00%"
    assert_drawn(picture, "without clipping", "clipped at 2", "root mean square error")


def test_options_out_of_range_are_refused(capsys):
    assert error_line(capsys, program, "--wild", "2") == (
        "argument --wild: expected a number in [0, 1], got '2'"
    )


def test_help_shows_every_option(capsys):
    text = help_text(capsys, program)
    for option in ("--users N", "--items N", "--ratings N", "--rank N", "--epochs N", "--seed N"):
        assert f"{option} default: " in text
    assert "--picture FILE" in text

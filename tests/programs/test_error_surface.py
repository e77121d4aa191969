"""The one-unit network, and the two ways down its error surface."""

from __future__ import annotations

import numpy as np

from numclip.examples import error_surface as program
from tests.oracle.programs import assert_drawn, error_line, finite_differences, help_text


def test_gradient_matches_finite_differences():
    point = np.array([[3.3, 4.4, 6.0], [-1.5, -2.1, -2.8]])
    _, *gradient = program.loss_and_gradient(*point)

    def total():
        return float(program.loss_and_gradient(*point)[0].sum())

    (slope,) = finite_differences(total, [point], 1e-6)
    np.testing.assert_allclose(gradient, slope, rtol=1e-6, atol=1e-9)


def test_the_wall_throws_descent_off_and_clipping_holds_it():
    start = 5.0, -2.0
    plain = program.descend(start, 1.0, np.inf, 100)
    clipped = program.descend(start, 1.0, 0.1, 100)
    assert plain.longest > 1.0
    assert plain.losses[-1] > plain.losses[0]
    assert clipped.longest <= 0.1 * (1 + 1e-12)
    assert clipped.losses[-1] < clipped.losses[0] / 5
    assert clipped.norms.max() > 1.0
    assert len(clipped.points) == len(clipped.losses) == len(clipped.norms) == 101


def test_table_and_picture(capsys, tmp_path):
    picture = tmp_path / "surface.svg"
    assert program.main(["--picture", str(picture)]) == 0
    rows = {line[:16].rstrip(): line[16:].split() for line in capsys.readouterr().out.splitlines()}
    first, last = (list(map(float, rows[f"{which} loss"])) for which in ("First", "Last"))
    assert first[0] == first[1]
    assert last[1] < first[1] < last[0]
    assert_drawn(picture, "without clipping", "clipped at 0.1", "square root of the loss", "10^{-")
    assert_drawn(picture, "thrown off, to (6.28, 2.48)", "start")


def test_options_out_of_range_are_refused(capsys):
    assert error_line(capsys, program, "--start", "nan", "1") == (
        "argument --start: expected finite numbers, got [nan, 1.0]"
    )
    assert error_line(capsys, program, "--steps", "0") == (
        "argument --steps: expected a whole number >= 1, got '0'"
    )


def test_help_shows_every_option(capsys):
    text = help_text(capsys, program)
    for option in ("--start W B", "--steps N", "--learning-rate X", "--max-norm X"):
        assert f"{option} default: " in text
    assert "--picture FILE" in text

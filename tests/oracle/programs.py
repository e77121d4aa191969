"""Helpers of the tests of the training programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest


def error_line(capsys: pytest.CaptureFixture[str], program: ModuleType, *argv: str) -> str:
    """Run a program that must refuse its arguments before any work; return its error's line."""
    with pytest.raises(SystemExit) as caught:
        program.main(argv)
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    prefix = f"python -m {program.__name__}: error: "
    assert err.startswith(prefix)
    assert err.count("\n") == 1
    return err.removeprefix(prefix).rstrip("\n")


def help_text(capsys: pytest.CaptureFixture[str], program: ModuleType) -> str:
    """Return a program's --help text, its lines joined."""
    with pytest.raises(SystemExit) as caught:
        program.main(["--help"])
    assert caught.value.code == 0
    return " ".join(capsys.readouterr().out.split())


def assert_drawn(picture: Path, *texts: str) -> None:
    """Assert that an SVG file contains words, or tick labels as ``10^{3}``."""
    drawn = picture.read_text()
    for text in texts:
        assert text in drawn


def finite_differences(
    cost: Callable[[], float], params: Iterable[np.ndarray], step: float = 1e-5
) -> list[np.ndarray]:
    """Return the central differences of `cost`, which reads the float64 `params` in place."""
    slopes = [np.empty_like(param) for param in params]
    for param, slope in zip(params, slopes, strict=True):
        for index in np.ndindex(param.shape):
            centre = param[index]
            param[index] = centre + step
            above = cost()
            param[index] = centre - step
            below = cost()
            param[index] = centre
            slope[index] = (above - below) / (2 * step)
    return slopes

"""What the training programs' command lines have in common."""

import argparse
import importlib.util
import math
from typing import NoReturn


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one line on stderr, and exit code 2."""

    def error(self, message: str) -> NoReturn:
        """Print ``message`` on one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def require(self, *packages: str) -> None:
        """Exit with code 2 unless every one of ``packages`` can be imported."""
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            self.error(f'cannot import {", ".join(missing)}: pip install "numclip[examples]"')


def positive_int(text: str) -> int:
    """Read a whole number >= 1."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return value


def positive_float(text: str) -> float:
    """Read a finite number > 0."""
    value = _float_or_nan(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number > 0, got {text!r}")
    return value


def norm_bound(text: str) -> float:
    """Read a bound on a norm: a number >= 0, ``inf`` for none."""
    value = _float_or_nan(text)
    if not value >= 0:
        raise argparse.ArgumentTypeError(f"expected a number >= 0, or inf, got {text!r}")
    return value


def _float_or_nan(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan

"""What the training programs' command lines have in common."""

import argparse
import importlib.util
import math
import tempfile
from pathlib import Path
from typing import NoReturn

PICTURES = (".png", ".svg", ".pdf")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""What pip calls packages, where that is not their name."""


class Parser(argparse.ArgumentParser):
    """A program's argument parser, whose errors are one line on stderr, and exit code 2."""

    def __init__(self, program: str, description: str | None) -> None:
        super().__init__(
            prog=f"python -m numclip.examples.{program}",
            description=description,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    def error(self, message: str) -> NoReturn:
        """Print ``message`` on one line and exit with code 2."""
        self.exit(2, f"{self.prog}: error: {message}\n")

    def require(self, *packages: str) -> None:
        """Exit with code 2 unless every one of ``packages`` can be imported."""
        missing = [name for name in packages if importlib.util.find_spec(name) is None]
        if missing:
            wanted = " ".join(DISTRIBUTIONS.get(name, name) for name in missing)
            self.error(f"cannot import {', '.join(missing)}: pip install {wanted}")

    def add_picture(self, name: str) -> None:
        """Let the user choose where the picture goes."""
        add = self.add_argument
        text = "where the picture goes (default: %(default)s)"
        add("--picture", type=picture_file, default=name, metavar="FILE", help=text)
        add("--no-picture", dest="picture", action="store_const", const=None, help="draw none")


def output_file(text: str) -> Path:
    """Read the path of a file that can be written, without leaving one behind."""
    path = Path(text)
    try:
        if path.exists():
            with path.open("ab"):
                pass
        else:
            with tempfile.TemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"expected a file that can be written, got {text!r}: {error.strerror}"
        ) from None
    return path


def picture_file(text: str) -> Path:
    """Read the path of a picture that can be written."""
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {', '.join(PICTURES)}, got {text!r}"
        )
    return output_file(text)


def whole_number(text: str) -> int:
    """Read a whole number >= 0."""
    value = _int_or_less(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 0, got {text!r}")
    return value


def positive_int(text: str) -> int:
    """Read a whole number >= 1."""
    value = _int_or_less(text)
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


def _int_or_less(text: str) -> int:
    try:
        return int(text)
    except ValueError:
        return -1

"""The parser and the argument types of the training programs' command lines."""

import argparse
import contextlib
import importlib.util
import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn, TypeVar

Number = TypeVar("Number", int, float)
PICTURES = (".png", ".svg", ".pdf")
DISTRIBUTIONS = {"sklearn": "scikit-learn"}
"""The names by which pip installs packages, where these differ from the import names."""


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
        """Add the options --picture, which is `name` by default, and --no-picture."""
        add = self.add_argument
        text = "where the picture goes (default: %(default)s)"
        add("--picture", type=picture_file, default=name, metavar="FILE", help=text)
        add("--no-picture", dest="picture", action="store_const", const=None, help="draw none")


def output_file(text: str) -> Path:
    """Return the path of a file, after checking that it can be written; create no file."""
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
    """Return the path of a picture, after checking its ending and that it can be written."""
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {', '.join(PICTURES)}, got {text!r}"
        )
    return output_file(text)


def _number(
    kind: Callable[[str], Number], wanted: str, fits: Callable[[Number], bool]
) -> Callable[[str], Number]:
    """Return an argparse type that reads a number for which `fits` returns True."""

    def read(text: str) -> Number:
        with contextlib.suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"expected {wanted}, got {text!r}")

    return read


whole_number = _number(int, "a whole number >= 0", lambda value: value >= 0)
positive_int = _number(int, "a whole number >= 1", lambda value: value >= 1)
positive_float = _number(float, "a finite number > 0", lambda value: 0 < value < math.inf)
norm_bound = _number(float, "a number >= 0, or inf", lambda value: value >= 0)
fraction = _number(float, "a number in [0, 1]", lambda value: 0 <= value <= 1)

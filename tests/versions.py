"""The first ring on other versions: ``python -m tests.versions [--oldest] [--python python3.13]``.

A wheel is built and installed in a new environment with the newest NumPy and numba, or with the
oldest that pyproject.toml allows. The tests run outside of the checkout: they see the wheel alone.
Arguments that are left over go to pytest.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
COPIED = "tests", "pyproject.toml", "README.md"


def run(*command: str | Path, cwd: Path = ROOT) -> None:
    print("+", *command, flush=True)
    done = subprocess.run(command, cwd=cwd, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def oldest() -> list[str]:
    """The lower bounds of what numclip needs, as what pip is to install."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [requirement.replace(">=", "==") for requirement in project["dependencies"]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--oldest", action="store_true")
    parser.add_argument("--python", default=sys.executable)
    args, rest = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run(args.python, "-m", "venv", folder / "env")
        python = folder / "env" / ("Scripts" if os.name == "nt" else "bin") / "python"
        pip = python, "-m", "pip", "-q"
        run(*pip, "wheel", "--no-deps", "--wheel-dir", folder, ROOT)
        (wheel,) = folder.glob("numclip-*.whl")
        run(*pip, "install", f"{wheel}[test]", *(oldest() if args.oldest else []))
        for each in COPIED:
            copy = shutil.copytree if (ROOT / each).is_dir() else shutil.copy
            copy(ROOT / each, folder / "outside" / each)
        outside = folder / "outside"
        run(python, "-c", "import numclip; numclip.show_versions()", cwd=outside)
        run(python, "-m", "pytest", "-q", *rest, cwd=outside)


if __name__ == "__main__":
    main()

"""Write the README's section on speed and its picture from measured figures.

Run ``python -m pytest bench --benchmark-json=raw.json`` and ``python -m bench.tables raw.json``.
The figures of raw.json replace those in bench/results.json, from which all output is made; more
files may be given, or none. ``--check`` writes nothing, and fails if README.md is not up to date.
"""

from __future__ import annotations

import argparse
import json
import re
import textwrap
from pathlib import Path
from statistics import median
from typing import Any

from bench import results

README = Path(__file__).parents[1] / "README.md"
SECTION = re.compile(r"(?<=<!-- speed -->\n).*(?=<!-- /speed -->)", re.DOTALL)
LIBRARIES = {
    "numpy": "NumPy",
    "numba": "Numba",
    "scipy": "SciPy",
    "torch": "PyTorch",
    "jax": "JAX",
    "optax": "optax",
    "tensorflow": "TensorFlow",
    "tensorflow-cpu": "TensorFlow",
}
HEAD = """\
| gradients | MB | clips | numclip | flat | fastest peer | its norm's error | times as fast | \
times the limit | flat |
|---|--:|---|--:|--:|---|--:|--:|--:|--:|
"""
INTRODUCTION = """\
{cores} cores of {processor}, {threads} threads, Python {python}, {libraries}; {date}. float32, in
place; all ways were timed in turns of milliseconds, and ratios are medians over the turns. The
limit is the memory's: a plain read of one array of as many bytes, and a plain scaling of it where
something is clipped (for an optimizer's step: a plain loop over as many arrays). "flat" is
`groups.clip`, on flat buffers. A peer that is off by more than {wrong:.0%} is not compared with."""


def digits(number: float) -> str:
    """Return three significant digits."""
    return f"{number:#.3g}" if 1e-4 < number < 99.95 else f"{number:.0f}"


def unit(microseconds: float) -> str:
    small = microseconds < 1000
    return f"{digits(microseconds)} us" if small else f"{digits(microseconds / 1000)} ms"


def row(case: dict[str, Any]) -> str:
    """Return the table's row of a case."""
    name = results.fastest_peer(case)
    ours, flat = case["ways"]["numclip"], case["ways"].get("numclip, flat")
    peer = case["ways"].get(name)
    limited = case["nbytes"] >= 1e6  # less is not limited by the memory
    cells = [
        case["case"],
        digits(case["nbytes"] / 1e6),
        "yes" if case["clips"] else "no",
        unit(ours["microseconds"]),
        unit(flat["microseconds"]) if flat else "",
        f"{name}, {unit(peer['microseconds'])}" if peer else "none installed",
        f"{peer['norm error']:.0e}".replace("0e+00", "0") if peer else "",
        digits(peer["over numclip"]) if peer else "",
        digits(ours["of the limit"]) if limited else "",
        digits(flat["of the limit"]) if limited and flat else "",
    ]
    return f"| {' | '.join(cells)} |\n"


LOOP = "NumPy loop"
FOLDED = "<details><summary>Every figure, the machine, and other peers</summary>\n\n"
SHORT = """\
How many times as fast as a NumPy loop that does the same, in place, by the case:

| float32 | MB | nothing is clipped | clipped |
|---|--:|--:|--:|
"""


def short(cases: list[dict[str, Any]]) -> str:
    """Return a table of the NumPy loop's times over numclip's, a row for each gradient."""
    times: dict[str, dict[bool, float]] = {}
    for case in cases:
        if LOOP in case["ways"]:
            own = times.setdefault(f"{case['case']} | {digits(case['nbytes'] / 1e6)}", {})
            own[case["clips"]] = case["ways"][LOOP]["over numclip"]
    rows = (
        f"| {name} | {' | '.join(digits(own[c]) if c in own else '-' for c in (False, True))} |\n"
        for name, own in times.items()
    )
    return SHORT + "".join(rows)


def section(found: dict[str, Any]) -> str:
    """Return the README's section: a short table, and all figures folded below it."""
    machine = found["measured on"]
    libraries = ", ".join(
        f"{LIBRARIES[key]} {value}" for key, value in machine.items() if key in LIBRARIES
    )
    cases = found["cases"].values()
    wrong, date = results.WRONG, found["date"]
    text = INTRODUCTION.format(**machine, libraries=libraries, wrong=wrong, date=date)
    text = f"{short(list(cases))}\n{FOLDED}{textwrap.fill(text, 100)}\n\n"
    text += HEAD + "".join(map(row, cases))
    text += "\n![Time of every peer over the limit](bench/peers.png)\n"
    for way, figures in found["memory"].items():
        text += (
            f"\n`{way}` of {figures['nbytes'] / 1e6:.0f} MB in place allocates "
            f"{figures['traced'] / 1e3:.1f} kB; the process's peak grows by "
            f"{figures['peak'] / 1e3:.0f} kB."
        )
    if found["start-up"]:
        text += "\n\n| start-up | time |\n|---|--:|\n"
        for way, seconds in found["start-up"].items():
            text += f"| {way} | {unit(1e6 * median(seconds))} |\n"
    return f"{text}\n</details>\n"


def filled(found: dict[str, Any]) -> str:
    """Return the README with the section made of these figures."""
    return SECTION.sub(lambda _: section(found), README.read_text())


def main() -> None:
    """Merge new figures into results.json, and write the README's section and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("raw", nargs="*", type=Path, help="pytest-benchmark's JSON")
    parser.add_argument("--check", action="store_true", help="write nothing")
    options = parser.parse_args()
    found = results.load()
    if options.check:
        is_current = filled(found) == README.read_text()
        raise SystemExit(0 if is_current else "README.md: run python -m bench.tables")
    from bench.bars import draw
    from bench.cases import CASES

    for path in options.raw:
        found = results.merged(found, results.compact(json.loads(path.read_text())))
    found = results.ordered(found, [case.name for case in CASES])
    results.save(found)
    README.write_text(filled(found))
    draw(found, Path(__file__).with_name("peers.png"))


if __name__ == "__main__":
    main()

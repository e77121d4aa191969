"""The measured figures: extracted from pytest-benchmark's JSON, and kept in results.json."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

KEPT = Path(__file__).with_name("results.json")
# A way whose norm or result is off by more solves another problem: shown, but not compared with.
WRONG = 1e-2

INNERMOST = re.compile(r"[{\[][^{}\[\]]*[}\]]")
FIGURES = ("GB/s", "of the limit", "over numclip", "norm error", "result error")


def load() -> dict[str, Any]:
    return json.loads(KEPT.read_text()) if KEPT.exists() else {}


def save(found: dict[str, Any]) -> None:
    """Write the results, a line for each way."""
    text = json.dumps(found, indent=1)
    KEPT.write_text(INNERMOST.sub(lambda part: " ".join(part[0].split()), text) + "\n")


def rounded(number: float) -> float:
    return float(f"{number:.4g}")


def compact(raw: dict[str, Any]) -> dict[str, Any]:
    """Return the medians and ratios in pytest-benchmark's JSON, with the machine and versions."""
    machine = raw["machine_info"]
    cpu = machine["cpu"]
    made: dict[str, Any] = {
        "measured on": {
            "processor": cpu["brand_raw"],
            "cores": cpu["count"],
            "python": machine["python_version"],
            **machine["versions"],
        },
        "date": raw["datetime"][:10],
        "cases": {},
        "memory": {},
        "start-up": {},
    }
    for bench in raw["benchmarks"]:
        info = bench["extra_info"]
        if bench["group"] == "memory":
            made["memory"][info["way"]] = {key: info[key] for key in ("nbytes", "peak", "traced")}
        elif bench["group"] == "start-up":
            made["start-up"].setdefault(info["way"], []).append(rounded(info["seconds"]))
        elif "case" in info:
            add(made["cases"], bench["group"], info, bench["stats"]["median"])
    return made


def add(cases: dict[str, Any], group: str, info: dict[str, Any], seconds: float) -> None:
    empty = {"case": info["case"], "clips": info["clips"], "nbytes": info["nbytes"], "ways": {}}
    way = {"microseconds": rounded(seconds * 1e6)}
    way.update((key, rounded(info[key])) for key in FIGURES if key in info)
    cases.setdefault(group, empty)["ways"][info["way"]] = way


def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Return `old` updated by `new`; `new` alone if the machine or a version differs."""
    if not old or old["measured on"] != new["measured on"]:
        return new
    for part in ("cases", "memory", "start-up"):
        old[part].update(new[part])
    return {**old, "date": new["date"]}


def ordered(found: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Return the results with the cases in the order of these names."""
    cases = sorted(found["cases"].items(), key=lambda item: names.index(item[1]["case"]))
    return {**found, "cases": dict(cases)}


def is_wrong(case: dict[str, Any], way: str) -> bool:
    found = case["ways"][way]
    return max(found["norm error"], found["result error"]) > WRONG


def fastest_peer(case: dict[str, Any]) -> str | None:
    """Return the fastest peer that is not wrong; None if none was measured."""
    peers = [way for way in case["ways"] if way != "limit" and not way.startswith("numclip")]
    right = [way for way in peers if not is_wrong(case, way)]
    return min(right, key=lambda way: case["ways"][way]["microseconds"], default=None)

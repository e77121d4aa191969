"""Print where numclip stands against its goals: ``python -m bench.goals``."""

from __future__ import annotations

from bench import results
from bench.cases import CASES


def main() -> None:
    """Print a line for each measured case: ratios, and the goals in brackets."""
    goals = {case.name: case for case in CASES}
    for name, case in results.load()["cases"].items():
        goal, peer, ways = goals[case["case"]], results.fastest_peer(case), case["ways"]
        line = f"{name:<30}{ways['numclip']['microseconds']:>10.1f} us"
        if peer:
            faster = ways[peer]["over numclip"]
            line += f"  {peer:<15}{ways[peer]['microseconds']:>10.1f} us"
            line += f"{faster:>7.2f}x faster ({goal.faster}{missed(faster < goal.faster)})"
        for way, most in (("numclip", goal.limit), ("numclip, flat", goal.flat)):
            if most and way in ways:
                found = ways[way]["of the limit"]
                line += f"  {way}: {found:.2f} of the limit ({most}{missed(found > most)})"
        for way, found in ways.items():
            if way == "numclip, flat" or (way.startswith("tf") and results.is_wrong(case, way)):
                line += f"  {way}: {found['over numclip']:.2f} of numclip's time"
        print(line)


def missed(is_missed: bool) -> str:
    return ", missed" if is_missed else ""


if __name__ == "__main__":
    main()

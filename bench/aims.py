"""Print where numclip stands against what it aims at: ``python -m bench.aims``."""

from __future__ import annotations

from bench import results
from bench.cases import CASES


def main() -> None:
    """Print a line for each measured case: ratios, and the aims in brackets."""
    aims = {case.name: case for case in CASES}
    for name, case in results.load()["cases"].items():
        aim, peer, ways = aims[case["case"]], results.fastest_peer(case), case["ways"]
        line = f"{name:<30}{ways['numclip']['microseconds']:>10.1f} us"
        if peer:
            faster = ways[peer]["over numclip"]
            line += f"  {peer:<15}{ways[peer]['microseconds']:>10.1f} us"
            line += f"{faster:>7.2f}x faster ({aim.faster}{missed(faster < aim.faster)})"
        for way, most in (("numclip", aim.limit), ("numclip, flat", aim.flat)):
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

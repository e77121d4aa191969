"""numclip against its peers and against the memory.

pytest-benchmark times one function after another, over minutes in which a machine's speed
changes. So all ways of a case are timed in turns, see timing_in_turns.py, and the times replayed.
"""

import pytest

from bench.cases import CASES
from bench.timing_in_turns import time_in_turns


class Clock:
    """A timer by which pytest-benchmark measures times that were recorded before."""

    now = 0.0

    def read(self):
        return self.now

    def replay(self, times):
        rest = iter(times)

        def advance():
            self.now += next(rest)

        return advance


clock = Clock()


def pytest_generate_tests(metafunc):
    chosen = metafunc.config.getoption("case")
    metafunc.parametrize(
        ("case", "clips", "way"),
        [
            pytest.param(case, clips, way, id=f"{case.name}-{label}-{way}")
            for case in CASES
            if not chosen or case.name in chosen
            for clips, label in ((False, "does not clip"), (True, "clips"))
            for way in case.kind.ways
        ],
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.benchmark(timer=clock.read)
def test_speed(benchmark, case, clips, way):
    run = time_in_turns(case.name, clips, benchmark.disabled)
    if way in run.missing:
        pytest.skip(run.missing[way])
    runner = run.runners[way]
    benchmark.group = f"{case.name}, {'clips' if clips else 'does not clip'}"
    benchmark.pedantic(clock.replay(runner.times), rounds=len(runner.times))
    benchmark.extra_info.update(
        {
            "case": case.name,
            "clips": clips,
            "way": way,
            "nbytes": run.nbytes,
            "GB/s": run.nbytes * case.kind.passes[clips] / run.time(way) / 1e9,
            "of the limit": run.ratio(way, "limit"),
            "over numclip": run.ratio(way, "numclip"),
            **runner.errors,
        }
    )
    if way.startswith("numclip"):
        assert runner.errors["norm error"] < 1e-6
        assert runner.errors["result error"] < 1e-5
    if clips and case.kind.follows and way != "limit":
        bound, result = runner.fallen  # a peer's wrong norm may not follow the bound exactly
        assert bound < 0
        assert result == pytest.approx(bound, rel=0.05, abs=runner.errors["norm error"])

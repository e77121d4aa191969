"""Some cases of the fuzzer, in a child process; ``python -m tests.promises.fuzz`` runs more."""

import numpy as np
import pytest

import numclip as nc
from tests.promises import fuzz

pytestmark = pytest.mark.full


def test_cases_end_as_the_contract_says():
    assert fuzz.run_batch(first=0, count=400) == []


def test_what_a_case_finds_is_told(monkeypatch):
    """A byte beside what is to be written, a wrong number, an error without a name, a crash."""
    assert any(fuzz.run(number) for number in range(50))
    assert not all(fuzz.run(number) for number in range(50))

    def raising(*_, **__):
        raise TypeError("something")

    for name, wrong in {
        "global_norm": lambda *_, **__: 3.25,
        "clip_by_norm": lambda grad, *_, **__: np.add(grad, 1.0),
        "clip_by_global_norm": raising,
    }.items():
        with monkeypatch.context() as patched:
            patched.setattr(nc, name, wrong)
            with pytest.raises(AssertionError):
                all(fuzz.run(number) in (True, False) for number in range(300))


def test_a_byte_that_is_written_beside_is_found():
    case = fuzz.Case(0)
    array = case.array((3,), "f4")
    before = case.frozen()
    raw, mask = case.memory[0]
    array[...] = 1.0
    case.check_unwritten(before, [array])
    raw[np.flatnonzero(~mask)[-1]] ^= 1
    with pytest.raises(AssertionError, match="memory 0 was written"):
        case.check_unwritten(before, [array])


def test_a_case_that_ends_the_process_is_told(monkeypatch):
    begun = fuzz.run_batch
    code = "import os; print('case\\t5', flush=True); os._exit(3)"
    run = fuzz.subprocess.run
    calls = []

    def once(arguments, **more):
        calls.append(arguments)
        return run([*arguments[:2], code] if len(calls) == 1 else arguments, **more)

    monkeypatch.setattr(fuzz.subprocess, "run", once)
    ((number, text),) = begun(first=5, count=2)
    assert number == 5
    assert text.startswith("ended the process: 3")
    assert "run_all(6, 7)" in calls[1][2]

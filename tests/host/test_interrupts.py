"""An exception of a signal's handler leaves everything done or nothing, and nothing to be done."""

import subprocess
import sys

import pytest

from numclip.host.runtime.jit import INTERPRETED

pytestmark = [
    pytest.mark.full,  # child processes, or minutes
    pytest.mark.skipif(
        INTERPRETED or sys.platform == "win32", reason="needs kernels and interval timers"
    ),
]

PROGRAM = """
import signal, sys, time
import numpy as np, numclip as nc
from numclip.host.runtime import threads

class Alarm({base}):
    pass

def ring(*_):
    raise Alarm

signal.signal(signal.SIGALRM, ring)
nc.set_num_threads(2)
rng = np.random.default_rng(5)

def listed():
    return [np.ones(300, np.float32) for _ in range(200)]

def mixed():
    strided = np.ones((50, 50))[:, ::2]
    slices = nc.IndexedSlices(np.ones((60, 4)), np.arange(60) % 11, (11, 4))
    return [*(np.ones(9_000, kind) for kind in ("f2", "f4", "f8", "c8")), strided, slices]

def large():
    return [np.ones(900_000, np.float32), np.ones(700_000), np.ones((40, 30), "f4")[::2]]

def gone_bad():
    grads = mixed()
    grads[1][4] = np.nan
    return grads

def arrays(grads):
    return [g.values if isinstance(g, nc.IndexedSlices) else g for g in grads]

def clip(grads):
    nc.clip_by_global_norm(grads, 0.5, out=grads, nonfinite=policy)

make = {kind}
policy = "zero" if make is gone_bad else "propagate"
begun, whole = make(), make()
clip(whole)
spans = []
for _ in range(5):
    grads = make()
    start = time.perf_counter()
    clip(grads)
    spans.append(time.perf_counter() - start)
before = [a.tobytes() for a in arrays(begun)]
after = [a.tobytes() for a in arrays(whole)]
counts = dict(finished=0, nothing=0, everything=0)
for _ in range({runs}):
    grads = make()
    delay = float(rng.uniform(1e-6, 1.2 * sorted(spans)[2]))
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, delay)
            clip(grads)
            signal.setitimer(signal.ITIMER_REAL, 0)
            counts["finished"] += 1
        except Alarm:
            found = [a.tobytes() for a in arrays(grads)]
            if found == before:
                counts["nothing"] += 1
            else:
                assert found == after, [x == y for x, y in zip(found, after)]
                counts["everything"] += 1
            time.sleep(0.001)
            assert found == [a.tobytes() for a in arrays(grads)]
    except Alarm:
        pass
signal.setitimer(signal.ITIMER_REAL, 0)
signal.signal(signal.SIGALRM, signal.SIG_IGN)
assert counts["nothing"] > 0, counts
last = make()
clip(last)
assert [a.tobytes() for a in arrays(last)] == after
print(counts)
"""


@pytest.mark.parametrize("base", ["Exception", "BaseException"])
@pytest.mark.parametrize("kind", ["listed", "mixed", "large", "gone_bad"])
def test_a_clip_in_place_is_whole_or_has_not_begun(kind, base):
    code = PROGRAM.format(kind=kind, base=base, runs=200)
    result = subprocess.run(
        [sys.executable, "-c", code], timeout=300, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


STARTS = """
import _thread, signal, time
import numpy as np, numclip as nc
from numclip.host.runtime import threads

nc.set_num_threads(4)
x = [np.ones(3_000_000, np.float32)]
start = _thread.start_new_thread
class Alarm(Exception):
    pass
def interrupted(*arguments):
    start(*arguments)
    raise Alarm
_thread.start_new_thread = interrupted
grads = [a.copy() for a in x]
for _ in range(2):  # once as the first thread was started, once more as it is started again
    try:
        nc.clip_by_global_norm(grads, 0.5, out=grads)
    except Alarm:
        time.sleep(0.05)
        assert (grads[0] == 1.0).all()
    else:
        raise AssertionError("no thread was started")
_thread.start_new_thread = start
assert nc.global_norm(x) == 3_000_000**0.5
assert threads._team.started == 3
"""


def test_an_exception_as_threads_are_started_writes_nothing_and_loses_none():
    result = subprocess.run(
        [sys.executable, "-c", STARTS], timeout=300, check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr

"""Our own threads: shares, errors, forks, concurrent callers, the environment."""

import os
import signal
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import numclip as nc
from numclip.kernels import threads

LARGE = threads.PARALLEL_BYTES


@pytest.fixture(autouse=True)
def restore():
    yield
    nc.set_num_threads(None)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 17])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_shares_make_up_the_whole(limit, count):
    nc.set_num_threads(limit)
    shares, names = [], set()

    def kernel(begin, end, tag):
        assert tag == "argument"
        shares.append((begin, end))
        names.add(threading.current_thread().name)

    threads.run(kernel, count, LARGE, "argument")
    assert [k for share in sorted(shares) for k in range(*share)] == list(range(count))
    assert len(shares) == max(1, min(limit, count))
    assert threading.current_thread().name in names


def test_small_work_stays_with_the_caller():
    nc.set_num_threads(4)
    shares = []
    threads.run(lambda begin, end: shares.append((begin, end)), 9, LARGE - 1)
    assert shares == [(0, 9)]


@pytest.mark.parametrize("failing", [0, 5])
def test_an_error_reaches_the_caller_after_all_shares_are_done(failing):
    nc.set_num_threads(2)
    done = []

    def kernel(begin, _end):
        if begin == failing:
            raise ValueError("share failed")
        time.sleep(0.02)
        done.append(begin)

    with pytest.raises(ValueError, match="share failed"):
        threads.run(kernel, 10, LARGE)
    assert done == [5 - failing]
    assert threads._free.acquire(blocking=False)
    threads._free.release()


def test_concurrent_callers_get_their_own_results():
    nc.set_num_threads(2)
    rng = np.random.default_rng(1)
    arrays = [rng.standard_normal(400_000) for _ in range(4)]
    wanted = [nc.global_norm([array]) for array in arrays]
    found = [[] for _ in arrays]

    def work(k):
        for _ in range(5):
            found[k].append(nc.global_norm([arrays[k]]))

    callers = [threading.Thread(target=work, args=(k,)) for k in range(4)]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert found == [[norm] * 5 for norm in wanted]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_makes_threads_of_its_own(busy):
    code = """
import os, sys, threading, warnings
import numpy as np, numclip as nc
from numclip.kernels import threads
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
nc.set_num_threads(2)
g = [np.ones(threads.PARALLEL_BYTES // 8)]
norm = nc.global_norm(g)
assert threading.active_count() == 2
if sys.argv[1] == "True":
    threads._free.acquire()
child = os.fork()
if child == 0:
    ok = threading.active_count() == 1 and nc.global_norm(g) == norm
    os._exit(0 if ok and threading.active_count() == 2 else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    command = [sys.executable, "-c", code, str(busy)]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize("error", [KeyboardInterrupt, TimeoutError])
def test_an_interrupt_waits_for_the_shares(error):
    nc.set_num_threads(2)
    done = []

    def kernel(begin, _end):
        if begin:
            time.sleep(0.3)
            done.append(begin)

    def interrupt(*_):
        raise error

    previous = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.1)
    try:
        with pytest.raises(error):
            threads.run(kernel, 2, LARGE)
    finally:
        signal.signal(signal.SIGALRM, previous)
    assert done == [1]
    threads.run(lambda _, end: done.append(end), 2, LARGE)
    assert sorted(done[1:]) == [1, 2]


@pytest.mark.parametrize(
    ("wish", "wanted"), [("3", 3), (" 1 ", 1), ("0", None), ("many", None), ("", None)]
)
def test_environment_sets_the_default(monkeypatch, wish, wanted):
    monkeypatch.setenv("NUMCLIP_NUM_THREADS", wish)
    nc.set_num_threads(None)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if wanted is None:
        assert 1 <= nc.get_num_threads() <= cores
    else:
        assert nc.get_num_threads() == wanted


@pytest.mark.parametrize(
    ("text", "cores"), [("max 100000", None), ("250000 100000", 2), ("5 10", 1)]
)
def test_control_group_bounds_the_default(monkeypatch, tmp_path, text, cores):
    file = tmp_path / "cpu.max"
    file.write_text(text)
    monkeypatch.setattr(threads, "CGROUP_QUOTA", str(file))
    assert threads._cgroup_cores() == cores


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="this system has no interval timer")
@pytest.mark.parametrize("error", ["KeyboardInterrupt", "TimeoutError"])
def test_interrupts_at_any_time_lose_no_thread(error):
    code = f"""
import random, signal
import numpy as np, numclip as nc
nc.set_num_threads(2)
x = np.ones(1 << 18)
norm = nc.global_norm([x])
def interrupt(*_):
    raise {error}
signal.signal(signal.SIGALRM, interrupt)
random.seed(3)
for _ in range(1000):
    try:
        signal.setitimer(signal.ITIMER_REAL, random.uniform(5e-5, 5e-4))
        while True:
            assert nc.global_norm([x]) == norm
    except ({error}, SystemError):  # numba, if it is interrupted as it returns an array
        pass
signal.signal(signal.SIGALRM, signal.SIG_IGN)
assert nc.global_norm([x]) == norm
"""
    # What CPython says on stderr of a thread interrupted as it is started does not matter.
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, timeout=120, check=False, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_threads_let_go_of_the_arrays():
    nc.set_num_threads(2)
    array = np.ones(threads.PARALLEL_BYTES)
    nc.global_norm([array])
    gone = weakref.ref(array)
    del array
    deadline = time.monotonic() + 5
    while gone() is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert gone() is None


def test_threads_that_race_for_a_manager_do_not_break_it():
    groups = nc.ParamGroups([nc.Group("all of it", {"w": np.ones(9)}, clip=nc.ByGlobalNorm(1.0))])
    errors = []

    def clip():
        try:
            for _ in range(400):
                groups.clip()
        except Exception as error:
            errors.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        callers = [threading.Thread(target=clip) for _ in range(4)]
        for caller in callers:
            caller.start()
        for caller in callers:
            caller.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    groups.clip()
    assert 400 < len(groups.history) <= 1601

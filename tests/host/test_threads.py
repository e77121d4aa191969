"""Our own threads: shares, errors, forks, concurrent callers, shutdown, refused threads."""

import os
import subprocess
import sys
import threading
import time
import weakref

import numpy as np
import pytest

import numclip as nc
from numclip.host.runtime import threads
from numclip.host.runtime.jit import INTERPRETED, kernel
from tests.oracle.races import errors_of_race

LARGE = threads.PARALLEL_BYTES
alone_when_interpreted = pytest.mark.skipif(INTERPRETED, reason="interpreted kernels run alone")
on_linux = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts in /proc")


@pytest.fixture(autouse=True)
def restore():
    yield
    nc.set_num_threads(None)


@kernel
def count_visits(begin, end, visits):
    """Count how often each item is computed."""
    for k in range(begin, end):
        visits[k] += 1


@kernel
def visit_slowly(begin, end, visits, rounds):
    """Count visits, after a long computation for each."""
    for k in range(begin, end):
        x = 1.0
        for _ in range(rounds):
            x = np.sqrt(x + 1.0)
        visits[k] += 1.0 if x > 0.0 else 0.0


@kernel
def ask_for_memory(begin, end, sizes):
    """Fail where there is not as much memory as the items ask for."""
    for k in range(begin, end):
        sizes[k] = np.empty(sizes[k], np.int64).size


def program(code, *arguments, **options):
    """Run a program of its own, whose threads are numclip's.

    A compilation can load SciPy, whose OpenBLAS would start some at that moment.
    """
    command = [sys.executable, "-c", code, *arguments]
    environment = {**options.pop("env", os.environ), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.run(
        command,
        timeout=240,
        check=False,
        capture_output=True,
        text=True,
        env=environment,
        **options,
    )


@pytest.mark.full
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 17, 1000])
@pytest.mark.parametrize("limit", [1, 2, 3, 7])
def test_every_item_is_computed_once(limit, count):
    nc.set_num_threads(limit)
    visits = np.zeros(count)
    for round_ in range(1, 21):
        threads.run(count_visits, count, LARGE, visits)
        assert (visits == round_).all()


@alone_when_interpreted
def test_several_calls_are_made_once_each():
    nc.set_num_threads(2)
    visits = [np.zeros(k + 3) for k in range(5)]
    calls = [
        threads.Call(count_visits, part.size, LARGE if k % 2 else 10, (part,))
        for k, part in enumerate(visits)
    ]
    make = threads.ready(calls)
    assert not np.concatenate(visits).any()
    for _ in range(3):
        make()
    assert (np.concatenate(visits) == 1.0).all()


@pytest.mark.full
@alone_when_interpreted
def test_two_threads_share_the_work():
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    if cores < 2:
        pytest.skip("there is one core")
    visits = np.zeros(64)
    ratios = []
    for _ in range(15):
        seconds = []
        for limit in (1, 2):
            nc.set_num_threads(limit)
            start = time.perf_counter()
            threads.run(visit_slowly, 64, LARGE, visits, 30_000)
            seconds.append(time.perf_counter() - start)
        ratios.append(seconds[1] / seconds[0])
    assert min(ratios) < 0.75, ratios


@pytest.mark.full
@alone_when_interpreted
@pytest.mark.parametrize("limit", [1, 2])
def test_memory_that_runs_out_reaches_the_caller_and_the_team_stays(limit):
    nc.set_num_threads(limit)
    sizes = np.full(40, 5, np.int64)
    sizes[33] = 1 << 58
    with pytest.raises(MemoryError):
        threads.run(ask_for_memory, 40, LARGE, sizes)
    visits = np.zeros(50)
    threads.run(count_visits, 50, LARGE, visits)
    assert (visits == 1.0).all()


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


@pytest.mark.full
@alone_when_interpreted
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_child_makes_threads_of_its_own(busy):
    code = """
import ctypes, os, sys, warnings
import numpy as np, numclip as nc
from numclip.host.runtime import team, threads
warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
nc.set_num_threads(2)
g = [np.ones(threads.PARALLEL_BYTES // 8)]
norm = nc.global_norm(g)
assert threads._team.started == 1
if sys.argv[1] == "True":
    ctypes.c_int64.from_address(threads._team.words + team.BUSY * team.WORD).value = 1
child = os.fork()
if child == 0:
    ok = threads._team is None and nc.global_norm(g) == norm
    os._exit(0 if ok and threads._team.started == 1 else 1)
assert nc.global_norm(g) == norm
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    result = program(code, str(busy))
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@alone_when_interpreted
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_children_of_a_process_whose_threads_work_get_their_results():
    code = """
import os, sys, threading, warnings
import numpy as np, numclip as nc
warnings.simplefilter("ignore", DeprecationWarning)
nc.set_num_threads(2)
x = [np.full(1_500_000, 0.5, np.float32)]
norm, going = nc.global_norm(x), True
def work():
    while going:
        nc.global_norm(x)
callers = [threading.Thread(target=work) for _ in range(2)]
for caller in callers:
    caller.start()
bad = 0
for k in range(20):
    child = os.fork()
    if child == 0:
        inner = os.fork() if k % 2 else 0
        ok = nc.global_norm(x) == norm
        if inner:
            ok = ok and os.waitpid(inner, 0)[1] == 0
        os._exit(0 if ok else 1)
    bad += os.waitpid(child, 0)[1] != 0
going = False
for caller in callers:
    caller.join()
sys.exit(bad)
"""
    result = program(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@alone_when_interpreted
@pytest.mark.parametrize("warm", [False, True])
def test_calls_work_while_the_interpreter_ends(warm):
    code = """
import atexit, sys
import numpy as np, numclip as nc
nc.set_num_threads(2)
grads = [np.ones(1_500_000, np.float32)]
nc.clip_by_global_norm(grads, 1e9, out=grads)
nc.clip_by_global_norm([np.ones(1_500_000, np.float32)], 0.5)
if sys.argv[1] == "False":
    from numclip.host.runtime import threads
    threads._team = None  # the end of the process has to start its threads
def last(bound):
    norm = nc.clip_by_global_norm(grads, bound, out=grads)[1]
    print(norm <= 2 * bound, flush=True)
atexit.register(last, 700.0)
class Late:
    def __del__(self):
        last(400.0)
kept = Late()
"""
    result = program(code, str(warm))
    assert (result.returncode, result.stdout.split(), result.stderr) == (0, ["True", "True"], "")


@pytest.mark.full
@alone_when_interpreted
@on_linux
def test_where_no_thread_can_be_started_the_caller_works_alone():
    code = """
import os, threading
import numpy as np, numclip as nc
nc.set_num_threads(1)
x = [np.ones(2_000_000, np.float32)]
nc.global_norm(x)
nc.set_num_threads(2)
before = len(os.listdir("/proc/self/task"))
threading.stack_size(1 << 47)  # as much as there are addresses
for _ in range(3):
    assert nc.global_norm(x) == 2_000_000**0.5
assert len(os.listdir("/proc/self/task")) == before
threading.stack_size(0)
from numclip.host.runtime import threads
assert threads._team.started == 0
threads._team.retry = 0.0
assert nc.global_norm(x) == 2_000_000**0.5
assert threads._team.started == 1
"""
    result = program(code)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
@alone_when_interpreted
@on_linux
def test_threads_that_did_start_end_where_others_are_refused():
    code = """
import _thread, os, time
import numpy as np, numclip as nc
from numclip.host.runtime import threads
nc.set_num_threads(9)
x = [np.ones(9_000_000, np.float32)]
norm = nc.global_norm(x)
assert threads._team.started == 8
alive = lambda: len(os.listdir("/proc/self/task"))
def settled(wanted):
    deadline = time.monotonic() + 30
    while alive() != wanted and time.monotonic() < deadline:
        time.sleep(0.01)
    return alive() == wanted
before = alive() - 8
start, starts = _thread.start_new_thread, []
def refuse(*arguments):
    starts.append(arguments)
    if len(starts) > 5:
        raise RuntimeError("can't start new thread")
    return start(*arguments)
_thread.start_new_thread = refuse
nc.set_num_threads(19)
assert nc.global_norm(x) == norm and len(starts) == 6
assert settled(before), (alive(), before)
assert nc.global_norm(x) == norm and len(starts) == 6  # it is not tried again at once
_thread.start_new_thread = start
threads._team.retry = 0.0
assert nc.global_norm(x) == norm
assert settled(before + 18), (alive(), before)
"""
    result = program(code)
    assert result.returncode == 0, result.stderr


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


def test_threads_let_go_of_the_arrays():
    nc.set_num_threads(2)
    array = np.ones(threads.PARALLEL_BYTES)
    nc.global_norm([array])
    gone = weakref.ref(array)
    del array
    assert gone() is None


def test_threads_that_race_for_a_manager_do_not_break_it():
    groups = nc.ParamGroups([nc.Group("all of it", {"w": np.ones(9)}, clip=nc.ByGlobalNorm(1.0))])

    def clip():
        for _ in range(400):
            groups.clip()

    assert errors_of_race([clip] * 4) == []
    groups.clip()
    assert 400 < len(groups.history) <= 1601

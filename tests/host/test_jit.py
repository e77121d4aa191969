"""Compilation: the cache survives what happens to files, kernels vectorise, imports point down."""

import json
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from numba.core.registry import cpu_target

import numclip
from numclip.host.kernels import cpu, elements
from numclip.host.runtime import jit
from numclip.host.runtime.jit import INTERPRETED
from tests.oracle import reference
from tests.oracle.checks import assert_same_bits

PACKAGE = Path(numclip.__file__).parent
CLIP = (
    "import numpy as np, numclip as nc;"
    "print(nc.clip_by_global_norm([np.array([3.0, 4.0])], 1e9)[1])"
)

compiled_only = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in this run")


# A kernel that compiles in a moment, with a part that is compiled into it.
KERNEL = """
import sys
from numclip.host.runtime.jit import inline, kernel
@inline
def part(x):
    return 2.0 * x
@kernel
def double(x):
    return part(x)
print(double(21.0), *double.stats.cache_hits.values())
"""


# Runs programs in forks of itself: what takes most of their time, the start of numba, is done once.
FORKING = """
import json, os, sys
import numclip
from numba import njit
from numba.core import config
njit(lambda x: x)(1.0)
for line in sys.stdin:
    cache, code, environment, paths = json.loads(line)
    if child := os.fork():
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
        continue
    for number, path in enumerate(paths, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(environment)
    config.CACHE_DIR = cache
    exec(code, {"__name__": "__main__"})
    sys.exit()
"""


@pytest.fixture(scope="module")
def forked(tmp_path_factory):
    """Return a function like `run`, for environments that numba does not read."""
    if not hasattr(os, "fork"):
        pytest.skip("needs forks")
    paths = [tmp_path_factory.mktemp("forked") / name for name in ("stdout", "stderr")]
    # Python warns of forks where there are threads, as OpenBLAS starts them.
    variables = {**os.environ, "NUMCLIP_QUIET": "1", "OPENBLAS_NUM_THREADS": "1"}
    command, pipe = [sys.executable, "-W", "error", "-c", FORKING], subprocess.PIPE

    with subprocess.Popen(command, env=variables, stdin=pipe, stdout=pipe, text=True) as forking:

        def run_forked(cache, code, **environment):
            told = json.dumps([str(cache), code, environment, list(map(str, paths))])
            print(told, file=forking.stdin, flush=True)
            code = int(forking.stdout.readline())
            return subprocess.CompletedProcess([], code, *(path.read_text() for path in paths))

        yield run_forked


def run(cache, code=CLIP, **environment):
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(cache), "NUMCLIP_QUIET": "1", **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@pytest.mark.full
@compiled_only
def test_the_second_process_takes_what_the_first_one_compiled(tmp_path):
    assert run(tmp_path).stdout == "5.0\n"
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert len(files) >= 1
    heavy = "'scipy.linalg', 'numba.np.linalg'"
    loaded = f"{CLIP}; import sys; print([m for m in sys.modules if m in ({heavy})])"
    again = run(tmp_path, loaded)
    assert (again.stdout, again.stderr) == ("5.0\n[]\n", "")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == files


@pytest.mark.full
@compiled_only
def test_broken_cache_files_are_replaced(forked, tmp_path):
    assert forked(tmp_path, KERNEL).stdout == "42.0\n"
    assert forked(tmp_path, KERNEL).stdout == "42.0 1\n"
    (file,) = tmp_path.rglob("*.nbc")
    whole = file.read_bytes()
    for broken in (b"", whole[:40], whole[:-1], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(broken)
        again = forked(tmp_path, KERNEL)
        assert (again.stdout, again.stderr) == ("42.0\n", "")
        assert forked(tmp_path, KERNEL).stdout == "42.0 1\n"


@pytest.mark.full
@compiled_only
@pytest.mark.parametrize("payload", ["b'no pickle'", "dumps(5)", "dumps(([], (1, 2)))", "ended"])
def test_code_that_cannot_be_loaded_is_compiled(forked, tmp_path, payload):
    """A file that is what it says can still hold what this process cannot use."""
    spoilt = f"""
from numclip.host.runtime import jit
from numclip.host.runtime.jit import dumps
def ended(pair):
    return dumps((["no_function_of_this_name"], pair[1]))
def spoil(pair):
    return {"ended(pair)" if payload == "ended" else payload}
jit.dumps = spoil
"""
    assert forked(tmp_path, KERNEL.replace("import sys", "import sys" + spoilt)).stdout == "42.0\n"
    again = forked(tmp_path, KERNEL)
    assert (again.returncode, again.stdout, again.stderr) == (0, "42.0\n", "")
    assert forked(tmp_path, KERNEL).stdout == "42.0 1\n"


@pytest.mark.full
@compiled_only
def test_no_directory_for_the_cache(forked, tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    result = forked(blocked, KERNEL, HOME=str(blocked), XDG_CACHE_HOME=str(blocked))
    assert (result.stdout, result.stderr) == ("42.0\n", "")
    assert [*tmp_path.iterdir()] == [blocked]


@pytest.mark.full
@compiled_only
@pytest.mark.parametrize(
    ("old", "new", "result"),
    [("2.0 * x", "3.0 * x", "63.0\n"), ("return part(x)", "return part(x) + 1", "43.0\n")],
)
def test_code_is_stale_when_what_it_is_made_of_changes(forked, tmp_path, old, new, result):
    assert forked(tmp_path, KERNEL).stdout == "42.0\n"
    assert forked(tmp_path, KERNEL.replace(old, new)).stdout == result
    assert forked(tmp_path, KERNEL).stdout == "42.0 1\n"


@pytest.mark.full
@compiled_only
def test_code_for_other_settings_of_numba_is_not_taken(tmp_path):
    environments: list[dict[str, str]] = [
        {},
        {"NUMBA_OPT": "1"},
        {"NUMBA_BOUNDSCHECK": "1"},
        {"NUMBA_CPU_NAME": "generic"},
    ]
    for environment in environments:
        assert run(tmp_path, KERNEL, **environment).stdout == "42.0\n"
    for environment in environments:
        assert run(tmp_path, KERNEL, **environment).stdout == "42.0 1\n"


@compiled_only
def test_versions_arguments_and_options_are_in_the_description(monkeypatch):
    def described(options, kinds, target=("a", "b", "c")):
        return jit.description(cpu.merge.py_func, options, kinds, target)

    seen = {
        described({"nogil": True}, ["float32"]),
        described({"nogil": False}, ["float32"]),
        described({"nogil": True}, ["float64"]),
        described({"nogil": True}, ["float32"], ("a", "b", "d")),
    }
    for module in (jit.numba, jit.llvmlite, jit.np):
        with monkeypatch.context() as patch:
            patch.setattr(module, "__version__", "0")
            seen.add(described({"nogil": True}, ["float32"]))
    with monkeypatch.context() as patch:
        patch.setattr(jit.sys, "version", "4.0")
        seen.add(described({"nogil": True}, ["float32"]))
    assert len(seen) == 8
    flags = [{"fastmath": set(order)} for order in (("nsz", "reassoc"), ("reassoc", "nsz"))]
    assert described(flags[0], []) == described(flags[1], [])


@pytest.mark.full
@compiled_only
def test_the_first_compilation_is_announced_once(forked, tmp_path):
    twice = KERNEL + "double(1)"
    told = forked(tmp_path, twice, NUMCLIP_QUIET="0").stderr
    assert told.count("\n") == 1
    assert told.startswith("numclip: compiling")
    assert f"kept in {tmp_path}/numclip" in told
    assert forked(tmp_path, twice, NUMCLIP_QUIET="0").stderr == ""
    assert forked(tmp_path, twice.replace("2.0", "5.0")).stderr == ""


@pytest.mark.full
@compiled_only
@pytest.mark.parametrize("stream", ["None", "open('/dev/full', 'w')", "open('/dev/null')"])
def test_a_lost_stderr_is_no_fault(forked, tmp_path, stream):
    code = f"import sys; kept, sys.stderr = sys.stderr, {stream}\n{KERNEL}\nsys.stderr = kept"
    assert forked(tmp_path, code, NUMCLIP_QUIET="").stdout == "42.0\n"


@pytest.mark.full
@compiled_only
def test_nowhere_to_keep_code_is_announced_with_the_reason(forked, tmp_path):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    slot = str(tmp_path / "open")
    told = forked(slot, KERNEL, NUMCLIP_QUIET="0", HOME=slot, XDG_CACHE_HOME=slot).stderr
    assert "kept nowhere" in told
    assert f"{slot} can be written by others" in told
    assert [*(tmp_path / "open").iterdir()] == []


HALVES = """
import sys
import ml_dtypes
import numpy as np
from numclip.host.kernels import cpu, elements, halves
from numba.core.registry import cpu_target
values = np.arange(65_536, dtype=np.uint16)
lows = 0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF, 0x8000, 0x8001, 0xFFFF
wide = np.concatenate([values.astype(np.uint32) << 16 | low for low in lows]).view(np.float32)
wide = np.append(wide, values * np.float32(2.0**-26))  # where float16 is subnormal
for storage in np.uint16, np.int16:
    x = values.astype(storage)
    y = np.empty_like(x)
    chunks = np.array([[x.ctypes.data, y.ctypes.data, x.size, 0]])
    cpu.scale(0, 1, chunks, np.full(1, 0.37, np.float32), x[:0])
    ones = np.ones((x.size, 4), np.int64)
    ones[:, 0] = x.ctypes.data + 2 * np.arange(x.size)
    squares = np.empty(x.size)
    cpu.sum_squares(0, x.size, ones, x[:0], squares)
    sys.stdout.write(y.tobytes().hex() + squares.tobytes().hex() + "\\n")
    nearest = np.empty(wide.size, storage)
    halves.round_all(0, 1, np.array([[nearest.ctypes.data, wide.ctypes.data, wide.size, 0]]),
                     nearest[:0], wide[:0])
    with np.errstate(all="ignore"):
        wanted = wide.astype(np.float16 if storage is np.uint16 else ml_dtypes.bfloat16)
    assert (np.isnan(wide) | (nearest == wanted.view(storage))).all()
    assert np.isnan(nearest.view(wanted.dtype)[np.isnan(wide)].astype(float)).all()
print(elements.converts_halves(cpu_target.target_context.codegen()))
"""


@pytest.fixture(scope="module")
def halves_here():
    """Return what the host's own code makes of every 16-bit float."""
    result = run(os.environ["NUMBA_CACHE_DIR"], HALVES)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


@pytest.mark.full
@compiled_only
@pytest.mark.skipif(platform.machine() != "x86_64", reason="names processors of x86-64")
@pytest.mark.parametrize(
    ("environment", "native"),
    [
        ({"NUMBA_CPU_NAME": "generic"}, False),
        ({"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": "+f16c"}, True),
        ({"NUMBA_CPU_FEATURES": "-f16c"}, False),
        ({"NUMBA_ENABLE_AVX": "0"}, None),
    ],
)
def test_halves_are_computed_alike_on_any_target(tmp_path, halves_here, environment, native):
    """Asked of the host instead of the target, LLVM ends the process."""
    result = run(tmp_path, HALVES, **environment)
    assert result.returncode == 0, result.stderr[-300:]
    assert result.stdout.split()[:2] == halves_here[:2]
    if native is not None:
        assert result.stdout.split()[2] == str(native)


@pytest.mark.full
@compiled_only
@pytest.mark.parametrize("used", ["", "whole(1.0);"])
def test_a_part_of_kernels_is_not_called_from_python(forked, tmp_path, used):
    """It has no way in from there; numba would call address 0."""
    code = f"""
from numclip.host.runtime.jit import inline, kernel
@inline
def part(x):
    return 2.0 * x
@kernel
def whole(x):
    return part(x)
{used}
try:
    part(1.0)
except TypeError as error:
    print(error, whole(1.0))
"""
    result = forked(tmp_path, code)
    assert result.stdout == "part is a part of kernels: only they can call it 2.0\n"


@pytest.mark.full
@compiled_only
def test_a_part_is_compiled_once_for_all_numbers_that_kernels_write_out(forked, tmp_path):
    code = """
from numclip.host.runtime.jit import inline, kernel
@inline
def part(x, power, whole):
    return x**power if whole else 0.0
@kernel
def sums(x, power):
    return part(x, 2, True) + part(x, 3, False) + part(x, power, True) + part(x, power, whole=True)
print(sums(3.0, 1), [str(kind) for kinds in part.overloads for kind in kinds])
"""
    assert forked(tmp_path, code).stdout == "15.0 ['float64', 'int64', 'bool']\n"


@pytest.mark.full
@compiled_only
def test_a_kernel_that_kernels_call_is_a_part_of_them(forked, tmp_path):
    code = """
from numclip.host.runtime.jit import kernel
@kernel
def half(x):
    return 0.5 * x
@kernel
def whole(x):
    return half(x) + half(x)
print(whole(3.0), len(half.overloads))
print(half(3.0), len(half.overloads))
"""
    assert forked(tmp_path, code).stdout == "3.0 0\n1.5 1\n"


@pytest.mark.full
def test_import_compiles_nothing_and_loads_no_cuda(tmp_path):
    code = (
        "import sys, threading, numclip;"
        "from numclip.host.kernels import cpu;"
        "print(sum(len(k.signatures) for k in vars(cpu).values() if hasattr(k, 'signatures')),"
        "any(name.startswith(('numba_cuda', 'cuda.', 'numclip.cuda'))"
        "for name in sys.modules),"
        "'ml_dtypes' in sys.modules, threading.active_count())"
    )
    result = run(tmp_path, code)
    assert result.stdout == "0 False False 1\n", result.stderr


@compiled_only
@pytest.mark.parametrize(
    "storage",
    [
        np.float32,
        *(pytest.param(t, marks=pytest.mark.full) for t in (np.float64, np.uint16, np.int16)),
    ],
)
def test_streaming_kernels_vectorise(storage):
    like = np.ones(64, storage)
    chunks = np.array([[like.ctypes.data, like.ctypes.data, like.size, 0]])
    factor = np.ones(1, np.float64 if storage is np.float64 else np.float32)
    width = r"<\d+ x (float|double)>"
    for kernel, operation, arguments in (
        (cpu.sum_squares, "fmul|fma|fmuladd", (like[:0], np.empty(1))),
        (cpu.scale, "fmul", (factor, like[:0])),
    ):
        options = {k: v for k, v in kernel.targetoptions.items() if k != "nopython"}
        fresh = njit(**options)(kernel.py_func)  # that from files cannot be inspected
        fresh(0, 1, chunks, *arguments)
        (code,) = fresh.inspect_llvm().values()
        assert re.search(rf"({operation})[^\n]*{width}", code), kernel


def test_halves_convert_exactly():
    halves = np.arange(65_536, dtype=np.uint16)
    as_bfloat = (halves.astype(np.uint32) << 16).view(np.float32)
    for storage, wanted in (
        (halves, halves.view(np.float16)),
        (halves.view(np.int16), as_bfloat),
    ):
        addresses = storage.ctypes.data + 2 * np.arange(storage.size)
        ones = np.ones_like(addresses)
        chunks = np.stack([addresses, addresses, ones, ones], axis=1)
        squares = np.empty(storage.size)
        cpu.sum_squares(0, storage.size, chunks, storage[:0], squares)
        with np.errstate(invalid="ignore"):  # signalling NaN
            exact = wanted.astype(np.float64) ** 2
        np.testing.assert_array_equal(squares, exact)


@compiled_only
@pytest.mark.parametrize("native", [True, False])
def test_halves_round_alike_with_and_without_hardware(monkeypatch, native):
    if native and not elements.converts_halves(cpu_target.target_context.codegen()):
        pytest.skip("this processor does not convert float16")
    monkeypatch.setattr(elements, "converts_halves", lambda _: native)

    narrow = elements.narrow

    @njit
    def convert(x, out):
        for i in range(x.size):
            out[i] = narrow(x[i], out[i])

    rng = np.random.default_rng(5)
    values = rng.integers(0, 2**32, 200_000, np.uint32).view(np.float32)
    edges = np.array([0.0, 65_504, 65_519.99, 65_520, np.inf, np.nan, 2**-14, 2**-24], np.float32)
    near_zero = np.float32(2.0**-14) * rng.random(2000, np.float32)
    values = np.concatenate([values, edges, -edges, near_zero])
    bits = np.empty(values.size, np.uint16)
    convert(values, bits)
    with np.errstate(over="ignore", invalid="ignore"):
        rounded = values.astype(np.float16)
    small = np.abs(values) < 2.0**-14
    rounded[small] = np.trunc(values[small] * 2.0**24) * 2.0**-24
    np.testing.assert_array_equal(bits.view(np.float16), rounded)

    nearest = elements.nearest

    @njit
    def round_all(x, out):
        for i in range(x.size):
            out[i] = nearest(x[i], out[i])

    for storage, name in ((np.uint16, "float16"), (np.int16, "bfloat16")):
        dtype = reference.DTYPES[name]
        own = np.arange(0x7C00, dtype=np.uint16).view(dtype).astype(np.float64)
        own = own[np.isfinite(own)]
        midway = (own[1:] + own[:-1]) / 2  # float32 has no numbers between these and their like
        wide = np.concatenate([midway * (1.0 + sign * 2.0**-40) for sign in (-1, 0, 1)])
        others = [1e300, 1e-300, 5e-324, 0.0, np.inf, 1.01 * own[-1]]
        wide = np.concatenate([wide, values[np.isfinite(values)], others])
        wide = np.concatenate([wide, -wide, [np.nan]])
        out = np.empty(wide.size, storage)
        round_all(wide, out)
        assert_same_bits(out.view(dtype)[:-1], reference.nearest(wide[:-1], dtype))
        assert np.isnan(out.view(dtype)[-1])

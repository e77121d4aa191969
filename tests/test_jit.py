"""Compilation: the cache survives what happens to files, kernels vectorise, imports point down."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import numclip
from numclip.kernels import cpu, elements, jit
from numclip.kernels.jit import INTERPRETED

PACKAGE = Path(numclip.__file__).parent
CLIP = (
    "import numpy as np, numclip as nc;"
    "print(nc.clip_by_global_norm([np.array([3.0, 4.0])], 1e9)[1])"
)

compiled_only = pytest.mark.skipif(INTERPRETED, reason="kernels are not compiled in this run")


def run(cache, code=CLIP, **environment):
    variables = {**os.environ, "NUMBA_CACHE_DIR": str(cache), **environment}
    command = [sys.executable, "-W", "error", "-c", code]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


@compiled_only
def test_broken_cache_files_are_replaced(tmp_path):
    assert run(tmp_path).stdout == "5.0\n"
    files = sorted(tmp_path.rglob("*.nb?"))
    assert {path.suffix for path in files} == {".nbi", ".nbc"}
    for number, path in enumerate(files):
        path.write_bytes(path.read_bytes()[: 40 * (number % 3)])
    broken = {path: path.read_bytes() for path in files}
    again = run(tmp_path)
    assert (again.stdout, again.stderr) == ("5.0\n", "")
    assert all(path.read_bytes() != content for path, content in broken.items())


@compiled_only
def test_no_directory_for_the_cache(tmp_path):
    blocked = tmp_path / "a file"
    blocked.write_text("")
    code = (
        "import numba.core.caching as c;"
        "c.CacheImpl._locator_classes = [c.UserProvidedCacheLocator];" + CLIP
    )
    result = run(blocked, code)
    assert (result.stdout, result.stderr) == ("5.0\n", "")


@compiled_only
def test_code_is_stale_when_any_kernel_source_changes(tmp_path):
    assert run(tmp_path).stdout == "5.0\n"
    written = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")}
    assert run(tmp_path).stdout == "5.0\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} == written
    stamped = (
        "import hashlib; real = hashlib.sha256;"
        "hashlib.sha256 = lambda data=b'': real(data + b'edited');" + CLIP
    )
    assert run(tmp_path, stamped).stdout == "5.0\n"
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.nbc")} != written


def test_import_compiles_nothing_and_loads_no_cuda(tmp_path):
    code = (
        "import sys, threading, numclip;"
        "from numclip.kernels import cpu;"
        "print(sum(len(k.signatures) for k in vars(cpu).values() if hasattr(k, 'signatures')),"
        "any(name.startswith(('numba_cuda', 'cuda.', 'numclip.cuda', 'numclip.kernels.cuda'))"
        "for name in sys.modules),"
        "'ml_dtypes' in sys.modules, threading.active_count())"
    )
    result = run(tmp_path, code)
    assert result.stdout == "0 False False 1\n", result.stderr


@compiled_only
@pytest.mark.parametrize("storage", [np.float32, np.float64, np.uint16, np.int16])
def test_streaming_kernels_vectorise(storage):
    like = np.ones(64, storage)
    chunks = np.array([[like.ctypes.data, like.ctypes.data, like.size, 0]])
    factor = np.ones(1, np.float64 if storage is np.float64 else np.float32)
    width = r"<\d+ x (float|double)>"
    for kernel, operation, arguments in (
        (cpu.sum_squares, "fmul|fma|fmuladd", (like[:0], np.empty(1))),
        (cpu.scale, "fmul", (factor, like[:0])),
    ):
        fresh = jit.inline(kernel.py_func)  # code from the cache cannot be inspected
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
    if native and not elements.NATIVE_HALVES:
        pytest.skip("this processor does not convert float16")
    monkeypatch.setattr(elements, "NATIVE_HALVES", native)
    from numba import njit

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


LAYERS = [
    {
        "kernels.tuning",
        "kernels.formulas",
        "kernels.jit",
        "kernels.missing",
        "compiled.types_taken",
    },
    {"dtypes", "kernels.elements", "kernels.threads", "kernels.cuda.device", "kernels.cuda.tables"},
    {"foreign", "layout", "state", "plotting", "report", "kernels.cpu", "kernels.updates"},
    {"kernels.cuda.packets", "kernels.cuda.scalars", "placement"},
    {
        "kernels.joint",
        "kernels.columns",
        "kernels.grouping",
        "kernels.cuda.blocks",
        "cuda.values",
        "cuda.dlpack",
        "cuda.plans",
        "cuda.tensors",
    },
    {
        "cuda.protocols",
        "kernels.cuda.norms",
        "kernels.cuda.rows",
        "kernels.cuda.verdict",
        "kernels.cuda.scaling",
    },
    {
        "kernels.backend",
        "kernels.arrays",
        "kernels.spans",
        "kernels.cuda.updates",
        "kernels.cuda.chunks",
    },
    {"compiled.arrays", "compiled.calls", "kernels.cuda.tiles", "kernels.cuda.units"},
    {"compiled.checks", "compiled.containers", "kernels.cuda.tile_scaling"},
    {"compiled.values", "kernels.cuda.tiling"},
    {"slices", "plain", "kernels.cuda.grouping"},
    {"inputs", "kernels.cuda.plan"},
    {"nonfinite", "outputs", "measuring", "rules", "history"},
    {"cuda.entries", "kernels.cuda.update_plan", "kernels.cuda.unit_plan"},
    {"clipping", "compiled.policies", "group", "running_rules", "cuda.streams"},
    {"compiled.whole", "cuda.copies"},
    {"cuda.arrays"},
    {"cuda.outputs"},
    {"cuda.slices"},
    {"units", "step", "cuda.clipping", "cuda.group"},
    {"functional", "general_step", "joint_step", "cuda.report", "cuda.sparse_group", "cuda.units"},
    {"updating", "compiled.registration", "cuda.clipper"},
    {"groups", "cuda.clippers", "cuda.updating"},
    {"optim"},
    {"diagnostics", "cuda.groups"},
]


def test_imports_point_down():
    level = {name: rank for rank, names in enumerate(LAYERS) for name in names}
    seen = set()
    for path in PACKAGE.rglob("*.py"):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        if module.endswith("__init__") or module.startswith("examples"):
            continue
        seen.add(module)
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("numclip"):
                origin = node.module.removeprefix("numclip").removeprefix(".")
                names = [f"{origin}.{alias.name}".strip(".") for alias in node.names]
                for target in [origin, *names]:
                    assert level.get(target, -1) < level[module], f"{module} imports {target}"
    assert seen == set(level)

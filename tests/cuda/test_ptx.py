"""The code of every GPU kernel, compiled without a GPU for two compute capabilities."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cuda.ptx_names import kernel_names

PARTS = {"numba_cuda": "numba-cuda", "nvidia": "NVVM, of nvidia-cuda-nvcc-cu12 or nvidia-nvvm"}


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


MISSING = [name for module, name in PARTS.items() if not is_there(module)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
VECTORS = {"float16": "v4.u32", "bfloat16": "v4.u32", "float32": "v4.f32", "float64": "v2.f64"}
ROOT = Path(__file__).parents[2]

# Kernels that stream over elements in words of 16 bytes, and whether they also write them.
STREAMING = {
    "sum_squares": False,
    "max_magnitude": False,
    "sum_tile_squares": False,
    "max_tile_magnitude": False,
    "scale_tiles": True,
    "copy_chunks": True,
    "add_chunks": True,
    "scale": True,
    "clamp": True,
    "add": True,
    "descend": True,
    "adam": True,
}


def compiled(capability: str) -> tuple[Path, dict[str, str]]:
    environment = {**os.environ, "NUMBA_FORCE_CUDA_CC": capability, "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, "-m", "tests.cuda.ptx"]
    result = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    return Path(found["nvvm"]), found["kernels"]


def ptxas_beside(nvvm: Path) -> Path | None:
    """What assembles the code of this NVVM: that of an older CUDA does not know its version."""
    places = (parent / "bin" / "ptxas" for parent in nvvm.parents)
    return next((place for place in places if place.is_file()), None)


@pytest.mark.parametrize("capability", ["8.0", "9.0"])
def test_code(capability, tmp_path):
    """One test for all: compiling takes ten seconds."""
    nvvm, kernels = compiled(capability)
    target = f"sm_{capability.replace('.', '')}"
    assert {name.split()[0] for name in kernels} == kernel_names()
    for name, code in kernels.items():
        assert f".target {target}" in code, name
        assert ".local" not in code, name
        assert not re.search(r"\b(div|rem)\.[su]64", code), name
    for dtype in VECTORS:
        for kernel, writes in STREAMING.items():
            assert_words(kernels[f"{kernel} {dtype}"], dtype, writes=writes)
        assert f"ld.global.{VECTORS[dtype]}" in kernels[f"sum_powers {dtype}"]  # `pow` is not exact
        for kernel in ("sum_squares", "max_magnitude", "scale", "copy_chunks"):
            assert_loads_in_flight(kernels[f"{kernel} {dtype}"], dtype)
        for kernel in ("sum_tile_squares", "scale_tiles"):
            assert_elements_in_flight(kernels[f"{kernel} {dtype}"], dtype)
    # The errors of a sum would vanish if its subtractions were simplified.
    assert len(re.findall(r"sub\.f64|neg\.f64", kernels["sum_squares float32"])) >= 4
    # Whoever counts the last block also makes sure that the others' sums are seen.
    steps = re.findall(r"atom\.global\.inc|membar\.gl|bar\.sync", kernels["decide_pools"])
    after = [step for before, step in itertools.pairwise(steps) if before.startswith("atom")]
    assert after == ["membar.gl", "membar.gl"]
    ptxas = ptxas_beside(nvvm)
    for name, code in kernels.items() if ptxas else []:
        assert_nothing_spilled(name, code, target, tmp_path, ptxas)


def assert_words(code, dtype, *, writes):
    """Elements are moved 16 bytes at a time, and no arithmetic is approximate."""
    assert not re.search(r"\.(approx|ftz)", code)
    assert f"ld.global.{VECTORS[dtype]}" in code
    assert (f"st.global.{VECTORS[dtype]}" in code) == writes


def assert_loads_in_flight(code, dtype):
    """The turn of the loop that reads most begins with all its loads."""
    words = 2 * 8 // {"float32": 4, "float64": 2}.get(dtype, 8)
    loads = re.findall(rf"ld\.global\.{VECTORS[dtype]}|bra", code)
    runs = "".join("l" if found.startswith("ld") else " " for found in loads).split()
    assert max(map(len, runs)) >= words


def assert_elements_in_flight(code, dtype):
    """Eight elements are read with no branch and no store between, which ptxas starts at once."""
    assert not re.search(r"\.(approx|ftz)", code)
    kind = {"float32": "f32", "float64": "f64"}.get(dtype, "[bu]16")
    moves = re.findall(rf"ld\.global\.{kind}|st\.global|bra", code)
    runs = "".join("l" if found.startswith("ld") else " " for found in moves).split()
    assert max(map(len, runs)) >= 8


def assert_nothing_spilled(name, code, target, folder, ptxas):
    """The machine code keeps everything in registers, few enough for 768 threads or more."""
    source = folder / "kernel.ptx"
    source.write_text(code)
    command = [ptxas, "-v", f"-arch={target}", source, "-o", folder / "kernel.cubin"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert set(re.findall(r"(\d+) bytes (?:stack frame|spill)", result.stderr)) == {"0"}, name
    registers = max(map(int, re.findall(r"Used (\d+) registers", result.stderr)))
    assert registers <= (128 if "float64" in name else 80), name

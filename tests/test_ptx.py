"""The code of every GPU kernel, compiled without a GPU for two compute capabilities."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from ptx_names import kernel_names

PARTS = {"numba_cuda": "numba-cuda", "nvidia.cuda_nvcc": "nvidia-cuda-nvcc-cu12 (NVVM)"}


def is_there(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:
        return False


MISSING = [name for module, name in PARTS.items() if not is_there(module)]
pytestmark = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
capabilities = pytest.mark.parametrize("capability", ["8.0", "9.0"])
VECTORS = {"float16": "v4.u32", "bfloat16": "v4.u32", "float32": "v4.f32", "float64": "v2.f64"}
# Kernels that stream over elements in words of 16 bytes, and whether they also write them.
STREAMING = {
    "sum_squares": False,
    "scale": True,
    "clamp": True,
    "add": True,
    "descend": True,
    "descend_with_momentum": True,
    "adam": True,
}


@functools.cache
def kernels(capability: str) -> dict[str, str]:
    environment = {k: v for k, v in os.environ.items() if k != "NUMBA_ENABLE_CUDASIM"}
    environment |= {"NUMBA_FORCE_CUDA_CC": capability, "NUMBA_DISABLE_JIT": "0"}
    command = [sys.executable, str(Path(__file__).with_name("ptx.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@capabilities
def test_every_kernel_is_compiled(capability):
    assert {key.split()[0] for key in kernels(capability)} == kernel_names()
    target = f".target sm_{capability.replace('.', '')}"
    assert all(target in code for code in kernels(capability).values())


@capabilities
def test_no_kernel_uses_local_memory_or_divides_64_bit_integers(capability):
    for name, code in kernels(capability).items():
        assert ".local" not in code, name
        assert not re.search(r"\b(div|rem)\.[su]64", code), name


@capabilities
@pytest.mark.parametrize("dtype", VECTORS)
@pytest.mark.parametrize("kernel", STREAMING)
def test_streaming_kernels_move_16_bytes_at_a_time(capability, kernel, dtype):
    code = kernels(capability)[f"{kernel} {dtype}"]
    assert f"ld.global.{VECTORS[dtype]}" in code
    assert (f"st.global.{VECTORS[dtype]}" in code) == STREAMING[kernel]


@capabilities
@pytest.mark.parametrize("dtype", VECTORS)
@pytest.mark.parametrize("kernel", ["sum_squares", "scale"])
def test_several_loads_are_in_flight(capability, kernel, dtype):
    """The turn of the loop that reads most begins with all its loads."""
    code = kernels(capability)[f"{kernel} {dtype}"]
    words = 2 * 8 // {"float32": 4, "float64": 2}.get(dtype, 8)
    loads = re.findall(rf"ld\.global\.{VECTORS[dtype]}|bra", code)
    runs = "".join("l" if found.startswith("ld") else " " for found in loads).split()
    assert max(map(len, runs)) >= words


@capabilities
def test_machine_code_spills_nothing(capability, tmp_path):
    spec = importlib.util.find_spec("nvidia.cuda_nvcc")
    assert spec is not None
    assert spec.submodule_search_locations
    (ptxas,) = Path(spec.submodule_search_locations[0]).glob("bin/ptxas*")
    source = tmp_path / "kernel.ptx"
    for name, code in kernels(capability).items():
        source.write_text(code)
        architecture = f"-arch=sm_{capability.replace('.', '')}"
        command = [ptxas, "-v", architecture, source, "-o", tmp_path / "kernel.cubin"]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        sizes = re.findall(r"(\d+) bytes (?:stack frame|spill)", result.stderr)
        assert sizes, name
        assert set(sizes) == {"0"}, name
        registers = max(map(int, re.findall(r"Used (\d+) registers", result.stderr)))
        assert registers <= (128 if "float64" in name else 72), name


@capabilities
def test_sums_are_not_reassociated(capability):
    """The errors of a sum would vanish if its subtractions were simplified."""
    code = kernels(capability)["sum_squares float32"]
    assert len(re.findall(r"sub\.f64|neg\.f64", code)) >= 4
    assert ".approx" not in code
    assert ".ftz" not in code

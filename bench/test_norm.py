"""The norm against NumPy's ways, and each streaming kernel's rate; all by one thread."""

import numpy as np
import pytest

import numclip as nc

pytestmark = pytest.mark.usefixtures("one_thread")
NORMS = {
    "numclip": lambda x: nc.global_norm([x]),
    "vdot": lambda x: np.sqrt(np.vdot(x, x)),
    "linalg": np.linalg.norm,
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("method", NORMS)
def test_norm_of_16_megabytes(benchmark, normal, timed, method, dtype):
    benchmark.group = f"norm of 16 MB of {dtype}, one thread"
    x = normal(16 << 20, dtype)
    exact = np.linalg.norm(x.astype(np.longdouble))
    error = float(abs(NORMS[method](x) / exact - 1))
    timed(lambda: NORMS[method](x), x.nbytes, relative_error=error)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("operation", ["norm", "scale", "scale into", "clamp", "ord 3"])
def test_kernels_in_cache(benchmark, normal, timed, operation, dtype):
    benchmark.group = f"256 KB of {dtype} in cache, one thread"
    x = normal(256 << 10, dtype)
    out = np.empty_like(x)
    # numclip applies even a factor so near 1 that it changes nothing.
    bound = 1e30
    calls = {
        "norm": lambda: nc.global_norm([x]),
        "scale": lambda: nc.clip_by_global_norm([x], bound, bound * (1 + 1e-15), out=[x]),
        "scale into": lambda: nc.clip_by_global_norm([x], bound, bound * (1 + 1e-15), out=[out]),
        "clamp": lambda: nc.clip_by_value(x, -1.0, 1.0, out=out),
        "ord 3": lambda: nc.global_norm([x], 3),
    }
    timed(calls[operation], x.nbytes)

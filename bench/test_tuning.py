"""The measurements behind numclip/host/kernels/tuning.py."""

import numpy as np
import pytest
from numba import njit

from numclip.host import rows
from numclip.host.kernels import columns, cpu, grouping, tuning
from numclip.host.runtime import jit, threads

VALUES = {
    "BLOCK": [32, 64, 128, 256, 512],
    "CHUNK": [4096, 16_384, 65_536],
    "COLUMNS": [128, 520, 1024, 1032, 8200],
    "COLUMN_ROWS": [248, 1016, 1024, 4072],
    "EXAMPLE_COLUMNS": [1024, 4096, 8192, 16_384],
    "PARALLEL_BYTES": [1 << 20, 2 << 20, 4 << 20, 8 << 20, 16 << 20],
    "STRIP": [248, 504, 512],
    "AHEAD": [0, 1024, 2048, 4096, 8192],
}


def pytest_generate_tests(metafunc):
    """Try each value of a constant; the smoke run only the current one, with cached kernels."""
    name = metafunc.function.__name__.removeprefix("test_").upper()
    if name in VALUES:
        smoke = metafunc.config.getoption("benchmark_disable")
        metafunc.parametrize("value", [getattr(tuning, name)] if smoke else VALUES[name])


def chunks_of(x, length):
    spans = np.array([[x.ctypes.data, x.ctypes.data, x.size]])
    chunks = np.empty((cpu.count_chunks(spans, length)[0], 4), np.int64)
    cpu.split(spans, x.itemsize, length, chunks)
    return chunks


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_block(benchmark, monkeypatch, normal, timed, dtype, value):
    benchmark.group = f"BLOCK: sum of squares, 256 KB of {dtype}"
    monkeypatch.setattr(cpu, "BLOCK" if dtype == "float64" else "NARROW_BLOCK", value)
    monkeypatch.setattr(cpu, "array_of_squares", jit.expanded(cpu.array_of_squares.py_func))
    kernel = jit.kernel(cpu.sum_squares.py_func)
    x = normal(256 << 10, dtype)
    chunks = chunks_of(x, tuning.CHUNK)
    out = np.empty(len(chunks))
    timed(lambda: kernel(0, out.size, chunks, x[:0], out), x.nbytes)


@pytest.mark.parametrize("nbytes", [256 << 10, 64 << 20])
def test_chunk(benchmark, normal, timed, nbytes, value):
    benchmark.group = f"CHUNK: sum of squares, {nbytes >> 10} KB of float32"
    x = normal(nbytes, "float32")
    chunks = chunks_of(x, value)
    out = np.empty(len(chunks))
    timed(lambda: threads.run(cpu.sum_squares, out.size, x.nbytes, chunks, x[:0], out), x.nbytes)


def sums_of_columns(monkeypatch, columns_of_share=columns.COLUMNS):
    """Return the kernel `column_squares`, compiled with another value of `COLUMNS`."""
    monkeypatch.setattr(columns, "COLUMNS", columns_of_share)
    for name in ("add_squares", "add_eight_squares", "sum_squares"):
        monkeypatch.setattr(columns, name, jit.inline(getattr(columns, name).py_func))
    return jit.kernel(columns.column_squares.py_func)


def test_columns(benchmark, monkeypatch, normal, timed, value):
    benchmark.group = "COLUMNS: sums over the first axis of 64 MB of float32, 8192 columns"
    kernel = sums_of_columns(monkeypatch, value)
    x = normal(64 << 20, "float32").reshape(1, -1, 8192 if not benchmark.disabled else 64)
    parts = -(-x.shape[1] // tuning.COLUMN_ROWS)
    out = np.empty((1, parts, x.shape[2]))
    count = parts * -(-x.shape[2] // value)
    timed(lambda: threads.run(kernel, count, x.nbytes, x, tuning.COLUMN_ROWS, out), x.nbytes)


def test_column_rows(benchmark, normal, timed, value):
    benchmark.group = "COLUMN_ROWS: sums over the first axis of 64 MB of float32, 64 columns"
    x = normal(64 << 20, "float32").reshape(1, -1, 64)
    out = np.empty((1, -(-x.shape[1] // value), 64))
    timed(
        lambda: threads.run(columns.column_squares, out.shape[1], x.nbytes, x, value, out), x.nbytes
    )


def test_example_columns(benchmark, normal, timed, value):
    benchmark.group = "EXAMPLE_COLUMNS: sums over 64 examples, 64 MB of float32"
    x = normal(64 << 20, "float32").reshape(64, -1)
    out = np.empty(x.shape[1], x.dtype)
    arguments = x, np.ones(64), value, out
    count = -(-out.size // value)
    timed(lambda: threads.run(columns.sum_examples, count, x.nbytes, *arguments), x.nbytes)


@pytest.mark.parametrize("count", [1, 2])
def test_parallel_bytes(benchmark, monkeypatch, normal, timed, value, count):
    benchmark.group = f"PARALLEL_BYTES: sum of squares, {value >> 10} KB of float32"
    monkeypatch.setattr(threads, "PARALLEL_BYTES", 0)
    monkeypatch.setattr(threads, "_limit", count)
    x = normal(value, "float32")
    chunks = chunks_of(x, tuning.CHUNK)
    out = np.empty(len(chunks))
    timed(lambda: threads.run(cpu.sum_squares, out.size, x.nbytes, chunks, x[:0], out), x.nbytes)


def sums_of_groups(monkeypatch, name, value):
    """Return the kernel `grouped_squares`, compiled with a constant of this name and value."""
    monkeypatch.setattr(grouping, name, value)
    sums = "add_strip", "add_eight", "add_four_exactly", "row_or_zeros", "four_rows", "sum_strips"
    for function in ("fetch", *sums, "strip_squares"):
        monkeypatch.setattr(grouping, function, jit.inline(getattr(grouping, function).py_func))
    return jit.kernel(grouping.grouped_squares.py_func)


def test_strip(benchmark, monkeypatch, normal, timed, value):
    benchmark.group = "STRIP: summed rows of 64 float32, 1 MB"
    kernel = sums_of_groups(monkeypatch, "STRIP", value)
    x = normal(1 << 20, "float32").reshape(-1, 64)
    starts = np.append(np.arange(0, len(x), 16), len(x))
    out = np.empty((1, 2))
    timed(lambda: kernel(0, 1, len(x), np.arange(len(x)), starts, x, False, out), x.nbytes)


def test_ahead(benchmark, monkeypatch, normal, timed, value):
    benchmark.group = "AHEAD: summed rows of 64 float32, 16 MB, Zipf(1.3)"
    kernel = sums_of_groups(monkeypatch, "AHEAD", value)
    x = normal(16 << 20, "float32").reshape(-1, 64)
    order, starts = rows.group(np.random.default_rng(3).zipf(1.3, len(x)) % 1_000_000)
    out = np.empty((1, 2))
    timed(lambda: kernel(0, 1, len(x), order, starts, x, False, out), x.nbytes)


@njit
def by_radix(indices, digits):
    """Return the stable order that sorts indices below ``2 ** (11 * digits)``."""
    order = np.arange(indices.size)
    other = np.empty_like(order)
    for digit in range(digits):
        starts = np.zeros(2049, np.int64)
        for k in range(indices.size):
            starts[(indices[k] >> 11 * digit & 2047) + 1] += 1
        for bucket in range(2048):
            starts[bucket + 1] += starts[bucket]
        for k in order:
            bucket = indices[k] >> 11 * digit & 2047
            other[starts[bucket]] = k
            starts[bucket] += 1
        order, other = other, order
    return order


@pytest.mark.parametrize("way", ["hash", "radix", "argsort"])
def test_grouping(benchmark, timed, way):
    benchmark.group = "grouping 65,536 indices, Zipf(1.3), into 1,000,000 rows"
    indices = np.random.default_rng(3).zipf(1.3, 65_536) % 1_000_000
    ways = {
        "hash": lambda: rows.group(indices)[0],
        "radix": lambda: by_radix(indices, 2),
        "argsort": lambda: np.argsort(indices, kind="stable"),
    }
    together = indices[ways[way]()]
    assert np.count_nonzero(np.diff(together)) == np.unique(indices).size - 1
    timed(ways[way], indices.nbytes)

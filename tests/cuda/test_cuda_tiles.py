"""Memory of any steps on the GPU: that tiles cover it, and norms and results as on the CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip import tables
from numclip.cuda import strided
from numclip.cuda.strided import Memory, Strided
from numclip.dtypes import lookup
from tests.cuda.devices import HARDWARE, fetch, ready, send
from tests.oracle import reference
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES

__all__ = ["ready"]
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore::RuntimeWarning")]


@st.composite
def views(draw: st.DrawFn) -> np.ndarray:
    """A view of some memory: axes in any order, steps of either sign, over gaps or of 0."""
    shape = draw(st.lists(st.integers(0, 5) | st.integers(1, 40), max_size=3))
    shape += draw(st.lists(st.integers(1, 3), max_size=2))
    steps, start, unit = [0] * len(shape), 0, 4
    for k in draw(st.permutations(range(len(shape)))):
        gap = draw(st.sampled_from([1, 1, 1, 2, 3, -1, -3, 0]))
        steps[k] = gap * unit
        start -= min(steps[k] * (shape[k] - 1), 0)
        unit *= max(abs(gap) * shape[k], 1)
    memory = np.empty(start + unit, np.uint8)
    return np.ndarray(shape, "f4", memory, start, steps)


def described(view: np.ndarray, axes: Any) -> Strided:
    dtype = lookup(view.dtype)
    assert dtype is not None
    memory = Memory(view.ctypes.data, view.strides)
    return Strided(dtype, view.shape, memory, memory, axes)


def elements(table: np.ndarray) -> list[tuple[int, int, int]]:
    """The number of the unit, the partial sum and the address of every element of some tiles."""
    found = []
    for tile in table.tolist():
        for n, i in itertools.product(range(tile[tables.COUNT]), range(tile[tables.LENGTH])):
            address = tile[tables.SOURCE] + n * tile[tables.UNIT_STEP] + i * tile[tables.STEP]
            number = tile[tables.NUMBER] + n * tile[tables.NUMBER_STEP]
            found.append((number, tile[tables.PART] + n * tile[tables.NUMBER_STEP], address))
    return found


@given(views(), st.data())
def test_tiles_cover_every_element_once(view, data):
    axes = data.draw(st.none() | st.sets(st.integers(0, max(view.ndim - 1, 0))).map(sorted))
    axes = None if axes is None or view.ndim == 0 else tuple(axes)
    array = described(view, axes)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(strided, "LEAST_BYTES", data.draw(st.sampled_from([16, 64, 4096])))
        patched.setattr(strided.device, "THREADS", data.draw(st.sampled_from([4, 256])))
        table, sums = strided.cut(array, [array.read])
    wanted = []
    for index in np.ndindex(view.shape):
        number = 0
        for axis in array.kept:
            number = number * view.shape[axis] + index[axis]
        address = sum(i * step for i, step in zip(index, view.strides, strict=True))
        wanted.append((number, view.ctypes.data + address))
    found = elements(table)
    assert sorted((number, address) for number, _, address in found) == sorted(wanted)
    assert all(part % array.units == number for number, part, _ in found)
    assert {part for _, part, _ in found} == (set(range(sums * array.units)) if wanted else set())


@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((5_000_000, 2), (1,)),
        ((5_000_000, 2), (0,)),
        ((2, 5_000_000), (1,)),
        ((1_000_000, 2, 8), (1,)),
        ((1_000_000, 2, 8), (0, 2)),
        ((8, 2, 1_000_000), (1,)),
        ((1_000_000, 3, 3), None),
    ],
)
def test_tiles_are_not_many_where_axes_are_short(shape, axes):
    """There would be more bytes of tiles than of elements."""
    array = described(np.empty(shape, "f")[..., ::-1], axes)
    table, sums = strided.cut(array, [array.read])
    assert len(table) < 3 * strided.TILES
    assert sums * array.units < 3 * max(strided.TILES, array.units)


VIEWS = {
    "columns": lambda x: x[:, 2:7],
    "planes": lambda x: x.reshape(3, 7, 22)[:, ::2, ::-1],
    "permuted": lambda x: x.reshape(3, 7, 22).transpose(1, 0, 2),
    "repeated": lambda x: np.broadcast_to(x[:, :1], x.shape),
    "line": lambda x: x.reshape(-1)[::5],
    "bottom": lambda x: x[::-1],
    "blocks": lambda x: x.reshape(-1)[:448].reshape(14, 32)[:, :16],  # lines of packets
}


def numbers(array: np.ndarray) -> np.ndarray:
    """All real numbers of an array in C order, in the array's own precision."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return flat.view(reference.real_dtype(flat.dtype))


# Two dtypes for each view on the stand-in: each of them is seen twice.
PAIRS = [(view, dtype) for view in VIEWS for dtype in DTYPES]
ROWS = range(len(VIEWS))
SEEN = PAIRS if HARDWARE else [PAIRS[6 * k + (k + 3 * j) % 6] for k in ROWS for j in range(2)]


@pytest.mark.parametrize(("view", "dtype"), SEEN)
def test_views(view, dtype):
    grad = VIEWS[view](normal(np.random.default_rng(0), (21, 22), dtype))
    # The last bit of a float64 norm can depend on the steps, on either side, and so its factor.
    wanted, norm = nc.clip_by_global_norm([np.ascontiguousarray(grad)], 0.5)
    sent = send(grad)
    found, same = nc.clip_by_global_norm([sent], 0.5)
    assert float(same) == pytest.approx(norm, rel=1e-14)
    distance = reference.ulp_distance(*map(numbers, (fetch(found[0]), wanted[0]))).max()
    assert distance <= (2 if dtype == "float64" else 1)
    assert found[0]._strides in (None, sent._strides)
    if view != "repeated":
        nc.clip_by_global_norm([sent], 0.5, out=[sent])
        assert_same_bits(fetch(sent), fetch(found[0]))


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
@pytest.mark.parametrize("columns", [64, 100, 77])
def test_lines_are_read_in_packets_or_not(columns, ord):
    """What follows the packets, and lines that begin where none can, are of the same units."""
    grad = normal(np.random.default_rng(columns), (40, columns), "float32")
    wanted = nc.clip_by_norm(grad, 2.0, 1, ord=ord)
    sent = send(grad)
    found = nc.clip_by_norm(sent, 2.0, 1, ord=ord)
    assert reference.ulp_distance(fetch(found), wanted).max() <= 1
    nc.clip_by_norm(sent, 2.0, 1, ord=ord, out=sent)
    assert_same_bits(fetch(sent), fetch(found))


@pytest.mark.parametrize("dtype", reference.REAL_DTYPES)
def test_bounds_that_are_arrays(dtype):
    rng = np.random.default_rng(5)
    grad = normal(rng, (4, 3, 5), dtype, 3.0)
    grad[0, 0, :2] = math.nan, math.inf
    low, high = -np.abs(normal(rng, (3, 1), "float64")), np.abs(normal(rng, (5,), "float32"))
    for given_low, given_high in [(low, high), (send(low), 1e300), (-7, send(high))]:
        host = [fetch(b) if hasattr(b, "address") else b for b in (given_low, given_high)]
        for made in (grad, grad[::-1, :, ::-1]):
            sent = send(made)
            found = nc.clip_by_value(sent, given_low, given_high)
            assert_same_bits(fetch(found), nc.clip_by_value(made, *host))
        assert nc.clip_by_value(sent, given_low, given_high, out=sent) is sent
        assert_same_bits(fetch(sent), fetch(found))

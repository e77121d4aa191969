"""Kernels that add rows: those that share an index, and those of a matrix, column by column."""

from __future__ import annotations

import math

import numpy as np
import pytest

import numclip as nc
from numclip.host import columns as host_columns
from numclip.host.kernels import grouping, unit_loops
from numclip.host.kernels.tuning import CHUNK, COLUMN_ROWS, COLUMNS, STRIP
from numclip.host.rows import group


@pytest.mark.parametrize("row", [np.uint32, np.int64])
@pytest.mark.parametrize(("rows", "most"), [(0, 1), (1, 1), (20, 1), (20, 9), (300, 1 << 40)])
def test_equal_indices_come_together_as_they_first_appear(rows, most, row):
    indices = np.random.default_rng(rows).integers(0, most, rows)
    table = np.zeros(1 << (2 * rows).bit_length(), row)
    order, starts = np.empty(rows, np.int64), np.empty(rows + 1, np.int64)
    count = grouping.group_rows(indices, table, order, starts)
    members: dict[int, list[int]] = {}
    for k, index in enumerate(indices.tolist()):
        members.setdefault(index, []).append(k)
    groups = [order[starts[g] : starts[g + 1]].tolist() for g in range(count)]
    assert groups == list(members.values())
    for made, own in zip(group(indices), (order, starts[: count + 1]), strict=True):
        np.testing.assert_array_equal(made, own)


@pytest.mark.parametrize("big", [2.0**20, 2.0**60, 2.0**126])
@pytest.mark.parametrize("columns", [1, 9, 600])
def test_rows_that_cancel_within_those_added_together(columns, big):
    """The plain sum of rows loses the small ones where `big` exceeds 2**53."""
    for more in (0, 8, 20):  # groups of up to eight rows have a loop of their own
        column = np.array([0.5, big, 1.0, -big, 1.0] + more * [1.0], np.float32)
        values = np.repeat(column[:, None], columns, axis=1)
        slices = nc.IndexedSlices(values, np.zeros(5 + more, int), (1, columns))
        norm = (2.5 + more) * math.sqrt(columns)
        assert nc.global_norm([slices]) == pytest.approx(norm, rel=1e-15)
        np.testing.assert_array_equal(slices.coalesce().values, np.full((1, columns), 2.5 + more))


@pytest.mark.jit_only
@pytest.mark.parametrize("name", ["float16", "float32"])
def test_norms_of_sums_of_any_number_of_rows(name):
    """Rows that cancel by up to 2**10, in groups that share their blocks of eight with zeros."""
    rng = np.random.default_rng(12)
    sizes = np.arange(1, 27)
    indices = np.repeat(sizes, sizes)
    values = (rng.standard_normal((indices.size, STRIP + 9)) * 64).astype(name)
    for size in sizes[sizes > 1]:
        own = np.flatnonzero(indices == size)
        values[own[-1]] = values[own[:-1]].astype(np.float64).sum(axis=0) * (2.0**-10 - 1)
    order = rng.permutation(indices.size)
    values, indices = values[order], indices[order]
    slices = nc.IndexedSlices(values, indices, (30, STRIP + 9))
    exact = np.zeros((30, STRIP + 9))
    np.add.at(exact, indices, values.astype(np.float64))
    assert nc.global_norm([slices]) == pytest.approx(np.linalg.norm(exact), rel=2.0**-38)


def test_negative_zeros_add_up_to_zero():
    slices = nc.IndexedSlices(np.full((3, 2), -0.0), np.array([1, 0, 1]), (2, 2))
    assert not np.signbit(slices.coalesce().values).any()


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
@pytest.mark.parametrize("shape", [(1, 0, 3), (1, 7, 1), (2, 8, 5), (3, 41, 17)])
def test_column_squares(shape, name):
    x = np.random.default_rng(5).standard_normal(shape).astype(name)
    stored = x.view(np.uint16) if name == "float16" else x
    check_columns(x, host_columns.column_squares(stored))


@pytest.mark.parametrize("size", [CHUNK, CHUNK + 1, 2 * CHUNK + 70])
def test_a_long_row_has_the_norm_of_a_tensor(size):
    row = np.random.default_rng(2).standard_normal((1, size)).astype(np.float32)
    sums = np.empty(1)
    unit_loops.row_squares(0, 1, row, sums)
    assert math.sqrt(sums[0]) == nc.global_norm([row])


@pytest.mark.jit_only
def test_columns_of_several_blocks_and_parts():
    x = np.random.default_rng(6).standard_normal((1, 2 * COLUMN_ROWS + 13, COLUMNS + 3))
    once = host_columns.column_squares(x)
    check_columns(x[..., -9:], once[..., -9:])
    nc.set_num_threads(1)
    try:
        assert host_columns.column_squares(x).tobytes() == once.tobytes()
    finally:
        nc.set_num_threads(None)


def check_columns(x, sums):
    squares = x.astype(np.float64) ** 2
    for a, column in np.ndindex(sums.shape):
        exact = math.fsum(squares[a, :, column])
        assert sums[a, column] == pytest.approx(exact, rel=8 * 2.0**-53)

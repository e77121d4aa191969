"""Ranks that are processes of MPI, started here; threads stand in for them in tests/groups."""

from __future__ import annotations

import pytest

from tests.oracle import mpi

pytestmark = mpi.MARKS


def start(size, program):
    """Run a program of tests.oracle.on_ranks."""
    return mpi.start(size, "-m", "tests.oracle.on_ranks", program)


def told(size: int, program: str) -> list[str]:
    """Return what each rank found."""
    done = start(size, program)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert len(lines) == size
    return lines


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_shards_of_whole_chunks_have_the_bits_of_all_at_once(size):
    assert len(set(told(size, "whole_chunks"))) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_ranks_with_parts_train_as_one_process_with_all(size):
    assert set(told(size, "sharded")) == {"ok"}


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_with_copies_train_as_one_process(size):
    assert set(told(size, "copies")) == {"ok"}


def test_halves_of_a_communicator_are_apart():
    assert told(4, "split") == ["3", "4", "3", "4"]


def test_a_nan_on_one_rank_is_an_error_on_all():
    text = "NonFiniteGradientError: rank 1: g.w is not finite: nan at flat index 0"
    assert all(line.startswith(text) for line in told(3, "not_finite"))


def test_groups_that_differ_are_an_error_on_all():
    lines = set(told(3, "mismatched"))
    assert len(lines) == 1
    assert lines.pop().startswith("RankError: group 'g', clip: ByGlobalNorm(max_norm=1.0")


def test_what_one_rank_raises_is_an_error_on_all():
    first, second, third = told(3, "raising")
    assert second == "KeyError: 'no rate at step 0'"
    assert first == third
    assert first.startswith("RankError: rank 1 raised KeyError: 'no rate at step 0'")


@pytest.mark.parametrize("program", ["killed", "uncaught"])
def test_a_rank_that_dies_ends_the_run(program):
    done = start(3, program)
    assert done.returncode != 0
    assert "went on" not in done.stdout


def test_the_bench_tells_what_it_measures_and_what_that_makes_of_more():
    done = mpi.start(2, "-m", "bench.ranks")
    assert done.returncode == 0, done.stdout + done.stderr
    assert '"clip of all ranks": ' in done.stdout
    assert " 100000 a tree " in done.stdout

"""The rings of the tests: the first stays small, and covering sets cover."""

from __future__ import annotations

import ast
import itertools

import pytest

from tests import rings
from tests.conftest import COLLECTED, TESTS

# Some 80 s of processor time. A test beyond them belongs to --full, or replaces another.
MOST_TESTS = 3400
MOST_PROPERTIES = 60


def test_the_first_ring_is_small(request):
    first = rings.chosen(request.config.stash[COLLECTED], "first")
    assert len(first) <= MOST_TESTS
    drawn = [item for item in first if rings.is_property(item)]
    assert len(drawn) <= MOST_PROPERTIES


def test_the_first_ring_is_of_the_host(request):
    first = rings.chosen(request.config.stash[COLLECTED], "first")
    for item in first:
        assert item.get_closest_marker("gpu") is None, item.nodeid
        assert item.get_closest_marker("full") is None, item.nodeid


@pytest.mark.parametrize("sizes", [(3,), (4, 3), (2, 5, 3), (6, 9, 4, 2)])
def test_every_pair_of_values_is_in_a_covering_set(sizes):
    rows = list(itertools.product(*map(range, sizes)))
    chosen = [rows[k] for k in rings.covering(rows, 2)]
    for one, other in itertools.combinations(range(len(sizes)), 2):
        pairs = {(row[one], row[other]) for row in rows}
        assert {(row[one], row[other]) for row in chosen} == pairs
    assert len(chosen) < len(rows) / 4 or len(rows) < 100
    for axis in range(len(sizes)):
        assert {row[axis] for row in chosen} == set(range(sizes[axis]))


def test_every_value_is_in_a_covering_set_of_single_values():
    rows = list(itertools.product(range(5), range(3)))
    assert len(rings.covering(rows, 1)) == 5
    assert {rows[k][0] for k in rings.covering(rows, 1)} == set(range(5))


def test_pairs_that_no_row_has_are_not_missed():
    rows = [(0, 0), (1, 1), (1, 2)]
    assert rings.covering(rows, 2) == [0, 1, 2]
    assert rings.covering([], 2) == []


def test_no_suite_reaches_into_another():
    for path in sorted(TESTS.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, IMPORTS) else []
            module = getattr(node, "module", None) or ""
            for name in names:
                last = [*module.split("."), *name.split(".")]
                assert not any(part.startswith("test_") for part in last), f"{path}: {last}"


IMPORTS = ast.Import | ast.ImportFrom

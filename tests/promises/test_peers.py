"""What other libraries get wrong: a test for each row of the README's table."""

import re
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference

ROOT = Path(__file__).parents[2]


def clip_one(values, clip_norm, dtype):
    grad = np.asarray(values, dtype)
    (result,), norm = nc.clip_by_global_norm([grad], clip_norm)
    return grad, result, norm


def assert_clipped_to(result, clip_norm, units):
    square = reference.square_sum([result])
    bound = Fraction(clip_norm)
    assert (bound * (1 - units)) ** 2 <= square <= bound**2


def test_overflow():
    _, result, norm = clip_one([1e20] * 4, 1.0, np.float32)
    assert norm == pytest.approx(2e20, rel=1e-7)
    assert_clipped_to(result, 1.0, Fraction(4, 2**24))


def test_underflow():
    _, result, norm = clip_one([1e-30] * 4, 1e-31, np.float32)
    assert norm == pytest.approx(2e-30, rel=1e-7)
    assert_clipped_to(result, 1e-31, Fraction(4, 2**24))


def test_half_overflow():
    _, result, norm = clip_one([300.0] * 1000, 1.0, np.float16)
    assert norm == np.sqrt(1000) * 300.0
    assert_clipped_to(result, 1.0, Fraction(4, 2**11))


def test_half_underflow():
    grad, result, norm = clip_one([1e-4] * 1000, 1e-3, np.float16)
    assert norm == pytest.approx(float(np.linalg.norm(grad.astype(np.float64))), rel=1e-15)
    # The results are subnormal in float16: the bound holds, the grid is coarse.
    assert_clipped_to(result, 1e-3, Fraction(1, 2**5))


def test_negative_bound():
    with pytest.raises(ValueError, match=r"clip_norm: expected a number >= 0 .*, got -1"):
        nc.clip_by_global_norm([np.ones(3)], -1)


def test_bound_holds():
    rng = np.random.default_rng(200)
    for size in rng.integers(1, 400, 200):
        _, result, _ = clip_one(rng.standard_normal(size) * 10, 1.0, np.float32)
        assert reference.square_sum([result]) <= 1


@pytest.mark.jit_only
def test_long_sum():
    grad = np.random.default_rng(26).standard_normal(1 << 26, np.float32)
    exact = np.sqrt(sum(np.sum(part.astype(np.float64) ** 2) for part in np.split(grad, 1 << 10)))
    assert nc.global_norm([grad]) == pytest.approx(float(exact), rel=1e-14)


def test_repeated_rows():
    slices = nc.IndexedSlices(np.array([[3.0, 0.0], [4.0, 0.0]], np.float32), [1, 1], (5, 2))
    (result,), norm = nc.clip_by_global_norm([slices], 1.0)
    assert norm == 7.0
    assert_clipped_to(result.to_dense(), 1.0, Fraction(4, 2**24))


def test_untouched_below():
    rng = np.random.default_rng(199)
    for _ in range(199):
        grad = rng.standard_normal(50, np.float32)
        norm = nc.global_norm([grad])
        for bound in (norm, np.nextafter(norm, np.inf), norm * (1 + 1e-6)):
            (result,), _ = nc.clip_by_global_norm([grad], bound)
            assert result.tobytes() == grad.tobytes()


@pytest.mark.parametrize("use_norm", [None, 2.0])
def test_integers(use_norm):
    with pytest.raises(TypeError, match=r"grads\[0\]: expected .* got int64; convert it with"):
        nc.clip_by_global_norm([np.arange(3)], 1.0, use_norm)


def test_every_row_names_a_test():
    table = (ROOT / "README.md").read_text().split("| input |")[1].split("\n\n")[0]
    named = re.findall(r"`(test_\w+)` \|$", table, flags=re.MULTILINE)
    rows = [line for line in table.splitlines() if line.startswith("|")][1:]
    assert len(named) == len(rows)
    for name in named:
        assert callable(globals()[name])


def test_promises_name_tests_that_there_are():
    section = (ROOT / "README.md").read_text().split("## What you can rely on")[1]
    rows = re.findall(r"^\| (\d) \| (.*) \|$", section.split("\n## ")[0], flags=re.MULTILINE)
    assert [number for number, _ in rows] == list("123456")
    for _, held in rows:
        suites = re.findall(r"`([\w/]+\.py)`: ((?:`test_\w+`(?:, )?)+)", held)
        assert held.count(".py") == len(suites) > 0
        for path, names in suites:
            source = (ROOT / "tests" / path).read_text()
            for name in re.findall(r"`(\w+)`", names):
                assert f"\ndef {name}(" in source, (path, name)

"""Some of the calls whose results are compared in exact arithmetic, and what that would find."""

import numpy as np
import pytest

import numclip as nc
from tests.promises import bound


def test_calls_hold_the_contract(tries):
    found = [bound.run(number) for number in range(tries(200))]
    assert {name for name, _ in found} == {draw.__name__ for draw in bound.DRAWS}
    assert all(any(clips for own, clips in found if own == name) for name, _ in found)


def tilted(grad, clip_norm):
    """Clip, and move the first element toward 0."""
    result = nc.clip_by_norm(grad, clip_norm)
    if not np.array_equal(result, grad):
        result[0] *= 1 - 2.0**-40
    return result


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (lambda g, c: g * min(1.0, c / bound.Vector(g).norm), "exceeds"),
        (lambda g, c: nc.clip_by_norm(g, c * (1 - 2.0**-46)), "short of"),
        (lambda g, c: nc.clip_by_norm(g, c * (1 - 2.0**-20)), "changed below the bound"),
        (lambda g, _: g, "not clipped"),
        (tilted, "no single factor"),
        (lambda g, c: -nc.clip_by_norm(g, c), "a sign flipped"),
    ],
)
def test_what_breaks_the_contract_is_found(wrong, told):
    rng = np.random.default_rng(6)
    found = set()
    for _ in range(40):
        grad = rng.standard_normal(9)
        before = bound.Vector(grad)
        limit = bound.Limit(before.norm * rng.choice([0.1, 0.5, 1.0, 1 + 2.0**-30, 1.5]))
        try:
            bound.check(before, bound.Vector(wrong(grad, limit.bound)), limit)
        except AssertionError as error:
            found.add(str(error))
    assert any(told in text for text in found), found

"""Functions of one gradient that are given a structure: each gradient is clipped by itself."""

from __future__ import annotations

import numpy as np
import pytest

import numclip as nc
from tests.oracle.checks import assert_same_bits

RNG = np.random.default_rng(0)
SHAPES = [(3, 4), (5,), (2, 3, 2), (1, 1), (0, 3)]
GRADS = [RNG.normal(size=shape) for shape in SHAPES]
PARAMS = [RNG.normal(size=shape) for shape in SHAPES]
SPARSE = nc.IndexedSlices(np.full((2, 3), 2.0), [4, 4], (6, 3))


def functions():
    """Functions of a structure of gradients, of one of parameters, and of where to write."""
    return {
        "value": lambda g, _, **out: nc.clip_by_value(g, -0.5, 1, **out),
        "value by arrays": lambda g, _, **out: nc.clip_by_value(g, np.float64(-0.5), [1], **out),
        "norm": lambda g, _, **out: nc.clip_by_norm(g, 0.7, **out),
        "inf norm": lambda g, _, **out: nc.clip_by_norm(g, 0.7, ord=np.inf, **out),
        "units": lambda g, _, **out: nc.clip_by_norm(g, 0.7, axes=-1, **out),
        "average": lambda g, _, **out: nc.clip_by_average_norm(g, 0.1, **out),
        "rms": lambda g, _, **out: nc.clip_by_block_rms(g, 0.5, **out),
        "adaptive": lambda g, p, **out: nc.adaptive_clip(g, p, 0.1, **out),
    }


def nested(items):
    return {"a": [items[0], None, {"b": items[1]}], "c": (items[2], items[3]), "d": items[4]}


def leaves(tree):
    return [tree["a"][0], tree["a"][2]["b"], *tree["c"], tree["d"]]


def copies():
    return [grad.copy() for grad in GRADS]


def assert_same(results, wanted):
    for result, own in zip(results, wanted, strict=True):
        assert_same_bits(result, own)


@pytest.mark.parametrize("name", functions())
def test_each_has_the_bits_of_its_own_call(name):
    clip = functions()[name]
    wanted = [clip(grad, param) for grad, param in zip(GRADS, PARAMS, strict=True)]
    assert any((own != grad).any() for own, grad in zip(wanted, GRADS, strict=True))
    assert_same(clip(GRADS, PARAMS), wanted)
    assert_same(clip(iter(GRADS), PARAMS), wanted)
    assert_same(clip(dict(enumerate(GRADS)), dict(enumerate(PARAMS))).values(), wanted)
    result = clip(nested(GRADS), nested(PARAMS))
    assert_same(leaves(result), wanted)
    assert result["a"][1] is None
    assert (type(result["a"]), type(result["c"])) == (list, tuple)


@pytest.mark.parametrize("name", functions())
def test_in_place_the_same_arrays_come_back(name):
    clip = functions()[name]
    wanted = [clip(grad, param) for grad, param in zip(GRADS, PARAMS, strict=True)]
    views = [grad[...] for grad in copies()]  # which do not own their memory
    for grads in (copies(), views):
        result = clip(grads, PARAMS, out=grads)
        assert all(own is grad for own, grad in zip(result, grads, strict=True))
        assert_same(grads, wanted)
    others = copies()
    clip(nested(GRADS), nested(PARAMS), out=nested(others))
    assert_same(others, wanted)


@pytest.mark.parametrize("name", functions())
def test_one_that_does_not_fit_leaves_all_as_they_were(name):
    clip = functions()[name]
    for number, bad, error in [
        (1, np.ones(5, np.int64), r"grad\[1\]: expected an array of .* int64"),
        (1, np.broadcast_to(1.0, 5), r"out\[1\]: expected a writeable array"),
        (4, GRADS[4], r"out\[4\]: shares memory with out\[0\]"),
    ]:
        grads = copies()
        grads[number] = grads[0] if number == 4 else bad
        params = [*PARAMS[:4], PARAMS[0]] if number == 4 else PARAMS
        with pytest.raises((TypeError, ValueError), match=error):
            clip(grads, params, out=grads)
        assert_same_bits(grads[0], GRADS[0])


def test_errors_name_the_gradient():
    with pytest.raises(TypeError, match=r"grad\['a'\]\[0\]: expected real numbers"):
        nc.clip_by_value({"a": [np.ones(2, complex)]}, -1, 1)
    with pytest.raises(ValueError, match=r"param\[1\]: expected an array of the gradient's shape"):
        nc.adaptive_clip(GRADS[:2], [PARAMS[0], PARAMS[0]])
    with pytest.raises(ValueError, match=r"param: expected an entry param\[1\], got only \[0\]"):
        nc.adaptive_clip(GRADS[:2], PARAMS[:1])
    grads = copies()
    with pytest.raises(ValueError, match="axes"):
        nc.clip_by_norm(grads, 0.1, axes=2, out=grads)
    assert_same(grads, GRADS)


def test_not_finite_ones_stay_by_themselves():
    grads = [np.array([3.0, np.nan]), np.array([3.0, 4.0])]
    first, second = nc.clip_by_norm(grads, 1.0)
    assert np.isnan(first).all()
    assert_same_bits(second, nc.clip_by_norm(grads[1], 1.0))
    grads = grads[::-1]  # one is clipped before the other is found
    nc.clip_by_norm(grads, 1.0, out=grads)
    assert_same_bits(grads[0], second)


def test_slices_and_dtypes_may_be_mixed():
    mixed = {"rows": SPARSE, "half": np.full(3, 2.0, np.float16), "wide": np.full(2, 1e300)}
    result = nc.clip_by_norm(mixed, 1.0)
    assert all(nc.global_norm([own]) <= 1.0 for own in result.values())
    assert type(result["rows"]) is nc.IndexedSlices
    held = nc.clip_by_value(mixed, -1.0, 1.0)
    assert held["rows"].to_dense().max() == 1.0


@pytest.mark.parametrize("bad", [np.ones(3, np.int64), np.ones(3, object), np.ones(3, "S1")])
def test_a_parameter_that_does_not_fit_leaves_all_as_they_were(bad):
    grads = [np.full(3, 10.0), np.full(3, 10.0)]
    with pytest.raises(TypeError, match=r"param\[1\]"):
        nc.adaptive_clip(grads, [np.ones(3), bad], out=grads)
    assert (grads[0] == 10.0).all()


def test_a_parameter_that_would_be_written_first_is_refused():
    grads = [np.full(3, 10.0), np.full(3, 10.0)]
    for owner in (grads[0], grads[0][:]):
        with pytest.raises(ValueError, match=r"out\[0\]: shares memory with param\[1\]"):
            nc.adaptive_clip(grads, [np.ones(3), owner], out=grads)
    wanted = nc.adaptive_clip(grads[1], grads[0])
    assert_same_bits(nc.adaptive_clip(grads, [np.ones(3), grads[0]])[1], wanted)
    nc.adaptive_clip(grads, grads, out=grads)  # each is measured before it is written
    assert_same_bits(grads[1], wanted)

"""Gradients in nested lists, tuples and dicts: taken apart, clipped together, made again."""

from __future__ import annotations

from collections import OrderedDict, defaultdict, namedtuple

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference

Layer = namedtuple("Layer", ["W", "b"])


def nested():
    return {
        "enc": [{"W": np.full((2, 2), 3.0), "b": np.zeros(2)}, {"W": np.ones(1), "b": None}],
        "out": (np.array([4.0]), None),
        "last": Layer(np.full(3, 2.0), np.zeros(0)),
    }


def leaves(grads):
    found = [*grads["enc"][0].values(), grads["enc"][1]["W"], grads["out"][0], *grads["last"]]
    return [grad for grad in found if grad is not None]


def test_the_norm_is_of_all_leaves():
    assert nc.global_norm(nested()) == reference.norm(leaves(nested()))


def test_results_have_the_same_structure():
    grads = nested()
    clipped, norm = nc.clip_by_global_norm(grads, 1.0)
    flat, same = nc.clip_by_global_norm(leaves(grads), 1.0)
    assert norm == same
    for ours, theirs in zip(leaves(clipped), flat, strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert clipped["out"][1] is None
    assert clipped["enc"][1]["b"] is None
    assert type(clipped["out"]) is tuple
    assert type(clipped["last"]) is Layer
    np.testing.assert_array_equal(grads["out"][0], [4.0])


def test_in_place():
    grads = nested()
    held = leaves(grads)
    clipped, _ = nc.clip_by_global_norm(grads, 1.0, out=grads)
    assert all(a is b for a, b in zip(leaves(clipped), held, strict=True))
    assert nc.global_norm(held) <= 1.0


@pytest.mark.parametrize("kind", [dict, OrderedDict, lambda **own: defaultdict(list, **own)])
def test_mappings_come_back_as_what_they_were(kind):
    grads = kind(a=np.array([3.0]), b=np.array([4.0]))
    clipped, _ = nc.clip_by_global_norm([grads], 1.0)
    assert type(clipped[0]) is type(grads)
    assert getattr(clipped[0], "default_factory", None) is getattr(grads, "default_factory", None)
    np.testing.assert_array_equal(grads["a"], [3.0])
    assert nc.global_norm(clipped) <= 1.0


def test_errors_name_the_path():
    grads = nested()
    grads["enc"][0]["W"] = np.ones(2, np.int64)
    with pytest.raises(TypeError, match=r"^grads\['enc'\]\[0\]\['W'\]: .* int64"):
        nc.global_norm(grads)
    grads = nested()
    grads["enc"][1]["W"][0] = np.nan
    with pytest.raises(nc.NonFiniteGradientError, match=r"^grads\['enc'\]\[1\]\['W'\] is not"):
        nc.clip_by_global_norm(grads, 1.0, nonfinite="raise")
    with pytest.raises(ValueError, match=r"^out"):
        nc.clip_by_global_norm(nested(), 1.0, out={**nested(), "out": (None, np.ones(1))})


def test_a_list_of_numbers_is_no_structure():
    with pytest.raises(TypeError, match=r"^grads\[1\]: .* list; convert it with numpy\.asarray"):
        nc.global_norm([np.ones(2), [1.0, 2.0]])


def test_columns_of_one_matrix_are_clipped_in_place_at_once():
    """Views that are woven into one another share no element, and are not compared in pairs."""
    matrix = np.ones((3, 1000))
    views = [matrix[:, k] for k in range(1000)]
    nc.clip_by_global_norm(views, 1.0, out=views)
    assert nc.global_norm([matrix]) <= 1.0
    with pytest.raises(ValueError, match=r"out\[1000\]: shares memory with out\[7\]"):
        nc.clip_by_global_norm([*views, matrix[1:, 7]], 1.0, out=[*views, matrix[1:, 7]])


def test_elements_that_share_memory_are_not_written():
    windows = np.lib.stride_tricks.sliding_window_view(np.ones(6), 3, writeable=True)
    with pytest.raises(ValueError, match=r"out\[0\]: expected distinct elements, got strides"):
        nc.clip_by_global_norm([windows], 1.0, out=[windows])
    odd = np.lib.stride_tricks.as_strided(np.ones(8), (2, 2), (24, 16))
    nc.clip_by_global_norm([odd], 1.0, out=[odd])
    assert nc.global_norm([odd]) <= 1.0

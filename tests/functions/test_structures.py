"""Gradients in nested lists, tuples and dicts: taken apart, clipped together, made again."""

from __future__ import annotations

import itertools
from collections import OrderedDict, UserDict, UserList, defaultdict, namedtuple
from collections.abc import Mapping, MutableSequence

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


class ByAttribute(dict):
    """A dict whose keys are attributes, all others being None."""

    __getattr__ = dict.get


class ByKey(dict):
    """A dict whose keys are attributes, where all others raise a KeyError."""

    __getattr__ = dict.__getitem__


class Itself(dict):
    """A dict whose attributes are its items."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.__dict__ = self


class Stack(list):
    """A list of a user's own class."""


CLASSES = ByAttribute, ByKey, Itself, UserDict, UserList, Stack


def test_structures_of_a_users_class_come_back_as_what_they_were():
    for kind, in_place in itertools.product(CLASSES, (False, True)):
        items = [np.array([3.0]), np.array([4.0])]
        grads = kind(items) if issubclass(kind, MutableSequence) else kind(W=items[0], b=items[1])
        for given in (grads, {"inner": grads} if isinstance(grads, Mapping) else grads):
            clipped, _ = nc.clip_by_global_norm(given, 1.0, out=given if in_place else None)
            assert type(clipped) is type(given)
            found = clipped["inner"] if given is not grads else clipped
            assert type(found) is kind
            values = list(found.values() if isinstance(found, Mapping) else found)
            assert reference.norm(values) <= 1.0
            assert all(a is b for a, b in zip(values, items, strict=True)) is in_place
        if kind is Itself:
            assert found.W is found["W"]
        assert len(grads) == 2


def test_a_mapping_whose_class_cannot_be_made_again_comes_back_as_a_dict():
    class Fixed(Mapping):
        def __getitem__(self, key):
            return {"W": np.array([3.0])}[key]

        def __iter__(self):
            return iter("W")

        def __len__(self):
            return 1

    class Renamed(UserDict):
        def __init__(self, items):
            super().__init__({f"my {key}": item for key, item in items.items()})

    for grads in (Fixed(), Renamed({"W": np.array([3.0])})):
        clipped, norm = nc.clip_by_global_norm(grads, 1.0)
        assert (type(clipped), [*clipped], norm) == (dict, [*grads], 3.0)


def test_a_structure_that_holds_itself_is_refused():
    endless = [[np.ones(2)]]
    endless[0].append(endless)
    with pytest.raises(ValueError, match=r"^grads: expected .* that holds itself"):
        nc.global_norm(endless)

"""What errors advise is done, and succeeds; and what needs no advice any more."""

from __future__ import annotations

import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numclip as nc
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import BFLOAT16


class Refusing:
    """An array that every protocol is refused by, as those of JAX whose memory is given back."""

    def __dlpack__(self, **_: Any) -> Any:
        raise RuntimeError("array has been deleted")

    def __dlpack_device__(self) -> Any:
        return (1, 0)

    def __array__(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("array has been deleted")


class Nowhere(Refusing):
    def __dlpack_device__(self) -> Any:
        raise RuntimeError("array has been deleted")


def test_only_what_an_index_has_is_to_be_installed_from_one():
    sources = [path.read_text() for path in Path(nc.__file__).parent.rglob("*.py")]
    advice = [found for text in sources for found in re.findall(r"pip install ([^\n]*)", text)]
    assert any(found.startswith("ml_dtypes") for found in advice)
    assert not [found for found in advice if "numclip" in found]


def test_an_array_that_nothing_can_read_is_named():
    for kind in (Refusing, Nowhere):
        for run in (
            lambda odd: nc.global_norm([np.ones(2), odd]),
            lambda odd: nc.clip_by_global_norm([np.ones(2), odd], 1.0),
        ):
            with pytest.raises(
                TypeError, match=rf"grads\[1\]: expected .*{kind.__name__}: array has"
            ):
                run(kind())
        for name, run in {
            "grad": lambda odd: nc.clip_by_norm(odd, 1.0),
            "clip_norm": lambda odd: nc.clip_by_norm(np.ones(2), odd),
            "clip_value_min": lambda odd: nc.clip_by_value(np.ones(2), odd, 1.0),
            "indices": lambda odd: nc.IndexedSlices(np.ones(2), odd, (3,)),
            "values": lambda odd: nc.IndexedSlices(odd, [0, 1], (3,)),
        }.items():
            with pytest.raises(TypeError, match=rf"{name}: expected "):
                run(kind())


CONVERTED = [
    ([3.0, 4.0], "; convert it with numpy.asarray$", np.asarray),
    ([3, 4], r"; convert it with numpy.asarray\(..., float\)$", lambda x: np.asarray(x, float)),
    (5, r"int; convert it with numpy.asarray\(..., float\)$", lambda x: np.asarray(x, float)),
]


def test_what_is_no_array_is_converted_as_advised():
    for value, advice, follow in CONVERTED:
        with pytest.raises(
            TypeError, match=rf"grad: expected an array or IndexedSlices, .*{advice}"
        ):
            nc.clip_by_norm(value, 1.0)
        assert nc.global_norm([follow(value)]) == 5.0


def test_no_advice_is_given_where_it_would_fail():
    for value in (object(), "words", lambda: None):
        with pytest.raises(TypeError, match=r"grad: expected an array or IndexedSlices, got \w+$"):
            nc.clip_by_norm(value, 1.0)


def test_a_saved_array_of_bfloat16_is_viewed_as_advised():
    file = io.BytesIO()
    np.save(file, np.array([3.0, 4.0], BFLOAT16))
    file.seek(0)
    loaded = np.load(file)
    with pytest.raises(TypeError, match=r"grads\[0\]: .*pass array.view\(ml_dtypes.bfloat16\)"):
        nc.global_norm([loaded])
    assert nc.global_norm([loaded.view(BFLOAT16)]) == 5.0


def of_tensorflow(**parts: Any) -> Any:
    """What numclip asks of ``tf.IndexedSlices`` and ``tf.SparseTensor``."""
    return SimpleNamespace(**parts)


def test_slices_of_tensorflow_are_taken():
    values, indices = np.array([[3.0, 0.0], [4.0, 0.0]]), np.array([7, 7])
    own = nc.IndexedSlices(values.copy(), indices, (9, 2))
    given = of_tensorflow(values=values, indices=indices, dense_shape=np.array([9, 2]))
    assert nc.global_norm([given, None]) == 7.0
    (clipped,), norm = nc.clip_by_global_norm([given], 1.0)
    assert norm == 7.0
    assert_same_bits(clipped.to_dense(), nc.clip_by_global_norm([own], 1.0)[0][0].to_dense())
    assert nc.clip_by_norm(given, 1.0, axes=1, out=given) is given
    assert nc.global_norm([given]) <= 1.0
    groups = nc.ParamGroups([nc.Group("g", {"E": np.zeros((9, 2))}, sparse=True)])
    groups.set_grads({"E": given})
    assert groups.clip().norm == nc.global_norm([given])


MISFITS = [
    ({"indices": np.array([9])}, r"grads\[0\]\.indices: expected rows in \[0, 9\)"),
    ({"values": np.array([1])}, r"grads\[0\]\.values: expected one of .*int64"),
    ({"dense_shape": None}, r"grads\[0\]: .*pass numclip.IndexedSlices\(g.values, g.indices"),
]


def test_slices_of_tensorflow_that_do_not_fit_are_named():
    for parts, message in MISFITS:
        fitting = {"values": np.ones(1), "indices": np.array([1]), "dense_shape": (9,)}
        with pytest.raises((TypeError, ValueError), match=message):
            nc.global_norm([of_tensorflow(**fitting | parts)])


def test_where_elements_are_sparse_axes_are_flattened():
    indices, values = np.array([[0, 1], [2, 2]]), np.array([3.0, 4.0])
    given = of_tensorflow(values=values, indices=indices, dense_shape=(3, 5))
    assert nc.global_norm([given]) == 5.0
    clipped = nc.clip_by_average_norm(given, 0.1)  # of 15 elements
    assert clipped.dense_shape == (15,)
    assert clipped.indices.tolist() == [1, 12]
    assert nc.global_norm([clipped]) == pytest.approx(1.5)
    for run in (
        lambda: nc.clip_by_norm(given, 1.0, axes=0),
        lambda: nc.adaptive_clip(given, np.ones((3, 5))),
        lambda: nc.clip_per_example([given], 1.0)[0],
    ):
        with pytest.raises(TypeError, match=r"2 sparse axes; convert it to a dense array"):
            run()

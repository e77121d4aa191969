"""Every error, by its message: the parameter or entry, what came, what is wanted."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import scipy.sparse

import numclip as nc
from tests.oracle import cases, checks

ONES = np.ones(3, np.float32)
TABLE = np.ones((3, 2), np.float32)


def raises(error: type[Exception] | tuple[type[Exception], ...], message: str):
    return pytest.raises(error, match=f"(?s){message}")


# ---- bounds and other numbers

BOUNDED = {
    "clip_norm": [
        lambda c: nc.clip_by_global_norm([ONES], c),
        lambda c: nc.clip_by_norm(ONES, c),
        lambda c: nc.clip_by_average_norm(ONES, c),
        lambda c: nc.clip_per_example([TABLE], c),
    ],
    "threshold": [lambda c: nc.clip_by_block_rms(ONES, c)],
    "clip_factor": [lambda c: nc.adaptive_clip(ONES, ONES, c)],
    "eps": [lambda c: nc.adaptive_clip(ONES, ONES, 0.01, c)],
}
NUMBERS = [
    (-1, ValueError, "-1"),
    (-0.5, ValueError, r"-0\.5"),
    (-math.inf, ValueError, "-inf"),
    (10**400, ValueError, "one of 401 characters"),
    (math.nan, ValueError, "nan"),
    (np.array(math.nan), ValueError, "nan"),
    (True, TypeError, "bool|True"),
    (np.True_, TypeError, "bool|True"),
    (1j, TypeError, "complex|1j"),
    (np.complex64(1), TypeError, "complex"),
    ("1", TypeError, "str|'1'"),
    (None, TypeError, "None"),
    ([1.0], TypeError, "list"),
    (np.ones(1), (TypeError, ValueError), r"\(1,\)|ndarray"),
    (np.ones(2), (TypeError, ValueError), r"\(2,\)|ndarray"),
    (np.array("1"), TypeError, r"str|<U1"),
]


@pytest.mark.parametrize(("value", "error", "got"), NUMBERS, ids=lambda value: repr(value)[:20])
@pytest.mark.parametrize("parameter", BOUNDED)
def test_bounds(parameter, value, error, got):
    for call in BOUNDED[parameter]:
        with raises(error, f"{parameter}.*({got})"):
            call(value)


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (-1.0, ValueError, "-1"),
        (-math.inf, ValueError, "-inf"),
        (True, TypeError, "bool|True"),
        ("1", TypeError, "str|'1'"),
        (1j, TypeError, "complex|1j"),
        (np.ones(2), (TypeError, ValueError), r"\(2,\)|ndarray"),
    ],
)
def test_use_norm(value, error, got):
    with raises(error, f"use_norm.*({got})"):
        nc.clip_by_global_norm([ONES], 1.0, value)


@pytest.mark.parametrize(
    ("value", "error", "got"),
    [
        (0.5, ValueError, r"0\.5"),
        (0, ValueError, "0"),
        (-2, ValueError, "-2"),
        (-math.inf, ValueError, "-inf"),
        (math.nan, ValueError, "nan"),
        ("fro", TypeError, "fro|str"),
        (None, TypeError, "None"),
        (True, TypeError, "bool|True"),
        (2j, TypeError, "complex|2j"),
    ],
)
def test_ord(value, error, got):
    for call in (nc.global_norm, lambda g, ord: nc.clip_by_global_norm(g, 1.0, ord=ord)):
        with raises(error, f"ord.*({got})"):
            call([ONES], ord=value)
    with raises(error, f"ord.*({got})"):
        nc.clip_by_norm(ONES, 1.0, ord=value)


@pytest.mark.parametrize(
    ("parameter", "call"),
    [
        ("nonfinite", lambda v: nc.clip_by_global_norm([ONES], 1.0, nonfinite=v)),
        ("duplicates", lambda v: nc.clip_by_global_norm([ONES], 1.0, duplicates=v)),
        ("duplicates", lambda v: nc.global_norm([ONES], duplicates=v)),
        ("layerwise", lambda v: nc.clip_per_example([TABLE], 1.0, layerwise=v)),
    ],
)
def test_choices(parameter, call):
    with raises(ValueError, f"{parameter}.*'ignore'"):
        call("ignore")


@pytest.mark.parametrize(
    ("axes", "error", "got"),
    [
        (2, ValueError, "2"),
        (-3, ValueError, "-3"),
        ((0, 0), ValueError, r"0"),
        ((0, -2), ValueError, r"0|-2"),
        (0.5, TypeError, r"0\.5|float"),
        ("0", TypeError, "'0'|str"),
        (True, TypeError, "True|bool"),
    ],
)
def test_axes(axes, error, got):
    with raises(error, f"ax[ei]s.*({got})"):
        nc.clip_by_norm(TABLE, 1.0, axes)
    with raises(error, f"ax[ei]s.*({got})"):
        nc.adaptive_clip(TABLE, TABLE, axes=axes)


@pytest.mark.parametrize(
    ("low", "high", "error", "message"),
    [
        (1, -1, ValueError, "clip_value_min.*1"),
        (math.nan, 1, ValueError, "clip_value_min.*(nan|NaN)"),
        (-1, math.nan, ValueError, "clip_value_max.*(nan|NaN)"),
        (np.array([0, math.nan, 0]), 1, ValueError, "clip_value_min.*(nan|NaN)"),
        ("0", 1, TypeError, "clip_value_min.*(str|'0'|<U1)"),
        (0, 1j, TypeError, "clip_value_max.*(complex|1j)"),
        (None, 1, TypeError, "clip_value_min.*None"),
        (np.zeros(4), 1, ValueError, r"clip_value_min.*\(4,\)"),
        (0, np.ones((2, 3)), ValueError, r"clip_value_max.*\(2, 3\)"),
    ],
)
def test_value_bounds(low, high, error, message):
    with raises(error, message):
        nc.clip_by_value(ONES, low, high)


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (-2, ValueError), (1.5, TypeError), ("2", TypeError)]
)
def test_number_of_threads(value, error):
    before = nc.get_num_threads()
    with raises(error, rf"\bn\b.*{value}"):
        nc.set_num_threads(value)
    assert nc.get_num_threads() == before


# ---- gradients

ENTRIES = {
    "integer": (np.arange(3), "int64"),
    "boolean": (np.ones(3, bool), "bool"),
    "object": (np.array([1.0, None]), "object"),
    "string": (np.array(["a"]), "str|<U1"),
    "datetime": (np.zeros(2, "M8[s]"), "datetime64"),
    "masked": (np.ma.masked_array([1.0, 2.0], [False, True]), "[Mm]asked"),
    "structured": (np.zeros(2, [("x", "f4")]), r"void|structured|\('x', '<f4'\)"),
    "longdouble": (np.ones(2, np.longdouble), "longdouble|float128"),
    "clongdouble": (np.ones(2, np.clongdouble), "clongdouble|complex256"),
    "list": ([1.0, 2.0], "list.*asarray|asarray.*list"),
    "number": (1.5, "float.*asarray|asarray.*float"),
    "text": ("abc", "str"),
    "sparse_matrix": (scipy.sparse.csr_array(np.eye(2)), "csr_array|from_scipy"),
}


@pytest.mark.parametrize("kind", ENTRIES)
def test_entries(kind):
    entry, got = ENTRIES[kind]
    for name, grads in (("1", [ONES, entry]), ("'w'", {"b": ONES, "w": entry})):
        with raises(TypeError, rf"grads\[{name}\].*({got})"):
            nc.clip_by_global_norm(grads, 1.0)
        with raises(TypeError, rf"grads\[{name}\].*({got})"):
            nc.global_norm(grads)
    with raises(TypeError, rf"grads\[1\].*({got})"):
        nc.clip_per_example([TABLE, entry], 1.0)


@pytest.mark.parametrize("kind", ENTRIES)
def test_single_gradients(kind):
    entry, got = ENTRIES[kind]
    for call in (
        lambda g: nc.clip_by_norm(g, 1.0),
        lambda g: nc.clip_by_average_norm(g, 1.0),
        lambda g: nc.clip_by_block_rms(g, 1.0),
        lambda g: nc.clip_by_value(g, -1, 1),
        lambda g: nc.adaptive_clip(g, ONES),
    ):
        with raises(TypeError, rf"\bgrad\b.*({got})"):
            call(entry)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        (ONES, r"grads.*\[.*\]"),
        (nc.IndexedSlices(TABLE, [0, 1, 2], (5, 2)), r"grads.*IndexedSlices"),
        (1.0, r"grads.*float"),
        (None, r"grads.*None"),
        ("abc", r"grads.*str"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_grads_that_are_no_collection(grads, message):
    with raises(TypeError, message):
        nc.clip_by_global_norm(grads, 1.0)
    with raises(TypeError, message):
        nc.global_norm(grads)


@pytest.mark.parametrize(
    ("param", "error", "message"),
    [
        (np.ones(4), ValueError, r"param.*\(4,\).*\(3,\)|param.*\(3,\).*\(4,\)"),
        (np.ones((3, 1)), ValueError, r"param.*\(3, 1\)"),
        (np.arange(3), TypeError, "param.*int64"),
        ([1.0, 2.0, 3.0], TypeError, "param.*list"),
        (None, TypeError, "param.*None"),
    ],
)
def test_param(param, error, message):
    with raises(error, message):
        nc.adaptive_clip(ONES, param)
    for code in ("f4", "f8", "c8", "c16"):  # of the gradient's dtype, but of no axes
        with raises(ValueError, r"param.*\(\)"):
            nc.adaptive_clip(np.ones(3, code), np.ones((), code), axes=0)


@pytest.mark.parametrize(
    ("grads", "message"),
    [
        ([np.ones((3, 2)), np.ones((4, 2))], r"grads\[1\].*4.*3|grads\[1\].*3.*4"),
        ([np.ones((3, 2)), np.array(1.0)], r"grads\[1\].*(0-d|scalar|axis)"),
        ({"a": None, "b": np.array(1.0)}, r"grads\['b'\].*(0-d|scalar|axis)"),
    ],
)
def test_examples(grads, message):
    with raises(ValueError, message):
        nc.clip_per_example(grads, 1.0)


# ---- outputs: refused before anything is written
def pair() -> list[np.ndarray]:
    return [np.full(3, 5, np.float32), np.full((2, 2), 6.0)]


BUFFER = np.full(8, 9.0)
OUTPUTS = {
    "read_only": (lambda g: [g[0], cases.read_only(g[1])], ValueError, r"out\[1\].*read-only"),
    "shape": (lambda g: [g[0], np.ones(4)], ValueError, r"out\[1\].*\(4,\)"),
    "dtype": (
        lambda g: [g[0], np.ones((2, 2), "f4")],
        (TypeError, ValueError),
        r"out\[1\].*float32",
    ),
    "not_an_array": (lambda g: [g[0], [1.0]], TypeError, r"out\[1\].*list"),
    "none": (lambda g: [g[0], None], (TypeError, ValueError), r"out\[1\].*None"),
    "byte_swapped": (lambda g: [g[0], cases.byte_swapped(g[1])], TypeError, r"out\[1\]"),
    "too_few": (lambda g: g[:1], ValueError, "out.*1"),
    "too_many": (lambda g: [*g, g[0]], ValueError, "out.*3"),
    "no_collection": (lambda g: g[0], TypeError, "out"),
    "dict": (lambda g: {"a": g[0], "b": g[1]}, (TypeError, ValueError), "out.*'a'|out.*dict"),
    "overlap_of_input": (
        lambda g: [g[0], np.lib.stride_tricks.as_strided(g[1].ravel()[1:], (2, 2), (8, 8))],
        ValueError,
        r"out\[1\]",
    ),
    "overlap_of_each_other": (
        lambda _: [BUFFER[:3].view(np.float32)[:3], BUFFER[1:5].reshape(2, 2)],
        ValueError,
        r"out\[[01]\]",
    ),
    "repeated_addresses": (
        lambda g: [g[0], np.lib.stride_tricks.as_strided(BUFFER, (2, 2), (0, 8))],
        ValueError,
        r"out\[1\]",
    ),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_outputs(kind):
    make, error, message = OUTPUTS[kind]
    grads = pair()
    with raises(error, message):
        nc.clip_by_global_norm(grads, 1.0, out=make(grads))
    for grad, kept in zip(grads, pair(), strict=True):
        checks.assert_same_bits(grad, kept)
    assert np.all(BUFFER == 9)


def test_one_array_twice_is_refused_in_place():
    grad = np.full(3, 5.0)
    with raises(ValueError, r"out\[[01]\]"):
        nc.clip_by_global_norm([grad, grad], 1.0, out=[grad, grad])
    view = np.full(6, 5.0)
    with raises(ValueError, r"out\[[01]\]"):
        nc.clip_by_global_norm([view[:4], view[2:]], 1.0, out=[view[:4], view[2:]])
    assert np.all(grad == 5)
    assert np.all(view == 5)


def test_exchanged_outputs_are_refused_or_right():
    """Writing the first output must not spoil the second input."""
    a, b = np.full(3, 3.0), np.full(3, 4.0)
    expected, _ = nc.clip_by_global_norm([a, b], 1.0)
    try:
        nc.clip_by_global_norm([a, b], 1.0, out=[b, a])
    except ValueError as error:
        assert "out" in str(error)  # noqa: PT017
        assert (a[0], b[0]) == (3, 4)
    else:
        checks.assert_same_bits(b, expected[0])
        checks.assert_same_bits(a, expected[1])


def owner_of_overlaps(grad):
    """Return an array that owns its memory, and whose rows lie in one another."""
    out = np.zeros(grad.shape, grad.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        out.strides = grad.itemsize, grad.itemsize
    return out


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (cases.read_only, ValueError, r"\bout\b.*read-only"),
        (lambda g: g[:2].copy(), ValueError, r"\bout\b.*\(2, 2\)"),
        (lambda g: g.astype(np.float64), (TypeError, ValueError), r"\bout\b.*float64"),
        (lambda g: g.tolist(), TypeError, r"\bout\b.*list"),
        (lambda g: g[::-1], ValueError, r"\bout\b"),
        (owner_of_overlaps, ValueError, r"\bout\b.*distinct elements"),
    ],
)
def test_single_outputs(make, error, message):
    for call in (
        lambda g, out: nc.clip_by_norm(g, 1.0, out=out),
        lambda g, out: nc.clip_by_norm(g, 1.0, 0, out=out),
        lambda g, out: nc.clip_by_average_norm(g, 0.1, out=out),
        lambda g, out: nc.clip_by_block_rms(g, 0.1, out=out),
        lambda g, out: nc.clip_by_value(g, -1, 1, out=out),
        lambda g, out: nc.adaptive_clip(g, g, out=out),
    ):
        grad = np.full((3, 2), 4, np.float32)
        with raises(error, message):
            call(grad, make(grad))
        assert np.all(grad == 4)


def test_byte_swapped_in_place_is_refused():
    grads = [np.full(3, 5.0), cases.byte_swapped(np.full(3, 6.0))]
    with raises(TypeError, r"(grads|out)\[1\]"):
        nc.clip_by_global_norm(grads, 1.0, out=grads)
    assert np.all(grads[0] == 5)
    assert np.all(grads[1] == 6)


@pytest.mark.parametrize(
    "make",
    [
        lambda s: nc.IndexedSlices(s.values.copy(), s.indices[::-1].copy(), s.dense_shape),
        lambda s: nc.IndexedSlices(s.values[:2].copy(), s.indices[:2], s.dense_shape),
        lambda s: nc.IndexedSlices(s.values.copy(), s.indices, (9, 2)),
        lambda s: nc.IndexedSlices(s.values.astype(np.float64), s.indices, s.dense_shape),
        lambda s: s.to_dense(),
    ],
)
def test_sparse_outputs(make):
    slices = nc.IndexedSlices(np.full((3, 2), 5, np.float32), np.array([4, 0, 2]), (5, 2))
    with raises((TypeError, ValueError), r"out\[0\]"):
        nc.clip_by_global_norm([slices], 1.0, out=[make(slices)])
    assert np.all(slices.values == 5)


@pytest.mark.parametrize(
    "call",
    [
        lambda g: nc.clip_by_global_norm([*g, np.arange(3)], 1.0, out=[*g, np.arange(3)]),
        lambda g: nc.clip_by_global_norm(g, -1.0, out=g),
        lambda g: nc.clip_by_global_norm(g, 1.0, ord=0, out=g),
        lambda g: nc.clip_by_global_norm(g, 1.0, nonfinite="no", out=g),
        lambda g: nc.clip_by_global_norm(g, 1.0, "3", out=g),
        lambda g: nc.clip_by_norm(g[1], 1.0, 5, out=g[1]),
        lambda g: nc.clip_by_value(g[1], 1.0, -1.0, out=g[1]),
        lambda g: nc.adaptive_clip(g[1], np.ones(3), out=g[1]),
    ],
)
def test_an_error_leaves_every_gradient_as_it_was(call):
    grads = pair()
    with pytest.raises((TypeError, ValueError)):
        call(grads)
    for grad, kept in zip(grads, pair(), strict=True):
        checks.assert_same_bits(grad, kept)

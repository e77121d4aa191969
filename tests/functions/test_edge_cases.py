"""One test for each edge case of the contract."""

from __future__ import annotations

import itertools
import math
import sys
import tempfile
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

import numclip as nc
from tests.oracle import cases, checks, reference
from tests.oracle.checks import assert_same_bits

RNG = np.random.default_rng(17)
VECTOR = cases.normal(RNG, (9,))
MATRIX = cases.normal(RNG, (6, 4), "float64")


def grads() -> list[np.ndarray]:
    return [VECTOR.copy(), MATRIX.copy()]


# Every function of one gradient and a bound, with a second argument where it needs one.
SINGLE = {
    "norm": nc.clip_by_norm,
    "norm_axes": lambda g, c, **kw: nc.clip_by_norm(g, c, axes=0, **kw),
    "average_norm": nc.clip_by_average_norm,
    "block_rms": nc.clip_by_block_rms,
    "adaptive": lambda g, c, **kw: nc.adaptive_clip(g, np.ones_like(g), c, **kw),
    "global_norm": lambda g, c, out=None: nc.clip_by_global_norm(
        [g], c, out=None if out is None else [out]
    )[0][0],
}


# ---- bounds


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("name", reference.DTYPES)
def test_bound_of_zero_gives_zeros(rule, name):
    for grad in (cases.normal(RNG, (5, 3), name), np.zeros((5, 3), reference.DTYPES[name])):
        clipped = SINGLE[rule](grad, 0)
        assert clipped.dtype == grad.dtype
        np.testing.assert_array_equal(clipped, np.zeros((5, 3)))


@pytest.mark.parametrize("rule", SINGLE)
def test_bound_of_infinity_never_clips(rule):
    for grad in (MATRIX, MATRIX * 1e300, np.array([1.0, np.nan, np.inf, -np.inf])):
        checks.assert_same_bits(SINGLE[rule](grad, math.inf), grad)


def test_bound_of_infinity_still_measures():
    assert nc.clip_by_global_norm(grads(), math.inf)[1] == nc.global_norm(grads())


@pytest.mark.parametrize(
    "clip_norm",
    [
        2,
        2.0,
        Fraction(2),
        np.float32(2),
        np.float64(2),
        np.int64(2),
        np.array(2.0),
        np.array(2, np.float32),
        np.array(2),
    ],
    ids=lambda value: f"{type(value).__name__}-{getattr(value, 'dtype', '')}",
)
def test_any_real_number_is_a_bound(clip_norm):
    expected = nc.clip_by_global_norm(grads(), 2.0)[0]
    for new, old in zip(nc.clip_by_global_norm(grads(), clip_norm)[0], expected, strict=True):
        checks.assert_same_bits(new, old)
    checks.assert_same_bits(nc.clip_by_norm(MATRIX, clip_norm), nc.clip_by_norm(MATRIX, 2.0))


def test_bound_equal_to_the_norm_is_not_triggered():
    grad = np.array([3.0, 4.0], np.float32)
    clipped, norm = nc.clip_by_global_norm([grad], 5.0)
    assert norm == 5
    checks.assert_same_bits(clipped[0], grad)


# ---- shapes and kinds of gradients


@pytest.mark.parametrize("rule", SINGLE)
@pytest.mark.parametrize("name", reference.DTYPES)
@pytest.mark.parametrize("shape", [(0,), (3, 0, 2), (0, 4)])
def test_empty_gradients(rule, name, shape):
    clipped = SINGLE[rule](np.empty(shape, reference.DTYPES[name]), 1.0)
    assert clipped.shape == shape
    assert clipped.dtype == reference.DTYPES[name]
    assert nc.global_norm([clipped]) == 0


@pytest.mark.parametrize("rule", [rule for rule in SINGLE if rule != "norm_axes"])
@pytest.mark.parametrize("grad", [np.array(-3.0), np.float32(3), np.float64(-3), np.complex64(3j)])
def test_scalars(rule, grad):
    clipped = SINGLE[rule](grad, 0.5)
    assert isinstance(clipped, np.ndarray)
    assert clipped.shape == ()
    assert clipped.dtype == grad.dtype
    checks.assert_close(clipped, np.asarray(grad) / 6)


def test_scalars_by_value():
    clipped = nc.clip_by_value(np.float32(3), -1, 1)
    assert isinstance(clipped, np.ndarray)
    assert clipped.dtype == np.float32
    assert clipped == 1
    assert nc.global_norm([reference.BFLOAT16.type(3)]) == 3.0


def test_byte_swapped_floats_are_converted():
    swapped = cases.byte_swapped(MATRIX)
    clipped = nc.clip_by_norm(swapped, 1.0)
    assert clipped.dtype.isnative
    checks.assert_same_bits(clipped, nc.clip_by_norm(MATRIX, 1.0))


def test_broadcast_gradients_are_read():
    grad = np.broadcast_to(VECTOR, (5, 9))
    assert nc.global_norm([grad]) == nc.global_norm([grad.copy()])
    clipped = nc.clip_by_norm(grad, 1.0)
    checks.assert_same_bits(clipped, nc.clip_by_norm(grad.copy(), 1.0))


# ---- structures


def test_no_gradients():
    assert nc.global_norm([]) == 0
    assert nc.clip_by_global_norm([], 1.0) == ([], 0.0)
    assert nc.clip_by_global_norm({}, 1.0) == ({}, 0.0)
    assert nc.clip_by_global_norm((None, None), 0.0) == ((None, None), 0.0)


def test_what_gives_gradients_once_gives_a_list(monkeypatch):
    for dtype in "<f4", ">f4":  # the second is taken the general way
        given = {"a": np.full(3, 2.0, dtype), "b": [np.ones(2, dtype)], "c": None}
        (first, (second,), _), wanted = nc.clip_by_global_norm([*given.values()], 1.0)
        for take in given.values, lambda given=given: (grad for grad in given.values()):
            with monkeypatch.context() as context:
                if dtype == "<f4":
                    context.setattr("numclip.clipping.clip.clip_together", None)
                    context.setattr("numclip.clipping.clip.norm_of", None)
                clipped, norm = nc.clip_by_global_norm(take(), 1.0)
                assert nc.global_norm(take()) == norm == wanted
            assert isinstance(clipped, list)
            assert_same_bits(clipped[0], first)
            assert_same_bits(clipped[1][0], second)
            assert clipped[2] is None


def test_structure_is_kept_in_place():
    for before in (
        grads(),
        tuple(grads()),
        cases.Weights(*grads()),
        {"b": VECTOR.copy(), 7: None, "a": MATRIX.copy()},
    ):
        clipped, _ = nc.clip_by_global_norm(before, 0.5, out=before)
        assert type(clipped) is type(before)
        items = before.items() if isinstance(before, dict) else enumerate(before)
        assert all(clipped[key] is entry for key, entry in items)


def test_one_array_twice_counts_twice():
    clipped, norm = nc.clip_by_global_norm([VECTOR, VECTOR], 1.0)
    assert norm == pytest.approx(math.sqrt(2) * reference.norm([VECTOR]), rel=1e-7)
    checks.assert_same_bits(clipped[0], clipped[1])
    assert not np.shares_memory(clipped[0], clipped[1])


def test_norm_is_a_python_float():
    for name in reference.DTYPES:
        assert type(nc.global_norm([cases.normal(RNG, (3,), name)])) is float
    assert type(nc.global_norm([])) is float
    assert type(nc.clip_by_global_norm([VECTOR], 1.0, use_norm=np.float32(2))[1]) is float


# ---- use_norm


def test_use_norm_below_the_bound_clips_nothing():
    for use_norm in (0, 0.5, np.float32(1), np.array(1.0)):
        clipped, norm = nc.clip_by_global_norm([VECTOR], 1.0, use_norm)
        assert norm == use_norm
        checks.assert_same_bits(clipped[0], VECTOR)


@pytest.mark.parametrize("use_norm", [math.nan, math.inf])
def test_use_norm_that_is_not_finite(use_norm):
    def clip(nonfinite, clip_norm=1.0):
        (clipped,), norm = nc.clip_by_global_norm(
            [VECTOR], clip_norm, use_norm, nonfinite=nonfinite
        )
        return clipped, norm

    clipped, norm = clip("propagate")
    np.testing.assert_equal(norm, use_norm)
    checks.assert_all_nan(clipped)
    checks.assert_same_bits(clip("propagate", math.inf)[0], VECTOR)

    clipped, norm = clip("skip")
    np.testing.assert_equal(norm, use_norm)
    checks.assert_same_bits(clipped, VECTOR)

    with pytest.raises(nc.NonFiniteGradientError, match=r"use_norm"):
        clip("raise")

    clipped, norm = clip("zero")
    assert norm == nc.global_norm([VECTOR])
    checks.assert_same_bits(clipped, nc.clip_by_norm(VECTOR, 1.0))


# ---- clip_by_value


def test_value_passes_nan_and_clamps_infinity():
    grad = np.array([np.nan, np.inf, -np.inf, 0.5], np.float32)
    np.testing.assert_array_equal(nc.clip_by_value(grad, -1, 2), [np.nan, 2, -1, 0.5])
    checks.assert_same_bits(nc.clip_by_value(grad, -math.inf, math.inf), grad)


@pytest.mark.parametrize("name", reference.REAL_DTYPES)
def test_value_bounds_are_rounded_like_numpy(name):
    grad = cases.normal(RNG, (50,), name)
    clipped = nc.clip_by_value(grad, -0.1, 1 / 3)
    assert clipped.max() == np.array(1 / 3).astype(grad.dtype)
    assert clipped.min() == np.array(-0.1).astype(grad.dtype)


@pytest.mark.parametrize("name", reference.REAL_DTYPES)
def test_value_bounds_are_broadcast(name):
    grad = cases.normal(RNG, (6, 4), name)
    low, high = -np.linspace(0, 1, 4), np.linspace(0.1, 1, 6)[:, None]
    for bounds in ((low, high), (low, 0.5), (-0.5, high), (np.array(-0.5), high.tolist())):
        clipped = nc.clip_by_value(grad, *bounds)
        checks.assert_same_bits(clipped, reference.clip_by_value(grad, *bounds))


# ---- adaptive_clip


def test_adaptive_axes():
    grad, param = cases.normal(RNG, (3, 2, 5)), cases.normal(RNG, (3, 2, 5))
    default = nc.adaptive_clip(grad, param)
    checks.assert_same_bits(default, nc.adaptive_clip(grad, param, axes=(0, 1)))
    checks.assert_close(default, reference.adaptive_clip(grad, param))
    vector = nc.adaptive_clip(VECTOR, np.ones_like(VECTOR))
    assert reference.norm([vector]) == pytest.approx(0.03, rel=1e-6)
    rows = nc.adaptive_clip(grad, param, axes=[-1, 1])
    checks.assert_close(rows, reference.adaptive_clip(grad, param, axes=[2, 1]))


def test_adaptive_eps_stands_in_for_a_zero_parameter():
    clipped = nc.adaptive_clip(MATRIX, np.zeros_like(MATRIX), 0.5, 0.25)
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=0), 0.125, rtol=1e-14)


@pytest.mark.parametrize("name", reference.REAL_DTYPES)
def test_adaptive_parameter_of_another_dtype(name):
    param = cases.normal(RNG, (6, 4), name)
    checks.assert_close(nc.adaptive_clip(MATRIX, param), reference.adaptive_clip(MATRIX, param))


# ---- writing


# Every function that takes structures.
EACH = {
    "value": lambda g, c, **kw: nc.clip_by_value(g, -c, c, **kw),
    "norm": nc.clip_by_norm,
    "norm of order 3": lambda g, c, **kw: nc.clip_by_norm(g, c, ord=3, **kw),
    "norm of order 4": lambda g, c, **kw: nc.clip_by_norm(g, c, ord=4, **kw),
    "norm of rows": lambda g, c, **kw: nc.clip_by_norm(g, c, axes=-1, **kw),
    "average norm": nc.clip_by_average_norm,
    "block rms": nc.clip_by_block_rms,
    "global norm": lambda g, c, **kw: nc.clip_by_global_norm(g, c, **kw)[0],
}
STRUCTURES = {
    list: lambda arrays: [*arrays, None],
    tuple: tuple,
    dict: lambda arrays: dict(zip("ab", arrays, strict=True)),
}


def entries(structure):
    items = structure.values() if isinstance(structure, dict) else structure
    return [item for item in items if item is not None]


def adaptive(given, bound, **kw):
    ones = STRUCTURES[type(given)](list(map(np.ones_like, entries(given))))
    return nc.adaptive_clip(given, ones, bound, **kw)


def test_outputs_may_be_other_arrays():
    for clip, (kind, make) in itertools.product([*EACH.values(), adaptive], STRUCTURES.items()):
        given, out = make(grads()), make([np.full_like(g, 7) for g in grads()])
        expected, clipped = entries(clip(given, 0.5)), clip(given, 0.5, out=out)
        in_place = clip(given, 0.5, out=make(entries(given)))
        assert type(clipped) is type(in_place) is kind
        for results, targets in ((clipped, out), (in_place, given)):
            triples = zip(entries(results), entries(targets), expected, strict=True)
            for new, target, right in triples:
                assert new is target
                checks.assert_same_bits(new, right)


def test_other_outputs_are_as_they_were_after_an_error():
    given, out = grads(), [np.full_like(g, 7) for g in grads()]
    given[1].flat[-1] = np.nan
    with pytest.raises(nc.NonFiniteGradientError, match=r"grads\[1\]"):
        nc.clip_by_global_norm(given, 0.5, out=out, nonfinite="raise")
    assert all((own == 7).all() for own in out)


def test_outputs_may_be_parts_of_one_buffer():
    buffer = np.zeros(40, np.float64)
    out = [buffer[:24].reshape(6, 4), buffer[30:39]]
    given = [MATRIX, VECTOR.astype(np.float64)]
    nc.clip_by_global_norm(given, 0.5, out=out)
    for new, expected in zip(out, nc.clip_by_global_norm(given, 0.5)[0], strict=True):
        checks.assert_same_bits(new, expected)
    assert not buffer[24:30].any()
    assert buffer[39] == 0


def test_outputs_may_be_woven_into_one_another():
    buffer = np.zeros(20)
    given = [cases.normal(RNG, (10,), "float64") for _ in range(2)]
    buffer[::2], buffer[1::2] = given
    woven = [buffer[::2], buffer[1::2]]
    nc.clip_by_global_norm(woven, 0.5, out=woven)
    for new, expected in zip(woven, nc.clip_by_global_norm(given, 0.5)[0], strict=True):
        checks.assert_same_bits(new, expected)
    repeated = [np.broadcast_to(one, (10,)) for one in given[0][:2]]  # their steps are 0
    nc.clip_by_global_norm(repeated, 0.5, out=woven)
    for new, expected in zip(woven, nc.clip_by_global_norm(repeated, 0.5)[0], strict=True):
        checks.assert_same_bits(new, expected)


@pytest.mark.parametrize("layout", sorted(set(cases.LAYOUTS) - cases.UNWRITABLE))
@pytest.mark.parametrize("rule", [*SINGLE, "value"])
def test_outputs_may_have_any_layout(rule, layout):
    clip = SINGLE.get(rule, lambda g, c, **out: nc.clip_by_value(g, -c, c, **out))
    for bound in (0.01, 1e6):
        for given in (MATRIX, np.asfortranarray(MATRIX), cases.strided(MATRIX)):
            out = cases.LAYOUTS[layout](np.full_like(MATRIX, 7))
            assert clip(given, bound, out=out) is out
            checks.assert_same_bits(out, clip(given, bound))


def anonymous_kilobytes(address: int) -> int:
    """How much of the mapping at an address has been written since it was made."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first, *rest = line.split()
        if "-" in first and not first.endswith(":"):
            low, high = (int(part, 16) for part in first.split("-"))
            inside = low <= address < high
        elif inside and first == "Anonymous:":
            return int(rest[0])
    raise LookupError(hex(address))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/smaps")
@pytest.mark.parametrize("size", [5_000, pytest.param(300_000, marks=pytest.mark.jit_only)])
def test_untriggered_in_place_writes_nothing(size):
    with tempfile.NamedTemporaryFile() as file:
        cases.normal(RNG, (size,)).tofile(file.name)
        # Copy on write: a page that is written, with whatever bytes, leaves the file.
        grad = np.asarray(np.memmap(file.name, np.float32, "c"))
        address = grad.ctypes.data
        nc.clip_by_global_norm([grad], 1e6, out=[grad])
        nc.clip_by_norm(grad, 1e6, out=grad)
        nc.clip_by_average_norm(grad, 1e6, out=grad)
        nc.clip_by_block_rms(grad, 1e6, out=grad)
        nc.adaptive_clip(grad, grad, 1e6, out=grad)
        table = grad.reshape(-1, 100)
        nc.clip_by_norm(table, 1e6, axes=0, out=table)
        nc.clip_by_norm(table, 1e6, axes=1, out=table)
        assert anonymous_kilobytes(address) == 0
        nc.clip_by_norm(grad, 1e-3, out=grad)
        assert anonymous_kilobytes(address) > 0
        del grad, table


# ---- the library itself


def test_threads_can_be_set_and_restored():
    default = nc.get_num_threads()
    assert type(default) is int
    assert default >= 1
    try:
        nc.set_num_threads(3)
        assert nc.get_num_threads() == 3
    finally:
        nc.set_num_threads(None)
    assert nc.get_num_threads() == default


@pytest.mark.full  # asks the system in a child process
def test_show_versions(capsys):
    assert nc.show_versions() is None
    printed = capsys.readouterr().out
    for package in ("numclip", "numpy", "numba"):
        assert package in printed
    assert np.__version__ in printed
    with pytest.raises(TypeError, match="dtypes: expected a dtype name or dtypes, got int"):
        nc.warmup(3)


@pytest.mark.full
@pytest.mark.jit_only
def test_warmup_changes_no_result():
    before = nc.clip_by_global_norm(grads(), 0.5)
    nc.warmup()
    after = nc.clip_by_global_norm(grads(), 0.5)
    assert before[1] == after[1]
    for one, other in zip(before[0], after[0], strict=True):
        checks.assert_same_bits(one, other)


@pytest.mark.parametrize("ord", [1, 2, 3, math.inf])
def test_units_whose_magnitudes_exceed_float64(ord):
    grad = np.full((3, 2), 1.5e308 + 1.5e308j)
    wanted = 2.0**9 * nc.clip_by_norm(grad / 2.0**9, 1e308 / 2.0**9, 1, ord=ord)
    np.testing.assert_allclose(nc.clip_by_norm(grad, 1e308, 1, ord=ord), wanted, rtol=1e-14)


def varied(rng, scale):
    """Return gradients of several dtypes, strided, sparse, empty and missing."""
    with np.errstate(all="ignore"):
        return [
            (rng.standard_normal((5, 6)) * scale).astype(np.float32)[:, ::2],
            rng.standard_normal((4, 3)) * scale,
            None,
            (rng.standard_normal(7) * scale).astype(np.float16),
            np.asfortranarray(rng.standard_normal((3, 4)) * scale).astype(np.complex64),
            nc.IndexedSlices(rng.standard_normal((2, 3)) * scale, [4, 1], (6, 3)),
            np.zeros((0, 3)),
            (rng.standard_normal((6, 4)) * scale).astype(np.float32)[::-1, 1:3].T,
        ]


def plainly(grads, bound, out=None):
    """Clip the general way: of no other way is an iterator taken."""
    clipped, norm = nc.clip_by_global_norm(iter(grads), bound, out=out)
    return clipped, norm


@pytest.mark.each_value
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e-170, 1e170, np.nan])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.5, np.inf])
@pytest.mark.parametrize("of", [list, tuple, dict])
def test_little_of_several_kinds_has_the_bits_of_the_general_way(scale, ratio, of):
    grads = varied(np.random.default_rng(6), scale)
    norm = nc.global_norm(iter(grads))
    held = dict(enumerate(grads)) if of is dict else of(grads)
    assert np.array_equal(nc.global_norm(held), norm, equal_nan=True)
    bound = ratio * (norm if 0.0 < norm < np.inf else 1.0)
    wanted, told = plainly(grads, bound)
    clipped, found = nc.clip_by_global_norm(held, bound)
    assert type(clipped) is of
    assert np.array_equal([found, told], [norm, norm], equal_nan=True)
    nc.clip_by_global_norm(held, bound, out=held)
    for results in (clipped, held):
        results = list(results.values()) if of is dict else results
        for result, other, grad in zip(results, wanted, grads, strict=True):
            assert type(result) is type(other)
            if grad is not None:
                pair = [getattr(item, "values", item) for item in (result, other)]
                assert_same_bits(*map(np.ascontiguousarray, pair))


def test_little_that_shares_memory_is_clipped_once():
    memory = np.arange(24.0).reshape(4, 6)
    grads = [memory[:, ::2], memory[:, 1::2], np.ones(3, np.float32)]
    norm = nc.global_norm([memory, grads[2]])
    clipped, found = nc.clip_by_global_norm(grads, norm / 2, out=grads)
    assert found == norm
    assert clipped[0] is grads[0]
    np.testing.assert_allclose(memory, np.arange(24.0).reshape(4, 6) / 2, rtol=1e-6)
    overlapping = [memory[:, :4], memory[:, 3:], np.ones(3, np.float32)]
    with pytest.raises(ValueError, match="shares memory"):
        nc.clip_by_global_norm(overlapping, 1.0, out=overlapping)
    memory = np.ones(24)
    apart = [memory[8:], *(memory.reshape(12, 2)[k:, :0] for k in (0, 2, 4)), memory[:8]]
    for bound in (2.0, np.float32(1.0)):  # the latter is no plain number
        nc.clip_by_global_norm(apart, bound, out=apart)
        np.testing.assert_allclose(memory, bound / 24**0.5)
    itself = np.lib.stride_tricks.as_strided(np.ones(9), (4, 3), (16, 8))
    with pytest.raises(ValueError, match="distinct elements"):
        nc.clip_by_global_norm([itself, grads[2]], 1.0, out=[itself, grads[2]])


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_zeros_of_bounds_keep_their_signs(name):
    for low, high in (
        (-1.0, 0.0),
        (-1.0, -0.0),
        (0.0, 1.0),
        (-0.0, 1.0),
        (1e-8, 1.0),
        (1e-320, 1.0),
    ):
        for value in (0.0, -0.0, 1.0, -1.0):
            grad = np.array([value], name)
            own = nc.clip_by_value(grad, low, high)
            other = nc.clip_by_value(np.array([[value, 1]], name)[:, 0], low, high, out=grad.copy())
            checks.assert_same_bits(own, other)

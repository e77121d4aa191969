"""Plain arrays take a shorter way: the same bits, and nothing that it should not take."""

from __future__ import annotations

import math
import operator
import pickle
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from numclip.border import arguments
from numclip.clipping import parts
from numclip.host import lists as plain
from numclip.host import nests, outs, plain_arrays, plain_units
from numclip.host.kernels import arrays, little, unit_loops
from numclip.host.kernels.tuning import CHUNK, PARALLEL_BYTES
from tests.oracle.cases import LAYOUTS, normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import DTYPES
from tests.oracle.strategies import arrays as gradients
from tests.oracle.strategies import names

Grads = list[np.ndarray | None]
ODD = "strided", "negative", "misaligned"


def general(patch: pytest.MonkeyPatch) -> None:
    """Send everything the general way."""
    patch.setattr(plain_arrays, "READABLE", False)


def copied(grads: Grads) -> Grads:
    return [None if grad is None else grad.copy("K") for grad in grads]


def results(grads: Grads, bound: float, *, in_place: bool) -> list[Any]:
    """The bits of all that a call returns and writes."""
    own = copied(grads)
    norm = nc.global_norm(own)
    clipped, told = nc.clip_by_global_norm(own, bound, out=own if in_place else None)
    single = [nc.clip_by_average_norm(grad, bound / 9) for grad in grads if grad is not None]
    written = [*own, *clipped, *single, np.float64(norm), np.float64(told)]
    held, peak = nc.clip_by_global_norm(own, bound / 9, ord=math.inf, out=own if in_place else None)
    written += [*own, *held, np.float64(peak), np.float64(nc.global_norm(own, math.inf))]
    parts = copied(grads)
    nested = {"a": [tuple(parts[1:])], "b": parts[0]}
    inner, joint = nc.clip_by_global_norm(nested, bound, out=nested if in_place else None)
    assert type(inner["a"][0]) is tuple
    written += [*parts, *inner["a"][0], inner["b"], np.float64(joint)]
    for order, policy in ((1, "zero"), (1.5, "skip"), (2, "zero"), (2, "skip"), (math.inf, "zero")):
        own = copied(grads)
        how = {"ord": order, "nonfinite": policy, "out": own if in_place else None}
        held, joint = nc.clip_by_global_norm(own, bound / 9, **how)
        written += [*own, *held, np.float64(joint), np.float64(nc.global_norm(own, order))]
    own = copied(grads)
    held, _ = nc.clip_by_global_norm(own, bound, 2 * bound, out=own if in_place else None)
    each = nc.clip_by_norm(held, bound / 9)
    written += [*held, *each, *(nc.clip_by_block_rms(own, bound / 9)), *clamped(own, in_place)]
    return [None if array is None else np.asarray(array).tobytes() for array in written]


def clamped(grads: Grads, in_place: bool) -> list[Any]:
    """The real ones, held between two bounds."""
    real = [grad for grad in grads if grad is not None and grad.dtype.kind != "c"]
    return [nc.clip_by_value(grad, -0.5, 1e10, out=grad if in_place else None) for grad in real]


def same_both_ways(grads: Grads, bound: float) -> None:
    for in_place in (True, False):
        taken = results(grads, bound, in_place=in_place)
        with pytest.MonkeyPatch.context() as patch:
            general(patch)
            assert results(grads, bound, in_place=in_place) == taken


@st.composite
def of_any_dtypes(draw: st.DrawFn) -> Grads:
    """Gradients of one dtype or several, some strided, reversed or misaligned."""
    name = draw(names | st.none())
    grads = draw(st.lists(gradients(name) | st.none(), min_size=1, max_size=5))
    for k in range(len(grads)):
        if grads[k] is not None and draw(st.integers(0, 3)) == 0:
            grads[k] = LAYOUTS[draw(st.sampled_from(ODD))](grads[k])
    return grads


@given(of_any_dtypes(), st.sampled_from([0.0, 1e-300, 1e-42, 0.9, 1.0, 3.0, math.inf]))
def test_any_values(grads, ratio):
    norm = nc.global_norm(grads)
    same_both_ways(grads, min(norm, 1e300) * ratio if norm and ratio else ratio)


@pytest.mark.jit_only
@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_about_blocks_and_chunks(dtype):
    rng = np.random.default_rng(3)
    lengths = [0, 1, 63, 64, 65, 255, 256, 257, 1024, 1025, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK]
    for length in lengths:
        grads = [normal(rng, (length,), dtype), normal(rng, (5,), dtype)]
        same_both_ways(grads, 0.5 * nc.global_norm(grads))
    same_both_ways([normal(rng, (n,), dtype) for n in rng.integers(0, 40_000, 70)], 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_plain_is_taken(dtype):
    rng = np.random.default_rng(4)
    for grads in (
        [normal(rng, (3, 4), dtype), None, normal(rng, (), dtype), normal(rng, (0, 2), dtype)],
        [np.asfortranarray(normal(rng, (3, 4), dtype))],
        [normal(rng, (7,), dtype) for _ in range(300)],
    ):
        assert plain.global_norm(grads) == nc.global_norm(grads)
        peak = plain.global_norm(grads, math.inf)
        if dtype.startswith("complex"):
            assert peak is None
        else:
            assert peak == max(float(np.abs(g).max()) for g in grads if g is not None and g.size)
        for bound in (1e-3, 1e3):
            result, norm = plain.clip_by_global_norm(tuple(copied(grads)), bound, None)
            assert norm == nc.global_norm(grads)
            assert [None if r is None else r.flags.f_contiguous for r in result] == [
                None if g is None else g.flags.f_contiguous for g in grads
            ]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_first_dtype_met_may_be_another_object(monkeypatch, dtype):
    monkeypatch.setattr(plain_arrays, "_KINDS", {})
    grad = normal(np.random.default_rng(5), (6,), dtype)
    unpickled = pickle.loads(pickle.dumps(grad))
    noted = grad.astype(np.dtype(grad.dtype, metadata={"unit": "m"}))
    for odd in (unpickled, noted, grad):
        assert nc.global_norm([odd]) == nc.global_norm([grad])
    assert plain.global_norm([grad]) == nc.global_norm([grad])


def test_dtype_objects_that_are_equal_are_taken_together():
    for dtype in DTYPES:
        grad = normal(np.random.default_rng(5), (6,), dtype)
        unpickled = pickle.loads(pickle.dumps([grad, grad.copy()]))
        noted = grad.astype(np.dtype(grad.dtype, metadata={"unit": "m"}))
        same = [grad.copy() for _ in range(4)]
        grads = [grad, *unpickled, noted]
        assert plain.global_norm(grads) == plain.global_norm(same)
        other = np.ones(3, np.float32 if np.dtype(dtype) != np.float32 else np.float64)
        assert plain.global_norm([other, *unpickled]) == plain.global_norm([other, *same[:2]])
        for both in (grads, same):
            assert plain.clip_by_global_norm(both, 1e-2, both) is not None
        for found, one in zip(grads, same, strict=True):
            assert_same_bits(np.array(found), one)


class Subclass(np.ndarray):
    pass


@pytest.mark.parametrize(
    "odd",
    [
        LAYOUTS["byte_swapped"],
        lambda x: x.view(Subclass),
        lambda x: np.ma.array(x),
        lambda x: x.astype(np.int64),
        lambda x: x.astype(object),
        lambda x: x.tolist(),
        lambda _: 3.0,
        lambda x: nc.IndexedSlices(x, np.arange(len(x)), x.shape),
    ],
)
def test_what_is_odd_is_left_alone(odd):
    first = np.ones((4, 6), np.float32)
    grads = [first, odd(np.ones((4, 6), np.float32))]
    assert plain.global_norm(grads) is None
    assert plain.clip_by_global_norm(grads, 1.0, grads) is None
    assert plain.global_norm(grads[::-1]) is None
    np.testing.assert_array_equal(first, 1)


@pytest.mark.parametrize("shape", [(), (5, 1), (0, 3), (3, 4, 2)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_steps_of_any_kind_are_followed(dtype, shape):
    rng = np.random.default_rng(2)
    big = normal(rng, tuple(2 * n + 1 for n in shape), dtype)
    first, second = (big[(..., *(slice(k, k + 2 * n, 2) for n in shape))] for k in (0, 1))
    turned = np.moveaxis(normal(rng, (4, 3, 2), dtype), 0, 1)
    grads = [first.T, turned, LAYOUTS["misaligned"](first), np.broadcast_to(first, (2, *shape))]
    contiguous = [grad.copy("K" if grad is turned else "C") for grad in grads]
    assert plain.global_norm(grads) == nc.global_norm(contiguous)
    assert plain.clip_by_global_norm(grads, 1e-3, grads) is None  # as elements share memory
    own = [grads[0], grads[1], second] if shape else grads[:2]
    expected, _ = nc.clip_by_global_norm(
        [grad.copy("K" if grad is turned else "C") for grad in own], 1e-3
    )
    taken = plain.clip_by_global_norm(own, 1e-3, own)
    assert (taken is None) == (len(own) == 3 and second.size > 0)  # whose extents overlap
    nc.clip_by_global_norm(own, 1e-3, out=own)
    for grad, wanted in zip(own, expected, strict=True):
        assert_same_bits(grad, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_much_of_one_dtype_has_the_bits_of_little(monkeypatch, dtype):
    rng = np.random.default_rng(8)
    grads = [normal(rng, (30, 4), dtype), None, normal(rng, (7,), dtype)]
    little_of_it = results(grads, 2.0, in_place=False), results(grads, 2.0, in_place=True)
    for module in (plain, little):  # what is compiled does not see this
        monkeypatch.setattr(module, "PARALLEL_BYTES", 8)
    assert results(grads, 2.0, in_place=False) == little_of_it[0]
    assert results(grads, 2.0, in_place=True) == little_of_it[1]


def test_strided_arrays_are_brought_back_where_they_were_written():
    for ord in (2.0, 1.0):
        grads = [np.ones((4, 6))[:, ::2], np.full((4, 6), 1e-3)[:, ::2]]
        assert plain.clip_each(grads, 0.5, grads, ord, 0) is not None
        assert (grads[1] == 1e-3).all()
        assert 0.49 < nc.global_norm(grads[:1], ord) <= 0.5
    odd = [np.ones((4, 6))[:, ::2]]
    assert plain.clamp(odd, -0.5, 0.5, odd)[0] is odd[0]
    assert (odd[0] == 0.5).all()
    twice = np.lib.stride_tricks.as_strided(np.ones(9), (3, 3), (16, 8))
    assert plain.clip_each([twice], 0.5, [twice], 2.0, 0) is None  # whose rows overlap
    with pytest.raises(ValueError, match="distinct elements"):
        nc.clip_by_norm(twice, 0.5, out=twice)


def overlapping() -> dict[str, Grads]:
    base = np.ones(100, np.float32)
    return {
        "one array twice": [base, np.ones(3, np.float32), base],
        "one array twice among many": [*(np.ones(2, np.float32) for _ in range(99)), base, base],
        "views": [base[:60], base[50:]],
        "a view and its base": [base[3:5], base],
        "views among many": [base[k : k + 2] for k in range(90)],
    }


@pytest.mark.parametrize("name", overlapping())
def test_overlaps_are_refused(name):
    grads = overlapping()[name]
    for ord in (2, math.inf):
        with pytest.raises(ValueError, match="shares memory with"):
            nc.clip_by_global_norm(grads, 1e-3, ord=ord, out=grads)
    assert all((grad == 1).all() for grad in grads)
    assert nc.global_norm(grads) == math.sqrt(sum(grad.size for grad in grads))


def test_views_apart_are_taken():
    base = np.ones(1000, np.float32)
    grads = [base[k : k + 10] for k in np.random.default_rng(1).permutation(100) * 10]
    assert plain.clip_by_global_norm(grads, 1.0, grads) is not None
    assert np.unique(base).size == 1
    assert nc.global_norm(grads) <= 1.0


def test_other_arrays_are_written_where_each_is_like_its_gradient():
    x, y, u, v = (np.ones(3, np.float32) for _ in range(4))
    for grads, out in (
        (x, u),
        ([x, y], [u, v]),
        ((x, None), (u, None)),
        ({"a": x, "b": y}, {"a": u, "b": v}),
    ):
        found = outs.of(grads, out)
        assert all(map(operator.is_, found, nests.items_of(out) or (out,)))
        written = outs.filled(found, grads)
        assert type(written) is type(out)
        assert all(map(operator.is_, found, nests.items_of(written) or (written,)))
        u[:] = v[:] = 7.0
        assert type(nc.clip_by_norm(grads, 1.0, out=out)) is type(out)
        assert nc.global_norm([u]) == pytest.approx(1.0)
    assert x.tolist() == y.tolist() == [1, 1, 1]
    read_only = LAYOUTS["read_only"](u)
    wide, long, steps = np.ones(3), np.ones(4, np.float32), np.ones(6, np.float32)[::2]
    for grads, out in (
        ([x], (u,)),
        ([], []),
        ([x, y], [u]),
        ([x], [u, v]),
        ({"a": x, "b": y}, {"b": u, "a": v}),
        ([x, y], [u, None]),
        ([x, None], [u, v]),
        ([x, y], [u, u]),
        ([x, y], [u, x]),
        *(([x, y], [u, other]) for other in (read_only, wide, long, steps, [v])),
    ):
        assert outs.of(grads, out) is None
        assert not outs.takes(grads, out)
    assert outs.of([x], [u], [u]) is None
    assert outs.of([x], [u], [y]) is not None
    much = np.ones(PARALLEL_BYTES // 4, np.float32)
    assert outs.of([much], [much.copy()]) is None
    assert outs.takes([x, y], [x, y])
    assert outs.takes({"a": x}, {"a": x})
    assert not outs.takes({"a": x}, {"b": x})


def test_nests_are_opened_and_closed():
    a, b, c = (np.ones(3) for _ in range(3))
    nested = [{"w": a, "b": None}, (b, [c, ()])]
    items, nest = nests.taken(nested)
    assert all(map(operator.is_, items, (a, None, b, c)))
    assert nests.rebuilt(nest, (1, None, 3, 4), None) == [{"w": 1, "b": None}, (3, [4, ()])]
    holds_itself = [[a]]
    holds_itself[0].append(holds_itself)
    for odd in ([[a], 3.0], [[a], a.view(np.matrix)], {"k": [[3.0], a]}, holds_itself, 3.0, a, []):
        assert nests.taken(odd)[0] == ()
    middle = {"k": a, "l": [b], "m": c}
    assert nests.is_nest(nests.items_of(middle))
    assert nests.taken(middle)[0][1] is middle["l"]
    assert all(map(operator.is_, nests.taken(middle, is_nested=True)[0], (a, b, c)))
    for flat in ((a, None), [a, None], {"k": a, "l": None}):
        items, held = nests.taken(flat)
        assert all(map(operator.is_, items, (a, None)))
        made = nests.rebuilt(held, (1, 2), None)
        assert made == ({"k": 1, "l": 2} if type(flat) is dict else type(flat)((1, 2)))
        assert type(made) is type(flat)
    assert held is not flat  # another thread may change its keys
    assert nests.rebuilt(held, (a, None), flat) is held


def test_read_only_arrays_are_refused_in_place_only():
    grads = [LAYOUTS["read_only"](np.ones(4, np.float32))]
    with pytest.raises(ValueError, match="writeable"):
        nc.clip_by_global_norm(grads, 1.0, out=grads)
    assert plain.clip_by_global_norm(grads, 1.0, None)[1] == 2.0


def test_arrays_that_are_only_read_need_no_code_of_their_own(monkeypatch):
    monkeypatch.setattr(plain_units, "PARALLEL_BYTES", 8)
    rows = np.arange(12.0).reshape(3, 4)
    expected = nc.clip_by_norm(rows, 1.0, 1)
    known = list(getattr(unit_loops.row_squares, "signatures", ()))
    clipped = nc.clip_by_norm(LAYOUTS["read_only"](rows), 1.0, 1)
    assert clipped.flags.writeable
    assert_same_bits(clipped, expected)
    assert list(getattr(unit_loops.row_squares, "signatures", ())) == known


@pytest.mark.parametrize("field", ["DATA", "NDIM", "SHAPE", "STRIDES", "DESCR", "FLAGS", "KIND"])
def test_another_layout_is_noticed(monkeypatch, field):
    assert arrays.layout_holds()
    others = [arrays.DATA, arrays.SHAPE, arrays.STRIDES]  # of a pointer each
    for offset in set(others) - {getattr(arrays, field)}:
        monkeypatch.setattr(arrays, field, offset)
        assert not arrays.layout_holds()


def test_other_pythons_are_noticed(monkeypatch):
    monkeypatch.setattr(arrays.platform, "python_implementation", lambda: "PyPy")
    assert not arrays.layout_holds()


@pytest.mark.jit_only
def test_a_list_that_changes_meanwhile(tries):
    rng = np.random.default_rng(0)
    grads = [normal(rng, (50,)) for _ in range(200)]
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for k in range(200):
                grads[k] = np.ones(50 + k % 3, np.float32)

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(tries(2000)):
            assert 0 < nc.global_norm(grads) < 1000
            clipped, _ = nc.clip_by_global_norm(grads, 1e-3)
            assert nc.global_norm(clipped) <= 1e-3
    finally:
        stop.set()
        thread.join()


@pytest.mark.jit_only
def test_a_dict_that_changes_meanwhile(tries):
    grads = {k: np.ones(50, np.float32) for k in range(200)}
    stop = threading.Event()

    def replace() -> None:
        while not stop.is_set():
            for k in range(200, 400):
                grads[k] = np.ones(50, np.float32)
            for k in range(200, 400):
                del grads[k]

    thread = threading.Thread(target=replace)
    thread.start()
    try:
        for _ in range(tries(1000)):
            for out in (None, grads):
                clipped, _ = nc.clip_by_global_norm(grads, 1e-3, out=out)
                assert clipped is not grads
                assert 200 <= len(clipped) <= 400
                assert nc.global_norm(clipped) <= 1e-3
    finally:
        stop.set()
        thread.join()


def test_much_that_takes_no_memory_is_not_taken_for_little():
    """Four times 2**62 bytes are none, counted in 64 bits."""
    huge = np.broadcast_to(np.float32(1.0), (2**60,))
    with pytest.raises(MemoryError):
        nc.global_norm([huge] * 4)


@pytest.mark.full
@pytest.mark.parametrize("dtype", ["float32", "float64", "bfloat16", "complex64"])
@pytest.mark.parametrize("layout", sorted(set(LAYOUTS) - {"byte_swapped"}))
@pytest.mark.parametrize("axes", [(0,), (1,), (0, 1)], ids=str)
def test_units_of_arrays_in_any_order_are_clipped_by_way_of_copies(layout, dtype, axes):
    """With the bits, and in the memory, of the general way."""
    make, rng = LAYOUTS[layout], np.random.default_rng(0)
    every = [make(normal(rng, (13, 11), DTYPES[dtype])) for _ in range(3)]
    grads, params = every[:2], make(every[2])
    for bound in (0.5, 1e30, 0.0):
        wanted = [parts.clip_by_norm(grad, bound, axes, 2.0, None) for grad in grads]
        found = plain_units.clip([*grads, None], bound, axes, arguments.axes_of, None)
        relative = parts.adaptive_clip(grads[0], params, bound, 1e-3, axes, None)
        told = arguments.adaptive_axes, None, params, 1e-3
        owned = plain_units.clip(grads[0], bound, axes, *told)
        if found is None:  # complex columns
            assert dtype == "complex64"
            continue
        for a, b in zip([*found[:2], owned], [*wanted, relative], strict=True):
            assert_same_bits(a, b)
            assert a.strides == b.strides
        if layout == "fortran":
            held = [grad.copy("F") for grad in grads]
            done = plain_units.clip(held, bound, axes, arguments.axes_of, held)
            assert all(a is b for a, b in zip(done, held, strict=True))
            for a, b in zip(held, wanted, strict=True):
                assert_same_bits(a, b)

"""Optimizers: their state, threads, arrays of the user's own, arguments that do not fit."""

import copy
import functools
import itertools
import math
import pickle

import numpy as np
import pytest

import numclip as nc
import numclip.host.given
import numclip.host.updates
from numclip.clipping import array_updating
from tests.oracle.cases import fortran, normal, slices, strided
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import ROWS, frozen, grads_of, snapshot
from tests.oracle.plain_optim import initial, kinds, made, two_groups
from tests.oracle.races import errors_of_race
from tests.oracle.reference import DTYPES

# ---- state and threads


@kinds
@pytest.mark.parametrize("by_file", [False, True])
def test_a_restored_state_goes_on_with_the_same_bits(tmp_path, kind, by_file):
    whole, restored = two_groups("skip"), two_groups("skip")
    first, second = (made(kind, groups)[0] for groups in (whole, restored))

    def advance(groups, optimizer, steps):
        for step in steps:
            groups.set_grads(grads_of(groups, step))
            if step == 3:
                groups.grads["b"][0] = math.nan
            optimizer.step()

    advance(whole, first, range(6))
    if by_file:
        for saved, loaded, name in ((whole, restored, "groups"), (first, second, "optimizer")):
            saved.save(tmp_path / name)
            loaded.load(tmp_path / name)
    else:
        restored.load_state_dict(whole.state_dict())
        second.load_state_dict(first.state_dict())
    for groups, optimizer in ((whole, first), (restored, second)):
        advance(groups, optimizer, range(6, 12))
    assert snapshot(restored) == snapshot(whole)
    assert frozen(second.state_dict()) == frozen(first.state_dict())


def test_states_that_do_not_fit_change_nothing(tmp_path):
    groups = two_groups()
    optimizer = nc.SGD(groups, 0.1, momentum=0.9)
    groups.set_grads(grads_of(groups))
    optimizer.step()
    before = frozen(optimizer.state_dict())
    state = optimizer.state_dict()
    negative = {**state, "groups": {**state["groups"], "last": {**state["groups"]["last"]}}}
    negative["groups"]["last"]["steps"] = -1
    other = nc.ParamGroups([nc.Group("first", initial("float32"))])
    for wrong in (
        negative,
        {},
        {**state, "more": 1},
        {**state, "optimizer": "Adam"},
        nc.Adam(groups).state_dict(),
        nc.SGD(groups, 0.1).state_dict(),
        nc.SGD(other, 0.1, momentum=0.9).state_dict(),
        groups.state_dict(),
    ):
        with pytest.raises(nc.StateError):
            optimizer.load_state_dict(wrong)
        with pytest.raises(TypeError, match="state_dict: expected a mapping, got list"):
            optimizer.load_state_dict([wrong])
        assert frozen(optimizer.state_dict()) == before
    optimizer.save(tmp_path / "state")
    content = (tmp_path / "state").read_bytes()
    (tmp_path / "state").write_bytes(content[:-7])
    with pytest.raises(nc.StateError, match="state"):
        optimizer.load(tmp_path / "state")
    assert frozen(optimizer.state_dict()) == before


@pytest.mark.jit_only
@kinds
def test_threads_leave_the_bits_alone(kind):
    rng = np.random.default_rng(5)
    start = {"w": normal(rng, (700, 1001)), "h": normal(rng, (300_000,), "float16")}
    table = {"e": normal(rng, (5000, 64))}
    results = []
    try:
        for threads in (1, 2, 5):
            nc.set_num_threads(threads)
            members = [
                nc.Group("g", start, clip=nc.ByGlobalNorm(1.0)),
                nc.Group("rows", table, clip=nc.ByNorm(1.0), sparse=True),
            ]
            groups = nc.ParamGroups(members)
            optimizer, _ = made(kind, groups)
            rng = np.random.default_rng(6)
            for _ in range(2):
                grads = {name: normal(rng, p.shape, p.dtype) for name, p in start.items()}
                grads["e"] = slices(rng, 3000, (5000, 64), repeated=True)
                groups.set_grads(grads)
                optimizer.step()
            results.append((frozen(groups.params), frozen(optimizer.state_dict())))
    finally:
        nc.set_num_threads(None)
    assert results[0] == results[1] == results[2]


# ---- arrays of the user's own


@kinds
def test_own_arrays_are_updated_as_groups_are(kind):
    start = {f"{d}-{n}": p for d in DTYPES for n, p in initial(d).items()}
    groups = nc.ParamGroups(
        [nc.Group("g", start), nc.Group("rows", {"e": np.ones(ROWS)}, sparse=True)]
    )
    managed, _ = made(kind, groups)
    optimizer, _ = made(kind, None)
    variables = {name: param.copy() for name, param in groups.params.items()}
    for step in range(4):
        grads = grads_of(groups, step)
        groups.set_grads(grads)
        managed.step()
        layout = [fortran, np.array, strided][step % 3]
        pairs = [
            (grad if name == "e" or not grad.ndim else layout(grad), variables[name])
            for name, grad in grads.items()
        ]
        unused = np.ones(3)
        optimizer.apply_gradients(iter([*pairs[::-1], (None, unused)]))
        assert unused.tolist() == [1, 1, 1]
    for name, variable in variables.items():
        assert_same_bits(variable, groups.params[name])


def read_only(array):
    array.flags.writeable = False
    return array


@pytest.mark.parametrize(
    ("grad", "variable", "message"),
    [
        (np.ones(2), np.ones(3), r"\[1\]: .*shape \(3,\)"),
        (np.ones(3, complex), np.ones(3), r"\[1\]: .*float64.*complex128"),
        (np.ones(3, int), np.ones(3), r"\[1\].*int64"),
        (np.ones(3), [1.0, 2.0, 3.0], r"\[1\]: .*list"),
        (np.ones(3), np.ones(6)[::2], r"\[1\]: .*contiguous"),
        (np.ones(3), read_only(np.ones(3)), r"\[1\]: .*read-only"),
        (nc.IndexedSlices(np.ones((1, 3)), [0], (4, 3)), np.ones((5, 3)), r"\[1\]: .*\(5, 3\)"),
    ],
)
def test_pairs_that_do_not_fit_change_nothing(grad, variable, message):
    optimizer, first = nc.SGD(None, 0.1, momentum=0.9), np.ones(3)
    with pytest.raises((TypeError, ValueError), match=message):
        optimizer.apply_gradients([(np.ones(3), first), (grad, variable)])
    assert first.tolist() == [1, 1, 1]
    optimizer.apply_gradients([(np.ones(3), first)])
    np.testing.assert_allclose(first, 0.9)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda g: nc.SGD(g, -0.1), "lr: expected a finite number >= 0, got -0.1"),
        (lambda g: nc.SGD(g, math.inf), "lr: .*inf"),
        (lambda g: nc.SGD(g, "fast"), "lr: .*fast"),
        (lambda g: nc.SGD(g, 0.1, momentum=-1), "momentum: .*-1"),
        (lambda g: nc.SGD(g, 0.1, nesterov=True), "momentum: .*nesterov"),
        (lambda g: nc.SGD(g, 0.1, weight_decay=math.nan), "weight_decay: .*nan"),
        (lambda g: nc.Adam(g, betas=(0.9, 1.0)), r"betas: .*1\.0"),
        (lambda g: nc.Adam(g, betas=0.9), "betas: .*0.9"),
        (lambda g: nc.Adam(g, eps=-1e-8), "eps: .*-1e-08"),
        (lambda g: nc.Adam(g, weight_decay=-1), "weight_decay: .*-1"),
        (lambda g: nc.SGD([g], 0.1), "groups: .*list"),
        (lambda _: nc.SGD(None, 0.1).step(), "groups: "),
    ],
)
def test_arguments_that_do_not_fit_are_named(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make(two_groups())


@pytest.mark.filterwarnings("ignore:Setting the dtype:DeprecationWarning")  # of NumPy 2.5
def test_an_array_that_changed_gets_new_states():
    optimizer = nc.SGD(None, lr=0.5, momentum=0.5)
    variable = np.ones(4)
    optimizer.apply_gradients([(np.ones(4), variable)])
    variable.dtype = np.float32
    variable[:] = 1
    optimizer.apply_gradients([(np.ones(8, np.float32), variable)])
    assert variable.tolist() == [0.5] * 8


@kinds
def test_views_made_anew_find_the_states_of_their_memory(kind):
    flat, parts = np.ones(12, np.float32), [np.ones((2, 3), np.float32), np.ones(6, np.float32)]
    fresh, kept = made(kind, None)[0], made(kind, None)[0]
    rng = np.random.default_rng(0)
    for step in range(4):
        grads = [normal(rng, part.shape, np.float32) for part in parts]
        views = flat[:6].reshape(2, 3), flat[6:] if step % 2 else flat[6:].reshape(6)
        fresh.apply_gradients(zip(grads, views, strict=True))
        kept.apply_gradients(zip(grads, parts, strict=True))
    assert_same_bits(flat, np.concatenate([part.ravel() for part in parts]))
    assert len(fresh._arrays._known) == 2


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize("dtype", DTYPES)
def test_plain_arrays_are_updated_as_others_are(kind, dtype):
    shapes = (5, 3), (40_000,), (), (0, 2)
    rng = np.random.default_rng(1)
    plain = [normal(rng, shape, dtype) for shape in shapes]
    other = [array.copy() for array in plain]
    one, two = made(kind, None)[0], made(kind, None)[0]
    for _ in range(3):
        grads = [normal(rng, shape, dtype) for shape in shapes]
        one.apply_gradients(zip(grads, plain, strict=True))
        wide = [np.stack([grad, grad], -1)[..., 0] if grad.ndim else grad for grad in grads]
        two.apply_gradients(zip(wide, other, strict=True))
        assert len(one._arrays._known) == 3  # nothing is kept for no elements
    for mine, theirs in zip(plain, other, strict=True):
        assert_same_bits(mine, theirs)


def test_nothing_is_kept_of_arrays_whose_memory_is_given_back():
    optimizer = nc.SGD(None, lr=1.0, momentum=0.5)
    for _ in range(50):  # a new array is often where the one before it was
        variable = np.zeros(4)
        optimizer.apply_gradients([(np.ones(4), variable)])
        assert variable.tolist() == [-1.0] * 4
        del variable
    assert len(optimizer._arrays._known) <= 1


@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_gradients_of_other_dtypes_are_cast_as_groups_cast_them(dtype):
    grads = normal(np.random.default_rng(2), (7,), dtype), np.full(3, 0.1, dtype)
    variables = np.ones(7, np.float32), np.ones(3, np.float16)
    groups = nc.ParamGroups([nc.Group("g", {"a": variables[0], "b": variables[1]})])
    groups.set_grads({"a": grads[0], "b": grads[1]})
    nc.SGD(groups, 0.5).step()
    nc.SGD(None, 0.5).apply_gradients(zip(grads, variables, strict=True))
    for variable, wanted in zip(variables, groups.params.values(), strict=True):
        assert_same_bits(variable, wanted)


class Other(np.ndarray):
    """Another kind of array, which is taken the general way."""


def test_plans_that_are_known_read_the_gradients_of_the_call():
    first, second, variable = np.ones(3), np.full(3, 100.0), np.zeros(3)
    optimizer = nc.SGD(None, 1.0)
    for grad in (first, second):
        optimizer.apply_gradients([(grad, variable)])
    variable[:] = 0
    optimizer.apply_gradients([(first, variable), (first, variable)])
    assert variable.tolist() == [-2.0] * 3
    optimizer.apply_gradients([(first.view(Other), variable)])
    assert variable.tolist() == [-3.0] * 3
    for _ in range(2):
        optimizer.apply_gradients([(first, variable), (second, variable)])
    assert variable.tolist() == [-205.0] * 3


def test_sets_of_arrays_that_take_turns_are_not_described_again(monkeypatch):
    rng = np.random.default_rng(3)
    first = [((2, 3), "float32"), ((40_000,), "float64"), ((), "float16"), ((0, 2), "float32")]
    shapes = [first, [((5,), "float32")]]
    sets = [[np.asarray(normal(rng, *own)) for own in arrays] for arrays in shapes]
    others = [[array.copy() for array in arrays] for arrays in sets]
    one, two = nc.Adam(None, 0.1), nc.Adam(None, 0.1)
    for step in range(5):
        for own, arrays, other in zip(shapes, sets, others, strict=True):
            grads = [np.asarray(normal(rng, *wanted)) for wanted in own]
            two.apply_gradients([(g.view(Other), a) for g, a in zip(grads, other, strict=True)])
            with monkeypatch.context() as context:
                if step > 1:  # a new set may be where another one was
                    context.setattr(array_updating, "describe", None)
                if step == 2:
                    grads = pickle.loads(pickle.dumps(grads))  # have dtype objects of their own
                one.apply_gradients(zip(grads, [array[...] for array in arrays], strict=True))
            for mine, theirs in zip(arrays, other, strict=True):
                assert_same_bits(mine, theirs)


def test_what_changed_of_arrays_that_are_known_is_seen():
    variable, grad = np.ones(4), np.ones(4)
    memory = np.zeros(6)
    shifted = memory[2:]
    optimizer = nc.SGD(None, 1.0)
    for own in (variable, shifted, variable):  # what is new lets all be described again
        optimizer.apply_gradients([(grad, own)])
    for wrong in (np.ones(5), np.ones(4, complex), [1.0] * 4):
        with pytest.raises((TypeError, ValueError), match="grads_and_vars"):
            optimizer.apply_gradients([(wrong, variable)])
    with pytest.raises(TypeError, match=r"grads_and_vars: expected pairs .* got float"):
        optimizer.apply_gradients(3.0)
    memory[:] = range(6)
    optimizer.apply_gradients([(memory[:4], shifted)])
    assert memory.tolist() == [0.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    for wrong in ((grad,), grad, None, 3.0, "abc"):
        with pytest.raises(TypeError, match=r"grads_and_vars\[1\]: .*a pair"):
            optimizer.apply_gradients([(grad, variable), wrong])
    with pytest.raises(TypeError, match=r"\[1\].*int64"):
        optimizer.apply_gradients([(grad, variable), (np.ones(0, int), np.ones(0))])
    variable.flags.writeable = False
    with pytest.raises(ValueError, match="read-only"):
        optimizer.apply_gradients([(grad, variable)])
    assert variable.tolist() == [-1.0] * 4


@pytest.mark.parametrize("size", [9, pytest.param(2_000_001, marks=pytest.mark.full)])
@pytest.mark.parametrize("shift", [1, -1])
def test_gradients_are_read_before_what_they_overlap_is_written(size, shift):
    memory = np.arange(float(size))
    grad, variable = (memory[:-1], memory[1:])[::shift]
    wanted = variable - 0.5 * grad
    nc.SGD(None, 0.5).apply_gradients([(grad, variable)])
    assert_same_bits(variable, wanted)
    first, second = np.ones(3), np.full(3, 2.0)
    nc.SGD(None, 0.5).apply_gradients([(second, first), (first, second)])
    assert (first.tolist(), second.tolist()) == ([0.0] * 3, [1.5] * 3)
    nc.SGD(None, 0.5).apply_gradients([(second, second)])
    assert second.tolist() == [0.75] * 3
    grad, first, second = np.ones(3), np.ones(3), np.ones(3)
    for given in first, first[::-1], second:  # as it was, though updated before
        first[:] = second[:] = 1
        nc.SGD(None, 0.5).apply_gradients([(grad, first), (grad, second), (given, first)])
        assert (first.tolist(), second.tolist()) == ([0.0] * 3, [0.5] * 3)

    memory, array, optimizer = np.zeros(6), np.zeros(1), nc.SGD(None, 1.0)
    pairs = [(np.ones(4), memory[:4]), (np.ones(1), array), (np.ones(1), array)]
    with pytest.raises(ValueError, match=r"\[3\].*shares memory with.*\[0\]"):
        optimizer.apply_gradients([*pairs, (np.ones(4), memory[2:])])
    assert (memory.any(), array.any()) == (False, False)


def test_rates_may_apply_gradients_and_threads_may_share_an_optimizer():
    others = [1]

    def rate(step):
        if step in others:
            others.remove(step)
            optimizer.apply_gradients([(np.full(3, 0.5), array)])
        return 1.0

    array = np.zeros(3)
    optimizer = nc.SGD(None, rate)
    for _ in range(2):
        optimizer.apply_gradients([(np.ones(3), array)])
    assert array.tolist() == [-2.5] * 3

    shared, arrays = nc.SGD(None, 1.0), [np.zeros(5) for _ in range(4)]

    def work(own):
        for _ in range(400):
            shared.apply_gradients([(np.ones(5), own)])

    assert errors_of_race([functools.partial(work, own) for own in arrays]) == []
    assert [own.tolist() for own in arrays] == [[-400.0] * 5] * 4


def test_optimizers_are_not_copied():
    with pytest.raises(TypeError, match="load_state_dict"):
        copy.deepcopy(nc.SGD(None, lr=0.5))


@pytest.mark.parametrize(
    ("dtype", "size", "bound"), [("f", 2e38, 1e-6), ("f", 2e38, 1e-8), ("d", 1e300, 1e-25)]
)
def test_factors_that_are_subnormal(dtype, size, bound, monkeypatch):
    sizes = {"w": np.full(4, size), "zeros": np.zeros(3), "x": np.full(2, size), "0": np.zeros(1)}
    grads = {name: grad.astype(dtype) for name, grad in sizes.items()}

    def made(rule):
        params = {name: np.zeros_like(grad) for name, grad in grads.items()}
        groups = nc.ParamGroups([nc.Group("g", params, clip=rule)])
        groups.set_grads(grads)
        return groups

    for much, rule in itertools.product([False, True], [nc.ByGlobalNorm(bound), nc.ByNorm(bound)]):
        for module in (nc.host.given, nc.host.updates) if much else ():  # read in place
            monkeypatch.setattr(module, "PARALLEL_BYTES", 0)
        clipped = made(rule)
        clipped.clip()
        assert clipped.grads["w"].all()
        turned = {name: np.flip(grad) for name, grad in grads.items()}
        for given in (None, grads, turned):
            optimizer = nc.SGD(stepped := made(rule), lr=1.0)
            if given is not None:
                stepped.zero_grads()
            optimizer.step(given)
            for name, param in stepped.params.items():
                assert (-param).tolist() == clipped.grads[name].tolist()


def test_gradients_can_change_places():
    groups = nc.ParamGroups([nc.Group("g", {"a": np.ones(2), "b": np.ones(2)})])
    groups.set_grads({"a": np.full(2, 1.0), "b": np.full(2, 2.0)})
    groups.set_grads({"a": groups.grads["b"], "b": groups.grads["a"]})
    assert (groups.grads["a"].tolist(), groups.grads["b"].tolist()) == ([2.0, 2.0], [1.0, 1.0])

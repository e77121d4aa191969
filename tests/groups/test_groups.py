"""Parameter groups: buffers, gradients in and out, state, memory, sequences of operations."""

import math
import re
import tracemalloc

import numpy as np
import pytest

import numclip as nc
from tests.oracle.cases import fortran, normal, slices, strided
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import ROWS, grads_of, params_of, snapshot
from tests.oracle.reference import DTYPES

# ---- buffers and names


def test_views_lie_in_aligned_flat_buffers():
    tensors = {f"{name}-{d}": a for d in DTYPES for name, a in params_of(d).items()}
    tensors["fortran"] = fortran(normal(np.random.default_rng(3), (4, 3)))
    tensors["swapped"] = np.arange(3.0).astype(">f8")
    groups = nc.ParamGroups([nc.Group("g", tensors), nc.Group("other", {"x": np.ones(3)})])
    for flats, views in (
        (groups["g"].flat_params, groups.params),
        (groups["g"].flat_grads, groups.grads),
    ):
        assert set(flats) == set(DTYPES)
        for dtype, flat in flats.items():
            assert flat.ndim == 1
            assert flat.ctypes.data % 64 == 0
            members = [views[n] for n, t in tensors.items() if t.dtype.name == dtype]
            assert flat.size == sum(member.size for member in members)
            assert all(np.shares_memory(flat, m) or not m.size for m in members)
            flat[...] = np.arange(flat.size) % 100
            joined = np.concatenate([member.ravel() for member in members])
            assert_same_bits(joined, flat)
    assert groups.params["x"].tolist() == [1, 1, 1]
    fresh = nc.ParamGroups([nc.Group("g", tensors)])
    for name, tensor in tensors.items():
        assert not np.shares_memory(fresh.params[name], tensor)
        assert_same_bits(fresh.params[name], tensor.astype(tensor.dtype.newbyteorder("=")))
        assert not fresh.grads[name].any()


def test_names():
    one = nc.Group("g", {"w": np.ones(2)})
    with pytest.raises(ValueError, match=r"'g' appears twice"):
        nc.ParamGroups([one, nc.Group("g", {"v": np.ones(2)})])
    with pytest.raises(ValueError, match=r"'w' is in 'g' and 'h'"):
        nc.ParamGroups([one, nc.Group("h", {"w": np.ones(2)})])
    groups = nc.ParamGroups([one])
    for look_up in (lambda: groups["w"], lambda: groups.grads["v"], lambda: groups.params["v"]):
        with pytest.raises(KeyError, match=r"'[wv]'"):
            look_up()
    for call in (groups.set_grads, groups.accumulate):
        with pytest.raises(KeyError, match=r"'v' is no parameter"):
            call({"w": np.ones(2), "v": np.ones(2)})
    assert groups.grads["w"].tolist() == [0, 0]
    assert list(groups.params) == list(groups.grads) == ["w"]
    assert len(groups) == 1
    assert [group.name for group in groups] == ["g"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": 3}, "name: "),
        ({"params": {}}, "params: "),
        ({"params": {"w": [1.0]}}, r"params\['w'\]: "),
        ({"params": {3: np.ones(2)}}, "params: .*3"),
        ({"params": {"w": np.ones(2, int)}}, r"params\['w'\]: .*int64"),
        ({"clip": 5.0}, "clip: .*5.0"),
        ({"nonfinite": "ignore"}, "nonfinite: .*ignore"),
        ({"lr": -1.0}, "lr: .*-1"),
        ({"lr": math.inf}, "lr: .*inf"),
        ({"sparse": True, "clip": nc.Adaptive()}, "clip: .*Adaptive"),
        ({"sparse": True, "params": {"w": np.array(1.0)}}, "'w'"),
        ({"name": "all"}, "'all'"),
        ({"clip": nc.ByNorm(1.0, axes=1)}, "axes: "),
        ({"clip": nc.ByValue(-1, 1), "params": {"w": np.ones(2, "F")}}, r"\['w'\]: .* complex64"),
    ],
)
def test_groups_that_do_not_fit_are_refused(arguments, message):
    valid = {"name": "g", "params": {"w": np.ones(2)}}
    with pytest.raises((TypeError, ValueError), match=message):
        nc.ParamGroups([nc.Group(**(valid | arguments))])


def test_group_lists_that_do_not_fit_are_refused():
    group = nc.Group("g", {"w": np.ones(2)})
    for wrong, message in (
        ([], "at least one"),
        (None, "groups: expected a sequence of Group objects, got NoneType"),
        ([np.ones(2)], "expected Group"),
        (group, r"got Group; pass \[group\]"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            nc.ParamGroups(wrong)
    groups = nc.ParamGroups([group])
    for number in (-1, 1.5, True):
        with pytest.raises((TypeError, ValueError), match="step: expected an integer >= 0"):
            groups.step = number
    assert groups.step == 0


# ---- setting gradients


def small(sparse_dtype="float32"):
    return nc.ParamGroups(
        [
            nc.Group("dense", {"w": np.ones((2, 3)), "b": np.ones(3, np.float32)}),
            nc.Group("rows", {"e": np.ones(ROWS, DTYPES[sparse_dtype])}, sparse=True),
        ]
    )


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("own", DTYPES)
def test_gradients_are_cast_or_refused(source, own):
    value = normal(np.random.default_rng(4), (4, 3), source)
    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones((4, 3), DTYPES[own])})])
    if DTYPES[source].kind == "c" and DTYPES[own].kind != "c":
        with pytest.raises(TypeError, match=rf"grads\['w'\]: .*{own}.*{source}"):
            groups.set_grads({"w": value})
        return
    if (own, source) == ("float16", "bfloat16"):
        value = value.astype(np.float32)  # neither type holds the other's numbers
    groups.set_grads({"w": strided(value)})
    once = value.astype(DTYPES[own])
    assert_same_bits(groups.grads["w"], once)
    groups.accumulate({"w": fortran(value)})
    np.testing.assert_array_equal(groups.grads["w"], once + once)


def test_setting_accumulating_zeroing():
    groups, rng = small(), np.random.default_rng(5)
    first, second = (slices(rng, n, ROWS, "float64", repeated=True) for n in (4, 3))
    groups.grads["w"] = np.full((2, 3), 2.0)
    groups.grads["b"] += 1
    groups.accumulate({"w": np.ones((2, 3)), "e": first, "b": None})
    groups.accumulate({"e": second})
    assert groups.grads["w"].tolist() == [[3.0] * 3] * 2
    assert groups.grads["b"].tolist() == [1, 1, 1]
    joined = groups.grads["e"]
    wanted = np.concatenate([first.values, second.values]).astype(np.float32)
    assert_same_bits(joined.values, wanted)
    assert joined.indices.tolist() == [*first.indices, *second.indices]
    before = wanted.copy()
    first.values[...] = 0  # copied in
    assert_same_bits(groups.grads["e"].values, before)
    groups.set_grads({"e": second, "w": None})
    assert_same_bits(groups.grads["e"].values, second.values.astype(np.float32))
    assert not groups.grads["w"].any()
    assert groups.grads["b"].tolist() == [1, 1, 1]
    groups.zero_grads()
    assert groups.grads["e"] is None
    assert not groups.grads["b"].any()
    groups.set_grads({"e": None})
    assert groups.clip().groups["rows"].norm == 0.0


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"b": np.ones(4)}, r"grads\['b'\]: expected shape \(3,\), got \(4,\)"),
        ({"b": np.ones(3, complex)}, r"grads\['b'\]: expected dtype float32, got complex128"),
        ({"b": [1.0, 2.0, 3.0]}, r"grads\['b'\]: .*list"),
        ({"b": np.ones(3, int)}, r"grads\['b'\]: .*int64"),
        ({"b": nc.IndexedSlices(np.ones(1), [0], (3,))}, r"grads\['b'\]: expected an array"),
        ({"e": np.ones(ROWS)}, r"grads\['e'\]: expected IndexedSlices"),
        ({"e": nc.IndexedSlices(np.ones((1, 3)), [0], (7, 3))}, r"grads\['e'\]: .*\(7, 3\)"),
        (5, "grads: expected a mapping"),
    ],
)
@pytest.mark.parametrize("method", ["set_grads", "accumulate"])
def test_refused_gradients_change_nothing(method, bad, message):
    groups = small()
    groups.set_grads(grads_of(groups))
    before = snapshot(groups)
    grads = {"w": np.full((2, 3), 9.0), **bad} if isinstance(bad, dict) else bad
    with pytest.raises((TypeError, ValueError), match=message):
        getattr(groups, method)(grads)
    assert snapshot(groups) == before
    with pytest.raises(TypeError, match="cannot be deleted"):
        del groups.grads["w"]


# ---- state


def stateful():
    rules = [nc.AutoClip(40, window=7), nc.ZClip(warmup=3), nc.AdaGC(warmup=3), nc.ByNorm(1.0)]
    return nc.ParamGroups(
        [
            nc.Group(f"g{k}", {f"w{k}": np.ones((3, 2)), f"h{k}": np.ones(2, "f2")}, clip=rule)
            for k, rule in enumerate(rules)
        ]
    )


def advance(groups, steps):
    for step in steps:
        groups.set_grads(grads_of(groups, step, scale=9.0 if step % 5 == 4 else 1.0))
        groups.clip()
        for name, grad in groups.grads.items():
            groups.params[name][...] -= grad.astype(grad.dtype)


@pytest.mark.parametrize("split", [0, 2, 9])
@pytest.mark.parametrize("by_file", [False, True])
def test_a_restored_state_goes_on_with_the_same_bits(tmp_path, split, by_file):
    whole, restored = stateful(), stateful()
    advance(whole, range(split))
    if by_file:
        whole.save(tmp_path / "state")
        restored.load(tmp_path / "state")
    else:
        restored.load_state_dict(whole.state_dict())
    whole.zero_grads()
    assert snapshot(restored) == snapshot(whole)
    for groups in (whole, restored):
        advance(groups, range(split, 20))
    assert snapshot(restored) == snapshot(whole)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (["rules", "g0", "count"], np.array(-1)),
        (["step"], -1),
        (["step"], "1"),
        (["params", "w0"], np.ones((2, 3))),
        (["params", "w0"], np.ones((3, 2), np.float32)),
        (["params", "w9"], np.ones(2)),
        (["rules", "g0"], {}),
        (["rules", "g9"], {}),
        (["rules", "g3", "rule"], repr(nc.ByNorm(9.0))),
        (["history", "all"], {}),
        (["history"], None),
        (["more"], 1),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(path, value):
    groups, other = stateful(), stateful()
    advance(groups, range(4))
    advance(other, range(6))
    state = other.state_dict()
    node = state
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    before = snapshot(groups)
    with pytest.raises(nc.StateError):
        groups.load_state_dict(state)
    assert snapshot(groups) == before


def test_damaged_files_change_nothing(tmp_path):
    groups = stateful()
    advance(groups, range(4))
    before, path = snapshot(groups), tmp_path / "state"
    with pytest.raises(TypeError, match="state_dict: expected a mapping, got str"):
        groups.load_state_dict(str(path))
    stateful().save(path)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    for damaged in (b"", content[:100], content[:-1], content[: len(content) // 2], flipped):
        path.write_bytes(damaged)
        with pytest.raises(nc.StateError, match=re.escape(str(path))):
            groups.load(path)
        assert snapshot(groups) == before
    with pytest.raises(FileNotFoundError):
        groups.load(tmp_path / "nowhere")


# ---- memory


@pytest.mark.each_value
@pytest.mark.jit_only
@pytest.mark.parametrize(
    "rule",
    [None, nc.ByGlobalNorm(1.0), nc.ByNorm(1.0), nc.ByValue(-1, 1), nc.AutoClip(), nc.AdaGC()],
    ids=repr,
)
@pytest.mark.parametrize("policy", ["propagate", "skip"])
def test_a_dense_group_allocates_little(rule, policy):
    tensors = {f"w{k}": np.ones((1024, 2048), np.float32) for k in range(8)}  # 64 MB
    groups = nc.ParamGroups([nc.Group("g", tensors, clip=rule, nonfinite=policy)])
    for name in tensors:
        groups.grads[name][...] = 1.0
    groups.clip(unscale=2.0)
    tracemalloc.start()
    try:
        groups.clip()
        groups.clip(unscale=2.0)
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


# ---- gradients that are other gradients, or that do not fit the dtype


def apart(sparse=False):
    params = {"x": np.zeros((2, 2)), "y": np.zeros((2, 2))}
    members = [nc.Group("a", {"x": params["x"]}), nc.Group("b", {"y": params["y"]}, sparse=sparse)]
    return nc.ParamGroups(members)


def test_gradients_of_one_group_are_set_from_anothers():
    groups = apart()
    one, two = np.full((2, 2), 1.0), np.full((2, 2), 2.0)
    groups.set_grads({"x": one, "y": two})
    groups.set_grads({"x": groups.grads["y"], "y": groups.grads["x"]})
    assert_same_bits(groups.grads["x"], two)
    assert_same_bits(groups.grads["y"], one)
    groups.accumulate({"x": groups.grads["y"].T, "y": groups.grads["x"][::-1]})
    assert_same_bits(groups.grads["x"], one + two)
    assert_same_bits(groups.grads["y"], one + two)


def test_rows_are_set_from_dense_gradients_of_another_group():
    groups = apart(sparse=True)
    groups.set_grads({"x": np.full((2, 2), 1.0)})
    rows = nc.IndexedSlices(groups.grads["x"], [0, 1], (2, 2))
    groups.set_grads({"x": np.full((2, 2), 5.0), "y": rows})
    assert_same_bits(groups.grads["y"].values, np.full((2, 2), 1.0))
    groups.set_grads({"x": groups.grads["y"].values, "y": rows})
    assert_same_bits(groups.grads["x"], np.full((2, 2), 1.0))
    assert_same_bits(groups.grads["y"].values, np.full((2, 2), 5.0))


@pytest.mark.parametrize("sparse", [False, True])
def test_elements_beyond_the_range_of_a_group_are_refused(sparse):
    for dtype in ("float16", "float32", "complex64"):
        groups = nc.ParamGroups([nc.Group("g", {"w": np.zeros((1, 2), dtype)}, sparse=sparse)])
        for given, message in {1e6 if dtype == "float16" else 1e39: "up to 1", 3.0: ""}.items():
            dense = np.array([[given, np.inf]], "D" if dtype == "complex64" else "d")
            grad = nc.IndexedSlices(dense, [0], (1, 2)) if sparse else dense
            if not message:
                groups.set_grads({"w": grad})
                continue
            for take in (groups.set_grads, groups.accumulate):
                with pytest.raises(
                    ValueError, match=rf"grads\['w'\]: expected .*{message}.*clip them"
                ):
                    take({"w": grad})
            assert groups.clip().norm == 0.0
            own = np.zeros((1, 2), dtype)
            with pytest.raises(
                ValueError, match=rf"grads_and_vars\[0\]: expected .*{message}.*clip"
            ):
                nc.SGD(None, 1.0).apply_gradients([(grad, own)])
            assert not own.any()
            clipped = nc.clip_by_value(dense.real.copy(), -1.0, 1.0)
            groups.set_grads({"w": nc.IndexedSlices(clipped, [0], (1, 2)) if sparse else clipped})
            assert groups.clip().norm == 2.0**0.5


@pytest.mark.parametrize("policy", ["skip", "raise"])
def test_elements_beyond_the_range_are_left_to_a_policy_that_finds_them(policy):
    group = nc.Group("g", {"w": np.zeros(2, np.float16)}, nc.ByGlobalNorm(1.0), policy)
    groups = nc.ParamGroups([group])
    optimizer = nc.SGD(groups, 1.0)
    for step in (
        lambda: groups.set_grads({"w": np.array([1e6, 1.0])}) or optimizer.step(),
        lambda: optimizer.step({"w": np.array([1e6, 1.0], np.float32)}),
    ):
        if policy == "skip":
            assert step().skipped
        else:
            with pytest.raises(nc.NonFiniteGradientError, match=r"g\.w is not finite: inf at"):
                step()
        assert not groups.params["w"].any()
    with pytest.raises(ValueError, match=r"params\['w'\]: expected elements that float16 holds"):
        groups.params["w"] = np.array([1e6, 1.0])


# ---- parameters that stay where they are


def own_and_copied(rule):
    rng = np.random.default_rng(8)
    params = {"W": rng.standard_normal((4, 3)), "b": rng.standard_normal(3).astype(np.float32)}
    rows = {"E": rng.standard_normal((9, 2))}
    made = []
    for copy in (False, True):
        own = [{name: array.copy() for name, array in group.items()} for group in (params, rows)]
        groups = nc.ParamGroups(
            [
                nc.Group("g", own[0], clip=rule),
                nc.Group("rows", own[1], clip=nc.ByNorm(1.0), sparse=True),
            ],
            copy=copy,
        )
        made.append((groups, own[0] | own[1]))
    return made


@pytest.mark.parametrize("make", [nc.SGD, nc.Adam])
@pytest.mark.parametrize("rule", [nc.ByGlobalNorm(0.5), nc.ByValue(-0.1, 0.1)], ids=repr)
def test_parameters_that_are_not_copied_are_updated_where_they_are(make, rule, tmp_path):
    (ours, own), (theirs, _) = own_and_copied(rule)
    optimizers = make(ours, lr=0.1), make(theirs, lr=0.1)
    rng = np.random.default_rng(9)
    for step in range(4):
        grads = {name: rng.standard_normal(own[name].shape) for name in ("W", "b")}
        grads["b"] = grads["b"].astype(np.float32)
        grads["E"] = nc.IndexedSlices(rng.standard_normal((2, 2)), [4, 4], (9, 2))
        for groups, optimizer in zip((ours, theirs), optimizers, strict=True):
            if step % 2:
                optimizer.step(grads)
            else:
                groups.set_grads(grads)
                optimizer.step()
        for name, array in own.items():
            assert ours.params[name] is array
            assert_same_bits(array, theirs.params[name])
    ours.save(tmp_path / "own.npz")
    before = {name: array.copy() for name, array in own.items()}
    for array in own.values():
        array[...] = 0
    ours.load(tmp_path / "own.npz")
    for name, array in own.items():
        assert_same_bits(array, before[name])
    assert not ours["g"].flat_params


def test_parameters_are_written_by_name():
    (ours, own), (theirs, passed) = own_and_copied(None)
    for groups in (ours, theirs):
        groups.params["W"] -= 1.0
        groups.params["b"] = np.arange(3)[::-1].astype(np.float64)
        with pytest.raises(ValueError, match=r"params\['W'\]: expected shape \(4, 3\)"):
            groups.params["W"] = np.zeros(3)
        with pytest.raises(KeyError, match="'V' is no parameter"):
            groups.params["V"] = np.zeros(3)
        with pytest.raises(TypeError, match="cannot be deleted"):
            del groups.params["W"]
    assert ours.params["W"] is own["W"]
    assert own["b"].tolist() == theirs.params["b"].tolist() == [2.0, 1.0, 0.0]
    assert_same_bits(own["W"], theirs.params["W"])
    assert_same_bits(passed["W"] - 1.0, own["W"])


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (lambda a: {"x": a, "y": a}, r"params\['y'\]: shares memory with params\['x'\]; pass tied"),
        (lambda a: {"x": a[:3], "y": a[2:]}, "shares memory"),
        (lambda a: {"x": a.T}, r"params\['x'\]: expected C order for copy=False"),
        (lambda a: {"x": a[:, ::2]}, "expected C order for copy=False"),
        (lambda a: {"x": np.broadcast_to(a, (2, 4, 4))}, "a writeable array, got a read-only one"),
        (lambda a: {"x": a.astype(">f8")}, "expected native byte order"),
        (lambda a: {"x": a[0, 0]}, "an array, which can be updated where it is"),
    ],
)
def test_parameters_that_cannot_stay_are_refused(params, message):
    with pytest.raises((TypeError, ValueError), match=message):
        nc.ParamGroups([nc.Group("g", params(np.ones((4, 4))))], copy=False)


def test_parameters_of_a_gpu_are_copied():
    with pytest.raises(ValueError, match="copy: expected True for device='cuda'"):
        nc.ParamGroups([nc.Group("g", {"x": np.ones(2)})], copy=False, device="cuda")

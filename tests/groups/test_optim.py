"""Optimizers against plain NumPy and PyTorch; rows, skips, rates, loss scales."""

import math

import numpy as np
import pytest

import numclip as nc
from tests.oracle import reference
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import ROWS, frozen, grads_of, over, snapshot
from tests.oracle.plain_optim import KINDS, SHAPES, PlainAdam, initial, kinds, made, sgd, two_groups

STEPS = 50
TOLERANCES = {"float32": 1e-6, "float64": 1e-12, "complex64": 1e-6, "complex128": 1e-12}
RULES = [None, nc.ByValue(-0.4, 0.3), nc.Adaptive(0.2), nc.ByNorm(0.6), nc.ByGlobalNorm(0.7)]


def clipped(rule, grads, params):
    """The gradients of a group after clipping, in float64, by the exact oracles."""
    match rule:
        case None:
            return {name: reference.wide(grad) for name, grad in grads.items()}
        case nc.ByGlobalNorm(max_norm=bound):
            results = reference.clip_by_global_norm(list(grads.values()), bound)
            return dict(zip(grads, results, strict=True))
        case nc.ByNorm(max_norm=bound):
            return {n: reference.clip_by_norm(g, bound) for n, g in grads.items()}
        case nc.ByValue(min=low, max=high):
            return {n: np.clip(reference.wide(g), low, high) for n, g in grads.items()}
        case nc.Adaptive(clip_factor=factor, eps=eps):
            return {n: reference.adaptive_clip(g, params[n], factor, eps) for n, g in grads.items()}
    raise AssertionError(rule)


def assert_near(actual, expected, tolerance):
    """Equal relative to the size of the array: what cancels to near 0 has no digits of its own."""
    size = float(np.abs(expected).max(initial=0.0))
    np.testing.assert_allclose(reference.wide(actual), expected, rtol=0, atol=tolerance * size)


# ---- against plain NumPy and PyTorch


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize(
    ("dtype", "rule"),
    [
        *((dtype, rule) for dtype in ("float32", "float64") for rule in RULES),
        *((dtype, nc.ByGlobalNorm(0.7)) for dtype in ("complex64", "complex128")),
    ],
    ids=str,
)
def test_fifty_steps_against_numpy(kind, rule, dtype):
    start = initial(dtype)
    groups = nc.ParamGroups([nc.Group("g", start, clip=rule)])
    optimizer, plain = made(kind, groups)
    expected = {name: reference.wide(param) for name, param in start.items()}
    for step in range(STEPS):
        grads = grads_of(groups, step, scale=0.3)
        groups.set_grads(grads)
        report = optimizer.step()
        assert report.step == step
        for name, grad in clipped(rule, grads, expected).items():
            expected[name] = plain.update(name, expected[name], grad, 0.02)
    for name, wanted in expected.items():
        assert_near(groups.params[name], wanted, TOLERANCES[dtype])


@kinds
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_fifty_steps_against_torch(kind, dtype):
    torch = pytest.importorskip("torch", reason="compares with PyTorch where it is installed")
    make, settings = KINDS[kind]
    start = initial(dtype)
    groups = nc.ParamGroups([nc.Group("g", start, clip=nc.ByGlobalNorm(0.7))])
    optimizer, _ = make(groups, 0.02, **settings)
    # In float64 whatever our dtype: PyTorch's own float32 rounds 1 - lr * weight_decay, which
    # alone is off by 1.5e-6 after 50 steps.
    wide = [param.astype(np.float64) for param in start.values()]
    tensors = [torch.from_numpy(param).requires_grad_() for param in wide]
    if make is sgd:
        other = torch.optim.SGD(tensors, lr=0.02, **settings)
    else:
        other = torch.optim.AdamW(tensors, lr=0.02, **({"weight_decay": 0.0} | settings))
    for step in range(STEPS):
        grads = grads_of(groups, step, scale=0.3)
        groups.set_grads(grads)
        norm = optimizer.step().norm
        for tensor, grad in zip(tensors, grads.values(), strict=True):
            tensor.grad = torch.from_numpy(grad.astype(np.float64))
        # PyTorch divides by norm + 1e-6; a bound larger by as much takes that out again.
        bound = 0.7 * (1 + 1e-6 / norm)
        if norm > 0.7:
            torch.nn.utils.clip_grad_norm_(tensors, bound)
        other.step()
    for param, tensor in zip(groups.params.values(), tensors, strict=True):
        assert_near(param, tensor.detach().numpy().astype(float), TOLERANCES[dtype])


@pytest.mark.each_value
@kinds
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bit_parameters_are_rounded_once_a_step(kind, dtype):
    groups = nc.ParamGroups([nc.Group("g", initial(dtype), clip=nc.ByGlobalNorm(0.7))])
    optimizer, plain = made(kind, groups)
    spacing = 2.0 ** (1 - reference.PRECISION[dtype])
    for step in range(10):
        grads = grads_of(groups, step)
        groups.set_grads(grads)
        before = {name: reference.wide(param) for name, param in groups.params.items()}
        scale = optimizer.step().scale
        for name, grad in grads.items():
            wanted = plain.update(name, before[name], reference.wide(grad) * scale, 0.02)
            error = np.abs(reference.wide(groups.params[name]) - wanted)
            assert (error <= 0.501 * spacing * 2 ** np.floor(np.log2(np.abs(wanted)))).all()


def test_subnormal_parameters_are_rounded_to_the_nearest():
    for dtype in (reference.DTYPES["float16"], reference.DTYPES["bfloat16"]):
        smallest = float(reference.float_info(dtype).smallest_subnormal)
        start = np.arange(-20, 20) * smallest
        grad = np.arange(40) % 7 * smallest
        for make, wanted in (
            (lambda groups: nc.SGD(groups, 0.3), start - 0.3 * grad),
            (lambda groups: nc.SGD(groups, 0.3, momentum=0.5), start - 0.3 * grad),
            (lambda groups, lr=0.3 * smallest: nc.Adam(groups, lr), start - 0.3 * smallest),
        ):
            groups = nc.ParamGroups([nc.Group("g", {"w": start.astype(dtype)})])
            adam = isinstance(optimizer := make(groups), nc.Adam)
            groups.set_grads({"w": (np.ones(40) if adam else grad).astype(dtype)})
            optimizer.step()
            assert_same_bits(groups.params["w"], reference.nearest(wanted, dtype))


# ---- sparse parameters


@kinds
@pytest.mark.parametrize("dtype", ["float32", "float64", "complex128"])
def test_sparse_parameters_change_at_touched_rows_only(kind, dtype):
    rng = np.random.default_rng(2)
    start = {"e": normal(rng, ROWS, dtype), "v": normal(rng, (7,), dtype)}
    rule = nc.ByGlobalNorm(1.5)
    groups = nc.ParamGroups([nc.Group("rows", start, clip=rule, sparse=True)])
    optimizer, plain = made(kind, groups)
    expected = {name: reference.wide(param) for name, param in start.items()}
    for step in range(20):
        grads = {n: slices(rng, 4, p.shape, dtype, repeated=True) for n, p in start.items()}
        groups.set_grads({"e": grads["e"]})
        groups.accumulate({"v": grads["v"]})
        before = frozen(groups.grads)
        untouched = {
            name: np.setdiff1d(np.arange(len(start[name])), grad.indices)
            for name, grad in grads.items()
        }
        kept = {name: groups.params[name][rows].copy() for name, rows in untouched.items()}
        optimizer.step()
        assert frozen(groups.grads) == before
        for name, rows in untouched.items():
            assert_same_bits(groups.params[name][rows], kept[name])
        dense = [reference.densify(grad) for grad in grads.values()]
        results = reference.clip_by_global_norm(dense, 1.5)
        for (name, grad), result in zip(grads.items(), results, strict=True):
            for row in set(grad.indices.tolist()):
                label = f"{name}{row}"
                if isinstance(plain, PlainAdam):  # one count for the group, one moment for a row
                    for part in (label, f"{label}.real", f"{label}.imag"):
                        _, *moments = plain.moments.get(part, (0, 0.0, 0.0))
                        plain.moments[part] = step, *moments
                expected[name][row] = plain.update(label, expected[name][row], result[row], 0.02)
        groups.zero_grads()
    for name, wanted in expected.items():
        assert_near(groups.params[name], wanted, TOLERANCES[dtype])
    before = frozen(groups.params)
    optimizer.step()
    assert frozen(groups.params) == before


@pytest.mark.parametrize("order", ["C", "F"])
def test_repeated_rows_are_scaled_first_where_their_sums_overflow(order):
    values = np.array([[4e4, 1.0], [4e4, 2.0]], np.float16, order=order)
    rows = nc.IndexedSlices(values, [1, 1], (3, 2))
    param = np.ones((3, 2), np.float16)
    groups = nc.ParamGroups([nc.Group("g", {"e": param}, clip=nc.ByNorm(1.0), sparse=True)])
    groups.grads["e"] = rows
    nc.SGD(groups, lr=0.5).step()
    np.testing.assert_allclose(groups.params["e"], [[1, 1], [0.5, 1], [1, 1]], rtol=1e-3)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("float32", 3e-7)])
def test_rows_that_cancel_leave_no_rounding_of_each(dtype, tolerance):
    rng = np.random.default_rng(3)
    values = rng.standard_normal((2, 64)).astype(dtype)
    values[1] = -values[0] * np.dtype(dtype).type(1 - 2 * np.finfo(dtype).eps)
    rows = nc.IndexedSlices(16 * values, [1, 1], (3, 64))
    dense = reference.densify(rows)
    bound = 0.3 * float(np.linalg.norm(dense))
    groups = nc.ParamGroups(
        [nc.Group("g", {"e": np.zeros((3, 64), dtype)}, clip=nc.ByNorm(bound), sparse=True)]
    )
    groups.grads["e"] = rows
    factor = nc.SGD(groups, lr=8.0).step().scale
    assert factor < 0.3
    wanted = -8 * factor * dense
    np.testing.assert_allclose(groups.params["e"].astype(float), wanted, rtol=tolerance, atol=0)


def test_as_many_rows_in_each_step_that_repeat_or_do_not():
    """Their tables stay where they can; every step is that of the dense gradient."""
    rng = np.random.default_rng(4)
    both = [
        nc.ParamGroups(
            [nc.Group("g", {"e": np.zeros((6, 3))}, clip=nc.ByGlobalNorm(1.0), sparse=sparse)]
        )
        for sparse in (True, False)
    ]
    optimizers = [nc.SGD(groups, lr=0.1, weight_decay=0.0) for groups in both]
    for indices in ([0, 1, 2], [4, 4, 1], [4, 1, 4], [5, 5, 5], [3, 0, 2], [2, 2, 2, 2]):
        rows = nc.IndexedSlices(rng.standard_normal((len(indices), 3)), indices, (6, 3))
        reports = [
            optimizer.step({"e": grad})
            for optimizer, grad in zip(optimizers, (rows, rows.to_dense()), strict=True)
        ]
        assert reports[0].norm == pytest.approx(reports[1].norm, rel=1e-14)
        np.testing.assert_allclose(both[0].params["e"], both[1].params["e"], rtol=0, atol=1e-14)


# ---- what a step leaves alone


@kinds
@pytest.mark.parametrize("rule", [None, *RULES[3:], nc.AutoClip(50), nc.AdaGC(warmup=1)], ids=repr)
def test_the_clipped_gradient_is_never_written(kind, rule):
    groups = nc.ParamGroups([nc.Group("g", initial("float64"), clip=rule)])
    optimizer, _ = made(kind, groups)
    for step in range(3):
        groups.set_grads(grads_of(groups, step))
        before = frozen(groups.grads)
        report = optimizer.step(unscale=3.0)
        assert frozen(groups.grads) == before
        assert groups.step == len(groups.history) == step + 1
        assert groups.history.to_dict()["g"]["norm"][-1] == report.groups["g"].norm


@kinds
def test_a_skipped_group_changes_nothing(kind):
    groups, finite = two_groups("skip"), two_groups("skip")
    optimizers = [made(kind, each)[0] for each in (groups, finite)]
    for step in range(4):
        for each, optimizer in zip((groups, finite), optimizers, strict=True):
            each.set_grads(grads_of(each, step))
            if step == 2 and each is groups:
                each.grads["b"][1] = math.inf
                kept = {name: frozen(each.params[name]) for name in SHAPES}
                states = frozen(optimizer.state_dict()["groups"]["first"])
            report = optimizer.step()
            if step == 2 and each is groups:
                assert report.groups["first"].skipped
                assert {name: frozen(each.params[name]) for name in SHAPES} == kept
                assert frozen(optimizer.state_dict()["groups"]["first"]) == states
        assert all(np.isfinite(param).all() for param in groups.params.values())
    for name in ("e", "z"):
        assert_same_bits(groups.params[name], finite.params[name])
    assert frozen(groups.params["w"]) != frozen(finite.params["w"])


@kinds
@pytest.mark.parametrize("failure", ["raise", "schedule", "unscale", "bound"])
def test_a_step_that_fails_changes_nothing(kind, failure):
    bounds = [0.5, -1.0 if failure == "bound" else 0.5]
    rates = [0.1, math.nan if failure == "schedule" else 0.1]
    members = [
        nc.Group("zeroed", {"z": np.ones(3)}, clip=nc.ByNorm(0.5), nonfinite="zero"),
        nc.Group("raising", {"w": np.ones(3)}, clip=nc.ByGlobalNorm(0.5), nonfinite="raise"),
        nc.Group("bounded", {"v": np.ones(3)}, clip=nc.ByNorm(lambda step: bounds[step])),
    ]
    groups = nc.ParamGroups(members)
    optimizer, _ = made(kind, groups, lambda step: rates[step])
    groups.set_grads(grads_of(groups))
    optimizer.step()
    groups.grads["z"][1] = math.nan
    if failure == "raise":
        groups.grads["w"][2] = math.inf
    before = snapshot(groups), frozen(optimizer.state_dict())
    message = {
        "raise": r"raising.*w.*index 2",
        "schedule": r"lr\(step=1\): expected",
        "unscale": "unscale: expected",
        "bound": r"max_norm\(step=1\): expected",
    }[failure]
    with pytest.raises((ArithmeticError, ValueError), match=message):
        optimizer.step(unscale=-1.0 if failure == "unscale" else 1.0)
    assert (snapshot(groups), frozen(optimizer.state_dict())) == before


# ---- rates and loss scales


@kinds
def test_rates_by_group_and_by_step(kind):
    seen = []

    def schedule(step):
        seen.append(step)
        return 0.1 / (step + 1)

    groups = two_groups(lr=0.03)
    optimizer, plain = made(kind, groups, schedule)
    expected = {name: reference.wide(param) for name, param in groups.params.items()}
    for step in range(5):
        grads = {name: grad for name, grad in grads_of(groups, step).items() if name != "e"}
        groups.set_grads(grads)
        report = optimizer.step()
        own = clipped(nc.ByGlobalNorm(0.7), {name: grads[name] for name in SHAPES}, None)
        own["z"] = reference.wide(grads["z"]) * report.groups["last"].scale
        for name, grad in own.items():
            lr = 0.03 if name in SHAPES else 0.1 / (step + 1)
            expected[name] = plain.update(name, expected[name], grad, lr)
    assert sorted(set(seen)) == [0, 1, 2, 3, 4]
    for name in ("z", *SHAPES):
        assert_near(groups.params[name], expected[name], 1e-6 if name == "z" else 1e-12)


@kinds
@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_loss_scales(kind, rule):
    plain, exact, near = (
        nc.ParamGroups([nc.Group("g", initial("float64"), clip=rule)]) for _ in range(3)
    )
    optimizers = [made(kind, groups)[0] for groups in (plain, exact, near)]
    for step in range(5):
        grads = grads_of(plain, step)
        for groups, optimizer, scale in zip(
            (plain, exact, near), optimizers, (1.0, 1024.0, 3.0), strict=True
        ):
            groups.set_grads({name: over(grad, 1 / scale) for name, grad in grads.items()})
            report = optimizer.step(unscale=scale)
            assert report.norm == pytest.approx(nc.global_norm(grads), rel=1e-14)
    assert frozen(exact.params) == frozen(plain.params)
    for name, param in plain.params.items():
        assert_near(near.params[name], param, 1e-12)


@pytest.mark.full
@pytest.mark.parametrize("length", [3, 2_000_000], ids=["little", "much"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("bad", [False, True], ids=["finite", "not finite"])
def test_a_parameter_that_is_nan_skips_no_group(dtype, length, bad):
    """Only gradients do, whatever the size and the dtypes: the report says which are skipped."""
    params = {"a": np.ones((2, 2), np.float32), "b": np.ones(length, dtype)}
    params["a"][0, 1] = np.nan
    rule = nc.Adaptive(0.1)
    groups = nc.ParamGroups([nc.Group("g", params, clip=rule, nonfinite="skip")])
    grads = {name: np.ones_like(param) for name, param in params.items()}
    grads["b"][0] = np.nan if bad else 1.0
    report = nc.SGD(groups, 0.5).step(grads)
    assert report.skipped is bad
    left = [[1.0, np.nan], [1.0, 1.0]] if bad else [[0.95, np.nan], [0.95, np.nan]]
    np.testing.assert_allclose(groups.params["a"], left, rtol=1e-6)
    assert (groups.params["b"] == 1.0).all() == bad

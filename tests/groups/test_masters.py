"""Float32 masters of 16-bit parameters, beside the same groups of float32."""

from __future__ import annotations

import math
import re

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import numclip as nc
from tests.oracle.cases import normal, slices
from tests.oracle.checks import assert_same_bits
from tests.oracle.grouped import frozen

HALVES = {"float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
SHAPES = {"w": (37, 5), "v": (1003,), "e": (), "none": (0, 2), "wide": (3,)}
OPTIMIZERS = {
    "sgd": lambda groups: nc.SGD(groups, lr=0.05, weight_decay=0.01),
    "momentum": lambda groups: nc.SGD(groups, lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda groups: nc.Adam(groups, lr=0.02, weight_decay=0.1),
}
CLIPS = [nc.ByGlobalNorm(0.7), nc.ByNorm(1e9), nc.Adaptive(0.02), nc.ByValue(-0.5, 0.5), nc.AdaGC()]
halves = pytest.mark.parametrize("dtype", HALVES.values(), ids=HALVES.keys())


def on_host(array):
    return array.copy_to_host() if hasattr(array, "copy_to_host") else np.array(array)


def initial(dtype, seed=0):
    """Parameters of 16 bits and one of float32, with subnormal numbers and both zeros."""
    rng = np.random.default_rng(seed)
    params = {name: normal(rng, shape, "float32").astype(dtype) for name, shape in SHAPES.items()}
    smallest = float(ml_dtypes.finfo(dtype).smallest_subnormal)
    params["v"][:6] = [0.0, -0.0, smallest, -3 * smallest, math.inf, 1.0]
    return params | {"wide": np.ones(3, np.float32)}


def gradients(rng, dtype, kinds=("half", "float32")):
    kind = rng.choice(kinds)
    grads = {name: normal(rng, shape, "float32", 0.3) for name, shape in SHAPES.items()}
    own = {name: grad.astype(dtype) for name, grad in grads.items() if name != "wide"}
    return grads if kind == "float32" else grads | own


def pair(dtype, device="cpu", **options):
    """Groups with masters, and the same of float32."""
    params = initial(dtype)
    wide = {name: param.astype(np.float32) for name, param in params.items()}
    made = [nc.Group("g", params, master="float32", **options), nc.Group("g", wide, **options)]
    return [nc.ParamGroups([group], device=device) for group in made]


def assert_rounded(groups, wide, dtype):
    """Masters have the bits of a group of float32, parameters those of them rounded."""
    assert set(groups["g"].masters) == set(wide.params) - {"wide"}
    for name, param in wide.params.items():
        number = on_host(param)
        assert_same_bits(on_host(groups["g"].updated[name]), number)
        with np.errstate(over="ignore"):
            rounded = number if name == "wide" else number.astype(dtype)
        assert_same_bits(on_host(groups.params[name]), rounded)


@halves
@pytest.mark.each_value
@pytest.mark.parametrize("clip", CLIPS, ids=repr)
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_steps_are_those_of_float32(target, kind, clip, dtype):
    rng = np.random.default_rng(1)
    groups, wide = pair(dtype, target.device, clip=clip)
    optimizers = [OPTIMIZERS[kind](own) for own in (groups, wide)]
    for step in range(4):
        first, second = gradients(rng, dtype), gradients(rng, dtype)
        written = normal(rng, (37, 5), dtype)
        reports = []
        for own, optimizer in zip((groups, wide), optimizers, strict=True):
            own.set_grads(first)
            own.accumulate(second)
            if step == 2:  # what is written to parameters is not lost
                own.params["w"][...] = written
            if step == 3:
                own.clip(unscale=2.0)
            reports.append(optimizer.step())
            assert own.grads["v"].dtype == np.float32
        assert reports[0].to_dict() == reports[1].to_dict()
        assert_rounded(groups, wide, dtype)
    assert frozen(optimizers[0].state_dict()) == frozen(optimizers[1].state_dict())


def test_gradients_that_are_passed():
    rng, dtype = np.random.default_rng(2), HALVES["bfloat16"]
    groups, wide = pair(dtype, clip=nc.ByGlobalNorm(0.7))
    optimizers = [nc.Adam(own, lr=0.02) for own in (groups, wide)]
    for kinds in (("float32",), ("half",), ("half",)):
        grads = gradients(rng, dtype, kinds) | {"e": None}
        reports = [optimizer.step(grads) for optimizer in optimizers]
        assert reports[0].to_dict() == reports[1].to_dict()
        assert_rounded(groups, wide, dtype)
    measured = [own.clip(apply=False, grads=grads).to_dict() for own in (groups, wide)]
    assert measured[0] == measured[1]


@halves
@pytest.mark.each_value
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_sparse_steps_are_those_of_float32(target, kind, dtype):
    rng = np.random.default_rng(3)
    table = normal(rng, (50, 3), dtype)
    made = [
        nc.Group("g", {"e": table.astype(own), "f": table[:9].astype(own)}, nc.ByNorm(0.5), **more)
        for own, more in ((dtype, {"master": "float32"}), ("float32", {}))
        for more in [{"sparse": True, **more}]
    ]
    groups, wide = (nc.ParamGroups([group], device=target.device) for group in made)
    optimizers = [OPTIMIZERS[kind](own) for own in (groups, wide)]
    for step in range(4):
        rows = {"e": slices(rng, 5, (50, 3), dtype.name, repeated=True)}
        rows["f"] = slices(rng, 4, (9, 3), "float32", repeated=True) if step else None
        for own, optimizer in zip((groups, wide), optimizers, strict=True):
            if step == 2:
                written = on_host(own.params["e"])
                written[:30] = 1.5
                own.params["e"][...] = written
            if step % 2:
                own.zero_grads()
                own.accumulate(rows)
                optimizer.step()
            else:
                optimizer.step(rows)
        groups.state_dict()  # which takes over what was written to rows without gradients
        for name, param in wide.params.items():
            assert_same_bits(on_host(groups["g"].masters[name]), on_host(param))
            assert_same_bits(on_host(groups.params[name]), on_host(param).astype(dtype))


def test_small_gradients_and_steps_are_not_lost():
    for dtype in HALVES.values():
        groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(3, dtype)}, master="float32")])
        for _ in range(4000):
            groups.accumulate({"w": np.ones(3, dtype)})
        assert groups.grads["w"].tolist() == [4000.0] * 3
        groups.zero_grads()
        optimizer = nc.Adam(groups, lr=5e-4)
        for _ in range(1000):
            groups.set_grads({"w": np.ones(3)})
            optimizer.step()
        np.testing.assert_allclose(groups["g"].masters["w"], 0.5, rtol=1e-4)
        np.testing.assert_allclose(groups.params["w"].astype(float), 0.5, rtol=2e-3)


def test_wide_gradients_are_not_cast_to_16_bits():
    param = np.ones(2, np.float16)
    groups = nc.ParamGroups([nc.Group("g", {"w": param}, nc.ByGlobalNorm(1.0), master="float32")])
    groups.set_grads({"w": np.array([3e6, 4e6])})
    assert groups.clip().norm == 5e6
    np.testing.assert_allclose(groups.grads["w"], [0.6, 0.8], rtol=1e-6)
    with pytest.raises(ValueError, match="elements that float32 holds"):
        groups.set_grads({"w": np.full(2, 1e300)})


@pytest.mark.parametrize("policy", ["skip", "raise", "propagate", "zero"])
def test_what_is_not_finite(policy):
    groups, wide = pair(HALVES["bfloat16"], clip=nc.ByGlobalNorm(1.0), nonfinite=policy)
    grads = gradients(np.random.default_rng(4), HALVES["bfloat16"])
    grads["w"][3, 2] = math.nan
    before = frozen(groups.state_dict()["masters"])
    for own in (groups, wide):
        own.set_grads(grads)
        if policy == "raise":
            with pytest.raises(nc.NonFiniteGradientError):
                nc.SGD(own, lr=0.1).step()
        else:
            nc.SGD(own, lr=0.1).step()
    if policy in ("skip", "raise"):
        assert frozen(groups.state_dict()["masters"]) == before
    assert_rounded(groups, wide, HALVES["bfloat16"])


def test_what_is_written_and_assigned_to_parameters():
    dtype = HALVES["bfloat16"]
    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(4, dtype)}, master="float32")])
    optimizer = nc.SGD(groups, lr=1e-4)

    def step():
        groups.set_grads({"w": np.ones(4)})
        optimizer.step()
        return groups["g"].masters["w"]

    groups.params["w"][2] = 1.5  # before the first step, too
    assert step()[2] == np.float32(1.4999)
    groups.params["w"] = np.ones(4)
    kept = step().copy()
    groups.params["w"][1] = 2.0
    groups.params["w"] *= dtype.type(1)  # nothing changes
    np.testing.assert_array_equal(
        step(), [kept[0] - np.float32(1e-4), np.float32(1.9999), *2 * [kept[0] - np.float32(1e-4)]]
    )
    groups.params["w"] = np.full(4, 0.1)  # the master is not rounded to 16 bits
    assert_same_bits(groups["g"].masters["w"], np.full(4, 0.1, np.float32))
    assert_same_bits(groups.params["w"], np.full(4, 0.1, np.float32).astype(dtype))
    groups.params["w"][3] = 7
    assert groups.state_dict()["masters"]["w"].tolist() == [*3 * [np.float32(0.1)], 7]
    with pytest.raises(ValueError, match="read-only"):
        groups["g"].masters["w"][0] = 1.0


def test_parameters_that_stay_where_they_are():
    for dtype in HALVES.values():
        own = initial(dtype)
        kept = {name: param.copy() for name, param in own.items()}
        group = nc.Group("g", own, nc.ByGlobalNorm(0.7), master="float32")
        there, copied = nc.ParamGroups([group], copy=False), nc.ParamGroups([group])
        rng = np.random.default_rng(5)
        for groups in (there, copied):
            rng = np.random.default_rng(5)
            optimizer = nc.Adam(groups, lr=0.02)
            for _ in range(3):
                optimizer.step(gradients(rng, dtype))
        for name, param in own.items():
            assert there.params[name] is param
            assert_same_bits(param, copied.params[name])
            assert param.size == 0 or not np.array_equal(param, kept[name])
        assert not there["g"].flat_params


def test_states(tmp_path):
    dtype = HALVES["float16"]
    rng = np.random.default_rng(6)
    (groups, _), (others, _) = pair(dtype), pair(dtype)
    plain = nc.ParamGroups([nc.Group("g", initial(dtype))])
    optimizers = [nc.Adam(own, lr=0.02) for own in (groups, others, plain)]
    for _ in range(3):
        optimizers[0].step(gradients(rng, dtype))
    groups.save(tmp_path / "groups")
    optimizers[0].save(tmp_path / "adam")
    assert others.load(tmp_path / "groups") == []
    assert optimizers[1].load(tmp_path / "adam") == []
    assert frozen(others.state_dict()) == frozen(groups.state_dict())
    grads = gradients(rng, dtype)
    for optimizer in optimizers[:2]:
        optimizer.step(grads)
    assert frozen(others.state_dict()) == frozen(groups.state_dict())
    # Without masters, and from what has none.
    with pytest.raises(nc.StateError, match=r"state\['masters'\]: expected nothing, got dict"):
        plain.load(tmp_path / "groups")
    (told,) = plain.load(tmp_path / "groups", strict=False)
    assert told == "state['masters']: expected nothing, got dict"
    assert optimizers[2].load(tmp_path / "adam") == []
    (told,) = groups.load_state_dict(plain.state_dict(), strict=False)
    assert told == "state['masters']: expected dict, got nothing"
    for name, master in groups["g"].masters.items():
        assert_same_bits(master, plain.params[name].astype(np.float32))
        assert_same_bits(groups.params[name], plain.params[name])
    # Masters alone fit where the 16 bits are others; what is edited in a state holds.
    (half, _), state = pair(HALVES["bfloat16"]), others.state_dict()
    assert len(half.load_state_dict(state, strict=False)) == len(SHAPES) - 1
    for name, master in others["g"].masters.items():
        assert_same_bits(half["g"].masters[name], master)
        assert_same_bits(half.params[name], master.astype(HALVES["bfloat16"]))
    state["params"]["w"][...] = 2.0
    assert others.load_state_dict(state) == []
    assert (others["g"].masters["w"] == 2.0).all()


@given(st.data())
def test_every_number_is_rounded_to_the_nearest(data):
    bits = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
    numbers = np.array(bits, np.uint32).view(np.float32)
    numbers = np.where(np.isnan(numbers), np.float32(0.0), numbers)
    dtype = data.draw(st.sampled_from(list(HALVES.values())))
    groups = nc.ParamGroups([nc.Group("g", {"w": np.ones(len(bits), dtype)}, master="float32")])
    with np.errstate(over="ignore"):
        wanted = numbers.astype(dtype)
    if np.isinf(wanted.astype(np.float32)).sum() > np.isinf(numbers).sum():
        with pytest.raises(ValueError, match=r"params\['w'\]: expected elements that"):
            groups.params["w"] = numbers
        return
    groups.params["w"] = numbers
    assert_same_bits(groups.params["w"], wanted)
    assert_same_bits(groups["g"].masters["w"], numbers)


def test_arguments():
    half, wide = np.ones(2, np.float16), np.ones(2)
    message = "master: expected None for a group without float16 or bfloat16 parameters, got"
    with pytest.raises(ValueError, match=f"^{message} 'float32' for parameters of float64$"):
        nc.Group("g", {"w": wide}, master="float32")
    for odd in ("float64", "bfloat16", True, np.float32):
        with pytest.raises((TypeError, ValueError), match=re.escape("master: expected")):
            nc.Group("g", {"w": half}, master=odd)
    groups = nc.ParamGroups([nc.Group("g", {"w": half, "v": wide}, master="float32")])
    assert repr(groups["g"]).endswith("nonfinite='propagate', master='float32'")
    assert set(groups["g"].flat_params) == {"float16", "float64"}
    assert set(groups["g"].flat_grads) == {"float32", "float64"}
    assert groups["g"].params["w"] is groups.params["w"]
    plain = nc.ParamGroups([nc.Group("g", {"w": half})])
    assert not plain["g"].masters
    assert "masters" not in plain.state_dict()


def interrupt():
    raise KeyboardInterrupt


def test_an_update_that_is_interrupted_before_it_is_rounded_stays(monkeypatch):
    dtype = HALVES["bfloat16"]
    groups, wide = pair(dtype)
    optimizers = [nc.SGD(own, lr=0.1) for own in (groups, wide)]
    for step in range(3):
        grads = gradients(np.random.default_rng(step), dtype)
        with monkeypatch.context() as changed:
            if step == 1:
                changed.setattr(groups._manager, "_round", interrupt)
                with pytest.raises(KeyboardInterrupt):
                    optimizers[0].step(grads)
            else:
                optimizers[0].step(grads)
        optimizers[1].step(grads)
    assert_rounded(groups, wide, dtype)

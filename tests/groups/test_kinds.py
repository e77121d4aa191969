"""Rules and optimizers that numclip does not know work on every engine by what they say of
themselves; what they cannot ask for is refused."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import pytest

import numclip as nc
from numclip.optim import Optimizer
from numclip.rules import Rule


@pytest.fixture
def device(target: Any) -> str:
    """The device of the target."""
    return "cpu" if type(target).__name__ == "Host" else "cuda"


def made(device: str, rule: Rule | None) -> nc.ParamGroups:
    """Groups of two tensors."""
    return nc.ParamGroups([nc.Group("g", PARAMS, clip=rule)], device=device)


RNG = np.random.default_rng(5)
PARAMS = {"w": RNG.standard_normal((5, 3)), "b": RNG.standard_normal(4)}
GRADS = [
    {name: RNG.standard_normal(param.shape) * (1.0 + step) for name, param in PARAMS.items()}
    for step in range(4)
]


def norm(grads: dict[str, np.ndarray], order: float = 2.0) -> float:
    return float(np.linalg.norm(np.concatenate([g.reshape(-1) for g in grads.values()]), order))


@dataclass(frozen=True, slots=True, repr=False)
class TimesLeast(Rule):
    """Clip a group to a multiple of its least norm so far."""

    scope: ClassVar[str] = "group"
    times: float = 1.5

    def initial_state(self, tensors: int) -> dict[str, np.ndarray]:  # noqa: ARG002
        return {"least": np.array(1e9)}

    def thresholds(self, norms, total, step, state):  # noqa: ARG002
        return np.minimum(norms, state["least"]) * self.times

    def observe(self, norms, clipped, total, step, state):  # noqa: ARG002
        return {"least": np.minimum(state["least"], norms[0])}


@dataclass(frozen=True, slots=True, repr=False)
class Remembering(Rule):
    """Clip to a bound, and remember the largest norm of each tensor after clipping."""

    scope: ClassVar[str] = "tensor"
    bound_name: ClassVar[str | None] = "most"
    most: float = 2.0

    def initial_state(self, tensors: int) -> dict[str, np.ndarray]:
        return {"largest": np.zeros(tensors)}

    def observe(self, norms, clipped, total, step, state):  # noqa: ARG002
        return {"largest": np.maximum(state["largest"], clipped)}


@dataclass(frozen=True, slots=True, repr=False)
class BySumPerElement(Rule):
    """Hold the mean of the magnitudes of a tensor, or a group, to a bound that falls."""

    scope: str = "tensor"
    ord: float = 1.0

    def bound(self, step: int) -> float:
        return 0.5 / (1 + step)

    def divisor(self, size: int) -> float:
        return float(size)


@dataclass(frozen=True, slots=True, repr=False)
class ByFirstAxis(Rule):
    """Hold the largest magnitude over the first axis to a bound."""

    scope: ClassVar[str] = "unit"
    bound_name: ClassVar[str | None] = "most"
    most: float = 0.7
    ord: float = math.inf

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:  # noqa: ARG002
        return (0,)


@dataclass(frozen=True, slots=True, repr=False)
class ByParameter(Rule):
    """Hold each element to a share of its parameter, or of 1."""

    scope: ClassVar[str] = "unit"
    bound_name: ClassVar[str | None] = "share"
    share: float = 0.5
    floor: float = 1.0

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:  # noqa: ARG002
        return ()


@dataclass(frozen=True, slots=True, repr=False)
class BySize(Rule):
    """Hold each element's magnitude to a bound."""

    scope: ClassVar[str] = "element"
    most: float = 0.4

    @property
    def element_bounds(self) -> tuple[float, float]:
        return -self.most, self.most


def factor(bound: float, found: float) -> float:
    return 1.0 if found <= bound else bound / found


def wanted(rule: Any, step: int, grads: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a rule makes of gradients, by its definition."""
    match rule:
        case TimesLeast(times=times):
            bound = times * min(norm(own) for own in GRADS[: step + 1])
            return {name: grad * factor(bound, norm(grads)) for name, grad in grads.items()}
        case Remembering(most=most):
            return {n: g * factor(most, norm({n: g})) for n, g in grads.items()}
        case BySumPerElement(scope="tensor"):
            bound = rule.bound(step)
            return {n: g * factor(bound, np.abs(g).mean()) for n, g in grads.items()}
        case BySumPerElement():
            mean = norm(grads, 1) / sum(grad.size for grad in grads.values())
            return {n: g * factor(rule.bound(step), mean) for n, g in grads.items()}
        case ByFirstAxis(most=most):
            peaks = {n: np.abs(g).max(axis=0, keepdims=True) for n, g in grads.items()}
            return {n: g * np.minimum(1.0, most / peaks[n]) for n, g in grads.items()}
        case ByParameter(share=share, floor=floor):
            most = {n: share * np.maximum(np.abs(p), floor) for n, p in PARAMS.items()}
            return {n: np.clip(g, -most[n], most[n]) for n, g in grads.items()}
        case BySize(most=most):
            return {n: np.clip(g, -most, most) for n, g in grads.items()}
    raise AssertionError(rule)


RULES = [
    TimesLeast(),
    Remembering(),
    BySumPerElement(),
    BySumPerElement(scope="group"),
    ByFirstAxis(),
    ByFirstAxis(ord=3.0),
    ByParameter(),
    BySize(),
]


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_a_rule_works_by_what_it_says_of_itself(device, rule):
    groups = made(device, rule)
    for step, grads in enumerate(GRADS):
        groups.set_grads(grads)
        report = groups.clip()
        assert report.clipped == any(
            not np.array_equal(np.asarray(groups.grads[n]), g) for n, g in grads.items()
        )
        if getattr(rule, "ord", 2.0) == 3.0:
            rooted = {n: (np.abs(g) ** 3).sum(axis=0) ** (1 / 3) for n, g in grads.items()}
            expected = {n: g * np.minimum(1.0, 0.7 / rooted[n]) for n, g in grads.items()}
        else:
            expected = wanted(rule, step, grads)
        for name, grad in expected.items():
            np.testing.assert_allclose(np.asarray(groups.grads[name]), grad, rtol=1e-12)
            held = np.linalg.norm(grad.reshape(-1))
            assert report.tensors[name].clipped_norm == pytest.approx(held, rel=1e-12) or (
                getattr(rule, "ord", 2.0) != 2.0
            )
    assert len(groups.history) == len(GRADS)


def test_a_rule_that_remembers_is_told(device):
    groups = made(device, Remembering(most=1.0))
    for grads in GRADS:
        groups.set_grads(grads)
        groups.clip()
    np.testing.assert_allclose(groups["g"].rule_state["largest"], [1.0, 1.0], rtol=1e-12)
    told = []

    class Telling(TimesLeast):
        def thresholds(self, norms, total, step, state):
            told.append((norms.tolist(), total))
            return TimesLeast.thresholds(self, norms, total, step, state)

    groups = made(device, Telling())
    for bad, norm_told in ((math.nan, 0.0), (math.inf, np.finfo(np.float64).max), (3.0, 3.0)):
        groups.set_grads({"w": np.zeros((5, 3)), "b": np.array([0.0, bad, 0.0, 0.0])})
        groups.clip()
        assert told[-1] == ([norm_told], norm_told)


def test_a_group_follows_the_rule_it_is_given_later(device):
    for rule in (nc.ByNorm(0.1), nc.ByGlobalNorm(0.1)):
        groups = made(device, None)
        optimizer = nc.SGD(groups, 0.1, momentum=0.5)
        groups.set_grads(GRADS[0])
        optimizer.step()
        groups["g"].clip = rule
        optimizer.step()
        assert [row["clipped"] for row in [groups.history.to_dict()["g"]]] == [[False, True]]
        assert optimizer.state_dict()["groups"]["g"]["steps"] == 2
        other = made(device, rule)
        again = nc.SGD(other, 0.1, momentum=0.5)
        again.load_state_dict(optimizer.state_dict())
        for name in PARAMS:
            other.params[name][...] = np.asarray(groups.params[name])
        for each, own in ((groups, optimizer), (other, again)):
            each.set_grads(GRADS[1])
            own.step()
        for name in PARAMS:
            np.testing.assert_array_equal(
                np.asarray(groups.params[name]), np.asarray(other.params[name])
            )


@dataclass(frozen=True, slots=True, repr=False)
class Toy(Rule):
    """A rule that can say anything of itself."""

    scope: str = "group"
    ord: float = 2.0
    shared: str | None = None
    floor: float | None = None
    divided: float = 1.0

    def divisor(self, size: int) -> float:  # noqa: ARG002
        return self.divided


@dataclass(frozen=True, slots=True, repr=False)
class Following(Toy):
    """The same, whose bound follows the norms."""

    def thresholds(self, norms, total, step, state):  # noqa: ARG002
        return norms


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Toy(scope="layer"), "a scope of 'element', 'unit', 'tensor', 'group', got Toy"),
        (Following(scope="unit"), "'tensor' or 'group' where the bound follows the norms"),
        (Following(scope="element"), "'tensor' or 'group' where the bound follows the norms"),
        (Following(ord=3.0), "ord=2 and a norm that is not shared where the bound follows"),
        (Following(shared="all"), "ord=2 and a norm that is not shared where the bound follows"),
        (Toy(scope="tensor", shared="all"), "the scope 'group' where a norm is shared"),
        (Toy(floor=0.1), "'unit' and ord=2 where the bound is relative to parameters"),
        (Toy(scope="unit", floor=0.1, ord=3.0), "'unit' and ord=2 where the bound is relative"),
        (Toy(scope="element", ord=3.0), "ord=2 where elements are held between bounds"),
        (Toy(scope="unit", divided=2.0), "a divisor of 1 where a norm is not of a tensor or a"),
    ],
    ids=str,
)
def test_what_no_clipper_does_is_refused(rule, message):
    with pytest.raises(ValueError, match=f"clip: expected .*{message}"):
        nc.Group("g", PARAMS, clip=rule)


class Heavy(Optimizer):
    """Momentum, by an optimizer that keeps one more state than the kernel reads."""

    kernel = "descend_with_momentum"
    state_names = ("velocity", "spare")

    def settings(self, lr: float) -> list[float]:
        return [lr, 0.0, 0.9, 0.0, 1.0]


class Lion(Optimizer):
    """An optimizer that names a kernel which no engine has."""

    kernel = "lion"
    state_names = ("mean", "square")

    def settings(self, lr: float) -> list[float]:
        return [lr]


class Bare(Heavy):
    """An optimizer that has not the states its kernel needs."""

    kernel = "adam"
    state_names = ("mean",)


def test_an_optimizer_is_run_by_the_kernel_it_names(device):
    """Not by how many states it has: two are Adam's, too."""
    one, two = (made(device, nc.ByGlobalNorm(0.5)) for _ in range(2))
    heavy, plain = Heavy(one, 0.1), nc.SGD(two, 0.1, momentum=0.9)
    for grads in GRADS:
        for groups, optimizer in ((one, heavy), (two, plain)):
            groups.set_grads(grads)
            optimizer.step()
    for name in PARAMS:
        np.testing.assert_array_equal(np.asarray(one.params[name]), np.asarray(two.params[name]))
    states = heavy.state_dict()["groups"]["g"]["states"]["w"]
    np.testing.assert_array_equal(
        states["velocity"], plain.state_dict()["groups"]["g"]["states"]["w"]["velocity"]
    )
    assert not states["spare"].any()


def test_kernels_that_an_engine_does_not_have_are_refused(device):
    groups = made(device, None)
    with pytest.raises(ValueError, match=rf"kernel: .*'adam', which device='{device}' has, got 'l"):
        Lion(groups, 0.1)
    with pytest.raises(ValueError, match=r"state_names: expected from 2 to 2 names for the kernel"):
        Bare(groups, 0.1)
    with pytest.raises(ValueError, match="kernel: expected one of"):
        Lion(None, 0.1).apply_gradients([(np.ones(2), np.ones(2))])


def test_arrays_that_come_twice_are_updated_twice():
    optimizer, variable = nc.SGD(None, 0.5), np.zeros(3)
    optimizer.apply_gradients([(np.ones(3), variable), (np.ones(3), variable)])
    assert variable.tolist() == [-1.0] * 3
    optimizer.apply_gradients([])
    with pytest.raises(ValueError, match=r"grads_and_vars\[1\]: shares memory with grads_and_vars"):
        optimizer.apply_gradients([(np.ones(3), variable), (np.ones(2), variable[1:])])
    assert variable.tolist() == [-1.0] * 3


def test_measuring_by_value_works_on_copies(device, monkeypatch):
    groups = made(device, nc.ByValue(-0.1, 0.2))
    groups.set_grads(GRADS[0])
    (clipper,) = groups._manager.made_steps().clippers

    def refuse(*_: Any) -> None:
        raise AssertionError("the gradients are written")

    with monkeypatch.context() as patched:
        for name in ("scale", "clamp", "write_exceptional"):
            patched.setattr(clipper.plan, name, refuse)
        found = [groups.clip(apply=False) for _ in range(2)]
    for name, grad in GRADS[0].items():
        np.testing.assert_array_equal(np.asarray(groups.grads[name]), grad)
    clipped = groups.clip()
    assert found[0] == found[1] == clipped


MIXED = {
    "follows": TimesLeast(),
    "bounded": nc.ByNorm(lambda step: 1.0 + 0.25 * step),
    "adapts": nc.AdaGC(warmup=1),
    "shared": nc.ByGlobalNorm(0.5, shared="key"),
    "with it": nc.ByGlobalNorm(0.5, shared="key"),
    "measured": None,
}


def test_rules_that_follow_norms_leave_others_alone(device):
    """Each group does beside the others what it does alone."""
    params = {f"{name}.{key}": own for name in MIXED for key, own in PARAMS.items()}

    def managed(*names):
        members = [
            (n, {k: own for k, own in params.items() if k.split(".")[0] == n}) for n in names
        ]
        groups = nc.ParamGroups([nc.Group(n, own, MIXED[n]) for n, own in members], device=device)
        return groups, nc.SGD(groups, 0.125)

    together = managed(*MIXED)
    apart = [managed(name) for name in MIXED if "shared" not in name and name != "with it"]
    apart.append(managed("shared", "with it"))
    for step, grads in enumerate(
        [*GRADS, {key: own * np.nan for key, own in GRADS[0].items()}, *GRADS]
    ):
        given = {
            f"{name}.{key}": grads[key] * (1 + k) for k, name in enumerate(MIXED) for key in grads
        }
        own = managed_step(*together, given, step)
        for pair in apart:
            for name, told in managed_step(*pair, given, step).items():
                assert repr(own[name]) == repr(told)
                kept, other = (groups[name].params for groups in (together[0], pair[0]))
                for param, right in zip(kept.values(), other.values(), strict=True):
                    assert np.asarray(param).tobytes() == np.asarray(right).tobytes()


def managed_step(groups, optimizer, given, step):
    """Take a step by gradients of the groups, as one or as a clip and a step; return reports."""
    grads = {name: given[name] for name in groups.params}
    if step % 2:
        return optimizer.step(grads).groups
    groups.set_grads(grads)
    report = groups.clip()
    optimizer.step()
    return report.groups

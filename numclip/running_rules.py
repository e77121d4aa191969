"""Rules whose bound follows the norms there have been: AutoClip, ZClip, AdaGC."""

# ruff: noqa: ARG002 - every rule is passed what any rule may need

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, final

import numpy as np

from numclip.border import arguments
from numclip.dtypes import Array
from numclip.host.kernels import running
from numclip.rules import Bound, Rule, State, bound_or_schedule, put

MOST = 2**62  # steps that are counted; one more must fit into int64


class _Norms(dict[str, Array]):
    """A ring of norms; beside it, until the state after takes them over, these in order."""

    __slots__ = ("ordered",)
    ordered: Array | None

    def __reduce__(self) -> tuple[Any, ...]:
        """Let copies be without: norms in order that two states hold are those of neither."""
        return dict, (dict(self),)

    @classmethod
    def of(cls, state: State) -> _Norms:
        """Return a state that has them in order: this one, or a copy."""
        if type(state) is cls and state.ordered is not None:
            return state
        ring, count = np.array(state["norms"]), np.array(state["count"])
        made = cls(norms=ring, count=count)
        known = np.sort(ring[: count.item()])
        made.ordered = np.empty(ring.size)
        made.ordered[: known.size] = known
        return made


@final
@dataclass(frozen=True, slots=True, repr=False)
class AutoClip(Rule):
    """Clip a group's norm to a percentile of its norms so far, the present one included.

    Parameters
    ----------
    percentile : float, default 10
        From 0 to 100, interpolated linearly as by `numpy.percentile`.
    window : int, default 10_000
        How many norms count, the last ones; each takes 8 bytes of state.
    warmup : int, default 0
        How many norms are awaited before the first is clipped.

    Notes
    -----
    **Guarantees.** The percentile is exact, of the norms before clipping. **Edge cases.** The
    first norm is never clipped. Where more than `percentile` per cent of the norms are 0, so is
    the bound. **Source.** Seetharaman et al. 2020 (arXiv 2007.14469), who keep all norms.

    Examples
    --------
    >>> import numpy as np
    >>> from numclip.running_rules import AutoClip
    >>> rule = AutoClip(percentile=50)
    >>> state = rule.initial_state(tensors=1)
    >>> for step, norm in enumerate([3.0, 1.0, 8.0]):
    ...     bound = rule.thresholds(np.array([norm]), norm, step, state)
    ...     clipped = np.minimum(bound, norm)
    ...     state = rule.observe(np.array([norm]), clipped, norm, step, state)
    ...     print(norm, clipped.item())
    3.0 3.0
    1.0 1.0
    8.0 3.0
    """

    scope: ClassVar[str] = "group"
    percentile: float = 10
    window: int = 10_000
    warmup: int = 0

    def __post_init__(self) -> None:
        """Check each field."""
        percentile = arguments.real("percentile", self.percentile)
        if not 0.0 <= percentile <= 100.0:
            raise ValueError(f"percentile: expected a number from 0 to 100, got {percentile}")
        window, warmup = (
            arguments.count("window", self.window, 1),
            arguments.count("warmup", self.warmup, 0),
        )
        put(self, percentile=percentile, window=window, warmup=warmup)

    def initial_state(self, tensors: int) -> dict[str, Array]:
        """Return a ring without norms."""
        return {"norms": np.zeros(self.window), "count": np.array(0, np.int64)}

    def thresholds(self, norms: Array, total: float, step: int, state: State) -> Array:
        """Return the percentile."""
        count: int = state["count"].item()
        if count < self.warmup:
            return np.array([np.inf])
        own = _Norms.of(state)
        share = self.percentile / 100.0
        found = running.percentile(norms.item(), share, count, own["norms"], own.ordered)
        return np.array([found])

    def observe(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Put the norm in the place of the oldest."""
        own = _Norms.of(state)
        if own is state:  # which goes on without: so that both are right at any time
            ordered, own.ordered = own.ordered, None
            own = _Norms(norms=own["norms"].copy(), count=own["count"].copy())
            own.ordered = ordered
        return self.renew(norms, clipped, total, step, own)

    def renew(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Do the same in place: a copy of 10,000 norms takes as long as the rest of a step."""
        own = _Norms.of(state)
        running.take(norms.item(), own["count"], own["norms"], own.ordered)
        return own

    def _sane(self, name: str, found: Array) -> tuple[Array, str]:
        return _counted(found, MOST) if name == "count" else Rule._sane(self, name, found)


@final
@dataclass(frozen=True, slots=True, repr=False)
class ZClip(Rule):
    """Clip a group's norm where it stands out from a moving mean by more than `z` deviations.

    With ``s = (norm - mean) / (deviation + 1e-6)``, norms of ``s > z`` are clipped to
    ``mean + z * deviation / (s / z)``: the further out, the closer to the mean.

    Parameters
    ----------
    alpha : float, default 0.97
        The share of the past in the moving mean and variance, in [0, 1).
    z : float, default 2.5
        How many deviations are let through, >= 0.
    warmup : int, default 25
        How many norms are collected, unclipped, before; mean and variance start as theirs.
    max_norm : float or function of the step, optional
        A bound at all times, during warm-up too.

    Notes
    -----
    **Guarantees.** The deviation is kept in place of the variance: nothing overflows. **Edge
    cases.** A mean of 0, where nothing is known, clips nothing: the bound would be 0 for ever.
    After a warm-up of equal norms greater ones are clipped to them. **Source.** Kumar et al.
    2025 (arXiv 2504.02507). The mean is fed with the norm after clipping; here that is at most
    `max_norm`, which the authors' code leaves out of account.

    Examples
    --------
    >>> import numpy as np
    >>> from numclip.running_rules import ZClip
    >>> rule = ZClip(warmup=2)
    >>> state = rule.initial_state(tensors=1)
    >>> for step, norm in enumerate([2.0, 4.0]):  # a mean of 3, a deviation of 1
    ...     state = rule.observe(np.array([norm]), np.array([norm]), norm, step, state)
    >>> rule.thresholds(np.array([8.0]), 8.0, 2, state).round(3)  # s = 5
    array([4.25])
    """

    scope: ClassVar[str] = "group"
    bound_name: ClassVar[str | None] = "max_norm"
    alpha: float = 0.97
    z: float = 2.5
    warmup: int = 25
    max_norm: Bound | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        put(self, alpha=_share("alpha", self.alpha), z=arguments.bound("z", self.z))
        put(self, warmup=arguments.count("warmup", self.warmup, 0))
        if self.max_norm is not None:
            put(self, max_norm=bound_or_schedule("max_norm", self.max_norm))

    def initial_state(self, tensors: int) -> dict[str, Array]:
        """Return the statistics of no norms."""
        return {"count": np.array(0, np.int64), "mean": np.array(0.0), "deviation": np.array(0.0)}

    def thresholds(self, norms: Array, total: float, step: int, state: State) -> Array:
        """Return the bound where the norm stands out, infinity or `max_norm` where not."""
        bound = math.inf if self.max_norm is None else self.bound(step)
        mean: float = state["mean"].item()
        if mean > 0.0 and state["count"].item() >= self.warmup:
            deviation: float = state["deviation"].item()
            score = (norms.item() - mean) / (deviation + 1e-6)
            if score > self.z:
                bound = min(bound, mean + deviation / score * self.z * self.z)
        return np.array([bound])

    def observe(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Take up the norm before clipping during warm-up, the norm after clipping then."""
        count, mean = state["count"], state["mean"].item()
        known: int = count.item()
        if known < max(self.warmup, 1):
            # One by one as by all at once (Welford): only what is known so far is kept.
            keep = share = known / (known + 1)
            apart = (norms.item() - mean) / math.sqrt(known + 1)
            mean = _blend(mean, norms.item(), keep)
            count = np.array(known + 1, np.int64)
        else:
            keep, share = self.alpha, 1.0 - self.alpha
            mean = _blend(mean, clipped.item(), keep)
            apart = clipped.item() - mean
        deviation: float = state["deviation"].item()
        spread = math.hypot(math.sqrt(keep) * deviation, math.sqrt(share) * apart)
        return {"count": count, "mean": np.array(mean), "deviation": np.array(spread)}

    def _sane(self, name: str, found: Array) -> tuple[Array, str]:
        if name == "count":
            return _counted(found, max(self.warmup, 1))
        return Rule._sane(self, name, found)


@final
@dataclass(frozen=True, slots=True, repr=False)
class AdaGC(Rule):
    """Clip each tensor's norm to a multiple of the moving average of its own clipped norms.

    During warm-up each tensor is scaled by ``min(absolute / total, 1)``, `total` being the
    group's norm, and ``gamma`` is the least of its norms after that. Then the bound is
    ``relative * gamma``, and ``gamma = beta * gamma + (1 - beta) * clipped_norm``.

    Parameters
    ----------
    relative : float, default 1.05
        How far a norm may exceed the average, >= 0.
    absolute : float, default 1.0
        The bound on the group's norm during warm-up, >= 0.
    beta : float, default 0.98
        The share of the past in the average, in [0, 1).
    warmup : int, default 100
        How many steps the warm-up takes; steps that are skipped do not count.

    Notes
    -----
    **Edge cases.** Where ``gamma`` would become 0, and with it all later gradients, it stays
    what it is. A tensor whose norm was never above 0 is in warm-up until it is. **Source.**
    Wang et al. 2025 (arXiv 2502.11034).

    Examples
    --------
    >>> import numpy as np
    >>> from numclip.running_rules import AdaGC
    >>> rule = AdaGC(warmup=1)
    >>> norms, state = np.array([3.0, 4.0]), rule.initial_state(tensors=2)
    >>> clipped = rule.thresholds(norms, 5.0, 0, state)
    >>> clipped.round(3)
    array([0.6, 0.8])
    >>> state = rule.observe(norms, clipped, 5.0, 0, state)
    >>> rule.thresholds(norms, 5.0, 1, state).round(3)
    array([0.63, 0.84])
    """

    scope: ClassVar[str] = "tensor"
    relative: float = 1.05
    absolute: float = 1.0
    beta: float = 0.98
    warmup: int = 100

    def __post_init__(self) -> None:
        """Check each field."""
        for name in ("relative", "absolute"):
            put(self, **{name: arguments.bound(name, getattr(self, name))})
        put(self, beta=_share("beta", self.beta), warmup=arguments.count("warmup", self.warmup, 0))

    def initial_state(self, tensors: int) -> dict[str, Array]:
        """Return averages of which nothing is known."""
        return {"count": np.array(0, np.int64), "gamma": np.full(tensors, np.inf)}

    def thresholds(self, norms: Array, total: float, step: int, state: State) -> Array:
        """Return the bound of each tensor."""
        warms, bounds = state["count"].item() < self.warmup, np.empty(norms.size)
        settings = warms, self.relative, self.absolute
        running.bounds_of(norms, total, *settings, state["gamma"], bounds)
        return bounds

    def observe(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Take up the norms after clipping."""
        count, found = state["count"], np.empty(norms.size)
        known: int = count.item()
        running.blend(clipped, known < self.warmup, self.beta, state["gamma"], found)
        if known < self.warmup:
            count = np.array(known + 1, np.int64)
        return {"count": count, "gamma": found}

    def _sane(self, name: str, found: Array) -> tuple[Array, str]:
        if name == "count":
            return _counted(found, self.warmup)
        return found > 0.0, "numbers > 0"


def _blend(old: Any, new: Any, keep: float) -> Any:
    """Return a moving average after one more value: within both, and so never too large."""
    return new + keep * (old - new)


def _counted(found: Array, most: int) -> tuple[Array, str]:
    return (found >= 0) & (found <= most), f"a count from 0 to {most}"


def _share(name: str, value: Any) -> float:
    """Return a number in [0, 1)."""
    number = arguments.real(name, value)
    if not 0.0 <= number < 1.0:
        raise ValueError(f"{name}: expected a number in [0, 1), got {number}")
    return number

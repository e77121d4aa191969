"""Clip rules: frozen dataclasses that say what norm they bound, and by how much at each step."""

# ruff: noqa: ARG002 - every rule is passed what any rule may need

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, final

import numpy as np

from numclip.border import arguments
from numclip.dtypes import Array

Bound = float | Callable[[int], float]
State = Mapping[str, Array]
MOST_DIMENSIONS = 64  # of a NumPy array


class Rule(ABC):
    """What all rules answer; the norms they are given are finite and >= 0.

    A rule is checked when it is made: a TypeError or ValueError names the field that does not
    fit. What a function of the step returns is checked in the same way at every step; it can be
    called more than once a step, and must then return the same.
    """

    __slots__ = ()
    bound_name: ClassVar[str | None] = None

    @property
    @abstractmethod
    def scope(self) -> str:
        """What the norm is of: an "element", a "unit", a "tensor" or the whole "group"."""

    @property
    def ord(self) -> float:
        """The order of the norm."""
        return 2.0

    @property
    def shared(self) -> Hashable:
        """The key of groups that are clipped by one norm with this one, None where it is alone."""
        return None

    @property
    def follows_norms(self) -> bool:
        """Whether the rule is passed norms: its bounds, or what it remembers, depend on them."""
        own = type(self)
        return own.thresholds is not Rule.thresholds or own.observe is not Rule.observe

    @property
    def scheduled(self) -> bool:
        """Whether the bound depends on the step."""
        if type(self).bound is not Rule.bound:
            return True
        return self.bound_name is not None and callable(getattr(self, self.bound_name))

    @property
    def floor(self) -> float | None:
        """The least norm of parameters that counts, where the bound is a fraction of such norms.

        None where the bound is on the norm itself.
        """
        return None

    @property
    def element_bounds(self) -> tuple[float, float]:
        """The bounds on each element, of a rule whose scope is an "element"."""
        return -math.inf, math.inf

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that a unit's norm is taken over, of a rule whose scope is a "unit"."""
        return tuple(range(ndim))

    def __repr__(self) -> str:
        # A function is named, its address left out: the text is compared with that in files.
        values = [(field.name, getattr(self, field.name)) for field in fields(self)]  # type: ignore[arg-type]
        shown = (f"{name}={_name(v) if callable(v) else repr(v)}" for name, v in values)
        return f"{type(self).__name__}({', '.join(shown)})"

    def bound(self, step: int) -> float:
        """Return the bound at a step, infinity where the rule has none of its own."""
        if self.bound_name is None:
            return math.inf
        value = getattr(self, self.bound_name)
        if callable(value):
            found = value(step)
            if type(found) is float and found >= 0.0:
                return found
            return arguments.bound(f"{self.bound_name}(step={step})", found)
        return math.inf if value is None else float(value)

    def divisor(self, size: int) -> float:
        """Return what the norm of a tensor of some size is divided by."""
        return 1.0

    def initial_state(self, tensors: int) -> dict[str, Array]:
        """Return what the rule remembers, before the first step of a group of some tensors."""
        return {}

    def thresholds(self, norms: Array, total: float, step: int, state: State) -> Array:
        """Return the bound for each norm, infinity where it is not clipped.

        There is one norm for each tensor, or one for the group; `total` is the group's L2 norm.
        """
        return np.full(norms.shape, self.bound(step))

    def observe(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Return the state after a step, from the norms before and after clipping."""
        return dict(state)

    def renew(
        self, norms: Array, clipped: Array, total: float, step: int, state: State
    ) -> dict[str, Array]:
        """Return what `observe` returns; the state handed in, which nobody else has, may be it."""
        return self.observe(norms, clipped, total, step, state)

    def check_state(self, state: State, tensors: int) -> None:
        """Refuse, with a ValueError, a state that this rule cannot have come to."""
        expected = self.initial_state(tensors)
        owner = type(self).__name__
        if set(state) != set(expected):
            raise ValueError(f"{owner} state: expected {list(expected)}, got {list(state)}")
        for name, wanted in expected.items():
            found = state[name]
            kind = _kind(found)
            if kind != _kind(wanted):
                raise ValueError(f"{owner} state, {name}: expected {_kind(wanted)}, got {kind}")
            good, meaning = self._sane(name, found)
            if not np.all(good):
                worst = found[~good].flat[0]
                raise ValueError(f"{owner} state, {name}: expected {meaning}, got {worst}")

    def _sane(self, name: str, found: Array) -> tuple[Array, str]:
        """Return which values of a state's array are valid, and a description of valid ones."""
        return np.isfinite(found) & (found >= 0), "finite numbers >= 0"


@final
@dataclass(frozen=True, slots=True, repr=False)
class ByValue(Rule):
    """Hold each element between two bounds, as `clip_by_value`.

    Parameters
    ----------
    min, max : float
        The bounds, infinity included; ``min <= max``.

    Examples
    --------
    >>> from numclip.rules import ByValue
    >>> ByValue(-1, 1)
    ByValue(min=-1.0, max=1.0)
    """

    scope: ClassVar[str] = "element"
    min: float
    max: float

    def __post_init__(self) -> None:
        """Check each field."""
        low, high = arguments.real("min", self.min), arguments.real("max", self.max)
        for name, value in (("min", low), ("max", high)):
            if math.isnan(value):
                raise ValueError(f"{name}: expected a number, got nan")
        if low > high:
            raise ValueError(f"min: expected at most max = {high}, got {low}")
        put(self, min=low, max=high)

    @property
    def element_bounds(self) -> tuple[float, float]:
        """The bounds on each element."""
        return self.min, self.max


@final
@dataclass(frozen=True, slots=True, repr=False)
class ByNorm(Rule):
    """Scale each tensor, or each unit of it, by ``min(1, max_norm / norm)``, as `clip_by_norm`.

    Parameters
    ----------
    max_norm : float or function of the step
        The bound on the norm, >= 0. ``inf`` never clips, 0 gives zeros.
    axes : int or sequence of int, optional
        The axes the norms are taken over, a unit being what the others select. All by default.
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``.

    Examples
    --------
    >>> from numclip.rules import ByNorm
    >>> rule = ByNorm(lambda step: 10.0 / (1 + step), ord=1)
    >>> rule.bound(0), rule.bound(4)
    (10.0, 2.0)
    """

    bound_name: ClassVar[str | None] = "max_norm"
    max_norm: Bound
    axes: int | Iterable[int] | None = None
    ord: float = 2

    def __post_init__(self) -> None:
        """Check each field."""
        order = arguments.order(self.ord)
        put(
            self,
            max_norm=bound_or_schedule("max_norm", self.max_norm),
            axes=_axes(self.axes),
            ord=order,
        )

    @property
    def scope(self) -> str:
        """What the norm is of."""
        return "tensor" if self.axes is None else "unit"

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that a unit's norm is taken over."""
        found = arguments.axes_of(self.axes, ndim)
        return tuple(range(ndim)) if found is None else found


@final
@dataclass(frozen=True, slots=True, repr=False)
class ByAverageNorm(Rule):
    """Scale each tensor by ``min(1, max_norm / (norm / size))``, as `clip_by_average_norm`.

    Parameters
    ----------
    max_norm : float or function of the step
        The bound on the L2 norm divided by the number of elements, >= 0.

    Examples
    --------
    >>> from numclip.rules import ByAverageNorm
    >>> ByAverageNorm(0.1).divisor(250)
    250.0
    """

    scope: ClassVar[str] = "tensor"
    bound_name: ClassVar[str | None] = "max_norm"
    max_norm: Bound

    def __post_init__(self) -> None:
        """Check the field."""
        put(self, max_norm=bound_or_schedule("max_norm", self.max_norm))

    def divisor(self, size: int) -> float:
        """Return the number of elements, at least 1."""
        return float(max(size, 1))


@final
@dataclass(frozen=True, slots=True, repr=False)
class ByGlobalNorm(Rule):
    """Scale a whole group by ``min(1, max_norm / norm)``, as `clip_by_global_norm`.

    Parameters
    ----------
    max_norm : float or function of the step
        The bound on the norm of all the group's tensors together, >= 0.
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``.
    shared : hashable, optional
        Groups of the same key, a str for instance, are clipped by their joint norm.

    Examples
    --------
    >>> from numclip.rules import ByGlobalNorm
    >>> ByGlobalNorm(5, shared="model")
    ByGlobalNorm(max_norm=5.0, ord=2.0, shared='model')
    """

    scope: ClassVar[str] = "group"
    bound_name: ClassVar[str | None] = "max_norm"
    max_norm: Bound
    ord: float = 2
    shared: Hashable = None

    def __post_init__(self) -> None:
        """Check each field."""
        put(
            self,
            max_norm=bound_or_schedule("max_norm", self.max_norm),
            ord=arguments.order(self.ord),
        )
        try:
            hash(self.shared)
        except TypeError:
            raise TypeError(f"shared: expected a hashable key, got {self.shared!r}") from None


@final
@dataclass(frozen=True, slots=True, repr=False)
class ByBlockRMS(Rule):
    """Scale each tensor by ``1 / max(1, rms / threshold)``, as `clip_by_block_rms`.

    Parameters
    ----------
    threshold : float or function of the step
        The bound on the root mean square of the elements, >= 0.

    Notes
    -----
    **Source.** Shazeer and Stern 2018 (arXiv 1804.04235, section 6).

    Examples
    --------
    >>> from numclip.rules import ByBlockRMS
    >>> ByBlockRMS(1.0).divisor(400)
    20.0
    """

    scope: ClassVar[str] = "tensor"
    bound_name: ClassVar[str | None] = "threshold"
    threshold: Bound

    def __post_init__(self) -> None:
        """Check the field."""
        put(self, threshold=bound_or_schedule("threshold", self.threshold))

    def divisor(self, size: int) -> float:
        """Return the root of the number of elements, at least 1."""
        return math.sqrt(max(size, 1))


@final
@dataclass(frozen=True, slots=True, repr=False)
class Adaptive(Rule):
    """Hold the norm of each unit to a fraction of its parameters' norm, as `adaptive_clip`.

    Parameters
    ----------
    clip_factor : float or function of the step, default 0.01
        The greatest ratio of the norms, >= 0.
    eps : float, default 1e-3
        The least parameter norm that counts, >= 0.
    axes : int or sequence of int, optional
        The axes the norms are taken over. By default all but the last; all for one dimension.

    Notes
    -----
    **Source.** Brock et al. 2021 (arXiv 2102.06171, equation 3), who leave the last layer out:
    give it a group of its own.

    Examples
    --------
    >>> from numclip.rules import Adaptive
    >>> Adaptive(axes=0)
    Adaptive(clip_factor=0.01, eps=0.001, axes=(0,))
    """

    scope: ClassVar[str] = "unit"
    bound_name: ClassVar[str | None] = "clip_factor"
    clip_factor: Bound = 0.01
    eps: float = 1e-3
    axes: int | Iterable[int] | None = None

    def __post_init__(self) -> None:
        """Check each field."""
        factor = bound_or_schedule("clip_factor", self.clip_factor)
        put(self, clip_factor=factor, eps=arguments.bound("eps", self.eps), axes=_axes(self.axes))

    @property
    def floor(self) -> float:
        """The least parameter norm that counts."""
        return self.eps

    def reduced_axes(self, ndim: int) -> tuple[int, ...]:
        """Return the axes that a unit's norm is taken over."""
        return arguments.adaptive_axes(self.axes, ndim)


def _kind(found: Any) -> str:
    """Return an array's dtype and shape in words, or the name of another object's type."""
    if isinstance(found, np.ndarray):
        return f"{found.dtype}{found.shape}"
    return type(found).__name__


def _name(function: Any) -> str:
    return f"<function {getattr(function, '__qualname__', type(function).__qualname__)}>"


def put(rule: Rule, **values: Any) -> None:
    """Put checked values into a frozen rule that is being made."""
    for name, value in values.items():
        object.__setattr__(rule, name, value)


def bound_or_schedule(name: str, value: Any) -> Bound:
    """Return a number >= 0, or a function of the step as it is."""
    return value if callable(value) else arguments.bound(name, value)


def _axes(value: Any) -> tuple[int, ...] | None:
    """Return axes as a tuple; whether an array has them is checked when there is one."""
    if value is None:
        return None
    given = tuple(value) if isinstance(value, Iterable) else (value,)
    arguments.axes_of(given, MOST_DIMENSIONS)
    return tuple(map(operator.index, given))

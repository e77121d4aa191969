"""The norm of gradients that arrive in pieces."""

from __future__ import annotations

import math
import threading
from copy import copy
from typing import Any, Self

import numpy as np

from numclip import tables
from numclip.border import arguments
from numclip.border.arguments import DUPLICATES
from numclip.clipping.clip import norm_of_sum
from numclip.clipping.pieces import Piece, piece
from numclip.errors import expected
from numclip.isolation import in_ordinary_environment
from numclip.sums import GRID, Found, Sums, Whole, add_sums, exact, exact_sums, rounded_sum

USUAL = 1e-12, 1e12
"""Norms and least bounds for which the rounding of subnormal results never counts."""


class NormAccumulator:
    """The norm of gradients that arrive in pieces, from several threads or processes.

    Parameters
    ----------
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``.

    Attributes
    ----------
    ord : float
        The order.

    Raises
    ------
    TypeError, ValueError
        Where `ord` is none of the above.

    Notes
    -----
    **Guarantees.** `norm` has the bits that `global_norm` finds for all gradients at once in the
    host's memory, whatever the order in which whole tensors arrive and however they are grouped
    and merged. Every clip by ``clip_by_global_norm(..., use_norm=accumulator)`` of the pieces
    takes the same factor for the same dtypes, and all pieces together are held to the bound as
    strictly as in one call. Sums are exact: integers of some 500 bytes.

    **Edge cases.** Without gradients the norm is 0.0. NaN and Inf pass on; a clip with
    ``nonfinite="zero"`` refuses them, as the norm of the rest is not known. A tensor that arrives
    in parts counts part by part: its bits are those of the parts as tensors.

    **Threads.** `add` and `merge` may be called by several threads at a time. CUDA arrays are
    waited for. An accumulator can be pickled and copied.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> whole, other = nc.NormAccumulator(), nc.NormAccumulator()
    >>> whole.add({"w": np.array([3.0, 0.0])})
    >>> other.add([np.array([4.0])])
    >>> whole.merge(other)
    >>> whole.norm
    5.0
    >>> clipped, norm = nc.clip_by_global_norm([np.array([4.0])], 1.0, use_norm=whole)
    >>> clipped[0].round(12)
    array([0.8])
    """

    def __init__(self, ord: float = 2) -> None:
        self._ord = arguments.order(ord)
        self._lock = threading.Lock()
        self._sums: Sums = {}
        self._terms: Sums = {}  # of rows that repeat, the sums of their magnitudes
        self._loss = self._size = 0
        self._bad, self._special = 0.0, 0.0

    @property
    def ord(self) -> float:
        """The order of the norm."""
        return self._ord

    def __repr__(self) -> str:
        return f"NormAccumulator(ord={self.ord:g}, norm={self.norm!r})"

    def __getstate__(self) -> dict[str, Any]:
        with self._lock:
            found = {name: value for name, value in vars(self).items() if name != "_lock"}
            return {**found, "_sums": dict(self._sums), "_terms": dict(self._terms)}

    def __setstate__(self, found: dict[str, Any]) -> None:
        vars(self).update(found)
        self._lock = threading.Lock()

    def add(self, grads: Any, *, duplicates: str = "sum") -> None:
        """Add gradients.

        Parameters
        ----------
        grads : list, tuple, dict or iterator of gradients
            As in `global_norm`. Only read.
        duplicates : {"sum", "raw"}, default "sum"
            As in `global_norm`. Rows of one index that arrive in different pieces are not summed.

        Raises
        ------
        TypeError, ValueError
            Where an argument does not fit; the message names it. Nothing is added then.
        """
        arguments.choice("duplicates", duplicates, DUPLICATES)
        found = piece(grads, self.ord, duplicates)
        if found is not None:
            self._take(_taken(self.ord, found))

    def merge(self, other: NormAccumulator) -> None:
        """Add all that another accumulator of the same order has.

        Parameters
        ----------
        other : NormAccumulator
            It stays as it is.

        Raises
        ------
        TypeError, ValueError
            Where `other` is no accumulator, this one itself, or of another order.
        """
        if not isinstance(other, NormAccumulator):
            raise TypeError(expected("other", "a NormAccumulator", type(other).__name__))
        if other is self:
            raise ValueError(expected("other", "another accumulator", "this one itself"))
        other.check_order("other", self.ord)
        self._take(other.__getstate__())

    def _take(self, found: dict[str, Any]) -> None:
        with self._lock:
            add_sums(self._sums, found["_sums"], self.ord)
            add_sums(self._terms, found["_terms"], self.ord)
            self._loss += found["_loss"]
            self._size += found["_size"]
            self._bad += found["_bad"]
            self._special += found["_special"]

    @property
    @in_ordinary_environment
    def norm(self) -> float:
        """The norm of all that was added, a float."""
        total, exponent, _ = self._found("_sums")
        return norm_of_sum(total, exponent, self.ord)

    def _found(self, name: str) -> Found:
        with self._lock:
            sums, special = dict(getattr(self, name)), self._special
        return (special, 0, 0.0) if special else rounded_sum(sums)

    def norm_alone(self, ord: Any, bound: Any, nonfinite: Any) -> float:
        """Return the norm if a clip of ordinary arrays needs no more than that; else NaN.

        More is needed where rows repeat, where something is not finite, and where the number of
        elements matters: where the rounding of subnormal results counts.
        """
        if not arguments.are_usual(ord, bound, nonfinite) or bound <= USUAL[0]:
            return math.nan
        if ord != self.ord or nonfinite != "propagate":
            return math.nan
        own = copy(self)  # of one moment: another thread may add rows that repeat
        simple = own._sums == own._terms and not (own._special or own._loss)
        norm = own.norm if simple else math.nan
        return norm if USUAL[0] < norm < USUAL[1] else math.nan

    def check_order(self, name: str, ord: float) -> None:
        """Refuse, by the name of an argument, an accumulator of another order."""
        if self.ord != ord:
            raise ValueError(expected(name, f"one of ord={ord:g}", f"one of ord={self.ord:g}"))

    def check_policy(self, name: str, nonfinite: str) -> None:
        """Refuse likewise one of which too little is known for a policy."""
        if nonfinite == "zero" and self._special:
            wanted = 'finite gradients for nonfinite="zero"'
            got = (
                f"a norm of {self.norm}; that of the rest is not known, so clean them before add()"
            )
            raise ValueError(expected(name, wanted, got))

    @property
    def whole(self) -> Whole:
        """The exact sums, the size and the loss of all that was added."""
        row, own = np.zeros(tables.SUM_COLUMNS), copy(self)  # of one moment, as above
        row[[tables.TOTAL, tables.EXPONENT, tables.ERROR]] = own._found("_sums")
        row[[tables.TERMS, tables.TERMS_EXPONENT]] = own._found("_terms")[:2]
        row[tables.BAD] = own._bad
        return Whole(row, own._size, own._loss / (1 << GRID))

    @classmethod
    def of(cls, ord: float, found: Piece | None) -> Self:
        """Return an accumulator of one piece."""
        made = cls(ord)
        if found is not None:
            made._take(_taken(made.ord, found))
        return made


@in_ordinary_environment
def _taken(ord: float, found: Piece) -> dict[str, Any]:
    """Return a piece as an accumulator's state, whose exact sums leave out non-finite tensors."""
    bad = ~np.isfinite(found.sums[:, tables.TOTAL])
    sums = found.sums[~bad]
    squares, terms = tables.TOTAL, tables.TERMS
    alike = sums[:, squares : squares + 2] == sums[:, terms : terms + 2]
    elements = alike.all(axis=1)  # where no rows repeat
    units = exact_sums(sums[elements], squares, ord, tables.ERROR)
    of_terms = dict(units)
    if not elements.all():
        add_sums(units, exact_sums(sums[~elements], squares, ord, tables.ERROR), ord)
        add_sums(of_terms, exact_sums(sums[~elements], terms, ord), ord)
    with np.errstate(invalid="ignore"):
        special = float(found.sums[bad, tables.TOTAL].sum())
    return {
        "_sums": units,
        "_terms": of_terms,
        "_loss": exact([found.loss]),
        "_size": found.size,
        "_bad": float(found.sums[:, tables.BAD].sum()),
        "_special": special,
    }

"""The norm of gradients that arrive in pieces."""

from __future__ import annotations

import math
import threading
from typing import Any, Self

import numpy as np

from numclip import tables
from numclip.border import arguments
from numclip.border.arguments import DUPLICATES
from numclip.clipping.pieces import Piece, piece
from numclip.dtypes import Array
from numclip.errors import expected
from numclip.formulas import power_term, root, scale_by_power
from numclip.isolation import in_ordinary_environment
from numclip.sums import GRID, Whole, exact, exact_columns, rounded

Found = tuple[float, float, int]
"""A total, what rounding has taken from it, and its exponent."""


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
    **Guarantees.** For the orders 2 and ``inf`` `norm` has the bits that `global_norm` finds for
    all gradients at once in the host's memory, whatever the order in which whole tensors arrive
    and however they are grouped and merged. Other orders are as right, and do not depend on the
    order of arrival either, but may differ from `global_norm` in the last bits. Every
    clip by ``clip_by_global_norm(..., use_norm=accumulator)`` of the pieces takes the same factor
    for the same dtypes, and all pieces together are held to the bound as strictly as in one call.
    Sums are exact: integers of some 500 bytes.

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
        self.ord = arguments.order(ord)
        self._lock = threading.Lock()
        # Exact sums in units of `sums.GRID`: of order 2 one of squares, under 0; of others, of
        # powers of fractions, under the exponents of these. Of order inf, the fractions alone.
        self._sums: dict[int, int] = {}
        self._terms: dict[int, int] = {}  # likewise, of rows that repeat the magnitudes
        self._loss = self._size = 0
        self._bad, self._special = 0.0, 0.0

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
            for name in ("_sums", "_terms"):
                sums: dict[int, int] = getattr(self, name)
                for power, units in found[name].items():
                    own = sums.get(power, 0)
                    sums[power] = max(own, units) if self.ord == math.inf else own + units
            self._loss += found["_loss"]
            self._size += found["_size"]
            self._bad += found["_bad"]
            self._special += found["_special"]

    @property
    @in_ordinary_environment
    def norm(self) -> float:
        """The norm of all that was added, a float."""
        total, _, exponent = self._found("_sums")
        if self.ord == 2.0:
            return scale_by_power(math.sqrt(total), exponent)
        return scale_by_power(total, exponent)

    def _found(self, name: str) -> Found:
        """Return the sum of squares over ``4**exponent``, the norm over ``2**exponent`` else."""
        with self._lock:
            sums, special = dict(getattr(self, name)), self._special
        if special:
            return special, 0.0, 0
        if self.ord == 2.0:
            return rounded(sums.get(0, 0))
        return _norm(sums, self.ord)

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
        """What a clip is told of all that was added."""
        row = np.zeros(tables.SUM_COLUMNS)
        row[[tables.TOTAL, tables.ERROR, tables.EXPONENT]] = self._found("_sums")
        row[[tables.TERMS, tables.TERMS_EXPONENT]] = self._found("_terms")[::2]
        row[tables.BAD] = self._bad
        return Whole(row, self._size, self._loss / (1 << GRID))

    @classmethod
    def of(cls, ord: float, found: Piece | None) -> Self:
        """Return an accumulator of one piece."""
        made = cls(ord)
        if found is not None:
            made._take(_taken(made.ord, found))
        return made


@in_ordinary_environment
def _taken(ord: float, found: Piece) -> dict[str, Any]:
    """Return a piece as the state of an accumulator, without those tensors that are not finite."""
    told = found.sums[:, tables.TOTAL] if ord == 2.0 else found.norms[:, 0]
    bad = ~np.isfinite(told)
    sums = found.sums[~bad]
    if ord == 2.0:
        squares, terms = tables.TOTAL, tables.TERMS
        alike = sums[:, squares : squares + 2] == sums[:, terms : terms + 2]
        elements = alike.all(axis=1)  # where no rows repeat
        of_elements = _exact_squares(sums[elements])
        units = {0: of_elements + _exact_squares(sums[~elements])}
        of_terms = {0: of_elements + exact_columns(sums[~elements], terms, terms + 1)}
    else:
        units, of_terms = (_powers(own[~bad], ord) for own in (found.norms, found.terms))
    with np.errstate(invalid="ignore"):
        special = float(told[bad].sum())
    return {
        "_sums": units,
        "_terms": of_terms,
        "_loss": exact([found.loss]),
        "_size": found.size,
        "_bad": float(found.sums[:, tables.BAD].sum()),
        "_special": special,
    }


def _exact_squares(sums: Array) -> int:
    return exact_columns(sums, tables.TOTAL, tables.EXPONENT, tables.ERROR)


def _powers(norms: Array, ord: float) -> dict[int, int]:
    """Return exact sums of the powers of tensors' norms, as fractions of powers of two."""
    found: dict[int, int] = {}
    for norm, power in norms.tolist():
        fraction, exponent = math.frexp(norm)
        key = exponent + int(power)
        units = exact([fraction if ord == math.inf else power_term(fraction, ord)])
        if units:
            own = found.get(key, 0)
            found[key] = max(own, units) if ord == math.inf else own + units
    return found


def _norm(sums: dict[int, int], ord: float) -> Found:
    """Return the norm that belongs to such sums, as a number and a power of two."""
    highest = max(sums, default=0)
    if ord == math.inf:
        return rounded(sums.get(highest, 0))[0], 0.0, highest
    terms = [
        rounded(units)[0] * math.pow(2.0, (power - highest) * ord) for power, units in sums.items()
    ]
    return root(math.fsum(terms), ord), 0.0, highest

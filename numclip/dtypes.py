"""The table of element types: how each is stored, computed and rounded."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from numclip import formulas

Array = npt.NDArray[Any]


@dataclass(frozen=True, eq=False)
class DType:
    """A gradient's element type, as kernels need to know it.

    `like` is the storage sample: an empty array that gives kernels the dtype.
    `roundoff` bounds the relative error of one stored product, `digits` is the precision the
    factor may have, `precision` the dtype's own digits and the exponent of its smallest
    subnormal. `smallest_subnormal` is that if subnormal products are rounded to nearest, 0 if
    they are truncated (the 16-bit types).
    """

    name: str
    like: Array
    compute: np.dtype[Any]
    components: int
    roundoff: float
    digits: int
    precision: tuple[int, int]
    smallest_subnormal: float

    @property
    def is_half(self) -> bool:
        """Whether it has 16 bits."""
        return self.storage.itemsize == 2

    @property
    def storage(self) -> np.dtype[Any]:
        """The dtype that memory is read as."""
        return self.like.dtype

    @cached_property
    def native(self) -> np.dtype[Any]:
        """The dtype of NumPy, or that of ml_dtypes for bfloat16."""
        return next(native for native, row in _BY_DTYPE.items() if row is self)

    @cached_property
    def wide(self) -> DType:
        """The type in double precision that holds the elements, real or complex as they are."""
        return _ROWS["complex128" if self.components == 2 else "float64"]

    @cached_property
    def tiny(self) -> float:
        """The smallest normal number of the type that factors are stored in."""
        return float(np.finfo(self.compute).tiny)

    @cached_property
    def smallest(self) -> float:
        """The smallest subnormal of the dtype."""
        return 2.0 ** self.precision[1]

    @property
    def truncate_below(self) -> float:
        """The bound over the norm of ones under which subnormal rounding counts, see `formulas`."""
        return self.smallest_subnormal / (2.0 * formulas.SUBNORMAL_LIMIT)

    @cached_property
    def limits(self) -> Array:
        """What `kernels.one_norm` reads: `roundoff`, `digits`, `tiny` and `truncate_below`."""
        return np.array([self.roundoff, self.digits, self.tiny, self.truncate_below])

    @cached_property
    def mask(self) -> Array:
        """The mask of the stored bits without the sign, an array of one unsigned integer."""
        bits = 8 * self.storage.itemsize
        return np.array([(1 << (bits - 1)) - 1], f"u{bits // 8}")


def _row(
    name: str, storage: type, compute: type, components: int, precision: tuple[int, int]
) -> DType:
    halves = np.dtype(storage).kind in "ui"
    # A 16-bit product is rounded to float32 before it is stored.
    roundoff = 2.0 ** -precision[0] + (2.0**-23 if halves else 0.0)
    return DType(
        name=name,
        like=np.empty(0, storage),
        compute=np.dtype(compute),
        components=components,
        roundoff=roundoff,
        digits=24 if compute is np.float32 else 53,
        precision=precision,
        smallest_subnormal=0.0 if halves else 2.0 ** precision[1],
    )


_ROWS = {
    row.name: row
    for row in (
        _row("float16", np.uint16, np.float32, 1, (11, -24)),
        _row("bfloat16", np.int16, np.float32, 1, (8, -133)),
        _row("float32", np.float32, np.float32, 1, (24, -149)),
        _row("float64", np.float64, np.float64, 1, (53, -1074)),
        _row("complex64", np.float32, np.float32, 2, (24, -149)),
        _row("complex128", np.float64, np.float64, 2, (53, -1074)),
    )
}
NAMES = ", ".join(_ROWS)
FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = list(_ROWS.values())[:4]

# bfloat16 is a dtype of ml_dtypes, not of NumPy: it is added when `lookup` first meets it.
_BY_DTYPE = {np.dtype(name): row for name, row in _ROWS.items() if name != "bfloat16"}
_STORAGE: dict[np.dtype[Any], np.dtype[Any]] = {}


def lookup(dtype: np.dtype[Any]) -> DType | None:
    """Return the `DType` of a NumPy dtype, None if gradients cannot have it."""
    row = _BY_DTYPE.get(dtype)
    if row is None and dtype.name == "bfloat16" and dtype.itemsize == 2:
        row = _BY_DTYPE[dtype] = _ROWS["bfloat16"]
    return row


def refusal(dtype: np.dtype[Any]) -> str:
    """Return the reason why gradients cannot have a dtype, and the remedy."""
    if (dtype.kind == "f" and dtype.itemsize > 8) or (dtype.kind == "c" and dtype.itemsize > 16):
        return f"{dtype} (extended precision); convert it with .astype(numpy.float64)"
    if dtype.names is not None:
        return f"structured dtype {dtype}; pass its fields one by one"
    if dtype.kind in "iub":
        return f"{dtype}; convert it with .astype(numpy.float32)"
    if dtype == np.dtype("V2"):
        return f"{dtype}, as files hold bfloat16; pass array.view(ml_dtypes.bfloat16)"
    return f"{dtype}"


def as_stored(array: Array) -> Array:
    """Return a contiguous array as a view of its stored numbers, two for each complex element."""
    storage = _STORAGE.get(array.dtype)
    if storage is None:
        row = lookup(array.dtype)
        assert row is not None
        storage = _STORAGE[array.dtype] = row.storage
    return array if array.dtype is storage else array.view(storage)

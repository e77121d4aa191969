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

    `like` is an empty array of what is stored, from which they take the type.
    `roundoff` bounds the relative error of one stored product, `digits` is the precision the
    factor may have, `precision` the dtype's own digits and the exponent of its smallest
    positive number. `grain` is that number where products round to nearest below the normal
    numbers, 0 where they are cut (the 16-bit types).
    """

    name: str
    like: Array
    compute: np.dtype[Any]
    components: int
    roundoff: float
    digits: int
    precision: tuple[int, int]
    grain: float

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
        """The dtype as NumPy knows it, or the package that makes bfloat16."""
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
        """The smallest positive number of the dtype."""
        return 2.0 ** self.precision[1]

    @property
    def coarse(self) -> float:
        """The bound under which the grain matters (see `formulas`), over the norm of ones."""
        return self.grain / (2.0 * formulas.GRAIN_LIMIT)

    @cached_property
    def limits(self) -> Array:
        """What `kernels.joint` is told: roundoff, digits, `tiny` and `coarse`."""
        return np.array([self.roundoff, self.digits, self.tiny, self.coarse])

    @cached_property
    def mask(self) -> Array:
        """An unsigned integer of the stored bits but for the sign, as an array of one."""
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
        grain=0.0 if halves else 2.0 ** precision[1],
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

# bfloat16 is not NumPy's own: ml_dtypes makes it, and its rows are added when they are met.
_BY_DTYPE = {np.dtype(name): row for name, row in _ROWS.items() if name != "bfloat16"}
_STORAGE: dict[np.dtype[Any], np.dtype[Any]] = {}


def lookup(dtype: np.dtype[Any]) -> DType | None:
    """Return the row of a native dtype, None where it is no gradient's."""
    row = _BY_DTYPE.get(dtype)
    if row is None and dtype.name == "bfloat16" and dtype.itemsize == 2:
        row = _BY_DTYPE[dtype] = _ROWS["bfloat16"]
    return row


def refusal(dtype: np.dtype[Any]) -> str:
    """Say why a dtype is no gradient's and how to mend it."""
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
    """Return a contiguous array of gradients as the numbers that kernels see, two if complex."""
    storage = _STORAGE.get(array.dtype)
    if storage is None:
        row = lookup(array.dtype)
        assert row is not None
        storage = _STORAGE[array.dtype] = row.storage
    return array if array.dtype is storage else array.view(storage)

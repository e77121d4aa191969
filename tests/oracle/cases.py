"""The table of gradients that tests try; its models are those of the benches, cut small."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

import numclip as nc
from tests.oracle.models import MODELS, Shape
from tests.oracle.reference import DTYPES

Builder = Callable[[np.random.Generator], Any]


class Weights(NamedTuple):
    kernel: Any
    bias: Any


@dataclass(frozen=True)
class Case:
    """Named gradients: the same name and seed always build the same ones."""

    name: str
    build: Builder = field(repr=False)
    # What tests/rings.py combines: the names of the shape (or case), the dtype and the layout.
    facets: tuple[str, str, str]
    # Whether the gradients can be written: contiguous or strided, aligned, in native byte order.
    writable: bool = True
    # Whether they are too large for kernels that run as plain Python.
    large: bool = False

    def gradients(self, seed: int = 0) -> Any:
        return self.build(np.random.default_rng([zlib.crc32(self.name.encode()), seed]))

    @property
    def fits_a_gpu(self) -> bool:
        """Whether the gradients can lie on a GPU and numclip accepts them there."""
        return self.facets[2] not in NOT_ON_A_GPU


# ---- values


def normal(
    rng: np.random.Generator, shape: tuple[int, ...], dtype: Any = "float32", scale: float = 1.0
) -> np.ndarray:
    dtype = DTYPES[dtype] if isinstance(dtype, str) else np.dtype(dtype)
    values = rng.standard_normal(shape) * scale
    if dtype.kind == "c":
        values = values + 1j * rng.standard_normal(shape) * scale
    return np.asarray(values).astype(dtype)


def slices(
    rng: np.random.Generator,
    rows: int,
    dense_shape: tuple[int, ...],
    dtype: str = "float32",
    *,
    repeated: bool,
) -> nc.IndexedSlices:
    """Random rows in random order, some of which share an index if `repeated`."""
    values = normal(rng, (rows, *dense_shape[1:]), dtype)
    if repeated:
        indices = rng.integers(0, min(dense_shape[0], max(rows // 2, 1)), rows)
    else:
        indices = rng.permutation(dense_shape[0])[:rows]
    return nc.IndexedSlices(values, indices, dense_shape)


# ---- layouts: the same values in other memory layouts


def at_offset(array: np.ndarray, offset: int) -> np.ndarray:
    """A C-contiguous copy that starts `offset` bytes after a multiple of 64."""
    room = np.empty(array.nbytes + offset + 64, np.uint8)
    start = -room.ctypes.data % 64 + offset
    copy = room[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def fortran(array: np.ndarray) -> np.ndarray:
    return np.asfortranarray(array)


def strided(array: np.ndarray) -> np.ndarray:
    wide = np.zeros((*array.shape[:-1], 3 * array.shape[-1]), array.dtype)
    wide[..., 1::3] = array
    return wide[..., 1::3]


def negative(array: np.ndarray) -> np.ndarray:
    return np.flip(np.flip(array).copy())


def misaligned(array: np.ndarray) -> np.ndarray:
    return at_offset(array, 1)


def read_only(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array.flags.writeable = False
    return array


def byte_swapped(array: np.ndarray) -> np.ndarray:
    return array.astype(array.dtype.newbyteorder("S"))


LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "fortran": fortran,
    "strided": strided,
    "negative": negative,
    "misaligned": misaligned,
    "read_only": read_only,
    "byte_swapped": byte_swapped,
}
UNWRITABLE = {"read_only", "byte_swapped"}
NOT_ON_A_GPU = {"misaligned", *UNWRITABLE}  # do not exist on a GPU, or are refused there

SHAPES: dict[str, tuple[int, ...]] = {
    "scalar": (),
    "one": (1,),
    "empty": (0,),
    "empty_rows": (3, 0, 2),
    "vector": (7,),
    "odd": (33, 17),
    "filter": (3, 3, 4, 5),
    "thousand": (1001,),
    "chunks": (40_000,),
}


def single(shape: tuple[int, ...], dtype: str) -> Builder:
    return lambda rng: [normal(rng, shape, dtype)]


def laid_out(layout: str, dtype: str) -> Builder:
    return lambda rng: [LAYOUTS[layout](normal(rng, (13, 11), dtype))]


def layers(rng: np.random.Generator) -> list[np.ndarray]:
    shapes = [(33, 17), (17,), (2, 3, 4), (), (0, 5), (1,)]
    return [normal(rng, shape) for shape in shapes]


def of_shapes(rng: np.random.Generator, shapes: Sequence[Shape]) -> list[np.ndarray]:
    return [rng.standard_normal(shape, np.float32) for shape in shapes]


def cut(shapes: Sequence[Shape]) -> list[Shape]:
    """The first 20 shapes of a model, each side cut to 8 at most."""
    return [tuple(min(side, 8) for side in shape) for shape in shapes[:20]]


def model(name: str) -> Builder:
    return lambda rng: of_shapes(rng, cut(MODELS[name]))


def mixed(rng: np.random.Generator) -> list[np.ndarray]:
    return [normal(rng, (5, 3), dtype) for dtype in DTYPES]


def with_none(rng: np.random.Generator) -> list[Any]:
    return [None, normal(rng, (9,)), None, normal(rng, (4, 4), "float64"), None]


CONTAINERS: dict[str, Builder] = {
    "no_gradients": lambda _: [],
    "only_none": lambda _: [None, None],
    "list": layers,
    "tuple": lambda rng: tuple(layers(rng)),
    "named_tuple": lambda rng: Weights(normal(rng, (8, 3)), normal(rng, (3,))),
    "dict": lambda rng: {"w": normal(rng, (8, 3)), "none": None, "b": normal(rng, (3,))},
    "with_none": with_none,
    "mixed_dtypes": mixed,
    "zeros": lambda _: [np.zeros((4, 4), np.float32), np.zeros(3)],
    "many_small": lambda rng: [normal(rng, (int(n),)) for n in rng.integers(0, 9, 300)],
    "slices": lambda rng: [slices(rng, 6, (50, 4), repeated=False)],
    "repeated_slices": lambda rng: [slices(rng, 30, (50, 4), repeated=True)],
    "empty_slices": lambda rng: [slices(rng, 0, (50, 4), repeated=False), normal(rng, (3,))],
    "vector_slices": lambda rng: [slices(rng, 30, (50,), "float64", repeated=True)],
    "half_slices": lambda rng: [slices(rng, 30, (50, 2, 3), "float16", repeated=True)],
    "bfloat16_slices": lambda rng: [slices(rng, 30, (50, 5), "bfloat16", repeated=True)],
    "complex_slices": lambda rng: [slices(rng, 30, (50, 3), "complex64", repeated=True)],
    "sparse_and_dense": lambda rng: {
        "embedding": slices(rng, 40, (1000, 8), repeated=True),
        "w": normal(rng, (8, 8)),
        "b": normal(rng, (8,), "float64"),
    },
    **{name: model(name) for name in MODELS},
}

DENSE_CASES = [
    *(
        Case(f"{name}-{dtype}", single(shape, dtype), (name, dtype, "C"), large=name == "chunks")
        for name, shape in SHAPES.items()
        for dtype in DTYPES
    ),
    *(
        Case(
            f"{layout}-{dtype}",
            laid_out(layout, dtype),
            ("matrix", dtype, layout),
            writable=layout not in UNWRITABLE,
        )
        for layout in LAYOUTS
        for dtype in DTYPES
        if (layout, dtype) != ("byte_swapped", "bfloat16")  # ml_dtypes has one byte order only
    ),
]
CASES = [*DENSE_CASES, *(Case(name, build, (name, "", "C")) for name, build in CONTAINERS.items())]

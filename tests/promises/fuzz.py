"""A fuzzer of the public functions: ``python -m tests.promises.fuzz 200000 [first case]``.

Each case is a call with arguments that are partly hostile: odd dtypes, byte orders, strides,
overlaps, subclasses, bounds, slices. It must end with what the contract says, or with an error that
names an argument and leaves every byte as it was; bytes beside what is to be written never change.
Cases run in child processes, and a case that ends a process is a failure. A case is found again by
its number.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys
import traceback
import warnings
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np

import numclip as nc
from tests.oracle import checks, reference
from tests.oracle.reference import BFLOAT16

# A child starts and loads compiled code for 3 s, then takes 260 cases a second or more. With a new
# cache the first 600 cases took 279 s: they compile the kernels.
BATCH = 10_000
PAD = 64
GOOD = [np.dtype(code) for code in ("f2", "f4", "f8", "F", "D")] + [BFLOAT16]
ODD = [
    "i4",
    "u1",
    "?",
    "g",
    "G",
    "O",
    "U3",
    "S2",
    "M8[s]",
    "m8[s]",
    "V2",
    "f4,i4",
    ">f4",
    ">f8",
    ">c8",
]
NAMED = re.compile(
    r"(grads?|out|params?|clip_norm|use_norm|ord|nonfinite|duplicates|clip_value_m(in|ax)|axes|lr"
    r"|threshold|clip_factor|eps|layerwise|values|indices|dense_shape|parts|max_norm|min|max|clip"
    r"|grads_and_vars|unscale|momentum|betas|name|w|g\.w)\b"
)


class Case:
    """The random choices of one case, and all memory that they made."""

    def __init__(self, number: int) -> None:
        self.rng = np.random.default_rng(number)
        self.memory: list[tuple[np.ndarray, np.ndarray]] = []  # and a mask of the elements
        self.where: dict[int, int] = {}  # of an array, by its id
        self.held: list[Any] = []
        self.items: list[Any] = []  # of what can be iterated once

    def one(self, *choices: Any) -> Any:
        return choices[self.rng.integers(len(choices))]

    def rarely(self, often: int = 12) -> bool:
        return bool(self.rng.integers(often) == 0)

    # ---- arrays

    def shape(self) -> tuple[int, ...]:
        ndim = self.one(0, 1, 1, 1, 2, 2, 3)
        return tuple(int(n) for n in self.rng.integers(0 if self.rarely(4) else 1, 6, ndim))

    def array(self, shape: tuple[int, ...] | None = None, dtype: Any = None) -> np.ndarray:
        """An array of any strides in memory with something before and behind it."""
        shape = self.shape() if shape is None else shape
        dtype = np.dtype(dtype if dtype is not None else self.dtype())
        if dtype.hasobject:
            return np.full(shape, 1.5, object)
        order = (
            list(self.rng.permutation(len(shape))) if self.rarely(3) else range(len(shape))[::-1]
        )
        strides, step = [0] * len(shape), dtype.itemsize * self.one(1, 1, 1, 2)
        for axis in order:
            strides[axis], step = step, step * max(shape[axis], 1)
        offset = PAD + (self.one(1, 3) if self.rarely() else 0)
        for axis in range(len(shape)):
            if shape[axis] and self.rarely(10):  # backwards
                offset += strides[axis] * (shape[axis] - 1)
                strides[axis] = -strides[axis]
        if shape and self.rarely(30):
            strides[self.rng.integers(len(shape))] = self.one(0, 1, dtype.itemsize)
        size = 2 * PAD + step + dtype.itemsize + sum(map(abs, strides)) * max(shape, default=1)
        raw, mask = self.rng.integers(0, 256, size, np.uint8), np.zeros(size, np.bool_)
        array = np.ndarray(shape, dtype, raw, offset, strides)
        np.ndarray((*shape, dtype.itemsize), np.bool_, mask, offset, (*strides, 1))[...] = True
        self.fill(array)
        self.where[id(array)] = len(self.memory)
        self.memory.append((raw, mask))
        self.held.append(array)
        if self.rarely(25):
            array.flags.writeable = False
        return array

    def fill(self, array: np.ndarray) -> None:
        values = self.rng.standard_normal(array.shape) * 10.0 ** self.one(0, 0, 0, -3, 3)
        if self.rarely(6):
            values *= 10.0 ** int(self.rng.integers(-320, 309))
        if self.rarely(10) and values.size:
            values.reshape(-1)[self.rng.integers(values.size)] = self.one(np.nan, np.inf, -np.inf)
        if array.dtype.kind in "fcV" and array.dtype.names is None and array.dtype != "V2":
            array[...] = values.astype(array.dtype.newbyteorder("="))

    def dtype(self) -> Any:
        return self.one(*ODD) if self.rarely(25) else self.one(*GOOD)

    def entry(self) -> Any:
        """A gradient, or what is none."""
        if self.rarely(6):
            return self.slices()
        if self.rarely(40):
            return self.one(
                1.5, "a", [1.0, 2.0], {"a": 1}, object(), True, 1j, np.float32(2), set()
            )
        made = self.array()
        if self.rarely(40):
            return self.one(
                lambda: np.ma.masked_array(made),
                lambda: np.asarray(made).view(type("Own", (np.ndarray,), {})),
                lambda: np.matrix(np.ones((2, 2))),
            )()
        return made

    def entry_or_entries(self) -> Any:
        return self.entries() if self.rarely(4) else self.entry()

    def slices(self) -> Any:
        shape = (int(self.rng.integers(1, 6)), *self.shape()[:2])
        rows = int(self.rng.integers(0, 6))
        made = self.array((rows, *shape[1:]), self.one(*GOOD))
        slices = nc.IndexedSlices(made, self.rng.integers(0, shape[0], rows), shape)
        if slices.values is not made:  # a view
            self.where[id(slices.values)] = self.where[id(made)]
        return slices

    def entries(self) -> Any:
        count = int(self.rng.integers(0, 5))
        items = [None if self.rarely(10) else self.entry() for _ in range(count)]
        if self.rarely(15) and items:
            items.append(items[0])
        self.items = items
        names = dict(zip("abcdef", items, strict=False))
        return self.one(
            lambda: items,
            lambda: tuple(items),
            lambda: names,
            lambda: {"x": items, "y": (names, None)},
            lambda: OrderedDict(names),
            lambda: iter(items) if self.rarely() else items,
        )()

    def params_of(self, grads: Any) -> Any:
        if isinstance(grads, (list, tuple)):
            return type(grads)(map(self.params_of, grads))
        if isinstance(grads, dict):
            return {name: self.params_of(item) for name, item in grads.items()}
        shape = getattr(grads, "dense_shape", getattr(grads, "shape", (2,)))
        return self.array(self.shape() if self.rarely() else tuple(shape))

    # ---- numbers

    def bound(self) -> Any:
        if self.rarely(15):
            return self.one(
                -1.0, math.nan, True, "1", None, 1j, np.array([1.0]), 10**400, np.ma.masked, b"1",
                np.timedelta64(1, "s"), np.array(1, object), [1.0], np.longdouble("1e4000"),
            )  # fmt: skip
        return self.one(
            0, 1, 1.0, 0.5, 1e-3, 1e3, math.inf, 5e-324, 1e-310, 1e300, np.float32(0.7),
            np.array(0.3), np.float16(2), 10**30, float(abs(self.rng.standard_normal())),
        )  # fmt: skip

    def axes(self) -> Any:
        return self.one(
            None, 0, 1, -1, (0,), (0, 1), (), [0], 7, "a", 1.0, (0, 0), True, np.int64(0)
        )

    def order(self) -> Any:
        return self.one(2, 2, 2, 2.0, 1, 3, math.inf, 1.5, 0, -1, math.nan, "2", None, 1e6)

    def out(self, given: Any) -> Any:
        kind = self.rng.integers(12)
        if kind < 5:
            return None
        if kind < 9:
            return given
        if isinstance(given, (list, tuple)):
            return type(given)(map(self.out_of_one, given))
        if isinstance(given, dict):
            return {name: self.out_of_one(item) for name, item in given.items()}
        return self.out_of_one(given)

    def out_of_one(self, given: Any) -> Any:
        if isinstance(given, np.ndarray) and not given.dtype.hasobject:
            if self.rarely(6):
                return given[..., ::-1] if given.ndim else given
            shape = self.shape() if self.rarely(15) else given.shape
            return self.array(shape, self.dtype() if self.rarely(15) else given.dtype)
        if isinstance(given, nc.IndexedSlices):
            return given.with_values(self.array(given.values.shape, given.dtype))
        return self.one(None, given, np.ones(3))

    # ---- what memory holds

    def frozen(self) -> list[bytes]:
        return [raw.tobytes() for raw, _ in self.memory]

    def check_unwritten(self, before: list[bytes], written: list[Any]) -> None:
        """Every byte is as it was, but for those of the elements of what may be written."""
        allowed = {self.where.get(id(getattr(item, "values", item)), -1) for item in written}
        own = [item for item in written if id(getattr(item, "values", item)) not in self.where]
        for k, ((raw, mask), old) in enumerate(zip(self.memory, before, strict=False)):
            changed = raw != np.frombuffer(old, np.uint8)
            if k in allowed:
                changed &= ~mask
            elif any(np.shares_memory(getattr(item, "values", item), raw) for item in own):
                continue  # a view of what this is
            assert not changed.any(), f"memory {k} was written"


def leaves(grads: Any) -> list[Any]:
    if isinstance(grads, dict):
        return leaves(list(grads.values()))
    if isinstance(grads, (list, tuple)):
        return [leaf for item in grads for leaf in leaves(item)]
    return [] if grads is None else [grads]


def native(grad: Any) -> Any:
    """A copy of a gradient that is not written."""
    if isinstance(grad, nc.IndexedSlices):
        return grad.with_values(native(grad.values))
    array = np.array(grad)
    return array.astype(array.dtype.newbyteorder("=")) if array.dtype.kind in "fc" else array


def are_finite(grads: list[Any]) -> bool:
    return all(np.isfinite(reference.stored(g).astype(complex)).all() for g in grads)


# ---- calls: each returns what was given, where results may be, and a check of the result


def global_norm(case: Case) -> Any:
    grads, ord, raw = case.entries(), case.order(), case.one("sum", "sum", "raw", "x", None)

    def check(before: list[Any], norm: Any) -> None:
        assert type(norm) is float
        if ord == 2 and raw == "sum" and are_finite(before):
            checks.assert_norm(norm, before)

    return grads, None, lambda: nc.global_norm(grads, ord, duplicates=raw), check


def clip_by_global_norm(case: Case) -> Any:
    grads, bound, ord = case.entries(), case.bound(), case.order()
    policy = case.one("propagate", "propagate", "raise", "skip", "zero", "x")
    use_norm = case.bound() if case.rarely(6) else None
    out = case.out(grads)

    def run() -> Any:
        return nc.clip_by_global_norm(grads, bound, use_norm, ord=ord, nonfinite=policy, out=out)

    def check(before: list[Any], found: Any) -> None:
        clipped, norm = found
        if ord == 2 and use_norm is None and are_finite(before):
            checks.assert_norm(norm, before)
            if norm < math.inf and float(bound) < math.inf:
                checks.assert_clipped(before, leaves(clipped), Fraction(float(bound)) ** 2, norm)

    return grads, out, run, check


def one_by_norm(case: Case) -> Any:
    grad, bound = case.entry_or_entries(), case.bound()
    axes, ord = (case.axes(), case.order()) if case.rarely(2) else (None, 2)
    out = case.out(grad)

    def check(before: list[Any], found: Any) -> None:
        if axes is None and ord == 2 and are_finite(before) and float(bound) < math.inf:
            for old, new in zip(before, leaves(found), strict=True):
                checks.assert_clipped([old], [new], Fraction(float(bound)) ** 2)

    return grad, out, lambda: nc.clip_by_norm(grad, bound, axes, ord=ord, out=out), check


def one_by_size(case: Case) -> Any:
    grad, bound, function = case.entry_or_entries(), case.bound(), case.one(
        nc.clip_by_average_norm, nc.clip_by_block_rms
    )  # fmt: skip
    out = case.out(grad)
    return grad, out, lambda: function(grad, bound, out=out), lambda *_: None


def one_by_value(case: Case) -> Any:
    grad, low, high = case.entry_or_entries(), case.one(-1.0, 0, case.bound()), case.bound()
    if case.rarely(6):
        high = case.array(case.one((), (3,), (1,), case.shape()))
    out = case.out(grad)

    def check(before: list[Any], found: Any) -> None:
        for old, new in zip(before, leaves(found), strict=True):
            plain = isinstance(old, np.ndarray) and not np.ndim(high) and not np.ndim(low)
            if plain and are_finite([old]):
                wanted = reference.clip_by_value(old, *map(float, (low, high)))
                np.testing.assert_array_equal(native(new), wanted)

    return grad, out, lambda: nc.clip_by_value(grad, low, high, out=out), check


def adaptive(case: Case) -> Any:
    grad, factor, eps = case.entry_or_entries(), case.bound(), case.one(1e-3, case.bound())
    axes, param = case.axes(), case.params_of(grad)
    out = case.out(grad)
    return grad, out, lambda: nc.adaptive_clip(grad, param, factor, eps, axes, out=out), None


def per_example(case: Case) -> Any:
    grads, bound = case.entries(), case.bound()
    if not case.rarely(3):
        count = int(case.rng.integers(0, 5))
        grads = [case.array((count, *case.shape()[:2])) for _ in range(3)]
    layers = case.one(None, "uniform", "proportional", "x", 1)
    return grads, None, lambda: nc.clip_per_example(grads, bound, layerwise=layers), None


def construction(case: Case) -> Any:
    values = case.array((3, 2)) if case.rarely(2) else case.entry()
    indices = case.one(
        [0, 1, 1], [0, 1, 9], [-1, 0, 0], [], [0.5, 1, 2], np.array([0, 1, 2**63], np.uint64),
        np.ma.masked_array([0, 1, 2]), ["a"] * 3, [True] * 3, [[0, 1, 2]], None, 1,
        np.array([0, 1, 2], ">i4"), np.arange(6)[::2] // 2, [None] * 3,
    )  # fmt: skip
    shape = case.one((4, 2), [4, 2], (4,), 4, None, (4, -2), (2**63, 2), (4.0, 2), "42", (), (0, 2))

    def run() -> Any:
        made = nc.IndexedSlices(values, indices, shape)
        return made, made.coalesce(), (made + made).to_dense()

    return values, None, run, None


def groups_of(case: Case) -> Any:
    dtype, sparse, shape = case.one(*GOOD), case.rarely(4), case.shape()
    if sparse and not shape:
        shape = (2,)
    rule = case.one(
        None, nc.ByGlobalNorm(1.0), nc.ByNorm(0.5), nc.ByNorm(1.0, ord=3), nc.AutoClip(50),
        nc.ByBlockRMS(0.1), nc.AdaGC(warmup=1), nc.ZClip(warmup=1),
    )  # fmt: skip
    policy = case.one("propagate", "skip", "zero", "raise")
    grad = case.array(shape) if not case.rarely(3) else case.entry()
    method = case.one(nc.SGD, nc.Adam)

    def run() -> Any:
        params = {"w": np.ones(shape, dtype)}
        groups = nc.ParamGroups([nc.Group("g", params, rule, policy, sparse)])
        optimizer = method(groups, 0.1)
        groups.set_grads({"w": grad})
        groups.accumulate({"w": grad})
        groups.clip(apply=False)
        report = optimizer.step()
        assert report.to_dict()["groups"]["g"] is not None
        return groups.state_dict()

    return grad, None, run, None


def apply(case: Case) -> Any:
    variable = case.array()
    grad = case.array(variable.shape, variable.dtype) if not case.rarely(3) else case.entry()
    method = case.one(nc.SGD, nc.Adam)(None, case.one(0.1, 0.0))

    def run() -> Any:
        method.apply_gradients([(grad, variable)])

    return grad, variable, run, None


CALLS: list[Callable[[Case], Any]] = [
    *(clip_by_global_norm, global_norm, one_by_norm, one_by_size, one_by_value, adaptive),
    *(per_example, construction, groups_of, apply),
]


def is_documented(error: Exception) -> bool:
    if isinstance(error, nc.NonFiniteGradientError):
        return True
    return isinstance(error, (TypeError, ValueError)) and bool(NAMED.match(str(error)))


def run(number: int) -> bool:
    """Run one case; tell whether it gave a result, or raise an AssertionError where it is wrong."""
    case = Case(number)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what makes the case may warn
        *both, call, check = case.one(*CALLS)(case)
        given, out = (case.items if hasattr(one, "__next__") else one for one in both)
        before = [
            native(grad)
            for grad in leaves(given)
            if isinstance(grad, (np.ndarray, nc.IndexedSlices))
        ]
    frozen = case.frozen()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = None
        try:
            found = call()
        except Exception as raised:
            error = raised
    if error is not None:
        if not is_documented(error):
            raise AssertionError("".join(traceback.format_exception(error)))
        case.check_unwritten(frozen, [])
        return False
    case.check_unwritten(frozen, leaves(out))
    if check is not None and len(before) == len(leaves(given)):
        with np.errstate(all="ignore"):
            check(before, found)
    return True


def run_batch(first: int, count: int) -> list[tuple[int, str]]:
    """Run cases in a child process, and on in another where one ends it; return what failed."""
    failed, number = [], first
    while number < first + count:
        code = f"from tests.promises import fuzz; fuzz.run_all({number}, {first + count})"
        child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        lines = child.stdout.splitlines()
        failed += [
            (int(line.split("\t")[1]), line.split("\t")[2]) for line in lines if "failed\t" in line
        ]
        if child.returncode == 0:
            break
        begun = [int(line.split("\t")[1]) for line in lines if line.startswith("case\t")]
        if not begun:
            raise RuntimeError(child.stderr)
        failed.append((begun[-1], f"ended the process: {child.returncode} {child.stderr[-500:]}"))
        number = begun[-1] + 1
    return failed


def run_all(first: int, end: int) -> None:
    for number in range(first, end):
        print(f"case\t{number}", flush=True)
        try:
            run(number)
        except Exception:
            text = traceback.format_exc().replace("\t", " ").replace("\n", "\\n")
            print(f"failed\t{number}\t{text}", flush=True)


def main(count: int, first: int = 0) -> int:
    failures = 0
    for start in range(first, first + count, BATCH):
        for number, text in run_batch(start, min(BATCH, first + count - start)):
            failures += 1
            print(f"case {number}: {text.replace(chr(92) + 'n', chr(10))}\n", flush=True)
    print(f"{count} cases, {failures} failed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main(*map(int, sys.argv[1:])))

"""Arrays of other libraries in the host's memory: taken where they lie, as NumPy's own."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import numclip as nc
from numclip import libraries as foreign
from numclip.host import lists as plain
from tests.oracle.cases import normal
from tests.oracle.checks import assert_same_bits
from tests.oracle.reference import BFLOAT16, DTYPES

TORCH = importlib.util.find_spec("torch") is not None
ALL = [*DTYPES]


class StandIn:
    """What numclip asks of PyTorch's tensors in the host's memory."""

    __module__ = "torch"
    is_cuda = False

    def __init__(self, array: np.ndarray, **told: Any) -> None:
        self.array = array
        self.dtype = f"torch.{array.dtype.name}"
        self.layout, self.requires_grad = "torch.strided", False
        self.shape, self.ndim = array.shape, array.ndim
        vars(self).update(told)

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("asked of no tensor")

    def __iter__(self) -> Any:
        return map(StandIn, self.array)

    def detach(self) -> StandIn:
        return StandIn(self.array)

    def is_conj(self) -> bool:
        return self.dtype == "torch.complex64, conjugated"

    def is_neg(self) -> bool:
        return self.dtype == "torch.float32, negated"

    def view(self, dtype: Any) -> StandIn:
        return StandIn(self.array.view(dtype))

    def numpy(self) -> np.ndarray:
        plain = self.dtype == f"torch.{self.array.dtype.name}" and self.array.dtype != BFLOAT16
        if self.requires_grad or self.is_cuda or self.layout != "torch.strided" or not plain:
            raise TypeError("Got unsupported ScalarType")
        return self.array


class Sharing:
    """An array that tells of itself by DLPack alone, as the newer protocol or the older one."""

    def __init__(self, array: np.ndarray, *, versioned: bool = True) -> None:
        self.array, self.versioned = array, versioned

    def __dlpack__(self, *, stream: Any = None, **newer: Any) -> Any:
        if newer and not self.versioned:
            raise TypeError("unexpected keyword")
        return self.array.__dlpack__(stream=stream, **newer)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()


@pytest.fixture(autouse=True)
def torch(monkeypatch) -> Any:
    """PyTorch, or where it is missing a module that stands for it."""
    if TORCH:
        import torch as real

        return real
    monkeypatch.setitem(
        sys.modules, "torch", SimpleNamespace(int16=np.int16, bfloat16="torch.bfloat16")
    )
    return None


def tensor(array: np.ndarray) -> Any:
    if not TORCH:
        return StandIn(array)
    import torch as real

    if array.dtype == BFLOAT16:
        return real.from_numpy(array.view(np.int16)).view(real.bfloat16)
    return real.from_numpy(array)


def of_jax(array: np.ndarray) -> Any:
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax

    with jax.enable_x64(True):
        return jax.numpy.asarray(array)


KINDS: dict[str, Callable[[np.ndarray], Any]] = {"tensor": tensor, "DLPack": Sharing}
READABLE = dict(KINDS)
if importlib.util.find_spec("jax") is not None:
    READABLE["jax"] = of_jax


def known(kind: str, dtype: str) -> bool:
    return kind != "DLPack" or dtype != "bfloat16"  # NumPy cannot say it by DLPack


def grads_of(dtype: str) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    shapes: list[tuple[int, ...]] = [(5, 7), (), (0, 3), (300,)]
    return [normal(rng, shape, dtype) for shape in shapes]


PAIRS = [(kind, dtype) for kind in KINDS for dtype in ALL if known(kind, dtype)]
READ_PAIRS = [(kind, dtype) for kind in READABLE for dtype in ALL if known(kind, dtype)]


@pytest.mark.parametrize(("kind", "dtype"), READ_PAIRS)
def test_new_results_are_arrays_of_numpy(kind, dtype):
    grads = grads_of(dtype)
    given = [None, *map(READABLE[kind], grads)]
    wanted, norm = nc.clip_by_global_norm(grads, 0.5)
    clipped, same = nc.clip_by_global_norm(given, 0.5)
    assert same == norm == nc.global_norm(given)
    assert clipped[0] is None
    for found, expected in zip(clipped[1:], wanted, strict=True):
        assert type(found) is np.ndarray
        assert_same_bits(found, expected)


@pytest.mark.parametrize("container", [list, tuple, lambda grads: dict(enumerate(grads))])
@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize(("kind", "dtype"), PAIRS)
def test_in_place_the_very_same_objects_are_returned(kind, dtype, order, container):
    grads = grads_of(dtype)
    wanted, norm = nc.clip_by_global_norm(grads, 0.5, ord=order)
    given = container(list(map(KINDS[kind], grads)))
    clipped, same = nc.clip_by_global_norm(given, 0.5, ord=order, out=given)
    assert same == norm
    assert type(clipped) is type(given)
    results, objects = (g.values() if isinstance(g, dict) else g for g in (clipped, given))
    for result, item, grad, expected in zip(results, objects, grads, wanted, strict=True):
        assert result is item
        assert_same_bits(grad, expected)  # whose memory the item shares


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "run",
    [
        lambda grad, **o: nc.clip_by_norm(grad, 0.5, **o),
        lambda grad, **o: nc.clip_by_norm(grad, 0.5, axes=0, **o),
        lambda grad, **o: nc.clip_by_average_norm(grad, 0.01, **o),
        lambda grad, **o: nc.clip_by_block_rms(grad, 0.1, **o),
        lambda grad, **o: nc.clip_by_value(grad, -0.5, 0.25, **o),
        lambda grad, **o: nc.adaptive_clip(grad, grad, 0.5, **o),
    ],
)
def test_functions_of_one_gradient(kind, run):
    for layout in (lambda a: a, lambda a: a[:, ::2], lambda a: a.T):
        grad = layout(normal(np.random.default_rng(0), (6, 8)))
        wanted, item = run(grad), KINDS[kind](grad)
        found = run(item)
        assert type(found) is np.ndarray
        assert_same_bits(found, wanted)
        assert run(item, out=item) is item
        assert_same_bits(grad, wanted)


@pytest.mark.parametrize("kind", KINDS)
def test_other_places_to_write_to(kind):
    grad, target = normal(np.random.default_rng(0), (6, 8)), np.zeros((6, 8), "f")
    wanted, item = nc.clip_by_norm(grad, 0.5), KINDS[kind](target)
    assert nc.clip_by_norm(KINDS[kind](grad), 0.5, out=item) is item
    assert_same_bits(target, wanted)
    own = np.zeros((6, 8), "f")
    assert nc.clip_by_norm(KINDS[kind](grad), 0.5, out=own) is own
    assert_same_bits(own, wanted)
    with pytest.raises(TypeError, match=r"out: expected dtype float32, got float64"):
        nc.clip_by_norm(KINDS[kind](grad), 0.5, out=KINDS[kind](np.zeros((6, 8))))
    with pytest.raises(ValueError, match=r"out\[1\]: shares memory with out\[0\]"):
        nc.clip_by_global_norm([item, grad], 0.5, out=[item, item])


@pytest.mark.parametrize("kind", READABLE)
def test_examples_and_bounds(kind):
    make = READABLE[kind]
    grads = [normal(np.random.default_rng(0), (4, 5)), normal(np.random.default_rng(1), (4,))]
    wanted, count = nc.clip_per_example(grads, 1.0)
    found, same = nc.clip_per_example([make(g) for g in grads], make(np.array(1.0, "f")))
    assert same == count
    for new, old in zip(found, wanted, strict=True):
        assert_same_bits(new, old)
    low = -np.arange(5, dtype="f")
    held = nc.clip_by_value(make(grads[0]), make(low), make(np.array(2.0, "f")))
    assert_same_bits(held, nc.clip_by_value(grads[0], low, 2.0))


@pytest.mark.parametrize("kind", READABLE)
def test_slices(kind):
    make, values = READABLE[kind], normal(np.random.default_rng(0), (3, 2))
    slices = nc.IndexedSlices(make(values), make(np.array([4, 0, 4])), (5, 2))
    own = nc.IndexedSlices(values, [4, 0, 4], (5, 2))
    assert nc.global_norm([slices]) == nc.global_norm([own])
    assert_same_bits(nc.clip_by_norm(slices, 0.1).values, nc.clip_by_norm(own, 0.1).values)


@pytest.mark.parametrize("kind", READABLE)
def test_groups_take_them_and_hold_views_of_numpy(kind):
    make, rng = READABLE[kind], np.random.default_rng(0)
    params = {"w": normal(rng, (3, 4)), "b": normal(rng, (), "float64")}
    grads = {"w": normal(rng, (3, 4)), "b": normal(rng, ())}
    table = normal(rng, (5, 2))
    rows = nc.IndexedSlices(make(np.ones((2, 2), "f")), [0, 3], (5, 2))
    made = nc.Group("g", {name: make(p) for name, p in params.items()}, clip=nc.ByGlobalNorm(1.0))
    groups = nc.ParamGroups([made, nc.Group("s", {"e": make(table)}, sparse=True)])
    own = nc.ParamGroups([nc.Group("g", params), nc.Group("s", {"e": table}, sparse=True)])
    for name in groups.params:
        assert type(groups.params[name]) is np.ndarray
        assert_same_bits(groups.params[name], own.params[name])
    for manager, change in ((groups, make), (own, np.asarray)):
        manager.set_grads({name: change(grad) for name, grad in grads.items()})
        manager.accumulate({"w": change(grads["w"]), "e": rows})
        manager.grads["b"] = change(grads["b"])
    for name in params:
        assert_same_bits(groups.grads[name], own.grads[name])


@pytest.mark.parametrize("optimizer", [nc.SGD, nc.Adam])
@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_updates_them(kind, optimizer):
    rng = np.random.default_rng(0)
    params, grads = ([normal(rng, (3, 4)), normal(rng, (7,))] for _ in range(2))
    copies = [param.copy() for param in params]
    ours, theirs = optimizer(None, 0.1), optimizer(None, 0.1)
    held = [KINDS[kind](param) for param in params]
    for _ in range(3):
        ours.apply_gradients(zip(grads, copies, strict=True))
        theirs.apply_gradients(zip(map(KINDS[kind], grads), held, strict=True))
    for param, copy in zip(params, copies, strict=True):
        assert_same_bits(param, copy)


def of_graph(leaf: Any) -> Any:
    return leaf.requires_grad_().view(-1)


def test_a_tensor_with_a_graph_is_taken_as_it_is_without(torch):
    """PyTorch's own clipping ignores it too."""
    grad = normal(np.random.default_rng(0), (9,))
    item = StandIn(grad, requires_grad=True) if torch is None else of_graph(tensor(grad))
    wanted = nc.clip_by_norm(grad, 0.5)
    assert_same_bits(nc.clip_by_norm(item, 0.5), wanted)
    assert nc.clip_by_norm(item, 0.5, out=item) is item
    assert_same_bits(grad, wanted)
    assert_same_bits(nc.adaptive_clip(wanted, item), nc.adaptive_clip(wanted, grad))


def odd_tensors(torch: Any) -> list[tuple[Any, str]]:
    """Tensors that are refused, and why."""
    ones = np.ones(3, "f")
    if torch is None:
        values = {
            "complex64, conjugated": "resolve_conj",
            "float32, negated": "resolve_neg",
            "float8_e5m2": r"NumPy can view, got StandIn: Got unsupported ScalarType",
        }
        odd = [(StandIn(ones, dtype=f"torch.{name}"), text) for name, text in values.items()]
        odd += [(StandIn(ones, layout="torch.sparse_bsr"), r"pass tensor\.to_dense\(\)")]
        odd += [(StandIn(ones, is_cuda=True), "in the host's memory, got StandIn on the GPU")]
        return odd
    imaginary = torch.ones(3, dtype=torch.complex64).conj()
    return [
        (imaginary, "resolve_conj"),
        (imaginary.imag, "resolve_neg"),
        (torch.ones(3).to(torch.float8_e5m2), "NumPy can view, got Tensor: Got unsupported"),
        (torch.eye(4).to_sparse_bsr((2, 2)), r"layout torch\.sparse_bsr; pass tensor\.to_dense"),
        (torch.ones(3, device="meta"), "NumPy can view, got Tensor: can't convert meta device"),
        (torch.ones(3, dtype=torch.int64), "got int64; convert it"),
    ]


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_tensors_that_are_not_taken(torch):
    for odd, message in odd_tensors(torch):
        with pytest.raises((TypeError, ValueError), match=rf"grads\[1\]: expected .*{message}"):
            nc.clip_by_global_norm([np.ones(3, "f"), odd], 1.0)


@pytest.mark.parametrize("kind", READABLE)
def test_a_single_gradient_is_no_list_of_its_rows(kind):
    item = READABLE[kind](np.ones((3, 2), "f"))
    for run in (nc.global_norm, lambda grads: nc.clip_by_global_norm(grads, 1.0)):
        with pytest.raises(TypeError, match=r"grads: expected a list, .*pass a single gradient as"):
            run(item)


def read_only() -> list[Any]:
    fixed = np.ones(3, "f")
    fixed.flags.writeable = False
    made = [Sharing(fixed), Sharing(np.ones(3, "f"), versioned=False)]
    return [*made, of_jax(fixed)] if "jax" in READABLE else made


def test_what_is_read_only_is_read_but_not_written():
    for item in read_only():
        assert nc.global_norm([item]) == 3**0.5
        with pytest.raises(ValueError, match=r"out\[0\]: expected a writeable array, got a read-"):
            nc.clip_by_global_norm([item], 1.0, out=[item])
        with pytest.raises(ValueError, match=r"grads_and_vars\[0\]: expected a writeable array"):
            nc.SGD(None, 0.1).apply_gradients([(item, item)])


class Described(Sharing):
    """An array that NumPy takes by ``__array__`` alone, as JAX's of bfloat16."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("a dtype that NumPy does not know by DLPack")

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self.array.copy()


def test_copies_are_not_written():
    """What was written to one would be lost."""
    grad = normal(np.random.default_rng(0), (9,), "bfloat16")
    item = Described(grad)
    assert_same_bits(nc.clip_by_norm(item, 0.5), nc.clip_by_norm(grad, 0.5))
    with pytest.raises(ValueError, match=r"out: expected a writeable array, got a read-only one"):
        nc.clip_by_norm(item, 0.5, out=item)


class Silent(Sharing):
    """An array that is not taken in any way."""

    def __dlpack__(self, **_: Any) -> Any:
        raise BufferError("kept to itself")


class Traced(Silent):
    """An array that has no memory, as JAX's within a function to be compiled."""

    @property
    def __dlpack_device__(self) -> Any:
        raise AttributeError("no memory")


class OnGpu(Sharing):
    """An array in the memory of a GPU."""

    def __dlpack_device__(self) -> tuple[int, int]:
        return 2, 0


def test_what_cannot_be_viewed():
    ones = np.ones(3, "f")
    with pytest.raises(TypeError, match=r"grads\[0\]: expected an array that NumPy can view"):
        nc.global_norm([Silent(ones)])
    with pytest.raises(TypeError, match=r"grads\[1\]: .* host's memory, got OnGpu on the GPU"):
        nc.global_norm([ones, OnGpu(ones)])
    with pytest.raises(TypeError, match=r"grads\[0\]: expected an array or .*, got Traced"):
        nc.global_norm([Traced(ones)])
    with pytest.raises(TypeError, match=r"out: expected an array to write to, got list"):
        nc.clip_by_norm(ones, 1.0, out=[0.0] * 3)


def test_bfloat16_without_its_package(monkeypatch):
    item = tensor(np.ones(3, BFLOAT16))
    foreign._bfloat16.cache_clear()
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(TypeError, match=r"grads\[0\]: .* bfloat16, .*pip install ml_dtypes"):
        nc.global_norm([item])


def test_tensors_are_described_natively():
    """Through one view each, not in the general way of some microseconds."""
    grads = [np.ones(9, "f") for _ in range(3)]
    assert plain.global_norm([tensor(grad) for grad in grads]) == 27**0.5
    items = [tensor(grads[0]), None, grads[1]]
    clipped, norm = plain.clip_by_global_norm(items, 1.0, items)
    assert norm == 18**0.5
    assert [a is b for a, b in zip(clipped, items, strict=True)] == [True] * 3
    for odd in (nc.IndexedSlices(np.ones((1, 2)), [0], (2, 2)), 3.0, "grads"):
        assert plain.global_norm([tensor(grads[0]), odd]) is None


def test_subclasses_are_of_their_library():
    class Own(StandIn):
        pass

    assert foreign.library(Own) == foreign.library(StandIn) == "torch"
    assert foreign.library(np.ndarray) == "numpy"

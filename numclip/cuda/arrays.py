"""The border of the GPU: arrays of numba, CuPy, PyTorch and others, described and checked."""

from __future__ import annotations

import bisect
import contextlib
import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from numclip import inputs
from numclip.cuda import dlpack
from numclip.cuda.dlpack import Lease, Told
from numclip.dtypes import NAMES, Array, DType, lookup, refusal
from numclip.foreign import bfloat16, library, refuse_lazy, to_numpy
from numclip.inputs import Entry, Gradients, Key
from numclip.kernels.cuda import device
from numclip.kernels.cuda.chunks import Span, add
from numclip.kernels.cuda.tiling import Memory
from numclip.placement import on_device
from numclip.slices import IndexedSlices


def _address(memory: Any) -> int:
    return int(device.interface_of(memory)["data"][0])


class DeviceArray:
    """An array on the GPU that is a part of a buffer of numclip's.

    CuPy (``cupy.asarray``), PyTorch (``torch.as_tensor(..., device="cuda")``) and numba
    (``numba.cuda.as_cuda_array``) take it without a copy, by ``__cuda_array_interface__``.

    Parameters
    ----------
    memory : array of bytes
        The buffer, which is kept.
    offset : int
        Where in it the array begins, in bytes.
    shape : tuple of int
        The shape.
    dtype : dtype
        The dtype.
    strides : tuple of int, optional
        The strides in bytes; C order by default.
    """

    def __init__(
        self,
        memory: Any,
        offset: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.dtype, self._strides = shape, np.dtype(dtype), strides
        self._memory = memory
        self.address = _address(memory) + offset

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.itemsize

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        """The description that other libraries read; bfloat16 is told as two bytes."""
        address = self.address if self.size else 0
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (address, False),
            "strides": self._strides,
            "version": 2,
        }

    def copy_to_host(self, stream: Any = None) -> Array:
        """Return a copy in the host's memory, after what the stream, or all, still have to do."""
        with device.on_stream(stream) as own:
            return host_copy(describe("array", 0, self), own)

    def copy_from(self, source: Any, stream: Any = None) -> None:
        """Copy an array of the same shape and dtype in, from the host or the GPU.

        Parameters
        ----------
        source : array
            A NumPy array, or one on the GPU; C order.
        stream : stream, optional
            Where in order to copy; by default after everything the GPU still has to do.

        Raises
        ------
        TypeError, ValueError
            Where it does not fit.
        """
        if on_device(source):
            entry = self._fitting(source)
            with device.on_stream(stream) as own, in_order(own, [entry]):
                device.copy(self.address, entry.address, self.nbytes, own)
            return
        source = to_numpy("source", source)
        self._check(source.shape, source.dtype)
        flat = np.ascontiguousarray(source).reshape(-1)
        with device.on_stream(stream) as own:
            device.write(self.address, flat.view(np.uint8), own)

    def add(self, source: Any, stream: Any = None) -> None:
        """Add an array of the same shape and dtype, from the host or the GPU.

        Parameters
        ----------
        source : array
            A NumPy array, or one on the GPU; C order.
        stream : stream, optional
            Where in order to add, as in `copy_from`. An array of the host is sent first, into
            new memory.

        Raises
        ------
        TypeError, ValueError
            Where it does not fit.
        """
        if not on_device(source):
            source = to_numpy("source", source)
            sent = DeviceArray(device.allocate(source.nbytes), 0, source.shape, source.dtype)
            sent.copy_from(source, stream)
            source = sent
        entry = self._fitting(source)
        span = Span(entry.dtype, entry.address, self.address, entry.size)
        with device.on_stream(stream) as own, in_order(own, [entry]):
            add(span, own)

    def _fitting(self, source: Any) -> DeviceEntry:
        """Return the description of an array on the GPU that fits this one."""
        entry = describe("source", 0, source)
        self._check(entry.shape, entry.native, c_order=entry.c_order)
        return entry

    def _check(self, shape: Any, dtype: Any, *, c_order: bool = True) -> None:
        if self._strides is not None:
            raise ValueError(
                f"array: expected one in C order to copy to, got strides {self._strides}; "
                "copy to a new one"
            )
        if shape != self.shape or dtype != self.dtype or not c_order:
            raise ValueError(
                f"source: expected {self.dtype} of shape {self.shape} in C order, "
                f"got {dtype} of {shape}"
            )

    def part(self, start: int, shape: tuple[int, ...]) -> DeviceArray:
        """Return the view of some elements of a 1-d array, from the one numbered `start`."""
        offset = self.address - _address(self._memory) + start * self.dtype.itemsize
        return DeviceArray(self._memory, offset, shape, self.dtype)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        """Return a copy in the host's memory."""
        if copy is False:
            raise ValueError("copy: expected True or None, as the array is on the GPU")
        return self.copy_to_host().astype(dtype or self.dtype, copy=False)

    def __setitem__(self, key: Any, source: Any) -> None:
        if key is not Ellipsis:
            raise TypeError("index: expected ..., as a whole array is copied to the GPU")
        source = source if on_device(source) else np.asarray(source, self.dtype)
        self.copy_from(source)

    def __repr__(self) -> str:
        return f"DeviceArray({self.dtype}, shape={self.shape})"


class DeviceEntry(NamedTuple):
    """One gradient on the GPU: `size` stored numbers from `address` on.

    `strides` is None in C order. `lease` is to be held while the array is used, where there is
    one. Of `slices`, if it is that, shape and memory are the values'.
    """

    name: str
    key: Key
    dtype: DType
    native: np.dtype[Any]
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None
    address: int
    writable: bool
    array: Any
    lease: Lease | None = None
    slices: IndexedSlices | None = None

    @property
    def result(self) -> Any:
        """What the user has, or is given: an array or slices."""
        return self.array if self.slices is None else self.slices

    @property
    def repeated(self) -> bool:
        """Whether rows of the dense array are stored more than once."""
        return self.slices is not None and self.slices.has_duplicates

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self.shape if self.slices is None else self.slices.dense_shape

    @property
    def size(self) -> int:
        """The stored numbers, two for each complex element."""
        return math.prod(self.shape) * self.dtype.components

    @property
    def dense_size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.dense_shape)

    @property
    def nbytes(self) -> int:
        """The number of bytes."""
        return self.size * self.dtype.storage.itemsize

    @property
    def c_order(self) -> bool:
        """Whether the elements lie in C order."""
        return self.strides is None

    @property
    def dense(self) -> bool:
        """Whether the elements fill their memory, in any order of the axes."""
        return self.strides is None or _is_dense(self.shape, self.strides, self.native.itemsize)

    def lies_as(self, other: DeviceEntry) -> bool:
        """Tell whether an array of the same shape and dtype has the same memory."""
        return self.address == other.address and self.strides == other.strides

    @property
    def memory(self) -> Memory:
        """The address and the steps."""
        return Memory(self.address, self.strides or _strides(self.shape, self.native.itemsize))

    @property
    def extent(self) -> tuple[int, int]:
        """The addresses between which the elements lie."""
        if self.strides is None or not self.size:
            return self.address, self.address + self.nbytes
        ways = [step * (n - 1) for n, step in zip(self.shape, self.strides, strict=True)]
        least, most = (sum(pick(way, 0) for way in ways) for pick in (min, max))
        return self.address + least, self.address + most + self.native.itemsize


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides of C order."""
    sizes = [max(length, 1) for length in shape]
    return tuple(math.prod(sizes[k + 1 :]) * itemsize for k in range(len(sizes)))


def _is_dense(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether elements fill their memory, in any order of the axes."""
    for step, length in sorted(zip(strides, shape, strict=True)):
        if length > 1 and step != itemsize:
            return False
        itemsize *= length
    return True


def _is_c_order(shape: Sequence[int], strides: Sequence[int], itemsize: int) -> bool:
    """Tell whether elements lie in C order; axes of one element lie in any."""
    wanted = zip(shape, strides, _strides(shape, itemsize), strict=True)
    return 0 in shape or all(n == 1 or step == own for n, step, own in wanted)


def _native(interface: Any, array: Any) -> np.dtype[Any]:
    """Return the dtype; bfloat16 is told as two bytes, and known by its name."""
    if interface["typestr"] == "<V2" and str(getattr(array, "dtype", "")).endswith("bfloat16"):
        return bfloat16("dtype")
    return np.dtype(str(interface["typestr"]))


def describe(name: str, key: Key, array: Any) -> DeviceEntry:
    """Return the description of one gradient on the GPU, or say why it cannot be taken."""
    if not on_device(array):
        kind = type(array).__name__
        raise TypeError(f"{name}: expected a CUDA array, as the others are, got {kind}")
    if isinstance(array, IndexedSlices):
        return rows(name, key, array.values)._replace(slices=array)
    return _checked(name, key, array, _told(name, array))


def rows(name: str, key: Key, values: Any) -> DeviceEntry:
    """Return the description of the values of slices, whose rows are contiguous."""
    entry = describe(name, key, values)
    if not entry.c_order:
        raise ValueError(
            f"{name}: expected rows in C order on the GPU, got strides {entry.strides} for shape "
            f"{entry.shape}; pass a contiguous copy"
        )
    return entry


def host_indices(indices: Any) -> Array:
    """Return a copy of a 1-d CUDA array in the host's memory, after waiting for it."""
    told = _told("indices", indices)
    native, shape, strides = told.native, told.shape, told.strides
    if native is None or native.hasobject:
        raise TypeError(f"indices: expected integers, got {indices.dtype}")
    if len(shape) != 1 or not _is_c_order(shape, strides or (native.itemsize,), native.itemsize):
        raise ValueError(
            f"indices: expected a contiguous 1-d CUDA array, got strides {strides} for shape "
            f"{shape}; pass a contiguous copy"
        )
    nbytes = math.prod(shape) * native.itemsize
    copy: Array = device.read(told.address, nbytes, current_stream(indices)).view(native)
    return copy


def _told(name: str, array: Any) -> Told:
    """Return what an array on the GPU tells of itself, which is to be the GPU in use."""
    if _library(array) == "torch":
        told = _tensor(name, array)
    else:
        told = _interface(array) or dlpack.read(name, array)
    if told.gpu is not None and told.gpu != device.ordinal():
        raise ValueError(
            f"{name}: expected an array on GPU {device.ordinal()}, got one on GPU {told.gpu}; a "
            "process uses one GPU, which CUDA_VISIBLE_DEVICES or torch.cuda.set_device chooses"
        )
    return told


def _library(array: Any) -> str:
    """Return the name of the package an array is of."""
    return library(array.__class__)


def _tensor(name: str, array: Any) -> Told:
    """Return what a tensor of PyTorch tells: its own description knows none with a graph."""
    refuse_lazy(name, array)
    native = _torch_dtype(array.dtype)
    strides = None if array.is_contiguous() else array.stride()
    if strides is not None and native is not None:
        strides = tuple(step * native.itemsize for step in strides)
    shape, address, gpu = tuple(array.shape), array.data_ptr(), array.get_device()
    return Told(native, shape, strides, address, gpu=gpu)


@functools.cache
def _torch_dtype(dtype: Any) -> np.dtype[Any] | None:
    """Return a dtype of PyTorch's as NumPy's."""
    name = str(dtype).removeprefix("torch.")
    try:
        return bfloat16("dtype") if name == "bfloat16" else np.dtype(name)
    except TypeError:
        return None


def _interface(array: Any) -> Told | None:
    """Return what ``__cuda_array_interface__`` tells, None where there is none."""
    interface = device.interface_of(array)
    if interface is None:
        return None
    address, read_only = interface["data"]
    native, shape = _native(interface, array), tuple(interface["shape"])
    gpu = array.device.id if _library(array) == "cupy" else None
    return Told(native, shape, interface.get("strides"), address or 0, bool(read_only), gpu)


def _checked(name: str, key: Key, array: Any, told: Told) -> DeviceEntry:
    """Return the description of an array that kernels can take, refuse any other."""
    native, shape, strides, address, *_ = told
    row = None if native is None else lookup(native)
    if native is None or row is None:
        unknown = getattr(array, "dtype", type(array).__name__)
        got = unknown if native is None else refusal(native)
        raise TypeError(f"{name}: expected an array of {NAMES}, got {got}")
    if strides is not None and _is_c_order(shape, strides, native.itemsize):
        strides = None
    if not address and 0 not in shape:
        raise ValueError(
            f"{name}: expected an array with memory on the GPU, got {type(array).__name__} at "
            "address 0; pass its local part"
        )
    if any(step % row.storage.itemsize for step in (address, *(strides or ()))):
        raise ValueError(
            f"{name}: expected an aligned CUDA array, got address {address:#x}, strides {strides}"
        )
    writable = not told.read_only
    return DeviceEntry(name, key, row, native, shape, strides, address, writable, array, told.lease)


def gradients(grads: Any, name: str = "grads") -> Gradients:
    """Return the description of several gradients on the GPU."""
    keys, items, rebuild = inputs.structure(grads, name)
    entries: list[Any] = [
        describe(f"{name}[{key!r}]", key, item)
        for key, item in zip(keys, items, strict=True)
        if item is not None
    ]
    return Gradients(entries, items, keys, rebuild)


def new_like(entry: DeviceEntry) -> DeviceEntry:
    """Return a new array of the library that another one is from, and in memory like that one.

    One that does not fill its memory gives one in C order.
    """
    package, strides = _library(entry.array), entry.strides if entry.dense else None
    if package == "torch":
        torch = sys.modules[package]
        options = {} if entry.dense else {"memory_format": torch.contiguous_format}
        made = torch.empty_like(entry.array, **options)
    elif package == "cupy":
        made = sys.modules[package].empty_like(entry.array, order="K" if entry.dense else "C")
    else:
        made = _new(entry, entry.shape, strides)
    if entry.slices is not None:
        made = entry.slices.with_values(made)
    return describe("out", 0, made)


def new_of_shape(entry: DeviceEntry, shape: tuple[int, ...]) -> DeviceEntry:
    """Return a new array in C order of the dtype and the library of another one."""
    package = _library(entry.array)
    if package == "torch":
        made = entry.array.new_empty(shape)
    elif package == "cupy":
        made = sys.modules["cupy"].empty(shape, entry.array.dtype)
    else:
        made = _new(entry, shape, None)
    return describe("out", 0, made)


def _new(entry: DeviceEntry, shape: tuple[int, ...], strides: tuple[int, ...] | None) -> Any:
    """Return a new array of ours, or of numba's where another one is of numba."""
    memory = device.allocate(math.prod(shape) * entry.native.itemsize)
    made = DeviceArray(memory, 0, shape, entry.native, strides)
    if _library(entry.array) == "numba" and entry.native.name != "bfloat16":
        return device.as_array(made, shape, entry.native, strides)
    return made


def host_copy(entry: DeviceEntry, stream: Any = 0) -> Array:
    """Return a copy of an array in the host's memory."""
    begin, end = entry.extent
    memory = device.read(begin, end - begin, stream)
    offset, strides = entry.address - begin, entry.strides
    return np.ndarray(entry.shape, entry.native, memory, offset, strides)


def host_entry(entry: DeviceEntry, stream: Any) -> Entry:
    """Return the description of a copy in the host's memory."""
    copy: Any = host_copy(entry, stream)
    if entry.slices is not None:
        copy = IndexedSlices(copy, entry.slices.indices, entry.slices.dense_shape)
    return inputs.entry(entry.name, entry.key, copy)


def stream_from(stream: Any) -> Any:
    """Return a stream that a user gives: of numba, CuPy or PyTorch, or a handle."""
    for name in ("cuda_stream", "ptr"):
        handle = getattr(stream, name, None)
        if isinstance(handle, int):
            return device.stream_at(handle)
    if isinstance(stream, int) and not isinstance(stream, bool):
        return device.stream_at(stream)
    if stream is None or hasattr(stream, "begin_building"):  # a graph builder of cuda.core
        return stream or 0
    if hasattr(stream, "__cuda_stream__"):
        return device.stream_at(int(stream.__cuda_stream__()[1]))
    raise TypeError(f"stream: expected a CUDA stream or None, got {type(stream).__name__}")


def stream_of(entries: Sequence[DeviceEntry]) -> Any:
    """Return the stream that the library of the first array works on at present."""
    stream = current_stream(entries[0].array if entries else None)
    leases = [entry.lease for entry in entries if entry.lease is not None]
    if device.handle_of(stream) and leases:
        device.order(stream, 0)  # which DLPack's producers were told to be ready for
        for lease in leases:
            lease.streams.append(stream)
    return stream


def current_stream(array: Any) -> Any:
    """Return the stream that the library of an array works on at present."""
    package = _library(array)
    if package == "torch":
        return device.stream_at(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    if package == "cupy":
        return device.stream_at(sys.modules["cupy"].cuda.get_current_stream().ptr)
    return device.stream_at(_told_stream(array))


@contextlib.contextmanager
def in_order(stream: Any, entries: Sequence[DeviceEntry]) -> Iterator[None]:
    """Do something after what the arrays' library was told, and before what it will be told."""
    theirs = stream_of(entries)
    device.order(stream, theirs)
    yield
    device.order(theirs, stream)


def _told_stream(array: Any) -> int:
    """Return the stream an array names; 1 is the default one, and so is none."""
    interface = device.interface_of(array) or {}
    handle = interface.get("stream") or 0
    return 0 if handle == 1 else int(handle)


def target(entry: DeviceEntry, out: Any, name: str) -> DeviceEntry:
    """Return where a result goes that the user gives, after checking that it fits."""
    if out is entry.result:
        found = entry._replace(name=name)
    else:
        found = describe(name, entry.key, out)
        _check_slices(entry, found)
        if found.shape != entry.shape:
            raise ValueError(f"{name}: expected shape {entry.shape}, got {found.shape}")
        if found.native != entry.native:
            raise TypeError(f"{name}: expected dtype {entry.native}, got {found.native}")
        steps = zip(found.shape, found.strides or (), strict=False)
        if found.size and any(length > 1 and not step for length, step in steps):
            raise ValueError(f"{name}: expected distinct elements, got strides {found.strides}")
    if not found.writable:
        raise ValueError(f"{name}: expected a writeable array, got a read-only one")
    return found


def _check_slices(entry: DeviceEntry, found: DeviceEntry) -> None:
    """Refuse a result that is slices where the gradient is none, or has other indices."""
    if (entry.slices is None) != (found.slices is None):
        wanted = "an array" if entry.slices is None else "IndexedSlices"
        raise TypeError(f"{found.name}: expected {wanted}, got {type(found.result).__name__}")
    if entry.slices is not None and found.slices is not None:
        same = np.array_equal(found.slices.indices, entry.slices.indices)
        if not same or found.dense_shape != entry.dense_shape:
            raise ValueError(f"{found.name}: expected the indices and dense_shape of {entry.name}")


def refuse_overlaps(
    entries: Sequence[DeviceEntry],
    targets: Sequence[DeviceEntry],
    advice: str = "pass out= the gradients themselves to work in place",
) -> None:
    """Refuse results that would be written over one another or over a gradient still to read."""
    if not all(entry.dense for entry in (*entries, *targets)):
        _refuse_interleaved(entries, targets, advice)
        return
    spans = sorted((t.address, t.address + t.nbytes, t.name) for t in targets if t.nbytes)
    for (_, end, first), (begin, _, second) in itertools.pairwise(spans):
        if begin < end:
            raise _shared(second, first)
    for entry, target in zip(entries, targets, strict=True):
        before = bisect.bisect_left(spans, (entry.address + entry.nbytes,))
        if entry.lies_as(target) or not entry.nbytes or not before:
            continue
        _, end, name = spans[before - 1]
        if entry.address < end:
            raise _shared(name, entry.name, advice)


def _refuse_interleaved(
    entries: Sequence[DeviceEntry], targets: Sequence[DeviceEntry], advice: str
) -> None:
    """Refuse what `refuse_overlaps` does, of arrays that can lie between another's elements."""
    views = {id(entry): _addresses(entry) for entry in (*entries, *targets)}
    for k, target in enumerate(targets):
        for other in targets[:k]:
            if np.shares_memory(views[id(target)], views[id(other)]):
                raise _shared(target.name, other.name)
        for j, entry in enumerate(entries):
            reads_itself = j == k and entry.lies_as(target)
            if not reads_itself and np.shares_memory(views[id(target)], views[id(entry)]):
                raise _shared(target.name, entry.name, advice)


def _shared(name: str, other: str, advice: str = "") -> ValueError:
    return ValueError(f"{name}: shares memory with {other}{advice and '; '}{advice}")


def _addresses(entry: DeviceEntry) -> Array:
    """Return an array of NumPy's at the same addresses, which cannot be read."""

    class Addresses:
        __array_interface__ = {  # noqa: RUF012 - of one object
            "shape": entry.shape,
            "typestr": f"|V{entry.native.itemsize}",
            "data": (entry.address, True),
            "strides": entry.memory.steps,
            "version": 3,
        }

    return np.asarray(Addresses())


def place(entry: DeviceEntry, out: Any) -> DeviceEntry:
    """Return where the result of a single gradient goes."""
    device.require()
    if out is None:
        return new_like(entry)
    found = target(entry, out, "out")
    refuse_overlaps([entry], [found])
    return found


def targets(grads: Gradients, given: Any, out: Any) -> list[DeviceEntry]:
    """Return where the results of several gradients go; `given` is what the user passed."""
    entries: Sequence[Any] = grads.entries
    if out is None:
        return [new_like(entry) for entry in entries]
    keys, items = grads.keys, grads.items
    if out is not given:
        keys, items, _ = inputs.structure(out, "out")
    absent = [[item is None for item in those] for those in (items, grads.items)]
    if keys != grads.keys or absent[0] != absent[1]:
        raise ValueError(f"out: expected the {len(grads.keys)} keys of grads, None where they are")
    pairs = [(key, item) for key, item in zip(keys, items, strict=True) if item is not None]
    found = [
        target(entry, item, f"out[{key!r}]")
        for entry, (key, item) in zip(entries, pairs, strict=True)
    ]
    refuse_overlaps(entries, found)
    return found

"""Ordinary NumPy arrays, read from a tuple in one native call.

In Python each array costs microseconds before its elements are reached. These kernels follow the
pointers of a tuple to its arrays, and the arrays' pointers to shape and data, as every C extension
does: the first fields of an array object are part of NumPy's C interface
(`PyArrayObject_fields`), and `layout_holds` checks that this process has them. Kernels hold the
GIL while they read objects. Every entry is checked: if one is not an exact ndarray of the one
dtype, contiguous, aligned and (if it is to be written) writeable, kernels report it and write
nothing.
"""

import ctypes
import platform
import sys
import sysconfig

import numpy as np

from numclip.dtypes import Array
from numclip.host.kernels.cpu import LENGTH, OWNER, SOURCE, TARGET, slot_of
from numclip.host.kernels.elements import WORDS, word_at, zeros
from numclip.host.kernels.tuning import CHUNK
from numclip.host.runtime.jit import inline, kernel_with_gil

WORD = 8
# Fields of an array object, in bytes after the object's header, whose last word is its type.
DATA, NDIM, SHAPE, STRIDES, DESCR, FLAGS = 0, 8, 16, 24, 40, 48
# In a dtype object after its header: the scalar type, and a word with byte order and type number,
# which the mask selects.
KIND, ORDER_AND_NUMBER = WORD, -1 << 32 | 0xFF << 16
C_ORDER, FORTRAN_ORDER, OWNER_OF_DATA, ALIGNED, WRITEABLE = 0x1, 0x2, 0x4, 0x100, 0x400
# Facts of the process and of the dtype: bytes of an object's header, the addresses of the type, of
# None and of the dtype, bytes of a number, numbers of an element, the flags that arrays must have.
HEADER, NDARRAY, NONE, DTYPE, ITEMSIZE, COMPONENTS, NEEDS = range(7)


def layout_holds() -> bool:
    """Tell whether this process lays arrays and tuples out as the kernels assume."""
    ordinary = (
        platform.python_implementation() == "CPython"
        and sys.byteorder == "little"
        and ctypes.sizeof(ctypes.c_void_p) == WORD
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
    )
    header = object.__basicsize__
    if not ordinary or np.ndarray.__basicsize__ < header + FLAGS + WORD:
        return False
    matrix = np.zeros((3, 5), np.float32)
    probes = matrix, matrix.T, matrix[1:, ::2], np.zeros(0), np.zeros(()), np.frombuffer(b"a", "u1")
    pointers = id(probes) + tuple.__basicsize__
    return _word(id(probes) + header) == len(probes) and all(
        _word(pointers + k * WORD) == id(probe) and _is_laid_out(probe, id(probe) + header)
        for k, probe in enumerate(probes)
    )


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _is_laid_out(probe: Array, fields: int) -> bool:
    """Tell whether an array's fields, and its dtype's, are where the kernels look."""
    shape, strides = _word(fields + SHAPE), _word(fields + STRIDES)
    dtype = id(probe.dtype) + object.__basicsize__
    order_and_number = ord(probe.dtype.byteorder) << 16 | probe.dtype.num << 32
    return (
        _word(fields - WORD) == id(np.ndarray)
        and _word(dtype) == id(probe.dtype.type)
        and _word(dtype + KIND) & ORDER_AND_NUMBER == order_and_number
        and _word(fields + DATA) == probe.ctypes.data
        and _word(fields + DESCR) == id(probe.dtype)
        and _word(fields + FLAGS) & 0xFFFF_FFFF == probe.flags.num
        and _word(fields + NDIM) & 0xFFFF_FFFF == probe.ndim
        and tuple(_word(shape + k * WORD) for k in range(probe.ndim)) == probe.shape
        and tuple(_word(strides + k * WORD) for k in range(probe.ndim)) == probe.strides
    )


@inline
def are_equal(dtype, other):
    """Tell whether two dtypes are equal: unpickled arrays have dtype objects of their own."""
    known = word_at(dtype) == word_at(other)
    return known and (word_at(dtype + KIND) ^ word_at(other + KIND)) & ORDER_AND_NUMBER == 0


@inline
def length_of(fields, facts):
    """Return how many numbers an array stores, -1 if it does not meet the facts."""
    dtype = word_at(fields + DESCR)
    if word_at(fields - WORD) != facts[NDARRAY]:
        return np.int64(-1)
    if dtype != facts[DTYPE] and not are_equal(dtype + facts[HEADER], facts[DTYPE] + facts[HEADER]):
        return np.int64(-1)
    flags = word_at(fields + FLAGS)
    if flags & facts[NEEDS] != facts[NEEDS] or flags & (C_ORDER | FORTRAN_ORDER) == 0:
        return np.int64(-1)
    length = facts[COMPONENTS]
    shape = word_at(fields + SHAPE)
    for k in range(word_at(fields + NDIM) & 0xFFFF_FFFF):
        length *= word_at(shape + k * WORD)
    return length


@inline
def read(items, count, facts, chunks):
    """Write the chunks of `count` arrays, whose pointers are at `items`, as far as there is room.

    Return (chunks, elements): how many there are, chunks -1 if an entry does not meet the facts.
    """
    used = 0
    elements = np.int64(0)
    for t in range(count):
        item = word_at(items + t * WORD)
        if item == facts[NONE]:
            continue
        fields = item + facts[HEADER]
        length = length_of(fields, facts)
        if length < 0:
            return -1, elements
        elements += length
        address = word_at(fields + DATA)
        start = 0
        while start < length:
            if used < chunks.shape[0]:
                chunks[used, SOURCE] = chunks[used, TARGET] = address + start * facts[ITEMSIZE]
                chunks[used, LENGTH] = min(CHUNK, length - start)
                chunks[used, OWNER] = t
            used += 1
            start += CHUNK
    return used, elements


@inline
def own_their_data(items, count, header, none):
    """Tell whether the arrays are different objects that all own their data."""
    size = 4
    while size < 2 * count:
        size *= 2
    seen = zeros(size, WORDS)
    for t in range(count):
        item = word_at(items + t * WORD)
        if item == none:
            continue
        if word_at(item + header + FLAGS) & OWNER_OF_DATA == 0:
            return False
        slot = slot_of(item, size)
        while seen[slot] != 0:
            if seen[slot] == item:
                return False
            slot = (slot + 1) & (size - 1)
        seen[slot] = item
    return True


@kernel_with_gil
def table(items, count, facts, chunks):
    """Write the chunks of arrays; return both that `read` does, and whether all own their data."""
    used, elements = read(items, count, facts, chunks)
    return used, elements, used >= 0 and own_their_data(items, count, facts[HEADER], facts[NONE])

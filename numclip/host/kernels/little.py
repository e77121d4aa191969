"""Small NumPy arrays of any gradient types and strides, clipped in one native call.

The arrays of a tuple are read as in `arrays`, described by a table for `spans`, and clipped there.
A non-contiguous array is clipped in a copy in C order. Every array is checked before
anything is written: if one has no gradient type, or is to be written and is read-only, or shares
memory with another, nothing is written.
"""

import numpy as np

from numclip.dtypes import FLOAT32, FLOAT64
from numclip.host.kernels import spans
from numclip.host.kernels.arrays import (
    ALIGNED,
    C_ORDER,
    DATA,
    DESCR,
    FLAGS,
    FORTRAN_ORDER,
    HEADER,
    NDARRAY,
    NDIM,
    NONE,
    SHAPE,
    STRIDES,
    WORD,
    WRITEABLE,
    are_equal,
    own_their_data,
)
from numclip.host.kernels.elements import array_at, word_at
from numclip.host.kernels.spans import (
    ADDRESS,
    BRAIN,
    COMPLEX,
    FEW,
    FIELDS,
    HALF,
    HIGH,
    KIND,
    LENGTH,
    LOW,
    UNCHANGED,
    WIDE,
    WRITTEN,
    are_apart,
)
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime.jit import expanded, inline, kernel_with_gil

# Facts are those of `arrays` up to NONE, then the offset of a tuple's pointers (Python 3.14 keeps
# a hash before them) and the addresses of the dtypes, 0 for one that is not registered.
NAMES = "float32", "float64", "float16", "bfloat16", "complex64", "complex128"
KINDS = np.array([0, WIDE, HALF, BRAIN, COMPLEX, WIDE | COMPLEX])
SIZES = np.array([4, 8, 2, 2, 8, 16])
POINTERS = NONE + 1
DTYPES = POINTERS + 1
WRITES, EACH, REAL = 1, 2, 4  # bits of `access`: write results, clip each by itself, refuse complex
ELSEWHERE, MUCH = 16, 17  # outcomes beside those of `spans`: an array is refused; too many bytes
AXES = 64  # the most that NumPy allows
NARROW_LIKE, WIDE_LIKE, BYTE_LIKE = FLOAT32.like, FLOAT64.like, np.empty(0, np.uint8)


@inline
def fact(facts, k):
    """Return fact `k`, of facts at an address."""
    return word_at(facts + k * WORD)


@inline
def code_of(dtype, facts):
    """Return the index of a dtype in `NAMES`, -1 if it is none of them."""
    for k in range(KINDS.size):
        if fact(facts, DTYPES + k) == dtype:
            return k
    header = fact(facts, HEADER)
    for k in range(KINDS.size):
        known = fact(facts, DTYPES + k)
        if known != 0 and are_equal(dtype + header, known + header):
            return k
    return -1


@inline
def axis(fields, k):
    """Return (length, stride) of axis `k`."""
    shape, strides = word_at(fields + SHAPE), word_at(fields + STRIDES)
    return word_at(shape + k * WORD), word_at(strides + k * WORD)


@inline
def axes(fields):
    """Return the number of axes."""
    return word_at(fields + NDIM) & 0xFFFF_FFFF


@inline
def is_nested(fields, itemsize):
    """Tell whether each stride is at least what smaller ones span, so that nothing overlaps."""
    for k in range(axes(fields)):
        length, step = axis(fields, k)
        reach = itemsize
        for j in range(axes(fields)):
            others, other = axis(fields, j)
            if j != k and abs(other) <= abs(step):
                reach += abs(other) * (others - 1)
        if length > 1 and abs(step) < reach:
            return False
    return True


@inline
def is_contiguous(fields, itemsize):
    """Tell whether an array is aligned and fills its memory, in any order of the axes."""
    flags = word_at(fields + FLAGS)
    if flags & ALIGNED == 0 or flags & (C_ORDER | FORTRAN_ORDER) != 0:
        return flags & ALIGNED != 0
    reach, nbytes = np.int64(itemsize), np.int64(itemsize)
    for k in range(axes(fields)):
        length, step = axis(fields, k)
        if length > 1 and step < 0:
            return False
        reach, nbytes = reach + (length - 1) * step, nbytes * length
    return reach == nbytes and is_nested(fields, itemsize)


@inline
def can_be_written(fields, itemsize):
    """Tell whether an array is writeable and its elements do not overlap."""
    writeable = word_at(fields + FLAGS) & WRITEABLE != 0
    return writeable and (is_contiguous(fields, itemsize) or is_nested(fields, itemsize))


@inline
def write_row(fields, code, row):
    """Write an array's row of the table for `spans`; return the bytes of its elements."""
    length, itemsize = np.int64(1), np.int64(SIZES[code])
    low = high = word_at(fields + DATA)
    for k in range(axes(fields)):
        size, step = axis(fields, k)
        length *= size
        low, high = low + min((size - 1) * step, 0), high + max((size - 1) * step, 0)
    row[ADDRESS], row[KIND] = word_at(fields + DATA), KINDS[code]
    row[LENGTH] = 2 * length if KINDS[code] & COMPLEX else length
    row[LOW], row[HIGH] = low, (high + itemsize if length else low)
    return length * itemsize


@inline
def take(items, facts, access, rows):
    """Write a row for each array; return (state, rows, bytes).

    State is UNCHANGED, ELSEWHERE or MUCH; bytes are those that copies of arrays need.
    """
    used, held, copied = 0, 0, 0
    for t in range(rows.shape[0]):
        item = word_at(items + t * WORD)
        if item == fact(facts, NONE):
            continue
        fields = item + fact(facts, HEADER)
        if word_at(fields - WORD) != fact(facts, NDARRAY):
            return ELSEWHERE, 0, 0
        code = code_of(word_at(fields + DESCR), facts)
        if code < 0 or (access & REAL and KINDS[code] & COMPLEX):
            return ELSEWHERE, 0, 0
        if access & WRITES and not can_be_written(fields, SIZES[code]):
            return ELSEWHERE, 0, 0
        nbytes = write_row(fields, code, rows[used])
        held += nbytes
        if nbytes >= PARALLEL_BYTES or held >= PARALLEL_BYTES:  # sums of more could wrap around
            return MUCH, 0, 0
        if not is_contiguous(fields, SIZES[code]):
            copied += nbytes + WORD
        used += 1
    return UNCHANGED, used, copied


@inline
def have_own_memory(items, facts, rows, used):
    """Tell whether no two arrays share memory: all own their data, or no extents overlap."""
    if used > FEW and own_their_data(items, rows.shape[0], fact(facts, HEADER), fact(facts, NONE)):
        return True
    return are_apart(np.int64(rows.ctypes.data), used)


@inline
def size_of(kind):
    """Return the bytes of a stored number of a kind."""
    if kind & WIDE:
        return 8
    return 2 if kind & (HALF | BRAIN) else 4


@inline
def copy_element(source, target, unit, count):
    """Copy an element of `count` units of 8, 4 or 1 bytes from one address to another."""
    for k in range(0, unit * count, unit):
        if unit == 8:
            array_at(target + k, 1, WIDE_LIKE)[0] = array_at(source + k, 1, WIDE_LIKE)[0]
        elif unit == 4:
            array_at(target + k, 1, NARROW_LIKE)[0] = array_at(source + k, 1, NARROW_LIKE)[0]
        else:
            array_at(target + k, 1, BYTE_LIKE)[0] = array_at(source + k, 1, BYTE_LIKE)[0]


@inline
def move(fields, row, back):
    """Copy an array in C order to the address in its row, or back from there."""
    unit, parts = size_of(row[KIND]), 2 if row[KIND] & COMPLEX else 1
    itemsize = unit * parts
    if unit == 2 or word_at(fields + FLAGS) & ALIGNED == 0:
        unit, parts = 1, itemsize
    last = axes(fields) - 1
    inner, step = axis(fields, last) if last >= 0 else (np.int64(1), np.int64(0))
    address, index = word_at(fields + DATA), np.zeros(AXES, np.int64)
    end = row[ADDRESS] + row[LENGTH] * size_of(row[KIND])
    for copy in range(row[ADDRESS], end, inner * itemsize):
        for i in range(inner):
            element, own = address + i * step, copy + i * itemsize
            copy_element(own if back else element, element if back else own, unit, parts)
        for k in range(last - 1, -1, -1):
            length, stride = axis(fields, k)
            index[k] += 1
            address += stride
            if index[k] < length:
                break
            address -= length * stride
            index[k] = 0


@inline
def move_all(items, facts, rows, copies, back):
    """Copy non-contiguous arrays, with the copies' addresses in their rows; or copy them back.

    Rows of length 0 are passed over.
    """
    used, address = 0, np.int64(copies.ctypes.data)
    for t in range(rows.shape[0]):
        item = word_at(items + t * WORD)
        if item == fact(facts, NONE):
            continue
        fields, row = item + fact(facts, HEADER), rows[used]
        used += 1
        itemsize = size_of(row[KIND]) * (2 if row[KIND] & COMPLEX else 1)
        if row[LENGTH] == 0 or is_contiguous(fields, itemsize):
            continue
        if not back:
            row[ADDRESS] = address
            address += (row[LENGTH] * size_of(row[KIND]) + WORD - 1) // WORD * WORD
        move(fields, row, back)


@inline
def enter(items, facts, access, rows):
    """Call `take` and copy non-contiguous arrays; return (state, rows, memory of the copies)."""
    state, used, copied = take(items, facts, access, rows)
    if state == UNCHANGED and access & WRITES and not have_own_memory(items, facts, rows, used):
        state = ELSEWHERE
    copies = np.empty(copied // WORD if state == UNCHANGED else 0, np.int64)
    if copies.size:
        move_all(items, facts, rows, copies, copies.size == 0)
    return state, used, copies


@inline
def note(rows, first, access, status, done):
    """Return the greater outcome; with EACH, set length 0 so that no unchanged copy goes back."""
    if access & EACH and status != WRITTEN:
        rows[first, LENGTH] = 0
    return max(done, status)


@inline
def pointers(tuple_, facts):
    """Return (address, count) of a tuple's pointers."""
    return tuple_ + fact(facts, POINTERS), word_at(tuple_ + fact(facts, HEADER))


@expanded
def clip_by(clip_rows, arrays, facts, access, bound, given, ord, options):
    """Clip the arrays of a tuple in place by a function of `spans`; return (norm, outcome).

    With EACH, arrays are clipped one by one, and the norm is that of the last.
    """
    items, count = pointers(arrays, facts)
    rows = np.empty((count, FIELDS), np.int64)
    done, used, copies = enter(items, facts, access, rows)
    norm, step = 0.0, 1 if access & EACH else max(used, 1)
    for first in range(0, max(used, 1) if done == UNCHANGED else 0, step):
        address = np.int64(rows.ctypes.data) + first * FIELDS * WORD
        norm, status = clip_rows(address, min(step, used), bound, given, ord, options)
        done = note(rows, first, access, status, done)
    if copies.size and access & WRITES and (done == WRITTEN or access & EACH):
        move_all(items, facts, rows, copies, copies.size > 0)
    return norm, done


@kernel_with_gil
def clip(arrays, facts, access, bound, given, ord, options):
    """Clip the arrays of a tuple as `spans.clip` does, see `clip_by`."""
    return clip_by(spans.clip, arrays, facts, access, bound, given, ord, options)


@kernel_with_gil
def clip_rare(arrays, facts, access, bound, given, ord, options):
    """Clip the arrays of a tuple as `spans.clip_rare` does, see `clip_by`."""
    return clip_by(spans.clip_rare, arrays, facts, access, bound, given, ord, options)


@kernel_with_gil
def clamp(arrays, facts, access, low, high):
    """Clamp the arrays of a tuple to [low, high] in place; return the outcome."""
    items, count = pointers(arrays, facts)
    rows = np.empty((count, FIELDS), np.int64)
    done, used, copies = enter(items, facts, access, rows)
    for t in range(used if done == UNCHANGED else 0):
        done = max(done, spans.clamp(np.int64(rows.ctypes.data) + t * FIELDS * WORD, low, high))
    if copies.size and done == WRITTEN:
        move_all(items, facts, rows, copies, copies.size > 0)
    return done

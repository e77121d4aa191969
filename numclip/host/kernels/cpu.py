"""Loops over memory on the CPU.

Kernels work on a table of chunks. A row holds a chunk's source address, its target address, its
number of elements and the number of the tensor that owns it. As in every long loop, a kernel's
first arguments are the range ``[begin, end)`` of rows to process; it releases the GIL. `like` is a
storage sample: an empty array with the dtype that elements are stored in. Sums are float64: each
block is summed plainly, and the block sums are added with their rounding errors kept, so a result
depends on the chunk alone.
"""

import math

import numpy as np

from numclip.host.kernels.elements import array_at, as_computed, narrow, rounded, widen
from numclip.host.kernels.scalars import (
    clamped,
    is_product,
    power_term,
    settled,
    truncated_product,
    two_sum,
)
from numclip.host.kernels.tuning import BLOCK, CHUNK, NARROW_BLOCK, WIDE_BLOCK
from numclip.host.runtime.jit import block_sum, expanded, inline, kernel
from numclip.tables import MANTISSA, MODE, MULTIPLY, POWER

SOURCE, TARGET, LENGTH, OWNER = 0, 1, 2, 3
ABREAST = 16  # the most elements that one vectorised step adds: quarters are multiples of it
GOLDEN = np.int64(0x9E37_79B9_7F4A_7C15 - 2**64)  # 2**64 over the golden ratio


@inline
def slot_of(key, slots):
    """Return the first slot to try for a key in a hash table of `slots` slots, a power of two."""
    return (key * GOLDEN >> 32) & (slots - 1)


@kernel
def count_chunks(spans, limit):
    """Return (chunks, elements): how many chunks `split` writes, and all tensors' elements."""
    count = 0
    elements = 0
    for t in range(spans.shape[0]):
        count += -(-spans[t, LENGTH] // limit)
        elements += spans[t, LENGTH]
    return count, elements


@kernel
def split(spans, itemsize, limit, chunks):
    """Cut tensors, rows of (source, target, length), into chunks of at most `limit` elements."""
    c = 0
    for t in range(spans.shape[0]):
        for start in range(0, spans[t, LENGTH], limit):
            chunks[c, SOURCE] = spans[t, SOURCE] + start * itemsize
            chunks[c, TARGET] = spans[t, TARGET] + start * itemsize
            chunks[c, LENGTH] = min(limit, spans[t, LENGTH] - start)
            chunks[c, OWNER] = t
            c += 1


@block_sum
def block_of_squares(x):
    """Return the sum of squares of a short array."""
    total = 0.0
    for i in range(x.size):
        value = np.float64(widen(x[i]))
        total += value * value
    return total


@block_sum
def four_of_squares(address, step, size, like):
    """Return the sum of squares of four arrays of `size` elements that lie `step` bytes apart."""
    a, b = array_at(address, size, like), array_at(address + step, size, like)
    c, d = array_at(address + 2 * step, size, like), array_at(address + 3 * step, size, like)
    first = second = third = fourth = 0.0
    for i in range(size):
        x, y = np.float64(widen(a[i])), np.float64(widen(b[i]))
        z, w = np.float64(widen(c[i])), np.float64(widen(d[i]))
        first += x * x
        second += y * y
        third += z * z
        fourth += w * w
    return (first + second) + (third + fourth)


@inline
def long_of_squares(x, size):
    """Return the sum of squares of a contiguous array, accurate to a few units of roundoff.

    Its quarters are read as four streams, `size` elements of each at a time: a core of a Xeon of
    2023 read one stream from memory at 10 GB/s, and four at 17.
    """
    quarter = x.size // (4 * ABREAST) * ABREAST
    address, step = np.int64(x.ctypes.data), quarter * x.itemsize
    total, error = block_of_squares(x[4 * quarter :]), 0.0
    for first in range(0, quarter, size):
        own = address + first * x.itemsize
        total, rest = two_sum(total, four_of_squares(own, step, min(size, quarter - first), x))
        error += rest
    return settled(total, error)


@expanded
def array_of_squares(x):
    """Return the sum of squares of at most `CHUNK` elements; one block needs no compensation."""
    size = BLOCK if x.itemsize == 8 else NARROW_BLOCK
    if x.size <= size:
        return block_of_squares(x)
    return long_of_squares(x, size)


@expanded
def parts_of_squares(x):
    """Return (total, error): an array's sum of squares, added chunk by chunk, and its error."""
    if x.size <= CHUNK:
        return array_of_squares(x), 0.0
    total = error = 0.0
    for start in range(0, x.size, CHUNK):
        total, rest = two_sum(total, array_of_squares(x[start : start + CHUNK]))
        error += rest
    return total, error


@inline
def squares_of(x):
    """Return the sum of squares of an array."""
    total, error = parts_of_squares(x)
    return settled(total, error)


@kernel
def sum_squares(begin, end, chunks, like, out):
    """Write each chunk's sum of squares. Reads every element once."""
    for c in range(begin, end):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        out[c] = array_of_squares(x)


@block_sum
def block_of_powers(x, inverse, ord):
    """Return the sum of ``(|x| * inverse) ** ord`` of a short array."""
    total = 0.0
    for i in range(x.size):
        total += power_term(np.float64(abs(widen(x[i]) * inverse)), ord)
    return total


@inline
def blocks_of_powers(x, inverse, ord):
    """Return the sum of ``(|x| * inverse) ** ord`` of an array, adding four blocks at a time.

    Blocks are read one after another: in four streams, as for squares, bfloat16 is not vectorised.
    """
    total = error = 0.0
    size = WIDE_BLOCK if ord == 1.0 and x.itemsize == 8 else BLOCK
    for start in range(0, x.size, 4 * size):
        low = block_of_powers(x[start : start + size], inverse, ord)
        low += block_of_powers(x[start + size : start + 2 * size], inverse, ord)
        high = block_of_powers(x[start + 2 * size : start + 3 * size], inverse, ord)
        high += block_of_powers(x[start + 3 * size : start + 4 * size], inverse, ord)
        total, rest = two_sum(total, low + high)
        error += rest
    return settled(total, error)


@inline
def array_of_powers(x, scale, ord):
    """Return the sum of ``(|x| / scale) ** ord`` for a finite order; see `formulas.usable`."""
    if is_product(ord):
        return blocks_of_powers(x, 1.0 / scale, ord)  # exact: the scale is a power of two
    total = error = 0.0
    for i in range(x.size):  # the power function takes longer than compensation
        term = power_term(np.float64(abs(widen(x[i]) / scale)), ord)
        total, rest = two_sum(total, term)
        error += rest
    return settled(total, error)


@kernel
def sum_powers(begin, end, chunks, scales, ord, like, out):
    """Write each chunk's sum of ``(|x| / scales[owner]) ** ord`` for a finite order."""
    for c in range(begin, end):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        out[c] = array_of_powers(x, scales[chunks[c, OWNER]], ord)


@inline
def largest_bits(chunk, mask):
    """Return the largest magnitude of a chunk as the integer of its bits; NaN exceeds Inf.

    `mask` holds one unsigned integer of the element's size, all bits set but the sign: the bits
    of positive floats order as the floats do.
    """
    bits = array_at(chunk[SOURCE], chunk[LENGTH], mask)
    # numba widens integers to 64 bits, of which fewer would fit into a vector register.
    kind, magnitude = mask.dtype.type, mask[0]
    largest = kind(bits[0] & magnitude)
    for i in range(bits.size):
        largest = max(largest, kind(bits[i] & magnitude))
    return largest


@kernel
def max_magnitude(begin, end, chunks, mask, out):
    """Write each chunk's largest magnitude, see `largest_bits`."""
    for c in range(begin, end):
        out[c] = largest_bits(chunks[c], mask)


@inline
def settle(total, error):
    """Add the collected rounding errors to the finite sums."""
    for i in range(total.size):
        if math.isfinite(total[i]):
            total[i] += error[i]


@kernel
def merge(chunks, partial, out):
    """Add the partial sums of each tensor in the order of its chunks."""
    errors = np.zeros_like(out)
    for c in range(chunks.shape[0]):
        t = chunks[c, OWNER]
        total, rest = two_sum(out[t], partial[c])
        out[t] = total
        errors[t] += rest
    settle(out, errors)


@inline
def scaled(value, factor):
    """Return an element times the factor, rounded once."""
    return narrow(widen(value) * factor, value)


@inline
def multiply(x, factor):
    """Multiply an array in place."""
    for i in range(x.size):
        x[i] = scaled(x[i], factor)


@inline
def multiply_into(x, factor, out):
    """Write the products to `out`: a loop of its own, as one that may alias is not vectorised."""
    for i in range(x.size):
        out[i] = scaled(x[i], factor)


@kernel
def scale(begin, end, chunks, factors, like):
    """Multiply each chunk by the factor of its owner. Reads and writes every element once.

    A factor of 1 copies bits; in place, it writes nothing.
    """
    for c in range(begin, end):
        factor = factors[chunks[c, OWNER]]
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        out = array_at(chunks[c, TARGET], chunks[c, LENGTH], like)
        if chunks[c, SOURCE] == chunks[c, TARGET]:
            if factor != 1.0:
                multiply(x, factor)
        elif factor != 1.0:
            multiply_into(x, factor, out)
        else:
            copy(x, out)


@inline
def copy(x, out):
    """Copy an array."""
    for i in range(x.size):
        out[i] = x[i]


@inline
def written(chunk, like):
    """Copy a chunk's source to its target if these differ; return the target as an array."""
    out = array_at(chunk[TARGET], chunk[LENGTH], like)
    if chunk[SOURCE] != chunk[TARGET]:
        copy(array_at(chunk[SOURCE], chunk[LENGTH], like), out)
    return out


@inline
def multiply_truncating(x, mantissa, power, digits, lowest):
    """Multiply in place by ``mantissa * 2**power``, rounding subnormal results toward zero."""
    for i in range(x.size):
        value = np.float64(widen(x[i]))
        product = truncated_product(value, mantissa, power, digits, lowest)
        x[i] = narrow(product, x[i])


@kernel
def scale_truncating(begin, end, chunks, decided, column, precision, like):
    """Write chunks times their factors; in modes above MULTIPLY, truncate subnormal results.

    `decided` has a decision for each owner, whose factor is in `column`. `precision` holds the
    dtype's digits and the exponent of its smallest subnormal.
    """
    digits, lowest = int(precision[0]), int(precision[1])
    for c in range(begin, end):
        own, x = decided[chunks[c, OWNER]], written(chunks[c], like)
        mantissa, power = own[MANTISSA], int(own[POWER])
        if own[MODE] > MULTIPLY and (mantissa != 1.0 or power != 0):
            multiply_truncating(x, mantissa, power, digits, lowest)
        elif own[MODE] == MULTIPLY:
            multiply(x, as_computed(own[column], x))


@inline
def clean_array(x, components):
    """Set each element, of `components` numbers, to 0 if one of its numbers is not finite."""
    for i in range(0, x.size, components):
        finite = True
        for k in range(components):
            finite &= math.isfinite(widen(x[i + k]))
        for k in range(components):
            if not finite:
                x[i + k] = 0


@kernel
def clean(begin, end, chunks, components, like):
    """Copy each chunk to its target, with 0 for elements that are not finite.

    An element of two components is finite if both are.
    """
    for c in range(begin, end):
        clean_array(written(chunks[c], like), components)


@inline
def hold(x, low, high):
    """Clamp an array to [low, high] in place; return whether an element was outside."""
    beyond = False
    for i in range(x.size):
        value = widen(x[i])
        beyond |= (value < low) | (value > high)
        x[i] = narrow(clamped(value, low, high), x[i])
    return beyond


@kernel
def clamp(begin, end, chunks, low, high, like, beyond):
    """Clamp each element to [low, high]. Reads and writes every element once.

    Bounds are rounded to the dtype. `beyond` receives whether each chunk had an element outside.
    """
    least, most = rounded(low, like), rounded(high, like)
    for c in range(begin, end):
        beyond[c] = hold(written(chunks[c], like), least, most)


@inline
def add_exactly(x, total, error):
    """Add an array to `total`, and the rounding errors to `error`."""
    for i in range(x.size):
        total[i], rest = two_sum(total[i], np.float64(widen(x[i])))
        error[i] += rest

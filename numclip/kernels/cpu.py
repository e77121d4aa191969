"""Loops over memory on the CPU.

Kernels work on a table of chunks, a row each: where the chunk is read (address), where it is
written, its number of elements, the tensor that owns it. Like every long loop they take the
range ``[begin, end)`` of their share first, and release the GIL. `like` is an empty array that
says how elements are stored. Sums are in float64: a plain sum over each block, the blocks
added with their rounding errors kept, so a result depends on the chunk alone.
"""

import math

import numpy as np

from numclip.kernels import formulas
from numclip.kernels.elements import array_at, narrow, widen
from numclip.kernels.jit import block_sum, expanded, inline, kernel
from numclip.kernels.tuning import BLOCK, NARROW_BLOCK

SOURCE, TARGET, LENGTH, OWNER = 0, 1, 2, 3
GOLDEN = np.int64(0x9E37_79B9_7F4A_7C15 - 2**64)  # 2**64 over the golden ratio

two_sum = inline(formulas.two_sum)
power_term = inline(formulas.power_term)
scale_by_power = inline(formulas.scale_by_power)
larger = inline(formulas.larger)
root = inline(formulas.root)
clip_factor = inline(formulas.clip_factor)
factor_over = inline(formulas.factor_over)
truncated_product = inline(formulas.truncated_product)
clamped = inline(formulas.clamped)


@inline
def slot_of(key, slots):
    """Return where a key goes first in a hash table; `slots` is a power of two."""
    return (key * GOLDEN >> 32) & (slots - 1)


@kernel
def split(spans, itemsize, limit):
    """Return tensors, rows of (source, target, length), cut into chunks of `limit` elements.

    The number of elements in all comes second.
    """
    count = 0
    elements = 0
    for t in range(spans.shape[0]):
        count += -(-spans[t, LENGTH] // limit)
        elements += spans[t, LENGTH]
    chunks = np.empty((count, 4), np.int64)
    c = 0
    for t in range(spans.shape[0]):
        for start in range(0, spans[t, LENGTH], limit):
            chunks[c, SOURCE] = spans[t, SOURCE] + start * itemsize
            chunks[c, TARGET] = spans[t, TARGET] + start * itemsize
            chunks[c, LENGTH] = min(limit, spans[t, LENGTH] - start)
            chunks[c, OWNER] = t
            c += 1
    return chunks, elements


@block_sum
def block_of_squares(x):
    """Return the sum of squares of a short array."""
    total = 0.0
    for i in range(x.size):
        value = np.float64(widen(x[i]))
        total += value * value
    return total


@inline
def blocks_of_squares(x, size):
    """Return the sum of squares of an array, right to a few units of roundoff."""
    total = 0.0
    error = 0.0
    for start in range(0, x.size, 4 * size):
        low = block_of_squares(x[start : start + size])
        low += block_of_squares(x[start + size : start + 2 * size])
        high = block_of_squares(x[start + 2 * size : start + 3 * size])
        high += block_of_squares(x[start + 3 * size : start + 4 * size])
        total, rest = two_sum(total, low + high)
        error += rest
    # An infinite total has no error; its two_sum is NaN.
    return total + error if math.isfinite(total) else total


@expanded
def array_of_squares(x):
    """Return what `blocks_of_squares` does; one block needs no compensation."""
    size = BLOCK if x.itemsize == 8 else NARROW_BLOCK
    if x.size <= size:
        return block_of_squares(x)
    return blocks_of_squares(x, size)


@kernel
def sum_squares(begin, end, chunks, like, out):
    """Write each chunk's sum of squares. Reads every element once."""
    for c in range(begin, end):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        out[c] = array_of_squares(x)


@inline
def array_of_powers(x, scale, ord):
    """Return the sum of ``(|x| / scale) ** ord``, a finite order."""
    total = 0.0
    error = 0.0
    for i in range(x.size):
        term = power_term(np.float64(abs(widen(x[i]) / scale)), ord)
        total, rest = two_sum(total, term)
        error += rest
    return total + error


@kernel
def sum_powers(begin, end, chunks, scales, ord, like, out):
    """Write each chunk's sum of ``(|x| / scales[owner]) ** ord``, a finite order."""
    for c in range(begin, end):
        x = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        out[c] = array_of_powers(x, scales[chunks[c, OWNER]], ord)


@kernel
def max_magnitude(begin, end, chunks, mask, out):
    """Write each chunk's largest magnitude as the integer of its bits; NaN exceeds Inf.

    `mask` is an array of one unsigned integer of the element's size that leaves out the sign:
    the bits of positive floats order as the floats do.
    """
    for c in range(begin, end):
        bits = array_at(chunks[c, SOURCE], chunks[c, LENGTH], mask)
        largest = bits[0] & mask[0]
        for i in range(bits.size):
            largest = max(largest, bits[i] & mask[0])
        out[c] = largest


@inline
def settle(total, error):
    """Add the collected errors to their sums; an infinite sum has none."""
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


@kernel
def join(totals, exponents, groups, ord, roots, powers):
    """Write the norm of each group of tensors, ``root * 2**power``, from sums of powers.

    A sum stands for ``total * 2**(ord * exponent)``; those of a group are brought to its
    largest exponent (which differ for ``ord=2`` alone) and added in order.
    """
    empty = np.ones(roots.size, np.bool_)
    for t in range(totals.size):
        g = groups[t]
        if totals[t] != 0.0 and (empty[g] or exponents[t] > powers[g]):
            powers[g] = exponents[t]
            empty[g] = False
    errors = np.zeros(roots.size)
    for t in range(totals.size):
        g = groups[t]
        value = scale_by_power(totals[t], 2 * int(exponents[t] - powers[g]))
        if ord == math.inf:
            roots[g] = larger(roots[g], value)
            continue
        roots[g], rest = two_sum(roots[g], value)
        errors[g] += rest
    settle(roots, errors)
    for g in range(roots.size):
        roots[g] = root(roots[g], ord)


@inline
def factor_of(norm, exponent, bound, target, coarse, roundoff, limits):
    """Return the factor of a norm that exceeds its bound, and whether to truncate results.

    `bound` triggers, `target` is the one to reach; under `coarse` the grain (see `formulas`)
    demands that subnormal results are rounded toward zero, as does a factor so small that it
    is not exact. `limits` are a factor's digits, and the smallest exact in so many.
    """
    if scale_by_power(norm, exponent) <= bound:
        return 1.0, 0, False
    mantissa, power = clip_factor(target, norm, exponent, roundoff, int(limits[0]))
    truncate = False
    if 0.0 < mantissa < 1.0:
        truncate = target < coarse or scale_by_power(mantissa, power) < limits[1]
    return mantissa, power, truncate


@kernel
def factors(norms, bounds, roundoffs, limits, mantissas, powers):
    """Write the factor of each norm; tell whether one is not 1, and whether to truncate.

    `norms` are roots and exponents, `bounds` those that `factor_of` takes.
    """
    active = truncate = False
    for t in range(roundoffs.size):
        mantissas[t], powers[t], cuts = factor_of(
            norms[0][t],
            int(norms[1][t]),
            bounds[0][t],
            bounds[1][t],
            bounds[2][t],
            roundoffs[t],
            limits,
        )
        active |= mantissas[t] != 1.0
        truncate |= cuts
    return active, truncate


@kernel
def divide_factors(mantissas, powers, scale, digits):
    """Divide factors by a loss scale, in place, each rounded down to its digits."""
    for t in range(mantissas.size):
        power, precision = int(powers[t]), int(digits[t])
        mantissas[t], powers[t] = factor_over(mantissas[t], power, scale, precision)


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
    """Multiply an array into another: a loop of its own, as one that may alias is scalar."""
    for i in range(x.size):
        out[i] = scaled(x[i], factor)


@kernel
def scale(begin, end, chunks, factors, like):
    """Multiply each chunk by the factor of its owner. Reads and writes every element once.

    A factor of 1 copies bits; in place, it touches nothing.
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
    """Return the array a chunk is written to, after copying there what the chunk reads."""
    out = array_at(chunk[TARGET], chunk[LENGTH], like)
    if chunk[SOURCE] != chunk[TARGET]:
        copy(array_at(chunk[SOURCE], chunk[LENGTH], like), out)
    return out


@inline
def multiply_truncating(x, mantissa, power, digits, lowest):
    """Multiply an array in place by ``mantissa * 2**power``, subnormal results toward zero."""
    for i in range(x.size):
        value = np.float64(widen(x[i]))
        product = truncated_product(value, mantissa, power, digits, lowest)
        x[i] = narrow(product, x[i])


@kernel
def scale_truncating(begin, end, chunks, mantissas, powers, precision, like):
    """Multiply as `scale` does, by ``mantissa * 2**power``, subnormal results toward zero.

    `precision` holds the digits of the dtype and the exponent of its smallest number.
    """
    digits, lowest = int(precision[0]), int(precision[1])
    for c in range(begin, end):
        mantissa = mantissas[chunks[c, OWNER]]
        power = int(powers[chunks[c, OWNER]])
        x = written(chunks[c], like)
        if mantissa == 1.0 and power == 0:
            continue
        multiply_truncating(x, mantissa, power, digits, lowest)


@inline
def hold(x, low, high):
    """Hold each element of an array between `low` and `high`, in place."""
    for i in range(x.size):
        x[i] = narrow(clamped(widen(x[i]), low, high), x[i])


@kernel
def clamp(begin, end, chunks, low, high, like):
    """Hold each element between `low` and `high`. Reads and writes every element once."""
    for c in range(begin, end):
        hold(written(chunks[c], like), low, high)


@inline
def add_exactly(x, total, error):
    """Add an array to another, collecting the rounding errors."""
    for i in range(x.size):
        total[i], rest = two_sum(total[i], np.float64(widen(x[i])))
        error[i] += rest

"""Per-example gradients in ordinary arrays: norms over all arrays, factors, sums over examples.

Arrays are read from a tuple as in `arrays`. `begin`, `end` and `like` are as in `cpu`.
"""

import math

import numpy as np

from numclip.host.kernels.arrays import DATA, HEADER, SHAPE, WORD, length_of
from numclip.host.kernels.columns import sum_examples
from numclip.host.kernels.cpu import squares_of
from numclip.host.kernels.elements import WORDS, array_at, empty_table, table_at, word_at
from numclip.host.kernels.scalars import factor_of, is_safe, scale_by_power, settled, two_sum
from numclip.host.runtime.jit import inline, kernel, kernel_with_gil
from numclip.tables import BOUND, ROUNDOFF, TINY, TRUNCATE_BELOW

SOURCE, TARGET, LENGTH, FIRST = range(4)  # of arrays: FIRST is their first block of columns
UNKNOWN = -1.0  # instead of a factor that the general path must find


@kernel_with_gil
def find(items, results, facts, width, table):
    """Write the addresses of arrays and their sums; return how many blocks of `width` columns.

    Return -1 if an array does not meet the facts. `items` and `results` are the addresses of the
    pointers to both; the first axis of each array is of examples, of which there is at least one.
    """
    blocks = 0
    for t in range(table.shape[0]):
        fields = word_at(items + t * WORD) + facts[HEADER]
        length = length_of(fields, facts)
        if length < 0:
            return -1
        length //= word_at(word_at(fields + SHAPE))
        table[t, SOURCE], table[t, LENGTH], table[t, FIRST] = word_at(fields + DATA), length, blocks
        table[t, TARGET] = word_at(word_at(results + t * WORD) + facts[HEADER] + DATA)
        blocks += -(-length // width)
    return blocks


@inline
def squares_of_example(e, table, like):
    """Return an example's sum of squares over all arrays, and whether it lost nothing."""
    total = error = 0.0
    right = True
    for t in range(table.shape[0]):
        length = table[t, LENGTH]
        x = array_at(table[t, SOURCE] + e * length * like.itemsize, length, like)
        value = squares_of(x)
        if like.itemsize == 8 and not is_safe(value):
            right &= value == 0.0 and not x.any()
        total, rest = two_sum(total, value)
        error += rest
    return settled(total, error), right


@kernel
def find_factors(begin, end, table, law, like, factors, clipped):
    """Write the factor of each example, for a sum in float64, and whether it is clipped.

    A factor below the smallest normal float64 is UNKNOWN for float64; smaller types become 0.
    """
    for e in range(begin, end):
        total, right = squares_of_example(e, table, like)
        norm = math.sqrt(total)
        mantissa, power, _ = factor_of(
            norm, 0, law[BOUND], law[BOUND], law[TRUNCATE_BELOW], law[ROUNDOFF], 53, law[TINY]
        )
        factor = scale_by_power(mantissa, power)
        if like.itemsize == 8 and mantissa > 0.0 and factor < law[TINY]:
            right = False
        factors[e] = factor if right else UNKNOWN
        clipped[e] = norm > law[BOUND]


@kernel
def sum_blocks(begin, end, table, factors, width, like):
    """Write sums of examples times their factors; `begin` and `end` count blocks of columns."""
    for block in range(begin, end):
        t = np.searchsorted(table[:, FIRST], block, side="right") - 1
        x = table_at(table[t, SOURCE], factors.size, table[t, LENGTH], like)
        own = block - table[t, FIRST]
        out = array_at(table[t, TARGET], table[t, LENGTH], like)
        sum_examples(own, own + 1, x, factors, width, out)


@kernel_with_gil
def clip_little(items, results, count, facts, width, law, like, factors, clipped):
    """Clip and sum `count` arrays; return how many examples are clipped.

    Return -1 and write no sums if an array does not meet the facts or a factor is UNKNOWN.
    """
    table = empty_table(count, 4, WORDS)
    blocks = find(items, results, facts, width, table)
    if blocks < 0:
        return -1
    find_factors(0, factors.size, table, law, like, factors, clipped)
    found = 0
    for e in range(factors.size):
        if factors[e] == UNKNOWN:
            return -1
        found += 1 if clipped[e] else 0
    sum_blocks(0, blocks, table, factors, width, like)
    return found

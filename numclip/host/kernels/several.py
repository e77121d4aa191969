"""Clips and steps of small data of several element types: kernels called once for each type.

One native call calls the kernels one after another, so that all of them write or none. They share
three words: the turn, whether all sums and decisions are valid, whether the step is counted.
`tables` are those of `kernels.given`; each type has its own chunks.
"""

# ruff: noqa: ARG001 - each call has one item, so that `begin` and `end` are not used

from numclip.host.kernels import given, pools, updates
from numclip.host.runtime.jit import inline, kernel

SLOT, RIGHT, COUNTED, WORDS = range(4)


@kernel
def locate(begin, end, tables):
    """Write the found addresses of gradients to chunks and updates."""
    given.locate(given.OWN, tables)


@kernel
def measure(begin, end, words, tables, bounds, like):
    """Measure chunks; RIGHT becomes 0 if sums of float64 squares leave the safe range."""
    chunks = given.found(tables, given.CHUNKS, tables)
    sums = given.found_slot(tables, given.SUMS, words[SLOT], bounds)
    if not pools.measure(chunks, like, sums) and like.itemsize == 8:
        words[RIGHT] = 0


@kernel
def decide(begin, end, words, unscale, tables, bounds, like):
    """Decide by the sums; RIGHT becomes 0 if the general path is needed."""
    words[COUNTED] = 0
    if words[RIGHT] != 0:
        right = given.decide(False, words[SLOT], unscale[0], tables, bounds, like)
        words[RIGHT] = 1 if right else 0


@inline
def decided(words, tables, bounds):
    """Return the decisions of the turn."""
    return given.found_slot(tables, given.DECISIONS, words[SLOT], bounds)


@kernel
def scale(begin, end, words, tables, bounds, like):
    """Multiply arrays in place by the factors that were decided, if RIGHT."""
    if words[RIGHT] != 0:
        given.scale(decided(words, tables, bounds), tables, like)


@inline
def settle(advance, words, tables, bounds, factors):
    """Write factors and settings of updates, and count the step once; if not RIGHT, leave all."""
    if words[RIGHT] == 0:
        factors[:] = updates.LEFT
        return
    counts = given.found_row(tables, given.COUNTS, tables)
    own = given.found(tables, given.GIVEN, bounds)
    settings = given.found(tables, given.SETTINGS, factors)
    column = given.column_of(factors)
    counted = words[COUNTED] != 0
    advance(decided(words, tables, bounds), column, counts, counted, own, factors, settings)
    words[COUNTED] = 1


@kernel
def settle_descent(begin, end, words, tables, bounds, factors):
    """Call `settle` for `updates.descend`, with momentum or without."""
    settle(updates.advance, words, tables, bounds, factors)


@kernel
def settle_adam(begin, end, words, tables, bounds, factors):
    """Call `settle` for `updates.adam`."""
    settle(updates.advance_adam, words, tables, bounds, factors)


@kernel
def uncount(begin, end, words, tables, factors):
    """Call `given.uncount` if RIGHT."""
    if words[RIGHT] != 0:
        given.uncount(tables, given.found_row(tables, given.COUNTS, tables), factors)

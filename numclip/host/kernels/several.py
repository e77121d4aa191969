"""Clips and steps of little data of several element types: what is done for each as a share.

Shares are performed one after another by one native call, so that all of them write or none. They
know the turn from three words, and say there whether all was right; `tables` are those of
`kernels.given`, of which each type has its own chunks.
"""

# ruff: noqa: ARG001 - a share is of one item, which is whole

from numclip.host.kernels import given, pools, updates
from numclip.host.runtime.jit import inline, kernel

TURN, RIGHT, COUNTED, WORDS = range(4)


@kernel
def place(begin, end, tables):
    """Let chunks and updates read gradients at the addresses that were found."""
    given.place(given.OWN, tables)


@kernel
def measure(begin, end, words, tables, bounds, like):
    """Measure chunks; squares of float64 can be no numbers that it has, which is not right."""
    chunks = given.found(tables, given.CHUNKS, tables)
    sums = given.found_turn(tables, given.SUMS, words[TURN], bounds)
    if not pools.measure(chunks, like, sums) and like.itemsize == 8:
        words[RIGHT] = 0


@kernel
def decide(begin, end, words, unscale, tables, bounds, like):
    """Decide by what was measured."""
    words[COUNTED] = 0
    if words[RIGHT] != 0:
        right = given.decide(False, words[TURN], unscale[0], tables, bounds, like)
        words[RIGHT] = 1 if right else 0


@inline
def decided(words, tables, bounds):
    """Return what was decided."""
    return given.found_turn(tables, given.DECISIONS, words[TURN], bounds)


@kernel
def scale(begin, end, words, tables, bounds, like):
    """Multiply arrays in place by the factors that were decided, if all was right."""
    if words[RIGHT] != 0:
        given.scale(decided(words, tables, bounds), tables, like)


@inline
def settle(advance, words, tables, bounds, factors):
    """Write the factors and settings of updates, once counted; else that all is left."""
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
    """Do so for `updates.descend`, with momentum or without."""
    settle(updates.advance, words, tables, bounds, factors)


@kernel
def settle_adam(begin, end, words, tables, bounds, factors):
    """Do so for `updates.adam`."""
    settle(updates.advance_adam, words, tables, bounds, factors)


@kernel
def uncount(begin, end, words, tables, factors):
    """Take back what was counted for groups, or those of one norm, of which all is absent."""
    if words[RIGHT] != 0:
        given.uncount(tables, given.found_row(tables, given.COUNTS, tables), factors)

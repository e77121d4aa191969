"""Computations of the rules whose bounds follow earlier norms; see `running_rules`.

A window of norms is a ring of the last ones, and an array of the same in ascending order; `count`
is how many norms there have been. Each call does all or nothing: no Python signal interrupts it.
"""

import math

from numclip.host.runtime.jit import inline, kernel


@inline
def insertion_index(norm, ordered, known):
    """Return how many of the first `known` numbers in ascending order are less than a norm."""
    low, high = 0, known
    while low < high:
        middle = (low + high) // 2
        if ordered[middle] < norm:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def known_with(k, norm, index, oldest, ordered):
    """Return norm k of `ordered` without index `oldest` and with `norm` inserted at `index`."""
    if k == index:
        return norm
    k -= k > index
    return ordered[k + (k >= oldest)]


@inline
def indices_of(norm, count, ring, ordered):
    """Return (index, oldest): the index of a new norm, and that of the oldest if the ring is full.

    The oldest is to be removed first; in a ring with room, its index is the number of norms.
    """
    known = min(count, ring.size)
    index, oldest = insertion_index(norm, ordered, known), known
    if count >= ring.size:
        oldest = insertion_index(ring[count % ring.size], ordered, known)
        index -= oldest < index
    return index, oldest


@kernel
def percentile(norm, share, count, ring, ordered):
    """Return a percentile of the window after one more norm, to the bits of `numpy.percentile`."""
    index, oldest = indices_of(norm, count, ring, ordered)
    last = min(count, ring.size - 1)
    position = last * share
    below = math.floor(position)
    low = known_with(below, norm, index, oldest, ordered)
    high = known_with(min(below + 1, last), norm, index, oldest, ordered)
    part = position - below
    if part < 0.5:
        return low + (high - low) * part
    return high + (high - low) * (part - 1.0)


@kernel
def take(norm, count, ring, ordered):
    """Put a norm into the window, in place of the oldest if the ring is full."""
    number = count[()]
    index, oldest = indices_of(norm, number, ring, ordered)
    for k in range(oldest, index):
        ordered[k] = ordered[k + 1]
    carried = norm
    for k in range(index, oldest + 1):
        ordered[k], carried = carried, ordered[k]
    ordered[index] = ring[number % ring.size] = norm
    count[()] = number + 1


@kernel
def bounds_of(norms, total, warms, relative, absolute, average, bounds):
    """Write each tensor's bound, from its average, or in warm-up from `absolute` over `total`."""
    for t in range(bounds.size):
        if not warms and average[t] < math.inf:
            bounds[t] = relative * average[t]
        else:
            bounds[t] = norms[t] * (absolute / total) if total > absolute else math.inf


@kernel
def blend(clipped, warms, keep, average, found):
    """Write the averages after one more norm: between both, so never too large, and never 0."""
    for t in range(found.size):
        new, old = clipped[t], average[t]
        made = min(old, new) if warms or old == math.inf else new + keep * (old - new)
        found[t] = made if made > 0.0 else old

"""What rules compute whose bounds follow the norms there have been; see `running_rules`.

A window of norms is a ring of the last ones, beside these in ascending order; `count` says how many
there have been. Each call does all or nothing: no signal of Python's comes between.
"""

import math

from numclip.host.runtime.jit import inline, kernel


@inline
def place_of(norm, ordered, known):
    """Return where a norm comes in ascending order, before those that are equal."""
    low, high = 0, known
    while low < high:
        middle = (low + high) // 2
        if ordered[middle] < norm:
            low = middle + 1
        else:
            high = middle
    return low


@inline
def known_with(k, norm, place, oldest, ordered):
    """Return the k-th of the norms, of one more at some place and without the oldest."""
    if k == place:
        return norm
    k -= k > place
    return ordered[k + (k >= oldest)]


@inline
def places_of(norm, count, ring, ordered):
    """Return where a norm comes, and the oldest, whose place it takes if the ring is full."""
    known = min(count, ring.size)
    place, oldest = place_of(norm, ordered, known), known
    if count >= ring.size:
        oldest = place_of(ring[count % ring.size], ordered, known)
        place -= oldest < place
    return place, oldest


@kernel
def percentile(norm, share, count, ring, ordered):
    """Return a percentile of the norms, of one more too, with the bits of `numpy.percentile`."""
    place, oldest = places_of(norm, count, ring, ordered)
    last = min(count, ring.size - 1)
    position = last * share
    below = math.floor(position)
    low = known_with(below, norm, place, oldest, ordered)
    high = known_with(min(below + 1, last), norm, place, oldest, ordered)
    part = position - below
    if part < 0.5:
        return low + (high - low) * part
    return high + (high - low) * (part - 1.0)


@kernel
def take(norm, count, ring, ordered):
    """Put a norm into the ring, in the place of the oldest where it is full."""
    number = count[()]
    place, oldest = places_of(norm, number, ring, ordered)
    for k in range(oldest, place):
        ordered[k] = ordered[k + 1]
    carried = norm
    for k in range(place, oldest + 1):
        ordered[k], carried = carried, ordered[k]
    ordered[place] = ring[number % ring.size] = norm
    count[()] = number + 1


@kernel
def bounds_of(norms, total, warms, relative, absolute, average, bounds):
    """Write the bound of each tensor: a multiple of its average, if that is known."""
    for t in range(bounds.size):
        if not warms and average[t] < math.inf:
            bounds[t] = relative * average[t]
        else:
            bounds[t] = norms[t] * (absolute / total) if total > absolute else math.inf


@kernel
def blend(clipped, warms, keep, average, found):
    """Write the averages after one more norm: within both, so never too large; 0 is not taken."""
    for t in range(found.size):
        new, old = clipped[t], average[t]
        made = min(old, new) if warms or old == math.inf else new + keep * (old - new)
        found[t] = made if made > 0.0 else old

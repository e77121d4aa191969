"""Sums of powers of magnitudes as rows of sums, for orders other than 2; see `formulas`."""

from numclip.host.kernels.cpu import LENGTH, OWNER, SOURCE
from numclip.host.kernels.elements import array_at
from numclip.host.kernels.pools import decide_all, write_sum
from numclip.host.kernels.scalars import norm_of, power_sum, scale_by_power, usable
from numclip.host.kernels.spans import sum_of
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import EXPONENT, TERMS_EXPONENT


@kernel
def write_scales(peaks, ord, out):
    """Write the scale for each peak, by which magnitudes are divided before taking powers."""
    for t in range(out.size):
        out[t] = usable(peaks[t], ord)


@kernel
def write_power_sums(totals, scales, shifts, ord, out):
    """Write scaled sums of powers of a finite order as rows of (total, exponent)."""
    for t in range(totals.size):
        out[t, 0], out[t, 1] = power_sum(totals[t], scales[t], int(shifts[t]), ord)


@kernel
def norm_of_sum(total, exponent, ord):
    """Return the norm that belongs to a sum of powers ``total * 4**exponent``.

    It is compiled, since Python's own power function has other last bits.
    """
    root, power = norm_of(total, exponent, ord)
    return scale_by_power(root, int(power))


@inline
def tensor_at(chunks, first, like):
    """Return (tensor, next): the tensor whose chunks begin at `first`, and the next chunk."""
    c, length = first, 0
    while c < chunks.shape[0] and chunks[c, OWNER] == chunks[first, OWNER]:
        length += chunks[c, LENGTH]
        c += 1
    return array_at(chunks[first, SOURCE], length, like), c


@kernel
def decide_by_powers(chunks, like, ord, pools, laws, sums, decisions):
    """Measure norms of an order other than 2, and decide."""
    c = 0
    while c < chunks.shape[0]:
        row = sums[chunks[c, OWNER]]
        x, c = tensor_at(chunks, c, like)
        total, exponent = sum_of(x, ord)
        write_sum(row, total, 0.0)
        row[EXPONENT] = row[TERMS_EXPONENT] = exponent
    decide_all(pools, laws, sums, decisions)

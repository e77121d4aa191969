"""One norm over all tensors of a table of chunks, and its factor, without a batch's generality.

For sums of squares that lose nothing: non-finite sums, sums that over- or underflow in float64 and
factors whose subnormal results must be truncated are reported, and left to other kernels.
"""

import math

from numclip.host.kernels.cpu import OWNER
from numclip.host.kernels.pools import add_sum
from numclip.host.kernels.scalars import factor_of, is_safe, is_settled, scale_by_power, two_sum
from numclip.host.runtime.jit import kernel

# Indices of `limits`, see `dtypes.DType.limits`; TINY is the smallest normal number.
ROUNDOFF, DIGITS, TINY, TRUNCATE_BELOW = range(4)


@kernel
def norm_of_chunks(chunks, partial, limits, totals):
    """Return (norm, right): the norm of all chunks, and whether it has the bits of `pools`.

    `right` is False for a norm that is not finite, too. `totals` receives the sum of each tensor
    that has a chunk.
    """
    total = error = doubt = tensor = tensor_error = 0.0
    safe = True
    for c in range(partial.size):
        tensor, rest = two_sum(tensor, partial[c])
        tensor_error += rest
        owner = chunks[c, OWNER]
        if c + 1 == partial.size or chunks[c + 1, OWNER] != owner:
            value = tensor + tensor_error
            totals[owner] = value
            safe &= is_safe(value)
            rest = (tensor - value) + tensor_error
            total, error, doubt = add_sum((total, error, doubt), value, rest)
            tensor = tensor_error = 0.0
    norm = math.sqrt(total + error)
    right = safe or (limits[DIGITS] < 53.0 and math.isfinite(norm))
    return norm, right and is_settled(total, error, doubt)


@kernel
def decide(norm, bound, norm_of_ones, divisor, limits):
    """Return (factor, truncate) for a norm that is already divided by `divisor`.

    `truncate` is that of `decisions.factor_of`; `norm_of_ones` that of as many ones as elements.
    """
    truncate_below = norm_of_ones / divisor * limits[TRUNCATE_BELOW]
    digits = int(limits[DIGITS])
    mantissa, power, truncate = factor_of(
        norm, 0, bound, bound, truncate_below, limits[ROUNDOFF], digits, limits[TINY]
    )
    return scale_by_power(mantissa, power), truncate

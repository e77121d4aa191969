"""The scalar mathematics and the decision, compiled as device functions for the kernels."""

from numclip.cuda.device import inline
from numclip.decisions import DECISIONS, SCALARS, compiled

_parts = compiled((*SCALARS, *DECISIONS), inline)

two_sum, settled, is_safe = _parts.two_sum, _parts.settled, _parts.is_safe
binned_square, sum_of_bins = _parts.binned_square, _parts.sum_of_bins
larger, usable, power_sum = _parts.larger, _parts.usable, _parts.power_sum
power_term, scale_by_power = _parts.power_term, _parts.scale_by_power
truncated_product, clamped = _parts.truncated_product, _parts.clamped
norm_of, write_norm = _parts.norm_of, _parts.write_norm
write_cancellation = _parts.write_cancellation
factor_of = _parts.factor_of
write_factor, decide, relative = _parts.write_factor, _parts.decide, _parts.relative

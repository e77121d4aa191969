"""The scalar functions of `formulas` and `decisions`, each compiled once for the CPU's kernels."""

from numclip.decisions import DECISIONS, SCALARS, compiled
from numclip.host.runtime.jit import inline

_parts = compiled((*SCALARS, *DECISIONS), inline)

two_sum, settled, is_settled = _parts.two_sum, _parts.settled, _parts.is_settled
is_safe, larger, usable = _parts.is_safe, _parts.larger, _parts.usable
binned_square, sum_of_bins = _parts.binned_square, _parts.sum_of_bins
capped_order, is_product, root = _parts.capped_order, _parts.is_product, _parts.root
power_term, power_sum, scale_by_power = _parts.power_term, _parts.power_sum, _parts.scale_by_power
truncated_product, clamped = _parts.truncated_product, _parts.clamped
norm_of, write_root = _parts.norm_of, _parts.write_root
write_norm, write_cancellation = _parts.write_norm, _parts.write_cancellation
factor_of, write_factor = _parts.factor_of, _parts.write_factor
decide, relative = _parts.decide, _parts.relative

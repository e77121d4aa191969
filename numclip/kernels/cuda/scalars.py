"""The scalar mathematics, compiled as parts of the kernels of the GPU."""

from numclip.kernels import formulas
from numclip.kernels.cuda.device import inline

two_sum = inline(formulas.two_sum)
settled = inline(formulas.settled)
is_safe = inline(formulas.is_safe)
binned_square = inline(formulas.binned_square)
joined_bins = inline(formulas.joined_bins)
larger = inline(formulas.larger)
usable = inline(formulas.usable)
root = inline(formulas.root)
power_term = inline(formulas.power_term)
scale_by_power = inline(formulas.scale_by_power)
clip_factor = inline(formulas.clip_factor)
factor_over = inline(formulas.factor_over)
truncated_product = inline(formulas.truncated_product)
clamped = inline(formulas.clamped)

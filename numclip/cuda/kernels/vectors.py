"""The device functions that `numclip.cuda` exports: they clip vectors within users' kernels."""

import math

import numpy as np
from numba.cuda import types
from numba.cuda.extending import errors, intrinsic

from numclip.cuda.device import cuda, inline
from numclip.cuda.kernels.blocks import EMPTY, tree_sum, with_square
from numclip.cuda.kernels.norms import is_lossless
from numclip.cuda.kernels.packets import as_computed, size_of
from numclip.cuda.kernels.scalars import (
    factor_of,
    scale_by_power,
    settled,
    sum_of_bins,
    truncated_product,
    two_sum,
)
from numclip.dtypes import lookup

MOST_THREADS = 1024  # of a block
# Of float32 and float64: roundoff, digits, smallest normal number, truncate_below, and the
# exponent of the smallest subnormal.
NARROW, WIDE = (
    (*row.limits.tolist(), row.precision[1])
    for row in (lookup(np.dtype(np.float32)), lookup(np.dtype(np.float64)))
)


@intrinsic
def element(_typing, x):
    """Return a 0 of the type of a vector's elements; raise TypingError if `x` is no vector."""
    if (
        not isinstance(x, types.Array)
        or x.ndim != 1
        or x.dtype not in (types.float32, types.float64)
    ):
        wanted = "a 1-d array of float32 or float64"
        raise errors.TypingError(f"numclip.cuda: x: expected {wanted}, got {x}")

    def emit(context, _builder, _signature, _arguments):
        return context.get_constant(x.dtype, 0.0)

    return x.dtype(x), emit


@inline
def share():
    """Return the number of the thread in its block, and the number of threads."""
    wide, high = cuda.blockDim.x, cuda.blockDim.y
    thread = cuda.threadIdx.x + wide * (cuda.threadIdx.y + high * cuda.threadIdx.z)
    return np.int64(thread), np.int64(wide * high * cuda.blockDim.z)


@inline
def squares(x, first, step):
    """Return the sum of the squares of every `step`-th number from `first` on, and its error."""
    total, error = 0.0, 0.0
    i = first
    while i < x.size:
        value = np.float64(x[i])
        total, rest = two_sum(total, value * value)
        error += rest
        i += step
    return total, error


@inline
def careful_squares(x, first, step):
    """Return the sum that `squares` returns, in bins, see `with_square`."""
    bins, like = EMPTY, element(x)
    i = first
    while i < x.size:
        bins = with_square(bins, np.float64(x[i]), 0.0, like)
        i += step
    return bins


@inline
def norm_of_shares(add_up, x, first, step):
    """Return the norm of a vector as ``root * 2**exponent``; `add_up` adds up threads' shares."""
    like = element(x)
    total, error = squares(x, first, step)
    total, exponent = add_up(total, error), 0
    if not is_lossless(total, like):  # for all threads or for none
        bins = careful_squares(x, first, step)
        small, middle = add_up(bins[0], bins[3]), add_up(bins[1], bins[4])
        total, exponent = sum_of_bins(small, middle, add_up(bins[2], bins[5]))
    return math.sqrt(total), exponent


@inline
def thread_norm(x):
    """Return the norm of a vector that the thread holds, as ``root * 2**exponent``."""
    return norm_of_shares(settled, x, 0, 1)


@inline
def over_block(total, error):
    """Return the sum of the sums, and their errors, of all threads of the block."""
    scratch = cuda.shared.array((2, MOST_THREADS), np.float64)
    thread, count = share()
    return tree_sum(total, error, thread, count, 1, scratch)


@inline
def norm_over_block(x):
    """Return the norm of a vector that the block holds, as ``root * 2**exponent``."""
    thread, count = share()
    cuda.syncthreads()
    return norm_of_shares(over_block, x, thread, count)


@inline
def scale(x, first, step, norm, exponent, bound):
    """Multiply every `step`-th number by the factor that brings a norm to a bound."""
    like = element(x)
    roundoff, digits, tiny, truncate_below, lowest = WIDE if size_of(like) == 8 else NARROW
    aim = bound if bound >= 0.0 else math.nan
    mantissa, power, truncates = factor_of(
        norm, exponent, aim, aim, math.sqrt(x.size) * truncate_below, roundoff, int(digits), tiny
    )
    if mantissa == 1.0 and power == 0:
        return
    factor = as_computed(scale_by_power(mantissa, power), like)
    i = first
    while i < x.size:
        if truncates:
            x[i] = truncated_product(np.float64(x[i]), mantissa, power, int(digits), lowest)
        else:
            x[i] *= factor
        i += step


@inline
def clip_factor(norm, bound, digits=24):
    """Return the factor in [0, 1] that brings a norm to a bound.

    Parameters
    ----------
    norm : float
        The L2 norm of the numbers to be scaled. The bound holds to the last bit where the norm is
        as accurate as from a float64 sum of squares: `vector_norm` and `block_norm` are.
    bound : float
        A number >= 0; ``inf`` never clips. A negative or NaN bound gives NaN.
    digits : int
        The significand's bits in the type that products are stored as: 24 for float32, 53 for
        float64, 11 for float16, 8 for bfloat16. The default is right for float64 too, which then
        falls short of the bound by up to ``2**-22``, relatively.

    Returns
    -------
    float
        float64; 1 where ``norm <= bound``, NaN where the norm is not finite and the bound is.
        Multiply by it as it is, or as ``numpy.float32(factor)`` where ``digits`` is at most 24.

    Notes
    -----
    Guarantees: the exact norm of the products, each rounded once, is at most `bound`, as long as
    none of them is subnormal; `clip_vector` and `clip_block` handle subnormal ones too.

    Source: the clip by norm of R. Pascanu et al., "On the difficulty of training recurrent neural
    networks", ICML 2013, without their loss by rounding.
    """
    aim = bound if bound >= 0.0 else math.nan
    roundoff = math.ldexp(1.0, -digits) + (0.0 if digits >= 24 else 2.0**-23)
    mantissa, power, _ = factor_of(
        np.float64(norm), 0, aim, aim, 0.0, roundoff, max(digits, 24), 0.0
    )
    return scale_by_power(mantissa, power)


@inline
def vector_norm(x):
    """Return the L2 norm of a vector that the calling thread holds.

    Parameters
    ----------
    x : array of float32 or float64, 1-d
        In any memory: `cuda.local.array`, `cuda.shared.array`, or a row of the GPU's memory.

    Returns
    -------
    float
        float64. Not finite where an element is not.

    Notes
    -----
    Guarantees: within a relative ``2**-51`` of the exact norm; no square over- or underflows.
    """
    root, exponent = thread_norm(x)
    return scale_by_power(root, exponent)


@inline
def clip_vector(x, bound):
    """Clip a vector that the calling thread holds, in place, by its L2 norm; return that norm.

    Parameters
    ----------
    x : array of float32 or float64, 1-d
        In any memory, as for `vector_norm`; written where it is clipped.
    bound : float
        A number >= 0; 0 gives zeros, ``inf`` never clips. A negative or NaN bound gives NaN.

    Returns
    -------
    float
        The norm before clipping, as `vector_norm` gives it.

    Notes
    -----
    Guarantees: what `numclip.clip_by_norm` promises. The exact norm of the result is at most
    `bound`, and short of it by at most 4 roundoffs of float32, or 64 of float64. Where
    ``norm <= bound`` nothing is written. No sign flips, and one factor scales all elements.

    Edge cases: NaN or Inf in `x` makes every element NaN, unless the bound is infinite.
    """
    root, exponent = thread_norm(x)
    scale(x, 0, 1, root, exponent, bound)
    return scale_by_power(root, exponent)


@inline
def block_norm(x):
    """Return, in each thread, the L2 norm of a vector that the threads of a block hold together.

    Every thread of the block must make the call, with the same `x`. It waits for all of them
    before it reads. Blocks may have up to three axes; 16 KB of shared memory are used.

    Parameters
    ----------
    x : array of float32 or float64, 1-d
        In shared memory or in the GPU's.

    Returns
    -------
    float
        float64, the same bits in every thread; otherwise as `vector_norm`.
    """
    root, exponent = norm_over_block(x)
    return scale_by_power(root, exponent)


@inline
def clip_block(x, bound):
    """Clip a vector that the threads of a block hold together, in place; return its L2 norm.

    Every thread of the block must make the call, with the same `x` and bound. It waits for all
    of them before it reads, and after it has written. 16 KB of shared memory are used.

    Parameters
    ----------
    x : array of float32 or float64, 1-d
        In shared memory or in the GPU's; written where it is clipped.
    bound : float
        As for `clip_vector`.

    Returns
    -------
    float
        The norm before clipping, as `block_norm` gives it.

    Notes
    -----
    Guarantees and edge cases: those of `clip_vector`.
    """
    root, exponent = norm_over_block(x)
    thread, count = share()
    scale(x, thread, count, root, exponent, bound)
    cuda.syncthreads()
    return scale_by_power(root, exponent)

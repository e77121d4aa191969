"""The functions: names, defaults and documentation."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

from numclip import libraries
from numclip.accumulator import NormAccumulator
from numclip.border import arguments
from numclip.border.arguments import DUPLICATES, POLICIES
from numclip.border.communicator import communicator
from numclip.border.gradients import describe
from numclip.border.structures import structure
from numclip.clipping import clip, mixed, parts, ranks
from numclip.errors import expected
from numclip.host import lists, plain_examples, plain_units
from numclip.host.kernels.spans import AVERAGE, GIVEN, ROOT_MEAN
from numclip.isolation import in_ordinary_environment
from numclip.law import ABSENT, Law
from numclip.law import POLICIES as LAWS
from numclip.sums import Whole
from numclip.tables import PROPAGATE


def global_norm(grads: Any, ord: float = 2, *, duplicates: str = "sum") -> float:
    """Return the norm of all gradients together, as of one long vector.

    Parameters
    ----------
    grads : list, tuple, dict or iterator of gradients
        Arrays of float16, bfloat16, float32, float64, complex64 or complex128, of any shape
        and strides, `IndexedSlices`, or None, which counts as nothing. Only read. Arrays of
        NumPy, or of other libraries: tensors of PyTorch (with a graph or without) and what has
        DLPack are read where they lie, in the host's memory or on a GPU.
        Sparse ones of other libraries count as `IndexedSlices` that share their values:
        ``tf.IndexedSlices`` and PyTorch's COO, CSR and CSC, whose sparse axes are flattened into
        one.
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``. An order other than 2 and ``inf``
        takes two reads. All but 2 copy complex gradients, and are norms of their magnitudes.
    duplicates : {"sum", "raw"}, default "sum"
        Whether rows that repeat in `IndexedSlices` are added up before their norm is taken,
        or taken as they lie, as TensorFlow does.

    Returns
    -------
    float
        The norm, 0.0 for no elements. Infinite where it exceeds the range of float64. For
        CUDA arrays a `DeviceFloat`, which waits for the GPU when its value is asked for.

    Raises
    ------
    TypeError
        Where an entry is not a gradient; the message names it.
    ValueError
        Where `ord` or `duplicates` is none of the above.

    Notes
    -----
    **Guarantees.** For ``ord=2`` within 1 ulp of float32 of the exact norm for gradients of 16
    or 32 bits, within 4 ulp for float64, at any size and magnitude: nothing overflows or
    underflows on the way. NaN and Inf pass on. The same bits at any number of threads and at
    any alignment. Contiguous arrays (C or Fortran order) are read where they lie; others are
    copied. Sums of repeated rows are held in two float64: what cancels to less than 2**-100 of
    its terms is lost.

    **Source.** ``tf.linalg.global_norm``, in float64 and with repeated rows summed;
    ``norm_type`` of ``torch.nn.utils.clip_grad_norm_``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> norm = nc.global_norm([np.array([3e20, 0.0], np.float32), None, np.array([4e20])])
    >>> f"{norm:.7g}"
    '5e+20'
    """
    held = None
    if arguments.are_usual(ord, duplicates=duplicates):
        known = lists.global_norm(grads, float(ord))
        if known is None:
            held = structure(grads)
            known = mixed.global_norm(held, float(ord), duplicates)
        if known is not None:
            return known
    order = arguments.order(ord)
    arguments.choice("duplicates", duplicates, DUPLICATES)
    return clip.norm_of(held or structure(grads), order, duplicates)  # type: ignore[no-any-return]


def clip_by_global_norm(
    grads: Any,
    clip_norm: float,
    use_norm: float | NormAccumulator | None = None,
    *,
    ord: float = 2,
    nonfinite: str = "propagate",
    duplicates: str = "sum",
    out: Any = None,
    comm: Any = None,
) -> tuple[Any, float]:
    """Scale all gradients by ``min(1, clip_norm / norm)``, the norm being that of all together.

    Parameters
    ----------
    grads : list, tuple, dict or iterator of gradients
        As in `global_norm`. Written only where `out` says so.
    clip_norm : float
        The bound on the norm, >= 0. ``inf`` never clips, 0 gives zeros (NaN where a gradient
        is not finite, as any bound does).
    use_norm : float or NormAccumulator, optional
        A norm to use instead of computing it, for instance from `global_norm`. Where rows
        repeat, the gradients are read all the same, for what rounding can add to their sums.
        An accumulator of all pieces of which these gradients are one holds the pieces together
        to the bound; one that nothing was added to is refused, and with ``nonfinite="zero"``
        all it was given must be finite.
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``.
    nonfinite : {"propagate", "raise", "skip", "zero"}, default "propagate"
        What to do where a gradient holds NaN or Inf. "propagate": every output is NaN (nothing
        is changed if `clip_norm` is ``inf``). "raise": `NonFiniteGradientError`, nothing is
        modified (on a GPU, which is waited for). "skip": the gradients are returned as they
        are. "zero": such elements become 0 and the rest is clipped by the norm of the rest.
    duplicates : {"sum", "raw"}, default "sum"
        Whether repeated rows of `IndexedSlices` count as their sum, or as they lie.
    out : list, tuple, dict, optional
        Where to write: `grads` itself to work in place, or arrays of the same shapes and
        dtypes. New arrays by default.
    comm : intra-communicator of mpi4py, optional
        The ranks that make this call together: the norm is that of the gradients of all, each of
        which counts, and the bound holds for all together. One ``Allgather`` of 80 bytes. What
        `ParamGroups.clip` says of ranks holds here.

    Returns
    -------
    clipped : list, tuple or dict
        The results in the structure of `grads`, None where None was; the objects of `out`,
        whatever library they are of. New ones are NumPy arrays for gradients in the host's
        memory; on a GPU arrays of PyTorch, CuPy or numba as the gradient is, else `DeviceArray`.
    norm : float
        The norm before clipping, or `use_norm`. For CUDA arrays a `DeviceFloat`, which waits
        for the GPU when its value is asked for.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is written then.
    NonFiniteGradientError
        With ``nonfinite="raise"``, naming the first bad gradient, its index and its value, and
        with `comm`, on all ranks, the rank that has it.
    RankError
        On all ranks, where arguments differ or another rank raised.

    Notes
    -----
    **Guarantees.** Where clipped, the exact L2 norm of the result, in real arithmetic, does not
    exceed `clip_norm` (other orders: but for the rounding of the power function), and falls
    short of it by at most 4 units of roundoff of the coarsest dtype among the gradients (64
    units for float64 alone), unless results are subnormal. Where repeated rows cancel, the
    units count from the norm of their magnitudes. Where the norm does not exceed `clip_norm`,
    results are bit-identical, and in place not a byte is written. One factor for all elements.
    Results do not depend on threads or alignment.

    **Edge cases.** Zero gradients stay zero. Finite gradients whose norm exceeds float64 are
    clipped; the norm is returned as ``inf``. Strided, misaligned and byte-swapped arrays are
    worked on in a copy; in place they are written back, but byte-swapped ones are refused.
    CUDA arrays are worked on where they lie; misaligned ones are refused.
    Parameters of PyTorch (leaf tensors that require grad) are refused in place of their
    ``.grad``. A backward pass that needs a tensor as it was before an in-place call raises an
    error.

    **Source.** ``tf.clip_by_global_norm`` and Pascanu, Mikolov and Bengio 2013 (arXiv
    1211.5063, algorithm 1). Differs where TensorFlow overflows, underflows, exceeds the bound
    by rounding, or takes repeated rows as they lie.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> grads = {"w": np.array([3.0, 0.0]), "b": np.array([4.0])}
    >>> clipped, norm = nc.clip_by_global_norm(grads, 1.0)
    >>> norm, nc.global_norm(clipped) <= 1.0
    (5.0, True)
    """
    if comm is not None:
        found = communicator(comm, ranks.EXCHANGED)
        if found is not None:
            check = partial(_law, clip_norm, use_norm, ord, nonfinite, duplicates, comm)
            others = nonfinite, duplicates, out
            return ranks.clip_by_global_norm(found, grads, lambda: check()[0], *others)
    held, norm = None, use_norm
    if norm is not None and isinstance(norm, NormAccumulator):
        norm = norm.norm_alone(ord, clip_norm, nonfinite)
    if arguments.are_usual(ord, clip_norm, nonfinite, duplicates, norm):
        options, given = LAWS[nonfinite], 0.0
        if norm is not None:
            options, given = options | GIVEN, float(norm)
        bound, order = float(clip_norm), float(ord)
        done = lists.clip_by_global_norm(grads, bound, out, order, options, given)
        if done is None:
            held = structure(grads)
            done = mixed.clip_by_global_norm(held, bound, out, order, options, given, duplicates)
        if done is not None:
            return done
    law, whole = _law(clip_norm, use_norm, ord, nonfinite, duplicates)
    return clip.clip_together(held or structure(grads), law, nonfinite, duplicates, out, whole)


def _law(
    clip_norm: Any, use_norm: Any, ord: Any, nonfinite: Any, duplicates: Any, comm: Any = None
) -> tuple[Law, Whole | None]:
    """Check the arguments of `clip_by_global_norm`; return (law, an accumulator's `Whole`)."""
    order = arguments.order(ord)
    bound = arguments.bound("clip_norm", clip_norm)
    given, whole = ABSENT, None
    if use_norm is not None and comm is not None:
        raise ValueError(expected("use_norm", "None where comm= finds the norm", repr(use_norm)))
    if isinstance(use_norm, NormAccumulator):
        use_norm.check_order("use_norm", order)
        whole = use_norm.whole
    elif use_norm is not None:
        given = arguments.given_norm(use_norm)
    arguments.choice("nonfinite", nonfinite, POLICIES)
    if isinstance(use_norm, NormAccumulator):
        use_norm.check_policy("use_norm", nonfinite)
    arguments.choice("duplicates", duplicates, DUPLICATES)
    return Law(bound, given=given, ord=order), whole


def clip_by_norm(
    grad: Any, clip_norm: float, axes: Any = None, *, ord: float = 2, out: Any = None
) -> Any:
    """Scale a gradient by ``min(1, clip_norm / norm)``.

    Parameters
    ----------
    grad : array or IndexedSlices, or a list, tuple or dict of them
        A gradient of any dtype and shape, see `global_norm`. Of a structure, nested or
        not, each gradient is clipped by itself.
    clip_norm : float
        The bound on the norm, >= 0. ``inf`` never clips, 0 gives zeros.
    axes : int or sequence of int, optional
        The axes the norm is taken over, each unit along the others being clipped by its own
        norm; all by default. Of the dense array, for `IndexedSlices`.
    ord : float, default 2
        The order of the norm, a real number >= 1 or ``inf``.
    out : array or IndexedSlices, or a list, tuple or dict of them, optional
        Where to write: `grad` itself, or one of the same shape and dtype.

    Returns
    -------
    array or IndexedSlices, or a list, tuple or dict of them
        The clipped gradient. With `axes`, repeated rows are summed first: new slices are
        coalesced, and `out` holds each sum in the first of its rows and 0 in the others; but
        where no unit is clipped, rows are as they were, for which the GPU is waited for.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is written then.

    Notes
    -----
    **Guarantees.** As `clip_by_global_norm`, for each unit. NaN or Inf makes its unit NaN.
    Axes in front or in the middle are summed where they stand; other arrangements, and orders
    other than 2, work on a transposed copy. CUDA arrays are never copied, but repeated rows are
    summed in new memory.

    **Source.** ``tf.clip_by_norm``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> nc.clip_by_norm(np.array([[3.0, 4.0], [0.3, 0.4]]), 1.0, axes=1).round(12)
    array([[0.6, 0.8],
           [0.3, 0.4]])
    """
    usual = arguments.are_usual(ord, clip_norm)
    order = float(ord) if usual else arguments.order(ord)
    bound = float(clip_norm) if usual else arguments.bound("clip_norm", clip_norm)
    if axes is None:
        result = lists.clip_each(grad, bound, out, order, PROPAGATE)
        if result is None:
            result = mixed.clip_slices(grad, bound, out, order)
        if result is not None:
            return result
        return clip.clip_whole(grad, bound, out, lambda _: 1.0, order)
    result = plain_units.clip(grad, bound, axes, arguments.axes_of, out, ord=order)
    if result is not None:
        return result
    return parts.clip_by_norm(grad, bound, axes, order, out)


def clip_by_average_norm(grad: Any, clip_norm: float, *, out: Any = None) -> Any:
    """Scale a gradient by ``min(1, clip_norm / (norm / size))``.

    Parameters
    ----------
    grad : array or IndexedSlices, or a list, tuple or dict of them
        A gradient of any dtype and shape, see `global_norm`. Of a structure, nested or
        not, each gradient is clipped by itself.
    clip_norm : float
        The bound on the L2 norm divided by the number of elements (of the dense array, for
        `IndexedSlices`), >= 0.
    out : array or IndexedSlices, or a list, tuple or dict of them, optional
        Where to write: `grad` itself, or one of the same shape and dtype.

    Returns
    -------
    array or IndexedSlices, or a list, tuple or dict of them
        The clipped gradient.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is written then.

    Notes
    -----
    **Guarantees.** As `clip_by_global_norm`. **Source.** ``tf.compat.v1.clip_by_average_norm``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> nc.clip_by_average_norm(np.array([3.0, 4.0]), 1.0).round(12)
    array([1.2, 1.6])
    """
    bound = arguments.bound("clip_norm", clip_norm)
    result = lists.clip_each(grad, bound, out, 2.0, PROPAGATE | AVERAGE)
    if result is not None:
        return result
    return clip.clip_whole(grad, bound, out, float, 2.0)


def clip_by_block_rms(grad: Any, threshold: float, *, out: Any = None) -> Any:
    """Scale a gradient by ``1 / max(1, rms / threshold)``.

    Parameters
    ----------
    grad : array or IndexedSlices, or a list, tuple or dict of them
        A gradient of any dtype and shape, see `global_norm`. Of a structure, nested or
        not, each gradient is clipped by itself.
    threshold : float
        The bound on the root mean square of the elements (of the dense array, for
        `IndexedSlices`), >= 0.
    out : array or IndexedSlices, or a list, tuple or dict of them, optional
        Where to write: `grad` itself, or one of the same shape and dtype.

    Returns
    -------
    array or IndexedSlices, or a list, tuple or dict of them
        The clipped gradient.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is written then.

    Notes
    -----
    **Guarantees.** As `clip_by_global_norm`. **Source.** Shazeer and Stern 2018 (arXiv
    1804.04235, section 6); ``optax.clip_by_block_rms``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> nc.clip_by_block_rms(np.array([2.0, -2.0]), 0.5).round(12)
    array([ 0.5, -0.5])
    """
    bound = arguments.bound("threshold", threshold)
    result = lists.clip_each(grad, bound, out, 2.0, PROPAGATE | ROOT_MEAN)
    if result is not None:
        return result
    return clip.clip_whole(grad, bound, out, _root, 2.0)


def clip_by_value(grad: Any, clip_value_min: Any, clip_value_max: Any, *, out: Any = None) -> Any:
    """Hold each element between two bounds.

    Parameters
    ----------
    grad : array or IndexedSlices, or a list, tuple or dict of them
        A gradient of a real dtype and any shape, see `global_norm`. Of a structure, nested or
        not, each gradient is clipped by itself.
    clip_value_min, clip_value_max : float or array
        The bounds, rounded to the dtype of `grad`; arrays broadcast to its (dense) shape, and
        take a slower path. Neither may be NaN, none of the first exceed the second's. CUDA
        arrays are read for that, which waits for the GPU.
    out : array or IndexedSlices, or a list, tuple or dict of them, optional
        Where to write: `grad` itself, or one of the same shape and dtype.

    Returns
    -------
    array or IndexedSlices, or a list, tuple or dict of them
        The clipped gradient. Repeated rows are summed first: new slices are coalesced, and
        `out` holds each sum in the first of its rows and 0 in the others.

    Raises
    ------
    TypeError
        Where `grad` is complex or no gradient.
    ValueError
        Where the bounds do not fit, or exclude 0 for `IndexedSlices`, whose missing rows
        would change.

    Notes
    -----
    **Edge cases.** NaN stays NaN, Inf becomes the bound. **Source.** ``tf.clip_by_value``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> nc.clip_by_value(np.array([-3.0, 0.5, np.inf]), -1.0, 1.0)
    array([-1. ,  0.5,  1. ])
    """
    result = lists.clamp(grad, clip_value_min, clip_value_max, out)
    if result is None:
        result = mixed.clamp_slices(grad, clip_value_min, clip_value_max, out)
    if result is not None:
        return result

    def bounds(shape: tuple[int, ...]) -> tuple[Any, Any]:
        low, high = map(
            _on_host, ("clip_value_min", "clip_value_max"), (clip_value_min, clip_value_max)
        )
        return arguments.value_bounds(low, high, shape)

    return clip.clip_by_value(grad, bounds, out)


def adaptive_clip(
    grad: Any,
    param: Any,
    clip_factor: float = 0.01,
    eps: float = 1e-3,
    axes: Any = None,
    *,
    out: Any = None,
) -> Any:
    """Hold the norm of each unit of a gradient to a fraction of its parameters' norm.

    A unit whose norm exceeds ``clip_factor * max(norm(param_unit), eps)`` is scaled down to it.

    Parameters
    ----------
    grad : array or IndexedSlices, or a list, tuple or dict of them
        A gradient of any dtype and shape, see `global_norm`. Of a structure, nested or
        not, each gradient is clipped by itself.
    param : array, or a list, tuple or dict of them
        The parameter, of the same (dense) shape; one for each key of a structure. Only read.
    clip_factor : float, default 0.01
        The greatest ratio of the norms, >= 0.
    eps : float, default 1e-3
        The least parameter norm that counts, >= 0: parameters at 0 can still move.
    axes : int or sequence of int, optional
        The axes the norms are taken over. By default all but the last, so that a unit is what
        feeds one output (weights of inputs x outputs, HWIO filters); all for one dimension.
    out : array or IndexedSlices, or a list, tuple or dict of them, optional
        Where to write: `grad` itself, or one of the same shape and dtype.

    Returns
    -------
    array or IndexedSlices, or a list, tuple or dict of them
        The clipped gradient. Repeated rows are summed as in `clip_by_norm` with axes. On a GPU,
        the parameter's rows are copied for slices whose axis 0 is not reduced.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is written then.

    Notes
    -----
    **Guarantees.** As `clip_by_global_norm`, for each unit. **Source.** Brock et al. 2021
    (arXiv 2102.06171, equation 3); ``optax.adaptive_grad_clip``, which adds 1e-6 to norms of 0.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> grad, param = np.array([[3.0, 0.01], [4.0, 0.0]]), np.array([[6.0, 6.0], [8.0, 8.0]])
    >>> nc.adaptive_clip(grad, param, clip_factor=0.1).round(12)
    array([[0.6 , 0.01],
           [0.8 , 0.  ]])
    """
    factor = arguments.bound("clip_factor", clip_factor)
    least = arguments.bound("eps", eps)
    if param is not None:
        result = plain_units.clip(grad, factor, axes, arguments.adaptive_axes, out, param, least)
        if result is not None:
            return result
    return parts.adaptive_clip(grad, param, factor, least, axes, out)


def clip_per_example(
    grads: Any, clip_norm: float, *, layerwise: str | None = None
) -> tuple[Any, Any]:
    """Clip the gradients of each example by their norm, and add the examples up.

    Parameters
    ----------
    grads : list, tuple, dict or iterator of gradients
        Axis 0 of each is the example, of the same length in all. See `global_norm`. On a GPU,
        `IndexedSlices` are made dense first.
    clip_norm : float
        The bound on the norm of all gradients of one example, >= 0.
    layerwise : {None, "uniform", "proportional"}, default None
        Share the bound among the K gradients, each clipped by its own norm: to
        ``clip_norm / sqrt(K)`` each, or by the square root of its share of the elements.

    Returns
    -------
    summed : list, tuple or dict
        The sums over examples of the clipped gradients, in the structure and dtypes of `grads`;
        NumPy arrays, or of the gradients' library on a GPU.
    num_clipped : int, or list, tuple or dict of int
        How many examples were clipped; with `layerwise` for each gradient. For CUDA arrays
        `DeviceInt`, which waits for the GPU when its value is asked for.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it.

    Notes
    -----
    **Guarantees.** What one example adds has a norm of at most `clip_norm`, before the sum is
    rounded: sums are taken in float64 and rounded to the nearest number of the dtype at the end,
    by which even that of one example can exceed the bound, by a unit of roundoff (2**-11 of it for
    float16) where nothing is subnormal. NaN or Inf in an example makes the sums NaN; where
    `clip_norm` is ``inf``, which scales nothing, they pass on in their elements.

    **Source.** Abadi et al. 2016 (arXiv 1607.00133, algorithm 1), before the noise;
    ``optax.per_example_global_norm_clip`` and ``optax.per_example_layer_norm_clip``.

    Examples
    --------
    >>> import numpy as np, numclip as nc
    >>> summed, clipped = nc.clip_per_example([np.array([[3.0, 4.0], [0.3, 0.4]])], 1.0)
    >>> summed[0].round(12), clipped
    (array([0.9, 1.2]), 1)
    """
    bound = arguments.bound("clip_norm", clip_norm)
    arguments.choice("layerwise", layerwise, (None, "uniform", "proportional"))
    if layerwise is None:
        done = plain_examples.clip(grads, bound)
        if done is not None:
            return done
    return parts.clip_per_example(grads, bound, layerwise)


def _on_host(name: str, bound: Any) -> Any:
    """Return a bound in the host's memory; one on a GPU is waited for."""
    if not libraries.on_device(bound):
        return bound
    found = describe(name, 0, bound)
    return found.engine.on_host(found.facts, found.engine.stream_of([found.facts]))


_root = in_ordinary_environment(math.sqrt)

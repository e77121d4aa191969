"""The clipping functions of `torch.nn.utils`, with their names and arguments: one import to change.

```python
from numclip.torch import clip_grad_norm_  # was: from torch.nn.utils import clip_grad_norm_

for x, y in batches:
    optimizer.zero_grad()
    loss_of(model, x, y).backward()
    clip_grad_norm_(model.parameters(), max_norm=1.0)
    optimizer.step()
```

Lightning clips in a hook of the module, and logs the norm there:

```python
class Model(lightning.LightningModule):
    def configure_gradient_clipping(self, optimizer, *args, **kwargs):
        self.log("norm", clip_grad_norm_(self.parameters(), 1.0))
```

Gradients are clipped where they lie. `clip_grad_norm_` of gradients on a GPU waits for nothing.

| where they differ | `torch.nn.utils` | `numclip.torch` |
|---|---|---|
| scale factor | max_norm / (norm + 1e-6) | min(1, max_norm / norm): the result reaches max_norm |
| norm <= max_norm | written, and rescaled close to the bound | not written |
| norm | in the gradients' dtype | exact; float32, or float64 for 64-bit gradients |
| float32, four times 1e20 | norm inf, gradients 0 | norm 2e20, clipped |
| NaN or Inf, without error_if_nonfinite | NaN and 0, or all NaN | all NaN (orders >= 1) |
| max_norm, clip_value < 0 | every sign flips | ValueError |
| sparse gradients (COO) | error | clipped as the dense ones they stand for |
| gradients on several devices | moved | TypeError |
"""

from __future__ import annotations

import contextlib
import math
import re
import warnings
from collections.abc import Generator, Iterable, Iterator
from typing import Any

from numclip import functional
from numclip.border import arguments
from numclip.errors import NonFiniteGradientError, expected

__all__ = [
    "NonFiniteNormError",
    "clip_grad_norm_",
    "clip_grad_value_",
    "clip_grads_with_norm_",
    "get_total_norm",
]

Tensor = Any
Tensors = Any


class NonFiniteNormError(NonFiniteGradientError, RuntimeError):
    """A norm is NaN or Inf, and ``error_if_nonfinite=True``; a RuntimeError, as PyTorch's is.

    Attributes
    ----------
    name : int or None
        The position of the first bad gradient; None for an order below 1, which is not traced.
    index : int
        The flat index of its first bad element.
    value : float or complex
        That element, or the norm where `name` is None.
    count : int
        How many of that gradient's elements are not finite.
    """


def clip_grad_norm_(
    parameters: Tensors,
    max_norm: float,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Scale the gradients of parameters by ``min(1, max_norm / norm)``, in place.

    Parameters
    ----------
    parameters : iterable of tensors, or a tensor
        Their ``.grad`` is clipped; those without are left out. Dense gradients of any strides,
        or sparse ones (COO).
    max_norm : float
        The bound on the norm of all gradients together, >= 0. ``inf`` only measures.
    norm_type : float, default 2.0
        The order of the norm; ``"inf"`` is taken too.
    error_if_nonfinite : bool, default False
        Whether a norm of NaN or Inf is an error; otherwise all gradients become NaN.
    foreach : bool, optional
        Accepted for the signature's sake, and ignored.

    Returns
    -------
    tensor, 0-d
        The norm before clipping, on the device of the first gradient: float64 for 64-bit
        gradients, else float32, which makes it ``inf`` on a GPU where it is beyond that (clipping
        is right all the same); in the host's memory it is float64 then.

    Raises
    ------
    NonFiniteNormError
        With ``error_if_nonfinite=True``, naming the gradient. Nothing is modified.
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is modified.

    Notes
    -----
    **Guarantees.** Those of `numclip.clip_by_global_norm`, for orders >= 1. Norms of orders
    below 1 are PyTorch's, in float64.

    **On a GPU** nothing is waited for, but with `error_if_nonfinite` or an order below 1.

    **Edge cases.** No gradients: a norm of 0. A tensor that stands in `parameters` twice is
    refused, as its gradient would be scaled twice. **Source.** ``torch.nn.utils.clip_grad_norm_``.

    Examples
    --------
    >>> import torch
    >>> from numclip.torch import clip_grad_norm_
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grad_norm_([weight], max_norm=1.0)
    tensor(5.)
    >>> weight.grad.norm() <= 1.0
    tensor(True)
    """
    del foreach
    bound = arguments.bound("max_norm", max_norm)
    order = _order(norm_type)
    grads = _gradients(parameters)
    first: dict[int, int] = {}
    for number, grad in enumerate(grads):
        other = first.setdefault(id(grad), number) if grad is not None else number
        if other != number:
            raise ValueError(
                f"parameters[{number}].grad: expected a gradient that comes once, got that of "
                f"parameters[{other}], which would be scaled twice"
            )
    with _named("parameters[{}].grad"):
        return _clip(grads, bound, order, error_if_nonfinite)


def clip_grad_value_(parameters: Tensors, clip_value: float, foreach: bool | None = None) -> None:
    """Hold each element of the gradients of parameters in ``[-clip_value, clip_value]``, in place.

    The bounds are rounded to the dtype of each gradient.

    Parameters
    ----------
    parameters : iterable of tensors, or a tensor
        As in `clip_grad_norm_`.
    clip_value : float
        The bound on the magnitudes, >= 0.
    foreach : bool, optional
        Accepted for the signature's sake, and ignored.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit, or a gradient is complex. Nothing is modified.

    Notes
    -----
    **Edge cases.** NaN stays NaN, Inf becomes the bound. **Source.**
    ``torch.nn.utils.clip_grad_value_``.

    Examples
    --------
    >>> import torch
    >>> from numclip.torch import clip_grad_value_
    >>> weight = torch.nn.Parameter(torch.zeros(3))
    >>> weight.grad = torch.tensor([-3.0, 0.5, 7.0])
    >>> clip_grad_value_([weight], 1.0)
    >>> weight.grad
    tensor([-1.0000,  0.5000,  1.0000])
    """
    del foreach
    bound = arguments.bound("clip_value", clip_value)
    grads = _gradients(parameters)
    for number, grad in enumerate(grads):
        if grad is not None and not grad.is_floating_point():
            raise TypeError(
                f"parameters[{number}].grad: expected real floating-point numbers to hold "
                f"between bounds, got {grad.dtype}"
            )
    every = [*{id(grad): grad for grad in grads}.values()]  # a parameter may stand there twice
    with _named("a gradient"):
        functional.clip_by_value(every, -bound, bound, out=every)


def get_total_norm(
    tensors: Tensors,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
) -> Tensor:
    """Return the norm of tensors together, as of one long vector.

    Parameters
    ----------
    tensors : iterable of tensors, or a tensor
        Gradients, not parameters. Only read.
    norm_type : float, default 2.0
        The order of the norm; ``"inf"`` is taken too.
    error_if_nonfinite : bool, default False
        Whether a norm of NaN or Inf is an error.
    foreach : bool, optional
        Accepted for the signature's sake, and ignored.

    Returns
    -------
    tensor, 0-d
        The norm, as `clip_grad_norm_` returns it.

    Raises
    ------
    NonFiniteNormError
        With ``error_if_nonfinite=True``, naming the tensor.
    TypeError, ValueError
        Where an argument does not fit; the message names it.

    Notes
    -----
    **Source.** ``torch.nn.utils.get_total_norm``.

    Examples
    --------
    >>> import torch
    >>> from numclip.torch import get_total_norm
    >>> get_total_norm([torch.tensor([3e20]), torch.tensor([4e20])])
    tensor(5.0000e+20)
    """
    del foreach
    order = _order(norm_type)
    with _named("tensors[{}]"):
        return _clip(_listed("tensors", tensors), None, order, error_if_nonfinite)


def clip_grads_with_norm_(
    parameters: Tensors, max_norm: float, total_norm: Tensor, foreach: bool | None = None
) -> None:
    """Scale the gradients of parameters by ``min(1, max_norm / total_norm)``, in place.

    Parameters
    ----------
    parameters : iterable of tensors, or a tensor
        As in `clip_grad_norm_`.
    max_norm : float
        The bound on the norm, >= 0.
    total_norm : tensor, 0-d, or float
        The norm that stands for the gradients', for instance from `get_total_norm`.
    foreach : bool, optional
        Accepted for the signature's sake, and ignored.

    Raises
    ------
    TypeError, ValueError
        Where an argument does not fit; the message names it. Nothing is modified.

    Notes
    -----
    **Guarantees.** As `numclip.clip_by_global_norm` with ``use_norm``: where repeated rows of a
    sparse gradient cancel, the factor leaves room for what rounding can add to their sums.

    **On a GPU** a `total_norm` that lies there is read, and so waited for; `clip_grad_norm_`
    does both halves without waiting. **Source.** ``torch.nn.utils.clip_grads_with_norm_``.

    Examples
    --------
    >>> import torch
    >>> from numclip.torch import clip_grads_with_norm_
    >>> weight = torch.nn.Parameter(torch.zeros(2))
    >>> weight.grad = torch.tensor([3.0, 4.0])
    >>> clip_grads_with_norm_([weight], max_norm=1.0, total_norm=10.0)
    >>> weight.grad
    tensor([0.3000, 0.4000])
    """
    del foreach
    bound = arguments.bound("max_norm", max_norm)
    if _is_tensor(total_norm):
        if total_norm.numel() != 1:
            got = f"a tensor of shape {tuple(total_norm.shape)}"
            raise ValueError(expected("total_norm", "one number", got))
        total_norm = total_norm.item()
    norm = arguments.real("total_norm", total_norm)
    if norm < 0.0:
        raise ValueError(f"total_norm: expected a norm, which is >= 0, got {norm}")
    grads = _gradients(parameters)
    with _named("parameters[{}].grad"):
        functional.clip_by_global_norm(grads, bound, use_norm=norm, out=grads)


@contextlib.contextmanager
def _named(form: str) -> Iterator[None]:
    """Rename gradients in error messages as `form` says, by their numbers."""
    try:
        yield
    except NonFiniteGradientError:
        raise
    except (TypeError, ValueError) as error:
        text = re.sub(r"\b(?:grads|out)\[(\d+)\]", lambda k: form.format(k[1]), str(error))
        text = re.sub(r"\.astype\(numpy\.(\w+)\)", r".to(torch.\1)", text)
        raise type(error)(text) from None


def _clip(tensors: list[Tensor], bound: float | None, order: float, strict: bool) -> Tensor:
    """Clip by the global norm, or only measure where there is no bound; return the norm."""
    import torch

    norm: Any = functional.global_norm(tensors, order) if bound is None and order >= 1.0 else None
    if not order >= 1.0:
        norm = float(_norm_of_low_order(tensors, order))
        if strict and not math.isfinite(norm):
            raise NonFiniteNormError(_complaint(order, f"it is {norm}"), None, 0, norm, 0)
        if bound is not None:
            functional.clip_by_global_norm(tensors, bound, use_norm=norm, out=tensors)
    elif bound is not None or (strict and not math.isfinite(norm)):
        # A bound of inf only measures, parameters too, and says what is not finite.
        written = (
            tensors if bound is not None else [t if t is None else t.detach() for t in tensors]
        )
        try:
            _, norm = functional.clip_by_global_norm(
                written,
                math.inf if bound is None else bound,
                ord=order,
                nonfinite="raise" if strict else "propagate",
                out=written,
            )
        except NonFiniteGradientError as error:
            what = f"gradient {error.name} has {error.value} at flat index {error.index}"
            facts = error.name, error.index, error.value, error.count
            raise NonFiniteNormError(_complaint(order, what), *facts) from None
    given = [tensor for tensor in tensors if tensor is not None]
    if not given:
        return torch.tensor(0.0)
    wide = any(tensor.dtype in (torch.float64, torch.complex128) for tensor in given)
    dtype, device = torch.float64 if wide else torch.float32, given[0].device
    if hasattr(norm, "__cuda_array_interface__"):  # it stays on the GPU, nobody waits
        return torch.as_tensor(norm, device=device).to(dtype, copy=True)
    if math.isfinite(norm) and norm > torch.finfo(dtype).max:
        dtype = torch.float64
    return torch.tensor(float(norm), dtype=dtype, device=device)


def _complaint(order: float, what: str) -> str:
    return (
        f"The total norm of order {order} for gradients is not finite: {what}; nothing was "
        "modified. error_if_nonfinite=False lets all gradients become NaN"
    )


def _order(norm_type: Any) -> float:
    """Return the order of a norm: any real number, or a string for infinity."""
    try:
        order = float(norm_type) if isinstance(norm_type, str) else norm_type
    except ValueError:
        raise ValueError(expected("norm_type", "a number or 'inf'", repr(norm_type))) from None
    number = arguments.real("norm_type", order)
    if math.isnan(number):
        raise ValueError(expected("norm_type", "a number or 'inf'", norm_type))
    return number


def _norm_of_low_order(tensors: list[Tensor], order: float) -> Tensor:
    """Return the norm of an order that numclip does not support, by PyTorch, in float64."""
    import torch

    norms = []
    for tensor in tensors:
        if tensor is not None:
            wide = tensor.detach().to(torch.complex128 if tensor.is_complex() else torch.float64)
            dense = wide.to_dense() if tensor.is_sparse else wide  # sums of rows, unrounded
            norms.append(torch.linalg.vector_norm(dense.abs(), order))
    return torch.linalg.vector_norm(torch.stack(norms), order) if norms else torch.tensor(0.0)


def _is_tensor(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor)


def _listed(name: str, tensors: Tensors) -> list[Tensor]:
    """Return tensors as a list, a single one too."""
    if _is_tensor(tensors):
        return [tensors]
    if not isinstance(tensors, Iterable) or isinstance(tensors, (str, bytes)):
        raise TypeError(f"{name}: expected an iterable of tensors, got {type(tensors).__name__}")
    found = list(tensors)
    for number, tensor in enumerate(found):
        if not _is_tensor(tensor) and not (tensor is None and name == "tensors"):
            advice = "; pass model.parameters()" if isinstance(tensor, (tuple, str)) else ""
            got = f"{type(tensor).__name__}{advice}"
            raise TypeError(expected(f"{name}[{number}]", "a tensor", got))
    return found


def _gradients(parameters: Tensors) -> list[Tensor | None]:
    """Return the gradients of parameters, None where there is none."""
    found = _listed("parameters", parameters)
    if not found and isinstance(parameters, Generator):
        warnings.warn(
            "parameters: got a generator that has nothing left; no gradient is clipped",
            stacklevel=3,
        )
    return [parameter.grad for parameter in found]

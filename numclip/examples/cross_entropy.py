"""The cost of a language model: the cross entropy of its predictions, with the gradient."""

from typing import Any

import numpy as np
import numpy.typing as npt

from numclip.examples.corpus import Numbers

Array = npt.NDArray[np.floating[Any]]


def cross_entropy(logits: Array, targets: Numbers) -> tuple[Array, Array]:
    """Return ``-log softmax(logits)`` at the targets, and its gradient by the logits.

    Parameters
    ----------
    logits : array, shape (n, classes)
        Of float32 or float64. Overwritten.
    targets : array of int, shape (n,)
        The right class of each row.

    Returns
    -------
    losses : array, shape (n,)
        In nats.
    gradient : array, shape (n, classes)
        The gradient of the losses' sum, in the memory of `logits`.
    """
    rows = np.arange(len(targets))
    logits -= logits.max(axis=1, keepdims=True)  # exp cannot overflow
    at_targets = logits[rows, targets]
    gradient = np.exp(logits, out=logits)
    sums = gradient.sum(axis=1, keepdims=True)
    gradient /= sums
    gradient[rows, targets] -= 1
    return np.log(sums[:, 0]) - at_targets, gradient

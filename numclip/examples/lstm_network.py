"""The LSTM language model of Zaremba et al. 2014 (arXiv 1409.2329), in NumPy: forward and backward.

A layer has one matrix: ``i, j, f, o = split([x, h] @ W + b)``, as TensorFlow's BasicLSTMCell, with
a forget bias of 0. A step is::

    c = sigmoid(f) * c + sigmoid(i) * tanh(j)
    h = sigmoid(o) * tanh(c)

Dropout acts on what enters the first layer and on what leaves each layer, not from step to step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from numclip import IndexedSlices
from numclip.examples.corpus import Numbers
from numclip.examples.cross_entropy import Array, cross_entropy
from numclip.examples.gru_network import sigmoid

Params = Mapping[str, Array]


def initial_params(
    rng: np.random.Generator, words: int, hidden: int, layers: int, scale: float
) -> dict[str, Array]:
    """Return float32 parameters, uniform within `scale`, the embedding first."""
    shapes: dict[str, tuple[int, ...]] = {"embedding": (words, hidden)}
    for layer in range(layers):
        shapes[f"lstm{layer}_w"] = (2 * hidden, 4 * hidden)
        shapes[f"lstm{layer}_b"] = (4 * hidden,)
    shapes |= {"softmax_w": (hidden, words), "softmax_b": (words,)}
    return {
        name: rng.uniform(-scale, scale, shape).astype(np.float32) for name, shape in shapes.items()
    }


def initial_state(params: Params, batch: int) -> Array:
    """Return the zeros that training starts from: c and h of each layer, for each sequence."""
    layers = sum(name.endswith("_w") for name in params) - 1
    embedding = params["embedding"]
    return np.zeros((layers, 2, batch, embedding.shape[1]), embedding.dtype)


def dropout_masks(
    rng: np.random.Generator, keep: float, shape: tuple[int, int, int, int]
) -> Array | None:
    """Return 0 or ``1 / keep`` for (layers + 1, steps, batch, hidden), None where all is kept."""
    if keep == 1.0:
        return None
    kept: Array = (rng.random(shape, dtype=np.float32) < keep) * np.float32(1 / keep)
    return kept


@dataclass
class _Layer:
    """Values of the forward pass through a layer that the backward pass reads, step by step."""

    inputs: Array  # (steps, batch, 2 * hidden): x and h before the step
    gates: Array  # (steps, batch, 4 * hidden): sigmoid(i), tanh(j), sigmoid(f), sigmoid(o)
    cells: Array  # (steps + 1, batch, hidden), the first one included


def cost(params: Params, words: Numbers, targets: Numbers, state: Array) -> tuple[float, Array]:
    """Return the cost of a batch and the state after it, as `cost_and_gradients` does."""
    above, _, end = _forward(params, words, state, None)
    losses, _ = cross_entropy(_logits(params, above), targets.reshape(-1))
    return float(losses.sum(dtype=np.float64)) / words.shape[1], end


def cost_and_gradients(
    params: Params,
    words: Numbers,
    targets: Numbers,
    state: Array,
    masks: Array | None = None,
    scale: float = 1.0,
) -> tuple[float, dict[str, Array | IndexedSlices], Array]:
    """Run over a batch of sequences, forward and backward.

    Parameters
    ----------
    params : dict of str to array
        As from `initial_params`.
    words, targets : array of int, shape (steps, batch)
        The words and those that follow them.
    state : array, shape (layers, 2, batch, hidden)
        The state before the first step.
    masks : array, optional
        From `dropout_masks`.
    scale : float, default 1.0
        The factor by which the gradients are multiplied.

    Returns
    -------
    cost : float
        The cross entropy, summed over the steps and averaged over the batch.
    gradients : dict of str to array or IndexedSlices
        The cost's gradients by the parameters; the embedding's has a row for every word of the
        batch, as they come. None flows into `state`.
    end : array
        The state after the last step.
    """
    (steps, batch), hidden = words.shape, state.shape[-1]
    above, layers, end = _forward(params, words, state, masks)
    losses, error = cross_entropy(_logits(params, above), targets.reshape(-1))
    error *= error.dtype.type(scale / batch)
    gradients: dict[str, Array | IndexedSlices] = {
        "softmax_w": above.reshape(-1, hidden).T @ error,
        "softmax_b": error.sum(axis=0),
    }
    below: Array = (error @ params["softmax_w"].T).reshape(steps, batch, hidden)
    for k in reversed(range(len(layers))):
        if masks is not None:
            below *= masks[k + 1]
        by_weights, by_bias, below = _backward(params[f"lstm{k}_w"], layers[k], below)
        gradients |= {f"lstm{k}_w": by_weights, f"lstm{k}_b": by_bias}
    if masks is not None:
        below *= masks[0]
    rows = below.reshape(-1, hidden)
    gradients["embedding"] = IndexedSlices(rows, words.reshape(-1), params["embedding"].shape)
    return float(losses.sum(dtype=np.float64)) / batch, gradients, end


def _logits(params: Params, above: Array) -> Array:
    flat = above.reshape(-1, above.shape[-1])
    result: Array = flat @ params["softmax_w"]
    result += params["softmax_b"]
    return result


def _forward(
    params: Params, words: Numbers, state: Array, masks: Array | None
) -> tuple[Array, list[_Layer], Array]:
    """Return the last layer's outputs after dropout, each layer's `_Layer`, and the last state."""
    x, layers, end = params["embedding"][words], [], np.empty_like(state)
    if masks is not None:
        x *= masks[0]
    for k, start in enumerate(state):
        x, layer = _forward_layer(params[f"lstm{k}_w"], params[f"lstm{k}_b"], x, start)
        layers.append(layer)
        end[k] = layer.cells[-1], x[-1]
        if masks is not None:
            x = x * masks[k + 1]
    return x, layers, end


def _forward_layer(weights: Array, bias: Array, x: Array, start: Array) -> tuple[Array, _Layer]:
    """Return the layer's outputs and its `_Layer` for the backward pass."""
    steps, batch, hidden = x.shape
    inputs = np.concatenate((x, np.empty_like(x)), axis=2)
    gates = (x.reshape(-1, hidden) @ weights[:hidden] + bias).reshape(steps, batch, 4 * hidden)
    cells = np.empty((steps + 1, batch, hidden), x.dtype)
    outputs = np.empty_like(x)
    cells[0], h = start
    for t in range(steps):
        inputs[t, :, hidden:] = h
        gates[t] += h @ weights[hidden:]
        i, j, f, o = np.split(gates[t], 4, axis=1)
        np.tanh(j, out=j)
        for gate in (i, f, o):
            gate[...] = sigmoid(gate)
        cells[t + 1] = f * cells[t] + i * j
        h = outputs[t] = o * np.tanh(cells[t + 1])
    return outputs, _Layer(inputs, gates, cells)


def _backward(weights: Array, layer: _Layer, by_outputs: Array) -> tuple[Array, Array, Array]:
    """Return the gradients by the weights, the bias and the layer's inputs."""
    steps, batch, hidden = by_outputs.shape
    by_sums = np.empty((steps, batch, 4 * hidden), by_outputs.dtype)
    by_state = by_cell = np.zeros((batch, hidden), by_outputs.dtype)
    for t in reversed(range(steps)):
        i, j, f, o = np.split(layer.gates[t], 4, axis=1)
        squashed = np.tanh(layer.cells[t + 1])
        by_state = by_outputs[t] + by_state
        by_cell = by_cell + by_state * o * (1 - squashed * squashed)
        di = by_cell * j * i * (1 - i)
        dj = by_cell * i * (1 - j * j)
        df = by_cell * layer.cells[t] * f * (1 - f)
        do = by_state * squashed * o * (1 - o)
        np.concatenate((di, dj, df, do), axis=1, out=by_sums[t])
        by_cell = by_cell * f
        by_state = by_sums[t] @ weights[hidden:].T
    flat = by_sums.reshape(-1, 4 * hidden)
    by_weights = layer.inputs.reshape(-1, 2 * hidden).T @ flat
    by_inputs = (flat @ weights[:hidden].T).reshape(steps, batch, hidden)
    return by_weights, flat.sum(axis=0), by_inputs

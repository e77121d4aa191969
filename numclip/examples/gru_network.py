"""A layer of gated recurrent units with a softmax on top, in NumPy: forward and backward.

With ``r``, ``z`` and ``n`` for the reset gate, the update gate and the new state, a step is::

    r = sigmoid(x @ W_ir.T + b_ir + h @ W_hr.T + b_hr)
    z = sigmoid(x @ W_iz.T + b_iz + h @ W_hz.T + b_hz)
    n = tanh(x @ W_in.T + b_in + r * (h @ W_hn.T + b_hn))
    h = (1 - z) * n + z * h

as in Cho et al. 2014 (arXiv 1406.1078), with the reset gate behind the product as PyTorch has
it. ``weight_ih`` holds W_ir, W_iz and W_in, one below the other; likewise the other names.
"""

from collections.abc import Mapping

import numpy as np

from numclip.examples.corpus import Numbers
from numclip.examples.cross_entropy import Array, cross_entropy

Params = Mapping[str, Array]


def initial_params(
    rng: np.random.Generator, inputs: int, hidden: int, outputs: int
) -> dict[str, Array]:
    """Return float32 parameters, uniform within ``1 / sqrt(hidden)``."""
    shapes = {
        "weight_ih": (3 * hidden, inputs),
        "weight_hh": (3 * hidden, hidden),
        "bias_ih": (3 * hidden,),
        "bias_hh": (3 * hidden,),
        "out_weight": (outputs, hidden),
        "out_bias": (outputs,),
    }
    bound = hidden**-0.5
    return {
        name: rng.uniform(-bound, bound, shape).astype(np.float32) for name, shape in shapes.items()
    }


def cost_and_gradients(
    params: Params,
    x: Array,
    targets: Numbers,
    start: Array,
    scale: float = 1.0,
) -> tuple[float, dict[str, Array], Array]:
    """Run over a batch of sequences, forward and backward.

    Parameters
    ----------
    params : dict of str to array
        As from `initial_params`.
    x : array, shape (steps, batch, inputs)
        The inputs of each step.
    targets : array of int, shape (steps, batch)
        The right output class of each step.
    start : array, shape (batch, hidden)
        The state before the first step.
    scale : float, default 1.0
        The factor by which the gradients are multiplied.

    Returns
    -------
    cost : float
        The cross entropy, averaged over steps and batch.
    gradients : dict of str to array
        The cost's gradients by the parameters. None flows into `start`.
    end : array, shape (batch, hidden)
        The state after the last step.
    """
    states, gates = _forward(params, x, start)
    above = states[1:].reshape(-1, start.shape[1])
    logits = above @ params["out_weight"].T + params["out_bias"]
    losses, error = cross_entropy(logits, targets.reshape(-1))
    error *= error.dtype.type(scale / len(losses))
    gradients = _backward(params, x, states, gates, error @ params["out_weight"])
    gradients["out_weight"] = error.T @ above
    gradients["out_bias"] = error.sum(axis=0)
    return float(losses.mean(dtype=np.float64)), gradients, states[-1]


def _forward(params: Params, x: Array, start: Array) -> tuple[Array, Array]:
    """Return the states, the first one included, and for each step r, z, n and W_hn h + b_hn."""
    (steps, batch, inputs), hidden = x.shape, start.shape[1]
    from_inputs = x.reshape(-1, inputs) @ params["weight_ih"].T + params["bias_ih"]
    from_inputs = from_inputs.reshape(steps, batch, 3 * hidden)
    states = np.empty((steps + 1, batch, hidden), start.dtype)
    gates = np.empty((steps, 4, batch, hidden), start.dtype)
    states[0] = start
    for t, (h, (r, z, n, recurrent)) in enumerate(zip(states, gates, strict=False)):
        from_state = h @ params["weight_hh"].T + params["bias_hh"]
        both = sigmoid(from_inputs[t, :, : 2 * hidden] + from_state[:, : 2 * hidden])
        r[...], z[...] = both[:, :hidden], both[:, hidden:]
        recurrent[...] = from_state[:, 2 * hidden :]
        np.tanh(from_inputs[t, :, 2 * hidden :] + r * recurrent, out=n)
        states[t + 1] = n + z * (h - n)
    return states, gates


def _backward(
    params: Params, x: Array, states: Array, gates: Array, above: Array
) -> dict[str, Array]:
    """Return the layer's gradients; `above` has the output layer's gradients by the states."""
    steps, batch, hidden = len(x), *states.shape[1:]
    by_states = above.reshape(steps, batch, hidden)
    by_inputs = np.empty((steps, batch, 3 * hidden), states.dtype)
    by_recurrent = np.empty_like(by_inputs)
    carried = np.zeros((batch, hidden), states.dtype)
    for t in reversed(range(steps)):
        r, z, n, recurrent = gates[t]
        dh = by_states[t] + carried
        dn = dh * (1 - z) * (1 - n * n)
        dr = dn * recurrent * r * (1 - r)
        dz = dh * (states[t] - n) * z * (1 - z)
        np.concatenate((dr, dz, dn), axis=1, out=by_inputs[t])
        np.concatenate((dr, dz, dn * r), axis=1, out=by_recurrent[t])
        carried = dh * z + by_recurrent[t] @ params["weight_hh"]
    flat_inputs = by_inputs.reshape(-1, 3 * hidden)
    flat_recurrent = by_recurrent.reshape(-1, 3 * hidden)
    return {
        "weight_ih": flat_inputs.T @ x.reshape(-1, x.shape[2]),
        "weight_hh": flat_recurrent.T @ states[:-1].reshape(-1, hidden),
        "bias_ih": flat_inputs.sum(axis=0),
        "bias_hh": flat_recurrent.sum(axis=0),
    }


def sigmoid(x: Array) -> Array:
    """Return ``1 / (1 + exp(-x))`` without overflow."""
    result: Array = 0.5 * np.tanh(0.5 * x) + 0.5
    return result

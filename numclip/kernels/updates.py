"""Optimizer steps on the CPU: gradient, parameter and state are read and written once.

A table of updates has a row for each chunk: the addresses of the gradient, the parameter and
up to two states, the number of elements, the tensor that owns them. The clip's factor is
applied on the way; the clipped gradient is never written. `settings` are in the type the
elements are computed in, and so are the states.
"""

import numpy as np

from numclip.kernels import formulas
from numclip.kernels.elements import array_at, narrow, widen
from numclip.kernels.jit import inline, kernel

GRAD, PARAM, FIRST, SECOND, LENGTH, OWNER = 0, 1, 2, 3, 4, 5

sgd_velocity = inline(formulas.sgd_velocity)
sgd_direction = inline(formulas.sgd_direction)
moment = inline(formulas.moment)
adam_step = inline(formulas.adam_step)


@kernel
def descend(begin, end, updates, factors, settings, like):
    """Take a plain gradient step: `settings` are the rate and the L2 penalty. Three passes."""
    rate, decay = settings[0], settings[1]
    for c in range(begin, end):
        factor = factors[updates[c, OWNER]]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        for i in range(param.size):
            value = widen(param[i])
            step = rate * (widen(grad[i]) * factor + decay * value)
            param[i] = narrow(value - step, param[i])


@kernel
def descend_with_momentum(begin, end, updates, factors, settings, like):
    """Take a step with momentum. Five passes.

    `settings` are the rate, the L2 penalty, the momentum, and the weights that the gradient
    and the velocity have in the step: (0, 1), or Nesterov's (1, momentum).
    """
    rate, decay, momentum = settings[0], settings[1], settings[2]
    own, lookahead = settings[3], settings[4]
    for c in range(begin, end):
        factor = factors[updates[c, OWNER]]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        velocity = array_at(updates[c, FIRST], updates[c, LENGTH], settings)
        for i in range(param.size):
            value = widen(param[i])
            slope = widen(grad[i]) * factor + decay * value
            velocity[i] = sgd_velocity(slope, velocity[i], momentum)
            step = sgd_direction(slope, velocity[i], own, lookahead)
            param[i] = narrow(value - rate * step, param[i])


@kernel
def adam(begin, end, updates, factors, settings, like):
    """Take a step of Adam with decoupled weight decay. Seven passes.

    `settings` are the share of the parameter that decays, the weights of the gradient and of
    its square in their averages, the rate and eps, see `formulas.adam_step`.
    """
    decay, weight, square_weight = settings[0], settings[1], settings[2]
    rate, eps = settings[3], settings[4]
    for c in range(begin, end):
        factor = factors[updates[c, OWNER]]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        mean = array_at(updates[c, FIRST], updates[c, LENGTH], settings)
        square = array_at(updates[c, SECOND], updates[c, LENGTH], settings)
        for i in range(param.size):
            slope = widen(grad[i]) * factor
            mean[i] = moment(slope, mean[i], weight)
            square[i] = moment(slope * slope, square[i], square_weight)
            step = adam_step(mean[i], np.sqrt(square[i]), rate, eps)
            value = widen(param[i])
            param[i] = narrow(value - (step + decay * value), param[i])

"""Optimizer steps on the CPU: gradient, parameter and state are read and written once.

A table of updates has a row for each chunk: the addresses of the gradient, the parameter and
up to two states, the number of elements, the pool that owns them. The clip's factor is applied
on the way; the clipped gradient is never written. A pool has a factor (0 or more, NaN, or `LEFT`
if the pool is not updated) and a row of settings; both are in the type the elements are computed
in, and so are the states.
"""

import numpy as np

from numclip import formulas
from numclip.decisions import compiled
from numclip.host.kernels.elements import array_at, nearest, widen
from numclip.host.kernels.tuning import CHUNK
from numclip.host.runtime.jit import inline, kernel
from numclip.tables import MODE, MULTIPLY, SKIPPED

GRAD, PARAM, FIRST, SECOND, LENGTH, OWNER = range(6)
LEFT = -1.0  # the factor of a pool that is not updated

sgd_velocity = inline(formulas.sgd_velocity)
sgd_direction = inline(formulas.sgd_direction)
moment = inline(formulas.moment)
adam_step = inline(formulas.adam_step)
adam_numbers = compiled((formulas.adam_rate, formulas.adam_numbers), inline).adam_numbers


@inline
def factor_of(decision, column):
    """Return an update's factor: LEFT if skipped, 1 if none is needed or it is applied already."""
    if decision[SKIPPED] != 0.0:
        return LEFT
    return decision[column] if decision[MODE] == MULTIPLY else 1.0


@kernel
def advance(decisions, column, counts, counted, given, factors, settings):
    """Count a step for each pool that is not skipped; write its factor and its settings.

    `column` is that of the factors in decisions. If `counted`, nothing is added to `counts`.
    """
    for p in range(counts.size):
        factor = factor_of(decisions[p], column)
        factors[p] = factor
        if factor != LEFT:
            counts[p] += 0 if counted else 1
            for k in range(given.shape[1]):
                settings[p, k] = given[p, k]


@kernel
def advance_adam(decisions, column, counts, counted, given, factors, settings):
    """Do what `advance` does, with the settings that `formulas.adam_numbers` returns."""
    for p in range(counts.size):
        factor = factor_of(decisions[p], column)
        factors[p] = factor
        if factor != LEFT:
            counts[p] += 0 if counted else 1
            own = given[p]
            found = adam_numbers(own[0], own[1], own[2], own[3], own[4], float(counts[p]))
            for k in range(len(found)):
                settings[p, k] = found[k]


@kernel
def write_row_updates(indices, length, addresses, itemsizes, owner, out):
    """Write the updates of the rows `indices` by their contiguous sums, cut into chunks.

    `addresses` are those of the sums, of the parameter and its states, `itemsizes` the bytes of
    an element of a parameter and of a state.
    """
    c = 0
    for g in range(indices.size):
        for start in range(0, length, CHUNK):
            begin = indices[g] * length + start
            out[c, GRAD] = addresses[GRAD] + (g * length + start) * itemsizes[0]
            out[c, PARAM] = addresses[PARAM] + begin * itemsizes[0]
            out[c, FIRST] = addresses[FIRST] + begin * itemsizes[1]
            out[c, SECOND] = addresses[SECOND] + begin * itemsizes[1]
            out[c, LENGTH], out[c, OWNER] = min(CHUNK, length - start), owner
            c += 1


@kernel
def descend(begin, end, updates, factors, settings, like):
    """Take a plain gradient step: settings are the rate and the L2 penalty. Three passes."""
    for c in range(begin, end):
        p = updates[c, OWNER]
        factor = factors[p]
        if factor == LEFT:
            continue
        rate, decay = settings[p, 0], settings[p, 1]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        for i in range(param.size):
            value = widen(param[i])
            step = rate * (widen(grad[i]) * factor + decay * value)
            param[i] = nearest(value - step, param[i])


@kernel
def descend_with_momentum(begin, end, updates, factors, settings, like):
    """Take a step with momentum. Five passes.

    Settings are the rate, the L2 penalty, the momentum, and the weights that the gradient
    and the velocity have in the step: (0, 1), or Nesterov's (1, momentum).
    """
    for c in range(begin, end):
        p = updates[c, OWNER]
        factor = factors[p]
        if factor == LEFT:
            continue
        rate, decay, momentum = settings[p, 0], settings[p, 1], settings[p, 2]
        own, lookahead = settings[p, 3], settings[p, 4]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        velocity = array_at(updates[c, FIRST], updates[c, LENGTH], factors)
        for i in range(param.size):
            value = widen(param[i])
            slope = widen(grad[i]) * factor + decay * value
            velocity[i] = sgd_velocity(slope, velocity[i], momentum)
            step = sgd_direction(slope, velocity[i], own, lookahead)
            param[i] = nearest(value - rate * step, param[i])


@kernel
def adam(begin, end, updates, factors, settings, like):
    """Take a step of Adam with decoupled weight decay. Seven passes.

    Settings are what `formulas.adam_numbers` returns.
    """
    for c in range(begin, end):
        p = updates[c, OWNER]
        factor = factors[p]
        if factor == LEFT:
            continue
        decay, weight, square_weight = settings[p, 0], settings[p, 1], settings[p, 2]
        rate, eps = settings[p, 3], settings[p, 4]
        grad = array_at(updates[c, GRAD], updates[c, LENGTH], like)
        param = array_at(updates[c, PARAM], updates[c, LENGTH], like)
        mean = array_at(updates[c, FIRST], updates[c, LENGTH], factors)
        square = array_at(updates[c, SECOND], updates[c, LENGTH], factors)
        for i in range(param.size):
            slope = widen(grad[i]) * factor
            mean[i] = moment(slope, mean[i], weight)
            square[i] = moment(slope * slope, square[i], square_weight)
            step = adam_step(mean[i], np.sqrt(square[i]), rate, eps)
            value = widen(param[i])
            param[i] = nearest(value - (step + decay * value), param[i])

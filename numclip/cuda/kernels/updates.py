"""Optimizer steps on NVIDIA GPUs: gradient, parameter and state are read and written once.

A table of updates has a row for each chunk, and for each row that a sparse gradient has: the
addresses of the gradient, the parameter and up to two states, the number of elements, the tensor
that owns them. The clip's factor is applied on the way; the clipped gradient is never written,
and a tensor that is skipped is left as it is. `settings` has a row for each pool.
"""

import math

import numpy as np

from numclip import formulas
from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.packets import as_computed, each, load_at, over_packets, rounded, store_at
from numclip.cuda.kernels.scaling import product
from numclip.decisions import compiled

sgd_velocity = inline(formulas.sgd_velocity)
sgd_direction = inline(formulas.sgd_direction)
moment = inline(formulas.moment)
adam_step = inline(formulas.adam_step)
adam_numbers = compiled((formulas.adam_rate, formulas.adam_numbers), inline).adam_numbers

GRAD, PARAM, FIRST, SECOND, LENGTH, OWNER = range(6)
# Of the settings that the host gives for each pool.
LR, DECAY, MOMENTUM, OWN, LOOKAHEAD = range(5)  # of SGD, as the kernels take them


@kernel
def advance(decisions, counts):
    """Count a step for each pool that is not skipped; one block."""
    p = np.int64(cuda.threadIdx.x)
    while p < counts.shape[0]:
        if decisions[p, col.SKIPPED] == 0.0:
            counts[p] += 1
        p += THREADS


@kernel
def advance_adam(decisions, given, counts, settings):
    """Count a step for each pool that is not skipped, and correct its moments' biases.

    `settings` receives the results of `formulas.adam_numbers`. One block.
    """
    p = np.int64(cuda.threadIdx.x)
    while p < counts.shape[0]:
        if decisions[p, col.SKIPPED] == 0.0:
            counts[p] += 1
            own = given[p]
            made = adam_numbers(own[0], own[1], own[2], own[3], own[4], float(counts[p]))
            for k in range(len(made)):
                settings[p, k] = made[k]
        p += THREADS


@inline
def factor_of(tensor, decision, like):
    """Return the factor still to be applied: 1 for sums of rows, and in modes but MULTIPLY."""
    multiplies = decision[col.MODE] == col.MULTIPLY and tensor[col.REPEATS] == 0
    return as_computed(decision[col.FACTOR] if multiplies else 1.0, like)


@inline
def decayed(slope, value, decay):
    """Return the gradient plus that of the L2 penalty."""
    return slope + decay * value


@inline
def descended(value, step, rate):
    """Return a parameter after a step."""
    return value - rate * step


@inline
def squared_moment(slope, average, weight):
    """Return the average of squares, updated with a gradient's square."""
    return moment(slope * slope, average, weight)


@inline
def adam_param(value, mean, square, decay, rate, eps):
    """Return a parameter after a step of Adam."""
    return value - (adam_step(mean, math.sqrt(square), rate, eps) + decay * value)


@inline
def over_updates(turn, updates, tensors, decisions, settings, like):
    """Call `turn` for each packet of each update that is not skipped, and each element in none."""
    c = np.int64(cuda.blockIdx.x)
    while c < updates.shape[0]:
        tensor, update = tensors[updates[c, OWNER]], updates[c]
        pool = tensor[col.POOL]
        if decisions[pool, col.SKIPPED] == 0.0:
            factor, state = factor_of(tensor, decisions[pool], like), as_computed(0.0, like)
            arguments = update, factor, settings[pool], state, like
            addresses = update[GRAD] | update[PARAM] | update[FIRST] | update[SECOND]
            over_packets(turn, arguments, addresses, update[LENGTH], like)
        c += cuda.gridDim.x


@kernel
def descend(updates, tensors, decisions, settings, like):
    """Take a gradient step: three passes, five where there is a state, momentum's velocity."""
    over_updates(descend_at, updates, tensors, decisions, settings, like)


@inline
def descend_at(spots, update, factor, settings, state, like):
    """Take a step for some elements; all are read before any is written."""
    rate, decay = as_computed(settings[LR], like), as_computed(settings[DECAY], like)
    momentum = as_computed(settings[MOMENTUM], like)
    own, lookahead = as_computed(settings[OWN], like), as_computed(settings[LOOKAHEAD], like)
    slope, value = load_at(update[GRAD], spots, like), load_at(update[PARAM], spots, like)
    rolls, velocity = update[FIRST] != 0, value
    if rolls:
        velocity = load_at(update[FIRST], spots, state)
    step = each(decayed, (each(product, (slope,), (factor,)), value), (decay,))
    if rolls:
        velocity = each(sgd_velocity, (step, velocity), (momentum,))
        store_at(update[FIRST], spots, velocity, state)
        step = each(sgd_direction, (step, velocity), (own, lookahead))
    value = each(descended, (value, step), (rate,))
    store_at(update[PARAM], spots, each(rounded, (value,), (like,)), like)


@kernel
def adam(updates, tensors, decisions, settings, like):
    """Take a step of Adam with decoupled weight decay. Seven passes."""
    over_updates(adam_at, updates, tensors, decisions, settings, like)


@inline
def adam_at(spots, update, factor, settings, state, like):
    """Take a step of Adam for some elements."""
    decay, weight = as_computed(settings[0], like), as_computed(settings[1], like)
    square_weight = as_computed(settings[2], like)
    rate, eps = as_computed(settings[3], like), as_computed(settings[4], like)
    slope = each(product, (load_at(update[GRAD], spots, like),), (factor,))
    value = load_at(update[PARAM], spots, like)
    mean = each(moment, (slope, load_at(update[FIRST], spots, state)), (weight,))
    square = load_at(update[SECOND], spots, state)
    square = each(squared_moment, (slope, square), (square_weight,))
    store_at(update[FIRST], spots, mean, state)
    store_at(update[SECOND], spots, square, state)
    value = each(adam_param, (value, mean, square), (decay, rate, eps))
    store_at(update[PARAM], spots, each(rounded, (value,), (like,)), like)

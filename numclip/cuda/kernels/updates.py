"""Optimizer steps on NVIDIA GPUs: gradient, parameter and state are read and written once.

A table of updates has a row for each chunk, and for each row that a sparse gradient has: the
addresses of the gradient, the parameter and up to two states, the number of elements, the tensor
that owns them. The clip's factor is applied on the way; the clipped gradient is never written,
and a tensor that is skipped is left as it is. `settings` has a row for each pool.
"""

import math

import numpy as np

from numclip import formulas
from numclip.cuda.device import THREADS, cuda, inline, kernel
from numclip.cuda.kernels.packets import (
    PACKET,
    WORD,
    as_computed,
    each,
    load,
    load_packet,
    size_of,
    store,
    store_packet,
    whole_packets,
)
from numclip.cuda.kernels.scaling import product
from numclip.tables import FACTOR, MODE, MULTIPLY, POOL, REPEATS, SKIPPED

sgd_velocity = inline(formulas.sgd_velocity)
sgd_direction = inline(formulas.sgd_direction)
moment = inline(formulas.moment)
adam_step = inline(formulas.adam_step)
adam_rate = inline(formulas.adam_rate)

GRAD, PARAM, FIRST, SECOND, LENGTH, OWNER = range(6)
# Of the settings that the host gives for each pool.
LR, DECAY, MOMENTUM, OWN, LOOKAHEAD = range(5)  # of SGD, as the kernels take them
BETA, BETA_SQUARE, EPS = range(2, 5)  # of Adam, after LR and DECAY
SETTINGS_COLUMNS = 5


@kernel
def advance(decisions, counts):
    """Count a step for each pool that is not skipped; one block."""
    p = np.int64(cuda.threadIdx.x)
    while p < counts.shape[0]:
        if decisions[p, SKIPPED] == 0.0:
            counts[p] += 1
        p += THREADS


@kernel
def advance_adam(decisions, given, counts, settings):
    """Count a step for each pool that is not skipped, and correct its moments' biases.

    `settings` are then the share that decays, the weights of the gradient and of its square in
    their averages, the rate and eps, see `formulas.adam_step`. One block.
    """
    p = np.int64(cuda.threadIdx.x)
    while p < counts.shape[0]:
        if decisions[p, SKIPPED] == 0.0:
            counts[p] += 1
            first, second = given[p, BETA], given[p, BETA_SQUARE]
            rate, bias = adam_rate(given[p, LR], float(counts[p]), first, second)
            settings[p, 0] = given[p, LR] * given[p, DECAY]
            settings[p, 1], settings[p, 2] = 1.0 - first, 1.0 - second
            settings[p, 3], settings[p, 4] = rate, given[p, EPS] * bias
        p += THREADS


@inline
def factor_of(tensor, decision, like):
    """Return the factor of a tensor; what is no plain number, or rows' sums, has it already."""
    plain = decision[MODE] == MULTIPLY and tensor[REPEATS] == 0
    return as_computed(decision[FACTOR] if plain else 1.0, like)


@inline
def state_word(p, like):
    """Return where in the states the elements of a packet begin, in bytes."""
    return p * WORD if size_of(like) > 2 else 2 * p * WORD


@inline
def state_stride(packets, like):
    """Return how far the words of a packet of states are apart."""
    return packets * WORD if size_of(like) > 2 else np.int64(WORD)


@inline
def decayed(slope, value, decay):
    """Return the gradient with the L2 penalty's."""
    return slope + decay * value


@inline
def descended(value, step, rate):
    """Return a parameter after a step."""
    return value - rate * step


@inline
def squared_moment(slope, average, weight):
    """Return the average of squares that has taken up a gradient."""
    return moment(slope * slope, average, weight)


@inline
def adam_param(value, mean, square, decay, rate, eps):
    """Return a parameter after a step of Adam."""
    return value - (adam_step(mean, math.sqrt(square), rate, eps) + decay * value)


@kernel
def descend(updates, tensors, decisions, settings, like):
    """Take a plain gradient step. Three passes."""
    c = np.int64(cuda.blockIdx.x)
    while c < updates.shape[0]:
        tensor = tensors[updates[c, OWNER]]
        pool = tensor[POOL]
        if decisions[pool, SKIPPED] == 0.0:
            factor = factor_of(tensor, decisions[pool], like)
            descend_chunk(updates[c], factor, settings[pool], like)
        c += cuda.gridDim.x


@inline
def descend_chunk(update, factor, settings, like):
    """Take a plain step for a chunk."""
    rate, decay = as_computed(settings[LR], like), as_computed(settings[DECAY], like)
    grad, param = update[GRAD], update[PARAM]
    packets = whole_packets(grad | param, update[LENGTH])
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        slope = each(product, (load_packet(grad + p * WORD, stride, like),), (factor,))
        value = load_packet(param + p * WORD, stride, like)
        slope = each(decayed, (slope, value), (decay,))
        store_packet(param + p * WORD, stride, each(descended, (value, slope), (rate,)), like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < update[LENGTH]:
        place = i * size_of(like)
        value = load(param + place, like)
        slope = decayed(load(grad + place, like) * factor, value, decay)
        store(param + place, descended(value, slope, rate), like)
        i += THREADS


@kernel
def descend_with_momentum(updates, tensors, decisions, settings, like):
    """Take a step with momentum. Five passes."""
    c = np.int64(cuda.blockIdx.x)
    while c < updates.shape[0]:
        tensor = tensors[updates[c, OWNER]]
        pool = tensor[POOL]
        if decisions[pool, SKIPPED] == 0.0:
            factor = factor_of(tensor, decisions[pool], like)
            roll_chunk(updates[c], factor, settings[pool], like)
        c += cuda.gridDim.x


@inline
def roll_chunk(update, factor, settings, like):
    """Take a step with momentum for a chunk."""
    rate, decay = as_computed(settings[LR], like), as_computed(settings[DECAY], like)
    momentum = as_computed(settings[MOMENTUM], like)
    own, lookahead = as_computed(settings[OWN], like), as_computed(settings[LOOKAHEAD], like)
    state = as_computed(0.0, like)
    grad, param, speed = update[GRAD], update[PARAM], update[FIRST]
    packets = whole_packets(grad | param | speed, update[LENGTH])
    stride, apart = packets * WORD, state_stride(packets, like)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        word, kept = p * WORD, state_word(p, like)
        slope = each(product, (load_packet(grad + word, stride, like),), (factor,))
        value = load_packet(param + word, stride, like)
        slope = each(decayed, (slope, value), (decay,))
        velocity = load_packet(speed + kept, apart, state)
        velocity = each(sgd_velocity, (slope, velocity), (momentum,))
        store_packet(speed + kept, apart, velocity, state)
        step = each(sgd_direction, (slope, velocity), (own, lookahead))
        store_packet(param + word, stride, each(descended, (value, step), (rate,)), like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < update[LENGTH]:
        place, kept = i * size_of(like), i * size_of(state)
        value = load(param + place, like)
        slope = decayed(load(grad + place, like) * factor, value, decay)
        velocity = sgd_velocity(slope, load(speed + kept, state), momentum)
        store(speed + kept, velocity, state)
        step = sgd_direction(slope, velocity, own, lookahead)
        store(param + place, descended(value, step, rate), like)
        i += THREADS


@kernel
def adam(updates, tensors, decisions, settings, like):
    """Take a step of Adam with decoupled weight decay. Seven passes."""
    c = np.int64(cuda.blockIdx.x)
    while c < updates.shape[0]:
        tensor = tensors[updates[c, OWNER]]
        pool = tensor[POOL]
        if decisions[pool, SKIPPED] == 0.0:
            factor = factor_of(tensor, decisions[pool], like)
            adam_chunk(updates[c], factor, settings[pool], like)
        c += cuda.gridDim.x


@inline
def adam_chunk(update, factor, settings, like):
    """Take a step of Adam for a chunk."""
    decay, weight = as_computed(settings[0], like), as_computed(settings[1], like)
    square_weight = as_computed(settings[2], like)
    rate, eps = as_computed(settings[3], like), as_computed(settings[4], like)
    state = as_computed(0.0, like)
    grad, param, means, squares = update[GRAD], update[PARAM], update[FIRST], update[SECOND]
    packets = whole_packets(grad | param | means | squares, update[LENGTH])
    stride, apart = packets * WORD, state_stride(packets, like)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        word, kept = p * WORD, state_word(p, like)
        slope = each(product, (load_packet(grad + word, stride, like),), (factor,))
        value = load_packet(param + word, stride, like)
        mean = each(moment, (slope, load_packet(means + kept, apart, state)), (weight,))
        square = load_packet(squares + kept, apart, state)
        square = each(squared_moment, (slope, square), (square_weight,))
        store_packet(means + kept, apart, mean, state)
        store_packet(squares + kept, apart, square, state)
        value = each(adam_param, (value, mean, square), (decay, rate, eps))
        store_packet(param + word, stride, value, like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < update[LENGTH]:
        place, kept = i * size_of(like), i * size_of(state)
        slope = load(grad + place, like) * factor
        mean = moment(slope, load(means + kept, state), weight)
        square = squared_moment(slope, load(squares + kept, state), square_weight)
        store(means + kept, mean, state)
        store(squares + kept, square, state)
        value = load(param + place, like)
        store(param + place, adam_param(value, mean, square, decay, rate, eps), like)
        i += THREADS

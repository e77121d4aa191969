"""Loops over memory on NVIDIA GPUs.

Kernels work on a table of chunks as those of ``cpu`` do: address read, address written, number
of elements, the tensor that owns it, and the place of its partial sum. A thousand tensors take
as many launches as one. Sums are in float64 with their rounding errors kept, and depend on the
chunks alone, not on the grid. A *pool* is the tensors of one norm, a *set* those that are
skipped together. Norm, verdict and factor stay on the device.
"""

import math

import numpy as np

from numclip.kernels import formulas
from numclip.kernels.device import THREADS, cuda, inline, kernel
from numclip.kernels.packets import (
    PACKET,
    WORD,
    as_computed,
    copy_element,
    copy_packet,
    each,
    load,
    load_packet,
    size_of,
    store,
    store_packet,
)

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks
FIRST, LAST, POOL, ZEROING = range(4)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS = range(2, 5)  # of pools, whose FIRST and LAST are tensors
TOTAL, EXPONENT, BAD = range(3)  # of sums: ``total * 4**exponent``, how many are not finite
# Of the law of each pool.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, ORD, PEAK = range(9)
LAW_COLUMNS = 9
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, SKIPPED, ROOT, ROOT_EXPONENT, BROKEN = range(8)
NORM, CLIPPED, SCALE, RARE = range(8, 12)
DECISION_COLUMNS = 12
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)

two_sum = inline(formulas.two_sum)
settled = inline(formulas.settled)
is_safe = inline(formulas.is_safe)
binned_square = inline(formulas.binned_square)
joined_bins = inline(formulas.joined_bins)
larger = inline(formulas.larger)
root = inline(formulas.root)
power_term = inline(formulas.power_term)
scale_by_power = inline(formulas.scale_by_power)
clip_factor = inline(formulas.clip_factor)
factor_over = inline(formulas.factor_over)
truncated_product = inline(formulas.truncated_product)
clamped = inline(formulas.clamped)


@inline
def whole_packets(addresses, length):
    """Return how many packets can be read in words: none where an address is not aligned."""
    return length // PACKET if addresses % WORD == 0 else np.int64(0)


@inline
def block_sum(total, error, room):
    """Return the sum over the threads of the block of sums and their errors, added in a tree."""
    totals, errors = room[0], room[1]
    i = cuda.threadIdx.x
    totals[i] = total
    errors[i] = error
    cuda.syncthreads()
    half = THREADS >> 1
    while half > 0:
        if i < half:
            totals[i], rest = two_sum(totals[i], totals[i + half])
            errors[i] += errors[i + half] + rest
        cuda.syncthreads()
        half >>= 1
    result = settled(totals[0], errors[0])
    cuda.syncthreads()
    return result


@inline
def block_max(value, room):
    """Return the largest value of the threads of the block, NaN where one is."""
    values = room[0]
    i = cuda.threadIdx.x
    values[i] = value
    cuda.syncthreads()
    half = THREADS >> 1
    while half > 0:
        if i < half:
            values[i] = larger(values[i], values[i + half])
        cuda.syncthreads()
        half >>= 1
    result = values[0]
    cuda.syncthreads()
    return result


@inline
def arrives_last(tickets, index, count, room):
    """Tell all threads of a block whether it is the last of `count` to come here."""
    cuda.threadfence()  # what was written before is seen by whoever comes later
    cuda.syncthreads()
    if cuda.threadIdx.x == 0:
        arrived = cuda.atomic.inc(tickets, index, np.uint32(count - 1))  # wraps to 0
        cuda.threadfence()  # with the barrier: no thread reads a stale copy after it
        room[0, 0] = 1.0 if arrived == count - 1 else 0.0
    cuda.syncthreads()
    last = room[0, 0] == 1.0
    cuda.syncthreads()
    return last


@inline
def packet_squares(x):
    """Return the sum of the squares of a packet."""
    total = 0.0
    for k in range(len(x)):
        value = np.float64(x[k])
        total += value * value
    return total


@inline
def chunk_squares(address, length, like, room):
    """Return a chunk's sum of squares; two packets a turn, to have more loads in flight."""
    total, error = 0.0, 0.0
    packets = whole_packets(address, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        x = load_packet(address + p * WORD, stride, like)
        y = load_packet(address + (p + THREADS) * WORD, stride, like)
        total, rest = two_sum(total, packet_squares(x) + packet_squares(y))
        error += rest
        p += 2 * THREADS
    if p < packets:
        total, rest = two_sum(total, packet_squares(load_packet(address + p * WORD, stride, like)))
        error += rest
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        value = np.float64(load(address + i * size_of(like), like))
        total, rest = two_sum(total, value * value)
        error += rest
        i += THREADS
    return block_sum(total, error, room)


@inline
def careful_squares(address, length, masked, like, room):
    """Return a chunk's sum of squares in bins, and how many elements are not finite.

    Those count as 0 where `masked`.
    """
    small, middle, large, bad = 0.0, 0.0, 0.0, 0.0
    i = np.int64(cuda.threadIdx.x)
    while i < length:
        value = np.float64(load(address + i * size_of(like), like))
        if not math.isfinite(value):
            bad += 1.0
            value = 0.0 if masked else value
        bins = binned_square(value)
        small += bins[0]
        middle += bins[1]
        large += bins[2]
        i += THREADS
    small, middle = block_sum(small, 0.0, room), block_sum(middle, 0.0, room)
    total, exponent = joined_bins(small, middle, block_sum(large, 0.0, room))
    return total, exponent, block_sum(bad, 0.0, room)


@inline
def is_lossless(total, like):
    """Tell whether a plain sum of squares lost nothing; only float64 can."""
    if size_of(like) == 8:
        return is_safe(total)
    return math.isfinite(total)


@kernel
def sum_squares(chunks, tensors, like, out):
    """Write each chunk's sum of squares. Reads every element once, rare chunks twice."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        address, length = chunks[c, SOURCE], chunks[c, LENGTH]
        total, exponent, bad = chunk_squares(address, length, like, room), 0, 0.0
        if not is_lossless(total, like):
            masked = tensors[chunks[c, OWNER], ZEROING] != 0
            total, exponent, bad = careful_squares(address, length, masked, like, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = total
            out[chunks[c, PART], EXPONENT] = exponent
            out[chunks[c, PART], BAD] = bad
        c += cuda.gridDim.x


@inline
def magnitude(address, masked, like):
    """Return an element's magnitude, 0 for one that is masked; and 1 for one not finite."""
    value = abs(np.float64(load(address, like)))
    if math.isfinite(value):
        return value, 0.0
    return (0.0 if masked else value), 1.0


@kernel
def max_magnitude(chunks, tensors, like, out):
    """Write each chunk's largest magnitude. Reads every element once."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        masked = tensors[chunks[c, OWNER], ZEROING] != 0
        largest, bad = 0.0, 0.0
        i = np.int64(cuda.threadIdx.x)
        while i < chunks[c, LENGTH]:
            value, odd = magnitude(chunks[c, SOURCE] + i * size_of(like), masked, like)
            largest = larger(largest, value)
            bad += odd
            i += THREADS
        largest, bad = block_max(largest, room), block_sum(bad, 0.0, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = largest
            out[chunks[c, PART], EXPONENT] = 0.0
            out[chunks[c, PART], BAD] = bad
        c += cuda.gridDim.x


@kernel
def find_peaks(tensors, pools, partial, out):
    """Write the largest magnitude of each pool; a block for each."""
    room = cuda.shared.array((2, THREADS), np.float64)
    p = np.int64(cuda.blockIdx.x)
    while p < pools.shape[0]:
        largest = 0.0
        part = tensors[pools[p, FIRST], FIRST] + cuda.threadIdx.x
        while part < tensors[pools[p, LAST] - 1, LAST]:
            largest = larger(largest, partial[part, TOTAL])
            part += THREADS
        largest = block_max(largest, room)
        if cuda.threadIdx.x == 0:
            out[p, PEAK] = largest
        p += cuda.gridDim.x


@inline
def usable(peak):
    """Return a peak that magnitudes can be divided by."""
    return peak if 0.0 < peak < math.inf else 1.0


@kernel
def sum_powers(chunks, tensors, laws, like, out):
    """Write each chunk's sum of ``(|x| / peak) ** ord``, a finite order."""
    room = cuda.shared.array((2, THREADS), np.float64)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        owner = chunks[c, OWNER]
        masked = tensors[owner, ZEROING] != 0
        peak, ord = usable(laws[tensors[owner, POOL], PEAK]), laws[tensors[owner, POOL], ORD]
        total, error = 0.0, 0.0
        i = np.int64(cuda.threadIdx.x)
        while i < chunks[c, LENGTH]:
            value, _ = magnitude(chunks[c, SOURCE] + i * size_of(like), masked, like)
            total, rest = two_sum(total, power_term(value / peak, ord))
            error += rest
            i += THREADS
        total = block_sum(total, error, room)
        if cuda.threadIdx.x == 0:
            out[chunks[c, PART], TOTAL] = total
        c += cuda.gridDim.x


@inline
def join(sums, first, last, room):
    """Return the sum of some rows of sums, as the rows are; for all threads of the block."""
    small, middle, large = 0.0, 0.0, 0.0
    errors = 0.0, 0.0, 0.0
    bad = 0.0
    k = first + cuda.threadIdx.x
    while k < last:
        total, exponent = sums[k, TOTAL], sums[k, EXPONENT]
        small, low = two_sum(small, total if exponent < 0.0 else 0.0)
        middle, mid = two_sum(middle, total if exponent == 0.0 else 0.0)
        large, high = two_sum(large, total if exponent > 0.0 else 0.0)
        errors = errors[0] + low, errors[1] + mid, errors[2] + high
        bad += sums[k, BAD]
        k += THREADS
    small, middle = block_sum(small, errors[0], room), block_sum(middle, errors[1], room)
    total, exponent = joined_bins(small, middle, block_sum(large, errors[2], room))
    return total, exponent, block_sum(bad, 0.0, room)


@inline
def write_norm(law, total, exponent, bad, out):
    """Write the norm of a pool as ``root * 2**exponent``, from its sum of powers."""
    if law[ORD] == 2.0:
        out[ROOT] = math.sqrt(total)
    elif not 0.0 < law[PEAK] < math.inf:
        out[ROOT] = law[PEAK]
    else:
        fraction, exponent = math.frexp(law[PEAK])
        out[ROOT] = fraction * (1.0 if law[ORD] == math.inf else root(total, law[ORD]))
    out[ROOT] /= law[UNSCALE]
    out[ROOT] /= law[DIVISOR]
    out[ROOT_EXPONENT] = exponent
    given_badly = not law[GIVEN] < 0.0 and not math.isfinite(law[GIVEN])
    out[BROKEN] = bad + 1.0 if given_badly else bad


@inline
def decide(law, policy, digits, bad, out):
    """Write the factor of a pool, what to do with its tensors, and what is told."""
    norm, exponent = out[ROOT], int(out[ROOT_EXPONENT])
    if not law[GIVEN] < 0.0 and (policy != ZERO or math.isfinite(law[GIVEN])):
        norm, exponent = law[GIVEN], 0
    mantissa, power = 1.0, 0
    leaves = bad and (policy in (SKIP, RAISE))
    out[SKIPPED] = 1.0 if leaves else 0.0
    out[NORM] = scale_by_power(norm, exponent)
    if not leaves and not out[NORM] <= law[BOUND]:
        mantissa, power = clip_factor(law[BOUND], norm, exponent, law[ROUNDOFF], digits)
    out[CLIPPED] = scale_by_power(norm * mantissa, exponent + power)
    out[SCALE] = scale_by_power(mantissa, power)
    small = 0.0 < mantissa < 1.0 and (out[SCALE] < law[TINY] or law[BOUND] < law[COARSE])
    if law[UNSCALE] != 1.0 and not leaves:
        mantissa, power = factor_over(mantissa, power, law[UNSCALE], digits)
        small = small or (mantissa > 0.0 and scale_by_power(mantissa, power) < law[TINY])
    out[FACTOR] = scale_by_power(mantissa, power)
    out[MANTISSA], out[POWER] = mantissa, power
    if bad and policy == ZERO:
        out[MODE] = CLEAN
    elif small:
        out[MODE] = TRUNCATE
    else:
        out[MODE] = MULTIPLY if mantissa != 1.0 or power != 0 else LEAVE


@kernel
def judge(tensors, pools, laws, partial, tickets, sums, decisions):
    """Add up each tensor's chunks, each pool's tensors, and decide; a block for each tensor.

    `tickets` counts, for each pool, tensors that are done; after them, for each set, those
    that are not finite, and last the blocks. All are 0 again in the end.
    """
    room = cuda.shared.array((2, THREADS), np.float64)
    t = np.int64(cuda.blockIdx.x)
    count = pools.shape[0]
    while t < tensors.shape[0]:
        p = tensors[t, POOL]
        total, exponent, bad = join(partial, tensors[t, FIRST], tensors[t, LAST], room)
        if cuda.threadIdx.x == 0:
            sums[t, TOTAL], sums[t, EXPONENT], sums[t, BAD] = total, exponent, bad
        if arrives_last(tickets, p, pools[p, LAST] - pools[p, FIRST], room):
            total, exponent, bad = join(sums, pools[p, FIRST], pools[p, LAST], room)
            if cuda.threadIdx.x == 0:
                write_norm(laws[p], total, exponent, bad, decisions[p])
                if decisions[p, BROKEN] != 0.0:
                    cuda.atomic.max(tickets, count + pools[p, SET], np.uint32(1))
        t += cuda.gridDim.x
    if arrives_last(tickets, tickets.shape[0] - 1, cuda.gridDim.x, room):
        decide_all(pools, laws, tickets, decisions, room)


@inline
def decide_all(pools, laws, tickets, decisions, room):
    """Decide for every pool, once all norms are there; tell in the last row if there is work."""
    count = pools.shape[0]
    work, rare = 0.0, 0.0
    p = np.int64(cuda.threadIdx.x)
    while p < count:
        bad = tickets[count + pools[p, SET]] != 0
        decide(laws[p], pools[p, POLICY], int(pools[p, DIGITS]), bad, decisions[p])
        work += 1.0 if decisions[p, MODE] != LEAVE else 0.0
        rare += 1.0 if decisions[p, MODE] > MULTIPLY else 0.0
        p += THREADS
    work, rare = block_sum(work, 0.0, room), block_sum(rare, 0.0, room)
    if cuda.threadIdx.x == 0:  # the sums also waited until every thread had read the tickets
        decisions[count, MODE], decisions[count, RARE] = work, rare
    k = count + cuda.threadIdx.x
    while k < tickets.shape[0]:
        tickets[k] = 0
        k += THREADS


@inline
def product(value, factor):
    """Return an element times a factor."""
    return value * factor


@inline
def multiply(source, target, length, factor, like):
    """Write a chunk times a factor, each product rounded once; two packets a turn."""
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p + THREADS < packets:
        q = p + THREADS
        x = load_packet(source + p * WORD, stride, like)
        y = load_packet(source + q * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(product, (x,), (factor,)), like)
        store_packet(target + q * WORD, stride, each(product, (y,), (factor,)), like)
        p += 2 * THREADS
    if p < packets:
        x = load_packet(source + p * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(product, (x,), (factor,)), like)
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        place = i * size_of(like)
        store(target + place, load(source + place, like) * factor, like)
        i += THREADS


@inline
def multiply_carefully(chunk, decision, digits, lowest, like):
    """Write a chunk times its factor, subnormal results rounded toward zero; slow.

    In the mode CLEAN, what is not finite becomes 0.
    """
    cleans = decision[MODE] == CLEAN
    mantissa, power = decision[MANTISSA], int(decision[POWER])
    i = np.int64(cuda.threadIdx.x)
    while i < chunk[LENGTH]:
        place = i * size_of(like)
        value = np.float64(load(chunk[SOURCE] + place, like))
        if cleans and not math.isfinite(value):
            value = 0.0
        result = truncated_product(value, mantissa, power, int(digits), int(lowest))
        store(chunk[TARGET] + place, result, like)
        i += THREADS


@inline
def copy(source, target, length, like):
    """Copy a chunk bit by bit."""
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        copy_packet(source + p * WORD, target + p * WORD, stride, like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        place = i * size_of(like)
        copy_element(source + place, target + place, like)
        i += THREADS


@kernel
def scale(chunks, tensors, decisions, digits, lowest, like):
    """Multiply each chunk by the factor of its pool. Reads and writes every element once.

    In place it leaves at once where no pool has anything to do, and touches no chunk of a pool
    that has nothing to do; out of place such a chunk is copied.
    """
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        chunk = chunks[c]
        decision = decisions[tensors[chunk[OWNER], POOL]]
        if decision[MODE] == MULTIPLY:
            factor = as_computed(decision[FACTOR], like)
            multiply(chunk[SOURCE], chunk[TARGET], chunk[LENGTH], factor, like)
        elif decision[MODE] != LEAVE:
            multiply_carefully(chunk, decision, digits, lowest, like)
        elif chunk[SOURCE] != chunk[TARGET]:
            copy(chunk[SOURCE], chunk[TARGET], chunk[LENGTH], like)
        elif decisions[decisions.shape[0] - 1, MODE] == 0.0:
            return
        c += cuda.gridDim.x


@kernel
def clamp(chunks, tensors, decisions, low, high, like):
    """Hold each element between two bounds, but what is skipped. Reads and writes it once."""
    low, high = as_computed(low, like), as_computed(high, like)
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        if decisions[tensors[chunks[c, OWNER], POOL], SKIPPED] == 0.0:
            clamp_chunk(chunks[c], low, high, like)
        c += cuda.gridDim.x


@inline
def clamp_chunk(chunk, low, high, like):
    """Hold a chunk between two bounds."""
    source, target, length = chunk[SOURCE], chunk[TARGET], chunk[LENGTH]
    packets = whole_packets(source | target, length)
    stride = packets * WORD
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        x = load_packet(source + p * WORD, stride, like)
        store_packet(target + p * WORD, stride, each(clamped, (x,), (low, high)), like)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        place = i * size_of(like)
        store(target + place, clamped(load(source + place, like), low, high), like)
        i += THREADS


@inline
def added(value, other):
    """Return the sum of two elements."""
    return value + other


@kernel
def add(chunks, like):
    """Add each chunk read to the one that is written to. Two reads, one write."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        source, target, length = chunks[c, SOURCE], chunks[c, TARGET], chunks[c, LENGTH]
        packets = whole_packets(source | target, length)
        stride = packets * WORD
        p = np.int64(cuda.threadIdx.x)
        while p < packets:
            x = load_packet(source + p * WORD, stride, like)
            y = load_packet(target + p * WORD, stride, like)
            store_packet(target + p * WORD, stride, each(added, (x, y), ()), like)
            p += THREADS
        i = packets * PACKET + cuda.threadIdx.x
        while i < length:
            place = i * size_of(like)
            total = added(load(source + place, like), load(target + place, like))
            store(target + place, total, like)
            i += THREADS
        c += cuda.gridDim.x


@kernel
def scale_rare(chunks, tensors, decisions, digits, lowest, like):
    """Multiply, in place, the chunks of pools whose factor is no plain one, as `scale` does."""
    if decisions[decisions.shape[0] - 1, RARE] == 0.0:
        return
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        decision = decisions[tensors[chunks[c, OWNER], POOL]]
        if decision[MODE] > MULTIPLY:
            multiply_carefully(chunks[c], decision, digits, lowest, like)
        c += cuda.gridDim.x

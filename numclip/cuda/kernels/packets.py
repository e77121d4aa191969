"""Loads and stores of elements by address: one at a time, or eight in 16-byte words.

A packet is eight elements: one, two or four words of 16 bytes. The words of a packet are as many
words apart as the chunk has packets, so that consecutive threads read consecutive words. A *spot*
is the index of an element, or a packet as `packet_at` returns it; several are read before anything
is written. `like` is a 0 of the type that elements are stored as: uint16 for float16, int16 for
bfloat16.
"""

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from numclip import tables as col
from numclip.cuda.device import THREADS, cuda, inline
from numclip.halves import double_to_float, float_to_bfloat, float_to_half

PACKET = 8
WORD = 16  # bytes of the widest load and store

_GLOBAL = 1  # the address space of the GPU's memory
_I16, _I32, _I64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
_F32, _F64 = ir.FloatType(), ir.DoubleType()


_ELEMENTS = {types.float32: _F32, types.float64: _F64, types.uint16: _I16, types.int16: _I16}


def _computed(like):
    return types.float64 if like == types.float64 else types.float32


def _int(value):
    return ir.Constant(_I32, value)


def _width(like):
    return WORD * 8 // like.bitwidth


def _word(like):
    """Return the type of a 16-byte word; one of eight 16-bit elements is split in two."""
    if like.bitwidth == 16:
        return ir.VectorType(_I32, 4)
    return ir.VectorType(_ELEMENTS[like], _width(like))


def _elements_of(builder, word, like):
    """Return the elements of a word; two of 16 bits share 32."""
    lanes = range(word.type.count)
    parts = [builder.extract_element(word, _int(lane)) for lane in lanes]
    if like.bitwidth > 16:
        return parts
    halves = [half for part in parts for half in (part, builder.lshr(part, _int(16)))]
    return [builder.trunc(half, _I16) for half in halves]


def _word_of(builder, elements, like):
    """Return the word of some elements."""
    if like.bitwidth == 16:
        wide = [builder.zext(element, _I32) for element in elements]
        pairs = zip(wide[::2], wide[1::2], strict=True)
        elements = [builder.or_(low, builder.shl(high, _int(16))) for low, high in pairs]
    word = ir.Constant(_word(like), ir.Undefined)
    for lane, element in enumerate(elements):
        word = builder.insert_element(word, element, _int(lane))
    return word


def _pointer(builder, address, element):
    return builder.inttoptr(address, ir.PointerType(element, _GLOBAL))


def _widened(builder, element, like):
    if like == types.uint16:
        return builder.fpext(builder.bitcast(element, ir.HalfType()), _F32)
    if like == types.int16:
        wide = builder.shl(builder.zext(element, _I32), _int(16))
        return builder.bitcast(wide, _F32)
    return element


def _narrowed(builder, value, like):
    if like == types.uint16:
        return float_to_half(builder, value, native=True)
    if like == types.int16:
        return float_to_bfloat(builder, value)
    return value


@intrinsic
def size_of(_typing, like):
    """Return the bytes of a stored element."""

    def emit(_context, _builder, _signature, _arguments):
        return ir.Constant(ir.IntType(64), like.bitwidth // 8)

    return types.int64(like), emit


@intrinsic
def load(_typing, address, like):
    """Return the element at an address in the type it is computed in."""

    def emit(_context, builder, _signature, arguments):
        pointer = _pointer(builder, arguments[0], _ELEMENTS[like])
        return _widened(builder, builder.load(pointer, align=like.bitwidth // 8), like)

    return _computed(like)(address, like), emit


@intrinsic
def store(_typing, address, value, like):
    """Write an element to an address, rounded to the type it is stored as."""

    def emit(context, builder, _signature, arguments):
        number = context.cast(builder, arguments[1], value, _computed(like))
        pointer = _pointer(builder, arguments[0], _ELEMENTS[like])
        builder.store(_narrowed(builder, number, like), pointer, align=like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(address, value, like), emit


@intrinsic
def as_computed(_typing, value, like):
    """Return a number in the type that elements are computed in."""

    def emit(context, builder, _signature, arguments):
        return context.cast(builder, arguments[0], value, _computed(like))

    return _computed(like)(value, like), emit


@intrinsic
def rounded(_typing, value, like):
    """Return a number rounded to nearest in the type of `like`, widened to the computed type."""

    def emit(context, builder, _signature, arguments):
        if like in (types.uint16, types.int16):
            number = arguments[0]
            if value == types.float64:
                number = double_to_float(builder, number)
            return _widened(builder, _nearest(builder, number, like), like)
        return context.cast(builder, arguments[0], value, _computed(like))

    return _computed(like)(value, like), emit


def _nearest(builder, value, like):
    """Return a float32 rounded to 16 bits, to nearest and ties to even."""
    if like == types.uint16:
        return float_to_half(builder, value, native=True, nearest=True)
    return float_to_bfloat(builder, value, nearest=True)


@intrinsic
def differ(_typing, value, other, like):
    """Tell whether two float32 numbers round to elements of different bits."""

    def emit(_context, builder, _signature, arguments):
        own, others = (_nearest(builder, number, like) for number in arguments[:2])
        return builder.icmp_unsigned("!=", own, others)

    return types.boolean(value, other, like), emit


@intrinsic
def packet_at(_typing, _number, _packets, like):
    """Return the spot of a packet: (its number, the number of packets), for 16 bits (its number,).

    Words of the latter, and of float32 elements at the same spot, are consecutive.
    """
    spot = types.UniTuple(types.int64, 1 if like.bitwidth == 16 else 2)

    def emit(context, builder, _signature, arguments):
        return context.make_tuple(builder, spot, arguments[: len(spot)])

    return spot(types.int64, types.int64, like), emit


def _addressed(builder, address, spot, kind, like):
    """Return the addresses of the words of a spot's packet, or of its element."""

    def size(number):
        return ir.Constant(_I64, number)

    if isinstance(kind, types.Integer):
        return [builder.add(address, builder.mul(spot, size(like.bitwidth // 8)))]
    number, *packets = _unpacked(builder, spot)
    bytes_on = WORD if packets else PACKET * like.bitwidth // 8
    step = builder.mul(packets[0], size(WORD)) if packets else size(WORD)
    addresses = [builder.add(address, builder.mul(number, size(bytes_on)))]
    for _ in range(PACKET // _width(like) - 1):
        addresses.append(builder.add(addresses[-1], step))
    return addresses


def _pointers(builder, address, spots, kinds, like):
    """Return pointers to the words, or elements, of some spots, and their alignment."""
    single = isinstance(kinds.dtype, types.Integer)
    element, align = (_ELEMENTS[like], like.bitwidth // 8) if single else (_word(like), WORD)
    words = [
        word
        for spot in _unpacked(builder, spots)
        for word in _addressed(builder, address, spot, kinds.dtype, like)
    ]
    return [_pointer(builder, word, element) for word in words], align


def _lanes(spots, like):
    """Return the type of the tuple of the elements at some spots."""
    count = len(spots) * (1 if isinstance(spots.dtype, types.Integer) else PACKET)
    return types.UniTuple(_computed(like), count)


@intrinsic
def load_at(_typing, address, spots, like):
    """Return the elements at some spots."""
    lanes = _lanes(spots, like)

    def emit(context, builder, _signature, arguments):
        pointers, align = _pointers(builder, *arguments[:2], spots, like)
        words = [builder.load(pointer, align=align) for pointer in pointers]
        if align == WORD:
            words = [part for word in words for part in _elements_of(builder, word, like)]
        return context.make_tuple(builder, lanes, [_widened(builder, w, like) for w in words])

    return lanes(address, spots, like), emit


@intrinsic
def store_at(_typing, address, spots, _values, like):
    """Write elements to some spots, rounded to the type they are stored as."""

    def emit(context, builder, _signature, arguments):
        pointers, align = _pointers(builder, *arguments[:2], spots, like)
        words = [_narrowed(builder, lane, like) for lane in _unpacked(builder, arguments[2])]
        if align == WORD:
            firsts = range(0, len(words), _width(like))
            words = [_word_of(builder, words[k : k + _width(like)], like) for k in firsts]
        for word, pointer in zip(words, pointers, strict=True):
            builder.store(word, pointer, align=align)
        return context.get_dummy_value()

    return types.void(address, spots, _lanes(spots, like), like), emit


@intrinsic
def copy_at(_typing, spots, source, target, like):
    """Copy the elements at some spots bit by bit."""

    def emit(context, builder, _signature, arguments):
        sources, align = _pointers(builder, arguments[1], arguments[0], spots, like)
        targets, _ = _pointers(builder, arguments[2], arguments[0], spots, like)
        values = [builder.load(pointer, align=align) for pointer in sources]
        for value, pointer in zip(values, targets, strict=True):
            builder.store(value, pointer, align=align)
        return context.get_dummy_value()

    return types.void(spots, source, target, like), emit


@intrinsic
def each(typing, function, packets, scalars):
    """Return the results of `function` for each lane of some packets, with the same `scalars`."""
    lane = (*(packet.dtype for packet in packets.types), *scalars.types)
    call_signature = function.get_call_type(typing, lane, {})
    result = types.UniTuple(call_signature.return_type, len(packets.types[0]))

    def emit(context, builder, _signature, arguments):
        call = context.get_function(function, call_signature)
        context.add_linking_libs(getattr(call, "libs", ()))
        inputs, fixed = (_unpacked(builder, argument) for argument in arguments[1:])
        lanes = zip(*(_unpacked(builder, packet) for packet in inputs), strict=True)
        made = [call(builder, [*lane, *fixed]) for lane in lanes]
        return context.make_tuple(builder, result, made)

    return result(function, packets, scalars), emit


def _unpacked(builder, aggregate):
    return [builder.extract_value(aggregate, k) for k in range(len(aggregate.type.elements))]


@inline
def whole_packets(addresses, length):
    """Return how many packets can be read in words: none where an address is not aligned."""
    return length // PACKET if addresses % WORD == 0 else np.int64(0)


@inline
def load_apart(address, step, like):
    """Return eight elements that are `step` bytes apart."""
    a, b = load(address, like), load(address + step, like)
    c, d = load(address + 2 * step, like), load(address + 3 * step, like)
    e, f = load(address + 4 * step, like), load(address + 5 * step, like)
    return a, b, c, d, e, f, load(address + 6 * step, like), load(address + 7 * step, like)


@inline
def store_apart(address, step, values, like):
    """Write eight elements `step` bytes apart."""
    for k in range(len(values)):
        store(address + k * step, values[k], like)


@inline
def fold_packets(turn, state, arguments, address, length, lane, lanes, like):
    """Return `state` after `turn` folded in a lane's share of a chunk, two packets at a time."""
    packets = whole_packets(address, length)
    p = lane
    while p + lanes < packets:
        spots = packet_at(p, packets, like), packet_at(p + lanes, packets, like)
        state = turn(state, load_at(address, spots, like), *arguments)
        p += 2 * lanes
    if p < packets:
        state = turn(state, load_at(address, (packet_at(p, packets, like),), like), *arguments)
    i = packets * PACKET + lane
    while i < length:
        state = turn(state, load_at(address, (i,), like), *arguments)
        i += lanes
    return state


@inline
def over_packets(turn, arguments, addresses, length, like):
    """Call `turn` for each packet of a chunk, and for each element that is in no packet."""
    packets = whole_packets(addresses, length)
    p = np.int64(cuda.threadIdx.x)
    while p < packets:
        turn((packet_at(p, packets, like),), *arguments)
        p += THREADS
    i = packets * PACKET + cuda.threadIdx.x
    while i < length:
        turn((i,), *arguments)
        i += THREADS


@inline
def over_chunks(turn, arguments, chunks, like):
    """Call `turn` as `over_packets` does for each chunk; its addresses precede `arguments`."""
    c = np.int64(cuda.blockIdx.x)
    while c < chunks.shape[0]:
        pair = chunks[c, col.SOURCE], chunks[c, col.TARGET]
        addresses, length = pair[0] | pair[1], chunks[c, col.LENGTH]
        over_packets(turn, pair + arguments, addresses, length, like)
        c += cuda.gridDim.x


@inline
def over_more_packets(turn, arguments, addresses, length, lane, lanes, like):
    """Call `turn` for two packets, or four elements, at a time: more loads in flight.

    The lanes that share the chunk are all threads of a block, or some of them.
    """
    packets = whole_packets(addresses, length)
    p = lane
    while p + lanes < packets:
        spots = packet_at(p, packets, like), packet_at(p + lanes, packets, like)
        turn(spots, *arguments)
        p += 2 * lanes
    if p < packets:
        turn((packet_at(p, packets, like),), *arguments)
    i = packets * PACKET + lane
    while i + 3 * lanes < length:
        turn((i, i + lanes, i + 2 * lanes, i + 3 * lanes), *arguments)
        i += 4 * lanes
    while i < length:
        turn((i,), *arguments)
        i += lanes

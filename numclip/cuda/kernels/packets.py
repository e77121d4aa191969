"""Elements in the GPU's memory by their addresses: one at a time, or eight in 16-byte words.

A packet is eight elements as the type they are computed in: one, two or four words of 16 bytes,
`stride` bytes apart. `like` is a 0 of the type that elements are stored as; float16 travels as
uint16 and bfloat16 as int16.
"""

import numpy as np
from llvmlite import ir
from numba.cuda import types
from numba.cuda.extending import intrinsic

from numclip.cuda.device import inline
from numclip.halves import float_to_bfloat, float_to_half

PACKET = 8
WORD = 16  # bytes of the widest load and store

_GLOBAL = 1  # the address space of the GPU's memory
_I16, _I32 = ir.IntType(16), ir.IntType(32)
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
    """Return the nearest element stored like `like` to a number, in the type it is computed in."""

    def emit(context, builder, _signature, arguments):
        number = context.cast(builder, arguments[0], value, _computed(like))
        if like in (types.uint16, types.int16):
            return _widened(builder, _nearest(builder, number, like), like)
        return number

    return _computed(like)(value, like), emit


def _nearest(builder, value, like):
    """Return the nearest element of 16 bits to a float32, of two the even one."""
    if like == types.uint16:
        return float_to_half(builder, value, native=True, nearest=True)
    return float_to_bfloat(builder, value, nearest=True)


@intrinsic
def nearest(_typing, value, like):
    """Return the nearest element to a float32, of two the even one, in float32."""

    def emit(_context, builder, _signature, arguments):
        return _widened(builder, _nearest(builder, arguments[0], like), like)

    return types.float32(value, like), emit


@intrinsic
def differ(_typing, value, other, like):
    """Tell whether the nearest elements to two of float32 have other bits."""

    def emit(_context, builder, _signature, arguments):
        own, others = (_nearest(builder, number, like) for number in arguments[:2])
        return builder.icmp_unsigned("!=", own, others)

    return types.boolean(value, other, like), emit


@intrinsic
def load_packet(_typing, address, stride, like):
    """Return eight elements, of words that are `stride` bytes apart."""
    packet = types.UniTuple(_computed(like), PACKET)
    width = _width(like)

    def emit(context, builder, _signature, arguments):
        place, values = arguments[0], []
        for _ in range(PACKET // width):
            word = builder.load(_pointer(builder, place, _word(like)), align=WORD)
            elements = _elements_of(builder, word, like)
            values += [_widened(builder, element, like) for element in elements]
            place = builder.add(place, arguments[1])
        return context.make_tuple(builder, packet, values)

    return packet(address, stride, like), emit


@intrinsic
def store_packet(_typing, address, stride, values, like):
    """Write eight elements to words that are `stride` bytes apart."""
    width = _width(like)

    def emit(context, builder, _signature, arguments):
        place = arguments[0]
        lanes = _unpacked(builder, arguments[2])
        elements = [_narrowed(builder, lane, like) for lane in lanes]
        for first in range(0, PACKET, width):
            word = _word_of(builder, elements[first : first + width], like)
            builder.store(word, _pointer(builder, place, _word(like)), align=WORD)
            place = builder.add(place, arguments[1])
        return context.get_dummy_value()

    return types.void(address, stride, values, like), emit


def _moved(builder, pairs, element, align):
    """Copy from and to pairs of addresses: all is read before anything is written."""
    sources = [_pointer(builder, source, element) for source, _ in pairs]
    values = [builder.load(source, align=align) for source in sources]
    for value, (_, target) in zip(values, pairs, strict=True):
        builder.store(value, _pointer(builder, target, element), align=align)


def _apart(builder, pair, step, count):
    """Return as many pairs of addresses, each a step on from the one before."""
    pairs = [pair]
    for _ in range(count - 1):
        pairs.append(tuple(builder.add(address, step) for address in pairs[-1]))
    return pairs


@intrinsic
def copy_element(_typing, source, target, like):
    """Copy an element bit by bit."""

    def emit(context, builder, _signature, arguments):
        _moved(builder, [tuple(arguments[:2])], _ELEMENTS[like], like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, target, like), emit


@intrinsic
def copy_elements(_typing, source, target, far, like):
    """Copy four elements bit by bit, which are `far` bytes apart."""

    def emit(context, builder, _signature, arguments):
        pairs = _apart(builder, tuple(arguments[:2]), arguments[2], 4)
        _moved(builder, pairs, _ELEMENTS[like], like.bitwidth // 8)
        return context.get_dummy_value()

    return types.void(source, target, far, like), emit


@intrinsic
def copy_packet(_typing, source, target, stride, like):
    """Copy the words of a packet bit by bit."""

    def emit(context, builder, _signature, arguments):
        words = PACKET // _width(like)
        pairs = _apart(builder, tuple(arguments[:2]), arguments[2], words)
        _moved(builder, pairs, _word(like), WORD)
        return context.get_dummy_value()

    return types.void(source, target, stride, like), emit


@intrinsic
def copy_packets(_typing, source, target, far, stride, like):
    """Copy the words of two packets bit by bit, which are `far` bytes apart."""

    def emit(context, builder, _signature, arguments):
        words = PACKET // _width(like)
        firsts = _apart(builder, tuple(arguments[:2]), arguments[2], 2)
        pairs = [p for first in firsts for p in _apart(builder, first, arguments[3], words)]
        _moved(builder, pairs, _word(like), WORD)
        return context.get_dummy_value()

    return types.void(source, target, far, stride, like), emit


@intrinsic
def each(typing, function, packets, scalars):
    """Return the packet of what a function makes of each lane of some packets."""
    lane = (*(packet.dtype for packet in packets.types), *scalars.types)
    call_signature = function.get_call_type(typing, lane, {})
    result = types.UniTuple(call_signature.return_type, PACKET)

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

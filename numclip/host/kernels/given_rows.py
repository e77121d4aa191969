"""Rows of sparse gradients that a user passes: read in place, or copied to memory that holds rows.

As `given`, but a sparse gradient is two entries of a tuple: the values of its rows, and, after all
gradients, their indices. A row of words for each gradient says where rows are held, see VALUES to
PRESENT in `numclip.tables`.
"""

from numclip.host.kernels.arrays import WORD
from numclip.host.kernels.elements import array_at
from numclip.host.kernels.given import (
    ABSENT,
    ADDRESSES,
    FREE,
    HEAD,
    LOCATIONS,
    NBYTES,
    OWN,
    ROW,
    ROWS,
    STAYS,
    WANTED,
    copy,
    find,
    found,
    found_row,
    length_at,
    locate,
    take_found,
)
from numclip.host.kernels.grouping import are_within
from numclip.host.kernels.tuning import PARALLEL_BYTES
from numclip.host.runtime.jit import inline, kernel_with_gil
from numclip.tables import CAPACITY, FILLED, HEIGHT, HELD_COLUMNS, INDICES, PRESENT, VALUES

# Columns of ROWS: the number of the tensor, the address of the words that say where rows are held,
# the numbers of a row, the exponent of the smallest subnormal; addresses of parameter and states.
TENSOR, HELD, LENGTH, LOWEST, PARAM, FIRST, SECOND, ROW_COLUMNS = range(8)
LOCATION_FIELDS = FILLED + 1  # columns of held rows that say where rows are: up to FILLED


@inline
def held_at(row):
    """Return the words that say where a gradient's rows are held."""
    return array_at(row[HELD], HELD_COLUMNS, row)


@inline
def find_rows(items, s, t, tables, out):
    """Write where the rows of a found gradient are; return whether there are as many indices."""
    wanted = found_row(tables, WANTED, tables)
    addresses = found_row(tables, ADDRESSES, tables)
    other = addresses.size - found(tables, ROWS, tables).shape[0] + s
    out[:] = 0
    if addresses[t] == ABSENT:
        return True
    out[VALUES], out[INDICES] = addresses[t], addresses[other]
    out[FILLED] = length_at(items, t, wanted)
    return length_at(items, other, wanted) == out[FILLED]


@inline
def locate_rows(items, tables, like):
    """Write where the rows of each sparse gradient are; return whether they fit and are small."""
    rows, locations = found(tables, ROWS, tables), found(tables, LOCATIONS, tables)
    nbytes = 0
    for s in range(rows.shape[0]):
        held, own = held_at(rows[s]), locations[s]
        if items == OWN:
            for k in range(LOCATION_FIELDS):
                own[k] = held[k]
        elif not find_rows(items, s, rows[s, TENSOR], tables, own):
            return False
        if not are_within(array_at(own[INDICES], own[FILLED], own), held[HEIGHT]):
            return False
        nbytes += own[FILLED] * rows[s, LENGTH] * like.itemsize
    return nbytes < PARALLEL_BYTES


@inline
def locate_all(items, tables, like):
    """Call `locate` and `locate_rows`; return whether all fit."""
    return locate(items, tables) and locate_rows(items, tables, like)


@inline
def are_apart(items, wanted, addresses, rows, itemsize):
    """Tell whether no found gradient overlaps memory that holds rows."""
    for t in range(addresses.size - rows.shape[0]):
        begin, row = addresses[t], HEAD + t * ROW
        if begin in (ABSENT, STAYS):
            continue
        count = length_at(items, t, wanted) if wanted[row + FREE] else 1
        end = begin + wanted[row + NBYTES] * count
        for s in range(rows.shape[0]):
            held = held_at(rows[s])
            room = held[CAPACITY] * rows[s, LENGTH] * itemsize
            if begin < held[VALUES] + room and held[VALUES] < end:
                return False
    return True


@inline
def have_room(items, wanted, addresses, rows, adds):
    """Tell whether each found row has a valid index, and the memory that holds rows has room."""
    first = addresses.size - rows.shape[0]
    for s in range(rows.shape[0]):
        t, held = rows[s, TENSOR], held_at(rows[s])
        if addresses[t] in (ABSENT, STAYS):
            continue
        count = length_at(items, t, wanted)
        filled = held[FILLED] if adds else 0
        if length_at(items, first + s, wanted) != count or filled + count > held[CAPACITY]:
            return False
        if not are_within(array_at(addresses[first + s], count, held), held[HEIGHT]):
            return False
    return True


@inline
def hold(address, indices, count, held, length, like, wide):
    """Append rows and their indices to those that are held."""
    filled = held[FILLED]
    begin = held[VALUES] + filled * length * wide.itemsize
    copy(array_at(address, count * length, like), array_at(begin, count * length, wide))
    own, given = (
        array_at(held[INDICES] + filled * WORD, count, held),
        array_at(indices, count, held),
    )
    for k in range(count):
        own[k] = given[k]
    held[FILLED], held[PRESENT] = filled + count, 1


@kernel_with_gil
def take(items, wanted, chunks, rows, adds, like, wide, addresses):
    """Do what `given.take` does, and append rows to the held ones if `adds`, else replace them."""
    if not find(items, wanted, addresses):
        return False
    if not have_room(items, wanted, addresses, rows, adds):
        return False
    if not are_apart(items, wanted, addresses, rows, wide.itemsize):
        return False
    take_found(0, chunks.shape[0], chunks, adds, like, wide, addresses)
    first = addresses.size - rows.shape[0]
    for s in range(rows.shape[0]):
        t, held = rows[s, TENSOR], held_at(rows[s])
        if addresses[t] == STAYS:
            continue
        if not adds:
            held[FILLED] = held[PRESENT] = 0
        if addresses[t] != ABSENT:
            count = length_at(items, t, wanted)
            hold(addresses[t], addresses[first + s], count, held, rows[s, LENGTH], like, wide)
    return True

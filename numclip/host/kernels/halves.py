"""Float32 numbers and their 16-bit copies, which are rounded to nearest.

A chunk's source is the address of the copies, its target the address of the numbers.
"""

from numclip.host.kernels.cpu import LENGTH, SOURCE, TARGET
from numclip.host.kernels.elements import array_at, nearest, widen
from numclip.host.runtime.jit import inline, kernel


@kernel
def round_all(begin, end, chunks, like, wide):
    """Write the copies of all numbers."""
    for c in range(begin, end):
        copies = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        numbers = array_at(chunks[c, TARGET], chunks[c, LENGTH], wide)
        for i in range(copies.size):
            copies[i] = nearest(numbers[i], copies[i])


@inline
def are_copies(copies, numbers):
    """Tell whether every copy is its number rounded; a loop that ends early is slower."""
    differ = False
    for i in range(copies.size):
        differ |= nearest(numbers[i], copies[i]) != copies[i]
    return not differ


@kernel
def take_over(begin, end, chunks, like, wide):
    """Set each number that does not round to its copy to the value of the copy."""
    for c in range(begin, end):
        copies = array_at(chunks[c, SOURCE], chunks[c, LENGTH], like)
        numbers = array_at(chunks[c, TARGET], chunks[c, LENGTH], wide)
        if are_copies(copies, numbers):
            continue
        for i in range(copies.size):
            if nearest(numbers[i], copies[i]) != copies[i]:
                numbers[i] = widen(copies[i])

"""Lengths and thresholds of the CPU kernels; ``bench/test_tuning.py`` measures them."""

CHUNK = 16_384
"""Elements a partial sum covers: the unit of work of a thread, the same at any thread count."""

BLOCK = 64
"""Elements summed plainly. In a longer array as many of each quarter are summed together, and
these four sums go into one compensated addition. In eight lanes or more that is at most 8 + 3 + 2
roundings, so that a norm is accurate to 4 ulp at any length."""

NARROW_BLOCK = 256
"""The same for elements under 64 bits, whose results leave more room: at most 32 + 3 + 2."""

WIDE_BLOCK = 32
"""The same for norms of order 1, whose sum is the norm: no root makes its error less. At most
4 + 3 + 2 roundings."""

STRIP = 248
"""Elements of a row summed together: the sums, their errors and the magnitudes stay in the
first-level cache, and no more than `NARROW_BLOCK` squares are added plainly. Not 256 or 512: 4096
bytes apart, the sums took a fifth longer in some runs."""

AHEAD = 4096
"""Bytes of rows scattered in memory that are prefetched before they are summed."""

LINE = 64
"""Bytes of a cache line."""

PARALLEL_BYTES = 4 << 20
"""Bytes under which one thread is faster than two: waking a second costs 20 to 50 us."""

COLUMNS = 1032
"""Columns that a thread sums together: their float64 sums, and the errors of these, stay in the
first-level cache. Not 1024, see `STRIP`; nor less, for layers of 1024."""

COLUMN_ROWS = 1016
"""Rows of columns that a partial sum covers, the same at any thread count. An eighth of it is odd:
eight rows of 64 elements, a power of two apart, would share one set of the caches."""

EXAMPLE_COLUMNS = 8192
"""`COLUMNS` for sums over examples, far apart in memory: longer reads of each are faster than
sums in the first-level cache."""

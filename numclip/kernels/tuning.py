"""Lengths and thresholds of the CPU kernels; ``bench/test_tuning.py`` measures them."""

CHUNK = 16_384
"""Elements a partial sum covers: the unit of work of a thread, the same at any thread count."""

BLOCK = 64
"""Elements summed plainly; four such sums go into one compensated addition. In eight lanes or
more that is at most 8 + 3 + 2 roundings, so that a norm is right to 4 ulp at any length."""

NARROW_BLOCK = 256
"""The same for elements under 64 bits, whose results leave more room: at most 32 + 3 + 2."""

ROWS = 8
"""Rows of a column summed plainly before a compensated addition, for the same precision."""

STRIP = 504
"""Elements of a row summed together: the sums, their errors and the magnitudes stay in the
first-level cache. Not 512: 4096 bytes apart, the three took a fifth longer in some runs."""

AHEAD = 4096
"""Bytes of rows that are asked for before they are summed, where they lie apart in memory."""

LINE = 64
"""Bytes of a line of the caches."""

PARALLEL_BYTES = 4 << 20
"""Bytes under which one thread is faster than two: waking a second costs 20 to 50 us."""

COLUMNS = 1024
"""Columns that a thread sums together: their float64 sums stay in the first-level cache."""

EXAMPLE_COLUMNS = 8192
"""The same for sums over examples, far apart in memory: longer reads of each are faster than
sums in the first-level cache."""

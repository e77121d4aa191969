"""Lengths and thresholds of the CPU kernels; ``bench/test_tuning.py`` measures them."""

CHUNK = 16_384
"""Elements a partial sum covers: the unit of work of a thread, the same at any thread count."""

BLOCK = 256
"""Elements summed plainly before a compensated addition: 16 a lane of 16, so that a sum of
any length is right to a few units of roundoff. 128 costs a quarter of the speed in cache."""

PARALLEL_BYTES = 1 << 20
"""Bytes under which one thread is faster than two."""

COLUMNS = 1024
"""Columns that a thread sums together: their float64 sums stay in the first-level cache."""

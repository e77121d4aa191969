"""The columns of the tables that kernels of the GPU read and write, and their codes."""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks
FIRST, LAST, POOL, ZEROING = range(4)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS = range(2, 5)  # of pools, whose FIRST and LAST are tensors
TOTAL, EXPONENT, BAD = range(3)  # of sums: ``total * 4**exponent``, how many are not finite
# Of the law of each pool.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, ORD, PEAK = range(9)
LAW_COLUMNS = 9
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, SKIPPED, ROOT, ROOT_EXPONENT, BROKEN = range(8)
NORM, CLIPPED, SCALE, RARE, CLAMPED = range(8, 13)
DECISION_COLUMNS = 13
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)

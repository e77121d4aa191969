"""The columns of the tables that kernels of the GPU read and write, and their codes."""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks, and of tiles, see `tiles`
COUNT, BITS, COMPONENTS, NUMBER, NUMBER_STEP = range(5, 10)
STEP, UNIT_STEP, TARGET_STEP, TARGET_UNIT_STEP = range(10, 14)
LOW, HIGH, LOW_STEP, LOW_UNIT_STEP, HIGH_STEP, HIGH_UNIT_STEP = range(14, 20)
TILE_COLUMNS = 20
FIRST, LAST, POOL, ZEROING = range(4)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS = range(2, 5)  # of pools, whose FIRST and LAST are tensors
TOTAL, EXPONENT, BAD = range(3)  # of sums: ``total * 4**exponent``, how many are not finite
# Of the law of each pool.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, PEAK, RATIO, ORD = range(10)
LAW_COLUMNS = 10
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, NORM, CLIPPED, SCALE = range(7)
SKIPPED, ROOT, ROOT_EXPONENT, BROKEN, CLAMPED = range(7, 12)
DECISION_COLUMNS = 12
RARE = POWER  # of the last row
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)

"""The columns of the tables that kernels of the GPU read and write, and their codes."""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks, and of tiles, see `tiles`
COUNT, BITS, COMPONENTS, NUMBER, NUMBER_STEP = range(5, 10)
STEP, UNIT_STEP, TARGET_STEP, TARGET_UNIT_STEP = range(10, 14)
LOW, HIGH, LOW_STEP, LOW_UNIT_STEP, HIGH_STEP, HIGH_UNIT_STEP = range(14, 20)
TILE_COLUMNS = 20
FIRST, LAST, POOL, ZEROING = range(4)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS = range(2, 5)  # of pools, whose FIRST and LAST are tensors
TOTAL, EXPONENT, BAD = range(3)  # of sums: ``total * 4**exponent``, how many are not finite
# Of the law of each pool, and of each family of units.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, PEAK, RATIO, ORD, EPS = range(11)
LAW_COLUMNS = 11
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, NORM, CLIPPED, SCALE = range(7)
SKIPPED, ROOT, ROOT_EXPONENT, BROKEN, CLAMPED = range(7, 12)
DECISION_COLUMNS = 12
RARE = POWER  # of the last row
# Of units: the first columns of decisions, and PEAK, RATIO and ORD as laws have them.
UNIT_COLUMNS = 10
# Of slabs, see `units`; a slab has NUMBER, COUNT and BITS as tiles do.
LAW, UNITS, ROW, PARAM, BASE, PRECISION = 2, 3, 4, 10, 11, 12
SLAB_COLUMNS = 13
AFTER, LEAST, CLIPPED_COUNT = range(3)  # of the summary of each family of units
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)

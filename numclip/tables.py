"""The columns of the tables that kernels of the GPU read and write, and their codes."""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks, and of tiles, see `tiles`
COUNT, BITS, COMPONENTS, NUMBER, NUMBER_STEP = range(5, 10)
STEP, UNIT_STEP, TARGET_STEP, TARGET_UNIT_STEP = range(10, 14)
LOW, HIGH, LOW_STEP, LOW_UNIT_STEP, HIGH_STEP, HIGH_UNIT_STEP = range(14, 20)
TILE_COLUMNS = 20
# Of shares of rows, see `rows`, beside what chunks have and COMPONENTS; and of groups of rows.
BEGIN, END, COLUMN, WIDTH, LANES = 5, 6, 8, 9, 10
SHARE_COLUMNS = 11
START, MEMBERS, PLACE = range(3)
FIRST, LAST, POOL, ZEROING, REPEATS = range(5)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS, REPEATED = range(2, 6)  # of pools, whose FIRST and LAST are tensors
# Of sums: ``total * 4**exponent``, how many are not finite; and of rows that repeat the same for
# the magnitudes of what is added. ERROR is what rounding has taken from the total, where that is
# known.
TOTAL, EXPONENT, BAD, TERMS, TERMS_EXPONENT, ERROR = range(6)
SUM_COLUMNS = 6
# Of the law of each pool, and of each family of units. AIM is the bound less what subnormal terms
# of repeated rows can add; the peak and the ratio of terms follow those of sums by as many columns.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, PEAK, RATIO, ORD = range(10)
TERMS_PEAK, TERMS_RATIO, AIM, EPS = range(10, 14)
LAW_COLUMNS = 14
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, NORM, CLIPPED, SCALE = range(7)
SKIPPED, ROOT, ROOT_EXPONENT, BROKEN, CLAMPED, SPREAD = range(7, 13)
FINE = 13  # the factor for those tensors of a pool that have 53 digits
DECISION_COLUMNS = 14
RARE = POWER  # of the last row
# Of units: the first columns of decisions, and PEAK, RATIO and ORD as laws have them.
UNIT_COLUMNS = 10
# Of slabs, see `units`; a slab has NUMBER, COUNT and BITS as tiles do.
LAW, UNITS, ROW, PARAM, BASE, PRECISION = 2, 3, 4, 10, 11, 12
SLAB_COLUMNS = 13
AFTER, LEAST, CLIPPED_COUNT = range(3)  # of the summary of each family of units
SUMMARY_COLUMNS = 3
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)
# Of the rows that are held for a sparse gradient: where values and indices are, how many there are
# and may be, how many the parameter has, and whether a gradient is PRESENT, be it of no rows.
VALUES, INDICES, FILLED, CAPACITY, HEIGHT, PRESENT = range(6)
HELD_COLUMNS = 6

"""The columns of the tables that kernels of the GPU read and write, and their codes."""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks
# Of shares of rows, after SOURCE, TARGET, the LENGTH of a row, OWNER and PART: the groups of
# rows, the first column, the powers of two of columns and lanes, and of a number's parts.
BEGIN, END, COLUMN, WIDTH, LANES, COMPONENTS = range(5, 11)
SHARE_COLUMNS = 11
START, COUNT, PLACE = range(3)  # of groups of rows: their places in the order, and their sum's
FIRST, LAST, POOL, ZEROING, REPEATS = range(5)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS, REPEATED = range(2, 6)  # of pools, whose FIRST and LAST are tensors
# Of sums: ``total * 4**exponent``, how many are not finite; and for the magnitudes of rows that
# repeat, before they are added, as for the sums.
TOTAL, EXPONENT, BAD, TERMS, TERMS_EXPONENT = range(5)
SUM_COLUMNS = 5
# Of the law of each pool; AIM is the bound less what subnormal terms of repeated rows can add.
BOUND, DIVISOR, GIVEN, ROUNDOFF, COARSE, TINY, UNSCALE, ORD, AIM = range(9)
PEAK, TERMS_PEAK = range(9, 11)  # of the sums, and of the magnitudes of rows that repeat
LAW_COLUMNS = 11
# Of the decision for each pool: the factor, what to do, and what is told. A last row counts.
FACTOR, MANTISSA, POWER, MODE, SKIPPED, ROOT, ROOT_EXPONENT, BROKEN = range(8)
NORM, CLIPPED, SCALE, RARE, CLAMPED, SPREAD = range(8, 14)
DECISION_COLUMNS = 14
LEAVE, MULTIPLY, TRUNCATE, CLEAN = range(4)
PROPAGATE, RAISE, SKIP, ZERO = range(4)

"""The columns and codes of both engines' tables, and the words for what stands in them.

tensor
    One gradient: of a parameter, or an entry of a list.
span
    Where a tensor is read and where it is written.
chunk
    Consecutive elements of a tensor that a thread (host) or a block (CUDA) works on at a time.
pool
    The tensors of one norm. Pools of one *set* are skipped together.
law
    How a pool is clipped: bound, divisor, loss scale, given norm, limits of rounding.
decision
    The factor of a pool, its mode (one of LEAVE to CLEAN), and values for reports.
unit
    Elements that have a norm of their own: a row of a tensor, or an example's part of every tensor.
family
    The units of one tensor, or of tensors that each have a part of every unit. It has a law, each
    unit a decision. A CUDA block decides for a *slab* of units.
tile
    Equally long lines of a strided tensor, side by side, that a CUDA block works on.
share
    Rows in groups of equal index, in a *strip* of columns, that a CUDA block sums. Its threads are
    *teams*, one for each group at a time, of *lanes*, which add to the same sum.
slot
    Of a step: its number in a block of steps, and so of its rows of sums and decisions.
like
    As in NumPy, what tells a kernel how numbers are stored: on the host an array, mostly empty, by
    its dtype; on CUDA a 0 of the storage type.
"""

SOURCE, TARGET, LENGTH, OWNER, PART = range(5)  # of chunks, and of tiles, see `tiles`
COUNT, BITS, COMPONENTS, NUMBER, NUMBER_STEP = range(5, 10)
STEP, UNIT_STEP, TARGET_STEP, TARGET_UNIT_STEP = range(10, 14)
LOW, HIGH, LOW_STEP, LOW_UNIT_STEP, HIGH_STEP, HIGH_UNIT_STEP = range(14, 20)
TILE_COLUMNS = 20
# Of shares of rows, see `rows`, beside the columns of chunks and COMPONENTS.
BEGIN, END, COLUMN, WIDTH, LANES = 5, 6, 8, 9, 10
SHARE_COLUMNS = 11
START, MEMBERS, TARGET_ROW = range(3)  # of groups of rows
FIRST, LAST, POOL, ZEROING, REPEATS = range(5)  # of tensors: their partial sums, their pool
SET, POLICY, DIGITS, REPEATED = range(2, 6)  # of pools, whose FIRST and LAST are tensors
# Of sums: ``total * 4**exponent``, and how many are not finite. For repeated rows, TERMS are the
# same for the magnitudes of the terms. ERROR is what rounding took from the total, where known.
TOTAL, EXPONENT, BAD, TERMS, TERMS_EXPONENT, ERROR = range(6)
SUM_COLUMNS = 6
# Of the law of each pool, and of each family of units. AIM is the bound less what subnormal terms
# of repeated rows can add. TERMS_PEAK is as far from PEAK as TERMS from TOTAL; so is TERMS_RATIO
# from RATIO.
BOUND, DIVISOR, GIVEN, ROUNDOFF, TRUNCATE_BELOW, TINY, UNSCALE, PEAK, RATIO, ORD = range(10)
TERMS_PEAK, TERMS_RATIO, AIM, EPS = range(10, 14)
LAW_COLUMNS = 14
# Of the decision for each pool: the factor, the mode, and values for reports. The last row counts
# pools with work, in MODE, and with modes above MULTIPLY, in RARE.
FACTOR, MANTISSA, POWER, MODE, NORM, CLIPPED, SCALE = range(7)
SKIPPED, ROOT, ROOT_EXPONENT, BROKEN, CLAMPED, CANCELLATION = range(7, 13)
FINE = 13  # the factor for those tensors of a pool whose factors have 53 digits
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
# Of the stored rows of a sparse gradient: the addresses of values and indices, the rows filled and
# the capacity, the rows of the parameter, and whether a gradient is PRESENT, even one of no rows.
VALUES, INDICES, FILLED, CAPACITY, HEIGHT, PRESENT = range(6)
HELD_COLUMNS = 6

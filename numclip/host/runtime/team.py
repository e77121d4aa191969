"""A team of threads that compute shares of jobs, in native code throughout.

Python only starts the threads and calls `perform`: between the first and the last write of a
call no exception can come, as Python runs signal handlers between its own instructions. A
thread takes part from the moment it is awake: whoever is free takes the next share, the caller
too, and the caller waits for shares that were taken and for nothing else. A thread that does
not exist (in a forked child, at the end of the interpreter) is therefore never waited for.

The team is a block of 64-bit words that is never freed, with the addresses of CPython's locks,
which need no GIL. Words are read and written in one order that all threads see, so that of two
threads which each write one word and then read the other's, one sees what the other wrote.
"""

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from numclip.host.runtime.entries import COUNT, FAILED, NEXT, SIZE
from numclip.host.runtime.jit import inline, kernel
from numclip.host.runtime.registers import REGISTER

# Words of a team: whether a caller uses it, its current job, threads inside that job, whether
# the caller sleeps, the lock that wakes it, the generation of its threads. Each that is often
# written has a cache line of its own.
BUSY, JOB, INSIDE, ASLEEP, WAKE, GENERATION, HEAD = 0, 8, 16, 24, 32, 40, 48
# Words of each thread's slot: whether a thread serves it, the lock it sleeps on (0: none yet),
# whether it was woken since.
SERVED, LOCK, WOKEN, SLOT = 0, 1, 2, 8
WORD = 8
SPINS = 1000
"""How often a thread looks for what it waits for before it sleeps: 10 to 50 us."""

_I64 = ir.IntType(64)
_allocate_lock = types.ExternalFunction("PyThread_allocate_lock", types.intp())
_acquire_lock = types.ExternalFunction("PyThread_acquire_lock", types.intc(types.intp, types.intc))
_release_lock = types.ExternalFunction("PyThread_release_lock", types.void(types.intp))


def _at(builder, address):
    return builder.inttoptr(address, _I64.as_pointer())


@intrinsic
def load(_typing, _address):
    """Return the word at an address."""

    def emit(_context, builder, _signature, arguments):
        return builder.load_atomic(_at(builder, arguments[0]), "seq_cst", WORD)

    return types.int64(types.int64), emit


@intrinsic
def store(_typing, _address, _value):
    """Write the word at an address."""

    def emit(context, builder, _signature, arguments):
        builder.store_atomic(arguments[1], _at(builder, arguments[0]), "seq_cst", WORD)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), emit


@intrinsic
def swap(_typing, _address, _value):
    """Write the word at an address and return its old value."""

    def emit(_context, builder, _signature, arguments):
        return builder.atomic_rmw("xchg", _at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def add(_typing, _address, _value):
    """Add to the word at an address and return its old value."""

    def emit(_context, builder, _signature, arguments):
        return builder.atomic_rmw("add", _at(builder, arguments[0]), arguments[1], "seq_cst")

    return types.int64(types.int64, types.int64), emit


@intrinsic
def call_share(_typing, _job, _begin, _end):
    """Compute items ``[begin, end)`` of a job; return another number than 0 if it failed."""

    def emit(_context, builder, _signature, arguments):
        share = ir.FunctionType(_I64, [_I64, _I64, _I64]).as_pointer()
        address = builder.load(_at(builder, arguments[0]))
        return builder.call(builder.inttoptr(address, share), arguments)

    return types.int64(types.int64, types.int64, types.int64), emit


@intrinsic
def pause(_typing):
    """Hint to the processor that this loop waits."""

    def emit(context, builder, _signature, _arguments):
        if REGISTER is not None:
            REGISTER.pause(builder)
        return context.get_dummy_value()

    return types.void(), emit


@inline
def word(block, index):
    """Return the address of a word of a block."""
    return block + index * WORD


@inline
def take_shares(job):
    """Compute shares of a job until all are taken."""
    count = load(word(job, COUNT))
    size = load(word(job, SIZE))
    begin = add(word(job, NEXT), size)
    while begin < count:
        if call_share(job, begin, min(begin + size, count)) != 0:
            store(word(job, FAILED), 1)
        begin = add(word(job, NEXT), size)


@inline
def take_part(team):
    """Compute shares of the team's job, if it has one."""
    add(word(team, INSIDE), 1)
    job = load(word(team, JOB))
    if job != 0:
        take_shares(job)
    if add(word(team, INSIDE), -1) == 1 and swap(word(team, ASLEEP), 0) != 0:
        _release_lock(load(word(team, WAKE)))


@inline
def lock_of(slot):
    """Return the lock of a slot, made when a thread first serves it."""
    lock = load(word(slot, LOCK))
    if lock == 0:
        lock = _allocate_lock()
        if lock != 0:
            _acquire_lock(lock, 0)
            store(word(slot, LOCK), lock)
    return lock


@kernel
def serve(team, number, generation):
    """Take part in the team's jobs until `generation` ends: the function of a thread."""
    slot = word(team, HEAD + number * SLOT)
    if swap(word(slot, SERVED), 1) != 0:
        return
    lock = lock_of(slot)
    while lock != 0 and load(word(team, GENERATION)) == generation:
        take_part(team)
        spins = 0
        while spins < SPINS and load(word(slot, WOKEN)) == 0:
            pause()
            spins += 1
        _acquire_lock(lock, 1)
        store(word(slot, WOKEN), 0)
    store(word(slot, SERVED), 0)


@inline
def wake(team, threads):
    """Wake `threads` threads, except those that have not arrived yet or are awake."""
    for number in range(threads):
        slot = word(team, HEAD + number * SLOT)
        lock = load(word(slot, LOCK))
        if lock != 0 and swap(word(slot, WOKEN), 1) == 0:
            _release_lock(lock)


@inline
def wait(team):
    """Wait until no thread is inside the job that was current."""
    spins = 0
    while load(word(team, INSIDE)) != 0:
        if spins < SPINS:
            pause()
            spins += 1
            continue
        store(word(team, ASLEEP), 1)
        # The last thread inside releases WAKE if it finds ASLEEP set, even just before this.
        if load(word(team, INSIDE)) != 0 or swap(word(team, ASLEEP), 0) == 0:
            _acquire_lock(load(word(team, WAKE)), 1)


@kernel
def perform(team, jobs, threads):
    """Compute jobs, rows of `jobs`, one after another; tell whether one failed.

    Each is computed by `threads` of its number. If there is no team (0), or if another caller uses
    it, the caller works alone.
    """
    alone = team == 0 or swap(word(team, BUSY), 1) != 0
    failed = False
    for k in range(jobs.shape[0]):
        job = jobs.ctypes.data + k * jobs.shape[1] * WORD
        if not alone and threads[k] > 1:
            store(word(team, JOB), job)
            wake(team, threads[k] - 1)
            take_shares(job)
            store(word(team, JOB), 0)
            wait(team)
        else:
            take_shares(job)
        failed |= load(word(job, FAILED)) != 0
    if not alone:
        store(word(team, BUSY), 0)
    return failed


@kernel
def dismiss(team, threads):
    """End the current generation, and wake its `threads` threads so that they return."""
    add(word(team, GENERATION), 1)
    wake(team, threads)

/* Blocks of a kernel on the processor: each thread of a block is a fiber.

   A fiber runs until its next barrier, and then the next fiber does. All of a block arrive at a
   barrier before one goes on. Blocks run one after another; the order of blocks, and of threads
   between two barriers, is as numbered or random. */

#include <setjmp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <ucontext.h>

#include "standin.h"

enum { MOST_THREADS = 1024, STACK_BYTES = 256 * 1024, WARP = 32 };
enum wait { RUNNING, AT_BARRIER, AT_VOTE, AT_SHUFFLE, DONE };

struct fiber {
    jmp_buf place;
    ucontext_t start;
    int made;
    enum wait wait;
    int vote;
    uint64_t word;
};

static struct fiber fibers[MOST_THREADS];
static jmp_buf scheduler;
static ucontext_t scheduler_start;
static int current, threads, said, random_order;
static unsigned block, blocks;
static const unsigned *sides;
static uint64_t state = 88172645463325252u;
static void (*entry)(void **);
static void **arguments;
static long divergences;

static unsigned below(unsigned limit) {
    state ^= state << 13;
    state ^= state >> 7;
    state ^= state << 17;
    return (unsigned)(state % limit);
}

static void order_of(unsigned *order, unsigned count) {
    for (unsigned k = 0; k < count; k++)
        order[k] = k;
    for (unsigned k = count; random_order && k > 1; k--) {
        unsigned other = below(k), kept = order[k - 1];
        order[k - 1] = order[other];
        order[other] = kept;
    }
}

static void pause_as(enum wait wait) {
    fibers[current].wait = wait;
    if (_setjmp(fibers[current].place) == 0)
        _longjmp(scheduler, 1);
}

/* A fiber lives as long as the process: after each block it waits for the next one. */
static void live(void) {
    for (;;) {
        entry(arguments);
        pause_as(DONE);
    }
}

static void resume(int thread) {
    struct fiber *own = &fibers[thread];
    current = thread;
    own->wait = RUNNING;
    if (_setjmp(scheduler) != 0)
        return;
    if (own->made)
        _longjmp(own->place, 1);
    own->made = 1;
    getcontext(&own->start);
    own->start.uc_stack.ss_sp = mmap(NULL, STACK_BYTES, PROT_READ | PROT_WRITE,
                                     MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    own->start.uc_stack.ss_size = STACK_BYTES;
    own->start.uc_link = &scheduler_start;
    makecontext(&own->start, live, 0);
    setcontext(&own->start);
}

/* Let every thread of a warp read another's word: all of the warp have to be there. */
static int shuffle_is_whole(int first) {
    int last = first + WARP < threads ? first + WARP : threads;
    for (int t = first; t < last; t++)
        if (fibers[t].wait != AT_SHUFFLE)
            return 0;
    return 1;
}

static void complain(const char *what) {
    divergences++;
    fprintf(stderr, "stand-in: block %u: %s\n", block, what);
}

static void run_block(void) {
    unsigned order[MOST_THREADS];
    for (int t = 0; t < threads; t++)
        fibers[t].wait = RUNNING;
    for (;;) {
        int counts[DONE + 1] = {0};
        order_of(order, (unsigned)threads);
        for (int k = 0; k < threads; k++)
            if (fibers[order[k]].wait == RUNNING)
                resume((int)order[k]);
        for (int t = 0; t < threads; t++)
            counts[fibers[t].wait]++;
        if (counts[AT_SHUFFLE]) {
            int woken = 0;
            for (int first = 0; first < threads; first += WARP)
                if (shuffle_is_whole(first))
                    for (int t = first; t < first + WARP && t < threads; t++, woken++)
                        fibers[t].wait = RUNNING;
            if (!woken) {
                complain("threads of a warp do not all shuffle");
                abort();
            }
            continue;
        }
        if (counts[DONE] == threads)
            return;
        if (counts[DONE] || (counts[AT_BARRIER] && counts[AT_VOTE]))
            complain("threads do not all come to the same barrier");
        said = 0;
        for (int t = 0; t < threads; t++)
            if (fibers[t].wait == AT_VOTE)
                said |= fibers[t].vote != 0;
        for (int t = 0; t < threads; t++)
            if (fibers[t].wait != DONE)
                fibers[t].wait = RUNNING;
    }
}

void standin_run_kernel(void (*function)(void **), unsigned grid, const unsigned *size,
                        void **given) {
    unsigned *order = malloc(grid * sizeof *order);
    entry = function, arguments = given, blocks = grid, sides = size;
    threads = (int)(size[0] * size[1] * size[2]);
    order_of(order, grid);
    for (unsigned k = 0; k < grid; k++) {
        block = order[k];
        run_block();
    }
    free(order);
}

long standin_divergences(void) { return divergences; }

void standin_random_order(int on, uint64_t seed) {
    random_order = on;
    if (seed)
        state = seed;
}

/* What kernels call. */

int32_t standin_thread(void) { return current % (int)sides[0]; }
int32_t standin_thread_y(void) { return current / (int)sides[0] % (int)sides[1]; }
int32_t standin_thread_z(void) { return current / (int)(sides[0] * sides[1]); }
int32_t standin_threads(void) { return (int32_t)sides[0]; }
int32_t standin_threads_y(void) { return (int32_t)sides[1]; }
int32_t standin_threads_z(void) { return (int32_t)sides[2]; }
int32_t standin_block(void) { return (int32_t)block; }
int32_t standin_blocks(void) { return (int32_t)blocks; }
void standin_barrier(void) { pause_as(AT_BARRIER); }

int32_t standin_barrier_or(int32_t vote) {
    fibers[current].vote = vote;
    pause_as(AT_VOTE);
    return said;
}

/* The word of the lane `apart` lanes further on in the warp; the own one beyond its end. */
int32_t standin_shuffle_down(int32_t word, int32_t apart) {
    int thread = current, other = thread + apart;
    fibers[thread].word = (uint32_t)word;
    pause_as(AT_SHUFFLE);
    int32_t found = word;
    if (thread % WARP + apart < WARP && other < threads)
        found = (int32_t)fibers[other].word;
    pause_as(AT_SHUFFLE); /* nobody writes its next word before all have read this one */
    return found;
}

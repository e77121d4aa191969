/* A CUDA driver over the memory of the host: what libcuda.so.1 offers, as far as it is used here.

   A stream is a queue. Eager, what is queued is run at once. Lazy, nothing is run before someone
   waits for it, and then no more than that needs: what was not ordered is seen out of order.
   Memory that is new, or was freed, is filled with bytes that are NaN as floats. Copies from
   pinned memory read it when they are run, as a GPU does; copies from other memory when called.
   While a stream is captured, what it is given is kept for replays, pointers and all. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "standin.h"

typedef int result;
typedef uint64_t address;
enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, NOT_FOUND = 500,
    NOT_READY = 600, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901
};
enum { DEVICES = 2, MOST_STREAMS = 4096, MOST_KERNELS = 4096, MOST_ARGUMENTS = 96, POISON = 0xFF };

/* Counting: by the names of the driver's functions, and how often the host would have waited. */

enum { MOST_COUNTERS = 256 };
static struct { const char *name; long count; } counters[MOST_COUNTERS];
static long waits;

static void count_call(const char *name) {
    for (int k = 0; k < MOST_COUNTERS; k++) {
        if (!counters[k].name)
            counters[k].name = name;
        if (counters[k].name == name || !strcmp(counters[k].name, name)) {
            counters[k].count++;
            return;
        }
    }
}
#define CALLED() count_call(__func__)

static pthread_mutex_t lock = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static int lazy, devices = 1;

/* Kernels: text that is compiled by the host's side when it is first asked for. */

struct kernel {
    char *name;
    const char *code;
    void (*function)(void **);
    const int *sizes;
    int count;
};
static struct kernel *kernels[MOST_KERNELS];
static int kernel_count;
static int (*compile)(const char *code, const char *name, char *path, int room);

/* Streams and events. */

enum kind { COPY, FILL, LAUNCH, RECORD, WAIT, FREE };
/* The last place that was recorded: what a stream was given up to a number. */
struct event { struct stream *on; long number; };
struct operation {
    enum kind kind;
    void *target;
    void *source;  /* owned where `staged` */
    size_t size;
    int staged;
    uint32_t value;
    int width;
    struct kernel *kernel;
    unsigned grid, block[3];
    void **arguments;  /* one block of memory with what they point to */
    int device;
    struct event event;  /* to be waited for */
    long number;
    struct operation *next;
};
struct stream {
    struct operation *first, *last;
    int blocking, alive, device;
    struct graph *captured;
};
struct graph { struct operation *first, *last; };

static struct stream legacy = {.blocking = 1, .alive = 1};
static struct stream *streams[MOST_STREAMS];
static int stream_count, capturing;
static __thread int relaxed;  /* whether this thread may do what a capture has no part in */
static long next_number;

static struct stream *stream_at(void *handle) {
    return (uintptr_t)handle <= 2 ? &legacy : (struct stream *)handle;
}

/* Contexts: one for each device, current for each thread. */

static char contexts[DEVICES];
static __thread int stack[64];  /* devices plus 1; 0 is no context */
static __thread int depth;
static int retained[DEVICES];
static int current_device(void) { return depth ? stack[depth - 1] - 1 : -1; }
static int device_of(const void *context) { return (int)((const char *)context - contexts); }

/* Memory, by where it begins. */

enum { MOST_BLOCKS = 1 << 16 };
struct memory { address begin; size_t size; int device, pinned, freed; };
static struct memory blocks[MOST_BLOCKS];
static int block_count;
static size_t most = SIZE_MAX; /* bytes that are not of the host */

static size_t taken(void) {
    size_t found = 0;
    for (int k = 0; k < block_count; k++)
        found += blocks[k].pinned ? 0 : blocks[k].size;
    return found;
}

void standin_room(size_t more) {
    pthread_mutex_lock(&lock);
    most = more == SIZE_MAX ? more : taken() + more;
    pthread_mutex_unlock(&lock);
}

static struct memory *memory_at(address place) {
    for (int k = block_count - 1; k >= 0; k--)
        if (place >= blocks[k].begin && place < blocks[k].begin + blocks[k].size)
            return &blocks[k];
    return NULL;
}

static result take(void **place, size_t size, int pinned) {
    pthread_mutex_lock(&lock);
    size_t room = size ? size : 1;
    int k = 0;
    while (k < block_count && blocks[k].size)
        k++;
    int full = !pinned && most != SIZE_MAX && taken() + room > most;
    if (full || k == MOST_BLOCKS || posix_memalign(place, 256, room)) {
        pthread_mutex_unlock(&lock);
        return OUT_OF_MEMORY;
    }
    memset(*place, POISON, room);
    blocks[k] = (struct memory){(address)*place, room, current_device(), pinned, 0};
    block_count = k == block_count ? k + 1 : block_count;
    pthread_mutex_unlock(&lock);
    return OK;
}

static result give_back(address place) {
    if (!place)
        return OK;
    struct memory *own = memory_at(place);
    if (!own || own->begin != place)
        return INVALID_VALUE;
    memset((void *)own->begin, POISON, own->size);
    free((void *)own->begin);
    own->size = 0, own->begin = 0;
    return OK;
}

/* Running what is queued. */

static void run(struct operation *own);

static void run_first(struct stream *stream) {
    struct operation *own = stream->first;
    stream->first = own->next;
    if (!stream->first)
        stream->last = NULL;
    run(own);
}

/* The default stream and the blocking ones run what either was given before the other's. */
static void run_before(struct stream *stream, long number) {
    if (stream == &legacy) {
        for (int k = 0; k < stream_count; k++)
            if (streams[k]->blocking)
                while (streams[k]->first && streams[k]->first->number < number)
                    run_first(streams[k]);
    } else if (stream->blocking) {
        while (legacy.first && legacy.first->number < number) {
            run_before(&legacy, legacy.first->number);
            run_first(&legacy);
        }
    }
}

static void run_all(struct stream *stream) {
    while (stream->first) {
        struct operation *own = stream->first;
        run_before(stream, own->number);
        if (stream->first == own)
            run_first(stream);
    }
}

static void run_everything(void) {
    run_all(&legacy);
    for (int k = 0; k < stream_count; k++)
        run_all(streams[k]);
}

static int is_reached(struct event event) {
    return !event.on || !event.on->first || event.on->first->number > event.number;
}

static void reach(struct event event) {
    while (!is_reached(event)) {
        struct operation *own = event.on->first;
        run_before(event.on, own->number);
        if (event.on->first == own)
            run_first(event.on);
    }
}

static void fill(struct operation *own) {
    for (size_t k = 0; k < own->size; k++)
        memcpy((char *)own->target + k * own->width, &own->value, own->width);
}

static void drop(struct operation *own) {
    if (own->staged)
        free(own->source);
    free(own->arguments);
    free(own);
}

static void carry_out(struct operation *own) {
    switch (own->kind) {
    case COPY:
        memmove(own->target, own->source, own->size);
        break;
    case FILL:
        fill(own);
        break;
    case LAUNCH:
        if (own->kernel->function)
            standin_run_kernel(own->kernel->function, own->grid, own->block, own->arguments);
        break;
    case RECORD:
        break;
    case WAIT:
        reach(own->event);
        break;
    case FREE:
        give_back((address)own->target);
        break;
    }
}

static void run(struct operation *own) {
    carry_out(own);
    drop(own);
}

static void append(struct operation **first, struct operation **last, struct operation *own) {
    own->next = NULL;
    if (*last)
        (*last)->next = own;
    else
        *first = own;
    *last = own;
}

static result queue(struct stream *stream, struct operation *own) {
    pthread_mutex_lock(&lock);
    result found = OK;
    if (stream->captured) {
        append(&stream->captured->first, &stream->captured->last, own);
    } else if (capturing && stream == &legacy) {
        drop(own);
        found = CAPTURE_UNSUPPORTED;
    } else {
        own->number = ++next_number;
        append(&stream->first, &stream->last, own);
        if (!lazy)
            run_all(stream);
    }
    pthread_mutex_unlock(&lock);
    return found;
}

static struct operation *operation(enum kind kind) {
    struct operation *made = calloc(1, sizeof *made);
    made->kind = kind;
    return made;
}

/* Wait for one stream, or for all; refused while a stream is captured. */
static result wait_for(struct stream *stream) {
    if (capturing && (!stream || stream == &legacy || stream->captured))
        return CAPTURE_UNSUPPORTED;
    pthread_mutex_lock(&lock);
    waits++;
    if (stream)
        run_all(stream);
    else
        run_everything();
    pthread_mutex_unlock(&lock);
    return OK;
}

/* For tests. */

int standin_lazy(int on) {
    pthread_mutex_lock(&lock);
    run_everything();
    int before = lazy;
    lazy = on;
    pthread_mutex_unlock(&lock);
    return before;
}
void standin_devices(int count) { devices = count; }
void standin_compiler(int (*own)(const char *, const char *, char *, int)) { compile = own; }
long standin_waits(void) { return waits; }
int standin_device(void) { return current_device(); }
void standin_reset_counts(void) {
    waits = 0;
    for (int k = 0; k < MOST_COUNTERS; k++)
        counters[k].count = 0;
}
const char *standin_counter(int k, long *count) {
    if (k >= MOST_COUNTERS)
        return NULL;
    *count = counters[k].count;
    return counters[k].name;
}
long standin_pending(void) {
    long found = 0;
    pthread_mutex_lock(&lock);
    for (struct operation *o = legacy.first; o; o = o->next)
        found++;
    for (int k = 0; k < stream_count; k++)
        for (struct operation *o = streams[k]->first; o; o = o->next)
            found++;
    pthread_mutex_unlock(&lock);
    return found;
}

/* The driver's own functions: devices and contexts. */

result cuInit(unsigned flags) { return CALLED(), (void)flags, OK; }
result cuDriverGetVersion(int *version) { return CALLED(), *version = 13000, OK; }
result cuDeviceGetCount(int *count) { return CALLED(), *count = devices, OK; }
result cuDeviceGet(int *device, int number) { return CALLED(), *device = number, OK; }
result cuDeviceGetName(char *name, int room, int device) {
    CALLED();
    snprintf(name, (size_t)room, "stand-in %d", device);
    return OK;
}
result cuDeviceGetUuid(void *uuid, int device) { return CALLED(), memset(uuid, device + 1, 16), OK; }
result cuDeviceTotalMem(size_t *bytes, int device) {
    return CALLED(), (void)device, *bytes = (size_t)140 << 30, OK;
}
result cuDeviceGetAttribute(int *value, int attribute, int device) {
    CALLED();
    (void)device;
    switch (attribute) {
    case 1: *value = 1024; break;     /* threads of a block */
    case 10: *value = 32; break;      /* threads of a warp */
    case 16: *value = 4; break;       /* multiprocessors */
    case 39: *value = 2048; break;    /* threads of a multiprocessor */
    case 41: *value = 1; break;       /* one address space with the host */
    case 75: *value = 9; break;       /* compute capability */
    default: *value = 0;
    }
    return OK;
}
result cuDevicePrimaryCtxRetain(void **context, int device) {
    CALLED();
    retained[device]++;
    *context = &contexts[device];
    return OK;
}
result cuDevicePrimaryCtxRelease(int device) { return CALLED(), (void)device, OK; }
result cuDevicePrimaryCtxReset(int device) { return CALLED(), (void)device, OK; }
result cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    return CALLED(), *flags = 0, *active = retained[device] > 0, OK;
}
result cuCtxGetCurrent(void **context) {
    CALLED();
    *context = current_device() < 0 ? NULL : &contexts[current_device()];
    return OK;
}
result cuCtxSetCurrent(void *context) {
    CALLED();
    if (!context)
        depth = depth ? depth - 1 : 0;
    else
        stack[depth ? depth - 1 : depth++] = device_of(context) + 1;
    return OK;
}
result cuCtxPushCurrent(void *context) {
    return CALLED(), stack[depth++] = device_of(context) + 1, OK;
}
result cuCtxPopCurrent(void **context) {
    CALLED();
    if (!depth)
        return INVALID_CONTEXT;
    int device = stack[--depth] - 1;
    if (context)
        *context = &contexts[device];
    return OK;
}
result cuCtxGetDevice(int *device) {
    CALLED();
    *device = current_device();
    return *device < 0 ? INVALID_CONTEXT : OK;
}
result cuCtxGetDevice_v2(int *device, void *context) {
    return context ? (*device = device_of(context), OK) : cuCtxGetDevice(device);
}
result cuCtxGetApiVersion(void *context, unsigned *version) {
    return CALLED(), (void)context, *version = 13000, OK;
}
result cuCtxGetId(void *context, uint64_t *id) { return CALLED(), *id = (uintptr_t)context, OK; }
result cuCtxGetStreamPriorityRange(int *least, int *most) {
    return CALLED(), *least = 0, *most = -5, OK;
}
result cuCtxSynchronize(void) { return CALLED(), wait_for(NULL); }

/* Memory. */

result cuMemGetInfo(size_t *free_bytes, size_t *total) {
    return CALLED(), *free_bytes = (size_t)139 << 30, *total = (size_t)140 << 30, OK;
}
result cuMemAlloc(address *place, size_t size) {
    CALLED();
    return capturing && !relaxed ? CAPTURE_UNSUPPORTED : take((void **)place, size, 0);
}
result cuMemFree(address place) {
    CALLED();
    if (capturing && !relaxed)
        return CAPTURE_UNSUPPORTED;
    pthread_mutex_lock(&lock);
    waits++;
    run_everything();
    result found = give_back(place);
    pthread_mutex_unlock(&lock);
    return found;
}
result cuMemAllocAsync(address *place, size_t size, void *stream) {
    return CALLED(), (void)stream, take((void **)place, size, 0);
}
result cuMemFreeAsync(address place, void *stream) {
    CALLED();
    struct operation *own = operation(FREE);
    own->target = (void *)place;
    return queue(stream_at(stream), own);
}
result cuMemAllocHost(void **place, size_t size) { return CALLED(), take(place, size, 1); }
result cuMemHostAlloc(void **place, size_t size, unsigned flags) {
    return CALLED(), (void)flags, take(place, size, 1);
}
result cuMemFreeHost(void *place) {
    CALLED();
    pthread_mutex_lock(&lock);
    run_everything();
    result found = give_back((address)place);
    pthread_mutex_unlock(&lock);
    return found;
}

/* From memory that is not pinned the driver copies at once, as far as 64 KB; more can wait. */
static result copy(struct stream *stream, void *to, const void *from, size_t size, int from_host) {
    pthread_mutex_lock(&lock);
    struct memory *source = from_host ? memory_at((address)from) : NULL;
    pthread_mutex_unlock(&lock);
    struct operation *own = operation(COPY);
    own->target = to, own->source = (void *)from, own->size = size;
    if (from_host && !source && !stream->captured) {
        own->source = malloc(size ? size : 1);
        memcpy(own->source, from, size);
        own->staged = 1;
        waits += size > 65536;
    }
    return queue(stream, own);
}
static result copy_now(struct stream *stream, void *to, const void *from, size_t size, int host) {
    result found = copy(stream, to, from, size, host);
    return found ? found : wait_for(stream);
}
result cuMemcpyHtoD(address to, const void *from, size_t size) {
    return CALLED(), copy_now(&legacy, (void *)to, from, size, 1);
}
result cuMemcpyHtoDAsync(address to, const void *from, size_t size, void *stream) {
    return CALLED(), copy(stream_at(stream), (void *)to, from, size, 1);
}
result cuMemcpyDtoH(void *to, address from, size_t size) {
    return CALLED(), copy_now(&legacy, to, (void *)from, size, 0);
}
result cuMemcpyDtoHAsync(void *to, address from, size_t size, void *stream) {
    CALLED();
    struct memory *target = memory_at((address)to);
    if (target && target->pinned)
        return copy(stream_at(stream), to, (void *)from, size, 0);
    return copy_now(stream_at(stream), to, (void *)from, size, 0);
}
result cuMemcpyDtoD(address to, address from, size_t size) {
    return CALLED(), copy(&legacy, (void *)to, (void *)from, size, 0);
}
result cuMemcpyDtoDAsync(address to, address from, size_t size, void *stream) {
    return CALLED(), copy(stream_at(stream), (void *)to, (void *)from, size, 0);
}
result cuMemcpyAsync(address to, address from, size_t size, void *stream) {
    return CALLED(), copy(stream_at(stream), (void *)to, (void *)from, size, 0);
}
static result set(struct stream *stream, address to, uint32_t value, int width, size_t size) {
    struct operation *own = operation(FILL);
    own->target = (void *)to, own->value = value, own->width = width, own->size = size;
    return queue(stream, own);
}
result cuMemsetD8(address to, unsigned char value, size_t size) {
    return CALLED(), set(&legacy, to, value, 1, size);
}
result cuMemsetD8Async(address to, unsigned char value, size_t size, void *stream) {
    return CALLED(), set(stream_at(stream), to, value, 1, size);
}
result cuMemsetD32Async(address to, unsigned value, size_t size, void *stream) {
    return CALLED(), set(stream_at(stream), to, value, 4, size);
}

static result attribute_of(void *out, int attribute, address place) {
    struct memory *own = memory_at(place);
    switch (attribute) {
    case 1: *(void **)out = &contexts[own ? own->device : 0]; return OK;
    case 2: *(unsigned *)out = own ? (own->pinned ? 1 : 2) : 0; return own ? OK : INVALID_VALUE;
    case 3: *(address *)out = place; return own ? OK : INVALID_VALUE;
    case 8: *(int *)out = 0; return OK;
    case 9: *(int *)out = own ? own->device : -1; return OK;
    default: return INVALID_VALUE;
    }
}
result cuPointerGetAttribute(void *out, int attribute, address place) {
    CALLED();
    pthread_mutex_lock(&lock);
    result found = attribute_of(out, attribute, place);
    pthread_mutex_unlock(&lock);
    return found;
}
result cuPointerGetAttributes(unsigned count, int *attributes, void **out, address place) {
    CALLED();
    pthread_mutex_lock(&lock);
    for (unsigned k = 0; k < count; k++)
        attribute_of(out[k], attributes[k], place);
    pthread_mutex_unlock(&lock);
    return OK;
}

/* Streams. */

result cuStreamCreate(void **handle, unsigned flags) {
    CALLED();
    struct stream *made = calloc(1, sizeof *made);
    made->blocking = !(flags & 1), made->alive = 1, made->device = current_device();
    pthread_mutex_lock(&lock);
    streams[stream_count++] = made;
    pthread_mutex_unlock(&lock);
    *handle = made;
    return OK;
}
result cuStreamCreateWithPriority(void **handle, unsigned flags, int priority) {
    return (void)priority, cuStreamCreate(handle, flags);
}
result cuStreamDestroy(void *stream) { return CALLED(), stream_at(stream)->alive = 0, OK; }
result cuStreamSynchronize(void *stream) { return CALLED(), wait_for(stream_at(stream)); }
result cuStreamQuery(void *stream) {
    return CALLED(), stream_at(stream)->first ? NOT_READY : OK;
}
result cuStreamGetFlags(void *stream, unsigned *flags) {
    return CALLED(), *flags = !stream_at(stream)->blocking, OK;
}
result cuStreamGetPriority(void *stream, int *priority) {
    return CALLED(), (void)stream, *priority = 0, OK;
}
result cuStreamGetCtx(void *stream, void **context) {
    return CALLED(), *context = &contexts[stream_at(stream)->device], OK;
}
result cuStreamGetDevice(void *stream, int *device) {
    return CALLED(), *device = stream_at(stream)->device, OK;
}
result cuStreamGetId(void *stream, uint64_t *id) { return CALLED(), *id = (uintptr_t)stream, OK; }
result cuStreamIsCapturing(void *stream, int *status) {
    return CALLED(), *status = stream_at(stream)->captured != NULL, OK;
}
result cuStreamWaitEvent(void *stream, struct event *event, unsigned flags) {
    CALLED();
    (void)flags;
    struct operation *own = operation(WAIT);
    own->event = *event;
    return queue(stream_at(stream), own);
}

/* Events; one that is destroyed stays, as what is queued can still name it. */

result cuEventCreate(struct event **event, unsigned flags) {
    return CALLED(), (void)flags, *event = calloc(1, sizeof **event), OK;
}
result cuEventRecord(struct event *event, void *stream) {
    CALLED();
    pthread_mutex_lock(&lock);
    result found = queue(stream_at(stream), operation(RECORD));
    *event = (struct event){stream_at(stream), next_number};
    pthread_mutex_unlock(&lock);
    return found;
}
result cuEventQuery(struct event *event) {
    return CALLED(), is_reached(*event) ? OK : NOT_READY;
}
result cuEventSynchronize(struct event *event) {
    CALLED();
    pthread_mutex_lock(&lock);
    waits++;
    reach(*event);
    pthread_mutex_unlock(&lock);
    return OK;
}
result cuEventDestroy(struct event *event) { return CALLED(), (void)event, OK; }

/* Graphs of one stream. */

result cuStreamBeginCapture(void *stream, int mode) {
    CALLED();
    (void)mode;
    if (stream_at(stream) == &legacy)
        return CAPTURE_UNSUPPORTED;
    stream_at(stream)->captured = calloc(1, sizeof(struct graph));
    capturing++;
    return OK;
}
result cuStreamEndCapture(void *stream, struct graph **graph) {
    CALLED();
    *graph = stream_at(stream)->captured;
    stream_at(stream)->captured = NULL;
    capturing--;
    return OK;
}
result cuThreadExchangeStreamCaptureMode(int *mode) {
    CALLED();
    int before = relaxed ? 2 : 0;
    relaxed = *mode == 2;
    *mode = before;
    return OK;
}
result cuGraphInstantiateWithFlags(struct graph **made, struct graph *graph, uint64_t flags) {
    return CALLED(), (void)flags, *made = graph, OK;
}
result cuGraphLaunch(struct graph *graph, void *stream) {
    CALLED();
    for (struct operation *own = graph->first; own; own = own->next) {
        struct operation *again = operation(own->kind);
        *again = *own;
        again->staged = 0;
        if (own->kind == LAUNCH) {
            size_t room = (size_t)own->kernel->count * (sizeof(void *) + 8);
            again->arguments = malloc(room + 8);
            memcpy(again->arguments, own->arguments, room);
            for (int k = 0; k < own->kernel->count; k++)
                again->arguments[k] = (char *)(again->arguments + own->kernel->count) + 8 * k;
        }
        queue(stream_at(stream), again);
    }
    return OK;
}
result cuGraphExecDestroy(struct graph *graph) { return CALLED(), (void)graph, OK; }
result cuGraphDestroy(struct graph *graph) { return CALLED(), (void)graph, OK; }

/* Code. */

static struct kernel *loaded(const char *code, const char *name) {
    pthread_mutex_lock(&lock);
    for (int k = 0; k < kernel_count; k++)
        if (kernels[k]->code == code && !strcmp(kernels[k]->name, name)) {
            pthread_mutex_unlock(&lock);
            return kernels[k];
        }
    pthread_mutex_unlock(&lock);
    char path[4096];
    if (!compile || compile(code, name, path, sizeof path))
        return NULL;
    void *library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (!library) {
        fprintf(stderr, "stand-in: %s\n", dlerror());
        return NULL;
    }
    struct kernel *made = calloc(1, sizeof *made);
    made->name = strdup(name), made->code = code;
    made->function = (void (*)(void **))dlsym(library, "standin_entry");
    made->sizes = dlsym(library, "standin_sizes");
    made->count = *(const int *)dlsym(library, "standin_count");
    pthread_mutex_lock(&lock);
    kernels[kernel_count++] = made;
    pthread_mutex_unlock(&lock);
    return made;
}
result cuLibraryLoadData(void **library, const void *code, void *a, void *b, unsigned c, void *d,
                         void *e, unsigned f) {
    CALLED();
    (void)a, (void)b, (void)c, (void)d, (void)e, (void)f;
    *library = strdup(code);
    return OK;
}
result cuLibraryUnload(void *library) { return CALLED(), (void)library, OK; }
result cuLibraryGetKernel(struct kernel **kernel, void *library, const char *name) {
    CALLED();
    *kernel = loaded(library, name);
    return *kernel ? OK : NOT_FOUND;
}
result cuKernelGetFunction(struct kernel **function, struct kernel *kernel) {
    return CALLED(), *function = kernel, OK;
}
result cuKernelGetAttribute(int *value, int attribute, struct kernel *kernel, int device) {
    return CALLED(), (void)kernel, (void)device, *value = attribute ? 32 : 1024, OK;
}
result cuFuncGetAttribute(int *value, int attribute, struct kernel *kernel) {
    return CALLED(), (void)kernel, *value = attribute ? 32 : 1024, OK;
}
result cuKernelGetParamInfo(struct kernel *kernel, size_t k, size_t *offset, size_t *size) {
    CALLED();
    if (k >= (size_t)kernel->count)
        return INVALID_VALUE;
    *offset = 8 * k;
    if (size)
        *size = (size_t)kernel->sizes[k];
    return OK;
}

struct launch {
    unsigned grid[3], block[3], shared;
    void *stream, *attributes;
    unsigned attribute_count;
};
result cuLaunchKernelEx(const struct launch *launch, struct kernel *kernel, void **given, void **x) {
    CALLED();
    (void)x;
    const unsigned *block = launch->block, size = block[0] * block[1] * block[2];
    if (!launch->grid[0] || !size || size > 1024)
        return INVALID_VALUE;
    struct operation *own = operation(LAUNCH);
    own->kernel = kernel, own->grid = launch->grid[0];
    memcpy(own->block, block, sizeof own->block);
    own->device = current_device();
    own->arguments = calloc((size_t)kernel->count + 1, sizeof(void *) + 8);
    for (int k = 0; k < kernel->count; k++) {
        own->arguments[k] = (char *)(own->arguments + kernel->count) + 8 * k;
        memcpy(own->arguments[k], given[k], (size_t)kernel->sizes[k]);
    }
    if (own->device != stream_at(launch->stream)->device && stream_at(launch->stream) != &legacy) {
        drop(own);
        return INVALID_CONTEXT;
    }
    return queue(stream_at(launch->stream), own);
}
result cuLaunchKernel(struct kernel *kernel, unsigned a, unsigned b, unsigned c, unsigned d,
                      unsigned e, unsigned f, unsigned shared, void *stream, void **given,
                      void **x) {
    struct launch launch = {{a, b, c}, {d, e, f}, shared, stream, NULL, 0};
    return cuLaunchKernelEx(&launch, kernel, given, x);
}
result cuGetErrorName(result error, const char **text) {
    CALLED();
    *text = error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
                                           : "CUDA_ERROR_OF_THE_STANDIN";
    return OK;
}
result cuGetErrorString(result error, const char **text) {
    return CALLED(), (void)error, *text = "refused by the stand-in", OK;
}

/* The address of a function by its name, the newest form of it; 1 where there is none. */
result cuGetProcAddress_v2(const char *name, void **found, int version, uint64_t flags, int *why) {
    (void)flags;
    if (!strcmp(name, "cuGetProcAddress"))
        *found = (void *)cuGetProcAddress_v2;
    else if (!strcmp(name, "cuCtxGetDevice") && version >= 13000)
        *found = (void *)cuCtxGetDevice_v2;
    else {
        Dl_info own, theirs;
        dladdr((void *)cuInit, &own);
        *found = dlsym(RTLD_DEFAULT, name);
        if (*found && (!dladdr(*found, &theirs) || theirs.dli_fbase != own.dli_fbase))
            *found = NULL;
    }
    if (why)
        *why = *found ? 0 : 1;
    return *found ? OK : NOT_FOUND;
}
result cuGetProcAddress(const char *name, void **found, int version, uint64_t flags) {
    return cuGetProcAddress_v2(name, found, version, flags, NULL);
}

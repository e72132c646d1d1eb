// libcudart of a device that computes nothing: memory is addresses only, reads give zeros, kernels are
// counted and not run.
#include "device.h"
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#define TOTAL_BYTES (140UL << 30)  // of an H200

EXPORT long nullcuda_count[COUNTERS];
EXPORT long nullcuda_bytes, nullcuda_peak;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

// ----- devices

static __thread int current;

static int devices(void) {
    const char *asked = getenv("NULLCUDA_DEVICES");
    return asked ? atoi(asked) : 1;
}

EXPORT cudaError_t cudaGetDeviceCount(int *count) { *count = devices(); return cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int *device) { *device = current; return cudaSuccess; }

EXPORT cudaError_t cudaSetDevice(int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    current = device;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDriverGetVersion(int *version) { *version = 13000; return cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int *version) { *version = 13000; return cudaSuccess; }

EXPORT cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
    if (device < 0 || device >= devices()) return cudaErrorInvalidDevice;
    memset(p, 0, sizeof *p);
    strcpy(p->name, "NVIDIA H200");
    p->major = 9;
    p->minor = 0;
    p->totalGlobalMem = TOTAL_BYTES;
    p->multiProcessorCount = 132;
    p->warpSize = 32;
    p->maxThreadsPerBlock = 1024;
    p->maxThreadsPerMultiProcessor = 2048;
    p->maxBlocksPerMultiProcessor = 32;
    p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024;
    p->maxThreadsDim[2] = 64;
    p->maxGridSize[0] = 2147483647;
    p->maxGridSize[1] = p->maxGridSize[2] = 65535;
    p->regsPerBlock = p->regsPerMultiprocessor = 65536;
    p->sharedMemPerBlock = 49152;
    p->sharedMemPerBlockOptin = 232448;
    p->sharedMemPerMultiprocessor = 233472;
    p->l2CacheSize = 50 << 20;
    p->unifiedAddressing = p->canMapHostMemory = p->managedMemory = p->concurrentKernels = 1;
    p->cooperativeLaunch = 1;
    p->textureAlignment = 512;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
    struct cudaDeviceProp p;
    cudaError_t error = cudaGetDeviceProperties(&p, device);
    if (error) return error;
    switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = p.major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = p.minor; break;
    case cudaDevAttrMultiProcessorCount: *value = p.multiProcessorCount; break;
    case cudaDevAttrWarpSize: *value = p.warpSize; break;
    case cudaDevAttrMaxThreadsPerBlock: *value = p.maxThreadsPerBlock; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = p.maxThreadsPerMultiProcessor; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = p.maxBlocksPerMultiProcessor; break;
    case cudaDevAttrMaxGridDimX: *value = p.maxGridSize[0]; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = p.maxGridSize[1]; break;
    case cudaDevAttrMaxRegistersPerBlock:
    case cudaDevAttrMaxRegistersPerMultiprocessor: *value = p.regsPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = (int)p.sharedMemPerBlock; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (int)p.sharedMemPerBlockOptin; break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = (int)p.sharedMemPerMultiprocessor; break;
    case cudaDevAttrL2CacheSize: *value = p.l2CacheSize; break;
    case cudaDevAttrUnifiedAddressing: case cudaDevAttrCooperativeLaunch: *value = 1; break;
    default: *value = 0;
    }
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceCanAccessPeer(int *can, int device, int peer) {
    *can = device != peer;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetPCIBusId(char *id, int size, int device) {
    snprintf(id, size, "0000:%02x:00.0", device + 1);
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
    *least = 0;
    *greatest = -5;
    return cudaSuccess;
}

// of this thread's failed calls: how torch learns that a launch was refused
static __thread cudaError_t last;

static cudaError_t fail(cudaError_t error) { return last = error; }

EXPORT cudaError_t cudaPeekAtLastError(void) { return last; }

EXPORT cudaError_t cudaGetLastError(void) {
    cudaError_t error = last;
    last = cudaSuccess;
    return error;
}

EXPORT const char *cudaGetErrorName(cudaError_t error) {
    return error ? "cudaErrorOfTheNullDevice" : "cudaSuccess";
}

EXPORT const char *cudaGetErrorString(cudaError_t error) {
    switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    default: return "error of the null device";
    }
}

// ----- streams, events and graphs: a stream that records puts its counts into a graph, and a replay adds
// them

struct CUgraph_st { long count[COUNTERS]; };
struct record {
    struct CUgraph_st *graph;
    unsigned long long id;
    enum cudaStreamCaptureMode mode;
    pthread_t thread;
    cudaStream_t origin;
    int broken, over;
};
struct CUstream_st { struct record *record; int priority; };
struct CUevent_st { struct record *record; };

static struct CUstream_st legacy;
static struct record *active;  // one stream at a time records; nothing here needs two
static unsigned long long records;
static __thread enum cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

static struct CUstream_st *stream_of(cudaStream_t s) { return (uintptr_t)s <= 2 ? &legacy : s; }

static struct record *recording(cudaStream_t s) {
    struct CUstream_st *stream = stream_of(s);
    if (stream->record && stream->record->over) stream->record = NULL;
    return stream->record;
}

EXPORT void nullcuda_note(enum counter what, cudaStream_t stream) {
    struct record *record = recording(stream);
    __atomic_add_fetch(record ? &record->graph->count[what] : &nullcuda_count[what], 1, __ATOMIC_RELAXED);
}

// A call that a recording forbids: it fails, and so does the recording.
static cudaError_t forbidden(struct record *record) {
    record->broken = 1;
    return fail(cudaErrorStreamCaptureUnsupported);
}

// For calls that are unsafe next to a recording (cudaMalloc, cudaEventQuery), by the rules of capture modes.
static cudaError_t unsafe(void) {
    struct record *record = active;
    const enum cudaStreamCaptureMode relaxed = cudaStreamCaptureModeRelaxed;
    if (!record || thread_mode == relaxed || record->mode == relaxed) return cudaSuccess;
    int own = pthread_equal(record->thread, pthread_self());
    int all = record->mode == cudaStreamCaptureModeGlobal && thread_mode == cudaStreamCaptureModeGlobal;
    return own || all ? forbidden(record) : cudaSuccess;
}

cudaError_t nullcuda_wait(cudaStream_t stream) {
    nullcuda_count[SYNCS]++;
    struct record *record = stream ? recording(stream) : NULL;
    return record ? forbidden(record) : unsafe();
}

EXPORT cudaError_t cudaDeviceSynchronize(void) { return nullcuda_wait(NULL); }
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t s) { return nullcuda_wait(s); }

EXPORT cudaError_t cudaStreamQuery(cudaStream_t s) {
    struct record *record = recording(s);
    return record ? forbidden(record) : unsafe();
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t *s, unsigned flags, int priority) {
    *s = calloc(1, sizeof **s);
    (*s)->priority = priority;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamCreate(cudaStream_t *s) { return cudaStreamCreateWithPriority(s, 0, 0); }
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t *s, unsigned f) {
    return cudaStreamCreateWithPriority(s, f, 0);
}
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t s) { free(s); return cudaSuccess; }

EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t s, int *priority) {
    *priority = stream_of(s)->priority;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t s, cudaEvent_t event, unsigned flags) {
    if (event->record && !event->record->over) stream_of(s)->record = event->record;
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) {
    *event = calloc(1, sizeof **event);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) { free(event); return cudaSuccess; }

EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t s) {
    event->record = recording(s);
    return cudaSuccess;
}

EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t e, cudaStream_t s, unsigned f) {
    return cudaEventRecord(e, s);
}

static cudaError_t ask(cudaEvent_t event) {
    return event->record && !event->record->over ? forbidden(event->record) : unsafe();
}

EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) { return ask(event); }

EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
    nullcuda_count[SYNCS]++;
    return ask(event);
}

EXPORT cudaError_t cudaEventElapsedTime(float *ms, cudaEvent_t start, cudaEvent_t end) {
    *ms = 1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(enum cudaStreamCaptureMode *mode) {
    enum cudaStreamCaptureMode before = thread_mode;
    thread_mode = *mode;
    *mode = before;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t s, enum cudaStreamCaptureMode mode) {
    if (active || stream_of(s) == &legacy) return cudaErrorStreamCaptureUnsupported;
    struct record *record = calloc(1, sizeof *record);
    record->graph = calloc(1, sizeof *record->graph);
    record->id = ++records;
    record->mode = mode;
    record->thread = pthread_self();
    record->origin = s;
    s->record = active = record;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t s, cudaGraph_t *graph) {
    struct record *record = recording(s);
    *graph = NULL;
    if (!record || record->origin != s) return fail(cudaErrorStreamCaptureUnmatched);
    record->over = 1;  // not freed: events and other streams may point to it
    s->record = active = NULL;
    if (record->broken) return fail(cudaErrorStreamCaptureInvalidated);
    *graph = record->graph;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t s, enum cudaStreamCaptureStatus *status) {
    struct record *record = recording(s);
    *status = !record ? cudaStreamCaptureStatusNone
            : record->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t s, enum cudaStreamCaptureStatus *status,
                                            unsigned long long *id,
                                            cudaGraph_t *graph, const cudaGraphNode_t **nodes,
                                            const cudaGraphEdgeData **edges, size_t *number) {
    struct record *record = recording(s);
    if (id) *id = record ? record->id : 0;
    if (graph) *graph = record ? record->graph : NULL;
    if (nodes) *nodes = NULL;
    if (edges) *edges = NULL;
    if (number) *number = 0;
    return cudaStreamIsCapturing(s, status);
}

EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *exec, cudaGraph_t graph,
                                                 unsigned long long flags) {
    struct CUgraph_st *copy = malloc(sizeof *copy);
    *copy = *graph;
    *exec = (cudaGraphExec_t)copy;
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t s) {
    struct CUgraph_st *graph = (struct CUgraph_st *)exec;
    for (int i = 0; i < COUNTERS; i++) nullcuda_count[i] += graph->count[i];
    nullcuda_note(REPLAYS, s);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t *nodes, size_t *number) {
    *number = 0;
    for (int i = 0; i < COUNTERS; i++) *number += graph->count[i];
    return cudaSuccess;
}

EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t graph) { free(graph); return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) { free(exec); return cudaSuccess; }

EXPORT cudaError_t cudaLaunchHostFunc(cudaStream_t s, cudaHostFn_t function, void *argument) {
    if (!recording(s)) function(argument);
    return cudaSuccess;
}

EXPORT cudaError_t cudaStreamAddCallback(cudaStream_t s, cudaStreamCallback_t function, void *argument,
                                         unsigned flags) {
    function(s, cudaSuccess, argument);
    return cudaSuccess;
}

// ----- memory: address ranges that nobody can touch, so a host that reads the device without a copy stops
// there

static struct { char *start; size_t bytes; } regions[1 << 16];
static int used;

EXPORT cudaError_t cudaMalloc(void **p, size_t bytes) {
    cudaError_t error = unsafe();
    if (error) return error;
    bytes = bytes ? bytes : 1;
    pthread_mutex_lock(&lock);
    char *base = MAP_FAILED;
    if (nullcuda_bytes + bytes <= TOTAL_BYTES && used < 1 << 16)
        base = mmap(NULL, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (base == MAP_FAILED) {
        pthread_mutex_unlock(&lock);
        *p = NULL;
        return fail(cudaErrorMemoryAllocation);
    }
    regions[used].start = base;
    regions[used++].bytes = bytes;
    nullcuda_bytes += (long)bytes;
    if (nullcuda_bytes > nullcuda_peak) nullcuda_peak = nullcuda_bytes;
    nullcuda_count[MALLOCS]++;
    pthread_mutex_unlock(&lock);
    *p = base;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFree(void *p) {
    if (!p) return cudaSuccess;
    cudaError_t error = unsafe();
    if (error) return error;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++) {
        if (regions[i].start != p) continue;
        munmap(p, regions[i].bytes);
        nullcuda_bytes -= (long)regions[i].bytes;
        nullcuda_count[FREES]++;
        regions[i] = regions[--used];
        pthread_mutex_unlock(&lock);
        return cudaSuccess;
    }
    pthread_mutex_unlock(&lock);
    return cudaErrorInvalidValue;
}

EXPORT cudaError_t cudaMallocAsync(void **p, size_t bytes, cudaStream_t s) { return cudaMalloc(p, bytes); }
EXPORT cudaError_t cudaFreeAsync(void *p, cudaStream_t s) { return cudaFree(p); }

EXPORT cudaError_t cudaMemGetInfo(size_t *free_bytes, size_t *total) {
    *total = TOTAL_BYTES;
    *free_bytes = TOTAL_BYTES - nullcuda_bytes;
    return cudaSuccess;
}

static struct { char *p; size_t bytes; } pinned[1 << 12];
static int pins;

static cudaError_t pin(void *p, size_t bytes) {
    pthread_mutex_lock(&lock);
    int full = pins == 1 << 12;
    if (!full) {
        pinned[pins].p = p;
        pinned[pins++].bytes = bytes;
    }
    pthread_mutex_unlock(&lock);
    return full ? cudaErrorMemoryAllocation : cudaSuccess;
}

static cudaError_t unpin(void *p) {
    pthread_mutex_lock(&lock);
    for (int i = 0; i < pins; i++)
        if (pinned[i].p == p) {
            pinned[i] = pinned[--pins];
            break;
        }
    pthread_mutex_unlock(&lock);
    return cudaSuccess;
}

EXPORT cudaError_t cudaHostAlloc(void **p, size_t bytes, unsigned flags) {
    return posix_memalign(p, 4096, bytes ? bytes : 1) ? cudaErrorMemoryAllocation : pin(*p, bytes);
}

EXPORT cudaError_t cudaFreeHost(void *p) { unpin(p); free(p); return cudaSuccess; }
EXPORT cudaError_t cudaHostRegister(void *p, size_t bytes, unsigned flags) { return pin(p, bytes); }
EXPORT cudaError_t cudaHostUnregister(void *p) { return unpin(p); }

static enum cudaMemoryType type_of(const void *p) {
    enum cudaMemoryType type = cudaMemoryTypeUnregistered;
    const char *at = p;
    pthread_mutex_lock(&lock);
    for (int i = 0; i < used; i++)
        if (at >= regions[i].start && at < regions[i].start + regions[i].bytes) type = cudaMemoryTypeDevice;
    for (int i = 0; i < pins; i++)
        if (at >= pinned[i].p && at < pinned[i].p + pinned[i].bytes) type = cudaMemoryTypeHost;
    pthread_mutex_unlock(&lock);
    return type;
}

EXPORT cudaError_t cudaPointerGetAttributes(struct cudaPointerAttributes *a, const void *p) {
    memset(a, 0, sizeof *a);
    a->type = type_of(p);
    a->device = current;
    if (a->type == cudaMemoryTypeDevice) a->devicePointer = (void *)p;
    else a->hostPointer = (void *)p;
    return cudaSuccess;
}

// Copies of bytes that a graph does not hold: between host memories as they are, from the device zeros, to it
// nothing.
static void copy(void *to, const void *from, size_t bytes) {
    if (type_of(to) == cudaMemoryTypeDevice) return;
    if (type_of(from) == cudaMemoryTypeDevice) memset(to, 0, bytes);
    else memmove(to, from, bytes);
}

EXPORT cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind,
                                   cudaStream_t s) {
    if (type_of(to) != cudaMemoryTypeDevice && type_of(from) == cudaMemoryTypeDevice)
        nullcuda_note(type_of(to) == cudaMemoryTypeHost ? SENDS : READS, s);
    if (!recording(s)) copy(to, from, bytes);
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemcpy(void *to, const void *from, size_t bytes, enum cudaMemcpyKind kind) {
    cudaError_t error = nullcuda_wait(NULL);
    return error ? error : cudaMemcpyAsync(to, from, bytes, kind, NULL);
}

EXPORT cudaError_t cudaMemcpy2DAsync(void *to, size_t to_pitch, const void *from, size_t from_pitch,
                                     size_t width,
                                     size_t height, enum cudaMemcpyKind kind, cudaStream_t s) {
    for (size_t i = 0; i < height; i++) copy((char *)to + i * to_pitch, (const char *)from + i * from_pitch,
                                             width);
    return cudaSuccess;
}

EXPORT cudaError_t cudaGetSymbolAddress(void **p, const void *symbol) {
    static char memory[1 << 16];
    *p = memory;
    return cudaSuccess;
}

EXPORT cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t *pool, int device) {
    *pool = (cudaMemPool_t)1;
    return cudaSuccess;
}

EXPORT cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t pool, enum cudaMemPoolAttr attribute, void *value) {
    *(uint64_t *)value = 0;
    return cudaSuccess;
}

// ----- kernels

static struct name { const void *function; const char *name; } *names;
static int named, room;

EXPORT void **__cudaRegisterFatBinary(void *binary) { static void *handle; return &handle; }

EXPORT void __cudaRegisterFunction(void **handle, const char *function, char *device_function,
                                   const char *device_name, int limit, uint3 *thread, uint3 *block,
                                   dim3 *block_dim, dim3 *grid_dim, int *warp) {
    pthread_mutex_lock(&lock);
    if (named == room) names = realloc(names, (room = room ? 2 * room : 1 << 14) * sizeof *names);
    names[named].function = function;
    names[named++].name = device_name;
    pthread_mutex_unlock(&lock);
}

static const char *name_of(const void *function) {
    for (int i = 0; i < named; i++)
        if (names[i].function == function) return names[i].name;
    return "unknown";
}

// Distinct launches: an open hash table, never emptied.
#define LAUNCHES (1 << 15)
static struct launch {
    const void *function;
    dim3 grid;
    unsigned threads;
    size_t shared;
    long count;
} launches[LAUNCHES];

static void remember(const void *function, dim3 grid, dim3 block, size_t shared) {
    uint64_t key = (uintptr_t)function * 0x9E3779B97F4A7C15UL;
    key ^= grid.x * 0x85EBCA6BUL ^ grid.y * 0xC2B2AE35UL ^ grid.z;
    pthread_mutex_lock(&lock);
    for (unsigned i = 0, at = key % LAUNCHES; i < LAUNCHES; i++, at = (at + 1) % LAUNCHES) {
        struct launch *l = &launches[at];
        int same = l->function == function && !memcmp(&l->grid, &grid, sizeof grid);
        if (l->count && !same) continue;
        *l = (struct launch){function, grid, block.x * block.y * block.z, shared, l->count + 1};
        break;
    }
    pthread_mutex_unlock(&lock);
}

// Writes "count x y z threads shared name" of each distinct launch. Returns 0, or 1 if the file cannot be
// written.
EXPORT int nullcuda_write_launches(const char *path) {
    FILE *file = fopen(path, "w");
    if (!file) return 1;
    for (int i = 0; i < LAUNCHES; i++) {
        struct launch *l = &launches[i];
        if (l->count) fprintf(file, "%ld %u %u %u %u %zu %s\n", l->count, l->grid.x, l->grid.y, l->grid.z,
                              l->threads, l->shared,
                              name_of(l->function));
    }
    return fclose(file) != 0;
}

static cudaError_t launch(const void *function, dim3 grid, dim3 block, size_t shared, cudaStream_t s) {
    remember(function, grid, block, shared);
    unsigned long threads = (unsigned long)block.x * block.y * block.z;
    int empty = !grid.x || !grid.y || !grid.z || !threads;
    if (empty || grid.y > 65535 || grid.z > 65535 || threads > 1024 || shared > 232448) {
        nullcuda_count[REFUSED]++;
        fprintf(stderr, "null device: no device takes the launch of %s with grid %u x %u x %u, %lu threads, "
                "%zu bytes of shared memory\n", name_of(function), grid.x, grid.y, grid.z, threads, shared);
        return fail(cudaErrorInvalidConfiguration);
    }
    nullcuda_note(KERNELS, s);
    return cudaSuccess;
}

EXPORT cudaError_t cudaLaunchKernel(const void *f, dim3 grid, dim3 block, void **args, size_t shared,
                                    cudaStream_t s) {
    return launch(f, grid, block, shared, s);
}

EXPORT cudaError_t cudaLaunchCooperativeKernel(const void *f, dim3 grid, dim3 block, void **args,
                                               size_t shared, cudaStream_t s) {
    return launch(f, grid, block, shared, s);
}

EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *f, void **args) {
    return launch(f, c->gridDim, c->blockDim, c->dynamicSmemBytes, c->stream);
}

EXPORT cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *f) {
    *kernel = (cudaKernel_t)f;
    return cudaSuccess;
}

EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void **args, size_t shared,
                                      cudaStream_t s) {
    return launch((const void *)f, grid, block, shared, s);
}

// f<<<grid, block, shared, stream>>>(...) is a push, and a pop in the function that then launches.
static __thread struct { dim3 grid, block; size_t shared; cudaStream_t stream; } pushed;

EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared,
                                            struct CUstream_st *stream) {
    pushed.grid = grid;
    pushed.block = block;
    pushed.shared = shared;
    pushed.stream = stream;
    return 0;
}

EXPORT cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
    *grid = pushed.grid;
    *block = pushed.block;
    *shared = pushed.shared;
    *(cudaStream_t *)stream = pushed.stream;
    return cudaSuccess;
}

EXPORT cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *f) {
    memset(a, 0, sizeof *a);
    a->binaryVersion = a->ptxVersion = 90;
    a->maxThreadsPerBlock = 1024;
    a->numRegs = 32;
    a->maxDynamicSharedSizeBytes = 232448;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *f,
                                                                          int threads,
                                                                          size_t shared, unsigned flags) {
    *blocks = 2;
    return cudaSuccess;
}

EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *f, int threads,
                                                                 size_t shared) {
    *blocks = 2;
    return cudaSuccess;
}

static int nothing(void) { return 0; }  // any function of the driver that torch asks for by name

EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned version,
                                                    unsigned long long flags,
                                                    enum cudaDriverEntryPointQueryResult *found) {
    *function = (void *)nothing;
    if (found) *found = cudaDriverEntryPointSuccess;
    return cudaSuccess;
}

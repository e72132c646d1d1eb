// What the parts of the null device share: counters, streams that record, and the list of launches.
#pragma once
#define _GNU_SOURCE
#include <stddef.h>
#include <stdint.h>
#include <cuda_runtime_api.h>

#define EXPORT __attribute__((visibility("default")))

// The order is that of COUNTERS in python/nullcuda.py.
enum counter {
    KERNELS,      // launches by torch's own code
    GEMMS,        // cuBLAS products
    INDUCTOR,     // launches of generated kernels, told by Python
    TRITON,       // launches of the project's kernels, told by Python
    SYNCS,        // calls that wait for the device
    READS,        // copies from the device to memory of the host that is not pinned: the host waits for them
    SENDS,        // copies from the device to pinned memory
    MALLOCS,
    FREES,        // each waits for the device
    COLLECTIVES,
    REPLAYS,      // of CUDA graphs
    REFUSED,      // launches that no device takes: an empty grid, too many threads, too much shared memory
    COUNTERS
};

extern long nullcuda_count[COUNTERS];

// Counts one event, or puts it into the graph that `stream` records.
void nullcuda_note(enum counter what, cudaStream_t stream);

// cudaSuccess, or the error of a call that must not happen while a stream records. stream: NULL for the whole
// device.
cudaError_t nullcuda_wait(cudaStream_t stream);

// cuBLAS, NCCL and the driver, as far as a caller looks at what they return; every other function comes from
// stubs.sh.
#include "device.h"
#include <cuda.h>
// nccl.h includes number types of CUDA that no function here has, and that need more headers
#define __CUDA_FP16_H__
#define __CUDA_BF16_H__
#define __CUDA_FP8_H__
#include <nccl.h>
#include <stdlib.h>
#include <string.h>

// ----- cuBLAS, whose headers want a part of CUDA that is no wheel: handles are pointers, statuses and modes
// are integers

typedef void *handle_t;

EXPORT int cublasCreate_v2(handle_t *handle) { *handle = calloc(1, 64); return 0; }
EXPORT int cublasDestroy_v2(handle_t handle) { free(handle); return 0; }
EXPORT int cublasGetMathMode(handle_t handle, int *mode) { *mode = 0; return 0; }
EXPORT int cublasGetPointerMode_v2(handle_t handle, int *mode) { *mode = 0; return 0; }

static __thread cudaStream_t blas_stream;  // of the products that have no stream argument

EXPORT int cublasSetStream_v2(handle_t handle, cudaStream_t stream) { blas_stream = stream; return 0; }

// Called by the stubs of products.
int nullcuda_gemm(void) {
    nullcuda_note(GEMMS, blas_stream);
    return 0;
}

EXPORT int cublasLtMatmul(handle_t handle, void *description, const void *alpha, const void *a,
                          void *a_layout, const void *b, void *b_layout, const void *beta, const void *c,
                          void *c_layout, void *d, void *d_layout, const void *algorithm, void *workspace,
                          size_t bytes, cudaStream_t stream) {
    nullcuda_note(GEMMS, stream);
    return 0;
}

EXPORT int cublasLtMatmulAlgoGetHeuristic(handle_t handle, void *description, void *a, void *b, void *c,
                                          void *d,
                                          void *preference, int asked, void *results, int *found) {
    memset(results, 0, 96);  // the bytes of a cublasLtMatmulHeuristicResult_t
    *found = 1;
    return 0;
}

// ----- NCCL: each process hears only itself. The hash over all calls must be equal on all processes.

EXPORT uint64_t nullcuda_collectives = 0xcbf29ce484222325UL;

struct ncclComm { int rank, size; };

static ncclResult_t collective(int kind, size_t count, ncclDataType_t type, int root, cudaStream_t stream) {
    const uint64_t call[4] = {kind, count, type, root};
    const unsigned char *bytes = (const unsigned char *)call;
    for (size_t i = 0; i < sizeof call; i++)
        nullcuda_collectives = (nullcuda_collectives ^ bytes[i]) * 0x100000001b3UL;
    nullcuda_note(COLLECTIVES, stream);
    return ncclSuccess;
}

EXPORT ncclResult_t ncclGetVersion(int *version) { *version = NCCL_VERSION_CODE; return ncclSuccess; }
EXPORT ncclResult_t ncclGetUniqueId(ncclUniqueId *id) { memset(id, 7, sizeof *id); return ncclSuccess; }
EXPORT const char *ncclGetErrorString(ncclResult_t result) { return "result of the null device"; }
EXPORT const char *ncclGetLastError(ncclComm_t comm) { return ""; }

EXPORT ncclResult_t ncclCommInitRankConfig(ncclComm_t *comm, int size, ncclUniqueId id, int rank,
                                           ncclConfig_t *config) {
    *comm = calloc(1, sizeof **comm);
    (*comm)->rank = rank;
    (*comm)->size = size;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclCommInitRank(ncclComm_t *comm, int size, ncclUniqueId id, int rank) {
    return ncclCommInitRankConfig(comm, size, id, rank, NULL);
}

EXPORT ncclResult_t ncclCommDestroy(ncclComm_t comm) { free(comm); return ncclSuccess; }
EXPORT ncclResult_t ncclCommAbort(ncclComm_t comm) { free(comm); return ncclSuccess; }
EXPORT ncclResult_t ncclCommCount(ncclComm_t comm, int *size) { *size = comm->size; return ncclSuccess; }
EXPORT ncclResult_t ncclCommUserRank(ncclComm_t comm, int *rank) { *rank = comm->rank; return ncclSuccess; }
EXPORT ncclResult_t ncclCommGetAsyncError(ncclComm_t comm, ncclResult_t *error) {
    *error = ncclSuccess;
    return ncclSuccess;
}

EXPORT ncclResult_t ncclAllReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                                  ncclComm_t comm,
                                  cudaStream_t s) {
    return collective(1, n, type, op, s);
}

EXPORT ncclResult_t ncclReduceScatter(const void *from, void *to, size_t n, ncclDataType_t type,
                                      ncclRedOp_t op,
                                      ncclComm_t comm, cudaStream_t s) {
    return collective(2, n, type, op, s);
}

EXPORT ncclResult_t ncclAllGather(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                  cudaStream_t s) {
    return collective(3, n, type, 0, s);
}

EXPORT ncclResult_t ncclBroadcast(const void *from, void *to, size_t n, ncclDataType_t type, int root,
                                  ncclComm_t comm,
                                  cudaStream_t s) {
    return collective(4, n, type, root, s);
}

EXPORT ncclResult_t ncclReduce(const void *from, void *to, size_t n, ncclDataType_t type, ncclRedOp_t op,
                               int root,
                               ncclComm_t comm, cudaStream_t s) {
    return collective(5, n, type, root, s);
}

EXPORT ncclResult_t ncclAlltoAll(const void *from, void *to, size_t n, ncclDataType_t type, ncclComm_t comm,
                                 cudaStream_t s) {
    return collective(6, n, type, 0, s);
}

// ----- driver

EXPORT CUresult cuDriverGetVersion(int *version) { *version = 13000; return 0; }
EXPORT CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = ordinal; return 0; }
EXPORT CUresult cuDeviceGetCount(int *count) { return (CUresult)cudaGetDeviceCount(count); }
EXPORT CUresult cuCtxGetCurrent(CUcontext *context) { *context = (CUcontext)16; return 0; }
EXPORT CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = "error of the null device";
    return 0;
}

EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
    *flags = 0;
    *active = 1;
    return 0;
}

EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    *context = (CUcontext)16;
    return 0;
}

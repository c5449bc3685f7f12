/* kernels/launch.cuh - the one place through which kernels are launched, and small things every .cu file needs.
 *
 * rf_launch queues a kernel on a stream, notes its label (error messages, counters) and turns a launch error into
 * RF_ERR_DEVICE. An empty grid is RF_OK and launches nothing. Execution errors surface at the next synchronise. */
#ifndef RF_KERNELS_LAUNCH_CUH
#define RF_KERNELS_LAUNCH_CUH

#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <atomic>

#include "core/backend.h"

static inline rf_status rf_cuda_fail(rf_error *err, const char *label, cudaError_t code) {
    return rf_fail(err, RF_ERR_DEVICE, "%s: %s (%s)", label, cudaGetErrorString(code), cudaGetErrorName(code));
}

template <typename... Params, typename... Args>
static rf_status rf_launch_with(rf_stream *stream, const char *label, rf_error *err, bool early,
                                void (*kernel)(Params...), dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
    if (grid.x == 0 || grid.y == 0 || grid.z == 0) return RF_OK;
    cudaLaunchConfig_t config = {};
    config.gridDim = grid;
    config.blockDim = block;
    config.dynamicSmemBytes = shared_bytes;
    config.stream = (cudaStream_t)rf_stream_native(stream);
    cudaLaunchAttribute attribute = {};
    if (early && rf_backend_sm(rf_stream_backend(stream)) >= 90) {
        attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
        attribute.val.programmaticStreamSerializationAllowed = 1;
        config.attrs = &attribute;
        config.numAttrs = 1;
    }
    cudaError_t code = cudaLaunchKernelEx(&config, kernel, Params(args)...);
    cudaError_t last = cudaGetLastError(); /* also clears what the launch left behind */
    if (code == cudaSuccess) code = last;
    if (code != cudaSuccess) return rf_cuda_fail(err, label, code);
    rf_stream_note_launch(stream, label);
    return RF_OK;
}

template <typename... Params, typename... Args>
static rf_status rf_launch(rf_stream *stream, const char *label, rf_error *err, void (*kernel)(Params...), dim3 grid,
                           dim3 block, size_t shared_bytes, Args... args) {
    return rf_launch_with(stream, label, err, false, kernel, grid, block, shared_bytes, args...);
}

/* The blocks of the kernel may take their places while the kernel before it still drains (programmatic dependent launch):
 * every thread of it must call rf_wait_for_previous before it touches global memory, to read or to write. */
template <typename... Params, typename... Args>
static rf_status rf_launch_early(rf_stream *stream, const char *label, rf_error *err, void (*kernel)(Params...),
                                 dim3 grid, dim3 block, size_t shared_bytes, Args... args) {
    return rf_launch_with(stream, label, err, true, kernel, grid, block, shared_bytes, args...);
}

/* Waits for the kernel before, then lets the one behind take its places as soon as all blocks of this one have theirs: it does
 * nothing but fetch constant weights (rf_gemm_args.w_is_constant) until this one is done. */
static __device__ __forceinline__ void rf_wait_for_previous(void) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

/* Prepares a kernel that lives in shared memory: allows more than 48 KB of it, and asks for the largest share of L1, because
 * the driver's own split may leave room for one block on an SM where two or three would fit. Once per kernel and device:
 * `done` is one bit per device, a static of the caller. Safe from several threads: the attributes may be set twice, never to
 * other values. */
static inline cudaError_t rf_allow_shared(const void *kernel, size_t shared_bytes, std::atomic<uint64_t> *done) {
    int device = 0;
    cudaError_t code = cudaGetDevice(&device);
    if (code != cudaSuccess) return code;
    uint64_t bit = device < 64 ? UINT64_C(1) << device : 0;
    if (bit && (done->load(std::memory_order_acquire) & bit)) return cudaSuccess;
    if (shared_bytes > 48 * 1024)
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)shared_bytes);
    if (code == cudaSuccess)
        code = cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared);
    if (code == cudaSuccess && bit) done->fetch_or(bit, std::memory_order_release);
    return code;
}

/* Host view of "num / den, rounded up"; also usable on the device. */
static __host__ __device__ inline int64_t rf_ceil_div(int64_t num, int64_t den) {
    return (num + den - 1) / den;
}

/* A grid-stride loop is used where a launch would pass this many blocks: enough to fill any card several times. */
#define RF_MAX_BLOCKS (1 << 20)

static inline unsigned rf_blocks_for(int64_t num, int64_t per_block) {
    int64_t blocks = rf_ceil_div(num, per_block);
    return (unsigned)(blocks < RF_MAX_BLOCKS ? blocks : RF_MAX_BLOCKS);
}

/* True if p is a multiple of `bytes` (a power of two). */
static inline bool rf_is_aligned(const void *p, size_t bytes) {
    return ((uintptr_t)p & (bytes - 1)) == 0;
}

#endif

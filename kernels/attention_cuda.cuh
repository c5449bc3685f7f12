/* kernels/attention_cuda.cuh - what the attention kernels share; private to attention*.cu.
 *
 * Query heads that share a key head are packed: a block works on "packed rows" r of one (batch, key head), where
 * packed row r is query r / group under query head kv_head * group + r % group, group = num_q_heads / num_kv_heads. So
 * K and V are read once for the whole group. */
#ifndef RF_KERNELS_ATTENTION_CUDA_CUH
#define RF_KERNELS_ATTENTION_CUDA_CUH

#include "kernels/attention.h"

/* Kernel parameters: the arguments with defaults resolved. Strides in elements. */
typedef struct {
    const void *q, *k, *v;
    void *out;
    float *lse;
    int64_t q_batch_stride, q_row_stride, q_head_stride;
    int64_t kv_batch_stride, kv_row_stride, kv_head_stride;
    int64_t out_batch_stride, out_row_stride, out_head_stride;
    const int32_t *q_rows, *kv_rows, *kv_lens;
    int64_t q_batch_stride_rows, kv_batch_stride_rows;
    int32_t range_end[RF_MAX_KEY_RANGES];   /* key index at which range i ends; INT32_MAX past the last range */
    int32_t range_shift[RF_MAX_KEY_RANGES]; /* row = key index + shift inside range i */
    int32_t num_keys;                       /* list length, sum of range lengths, or kv_len */
    int32_t first_key;                      /* row of key index 0 where keys are consecutive rows */
    int32_t q_len, num_rows;                /* num_rows = q_len * group, packed rows */
    int32_t group, num_q_heads, num_kv_heads, head_dim, batch;
    int32_t batch_first; /* blockIdx.z counts from here */
    int32_t mask, causal_block, q_pos_offset;
    const int32_t *q_pos_offsets; /* [batch], added to q_pos_offset; NULL: zeros */
    float scale_log2;             /* softmax_scale * log2(e) */
    /* where results go, and what they are joined with: attention.h; not in the mma, wgmma and small kernels */
    const int32_t *out_rows, *join_rows;
    const float *join_out, *join_lse;
    int64_t lse_slots, join_slots; /* lse_slots: q_len without out_rows */
    bool out_is_f32;
    int32_t num_splits;
    float *part_out; /* [num_splits, batch, num_kv_heads, num_rows, head_dim], normalised, if num_splits > 1 */
    float *part_lse; /* [num_splits, batch, num_kv_heads, num_rows], base 2 */
} rf_attention_params;

/* True if keys are not consecutive rows: a list, or more than one range. */
static inline bool rf_attention_is_indexed(const rf_attention_args *args) {
    return args->kv_rows != NULL || args->num_ranges > 1;
}
/* True if the result is not simply stored in dtype: the decode kernel's and the f32 kernel's work. */
static inline bool rf_attention_has_other_out(const rf_attention_args *args) {
    return (args->out_is_f32 && args->dtype != RF_DTYPE_F32) || args->out_rows || args->join_out;
}

rf_attention_params rf_attention_make_params(const rf_attention_args *args);

/* Both tensor-core kernels move 16 bytes at a time: every stride a multiple of 8 elements. */
rf_status rf_attention_check_strides(const rf_attention_args *args, rf_error *err);

/* Tiles of the mma.sync kernel: packed rows of a block. */
typedef enum {
    RF_ATTENTION_TILE_AUTO = 0,
    RF_ATTENTION_TILE_32,      /* 2 warps; few queries, long keys: loads are what counts */
    RF_ATTENTION_TILE_64,      /* 4 warps; every feature */
    RF_ATTENTION_TILE_64_PAIR, /* 8 warps, two halves take alternate key tiles; grids that leave SMs half empty */
    RF_ATTENTION_TILE_128      /* 4 warps of 32 rows; large dense grids: half the shared-memory reads per product */
} rf_attention_tile;

typedef struct {
    rf_attention_tile tile;
    int num_splits; /* key splits; more than 1 needs the workspace and a combine kernel */
    size_t workspace_bytes;
} rf_attention_mma_plan;

/* The chooser: fills the plan, or says why the kernel cannot take these arguments (err). The answer depends on shapes,
 * on which lists are given and on num_sms only. force: AUTO, or a tile for benchmarks and tests. */
rf_status rf_attention_mma_choose(const rf_attention_args *args, int num_sms, rf_attention_tile force,
                                  rf_attention_mma_plan *plan, rf_error *err);
/* Largest workspace that any choice of lists could ask for. */
size_t rf_attention_mma_workspace(const rf_attention_args *args, int num_sms);
/* stream NULL: only prepares the kernel (shared-memory limit), as far as a device is there. */
rf_status rf_attention_mma_run(rf_stream *stream, const rf_attention_args *args, const rf_attention_mma_plan *plan,
                               rf_error *err);

/* Few queries against many keys (attention_decode.cu), bf16. */
typedef struct {
    int row_tile;   /* packed rows of a block: 16, 32 or 64 */
    int cluster;    /* blocks that share the keys of a row tile and join their parts in shared memory: 1, 2, 4 or 8 */
    int num_splits; /* clusters that share them; more than 1 needs the workspace and a combine kernel */
    size_t workspace_bytes;
} rf_attention_decode_plan;

/* Fills the plan, or says why the kernel cannot take these arguments. Depends on shapes, sm and num_sms (0: unknown) only. */
rf_status rf_attention_decode_choose(const rf_attention_args *args, int sm, int num_sms, rf_attention_decode_plan *plan,
                                     rf_error *err);
/* True if AUTO should prefer it, by shape. */
bool rf_attention_decode_wins(const rf_attention_args *args);
rf_status rf_attention_decode_run(rf_stream *stream, const rf_attention_args *args,
                                  const rf_attention_decode_plan *plan, rf_error *err);

/* Plain f32 kernel. */
rf_status rf_attention_f32_check(const rf_attention_args *args, rf_error *err);
rf_status rf_attention_f32_run(rf_stream *stream, const rf_attention_args *args, rf_error *err);

/* Hopper kernel: RF_OK if it can take these arguments on a device of this architecture (0 = unknown, plan time). */
rf_status rf_attention_wgmma_check(const rf_attention_args *args, int sm, rf_error *err);
rf_status rf_attention_wgmma_run(rf_stream *stream, const rf_attention_args *args, rf_error *err);
/* True if AUTO should prefer it for these arguments on a device of num_sms SMs. */
bool rf_attention_wgmma_wins(const rf_attention_args *args, int num_sms);

/* Few keys, with or without rotary positions (attention_small.cu): RF_OK, or RF_ERR_UNSUPPORTED and why. */
rf_status rf_attention_small_check(const rf_attention_args *args, rf_error *err);
rf_status rf_attention_small_run(rf_stream *stream, const rf_attention_args *args, rf_error *err);

/* 16 bytes global -> shared (16-byte aligned); zeros if num_bytes is 0 (src must still be a valid address). */
static __device__ __forceinline__ void copy16(uint32_t dst, const void *src, int num_bytes) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst), "l"(src), "r"(num_bytes) : "memory");
}
static __device__ __forceinline__ float exp2_approx(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}

#endif

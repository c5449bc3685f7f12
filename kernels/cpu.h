/* kernels/cpu.h - what the CPU operators share: threads, multiversioned loops, vectorisable exp.
 *
 * Threads  every operator splits its work into tasks whose borders depend on shapes only, and runs them in one OpenMP
 *          loop; a task calls BLAS with one thread. So results have the same bits for every number of threads.
 *          Threads that wait spin: on cores shared with other work OMP_WAIT_POLICY=passive in the environment helps (2.6x
 *          for a small transformer layer on two cores with four other busy processes). The program shortens the spin.
 * RF_HOT   marks leaf loops that are compiled for AVX-512, AVX2 and plain x86-64 and chosen at load time. Rounding can
 *          differ between such machines in the last bits (fused multiply-add, widths of partial sums); on one machine it
 *          does not. OpenMP regions stay outside these functions: an outlined region would lose the target. */
#ifndef RF_KERNELS_CPU_H
#define RF_KERNELS_CPU_H

#include <math.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif

#include "kernels/checks.h"
#include "kernels/ops.h"

/* Sanitizers instrument code that runs before they are ready for the load-time choice: one version there. */
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__) || !defined(__x86_64__) || !defined(__GNUC__) ||     \
    (defined(__clang__) && __clang_major__ < 14) || !defined(__gnu_linux__)
#define RF_HOT
#elif defined(__clang__) && defined(__has_feature)
#if __has_feature(address_sanitizer) || __has_feature(thread_sanitizer) || __has_feature(memory_sanitizer)
#define RF_HOT
#endif
#endif
#ifndef RF_HOT
#define RF_HOT __attribute__((target_clones("avx512f", "avx2", "default")))
#endif

#define RF_INLINE static inline __attribute__((always_inline))

RF_INLINE int rf_cpu_threads(const rf_stream *stream) {
    int num = rf_backend_num_threads(rf_stream_backend(stream));
    return num < 1 ? 1 : num;
}

/* A region with less work than this, in elements touched or multiplications / 64, runs on the calling thread: waking others costs more,
 * much more where other programs want the cores too. Results do not depend on it. */
#define RF_SERIAL_WORK 16384

RF_INLINE int rf_cpu_thread_idx(void) {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

RF_INLINE int64_t rf_min64(int64_t a, int64_t b) {
    return a < b ? a : b;
}
RF_INLINE int64_t rf_max64(int64_t a, int64_t b) {
    return a > b ? a : b;
}
RF_INLINE int64_t rf_div_up(int64_t a, int64_t b) {
    return (a + b - 1) / b;
}

/* e^x within 2 units in the last place; 0 below -87.3, largest finite values above 88; NaN stays NaN. Branch-free, so
 * that a loop over it is vectorised. Cody-Waite reduction by a rounding constant and the Taylor polynomial of degree 7 on
 * [-ln2/2, ln2/2], whose remainder is 5e-9 relative. */
RF_INLINE float rf_exp(float x) {
    const float round_to_int = 12582912.0f; /* 1.5 * 2^23: adding it leaves an integer in the low bits */
    float c = x > 88.0f ? 88.0f : x;
    c = c < -87.3f ? -87.3f : c;
    float shifted = c * 1.44269504088896341f + round_to_int;
    float n = shifted - round_to_int;
    float r = (c - n * 0.693359375f) + n * 2.12194440e-4f; /* the first constant times n is exact */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits = (bits + 127u) << 23; /* the constant's own low bits are 0 */
    float scale;
    memcpy(&scale, &bits, sizeof scale);
    float y = p * scale;
    return x < -87.3f ? 0.0f : y;
}

/* u * sigmoid(s u): SiLU with s = 1. */
RF_INLINE float rf_silu(float u) {
    return u / (1.0f + rf_exp(-u));
}

/* 0.5 u (1 + tanh(z)) = u sigmoid(2 z): no cancellation for large negative u. */
RF_INLINE float rf_gelu_tanh(float u) {
    float z = 0.79788456080286536f * (u + 0.044715f * u * u * u);
    return u / (1.0f + rf_exp(-2.0f * z));
}

RF_INLINE float rf_gelu_erf(float u) {
    return 0.5f * u * erfcf(-0.70710678118654752f * u);
}

/* y[i] = act(y[i]) */
void rf_cpu_act(float *y, int64_t num, rf_act act);

/* C[m, n] = alpha * A B + beta * C with one BLAS thread; A [m, k] row stride lda; B [k, n], or [n, k] if b_is_nk. */
void rf_cpu_sgemm(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                  int64_t ldb, bool b_is_nk, float beta, float *c, int64_t ldc);
/* Before the parallel region that calls rf_cpu_sgemm. */
void rf_cpu_blas_single_thread(void);

/* out = x with its first num_pairs pairs turned by a table row (kernels/rope.h); `num` elements. out may be x. */
RF_INLINE void rf_cpu_turn(float *out, const float *x, const float *table, int64_t num_pairs, int64_t num) {
#pragma omp simd
    for (int64_t i = 0; i < num_pairs; i++) {
        float a = x[2 * i], b = x[2 * i + 1], c = table[2 * i], s = table[2 * i + 1];
        out[2 * i] = c * a - s * b;
        out[2 * i + 1] = s * a + c * b;
    }
    if (out == x) return;
#pragma omp simd
    for (int64_t i = 2 * num_pairs; i < num; i++) out[i] = x[i];
}

/* One row of a norm: shift and scale are table entries of that row, NULL if absent. y may be x. */
void rf_cpu_norm_row(float *y, const float *x, int64_t cols, rf_norm_kind kind, float eps, const float *weight,
                     const float *bias, const float *shift, const float *scale);
/* x += gate * term over a row; gate may be NULL (1). */
void rf_cpu_add_gated_row(float *x, const float *term, const float *gate, int64_t cols);

/* The table columns at `offset` that belong to `row`; NULL for offset -1. */
RF_INLINE const float *rf_cpu_modulation_row(const rf_modulation *mod, int64_t row, int64_t offset) {
    if (offset < 0) return NULL;
    int64_t group = row / mod->rows_per_group;
    int64_t table_row = mod->index ? mod->index[group] : group;
    return (const float *)mod->table + table_row * mod->stride + offset;
}

/* The operators, one file per header. */
rf_status rf_gemm_cpu(rf_stream *stream, const rf_gemm_args *args, rf_error *err);
rf_status rf_attention_cpu(rf_stream *stream, const rf_attention_args *args, rf_error *err);
size_t rf_attention_workspace_cpu(rf_backend *backend, const rf_attention_args *args);
rf_status rf_attention_merge_cpu(rf_stream *stream, const rf_attention_merge_args *args, rf_error *err);
rf_status rf_softmax_cpu(rf_stream *stream, const rf_softmax_args *args, rf_error *err);
rf_status rf_norm_cpu(rf_stream *stream, const rf_norm_args *args, rf_error *err);
rf_status rf_residual_cpu(rf_stream *stream, const rf_residual_args *args, rf_error *err);
rf_status rf_group_norm_cpu(rf_stream *stream, const rf_group_norm_args *args, rf_error *err);
rf_status rf_timestep_embed_cpu(rf_stream *stream, const rf_timestep_embed_args *args, rf_error *err);
rf_status rf_elementwise_cpu(rf_stream *stream, const rf_elementwise_args *args, rf_error *err);
rf_status rf_patchify_cpu(rf_stream *stream, const rf_patchify_args *args, rf_error *err);
rf_status rf_conv2d_cpu(rf_stream *stream, const rf_conv2d_args *args, rf_error *err);
size_t rf_conv2d_workspace_cpu(rf_backend *backend, const rf_conv2d_args *args);
rf_status rf_upsample2x_cpu(rf_stream *stream, const rf_upsample2x_args *args, rf_error *err);
rf_status rf_gather_rows_cpu(rf_stream *stream, const rf_rows_args *args, rf_error *err);
rf_status rf_scatter_rows_cpu(rf_stream *stream, const rf_rows_args *args, rf_error *err);
rf_status rf_reduce_pair_cpu(rf_stream *stream, const rf_reduce_pair_args *args, rf_error *err);
rf_status rf_group_copy_cpu(rf_stream *stream, const rf_group_copy_args *args, rf_error *err);
rf_status rf_combine_cpu(rf_stream *stream, const rf_combine_args *args, rf_error *err);
rf_status rf_curvature_cpu(rf_stream *stream, const rf_curvature_args *args, rf_error *err);
rf_status rf_post_cpu(rf_stream *stream, const rf_post_args *args, rf_error *err);
rf_status rf_row_merge_cpu(rf_stream *stream, const rf_row_merge_args *args, rf_error *err);
rf_status rf_token_select_cpu(rf_stream *stream, const rf_token_select_args *args, rf_error *err);
rf_status rf_row_score_cpu(rf_stream *stream, const rf_row_score_args *args, rf_error *err);
rf_status rf_rope_cpu(rf_stream *stream, const rf_rope_args *args, rf_error *err);
rf_status rf_temporal_attention_cpu(rf_stream *stream, const rf_temporal_attention_args *args, rf_error *err);
rf_status rf_embed_cpu(rf_stream *stream, const rf_embed_args *args, rf_error *err);
rf_status rf_qkv_rope_cpu(rf_stream *stream, const rf_qkv_rope_args *args, rf_error *err);
rf_status rf_swiglu_cpu(rf_stream *stream, const rf_swiglu_args *args, rf_error *err);
rf_status rf_head_stats_cpu(rf_stream *stream, const rf_head_stats_args *args, rf_error *err);
size_t rf_head_stats_workspace_cpu(rf_backend *backend, const rf_head_stats_args *args);
rf_status rf_attention_mass_cpu(rf_stream *stream, const rf_attention_mass_args *args, rf_error *err);
rf_status rf_attention_probs_cpu(rf_stream *stream, const rf_attention_probs_args *args, rf_error *err);
rf_status rf_cosine_rows_cpu(rf_stream *stream, const rf_cosine_rows_args *args, rf_error *err);
rf_status rf_select_smallest_cpu(rf_stream *stream, const rf_select_smallest_args *args, rf_error *err);
rf_status rf_argmax_cpu(rf_stream *stream, const rf_argmax_args *args, rf_error *err);
rf_status rf_sampler_step_cpu(rf_stream *stream, const rf_sampler_step_args *args, rf_error *err);
rf_status rf_step_advance_cpu(rf_stream *stream, const rf_step_advance_args *args, rf_error *err);
rf_status rf_fill_normal_cpu(rf_stream *stream, const rf_fill_normal_args *args, rf_error *err);

#endif

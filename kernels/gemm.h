/* kernels/gemm.h - y = act(alpha * x w^T + bias) + beta * y0, the Linear layer, optionally batched.
 *
 *   x     [num_batches][m, k]   dtype     row stride ldx elements
 *   w     [num_batches][n, k]   dtype     row stride ldw; with w_is_kn: [k, n]
 *   bias  [n]                   y_dtype   or NULL
 *   y0    [num_batches][m, n]   y_dtype   row stride ldy; NULL = no addend (beta unused); may be y itself
 *   y     [num_batches][m, n]   y_dtype   row stride ldy; written; may not alias x, w, bias
 * act is applied before the addend; CUDA refuses an act together with y0 == y (RF_ERR_UNSUPPORTED). GELU_TANH is 0.5 u (1 + tanh(sqrt(2/pi)(u + 0.044715 u^3))).
 * Batch strides are in elements; 0 shares the operand. w may be shared while x differs.
 * dtype f32 (true fp32 accumulation, no TF32) or bf16; y_dtype f32 or bf16 (bf16 only with bf16 inputs).
 * w_is_constant: the caller promises that nothing queued on the stream and possibly unfinished writes w or bias, as holds for a
 * model's weights after the synchronise that ends loading. CUDA may then fetch them before the kernels ahead of this one are
 * done. Never for a w that a kernel computes. It changes no bits; default false.
 * CUDA: k, ldx, ldw multiples of 8 (bf16) or 4 (f32) take the tensor-core/vector path; others are RF_ERR_SHAPE. */
#ifndef RF_KERNELS_GEMM_H
#define RF_KERNELS_GEMM_H

#include "core/backend.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_ACT_NONE = 0, RF_ACT_GELU_TANH, RF_ACT_GELU_ERF, RF_ACT_SILU } rf_act;

typedef struct {
    const void *x, *w, *bias, *y0;
    void *y;
    rf_dtype dtype, y_dtype;
    int64_t m, n, k;
    int64_t ldx, ldw, ldy;
    bool w_is_kn;
    bool w_is_constant;
    rf_act act;
    float alpha, beta;
    int64_t num_batches; /* 1 for a plain GEMM */
    int64_t x_batch_stride, w_batch_stride, y_batch_stride;
} rf_gemm_args;

/* alpha 1, beta 0, dense strides, one batch, y_dtype = dtype; pointers NULL. */
rf_gemm_args rf_gemm_args_default(rf_dtype dtype, int64_t m, int64_t n, int64_t k);

/* CUDA only: how algorithms are chosen in phase PLAN. Without tuning it is cuBLASLt's first heuristic choice or, for few rows
 * and constant weights, a kernel of gemv.h (1 to 8 rows) or, on Hopper, of gemm_stream.h (large weights) or gemm_skinny.h:
 * the same in every process. With tuning all candidates are timed on the device, cold weights, and the fastest bit-stable
 * one is kept; save/load carries choices between processes so that bits do not depend on timing noise. A file of another
 * card or cuBLASLt version is ignored with a log line. No-ops on the host backend. */
rf_status rf_gemm_set_tuning(rf_stream *stream, bool tune, rf_error *err);
rf_status rf_gemm_tuning_load(rf_stream *stream, const char *path, rf_error *err); /* a missing file is RF_OK */
rf_status rf_gemm_tuning_save(rf_stream *stream, const char *path, rf_error *err);
/* True if the stream holds choices that were tuned since the last load or save. */
bool rf_gemm_tuning_changed(const rf_stream *stream);

#ifdef __cplusplus
}
#endif
#endif

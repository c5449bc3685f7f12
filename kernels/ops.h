/* kernels/ops.h - the operator table: one row per operator, one table per backend.
 *
 * An operator is a function (stream, args, err) -> status. Args are plain structs of pointers, sizes and strides; pointers
 * are device pointers of the stream's backend unless a field says "host".
 *
 * Plan time: called with stream = NULL an operator only answers "could this run?" - it checks shapes, dtypes, strides and
 * alignment rules, reads no pointer (they may be NULL), queues nothing, and returns RF_OK or the reason
 * (RF_ERR_SHAPE, RF_ERR_DTYPE, RF_ERR_UNSUPPORTED). The same checks run again on every call.
 * Run time: RF_OK means queued (CUDA) or done (CPU). No operator allocates or synchronises in phase RUN.
 *
 * dtypes: the CPU table computes f32 only (weights are converted when a model loads). The CUDA table takes f32, and bf16
 * storage with f32 accumulation. Anything else is RF_ERR_DTYPE. */
#ifndef RF_KERNELS_OPS_H
#define RF_KERNELS_OPS_H

#include "core/backend.h"
#include "kernels/attention.h"
#include "kernels/cache.h"
#include "kernels/conv.h"
#include "kernels/elementwise.h"
#include "kernels/gemm.h"
#include "kernels/kv.h"
#include "kernels/kvq.h"
#include "kernels/norm.h"
#include "kernels/reduce.h"
#include "kernels/rope.h"
#include "kernels/rows.h"
#include "kernels/sampler.h"
#include "kernels/text.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    const char *name; /* "cpu", "cuda" */

    rf_status (*gemm)(rf_stream *, const rf_gemm_args *, rf_error *);
    rf_status (*attention)(rf_stream *, const rf_attention_args *, rf_error *);
    size_t (*attention_workspace)(rf_backend *, const rf_attention_args *); /* bytes; 0 = none needed */
    rf_status (*attention_merge)(rf_stream *, const rf_attention_merge_args *, rf_error *);
    rf_status (*softmax)(rf_stream *, const rf_softmax_args *, rf_error *);

    rf_status (*norm)(rf_stream *, const rf_norm_args *, rf_error *);
    rf_status (*residual)(rf_stream *, const rf_residual_args *, rf_error *);
    rf_status (*group_norm)(rf_stream *, const rf_group_norm_args *, rf_error *);

    rf_status (*timestep_embed)(rf_stream *, const rf_timestep_embed_args *, rf_error *);
    rf_status (*elementwise)(rf_stream *, const rf_elementwise_args *, rf_error *);
    rf_status (*patchify)(rf_stream *, const rf_patchify_args *, rf_error *);

    rf_status (*conv2d)(rf_stream *, const rf_conv2d_args *, rf_error *);
    size_t (*conv2d_workspace)(rf_backend *, const rf_conv2d_args *);
    rf_status (*upsample2x)(rf_stream *, const rf_upsample2x_args *, rf_error *);

    rf_status (*gather_rows)(rf_stream *, const rf_rows_args *, rf_error *);
    rf_status (*scatter_rows)(rf_stream *, const rf_rows_args *, rf_error *);
    rf_status (*reduce_pair)(rf_stream *, const rf_reduce_pair_args *, rf_error *);

    rf_status (*group_copy)(rf_stream *, const rf_group_copy_args *, rf_error *);
    rf_status (*combine)(rf_stream *, const rf_combine_args *, rf_error *);
    rf_status (*curvature)(rf_stream *, const rf_curvature_args *, rf_error *);
    rf_status (*post)(rf_stream *, const rf_post_args *, rf_error *);
    rf_status (*row_merge)(rf_stream *, const rf_row_merge_args *, rf_error *);
    rf_status (*token_select)(rf_stream *, const rf_token_select_args *, rf_error *);
    rf_status (*row_score)(rf_stream *, const rf_row_score_args *, rf_error *);

    rf_status (*rope)(rf_stream *, const rf_rope_args *, rf_error *);
    rf_status (*temporal_attention)(rf_stream *, const rf_temporal_attention_args *, rf_error *);

    rf_status (*embed)(rf_stream *, const rf_embed_args *, rf_error *);
    rf_status (*qkv_rope)(rf_stream *, const rf_qkv_rope_args *, rf_error *);
    rf_status (*swiglu)(rf_stream *, const rf_swiglu_args *, rf_error *);
    rf_status (*head_stats)(rf_stream *, const rf_head_stats_args *, rf_error *);
    size_t (*head_stats_workspace)(rf_backend *, const rf_head_stats_args *);
    rf_status (*attention_mass)(rf_stream *, const rf_attention_mass_args *, rf_error *);
    rf_status (*attention_probs)(rf_stream *, const rf_attention_probs_args *, rf_error *);
    rf_status (*cosine_rows)(rf_stream *, const rf_cosine_rows_args *, rf_error *);
    rf_status (*select_smallest)(rf_stream *, const rf_select_smallest_args *, rf_error *);
    rf_status (*argmax)(rf_stream *, const rf_argmax_args *, rf_error *);

    rf_status (*kv_columns)(rf_stream *, const rf_kv_columns_args *, rf_error *);
    size_t (*kv_columns_workspace)(rf_backend *, const rf_kv_columns_args *);
    rf_status (*kv_loss)(rf_stream *, const rf_kv_loss_args *, rf_error *);
    size_t (*kv_loss_workspace)(rf_backend *, const rf_kv_loss_args *);
    rf_status (*kv_norms)(rf_stream *, const rf_kv_norms_args *, rf_error *);
    rf_status (*kv_copy)(rf_stream *, const rf_kv_copy_args *, rf_error *);
    rf_status (*kv_append)(rf_stream *, const rf_kv_append_args *, rf_error *);
    rf_status (*kv_evict)(rf_stream *, const rf_kv_evict_args *, rf_error *);
    size_t (*kv_evict_workspace)(rf_backend *, const rf_kv_evict_args *);
    rf_status (*kvq_pack)(rf_stream *, const rf_kvq_pack_args *, rf_error *);
    rf_status (*kvq_unpack)(rf_stream *, const rf_kvq_unpack_args *, rf_error *);
    rf_status (*kvq_attention)(rf_stream *, const rf_kvq_attention_args *, rf_error *);
    size_t (*kvq_attention_workspace)(rf_backend *, const rf_kvq_attention_args *);
    rf_status (*kvq_direction)(rf_stream *, const rf_kvq_direction_args *, rf_error *);

    rf_status (*sampler_step)(rf_stream *, const rf_sampler_step_args *, rf_error *);
    rf_status (*step_advance)(rf_stream *, const rf_step_advance_args *, rf_error *);
    rf_status (*fill_normal)(rf_stream *, const rf_fill_normal_args *, rf_error *);
} rf_ops;

const rf_ops *rf_ops_cpu(void);
const rf_ops *rf_ops_cuda(void); /* NULL in a build without CUDA */
/* The table of a backend; never NULL for an open backend. */
const rf_ops *rf_ops_for(const rf_backend *backend);

#ifdef __cplusplus
}
#endif
#endif

/* kernels/ops_cuda.h - the CUDA operators, one function per row of the table in kernels/ops.h (kernels/ops_cuda.cu).
 *
 * Private to kernels/: callers go through rf_ops_cuda(). Every function checks its arguments with rf_<op>_check
 * (kernels/checks.h), returns there if stream is NULL, and otherwise queues work on the stream and nothing else. */
#ifndef RF_KERNELS_OPS_CUDA_H
#define RF_KERNELS_OPS_CUDA_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

/* gemm.cu */
rf_status rf_gemm_cuda(rf_stream *stream, const rf_gemm_args *args, rf_error *err);

/* conv.cu, group_norm.cu */
rf_status rf_conv2d_cuda(rf_stream *stream, const rf_conv2d_args *args, rf_error *err);
size_t rf_conv2d_workspace_cuda(rf_backend *backend, const rf_conv2d_args *args);
rf_status rf_group_norm_cuda(rf_stream *stream, const rf_group_norm_args *args, rf_error *err);
rf_status rf_upsample2x_cuda(rf_stream *stream, const rf_upsample2x_args *args, rf_error *err);

/* attention.cu: chooser and entry; attention_mma.cu, attention_f32.cu, attention_wgmma.cu, attention_small.cu:
 * kernels */
rf_status rf_attention_cuda(rf_stream *stream, const rf_attention_args *args, rf_error *err);
size_t rf_attention_workspace_cuda(rf_backend *backend, const rf_attention_args *args);
rf_status rf_attention_merge_cuda(rf_stream *stream, const rf_attention_merge_args *args, rf_error *err);
rf_status rf_softmax_cuda(rf_stream *stream, const rf_softmax_args *args, rf_error *err);

/* norm.cu */
rf_status rf_norm_cuda(rf_stream *stream, const rf_norm_args *args, rf_error *err);
rf_status rf_residual_cuda(rf_stream *stream, const rf_residual_args *args, rf_error *err);

/* elementwise.cu */
rf_status rf_timestep_embed_cuda(rf_stream *stream, const rf_timestep_embed_args *args, rf_error *err);
rf_status rf_elementwise_cuda(rf_stream *stream, const rf_elementwise_args *args, rf_error *err);
rf_status rf_patchify_cuda(rf_stream *stream, const rf_patchify_args *args, rf_error *err);

/* rows.cu, reduce.cu */
rf_status rf_gather_rows_cuda(rf_stream *stream, const rf_rows_args *args, rf_error *err);
rf_status rf_scatter_rows_cuda(rf_stream *stream, const rf_rows_args *args, rf_error *err);
rf_status rf_reduce_pair_cuda(rf_stream *stream, const rf_reduce_pair_args *args, rf_error *err);

/* cache.cu, curvature.cu, token_select.cu, row_score.cu */
rf_status rf_group_copy_cuda(rf_stream *stream, const rf_group_copy_args *args, rf_error *err);
rf_status rf_combine_cuda(rf_stream *stream, const rf_combine_args *args, rf_error *err);
rf_status rf_curvature_cuda(rf_stream *stream, const rf_curvature_args *args, rf_error *err);
rf_status rf_post_cuda(rf_stream *stream, const rf_post_args *args, rf_error *err);
rf_status rf_row_merge_cuda(rf_stream *stream, const rf_row_merge_args *args, rf_error *err);
rf_status rf_token_select_cuda(rf_stream *stream, const rf_token_select_args *args, rf_error *err);
rf_status rf_row_score_cuda(rf_stream *stream, const rf_row_score_args *args, rf_error *err);

/* rope.cu, temporal_attention.cu */
rf_status rf_rope_cuda(rf_stream *stream, const rf_rope_args *args, rf_error *err);
rf_status rf_temporal_attention_cuda(rf_stream *stream, const rf_temporal_attention_args *args, rf_error *err);

/* text.cu, head_stats.cu, attention_taps.cu, text_select.cu */
rf_status rf_embed_cuda(rf_stream *stream, const rf_embed_args *args, rf_error *err);
rf_status rf_qkv_rope_cuda(rf_stream *stream, const rf_qkv_rope_args *args, rf_error *err);
rf_status rf_swiglu_cuda(rf_stream *stream, const rf_swiglu_args *args, rf_error *err);
rf_status rf_head_stats_cuda(rf_stream *stream, const rf_head_stats_args *args, rf_error *err);
size_t rf_head_stats_workspace_cuda(rf_backend *backend, const rf_head_stats_args *args);
rf_status rf_attention_mass_cuda(rf_stream *stream, const rf_attention_mass_args *args, rf_error *err);
rf_status rf_attention_probs_cuda(rf_stream *stream, const rf_attention_probs_args *args, rf_error *err);
rf_status rf_cosine_rows_cuda(rf_stream *stream, const rf_cosine_rows_args *args, rf_error *err);
rf_status rf_select_smallest_cuda(rf_stream *stream, const rf_select_smallest_args *args, rf_error *err);
rf_status rf_argmax_cuda(rf_stream *stream, const rf_argmax_args *args, rf_error *err);

/* kv.cu, kv_evict.cu */
rf_status rf_kv_columns_cuda(rf_stream *stream, const rf_kv_columns_args *args, rf_error *err);
size_t rf_kv_columns_workspace_cuda(rf_backend *backend, const rf_kv_columns_args *args);
rf_status rf_kv_loss_cuda(rf_stream *stream, const rf_kv_loss_args *args, rf_error *err);
size_t rf_kv_loss_workspace_cuda(rf_backend *backend, const rf_kv_loss_args *args);
rf_status rf_kv_norms_cuda(rf_stream *stream, const rf_kv_norms_args *args, rf_error *err);
rf_status rf_kv_copy_cuda(rf_stream *stream, const rf_kv_copy_args *args, rf_error *err);
rf_status rf_kv_append_cuda(rf_stream *stream, const rf_kv_append_args *args, rf_error *err);
rf_status rf_kv_evict_cuda(rf_stream *stream, const rf_kv_evict_args *args, rf_error *err);
size_t rf_kv_evict_workspace_cuda(rf_backend *backend, const rf_kv_evict_args *args);

/* kvq.cu */
rf_status rf_kvq_pack_cuda(rf_stream *stream, const rf_kvq_pack_args *args, rf_error *err);
rf_status rf_kvq_unpack_cuda(rf_stream *stream, const rf_kvq_unpack_args *args, rf_error *err);
rf_status rf_kvq_attention_cuda(rf_stream *stream, const rf_kvq_attention_args *args, rf_error *err);
size_t rf_kvq_attention_workspace_cuda(rf_backend *backend, const rf_kvq_attention_args *args);
rf_status rf_kvq_direction_cuda(rf_stream *stream, const rf_kvq_direction_args *args, rf_error *err);

/* sampler.cu */
rf_status rf_sampler_step_cuda(rf_stream *stream, const rf_sampler_step_args *args, rf_error *err);
rf_status rf_step_advance_cuda(rf_stream *stream, const rf_step_advance_args *args, rf_error *err);
rf_status rf_fill_normal_cuda(rf_stream *stream, const rf_fill_normal_args *args, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif

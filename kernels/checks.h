/* kernels/checks.h - what every table checks about an operator's arguments before it looks at its own limits.
 *
 * rf_<op>_check      shapes, strides, dtypes and enum values; reads no pointer: what an operator does with stream = NULL.
 *                    RF_ERR_SHAPE a size or stride; RF_ERR_DTYPE a dtype that no table takes; RF_ERR_ARGUMENT the rest.
 *                    Optional operands count as present if their pointer is not NULL (it is compared, not read), so at
 *                    plan time any non-NULL value asks for the checks of that operand.
 * rf_<op>_check_run  the same, then that every pointer the call needs is there and that operands which may not be one
 *                    buffer are not (RF_ERR_ARGUMENT). A call with no rows needs no pointers.
 * Both accept f32 and bf16. A table adds its own rules: the CPU table takes f32 only, the CUDA table has alignment rules
 * and head dims. Empty calls (m, rows, len, batch or num of 0) are fine and do nothing. */
#ifndef RF_KERNELS_CHECKS_H
#define RF_KERNELS_CHECKS_H

#include "kernels/ops.h"

#ifdef __cplusplus
extern "C" {
#endif

rf_status rf_gemm_check(const rf_gemm_args *args, rf_error *err);
rf_status rf_attention_check(const rf_attention_args *args, rf_error *err);
rf_status rf_attention_merge_check(const rf_attention_merge_args *args, rf_error *err);
rf_status rf_softmax_check(const rf_softmax_args *args, rf_error *err);
rf_status rf_norm_check(const rf_norm_args *args, rf_error *err);
rf_status rf_residual_check(const rf_residual_args *args, rf_error *err);
rf_status rf_group_norm_check(const rf_group_norm_args *args, rf_error *err);
rf_status rf_timestep_embed_check(const rf_timestep_embed_args *args, rf_error *err);
rf_status rf_elementwise_check(const rf_elementwise_args *args, rf_error *err);
rf_status rf_patchify_check(const rf_patchify_args *args, rf_error *err);
rf_status rf_conv2d_check(const rf_conv2d_args *args, rf_error *err);
rf_status rf_upsample2x_check(const rf_upsample2x_args *args, rf_error *err);
rf_status rf_rows_check(const rf_rows_args *args, rf_error *err);
rf_status rf_reduce_pair_check(const rf_reduce_pair_args *args, rf_error *err);
rf_status rf_group_copy_check(const rf_group_copy_args *args, rf_error *err);
rf_status rf_combine_check(const rf_combine_args *args, rf_error *err);
rf_status rf_post_check(const rf_post_args *args, rf_error *err);
rf_status rf_row_merge_check(const rf_row_merge_args *args, rf_error *err);
rf_status rf_rope_check(const rf_rope_args *args, rf_error *err);
rf_status rf_temporal_attention_check(const rf_temporal_attention_args *args, rf_error *err);
rf_status rf_sampler_step_check(const rf_sampler_step_args *args, rf_error *err);
rf_status rf_step_advance_check(const rf_step_advance_args *args, rf_error *err);
rf_status rf_fill_normal_check(const rf_fill_normal_args *args, rf_error *err);

rf_status rf_gemm_check_run(const rf_gemm_args *args, rf_error *err);
rf_status rf_attention_check_run(const rf_attention_args *args, rf_error *err);
rf_status rf_attention_merge_check_run(const rf_attention_merge_args *args, rf_error *err);
rf_status rf_softmax_check_run(const rf_softmax_args *args, rf_error *err);
rf_status rf_norm_check_run(const rf_norm_args *args, rf_error *err);
rf_status rf_residual_check_run(const rf_residual_args *args, rf_error *err);
rf_status rf_group_norm_check_run(const rf_group_norm_args *args, rf_error *err);
rf_status rf_timestep_embed_check_run(const rf_timestep_embed_args *args, rf_error *err);
rf_status rf_elementwise_check_run(const rf_elementwise_args *args, rf_error *err);
rf_status rf_patchify_check_run(const rf_patchify_args *args, rf_error *err);
rf_status rf_conv2d_check_run(const rf_conv2d_args *args, rf_error *err);
rf_status rf_upsample2x_check_run(const rf_upsample2x_args *args, rf_error *err);
rf_status rf_rows_check_run(const rf_rows_args *args, rf_error *err);
rf_status rf_reduce_pair_check_run(const rf_reduce_pair_args *args, rf_error *err);
rf_status rf_group_copy_check_run(const rf_group_copy_args *args, rf_error *err);
rf_status rf_combine_check_run(const rf_combine_args *args, rf_error *err);
rf_status rf_post_check_run(const rf_post_args *args, rf_error *err);
rf_status rf_row_merge_check_run(const rf_row_merge_args *args, rf_error *err);
rf_status rf_rope_check_run(const rf_rope_args *args, rf_error *err);
rf_status rf_temporal_attention_check_run(const rf_temporal_attention_args *args, rf_error *err);
rf_status rf_sampler_step_check_run(const rf_sampler_step_args *args, rf_error *err);
rf_status rf_step_advance_check_run(const rf_step_advance_args *args, rf_error *err);
rf_status rf_fill_normal_check_run(const rf_fill_normal_args *args, rf_error *err);

/* RF_ERR_WORKSPACE with need and have, if need > 0 and the buffer is NULL or smaller. op: the operator's name. */
rf_status rf_check_workspace(const char *op, const void *workspace, size_t have_bytes, size_t need_bytes,
                             rf_error *err);
/* RF_ERR_DTYPE unless dtype is f32: the rule of the CPU table. what: "attention dtype", ... */
rf_status rf_check_f32(const char *what, rf_dtype dtype, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif

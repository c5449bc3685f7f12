/* kernels/ops_cuda.cu - the CUDA table. */
#include "kernels/ops_cuda.h"

static const rf_ops cuda_table = {
    /* name */ "cuda",
    rf_gemm_cuda,
    rf_attention_cuda,
    rf_attention_workspace_cuda,
    rf_attention_merge_cuda,
    rf_softmax_cuda,
    rf_norm_cuda,
    rf_residual_cuda,
    rf_group_norm_cuda,
    rf_timestep_embed_cuda,
    rf_elementwise_cuda,
    rf_patchify_cuda,
    rf_conv2d_cuda,
    rf_conv2d_workspace_cuda,
    rf_upsample2x_cuda,
    rf_gather_rows_cuda,
    rf_scatter_rows_cuda,
    rf_reduce_pair_cuda,
    rf_group_copy_cuda,
    rf_combine_cuda,
    rf_curvature_cuda,
    rf_post_cuda,
    rf_row_merge_cuda,
    rf_token_select_cuda,
    rf_row_score_cuda,
    rf_rope_cuda,
    rf_temporal_attention_cuda,
    rf_embed_cuda,
    rf_qkv_rope_cuda,
    rf_swiglu_cuda,
    rf_head_stats_cuda,
    rf_head_stats_workspace_cuda,
    rf_attention_mass_cuda,
    rf_attention_probs_cuda,
    rf_cosine_rows_cuda,
    rf_select_smallest_cuda,
    rf_argmax_cuda,
    rf_sampler_step_cuda,
    rf_step_advance_cuda,
    rf_fill_normal_cuda,
};

extern "C" const rf_ops *rf_ops_cuda(void) {
    return &cuda_table;
}

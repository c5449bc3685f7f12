/* kernels/ops.c - the CPU table, the choice of a table, and defaults of argument structs. */
#include "kernels/ops.h"

#include <math.h>

#include "kernels/cpu.h"
#include "kernels/kv_cpu.h"

static const rf_ops cpu_table = {
    .name = "cpu",
    .gemm = rf_gemm_cpu,
    .attention = rf_attention_cpu,
    .attention_workspace = rf_attention_workspace_cpu,
    .attention_merge = rf_attention_merge_cpu,
    .softmax = rf_softmax_cpu,
    .norm = rf_norm_cpu,
    .residual = rf_residual_cpu,
    .group_norm = rf_group_norm_cpu,
    .timestep_embed = rf_timestep_embed_cpu,
    .elementwise = rf_elementwise_cpu,
    .patchify = rf_patchify_cpu,
    .conv2d = rf_conv2d_cpu,
    .conv2d_workspace = rf_conv2d_workspace_cpu,
    .upsample2x = rf_upsample2x_cpu,
    .gather_rows = rf_gather_rows_cpu,
    .scatter_rows = rf_scatter_rows_cpu,
    .reduce_pair = rf_reduce_pair_cpu,
    .group_copy = rf_group_copy_cpu,
    .combine = rf_combine_cpu,
    .curvature = rf_curvature_cpu,
    .post = rf_post_cpu,
    .row_merge = rf_row_merge_cpu,
    .token_select = rf_token_select_cpu,
    .row_score = rf_row_score_cpu,
    .rope = rf_rope_cpu,
    .temporal_attention = rf_temporal_attention_cpu,
    .embed = rf_embed_cpu,
    .qkv_rope = rf_qkv_rope_cpu,
    .swiglu = rf_swiglu_cpu,
    .head_stats = rf_head_stats_cpu,
    .head_stats_workspace = rf_head_stats_workspace_cpu,
    .attention_mass = rf_attention_mass_cpu,
    .attention_probs = rf_attention_probs_cpu,
    .cosine_rows = rf_cosine_rows_cpu,
    .select_smallest = rf_select_smallest_cpu,
    .argmax = rf_argmax_cpu,
    .kv_columns = rf_kv_columns_cpu,
    .kv_columns_workspace = rf_kv_columns_workspace_cpu,
    .kv_loss = rf_kv_loss_cpu,
    .kv_loss_workspace = rf_kv_loss_workspace_cpu,
    .kv_norms = rf_kv_norms_cpu,
    .kv_copy = rf_kv_copy_cpu,
    .kv_append = rf_kv_append_cpu,
    .kv_evict = rf_kv_evict_cpu,
    .kv_evict_workspace = rf_kv_evict_workspace_cpu,
    .kvq_pack = rf_kvq_pack_cpu,
    .kvq_unpack = rf_kvq_unpack_cpu,
    .kvq_attention = rf_kvq_attention_cpu,
    .kvq_attention_workspace = rf_kvq_attention_workspace_cpu,
    .kvq_direction = rf_kvq_direction_cpu,
    .sampler_step = rf_sampler_step_cpu,
    .step_advance = rf_step_advance_cpu,
    .fill_normal = rf_fill_normal_cpu,
};

const rf_ops *rf_ops_cpu(void) {
    return &cpu_table;
}

const rf_ops *rf_ops_for(const rf_backend *backend) {
    if (rf_backend_get_kind(backend) != RF_BACKEND_CUDA) return rf_ops_cpu();
    return rf_ops_cuda();
}

rf_gemm_args rf_gemm_args_default(rf_dtype dtype, int64_t m, int64_t n, int64_t k) {
    return (rf_gemm_args){
        .dtype = dtype,
        .y_dtype = dtype,
        .m = m,
        .n = n,
        .k = k,
        .ldx = k,
        .ldw = k,
        .ldy = n,
        .act = RF_ACT_NONE,
        .alpha = 1.0f,
        .num_batches = 1,
        .x_batch_stride = m * k,
        .w_batch_stride = n * k,
        .y_batch_stride = m * n,
    };
}

rf_attention_args rf_attention_args_packed(rf_dtype dtype, int64_t batch, int64_t len, int num_heads, int head_dim,
                                           const void *qkv, void *out) {
    int64_t width = (int64_t)num_heads * head_dim;
    const char *base = qkv;
    size_t part_bytes = (size_t)width * rf_dtype_bytes(dtype);
    return (rf_attention_args){
        .q = base,
        .k = base ? base + part_bytes : NULL,
        .v = base ? base + 2 * part_bytes : NULL,
        .out = out,
        .dtype = dtype,
        .batch = batch,
        .num_q_heads = num_heads,
        .num_kv_heads = num_heads,
        .head_dim = head_dim,
        .q_len = len,
        .kv_len = len,
        .q_batch_stride = len * 3 * width,
        .q_row_stride = 3 * width,
        .q_head_stride = head_dim,
        .kv_batch_stride = len * 3 * width,
        .kv_row_stride = 3 * width,
        .kv_head_stride = head_dim,
        .out_batch_stride = len * width,
        .out_row_stride = width,
        .out_head_stride = head_dim,
        .softmax_scale = 1.0f / sqrtf((float)head_dim),
        .mask = RF_MASK_NONE,
        .kernel = RF_ATTENTION_AUTO,
    };
}

rf_elementwise_args rf_elementwise_args_default(rf_dtype x_dtype, rf_dtype y_dtype, int64_t rows, int64_t cols) {
    return (rf_elementwise_args){
        .add_period = 1,
        .x_dtype = x_dtype,
        .add_dtype = x_dtype,
        .y_dtype = y_dtype,
        .rows = rows,
        .cols = cols,
        .x_scale = 1.0f,
        .act = RF_ACT_NONE,
        .channels = 1,
    };
}

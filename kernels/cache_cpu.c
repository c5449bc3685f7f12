/* kernels/cache_cpu.c
 * Maths    groups of rows into rings of snapshots, weighted sums of snapshots, and computed rows among remembered ones; see
 *          cache.h.
 * Tasks    one row each. */
#include "kernels/cpu.h"

/* The group of the other side that packed group g is. */
RF_INLINE int64_t group_of(const int32_t *index, int64_t g) {
    return index ? index[g] : g;
}

/* dst may be a or b. */
RF_HOT static void subtract_row(float *dst, const float *a, const float *b, int64_t cols) {
#pragma omp simd
    for (int64_t c = 0; c < cols; c++) dst[c] = a[c] - b[c];
}

rf_status rf_group_copy_cpu(rf_stream *stream, const rf_group_copy_args *a, rf_error *err) {
    RF_TRY(stream ? rf_group_copy_check_run(a, err) : rf_group_copy_check(a, err));
    RF_TRY(rf_check_f32("group_copy: a_dtype", a->a_dtype, err));
    if (a->b) RF_TRY(rf_check_f32("group_copy: b_dtype", a->b_dtype, err));
    RF_TRY(rf_check_f32("group_copy: dst_dtype", a->dst_dtype, err));
    if (!stream || a->groups == 0 || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "group_copy");
    int64_t b_cols = a->b ? a->b_cols : 0;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t i = 0; i < a->groups * a->rows; i++) {
        int64_t g = i / a->rows, r = i % a->rows, dst_group = group_of(a->dst_index, g);
        const float *from = (const float *)a->a + (group_of(a->a_index, g) * a->rows + r) * a->a_ld;
        float *to = (float *)a->dst + (dst_group * a->rows + r) * a->dst_ld;
        if (a->dst_slot) to += a->dst_slot[dst_group] * a->dst_slot_stride;
        if (a->b)
            subtract_row(to, from, (const float *)a->b + (group_of(a->b_index, g) * a->rows + r) * a->b_ld, b_cols);
        if (to != from) memcpy(to + b_cols, from + b_cols, (size_t)(a->cols - b_cols) * sizeof(float));
    }
    return RF_OK;
}

/* dst = base (its first base_cols columns) + sum_j w_j ring_j over a row; a slot of weight 0 is not read. dst may be base. */
RF_HOT static void combine_row(float *dst, const float *base, int64_t base_cols, const float *ring, int64_t slot_stride,
                               const float *weights, int num_slots, int64_t cols) {
    for (int64_t c0 = 0; c0 < cols; c0 += 256) {
        float sum[256];
        int64_t num = cols - c0 < 256 ? cols - c0 : 256, num_base = base_cols - c0 < num ? base_cols - c0 : num;
        for (int64_t c = 0; c < num_base; c++) sum[c] = base[c0 + c];
        for (int64_t c = num_base > 0 ? num_base : 0; c < num; c++) sum[c] = 0;
        for (int j = 0; j < num_slots; j++) {
            float w = weights[j];
            if (w == 0) continue;
            const float *snapshot = ring + j * slot_stride + c0;
            for (int64_t c = 0; c < num; c++) sum[c] += w * snapshot[c];
        }
        for (int64_t c = 0; c < num; c++) dst[c0 + c] = sum[c];
    }
}

rf_status rf_combine_cpu(rf_stream *stream, const rf_combine_args *a, rf_error *err) {
    RF_TRY(stream ? rf_combine_check_run(a, err) : rf_combine_check(a, err));
    RF_TRY(rf_check_f32("combine: ring_dtype", a->ring_dtype, err));
    if (a->base) RF_TRY(rf_check_f32("combine: base_dtype", a->base_dtype, err));
    RF_TRY(rf_check_f32("combine: dst_dtype", a->dst_dtype, err));
    if (!stream || a->groups == 0 || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "combine");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t i = 0; i < a->groups * a->rows; i++) {
        int64_t g = i / a->rows, r = i % a->rows, src = group_of(a->src_index, g) * a->rows + r;
        int64_t row_class = a->row_class ? rf_min64(a->row_class[src], a->num_classes - 1) : 0;
        const float *weights = a->weights + (src / a->rows * a->num_classes + row_class) * a->num_slots;
        const float *base = NULL;
        if (a->base) base = (const float *)a->base + (group_of(a->base_index, g) * a->rows + r) * a->base_ld;
        combine_row((float *)a->dst + (group_of(a->dst_index, g) * a->rows + r) * a->dst_ld, base,
                    base ? a->base_cols : 0, (const float *)a->ring + src * a->cols, a->slot_stride, weights,
                    a->num_slots, a->cols);
    }
    return RF_OK;
}

rf_status rf_row_merge_cpu(rf_stream *stream, const rf_row_merge_args *a, rf_error *err) {
    RF_TRY(stream ? rf_row_merge_check_run(a, err) : rf_row_merge_check(a, err));
    RF_TRY(rf_check_f32("row_merge: x_dtype", a->x_dtype, err));
    RF_TRY(rf_check_f32("row_merge: dtype", a->dtype, err));
    if ((a->ring_a && a->gate_a >= 0) || a->gate_b >= 0) RF_TRY(rf_check_f32("row_merge: mod", a->mod.dtype, err));
    if (!stream || a->groups == 0 || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "row_merge");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t row = 0; row < a->groups * a->rows; row++) {
        int64_t state = group_of(a->index, row / a->rows) * a->rows + row % a->rows, cols = a->cols;
        float *x = (float *)a->x + row * cols, *b = (float *)a->ring_b + state * cols;
        if (a->place[row] >= 0)
            memcpy(b, (const float *)a->y + a->place[row] * cols, (size_t)cols * sizeof(float));
        else if (a->ring_a)
            rf_cpu_add_gated_row(x, (const float *)a->ring_a + state * cols,
                                 rf_cpu_modulation_row(&a->mod, row, a->gate_a), cols);
        rf_cpu_add_gated_row(x, b, rf_cpu_modulation_row(&a->mod, row, a->gate_b), cols);
    }
    return RF_OK;
}

rf_status rf_post_cpu(rf_stream *stream, const rf_post_args *a, rf_error *err) {
    RF_TRY(stream ? rf_post_check_run(a, err) : rf_post_check(a, err));
    if (!stream) return RF_OK;
    rf_stream_note_launch(stream, "post");
    memcpy(a->host + (*a->step + a->step_offset) * a->stride, a->src, (size_t)a->num * sizeof(float));
    *a->host_count = ++*a->count;
    return RF_OK;
}

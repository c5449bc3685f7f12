/* kernels/rows_cpu.c - packed copies of listed rows; see rows.h. One row per task. */
#include "kernels/cpu.h"

static rf_status copy_rows(rf_stream *stream, const rf_rows_args *a, bool gather, rf_error *err) {
    RF_TRY(stream ? rf_rows_check_run(a, err) : rf_rows_check(a, err));
    RF_TRY(rf_check_f32("rows: dtype", a->dtype, err));
    if (!stream || a->num_rows == 0) return RF_OK;
    rf_stream_note_launch(stream, gather ? "gather_rows" : "scatter_rows");
    int64_t src_ld = a->src_ld ? a->src_ld : a->cols, dst_ld = a->dst_ld ? a->dst_ld : a->cols;
    size_t row_bytes = (size_t)a->cols * sizeof(float);
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->num_rows * a->cols > 4 * RF_SERIAL_WORK)
    for (int64_t i = 0; i < a->num_rows; i++) {
        int64_t from = gather ? a->rows[i] : i, to = gather ? i : a->rows[i];
        memcpy((float *)a->dst + to * dst_ld, (const float *)a->src + from * src_ld, row_bytes);
    }
    return RF_OK;
}

rf_status rf_gather_rows_cpu(rf_stream *stream, const rf_rows_args *a, rf_error *err) {
    return copy_rows(stream, a, true, err);
}

rf_status rf_scatter_rows_cpu(rf_stream *stream, const rf_rows_args *a, rf_error *err) {
    return copy_rows(stream, a, false, err);
}

/* kernels/ops_no_cuda.c - what the CUDA files would define, for a build without them. */
#include "kernels/ops.h"

const rf_ops *rf_ops_cuda(void) {
    return NULL;
}

/* The CPU's GEMM has one way to run: nothing to tune, nothing to keep. */
rf_status rf_gemm_set_tuning(rf_stream *stream, bool tune, rf_error *err) {
    return RF_OK;
}
rf_status rf_gemm_tuning_load(rf_stream *stream, const char *path, rf_error *err) {
    return RF_OK;
}
rf_status rf_gemm_tuning_save(rf_stream *stream, const char *path, rf_error *err) {
    return RF_OK;
}
bool rf_gemm_tuning_changed(const rf_stream *stream) {
    return false;
}

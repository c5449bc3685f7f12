/* kernels/attention_wgmma.cu - Hopper attention; not built yet, refuses everything. */
#include "kernels/attention_cuda.cuh"

rf_status rf_attention_wgmma_check(const rf_attention_args *args, int sm, rf_error *err) {
    return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: this build has no wgmma kernel");
}
rf_status rf_attention_wgmma_run(rf_stream *stream, const rf_attention_args *args, rf_error *err) {
    return rf_attention_wgmma_check(args, 0, err);
}
bool rf_attention_wgmma_wins(const rf_attention_args *args) {
    return false;
}

/* kernels/kv_cpu.h - the operators of kv.h and kvq.h in the CPU table. */
#ifndef RF_KERNELS_KV_CPU_H
#define RF_KERNELS_KV_CPU_H

#include "kernels/kv.h"
#include "kernels/kvq.h"

rf_status rf_kv_columns_cpu(rf_stream *stream, const rf_kv_columns_args *args, rf_error *err);
size_t rf_kv_columns_workspace_cpu(rf_backend *backend, const rf_kv_columns_args *args);
rf_status rf_kv_loss_cpu(rf_stream *stream, const rf_kv_loss_args *args, rf_error *err);
size_t rf_kv_loss_workspace_cpu(rf_backend *backend, const rf_kv_loss_args *args);
rf_status rf_kv_norms_cpu(rf_stream *stream, const rf_kv_norms_args *args, rf_error *err);
rf_status rf_kv_copy_cpu(rf_stream *stream, const rf_kv_copy_args *args, rf_error *err);
rf_status rf_kv_append_cpu(rf_stream *stream, const rf_kv_append_args *args, rf_error *err);
rf_status rf_kv_evict_cpu(rf_stream *stream, const rf_kv_evict_args *args, rf_error *err);
size_t rf_kv_evict_workspace_cpu(rf_backend *backend, const rf_kv_evict_args *args);

rf_status rf_kvq_pack_cpu(rf_stream *stream, const rf_kvq_pack_args *args, rf_error *err);
rf_status rf_kvq_unpack_cpu(rf_stream *stream, const rf_kvq_unpack_args *args, rf_error *err);
rf_status rf_kvq_attention_cpu(rf_stream *stream, const rf_kvq_attention_args *args, rf_error *err);
size_t rf_kvq_attention_workspace_cpu(rf_backend *backend, const rf_kvq_attention_args *args);
rf_status rf_kvq_direction_cpu(rf_stream *stream, const rf_kvq_direction_args *args, rf_error *err);

#endif

/* dlm/kv_tables.h - what is calibrated or learned for a model's cache rules, read from files beside it.
 *
 * kv.json            {"compresskv": {"num_layers", "num_q_heads", "heads": [[query heads that score layer 0], ...],
 *                    "layer_shares": [numbers >= 0, one a layer]}, "razor": {"num_layers", "num_q_heads", "heads": [[retrieval heads
 *                    of layer 0], ...]}}; `refrain calibrate --kv` writes it (dlm/kv_calibrate.h)
 * gates/retention.safetensors, gates/retention-global.safetensors (rules with alloc=flat-all)
 *                    gates: layers.L.fc1.weight [M, hidden] fc1.bias [M], fc2.weight [N, M] fc2.bias [N], fc3 likewise or absent; the
 *                    last one has Hkv rows; f32, f16 or bf16. samples/train/train_gates.py makes them */
#ifndef RF_DLM_KV_TABLES_H
#define RF_DLM_KV_TABLES_H

#include "caching/kv/kv.h"
#include "dlm/model.h"

#ifdef __cplusplus
extern "C" {
#endif

enum { RF_KV_GATE_PARTS = 3 };

/* y = W x + b, SiLU between parts; log retention = ln sigmoid of the last. Host f32. */
typedef struct {
    int num_parts;
    int32_t in[RF_KV_GATE_PARTS], out[RF_KV_GATE_PARTS];
    float *weight[RF_KV_GATE_PARTS], *bias[RF_KV_GATE_PARTS]; /* [out][in], [out] */
} rf_kv_gate;

typedef struct {
    float *layer_shares;               /* [L], or NULL */
    uint8_t *head_list, *head_classes; /* [L][Hq] 0 or 1, or NULL */
    rf_kv_gate *gates;                 /* [L], or NULL */
    int num_layers;
} rf_kv_tables;

/* Reads what the rule wants, and nothing else. calibration: a file of the kind that is wanted, or NULL for the model's folder.
 * RF_ERR_MISSING: no such file or table; RF_ERR_CONFIG, RF_ERR_SHAPE: of another model. *out is empty then. */
rf_status rf_kv_tables_open(rf_kv_tables *out, const rf_kv_rule *rule, const rf_text_model *model,
                            const char *calibration, rf_error *err);
void rf_kv_tables_close(rf_kv_tables *tables);
/* out [num][Hkv] = ln beta of rows x [num][hidden]: the normed input of the layer's attention. work: 2 * most columns of a part. */
void rf_kv_gate_apply(const rf_kv_gate *gate, const float *x, int64_t num, float *out, float *work);
int64_t rf_kv_gate_work(const rf_kv_gate *gate);

#ifdef __cplusplus
}
#endif
#endif

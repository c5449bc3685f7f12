/* dlm/model.h - a text model's blueprint and weights: read-only after loading, shared by sessions.
 *
 * Layouts are normalised while loading so that the executor sees one form: q, k and v rows fused, gate and up rows fused, a
 * head that is always there (tied: the embedding itself). */
#ifndef RF_DLM_MODEL_H
#define RF_DLM_MODEL_H

#include "core/backend.h"
#include "core/params.h"
#include "dlm/config.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    float *attention_norm, *ffn_norm; /* [hidden] f32 */
    float *q_norm, *k_norm;           /* [head_dim] f32, or NULL */
    void *qkv;                        /* [(Hq + 2 Hkv) * D, hidden]: q rows, k rows, v rows */
    void *qkv_bias;                   /* [(Hq + 2 Hkv) * D] model dtype, or NULL */
    void *out;                        /* [hidden, Hq * D] */
    void *gate_up; /* [2 * ffn, hidden]: row 2c is gate row c, row 2c + 1 up row c (rf_swiglu interleaved) */
    void *down;    /* [hidden, ffn] */
} rf_text_layer;

typedef struct {
    rf_text_desc desc;
    rf_dtype dtype; /* of weights, activations and caches: f32, or bf16 on CUDA */
    rf_backend *backend;
    rf_params *params;
    void *embedding; /* [vocab, hidden] */
    void *head;      /* [vocab, hidden]; == embedding if tied */
    float *final_norm;
    rf_text_layer *layers;
    float *rope;            /* device f32 [rope_positions][head_dim / 2][2] = (cos, sin) */
    int64_t rope_positions; /* = desc.max_positions */
    char *folder;           /* it was loaded from; NULL: synthetic */
} rf_text_model;

/* dir: a Hugging Face folder (config.json, safetensors, sharded or not). dtype f32 or bf16 (CUDA). Weight names that the
 * architecture needs and the files lack, shapes that disagree with the config, and names that have no place in the architecture (but
 * for stored rotary frequencies, and the head of a tied model) are refused and named. Rows of the file past the vocabulary are not
 * kept. Tensors go from the map to the device in pieces of a few MB: host memory does not grow with the model. At most one rounding. */
rf_status rf_text_model_load(rf_text_model **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err);
/* Weights drawn on the device, normal with std 1/sqrt(fan_in), an untied embedding 1, biases 0.02; norms 1; max_positions > 0 replaces
 * desc's (rope table). */
rf_status rf_text_model_synthetic(rf_text_model **out, rf_backend *backend, const rf_text_desc *desc, rf_dtype dtype,
                                  uint64_t seed, int64_t max_positions, rf_error *err);
void rf_text_model_close(rf_text_model *model); /* NULL is a no-op */
/* Is dir a text model's folder (rather than an image model's or a world's)? True for families that are not supported too, so that
 * loading names them. */
bool rf_text_is_text(const char *dir);
/* Host table of (cos, sin) as the families compute it: inverse frequencies in f32 (f64 power rounded), llama3 scaling if used, angle
 * position * inv_freq in f32, then cos and sin rounded to f32 (torch's may be one unit off). out [positions][head_dim / 2][2]. */
void rf_text_rope_table(float *out, const rf_text_desc *desc, int64_t positions);
size_t rf_text_model_bytes(const rf_text_model *model);
int64_t rf_text_model_num_params(const rf_text_model *model); /* a tied head counts once; without the rotary table */

#ifdef __cplusplus
}
#endif
#endif

/* dlm/config.h - config.json of a text model to a description of it.
 *
 * Reads  Hugging Face folders by model_type / architectures: llama, qwen2, qwen3 (autoregressive); llada and Dream (masked
 *        diffusion, bidirectional); sdar (block diffusion, also TraDo). A family is a config reader and a weight map
 *        (dlm/model.h); the executor knows the fields below and no family's name.
 * Refused by name: mixture of experts, sliding windows that are on, rope types other than default and llama3, activations
 *        other than SiLU, ALiBi, attention or MLP biases where no field below holds them, multi-query layouts that do not divide. */
#ifndef RF_DLM_CONFIG_H
#define RF_DLM_CONFIG_H

#include "core/json.h"
#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum {
    RF_TEXT_CAUSAL = 0,    /* autoregressive: row i predicts token i + 1 */
    RF_TEXT_BIDIRECTIONAL, /* masked diffusion, every row sees every row */
    RF_TEXT_BLOCK_CAUSAL   /* block diffusion: row i sees rows of blocks <= its own; blocks are aligned to position 0 */
} rf_text_attention;

typedef struct {
    char family[16];            /* "llama", "qwen2", "qwen3", "llada", "dream", "sdar": for people */
    int64_t vocab, hidden, ffn; /* ffn: width of one of gate and up */
    int64_t
        embedding_rows; /* of the file's embedding and head (LLaDA's embedding_size); 0 = vocab. Rows past vocab are not kept */
    int num_layers, num_q_heads, num_kv_heads, head_dim;
    int64_t max_positions; /* prompt and output together */
    double norm_eps, rope_theta;
    struct { /* Llama-3.1: wavelengths above original / low_factor are divided by factor, in between blended */
        bool used;
        double factor, low_factor, high_factor;
        int64_t original;
    } rope_scaling;
    bool qkv_bias, qk_norm, tied_head;
    rf_text_attention attention;
    int32_t block;      /* block-causal: tokens a block, default of decoding; 0 otherwise */
    int32_t shift;      /* row p - shift predicts position p: 1 for causal models and Dream, 0 for LLaDA and SDAR */
    int32_t mask_id;    /* -1: none */
    int32_t eos_ids[8]; /* end of text and end of turn */
    int num_eos;
    int32_t bos_id, pad_id; /* -1: none */
} rf_text_desc;

/* dir: the folder's path for messages; generation_config.json is read too if there is one (eos ids). */
rf_status rf_text_config_read(rf_text_desc *out, const char *dir, rf_error *err);
/* From parsed JSON (generation may be NULL). */
rf_status rf_text_config_parse(rf_text_desc *out, const rf_json *config, const rf_json *generation, rf_error *err);
/* "llada-8b", "dream-7b", "sdar-8b", "sdar-4b", "llama-3-8b", "llama-3.1-8b", "qwen2.5-7b", "qwen3-8b". RF_ERR_ARGUMENT lists them. */
rf_status rf_text_config_builtin(rf_text_desc *out, const char *name, rf_error *err);
const char *rf_text_config_builtin_name(int index); /* NULL past the end */
rf_status rf_text_desc_check(const rf_text_desc *desc, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif

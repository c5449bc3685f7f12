/* samples/refrain/info_text.c */
#include "samples/refrain/info_text.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>

#include "core/file.h"
#include "core/memory.h"
#include "dlm/chat_template.h"
#include "dlm/config.h"
#include "dlm/tokenizer.h"
#include "samples/refrain/info_world.h"
#include "samples/refrain/program.h"
#include "samples/refrain/report.h"

typedef struct {
    const char *dir;
    rf_text_desc desc;
    weights_summary weights;
    rf_tokenizer *tokenizer; /* NULL: no tokenizer.json */
    char chat[256];          /* "yes", "no", or why it cannot be used */
} text_summary;

static rf_status read_text(text_summary *s, rf_error *err) {
    rf_weights *weights = NULL;
    rf_chat_template *chat = NULL;
    rf_error why = {0};
    RF_TRY(rf_text_config_read(&s->desc, s->dir, err));
    rf_status st = rf_weights_open(&weights, s->dir, err);
    if (st == RF_OK) s->weights = weights_summarize(weights);
    rf_weights_close(weights);
    RF_TRY(st);
    char *path = rf_path_join(s->dir, "tokenizer.json");
    if (!path) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", s->dir);
    bool exists = rf_path_exists(path);
    rf_free(path);
    if (exists) RF_TRY(rf_tokenizer_open(&s->tokenizer, s->dir, err));
    st = rf_chat_template_open(&chat, s->dir, &why);
    rf_chat_template_close(chat);
    snprintf(s->chat, sizeof s->chat, "%.240s", st == RF_OK ? "yes" : st == RF_ERR_MISSING ? "no" : why.message);
    return RF_OK;
}

static const char *attention_name(rf_text_attention attention) {
    switch (attention) {
    case RF_TEXT_CAUSAL: return "causal";
    case RF_TEXT_BIDIRECTIONAL: return "bidirectional";
    case RF_TEXT_BLOCK_CAUSAL: break;
    }
    return "block-causal";
}

static const char *kind_name(const rf_text_desc *d) {
    switch (d->attention) {
    case RF_TEXT_CAUSAL: return "autoregressive";
    case RF_TEXT_BIDIRECTIONAL: return "masked diffusion";
    case RF_TEXT_BLOCK_CAUSAL: break;
    }
    return "block diffusion";
}

/* Keys and values of one token. */
static double kv_bytes(const rf_text_desc *d, rf_dtype dtype) {
    return 2.0 * d->num_layers * d->num_kv_heads * d->head_dim * (double)rf_dtype_bytes(dtype);
}

static double weight_bytes(const text_summary *s, rf_dtype dtype) {
    return (double)s->weights.num_params * (double)rf_dtype_bytes(dtype);
}

static void print_id(const text_summary *s, const char *name, int32_t id) {
    size_t len = 0;
    if (id < 0) return;
    const char *bytes = s->tokenizer ? rf_tokenizer_token_bytes(s->tokenizer, id, &len) : NULL;
    printf("  %s %d", name, (int)id);
    if (!bytes) return;
    char text[64];
    snprintf(text, sizeof text, " %.*s", (int)(len < 60 ? len : 60), bytes); /* not zero-terminated */
    print_clean(text);
}

static void print_text(const text_summary *s) {
    const rf_text_desc *d = &s->desc;
    char f32[32], bf16[32], kv32[32], kv16[32];
    format_bytes(f32, sizeof f32, weight_bytes(s, RF_DTYPE_F32));
    format_bytes(bf16, sizeof bf16, weight_bytes(s, RF_DTYPE_BF16));
    format_bytes(kv32, sizeof kv32, kv_bytes(d, RF_DTYPE_F32));
    format_bytes(kv16, sizeof kv16, kv_bytes(d, RF_DTYPE_BF16));
    printf("model        %s\n", s->dir);
    printf("family       %s: %s, %s attention", d->family, kind_name(d), attention_name(d->attention));
    if (d->block > 0) printf(", blocks of %d", (int)d->block);
    printf("\nparameters   %.2f M in %s (%zu tensors)%s\n", (double)s->weights.num_params / 1e6, s->weights.dtype,
           s->weights.num_tensors, d->tied_head ? ", head tied to the embedding" : "");
    printf("layers       %d of width %" PRId64 ", %d query heads of %d on %d of keys and values, ffn %" PRId64 "%s%s\n",
           d->num_layers, d->hidden, d->num_q_heads, d->head_dim, d->num_kv_heads, d->ffn,
           d->qkv_bias ? ", biases of q, k, v" : "", d->qk_norm ? ", norms of q and k" : "");
    printf("positions    %" PRId64 ", rope base %g%s\n", d->max_positions, d->rope_theta,
           d->rope_scaling.used ? ", Llama-3.1 scaling" : "");
    printf("predicts     position p from row p%s\n", d->shift ? " - 1" : "");
    printf("vocabulary   %" PRId64 "\n", d->vocab);
    if (s->tokenizer) {
        printf("tokenizer    %d ids\n", (int)rf_tokenizer_vocab_size(s->tokenizer));
    } else {
        printf("tokenizer    none (--tokens takes ids)\n");
    }
    printf("special    ");
    for (int i = 0; i < d->num_eos; i++) print_id(s, "end", d->eos_ids[i]);
    print_id(s, "mask", d->mask_id);
    print_id(s, "begin", d->bos_id);
    print_id(s, "pad", d->pad_id);
    printf("\nchat         ");
    print_clean(s->chat);
    printf("\nweights      %s in f32, %s in bf16\n", f32, bf16);
    printf("cache        %s of keys and values a token in f32, %s in bf16\n", kv32, kv16);
}

static cJSON *id_or_null(int32_t id) {
    return id < 0 ? cJSON_CreateNull() : cJSON_CreateNumber(id);
}

static rf_status print_text_json(const text_summary *s, rf_error *err) {
    const rf_text_desc *d = &s->desc;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "command", "info");
    cJSON_AddStringToObject(root, "model", s->dir);
    cJSON_AddStringToObject(root, "family", d->family);
    cJSON_AddStringToObject(root, "kind", kind_name(d));
    cJSON_AddStringToObject(root, "attention", attention_name(d->attention));
    cJSON_AddItemToObject(root, "weights", weights_summary_json(&s->weights));
    cJSON_AddNumberToObject(root, "vocab", (double)d->vocab);
    cJSON_AddNumberToObject(root, "hidden", (double)d->hidden);
    cJSON_AddNumberToObject(root, "ffn", (double)d->ffn);
    cJSON_AddNumberToObject(root, "layers", d->num_layers);
    cJSON_AddNumberToObject(root, "q_heads", d->num_q_heads);
    cJSON_AddNumberToObject(root, "kv_heads", d->num_kv_heads);
    cJSON_AddNumberToObject(root, "head_dim", d->head_dim);
    cJSON_AddNumberToObject(root, "max_positions", (double)d->max_positions);
    cJSON_AddNumberToObject(root, "rope_theta", d->rope_theta);
    cJSON_AddBoolToObject(root, "rope_scaling", d->rope_scaling.used);
    cJSON_AddBoolToObject(root, "qkv_bias", d->qkv_bias);
    cJSON_AddBoolToObject(root, "qk_norm", d->qk_norm);
    cJSON_AddBoolToObject(root, "tied_head", d->tied_head);
    cJSON_AddNumberToObject(root, "block", d->block);
    cJSON_AddNumberToObject(root, "shift", d->shift);
    cJSON_AddItemToObject(root, "mask_id", id_or_null(d->mask_id));
    cJSON_AddItemToObject(root, "bos_id", id_or_null(d->bos_id));
    cJSON_AddItemToObject(root, "pad_id", id_or_null(d->pad_id));
    cJSON *ends = cJSON_AddArrayToObject(root, "eos_ids");
    for (int i = 0; i < d->num_eos; i++) cJSON_AddItemToArray(ends, cJSON_CreateNumber(d->eos_ids[i]));
    cJSON_AddItemToObject(root, "tokenizer_ids",
                          s->tokenizer ? cJSON_CreateNumber(rf_tokenizer_vocab_size(s->tokenizer))
                                       : cJSON_CreateNull());
    cJSON_AddBoolToObject(root, "chat_template", strcmp(s->chat, "yes") == 0);
    cJSON *memory = cJSON_AddObjectToObject(root, "memory");
    cJSON_AddNumberToObject(memory, "weights_f32_bytes", weight_bytes(s, RF_DTYPE_F32));
    cJSON_AddNumberToObject(memory, "weights_bf16_bytes", weight_bytes(s, RF_DTYPE_BF16));
    cJSON_AddNumberToObject(memory, "token_f32_bytes", kv_bytes(d, RF_DTYPE_F32));
    cJSON_AddNumberToObject(memory, "token_bf16_bytes", kv_bytes(d, RF_DTYPE_BF16));
    return report_print_json(root, err);
}

rf_status info_text(const char *dir, bool json, rf_error *err) {
    text_summary s = {.dir = dir};
    rf_status st = read_text(&s, err);
    if (st == RF_OK) {
        if (json) {
            st = print_text_json(&s, err);
        } else {
            print_text(&s);
        }
    }
    rf_tokenizer_close(s.tokenizer);
    return st;
}

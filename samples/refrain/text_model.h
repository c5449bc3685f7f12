/* samples/refrain/text_model.h - a text model as the commands open it: weights, tokenizer, what its folder says about decoding. */
#ifndef REFRAIN_TEXT_MODEL_H
#define REFRAIN_TEXT_MODEL_H

#include "dlm/decode.h"
#include "dlm/tokenizer.h"
#include "samples/refrain/program.h"

typedef struct {
    char *path;       /* as loaded; of a synthetic model its config */
    const char *name; /* last element of path, for people */
    rf_backend *backend;
    rf_dtype dtype;
    rf_text_model *model;
    rf_tokenizer *tokenizer;        /* NULL: synthetic weights, or a folder without tokenizer.json */
    int32_t usual_new, usual_block; /* of generation_config.json: tokens to make, tokens a block; 0 = not said */
} opened_text;

/* name: as for find_text; synthetic: a built-in config whose weights are drawn, or NULL; max_positions of it, 0 = its own. A tokenizer that
 * does not fit the model is refused. Also after a failure what is there must be given back: close_text_model. */
rf_status open_text_model(opened_text *out, const char *name, const char *synthetic, int64_t max_positions,
                          const char *device, int threads, const char *dtype, const rf_log *log, rf_error *err);
void close_text_model(opened_text *text);

/* A small autoregressive model on the same device for commit rule guided. Its tokens must be those of the main model. */
rf_status open_text_guide(rf_text_model **out, const opened_text *main_model, const char *name, rf_error *err);

bool text_is_causal(const opened_text *text);
/* The model's options for max_new tokens (0 = as usual, else 128): blocks as its folder says, where they divide max_new. */
rf_decode_options text_base_options(const opened_text *text, int32_t max_new);
/* What a decode is compared with: one token a pass, every row computed, nothing reused; distribution and seed as in `options`. */
rf_decode_options text_reference_options(const rf_decode_options *options, const opened_text *text);
/* Tokens a block as decoding will take them. */
int32_t text_block_of(const rf_decode_options *options, const opened_text *text);

/* Bytes that are valid UTF-8 from the start on; num_bytes if all are. */
size_t text_utf8_valid(const char *bytes, size_t num_bytes);
/* Text to ids. what: names the text in messages. RF_ERR_ARGUMENT: no tokenizer, or invalid UTF-8. */
rf_status text_encode(const opened_text *text, const char *bytes, size_t num_bytes, bool add_special, const char *what,
                      rf_token_ids *out, rf_error *err);
/* Ids to valid UTF-8 without special tokens. Without a tokenizer: numbers with commas. */
rf_status text_decode(const opened_text *text, const int32_t *ids, int32_t num, rf_text *out, rf_error *err);

#endif

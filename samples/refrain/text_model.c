/* samples/refrain/text_model.c */
#include "samples/refrain/text_model.h"

#include <inttypes.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/json.h"
#include "core/memory.h"

#define USUAL_NEW 128

/* ---- opening ---- */

static rf_status check_fit(const opened_text *t, rf_error *err) {
    const rf_text_desc *d = &t->model->desc;
    int32_t vocab = rf_tokenizer_vocab_size(t->tokenizer), mask = rf_tokenizer_special_ids(t->tokenizer).mask;
    if (vocab > d->vocab)
        return rf_fail(err, RF_ERR_CONFIG, "%s: the tokenizer has ids up to %d, the model only %jd of them", t->path,
                       (int)vocab - 1, (intmax_t)d->vocab);
    if (mask >= 0 && d->mask_id >= 0 && mask != d->mask_id)
        return rf_fail(err, RF_ERR_CONFIG, "%s: the tokenizer's mask token is id %d, the model's %d", t->path,
                       (int)mask, (int)d->mask_id);
    return RF_OK;
}

static rf_status open_tokenizer(opened_text *t, rf_error *err) {
    char *path = rf_path_join(t->path, "tokenizer.json");
    if (!path) return rf_fail(err, RF_ERR_MEMORY, "%s: no memory for a path", t->path);
    bool exists = rf_path_exists(path);
    rf_free(path);
    if (!exists) return RF_OK;
    RF_TRY(rf_tokenizer_open(&t->tokenizer, t->path, err));
    return check_fit(t, err);
}

/* What cannot be read there leaves the defaults: config.json has been read with it already. */
static void read_usual(opened_text *t) {
    char *path = rf_path_join(t->path, "generation_config.json");
    rf_json *doc = NULL;
    int64_t v = 0;
    if (path && rf_path_exists(path) && rf_json_open(&doc, path, NULL) == RF_OK) {
        const rf_json_value *root = rf_json_root(doc);
        if (rf_json_opt_int(doc, root, "block_length", 1, INT32_MAX, 0, &v, NULL) == RF_OK) t->usual_block = (int32_t)v;
        if (rf_json_opt_int(doc, root, "max_new_tokens", 1, INT32_MAX, 0, &v, NULL) == RF_OK) t->usual_new = (int32_t)v;
        if (!v && rf_json_opt_int(doc, root, "gen_length", 1, INT32_MAX, 0, &v, NULL) == RF_OK)
            t->usual_new = (int32_t)v;
    }
    rf_json_close(doc);
    rf_free(path);
}

/* Weights are drawn or copied, so what is larger than the memory would end the process. */
static rf_status check_memory(const opened_text *t, const rf_text_desc *d, rf_error *err) {
    long pages = sysconf(_SC_PHYS_PAGES), page_bytes = sysconf(_SC_PAGESIZE);
    if (rf_backend_get_kind(t->backend) != RF_BACKEND_CPU || pages <= 0 || page_bytes <= 0) return RF_OK;
    double heads = d->num_q_heads + 2.0 * d->num_kv_heads, width = d->head_dim;
    double layer = (double)d->hidden * (heads * width + d->num_q_heads * width + 3.0 * (double)d->ffn);
    double params = d->num_layers * layer + (double)(d->vocab * d->hidden) * (d->tied_head ? 1 : 2);
    double need = params * (double)rf_dtype_bytes(t->dtype), have = (double)pages * (double)page_bytes;
    if (need < have) return RF_OK;
    char needs[32], has[32];
    format_bytes(needs, sizeof needs, need);
    format_bytes(has, sizeof has, have);
    return rf_fail(err, RF_ERR_MEMORY, "%s: %.2f G parameters in %s are %s; this machine has %s", t->path, params / 1e9,
                   rf_dtype_name(t->dtype), needs, has);
}

static rf_status check_is_text(const char *path, rf_error *err) {
    if (!rf_path_is_dir(path) || rf_text_is_text(path)) return RF_OK;
    const char *hint = rf_world_is_world(path) ? ", but a world (refrain world)" : "";
    char *index = rf_path_join(path, "model_index.json");
    if (!hint[0] && index && rf_path_exists(index)) hint = ", but one of images (refrain image)";
    rf_free(index);
    return rf_fail(err, RF_ERR_ARGUMENT, "%s: not a text model%s", path, hint);
}

rf_status open_text_model(opened_text *out, const char *name, const char *synthetic, int64_t max_positions,
                          const char *device, int threads, const char *dtype, const rf_log *log, rf_error *err) {
    *out = (opened_text){0};
    rf_text_desc desc;
    if (synthetic) {
        rf_status st = rf_text_config_builtin(&desc, synthetic, err);
        if (st != RF_OK) return rf_fail_prefix(err, st, "--synthetic-weights");
    }
    RF_TRY(open_place(&out->path, &out->backend, &out->dtype, name, synthetic, find_text, device, threads, dtype, log,
                      err));
    out->name = short_name(out->path);
    if (!synthetic) {
        RF_TRY(check_is_text(out->path, err));
        RF_TRY(rf_text_config_read(&desc, out->path, err));
    }
    RF_TRY(check_memory(out, &desc, err));
    if (synthetic) return rf_text_model_synthetic(&out->model, out->backend, &desc, out->dtype, 0, max_positions, err);
    RF_TRY(rf_text_model_load(&out->model, out->backend, out->path, out->dtype, err));
    read_usual(out);
    return open_tokenizer(out, err);
}

void close_text_model(opened_text *t) {
    rf_tokenizer_close(t->tokenizer);
    rf_text_model_close(t->model);
    rf_backend_close(t->backend);
    rf_free(t->path);
    *t = (opened_text){0};
}

/* Equal ids must be equal bytes. */
static rf_status check_same_tokens(const opened_text *a, const opened_text *b, rf_error *err) {
    int32_t num = rf_tokenizer_vocab_size(a->tokenizer);
    bool same = num == rf_tokenizer_vocab_size(b->tokenizer);
    for (int32_t id = 0; id < num && same; id++) {
        size_t x_len = 0, y_len = 0;
        const char *x = rf_tokenizer_token_bytes(a->tokenizer, id, &x_len);
        const char *y = rf_tokenizer_token_bytes(b->tokenizer, id, &y_len);
        same = !x == !y && (!x || (x_len == y_len && memcmp(x, y, x_len) == 0));
    }
    if (same) return RF_OK;
    return rf_fail(err, RF_ERR_CONFIG, "--guide %s: its tokenizer is not that of %s", b->path, a->path);
}

rf_status open_text_guide(rf_text_model **out, const opened_text *main_model, const char *name, rf_error *err) {
    opened_text guide = {0};
    rf_status st = find_text(&guide.path, name, err);
    if (st == RF_OK) guide.name = short_name(guide.path);
    if (st == RF_OK) st = check_is_text(guide.path, err);
    if (st == RF_OK) st = rf_text_model_load(&guide.model, main_model->backend, guide.path, main_model->dtype, err);
    if (st == RF_OK && !text_is_causal(&guide))
        st = rf_fail(err, RF_ERR_CONFIG, "--guide %s: a guide is autoregressive; this is %s", guide.path,
                     guide.model->desc.family);
    if (st == RF_OK && guide.model->desc.vocab != main_model->model->desc.vocab)
        st = rf_fail(err, RF_ERR_CONFIG, "--guide %s: has %jd ids, %s %jd; they must share a tokenizer", guide.path,
                     (intmax_t)guide.model->desc.vocab, main_model->name, (intmax_t)main_model->model->desc.vocab);
    if (st == RF_OK) st = open_tokenizer(&guide, err);
    if (st == RF_OK && main_model->tokenizer && guide.tokenizer) st = check_same_tokens(main_model, &guide, err);
    if (st == RF_OK) {
        *out = guide.model;
        guide.model = NULL;
    }
    close_text_model(&guide); /* which has no backend of its own */
    return st;
}

/* ---- options ---- */

bool text_is_causal(const opened_text *t) {
    return t->model->desc.attention == RF_TEXT_CAUSAL;
}

rf_decode_options text_base_options(const opened_text *t, int32_t max_new) {
    rf_decode_options o = rf_decode_options_default(t->model);
    o.max_new = max_new > 0 ? max_new : t->usual_new > 0 ? t->usual_new : USUAL_NEW;
    bool bidirectional = t->model->desc.attention == RF_TEXT_BIDIRECTIONAL;
    if (bidirectional && t->usual_block > 0 && o.max_new % t->usual_block == 0) o.block = t->usual_block;
    if (t->model->desc.attention == RF_TEXT_BLOCK_CAUSAL && t->usual_block > 0) o.block = t->usual_block;
    return o;
}

rf_decode_options text_reference_options(const rf_decode_options *options, const opened_text *t) {
    rf_decode_options o = *options, plain = rf_decode_options_default(t->model);
    o.commit = plain.commit;
    o.confidence = plain.confidence;
    /* Dream's schedule is of one block; in blocks the surest mask of the block is one a pass all the same. */
    if (o.commit == RF_COMMIT_SCHEDULE && o.block > 0 && o.block != o.max_new) o.commit = RF_COMMIT_TOPN;
    o.steps = 0;
    o.alg_temp = 0;
    o.end = options->end == RF_END_NONE ? RF_END_NONE : RF_END_STOP;
    o.row_policy = NULL;
    o.force_policy = false;
    o.reuse = RF_REUSE_NONE;
    o.reuse_refresh_rows = false;
    o.guide = NULL;
    o.record_trace = false;
    return o;
}

int32_t text_block_of(const rf_decode_options *o, const opened_text *t) {
    if (o->block > 0) return o->block;
    return t->model->desc.attention == RF_TEXT_BLOCK_CAUSAL ? t->model->desc.block : o->max_new;
}

/* ---- text ---- */

/* Bytes of the character at c, 0 if it is none: shortest forms, no surrogates, up to U+10FFFF. */
static size_t utf8_len(const unsigned char *c, size_t left) {
    static const uint32_t least[] = {0, 0, 0x80, 0x800, 0x10000};
    if (c[0] < 0x80) return 1;
    size_t len = c[0] >= 0xf0 && c[0] < 0xf5   ? 4
                 : c[0] >= 0xe0 && c[0] < 0xf0 ? 3
                 : c[0] >= 0xc2 && c[0] < 0xe0 ? 2
                                               : 0;
    if (len == 0 || len > left) return 0;
    uint32_t code = c[0] & (0x7fu >> len);
    for (size_t i = 1; i < len; i++) {
        if ((c[i] & 0xc0) != 0x80) return 0;
        code = code << 6 | (c[i] & 0x3fu);
    }
    return code < least[len] || code > 0x10ffff || (code >= 0xd800 && code < 0xe000) ? 0 : len;
}

size_t text_utf8_valid(const char *bytes, size_t num_bytes) {
    size_t at = 0, len;
    while (at < num_bytes && (len = utf8_len((const unsigned char *)bytes + at, num_bytes - at)) > 0) at += len;
    return at;
}

rf_status text_encode(const opened_text *t, const char *bytes, size_t num_bytes, bool add_special, const char *what,
                      rf_token_ids *out, rf_error *err) {
    size_t valid = text_utf8_valid(bytes, num_bytes);
    if (valid < num_bytes)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: not valid UTF-8 at byte %zu (0x%02x)", what, valid,
                       (unsigned char)bytes[valid]);
    if (!t->tokenizer)
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: %s has no tokenizer.json; give ids with --tokens", what, t->path);
    return rf_tokenizer_encode(t->tokenizer, bytes, num_bytes, add_special, true, out, err);
}

rf_status text_decode(const opened_text *t, const int32_t *ids, int32_t num, rf_text *out, rf_error *err) {
    if (!t->tokenizer) {
        for (int32_t i = 0; i < num; i++) {
            char number[16];
            int len = snprintf(number, sizeof number, "%s%" PRId32, i ? "," : "", ids[i]);
            RF_TRY(rf_text_append(out, number, (size_t)len, err));
        }
        return RF_OK;
    }
    rf_token_stream stream = rf_token_stream_start(t->tokenizer, true);
    for (int32_t i = 0; i < num; i++) RF_TRY(rf_token_stream_push(&stream, ids[i], out, err));
    return rf_token_stream_finish(&stream, out, err);
}

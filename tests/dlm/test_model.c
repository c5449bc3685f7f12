/* tests/dlm/test_model.c - text models as they lie on a device: every weight against the file, in the executor's layout.
 *
 * RF_TEST_DEVICE=cuda runs the same on the GPU, in f32 and bf16. */
#include "dlm/model.h"

#include "core/file.h"
#include "core/memory.h"
#include "core/rng.h"
#include "tests/test_util.h"

static const char *const folders[] = {"text-llama", "text-llama-tied", "text-qwen2", "text-qwen3",
                                      "text-llada", "text-dream",      "text-sdar"};
#define NUM_FOLDERS (sizeof folders / sizeof *folders)

typedef struct {
    rf_backend *backend;
    rf_stream *stream;
    int num_dtypes;
    rf_error err;
} device;

static device open_device(void) {
    device d = {.num_dtypes = 1};
    const char *name = getenv("RF_TEST_DEVICE");
    rf_assert_ok(rf_backend_open(&d.backend, name && name[0] ? name : "cpu", 0, &d.err), d.err);
    rf_assert_ok(rf_stream_create(&d.stream, d.backend, &d.err), d.err);
    if (rf_backend_get_kind(d.backend) == RF_BACKEND_CUDA) d.num_dtypes = 2;
    void *p = NULL; /* the backend keeps a list of what it gave out from the first call on: not a leak of a model */
    rf_assert_ok(rf_backend_alloc(d.backend, &p, 16, &d.err), d.err);
    rf_backend_free(d.backend, p);
    return d;
}

static void close_device(device *d) {
    rf_stream_destroy(d->stream);
    rf_backend_close(d->backend);
}

static rf_dtype dtype_at(int i) {
    return i == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16;
}

/* num elements of a device buffer as floats. */
static float *download(device *d, const void *p, rf_dtype dtype, size_t num) {
    void *raw = rf_alloc(num * rf_dtype_bytes(dtype));
    float *out = rf_alloc(num * sizeof *out);
    ck_assert(raw && out && p);
    rf_assert_ok(rf_stream_download(d->stream, raw, p, num * rf_dtype_bytes(dtype), &d->err), d->err);
    rf_assert_ok(rf_stream_synchronize(d->stream, &d->err), d->err);
    rf_convert(out, RF_DTYPE_F32, raw, dtype, num);
    rf_free(raw);
    return out;
}

static const char *folder_path(char *out, size_t out_bytes, const char *name) {
    snprintf(out, out_bytes, "%s/%s", RF_FIXTURE_DIR, name);
    return out;
}

/* --- loading -------------------------------------------------------------------------------------------------------- */

/* Where the two layouts of files keep things; the test's own list. */
typedef struct {
    const char *embedding, *head, *final_norm, *attention_norm, *ffn_norm, *qkv[3], *out, *gate, *up, *down;
} names;
static const names hf_names = {"model.embed_tokens.weight",
                               "lm_head.weight",
                               "model.norm.weight",
                               "input_layernorm",
                               "post_attention_layernorm",
                               {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"},
                               "self_attn.o_proj",
                               "mlp.gate_proj",
                               "mlp.up_proj",
                               "mlp.down_proj"};
static const names llada_names = {"model.transformer.wte.weight",
                                  "model.transformer.ff_out.weight",
                                  "model.transformer.ln_f.weight",
                                  "attn_norm",
                                  "ff_norm",
                                  {"q_proj", "k_proj", "v_proj"},
                                  "attn_out",
                                  "ff_proj",
                                  "up_proj",
                                  "ff_out"};

typedef struct {
    device *d;
    const rf_weights *file;
    const names *n;
    rf_dtype dtype;
} checker;

/* `rows` rows of `cols` at p, `step` rows apart, are the file's tensor rounded to dtype. */
static void check_rows(const checker *c, const void *p, rf_dtype dtype, int64_t first, int64_t step, const char *name,
                       int64_t rows, int64_t cols) {
    rf_tensor t;
    rf_error err = {0};
    rf_assert_ok(rf_weights_get(c->file, name, &t, &err), err);
    ck_assert_int_ge(rf_tensor_num_elems(&t), rows * cols);
    size_t num = (size_t)((rows - 1) * step + 1) * (size_t)cols;
    float *got = download(c->d, (const char *)p + (size_t)(first * cols) * rf_dtype_bytes(dtype), dtype, num);
    float *want = rf_alloc((size_t)(rows * cols) * sizeof *want);
    rf_convert(want, RF_DTYPE_F32, t.data, t.dtype, (size_t)(rows * cols));
    for (int64_t r = 0; r < rows; r++)
        for (int64_t i = 0; i < cols; i++) {
            float w = want[r * cols + i], g = got[r * step * cols + i];
            if (dtype == RF_DTYPE_BF16) w = rf_bf16_to_f32(rf_f32_to_bf16(w));
            ck_assert_msg(g == w, "%s [%lld, %lld] is %.9g, the file has %.9g", name, (long long)r, (long long)i,
                          (double)g, (double)w);
        }
    rf_free(got);
    rf_free(want);
}

static void check_in_layer(const checker *c, const void *p, rf_dtype dtype, int64_t first, int64_t step, int layer,
                           const char *leaf, const char *kind, int64_t rows, int64_t cols) {
    char name[160];
    bool llada = c->n == &llada_names;
    snprintf(name, sizeof name, llada ? "model.transformer.blocks.%d.%s.%s" : "model.layers.%d.%s.%s", layer, leaf,
             kind);
    check_rows(c, p, dtype, first, step, name, rows, cols);
}

static void check_layer(const checker *c, const rf_text_model *m, int i) {
    const rf_text_desc *s = &m->desc;
    const rf_text_layer *w = &m->layers[i];
    int64_t q = (int64_t)s->num_q_heads * s->head_dim, kv = (int64_t)s->num_kv_heads * s->head_dim;
    const int64_t first[3] = {0, q, q + kv}, rows[3] = {q, kv, kv};
    check_in_layer(c, w->attention_norm, RF_DTYPE_F32, 0, 1, i, c->n->attention_norm, "weight", 1, s->hidden);
    check_in_layer(c, w->ffn_norm, RF_DTYPE_F32, 0, 1, i, c->n->ffn_norm, "weight", 1, s->hidden);
    for (int j = 0; j < 3; j++) {
        check_in_layer(c, w->qkv, c->dtype, first[j], 1, i, c->n->qkv[j], "weight", rows[j], s->hidden);
        if (s->qkv_bias) check_in_layer(c, w->qkv_bias, c->dtype, first[j], 1, i, c->n->qkv[j], "bias", rows[j], 1);
    }
    ck_assert_int_eq(w->qkv_bias != NULL, s->qkv_bias);
    ck_assert_int_eq(w->q_norm != NULL, s->qk_norm);
    ck_assert_int_eq(w->k_norm != NULL, s->qk_norm);
    if (s->qk_norm) {
        check_in_layer(c, w->q_norm, RF_DTYPE_F32, 0, 1, i, "self_attn.q_norm", "weight", 1, s->head_dim);
        check_in_layer(c, w->k_norm, RF_DTYPE_F32, 0, 1, i, "self_attn.k_norm", "weight", 1, s->head_dim);
    }
    check_in_layer(c, w->out, c->dtype, 0, 1, i, c->n->out, "weight", s->hidden, q);
    check_in_layer(c, w->gate_up, c->dtype, 0, 2, i, c->n->gate, "weight", s->ffn, s->hidden);
    check_in_layer(c, w->gate_up, c->dtype, 1, 2, i, c->n->up, "weight", s->ffn, s->hidden);
    check_in_layer(c, w->down, c->dtype, 0, 1, i, c->n->down, "weight", s->hidden, s->ffn);
}

START_TEST(every_weight_of_every_family_is_the_files) {
    device d = open_device();
    for (size_t i = 0; i < NUM_FOLDERS; i++)
        for (int t = 0; t < d.num_dtypes; t++) {
            char dir[512];
            rf_text_model *m = NULL;
            rf_weights *file = NULL;
            folder_path(dir, sizeof dir, folders[i]);
            rf_assert_ok(rf_text_model_load(&m, d.backend, dir, dtype_at(t), &d.err), d.err);
            rf_assert_ok(rf_weights_open(&file, dir, &d.err), d.err);
            bool llada = strcmp(m->desc.family, "llada") == 0;
            checker c = {.d = &d, .file = file, .n = llada ? &llada_names : &hf_names, .dtype = dtype_at(t)};
            int64_t vocab = m->desc.vocab, hidden = m->desc.hidden;
            check_rows(&c, m->embedding, c.dtype, 0, 1, c.n->embedding, vocab, hidden); /* LLaDA's file has 304 rows */
            check_rows(&c, m->final_norm, RF_DTYPE_F32, 0, 1, c.n->final_norm, 1, hidden);
            if (m->desc.tied_head)
                ck_assert_ptr_eq(m->head, m->embedding);
            else
                check_rows(&c, m->head, c.dtype, 0, 1, c.n->head, vocab, hidden);
            for (int l = 0; l < m->desc.num_layers; l++) check_layer(&c, m, l);
            int64_t num = 0;
            for (size_t k = 0; k < rf_weights_count(file); k++) {
                rf_tensor tensor;
                rf_assert_ok(rf_weights_get(file, rf_weights_name(file, k), &tensor, &d.err), d.err);
                num += rf_tensor_num_elems(&tensor);
            }
            if (llada) num -= 2 * 4 * hidden; /* rows past the vocabulary, not kept */
            ck_assert_int_eq(rf_text_model_num_params(m), num);
            ck_assert_uint_ge(rf_text_model_bytes(m), (size_t)num * rf_dtype_bytes(c.dtype));
            rf_weights_close(file);
            rf_text_model_close(m);
        }
    close_device(&d);
}
END_TEST

/* --- rotary tables -------------------------------------------------------------------------------------------------- */

/* transformers' cos and sin at a few positions: torch's own are rounded to within one unit, ours to within half of one. */
START_TEST(rotary_tables_are_transformers) {
    static const int64_t rows[] = {0, 1, 2, 39, 127, 511};
    device d = open_device();
    rf_weights *golden = NULL;
    rf_assert_ok(rf_weights_open(&golden, RF_FIXTURE_DIR "/text_forward.safetensors", &d.err), d.err);
    for (size_t i = 0; i < NUM_FOLDERS; i++) {
        char dir[512], name[64];
        rf_text_model *m = NULL;
        rf_tensor want;
        rf_assert_ok(rf_text_model_load(&m, d.backend, folder_path(dir, sizeof dir, folders[i]), RF_DTYPE_F32, &d.err),
                     d.err);
        ck_assert_int_eq(m->rope_positions, 512);
        int64_t pairs = m->desc.head_dim / 2;
        float *got = download(&d, m->rope, RF_DTYPE_F32, (size_t)(512 * 2 * pairs));
        float *host = rf_alloc((size_t)(512 * 2 * pairs) * sizeof *host);
        rf_text_rope_table(host, &m->desc, 512);
        ck_assert_mem_eq(got, host, (size_t)(512 * 2 * pairs) * sizeof *host);
        snprintf(name, sizeof name, "%s.rope", folders[i]);
        const int64_t shape[3] = {6, pairs, 2};
        rf_assert_ok(rf_weights_get_shaped(golden, name, 3, shape, &want, &d.err), d.err);
        for (int r = 0; r < 6; r++)
            rf_assert_close(got + rows[r] * 2 * pairs, (const float *)want.data + r * 2 * pairs, (size_t)(2 * pairs),
                            6e-8, 6e-8);
        rf_free(host);
        rf_free(got);
        rf_text_model_close(m);
    }
    rf_weights_close(golden);
    close_device(&d);
}
END_TEST

/* The frequencies themselves, bit for bit: the angle of position 1 is the frequency, and of small ones sine is the angle. */
START_TEST(scaled_frequencies_are_transformers) {
    rf_weights *golden = NULL;
    rf_error err = {0};
    rf_assert_ok(rf_weights_open(&golden, RF_FIXTURE_DIR "/text_forward.safetensors", &err), err);
    int num_small = 0;
    for (size_t i = 0; i < NUM_FOLDERS; i++) {
        char dir[512], name[64];
        rf_text_desc d;
        rf_tensor inv;
        float table[2][64];
        rf_assert_ok(rf_text_config_read(&d, folder_path(dir, sizeof dir, folders[i]), &err), err);
        snprintf(name, sizeof name, "%s.inv_freq", folders[i]);
        rf_assert_ok(rf_weights_get(golden, name, &inv, &err), err);
        ck_assert_int_le(d.head_dim, 64);
        ck_assert_int_eq(rf_tensor_num_elems(&inv), d.head_dim / 2);
        rf_text_rope_table(&table[0][0], &d, 2);
        const float *row = &table[0][0] + d.head_dim;
        for (int j = 0; j < d.head_dim / 2; j++) {
            float want = ((const float *)inv.data)[j];
            ck_assert_float_eq(row[2 * j], (float)cos((double)want));
            ck_assert_float_eq(row[2 * j + 1], (float)sin((double)want));
            if (want >= 1e-4f) continue;
            num_small++;
            ck_assert_float_eq(row[2 * j + 1], want);
        }
    }
    ck_assert_int_gt(num_small, 0);
    rf_weights_close(golden);
}
END_TEST

/* Llama 3.1's own numbers: the first pairs are left alone, the last divided by 8, and the blend lies between and falls steadily. */
START_TEST(llama_3_1_scales_its_slow_pairs) {
    rf_text_desc scaled, plain;
    rf_error err = {0};
    float a[2 * 128], b[2 * 128];
    int num_same = 0, num_blend = 0, num_eighth = 0;
    rf_assert_ok(rf_text_config_builtin(&scaled, "llama-3.1-8b", &err), err);
    rf_assert_ok(rf_text_config_builtin(&plain, "llama-3-8b", &err), err);
    rf_text_rope_table(a, &scaled, 2);
    rf_text_rope_table(b, &plain, 2);
    for (int j = 0; j < 64; j++) {
        double ratio = asin((double)a[128 + 2 * j + 1]) / asin((double)b[128 + 2 * j + 1]);
        if (fabs(ratio - 1) < 1e-6)
            num_same++;
        else if (fabs(ratio - 0.125) < 1e-6)
            num_eighth++;
        else if (ratio > 0.125 && ratio < 1)
            num_blend++;
    }
    /* wavelengths 2 pi 500000^(j/64): below 2048 up to j = 28, above 8192 from j = 35 on */
    ck_assert_int_eq(num_same, 29);
    ck_assert_int_eq(num_blend, 6);
    ck_assert_int_eq(num_eighth, 29);
}
END_TEST

/* --- broken folders ------------------------------------------------------------------------------------------------- */

static void copy_file(const char *from_dir, const char *to_dir, const char *name) {
    char path[512];
    char *bytes = NULL;
    size_t num = 0;
    rf_error err = {0};
    snprintf(path, sizeof path, "%s/%s", from_dir, name);
    rf_assert_ok(rf_file_read(path, (size_t)1 << 24, &bytes, &num, &err), err);
    snprintf(path, sizeof path, "%s/%s", to_dir, name);
    rf_assert_ok(rf_file_write(path, bytes, num, &err), err);
    rf_free(bytes);
}

/* A copy of a fixture folder of one weight file. */
static void copy_folder(char *dir, size_t dir_bytes, const char *name) {
    char from[512];
    ck_assert_ptr_nonnull(rf_temp_dir_make(dir, dir_bytes));
    folder_path(from, sizeof from, name);
    copy_file(from, dir, "config.json");
    copy_file(from, dir, "model.safetensors");
}

/* Every `from` in the first bytes of a file becomes `to`, of the same length. */
static void patch(const char *dir, const char *file, const char *from, const char *to) {
    char path[512];
    char *bytes = NULL;
    size_t num = 0, hits = 0, len = strlen(from);
    rf_error err = {0};
    ck_assert_uint_eq(len, strlen(to));
    snprintf(path, sizeof path, "%s/%s", dir, file);
    rf_assert_ok(rf_file_read(path, (size_t)1 << 24, &bytes, &num, &err), err);
    for (size_t i = 0; i + len <= num && i < 16384; i++)
        if (memcmp(bytes + i, from, len) == 0) memcpy(bytes + i, to, len), hits++;
    ck_assert_uint_ge(hits, 1);
    rf_assert_ok(rf_file_write(path, bytes, num, &err), err);
    rf_free(bytes);
}

static void check_refused(const char *dir, rf_status status, const char *message) {
    device d = open_device();
    rf_text_model *m = (void *)&d;
    uint64_t live = rf_memory_get_counts().num_live;
    rf_assert_fails(rf_text_model_load(&m, d.backend, dir, RF_DTYPE_F32, &d.err), d.err, status, message);
    ck_assert_ptr_null(m);
    ck_assert_ptr_null(strchr(d.err.message, '\n'));
    ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
    close_device(&d);
}

START_TEST(files_that_do_not_fit_their_config_are_refused) {
    static const struct {
        const char *folder, *file, *from, *to;
        rf_status status;
        const char *message;
    } cases[] = {
        /* a tensor under another name is missed or has no place: the latter is told first */
        {"text-qwen3", "model.safetensors", "layers.1.mlp.up_proj", "layers.1.mlp.op_proj", RF_ERR_UNSUPPORTED,
         "mlp.op_proj"},
        {"text-llama", "model.safetensors", "model.norm.weight", "rotary_emb.inv_fr", RF_ERR_UNSUPPORTED,
         "rotary_emb.inv_fr"},
        {"text-qwen3", "config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 4", RF_ERR_MISSING,
         "model.layers.3."},
        {"text-qwen3", "config.json", "\"num_hidden_layers\": 3", "\"num_hidden_layers\": 2", RF_ERR_UNSUPPORTED,
         "model.layers.2."},
        {"text-sdar", "config.json", "\"tie_word_embeddings\": true", "\"tie_word_embeddings\":false", RF_ERR_MISSING,
         "lm_head.weight"},
        {"text-qwen3", "config.json", "\"vocab_size\": 300", "\"vocab_size\": 301", RF_ERR_SHAPE,
         "model.embed_tokens.weight"},
        {"text-qwen3", "config.json", "\"intermediate_size\": 96", "\"intermediate_size\": 95", RF_ERR_SHAPE,
         "mlp.gate_proj"},
        {"text-qwen3", "config.json", "\"head_dim\": 32", "\"head_dim\": 16", RF_ERR_SHAPE, "q_norm"},
        {"text-qwen3", "config.json", "\"num_key_value_heads\": 2", "\"num_key_value_heads\": 4", RF_ERR_SHAPE,
         "k_proj"},
        {"text-llada", "config.json", "\"embedding_size\": 304", "\"embedding_size\": 303", RF_ERR_SHAPE, "wte"},
        {"text-dream", "config.json", "\"model_type\": \"Dream\"", "\"model_type\": \"llama\"", RF_ERR_UNSUPPORTED,
         "bias"},
        {"text-qwen3", "config.json", "\"model_type\": \"qwen3\"", "\"model_type\": \"llama\"", RF_ERR_UNSUPPORTED,
         "k_norm"},
        {"text-llama", "config.json", "\"model_type\": \"llama\"", "\"model_type\": \"qwen3\"", RF_ERR_MISSING,
         "q_norm"},
        {"text-llama", "config.json", "\"model_type\": \"llama\"", "\"model_type\": \"qwen2\"", RF_ERR_MISSING,
         "q_proj.bias"},
        {"text-llama", "model.safetensors", "model.embed_tokens", "modal.embed_tokens", RF_ERR_MISSING,
         "no text model's weights"},
    };
    for (size_t i = 0; i < sizeof cases / sizeof *cases; i++) {
        char dir[256];
        copy_folder(dir, sizeof dir, cases[i].folder);
        patch(dir, cases[i].file, cases[i].from, cases[i].to);
        check_refused(dir, cases[i].status, cases[i].message);
        rf_temp_dir_remove(dir);
    }
}
END_TEST

START_TEST(integers_are_no_weights) {
    char dir[256];
    copy_folder(dir, sizeof dir, "text-llama-tied");
    /* f16 and i16 have the same size, so the file stays well-formed */
    patch(dir, "model.safetensors", "\"F16\"", "\"I16\"");
    check_refused(dir, RF_ERR_DTYPE, "I16");
    rf_temp_dir_remove(dir);
}
END_TEST

START_TEST(truncated_and_absent_files_are_refused) {
    char dir[256], path[300];
    char *bytes = NULL;
    size_t num = 0;
    rf_error err = {0};
    copy_folder(dir, sizeof dir, "text-dream");
    snprintf(path, sizeof path, "%s/model.safetensors", dir);
    rf_assert_ok(rf_file_read(path, (size_t)1 << 24, &bytes, &num, &err), err);
    const size_t lengths[] = {0, 7, 8, 100, num / 2, num - 1};
    for (size_t i = 0; i < sizeof lengths / sizeof *lengths; i++) {
        rf_assert_ok(rf_file_write(path, bytes, lengths[i], &err), err);
        check_refused(dir, RF_ERR_FORMAT, "model.safetensors");
    }
    rf_free(bytes);
    ck_assert_int_eq(unlink(path), 0);
    check_refused(dir, RF_ERR_MISSING, dir);
    rf_temp_dir_remove(dir);
    check_refused("/nonexistent", RF_ERR_MISSING, "config.json");
}
END_TEST

/* Old files carry rotary frequencies, and a tied model's may repeat its embedding as a head. */
START_TEST(known_extra_tensors_are_ignored) {
    char dir[256];
    rf_text_model *m = NULL;
    device d = open_device();
    copy_folder(dir, sizeof dir, "text-llama");
    patch(dir, "config.json", "\"tie_word_embeddings\": false", "\"tie_word_embeddings\":  true");
    rf_assert_ok(rf_text_model_load(&m, d.backend, dir, RF_DTYPE_F32, &d.err), d.err);
    ck_assert_ptr_eq(m->head, m->embedding);
    rf_text_model_close(m);
    rf_temp_dir_remove(dir);

    copy_folder(dir, sizeof dir, "text-qwen3");
    patch(dir, "model.safetensors", "model.layers.2.self_attn.q_norm.weight", "model.layers.2.attn.rotary_emb.inv_fre");
    check_refused(dir, RF_ERR_UNSUPPORTED, "inv_fre");
    rf_temp_dir_remove(dir);
    copy_folder(dir, sizeof dir,
                "text-qwen3"); /* the full name has a place: what is missed now is the tensor it replaced */
    patch(dir, "model.safetensors", "model.layers.2.self_attn.q_norm.weight", "model.layers.2.att.rotary_emb.inv_freq");
    check_refused(dir, RF_ERR_MISSING, "model.layers.2.self_attn.q_norm.weight");
    rf_temp_dir_remove(dir);
    close_device(&d);
}
END_TEST

START_TEST(dtypes_that_a_device_does_not_compute_are_refused) {
    device d = open_device();
    rf_text_model *m = NULL;
    const char *dir = RF_FIXTURE_DIR "/text-llama";
    rf_assert_fails(rf_text_model_load(&m, d.backend, dir, RF_DTYPE_F16, &d.err), d.err, RF_ERR_DTYPE, "f16");
    if (d.num_dtypes == 1)
        rf_assert_fails(rf_text_model_load(&m, d.backend, dir, RF_DTYPE_BF16, &d.err), d.err, RF_ERR_DTYPE, "bf16");
    close_device(&d);
}
END_TEST

START_TEST(every_failing_allocation_is_survived) {
    device d = open_device();
    uint64_t live = rf_memory_get_counts().num_live;
    uint64_t nth = 1;
    for (;; nth++) {
        rf_text_model *m = NULL;
        ck_assert_uint_lt(nth, 10000);
        rf_memory_fail_nth(nth);
        rf_status st = rf_text_model_load(&m, d.backend, RF_FIXTURE_DIR "/text-qwen2", RF_DTYPE_F32, &d.err);
        rf_memory_fail_nth(0);
        ck_assert_int_eq(m != NULL, st == RF_OK);
        rf_text_model_close(m);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_msg(st == RF_ERR_MEMORY, "%llu: %s: %s", (unsigned long long)nth, rf_status_name(st), d.err.message);
    }
    ck_assert_uint_gt(nth, 10);
    close_device(&d);
}
END_TEST

/* A model must not need its size again in host memory: no allocation as large as the whole embedding in f32, and few of them. */
START_TEST(loading_takes_no_copies_of_tensors) {
    device d = open_device();
    rf_text_model *m = NULL;
    char dir[512];
    uint64_t before = rf_memory_get_counts().num_allocs;
    rf_assert_ok(rf_text_model_load(&m, d.backend, folder_path(dir, sizeof dir, "text-llada"), RF_DTYPE_F32, &d.err),
                 d.err);
    uint64_t few = rf_memory_get_counts().num_allocs - before;
    rf_text_model_close(m);
    before = rf_memory_get_counts().num_allocs;
    rf_weights *file = NULL;
    rf_json *config = NULL;
    rf_assert_ok(rf_weights_open(&file, dir, &d.err), d.err);
    rf_assert_ok(rf_json_open(&config, RF_FIXTURE_DIR "/text-llada/config.json", &d.err), d.err);
    uint64_t reading = rf_memory_get_counts().num_allocs - before;
    rf_json_close(config);
    rf_weights_close(file);
    /* beyond opening the two files: the model, its layers, parameters, slabs, table, paths; nothing for the 30 tensors */
    ck_assert_msg(few - reading < 20, "%llu allocations beside %llu for opening", (unsigned long long)(few - reading),
                  (unsigned long long)reading);
    close_device(&d);
}
END_TEST

/* --- synthetic weights ---------------------------------------------------------------------------------------------- */

static void check_moments(device *d, const void *p, rf_dtype dtype, int64_t num, double mean, double std,
                          const char *what) {
    float *x = download(d, p, dtype, (size_t)num);
    double sum = 0, sq = 0;
    for (int64_t i = 0; i < num; i++) sum += (double)x[i], sq += (double)x[i] * (double)x[i];
    double m = sum / (double)num, s = sqrt(fmax(0, sq / (double)num - m * m));
    double bound = 5 / sqrt((double)num);
    ck_assert_msg(fabs(m - mean) <= bound * std + 1e-7 && fabs(s - std) <= bound * std + 1e-7,
                  "%s: mean %g and deviation %g, expected %g and %g", what, m, s, mean, std);
    rf_free(x);
}

START_TEST(synthetic_weights_have_the_promised_spread) {
    device d = open_device();
    for (size_t i = 0; i < NUM_FOLDERS; i++)
        for (int t = 0; t < d.num_dtypes; t++) {
            char dir[512];
            rf_text_desc desc;
            rf_text_model *m = NULL;
            rf_dtype dt = dtype_at(t);
            rf_assert_ok(rf_text_config_read(&desc, folder_path(dir, sizeof dir, folders[i]), &d.err), d.err);
            rf_assert_ok(rf_text_model_synthetic(&m, d.backend, &desc, dt, 3, 40, &d.err), d.err);
            ck_assert_int_eq(m->rope_positions, 40);
            ck_assert_int_eq(m->desc.max_positions, 40);
            int64_t hidden = desc.hidden, q = (int64_t)desc.num_q_heads * desc.head_dim,
                    qkv = q + 2 * (int64_t)desc.num_kv_heads * desc.head_dim;
            check_moments(&d, m->embedding, dt, desc.vocab * hidden, 0, desc.tied_head ? 0.125 : 1, "embedding");
            if (desc.tied_head)
                ck_assert_ptr_eq(m->head, m->embedding);
            else
                check_moments(&d, m->head, dt, desc.vocab * hidden, 0, 0.125, "head");
            check_moments(&d, m->final_norm, RF_DTYPE_F32, hidden, 1, 0, "final norm");
            for (int l = 0; l < desc.num_layers; l++) {
                const rf_text_layer *w = &m->layers[l];
                check_moments(&d, w->attention_norm, RF_DTYPE_F32, hidden, 1, 0, "attention norm");
                check_moments(&d, w->ffn_norm, RF_DTYPE_F32, hidden, 1, 0, "feed-forward norm");
                check_moments(&d, w->qkv, dt, qkv * hidden, 0, 0.125, "qkv");
                check_moments(&d, w->out, dt, hidden * q, 0, 1 / sqrt((double)q), "out");
                check_moments(&d, w->gate_up, dt, 2 * desc.ffn * hidden, 0, 0.125, "gate and up");
                check_moments(&d, w->down, dt, hidden * desc.ffn, 0, 1 / sqrt((double)desc.ffn), "down");
                if (desc.qkv_bias) check_moments(&d, w->qkv_bias, dt, qkv, 0, 0.02, "bias");
                if (desc.qk_norm) check_moments(&d, w->k_norm, RF_DTYPE_F32, desc.head_dim, 1, 0, "k norm");
            }
            rf_text_model_close(m);
        }
    close_device(&d);
}
END_TEST

/* Weights are those of the counter generator, so every device and every run draws the same; tensors differ from one another. */
START_TEST(synthetic_weights_can_be_drawn_again) {
    device d = open_device();
    rf_text_desc desc;
    rf_text_model *a = NULL, *b = NULL, *c = NULL;
    char dir[512];
    rf_assert_ok(rf_text_config_read(&desc, folder_path(dir, sizeof dir, "text-qwen2"), &d.err), d.err);
    rf_assert_ok(rf_text_model_synthetic(&a, d.backend, &desc, RF_DTYPE_F32, 3, 0, &d.err), d.err);
    rf_assert_ok(rf_text_model_synthetic(&b, d.backend, &desc, RF_DTYPE_F32, 3, 0, &d.err), d.err);
    rf_assert_ok(rf_text_model_synthetic(&c, d.backend, &desc, RF_DTYPE_F32, 4, 0, &d.err), d.err);
    ck_assert_int_eq(a->rope_positions, 512);
    size_t num = (size_t)(desc.ffn * desc.hidden);
    float *wa = download(&d, a->layers[1].down, RF_DTYPE_F32, num),
          *wb = download(&d, b->layers[1].down, RF_DTYPE_F32, num),
          *wc = download(&d, c->layers[1].down, RF_DTYPE_F32, num),
          *other = download(&d, a->layers[2].down, RF_DTYPE_F32, num);
    ck_assert_mem_eq(wa, wb, num * sizeof *wa);
    ck_assert(memcmp(wa, wc, num * sizeof *wa) != 0);
    ck_assert(memcmp(wa, other, num * sizeof *wa) != 0);
    float first[4]; /* the embedding is the second tensor that is drawn: key 1 */
    float *embedding = download(&d, a->embedding, RF_DTYPE_F32, 4);
    rf_rng_normal_at(3, 1, 0, first, 4);
    rf_assert_close(embedding, first, 4, 1e-6, 1e-6);
    rf_free(embedding);
    rf_free(wa);
    rf_free(wb);
    rf_free(wc);
    rf_free(other);
    rf_text_model_close(a);
    rf_text_model_close(b);
    rf_text_model_close(c);
    close_device(&d);
}
END_TEST

START_TEST(synthetic_models_of_wrong_descriptions_are_refused) {
    device d = open_device();
    rf_text_desc desc;
    rf_text_model *m = NULL;
    char dir[512];
    rf_assert_ok(rf_text_config_read(&desc, folder_path(dir, sizeof dir, "text-sdar"), &d.err), d.err);
    desc.num_kv_heads = 3;
    rf_assert_fails(rf_text_model_synthetic(&m, d.backend, &desc, RF_DTYPE_F32, 3, 0, &d.err), d.err, RF_ERR_CONFIG,
                    "divide");
    desc.num_kv_heads = 1;
    rf_assert_fails(rf_text_model_synthetic(&m, d.backend, &desc, RF_DTYPE_F32, 3, (int64_t)1 << 40, &d.err), d.err,
                    RF_ERR_CONFIG, "positions");
    uint64_t live = rf_memory_get_counts().num_live;
    for (uint64_t nth = 1;; nth++) {
        rf_memory_fail_nth(nth);
        rf_status st = rf_text_model_synthetic(&m, d.backend, &desc, RF_DTYPE_F32, 3, 0, &d.err);
        rf_memory_fail_nth(0);
        rf_text_model_close(m);
        ck_assert_uint_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
    }
    close_device(&d);
}
END_TEST

START_TEST(text_folders_are_told_from_others) {
    char dir[512];
    for (size_t i = 0; i < NUM_FOLDERS; i++) ck_assert(rf_text_is_text(folder_path(dir, sizeof dir, folders[i])));
    ck_assert(!rf_text_is_text(folder_path(dir, sizeof dir, "dit-tiny")));
    ck_assert(!rf_text_is_text(folder_path(dir, sizeof dir, "dit-tiny/transformer")));
    ck_assert(!rf_text_is_text(folder_path(dir, sizeof dir, "dit-tiny-original")));
    ck_assert(!rf_text_is_text(folder_path(dir, sizeof dir, "oasis-tiny")));
    ck_assert(!rf_text_is_text("/nonexistent"));
}
END_TEST

int main(void) {
    const char *name = getenv("RF_TEST_DEVICE");
    if (name && name[0]) {
        rf_backend *backend = NULL;
        rf_error err = {0};
        if (rf_backend_open(&backend, name, 0, &err) != RF_OK) {
            printf("skipped: %s\n", err.message);
            return 77;
        }
        rf_backend_close(backend);
    }
    Suite *suite = suite_create("dlm/model");
    TCase *tc = tcase_create("model");
    tcase_set_timeout(tc, 120);
    tcase_add_test(tc, every_weight_of_every_family_is_the_files);
    tcase_add_test(tc, rotary_tables_are_transformers);
    tcase_add_test(tc, scaled_frequencies_are_transformers);
    tcase_add_test(tc, llama_3_1_scales_its_slow_pairs);
    tcase_add_test(tc, files_that_do_not_fit_their_config_are_refused);
    tcase_add_test(tc, integers_are_no_weights);
    tcase_add_test(tc, truncated_and_absent_files_are_refused);
    tcase_add_test(tc, known_extra_tensors_are_ignored);
    tcase_add_test(tc, dtypes_that_a_device_does_not_compute_are_refused);
    tcase_add_test(tc, every_failing_allocation_is_survived);
    tcase_add_test(tc, loading_takes_no_copies_of_tensors);
    tcase_add_test(tc, synthetic_weights_have_the_promised_spread);
    tcase_add_test(tc, synthetic_weights_can_be_drawn_again);
    tcase_add_test(tc, synthetic_models_of_wrong_descriptions_are_refused);
    tcase_add_test(tc, text_folders_are_told_from_others);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

/* dlm/model.c - weight maps of the text families into the executor's one form; rotary tables; synthetic weights. */
#include "dlm/model.h"

#include <math.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "core/file.h"
#include "core/memory.h"
#include "kernels/ops.h"

#define STAGING_BYTES ((size_t)8 << 20) /* page-locked, on CUDA only; holds at least two of the longest rows */
#define MAX_NAME      192

/* Where a dialect keeps a role. Names of a layer follow "<layers>.<index>."; all end in ".weight", those of q, k and v in
 * ".bias" too. */
typedef struct {
    const char *embedding, *head, *final_norm, *layers;
    const char *attention_norm, *ffn_norm, *q, *k, *v, *out, *gate, *up, *down, *q_norm, *k_norm;
} weight_map;

static const weight_map weight_maps[] = {
    {
        .embedding = "model.embed_tokens",
        .head = "lm_head",
        .final_norm = "model.norm",
        .layers = "model.layers",
        .attention_norm = "input_layernorm",
        .ffn_norm = "post_attention_layernorm",
        .q = "self_attn.q_proj",
        .k = "self_attn.k_proj",
        .v = "self_attn.v_proj",
        .out = "self_attn.o_proj",
        .gate = "mlp.gate_proj",
        .up = "mlp.up_proj",
        .down = "mlp.down_proj",
        .q_norm = "self_attn.q_norm",
        .k_norm = "self_attn.k_norm",
    },
    {
        /* LLaDA, OLMo's names. ff_proj is the gate; ff_out is the down-projection inside a block and the head outside. */
        .embedding = "model.transformer.wte",
        .head = "model.transformer.ff_out",
        .final_norm = "model.transformer.ln_f",
        .layers = "model.transformer.blocks",
        .attention_norm = "attn_norm",
        .ffn_norm = "ff_norm",
        .q = "q_proj",
        .k = "k_proj",
        .v = "v_proj",
        .out = "attn_out",
        .gate = "ff_proj",
        .up = "up_proj",
        .down = "ff_out",
        .q_norm = "q_norm",
        .k_norm = "k_norm",
    },
};
#define NUM_MAPS (sizeof weight_maps / sizeof *weight_maps)

typedef struct {
    rf_text_model *m;
    const rf_weights *file;
    const weight_map *map;
    rf_stream *stream; /* NULL on the host, where weights are converted in place */
    char *staging;
} loader;

/* layer < 0: outside the layers. */
static const char *tensor_name(char *out, const weight_map *map, int layer, const char *leaf, const char *suffix) {
    if (layer < 0)
        snprintf(out, MAX_NAME, "%s%s", leaf, suffix);
    else
        snprintf(out, MAX_NAME, "%s.%d.%s%s", map->layers, layer, leaf, suffix);
    return out;
}

/* --- names ---------------------------------------------------------------------------------------------------------- */

static bool is_leaf(const char *name, const char *leaf, const char *suffix) {
    size_t len = strlen(leaf);
    return strncmp(name, leaf, len) == 0 && strcmp(name + len, suffix) == 0;
}

static bool is_layer_leaf(const weight_map *map, const rf_text_desc *d, const char *leaf) {
    const char *const always[] = {map->attention_norm, map->ffn_norm, map->q,   map->k, map->v, map->out,
                                  map->gate,           map->up,       map->down};
    for (size_t i = 0; i < sizeof always / sizeof *always; i++)
        if (is_leaf(leaf, always[i], ".weight")) return true;
    if (d->qkv_bias &&
        (is_leaf(leaf, map->q, ".bias") || is_leaf(leaf, map->k, ".bias") || is_leaf(leaf, map->v, ".bias")))
        return true;
    return d->qk_norm && (is_leaf(leaf, map->q_norm, ".weight") || is_leaf(leaf, map->k_norm, ".weight"));
}

/* Does the architecture have a tensor of this name? Rotary frequencies are buffers that old files carry: computed here. A tied
 * model's file may repeat the embedding as its head. */
static bool is_known(const weight_map *map, const rf_text_desc *d, const char *name) {
    static const char buffer[] = "rotary_emb.inv_freq";
    size_t len = strlen(name), layers_len = strlen(map->layers);
    if (len >= sizeof buffer - 1 && strcmp(name + len - (sizeof buffer - 1), buffer) == 0) return true;
    if (is_leaf(name, map->embedding, ".weight") || is_leaf(name, map->head, ".weight") ||
        is_leaf(name, map->final_norm, ".weight"))
        return true;
    if (strncmp(name, map->layers, layers_len) != 0 || name[layers_len] != '.') return false;
    const char *p = name + layers_len + 1, *digits = p;
    int layer = 0;
    while (*p >= '0' && *p <= '9' && p - digits < 5) layer = layer * 10 + (*p++ - '0');
    bool number = p > digits && (digits[0] != '0' || p == digits + 1);
    return number && *p == '.' && layer < d->num_layers && is_layer_leaf(map, d, p + 1);
}

static rf_status check_names(const loader *l, rf_error *err) {
    const rf_text_desc *d = &l->m->desc;
    const char *first = NULL;
    size_t num = 0;
    for (size_t i = 0; i < rf_weights_count(l->file); i++) {
        const char *name = rf_weights_name(l->file, i);
        if (is_known(l->map, d, name)) continue;
        if (num++ == 0) first = name;
    }
    if (num == 0) return RF_OK;
    return rf_fail(err, RF_ERR_UNSUPPORTED,
                   "tensor '%s' (%zu such) has no place in a %s model of %d layers%s%s: the config is another model's",
                   first, num, d->family, d->num_layers, d->qkv_bias ? " with q, k, v biases" : "",
                   d->qk_norm ? " with q, k norms" : "");
}

static rf_status find_map(loader *l, rf_error *err) {
    char name[MAX_NAME];
    for (size_t i = 0; i < NUM_MAPS; i++) {
        tensor_name(name, &weight_maps[i], -1, weight_maps[i].embedding, ".weight");
        if (rf_weights_has(l->file, name)) {
            l->map = &weight_maps[i];
            return RF_OK;
        }
    }
    return rf_fail(err, RF_ERR_MISSING,
                   "no text model's weights here: neither %s.weight nor %s.weight is among the %zu "
                   "tensors",
                   weight_maps[0].embedding, weight_maps[1].embedding, rf_weights_count(l->file));
}

/* --- file to device ------------------------------------------------------------------------------------------------- */

static rf_status get_tensor(const loader *l, int layer, const char *leaf, const char *suffix, int rank, int64_t rows,
                            int64_t cols, rf_tensor *out, rf_error *err) {
    char name[MAX_NAME];
    int64_t shape[2] = {rows, cols};
    tensor_name(name, l->map, layer, leaf, suffix);
    RF_TRY(rf_weights_get_shaped(l->file, name, rank, shape, out, err));
    if (out->dtype != RF_DTYPE_F32 && out->dtype != RF_DTYPE_F16 && out->dtype != RF_DTYPE_BF16)
        return rf_fail(err, RF_ERR_DTYPE, "%s: dtype %s where f32, f16 or bf16 is wanted", name,
                       rf_dtype_name(out->dtype));
    return RF_OK;
}

/* Rows first..first+num of the sources in turn (row r of each, then row r + 1): one conversion from the map, at most one
 * rounding, no copy of a whole tensor. */
static void pack_rows(void *dst, rf_dtype dtype, const rf_tensor *sources, int num_sources, int64_t first, int64_t num,
                      int64_t cols) {
    size_t row_bytes = (size_t)cols * rf_dtype_bytes(dtype);
    int64_t run = num_sources == 1 ? num : 1; /* rows that lie together on both sides */
    for (int64_t r = 0; r < num; r += run)
        for (int s = 0; s < num_sources; s++) {
            size_t src_row = (size_t)cols * rf_dtype_bytes(sources[s].dtype);
            rf_convert((char *)dst + (size_t)(r * num_sources + s) * row_bytes, dtype,
                       (const char *)sources[s].data + (size_t)(first + r) * src_row, sources[s].dtype,
                       (size_t)(run * cols));
        }
}

/* sources: num_sources tensors of at least `rows` rows of `cols`, interleaved by rows into dst [rows * num_sources, cols]. */
static rf_status copy_rows(loader *l, void *dst, rf_dtype dtype, const rf_tensor *sources, int num_sources,
                           int64_t rows, int64_t cols, rf_error *err) {
    if (l->stream == NULL) {
        pack_rows(dst, dtype, sources, num_sources, 0, rows, cols);
        return RF_OK;
    }
    size_t row_bytes = (size_t)cols * rf_dtype_bytes(dtype) * (size_t)num_sources;
    int64_t chunk = (int64_t)(STAGING_BYTES / row_bytes);
    for (int64_t done = 0; done < rows; done += chunk) {
        int64_t now = rows - done < chunk ? rows - done : chunk;
        pack_rows(l->staging, dtype, sources, num_sources, done, now, cols);
        RF_TRY(rf_stream_upload(l->stream, (char *)dst + (size_t)done * row_bytes, l->staging, (size_t)now * row_bytes,
                                err));
        RF_TRY(rf_stream_synchronize(l->stream, err)); /* the next chunk overwrites the staging buffer */
    }
    return RF_OK;
}

static rf_status load_matrix(loader *l, void **out, int layer, const char *leaf, int64_t rows, int64_t cols,
                             rf_error *err) {
    rf_tensor t;
    RF_TRY(get_tensor(l, layer, leaf, ".weight", 2, rows, cols, &t, err));
    RF_TRY(rf_params_take(l->m->params, out, l->m->dtype, (size_t)(rows * cols), err));
    return copy_rows(l, *out, l->m->dtype, &t, 1, rows, cols, err);
}

/* Embedding or head: the file has embedding_rows rows, the vocabulary's are kept. */
static rf_status load_vocab(loader *l, void **out, const char *leaf, rf_error *err) {
    const rf_text_desc *d = &l->m->desc;
    rf_tensor t;
    RF_TRY(get_tensor(l, -1, leaf, ".weight", 2, d->embedding_rows ? d->embedding_rows : d->vocab, d->hidden, &t, err));
    RF_TRY(rf_params_take(l->m->params, out, l->m->dtype, (size_t)(d->vocab * d->hidden), err));
    return copy_rows(l, *out, l->m->dtype, &t, 1, d->vocab, d->hidden, err);
}

static rf_status load_norm(loader *l, float **out, int layer, const char *leaf, int64_t width, rf_error *err) {
    rf_tensor t;
    void *device = NULL;
    RF_TRY(get_tensor(l, layer, leaf, ".weight", 1, width, 0, &t, err));
    RF_TRY(rf_params_take(l->m->params, &device, RF_DTYPE_F32, (size_t)width, err));
    *out = device;
    return copy_rows(l, device, RF_DTYPE_F32, &t, 1, 1, width, err);
}

/* q, k and v below each other; suffix ".bias": columns of one. */
static rf_status load_qkv(loader *l, void **out, int layer, const char *suffix, int64_t cols, rf_error *err) {
    const rf_text_desc *d = &l->m->desc;
    const char *const leaves[3] = {l->map->q, l->map->k, l->map->v};
    const int64_t q_rows = (int64_t)d->num_q_heads * d->head_dim, kv_rows = (int64_t)d->num_kv_heads * d->head_dim;
    const int64_t rows[3] = {q_rows, kv_rows, kv_rows};
    bool bias = suffix[1] == 'b';
    size_t row_bytes = (size_t)cols * rf_dtype_bytes(l->m->dtype);
    RF_TRY(rf_params_take(l->m->params, out, l->m->dtype, (size_t)((q_rows + 2 * kv_rows) * cols), err));
    char *dst = *out;
    for (int i = 0; i < 3; i++) {
        rf_tensor t;
        RF_TRY(get_tensor(l, layer, leaves[i], suffix, bias ? 1 : 2, rows[i], cols, &t, err));
        RF_TRY(copy_rows(l, dst, l->m->dtype, &t, 1, rows[i], cols, err));
        dst += (size_t)rows[i] * row_bytes;
    }
    return RF_OK;
}

static rf_status load_gate_up(loader *l, void **out, int layer, rf_error *err) {
    const rf_text_desc *d = &l->m->desc;
    rf_tensor both[2];
    RF_TRY(get_tensor(l, layer, l->map->gate, ".weight", 2, d->ffn, d->hidden, &both[0], err));
    RF_TRY(get_tensor(l, layer, l->map->up, ".weight", 2, d->ffn, d->hidden, &both[1], err));
    RF_TRY(rf_params_take(l->m->params, out, l->m->dtype, (size_t)(2 * d->ffn * d->hidden), err));
    return copy_rows(l, *out, l->m->dtype, both, 2, d->ffn, d->hidden, err);
}

static rf_status load_layer(loader *l, int layer, rf_error *err) {
    const rf_text_desc *d = &l->m->desc;
    const weight_map *map = l->map;
    rf_text_layer *w = &l->m->layers[layer];
    RF_TRY(load_norm(l, &w->attention_norm, layer, map->attention_norm, d->hidden, err));
    RF_TRY(load_norm(l, &w->ffn_norm, layer, map->ffn_norm, d->hidden, err));
    if (d->qk_norm) {
        RF_TRY(load_norm(l, &w->q_norm, layer, map->q_norm, d->head_dim, err));
        RF_TRY(load_norm(l, &w->k_norm, layer, map->k_norm, d->head_dim, err));
    }
    RF_TRY(load_qkv(l, &w->qkv, layer, ".weight", d->hidden, err));
    if (d->qkv_bias) RF_TRY(load_qkv(l, &w->qkv_bias, layer, ".bias", 1, err));
    RF_TRY(load_matrix(l, &w->out, layer, map->out, d->hidden, (int64_t)d->num_q_heads * d->head_dim, err));
    RF_TRY(load_gate_up(l, &w->gate_up, layer, err));
    return load_matrix(l, &w->down, layer, map->down, d->hidden, d->ffn, err);
}

static rf_status load_all(loader *l, rf_error *err) {
    rf_text_model *m = l->m;
    RF_TRY(find_map(l, err));
    RF_TRY(check_names(l, err));
    RF_TRY(load_norm(l, &m->final_norm, -1, l->map->final_norm, m->desc.hidden, err));
    RF_TRY(load_vocab(l, &m->embedding, l->map->embedding, err));
    m->head = m->embedding;
    if (!m->desc.tied_head) RF_TRY(load_vocab(l, &m->head, l->map->head, err));
    for (int i = 0; i < m->desc.num_layers; i++) RF_TRY(load_layer(l, i, err));
    return RF_OK;
}

/* --- rotary table --------------------------------------------------------------------------------------------------- */

/* As transformers computes them, operation by operation in f32 (a scalar over a tensor is a reciprocal and a product there); the
 * power alone is taken in f64 and rounded, where torch's own may be one unit off. */
static float inverse_frequency(const rf_text_desc *d, int j) {
    float exponent = (float)(2 * j) / (float)d->head_dim;
    float inv = 1.0f / (float)pow(d->rope_theta, (double)exponent);
    if (!d->rope_scaling.used) return inv;
    const float factor = (float)d->rope_scaling.factor, original = (float)d->rope_scaling.original;
    const double low = d->rope_scaling.low_factor, high = d->rope_scaling.high_factor;
    float wavelength = (1.0f / inv) * (float)(2.0 * M_PI);
    bool is_long = wavelength > (float)((double)d->rope_scaling.original / low);
    bool is_short = wavelength < (float)((double)d->rope_scaling.original / high);
    float scaled = is_long ? inv / factor : inv;
    if (is_long || is_short) return scaled;
    float smooth = ((1.0f / wavelength) * original - (float)low) / (float)(high - low);
    /* two statements: no fused multiply-add across them */
    float slow = (1.0f - smooth) * scaled / factor;
    float fast = smooth * scaled;
    return slow + fast;
}

void rf_text_rope_table(float *out, const rf_text_desc *desc, int64_t positions) {
    int pairs = desc->head_dim / 2;
    for (int j = 0; j < pairs; j++) {
        float inv = inverse_frequency(desc, j);
        for (int64_t p = 0; p < positions; p++) {
            float angle = (float)p * inv;
            float *pair = out + (p * pairs + j) * 2;
            pair[0] = (float)cos((double)angle);
            pair[1] = (float)sin((double)angle);
        }
    }
}

static rf_status put_rope(rf_text_model *m, rf_error *err) {
    size_t num = (size_t)m->desc.max_positions * (size_t)m->desc.head_dim;
    void *device = NULL;
    float *host = rf_alloc(num * sizeof *host);
    if (host == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a rotary table of %zu floats", num);
    rf_text_rope_table(host, &m->desc, m->desc.max_positions);
    rf_status st = rf_params_put(m->params, &device, RF_DTYPE_F32, host, num, err);
    rf_free(host);
    m->rope = device;
    m->rope_positions = m->desc.max_positions;
    return st;
}

/* --- models --------------------------------------------------------------------------------------------------------- */

static rf_status check_dtype(const rf_backend *backend, rf_dtype dtype, rf_error *err) {
    bool cuda = rf_backend_get_kind(backend) == RF_BACKEND_CUDA;
    if (dtype == RF_DTYPE_F32 || (dtype == RF_DTYPE_BF16 && cuda)) return RF_OK;
    return rf_fail(err, RF_ERR_DTYPE, "dtype %s is not computed on %s; it runs %s", rf_dtype_name(dtype),
                   rf_backend_name(backend), cuda ? "f32 and bf16" : "f32");
}

/* A host that hands out more memory than it has kills the process later; weights alone that pass it are refused here. */
static rf_status check_host_memory(const rf_backend *backend, const rf_text_desc *d, rf_dtype dtype, rf_error *err) {
    if (rf_backend_get_kind(backend) != RF_BACKEND_CPU) return RF_OK;
    const double layer = (double)d->hidden * d->head_dim * (2.0 * d->num_q_heads + 2.0 * d->num_kv_heads) +
                         3.0 * (double)d->hidden * (double)d->ffn;
    const double want = (double)rf_dtype_bytes(dtype) *
                        (layer * d->num_layers + (d->tied_head ? 1.0 : 2.0) * (double)d->vocab * (double)d->hidden);
    const long pages = sysconf(_SC_PHYS_PAGES), page = sysconf(_SC_PAGESIZE);
    const double have = (double)pages * (double)page;
    if (pages <= 0 || page <= 0 || want < 0.95 * have) return RF_OK;
    return rf_fail(err, RF_ERR_MEMORY, "the weights take %.1f GiB in %s, this machine has %.1f GiB", want / 0x1p30,
                   rf_dtype_name(dtype), have / 0x1p30);
}

static rf_status create(rf_text_model **out, rf_backend *backend, const rf_text_desc *desc, rf_dtype dtype,
                        rf_error *err) {
    RF_TRY(rf_text_desc_check(desc, err));
    RF_TRY(check_dtype(backend, dtype, err));
    RF_TRY(check_host_memory(backend, desc, dtype, err));
    rf_text_model *m = rf_alloc_zero(1, sizeof *m);
    if (m == NULL) return rf_fail(err, RF_ERR_MEMORY, "out of memory for a model");
    m->desc = *desc;
    m->dtype = dtype;
    m->backend = backend;
    m->layers = rf_alloc_zero((size_t)desc->num_layers, sizeof *m->layers);
    rf_status st = m->layers ? rf_params_create(&m->params, backend, err)
                             : rf_fail(err, RF_ERR_MEMORY, "out of memory for %d layers", desc->num_layers);
    if (st == RF_OK) st = put_rope(m, err);
    if (st != RF_OK) {
        rf_text_model_close(m);
        return st;
    }
    *out = m;
    return RF_OK;
}

rf_status rf_text_model_load(rf_text_model **out, rf_backend *backend, const char *dir, rf_dtype dtype, rf_error *err) {
    rf_text_desc desc;
    rf_weights *file = NULL;
    loader l = {0};
    *out = NULL;
    RF_TRY(rf_text_config_read(&desc, dir, err));
    rf_status st = rf_weights_open(&file, dir, err);
    l.file = file;
    if (st == RF_OK) st = create(&l.m, backend, &desc, dtype, err);
    if (st == RF_OK && rf_backend_get_kind(backend) != RF_BACKEND_CPU) {
        void *staging = NULL;
        st = rf_stream_create(&l.stream, backend, err);
        if (st == RF_OK) st = rf_backend_alloc_pinned(backend, &staging, STAGING_BYTES, err);
        l.staging = staging;
    }
    if (st == RF_OK) {
        st = load_all(&l, err);
        if (st != RF_OK) rf_fail_prefix(err, st, "%s", dir);
    }
    if (st == RF_OK) {
        l.m->folder = rf_strdup(dir);
        if (l.m->folder == NULL) st = rf_fail(err, RF_ERR_MEMORY, "no memory for a path");
    }
    rf_stream_destroy(l.stream);
    rf_backend_free_pinned(backend, l.staging);
    rf_weights_close(file);
    if (st == RF_OK)
        *out = l.m;
    else
        rf_text_model_close(l.m);
    return st;
}

void rf_text_model_close(rf_text_model *model) {
    if (model == NULL) return;
    rf_params_destroy(model->params);
    rf_free(model->layers);
    rf_free(model->folder);
    rf_free(model);
}

bool rf_text_is_text(const char *dir) {
    rf_json *config = NULL;
    char *path = rf_path_join(dir, "config.json");
    bool is_text = false;
    if (path != NULL && rf_path_exists(path) && rf_json_open(&config, path, NULL) == RF_OK) {
        const rf_json_value *root = rf_json_root(config);
        is_text = rf_json_is_object(root) && !rf_json_has(root, "_class_name") &&
                  (rf_json_has(root, "model_type") || rf_json_has(root, "architectures"));
    }
    rf_json_close(config);
    rf_free(path);
    return is_text;
}

size_t rf_text_model_bytes(const rf_text_model *model) {
    return rf_params_tensor_bytes(model->params);
}

int64_t rf_text_model_num_params(const rf_text_model *model) {
    return rf_params_num_elems(model->params) - model->rope_positions * model->desc.head_dim;
}

/* --- synthetic weights ---------------------------------------------------------------------------------------------- */

typedef struct {
    rf_text_model *m;
    rf_stream *stream;
    uint64_t seed, key; /* key: number of the tensor, so that a tensor's values depend on (seed, key, index) alone */
} drawer;

static rf_status draw(drawer *d, void **out, rf_dtype dtype, int64_t num, double mean, double std, rf_error *err) {
    RF_TRY(rf_params_take(d->m->params, out, dtype, (size_t)num, err));
    rf_fill_normal_args args = {.out = *out,
                                .dtype = dtype,
                                .num = num,
                                .seed = d->seed,
                                .key = d->key++,
                                .mean = (float)mean,
                                .std = (float)std};
    return rf_ops_for(d->m->backend)->fill_normal(d->stream, &args, err);
}

static rf_status draw_matrix(drawer *d, void **out, int64_t rows, int64_t cols, rf_error *err) {
    return draw(d, out, d->m->dtype, rows * cols, 0.0, 1.0 / sqrt((double)cols), err);
}

static rf_status draw_norm(drawer *d, float **out, int64_t width, rf_error *err) {
    void *device = NULL;
    rf_status st = draw(d, &device, RF_DTYPE_F32, width, 1.0, 0.0, err);
    *out = device;
    return st;
}

static rf_status draw_layer(drawer *d, rf_text_layer *w, rf_error *err) {
    const rf_text_desc *desc = &d->m->desc;
    int64_t q_rows = (int64_t)desc->num_q_heads * desc->head_dim;
    int64_t qkv_rows = q_rows + 2 * (int64_t)desc->num_kv_heads * desc->head_dim;
    RF_TRY(draw_norm(d, &w->attention_norm, desc->hidden, err));
    RF_TRY(draw_norm(d, &w->ffn_norm, desc->hidden, err));
    if (desc->qk_norm) {
        RF_TRY(draw_norm(d, &w->q_norm, desc->head_dim, err));
        RF_TRY(draw_norm(d, &w->k_norm, desc->head_dim, err));
    }
    RF_TRY(draw_matrix(d, &w->qkv, qkv_rows, desc->hidden, err));
    if (desc->qkv_bias) RF_TRY(draw(d, &w->qkv_bias, d->m->dtype, qkv_rows, 0.0, 0.02, err));
    RF_TRY(draw_matrix(d, &w->out, desc->hidden, q_rows, err));
    RF_TRY(draw_matrix(d, &w->gate_up, 2 * desc->ffn, desc->hidden, err));
    return draw_matrix(d, &w->down, desc->hidden, desc->ffn, err);
}

static rf_status draw_all(drawer *d, rf_error *err) {
    rf_text_model *m = d->m;
    const rf_text_desc *desc = &m->desc;
    RF_TRY(draw_norm(d, &m->final_norm, desc->hidden, err));
    /* a tied embedding serves as a head of fan-in `hidden`; alone it is looked up, and every row counts as one input */
    double std = desc->tied_head ? 1.0 / sqrt((double)desc->hidden) : 1.0;
    RF_TRY(draw(d, &m->embedding, m->dtype, desc->vocab * desc->hidden, 0.0, std, err));
    m->head = m->embedding;
    if (!desc->tied_head) RF_TRY(draw_matrix(d, &m->head, desc->vocab, desc->hidden, err));
    for (int i = 0; i < desc->num_layers; i++) RF_TRY(draw_layer(d, &m->layers[i], err));
    return RF_OK;
}

rf_status rf_text_model_synthetic(rf_text_model **out, rf_backend *backend, const rf_text_desc *desc, rf_dtype dtype,
                                  uint64_t seed, int64_t max_positions, rf_error *err) {
    rf_text_desc own = *desc;
    drawer d = {.seed = seed};
    *out = NULL;
    if (max_positions > 0) own.max_positions = max_positions;
    rf_status st = create(&d.m, backend, &own, dtype, err);
    if (st == RF_OK) st = rf_stream_create(&d.stream, backend, err);
    if (st == RF_OK) st = draw_all(&d, err);
    if (st == RF_OK) st = rf_stream_synchronize(d.stream, err);
    rf_stream_destroy(d.stream);
    if (st == RF_OK)
        *out = d.m;
    else
        rf_text_model_close(d.m);
    return st;
}

/* samples/refrain/bench_text.c - `refrain bench --what text`: what a pass of a text model costs, by computed rows and kept keys.
 *
 * A pass computes `rows` rows behind `kept` rows whose keys and values are in the cache, which it sees with its own. The rows that may
 * commit go through the head. Kept rows are computed beforehand, so that caches hold what caches hold.
 *   full      all rows of a text: kept 0
 *   reuse     attention to the kept keys is taken from the pass before (FlashBlock), fresh: computed and kept anew
 * On CUDA some passes are queued one behind the other and the last one's statistics are read: the time is the mean of such a group by
 * the clock, so it is the device's unless the host is slower. On the host a group is one pass. */
#include <stdio.h>
#include <string.h>

#include "core/memory.h"
#include "dlm/forward.h"
#include "samples/refrain/bench_run.h"

#define GROUP_DEVICE   8
#define WARMUP_DEVICE  3
#define WARMUP_HOST    1
#define FILL_ROWS      2048 /* of a pass that fills the cache */
#define BLOCK_ROWS     32   /* that may commit, of a long pass */
#define MOST_POSITIONS 1048576

typedef struct {
    int rows, kept, head;
} pass_shape;

typedef struct {
    bench *b;
    const rf_text_desc *desc;
    int batch;
    rf_text_session *session;
    int32_t *positions, *tokens, *head, *slots, *all; /* positions, tokens: [batch][rows]; the others [rows] */
    int32_t visible_end[4096];
    double weight_bytes; /* of the layers, read once a pass */
    bench_row *rows;
    int num_rows, room;
} text_bench;

/* ---- what is timed ---- */

/* Fills out with at most 4 * MAX_BATCHES shapes; returns how many. */
static rf_status list_shapes(const bench *b, const rf_text_desc *d, pass_shape *out, int *num, rf_error *err) {
    static const pass_shape bidirectional[] = {{1024, 0, 32}, {1024, 0, 1024}, {32, 1024, 32}, {32, 4096, 32}};
    static const pass_shape causal[] = {{1024, 0, 1}, {1, 1024, 1}, {1, 8192, 1}, {1, 32768, 1}};
    static const pass_shape blocks[] = {{0, 1024, 0}, {0, 8192, 0}, {0, 32768, 0}};
    int rows[MAX_BATCHES], kept[MAX_BATCHES], num_rows = 0, num_kept = 0;
    *num = 0;
    if (b->args.rows || b->args.kept) {
        char own[16];
        snprintf(own, sizeof own, "%d", d->attention == RF_TEXT_CAUSAL ? 1 : d->block > 0 ? (int)d->block : BLOCK_ROWS);
        RF_TRY(bench_read_numbers(b->args.rows ? b->args.rows : own, "rows", 1, MOST_POSITIONS, rows, &num_rows, err));
        RF_TRY(bench_read_numbers(b->args.kept ? b->args.kept : "0", "kept", 0, MOST_POSITIONS, kept, &num_kept, err));
        for (int i = 0; i < num_rows; i++) {
            for (int k = 0; k < num_kept && *num < 4 * MAX_BATCHES; k++) {
                int head = d->attention == RF_TEXT_CAUSAL ? 1 : rows[i] < BLOCK_ROWS ? rows[i] : BLOCK_ROWS;
                out[(*num)++] = (pass_shape){rows[i], kept[k], head};
            }
        }
        return RF_OK;
    }
    const pass_shape *list = bidirectional;
    size_t len = sizeof bidirectional / sizeof bidirectional[0];
    if (d->attention == RF_TEXT_CAUSAL) {
        list = causal;
        len = sizeof causal / sizeof causal[0];
    } else if (d->attention == RF_TEXT_BLOCK_CAUSAL) {
        list = blocks;
        len = sizeof blocks / sizeof blocks[0];
    }
    for (size_t i = 0; i < len; i++) {
        pass_shape s = list[i];
        if (s.rows == 0) s.rows = s.head = d->block; /* a block */
        out[(*num)++] = s;
    }
    return RF_OK;
}

rf_status bench_text_open(bench *b, rf_error *err) {
    const bench_args *a = &b->args;
    pass_shape shapes[4 * MAX_BATCHES];
    int num = 0;
    int64_t most = 0;
    if (a->is_kv) {
        RF_TRY(bench_kv_plan(b, &most, err));
    } else if (a->synthetic) {
        rf_text_desc desc;
        rf_status st = rf_text_config_builtin(&desc, a->synthetic, err);
        if (st != RF_OK) return rf_fail_prefix(err, st, "--synthetic-weights");
        RF_TRY(list_shapes(b, &desc, shapes, &num, err));
        for (int i = 0; i < num; i++)
            if (shapes[i].rows + shapes[i].kept > most) most = shapes[i].rows + shapes[i].kept;
        if (most < desc.max_positions) most = 0; /* the model's own are enough */
    }
    const char *model = a->is_kv && !a->model && !a->synthetic ? KV_DEFAULT_MODEL : a->model;
    rf_status st =
        open_text_model(&b->text, model, a->synthetic, most, a->device, (int)a->threads, a->dtype, &b->log, err);
    b->model_name = a->synthetic ? a->synthetic : b->text.name;
    b->backend = b->text.backend;
    b->dtype = b->text.dtype;
    return st == RF_OK && a->is_kv ? kv_check_model(&b->text, "--kv-policy", err) : st;
}

/* ---- passes ---- */

static rf_status open_session(text_bench *t, const pass_shape *s, bool graphs, bool reuse, rf_error *err) {
    const bench *b = t->b;
    int fill = s->kept < FILL_ROWS ? s->kept : FILL_ROWS;
    rf_text_session_options o = rf_text_session_options_default();
    o.batch = t->batch;
    o.capacity = s->rows + s->kept;
    o.max_rows = fill > s->rows ? fill : s->rows;
    o.max_head_rows = s->head;
    o.external_slots = reuse ? s->rows : 0;
    o.use_graphs = graphs;
    o.tune_gemm = b->args.tune;
    o.gemm_tuning = b->tuning_path;
    rf_dtype_from_name(b->args.residual, &o.residual_dtype); /* "auto" is no dtype and leaves the default */
    rf_text_session_destroy(t->session);
    t->session = NULL;
    return rf_text_session_create(&t->session, b->text.model, &o, err);
}

/* Rows [begin, end) of every sequence, with ids that differ. */
static void set_rows(text_bench *t, rf_text_pass *p, int begin, int end) {
    int n = end - begin;
    for (int s = 0; s < t->batch; s++) {
        t->visible_end[s] = end;
        for (int i = 0; i < n; i++) {
            t->positions[s * n + i] = begin + i;
            t->tokens[s * n + i] = (int32_t)(((int64_t)(begin + i) * 7919 + s * 104729 + 2) % t->desc->vocab);
        }
    }
    p->num_rows = n;
    p->rows = t->positions;
    p->tokens = t->tokens;
    p->visible_end = t->visible_end;
    if (t->desc->attention == RF_TEXT_CAUSAL && n > 1) p->mask = RF_MASK_CAUSAL;
    if (t->desc->attention == RF_TEXT_BLOCK_CAUSAL && n > t->desc->block) {
        p->mask = RF_MASK_BLOCK_CAUSAL;
        p->mask_block = t->desc->block;
    }
}

static rf_status fill(text_bench *t, int kept, rf_error *err) {
    for (int begin = 0; begin < kept; begin += FILL_ROWS) {
        rf_text_pass p = rf_text_pass_default();
        set_rows(t, &p, begin, begin + FILL_ROWS < kept ? begin + FILL_ROWS : kept);
        RF_TRY(rf_text_session_forward(t->session, &p, err));
    }
    return RF_OK;
}

typedef enum { EXTERNAL_NONE = 0, EXTERNAL_FRESH, EXTERNAL_REUSED } external_kind;

static rf_status time_pass(text_bench *t, const pass_shape *s, external_kind external, rf_error *err) {
    bool cuda = rf_backend_get_kind(t->b->backend) == RF_BACKEND_CUDA;
    int group = cuda ? GROUP_DEVICE : 1, warmups = cuda ? WARMUP_DEVICE : WARMUP_HOST;
    rf_text_pass p = rf_text_pass_default();
    rf_token_stats *stats = rf_alloc_zero((size_t)t->batch * (size_t)s->head, sizeof *stats);
    if (!stats) return rf_fail(err, RF_ERR_MEMORY, "no memory for a pass");
    set_rows(t, &p, s->kept, s->kept + s->rows);
    p.num_head_rows = s->head;
    p.head_rows = t->head;
    for (int q = 0; q < t->batch; q++)
        for (int i = 0; i < s->head; i++) t->head[q * s->head + i] = s->rows - s->head + i;
    if (external != EXTERNAL_NONE) {
        p.external = RF_EXTERNAL_USE;
        p.inside_begin = s->kept;
        p.inside_end = s->kept + s->rows;
        p.external_slot = t->slots;
        p.fresh = t->all;
        p.num_fresh = s->rows;
    }
    rf_status st = rf_text_session_forward(t->session, &p, err); /* whose slots are then full */
    if (external == EXTERNAL_REUSED) p.num_fresh = 0;
    for (int64_t run = -warmups; run < t->b->args.num_runs && st == RF_OK; run++) {
        double start = now_ms();
        for (int i = 0; i < group && st == RF_OK; i++) st = rf_text_session_forward(t->session, &p, err);
        if (st == RF_OK) st = rf_text_session_read_stats(t->session, stats, err);
        if (run >= 0) t->b->times[run] = (now_ms() - start) / group;
        if (st == RF_OK && cancel_requested())
            st = rf_fail(err, RF_ERR_CANCELLED, "interrupted after %d runs", run < 0 ? 0 : (int)run);
    }
    rf_free(stats);
    return st;
}

/* ---- rows ---- */

static void add_row(text_bench *t, const pass_shape *s, const char *label, double keys) {
    const bench *b = t->b;
    const rf_text_desc *d = t->desc;
    if (t->num_rows == t->room) return; /* room is counted beforehand */
    bench_row *row = &t->rows[t->num_rows++];
    rf_text_session_info info = rf_text_session_get_info(t->session);
    double head_bytes = (double)(d->vocab * d->hidden) * (double)rf_dtype_bytes(b->dtype);
    double bytes = t->weight_bytes + (s->head > 0 ? head_bytes : 0), each = (double)rf_dtype_bytes(b->dtype);
    double rows = (double)s->rows * t->batch;
    double flops = 2 * t->weight_bytes / each * rows + 2 * (double)(d->vocab * d->hidden) * s->head * t->batch +
                   4.0 * d->num_layers * d->num_q_heads * d->head_dim * rows * keys;
    *row = (bench_row){.model = b->model_name,
                       .device = rf_backend_description(b->backend),
                       .dtype = rf_dtype_name(b->dtype),
                       .text = true,
                       .num_params = rf_text_model_num_params(b->text.model),
                       .batch = t->batch,
                       .num_rows = s->rows,
                       .kept = s->kept,
                       .head_rows = s->head,
                       .arena_bytes = info.arena_bytes,
                       .graph_nodes = info.graph_nodes};
    snprintf(row->label, sizeof row->label, "%s", label);
    bench_row_set_times(row, b->times, (int)b->args.num_runs);
    row->gbytes_per_s = bytes / row->median_ms / 1e6;
    row->tflops = flops / row->median_ms / 1e9;
    if (b->flops_per_ms <= 0) return;
    double kv = 2.0 * d->num_layers * d->num_kv_heads * d->head_dim * each * keys * t->batch;
    double memory_ms = (bytes + kv) / b->copy_bytes_per_ms, compute_ms = flops / b->flops_per_ms;
    row->floor_ms = memory_ms > compute_ms ? memory_ms : compute_ms;
}

/* Keys that a row sees, mean. */
static double keys_of(const text_bench *t, const pass_shape *s) {
    if (t->desc->attention == RF_TEXT_CAUSAL) return s->kept + (s->rows + 1) / 2.0;
    if (t->desc->attention == RF_TEXT_BLOCK_CAUSAL && s->rows > t->desc->block)
        return s->kept + (s->rows + t->desc->block) / 2.0;
    return s->kept + s->rows;
}

static rf_status bench_shape(text_bench *t, const pass_shape *s, rf_error *err) {
    static const char *const names[] = {"", ", attention kept anew", ", attention reused"};
    bool causal = t->desc->attention == RF_TEXT_CAUSAL;
    bool reuses = !causal && s->kept > 0 && t->batch == 1 &&
                  (t->desc->attention == RF_TEXT_BIDIRECTIONAL || s->rows <= t->desc->block);
    bool graphs = rf_backend_has_graphs(t->b->backend);
    for (int pass = 0; pass < (graphs ? 2 : 1); pass++) {
        RF_TRY(open_session(t, s, pass == 0, reuses && pass == 0, err));
        RF_TRY(fill(t, s->kept, err));
        for (int e = EXTERNAL_NONE; e <= (reuses && pass == 0 ? EXTERNAL_REUSED : EXTERNAL_NONE); e++) {
            char label[96];
            RF_TRY(time_pass(t, s, (external_kind)e, err));
            snprintf(label, sizeof label, "%d row%s, %d kept%s%s", s->rows, s->rows == 1 ? "" : "s", s->kept, names[e],
                     pass ? ", no graphs" : "");
            add_row(t, s, label, e == EXTERNAL_REUSED ? s->rows : keys_of(t, s));
        }
    }
    return RF_OK;
}

static rf_status alloc_lists(text_bench *t, const pass_shape *shapes, int num, rf_error *err) {
    int most = FILL_ROWS;
    for (int i = 0; i < num; i++) {
        if (shapes[i].rows > most) most = shapes[i].rows;
    }
    size_t each = (size_t)most * (size_t)t->batch;
    t->positions = rf_alloc_zero(each, sizeof *t->positions);
    t->tokens = rf_alloc_zero(each, sizeof *t->tokens);
    t->head = rf_alloc_zero(each, sizeof *t->head);
    t->slots = rf_alloc_zero((size_t)most, sizeof *t->slots);
    t->all = rf_alloc_zero((size_t)most, sizeof *t->all);
    if (!t->positions || !t->tokens || !t->head || !t->slots || !t->all)
        return rf_fail(err, RF_ERR_MEMORY, "no memory for %d rows", most);
    for (int i = 0; i < most; i++) t->slots[i] = t->all[i] = i;
    return RF_OK;
}

static void free_lists(text_bench *t) {
    rf_text_session_destroy(t->session);
    t->session = NULL;
    rf_free(t->positions);
    rf_free(t->tokens);
    rf_free(t->head);
    rf_free(t->slots);
    rf_free(t->all);
    t->positions = t->tokens = t->head = t->slots = t->all = NULL;
}

rf_status bench_texts(bench *b, bench_row **rows, int *num_rows, rf_error *err) {
    static text_bench t;
    const rf_text_desc *d = &b->text.model->desc;
    pass_shape shapes[4 * MAX_BATCHES];
    int num = 0, num_fitting = 0;
    bool given = b->args.rows || b->args.kept;
    t = (text_bench){.b = b, .desc = d};
    *rows = NULL;
    *num_rows = 0;
    RF_TRY(list_shapes(b, d, shapes, &num, err));
    for (int i = 0; i < num; i++) {
        pass_shape s = shapes[i];
        if (s.rows + s.kept > d->max_positions && given)
            return rf_fail(err, RF_ERR_ARGUMENT, "--rows %d --kept %d: %s has %jd positions", s.rows, s.kept,
                           b->model_name, (intmax_t)d->max_positions);
        if (s.rows + s.kept <= d->max_positions) shapes[num_fitting++] = s;
    }
    double heads = d->num_q_heads + 2.0 * d->num_kv_heads;
    double layer = (double)d->hidden * ((heads + d->num_q_heads) * d->head_dim + 3.0 * (double)d->ffn);
    t.weight_bytes = layer * d->num_layers * (double)rf_dtype_bytes(b->dtype);
    t.room = b->num_batches * num_fitting * 4;
    t.rows = rf_alloc_zero((size_t)t.room + 1, sizeof *t.rows);
    if (!t.rows) return rf_fail(err, RF_ERR_MEMORY, "no memory for a table");
    *rows = t.rows;
    rf_status st = RF_OK;
    for (int k = 0; k < b->num_batches && st == RF_OK; k++) {
        t.batch = b->batches[k];
        st = alloc_lists(&t, shapes, num_fitting, err);
        for (int i = 0; i < num_fitting && st == RF_OK; i++) st = bench_shape(&t, &shapes[i], err);
        free_lists(&t);
    }
    for (int i = 0; i < t.num_rows; i++) t.rows[i].what = t.rows[i].label;
    *num_rows = t.num_rows;
    return st;
}

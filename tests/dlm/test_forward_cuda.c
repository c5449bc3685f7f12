/* tests/dlm/test_forward_cuda.c - the text executor on CUDA: against the host, which the fixtures hold against
 * transformers; graphs, padding and repeats to the bit; what a pass costs.
 *
 * Bounds: f32 relative L2 1e-4 (no TF32: other orders of sums only); bf16 1e-2 for hidden states (weights, activations
 * and caches rounded to 8 bits, over 4 layers). Decisions that rounding could turn (which rows change most, whether a
 * layer drifted) are compared in f32 alone. */
#include "core/memory.h"
#include "core/rng.h"
#include "dlm/forward.h"
#include "tests/test_util.h"

enum { HIDDEN = 256, VOCAB = 1000, LAYERS = 4, CAPACITY = 600, MAX_FLOATS = 8 << 20 };

static rf_text_desc small_desc(void) {
    return (rf_text_desc){.family = "test",
                          .vocab = VOCAB,
                          .hidden = HIDDEN,
                          .ffn = 512,
                          .num_layers = LAYERS,
                          .num_q_heads = 4,
                          .num_kv_heads = 2,
                          .head_dim = 64,
                          .max_positions = 1024,
                          .norm_eps = 1e-5,
                          .rope_theta = 1e4,
                          .qkv_bias = true,
                          .qk_norm = true,
                          .attention = RF_TEXT_BLOCK_CAUSAL, /* the masks are those of the passes */
                          .block = 32,
                          .mask_id = VOCAB - 1,
                          .bos_id = -1,
                          .pad_id = -1};
}

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_error err;
} device;

static device open_device(const char *name, rf_dtype dtype) {
    device d = {0};
    rf_text_desc desc = small_desc();
    rf_assert_ok(rf_backend_open(&d.backend, name, 0, &d.err), d.err);
    rf_assert_ok(rf_text_model_synthetic(&d.model, d.backend, &desc, dtype, 17, 0, &d.err), d.err);
    return d;
}

static void close_device(device *d) {
    rf_text_model_close(d->model);
    rf_backend_close(d->backend);
}

static rf_text_session *open_session(device *d, int batch, bool planes, bool graphs) {
    rf_text_session *s = NULL;
    rf_text_session_options o = rf_text_session_options_default();
    o.batch = batch;
    o.capacity = CAPACITY;
    o.keep_inputs = o.keep_increments = planes;
    o.external_slots = planes ? 40 : 0;
    o.use_graphs = graphs;
    rf_assert_ok(rf_text_session_create(&s, d->model, &o, &d->err), d->err);
    return s;
}

/* What passes gave, one after the other. */
typedef struct {
    float *data;
    size_t num;
} record;

static void keep(device *d, rf_text_session *s, const rf_text_pass *pass, int batch, record *out) {
    size_t num = (size_t)(batch * pass->num_head_rows) * HIDDEN;
    rf_token_stats stats[512];
    ck_assert(out->num + num <= MAX_FLOATS && batch * pass->num_head_rows <= 512);
    rf_assert_ok(rf_text_session_forward(s, pass, &d->err), d->err);
    rf_assert_ok(rf_text_session_read_stats(s, stats, &d->err), d->err);
    rf_assert_ok(rf_text_session_read_hidden(s, out->data + out->num, &d->err), d->err);
    out->num += num;
}

static void iota(int32_t *out, int32_t from, int32_t num) {
    for (int32_t i = 0; i < num; i++) out[i] = from + i;
}
static void draw_tokens(int32_t *out, int32_t num, uint32_t key) {
    for (int32_t i = 0; i < num; i++) {
        uint32_t counter[4] = {(uint32_t)i, key, 0, 0}, seed[2] = {7, 0}, words[4];
        rf_philox4x32(counter, seed, words);
        out[i] = (int32_t)(words[0] % (VOCAB - 1));
    }
}

/* Rows [from, to) of one sequence, every third of them a head row. */
typedef struct {
    rf_text_pass pass;
    int32_t rows[CAPACITY], head[CAPACITY], end[1];
} range_pass;
static void make_range(range_pass *r, const int32_t *tokens, int32_t from, int32_t to, int32_t end) {
    r->pass = rf_text_pass_default();
    iota(r->rows, from, to - from);
    r->end[0] = end;
    r->pass.num_rows = to - from;
    r->pass.rows = r->rows;
    r->pass.tokens = tokens + from;
    r->pass.head_rows = r->head;
    r->pass.visible_end = r->end;
    for (int32_t i = 0; i < to - from; i += 3) r->head[r->pass.num_head_rows++] = i;
}

/* One sequence, every kind of pass. exact: decisions too. */
static void one_sequence(device *d, bool graphs, bool exact, record *out) {
    rf_text_session *s = open_session(d, 1, true, graphs);
    static int32_t tokens[CAPACITY], visible[CAPACITY], slots[CAPACITY], all[CAPACITY];
    static range_pass r;
    draw_tokens(tokens, CAPACITY, 1);
    iota(all, 0, CAPACITY);
    /* masks and caches */
    make_range(&r, tokens, 0, 137, 137);
    r.pass.mask = RF_MASK_CAUSAL;
    keep(d, s, &r.pass, 1, out);
    make_range(&r, tokens, 137, 300, 300);
    r.pass.mask = RF_MASK_BLOCK_CAUSAL;
    r.pass.mask_block = 32;
    keep(d, s, &r.pass, 1, out);
    for (int32_t i = 300; i < 305; i++) { /* a row a pass */
        make_range(&r, tokens, i, i + 1, i + 1);
        r.pass.mask = RF_MASK_CAUSAL;
        keep(d, s, &r.pass, 1, out);
    }
    make_range(&r, tokens, 0, 300, 300);
    keep(d, s, &r.pass, 1, out);
    make_range(&r, tokens, 260, 292, 300);
    keep(d, s, &r.pass, 1, out);
    /* a window */
    int32_t num_visible = 0;
    for (int32_t j = 0; j < 300; j++)
        if (j % 3 || (j >= 260 && j < 292)) visible[num_visible++] = j;
    r.pass.visible = visible;
    r.pass.num_visible = num_visible;
    keep(d, s, &r.pass, 1, out);
    /* attention reuse: keys before the block, keys around it, a list */
    for (int form = 0; form < 3; form++) {
        make_range(&r, tokens, 260, 292, form == 0 ? 292 : 300);
        for (int32_t i = 0; i < 32; i++) slots[i] = 35 - i;
        if (form == 2) {
            r.pass.visible = visible;
            r.pass.num_visible = num_visible;
        }
        r.pass.external = RF_EXTERNAL_USE;
        r.pass.external_slot = slots;
        r.pass.inside_begin = 260;
        r.pass.inside_end = 292;
        r.pass.fresh = all;
        r.pass.num_fresh = 32;
        keep(d, s, &r.pass, 1, out);
        tokens[265 + form] = 3;
        r.pass.num_fresh = form == 1 ? 0 : 3 + form;
        keep(d, s, &r.pass, 1, out);
    }
    /* increments */
    static const double ratios[] = {1.0, 0.0, 0.25};
    for (int step = 0; step < (exact ? 4 : 3); step++) {
        make_range(&r, tokens, step == 0 ? 0 : 100, 300, 300);
        r.pass.layers = RF_PASS_VERIFY;
        r.pass.verify.store = step == 0;
        r.pass.verify.full_layers = 1;
        r.pass.verify.begin = 120;
        r.pass.verify.end = 300;
        r.pass.verify.ratio = step == 0 ? 0 : ratios[step - 1];
        keep(d, s, &r.pass, 1, out);
        for (int32_t i = 0; i < 40; i++) tokens[130 + 4 * i + step] = (tokens[130 + 4 * i + step] + 7) % VOCAB;
    }
    /* drift: full, never, forced, always, and where it is measured */
    static int32_t tracked[LAYERS], rows[CAPACITY], row_tokens[CAPACITY], window[16];
    static uint8_t decoded[CAPACITY];
    static const double thresholds[] = {0, -1, -1, 2, 0.9};
    for (int32_t j = 0; j < 200; j++) decoded[j] = 1;
    int32_t end = 300;
    for (int step = 0; step < (exact ? 5 : 4); step++) {
        rf_text_pass pass = rf_text_pass_default();
        int32_t num = 0;
        for (int32_t j = 0; j < end; j++) {
            bool is_tracked = false;
            for (int l = 0; l < LAYERS; l++) is_tracked |= tracked[l] == j;
            if (step > 0 && !is_tracked && (j < 200 || j >= 216) && j != 50 + step) continue;
            if (j >= 200 && j < 216) window[j - 200] = num;
            rows[num] = j;
            row_tokens[num++] = tokens[j];
        }
        pass.num_rows = num;
        pass.rows = rows;
        pass.tokens = row_tokens;
        pass.visible_end = &end;
        pass.num_head_rows = pass.drift.num_window = 16;
        pass.head_rows = pass.drift.window = window;
        pass.layers = RF_PASS_DRIFT;
        pass.drift.threshold = thresholds[step];
        pass.drift.over_heads = step == 4;
        pass.drift.tracked = tracked;
        pass.drift.decoded = decoded;
        pass.drift.force_from = step == 2 ? 2 : -1;
        pass.drift.all_rows = all;
        pass.drift.all_tokens = tokens;
        pass.drift.num_all = end;
        keep(d, s, &pass, 1, out);
        float drift[LAYERS];
        int32_t expanded_at;
        rf_assert_ok(rf_text_session_read_drift(s, tracked, drift, &expanded_at, &d->err), d->err);
        ck_assert_int_eq(expanded_at, step == 2 ? 1 : step == 3 ? 0 : step == 4 ? expanded_at : -1);
        for (int l = 0; l < LAYERS; l++) {
            ck_assert(tracked[l] >= 0 && tracked[l] < 200);
            if (exact) out->data[out->num++] = (float)tracked[l];
            if (exact) out->data[out->num++] = isnan(drift[l]) ? -1.0f : drift[l];
            if (!exact) tracked[l] = 20 + l; /* not what rounding chose */
        }
        if (exact) out->data[out->num++] = (float)expanded_at;
        tokens[51 + step] = (tokens[51 + step] + 100) % VOCAB;
    }
    rf_text_session_destroy(s);
}

/* Four sequences of different lengths, in pairs. */
static void batch_of_sequences(device *d, bool graphs, record *out) {
    enum { B = 4, N = 70 };
    rf_text_session *s = open_session(d, B, false, graphs);
    static int32_t rows[B * N], tokens[B * N], head[B * 3];
    static const int32_t lengths[B] = {70, 33, 1, 64};
    for (int b = 0; b < B; b++) {
        draw_tokens(tokens + b * N, N, (uint32_t)(40 + b));
        for (int32_t i = 0; i < N; i++) rows[b * N + i] = i < lengths[b] ? i : -1;
        for (int32_t i = 0; i < 3; i++) head[b * 3 + i] = i * (lengths[b] - 1) / 2;
    }
    for (int form = 0; form < 3; form++) {
        rf_text_pass pass = rf_text_pass_default();
        pass.num_rows = N;
        pass.rows = rows;
        pass.tokens = tokens;
        pass.visible_end = lengths;
        pass.num_head_rows = 3;
        pass.head_rows = head;
        pass.mask = form == 0 ? RF_MASK_CAUSAL : RF_MASK_NONE;
        pass.cfg = form == 2 ? 1.5f : 0;
        keep(d, s, &pass, B, out);
    }
    rf_text_session_destroy(s);
}

static record run_all(const char *name, rf_dtype dtype, bool graphs, bool exact) {
    record out = {.data = rf_alloc(MAX_FLOATS * sizeof(float))};
    ck_assert_ptr_nonnull(out.data);
    device d = open_device(name, dtype);
    one_sequence(&d, graphs, exact, &out);
    batch_of_sequences(&d, graphs, &out);
    close_device(&d);
    return out;
}

START_TEST(passes_agree_with_the_host) {
    for (int form = 0; form < 2; form++) {
        bool exact = form == 0;
        record want = run_all("cpu", RF_DTYPE_F32, true, exact);
        record got = run_all("cuda", exact ? RF_DTYPE_F32 : RF_DTYPE_BF16, true, exact);
        ck_assert_uint_eq(want.num, got.num);
        rf_difference diff = rf_compare_f32(got.data, want.data, want.num);
        printf("%s: relative L2 %.2e, max abs %.2e\n", exact ? "f32" : "bf16", diff.rel_l2, diff.max_abs);
        rf_assert_close(got.data, want.data, want.num, INFINITY, exact ? 1e-4 : 1e-2);
        rf_free(want.data);
        rf_free(got.data);
    }
}
END_TEST

START_TEST(graphs_and_repeats_change_no_bit) {
    rf_dtype dtype = _i == 0 ? RF_DTYPE_F32 : RF_DTYPE_BF16;
    record first = run_all("cuda", dtype, true, false), again = run_all("cuda", dtype, true, false);
    record eager = run_all("cuda", dtype, false, false);
    ck_assert(first.num == again.num && first.num == eager.num);
    ck_assert_msg(memcmp(first.data, again.data, first.num * sizeof(float)) == 0, "two runs differ");
    ck_assert_msg(memcmp(first.data, eager.data, first.num * sizeof(float)) == 0,
                  "the graph and the direct calls differ");
    rf_free(first.data);
    rf_free(again.data);
    rf_free(eager.data);
}
END_TEST

/* What shares a bucket with a row, padding or rows that it does not see, changes no bit of it: 33 to 48 rows are one
 * bucket. */
START_TEST(neighbours_change_no_bit) {
    device d = open_device("cuda", RF_DTYPE_BF16);
    rf_text_session *s = open_session(&d, 1, false, true);
    static int32_t tokens[CAPACITY];
    static float want[HIDDEN * 16], got[HIDDEN * 16];
    static range_pass r;
    draw_tokens(tokens, CAPACITY, 6);
    for (int32_t num = 33; num <= 48; num += 5) {
        make_range(&r, tokens, 0, 200, 200);
        rf_assert_ok(rf_text_session_forward(s, &r.pass, &d.err), d.err);
        make_range(&r, tokens, 100, 100 + num, 200);
        iota(r.rows + 33, 300, num - 33); /* written, not seen */
        r.pass.num_head_rows = 11;
        record out = {.data = num == 33 ? want : got};
        keep(&d, s, &r.pass, 1, &out);
        if (num > 33) ck_assert_msg(memcmp(want, got, 11 * HIDDEN * sizeof(float)) == 0, "%d rows", num);
    }
    rf_text_session_destroy(s);
    close_device(&d);
}
END_TEST

START_TEST(a_pass_is_one_graph_without_allocation) {
    device d = open_device("cuda", RF_DTYPE_BF16);
    rf_text_session *s = open_session(&d, 1, true, true);
    static int32_t tokens[CAPACITY];
    static range_pass r;
    rf_token_stats stats[64];
    draw_tokens(tokens, CAPACITY, 6);
    for (int step = 0; step < 20; step++) {
        make_range(&r, tokens, 100 + step, 132 + step - step % 3, 210 + step);
        rf_memory_counts host = rf_memory_get_counts();
        rf_backend_counts before = rf_backend_get_counts(d.backend), after;
        rf_assert_ok(rf_text_session_forward(s, &r.pass, &d.err), d.err);
        if (step > 0) { /* nothing is waited for yet */
            after = rf_backend_get_counts(d.backend);
            ck_assert_uint_eq(after.num_syncs, before.num_syncs);
            ck_assert_uint_eq(after.num_launches, before.num_launches);
            ck_assert_uint_eq(after.num_graph_launches, before.num_graph_launches + 1);
        }
        rf_assert_ok(rf_text_session_read_stats(s, stats, &d.err), d.err);
        after = rf_backend_get_counts(d.backend);
        if (step == 0) continue;
        ck_assert_uint_eq(rf_memory_get_counts().num_allocs, host.num_allocs);
        ck_assert_uint_eq(after.num_device_allocs, before.num_device_allocs);
        ck_assert_uint_eq(after.num_syncs, before.num_syncs + 1);
    }
    rf_text_session_info info = rf_text_session_get_info(s);
    ck_assert_int_eq(info.num_graphs, 1);
    ck_assert_int_ge(info.graph_nodes, 8 * LAYERS);
    printf("a pass of %d layers: %d nodes\n", LAYERS, info.graph_nodes);
    rf_text_session_destroy(s);
    close_device(&d);
}
END_TEST

/* Passes queued faster than they are read, and more shapes than graphs are kept. */
START_TEST(passes_in_flight_and_forgotten_graphs) {
    device d = open_device("cuda", RF_DTYPE_BF16);
    rf_text_session *s = open_session(&d, 1, false, true);
    static int32_t tokens[CAPACITY];
    static float want[HIDDEN * 200], got[HIDDEN * 200];
    static range_pass r;
    draw_tokens(tokens, CAPACITY, 6);
    for (int round = 0; round < 2; round++) {
        for (int32_t from = 0; from < 560; from += 4) { /* nobody reads */
            make_range(&r, tokens, from, from + 4, from + 4);
            rf_assert_ok(rf_text_session_forward(s, &r.pass, &d.err), d.err);
            if (round == 1) rf_assert_ok(rf_text_session_read_stats(s, &(rf_token_stats[8]){{0}}[0], &d.err), d.err);
        }
        make_range(&r, tokens, 556, 560, 560);
        record out = {.data = round == 0 ? want : got};
        keep(&d, s, &r.pass, 1, &out);
    }
    ck_assert(memcmp(want, got, 2 * HIDDEN * sizeof(float)) == 0);
    for (uint64_t seed = 0; seed < 80; seed++) { /* a seed is part of a graph */
        r.pass.temperature = 1;
        r.pass.seed = seed;
        record out = {.data = got};
        keep(&d, s, &r.pass, 1, &out);
        ck_assert(memcmp(want, got, 2 * HIDDEN * sizeof(float)) == 0);
    }
    ck_assert_int_le(rf_text_session_get_info(s).num_graphs, 64);
    r.pass.temperature = 0;
    record out = {.data = got};
    keep(&d, s, &r.pass, 1, &out);
    ck_assert(memcmp(want, got, 2 * HIDDEN * sizeof(float)) == 0);
    rf_text_session_destroy(s);
    close_device(&d);
}
END_TEST

START_TEST(logits_are_kept_for_64_rows) {
    device d = open_device("cuda", RF_DTYPE_F32);
    rf_text_session *s = open_session(&d, 1, false, true);
    static int32_t tokens[CAPACITY];
    static float logits[64 * VOCAB];
    static range_pass r;
    rf_token_stats stats[64];
    draw_tokens(tokens, CAPACITY, 6);
    make_range(&r, tokens, 0, 192, 192);
    r.pass.keep_logits = true;
    for (int repeat = 0; repeat < 3; repeat++) {
        rf_assert_ok(rf_text_session_forward(s, &r.pass, &d.err), d.err);
        rf_assert_ok(rf_text_session_read_logits(s, -1, logits, &d.err), d.err);
        rf_assert_ok(rf_text_session_read_stats(s, stats, &d.err), d.err);
        for (int i = 0; i < 64; i++) {
            int best = 0;
            for (int v = 0; v < VOCAB; v++) best = logits[i * VOCAB + v] > logits[i * VOCAB + best] ? v : best;
            ck_assert_int_eq(stats[i].best, best);
        }
    }
    make_range(&r, tokens, 0, 195, 195);
    r.pass.keep_logits = true;
    rf_assert_fails(rf_text_session_forward(s, &r.pass, &d.err), d.err, RF_ERR_ARGUMENT, "at most 64");
    rf_text_session_destroy(s);
    close_device(&d);
}
END_TEST

int main(void) {
    rf_backend *backend = NULL;
    rf_error err = {0};
    if (rf_backend_open(&backend, "cuda", 0, &err) != RF_OK) {
        printf("skipped: %s\n", err.message);
        return 77;
    }
    rf_backend_close(backend);
    Suite *suite = suite_create("dlm/forward_cuda");
    TCase *tc = tcase_create("cuda");
    tcase_set_timeout(tc, 300);
    tcase_add_test(tc, passes_agree_with_the_host);
    tcase_add_loop_test(tc, graphs_and_repeats_change_no_bit, 0, 2);
    tcase_add_test(tc, neighbours_change_no_bit);
    tcase_add_test(tc, a_pass_is_one_graph_without_allocation);
    tcase_add_test(tc, passes_in_flight_and_forgotten_graphs);
    tcase_add_test(tc, logits_are_kept_for_64_rows);
    suite_add_tcase(suite, tc);
    SRunner *runner = srunner_create(suite);
    srunner_set_fork_status(runner, CK_NOFORK); /* a CUDA context does not survive a fork */
    srunner_run_all(runner, CK_ENV);
    int failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return failed ? 1 : 0;
}

/* tests/dlm/test_decode.c - decoding against golden runs of the plain reference (tests/fixtures/make_text.py), pass by pass; the
 * invariances of cached decoding; end rules, guides, bad requests. */
#include "core/json.h"
#include "core/memory.h"
#include "dlm/decode.h"
#include "tests/test_util.h"

enum { MOST = 512 };

typedef struct {
    rf_backend *backend;
    rf_text_model *model;
    rf_decoder *decoder;
    rf_error err;
} fixture;

static fixture open_model(const char *name) {
    fixture f = {0};
    char dir[512];
    snprintf(dir, sizeof dir, "%s/%s", RF_FIXTURE_DIR, name);
    rf_assert_ok(rf_backend_open(&f.backend, "cpu", 1, &f.err), f.err);
    rf_assert_ok(rf_text_model_load(&f.model, f.backend, dir, RF_DTYPE_F32, &f.err), f.err);
    return f;
}

static void close_model(fixture *f) {
    rf_decoder_destroy(f->decoder);
    rf_text_model_close(f->model);
    rf_backend_close(f->backend);
}

/* What a run committed, pass by pass. */
typedef struct {
    int num_passes, num[MOST];
    int32_t position[MOST][MOST], token[MOST][MOST]; /* of the canvas, ascending */
    int stop_after;
} record;

static bool note(void *user, const int32_t *canvas, int32_t length, const int32_t *changed, int32_t num) {
    record *r = user;
    if (num > 0) {
        r->num[r->num_passes] = num;
        for (int32_t i = 0; i < num; i++) {
            r->position[r->num_passes][i] = changed[i];
            r->token[r->num_passes][i] = canvas[changed[i]];
        }
        r->num_passes++;
    }
    return r->stop_after == 0 || r->num_passes < r->stop_after;
}

static rf_decode_result run(fixture *f, const rf_decode_options *o, const int32_t *prompt, int32_t num, record *r) {
    rf_decode_result result;
    rf_decoder_destroy(f->decoder);
    f->decoder = NULL;
    rf_assert_ok(rf_decoder_create(&f->decoder, f->model, o, num + o->max_new, &f->err), f->err);
    if (r) memset(r, 0, sizeof *r);
    rf_assert_ok(rf_decoder_run(f->decoder, o, prompt, num, r ? note : NULL, r, &result, &f->err), f->err);
    return result;
}

static int32_t read_ids(const rf_json_value *array, int32_t *out) {
    int32_t n = 0;
    for (const rf_json_value *v = rf_json_first(array); v; v = rf_json_next(v)) out[n++] = (int32_t)rf_json_number(v);
    return n;
}

static double number(const rf_json_value *object, const char *key, double absent) {
    return rf_json_has(object, key) ? rf_json_number(rf_json_get(object, key)) : absent;
}

static bool is(const char *a, const char *b) {
    return a && strcmp(a, b) == 0;
}

/* The options of a golden case in our words. */
static rf_decode_options golden_options(const rf_text_model *model, const char *decoder, const rf_json_value *from) {
    rf_decode_options o = rf_decode_options_default(model);
    const char *rule = rf_json_string(rf_json_get(from, "rule")), *alg = rf_json_string(rf_json_get(from, "alg"));
    o.max_new = (int32_t)number(from, "length", number(from, "count", 64));
    o.steps = (int32_t)number(from, "steps", 0);
    o.block = (int32_t)number(from, "block", 0);
    o.cfg_scale = number(from, "cfg", 0);
    o.seed = (uint64_t)number(from, "seed", 0);
    o.end = RF_END_NONE;
    o.ignore_eos = o.allow_mask = true;
    if (is(decoder, "llada") || is(decoder, "sdar")) {
        o.commit = RF_COMMIT_TOPN;
        o.confidence = RF_CONFIDENCE_PROB;
        o.dynamic = false;
    }
    if (is(rule, "threshold") || is(rule, "dynamic")) o.commit = RF_COMMIT_THRESHOLD;
    if (is(rule, "dynamic")) o.dynamic = o.threshold_strict = true;
    if (is(rule, "factor")) o.commit = RF_COMMIT_FACTOR;
    if (is(rule, "entropy_bound")) o.commit = RF_COMMIT_ENTROPY_BOUND;
    if (is(rule, "sequential")) o.commit = RF_COMMIT_SEQUENTIAL;
    o.threshold = number(from, "threshold", o.threshold);
    o.factor = number(from, "factor", o.factor);
    o.entropy_bound = number(from, "bound", o.entropy_bound);
    if (is(alg, "origin")) o.commit = RF_COMMIT_ORIGIN;
    if (is(alg, "maskgit_plus")) o.confidence = RF_CONFIDENCE_PROB;
    if (is(alg, "topk_margin")) o.confidence = RF_CONFIDENCE_MARGIN;
    if (is(alg, "entropy")) o.confidence = RF_CONFIDENCE_NEG_ENTROPY;
    return o;
}

START_TEST(golden_runs_are_made_again_pass_by_pass) {
    static record got;
    rf_json *doc = NULL;
    rf_error err;
    rf_assert_ok(rf_json_open(&doc, RF_FIXTURE_DIR "/text_decodes.json", &err), err);
    const rf_json_value *cases = rf_json_get(rf_json_root(doc), "cases");
    int num_cases = 0;
    for (const rf_json_value *c = rf_json_first(cases); c; c = rf_json_next(c)) {
        const char *name = rf_json_key(c), *decoder = rf_json_string(rf_json_get(c, "decoder"));
        int32_t prompt[MOST], want[MOST];
        const int32_t num_prompt = read_ids(rf_json_get(c, "prompt"), prompt);
        fixture f = open_model(rf_json_string(rf_json_get(c, "model")));
        const rf_decode_options o = golden_options(f.model, decoder, rf_json_get(c, "options"));
        const rf_decode_result r = run(&f, &o, prompt, num_prompt, &got);
        read_ids(rf_json_get(c, "tokens"), want);
        ck_assert_int_eq(r.num_all, o.max_new);
        for (int32_t i = 0; i < r.num_all; i++)
            ck_assert_msg(r.tokens[i] == want[i], "%s: token %d is %d, must be %d", name, i, r.tokens[i], want[i]);
        /* commits of each pass as a set, without the reference's empty passes and what lies behind the canvas */
        int pass = 0;
        for (const rf_json_value *p = rf_json_first(rf_json_get(c, "passes")); p; p = rf_json_next(p)) {
            int32_t pairs[2 * MOST], wanted = 0;
            const int32_t num = read_ids(p, pairs) / 2;
            for (int32_t i = 0; i < num; i++) wanted += pairs[2 * i] < num_prompt + o.max_new;
            if (wanted == 0) continue;
            ck_assert_msg(pass < got.num_passes && got.num[pass] == wanted, "%s: pass %d commits %d, must be %d", name,
                          pass, pass < got.num_passes ? got.num[pass] : -1, wanted);
            for (int32_t i = 0; i < num; i++) {
                bool found = pairs[2 * i] >= num_prompt + o.max_new;
                for (int32_t j = 0; j < got.num[pass]; j++)
                    found |=
                        got.position[pass][j] == pairs[2 * i] - num_prompt && got.token[pass][j] == pairs[2 * i + 1];
                ck_assert_msg(found, "%s: pass %d does not commit %d at %d", name, pass, pairs[2 * i + 1],
                              pairs[2 * i]);
            }
            pass++;
        }
        if (pass > 0) ck_assert_msg(got.num_passes == pass, "%s: %d passes, must be %d", name, got.num_passes, pass);
        close_model(&f);
        num_cases++;
    }
    ck_assert_int_ge(num_cases, 25);
    rf_json_close(doc);
}
END_TEST

static const int32_t some_prompt[] = {5, 61, 17, 203, 88, 140, 9, 33, 250, 71, 102, 18, 66, 40, 7, 111, 29, 54};
enum { PROMPT = 18 };

/* Decodes with row policy `name` (options, may be NULL) and without; the tokens must be the same. */
static void same_as_without(fixture *f, rf_decode_options o, const char *name, const char *settings) {
    static record plain, cached;
    rf_policy *policy = NULL;
    run(f, &o, some_prompt, PROMPT, &plain);
    rf_assert_ok(rf_policy_create(&policy, name, &f->err), f->err);
    rf_assert_ok(rf_policy_set(policy, settings, &f->err), f->err);
    o.row_policy = policy;
    run(f, &o, some_prompt, PROMPT, &cached);
    ck_assert_msg(plain.num_passes == cached.num_passes, "%s %s: %d passes and %d", name, settings, cached.num_passes,
                  plain.num_passes);
    for (int p = 0; p < plain.num_passes; p++) {
        ck_assert_msg(plain.num[p] == cached.num[p], "%s %s: pass %d commits %d and %d", name, settings, p,
                      cached.num[p], plain.num[p]);
        for (int i = 0; i < plain.num[p]; i++)
            ck_assert_msg(plain.position[p][i] == cached.position[p][i] && plain.token[p][i] == cached.token[p][i],
                          "%s %s: pass %d differs at %d", name, settings, p, plain.position[p][i]);
    }
    rf_policy_destroy(policy);
}

/* 9.6: 1, 5, 6, 7: policies whose settings leave nothing stale. */
START_TEST(policies_that_renew_everything_change_nothing) {
    static const struct {
        const char *name, *settings;
    } all[] = {{"prefix", "refresh=1"},
               {"dual", "refresh=1"},
               {"vicinity", "refresh=1"},
               {"window", "refresh=1,active=64,external=64"},
               {"dkv", "refresh=1"},
               {"dllm-cache", "prompt=1,response=1"},
               {"dllm-cache", "prompt=1,response=4,ratio=1"}};
    static const char *models[] = {"text-llada", "text-dream"};
    for (int m = 0; m < 2; m++) {
        fixture f = open_model(models[m]);
        for (size_t i = 0; i < sizeof all / sizeof all[0]; i++) {
            rf_decode_options o = rf_decode_options_default(f.model);
            o.max_new = 32;
            o.end = RF_END_NONE;
            o.ignore_eos = true;
            o.commit = RF_COMMIT_TOPN;
            same_as_without(&f, o, all[i].name, all[i].settings);
            if (strcmp(all[i].name, "window") == 0) continue; /* it decodes one window, not blocks */
            o.block = 8;
            same_as_without(&f, o, all[i].name, all[i].settings);
        }
        close_model(&f);
    }
}
END_TEST

/* Every policy with its defaults runs to the end on both kinds of canvas, commits every mask once, and computes fewer rows. */
START_TEST(policies_save_rows_and_finish) {
    static record got;
    fixture f = open_model("text-llada");
    rf_decode_options o = rf_decode_options_default(f.model);
    o.max_new = 96;
    o.block = 32;
    o.end = RF_END_NONE;
    o.ignore_eos = true;
    const rf_decode_result plain = run(&f, &o, some_prompt, PROMPT, &got);
    const int64_t plain_rows = plain.row_passes;
    ck_assert_int_eq(plain_rows, 96 * (96 + PROMPT));
    for (int i = 0; i < rf_row_policy_count(); i++) {
        const rf_policy_def *def = rf_row_policy_at(i);
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, def->name, &f.err), f.err);
        rf_decode_options with = o;
        with.row_policy = policy;
        with.record_trace = true;
        const rf_decode_result r = run(&f, &with, some_prompt, PROMPT, &got);
        int committed = 0;
        bool seen[96] = {0};
        for (int p = 0; p < got.num_passes; p++)
            for (int k = 0; k < got.num[p]; k++) {
                ck_assert_msg(!seen[got.position[p][k]], "%s: %d twice", def->name, got.position[p][k]);
                seen[got.position[p][k]] = true;
                committed++;
            }
        ck_assert_msg(committed == 96 && r.num_tokens == 96, "%s: %d committed", def->name, committed);
        ck_assert_msg(r.row_passes < plain_rows, "%s: %lld row-passes of %lld", def->name, (long long)r.row_passes,
                      (long long)plain_rows);
        rf_policy_destroy(policy);
    }
    close_model(&f);
}
END_TEST

/* 9.6: 4: a refresh at every token is exact; and where it is not, rows are reused. On the block model and on frozen caches. */
START_TEST(attention_reuse_that_always_refreshes_is_exact) {
    static record plain, reused;
    fixture f = open_model("text-sdar");
    rf_decode_options o = rf_decode_options_default(f.model);
    o.max_new = 46;
    o.dynamic = false;
    o.commit = RF_COMMIT_TOPN;
    o.end = RF_END_NONE;
    o.ignore_eos = true;
    const rf_decode_result exact = run(&f, &o, some_prompt, PROMPT, &plain);
    const int64_t fused = exact.num_forwards;
    o.reuse = RF_REUSE_FLASHBLOCK;
    o.reuse_refresh = 1;
    rf_decode_result r = run(&f, &o, some_prompt, PROMPT, &reused);
    ck_assert_int_eq(r.external_rows_reused, 0);
    ck_assert_int_eq(reused.num_passes, plain.num_passes);
    for (int p = 0; p < plain.num_passes; p++)
        for (int i = 0; i < plain.num[p]; i++) {
            ck_assert_int_eq(reused.position[p][i], plain.position[p][i]);
            ck_assert_int_eq(reused.token[p][i], plain.token[p][i]);
        }
    /* 46 masks, one a pass; 2 of the prompt's rows open the first block; every further block adds its final pass where it is not fused */
    ck_assert_int_eq(fused, 1 + 46);
    ck_assert_int_ge(r.num_forwards, fused + 46 / 4 - 1);
    o.reuse_refresh = 100;
    r = run(&f, &o, some_prompt, PROMPT, &reused);
    ck_assert_int_gt(r.external_rows_reused, r.external_rows_fresh);
    o.reuse_refresh_rows = true;
    rf_decode_result rows = run(&f, &o, some_prompt, PROMPT, &reused);
    ck_assert_int_gt(rows.external_rows_fresh, r.external_rows_fresh);
    ck_assert_int_gt(rows.external_rows_reused, 0);
    close_model(&f);

    f = open_model("text-llada");
    static const char *policies[] = {"dual", "prefix", "window"};
    for (int i = 0; i < 3; i++) {
        rf_policy *policy = NULL;
        rf_assert_ok(rf_policy_create(&policy, policies[i], &f.err), f.err);
        o = rf_decode_options_default(f.model);
        o.max_new = 64;
        o.block = i == 2 ? 64 : 16;
        o.end = RF_END_NONE;
        o.ignore_eos = true;
        o.row_policy = policy;
        run(&f, &o, some_prompt, PROMPT, &plain);
        o.reuse = RF_REUSE_FLASHBLOCK;
        o.reuse_refresh = 1;
        run(&f, &o, some_prompt, PROMPT, &reused);
        ck_assert_int_eq(reused.num_passes, plain.num_passes);
        for (int p = 0; p < plain.num_passes; p++)
            for (int k = 0; k < plain.num[p]; k++)
                ck_assert_msg(reused.position[p][k] == plain.position[p][k] && reused.token[p][k] == plain.token[p][k],
                              "%s: pass %d differs", policies[i], p);
        o.reuse_refresh = 1000;
        r = run(&f, &o, some_prompt, PROMPT, &reused);
        ck_assert_msg(r.external_rows_reused > 0, "%s reuses nothing", policies[i]);
        ck_assert_int_eq(r.num_tokens, 64);
        rf_policy_destroy(policy);
    }
    close_model(&f);
}
END_TEST

/* The end of text: any id may play it. */
START_TEST(end_rules_end_as_they_say) {
    static record got;
    fixture f = open_model("text-llada");
    rf_decode_options o = rf_decode_options_default(f.model);
    o.max_new = 64;
    o.block = 16;
    o.end = RF_END_NONE;
    o.ignore_eos = true;
    rf_decode_result r = run(&f, &o, some_prompt, PROMPT, &got);
    int32_t whole[64];
    memcpy(whole, r.tokens, sizeof whole);
    /* the id whose first appearance lies deepest in the second block */
    int32_t end_at = 16;
    for (int32_t i = 16; i < 32; i++) {
        bool first = true;
        for (int32_t k = 0; k < i; k++) first &= whole[k] != whole[i];
        if (first) end_at = i;
    }
    o.stop_ids[0] = whole[end_at];
    o.num_stop_ids = 1;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert_int_eq(r.num_forwards, 64);
    ck_assert(r.ended && r.num_tokens <= end_at);
    const int32_t kept = r.num_tokens;
    o.end = RF_END_STOP;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert(r.ended);
    ck_assert_int_eq(r.num_tokens, kept);
    ck_assert_int_lt(r.num_forwards, 64);
    ck_assert_int_eq(memcmp(r.tokens, whole, (size_t)kept * sizeof *whole), 0);
    o.end = RF_END_TRUNCATE;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert(r.ended);
    ck_assert_int_eq(r.num_all, r.num_tokens + 1);
    ck_assert_int_lt(r.num_forwards, 64);
    o.end = RF_END_FILL;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert(r.ended);
    ck_assert_int_eq(r.num_all, 64);
    for (int32_t i = r.num_tokens; i < 64; i++) ck_assert_int_eq(r.tokens[i], o.stop_ids[0]);
    close_model(&f);

    f = open_model("text-llama");
    o = rf_decode_options_default(f.model);
    o.max_new = 40;
    o.ignore_eos = true;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    o.stop_ids[0] = r.tokens[20];
    o.num_stop_ids = 1;
    int32_t first = 0;
    while (r.tokens[first] != o.stop_ids[0]) first++;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert_int_eq(r.num_tokens, first);
    ck_assert_int_eq(r.num_all, first + 1);
    ck_assert(r.ended);
    close_model(&f);
}
END_TEST

/* A guide that always agrees commits the block at once; one that never does, a token a pass; and the tokens stay the draft's. */
START_TEST(a_guide_decides_how_many_commit) {
    static record got;
    fixture f = open_model("text-llada"), g = open_model("text-llama");
    rf_decode_options o = rf_decode_options_default(f.model);
    o.max_new = 32;
    o.block = 16;
    o.end = RF_END_NONE;
    o.ignore_eos = true;
    o.commit = RF_COMMIT_GUIDED;
    o.guide = g.model;
    o.accept = RF_ACCEPT_PROB;
    o.accept_threshold = -1;
    rf_decode_result r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert_int_eq(r.num_forwards, 2);
    ck_assert_int_eq(got.num[0], 16);
    o.accept_threshold = 2;
    r = run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert_int_eq(r.num_forwards, 32);
    for (int p = 0; p < got.num_passes; p++) {
        ck_assert_int_eq(got.num[p], 1);
        ck_assert_int_eq(got.position[p][0], p); /* left to right */
    }
    ck_assert_int_eq(r.guide_forwards, 32);
    o.guide_chunk = 4; /* in chunks: the same decisions */
    o.accept = RF_ACCEPT_TOPK;
    o.accept_k = 20;
    static record chunks;
    run(&f, &o, some_prompt, PROMPT, &chunks);
    o.guide_chunk = 32;
    run(&f, &o, some_prompt, PROMPT, &got);
    ck_assert_int_eq(got.num_passes, chunks.num_passes);
    for (int p = 0; p < got.num_passes; p++) ck_assert_int_eq(got.num[p], chunks.num[p]);
    ck_assert_int_lt(got.num_passes, 32);
    close_model(&f);
    close_model(&g);
}
END_TEST

/* The same seed gives the same text, another one another; chunks of a prefill change nothing. */
START_TEST(sampling_follows_the_seed) {
    static const char *models[] = {"text-llama", "text-llada", "text-sdar"};
    for (int m = 0; m < 3; m++) {
        fixture f = open_model(models[m]);
        rf_decode_options o = rf_decode_options_default(f.model);
        o.max_new = 32;
        o.ignore_eos = true;
        o.end = RF_END_NONE;
        o.temperature = 1.0;
        for (int filter = 0; filter < 2; filter++) {
            int32_t first[32];
            o.top_p = filter ? 0.9 : 1.0;
            o.seed = 1;
            rf_decode_result r = run(&f, &o, some_prompt, PROMPT, NULL);
            memcpy(first, r.tokens, sizeof first);
            o.prefill_chunk = 5;
            r = run(&f, &o, some_prompt, PROMPT, NULL);
            ck_assert_int_eq(memcmp(first, r.tokens, sizeof first), 0);
            o.prefill_chunk = 2048;
            o.seed = 2;
            r = run(&f, &o, some_prompt, PROMPT, NULL);
            ck_assert_int_ne(memcmp(first, r.tokens, sizeof first), 0);
        }
        close_model(&f);
    }
}
END_TEST

START_TEST(a_callback_stops_a_run) {
    static record got;
    static const char *models[] = {"text-llama", "text-llada", "text-sdar"};
    for (int m = 0; m < 3; m++) {
        fixture f = open_model(models[m]);
        rf_decode_options o = rf_decode_options_default(f.model);
        rf_decode_result r;
        o.max_new = 32;
        o.commit = RF_COMMIT_TOPN;
        rf_assert_ok(rf_decoder_create(&f.decoder, f.model, &o, 64, &f.err), f.err);
        memset(&got, 0, sizeof got);
        got.stop_after = 3;
        rf_assert_ok(rf_decoder_run(f.decoder, &o, some_prompt, PROMPT, note, &got, &r, &f.err), f.err);
        ck_assert_int_eq(got.num_passes, 3);
        ck_assert_int_le(r.num_tokens, 3);
        /* and the decoder serves the next run */
        rf_assert_ok(rf_decoder_run(f.decoder, &o, some_prompt, PROMPT, NULL, NULL, &r, &f.err), f.err);
        ck_assert_int_ge(r.num_all, 1);
        close_model(&f);
    }
}
END_TEST

START_TEST(requests_that_make_no_sense_are_refused_in_one_line) {
    fixture f = open_model("text-llada"), block = open_model("text-sdar"), causal = open_model("text-llama");
    rf_error err;
    rf_policy *policy = NULL, *feature = NULL;
    rf_assert_ok(rf_policy_create(&policy, "dual", &err), err);
    rf_assert_ok(rf_policy_create(&feature, "fora", &err), err);
    const rf_decode_options good = rf_decode_options_default(f.model);
#define REFUSED(model_, prompt_, status_, part_, change_)                                                              \
    do {                                                                                                               \
        rf_decode_options o = rf_decode_options_default((model_)->model);                                              \
        change_;                                                                                                       \
        rf_assert_fails(rf_decode_options_check(&o, (model_)->model, prompt_, &err), err, status_, part_);             \
    } while (0)
    rf_assert_ok(rf_decode_options_check(&good, f.model, 8, &err), err);
    REFUSED(&f, 0, RF_ERR_ARGUMENT, "empty", (void)0);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "new tokens", o.max_new = 0);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "positions", o.max_new = 100000000);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "whole blocks of 7", o.block = 7);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "do not divide", (o.block = 32, o.steps = 5));
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "schedule", (o.block = 32, o.commit = RF_COMMIT_SCHEDULE));
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "guide", o.commit = RF_COMMIT_GUIDED);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "frozen keys", o.reuse = RF_REUSE_FLASHBLOCK);
    REFUSED(&f, 8, RF_ERR_UNSUPPORTED, "autoregressive", o.repetition_penalty = 1.2);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "top-p", o.top_p = 0.0);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "temperature", o.temperature = -1.0);
    REFUSED(&f, 8, RF_ERR_ARGUMENT, "temperature", o.temperature = NAN);
    REFUSED(&block, 8, RF_ERR_UNSUPPORTED, "dual", o.row_policy = policy);
    REFUSED(&block, 8, RF_ERR_UNSUPPORTED, "guidance", o.cfg_scale = 1.0);
    REFUSED(&causal, 8, RF_ERR_UNSUPPORTED, "autoregressive", o.row_policy = policy);
#undef REFUSED
    rf_decode_options o = good;
    o.row_policy = feature;
    rf_assert_fails(rf_decoder_create(&f.decoder, f.model, &o, 256, &err), err, RF_ERR_ARGUMENT, "fora");
    rf_decode_result r;
    o = good;
    o.max_new = 32;
    rf_assert_ok(rf_decoder_create(&f.decoder, f.model, &o, 64, &err), err);
    const int32_t bad[] = {1, 2, 300};
    rf_assert_fails(rf_decoder_run(f.decoder, &o, bad, 3, NULL, NULL, &r, &err), err, RF_ERR_ARGUMENT, "300");
    rf_assert_fails(rf_decoder_run(f.decoder, &o, some_prompt, 18 + 20, NULL, NULL, &r, &err), err, RF_ERR_ARGUMENT,
                    "made for");
    o.row_policy = policy;
    rf_assert_fails(rf_decoder_run(f.decoder, &o, some_prompt, PROMPT, NULL, NULL, &r, &err), err, RF_ERR_STATE,
                    "row policy");
    rf_policy_destroy(policy);
    rf_policy_destroy(feature);
    close_model(&f);
    close_model(&block);
    close_model(&causal);
}
END_TEST

START_TEST(failed_allocations_are_reported_and_nothing_leaks) {
    fixture f = open_model("text-llada");
    rf_policy *policy = NULL;
    rf_assert_ok(rf_policy_create(&policy, "elastic", &f.err), f.err);
    rf_decode_options o = rf_decode_options_default(f.model);
    o.max_new = 16;
    o.row_policy = policy;
    o.top_k = 5;
    o.temperature = 1;
    o.record_trace = true;
    const uint64_t live = rf_memory_get_counts().num_live;
    int failures = 0;
    for (uint64_t n = 1; n < 2000; n++) {
        rf_decoder *d = NULL;
        rf_decode_result r;
        rf_memory_fail_nth(n);
        rf_status st = rf_decoder_create(&d, f.model, &o, 64, &f.err);
        if (st == RF_OK) st = rf_decoder_run(d, &o, some_prompt, PROMPT, NULL, NULL, &r, &f.err);
        rf_memory_fail_nth(0);
        rf_decoder_destroy(d);
        ck_assert_int_eq(rf_memory_get_counts().num_live, live);
        if (st == RF_OK) break;
        ck_assert_int_eq(st, RF_ERR_MEMORY);
        failures++;
    }
    ck_assert_int_gt(failures, 10);
    rf_policy_destroy(policy);
    close_model(&f);
}
END_TEST

START_TEST(likelihood_is_that_of_the_logits) {
    fixture f = open_model("text-llama");
    rf_decode_options o = rf_decode_options_default(f.model);
    double all = 0, tail = 0, sum = 0;
    rf_assert_ok(rf_decoder_create(&f.decoder, f.model, &o, 64, &f.err), f.err);
    rf_assert_ok(rf_decoder_nll(f.decoder, some_prompt, PROMPT, 1, &all, &f.err), f.err);
    rf_assert_ok(rf_decoder_nll(f.decoder, some_prompt, PROMPT, 10, &tail, &f.err), f.err);
    for (int32_t i = 1; i < PROMPT; i++) { /* one token at a time */
        double one;
        rf_assert_ok(rf_decoder_nll(f.decoder, some_prompt, i + 1, i, &one, &f.err), f.err);
        sum += one;
        if (i == 9) sum -= 0;
    }
    ck_assert_double_eq_tol(all, sum / (PROMPT - 1), 1e-4);
    ck_assert_double_gt(tail, 0);
    rf_assert_fails(rf_decoder_nll(f.decoder, some_prompt, PROMPT, 0, &all, &f.err), f.err, RF_ERR_ARGUMENT, "from");
    close_model(&f);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("decode");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, 240);
    tcase_add_test(tc, golden_runs_are_made_again_pass_by_pass);
    tcase_add_test(tc, policies_that_renew_everything_change_nothing);
    tcase_add_test(tc, policies_save_rows_and_finish);
    tcase_add_test(tc, attention_reuse_that_always_refreshes_is_exact);
    tcase_add_test(tc, end_rules_end_as_they_say);
    tcase_add_test(tc, a_guide_decides_how_many_commit);
    tcase_add_test(tc, sampling_follows_the_seed);
    tcase_add_test(tc, a_callback_stops_a_run);
    tcase_add_test(tc, requests_that_make_no_sense_are_refused_in_one_line);
    tcase_add_test(tc, failed_allocations_are_reported_and_nothing_leaks);
    tcase_add_test(tc, likelihood_is_that_of_the_logits);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

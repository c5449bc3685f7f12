/* tests/caching/test_kv_rules.c - KV rules: names and options, the parts they share, and scores against sums in double. */
#include <check.h>
#include <float.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "caching/kv/kv_internal.h"
#include "caching/kv/sentences.h"
#include "tests/test_util.h"

enum { L = 3, HQ = 4, HKV = 2, G = HQ / HKV, D = 8, T = 50, W = 8 };

static const rf_kv_shape shape = {
    .num_layers = L, .num_q_heads = HQ, .num_kv_heads = HKV, .head_dim = D, .max_prompt = 256, .max_new = 64};

static uint64_t state = 1;
static float draw(void) {
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) * 0x1p-24f;
}

/* ---- rules as text ---- */

START_TEST(every_method_opens_and_comes_back) {
    for (int i = 0; i < rf_kv_num_methods(); i++) {
        const rf_kv_method *m = rf_kv_method_at(i);
        rf_kv_rule rule, again;
        rf_error err = {0};
        char text[1024], twice[1024];
        ck_assert_msg(rf_kv_rule_parse(&rule, m->name, &err) == RF_OK, "%s: %s", m->name, err.message);
        ck_assert_str_eq(rule.method, m->name);
        size_t len = rf_kv_rule_describe(&rule, text, sizeof text);
        ck_assert(len < sizeof text && len == strlen(text));
        ck_assert_msg(rf_kv_rule_parse(&again, text, &err) == RF_OK, "%s: %s", text, err.message);
        rf_kv_rule_describe(&again, twice, sizeof twice);
        ck_assert_str_eq(text, twice);
        ck_assert_uint_eq(rf_kv_needs_prefill(&rule), rf_kv_needs_prefill(&again));
        rf_status st = rf_kv_rule_check(&rule, &err);
        ck_assert(st == RF_OK || st == RF_ERR_UNSUPPORTED);
        if (st != RF_OK) ck_assert(strstr(err.message, m->name) && !strchr(err.message, '\n'));
        ck_assert(m->about[0] && strlen(m->about) < 100);
    }
}
END_TEST

START_TEST(options_change_parts) {
    rf_kv_rule rule;
    rf_error err = {0};
    ck_assert_int_eq(rf_kv_rule_parse(&rule, "snapkv:window=16,pool=max7,alloc=cake", &err), RF_OK);
    ck_assert_int_eq(rule.window, 16);
    ck_assert_int_eq(rule.pool, RF_KV_POOL_MAX);
    ck_assert_int_eq(rule.pool_size, 7);
    ck_assert_int_eq(rule.alloc, RF_KV_ALLOC_CAKE);
    ck_assert_int_eq(rf_kv_rule_parse(&rule, "score=knorm,schedule=step,recents=4", &err), RF_OK);
    ck_assert_int_eq(rule.score, RF_KV_SCORE_KNORM);
    ck_assert_int_eq(rule.recents, 4);
    ck_assert_str_eq(rule.method, "");
    char text[512];
    rf_kv_rule_describe(&rule, text, sizeof text);
    ck_assert_str_eq(text, "score=knorm,schedule=step,recents=4");
    ck_assert_uint_eq(rf_kv_needs_step(&rule), RF_KV_NEED_KEY_NORM);
}
END_TEST

static bool same_rule(const rf_kv_rule *a, const rf_kv_rule *b) {
    bool parts = a->score == b->score && a->queries == b->queries && a->reduce == b->reduce && a->pool == b->pool &&
                 a->pool_size == b->pool_size && a->pool_after_group == b->pool_after_group && a->group == b->group &&
                 a->heads == b->heads && a->value == b->value && a->alloc == b->alloc && a->action == b->action &&
                 a->schedule == b->schedule && a->position == b->position;
    bool kept = a->sinks == b->sinks && a->recents == b->recents && a->window == b->window &&
                a->open_window == b->open_window && a->last == b->last && a->skip_layers == b->skip_layers;
    double x[] = {a->alpha,
                  a->gamma,
                  a->tau1,
                  a->tau2,
                  a->floor,
                  a->probe_recent,
                  a->probe_random,
                  a->activation,
                  a->crush_share,
                  a->sentence_penalty,
                  a->redundancy,
                  a->high_share,
                  a->sentence_threshold,
                  a->tsp_share};
    double y[] = {b->alpha,
                  b->gamma,
                  b->tau1,
                  b->tau2,
                  b->floor,
                  b->probe_recent,
                  b->probe_random,
                  b->activation,
                  b->crush_share,
                  b->sentence_penalty,
                  b->redundancy,
                  b->high_share,
                  b->sentence_threshold,
                  b->tsp_share};
    bool rest = a->beta == b->beta && a->every == b->every && a->buffer == b->buffer && a->drafts == b->drafts &&
                a->pseudo == b->pseudo && a->with_window == b->with_window && a->ladder_span == b->ladder_span &&
                a->ladder_overlap == b->ladder_overlap && a->future == b->future && a->page == b->page &&
                a->bits == b->bits && a->low_bits == b->low_bits && a->group_size == b->group_size &&
                a->residual == b->residual && a->fp8 == b->fp8 && a->select == b->select && a->init == b->init &&
                a->local == b->local && a->select_dims == b->select_dims && a->seed == b->seed &&
                a->tsp_layer == b->tsp_layer && a->block == b->block && a->selector == b->selector &&
                memcmp(a->delimiters, b->delimiters, sizeof a->delimiters) == 0;
    return parts && kept && rest && memcmp(x, y, sizeof x) == 0;
}

/* Any option of any method, put back to what the plain rule has; numbers of many digits. */
START_TEST(what_a_user_undoes_stays_undone) {
    static const char *const digits[] = {"a2sf:alpha=0.123456789012345", "lazy:activation=3.00000000000001e-7",
                                         "cake:gamma=0.1,tau1=1.1"};
    int num = rf_kv_num_methods() * rf_kv_num_keys(), more = (int)(sizeof digits / sizeof digits[0]);
    for (int i = 0; i < num + more; i++) {
        rf_kv_rule rule, again;
        rf_error err = {0};
        char spec[256], text[1024];
        const rf_policy_option *o = rf_kv_key_at(i % rf_kv_num_keys());
        if (i < num)
            snprintf(spec, sizeof spec, "%s:%s=%s", rf_kv_method_at(i / rf_kv_num_keys())->name, o->name, o->def);
        else
            snprintf(spec, sizeof spec, "%s", digits[i - num]);
        ck_assert_msg(rf_kv_rule_parse(&rule, spec, &err) == RF_OK, "%s: %s", spec, err.message);
        ck_assert(rf_kv_rule_describe(&rule, text, sizeof text) < sizeof text);
        ck_assert_msg(rf_kv_rule_parse(&again, text, &err) == RF_OK, "%s: %s", text, err.message);
        ck_assert_msg(same_rule(&rule, &again), "%s came back as %s", spec, text);
    }
}
END_TEST

START_TEST(needs_are_what_scores_read) {
    enum { SUM = RF_KV_NEED_SUM, KV = RF_KV_NEED_KV, REMOVAL = RF_KV_NEED_REMOVAL, HIDDEN = RF_KV_NEED_HIDDEN };
    static const struct {
        const char *spec;
        unsigned prefill, step;
    } cases[] = {{"none", 0, 0},
                 {"streaming", 0, 0},
                 {"random", 0, 0},
                 {"h2o", SUM, SUM},
                 {"snapkv", SUM, 0},
                 {"cake", SUM | RF_KV_NEED_SQUARES | RF_KV_NEED_ENTROPY, SUM},
                 {"obcache", REMOVAL, 0},
                 {"caote", SUM | KV, 0},
                 {"h2o:value=caote", SUM | KV, SUM | KV}, /* of sums: by the values of now */
                 {"tova:value=caote", SUM | KV, REMOVAL}, /* of the newest query alone: its own error */
                 {"h2o:value=obc-joint", REMOVAL, REMOVAL},
                 {"lazy", RF_KV_NEED_PEAK, SUM},
                 {"expected", RF_KV_NEED_EXPECTED | RF_KV_NEED_VALUE_NORM, 0},
                 {"criticalkv", SUM | RF_KV_NEED_WO, 0},
                 {"merge", SUM | KV, 0},
                 {"skipkv", SUM | KV | HIDDEN, SUM | KV | HIDDEN},
                 {"skipkv:sentence_penalty=0", SUM | KV, SUM | KV},
                 {"skipkv:redundancy=0", SUM | HIDDEN, SUM | HIDDEN}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rf_kv_rule rule;
        ck_assert_int_eq(rf_kv_rule_parse(&rule, cases[i].spec, NULL), RF_OK);
        unsigned prefill = rf_kv_needs_prefill(&rule), step = rf_kv_needs_step(&rule);
        ck_assert_msg(prefill == cases[i].prefill, "%s: prefill %#x", cases[i].spec, prefill);
        ck_assert_msg(step == cases[i].step, "%s: step %#x", cases[i].spec, step);
    }
}
END_TEST

START_TEST(wrong_words_are_named) {
    static const struct {
        const char *spec, *says;
    } cases[] = {{"snapkw", "did you mean 'snapkv'"},
                 {"h2o:recent=4", "did you mean 'recents'"},
                 {"snapkv:pool=mean", "one of none avg max"},
                 {"snapkv:window=0", "1..1048576"},
                 {"snapkv:window=x", "integer"},
                 {"snapkv,window=4", "behind ':'"},
                 {"score=attention,heads", "key=value"},
                 {"cake:tau1=nan", "a number"},
                 {"h2o:last=maybe", "true or false"}};
    for (size_t i = 0; i < sizeof cases / sizeof cases[0]; i++) {
        rf_kv_rule rule;
        rf_error err = {0};
        ck_assert_int_eq(rf_kv_rule_parse(&rule, cases[i].spec, &err), RF_ERR_ARGUMENT);
        ck_assert_msg(strstr(err.message, cases[i].says) != NULL, "%s: %s", cases[i].spec, err.message);
        ck_assert(!strchr(err.message, '\n'));
    }
}
END_TEST

START_TEST(parts_that_do_not_go_together_are_refused) {
    static const char *const specs[] = {"kivi:position=cache",
                                        "kivi:bits=3",
                                        "kivi:residual=48",
                                        "kivi:sinks=4",
                                        "kivi:schedule=high",
                                        "kivi:fp8=true",
                                        "zipcache:value=norm",
                                        "zipcache:low_bits=5",
                                        "mikv:bits=12",
                                        "mikv:score=position",
                                        "mikv:alloc=pyramid",
                                        "arkv:low_bits=4",
                                        "arkv:queries=drafted",
                                        "mikv:block=64",
                                        "arkv:tsp_share=0.5",
                                        "minicache:schedule=step",
                                        "score=knorm,action=demote",
                                        "score=attention,action=share",
                                        "attention-gate",
                                        "h2o:action=compensate",
                                        "tokenselect:alloc=pyramid",
                                        "snapkv:pool=avg,pool_size=4",
                                        "score=knorm,alloc=cake",
                                        "streaming:alloc=flat-heads",
                                        "tova:alloc=flat-heads",
                                        "score=knorm,value=wo",
                                        "expected:schedule=step",
                                        "snapkv:reduce=decay",
                                        "h2o:position=delta",
                                        "knorm:value=norm", /* larger values would go first */
                                        "streaming:value=norm",
                                        "tova:value=norm", /* one set of a layer, torn by each head's values */
                                        "tova:value=wo,schedule=prefill",
                                        "h2o:heads=mean,value=caote",
                                        "score=knorm,heads=mean", /* asked for, and not done */
                                        "score=knorm,pool=avg5",
                                        "h2o:redundancy=0.1", /* likeness goes with the attention of a window */
                                        "cake:redundancy=0.1",
                                        "skipkv:heads=mean",
                                        "epicache:block=0",
                                        "epicache:alloc=flat-heads",
                                        "epicache:action=merge",
                                        "h2o:block=64,schedule=prefill",
                                        "score=random,block=64",
                                        "fastkv:alloc=pyramid",
                                        "fastkv:position=delta",
                                        "h2o:tsp_share=0.5",
                                        "cake:tsp_share=0.5",
                                        "skipkv:action=merge",
                                        "skipkv:schedule=prefill", /* no sentence is known then */
                                        "skipkv:delimiter1=-1,delimiter2=-1",
                                        "snapkv:group=none"};
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        rf_kv_rule rule;
        rf_error err = {0};
        ck_assert_int_eq(rf_kv_rule_parse(&rule, specs[i], &err), RF_OK);
        ck_assert_msg(rf_kv_rule_check(&rule, &err) != RF_OK, "%s was taken", specs[i]);
        ck_assert(err.message[0] && !strchr(err.message, '\n'));
    }
}
END_TEST

/* ---- sentences ---- */

/* Four columns; '0' ends a sentence, other characters are words of their own direction, 'a' and 'b' nearly the same. */
START_TEST(of_two_like_sentences_the_earlier_is_penalised) {
    static const float words[4][4] = {{1, 0, 0, 0}, {1, 0.1f, 0, 0}, {0, 0, 1, 0}, {0, 0, 0, 1}};
    static const char *const text = "aa0cc0a0b0dd0bbb0cc"; /* the last has not ended */
    static const uint8_t again[] = {1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0};
    rf_kv_rule rule;
    rf_error err = {0};
    rf_kv_sentences *s = NULL;
    rf_assert_ok(rf_kv_rule_parse(&rule, "skipkv:delimiter1=48,sentence_threshold=0.9", &err), err);
    rf_assert_ok(rf_kv_sentences_create(&s, &rule, 4, &err), err);
    for (int round = 0; round < 2; round++) { /* the second behind a reset */
        int32_t num = -1;
        for (const char *at = text; *at; at++) {
            static const float zero[4] = {0};
            rf_assert_ok(rf_kv_sentences_add(s, *at, *at == '0' ? zero : words[*at - 'a'], &err), err);
        }
        const float *penalty = rf_kv_sentences_penalty(s, &num);
        ck_assert_int_eq(num, (int)strlen(text));
        ck_assert_int_eq(rf_kv_sentences_num(s), 6);
        for (int i = 0; i < num; i++)
            ck_assert_msg((penalty[i] > 0.99f) == again[i] && penalty[i] <= 1.0001f, "round %d, token %d: %g", round, i,
                          (double)penalty[i]);
        for (int i = 0; i < 400; i++) /* one token each: none */
            rf_assert_ok(rf_kv_sentences_add(s, '0', words[3], &err), err);
        ck_assert_int_eq(rf_kv_sentences_num(s), 7); /* "cc0" */
        for (int i = 0; i < 100; i++) {
            rf_assert_ok(rf_kv_sentences_add(s, 'c', words[2], &err), err);
            rf_assert_ok(rf_kv_sentences_add(s, '0', words[2], &err), err);
        }
        ck_assert_int_eq(rf_kv_sentences_num(s), 107);
        penalty = rf_kv_sentences_penalty(s, &num);
        ck_assert(penalty[3] > 0 && penalty[num - 3] > 0 && penalty[num - 1] == 0 && penalty[num - 2] == 0);
        rf_kv_sentences_reset(s);
        ck_assert_int_eq(rf_kv_sentences_num(s), 0);
    }
    rf_kv_sentences_destroy(s);
}
END_TEST

/* ---- parts ---- */

START_TEST(pools_deflate_edges_or_not) {
    float in[9] = {1, 1, 1, 1, 5, 1, 1, 1, 1}, out[9];
    rf_kv_pool_scores(out, in, 9, RF_KV_POOL_AVG, 5);
    ck_assert_float_eq_tol(out[0], 0.6f, 1e-6f); /* zeros beside it, divided by five all the same */
    ck_assert_float_eq_tol(out[1], 0.8f, 1e-6f);
    ck_assert_float_eq_tol(out[2], 1.8f, 1e-6f);
    rf_kv_pool_scores(out, in, 9, RF_KV_POOL_MAX, 5);
    ck_assert_float_eq(out[0], 1);
    ck_assert_float_eq(out[2], 5);
    float low[3] = {-3, -2, -4};
    rf_kv_pool_scores(out, low, 3, RF_KV_POOL_MAX, 3);
    ck_assert_float_eq(out[2], -2);
}
END_TEST

START_TEST(top_takes_the_largest_and_the_lowest_of_equals) {
    float score[8] = {1, 3, 3, NAN, INFINITY, 3, -0.0f, 0.0f};
    int32_t keep[8];
    rf_kv_top(keep, score, 8, 3);
    ck_assert(keep[0] == 1 && keep[1] == 2 && keep[2] == 4);
    rf_kv_top(keep, score, 8, 6);
    ck_assert(keep[0] == 0 && keep[4] == 5 && keep[5] == 6); /* -0 and 0 tie */
    rf_kv_top(keep, score, 8, 7);
    ck_assert(keep[5] == 6 && keep[6] == 7);
    for (int run = 0; run < 300; run++) {
        float s[40];
        int n = 1 + (int)(draw() * 40), count = 1 + (int)(draw() * (float)n);
        if (n > 40) n = 40;
        if (count > n) count = n;
        for (int i = 0; i < n; i++) s[i] = floorf(draw() * 12) - 6;
        rf_kv_top(keep, s, n, count < 8 ? count : 8);
        count = count < 8 ? count : 8;
        for (int i = 0; i < count; i++) {
            int before = 0; /* that come before keep[i] by score, then index */
            for (int j = 0; j < n; j++) before += s[j] > s[keep[i]] || (!(s[j] < s[keep[i]]) && j < keep[i]);
            ck_assert_int_lt(before, count);
            if (i > 0) ck_assert_int_gt(keep[i], keep[i - 1]);
        }
    }
}
END_TEST

/* Of few different sizes, and of every kind. */
static float draw_any(void) {
    static const float odd[] = {NAN, INFINITY, -INFINITY, 0.0f, -0.0f, 1e-40f, -1e-40f, FLT_MAX};
    float u = draw();
    if (u < 0.05f) return odd[(int)(u * 160) & 7];
    return u < 0.5f ? ldexpf(floorf(draw() * 9) - 3, (int)(draw() * 20) - 30) : draw() * draw() - 0.1f;
}

START_TEST(pools_of_many_are_those_of_each) {
    enum { MOST = 1100 };
    static float in[MOST], out[MOST];
    int wrong = 0;
    for (int run = 0; run < 60; run++) {
        int n = run < 20 ? 1 + run : 1 + (int)(draw() * (MOST - 1)), size = 1 + run % 9, half = size / 2;
        for (int i = 0; i < n; i++) in[i] = run % 3 ? fabsf(draw_any()) : draw() * 8 - 4;
        for (int average = 0; average < 2; average++) {
            rf_kv_pool_scores(out, in, n, average ? RF_KV_POOL_AVG : RF_KV_POOL_MAX, size);
            for (int j = 0; j < n; j++) {
                double sum = 0;
                float most = -INFINITY, want;
                for (int i = j - half; i <= j + half; i++) {
                    if (i < 0 || i >= n) continue;
                    sum += (double)in[i];
                    if (in[i] > most) most = in[i];
                }
                want = size == 1 ? in[j] : average ? (float)(sum / size) : most;
                wrong += isnan(want) ? !isnan(out[j]) : memcmp(&want, &out[j], sizeof want) != 0;
            }
        }
    }
    ck_assert_int_eq(wrong, 0);
}
END_TEST

/* Larger scores first, NaN last, then the lower index. */
static const float *sorted_scores;
static int by_score(const void *a, const void *b) {
    int32_t i = *(const int32_t *)a, j = *(const int32_t *)b;
    float x = sorted_scores[i], y = sorted_scores[j];
    if (isnan(x) != isnan(y)) return isnan(x) ? 1 : -1;
    if (x > y || x < y) return x > y ? -1 : 1;
    return i < j ? -1 : 1;
}

START_TEST(the_best_of_many_are_those_of_a_sort) {
    enum { MOST = 1500, HEADS = 3 };
    static float score[HEADS * MOST];
    static int32_t order[HEADS * MOST], keep[MOST];
    static uint8_t best[HEADS * MOST];
    int wrong = 0;
    for (int run = 0; run < 60; run++) {
        int n = 1 + (int)(draw() * (MOST - 1)), base = 1 + (int)(draw() * (float)(n - 1)), total = HEADS * n;
        for (int i = 0; i < total; i++) score[i] = run % 4 == 0 ? floorf(draw() * 3) : draw_any();
        sorted_scores = score;
        for (int heads = 1; heads <= HEADS; heads += HEADS - 1) {
            for (int i = 0; i < heads * n; i++) order[i] = i;
            qsort(order, (size_t)(heads * n), sizeof *order, by_score);
            memset(best, 0, sizeof best);
            for (int i = 0; i < heads * base; i++) best[order[i]] = 1;
            if (heads == 1) {
                rf_kv_top(keep, score, n, base);
                for (int i = 0; i < base; i++) wrong += !best[keep[i]] || (i > 0 && keep[i] <= keep[i - 1]);
            } else {
                int32_t counts[HEADS];
                rf_kv_flat_heads(counts, score, heads, n, n, base, 0, false);
                for (int h = 0; h < heads; h++) {
                    int want = 0;
                    for (int i = 0; i < n; i++) want += best[h * n + i];
                    wrong += counts[h] != want;
                }
            }
        }
    }
    ck_assert_int_eq(wrong, 0);
}
END_TEST

START_TEST(pyramid_is_an_arithmetic_series) {
    int32_t out[32], sum = 0;
    rf_kv_pyramid(out, 32, 128, 8, 100000, 20);
    ck_assert(out[0] == 234 && out[1] == 227 && out[2] == 220 && out[30] == 24 && out[31] == 17);
    for (int l = 0; l < 32; l++) sum += out[l];
    ck_assert_int_eq(sum, 4016);
    rf_kv_pyramid(out, 4, 64, 8, 200, 20);
    ck_assert(out[0] == 110 && out[1] == 74 && out[2] == 38 && out[3] == 2);
    rf_kv_pyramid(out, 4, 64, 8, 100, 20);
    ck_assert(out[0] == 92 && out[1] == 68 && out[2] == 44 && out[3] == 20);
    rf_kv_pyramid(out, 4, 64, 8, 60, 20);
    for (int l = 0; l < 4; l++) ck_assert_int_eq(out[l], 52);
}
END_TEST

START_TEST(flat_heads_follow_scores_above_a_floor) {
    const float s[2][8] = {{.50f, .20f, .10f, .06f, .05f, .04f, .03f, .02f},
                           {.16f, .15f, .14f, .13f, .12f, .11f, .10f, .09f}};
    int32_t out[2];
    rf_kv_flat_heads(out, s[0], 2, 8, 8, 3, 0, true);
    ck_assert(out[0] == 3 && out[1] == 3);
    rf_kv_flat_heads(out, s[0], 2, 8, 8, 3, 0, false);
    ck_assert(out[0] == 2 && out[1] == 4);
    rf_kv_flat_heads(out, s[0], 2, 8, 8, 3, 0.2, true); /* the released floor loses a slot of each */
    ck_assert(out[0] == 2 && out[1] == 2);
    rf_kv_flat_heads(out, s[0], 2, 8, 8, 3, 0.2, false);
    ck_assert(out[0] == 2 && out[1] == 3);
}
END_TEST

START_TEST(cake_shares_what_there_is) {
    int32_t out[4];
    const double even[4] = {1, 1, 1, 1}, steep[4] = {100, 1, 1, 2};
    rf_kv_cake(out, even, 4, 42, 100);
    ck_assert(out[0] == 11 && out[1] == 11 && out[2] == 10 && out[3] == 10);
    rf_kv_cake(out, steep, 4, 104, 40);
    ck_assert_int_eq(out[0], 40);
    ck_assert_int_eq(out[0] + out[1] + out[2] + out[3], 104);
    ck_assert(out[1] == out[2] && out[3] >= out[1]);
    rf_kv_cake(out, steep, 2, 400, 40); /* more than there is */
    ck_assert(out[0] == 40 && out[1] == 40);
}
END_TEST

/* ---- scores ---- */

static float p[HQ][W][T], s1[HQ][T], s2[HQ][T], peak[HQ][T], entropy[HQ], removal[HQ][T], wo[HQ][T], expected[HQ][T];
static float key_norm[HKV][T], value_norm[HKV][T], cosine[HKV][T], v[HKV][T][D];
static rf_kv_stats stats;

static void make_stats(void) {
    state = 7;
    for (int q = 0; q < HQ; q++) {
        entropy[q] = 0;
        for (int j = 0; j < T; j++) s1[q][j] = s2[q][j] = peak[q][j] = 0;
        for (int i = 0; i < W; i++) {
            double sum = 0;
            int seen = T - W + i + 1;
            for (int j = 0; j < T; j++) sum += (double)(p[q][i][j] = j < seen ? expf(4 * draw()) : 0);
            for (int j = 0; j < T; j++) {
                float x = p[q][i][j] = (float)((double)p[q][i][j] / sum);
                s1[q][j] += x;
                s2[q][j] += x * x;
                peak[q][j] = fmaxf(peak[q][j], x);
                if (j < T - W && x > 0) entropy[q] -= x * logf(x);
            }
        }
        for (int j = 0; j < T; j++) removal[q][j] = draw(), wo[q][j] = 1 + draw(), expected[q][j] = 4 * draw();
    }
    for (int h = 0; h < HKV; h++) {
        for (int j = 0; j < T; j++) {
            key_norm[h][j] = 1 + draw(), value_norm[h][j] = 1 + draw(), cosine[h][j] = 2 * draw() - 1;
            for (int d = 0; d < D; d++) v[h][j][d] = draw() - 0.5f;
        }
    }
    stats = (rf_kv_stats){.num_keys = T,
                          .stride = T,
                          .num_queries = W,
                          .s1 = s1[0],
                          .s2 = s2[0],
                          .peak = peak[0],
                          .entropy = entropy,
                          .removal = removal[0],
                          .wo_norm = wo[0],
                          .expected = expected[0],
                          .key_norm = key_norm[0],
                          .value_norm = value_norm[0],
                          .key_cosine = cosine[0],
                          .v = v[0][0],
                          .head_dim = D};
}

static double pooled(const double *x, int n, int j, bool max, int size) {
    double sum = 0, most = -1e30;
    for (int i = j - size / 2; i <= j + size / 2; i++) {
        if (i < 0 || i >= n) continue;
        sum += x[i];
        most = fmax(most, x[i]);
    }
    return max ? most : sum / size;
}

static float got[HKV][T], scratch[2 * HQ * T];
static void score(const char *spec, int32_t budget) {
    rf_kv_rule rule;
    rf_error err = {0};
    ck_assert_msg(rf_kv_rule_parse(&rule, spec, &err) == RF_OK, "%s", err.message);
    ck_assert_msg(rf_kv_prefill_scores(&rule, &shape, 1, T, budget, &stats, got[0], scratch, &err) == RF_OK, "%s",
                  err.message);
}
static void same(const char *name, int h, int j, double want) {
    ck_assert_msg(fabs((double)got[h][j] - want) <= 1e-5 * fabs(want) + 1e-9, "%s: head %d key %d: %g, wanted %g", name,
                  h, j, (double)got[h][j], want);
}

START_TEST(scores_are_their_formulas) {
    make_stats();
    double x[HQ][T];
    /* snapkv: sum, pool over the columns before the window, group mean, window protected */
    score("snapkv:window=8", 20);
    for (int h = 0; h < HKV; h++) {
        for (int j = 0; j < T; j++) {
            for (int g = 0; g < G; g++) {
                for (int i = 0; i < T; i++) x[g][i] = (double)s1[h * G + g][i];
            }
            if (j >= T - W)
                ck_assert(isinf(got[h][j]));
            else
                same("snapkv", h, j, (pooled(x[0], T - W, j, false, 5) + pooled(x[1], T - W, j, false, 5)) / 2);
        }
    }
    /* adakv: mean, group, then max over seven */
    score("adakv:window=8", 20);
    for (int h = 0; h < HKV; h++) {
        for (int i = 0; i < T; i++) x[0][i] = ((double)s1[h * G][i] + (double)s1[h * G + 1][i]) / 2 / W;
        for (int j = 0; j < T - W; j++) same("adakv", h, j, pooled(x[0], T - W, j, true, 7));
    }
    /* cake: mean + 200 variance, pooled, group */
    score("cake:window=8", 20);
    for (int h = 0; h < HKV; h++) {
        for (int g = 0; g < G; g++) {
            for (int j = 0; j < T; j++) {
                double mean = 0, var = 0;
                for (int i = 0; i < W; i++) mean += (double)p[h * G + g][i][j] / W;
                for (int i = 0; i < W; i++) var += pow((double)p[h * G + g][i][j] - mean, 2) / (W - 1);
                x[g][j] = mean + 200 * var;
            }
        }
        for (int j = 0; j < T - W; j++) {
            double want = (pooled(x[0], T - W, j, false, 5) + pooled(x[1], T - W, j, false, 5)) / 2;
            ck_assert(fabs((double)got[h][j] - want) <= 1e-3 * want); /* a difference of sums in f32 */
        }
    }
    score("observed", 20);
    for (int j = 0; j < T; j++) same("observed", 1, j, ((double)s1[2][j] + (double)s1[3][j]) / 2 / (T - j));
    score("h2o", 20);
    for (int j = 0; j < T; j++) {
        if (j >= T - 10)
            ck_assert(isinf(got[0][j]));
        else
            same("h2o", 0, j, ((double)s1[0][j] + (double)s1[1][j]) / 2);
    }
    score("a2sf", 20);
    for (int j = 0; j < T - 16; j++) same("a2sf", 0, j, (double)s1[0][j] + (double)s1[1][j]);
    score("tova", 20);
    for (int j = 0; j < T; j++) {
        same("tova", 0, j, ((double)s1[0][j] + (double)s1[1][j] + (double)s1[2][j] + (double)s1[3][j]) / 4);
        ck_assert_float_eq(got[0][j], got[1][j]);
    }
    score("knorm", 20);
    for (int j = 0; j < T; j++) same("knorm", 1, j, -(double)key_norm[1][j]);
    score("keydiff", 20);
    for (int j = 0; j < T; j++) same("keydiff", 1, j, -(double)cosine[1][j]);
    score("removal:window=8", 20);
    for (int j = 0; j < T - W; j++) same("removal", 1, j, ((double)removal[2][j] + (double)removal[3][j]) / 2);
    score("expected", 20);
    for (int h = 0; h < HKV; h++) {
        double sum[G] = {0};
        for (int g = 0; g < G; g++) {
            for (int j = 4; j < T; j++) sum[g] += exp((double)expected[h * G + g][j]);
        }
        for (int j = 0; j < 4; j++) ck_assert(isinf(got[h][j]));
        for (int j = 4; j < T; j++) {
            double want = (exp((double)expected[h * G][j]) / sum[0] + exp((double)expected[h * G + 1][j]) / sum[1]) / 2;
            same("expected", h, j, want * (double)value_norm[h][j]);
        }
    }
    score("caote:window=8,pool=none", 20);
    for (int h = 0; h < HKV; h++) {
        for (int j = 0; j < T - W; j++) {
            double want = 0;
            for (int g = 0; g < G; g++) {
                double sum = 0, o[D] = {0}, off = 0;
                for (int i = 0; i < T; i++) sum += (double)s1[h * G + g][i];
                for (int i = 0; i < T; i++) {
                    for (int d = 0; d < D; d++) o[d] += (double)s1[h * G + g][i] / sum * (double)v[h][i][d];
                }
                for (int d = 0; d < D; d++) off += pow(o[d] - (double)v[h][j][d], 2);
                double part = (double)s1[h * G + g][j] / sum;
                want += part / (1 - part) * sqrt(off) / G;
            }
            same("caote", h, j, want);
        }
    }
    /* criticalkv: half of the budget by the base score first, the window among them; the rest weighed */
    score("criticalkv:window=8,pool=none,reduce=sum", 28);
    int first = 0;
    for (int j = 0; j < T - W; j++) {
        double base = ((double)s1[0][j] + (double)s1[1][j]) / 2, before = 0;
        for (int i = 0; i < T - W; i++) before += ((double)s1[0][i] + (double)s1[1][i]) / 2 > base;
        if (before < 6)
            first += got[0][j] > 1e30f;
        else
            same("criticalkv", 0, j, (base + 1e-4) * ((double)wo[0][j] + (double)wo[1][j]) / 2);
    }
    ck_assert_int_eq(first, 6);
    rf_kv_rule cake;
    ck_assert_int_eq(rf_kv_rule_parse(&cake, "cake:window=8,tau1=1.6,tau2=0.4", NULL), RF_OK);
    double disorder = 0, spread = 0;
    for (int q = 0; q < HQ; q++) {
        for (int j = 0; j < T - W; j++) {
            double mean = 0;
            for (int i = 0; i < W; i++) {
                double y = (double)p[q][i][j];
                mean += y / W;
                disorder -= y * log(y);
            }
            for (int i = 0; i < W; i++) spread += pow((double)p[q][i][j] - mean, 2) / (W - 1);
        }
    }
    double want = pow(disorder, 1 / 1.6) * pow(spread, 1 / 0.4);
    ck_assert(fabs(rf_kv_preference(&cake, &shape, T, &stats) - want) <= 1e-3 * want);
}
END_TEST

/* One query behind a prompt weighs what one query of the prompt weighs, for every way to reduce a group. */
START_TEST(tokens_count_as_prompts_do) {
    static const char *const specs[] = {"a2sf:recents=0", "h2o:recents=0", "h2o:recents=0,group=max", "tova"};
    make_stats();
    stats.num_queries = 1;
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        rf_kv_rule rule;
        float step[T];
        ck_assert_int_eq(rf_kv_rule_parse(&rule, specs[i], NULL), RF_OK);
        score(specs[i], 20);
        for (int h = 0; h < HKV; h++) {
            rf_kv_step_probability(&rule, &shape, h, T, &stats, step);
            for (int j = 0; j < T; j++) same(specs[i], h, j, (double)step[j]);
        }
    }
}
END_TEST

/* Prompts shorter than the window, budgets below it: sinks, then the newest, no more than the budget, and no NaN. */
START_TEST(short_prompts_are_protected) {
    static const char *const specs[] = {"snapkv", "adakv", "cake", "caote", "criticalkv", "obcache", "h2o", "expected"};
    const float *all = got[0]; /* [HKV][n] */
    make_stats();
    for (size_t i = 0; i < sizeof specs / sizeof specs[0]; i++) {
        rf_kv_rule rule;
        ck_assert_int_eq(rf_kv_rule_parse(&rule, specs[i], NULL), RF_OK);
        bool window = rule.score == RF_KV_SCORE_ATTENTION && rule.queries == RF_KV_QUERIES_WINDOW;
        for (int n = 1; n <= T; n += 3) {
            for (int budget = 1; budget <= 48; budget++) {
                rf_error err = {0};
                stats.num_keys = n;
                stats.num_queries = n < W ? n : W;
                rf_assert_ok(rf_kv_prefill_scores(&rule, &shape, 0, n, budget, &stats, got[0], scratch, &err), err);
                int front = rule.sinks < budget ? rule.sinks : budget, back = rf_kv_num_recents(&rule, budget), num = 0;
                if (window && rule.window > back) back = rule.window;
                if (back > budget - front) back = budget - front;
                for (int j = 0; j < HKV * n; j++) {
                    ck_assert(!isnan(all[j]));
                    num += isinf(all[j]) != 0;
                }
                int want = HKV * (front + back < n ? front + back : n);
                ck_assert_msg(num == want, "%s: %d keys, budget %d: %d protected", specs[i], n, budget, num);
            }
        }
    }
}
END_TEST

/* |o - o without j|, renormalised, is h / (1 - h) |o - v|. */
START_TEST(caote_is_the_change_of_the_output) {
    make_stats();
    rf_kv_rule rule;
    rf_error err = {0};
    rf_kv_shape one = shape;
    one.num_q_heads = one.num_kv_heads = 1;
    stats.s1 = p[0][W - 1];
    ck_assert_int_eq(rf_kv_rule_parse(&rule, "score=attention,queries=last,reduce=sum,value=caote", NULL), RF_OK);
    rf_assert_ok(rf_kv_prefill_scores(&rule, &one, 0, T, 20, &stats, got[0], scratch, &err), err);
    for (int j = 0; j < T; j++) {
        double change = 0, gone = (double)stats.s1[j];
        for (int d = 0; d < D; d++) {
            double with = 0, without = 0;
            for (int i = 0; i < T; i++) {
                double x = (double)stats.s1[i] * (double)v[0][i][d];
                with += x;
                if (i != j) without += x / (1 - gone);
            }
            change += (with - without) * (with - without);
        }
        same("caote", 0, j, sqrt(change));
    }
    stats.head_dim = 640;
    rf_assert_fails(rf_kv_prefill_scores(&rule, &one, 0, T, 20, &stats, got[0], scratch, &err), err, RF_ERR_UNSUPPORTED,
                    "at most 512 columns");
}
END_TEST

START_TEST(what_is_missing_is_named) {
    make_stats();
    stats.s1 = NULL;
    rf_kv_rule rule;
    rf_error err = {0};
    ck_assert_int_eq(rf_kv_rule_parse(&rule, "snapkv", &err), RF_OK);
    ck_assert_int_ne(rf_kv_prefill_scores(&rule, &shape, 1, T, 20, &stats, got[0], scratch, &err), RF_OK);
    ck_assert(strstr(err.message, "sums") != NULL);
    ck_assert_int_eq(rf_kv_rule_parse(&rule, "streaming", &err), RF_OK);
    ck_assert_int_eq(rf_kv_prefill_scores(&rule, &shape, 1, T, 20, &stats, got[0], scratch, &err), RF_ERR_UNSUPPORTED);
}
END_TEST

START_TEST(random_is_uniform_and_the_same_everywhere) {
    double sum = 0;
    for (int j = 0; j < 4096; j++) {
        float u = rf_kv_uniform(3, 1, 0, j);
        ck_assert(u >= 0 && u < 1);
        sum += (double)u;
    }
    ck_assert(fabs(sum / 4096 - 0.5) < 0.02);
    ck_assert_float_eq(rf_kv_uniform(3, 1, 0, 5), rf_kv_uniform(3, 1, 0, 5));
    ck_assert_float_ne(rf_kv_uniform(3, 1, 0, 5), rf_kv_uniform(3, 1, 1, 5));
    ck_assert_float_ne(rf_kv_uniform(3, 1, 0, 5), rf_kv_uniform(3, 2, 0, 5));
    ck_assert_float_ne(rf_kv_uniform(3, 1, 0, 5), rf_kv_uniform(4, 1, 0, 5));
}
END_TEST

int main(void) {
    Suite *suite = suite_create("caching/kv rules");
    TCase *tc = tcase_create("rules");
    suite_add_tcase(suite, tc);
    tcase_add_test(tc, every_method_opens_and_comes_back);
    tcase_add_test(tc, options_change_parts);
    tcase_add_test(tc, what_a_user_undoes_stays_undone);
    tcase_add_test(tc, needs_are_what_scores_read);
    tcase_add_test(tc, wrong_words_are_named);
    tcase_add_test(tc, parts_that_do_not_go_together_are_refused);
    tcase_add_test(tc, of_two_like_sentences_the_earlier_is_penalised);
    tcase_add_test(tc, pools_deflate_edges_or_not);
    tcase_add_test(tc, top_takes_the_largest_and_the_lowest_of_equals);
    tcase_add_test(tc, pools_of_many_are_those_of_each);
    tcase_add_test(tc, the_best_of_many_are_those_of_a_sort);
    tcase_add_test(tc, pyramid_is_an_arithmetic_series);
    tcase_add_test(tc, flat_heads_follow_scores_above_a_floor);
    tcase_add_test(tc, cake_shares_what_there_is);
    tcase_add_test(tc, scores_are_their_formulas);
    tcase_add_test(tc, tokens_count_as_prompts_do);
    tcase_add_test(tc, short_prompts_are_protected);
    tcase_add_test(tc, caote_is_the_change_of_the_output);
    tcase_add_test(tc, what_is_missing_is_named);
    tcase_add_test(tc, random_is_uniform_and_the_same_everywhere);
    return rf_run_suite(suite);
}

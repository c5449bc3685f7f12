/* tests/dlm/test_commit.c - commit rules and host sampling, by hand and against sums in double. */
#include "dlm/commit.h"

#include "core/memory.h"
#include "dlm/sampling.h"
#include "tests/test_util.h"

static rf_decode_options rule(rf_commit_rule commit) {
    rf_decode_options o = rf_decode_options_default(NULL);
    o.commit = commit;
    return o;
}

/* Candidates at positions 10, 11, ... with these confidences; entropy 1 - confidence. */
static void fill(rf_candidate *c, const float *confidence, int num) {
    for (int i = 0; i < num; i++) c[i] = (rf_candidate){10 + i, 100 + i, confidence[i], 1.0f - confidence[i]};
}

static int32_t choose(const rf_decode_options *o, int32_t count, const float *confidence, int num, rf_candidate *c) {
    fill(c, confidence, num);
    return rf_commit_select(o, count, 1.0, 0, c, num);
}

START_TEST(shares_of_a_schedule_sum_to_all_masks) {
    for (int32_t masks = 0; masks < 40; masks++)
        for (int32_t steps = 1; steps < 20; steps++) {
            int32_t sum = 0;
            for (int32_t t = 0; t < steps; t++) {
                const int32_t share = rf_commit_share(masks, steps, t);
                ck_assert_int_ge(share, masks / steps);
                ck_assert_int_le(share, masks / steps + 1);
                sum += share;
            }
            ck_assert_int_eq(sum, masks);
        }
}
END_TEST

START_TEST(the_most_confident_commit_and_ties_go_to_the_left) {
    const float confidence[] = {0.5f, 0.9f, 0.5f, 0.9f, 0.1f};
    rf_decode_options o = rule(RF_COMMIT_TOPN);
    rf_candidate c[5];
    ck_assert_int_eq(choose(&o, 3, confidence, 5, c), 3);
    ck_assert_int_eq(c[0].position, 11);
    ck_assert_int_eq(c[1].position, 13);
    ck_assert_int_eq(c[2].position, 10);
    ck_assert_int_eq(choose(&o, 9, confidence, 5, c), 5);
}
END_TEST

START_TEST(a_threshold_takes_all_above_it_and_always_the_best) {
    const float confidence[] = {0.95f, 0.2f, 0.9f, 0.99f};
    rf_decode_options o = rule(RF_COMMIT_THRESHOLD);
    rf_candidate c[4];
    o.threshold = 0.9f;
    ck_assert_int_eq(choose(&o, 0, confidence, 4, c), 3);
    o.threshold_strict = true;
    ck_assert_int_eq(choose(&o, 0, confidence, 4, c), 2);
    o.threshold = 0.999;
    ck_assert_int_eq(choose(&o, 0, confidence, 4, c), 1);
    ck_assert_int_eq(c[0].position, 13);
    o.dynamic = true; /* at least what the schedule gives */
    ck_assert_int_eq(choose(&o, 3, confidence, 4, c), 3);
}
END_TEST

/* Worked by hand: (n + 1)(1 - c_n) < f with c = .99 .98 .9 .5: .02, .06, .4, 2.5. */
START_TEST(factor_takes_the_largest_prefix_under_it) {
    const float confidence[] = {0.5f, 0.98f, 0.99f, 0.9f};
    rf_decode_options o = rule(RF_COMMIT_FACTOR);
    rf_candidate c[4];
    const double factors[] = {0.01, 0.03, 0.1, 1.0, 3.0};
    const int want[] = {1, 1, 2, 3, 4};
    for (int i = 0; i < 5; i++) {
        o.factor = factors[i];
        ck_assert_int_eq(choose(&o, 0, confidence, 4, c), want[i]);
    }
}
END_TEST

/* Entropies sorted 0, .05, .1, .4: sums without the largest 0, 0, .05, .15. */
START_TEST(entropy_bound_leaves_the_largest_out_of_its_sum) {
    const float confidence[] = {0.9f, 1.0f, 0.6f, 0.95f};
    rf_decode_options o = rule(RF_COMMIT_ENTROPY_BOUND);
    rf_candidate c[4];
    const double bounds[] = {0.0, 0.04, 0.06, 0.2};
    const int want[] = {2, 2, 3, 4};
    for (int i = 0; i < 4; i++) {
        o.entropy_bound = bounds[i];
        ck_assert_int_eq(choose(&o, 0, confidence, 4, c), want[i]);
        ck_assert_int_eq(c[0].position, 11);
    }
}
END_TEST

START_TEST(sequential_and_origin_go_by_position) {
    const float confidence[] = {0.1f, 0.9f, 0.2f, 0.8f};
    rf_decode_options o = rule(RF_COMMIT_SEQUENTIAL);
    rf_candidate c[400];
    ck_assert_int_eq(choose(&o, 2, confidence, 4, c), 2);
    ck_assert_int_eq(c[0].position, 10);
    ck_assert_int_eq(c[1].position, 11);
    o = rule(RF_COMMIT_ORIGIN);
    ck_assert_int_eq(choose(&o, 0, confidence, 4, c), 4); /* transfer 1: all */
    float many[400];
    for (int i = 0; i < 400; i++) many[i] = 0.5f;
    int sum = 0;
    for (int32_t step = 0; step < 100; step++) {
        fill(c, many, 400);
        const int32_t n = rf_commit_select(&o, 0, 0.25, step, c, 400);
        sum += n;
        fill(c, many, 400);
        ck_assert_int_eq(rf_commit_select(&o, 0, 0.25, step, c, 400), n); /* by seed, step and position alone */
    }
    ck_assert_msg(abs(sum - 10000) < 350, "%d of 40000 at probability 0.25", sum); /* 4 sigma */
}
END_TEST

/* With temperature the first pick follows softmax(confidence / T). */
START_TEST(alg_temp_draws_by_confidence) {
    const float confidence[] = {0.0f, 0.5f, 1.0f};
    rf_decode_options o = rule(RF_COMMIT_SCHEDULE);
    o.alg_temp = 0.5;
    rf_candidate c[3];
    int hits[3] = {0};
    enum { RUNS = 20000 };
    for (int32_t step = 0; step < RUNS; step++) {
        fill(c, confidence, 3);
        ck_assert_int_eq(rf_commit_select(&o, 1, 1.0, step, c, 3), 1);
        hits[c[0].position - 10]++;
    }
    const double z = 1.0 + exp(1.0) + exp(2.0);
    for (int i = 0; i < 3; i++) {
        const double p = exp(i) / z, sigma = sqrt(p * (1 - p) / RUNS);
        ck_assert_msg(fabs(hits[i] / (double)RUNS - p) < 4.5 * sigma, "candidate %d: %d hits, p %g", i, hits[i], p);
    }
}
END_TEST

/* --- sampling ------------------------------------------------------------------------------------------------------------ */

enum { VOCAB = 5000 };
typedef struct {
    float logits[VOCAB], copy[VOCAB];
    rf_sampling_entry entries[VOCAB];
} buffers;

static buffers *make_buffers(void) {
    buffers *b = rf_alloc(sizeof *b);
    ck_assert_ptr_nonnull(b);
    uint32_t x = 12345;
    for (int v = 0; v < VOCAB; v++) {
        x = x * 1664525u + 1013904223u;
        b->logits[v] = (float)(x >> 8) / 16777216.0f * 8.0f - 4.0f;
    }
    return b;
}

static rf_token_stats sample(buffers *b, rf_sampling s) {
    rf_token_stats stats;
    memcpy(b->copy, b->logits, sizeof b->copy);
    if (s.repetition_penalty == 0) s.repetition_penalty = 1;
    if (s.top_p == 0) s.top_p = 1;
    rf_sample_row(&s, b->copy, VOCAB, b->entries, &stats);
    return stats;
}

START_TEST(greedy_takes_the_largest_and_states_its_probability) {
    buffers *b = make_buffers();
    int best = 0;
    double total = 0;
    for (int v = 0; v < VOCAB; v++)
        if (b->logits[v] > b->logits[best]) best = v;
    for (int v = 0; v < VOCAB; v++) total += exp((double)b->logits[v] - b->logits[best]);
    const rf_token_stats s = sample(b, (rf_sampling){0});
    ck_assert_int_eq(s.id, best);
    ck_assert_double_eq_tol(s.prob, 1.0 / total, 1e-7);
    double entropy = 0;
    for (int v = 0; v < VOCAB; v++) {
        const double p = exp((double)b->logits[v] - b->logits[best]) / total;
        entropy -= p * log(p);
    }
    ck_assert_double_eq_tol(s.entropy, entropy, 1e-4);
    rf_free(b);
}
END_TEST

/* Every filter: the set of ids that can come out, found by draws over a grid of uniforms, is the set of the plain rule. */
START_TEST(filters_leave_what_their_rules_say) {
    buffers *b = make_buffers();
    const rf_sampling settings[] = {{.temperature = 1, .top_k = 7},
                                    {.temperature = 0.7, .top_p = 0.3},
                                    {.temperature = 1, .top_p = 0.999},
                                    {.temperature = 1, .min_p = 0.9},
                                    {.temperature = 0.25, .top_k = 40, .top_p = 0.8, .min_p = 0.05}};
    for (size_t i = 0; i < sizeof settings / sizeof settings[0]; i++) {
        rf_sampling s = settings[i];
        /* the plain rule: sort everything */
        rf_sampling_entry e[VOCAB];
        for (int v = 0; v < VOCAB; v++) e[v] = (rf_sampling_entry){(float)(b->logits[v] / s.temperature), v};
        for (int v = 1; v < VOCAB; v++)
            for (int w = v; w > 0 && e[w].z > e[w - 1].z; w--) {
                const rf_sampling_entry t = e[w];
                e[w] = e[w - 1];
                e[w - 1] = t;
            }
        int num = s.top_k > 0 ? s.top_k : VOCAB;
        double total = 0, before = 0;
        for (int v = 0; v < num; v++) total += exp((double)e[v].z - e[0].z);
        if (s.top_p > 0) {
            int kept = 0;
            while (kept < num && (kept == 0 || before < s.top_p * total)) before += exp((double)e[kept++].z - e[0].z);
            num = kept;
        }
        if (s.min_p > 0) {
            int kept = 0;
            while (kept < num && exp((double)e[kept].z - e[0].z) >= s.min_p) kept++;
            num = kept;
        }
        total = 0;
        for (int v = 0; v < num; v++) total += exp((double)e[v].z - e[0].z);
        s.uniform = 1e-9;
        const rf_token_stats first = sample(b, s);
        s.uniform = 1 - 1e-9;
        const rf_token_stats last = sample(b, s);
        bool found_first = false, found_last = false;
        for (int v = 0; v < num; v++) {
            found_first |= e[v].id == first.id;
            found_last |= e[v].id == last.id;
        }
        ck_assert_msg(found_first && found_last, "setting %zu: ids %d and %d are not among %d", i, first.id, last.id,
                      num);
        ck_assert_double_eq_tol(first.best_prob, 1.0 / total, 1e-6);
        ck_assert_double_eq_tol(first.margin, (1.0 - (num > 1 ? exp((double)e[1].z - e[0].z) : 0)) / total, 1e-6);
        /* mean over a fine grid of uniforms is the distribution */
        double hits = 0;
        for (int k = 0; k < 1000; k++) {
            s.uniform = (k + 0.5) / 1000;
            hits += sample(b, s).id == e[0].id;
        }
        ck_assert_double_eq_tol(hits / 1000, 1.0 / total, 2e-3);
    }
    rf_free(b);
}
END_TEST

START_TEST(the_penalty_meets_each_id_once) {
    buffers *b = make_buffers();
    const int best = sample(b, (rf_sampling){0}).id;
    const int32_t history[] = {best, 3, best, -1, VOCAB, best};
    const float was = b->logits[best];
    rf_sampling s = {.repetition_penalty = 1.5, .history = history, .num_history = 6};
    sample(b, s);
    ck_assert_float_eq_tol(b->copy[best], was / 1.5f, 1e-6f);
    ck_assert_float_eq_tol(b->copy[3], b->logits[3] > 0 ? b->logits[3] / 1.5f : b->logits[3] * 1.5f, 1e-6f);
    ck_assert_float_eq(b->copy[4], b->logits[4]);
    rf_free(b);
}
END_TEST

START_TEST(nan_and_minus_infinity_are_never_taken) {
    buffers *b = make_buffers();
    for (int v = 0; v < VOCAB; v++) b->logits[v] = v % 2 ? NAN : -INFINITY;
    b->logits[77] = -3.0f;
    for (int k = 0; k < 10; k++) {
        const rf_token_stats s = sample(b, (rf_sampling){.temperature = 1, .uniform = (k + 0.5) / 10, .top_p = 0.9});
        ck_assert_int_eq(s.id, 77);
        ck_assert_float_eq_tol(s.prob, 1.0f, 1e-6f);
    }
    rf_free(b);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("commit");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, shares_of_a_schedule_sum_to_all_masks);
    tcase_add_test(tc, the_most_confident_commit_and_ties_go_to_the_left);
    tcase_add_test(tc, a_threshold_takes_all_above_it_and_always_the_best);
    tcase_add_test(tc, factor_takes_the_largest_prefix_under_it);
    tcase_add_test(tc, entropy_bound_leaves_the_largest_out_of_its_sum);
    tcase_add_test(tc, sequential_and_origin_go_by_position);
    tcase_add_test(tc, alg_temp_draws_by_confidence);
    tcase_add_test(tc, greedy_takes_the_largest_and_states_its_probability);
    tcase_add_test(tc, filters_leave_what_their_rules_say);
    tcase_add_test(tc, the_penalty_meets_each_id_once);
    tcase_add_test(tc, nan_and_minus_infinity_are_never_taken);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

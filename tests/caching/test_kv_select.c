/* tests/caching/test_kv_select.c - what a selecting rule reads, against direct statements in double: the ends of a budget, votes,
 * rotary pairs, agreement, sentences and pages. */
#include <math.h>

#include "caching/kv/select.h"
#include "core/rng.h"
#include "tests/test_util.h"

enum { N = 90, DIM = 8, HEADS = 2, GROUP = 3 };

static float draw(uint32_t a, uint32_t b) {
    uint32_t counter[4] = {a, b, 0, 0}, key[2] = {31, 7}, words[4];
    rf_philox4x32(counter, key, words);
    return (float)words[0] * 0x1p-31f - 1;
}

typedef struct {
    float pool[HEADS * N * DIM], q[HEADS * GROUP * DIM];
    int32_t rows[HEADS][N];
    rf_kv_keys keys[HEADS];
    rf_error err;
} fixture;

/* Rows of the pool in another order than slots. */
static void fill(fixture *f) {
    *f = (fixture){0};
    for (uint32_t i = 0; i < HEADS * N * DIM; i++) f->pool[i] = 2 * draw(i, 1);
    for (uint32_t i = 0; i < HEADS * GROUP * DIM; i++) f->q[i] = 2 * draw(i, 2);
    for (int h = 0; h < HEADS; h++) {
        for (int j = 0; j < N; j++) f->rows[h][j] = HEADS * ((j * 37 + 11) % N) + h;
        f->keys[h] = (rf_kv_keys){.k = f->pool, .rows = f->rows[h], .num = N, .dim = DIM};
    }
}

static double key(const fixture *f, int h, int j, int c) {
    return (double)f->pool[f->rows[h][j] * DIM + c];
}

START_TEST(ends_are_the_rules_or_their_part_of_a_small_budget) {
    rf_kv_rule rule;
    rf_error err;
    int32_t init, local;
    rf_assert_ok(rf_kv_rule_parse(&rule, "tokenselect", &err), err);
    ck_assert_int_eq(rule.selector, RF_KV_BY_VOTE);
    rf_kv_select_ends(&rule, 2688, &init, &local);
    ck_assert(init == 128 && local == 512);
    rf_kv_select_ends(&rule, 5000, &init, &local);
    ck_assert(init == 128 && local == 512);
    rf_kv_select_ends(&rule, 168, &init, &local);
    ck_assert(init == 8 && local == 32);
    rf_kv_select_ends(&rule, 1, &init, &local);
    ck_assert(init == 0 && local == 1);
    rf_kv_rule_parse(&rule, "fasa", &err);
    rf_kv_select_ends(&rule, 40, &init, &local);
    ck_assert(init == 0 && local == 1);
}
END_TEST

START_TEST(the_best_between_the_ends_ties_to_the_lowest) {
    float score[10] = {9, 1, 5, 5, 2, 5, 7, 0, 9, 9};
    int32_t out[6], want[6] = {0, 2, 3, 6, 8, 9};
    ck_assert_int_eq(rf_kv_select_best(out, score, 10, 6, 1, 2), 6);
    ck_assert(memcmp(out, want, sizeof out) == 0);
}
END_TEST

/* Softmax of each query head over the candidates alone, head h on key head h / G. */
START_TEST(votes_are_summed_softmaxes_of_all_heads) {
    fixture f;
    float score[N], work[N];
    fill(&f);
    int begin = 3, end = N - 7;
    rf_kv_select_vote(score, f.q, f.keys, HEADS, GROUP, 0.5f, begin, end, work);
    double want[N] = {0}, total = 0;
    for (int h = 0; h < HEADS * GROUP; h++) {
        double p[N], sum = 0;
        for (int j = begin; j < end; j++) {
            double z = 0;
            for (int c = 0; c < DIM; c++) z += (double)f.q[h * DIM + c] * key(&f, h / GROUP, j, c);
            sum += p[j] = exp(z * 0.5);
        }
        for (int j = begin; j < end; j++) want[j] += p[j] / sum;
    }
    for (int j = 0; j < N; j++) {
        ck_assert_double_eq_tol((double)score[j], want[j], 1e-5);
        total += (double)score[j];
    }
    ck_assert_double_eq_tol(total, HEADS * GROUP, 1e-4);
}
END_TEST

START_TEST(pairs_score_by_their_elements_alone) {
    fixture f;
    float score[N], work[N];
    int32_t pairs[GROUP][2] = {{0, 3}, {1, 2}, {2, 3}};
    fill(&f);
    rf_kv_select_pairs(score, f.q, &f.keys[1], &pairs[0][0], GROUP, 2, 0.7f, 0, N - 1, work);
    double want[N] = {0};
    for (int g = 0; g < GROUP; g++) {
        double p[N], sum = 0;
        for (int j = 0; j < N - 1; j++) {
            double z = 0;
            for (int i = 0; i < 2; i++)
                for (int half = 0; half < 2; half++) {
                    int c = pairs[g][i] + half * DIM / 2;
                    z += (double)f.q[g * DIM + c] * key(&f, 1, j, c);
                }
            sum += p[j] = exp(z * (double)0.7f);
        }
        for (int j = 0; j < N - 1; j++) want[j] += p[j] / sum / GROUP;
    }
    for (int j = 0; j < N; j++) ck_assert_double_eq_tol((double)score[j], want[j], 1e-5);
}
END_TEST

/* Is slot j among the count best of z? */
static bool is_best(const double *z, int n, int count, int j) {
    int ahead = 0;
    for (int i = 0; i < n; i++) ahead += z[i] > z[j] || (z[i] == z[j] && i < j);
    return ahead < count;
}

START_TEST(agreement_is_the_shared_part_of_the_best) {
    fixture f;
    float work[2 * N];
    double got[DIM / 2] = {0}, all[N], one[N];
    enum { SEEN = 60, COUNT = 15 };
    fill(&f);
    rf_kv_select_agreement(got, f.q, &f.keys[0], SEEN, COUNT, work);
    for (int c = 0; c < DIM / 2; c++) {
        int shared = 0;
        for (int j = 0; j < SEEN; j++) {
            all[j] = 0;
            for (int i = 0; i < DIM; i++) all[j] += (double)f.q[i] * key(&f, 0, j, i);
            one[j] = (double)f.q[c] * key(&f, 0, j, c) + (double)f.q[c + DIM / 2] * key(&f, 0, j, c + DIM / 2);
        }
        for (int j = 0; j < SEEN; j++) shared += is_best(all, SEEN, COUNT, j) && is_best(one, SEEN, COUNT, j);
        ck_assert_double_eq_tol(got[c], (double)shared / COUNT, 1e-12);
    }
    double agreement[4] = {0.5, 0.9, 0.5, 0.7};
    int32_t best[3], want[3] = {0, 1, 3};
    rf_kv_select_best_pairs(best, agreement, 4, 3);
    ck_assert(memcmp(best, want, sizeof best) == 0);
}
END_TEST

/* Six sentences; one of them counts with two of its three slots, one not at all. */
START_TEST(whole_sentences_by_their_mean_key) {
    rf_kv_units u = {0};
    rf_error err;
    rf_kv_units_reset(&u, 1);
    static const int len[6] = {2, 3, 3, 4, 1, 3};
    static const float value[6] = {1, 9, 5, 7, 100, 2};
    for (int s = 0, slot = 0; s < 6; s++)
        for (int i = 0; i < len[s]; i++, slot++) {
            bool counts = !(s == 2 && i == 1) && s != 4;
            float k =
                value[s] + (float)(i == 0) - (float)(i == 1 && s != 2); /* means are the values where it matters */
            rf_assert_ok(rf_kv_units_add(&u, &k, counts, &err), err);
            if (i + 1 == len[s]) u.open = -1;
        }
    ck_assert_int_eq(u.num_units, 6);
    ck_assert_int_eq(u.num_slots, 16);
    float q = 1, score[12];
    int32_t order[6], cost[6], out[16], want_order[6] = {1, 3, 2, 5, 0, 4};
    rf_kv_units_rank(order, &u, &q, score);
    ck_assert(memcmp(order, want_order, sizeof order) == 0);
    /* room for 6 between the ends: 3 of sentence 1, sentence 3's 4 do not fit, 2 of sentence 2; slot 13 is of sentence 5, which costs
     * 1 more than the newest two */
    int32_t num = rf_kv_select_units(out, &u, order, 1, 9, 1, 2, false, cost), want[9] = {0, 2, 3, 4, 5, 7, 13, 14, 15};
    ck_assert_int_eq(num, 9);
    ck_assert(memcmp(out, want, sizeof want) == 0);
    q = -1;
    rf_kv_units_rank(order, &u, &q, score);
    int32_t other[6] = {0, 5, 2, 3, 1, 4};
    ck_assert(memcmp(order, other, sizeof order) == 0);
    /* the sentence that has not ended, by far the best, is read only where a unit may be read while it grows */
    int32_t seven[7], still[9] = {0, 1, 2, 3, 4, 5, 7, 17, 18}, grown[9] = {0, 2, 3, 4, 5, 7, 16, 17, 18};
    float k = 1000, scratch[14];
    for (int i = 0; i < 3; i++) rf_assert_ok(rf_kv_units_add(&u, &k, true, &err), err);
    q = 1;
    rf_kv_units_rank(seven, &u, &q, scratch);
    ck_assert_int_eq(seven[0], 6);
    for (int growing = 0; growing < 2; growing++) {
        int32_t read[19], costs[7];
        ck_assert_int_eq(rf_kv_select_units(read, &u, seven, 1, 9, 1, 2, growing == 1, costs), 9);
        ck_assert(memcmp(read, growing == 1 ? grown : still, sizeof still) == 0);
    }
    rf_kv_units_free(&u);
}
END_TEST

/* Every slot has a page, pages are full but the last, and each is its seed with what is nearest of the rest. */
START_TEST(pages_are_of_near_keys) {
    enum { PAGE = 8 };
    fixture f;
    rf_kv_units u = {0};
    bool used[N] = {false};
    fill(&f);
    rf_assert_ok(rf_kv_units_page(&u, &f.keys[1], PAGE, &f.err), f.err);
    ck_assert_int_eq(u.num_units, (N + PAGE - 1) / PAGE);
    for (int p = 0; p < u.num_units; p++) {
        double near[N], sum[DIM] = {0};
        int seed = 0, size = 0;
        while (used[seed]) seed++;
        ck_assert_int_eq(u.unit[seed], p);
        for (int j = 0; j < N; j++) {
            near[j] = used[j] ? -INFINITY : 0;
            for (int c = 0; c < DIM && !used[j]; c++) near[j] -= pow(key(&f, 1, j, c) - key(&f, 1, seed, c), 2);
        }
        for (int j = 0; j < N; j++) {
            if (used[j]) continue;
            ck_assert_int_eq(u.unit[j] == p, is_best(near, N, PAGE, j));
            if (u.unit[j] != p) continue;
            used[j] = true;
            size++;
            for (int c = 0; c < DIM; c++) sum[c] += key(&f, 1, j, c);
        }
        ck_assert_int_eq(size, u.count[p]);
        ck_assert_int_eq(size, p + 1 < u.num_units ? PAGE : N % PAGE);
        for (int c = 0; c < DIM; c++) ck_assert_double_eq_tol(sum[c], (double)u.sum[p * DIM + c], 1e-4);
    }
    float k[DIM] = {0};
    rf_assert_ok(rf_kv_units_add(&u, k, true, &f.err), f.err);
    ck_assert_int_eq(u.unit[N], (N + PAGE - 1) / PAGE);
    rf_kv_units_free(&u);
}
END_TEST

/* Two heads' orders: the first of each, then the second of each. */
START_TEST(pages_of_a_group_are_a_union) {
    rf_kv_units u = {0};
    rf_error err;
    float k = 0;
    rf_kv_units_reset(&u, 1);
    for (int j = 0; j < 12; j++) {
        rf_assert_ok(rf_kv_units_add(&u, &k, true, &err), err);
        if (j % 2 == 1) u.open = -1;
    }
    int32_t order[2][6] = {{1, 2, 3, 4, 5, 0}, {4, 1, 0, 2, 3, 5}}, out[12], cost[6];
    int32_t want[7] = {2, 3, 4, 5, 8, 9, 11}; /* pages 1, 4, then 2 */
    ck_assert_int_eq(rf_kv_select_units(out, &u, &order[0][0], 2, 7, 0, 1, true, cost), 7);
    ck_assert(memcmp(out, want, sizeof want) == 0);
    rf_kv_units_free(&u);
}
END_TEST

/* The best three budgets of a prompt count for sentences, protected ones among them; a short prompt counts whole. */
START_TEST(what_counts_for_sentences) {
    enum { T = 40, BUDGET = 5 };
    rf_kv_rule rule;
    rf_error err;
    rf_assert_ok(rf_kv_rule_parse(&rule, "sentencekv:window=4,pool=none", &err), err);
    rf_assert_ok(rf_kv_rule_check(&rule, &err), err);
    rf_kv_shape shape = {
        .num_layers = 1, .num_q_heads = 2, .num_kv_heads = 1, .head_dim = DIM, .max_prompt = T, .max_new = 4};
    float s1[2 * T];
    for (uint32_t i = 0; i < 2 * T; i++) s1[i] = fabsf(draw(i, 5));
    rf_kv_stats stats = {.num_keys = T, .stride = T, .num_queries = 4, .s1 = s1, .head_dim = DIM};
    uint8_t counts[T];
    double mean[T];
    int num = 0;
    rf_assert_ok(rf_kv_select_counts(&rule, &shape, 0, T, BUDGET, &stats, counts, &err), err);
    for (int j = 0; j < T; j++) mean[j] = j >= T - 4 ? INFINITY : ((double)s1[j] + (double)s1[T + j]) / 2;
    for (int j = 0; j < T; j++) {
        num += counts[j];
        ck_assert_int_eq(counts[j], is_best(mean, T, 3 * BUDGET, j));
    }
    ck_assert_int_eq(num, 3 * BUDGET);
    rf_assert_ok(rf_kv_select_counts(&rule, &shape, 0, T, 14, &stats, counts, &err), err);
    for (int j = 0; j < T; j++) ck_assert_int_eq(counts[j], 1);
}
END_TEST

START_TEST(rules_that_do_not_go_together_are_refused) {
    static const char *const bad[] = {"tokenselect:position=cache", "fasa:alloc=flat-heads",
                                      "sentencekv:delimiter1=-1,delimiter2=-1,delimiter3=-1,delimiter4=-1",
                                      "sentencekv:queries=all"};
    rf_kv_rule rule;
    rf_error err;
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        rf_assert_ok(rf_kv_rule_parse(&rule, bad[i], &err), err);
        rf_assert_fails(rf_kv_rule_check(&rule, &err), err, RF_ERR_UNSUPPORTED, "sel");
    }
}
END_TEST

int main(void) {
    Suite *suite = suite_create("kv select");
    TCase *tc = tcase_create("kv select");
    tcase_add_test(tc, ends_are_the_rules_or_their_part_of_a_small_budget);
    tcase_add_test(tc, the_best_between_the_ends_ties_to_the_lowest);
    tcase_add_test(tc, votes_are_summed_softmaxes_of_all_heads);
    tcase_add_test(tc, pairs_score_by_their_elements_alone);
    tcase_add_test(tc, agreement_is_the_shared_part_of_the_best);
    tcase_add_test(tc, whole_sentences_by_their_mean_key);
    tcase_add_test(tc, pages_are_of_near_keys);
    tcase_add_test(tc, pages_of_a_group_are_a_union);
    tcase_add_test(tc, what_counts_for_sentences);
    tcase_add_test(tc, rules_that_do_not_go_together_are_refused);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

/* tests/caching/test_kv_demote.c - classes of tokens in few bits against plain statements: KIVI's blocks, ZipCache's two classes,
 * MiKV's and ARKV's ranks, MiniCache's exceptions; rooms hold what rules make; slots that the runtime places. */
#include <math.h>

#include "caching/kv/demote.h"
#include "core/rng.h"
#include "tests/test_util.h"

enum { MOST = 400 };

static rf_kv_rule rule_of(const char *spec) {
    rf_kv_rule rule;
    rf_error err = {0};
    rf_assert_ok(rf_kv_rule_parse(&rule, spec, &err), err);
    rf_assert_ok(rf_kv_rule_check(&rule, &err), err);
    return rule;
}

static float draw(uint32_t i, uint32_t key) {
    uint32_t counter[4] = {i, key, 0, 0}, seed[2] = {5, 0}, words[4];
    rf_philox4x32(counter, seed, words);
    return (float)(words[0] % 64) / 64.0f; /* ties */
}

/* Does token a come before b: larger score, then lower position. */
static bool before(const float *score, int a, int b) {
    return score[a] > score[b] || (score[a] == score[b] && a < b);
}
/* How many of `among` come before token i. */
static int rank_of(const float *score, const uint8_t *among, int n, int i) {
    int rank = 0;
    for (int j = 0; j < n; j++) rank += among[j] && before(score, j, i);
    return rank;
}

START_TEST(kivi_packs_whole_blocks_of_the_oldest) {
    rf_kv_rule rule = rule_of("kivi:residual=64");
    uint8_t next[MOST];
    int32_t work[MOST];
    int wrong = 0;
    for (int n = 1; n <= 200; n++) {
        rf_kv_demote_blocks(&rule, n, 0, 0, NULL, n, next, work);
        for (int i = 0; i < n; i++) wrong += next[i] != (i < n - n % 64 ? RF_KV_HIGH : RF_KV_RAW);
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert(!rf_kv_demote_due(&rule, 1, 63));
    ck_assert(rf_kv_demote_due(&rule, 1, 64));
    rule = rule_of("kivi:schedule=every,every=10");
    ck_assert(!rf_kv_demote_due(&rule, 9, 64));
    ck_assert(rf_kv_demote_due(&rule, 10, 4));
}
END_TEST

/* The prompt, then `more` tokens with a choice after every 100: in each choice the best of the raw ones are HIGH, the worst LOW. */
START_TEST(zipcache_packs_best_and_worst) {
    rf_kv_rule rule = rule_of("zipcache");
    rf_kv_shape shape = {
        .num_layers = 1, .num_q_heads = 1, .num_kv_heads = 1, .head_dim = 16, .max_prompt = 133, .max_new = 1000};
    rf_kv_demote_room room = rf_kv_demote_rooms(&rule, &shape, 0);
    int32_t raw = 133, seen = 133, high = 0, low = 0, work[MOST];
    float score[MOST];
    uint8_t next[MOST], all[MOST];
    memset(all, 1, sizeof all);
    for (int turn = 0; turn <= 10; turn++) {
        for (int i = 0; i < raw; i++) score[i] = draw((uint32_t)i, (uint32_t)turn);
        rf_kv_demote_blocks(&rule, seen, high, low, score, raw, next, work);
        int want_high = (int)floor(0.6 * seen + 0.5), best = (want_high - high) / 32 * 32;
        int worst = (seen - want_high - low) / 32 * 32, wrong = 0, left = 0;
        for (int i = 0; i < raw; i++) {
            int rank = rank_of(score, all, raw, i);
            int want = rank < best ? RF_KV_HIGH : rank >= raw - worst ? RF_KV_LOW : RF_KV_RAW;
            wrong += next[i] != want;
            left += want == RF_KV_RAW;
        }
        ck_assert_int_eq(wrong, 0);
        high += best;
        low += worst;
        ck_assert_int_le(left, 62);
        ck_assert_int_eq(high + low + left, seen);
        ck_assert_int_le(high, room.high);
        ck_assert_int_le(low, room.low);
        raw = left + 100;
        ck_assert_int_le(raw, room.raw);
        seen += 100;
    }
    ck_assert_int_ge(high, (int)(0.6 * 1133) - 32);
    ck_assert(!rf_kv_demote_due(&rule, 99, 100) && rf_kv_demote_due(&rule, 100, 0));
}
END_TEST

/* ranked: token by token from a prompt on, against the statement; rooms hold. */
static void run_ranks(const char *spec, int32_t budget, double share) {
    rf_kv_rule rule = rule_of(spec);
    enum { PROMPT = 60, NEW = 140 };
    rf_kv_shape shape = {
        .num_layers = 1, .num_q_heads = 1, .num_kv_heads = 1, .head_dim = 16, .max_prompt = PROMPT, .max_new = NEW};
    rf_kv_demote_room room = rf_kv_demote_rooms(&rule, &shape, budget);
    int window = rule.queries == RF_KV_QUERIES_WINDOW ? rule.window : 0, n = PROMPT, wrong = 0, raw = 0, low = 0;
    uint8_t now[MOST] = {0}, next[MOST], alive[MOST];
    float score[MOST], copy[MOST], work[2 * MOST];
    for (int seen = PROMPT; seen <= PROMPT + NEW; seen++) {
        for (int i = 0; i < n; i++) copy[i] = score[i] = draw((uint32_t)(i + 7 * seen), 3);
        rf_kv_demote_ranked(&rule, seen, budget, share, now, copy, n, next, work);
        int cap = budget > 0 && budget < seen ? budget : seen, w = window < cap ? window : cap;
        int want_raw = w + (int)floor(rule.high_share * share * (cap - w) + 0.5);
        if (want_raw < 1) want_raw = 1;
        int back = rule.recents < 0 ? want_raw / 2 : w;
        for (int i = 0; i < n; i++) { /* protected: above all others */
            if (i >= n - back) score[i] = 2;
            alive[i] = 1;
        }
        for (int i = 0; i < n && budget > 0 && n > budget; i++) {
            uint8_t all[MOST];
            memset(all, 1, sizeof all);
            alive[i] = rank_of(score, all, n, i) < budget;
        }
        uint8_t rest[MOST];
        int left = 0, at = 0;
        raw = low = 0;
        for (int i = 0; i < n; i++) left += rest[i] = alive[i] && now[i] == RF_KV_RAW;
        for (int i = 0; i < n; i++) {
            int want = !alive[i] ? RF_KV_GONE : now[i];
            if (rest[i] && left > want_raw && rank_of(score, rest, n, i) >= want_raw) want = RF_KV_LOW;
            wrong += next[i] != want;
            raw += want == RF_KV_RAW;
            low += want == RF_KV_LOW;
        }
        for (int i = 0; i < n; i++)
            if (next[i] != RF_KV_GONE) now[at++] = next[i];
        ck_assert_int_le(raw, want_raw);
        ck_assert_int_le(raw + 1, room.raw);
        ck_assert_int_le(low, room.low);
        ck_assert_int_eq(at, budget > 0 && budget < n ? budget : n);
        now[at] = RF_KV_RAW; /* the next token */
        n = at + 1;
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_gt(low, 0);
}

START_TEST(ranks_stay_raw_go_low_or_go) {
    run_ranks("mikv", 0, 1.0);
    run_ranks("mikv", 40, 1.0);
    run_ranks("mikv:high_share=0", 0, 1.0);
    run_ranks("arkv:window=8", 48, 0.5);
    run_ranks("arkv:window=8", 0, 0.25);
    run_ranks("arkv:window=8,high_share=0.5", 30, 1.0);
}
END_TEST

START_TEST(ranked_parts_have_golden_counts) {
    rf_kv_rule mikv = rule_of("mikv"), arkv = rule_of("arkv:window=8");
    ck_assert_int_eq(rf_kv_demote_raw(&mikv, 100, 0, 1.0), 20);
    ck_assert_int_eq(rf_kv_demote_raw(&mikv, 2, 0, 1.0), 1); /* never none */
    ck_assert_int_eq(rf_kv_demote_raw(&mikv, 100, 50, 1.0), 10);
    ck_assert_int_eq(rf_kv_demote_raw(&arkv, 100, 48, 1.0), 48);
    ck_assert_int_eq(rf_kv_demote_raw(&arkv, 100, 48, 0.5), 28); /* 8 + 0.5 * 40 */
    ck_assert_float_eq(rf_kv_demote_follow(&mikv, 2.0f, 0.5f), 2.5f);
    ck_assert_float_eq(rf_kv_demote_follow(&arkv, 2.0f, 0.5f), 0.5f);
    rf_kv_rule zip = rule_of("zipcache");
    ck_assert_float_eq(rf_kv_demote_compared(&zip, 3.0f, 10, 4), 0.5f);
    ck_assert_float_eq(rf_kv_demote_compared(&mikv, 3.0f, 10, 4), 3.0f);
}
END_TEST

START_TEST(pairs_of_layers_and_what_they_keep) {
    static const int layers[] = {1, 2, 3, 8, 9};
    static const char *const roles[] = {".", ".0", ".01", "....0101", "....01010"}; /* the last one alone is no pair */
    for (int i = 0; i < 5; i++)
        for (int l = 0; l < layers[i]; l++) {
            bool alone = roles[i][l] == '0' && l + 1 == layers[i];
            ck_assert_int_eq(rf_kv_share_earlier(layers[i], l), roles[i][l] == '0' && !alone);
            ck_assert_int_eq(rf_kv_share_later(layers[i], l), roles[i][l] == '1');
        }
    rf_kv_rule rule = rule_of("minicache");
    enum { N = 50 };
    float k[N], v[N];
    uint8_t kept[N];
    int32_t work[N], wrong = 0;
    for (int i = 0; i < N; i++) k[i] = draw((uint32_t)i, 8), v[i] = draw((uint32_t)i, 9);
    int32_t num = rf_kv_share_kept(&rule, k, v, N, kept, work), count = 0;
    uint8_t all[N];
    memset(all, 1, sizeof all);
    for (int i = 0; i < N; i++) {
        bool want = rank_of(k, all, N, i) < 3 || rank_of(v, all, N, i) < 3; /* ceil(2.5) */
        wrong += kept[i] != want;
        count += want;
    }
    ck_assert_int_eq(wrong, 0);
    ck_assert_int_eq(num, count);
    rule.high_share = 1;
    ck_assert_int_eq(rf_kv_share_kept(&rule, k, v, N, kept, work), N);
    rule.high_share = 0;
    ck_assert_int_eq(rf_kv_share_kept(&rule, k, v, N, kept, work), 0);
}
END_TEST

START_TEST(the_runtime_places_slots) {
    rf_kv_rule rule = rule_of("kivi");
    rf_kv_shape shape = {
        .num_layers = 2, .num_q_heads = 2, .num_kv_heads = 2, .head_dim = 16, .max_prompt = 40, .max_new = 9};
    rf_error err = {0};
    rf_kv_book *book;
    ck_assert_int_eq(rf_kv_pool_rows(&rule, &shape, 0), 2 * 2 * (31 + 1));
    rf_assert_ok(rf_kv_book_create(&book, &rule, &shape, 0, 100, &err), err);
    int32_t positions[2 * 40], counts[2] = {8, 7};
    for (int i = 0; i < 8; i++) positions[i] = 32 + i, positions[40 + i] = 33 + i;
    rf_assert_fails(rf_kv_book_place(book, 0, positions, counts, 40, &err), err, RF_ERR_STATE, "layer 0");
    for (int l = 0; l < 2; l++) {
        rf_assert_ok(rf_kv_book_prefill(book, l, 40, NULL, &err), err);
        ck_assert_int_eq(rf_kv_book_head(book, l, 0)->num, 0);
        rf_assert_ok(rf_kv_book_place(book, l, positions, counts, 40, &err), err);
    }
    rf_assert_fails(rf_kv_book_place(book, 1, positions, counts, 40, &err), err, RF_ERR_STATE, "layer 1");
    ck_assert_int_eq(rf_kv_book_head(book, 1, 1)->num, 7);
    ck_assert_int_eq(rf_kv_book_head(book, 1, 1)->position[6], 39);
    ck_assert_int_ge(rf_kv_book_head(book, 1, 1)->row[6], 100);
    rf_assert_ok(rf_kv_book_append(book, 40, &err), err);
    int32_t keep[2] = {1, 8};
    rf_kv_book_release(book, 1, 0, keep, 2);
    ck_assert_int_eq(rf_kv_book_head(book, 1, 0)->num, 2);
    ck_assert_int_eq(rf_kv_book_head(book, 1, 0)->position[0], 33);
    ck_assert_int_eq(rf_kv_book_head(book, 1, 0)->position[1], 40);
    ck_assert_int_eq(rf_kv_book_get_info(book).kept, 9 + 8 + 2 + 8);
    ck_assert_int_eq(rf_kv_book_get_info(book).evictions, 0);
    rf_kv_book_destroy(book);
}
END_TEST

int main(void) {
    Suite *s = suite_create("caching/kv demote");
    TCase *tc = tcase_create("rules");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, kivi_packs_whole_blocks_of_the_oldest);
    tcase_add_test(tc, zipcache_packs_best_and_worst);
    tcase_add_test(tc, ranks_stay_raw_go_low_or_go);
    tcase_add_test(tc, ranked_parts_have_golden_counts);
    tcase_add_test(tc, pairs_of_layers_and_what_they_keep);
    tcase_add_test(tc, the_runtime_places_slots);
    suite_add_tcase(s, tc);
    return rf_run_suite(s);
}

/* tests/core/test_rng.c - known answers of Philox, moments, and PyTorch's own draws on CPU and GPU
 * (tests/fixtures/rng.json, rng_cuda.json). */
#include "core/file.h"
#include "core/json.h"
#include "core/rng.h"
#include "tests/test_util.h"

/* Random123 1.14, tests/kat_vectors, philox4x32 10 */
START_TEST(philox_gives_the_published_answers) {
    static const struct {
        uint32_t counter[4], key[2], want[4];
    } cases[] = {
        {{0, 0, 0, 0}, {0, 0}, {0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}},
        {{~0u, ~0u, ~0u, ~0u}, {~0u, ~0u}, {0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}},
        {{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344},
         {0xa4093822, 0x299f31d0},
         {0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}},
    };
    for (int i = 0; i < 3; i++) {
        uint32_t got[4];
        rf_philox4x32(cases[i].counter, cases[i].key, got);
        ck_assert_mem_eq(got, cases[i].want, sizeof got);
    }
}
END_TEST

START_TEST(kinds_have_names) {
    for (int k = 0; k < 3; k++) {
        rf_rng_kind back;
        ck_assert(rf_rng_kind_from_name(rf_rng_kind_name((rf_rng_kind)k), &back) && (int)back == k);
    }
    rf_rng_kind none;
    ck_assert(!rf_rng_kind_from_name("cpu", &none) && !rf_rng_kind_from_name(NULL, &none));
}
END_TEST

START_TEST(counter_draws_do_not_depend_on_how_they_are_asked_for) {
    float whole[103], parts[103];
    rf_rng rng;
    rf_rng_normal_at(9, 4, 5, whole, 103);
    for (size_t i = 0; i < 103; i++) rf_rng_normal_at(9, 4, 5 + i, parts + i, 1);
    ck_assert_mem_eq(whole, parts, sizeof whole);
    rf_rng_normal_at(9, 0, 0, whole, 103);
    rf_rng_init(&rng, RF_RNG_COUNTER, 9);
    for (size_t at = 0, n = 1; at < 103; at += n, n = 2 * n < 103 - at ? 2 * n : 103 - at)
        rf_rng_normal(&rng, parts + at, n);
    ck_assert_mem_eq(whole, parts, sizeof whole);
}
END_TEST

START_TEST(counter_seeds_and_keys_give_other_streams) {
    float a[64], b[64], c[64];
    rf_rng_normal_at(1, 0, 0, a, 64);
    rf_rng_normal_at(UINT64_C(1) << 40, 0, 0, b, 64);
    rf_rng_normal_at(1, UINT64_C(1) << 40, 0, c, 64);
    for (int i = 0; i < 64; i++) ck_assert(a[i] != b[i] && a[i] != c[i] && b[i] != c[i]);
}
END_TEST

START_TEST(draws_are_standard_normal) {
    enum { N = 1 << 18 };
    static float x[N];
    rf_rng rng;
    rf_rng_init(&rng, (rf_rng_kind)_i, 3);
    rf_rng_normal(&rng, x, N);
    double m[5] = {0};
    for (int i = 0; i < N; i++) {
        double p = 1;
        for (int k = 1; k < 5; k++) m[k] += (p *= (double)x[i]) / N;
    }
    /* five standard errors: sqrt(Var(x^k) / N) with Var = 1, 2, 15, 96 */
    ck_assert_double_le(fabs(m[1]), 5 * sqrt(1.0 / N));
    ck_assert_double_le(fabs(m[2] - 1), 5 * sqrt(2.0 / N));
    ck_assert_double_le(fabs(m[3]), 5 * sqrt(15.0 / N));
    ck_assert_double_le(fabs(m[4] - 3), 5 * sqrt(96.0 / N));
}
END_TEST

/* torch.randn(4, device="cuda") after torch.manual_seed(0), as PyTorch prints it. */
START_TEST(torch_cuda_gives_the_well_known_first_draws) {
    static const float want[4] = {-0.9247f, -0.4253f, -2.6438f, 0.1452f};
    float got[4];
    rf_rng rng;
    rf_rng_init(&rng, RF_RNG_TORCH_CUDA, 0);
    rf_rng_normal(&rng, got, 4);
    rf_assert_close(got, want, 4, 5.1e-5, 1e-4);
    ck_assert_uint_eq(rng.offset, 4);
}
END_TEST

/* One loop turn covers 4 x the grid; the next turn and the next call use the following Philox block. */
START_TEST(torch_cuda_moves_on_as_the_kernel_does) {
    enum { THREADS = 256 * 2, N = THREADS * 4 + 300 };
    static float all[N], turn[THREADS];
    rf_rng rng, second;
    rf_rng_init(&rng, RF_RNG_TORCH_CUDA, 11);
    rng.cuda_num_sms = 1;
    rng.cuda_threads_per_sm = 512;
    second = rng;
    rf_rng_normal(&rng, all, N);
    ck_assert_uint_eq(rng.offset, 8);
    second.offset = 4;
    rf_rng_normal(&second, turn, THREADS);
    ck_assert_mem_eq(all + THREADS * 4, turn, 300 * sizeof(float));
}
END_TEST

/* ---- against PyTorch ---- */

/* Our logf, sinf and cosf against PyTorch's vectorised ones and the GPU's: 2.4e-7 and 1.3e-6 apart at most here. */
#define TORCH_BOUND 2e-6
/* Times the number of draws: the mean rounding difference is 4e-8 (the GPU's fast sine has a bias), that of squares 1.4e-7.
 * A single wrong draw moves the sum of the largest fixture, 1,000,003 draws, by about 1. */
#define SUM_BOUND 1e-7

/* The values listed in the fixture, and the sums over all, which show a wrong draw in the middle. */
static void check_draw(rf_rng *rng, const rf_json *doc, const rf_json_value *draw) {
    int64_t n;
    rf_error err = {0};
    rf_assert_ok(rf_json_get_int(doc, draw, "n", 1, 1 << 22, &n, &err), err);
    float *got = malloc((size_t)n * sizeof *got);
    rf_rng_normal(rng, got, (size_t)n);
    const char *const lists[] = {"values", "first", "last"};
    for (int k = 0; k < 3; k++) {
        const rf_json_value *values = rf_json_get(draw, lists[k]);
        size_t num = rf_json_count(values), i = k == 2 ? (size_t)n - num : 0;
        for (const rf_json_value *v = rf_json_first(values); v; v = rf_json_next(v), i++) {
            ck_assert_msg(fabs((double)got[i] - rf_json_number(v)) <= TORCH_BOUND,
                          "draw %zu of %d: got %.9g, want %.9g", i, (int)n, (double)got[i], rf_json_number(v));
        }
    }
    double sum = 0, squares = 0;
    for (int64_t i = 0; i < n; i++) {
        sum += (double)got[i];
        squares += (double)got[i] * (double)got[i];
    }
    const rf_json_value *want_sum = rf_json_get(draw, "sum"), *want_squares = rf_json_get(draw, "sum_of_squares");
    ck_assert_msg(n <= 64 || (want_sum && want_squares), "a draw of %d without its sums", (int)n);
    if (want_sum) ck_assert_double_le(fabs(sum - rf_json_number(want_sum)), SUM_BOUND * (double)n);
    if (want_squares) ck_assert_double_le(fabs(squares - rf_json_number(want_squares)), 3 * SUM_BOUND * (double)n);
    free(got);
}

static bool is_f32_randn(const rf_json *doc, const rf_json_value *draw) {
    const char *dtype, *function;
    return rf_json_get_string(doc, draw, "dtype", &dtype, NULL) == RF_OK && strcmp(dtype, "f32") == 0 &&
           rf_json_get_string(doc, draw, "function", &function, NULL) == RF_OK && strcmp(function, "randn") == 0;
}

static uint64_t seed_of(const rf_json_value *item) {
    double seed = rf_json_number(rf_json_get(item, "seed"));
    return seed >= 0x1p63 ? INT64_MAX : (uint64_t)seed; /* 2^63 - 1, which a double cannot hold */
}

START_TEST(torch_cpu_matches_the_fixture) {
    rf_error err = {0};
    rf_json *doc = NULL;
    int num_single = 0, num_rows = 0;
    rf_rng rng;
    rf_assert_ok(rf_json_open(&doc, RF_FIXTURE_DIR "/rng.json", &err), err);
    const rf_json_value *v = rf_json_first(rf_json_get(rf_json_root(doc), "single"));
    for (; v; v = rf_json_next(v)) {
        if (!is_f32_randn(doc, v)) continue;
        rf_rng_init(&rng, RF_RNG_TORCH_CPU, seed_of(v));
        check_draw(&rng, doc, v);
        num_single++;
    }
    for (v = rf_json_first(rf_json_get(rf_json_root(doc), "rows")); v; v = rf_json_next(v)) {
        rf_rng_init(&rng, RF_RNG_TORCH_CPU, seed_of(v));
        const rf_json_value *draw = rf_json_first(rf_json_get(v, "draws"));
        for (; draw && is_f32_randn(doc, draw); draw = rf_json_next(draw)) check_draw(&rng, doc, draw);
        num_rows += draw == NULL;
    }
    ck_assert_int_gt(num_single, 20);
    ck_assert_int_gt(num_rows, 0);
    rf_json_close(doc);
}
END_TEST

START_TEST(torch_cuda_matches_the_fixture) {
    rf_error err = {0};
    rf_json *doc = NULL;
    int num_single = 0, num_rows = 0;
    int64_t num_sms, threads_per_sm, offset;
    rf_rng rng;
    rf_assert_ok(rf_json_open(&doc, RF_FIXTURE_DIR "/rng_cuda.json", &err), err);
    const rf_json_value *root = rf_json_root(doc);
    rf_assert_ok(rf_json_get_int(doc, root, "multi_processor_count", 1, 4096, &num_sms, &err), err);
    rf_assert_ok(rf_json_get_int(doc, root, "max_threads_per_multi_processor", 256, 4096, &threads_per_sm, &err), err);
    const rf_json_value *v = rf_json_first(rf_json_get(root, "single"));
    for (; v; v = rf_json_next(v)) {
        if (!is_f32_randn(doc, v)) continue;
        rf_rng_init(&rng, RF_RNG_TORCH_CUDA, seed_of(v));
        rng.cuda_num_sms = (int)num_sms;
        rng.cuda_threads_per_sm = (int)threads_per_sm;
        check_draw(&rng, doc, v);
        num_single++;
    }
    for (v = rf_json_first(rf_json_get(root, "rows")); v; v = rf_json_next(v)) {
        rf_rng_init(&rng, RF_RNG_TORCH_CUDA, seed_of(v));
        rng.cuda_num_sms = (int)num_sms;
        rng.cuda_threads_per_sm = (int)threads_per_sm;
        const rf_json_value *draw = rf_json_first(rf_json_get(v, "draws"));
        for (; draw; draw = rf_json_next(draw)) {
            ck_assert(is_f32_randn(doc, draw));
            check_draw(&rng, doc, draw);
            rf_assert_ok(rf_json_get_int(doc, draw, "offset_after", 0, 1 << 20, &offset, &err), err);
            ck_assert_uint_eq(rng.offset, (uint64_t)offset);
        }
        num_rows++;
    }
    ck_assert_int_eq(num_single, 21);
    ck_assert_int_eq(num_rows, 21);
    rf_json_close(doc);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("rng");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, philox_gives_the_published_answers);
    tcase_add_test(tc, kinds_have_names);
    tcase_add_test(tc, counter_draws_do_not_depend_on_how_they_are_asked_for);
    tcase_add_test(tc, counter_seeds_and_keys_give_other_streams);
    tcase_add_loop_test(tc, draws_are_standard_normal, 0, 3);
    tcase_add_test(tc, torch_cuda_gives_the_well_known_first_draws);
    tcase_add_test(tc, torch_cuda_moves_on_as_the_kernel_does);
    tcase_add_test(tc, torch_cpu_matches_the_fixture);
    tcase_add_test(tc, torch_cuda_matches_the_fixture);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

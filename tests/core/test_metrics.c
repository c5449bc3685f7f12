/* tests/core/test_metrics.c - PSNR that does not wrap, SSIM against independently computed values, and the edges.
 *
 * The numbers of `golden` are from this, in double through torch's two-dimensional convolution (torch 2, numpy 2):
 *   import numpy as np, torch
 *   def pictures(c, h, w):
 *       n = np.arange(c * h * w, dtype=np.uint64)
 *       a = ((n * 2654435761 % 2**32) >> 16).astype(np.float64) / 65536
 *       b = (3 * a + ((n * n * 2246822519 % 2**32) >> 16).astype(np.float64) / 65536) / 4
 *       return [torch.tensor(x, dtype=torch.float64).reshape(c, 1, h, w) for x in (a, b)]
 *   def ssim(a, b):
 *       d = torch.arange(11, dtype=torch.float64) - 5
 *       g = torch.exp(-d * d / 4.5); g = g / g.sum()
 *       f = lambda x: torch.nn.functional.conv2d(x, torch.outer(g, g)[None, None])
 *       ma, mb = f(a), f(b)
 *       va, vb, cov = f(a * a) - ma**2, f(b * b) - mb**2, f(a * b) - ma * mb
 *       return ((2*ma*mb + .01**2) * (2*cov + .03**2) / ((ma**2 + mb**2 + .01**2) * (va + vb + .03**2))).mean().item()
 *   a, b = pictures(3, 16, 21)
 *   print(ssim(a, b), -10 * torch.log10(((a-b)**2).mean()).item(), (a-b).abs().max().item(), ((a-b).norm()/b.norm()).item()) */
#include "core/metrics.h"

#include "tests/test_util.h"

#define MOST (3 * 40 * 32)

typedef struct {
    int channels, height, width;
    double ssim, psnr_db, max_abs, rel_l2;
} golden_case;

static const golden_case golden[] = {
    {1, 11, 11, 0.920853708700680, 20.581882782363, 0.230701446533203, 0.171212545457899},
    {3, 16, 21, 0.915045338974864, 20.055231622677, 0.242286682128906, 0.180842915672804},
    {3, 40, 32, 0.925194851796124, 19.821813736427, 0.249526977539062, 0.186534416175863},
};

/* The two pictures of the script above; every value is exact in a float. Returns how many values. */
static size_t pictures(float *a, float *b, const golden_case *g) {
    size_t num = (size_t)g->channels * (size_t)g->height * (size_t)g->width;
    for (uint64_t n = 0; n < num; n++) {
        a[n] = (float)((n * 2654435761u & 0xffffffff) >> 16) / 65536;
        b[n] = (3 * a[n] + (float)((n * n * 2246822519u & 0xffffffff) >> 16) / 65536) / 4;
    }
    return num;
}

START_TEST(all_metrics_match_independent_values) {
    static float a[MOST], b[MOST], swap[MOST];
    const golden_case *g = &golden[_i];
    size_t num = pictures(a, b, g);
    rf_error err = {0};
    double ssim = 0, other = 0;
    rf_assert_ok(rf_metric_ssim(a, b, g->channels, g->height, g->width, 1, &ssim, &err), err);
    ck_assert_double_eq_tol(ssim, g->ssim, 1e-12);
    rf_assert_ok(rf_metric_ssim(b, a, g->channels, g->height, g->width, 1, &other, &err), err);
    ck_assert_double_eq_tol(other, ssim, 1e-14);
    ck_assert_double_eq_tol(rf_metric_psnr(a, b, num, 1), g->psnr_db, 1e-10);
    ck_assert_double_eq_tol(rf_metric_max_abs(a, b, num), g->max_abs, 1e-12);
    ck_assert_double_eq_tol(rf_metric_rel_l2(a, b, num), g->rel_l2, 1e-12);
    /* The range scales values away. */
    for (size_t i = 0; i < num; i++) {
        a[i] *= 255;
        b[i] *= 255;
    }
    rf_assert_ok(rf_metric_ssim(a, b, g->channels, g->height, g->width, 255, &ssim, &err), err);
    ck_assert_double_eq_tol(ssim, g->ssim, 1e-6);
    ck_assert_double_eq_tol(rf_metric_psnr(a, b, num, 255), g->psnr_db, 1e-5);
    /* Height and width are not mixed up: the transposed pictures give the same. */
    pictures(a, b, g);
    size_t h = (size_t)g->height, w = (size_t)g->width;
    for (int which = 0; which < 2; which++) {
        float *p = which == 0 ? a : b;
        memcpy(swap, p, num * sizeof *p);
        for (size_t i = 0; i < num; i++) p[i / (h * w) * h * w + i % w * h + i / w % h] = swap[i];
    }
    rf_assert_ok(rf_metric_ssim(a, b, g->channels, g->width, g->height, 1, &ssim, &err), err);
    ck_assert_double_eq_tol(ssim, g->ssim, 1e-12);
}
END_TEST

static double uniform(uint64_t *state) {
    *state = *state * 6364136223846793005u + 1442695040888963407u;
    return ((double)(*state >> 11) + 0.5) / 9007199254740992.0;
}

static double normal(uint64_t *state) {
    double radius = sqrt(-2 * log(uniform(state)));
    return radius * cos(6.283185307179586 * uniform(state));
}

/* A random 8-bit picture and the same with noise, rounded and clipped. */
static void noisy_pair(uint8_t *a, uint8_t *b, size_t num, double sigma) {
    uint64_t state = 42;
    for (size_t i = 0; i < num; i++) {
        a[i] = (uint8_t)(uniform(&state) * 256);
        double v = nearbyint(a[i] + sigma * normal(&state));
        b[i] = (uint8_t)(v < 0 ? 0 : v > 255 ? 255 : v);
    }
}

/* What a published tool computes: difference and square stay in 8 bits. */
static double wrapped_psnr(const uint8_t *a, const uint8_t *b, size_t num) {
    double squares = 0;
    for (size_t i = 0; i < num; i++) {
        uint8_t d = (uint8_t)(a[i] - b[i]);
        squares += (uint8_t)(d * d);
    }
    return 10 * log10(255.0 * 255.0 * (double)num / squares);
}

START_TEST(psnr_of_8_bits_does_not_wrap) {
    enum { NUM = 512 * 512 * 3 };
    static uint8_t a[NUM], b[NUM];
    static float fa[NUM], fb[NUM];
    static const double cases[][3] = {
        /* sigma, true, wrapped */ {1, 47.8, 47.8},
        {3, 38.6, 38.6},
        {5, 34.2, 34.3},
        {8, 30.2, 31.3},
        {12, 26.8, 29.9},
        {20, 22.5, 28.8},
        {30, 19.2, 28.4},
        {50, 15.2, 28.0},
    };
    for (size_t k = 0; k < sizeof cases / sizeof cases[0]; k++) {
        noisy_pair(a, b, NUM, cases[k][0]);
        for (size_t i = 0; i < NUM; i++) {
            fa[i] = a[i];
            fb[i] = b[i];
        }
        double ours = rf_metric_psnr_u8(a, b, NUM);
        ck_assert_double_eq_tol(ours, cases[k][1], 0.1);
        ck_assert_double_eq_tol(wrapped_psnr(a, b, NUM), cases[k][2], 0.1);
        ck_assert_double_eq_tol(rf_metric_psnr(fa, fb, NUM, 255), ours, 1e-9);
    }
}
END_TEST

START_TEST(equal_pictures) {
    static float a[MOST], b[MOST];
    size_t num = pictures(a, b, &golden[2]);
    rf_error err = {0};
    double ssim = 0;
    ck_assert_double_infinite(rf_metric_psnr(a, a, num, 1));
    ck_assert(rf_metric_psnr(a, a, num, 1) > 0);
    ck_assert_double_eq(rf_metric_max_abs(a, a, num), 0);
    ck_assert_double_eq(rf_metric_rel_l2(a, a, num), 0);
    rf_assert_ok(rf_metric_ssim(a, a, 3, 40, 32, 1, &ssim, &err), err);
    ck_assert_double_eq(ssim, 1);
    memset(a, 0, sizeof a); /* nothing is divided by zero */
    rf_assert_ok(rf_metric_ssim(a, a, 3, 40, 32, 1, &ssim, &err), err);
    ck_assert_double_eq(ssim, 1);
    ck_assert_double_eq_tol(rf_metric_rel_l2(b, a, 1), fabs((double)b[0]), 1e-12);
}
END_TEST

/* One constant against another has no variance: only the means count, (2 a b + C1) / (a^2 + b^2 + C1). */
START_TEST(ssim_of_constant_pictures) {
    static float a[MOST], b[MOST];
    rf_error err = {0};
    double ssim = 0;
    for (size_t i = 0; i < MOST; i++) {
        a[i] = 0.25f;
        b[i] = 0.75f;
    }
    rf_assert_ok(rf_metric_ssim(a, b, 3, 40, 32, 1, &ssim, &err), err);
    ck_assert_double_eq_tol(ssim, (2 * 0.25 * 0.75 + 1e-4) / (0.0625 + 0.5625 + 1e-4), 1e-12);
}
END_TEST

START_TEST(pictures_smaller_than_the_window_are_refused) {
    static const float zero[11 * 11];
    rf_error err = {0};
    double ssim = 0;
    rf_assert_ok(rf_metric_ssim(zero, zero, 1, 11, 11, 1, &ssim, &err), err);
    rf_assert_fails(rf_metric_ssim(zero, zero, 1, 10, 11, 1, &ssim, &err), err, RF_ERR_SHAPE, "at least 11 x 11");
    rf_assert_fails(rf_metric_ssim(zero, zero, 1, 11, 10, 1, &ssim, &err), err, RF_ERR_SHAPE, "found 10 x 11");
}
END_TEST

START_TEST(a_nan_is_never_passed_over) {
    float a[121] = {0}, b[121] = {0};
    rf_error err = {0};
    rf_picture_metrics m = {0};
    double ssim = 0;
    a[60] = (float)NAN;
    ck_assert_double_nan(rf_metric_psnr(a, b, 121, 1));
    ck_assert_double_nan(rf_metric_rel_l2(a, b, 121));
    ck_assert_double_infinite(rf_metric_max_abs(a, b, 121));
    rf_assert_ok(rf_metric_ssim(a, b, 1, 11, 11, 1, &ssim, &err), err);
    ck_assert_double_nan(ssim);
    rf_assert_ok(rf_metric_picture(a, b, 1, 11, 11, &m, &err), err);
    ck_assert_double_nan(m.psnr_db);
    ck_assert_double_nan(m.ssim);
    ck_assert_double_infinite(m.max_abs);
}
END_TEST

/* -1 .. 1 becomes 0 .. 1, and what lies outside does not count. */
START_TEST(pictures_are_compared_as_they_are_saved) {
    static float a[MOST], b[MOST], wide_a[MOST], wide_b[MOST];
    const golden_case *g = &golden[2];
    size_t num = pictures(a, b, g);
    rf_error err = {0};
    rf_picture_metrics m = {0};
    for (size_t i = 0; i < num; i++) {
        wide_a[i] = 2 * a[i] - 1;
        wide_b[i] = 2 * b[i] - 1;
    }
    rf_assert_ok(rf_metric_picture(wide_a, wide_b, 3, 40, 32, &m, &err), err);
    ck_assert_double_eq_tol(m.psnr_db, g->psnr_db, 1e-5);
    ck_assert_double_eq_tol(m.ssim, g->ssim, 1e-6);
    ck_assert_double_eq_tol(m.max_abs, g->max_abs, 1e-6);
    memcpy(wide_b, wide_a, sizeof wide_a);
    wide_a[5] = 7;
    wide_b[5] = 1;
    wide_a[6] = -3;
    wide_b[6] = -1;
    rf_assert_ok(rf_metric_picture(wide_a, wide_b, 3, 40, 32, &m, &err), err);
    ck_assert_double_infinite(m.psnr_db);
    ck_assert_double_eq(m.max_abs, 0);
    rf_assert_ok(rf_metric_picture(a, b, 3, 10, 32, &m, &err), err);
    ck_assert_double_nan(m.ssim);
    ck_assert(m.psnr_db > 0);
}
END_TEST

int main(void) {
    Suite *suite = suite_create("metrics");
    TCase *tc = tcase_create("all");
    tcase_add_loop_test(tc, all_metrics_match_independent_values, 0, (int)(sizeof golden / sizeof golden[0]));
    tcase_add_test(tc, psnr_of_8_bits_does_not_wrap);
    tcase_add_test(tc, equal_pictures);
    tcase_add_test(tc, ssim_of_constant_pictures);
    tcase_add_test(tc, pictures_smaller_than_the_window_are_refused);
    tcase_add_test(tc, a_nan_is_never_passed_over);
    tcase_add_test(tc, pictures_are_compared_as_they_are_saved);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

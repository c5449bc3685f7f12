/* tests/test_util.h - comparing arrays, temporary folders, and running one suite. Header only. */
#ifndef RF_TESTS_TEST_UTIL_H
#define RF_TESTS_TEST_UTIL_H

#include <check.h>
#include <ftw.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "core/status.h"

typedef struct {
    double max_abs;     /* infinity if one side has a NaN or an infinity that the other has not */
    double rel_l2;      /* |got - want| / |want|, or |got - want| if want is zero */
    size_t worst_index; /* of max_abs */
} rf_difference;

static inline rf_difference rf_compare_f32(const float *got, const float *want, size_t num) {
    rf_difference d = {0};
    double sum_diff = 0, sum_want = 0;
    for (size_t i = 0; i < num; i++) {
        double diff = fabs((double)got[i] - (double)want[i]);
        if (got[i] == want[i]) diff = 0; /* equal infinities */
        if (isnan(diff)) diff = INFINITY;
        if (diff > d.max_abs) {
            d.max_abs = diff;
            d.worst_index = i;
        }
        sum_diff += diff * diff;
        sum_want += (double)want[i] * (double)want[i];
    }
    d.rel_l2 = sum_want > 0 ? sqrt(sum_diff / sum_want) : sqrt(sum_diff);
    return d;
}

/* Fails the running test with all four numbers if a bound is passed. */
#define rf_assert_close(got, want, num, max_abs_bound, rel_l2_bound)                                                   \
    do {                                                                                                               \
        const float *rf_got_ = (got), *rf_want_ = (want);                                                              \
        rf_difference rf_d_ = rf_compare_f32(rf_got_, rf_want_, (num));                                                \
        ck_assert_msg(rf_d_.max_abs <= (max_abs_bound) && rf_d_.rel_l2 <= (rel_l2_bound),                              \
                      "max abs %g (bound %g), relative L2 %g (bound %g), worst at %zu: got %.9g, want %.9g",           \
                      rf_d_.max_abs, (double)(max_abs_bound), rf_d_.rel_l2, (double)(rel_l2_bound), rf_d_.worst_index, \
                      (double)rf_got_[rf_d_.worst_index], (double)rf_want_[rf_d_.worst_index]);                        \
    } while (0)

/* A call that must succeed, with its message if it does not. `err` is the rf_error given to the call. */
#define rf_assert_ok(call, err)                                                                                        \
    do {                                                                                                               \
        rf_status rf_st_ = (call);                                                                                     \
        ck_assert_msg(rf_st_ == RF_OK, "%s: %s", rf_status_name(rf_st_), (err).message);                               \
    } while (0)

/* A call that must fail with `status` and a message that holds `part`. */
#define rf_assert_fails(call, err, want_status, part)                                                                  \
    do {                                                                                                               \
        rf_status rf_st_ = (call);                                                                                     \
        ck_assert_msg(rf_st_ == (want_status), "wanted %s, got %s: %s", rf_status_name(want_status),                   \
                      rf_status_name(rf_st_), rf_st_ == RF_OK ? "" : (err).message);                                   \
        ck_assert_msg(strstr((err).message, (part)) != NULL, "'%s' is not in the message: %s", (part), (err).message); \
    } while (0)

/* ---- temporary folders ---- */

/* A fresh folder under $TMPDIR or /tmp; out of at least 256 bytes. */
static inline const char *rf_temp_dir_make(char *out, size_t out_bytes) {
    const char *base = getenv("TMPDIR");
    snprintf(out, out_bytes, "%s/refrain-test-XXXXXX", base && base[0] ? base : "/tmp");
    return mkdtemp(out);
}

static inline int rf_temp_dir_remove_one(const char *path, const struct stat *info, int type, struct FTW *where) {
    (void)info;
    (void)type;
    (void)where;
    return remove(path);
}

static inline void rf_temp_dir_remove(const char *dir) {
    nftw(dir, rf_temp_dir_remove_one, 16, FTW_DEPTH | FTW_PHYS);
}

/* ---- one suite ---- */

/* Runs a suite; the value is main's. */
static inline int rf_run_suite(Suite *suite) {
    SRunner *runner = srunner_create(suite);
    srunner_run_all(runner, CK_ENV);
    int num_failed = srunner_ntests_failed(runner);
    srunner_free(runner);
    return num_failed == 0 ? 0 : 1;
}

#endif

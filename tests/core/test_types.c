/* tests/core/test_types.c - dtypes, conversions, statuses and messages, log lines. */
#include "core/log.h"
#include "core/types.h"
#include "tests/test_util.h"

START_TEST(every_dtype_has_a_name_that_reads_back) {
    for (int d = 0; d < RF_DTYPE_COUNT; d++) {
        rf_dtype back = RF_DTYPE_COUNT;
        ck_assert(rf_dtype_from_name(rf_dtype_name((rf_dtype)d), &back));
        ck_assert_int_eq(back, d);
        ck_assert_uint_gt(rf_dtype_bytes((rf_dtype)d), 0);
    }
    rf_dtype any;
    ck_assert(rf_dtype_from_name("BF16", &any) && any == RF_DTYPE_BF16);
    ck_assert(!rf_dtype_from_name("f8", &any));
    ck_assert(!rf_dtype_from_name(NULL, &any));
    ck_assert_uint_eq(rf_dtype_bytes(RF_DTYPE_COUNT), 0);
}
END_TEST

START_TEST(every_half_survives_a_round_trip) {
    for (uint32_t h = 0; h < 65536; h++) {
        float f = rf_f16_to_f32((uint16_t)h), b = rf_bf16_to_f32((uint16_t)h);
        if (isnan(f)) {
            ck_assert(isnan(rf_f16_to_f32(rf_f32_to_f16(f))));
        } else {
            ck_assert_uint_eq(rf_f32_to_f16(f), h);
        }
        if (isnan(b)) {
            ck_assert(isnan(rf_bf16_to_f32(rf_f32_to_bf16(b))));
        } else {
            ck_assert_uint_eq(rf_f32_to_bf16(b), h);
        }
    }
}
END_TEST

/* Between any two neighbouring halves: the midpoint goes to the even one, a hair to either side to the nearer. */
START_TEST(halves_round_to_nearest_even) {
    for (uint32_t h = 0; h < 0x7bff; h++) {
        float low = rf_f16_to_f32((uint16_t)h), high = rf_f16_to_f32((uint16_t)(h + 1));
        float middle = low + (high - low) / 2;
        uint32_t even = h % 2 == 0 ? h : h + 1;
        ck_assert_uint_eq(rf_f32_to_f16(middle), even);
        ck_assert_uint_eq(rf_f32_to_f16(nextafterf(middle, 0)), h);
        ck_assert_uint_eq(rf_f32_to_f16(nextafterf(middle, 1e9f)), h + 1);
        ck_assert_uint_eq(rf_f32_to_f16(-middle), even | 0x8000);
    }
    ck_assert_uint_eq(rf_f32_to_f16(65519.99f), 0x7bff);
    ck_assert_uint_eq(rf_f32_to_f16(65520.0f), 0x7c00);
    ck_assert_uint_eq(rf_f32_to_f16(0x1p-25f), 0);
    ck_assert_uint_eq(rf_f32_to_f16(0x1.000002p-25f), 1);
}
END_TEST

START_TEST(bfloats_round_to_nearest_even) {
    ck_assert_uint_eq(rf_f32_to_bf16(0x1.01p0f), 0x3f80); /* halfway, even below */
    ck_assert_uint_eq(rf_f32_to_bf16(0x1.03p0f), 0x3f82); /* halfway, even above */
    ck_assert_uint_eq(rf_f32_to_bf16(0x1.0102p0f), 0x3f81);
    ck_assert_uint_eq(rf_f32_to_bf16(3.4e38f), 0x7f80);
    ck_assert(isnan(rf_bf16_to_f32(rf_f32_to_bf16(NAN))));
}
END_TEST

START_TEST(convert_handles_every_pair) {
    const rf_dtype kinds[] = {RF_DTYPE_F32, RF_DTYPE_F16, RF_DTYPE_BF16};
    const float values[] = {0, -1.5f, 0.25f, 96, -0.0078125f}; /* exact in all three */
    for (int i = 0; i < 3; i++) {
        for (int j = 0; j < 3; j++) {
            float a[5], b[5], back[5];
            rf_convert(a, kinds[i], values, RF_DTYPE_F32, 5);
            rf_convert(b, kinds[j], a, kinds[i], 5);
            rf_convert(back, RF_DTYPE_F32, b, kinds[j], 5);
            rf_assert_close(back, values, 5, 0, 0);
        }
    }
}
END_TEST

START_TEST(a_scalar_has_one_element) {
    rf_tensor t = {.dtype = RF_DTYPE_I64, .rank = 0};
    ck_assert_int_eq(rf_tensor_num_elems(&t), 1);
    ck_assert_uint_eq(rf_tensor_bytes(&t), 8);
    rf_tensor m = {.dtype = RF_DTYPE_BF16, .rank = 3, .shape = {2, 3, 5}};
    ck_assert_uint_eq(rf_tensor_bytes(&m), 60);
}
END_TEST

START_TEST(a_message_is_one_line_and_is_cut) {
    rf_error err;
    char longer[1000];
    memset(longer, 'x', sizeof longer - 1);
    longer[sizeof longer - 1] = 0;
    ck_assert_int_eq(rf_fail(&err, RF_ERR_IO, "a\nb\x1b[%d", 3), RF_ERR_IO);
    ck_assert_str_eq(err.message, "a?b?[3");
    ck_assert_int_eq(rf_fail(&err, RF_ERR_SHAPE, "%s", longer), RF_ERR_SHAPE);
    ck_assert_uint_eq(strlen(err.message), sizeof err.message - 1);
    ck_assert_int_eq(rf_fail(NULL, RF_ERR_SHAPE, "nobody listens"), RF_ERR_SHAPE);
}
END_TEST

START_TEST(a_prefix_goes_in_front) {
    rf_error err;
    rf_fail(&err, RF_ERR_CONFIG, "inner");
    ck_assert_int_eq(rf_fail_prefix(&err, RF_ERR_CONFIG, "file %d", 7), RF_ERR_CONFIG);
    ck_assert_str_eq(err.message, "file 7: inner");
    for (int i = 0; i < 200; i++) rf_fail_prefix(&err, RF_ERR_CONFIG, "again");
    ck_assert_uint_eq(strlen(err.message), sizeof err.message - 1);
}
END_TEST

START_TEST(statuses_have_different_names) {
    for (int a = 0; a <= RF_ERR_CANCELLED; a++) {
        ck_assert_str_ne(rf_status_name((rf_status)a), "unknown");
        for (int b = 0; b < a; b++) ck_assert_str_ne(rf_status_name((rf_status)a), rf_status_name((rf_status)b));
    }
}
END_TEST

static void keep_line(void *user, rf_log_level level, const char *line) {
    (void)level;
    snprintf(user, 64, "%s", line);
}

START_TEST(log_lines_above_the_level_are_dropped) {
    char last[64] = "";
    rf_log log = {.write = keep_line, .user = last, .level = RF_LOG_WARN};
    rf_log_write(&log, RF_LOG_INFO, "no");
    ck_assert_str_eq(last, "");
    rf_log_write(&log, RF_LOG_WARN, "yes %d", 1);
    ck_assert_str_eq(last, "yes 1");
    rf_log_write(NULL, RF_LOG_ERROR, "nowhere");
}
END_TEST

int main(void) {
    Suite *suite = suite_create("types");
    TCase *tc = tcase_create("all");
    tcase_set_timeout(tc, 60);
    tcase_add_test(tc, every_dtype_has_a_name_that_reads_back);
    tcase_add_test(tc, every_half_survives_a_round_trip);
    tcase_add_test(tc, halves_round_to_nearest_even);
    tcase_add_test(tc, bfloats_round_to_nearest_even);
    tcase_add_test(tc, convert_handles_every_pair);
    tcase_add_test(tc, a_scalar_has_one_element);
    tcase_add_test(tc, a_message_is_one_line_and_is_cut);
    tcase_add_test(tc, a_prefix_goes_in_front);
    tcase_add_test(tc, statuses_have_different_names);
    tcase_add_test(tc, log_lines_above_the_level_are_dropped);
    suite_add_tcase(suite, tc);
    return rf_run_suite(suite);
}

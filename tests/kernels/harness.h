/* tests/kernels/harness.h - one test program, any backend.
 *
 * A test makes its operands with op_* calls (host copy and device copy of the same values), runs an operator of
 * test_ops(), and compares what comes back with plain loops in double over the host copies. Values are rounded to the
 * operand's dtype before the reference sees them, so a bound speaks of the operator alone.
 * RF_TEST_DEVICE=cuda runs everything on the GPU in f32 and bf16; without it the CPU in f32. Where the device is missing,
 * the program says so and returns 77. Tests run in one process (a CUDA context does not survive a fork).
 * Every device buffer is filled with NaN before anything is put into it; buffers are freed after each test. */
#ifndef RF_TESTS_KERNELS_HARNESS_H
#define RF_TESTS_KERNELS_HARNESS_H

#include <check.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/memory.h"
#include "core/rng.h"
#include "kernels/ops.h"

typedef struct {
    rf_dtype dtype;
    size_t num;
    float *host; /* what the device holds, as floats */
    void *dev;
} operand;

const rf_ops *test_ops(void);
rf_backend *test_backend(void);
rf_stream *test_stream(void);
bool test_is_cuda(void);
/* The dtypes that the backend computes in: index 0.. of looped tests. */
int test_num_dtypes(void);
rf_dtype test_dtype(int index);

/* NaN everywhere, on both sides. */
operand op_poison(rf_dtype dtype, size_t num);
/* mean + std * normal draws, different for every call in a test, the same in every run. */
operand op_normal(rf_dtype dtype, size_t num, double mean, double std);
/* The given values. */
operand op_values(rf_dtype dtype, size_t num, const double *values);
const int32_t *dev_i32(const int32_t *values, size_t num);
const uint8_t *dev_u8(const uint8_t *values, size_t num);
void *dev_bytes(size_t bytes); /* scratch, NaN; NULL for 0 */
/* Copies host to device, or device to host. */
void op_upload(const operand *o);
void op_download(operand *o);
/* Same values and device copy of its own. */
operand op_clone(const operand *o);
double *host_doubles(size_t num); /* zeros; freed with the test */

/* 0..n-1 in an order drawn from key. */
void random_permutation(int32_t *out, int n, uint64_t key);
double uniform(void); /* [0, 1), the next draw of this test */

/* 2e-6 for f32: rounding of sums of up to a few thousand terms, no lower-precision product (TF32 would be 1e-4).
 * 4e-3 for bf16: one rounding of the result is 1.1e-3 relative L2, and probabilities or activations rounded on the way
 * add as much again. */
double dtype_bound(rf_dtype dtype);

/* Downloads got and compares: relative L2 <= bound, every element finite where want is; NaN in want says that the element
 * must still be the poison. shape (printf style) goes into the message. */
void expect_close(operand *got, const double *want, double rel_l2_bound, const char *op, const char *shape, ...)
    __attribute__((format(printf, 5, 6)));
/* The same for one f32 buffer with an absolute bound; infinities must match. */
void expect_abs(operand *got, const double *want, double abs_bound, const char *op, const char *shape, ...)
    __attribute__((format(printf, 5, 6)));
/* Bit for bit. Both are downloaded. */
void expect_same_bits(operand *a, operand *b, const char *op, const char *shape, ...)
    __attribute__((format(printf, 4, 5)));

#define expect_ok(call)                                                                                                \
    do {                                                                                                               \
        rf_error err = {0};                                                                                            \
        rf_status st_ = (call);                                                                                        \
        ck_assert_msg(st_ == RF_OK, "%s: %s", rf_status_name(st_), err.message);                                       \
        rf_error sync_ = {0};                                                                                          \
        st_ = rf_stream_synchronize(test_stream(), &sync_);                                                            \
        ck_assert_msg(st_ == RF_OK, "synchronize: %s: %s", rf_status_name(st_), sync_.message);                        \
    } while (0)

/* The call fails with this status and says something. */
#define expect_status(call, status_wanted)                                                                             \
    do {                                                                                                               \
        rf_error err = {0};                                                                                            \
        rf_status st_ = (call);                                                                                        \
        ck_assert_msg(st_ == (status_wanted), "wanted %s, got %s: %s", rf_status_name(status_wanted),                  \
                      rf_status_name(st_), err.message);                                                               \
        ck_assert_msg(err.message[0] != 0, "%s without a message", rf_status_name(st_));                               \
    } while (0)

double ref_act(double u, rf_act act);

/* Opens the device, runs the suite, prints the skip line; the value is main's. */
int run_kernel_suite(Suite *suite);
/* Adds the fixture that frees buffers, and a test for each dtype (index in _i). */
TCase *kernel_tcase(Suite *suite, const char *name);
#define add_for_dtypes(tcase, test) tcase_add_loop_test(tcase, test, 0, test_num_dtypes())

/* Reads RF_TEST_DEVICE; before the suite is built. 0, or 77 if the device is not there, or 1. */
int open_test_device(void);

#endif

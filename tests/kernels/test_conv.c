/* tests/kernels/test_conv.c - 2-D convolution and nearest upsampling against loops in double. */
#include "harness.h"

typedef struct {
    int batch, height, width, in, out, kernel, stride, pad_before, pad_after;
    bool upsample, bias;
    int addend; /* 0 none, 1 another buffer, 2 y itself */
} conv_case;

static const conv_case cases[] = {
    {1, 8, 8, 64, 64, 3, 1, 1, 1, false, true, 0},    {2, 7, 9, 64, 32, 3, 1, 1, 1, false, true, 1},
    {1, 33, 17, 4, 64, 3, 1, 1, 1, false, true, 0},   {1, 16, 16, 3, 128, 3, 1, 1, 1, false, true, 0},
    {1, 15, 13, 5, 7, 3, 1, 1, 1, false, true, 2},    {1, 20, 20, 128, 3, 3, 1, 1, 1, false, true, 0},
    {2, 16, 16, 32, 32, 3, 2, 0, 1, false, true, 0},  {1, 15, 17, 8, 16, 3, 2, 0, 1, false, false, 0},
    {1, 9, 9, 16, 8, 3, 2, 1, 1, false, true, 1},     {1, 8, 8, 64, 64, 3, 1, 1, 1, true, true, 0},
    {2, 5, 7, 16, 24, 3, 1, 1, 1, true, false, 1},    {1, 6, 6, 8, 8, 3, 2, 1, 1, true, true, 0},
    {3, 11, 5, 64, 96, 1, 1, 0, 0, false, true, 0},   {1, 40, 40, 4, 8, 1, 1, 0, 0, false, true, 2},
    {1, 12, 12, 24, 16, 1, 2, 0, 0, false, true, 0},  {1, 6, 5, 16, 16, 1, 1, 0, 0, true, true, 0},
    {1, 1, 1, 8, 8, 3, 1, 1, 1, false, true, 0},      {1, 3, 3, 8, 8, 3, 1, 0, 0, false, true, 0},
    {1, 16, 16, 512, 64, 3, 1, 1, 1, false, true, 1}, {1, 64, 64, 16, 16, 3, 1, 1, 1, false, true, 2},
};
#define NUM_CASES ((int)(sizeof cases / sizeof cases[0]))

static rf_conv2d_args args_of(const conv_case *c, rf_dtype dtype) {
    return (rf_conv2d_args){.dtype = dtype,
                            .batch = c->batch,
                            .height = c->height,
                            .width = c->width,
                            .in_channels = c->in,
                            .out_channels = c->out,
                            .kernel = c->kernel,
                            .stride = c->stride,
                            .pad_before = c->pad_before,
                            .pad_after = c->pad_after,
                            .upsample = c->upsample};
}

START_TEST(conv_matches_double) {
    for (int t = 0; t < test_num_dtypes(); t++) {
        const conv_case *c = &cases[_i];
        rf_dtype dtype = test_dtype(t);
        rf_conv2d_args a = args_of(c, dtype);
        int up = c->upsample ? 2 : 1;
        int out_h = (c->height * up + c->pad_before + c->pad_after - c->kernel) / c->stride + 1;
        int out_w = (c->width * up + c->pad_before + c->pad_after - c->kernel) / c->stride + 1;
        ck_assert_int_eq(rf_conv2d_out_size(&a, c->height), out_h);
        ck_assert_int_eq(rf_conv2d_out_size(&a, c->width), out_w);
        int patch = c->kernel * c->kernel * c->in;
        size_t num_y = (size_t)(c->batch * out_h * out_w * c->out);
        operand x = op_normal(dtype, (size_t)(c->batch * c->height * c->width * c->in), 0, 1);
        operand w = op_normal(dtype, (size_t)(c->out * patch), 0, 1 / sqrt(patch));
        operand bias = op_normal(RF_DTYPE_F32, (size_t)c->out, 0, 1), addend = op_normal(dtype, num_y, 0, 1);
        operand y = c->addend == 2 ? op_clone(&addend) : op_poison(dtype, num_y);
        a.x = x.dev;
        a.w = w.dev;
        a.bias = c->bias ? bias.dev : NULL;
        a.y = y.dev;
        a.addend = c->addend == 0 ? NULL : c->addend == 1 ? addend.dev : y.dev;
        expect_ok(test_ops()->conv2d(NULL, &a, &err));
        a.workspace_bytes = test_ops()->conv2d_workspace(test_backend(), &a);
        a.workspace = dev_bytes(a.workspace_bytes);
        expect_ok(test_ops()->conv2d(test_stream(), &a, &err));
        double *want = host_doubles(num_y);
        size_t at = 0;
        for (int b = 0; b < c->batch; b++) {
            for (int oy = 0; oy < out_h; oy++) {
                for (int ox = 0; ox < out_w; ox++) {
                    for (int o = 0; o < c->out; o++, at++) {
                        double sum = c->bias ? (double)bias.host[o] : 0;
                        for (int ky = 0; ky < c->kernel; ky++) {
                            for (int kx = 0; kx < c->kernel; kx++) {
                                int iy = oy * c->stride + ky - c->pad_before, ix = ox * c->stride + kx - c->pad_before;
                                if (iy < 0 || iy >= c->height * up || ix < 0 || ix >= c->width * up) continue;
                                const float *px = x.host + ((b * c->height + iy / up) * c->width + ix / up) * c->in;
                                const float *pw = w.host + ((o * c->kernel + ky) * c->kernel + kx) * c->in;
                                for (int e = 0; e < c->in; e++) sum += (double)px[e] * (double)pw[e];
                            }
                        }
                        want[at] = sum + (c->addend ? (double)addend.host[at] : 0);
                    }
                }
            }
        }
        expect_close(&y, want, dtype_bound(dtype), "conv2d", "b%d %dx%d in %d out %d k%d s%d pad %d+%d%s%s addend %d",
                     c->batch, c->height, c->width, c->in, c->out, c->kernel, c->stride, c->pad_before, c->pad_after,
                     c->upsample ? " upsample" : "", c->bias ? " bias" : "", c->addend);
    }
}
END_TEST

START_TEST(upsample_repeats_pixels) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][4] = {{1, 4, 4, 8}, {2, 3, 5, 64}, {1, 7, 1, 3}, {1, 16, 16, 5}, {3, 1, 1, 1}};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        int b = shapes[i][0], h = shapes[i][1], w = shapes[i][2], c = shapes[i][3];
        operand x = op_normal(dtype, (size_t)(b * h * w * c), 0, 1), y = op_poison(dtype, (size_t)(4 * b * h * w * c));
        rf_upsample2x_args a = {
            .x = x.dev, .y = y.dev, .dtype = dtype, .batch = b, .height = h, .width = w, .channels = c};
        expect_ok(test_ops()->upsample2x(NULL, &a, &err));
        expect_ok(test_ops()->upsample2x(test_stream(), &a, &err));
        double *want = host_doubles(y.num);
        for (int n = 0; n < b; n++)
            for (int oy = 0; oy < 2 * h; oy++)
                for (int ox = 0; ox < 2 * w; ox++)
                    for (int e = 0; e < c; e++)
                        want[((n * 2 * h + oy) * 2 * w + ox) * c + e] = x.host[((n * h + oy / 2) * w + ox / 2) * c + e];
        expect_close(&y, want, 0, "upsample2x", "b%d %dx%dx%d", b, h, w, c);
    }
}
END_TEST

START_TEST(bad_arguments_are_refused_at_plan_time) {
    rf_dtype dtype = test_dtype(_i);
    rf_conv2d_args good = args_of(&cases[0], dtype);
    expect_ok(test_ops()->conv2d(NULL, &good, &err));
#define REFUSED(change, status)                                                                                        \
    do {                                                                                                               \
        rf_conv2d_args a = good;                                                                                       \
        change;                                                                                                        \
        expect_status(test_ops()->conv2d(NULL, &a, &err), status);                                                     \
    } while (0)
    REFUSED(a.kernel = 5, RF_ERR_SHAPE);
    REFUSED(a.kernel = 0, RF_ERR_SHAPE);
    REFUSED(a.stride = 3, RF_ERR_SHAPE);
    REFUSED(a.stride = 0, RF_ERR_SHAPE);
    REFUSED(a.pad_before = -1, RF_ERR_SHAPE);
    REFUSED(a.pad_after = 3, RF_ERR_SHAPE);
    REFUSED(a.in_channels = 0, RF_ERR_SHAPE);
    REFUSED(a.out_channels = 0, RF_ERR_SHAPE);
    REFUSED(a.height = 0, RF_ERR_SHAPE);
    REFUSED(a.width = (int64_t)1 << 40, RF_ERR_SHAPE);
    REFUSED(a.batch = -1, RF_ERR_SHAPE);
    REFUSED((a.height = 1, a.pad_before = 0), RF_ERR_SHAPE);
    REFUSED((a.batch = INT32_MAX, a.height = 1 << 24, a.width = 1 << 24), RF_ERR_SHAPE);
    REFUSED(a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    if (!test_is_cuda()) REFUSED(a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
#undef REFUSED
    expect_status(test_ops()->conv2d(test_stream(), &good, &err), RF_ERR_ARGUMENT); /* no pointers */
    good.batch = 0;
    expect_ok(test_ops()->conv2d(test_stream(), &good, &err));

    rf_upsample2x_args u = {.dtype = dtype, .batch = 1, .height = 4, .width = 4, .channels = 8};
    expect_ok(test_ops()->upsample2x(NULL, &u, &err));
    u.channels = 0;
    expect_status(test_ops()->upsample2x(NULL, &u, &err), RF_ERR_SHAPE);
    u.channels = 8;
    u.height = 0;
    expect_status(test_ops()->upsample2x(NULL, &u, &err), RF_ERR_SHAPE);
    u.height = 4;
    u.dtype = RF_DTYPE_I32;
    expect_status(test_ops()->upsample2x(NULL, &u, &err), RF_ERR_DTYPE);
    u.dtype = dtype;
    expect_status(test_ops()->upsample2x(test_stream(), &u, &err), RF_ERR_ARGUMENT);
}
END_TEST

START_TEST(a_small_workspace_is_refused) {
    rf_dtype dtype = test_dtype(_i);
    operand x = op_normal(dtype, 9 * 9 * 16, 0, 1), w = op_normal(dtype, 8 * 9 * 16, 0, 1);
    operand y = op_poison(dtype, 9 * 9 * 8);
    rf_conv2d_args a = {.x = x.dev,
                        .w = w.dev,
                        .y = y.dev,
                        .dtype = dtype,
                        .batch = 1,
                        .height = 9,
                        .width = 9,
                        .in_channels = 16,
                        .out_channels = 8,
                        .kernel = 3,
                        .stride = 1,
                        .pad_before = 1,
                        .pad_after = 1};
    size_t need = test_ops()->conv2d_workspace(test_backend(), &a);
    if (need == 0) return; /* this backend does without */
    a.workspace = dev_bytes(need);
    a.workspace_bytes = need - 1;
    expect_status(test_ops()->conv2d(test_stream(), &a, &err), RF_ERR_WORKSPACE);
    a.workspace_bytes = need;
    expect_ok(test_ops()->conv2d(test_stream(), &a, &err));
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("conv");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, conv_matches_double, 0, NUM_CASES);
    add_for_dtypes(tc, upsample_repeats_pixels);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_arguments_are_refused_at_plan_time);
    add_for_dtypes(tc, a_small_workspace_is_refused);
    return run_kernel_suite(suite);
}

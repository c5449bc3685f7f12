/* tests/kernels/test_cache_ops.c - groups in and out of rings, weighted sums of snapshots, computed rows among remembered
 * ones, and what caching asks of residual, reduce_pair, the row copies and patchify, against plain loops. What must not be
 * read is NaN. */
#include "core/types.h"
#include "harness.h"

#define ALL    5 /* groups that state holds */
#define PACKED 3 /* groups of a call */
#define SLOTS  3

static const int32_t list_1[PACKED] = {4, 0, 2}, list_2[PACKED] = {1, 3, 0}, list_3[PACKED] = {2, 4, 1};

static int at_list(const int32_t *list, int g) {
    return list ? list[g] : g;
}

/* Three operands' dtypes out of three bits; the CPU has one combination. */
#define NUM_DTYPE_TRIPLES 8
static rf_dtype triple(int index, int operand_index) {
    return index >> operand_index & 1 ? RF_DTYPE_BF16 : RF_DTYPE_F32;
}
static int num_triples(void) {
    return test_is_cuda() ? NUM_DTYPE_TRIPLES : 1;
}

static double rounded_to(rf_dtype dtype, float v) {
    return dtype == RF_DTYPE_BF16 ? (double)rf_bf16_to_f32(rf_f32_to_bf16(v)) : (double)v;
}

static void poison(operand *o) {
    for (size_t i = 0; i < o->num; i++) o->host[i] = NAN;
    op_upload(o);
}

/* An assertion that holds costs a write to a file, one that the harness makes of every element; so many elements are compared
 * here, with the rules of expect_close, and go to the harness only to fail there. */
static bool is_close(operand *got, const double *want, double bound) {
    op_download(got);
    double sum_diff = 0, sum_want = 0, worst = 0;
    for (size_t i = 0; i < got->num; i++) {
        double g = got->host[i], diff = fabs(g - want[i]);
        if (isnan(want[i]) && isnan(g)) continue;
        if (!isfinite(diff)) return false;
        worst = fmax(worst, diff);
        sum_diff += diff * diff;
        sum_want += want[i] * want[i];
    }
    return sqrt(sum_diff) <= bound * (sum_want > 0 ? sqrt(sum_want) : 1) &&
           worst <= 64 * bound * sqrt(sum_want / (double)(got->num ? got->num : 1)) + 1e-30;
}
static bool is_same(operand *a, operand *b) {
    op_download(a);
    op_download(b);
    return a->num == b->num && memcmp(a->host, b->host, a->num * sizeof(float)) == 0;
}
#define must_be_close(got, want, bound, ...)                                                                           \
    do {                                                                                                               \
        if (!is_close(got, want, bound)) expect_close(got, want, bound, __VA_ARGS__);                                  \
    } while (0)
#define must_be_same(a, b, ...)                                                                                        \
    do {                                                                                                               \
        if (!is_same(a, b)) expect_same_bits(a, b, __VA_ARGS__);                                                       \
    } while (0)

/* [rows, cols] with odd and even widths; rows for vectors of 8, of 4 and of 1 element. */
static const int shapes[][2] = {{1, 3},   {1, 8},    {1, 1152}, {7, 3},   {7, 4},   {7, 8},    {7, 16},
                                {7, 33},  {7, 216},  {7, 1152}, {256, 3}, {256, 8}, {256, 33}, {256, 216},
                                {64, 36}, {3, 2000}, {5, 513},  {2, 516}, {3, 520}};
#define NUM_SHAPES ((int)(sizeof shapes / sizeof shapes[0]))

/* Elements between rows beyond the columns: dense, room that keeps vectors, room that does not. */
static const int pads[] = {0, 8, 3};

/* Small shapes of several rows, among them vectors of 8, of 4 and of 1, take all 144 forms of a call, the others a few: every
 * step-th, from another one at each shape and dtype, the step without a common factor with their number. */
static int case_step(int num, int t) {
    if (num > 8 && num < 60 && (t == 0 || t == NUM_DTYPE_TRIPLES - 1)) return 1; /* all f32, all bf16 */
    return num < 600 ? 13 : num < 3000 ? 29 : 53;
}

/* ---- group_copy ---- */

typedef struct {
    int pad, b_form; /* b: 0 none, 1 all columns, 2 some */
    bool a_list, b_list, dst_list, slots;
} copy_case;

static copy_case copy_case_of(int number) {
    copy_case c = {.pad = pads[number % 3], .b_form = number / 3 % 3};
    int bits = number / 9;
    c.a_list = bits & 1, c.b_list = bits & 2, c.dst_list = bits & 4, c.slots = bits & 8;
    return c;
}
#define NUM_COPY_CASES (9 * 16)

START_TEST(group_copy_moves_groups_and_subtracts) {
    const int32_t slot_of[ALL] = {1, 0, 2, 1, 0};
    int rows = shapes[_i / num_triples()][0], cols = shapes[_i / num_triples()][1], t = _i % num_triples();
    rf_dtype a_dtype = triple(t, 0), b_dtype = triple(t, 1), dst_dtype = triple(t, 2);
    size_t most = (size_t)(ALL * rows * (cols + 8));
    operand a = op_normal(a_dtype, most, 0, 1), b = op_normal(b_dtype, most, 0, 1);
    operand dst = op_poison(dst_dtype, SLOTS * (most + 8));
    double *want = host_doubles(dst.num);
    const int32_t *dev_1 = dev_i32(list_1, PACKED), *dev_2 = dev_i32(list_2, PACKED), *dev_3 = dev_i32(list_3, PACKED);
    const int32_t *dev_slots = dev_i32(slot_of, ALL);
    int step = case_step(rows * cols, t);
    for (int n = (rows + cols + t) % step; n < NUM_COPY_CASES; n += step) {
        copy_case c = copy_case_of(n);
        int64_t ld = cols + c.pad,
                b_cols = c.b_form == 2 ? (cols > 8 ? cols - cols % 8 - 8 + (c.pad == 3) : cols) : cols;
        if (b_cols < 1) b_cols = 1;
        rf_group_copy_args args = {.a = a.dev,
                                   .b = c.b_form ? b.dev : NULL,
                                   .dst = dst.dev,
                                   .a_dtype = a_dtype,
                                   .b_dtype = b_dtype,
                                   .dst_dtype = dst_dtype,
                                   .groups = PACKED,
                                   .rows = rows,
                                   .cols = cols,
                                   .b_cols = b_cols,
                                   .a_ld = ld,
                                   .b_ld = b_cols + c.pad,
                                   .dst_ld = ld,
                                   .a_index = c.a_list ? dev_1 : NULL,
                                   .b_index = c.b_list ? dev_2 : NULL,
                                   .dst_index = c.dst_list ? dev_3 : NULL,
                                   .dst_slot = c.slots ? dev_slots : NULL,
                                   .dst_slot_stride = ALL * rows * ld + c.pad};
        poison(&dst);
        expect_ok(test_ops()->group_copy(NULL, &args, &err));
        expect_ok(test_ops()->group_copy(test_stream(), &args, &err));
        for (size_t i = 0; i < dst.num; i++) want[i] = NAN;
        for (int g = 0; g < PACKED; g++) {
            int64_t ga = at_list(c.a_list ? list_1 : NULL, g), gb = at_list(c.b_list ? list_2 : NULL, g);
            int64_t gd = at_list(c.dst_list ? list_3 : NULL, g);
            double *to = want + (c.slots ? slot_of[gd] * args.dst_slot_stride : 0) + gd * rows * ld;
            for (int64_t r = 0; r < rows; r++) {
                for (int64_t e = 0; e < cols; e++) {
                    float v = a.host[(ga * rows + r) * ld + e];
                    if (c.b_form && e < b_cols) v -= b.host[(gb * rows + r) * args.b_ld + e];
                    to[r * ld + e] = rounded_to(dst_dtype, v);
                }
            }
        }
        must_be_close(&dst, want, 0, "group_copy", "%d x %d case %d: pad %d b %d (%s, %s)", rows, cols, n, c.pad,
                      c.b_form, rf_dtype_name(a_dtype), rf_dtype_name(b_dtype));
    }
}
END_TEST

START_TEST(group_copy_works_in_place) {
    rf_dtype dtype = test_dtype(_i);
    for (int i = 0; i < NUM_SHAPES; i++) {
        int rows = shapes[i][0], cols = shapes[i][1], ld = cols + pads[i % 3];
        for (int form = 0; form < 2; form++) { /* the second: some columns, of listed groups */
            operand a = op_normal(dtype, (size_t)(ALL * rows * ld), 0, 1);
            operand b = op_normal(dtype, a.num, 0, 1);
            int b_cols = form ? (cols + 1) / 2 : cols;
            const int32_t *list = form ? dev_i32(list_3, PACKED) : NULL;
            double *want = host_doubles(a.num);
            for (size_t k = 0; k < a.num; k++) want[k] = a.host[k];
            for (int g = 0; g < PACKED; g++) {
                for (int r = 0; r < rows; r++) {
                    for (int e = 0; e < b_cols; e++) {
                        size_t at = (size_t)((at_list(form ? list_3 : NULL, g) * rows + r) * ld + e);
                        want[at] = rounded_to(dtype, a.host[at] - b.host[(g * rows + r) * ld + e]);
                    }
                }
            }
            rf_group_copy_args args = {.a = a.dev,
                                       .b = b.dev,
                                       .dst = a.dev,
                                       .a_dtype = dtype,
                                       .b_dtype = dtype,
                                       .dst_dtype = dtype,
                                       .groups = PACKED,
                                       .rows = rows,
                                       .cols = cols,
                                       .b_cols = b_cols,
                                       .a_ld = ld,
                                       .b_ld = ld,
                                       .dst_ld = ld,
                                       .a_index = list,
                                       .dst_index = list};
            expect_ok(test_ops()->group_copy(test_stream(), &args, &err));
            must_be_close(&a, want, 0, "group_copy", "%d x %d in place, form %d", rows, cols, form);
        }
    }
}
END_TEST

/* ---- combine ---- */

typedef struct {
    int pad, base_form; /* base: 0 none, 1 all columns, 2 some */
    bool src_list, base_list, dst_list, classes, zero;
} sum_case;
#define NUM_SUM_CASES (9 * 16)
#define NUM_CLASSES   3

static sum_case sum_case_of(int number) {
    sum_case c = {.pad = pads[number % 3], .base_form = number / 3 % 3, .zero = number % 5 == 4};
    int bits = number / 9;
    c.src_list = bits & 1, c.base_list = bits & 2, c.dst_list = bits & 4, c.classes = bits & 8;
    return c;
}

static void run_combine(int rows, int cols, int num_slots, int t) {
    rf_dtype ring_dtype = triple(t, 0), base_dtype = triple(t, 1), dst_dtype = triple(t, 2);
    int64_t group = (int64_t)rows * cols, slot_stride = ALL * group + 8;
    size_t most = (size_t)(ALL * rows * (cols + 8)), num_weights = (size_t)(ALL * NUM_CLASSES * num_slots);
    operand full = op_normal(ring_dtype, (size_t)(num_slots * slot_stride), 0, 1), ring = op_clone(&full);
    operand base = op_normal(base_dtype, most, 0, 1), dst = op_poison(dst_dtype, most);
    operand weights = op_poison(RF_DTYPE_F32, num_weights), in_place = op_poison(dst_dtype, most);
    uint8_t *row_class = (uint8_t *)host_doubles((size_t)(ALL * rows));
    for (int i = 0; i < ALL * rows; i++) row_class[i] = (uint8_t)((i * 7 + i / 5) % 5); /* 3 and 4 count as 2 */
    row_class[0] = 255;
    const uint8_t *dev_class = dev_u8(row_class, (size_t)(ALL * rows));
    const int32_t *dev_1 = dev_i32(list_1, PACKED), *dev_2 = dev_i32(list_2, PACKED), *dev_3 = dev_i32(list_3, PACKED);
    double *want = host_doubles(dst.num);
    int step = case_step((int)group * num_slots / 4, t);
    for (int n = (rows + cols + t) % step; n < NUM_SUM_CASES; n += step) {
        sum_case c = sum_case_of(n);
        int num_classes = c.classes ? NUM_CLASSES : 1;
        int64_t ld = cols + c.pad, base_cols = c.base_form == 2 && cols > 8 ? cols - cols % 8 - 8 + (c.pad == 3) : cols;
        if (base_cols < 1) base_cols = 1;
        for (size_t i = 0; i < num_weights; i++) {
            float w = (float)(2 * uniform() - 1);
            weights.host[i] = c.zero || uniform() < 0.5 ? (i % 2 ? -0.0f : 0.0f) : w;
        }
        op_upload(&weights);
        for (int j = 0; j < num_slots; j++) { /* NaN wherever the weight is 0 */
            for (int r = 0; r < ALL * rows; r++) {
                int k = c.classes ? (row_class[r] < NUM_CLASSES ? row_class[r] : NUM_CLASSES - 1) : 0;
                bool used = weights.host[(r / rows * num_classes + k) * num_slots + j] != 0;
                for (int e = 0; e < cols; e++) {
                    int64_t at = j * slot_stride + (int64_t)r * cols + e;
                    ring.host[at] = used ? full.host[at] : NAN;
                }
            }
        }
        op_upload(&ring);
        rf_combine_args args = {.ring = ring.dev,
                                .ring_dtype = ring_dtype,
                                .num_slots = num_slots,
                                .num_classes = num_classes,
                                .slot_stride = slot_stride,
                                .weights = weights.dev,
                                .row_class = c.classes ? dev_class : NULL,
                                .base = c.base_form ? base.dev : NULL,
                                .base_dtype = base_dtype,
                                .base_cols = base_cols,
                                .base_ld = ld,
                                .dst = dst.dev,
                                .dst_dtype = dst_dtype,
                                .dst_ld = ld,
                                .groups = PACKED,
                                .rows = rows,
                                .cols = cols,
                                .src_index = c.src_list ? dev_1 : NULL,
                                .base_index = c.base_list ? dev_2 : NULL,
                                .dst_index = c.dst_list ? dev_3 : NULL};
        poison(&dst);
        expect_ok(test_ops()->combine(NULL, &args, &err));
        expect_ok(test_ops()->combine(test_stream(), &args, &err));
        for (size_t i = 0; i < dst.num; i++) want[i] = NAN;
        for (int g = 0; g < PACKED; g++) {
            int64_t gs = at_list(c.src_list ? list_1 : NULL, g), gb = at_list(c.base_list ? list_2 : NULL, g);
            int64_t gd = at_list(c.dst_list ? list_3 : NULL, g);
            for (int64_t r = 0; r < rows; r++) {
                int k = c.classes ? row_class[gs * rows + r] : 0;
                if (k >= num_classes) k = num_classes - 1;
                const float *w = weights.host + (gs * num_classes + k) * num_slots;
                for (int64_t e = 0; e < cols; e++) {
                    double sum = c.base_form && e < base_cols ? (double)base.host[(gb * rows + r) * ld + e] : 0;
                    for (int j = 0; j < num_slots; j++)
                        if (w[j] != 0)
                            sum += (double)w[j] * (double)ring.host[j * slot_stride + gs * group + r * cols + e];
                    want[(gd * rows + r) * ld + e] = sum;
                }
            }
        }
        must_be_close(&dst, want, dtype_bound(dst_dtype), "combine",
                      "%d x %d slots %d case %d: pad %d base %d classes %d (%s, %s)", rows, cols, num_slots, n, c.pad,
                      c.base_form, c.classes, rf_dtype_name(ring_dtype), rf_dtype_name(base_dtype));
        if (!c.base_form || base_dtype != dst_dtype || c.base_list != c.dst_list) continue;
        memcpy(in_place.host, base.host, base.num * sizeof(float));
        op_upload(&in_place);
        args.base_index = args.dst_index = c.base_list ? dev_2 : NULL; /* the base's groups */
        args.base = args.dst = in_place.dev;
        expect_ok(test_ops()->combine(test_stream(), &args, &err));
        op_download(&in_place);
        for (int g = 0; g < PACKED; g++) {
            int64_t gb = at_list(c.base_list ? list_2 : NULL, g), gd = at_list(c.dst_list ? list_3 : NULL, g);
            for (int64_t r = 0; r < rows; r++)
                if (memcmp(in_place.host + (gb * rows + r) * ld, dst.host + (gd * rows + r) * ld,
                           (size_t)cols * sizeof(float)) != 0)
                    ck_abort_msg("combine: %d x %d case %d: other values in place", rows, cols, n);
        }
    }
}

START_TEST(combine_matches_double_and_reads_no_slot_of_weight_zero) {
    const int *shape = shapes[_i / num_triples()];
    run_combine(shape[0], shape[1], 4, _i % num_triples());
}
END_TEST

START_TEST(combine_takes_any_number_of_slots) {
    const int slots[] = {1, 2, 31, 32, 33, 40, 64};
    run_combine(7, 24, slots[_i / num_triples()], _i % num_triples());
}
END_TEST

/* ---- residual ---- */

typedef struct {
    int cols, num_terms;
    bool groups, base, gate;
    int extra; /* 0 none, 1 without gate, 2 gated */
    bool norm;
} state_case;

static const state_case state_cases[] = {
    {8, 3, true, false, true, 0, true},     {100, 3, true, false, true, 1, true},
    {216, 1, true, true, false, 2, true},   {216, 3, true, false, true, 2, false},
    {1152, 4, true, false, true, 2, true},  {1152, 8, true, false, true, 0, true},
    {1152, 0, true, false, true, 2, true},  {1300, 3, true, false, true, 2, true},
    {2100, 3, true, true, true, 1, true},   {4100, 5, true, false, true, 2, true},
    {16384, 2, true, false, true, 2, true}, {216, 1, false, false, true, 2, true},
    {100, 3, false, true, true, 1, true},   {1152, 1, false, false, true, 2, false},
    {64, 0, false, false, false, 2, true},  {64, 0, false, false, false, 1, false},
    {64, 3, true, false, false, 0, false},  {1300, 0, false, true, false, 2, true},
};
#define NUM_STATE_CASES ((int)(sizeof state_cases / sizeof state_cases[0]))
#define GROUP_ROWS      7
#define STATE_ROWS      (PACKED * GROUP_ROWS)

static void run_state_residual(const state_case *c, rf_dtype x_dtype, rf_dtype dtype, rf_dtype table_dtype) {
    int64_t cols = c->cols, gate = cols, extra_gate = 2 * cols, shift = 0, scale = 3 * cols;
    int term_rows = c->groups ? ALL * GROUP_ROWS : STATE_ROWS;
    operand x = op_normal(x_dtype, (size_t)(STATE_ROWS * cols), 0, 1), before = op_clone(&x);
    operand base = op_normal(dtype, (size_t)(4 * cols), 0, 1),
            table = op_normal(table_dtype, (size_t)(4 * 4 * cols), 0, 0.5);
    const int32_t index[PACKED] = {2, 0, 3};
    rf_modulation mod = {.table = table.dev,
                         .dtype = table_dtype,
                         .stride = 4 * cols,
                         .index = dev_i32(index, PACKED),
                         .rows_per_group = GROUP_ROWS};
    operand extra = op_normal(dtype, (size_t)(term_rows * cols), 0, 1);
    operand norm_y = op_poison(dtype, (size_t)(STATE_ROWS * cols)), terms[RF_MAX_TERMS];
    operand weights = op_poison(RF_DTYPE_F32, (size_t)(ALL * (c->num_terms ? c->num_terms : 1)));
    for (size_t i = 0; i < weights.num; i++) {
        weights.host[i] = (float)(2 * uniform() - 1);
        if (c->groups && i % 3 == 1) weights.host[i] = 0;
    }
    op_upload(&weights);
    rf_residual_args a = {.x = x.dev,
                          .base = c->base ? base.dev : NULL,
                          .base_period = 4,
                          .num_terms = c->num_terms,
                          .weights = weights.dev,
                          .term_group = c->groups ? dev_i32(list_1, PACKED) : NULL,
                          .rows_per_term_group = GROUP_ROWS,
                          .extra = c->extra ? extra.dev : NULL,
                          .extra_gate = c->extra == 2 ? extra_gate : -1,
                          .x_dtype = x_dtype,
                          .base_dtype = dtype,
                          .y_dtype = dtype,
                          .num_rows = STATE_ROWS,
                          .cols = cols,
                          .gate_mod = mod,
                          .gate = c->gate ? gate : -1,
                          .norm_y = c->norm ? norm_y.dev : NULL,
                          .norm_y_dtype = dtype,
                          .norm_eps = 1e-6f,
                          .norm_mod = mod,
                          .norm_shift = shift,
                          .norm_scale = scale};
    for (int t = 0; t < c->num_terms; t++) {
        terms[t] = op_normal(dtype, (size_t)(term_rows * cols), 0, 1);
        a.terms[t] = terms[t].dev;
        for (int g = 0; c->groups && g < ALL; g++)
            for (int64_t i = 0; weights.host[g * c->num_terms + t] == 0 && i < GROUP_ROWS * cols; i++)
                terms[t].host[g * GROUP_ROWS * cols + i] = NAN;
        op_upload(&terms[t]);
    }
    expect_ok(test_ops()->residual(NULL, &a, &err));
    expect_ok(test_ops()->residual(test_stream(), &a, &err));

    double *want = host_doubles(x.num), *want_y = host_doubles(x.num);
    for (int64_t r = 0; r < STATE_ROWS; r++) {
        int64_t g = r / GROUP_ROWS, state = c->groups ? list_1[g] : g, term_row = state * GROUP_ROWS + r % GROUP_ROWS;
        const float *mod_row = table.host + index[g] * 4 * cols,
                    *w = weights.host + (c->groups ? state * c->num_terms : 0);
        double *row = want + r * cols, mean = 0, var = 0;
        for (int64_t e = 0; e < cols; e++) {
            double sum = 0;
            for (int t = 0; t < c->num_terms; t++)
                if (w[t] != 0) sum += (double)w[t] * (double)terms[t].host[term_row * cols + e];
            if (c->gate) sum *= (double)mod_row[gate + e];
            row[e] = sum + (double)(c->base ? base.host[r % 4 * cols + e] : before.host[r * cols + e]);
            if (c->extra)
                row[e] +=
                    (c->extra == 2 ? (double)mod_row[extra_gate + e] : 1) * (double)extra.host[term_row * cols + e];
            mean += row[e] / (double)cols;
        }
        for (int64_t e = 0; e < cols; e++) var += (row[e] - mean) * (row[e] - mean) / (double)cols;
        for (int64_t e = 0; e < cols; e++)
            want_y[r * cols + e] =
                (row[e] - mean) / sqrt(var + 1e-6) * (1 + (double)mod_row[scale + e]) + (double)mod_row[shift + e];
    }
    char text[120];
    snprintf(text, sizeof text, "%d columns terms %d%s%s%s extra %d x %s", c->cols, c->num_terms,
             c->groups ? " by group" : "", c->base ? " base" : "", c->gate ? " gate" : "", c->extra,
             rf_dtype_name(x_dtype));
    must_be_close(&x, want, dtype_bound(x_dtype), "residual x", "%s", text);
    if (c->norm) expect_close(&norm_y, want_y, dtype_bound(dtype), "residual norm_y", "%s", text);
}

START_TEST(residual_of_state_matches_double) {
    run_state_residual(&state_cases[_i], RF_DTYPE_F32, RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST
START_TEST(residual_of_state_matches_double_in_other_dtypes) {
    const rf_dtype f = RF_DTYPE_F32, b = RF_DTYPE_BF16;
    const rf_dtype dtypes[][3] = {{b, b, b}, {b, b, f}, {b, f, f}, {f, b, b}, {b, f, b}, {f, b, f}, {f, f, b}};
    const int step = state_cases[_i].cols > 4000 ? 3 : 1;
    for (int i = 0; i < 7; i += step) run_state_residual(&state_cases[_i], dtypes[i][0], dtypes[i][1], dtypes[i][2]);
}
END_TEST
START_TEST(residual_takes_odd_widths_of_state) {
    const state_case odd[] = {{3, 3, true, false, true, 2, true}, {33, 8, true, true, true, 1, true}};
    for (int i = 0; i < 2; i++) run_state_residual(&odd[i], RF_DTYPE_F32, RF_DTYPE_F32, RF_DTYPE_F32);
}
END_TEST

/* With every weight given and groups in order, terms of state are terms with a weight row per group, bit for bit. */
START_TEST(residual_of_state_in_order_is_the_plain_residual) {
    rf_dtype dtype = test_dtype(_i);
    const int widths[] = {64, 216, 1152, 1300, 4096, 8192};
    for (size_t i = 0; i < sizeof widths / sizeof widths[0]; i++) {
        int64_t cols = widths[i];
        operand x = op_normal(dtype, (size_t)(STATE_ROWS * cols), 0, 1), x2 = op_clone(&x);
        operand y = op_poison(dtype, x.num), y2 = op_poison(dtype, x.num);
        operand table = op_normal(dtype, (size_t)(PACKED * 3 * cols), 0, 0.5);
        operand weights = op_normal(RF_DTYPE_F32, PACKED * 3, 0, 1);
        operand terms[3] = {op_normal(dtype, x.num, 0, 1), op_normal(dtype, x.num, 0, 1),
                            op_normal(dtype, x.num, 0, 1)};
        const int32_t identity[PACKED] = {0, 1, 2};
        uint8_t weight_row[STATE_ROWS];
        for (int r = 0; r < STATE_ROWS; r++) weight_row[r] = (uint8_t)(r / GROUP_ROWS);
        rf_modulation mod = {.table = table.dev, .dtype = dtype, .stride = 3 * cols, .rows_per_group = GROUP_ROWS};
        rf_residual_args a = {.x = x.dev,
                              .num_terms = 3,
                              .terms = {terms[0].dev, terms[1].dev, terms[2].dev},
                              .weights = weights.dev,
                              .weight_row = dev_u8(weight_row, STATE_ROWS),
                              .x_dtype = dtype,
                              .y_dtype = dtype,
                              .num_rows = STATE_ROWS,
                              .cols = cols,
                              .gate_mod = mod,
                              .norm_y = y.dev,
                              .norm_y_dtype = dtype,
                              .norm_eps = 1e-6f,
                              .norm_mod = mod,
                              .norm_shift = cols,
                              .norm_scale = 2 * cols};
        expect_ok(test_ops()->residual(test_stream(), &a, &err));
        a.x = x2.dev;
        a.norm_y = y2.dev;
        a.weight_row = NULL;
        a.term_group = dev_i32(identity, PACKED);
        a.rows_per_term_group = GROUP_ROWS;
        expect_ok(test_ops()->residual(test_stream(), &a, &err));
        must_be_same(&x2, &x, "residual x", "%d columns by group", (int)cols);
        must_be_same(&y2, &y, "residual norm_y", "%d columns by group", (int)cols);
    }
}
END_TEST

/* Chosen rows: terms from listed rows of state, and a copy of the term in listed rows of a store. */
typedef struct {
    int cols, num_terms;
    bool term_rows, store, weights, base, gate, norm;
} listed_case;

static const listed_case listed_cases[] = {
    {8, 1, true, true, false, false, true, true},      {216, 1, false, true, false, false, true, true},
    {216, 1, true, false, false, false, true, true},   {1152, 1, true, true, false, false, true, true},
    {1152, 1, false, true, false, false, true, false}, {1152, 3, true, false, true, false, true, true},
    {1300, 1, true, true, true, true, false, true},    {2100, 1, false, true, false, false, true, true},
    {4100, 2, true, false, false, false, true, true},  {16384, 1, true, true, false, false, true, true},
    {64, 1, false, true, false, false, false, false},  {64, 0, true, false, false, true, false, true},
};
#define NUM_LISTED_CASES ((int)(sizeof listed_cases / sizeof listed_cases[0]))
#define CHOSEN           9

static void run_listed_residual(const listed_case *c, rf_dtype x_dtype, rf_dtype dtype, rf_dtype table_dtype) {
    const int64_t cols = c->cols, gate = cols, shift = 0, scale = 2 * cols;
    const int num_state = ALL * GROUP_ROWS;
    operand x = op_normal(x_dtype, (size_t)(STATE_ROWS * cols), 0, 1), before = op_clone(&x), plain_x = op_clone(&x);
    operand base = op_normal(dtype, (size_t)(4 * cols), 0, 1);
    operand table = op_normal(table_dtype, (size_t)(PACKED * 3 * cols), 0, 0.5);
    operand weights = op_normal(RF_DTYPE_F32, RF_MAX_TERMS, 0, 1);
    operand norm_y = op_poison(dtype, (size_t)(CHOSEN * cols)), plain_y = op_clone(&norm_y);
    operand store = op_poison(dtype, (size_t)(num_state * cols)), terms[RF_MAX_TERMS], packed[RF_MAX_TERMS];
    int32_t rows[STATE_ROWS], term_rows[ALL * GROUP_ROWS], store_rows[ALL * GROUP_ROWS];
    random_permutation(rows, STATE_ROWS, 21);
    random_permutation(term_rows, num_state, 22);
    random_permutation(store_rows, num_state, 23);
    const int32_t index[PACKED] = {2, 0, 1};
    rf_modulation mod = {.table = table.dev,
                         .dtype = table_dtype,
                         .stride = 3 * cols,
                         .index = dev_i32(index, PACKED),
                         .rows_per_group = GROUP_ROWS};
    rf_residual_args a = {.x = plain_x.dev,
                          .base = c->base ? base.dev : NULL,
                          .base_period = 4,
                          .num_terms = c->num_terms,
                          .weights = c->weights ? weights.dev : NULL,
                          .rows = dev_i32(rows, CHOSEN),
                          .x_dtype = x_dtype,
                          .base_dtype = dtype,
                          .y_dtype = dtype,
                          .num_rows = CHOSEN,
                          .cols = cols,
                          .gate_mod = mod,
                          .gate = c->gate ? gate : -1,
                          .norm_y = c->norm ? plain_y.dev : NULL,
                          .norm_y_dtype = dtype,
                          .norm_eps = 1e-6f,
                          .norm_mod = mod,
                          .norm_shift = shift,
                          .norm_scale = scale};
    for (int t = 0; t < c->num_terms; t++) { /* packed rows for the plain call, the same rows in state for the other */
        packed[t] = op_normal(dtype, (size_t)(CHOSEN * cols), 0, 1);
        a.terms[t] = packed[t].dev;
        terms[t] = op_poison(dtype, (size_t)(num_state * cols));
        for (int i = 0; i < CHOSEN; i++)
            memcpy(terms[t].host + term_rows[i] * cols, packed[t].host + i * cols, (size_t)cols * sizeof(float));
        op_upload(&terms[t]);
    }
    expect_ok(test_ops()->residual(test_stream(), &a, &err));
    for (int t = 0; t < c->num_terms && c->term_rows; t++) a.terms[t] = terms[t].dev;
    a.x = x.dev;
    if (c->norm) a.norm_y = norm_y.dev;
    if (c->term_rows) a.term_rows = dev_i32(term_rows, CHOSEN);
    if (c->store) {
        a.store = store.dev;
        a.store_rows = dev_i32(store_rows, CHOSEN);
    }
    expect_ok(test_ops()->residual(NULL, &a, &err));
    expect_ok(test_ops()->residual(test_stream(), &a, &err));
    must_be_same(&x, &plain_x, "residual x", "%d columns, listed terms", c->cols);
    if (c->norm) must_be_same(&norm_y, &plain_y, "residual norm_y", "%d columns, listed terms", c->cols);

    double *want = host_doubles(x.num), *want_y = host_doubles(norm_y.num), *want_store = host_doubles(store.num);
    for (size_t i = 0; i < x.num; i++) want[i] = (double)before.host[i];
    for (size_t i = 0; i < store.num; i++) want_store[i] = NAN;
    for (int i = 0; i < CHOSEN; i++) {
        const float *mod_row = table.host + index[rows[i] / GROUP_ROWS] * 3 * cols;
        double *row = want + rows[i] * cols, mean = 0, var = 0;
        for (int64_t e = 0; e < cols; e++) {
            double sum = 0;
            for (int t = 0; t < c->num_terms; t++)
                sum += (c->weights ? (double)weights.host[t] : 1) * (double)packed[t].host[i * cols + e];
            if (c->store) want_store[store_rows[i] * cols + e] = (double)packed[0].host[i * cols + e];
            if (c->gate) sum *= (double)mod_row[gate + e];
            row[e] = sum + (c->base ? (double)base.host[rows[i] % 4 * cols + e] : row[e]);
            mean += row[e] / (double)cols;
        }
        for (int64_t e = 0; e < cols; e++) var += (row[e] - mean) * (row[e] - mean) / (double)cols;
        for (int64_t e = 0; e < cols; e++)
            want_y[i * cols + e] =
                (row[e] - mean) / sqrt(var + 1e-6) * (1 + (double)mod_row[scale + e]) + (double)mod_row[shift + e];
    }
    must_be_close(&x, want, dtype_bound(x_dtype), "residual x", "%d columns, listed terms", c->cols);
    if (c->norm) must_be_close(&norm_y, want_y, dtype_bound(dtype), "residual norm_y", "%d columns", c->cols);
    must_be_close(&store, want_store, 0, "residual store", "%d columns", c->cols);
}

START_TEST(residual_of_listed_rows_is_the_plain_one_and_keeps_its_term) {
    for (int t = 0; t < num_triples(); t++)
        run_listed_residual(&listed_cases[_i], triple(t, 0), triple(t, 1), triple(t, 2));
}
END_TEST

/* ---- row_merge ---- */

typedef struct {
    rf_row_merge_args a;
    operand x, y, ring_a, ring_b, table;
    int32_t *place; /* host copy */
} merge;

static const int32_t merge_mod_index[PACKED] = {2, 0, 1};

/* form: bit 0 ring_a, bit 1 listed groups, bit 2 gate_a, bit 3 gate_b, bit 4 two modulation rows a group. In every other row a
 * chosen one: packed in an order of its own; what rings remember of chosen rows is NaN, and so are groups that no one names. */
static merge merge_new(int rows, int cols, int form, int t) {
    merge m = {.place = (int32_t *)host_doubles((size_t)(PACKED * rows))};
    const int num = PACKED * rows;
    int32_t *order = (int32_t *)host_doubles((size_t)num);
    random_permutation(order, num, (uint64_t)(31 + form));
    for (int i = 0; i < num; i++) m.place[i] = order[i] < num / 2 ? order[i] : -1;
    const rf_dtype dtype = triple(t, 1), table_dtype = triple(t, 2);
    m.x = op_normal(triple(t, 0), (size_t)(num * cols), 0, 1);
    m.y = op_normal(dtype, (size_t)(num * cols), 0, 1);
    m.table = op_normal(table_dtype, (size_t)(PACKED * 2 * cols), 0, 1);
    m.ring_a = op_normal(dtype, (size_t)(ALL * rows * cols), 0, 1);
    m.ring_b = op_normal(dtype, m.ring_a.num, 0, 1);
    for (int i = 0; i < ALL * rows; i++) {
        bool used = false;
        for (int g = 0; g < PACKED; g++)
            if (at_list(form & 2 ? list_1 : NULL, g) == i / rows) used = m.place[g * rows + i % rows] < 0;
        for (int e = 0; e < cols && !used; e++) m.ring_a.host[i * cols + e] = m.ring_b.host[i * cols + e] = NAN;
    }
    op_upload(&m.ring_a);
    op_upload(&m.ring_b);
    m.a = (rf_row_merge_args){.x = m.x.dev,
                              .y = m.y.dev,
                              .ring_a = form & 1 ? m.ring_a.dev : NULL,
                              .ring_b = m.ring_b.dev,
                              .x_dtype = m.x.dtype,
                              .dtype = dtype,
                              .place = dev_i32(m.place, (size_t)num),
                              .index = form & 2 ? dev_i32(list_1, PACKED) : NULL,
                              .groups = PACKED,
                              .rows = rows,
                              .cols = cols,
                              .mod = {.table = m.table.dev,
                                      .dtype = table_dtype,
                                      .stride = 2 * cols,
                                      .index = form & 16 ? NULL : dev_i32(merge_mod_index, PACKED),
                                      .rows_per_group = form & 16 ? (num + 1) / 2 : rows},
                              .gate_a = form & 4 ? 0 : -1,
                              .gate_b = form & 8 ? cols : -1};
    return m;
}

static void run_merge(int rows, int cols, int form, int t) {
    merge m = merge_new(rows, cols, form, t);
    const rf_row_merge_args *a = &m.a;
    double *want = host_doubles(m.x.num), *want_b = host_doubles(m.ring_b.num);
    for (size_t i = 0; i < m.ring_b.num; i++) want_b[i] = (double)m.ring_b.host[i];
    for (int r = 0; r < PACKED * rows; r++) {
        const int64_t state = at_list(form & 2 ? list_1 : NULL, r / rows) * rows + r % rows,
                      group = r / a->mod.rows_per_group;
        const float *gates = m.table.host + (form & 16 ? group : merge_mod_index[group]) * 2 * cols;
        for (int64_t e = 0; e < cols; e++) {
            const double gate_a = form & 4 ? (double)gates[e] : 1, gate_b = form & 8 ? (double)gates[cols + e] : 1;
            double sum = (double)m.x.host[r * cols + e];
            if (m.place[r] >= 0)
                want_b[state * cols + e] = (double)m.y.host[m.place[r] * cols + e];
            else if (a->ring_a)
                sum += gate_a * (double)m.ring_a.host[state * cols + e];
            want[r * cols + e] = sum + gate_b * want_b[state * cols + e];
        }
    }
    expect_ok(test_ops()->row_merge(NULL, a, &err));
    expect_ok(test_ops()->row_merge(test_stream(), a, &err));
    must_be_close(&m.x, want, dtype_bound(m.x.dtype), "row_merge x", "%d x %d form %d dtypes %d", rows, cols, form, t);
    must_be_close(&m.ring_b, want_b, 0, "row_merge ring", "%d x %d form %d dtypes %d", rows, cols, form, t);
}

START_TEST(row_merge_matches_double) {
    const int sizes[][2] = {{7, 8}, {5, 3}, {3, 36}, {256, 16}, {16, 1152}, {9, 516}, {1, 2000}};
    const int *size = sizes[_i % 7], t = _i / 7;
    const bool every = size[0] * size[1] < 60 && (t == 0 || t == NUM_DTYPE_TRIPLES - 1);
    for (int form = every ? 0 : _i * 5 % 7; form < 32; form += every ? 1 : 7) run_merge(size[0], size[1], form, t);
}
END_TEST

/* Of no chosen row it is residual with term_group and extra, of chosen rows alone residual of y, bit for bit on CUDA. */
START_TEST(row_merge_has_the_bits_of_residual) {
    const int rows = GROUP_ROWS, cols = 1152;
    for (int all = 0; all < 2; all++) {
        merge m = merge_new(rows, cols, 15, _i);
        for (int i = 0; i < STATE_ROWS; i++) m.place[i] = all ? i : -1;
        m.a.place = dev_i32(m.place, STATE_ROWS);
        operand ring_a = op_normal(m.a.dtype, m.ring_a.num, 0, 1), ring_b = op_normal(m.a.dtype, m.ring_b.num, 0, 1);
        m.a.ring_a = ring_a.dev;
        m.a.ring_b = ring_b.dev;
        const double ones[ALL] = {1, 1, 1, 1, 1};
        operand x = op_clone(&m.x), weights = op_values(RF_DTYPE_F32, ALL, ones);
        rf_residual_args a = {.x = x.dev,
                              .num_terms = 1,
                              .terms = {all ? m.y.dev : ring_a.dev},
                              .weights = all ? NULL : weights.dev,
                              .term_group = all ? NULL : m.a.index,
                              .rows_per_term_group = rows,
                              .extra = all ? NULL : ring_b.dev,
                              .extra_gate = m.a.gate_b,
                              .x_dtype = m.a.x_dtype,
                              .y_dtype = m.a.dtype,
                              .num_rows = STATE_ROWS,
                              .cols = cols,
                              .gate_mod = m.a.mod,
                              .gate = all ? m.a.gate_b : m.a.gate_a};
        expect_ok(test_ops()->residual(test_stream(), &a, &err));
        expect_ok(test_ops()->row_merge(test_stream(), &m.a, &err));
        must_be_same(&m.x, &x, "row_merge x", "%s rows chosen", all ? "all" : "no");
    }
}
END_TEST

/* ---- reduce_pair ---- */

static void run_reduce(int rows, int cols, rf_reduce_kind kind, rf_dtype a_dtype, rf_dtype b_dtype) {
    size_t most = (size_t)(ALL * rows * (cols + 8));
    operand a = op_normal(a_dtype, most, 0.1, 1), b = op_normal(b_dtype, most, 0, 2);
    operand w = op_normal(RF_DTYPE_F32, (size_t)rows, 0.5, 0.1), out = op_poison(RF_DTYPE_F32, ALL * 4);
    operand again = op_poison(RF_DTYPE_F32, out.num);
    const int32_t *dev_1 = dev_i32(list_1, PACKED), *dev_2 = dev_i32(list_2, PACKED), *dev_3 = dev_i32(list_3, PACKED);
    size_t bytes = (size_t)PACKED * 256 * 4 * sizeof(float);
    float *workspace = dev_bytes(bytes);
    for (int form = 0; form < 48; form++) {
        bool use_1 = form & 1, use_2 = form & 2, use_3 = form & 4, weights = form & 8;
        int pad = pads[form / 16], b_pad = form & 1 ? 0 : pad;
        int64_t a_ld = cols + pad, b_ld = cols + b_pad;
        if (kind == RF_REDUCE_ROW_NORMS && rows > 1) { /* a row of zeros adds nothing */
            for (int64_t e = 0; e < b_ld; e++) b.host[b_ld + e] = 0;
            op_upload(&b);
        }
        rf_reduce_pair_args args = {.a = a.dev,
                                    .b = b.dev,
                                    .a_dtype = a_dtype,
                                    .b_dtype = b_dtype,
                                    .kind = kind,
                                    .groups = PACKED,
                                    .rows = rows,
                                    .cols = cols,
                                    .a_ld = pad || weights ? a_ld : 0,
                                    .b_ld = b_pad || weights ? b_ld : 0,
                                    .a_index = use_1 ? dev_1 : NULL,
                                    .b_index = use_2 ? dev_2 : NULL,
                                    .out_index = use_3 ? dev_3 : NULL,
                                    .row_weight = weights ? w.dev : NULL,
                                    .out = out.dev,
                                    .workspace = workspace,
                                    .workspace_bytes = bytes};
        poison(&out);
        poison(&again);
        expect_ok(test_ops()->reduce_pair(NULL, &args, &err));
        expect_ok(test_ops()->reduce_pair(test_stream(), &args, &err));
        args.out = again.dev;
        expect_ok(test_ops()->reduce_pair(test_stream(), &args, &err));
        double want[ALL * 4];
        for (int i = 0; i < ALL * 4; i++) want[i] = NAN;
        for (int g = 0; g < PACKED; g++) {
            int64_t ga = at_list(use_1 ? list_1 : NULL, g), gb = at_list(use_2 ? list_2 : NULL, g);
            double *sums = want + 4 * at_list(use_3 ? list_3 : NULL, g);
            sums[0] = sums[1] = sums[2] = sums[3] = 0;
            for (int64_t r = 0; r < rows; r++) {
                double f = weights ? (double)w.host[r] : 1, sq_a = 0, sq_b = 0;
                for (int64_t e = 0; e < cols; e++) {
                    double u = a.host[(ga * rows + r) * a_ld + e], v = b.host[(gb * rows + r) * b_ld + e];
                    if (kind == RF_REDUCE_PLAIN) sums[0] += f * fabs(u - v);
                    if (kind == RF_REDUCE_RATIO) sums[0] += f * fabs(u - v) / (fabs(v) + 1e-10);
                    sums[1] += f * fabs(v);
                    sums[2] += f * (u - v) * (u - v);
                    sums[3] += f * v * v;
                    sq_a += u * u;
                    sq_b += v * v;
                }
                if (kind == RF_REDUCE_ROW_NORMS && sq_b > 0) sums[0] += f * sqrt(sq_a) / sqrt(sq_b);
            }
        }
        op_download(&out);
        for (int part = 0; part < 4; part++) { /* each sum by itself: they differ in size */
            for (int g = 0; g < ALL; g++) {
                double got = out.host[g * 4 + part], wanted = want[g * 4 + part];
                bool fine = isnan(wanted) ? isnan(got) : fabs(got - wanted) <= 1e-5 * fabs(wanted);
                if (!fine)
                    ck_abort_msg("reduce_pair kind %d form %d %d x %d: sum %d of group %d is %g, want %g", (int)kind,
                                 form, rows, cols, part, g, got, wanted);
            }
        }
        op_download(&again);
        ck_assert_msg(memcmp(out.host, again.host, out.num * sizeof(float)) == 0,
                      "reduce_pair: other bits the second time");
    }
}

START_TEST(reduce_of_kinds_and_lists_matches_double) {
    const int sizes[][2] = {{1, 3}, {7, 8}, {7, 33}, {3, 1152}, {256, 16}, {77, 100}, {1, 5000}};
    int pair = _i % (test_is_cuda() ? 4 : 1), kind = _i / (test_is_cuda() ? 4 : 1);
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++)
        run_reduce(sizes[i][0], sizes[i][1], (rf_reduce_kind)kind, triple(pair, 0), triple(pair, 1));
}
END_TEST

/* ---- row copies and patchify ---- */

START_TEST(row_copies_take_columns_of_wider_rows) {
    rf_dtype dtype = test_dtype(_i);
    const int sizes[][3] = {{16, 24, 4}, {216, 1152, 8}, {33, 40, 3}, {8, 8, 0}, {5, 1161, 700}}; /* cols, ld, first */
    for (size_t i = 0; i < sizeof sizes / sizeof sizes[0]; i++) {
        int cols = sizes[i][0], ld = sizes[i][1], first = sizes[i][2], num = 9;
        operand wide = op_normal(dtype, (size_t)(20 * ld), 0, 1), packed = op_poison(dtype, (size_t)(num * cols));
        operand spread = op_poison(dtype, wide.num);
        int32_t list[20];
        random_permutation(list, 20, 11);
        size_t skip = (size_t)first * rf_dtype_bytes(dtype);
        rf_rows_args a = {.src = (char *)wide.dev + skip,
                          .dst = packed.dev,
                          .rows = dev_i32(list, (size_t)num),
                          .dtype = dtype,
                          .num_rows = num,
                          .cols = cols,
                          .src_ld = ld};
        expect_ok(test_ops()->gather_rows(NULL, &a, &err));
        expect_ok(test_ops()->gather_rows(test_stream(), &a, &err));
        double *want = host_doubles(packed.num), *want_spread = host_doubles(spread.num);
        for (size_t k = 0; k < spread.num; k++) want_spread[k] = NAN;
        for (int r = 0; r < num; r++)
            for (int e = 0; e < cols; e++)
                want[r * cols + e] = want_spread[list[r] * ld + first + e] = wide.host[list[r] * ld + first + e];
        must_be_close(&packed, want, 0, "gather_rows", "%d of %d columns", cols, ld);
        a.src = packed.dev;
        a.dst = (char *)spread.dev + skip;
        a.src_ld = 0;
        a.dst_ld = ld;
        expect_ok(test_ops()->scatter_rows(test_stream(), &a, &err));
        must_be_close(&spread, want_spread, 0, "scatter_rows", "%d of %d columns", cols, ld);
    }
}
END_TEST

START_TEST(patchify_of_listed_samples_is_patchify_of_their_copy) {
    rf_dtype dtype = test_dtype(_i);
    const int32_t samples[4] = {3, 0, 4, 3}; /* of five; one twice */
    const size_t size = 4 * 2 * 6 * 8;
    operand latents = op_normal(RF_DTYPE_F32, 5 * size, 0, 1), listed = op_poison(RF_DTYPE_F32, 4 * size);
    for (int b = 0; b < 4; b++)
        memcpy(listed.host + (size_t)b * size, latents.host + (size_t)samples[b] * size, size * sizeof(float));
    op_upload(&listed);
    operand out = op_poison(dtype, 2 * 4 * size), want = op_poison(dtype, out.num);
    rf_patchify_args a = {.latent = listed.dev,
                          .out = want.dev,
                          .dtype = dtype,
                          .batch = 4,
                          .branches = 2,
                          .channels = 4,
                          .frames = 2,
                          .height = 6,
                          .width = 8,
                          .pt = 1,
                          .ph = 2,
                          .pw = 2};
    expect_ok(test_ops()->patchify(test_stream(), &a, &err));
    a.latent = latents.dev;
    a.out = out.dev;
    a.sample_index = dev_i32(samples, 4);
    expect_ok(test_ops()->patchify(NULL, &a, &err));
    expect_ok(test_ops()->patchify(test_stream(), &a, &err));
    must_be_same(&out, &want, "patchify", "listed samples");
    for (size_t i = 0; i < out.num; i++)
        if (!isfinite(out.host[i])) ck_abort_msg("patchify: element %zu not written", i);
}
END_TEST

/* ---- arguments ---- */

#define REFUSED(type, op, good, change, status)                                                                        \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(NULL, &a, &err), status);                                                         \
    } while (0)
#define REFUSED_RUN(type, op, good, change, status)                                                                    \
    do {                                                                                                               \
        type a = good;                                                                                                 \
        change;                                                                                                        \
        expect_status(test_ops()->op(test_stream(), &a, &err), status);                                                \
    } while (0)

static float some[4096];
static const int32_t some_list[4], other_list[4];
static const uint8_t some_bytes[4];

START_TEST(bad_group_copy_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_group_copy_args good = {.b = some,
                               .a_dtype = dtype,
                               .b_dtype = dtype,
                               .dst_dtype = dtype,
                               .groups = 2,
                               .rows = 4,
                               .cols = 8,
                               .b_cols = 8,
                               .a_ld = 8,
                               .b_ld = 8,
                               .dst_ld = 8,
                               .dst_slot = some_list,
                               .dst_slot_stride = 32};
    expect_ok(test_ops()->group_copy(NULL, &good, &err));
    REFUSED(rf_group_copy_args, group_copy, good, a.groups = -1, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.a_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.b_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.dst_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.b_cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.b_cols = 9, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.dst_slot_stride = 31, RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, (a.rows = INT32_MAX, a.a_ld = INT64_MAX / 4), RF_ERR_SHAPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.a_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.b_dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rf_group_copy_args, group_copy, good, a.dst_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    if (test_is_cuda()) {
        REFUSED(rf_group_copy_args, group_copy, good, a.groups = 65536, RF_ERR_SHAPE);
        REFUSED(rf_group_copy_args, group_copy, good, (a.rows = 1 << 28, a.dst_slot = NULL), RF_ERR_SHAPE);
    } else {
        REFUSED(rf_group_copy_args, group_copy, good, a.a_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_group_copy_args, group_copy, good, a.b_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_group_copy_args, group_copy, good, a.dst_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    }
    expect_status(test_ops()->group_copy(NULL, NULL, &err), RF_ERR_ARGUMENT);
    expect_status(test_ops()->group_copy(test_stream(), &good, &err), RF_ERR_ARGUMENT); /* no a */
    REFUSED_RUN(rf_group_copy_args, group_copy, good, a.a = some, RF_ERR_ARGUMENT);     /* no dst */
    good.dst_slot = NULL;
    REFUSED_RUN(rf_group_copy_args, group_copy, good, (a.a = a.dst = some, a.b = NULL, a.dst_index = some_list),
                RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_group_copy_args, group_copy, good,
                (a.a = a.dst = some, a.b = NULL, a.a_index = other_list, a.dst_index = some_list), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_group_copy_args, group_copy, good, (a.a = a.dst = some, a.b = NULL, a.dst_ld = 9), RF_ERR_ARGUMENT);
    good.groups = 0;
    expect_ok(test_ops()->group_copy(test_stream(), &good, &err));
    good.groups = 2;
    good.rows = 0;
    expect_ok(test_ops()->group_copy(test_stream(), &good, &err));
}
END_TEST

START_TEST(bad_combine_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_combine_args good = {.ring_dtype = dtype,
                            .num_slots = 3,
                            .num_classes = 2,
                            .slot_stride = 32,
                            .base = some,
                            .base_dtype = dtype,
                            .base_cols = 8,
                            .base_ld = 8,
                            .dst_dtype = dtype,
                            .dst_ld = 8,
                            .groups = 2,
                            .rows = 4,
                            .cols = 8};
    expect_ok(test_ops()->combine(NULL, &good, &err));
    REFUSED(rf_combine_args, combine, good, a.groups = -1, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.num_slots = 0, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.num_slots = 65, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.num_classes = 0, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.num_classes = 257, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.slot_stride = 31, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.base_cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.base_cols = 9, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.base_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.dst_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.slot_stride = INT64_MAX / 2, RF_ERR_SHAPE);
    REFUSED(rf_combine_args, combine, good, a.ring_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_combine_args, combine, good, a.base_dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rf_combine_args, combine, good, a.dst_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    if (test_is_cuda()) {
        REFUSED(rf_combine_args, combine, good, a.groups = 65536, RF_ERR_SHAPE);
    } else {
        REFUSED(rf_combine_args, combine, good, a.ring_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_combine_args, combine, good, a.base_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_combine_args, combine, good, a.dst_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    }
    expect_status(test_ops()->combine(NULL, NULL, &err), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_combine_args, combine, good, (a.ring = some, a.weights = some), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_combine_args, combine, good, (a.ring = some, a.dst = some + 1024), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_combine_args, combine, good, (a.weights = some, a.dst = some + 1024), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_combine_args, combine, good, (a.ring = a.dst = some + 1024, a.weights = some), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_combine_args, combine, good,
                (a.ring = some + 1024, a.weights = some, a.base = a.dst = some + 2048, a.dst_index = some_list),
                RF_ERR_ARGUMENT);
    good.groups = 0;
    expect_ok(test_ops()->combine(test_stream(), &good, &err));
}
END_TEST

START_TEST(bad_row_merge_arguments_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_row_merge_args good = {.ring_a = some + 512,
                              .x_dtype = dtype,
                              .dtype = dtype,
                              .groups = 2,
                              .rows = 4,
                              .cols = 8,
                              .mod = {.dtype = dtype, .stride = 16, .rows_per_group = 4},
                              .gate_a = 0,
                              .gate_b = 8};
    expect_ok(test_ops()->row_merge(NULL, &good, &err));
    REFUSED(rf_row_merge_args, row_merge, good, a.groups = -1, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.rows = -1, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.rows = INT32_MAX, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.cols = 0, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.gate_a = 9, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.gate_b = -2, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.mod.rows_per_group = 0, RF_ERR_SHAPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.x_dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.dtype = RF_DTYPE_I32, RF_ERR_DTYPE);
    REFUSED(rf_row_merge_args, row_merge, good, a.mod.dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    if (!test_is_cuda()) {
        REFUSED(rf_row_merge_args, row_merge, good, a.x_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_row_merge_args, row_merge, good, a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(rf_row_merge_args, row_merge, good, a.mod.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    }
    expect_status(test_ops()->row_merge(NULL, NULL, &err), RF_ERR_ARGUMENT);
    rf_row_merge_args run = good;
    run.x = some;
    run.y = some + 256;
    run.ring_b = some + 1024;
    run.place = some_list;
    run.mod.table = some + 2048;
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.x = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.y = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.ring_b = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.place = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.mod.table = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.x = (void *)a.y, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.x = a.ring_b, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.ring_a = a.x, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.ring_a = a.ring_b, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_row_merge_args, row_merge, run, a.y = a.ring_b, RF_ERR_ARGUMENT);
    run.groups = 0;
    expect_ok(test_ops()->row_merge(test_stream(), &run, &err));
}
END_TEST

START_TEST(bad_arguments_of_state_are_refused) {
    rf_dtype dtype = test_dtype(_i);
    rf_residual_args r = {.num_terms = 1,
                          .term_group = some_list,
                          .rows_per_term_group = 2,
                          .extra = some,
                          .extra_gate = 64,
                          .x_dtype = dtype,
                          .y_dtype = dtype,
                          .num_rows = 4,
                          .cols = 64,
                          .gate_mod = {.dtype = dtype, .stride = 128, .rows_per_group = 2},
                          .gate = 0};
    expect_ok(test_ops()->residual(NULL, &r, &err));
    REFUSED(rf_residual_args, residual, r, a.rows_per_term_group = 0, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, r, a.rows_per_term_group = 3, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, r, a.extra_gate = 65, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, r, a.extra_gate = -2, RF_ERR_SHAPE);
    REFUSED(rf_residual_args, residual, r, (a.gate = -1, a.gate_mod.dtype = RF_DTYPE_U8), RF_ERR_DTYPE);
    REFUSED(rf_residual_args, residual, r, a.weight_row = some_bytes, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, r, a.rows = some_list, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, r, (a.rows = some_list, a.term_group = NULL), RF_ERR_ARGUMENT);
    if (!test_is_cuda())
        REFUSED(rf_residual_args, residual, r, (a.gate = -1, a.gate_mod.dtype = RF_DTYPE_BF16), RF_ERR_DTYPE);
    rf_residual_args run = r;
    run.x = some + 1024;
    run.terms[0] = some + 2048;
    run.gate_mod.table = some;
    REFUSED_RUN(rf_residual_args, residual, run, a.weights = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_residual_args, residual, run, (a.weights = some, a.extra = a.x), RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_residual_args, residual, run, (a.weights = some, a.gate = -1, a.gate_mod.table = NULL),
                RF_ERR_ARGUMENT);

    rf_residual_args l = {.num_terms = 1,
                          .rows = some_list,
                          .term_rows = some_list,
                          .store = some + 3072,
                          .store_rows = other_list,
                          .x_dtype = dtype,
                          .y_dtype = dtype,
                          .num_rows = 4,
                          .cols = 64,
                          .gate = -1};
    expect_ok(test_ops()->residual(NULL, &l, &err));
    REFUSED(rf_residual_args, residual, l, (a.rows = NULL, a.store = NULL), RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, l, (a.rows = NULL, a.term_rows = NULL), RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, l, a.num_terms = 2, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, l, a.num_terms = 0, RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, l, (a.extra = some, a.extra_gate = -1), RF_ERR_ARGUMENT);
    REFUSED(rf_residual_args, residual, l, (a.term_group = some_list, a.rows_per_term_group = 2), RF_ERR_ARGUMENT);
    l.x = some + 1024;
    l.terms[0] = some + 2048;
    REFUSED_RUN(rf_residual_args, residual, l, a.store_rows = NULL, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_residual_args, residual, l, a.store = a.x, RF_ERR_ARGUMENT);
    REFUSED_RUN(rf_residual_args, residual, l, a.store = (void *)a.terms[0], RF_ERR_ARGUMENT);

    rf_reduce_pair_args p = {.b = some, .a_dtype = dtype, .b_dtype = dtype, .groups = 1, .rows = 4, .cols = 8};
    expect_ok(test_ops()->reduce_pair(NULL, &p, &err));
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.a_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.b_ld = -1, RF_ERR_SHAPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.a_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.b_dtype = RF_DTYPE_U8, RF_ERR_DTYPE);
    REFUSED(rf_reduce_pair_args, reduce_pair, p, a.kind = (rf_reduce_kind)3, RF_ERR_ARGUMENT);
    if (!test_is_cuda()) REFUSED(rf_reduce_pair_args, reduce_pair, p, a.b_dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
    REFUSED_RUN(rf_reduce_pair_args, reduce_pair, p,
                (a.a = some, a.out = some + 1024, a.b = NULL, a.kind = RF_REDUCE_RATIO), RF_ERR_ARGUMENT);

    rf_rows_args c = {.dtype = dtype, .num_rows = 4, .cols = 8, .src_ld = 8, .dst_ld = 9};
    expect_ok(test_ops()->gather_rows(NULL, &c, &err));
    REFUSED(rf_rows_args, gather_rows, c, a.src_ld = 7, RF_ERR_SHAPE);
    REFUSED(rf_rows_args, scatter_rows, c, a.dst_ld = -8, RF_ERR_SHAPE);
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("cache operators");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, group_copy_moves_groups_and_subtracts, 0, NUM_SHAPES * num_triples());
    add_for_dtypes(tc, group_copy_works_in_place);
    tcase_add_loop_test(tc, combine_matches_double_and_reads_no_slot_of_weight_zero, 0, NUM_SHAPES * num_triples());
    tcase_add_loop_test(tc, combine_takes_any_number_of_slots, 0, 7 * num_triples());
    tcase_add_loop_test(tc, residual_of_state_matches_double, 0, NUM_STATE_CASES);
    if (test_is_cuda())
        tcase_add_loop_test(tc, residual_of_state_matches_double_in_other_dtypes, 0, NUM_STATE_CASES);
    else
        tcase_add_test(tc, residual_takes_odd_widths_of_state);
    add_for_dtypes(tc, residual_of_state_in_order_is_the_plain_residual);
    tcase_add_loop_test(tc, residual_of_listed_rows_is_the_plain_one_and_keeps_its_term, 0, NUM_LISTED_CASES);
    tcase_add_loop_test(tc, row_merge_matches_double, 0, 7 * num_triples());
    if (test_is_cuda()) tcase_add_loop_test(tc, row_merge_has_the_bits_of_residual, 0, NUM_DTYPE_TRIPLES);
    tcase_add_loop_test(tc, reduce_of_kinds_and_lists_matches_double, 0, 3 * (test_is_cuda() ? 4 : 1));
    add_for_dtypes(tc, row_copies_take_columns_of_wider_rows);
    add_for_dtypes(tc, patchify_of_listed_samples_is_patchify_of_their_copy);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_group_copy_arguments_are_refused);
    add_for_dtypes(tc, bad_combine_arguments_are_refused);
    add_for_dtypes(tc, bad_row_merge_arguments_are_refused);
    add_for_dtypes(tc, bad_arguments_of_state_are_refused);
    return run_kernel_suite(suite);
}

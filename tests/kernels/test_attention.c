/* tests/kernels/test_attention.c - attention, merge and row softmax against loops in double.
 *
 * Bounds: dtype_bound for outputs; LSE within 1e-5 (f32: a logarithm of a sum of up to a thousand terms near 10) and 1e-3
 * (bf16: products of bf16 inputs are exact in f32, exponentials may be the hardware's). */
#include "harness.h"

typedef enum { KEYS_ALL, KEYS_IDENTITY, KEYS_PERMUTED, KEYS_DUPLICATES, KEYS_PER_SAMPLE } key_list;
typedef enum {
    JOIN_NONE,
    JOIN_IN_PLACE,
    JOIN_LISTED
} join_slots; /* slot i; slots in an order of their own. Some are empty */

typedef struct {
    int64_t batch, q_len, kv_len;
    int q_heads, kv_heads, d;
    key_list keys;
    bool q_list; /* every third row, backwards */
    bool lens;   /* 0, 1, half, all, ... */
    int num_ranges;
    rf_key_range ranges[4];
    rf_mask mask;
    int block, offset;
    double q_std; /* 0 = 1; large: one key takes all */
    bool offsets; /* more offset from the device: 5 * (sample + 1) */
    bool f32_out;
    bool out_list; /* out rows backwards, from 1, every second */
    join_slots join;
} attention_case;

#define ALL(b_, q_, k_, hq_, hkv_, d_)                                                                                 \
    .batch = (b_), .q_len = (q_), .kv_len = (k_), .q_heads = (hq_), .kv_heads = (hkv_), .d = (d_)
static const attention_case cases[] = {
    /* lengths around tile borders */
    {ALL(2, 1, 1, 2, 2, 64)},
    {ALL(1, 15, 17, 2, 2, 64)},
    {ALL(1, 16, 16, 2, 2, 72)},
    {ALL(1, 17, 15, 2, 2, 72)},
    {ALL(2, 63, 65, 2, 2, 72)},
    {ALL(2, 64, 64, 3, 3, 72)},
    {ALL(1, 65, 63, 2, 2, 80)},
    {ALL(1, 127, 129, 2, 2, 96)},
    {ALL(1, 129, 127, 2, 2, 128)},
    {ALL(1, 1, 1000, 2, 2, 128)},
    {ALL(1, 1000, 1, 1, 1, 64)},
    {ALL(1, 1000, 1000, 1, 1, 72)},
    /* models: the shipped one, DiT-XL/2, LLM decode */
    {ALL(2, 256, 256, 3, 3, 72)},
    {ALL(1, 256, 256, 16, 16, 72)},
    {ALL(1, 32, 1000, 8, 2, 128)},
    {ALL(3, 1, 513, 28, 4, 128)},
    /* every head dim, grouped heads */
    {ALL(1, 100, 130, 4, 1, 64)},
    {ALL(1, 100, 130, 7, 1, 80)},
    {ALL(2, 50, 130, 8, 2, 96)},
    {ALL(2, 70, 130, 14, 2, 128)},
    /* head dims that only the CPU takes */
    {ALL(1, 20, 33, 2, 1, 1)},
    {ALL(1, 20, 33, 2, 2, 7)},
    {ALL(1, 5, 9, 1, 1, 513)},
    /* lists */
    {ALL(2, 64, 200, 2, 2, 72), .keys = KEYS_IDENTITY},
    {ALL(2, 64, 200, 2, 2, 72), .keys = KEYS_PERMUTED},
    {ALL(1, 33, 77, 4, 2, 128), .keys = KEYS_DUPLICATES},
    {ALL(3, 40, 100, 2, 2, 64), .keys = KEYS_PER_SAMPLE},
    {ALL(2, 50, 256, 2, 2, 72), .q_list = true},
    {ALL(2, 50, 100, 2, 1, 80), .q_list = true, .keys = KEYS_PER_SAMPLE},
    {ALL(4, 65, 130, 2, 2, 72), .lens = true},
    {ALL(4, 33, 130, 2, 2, 64), .lens = true, .keys = KEYS_PERMUTED},
    {ALL(4, 1, 600, 8, 2, 128), .lens = true},
    {ALL(2, 20, 0, 2, 2, 72)},
    /* ranges */
    {ALL(1, 64, 300, 2, 2, 72), .num_ranges = 1, .ranges = {{17, 200}}},
    {ALL(2, 40, 300, 2, 2, 128), .num_ranges = 3, .ranges = {{0, 5}, {64, 65}, {131, 300}}},
    {ALL(1, 40, 300, 2, 2, 64), .num_ranges = 4, .ranges = {{0, 64}, {64, 64}, {100, 180}, {250, 251}}},
    {ALL(1, 16, 50, 2, 2, 72), .num_ranges = 2, .ranges = {{3, 3}, {9, 9}}},
    /* masks */
    {ALL(2, 130, 130, 2, 2, 72), .mask = RF_MASK_CAUSAL},
    {ALL(1, 65, 257, 4, 1, 128), .mask = RF_MASK_CAUSAL, .offset = 192},
    {ALL(1, 100, 40, 2, 2, 64), .mask = RF_MASK_CAUSAL},
    {ALL(1, 130, 130, 2, 2, 80), .mask = RF_MASK_BLOCK_CAUSAL, .block = 32},
    {ALL(1, 64, 200, 2, 1, 128), .mask = RF_MASK_BLOCK_CAUSAL, .block = 32, .offset = 96},
    {ALL(2, 33, 100, 2, 2, 72), .mask = RF_MASK_BLOCK_CAUSAL, .block = 7, .offset = 3},
    {ALL(1, 40, 120, 2, 2, 72), .mask = RF_MASK_CAUSAL, .keys = KEYS_PERMUTED, .q_list = true},
    {ALL(1, 40, 120, 2, 2, 128), .mask = RF_MASK_BLOCK_CAUSAL, .block = 16, .keys = KEYS_DUPLICATES},
    {ALL(4, 40, 120, 2, 2, 64), .mask = RF_MASK_CAUSAL, .lens = true, .offset = 40},
    {ALL(1, 100, 200, 2, 2, 72), .mask = RF_MASK_CAUSAL, .num_ranges = 2, .ranges = {{10, 40}, {90, 150}}},
    /* large logits: no overflow, one key takes all */
    {ALL(1, 64, 200, 2, 2, 72), .q_std = 60},
    {ALL(1, 64, 200, 2, 2, 128), .mask = RF_MASK_CAUSAL, .q_std = 1000},
    /* few rows against many keys: rows of a key head 1..64 and above, lengths around tiles, head_dim 64 and 128 */
    {ALL(1, 1, 1, 1, 1, 128)},
    {ALL(1, 1, 5, 4, 1, 64)},
    {ALL(1, 1, 63, 8, 2, 128)},
    {ALL(1, 1, 64, 7, 1, 64)},
    {ALL(1, 1, 65, 14, 2, 128)},
    {ALL(2, 1, 1000, 8, 2, 64)},
    {ALL(1, 1, 4097, 32, 8, 128)},
    {ALL(1, 1, 4097, 28, 4, 128)},
    {ALL(1, 4, 65, 8, 2, 128)},
    {ALL(1, 4, 1024, 16, 4, 128)},
    {ALL(1, 4, 1000, 7, 1, 64)},
    {ALL(1, 4, 4097, 2, 2, 64)},
    {ALL(1, 8, 63, 2, 2, 64)},
    {ALL(1, 8, 1000, 7, 1, 128)},
    {ALL(1, 8, 4097, 4, 1, 128)},
    {ALL(1, 32, 1, 2, 2, 128)},
    {ALL(1, 32, 64, 4, 4, 64)},
    {ALL(1, 32, 1024, 4, 4, 128)},
    {ALL(1, 32, 4097, 2, 2, 128)},
    {ALL(2, 32, 65, 8, 2, 64)},
    {ALL(1, 33, 1000, 2, 2, 64)},
    {ALL(1, 33, 4097, 1, 1, 128)},
    {ALL(1, 33, 1024, 7, 1, 128)},
    {ALL(1, 64, 5, 2, 2, 128)},
    {ALL(1, 64, 1024, 2, 2, 64)},
    {ALL(1, 64, 4097, 2, 2, 128)},
    {ALL(1, 64, 1000, 8, 2, 128)},
    /* more blocks than fit at once, and samples of their own lengths */
    {ALL(24, 1, 300, 16, 8, 64)},
    {ALL(3, 1, 4097, 8, 2, 128), .lens = true},
    {ALL(3, 8, 1024, 4, 1, 64), .lens = true},
    {ALL(4, 32, 1000, 2, 2, 128), .lens = true},
    {ALL(4, 64, 257, 2, 2, 64), .lens = true},
    {ALL(3, 4, 1024, 8, 2, 128), .lens = true, .keys = KEYS_PER_SAMPLE},
    {ALL(3, 33, 1000, 2, 1, 64), .lens = true, .keys = KEYS_PERMUTED},
    {ALL(1, 1, 4097, 8, 2, 128), .keys = KEYS_PERMUTED},
    {ALL(1, 32, 1024, 2, 2, 128), .keys = KEYS_DUPLICATES},
    {ALL(1, 32, 0, 2, 2, 128)},
    {ALL(1, 1, 0, 8, 2, 64)},
    {ALL(1, 32, 2000, 2, 2, 128), .num_ranges = 1, .ranges = {{63, 1500}}},
    {ALL(1, 4, 2000, 8, 2, 64), .num_ranges = 3, .ranges = {{0, 5}, {64, 1065}, {1131, 2000}}},
    {ALL(2, 32, 1000, 2, 2, 128), .q_list = true},
    /* masks of few rows, offsets from the device */
    {ALL(3, 1, 1000, 8, 2, 128), .mask = RF_MASK_CAUSAL, .offset = 700, .offsets = true},
    {ALL(1, 32, 1024, 2, 2, 128), .mask = RF_MASK_CAUSAL, .offset = 500},
    {ALL(2, 33, 400, 4, 1, 64), .mask = RF_MASK_CAUSAL, .offsets = true},
    {ALL(1, 4, 1000, 8, 2, 128), .mask = RF_MASK_BLOCK_CAUSAL, .block = 4, .offset = 900},
    {ALL(2, 32, 500, 2, 2, 64), .mask = RF_MASK_BLOCK_CAUSAL, .block = 32, .offset = 320, .offsets = true},
    {ALL(2, 16, 500, 4, 2, 128), .mask = RF_MASK_CAUSAL, .keys = KEYS_PER_SAMPLE, .q_list = true, .offsets = true},
    {ALL(1, 16, 500, 4, 2, 64), .mask = RF_MASK_BLOCK_CAUSAL, .block = 8, .keys = KEYS_PERMUTED, .offset = 100},
    {ALL(3, 8, 300, 4, 2, 64), .mask = RF_MASK_CAUSAL, .lens = true, .offset = 290},
    {ALL(2, 130, 150, 2, 2, 72), .mask = RF_MASK_CAUSAL, .offsets = true},
    {ALL(2, 300, 320, 4, 1, 128), .mask = RF_MASK_CAUSAL, .offsets = true, .offset = 3},
    /* prefill: row tiles of 64 and 128, key tiles of 128, lengths and masks around their borders, rows that see nothing,
     * more tiles of rows than a card has SMs */
    {ALL(1, 128, 128, 2, 2, 128), .mask = RF_MASK_CAUSAL},
    {ALL(1, 129, 257, 2, 1, 64), .mask = RF_MASK_CAUSAL, .offset = 128},
    {ALL(1, 127, 383, 4, 2, 128), .mask = RF_MASK_CAUSAL, .offset = 255},
    {ALL(2, 257, 300, 4, 1, 128), .mask = RF_MASK_CAUSAL, .offset = 1, .offsets = true},
    {ALL(1, 300, 100, 2, 2, 128), .mask = RF_MASK_CAUSAL},
    {ALL(4, 130, 300, 4, 2, 128), .lens = true},
    {ALL(4, 200, 257, 2, 1, 64), .lens = true},
    {ALL(4, 100, 200, 2, 1, 128), .lens = true},
    {ALL(4, 70, 600, 2, 2, 72), .lens = true},
    {ALL(4, 150, 500, 4, 1, 128), .lens = true, .mask = RF_MASK_CAUSAL, .offset = 200, .offsets = true},
    {ALL(4, 150, 500, 2, 2, 64), .lens = true, .mask = RF_MASK_BLOCK_CAUSAL, .block = 32, .offset = 64},
    {ALL(1, 256, 700, 4, 2, 128), .mask = RF_MASK_BLOCK_CAUSAL, .block = 32, .offset = 320},
    {ALL(2, 190, 400, 2, 1, 128), .mask = RF_MASK_BLOCK_CAUSAL, .block = 100, .offsets = true},
    {ALL(1, 150, 900, 2, 2, 72), .mask = RF_MASK_BLOCK_CAUSAL, .block = 1000},
    {ALL(1, 300, 400, 2, 1, 128), .mask = RF_MASK_CAUSAL, .num_ranges = 1, .ranges = {{140, 390}}},
    {ALL(1, 150, 400, 2, 1, 64), .mask = RF_MASK_CAUSAL, .num_ranges = 1, .ranges = {{200, 390}}},
    {ALL(1, 200, 300, 2, 2, 128), .mask = RF_MASK_CAUSAL, .offset = 50, .q_std = 60},
    {ALL(1, 270, 300, 48, 6, 128), .mask = RF_MASK_CAUSAL, .offset = 30},
    {ALL(2, 270, 300, 28, 4, 64), .mask = RF_MASK_CAUSAL, .lens = true, .offset = 30},
    {ALL(3, 130, 300, 24, 24, 64), .lens = true},
    {ALL(3, 500, 260, 24, 3, 64), .mask = RF_MASK_BLOCK_CAUSAL, .block = 50, .lens = true},
    /* where results go, and what they are joined with */
    {ALL(1, 32, 1024, 4, 4, 128), .f32_out = true},
    {ALL(3, 1, 1000, 8, 2, 64), .f32_out = true, .lens = true},
    {ALL(1, 130, 300, 4, 2, 64), .f32_out = true},
    {ALL(1, 8, 300, 2, 1, 128), .out_list = true},
    {ALL(2, 5, 1000, 4, 2, 64), .f32_out = true, .out_list = true, .q_list = true},
    {ALL(1, 130, 200, 2, 1, 128), .out_list = true, .mask = RF_MASK_CAUSAL},
    {ALL(1, 32, 32, 4, 4, 128), .join = JOIN_LISTED},
    {ALL(1, 32, 32, 4, 1, 64), .join = JOIN_LISTED, .f32_out = true},
    {ALL(1, 8, 0, 2, 1, 128), .join = JOIN_LISTED},
    {ALL(1, 8, 4097, 2, 1, 128), .join = JOIN_IN_PLACE},
    {ALL(3, 4, 1000, 8, 2, 64), .join = JOIN_LISTED, .lens = true, .out_list = true},
    {ALL(1, 130, 200, 2, 2, 64), .join = JOIN_IN_PLACE, .mask = RF_MASK_CAUSAL},
    {ALL(1, 300, 20, 2, 2, 128), .join = JOIN_LISTED, .out_list = true, .f32_out = true},
};
#define NUM_CASES ((int)(sizeof cases / sizeof cases[0]))

static void describe_case(const attention_case *c, char *text, size_t bytes) {
    snprintf(
        text, bytes,
        "b%d hq%d hkv%d q%d kv%d d%d keys %d qlist %d lens %d ranges %d mask %d/%d+%d(%d) std %g f32 %d outlist %d "
        "join %d",
        (int)c->batch, c->q_heads, c->kv_heads, (int)c->q_len, (int)c->kv_len, c->d, (int)c->keys, c->q_list, c->lens,
        c->num_ranges, (int)c->mask, c->block, c->offset, c->offsets, c->q_std, c->f32_out, c->out_list, (int)c->join);
}

static bool key_visible(const attention_case *c, int64_t q_pos, int64_t key_pos) {
    if (c->mask == RF_MASK_CAUSAL) return key_pos <= q_pos;
    if (c->mask == RF_MASK_BLOCK_CAUSAL) return key_pos < (q_pos / c->block + 1) * c->block;
    return true;
}

/* expect_abs, and NaN in want says that the element must still be the poison. */
static void expect_lse(operand *got, const double *want, double bound, const char *text) {
    op_download(got);
    for (size_t i = 0; i < got->num; i++) {
        double g = got->host[i];
        bool fine = isnan(want[i]) ? isnan(g) : g == want[i] || fabs(g - want[i]) <= bound;
        if (!fine)
            ck_abort_msg("attention lse [%s]: element %zu is %.9g, want %.9g (bound %.3g)", text, i, g, want[i], bound);
    }
}

/* kernel: which to force; false if it cannot run here. */
static bool run_case(const attention_case *c, rf_dtype dtype, rf_attention_kernel kernel) {
    const rf_ops *ops = test_ops();
    int64_t d = c->d, hq = c->q_heads, hkv = c->kv_heads;
    double q_std = c->q_std > 0 ? c->q_std : 1;
    int64_t q_src = c->q_list ? 3 * c->q_len : c->q_len;              /* rows of q */
    int64_t kv_src = c->keys == KEYS_ALL ? c->kv_len : 2 * c->kv_len; /* rows of k and v */
    operand q = op_normal(dtype, (size_t)(c->batch * q_src * hq * d), 0, q_std);
    operand k = op_normal(dtype, (size_t)(c->batch * kv_src * hkv * d), 0, 1);
    operand v = op_normal(dtype, (size_t)(c->batch * kv_src * hkv * d), 0.3, 1);
    int64_t out_src = c->out_list ? 2 * c->q_len + 1 : c->q_len, num_slots = 2 * c->batch * c->q_len + 3;
    rf_dtype out_dtype = c->f32_out ? RF_DTYPE_F32 : dtype;
    operand out = op_poison(out_dtype, (size_t)(c->batch * out_src * hq * d));
    operand lse = op_poison(RF_DTYPE_F32, (size_t)(c->batch * hq * out_src));

    int32_t *q_rows = NULL, *kv_rows = NULL, *lens = NULL, *out_rows = NULL, *join_rows = NULL, *offsets = NULL;
    size_t num_lists = c->keys == KEYS_PER_SAMPLE ? (size_t)c->batch : 1;
    if (c->q_list) {
        q_rows = (int32_t *)host_doubles((size_t)(c->batch * c->q_len));
        for (int64_t i = 0; i < c->batch * c->q_len; i++) q_rows[i] = (int32_t)(3 * (c->q_len - 1 - i % c->q_len) + 1);
    }
    if (c->out_list) {
        out_rows = (int32_t *)host_doubles((size_t)(c->batch * c->q_len));
        for (int64_t i = 0; i < c->batch * c->q_len; i++)
            out_rows[i] = (int32_t)(2 * (c->q_len - 1 - i % c->q_len) + 1);
    }
    if (c->join == JOIN_LISTED) {
        join_rows = (int32_t *)host_doubles((size_t)num_slots);
        random_permutation(join_rows, (int)num_slots, 5);
    }
    if (c->offsets) {
        offsets = (int32_t *)host_doubles((size_t)c->batch);
        for (int64_t b = 0; b < c->batch; b++) offsets[b] = (int32_t)(5 * (b + 1));
    }
    operand join_out = {0}, join_lse = {0};
    if (c->join != JOIN_NONE) {
        join_out = op_normal(RF_DTYPE_F32, (size_t)(num_slots * hq * d), 0.5, 1);
        join_lse = op_normal(RF_DTYPE_F32, (size_t)(hq * num_slots), log((double)c->kv_len + 1), 1);
        for (int64_t i = 0; i < hq * num_slots; i++)
            if (i % 5 == 2) join_lse.host[i] = -INFINITY;
        for (int64_t r = 0; r < num_slots; r++) /* an empty slot may hold anything */
            for (int64_t h = 0; h < hq; h++)
                for (int64_t e = 0; e < d; e++)
                    if (isinf(join_lse.host[h * num_slots + r])) join_out.host[(r * hq + h) * d + e] = NAN;
        op_upload(&join_out);
        op_upload(&join_lse);
    }
    if (c->keys != KEYS_ALL) {
        kv_rows = (int32_t *)host_doubles(num_lists * (size_t)c->kv_len + (size_t)kv_src);
        for (size_t l = 0; l < num_lists; l++) {
            int32_t *list = kv_rows + l * (size_t)c->kv_len;
            if (c->keys == KEYS_IDENTITY) {
                for (int64_t j = 0; j < c->kv_len; j++) list[j] = (int32_t)j;
            } else {
                int32_t *order = (int32_t *)host_doubles((size_t)kv_src);
                random_permutation(order, (int)kv_src, 7 + l);
                memcpy(list, order, (size_t)c->kv_len * sizeof *list);
            }
            if (c->keys == KEYS_DUPLICATES)
                for (int64_t j = 0; j < c->kv_len; j++) list[j] %= 20;
        }
    }
    if (c->lens) {
        const int64_t some[4] = {0, 1, c->kv_len / 2 + 1, c->kv_len};
        lens = (int32_t *)host_doubles((size_t)c->batch);
        for (int64_t b = 0; b < c->batch; b++) lens[b] = (int32_t)some[b % 4];
    }

    rf_attention_args a = {
        .q = q.dev,
        .k = k.dev,
        .v = v.dev,
        .out = out.dev,
        .lse = lse.dev,
        .dtype = dtype,
        .batch = c->batch,
        .num_q_heads = c->q_heads,
        .num_kv_heads = c->kv_heads,
        .head_dim = c->d,
        .q_len = c->q_len,
        .kv_len = c->kv_len,
        .q_batch_stride = q_src * hq * d,
        .q_row_stride = hq * d,
        .q_head_stride = d,
        .kv_batch_stride = kv_src * hkv * d,
        .kv_row_stride = hkv * d,
        .kv_head_stride = d,
        .out_batch_stride = out_src * hq * d,
        .out_row_stride = hq * d,
        .out_head_stride = d,
        .softmax_scale = (float)(1 / sqrt((double)d)),
        .num_ranges = c->num_ranges,
        .mask = c->mask,
        .causal_block = c->block,
        .q_pos_offset = c->offset,
        .out_is_f32 = c->f32_out,
        .lse_slots = c->out_list ? out_src : 0,
        .join_out = join_out.dev,
        .join_lse = join_lse.dev,
        .join_slots = c->join != JOIN_NONE ? num_slots : 0,
        .kernel = kernel,
    };
    memcpy(a.ranges, c->ranges, sizeof a.ranges);
    a.q_batch_stride_rows =
        c->join == JOIN_LISTED || c->batch % 2 == 0 ? c->q_len : 0; /* lists repeat, but for the slots */
    if (q_rows) a.q_rows = dev_i32(q_rows, (size_t)(c->batch * c->q_len));
    if (out_rows) a.out_rows = dev_i32(out_rows, (size_t)(c->batch * c->q_len));
    if (join_rows) a.join_rows = dev_i32(join_rows, (size_t)(c->batch * c->q_len));
    if (offsets) a.q_pos_offsets = dev_i32(offsets, (size_t)c->batch);
    if (kv_rows) a.kv_rows = dev_i32(kv_rows, num_lists * (size_t)c->kv_len);
    a.kv_batch_stride_rows = num_lists > 1 ? c->kv_len : 0;
    if (lens) a.kv_lens = dev_i32(lens, (size_t)c->batch);

    bool listed_dim = c->d == 64 || c->d == 72 || c->d == 80 || c->d == 96 || c->d == 128;
    if (test_is_cuda() && !listed_dim) {
        rf_error err = {0};
        rf_status st = ops->attention(NULL, &a, &err);
        ck_assert_msg(st == RF_ERR_SHAPE || st == RF_ERR_UNSUPPORTED, "head_dim %d: %s", c->d, rf_status_name(st));
        return false;
    }
    if (kernel != RF_ATTENTION_AUTO) {
        rf_error err = {0};
        if (ops->attention(NULL, &a, &err) != RF_OK) return false;
    }
    expect_ok(ops->attention(NULL, &a, &err));
    a.workspace_bytes = ops->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(ops->attention(test_stream(), &a, &err));

    double *want = host_doubles(out.num), *want_lse = host_doubles(lse.num);
    for (size_t i = 0; i < out.num; i++) want[i] = NAN;
    for (size_t i = 0; i < lse.num; i++) want_lse[i] = NAN;
    double *score = host_doubles((size_t)c->kv_len + 1);
    int32_t *row_of = (int32_t *)host_doubles((size_t)c->kv_len + 1);
    for (int64_t b = 0; b < c->batch; b++) {
        for (int64_t h = 0; h < hq; h++) {
            int64_t hk = h / (hq / hkv);
            for (int64_t i = 0; i < c->q_len; i++) {
                int64_t q_row = q_rows ? q_rows[i] : i;
                const float *qi = q.host + (b * q_src + q_row) * hq * d + h * d;
                int64_t num = 0, len = lens ? lens[b] : c->kv_len;
                for (int64_t j = 0; j < len; j++) {
                    int64_t row = kv_rows ? kv_rows[(num_lists > 1 ? b * c->kv_len : 0) + j] : j;
                    bool in = c->num_ranges == 0;
                    for (int r = 0; r < c->num_ranges; r++) in |= row >= c->ranges[r].begin && row < c->ranges[r].end;
                    if (in && key_visible(c, q_row + c->offset + (offsets ? offsets[b] : 0), row))
                        row_of[num++] = (int32_t)row;
                }
                double top = -INFINITY, sum = 0;
                for (int64_t j = 0; j < num; j++) {
                    const float *kj = k.host + (b * kv_src + row_of[j]) * hkv * d + hk * d;
                    double s = 0;
                    for (int64_t e = 0; e < d; e++) s += (double)qi[e] * (double)kj[e];
                    score[j] = s * (double)a.softmax_scale;
                    top = fmax(top, score[j]);
                }
                for (int64_t j = 0; j < num; j++) sum += score[j] = exp(score[j] - top);
                int64_t out_row = out_rows ? out_rows[i] : i;
                double *o = want + ((b * out_src + out_row) * hq + h) * d, value = num ? top + log(sum) : -INFINITY;
                for (int64_t e = 0; e < d; e++) o[e] = 0;
                for (int64_t j = 0; j < num; j++) {
                    const float *vj = v.host + (b * kv_src + row_of[j]) * hkv * d + hk * d;
                    for (int64_t e = 0; e < d; e++) o[e] += score[j] / sum * (double)vj[e];
                }
                if (c->join != JOIN_NONE) {
                    int64_t slot = join_rows ? join_rows[b * c->q_len + i] : i;
                    double kept = join_lse.host[h * num_slots + slot], high = fmax(value, kept);
                    double mine = isinf(value) ? 0 : exp(value - high), other = isinf(kept) ? 0 : exp(kept - high);
                    const float *y = join_out.host + (slot * hq + h) * d;
                    for (int64_t e = 0; e < d; e++)
                        o[e] = mine + other > 0
                                   ? (mine * o[e] + (other > 0 ? other * (double)y[e] : 0)) / (mine + other)
                                   : 0;
                    value = mine + other > 0 ? high + log(mine + other) : -INFINITY;
                }
                want_lse[(b * hq + h) * out_src + out_row] = value;
            }
        }
    }
    char text[200];
    describe_case(c, text, sizeof text);
    /* A logit of size s carries an error of s * 2^-22 into every probability. */
    double logit = q_std;
    double bound = dtype_bound(dtype) + 5e-7 * (logit - 1), lse_bound = dtype == RF_DTYPE_F32 ? 1e-5 : 1e-3;
    expect_close(&out, want, bound, "attention", "%s", text);
    expect_lse(&lse, want_lse, lse_bound * logit, text);

    /* Without LSE: the same output. */
    operand again = op_poison(out_dtype, out.num);
    a.out = again.dev;
    a.lse = NULL;
    expect_ok(ops->attention(test_stream(), &a, &err));
    expect_close(&again, want, bound, "attention without lse", "%s", text);
    return true;
}

START_TEST(matches_double) {
    run_case(&cases[_i], RF_DTYPE_F32, RF_ATTENTION_AUTO);
}
END_TEST

START_TEST(matches_double_in_bf16) {
    run_case(&cases[_i], RF_DTYPE_BF16, RF_ATTENTION_AUTO);
}
END_TEST

START_TEST(mma_kernel_matches_double) {
    run_case(&cases[_i], RF_DTYPE_BF16, RF_ATTENTION_MMA);
}
END_TEST

static int num_wgmma_runs;
START_TEST(wgmma_kernel_matches_double) {
    if (run_case(&cases[_i], RF_DTYPE_BF16, RF_ATTENTION_WGMMA)) num_wgmma_runs++;
    if (_i == NUM_CASES - 1) printf("forced wgmma ran %d of %d cases\n", num_wgmma_runs, NUM_CASES);
}
END_TEST

static int num_decode_runs;
START_TEST(decode_kernel_matches_double) {
    if (run_case(&cases[_i], RF_DTYPE_BF16, RF_ATTENTION_DECODE)) num_decode_runs++;
    if (_i == NUM_CASES - 1) {
        printf("forced decode ran %d of %d cases\n", num_decode_runs, NUM_CASES);
        ck_assert_int_gt(num_decode_runs, NUM_CASES / 2);
    }
}
END_TEST

/* Q, K and V as they leave the QKV projection: [token][3][H][D]. */
START_TEST(packed_rows_match_double) {
    rf_dtype dtype = test_dtype(_i);
    enum { B = 3, L = 100, H = 2, D = 72 };
    operand qkv = op_normal(dtype, B * L * 3 * H * D, 0, 1), out = op_poison(dtype, B * L * H * D);
    rf_attention_args a = rf_attention_args_packed(dtype, B, L, H, D, qkv.dev, out.dev);
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    double *want = host_doubles(out.num), p[L];
    for (int b = 0; b < B; b++) {
        for (int h = 0; h < H; h++) {
            for (int i = 0; i < L; i++) {
                const float *rows = qkv.host + b * L * 3 * H * D + h * D;
                double sum = 0;
                for (int j = 0; j < L; j++) {
                    double s = 0;
                    for (int e = 0; e < D; e++)
                        s += (double)rows[i * 3 * H * D + e] * (double)rows[(j * 3 + 1) * H * D + e];
                    sum += p[j] = exp(s / sqrt(D));
                }
                for (int j = 0; j < L; j++)
                    for (int e = 0; e < D; e++)
                        want[((b * L + i) * H + h) * D + e] += p[j] / sum * (double)rows[(j * 3 + 2) * H * D + e];
            }
        }
    }
    expect_close(&out, want, dtype_bound(dtype), "attention", "packed");
}
END_TEST

/* Rows past every query's limit and past kv_lens may hold NaN: they are not read into the result. */
static void check_unseen_keys(rf_dtype dtype, int d) {
    enum { KV = 400, LEN = 290 };
    operand k = op_normal(dtype, (size_t)(KV * d), 0, 1), v = op_normal(dtype, (size_t)(KV * d), 0, 1);
    operand k_bad = op_clone(&k), v_bad = op_clone(&v);
    const int32_t len = LEN;
    int32_t rows[KV];
    random_permutation(rows, KV, 3);
    for (int i = LEN * d; i < KV * d; i++) k_bad.host[i] = v_bad.host[i] = NAN;
    op_upload(&k_bad);
    op_upload(&v_bad);
    const rf_attention_kernel kernels[] = {RF_ATTENTION_AUTO, RF_ATTENTION_MMA, RF_ATTENTION_WGMMA,
                                           RF_ATTENTION_DECODE};
    const int q_lens[] = {1, 20, 100, 257};
    int runs = 0;
    for (size_t n = 0; n < 4; n++) {
        int q_len = q_lens[n];
        operand q = op_normal(dtype, (size_t)(q_len * d), 0, 1);
        for (int how = 0; how < 5; how++) { /* kv_lens; causal; block-causal; causal over a list; causal over ranges */
            for (size_t kernel = 0; kernel < 4; kernel++) {
                if (how > 0 && q_len > LEN) continue;
                operand good = op_poison(dtype, (size_t)(q_len * d)), out = op_poison(dtype, (size_t)(q_len * d));
                rf_attention_args a = rf_attention_args_packed(dtype, 1, q_len, 1, d, NULL, NULL);
                a.q_row_stride = a.kv_row_stride = a.out_row_stride = d;
                a.kv_len = KV;
                a.q = q.dev;
                a.k = k.dev;
                a.v = v.dev;
                a.out = good.dev;
                a.kernel = kernels[kernel];
                if (how == 0) a.kv_lens = dev_i32(&len, 1);
                if (how > 0) {
                    a.mask = how == 2 ? RF_MASK_BLOCK_CAUSAL : RF_MASK_CAUSAL;
                    a.causal_block = 10;
                    a.q_pos_offset = LEN - q_len;
                }
                if (how == 3) a.kv_rows = dev_i32(rows, KV);
                if (how == 4) {
                    a.num_ranges = 2;
                    a.ranges[0] = (rf_key_range){3, 40};
                    a.ranges[1] = (rf_key_range){100, KV};
                }
                rf_error why = {0};
                if (a.kernel != RF_ATTENTION_AUTO && test_ops()->attention(NULL, &a, &why) != RF_OK) continue;
                /* its lists of keys are loaded as they are */
                if (a.kernel == RF_ATTENTION_MMA && how >= 3) continue;
                if (a.kernel == RF_ATTENTION_AUTO && how >= 3 && test_is_cuda() && dtype == RF_DTYPE_BF16 &&
                    (q_len > 64 || d == 72))
                    continue;
                a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
                a.workspace = dev_bytes(a.workspace_bytes);
                expect_ok(test_ops()->attention(test_stream(), &a, &err));
                a.k = k_bad.dev;
                a.v = v_bad.dev;
                a.out = out.dev;
                expect_ok(test_ops()->attention(test_stream(), &a, &err));
                expect_same_bits(&good, &out, "attention",
                                 "NaN past the last key, %d queries of %d, case %d, kernel %d", q_len, d, how,
                                 (int)a.kernel);
                runs++;
            }
        }
    }
    ck_assert_int_ge(runs, 12);
}

START_TEST(unseen_keys_may_hold_anything) {
    check_unseen_keys(test_dtype(_i), 64);
}
END_TEST

START_TEST(unseen_keys_may_hold_anything_with_a_tail) {
    check_unseen_keys(test_dtype(_i), 72);
}
END_TEST

START_TEST(unseen_keys_may_hold_anything_in_wide_heads) {
    check_unseen_keys(test_dtype(_i), 128);
}
END_TEST

/* The Hopper kernel: a row's bits depend on the keys it sees. Lengths that are all keys are no lengths, a prompt in chunks is the
 * prompt, and how far the cache goes on behind the last position (which is what rows are ordered by) does not matter, nor is
 * any of it read. */
START_TEST(wgmma_rows_keep_their_bits) {
    enum { H = 48, HKV = 12, Q = 300, KV = 420, FROM = KV - Q, CUT = 170 };
    const int d = _i == 0 ? 64 : 128;
    const size_t num = (size_t)(Q * H * d);
    operand q = op_normal(RF_DTYPE_BF16, num, 0, 1), k = op_normal(RF_DTYPE_BF16, (size_t)(KV * HKV * d), 0, 1);
    operand v = op_normal(RF_DTYPE_BF16, (size_t)(KV * HKV * d), 0, 1);
    operand plain = op_poison(RF_DTYPE_BF16, num), out = op_poison(RF_DTYPE_BF16, num);
    operand plain_lse = op_poison(RF_DTYPE_F32, H * Q), lse = op_poison(RF_DTYPE_F32, H * Q);
    const int32_t len = KV;
    rf_attention_args a = rf_attention_args_packed(RF_DTYPE_BF16, 1, Q, H, d, NULL, NULL);
    a.num_kv_heads = HKV;
    a.kv_len = KV;
    a.q_row_stride = H * d;
    a.kv_row_stride = HKV * d;
    a.q = q.dev;
    a.k = k.dev;
    a.v = v.dev;
    a.out = plain.dev;
    a.lse = plain_lse.dev;
    a.kernel = RF_ATTENTION_WGMMA;
    rf_error why = {0};
    const rf_status status = test_ops()->attention(test_stream(), &a, &why);
    if (status == RF_ERR_UNSUPPORTED) return; /* another architecture */
    ck_assert_msg(status == RF_OK, "%s", why.message);
    rf_attention_args b = a;
    b.kv_lens = dev_i32(&len, 1);
    b.out = out.dev;
    b.lse = lse.dev;
    expect_ok(test_ops()->attention(test_stream(), &b, &err));
    expect_same_bits(&plain, &out, "attention", "lengths of all keys, head_dim %d", d);
    expect_same_bits(&plain_lse, &lse, "attention lse", "lengths of all keys, head_dim %d", d);

    a.mask = RF_MASK_CAUSAL;
    a.q_pos_offset = FROM;
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    b = a;
    b.out = out.dev;
    b.lse = lse.dev;
    b.kv_len = 1 << 20;
    expect_ok(test_ops()->attention(test_stream(), &b, &err));
    expect_same_bits(&plain, &out, "attention", "a longer cache, head_dim %d", d);
    expect_same_bits(&plain_lse, &lse, "attention lse", "a longer cache, head_dim %d", d);

    operand parts = op_poison(RF_DTYPE_BF16, num);
    b.kv_len = KV;
    b.lse = NULL;
    for (int part = 0; part < 2; part++) {
        const int first = part ? CUT : 0;
        b.q_len = part ? Q - CUT : CUT;
        b.q_pos_offset = FROM + first;
        b.q = (const char *)q.dev + (size_t)first * H * (size_t)d * 2;
        b.out = (char *)parts.dev + (size_t)first * H * (size_t)d * 2;
        expect_ok(test_ops()->attention(test_stream(), &b, &err));
    }
    expect_same_bits(&plain, &parts, "attention", "in two chunks, head_dim %d", d);
}
END_TEST

START_TEST(listed_keys_equal_packed_keys) {
    rf_dtype dtype = test_dtype(_i);
    enum { Q = 48, KV = 128, D = 72 };
    operand q = op_normal(dtype, Q * D, 0, 1), k = op_normal(dtype, KV * D, 0, 1), v = op_normal(dtype, KV * D, 0, 1);
    operand a_out = op_poison(dtype, Q * D), b_out = op_poison(dtype, Q * D);
    int32_t rows[KV];
    for (int j = 0; j < KV; j++) rows[j] = j;
    rf_attention_args a = rf_attention_args_packed(dtype, 1, Q, 1, D, NULL, NULL);
    a.q_row_stride = a.kv_row_stride = a.out_row_stride = D;
    a.kv_len = KV;
    a.q = q.dev;
    a.k = k.dev;
    a.v = v.dev;
    a.out = a_out.dev;
    a.kernel = test_is_cuda() && dtype == RF_DTYPE_BF16 ? RF_ATTENTION_MMA : RF_ATTENTION_AUTO;
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    a.out = b_out.dev;
    a.kv_rows = dev_i32(rows, KV);
    size_t need = test_ops()->attention_workspace(test_backend(), &a);
    if (need > a.workspace_bytes) {
        a.workspace_bytes = need;
        a.workspace = dev_bytes(need);
    }
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    if (test_is_cuda() && dtype == RF_DTYPE_BF16) { /* lists run in other tiles: another order of sums, one rounding */
        op_download(&a_out);
        double *want = host_doubles(Q * D);
        for (int i = 0; i < Q * D; i++) want[i] = a_out.host[i];
        expect_close(&b_out, want, dtype_bound(dtype), "attention", "identity list");
    } else {
        expect_same_bits(&a_out, &b_out, "attention", "identity list");
    }
}
END_TEST

/* ---- merge ---- */

/* Attention over keys [begin, end) into out and lse. */
static void attend_range(rf_attention_args a, operand *out, operand *lse, int32_t begin, int32_t end) {
    a.num_ranges = 1;
    a.ranges[0] = (rf_key_range){begin, end};
    a.out = out->dev;
    a.lse = lse->dev;
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
}

START_TEST(merge_of_two_parts_equals_the_whole) {
    rf_dtype dtype = test_dtype(_i);
    enum { Q = 37, KV = 150, H = 3, D = 72 };
    const int cuts[] = {0, 1, 63, 64, 149, 150, 50 + (int)(49 * 0.5)};
    operand q = op_normal(dtype, Q * H * D, 0, 2), k = op_normal(dtype, KV * H * D, 0, 1);
    operand v = op_normal(dtype, KV * H * D, 0, 1);
    rf_attention_args a = rf_attention_args_packed(dtype, 1, Q, H, D, NULL, NULL);
    a.q_row_stride = a.kv_row_stride = H * D;
    a.kv_len = KV;
    a.q = q.dev;
    a.k = k.dev;
    a.v = v.dev;
    operand whole = op_poison(dtype, Q * H * D), whole_lse = op_poison(RF_DTYPE_F32, H * Q);
    attend_range(a, &whole, &whole_lse, 0, KV);
    op_download(&whole);
    op_download(&whole_lse);
    double want[Q * H * D], want_lse[H * Q];
    for (int i = 0; i < Q * H * D; i++) want[i] = whole.host[i];
    for (int i = 0; i < H * Q; i++) want_lse[i] = whole_lse.host[i];
    for (size_t i = 0; i < sizeof cuts / sizeof cuts[0]; i++) {
        operand out[2], lse[2];
        for (int side = 0; side < 2; side++) {
            out[side] = op_poison(dtype, Q * H * D);
            lse[side] = op_poison(RF_DTYPE_F32, H * Q);
        }
        attend_range(a, &out[0], &lse[0], 0, cuts[i]);
        attend_range(a, &out[1], &lse[1], cuts[i], KV);
        /* An empty side's values are not looked at. */
        if (cuts[i] == 0) out[0] = op_poison(dtype, Q * H * D);
        if (cuts[i] == KV) out[1] = op_poison(dtype, Q * H * D);
        operand merged = op_poison(dtype, Q * H * D), merged_lse = op_poison(RF_DTYPE_F32, H * Q);
        rf_attention_merge_args m = {.out_a = out[0].dev,
                                     .out_b = out[1].dev,
                                     .lse_a = lse[0].dev,
                                     .lse_b = lse[1].dev,
                                     .out = merged.dev,
                                     .lse = merged_lse.dev,
                                     .out_a_dtype = dtype,
                                     .dtype = dtype,
                                     .rows = Q,
                                     .num_heads = H,
                                     .head_dim = D};
        expect_ok(test_ops()->attention_merge(test_stream(), &m, &err));
        /* Three roundings to dtype in place of one. */
        expect_close(&merged, want, 2 * dtype_bound(dtype), "attention_merge", "cut at %d of %d", cuts[i], KV);
        expect_abs(&merged_lse, want_lse, dtype == RF_DTYPE_F32 ? 1e-5 : 1e-3, "attention_merge lse", "cut at %d",
                   cuts[i]);
        if (cuts[i] != 64) continue;
        /* In place, and without LSE. */
        m.out = out[0].dev;
        m.lse = lse[0].dev;
        expect_ok(test_ops()->attention_merge(test_stream(), &m, &err));
        expect_same_bits(&out[0], &merged, "attention_merge", "in place");
        expect_same_bits(&lse[0], &merged_lse, "attention_merge lse", "in place");
    }
}
END_TEST

START_TEST(merge_matches_double_with_empty_sides_and_f32_cache) {
    rf_dtype dtype = test_dtype(_i);
    enum { R = 19, H = 5, D = 80 };
    operand a = op_normal(RF_DTYPE_F32, R * H * D, 0, 1), b = op_normal(dtype, R * H * D, 0, 1);
    operand la = op_normal(RF_DTYPE_F32, H * R, 0, 3), lb = op_normal(RF_DTYPE_F32, H * R, 0, 3);
    for (int i = 0; i < H * R; i++) {
        if (i % 7 == 1 || i % 7 == 3) la.host[i] = -INFINITY;
        if (i % 7 == 2 || i % 7 == 3) lb.host[i] = -INFINITY;
        if (i % 7 == 4) la.host[i] = 20000; /* a difference that only the maximum makes harmless */
    }
    op_upload(&la);
    op_upload(&lb);
    operand out = op_poison(dtype, R * H * D), lse = op_poison(RF_DTYPE_F32, H * R);
    rf_attention_merge_args m = {.out_a = a.dev,
                                 .out_b = b.dev,
                                 .lse_a = la.dev,
                                 .lse_b = lb.dev,
                                 .out = out.dev,
                                 .lse = lse.dev,
                                 .out_a_dtype = RF_DTYPE_F32,
                                 .dtype = dtype,
                                 .rows = R,
                                 .num_heads = H,
                                 .head_dim = D};
    expect_ok(test_ops()->attention_merge(NULL, &m, &err));
    expect_ok(test_ops()->attention_merge(test_stream(), &m, &err));
    double *want = host_doubles(out.num), *want_lse = host_doubles(lse.num);
    for (int h = 0; h < H; h++) {
        for (int r = 0; r < R; r++) {
            double x = la.host[h * R + r], y = lb.host[h * R + r], top = fmax(x, y);
            double wa = x == -INFINITY ? 0 : exp(x - top), wb = y == -INFINITY ? 0 : exp(y - top);
            want_lse[h * R + r] = wa + wb > 0 ? top + log(wa + wb) : -INFINITY;
            for (int e = 0; e < D; e++) {
                int at = (r * H + h) * D + e;
                want[at] = wa + wb > 0 ? (wa * (double)a.host[at] + wb * (double)b.host[at]) / (wa + wb) : 0;
            }
        }
    }
    expect_close(&out, want, dtype_bound(dtype), "attention_merge", "empty sides, f32 cache");
    expect_abs(&lse, want_lse, 2e-3, "attention_merge lse", "values up to 20000");
    m.lse = NULL;
    expect_ok(test_ops()->attention_merge(test_stream(), &m, &err));
}
END_TEST

/* Side a out of a plane of slots, side b in f32: the joined attention in two steps, with one rounding. */
START_TEST(merge_takes_slots) {
    rf_dtype dtype = test_dtype(_i);
    enum { R = 21, H = 3, D = 64, S = 50 };
    operand a = op_normal(RF_DTYPE_F32, S * H * D, 0, 1), b = op_normal(RF_DTYPE_F32, R * H * D, 0, 1);
    operand la = op_normal(RF_DTYPE_F32, H * S, 0, 2), lb = op_normal(RF_DTYPE_F32, H * R, 0, 2);
    int32_t slots[S];
    random_permutation(slots, S, 9);
    for (int i = 0; i < H * S; i += 4) la.host[i] = -INFINITY;
    for (int i = 0; i < H * R; i += 6) lb.host[i] = -INFINITY;
    op_upload(&la);
    op_upload(&lb);
    for (int half = 0; half < 2; half++) { /* b in f32, then in dtype */
        operand b_side = half ? op_poison(dtype, R * H * D) : b;
        if (half) {
            memcpy(b_side.host, b.host, R * H * D * sizeof(float));
            op_upload(&b_side);
            op_download(&b_side); /* rounded */
        }
        operand out = op_poison(dtype, R * H * D), lse = op_poison(RF_DTYPE_F32, H * R);
        rf_attention_merge_args m = {.out_a = a.dev,
                                     .out_b = b_side.dev,
                                     .lse_a = la.dev,
                                     .lse_b = lb.dev,
                                     .out = out.dev,
                                     .lse = lse.dev,
                                     .out_a_dtype = RF_DTYPE_F32,
                                     .dtype = dtype,
                                     .out_b_is_f32 = !half,
                                     .rows = R,
                                     .num_heads = H,
                                     .head_dim = D,
                                     .slots = dev_i32(slots, R),
                                     .num_slots = S};
        expect_ok(test_ops()->attention_merge(NULL, &m, &err));
        expect_ok(test_ops()->attention_merge(test_stream(), &m, &err));
        double *want = host_doubles(out.num), *want_lse = host_doubles(lse.num);
        for (int h = 0; h < H; h++) {
            for (int r = 0; r < R; r++) {
                double x = la.host[h * S + slots[r]], y = lb.host[h * R + r], top = fmax(x, y);
                double wa = isinf(x) ? 0 : exp(x - top), wb = isinf(y) ? 0 : exp(y - top);
                want_lse[h * R + r] = wa + wb > 0 ? top + log(wa + wb) : -INFINITY;
                for (int e = 0; e < D; e++)
                    want[(r * H + h) * D + e] = wa + wb > 0 ? (wa * (double)a.host[(slots[r] * H + h) * D + e] +
                                                               wb * (double)b_side.host[(r * H + h) * D + e]) /
                                                                  (wa + wb)
                                                            : 0;
            }
        }
        expect_close(&out, want, dtype_bound(dtype), "attention_merge", "slots, b %s", half ? "in dtype" : "f32");
        expect_abs(&lse, want_lse, 1e-5, "attention_merge lse", "slots");
        m.out = (void *)m.out_a;
        if (dtype == RF_DTYPE_F32) expect_status(test_ops()->attention_merge(test_stream(), &m, &err), RF_ERR_ARGUMENT);
        m.out = out.dev;
        m.num_slots = 0;
        expect_status(test_ops()->attention_merge(NULL, &m, &err), RF_ERR_SHAPE);
    }
}
END_TEST

/* FlashBlock: outside attention kept in slots, then the inside joined with it, is attention over everything; a row that is not
 * fresh keeps what its slot held. */
START_TEST(kept_outside_attention_joins_the_inside) {
    rf_dtype dtype = test_dtype(_i);
    enum { HQ = 8, HKV = 2, D = 128, B = 32, KV = 1200, FROM = 1100, SLOTS = B + 1 };
    operand q = op_normal(dtype, B * HQ * D, 0, 1), k = op_normal(dtype, KV * HKV * D, 0, 1);
    operand v = op_normal(dtype, KV * HKV * D, 0.3, 1);
    operand whole = op_poison(dtype, B * HQ * D), whole_lse = op_poison(RF_DTYPE_F32, HQ * B);
    operand kept = op_poison(RF_DTYPE_F32, SLOTS * HQ * D), kept_lse = op_poison(RF_DTYPE_F32, HQ * SLOTS);
    operand out = op_poison(dtype, B * HQ * D), lse = op_poison(RF_DTYPE_F32, HQ * B);
    int32_t slots[B], odd[B / 2], odd_slots[B / 2], even[B / 2], even_slots[B / 2];
    for (int i = 0; i < B; i++) slots[i] = (i * 7 + 3) % B;
    for (int i = 0; i < B / 2; i++) {
        even[i] = 2 * i;
        odd[i] = 2 * i + 1;
        even_slots[i] = slots[2 * i];
        odd_slots[i] = slots[2 * i + 1];
    }
    rf_attention_args a = rf_attention_args_packed(dtype, 1, B, HQ, D, NULL, whole.dev);
    a.num_kv_heads = HKV;
    a.q = q.dev;
    a.k = k.dev;
    a.v = v.dev;
    a.kv_len = KV;
    a.q_row_stride = HQ * D;
    a.kv_row_stride = HKV * D;
    a.lse = whole_lse.dev;
    a.workspace_bytes = test_ops()->attention_workspace(test_backend(), &a);
    a.workspace = dev_bytes(a.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    for (int part = 0; part < 2; part++) { /* two passes with half of the rows fresh in each */
        rf_attention_args x = a;
        x.q_len = B / 2;
        x.q_rows = dev_i32(part ? odd : even, B / 2);
        x.out = kept.dev;
        x.lse = kept_lse.dev;
        x.out_is_f32 = true;
        x.out_rows = dev_i32(part ? odd_slots : even_slots, B / 2);
        x.lse_slots = SLOTS;
        x.num_ranges = 1;
        x.ranges[0] = (rf_key_range){0, FROM};
        x.workspace_bytes = test_ops()->attention_workspace(test_backend(), &x);
        x.workspace = dev_bytes(x.workspace_bytes);
        expect_ok(test_ops()->attention(test_stream(), &x, &err));
    }
    rf_attention_args y = a;
    y.out = out.dev;
    y.lse = lse.dev;
    y.num_ranges = 1;
    y.ranges[0] = (rf_key_range){FROM, KV};
    y.join_out = kept.dev;
    y.join_lse = kept_lse.dev;
    y.join_rows = dev_i32(slots, B);
    y.join_slots = SLOTS;
    y.workspace_bytes = test_ops()->attention_workspace(test_backend(), &y);
    y.workspace = dev_bytes(y.workspace_bytes);
    expect_ok(test_ops()->attention(test_stream(), &y, &err));
    op_download(&whole);
    op_download(&whole_lse);
    double *want = host_doubles(whole.num), *want_lse = host_doubles(whole_lse.num);
    for (size_t i = 0; i < whole.num; i++) want[i] = whole.host[i];
    for (size_t i = 0; i < whole_lse.num; i++) want_lse[i] = whole_lse.host[i];
    expect_close(&out, want, dtype_bound(dtype), "attention", "kept outside, joined inside");
    expect_abs(&lse, want_lse, dtype == RF_DTYPE_F32 ? 1e-5 : 1e-3, "attention lse", "kept outside, joined inside");
    op_download(&kept_lse);
    for (int h = 0; h < HQ; h++) ck_assert(isnan(kept_lse.host[h * SLOTS + B])); /* nobody's slot */

    /* The same bits every time, whatever the workspace held. */
    operand again = op_poison(dtype, B * HQ * D);
    a.out = again.dev;
    a.lse = NULL;
    a.workspace = dev_bytes(a.workspace_bytes);
    for (int run = 0; run < 5; run++) {
        expect_ok(test_ops()->attention(test_stream(), &a, &err));
        expect_same_bits(&again, &whole, "attention", "again");
    }
}
END_TEST

/* ---- softmax ---- */

START_TEST(softmax_matches_double) {
    rf_dtype dtype = test_dtype(_i);
    const int shapes[][2] = {{1, 1}, {3, 2}, {5, 31}, {64, 64}, {7, 257}, {16, 1024}, {9, 4096}, {2, 5000}};
    const double stds[] = {1, 100};
    for (size_t i = 0; i < sizeof shapes / sizeof shapes[0]; i++) {
        for (int large = 0; large < 2; large++) {
            int rows = shapes[i][0], cols = shapes[i][1];
            size_t num = (size_t)rows * (size_t)cols;
            operand x = op_normal(RF_DTYPE_F32, num, 0, stds[large]), y = op_poison(dtype, num);
            rf_softmax_args a = {.x = x.dev,
                                 .y = y.dev,
                                 .x_dtype = RF_DTYPE_F32,
                                 .y_dtype = dtype,
                                 .rows = rows,
                                 .cols = cols,
                                 .scale = 0.7f};
            expect_ok(test_ops()->softmax(NULL, &a, &err));
            expect_ok(test_ops()->softmax(test_stream(), &a, &err));
            double *want = host_doubles(num);
            for (int r = 0; r < rows; r++) {
                double top = -INFINITY, sum = 0;
                for (int c = 0; c < cols; c++) top = fmax(top, (double)0.7f * (double)x.host[r * cols + c]);
                for (int c = 0; c < cols; c++)
                    sum += want[r * cols + c] = exp((double)0.7f * (double)x.host[r * cols + c] - top);
                for (int c = 0; c < cols; c++) want[r * cols + c] /= sum;
            }
            expect_close(&y, want, dtype_bound(dtype) + (large ? 1e-5 : 0), "softmax", "%d x %d std %g", rows, cols,
                         stds[large]);
            if (dtype != RF_DTYPE_F32) continue;
            a.y = x.dev; /* in place */
            expect_ok(test_ops()->softmax(test_stream(), &a, &err));
            expect_same_bits(&x, &y, "softmax", "%d x %d in place", rows, cols);
        }
    }
}
END_TEST

/* ---- arguments ---- */

START_TEST(bad_arguments_are_refused_at_plan_time) {
    const rf_ops *ops = test_ops();
    rf_attention_args good = rf_attention_args_packed(test_dtype(_i), 2, 64, 4, 64, NULL, NULL);
    const void *some = (const void *)64;
    expect_ok(ops->attention(NULL, &good, &err));
#define REFUSED(change, status)                                                                                        \
    do {                                                                                                               \
        rf_attention_args a = good;                                                                                    \
        change;                                                                                                        \
        expect_status(ops->attention(NULL, &a, &err), status);                                                         \
    } while (0)
    REFUSED(a.num_kv_heads = 3, RF_ERR_SHAPE);
    REFUSED(a.num_q_heads = 0, RF_ERR_SHAPE);
    REFUSED(a.num_kv_heads = 0, RF_ERR_SHAPE);
    REFUSED(a.head_dim = 0, RF_ERR_SHAPE);
    REFUSED(a.head_dim = -64, RF_ERR_SHAPE);
    REFUSED(a.batch = -1, RF_ERR_SHAPE);
    REFUSED(a.q_len = -1, RF_ERR_SHAPE);
    REFUSED(a.kv_len = (int64_t)1 << 33, RF_ERR_SHAPE);
    REFUSED(a.q_row_stride = 8, RF_ERR_SHAPE);
    REFUSED(a.kv_row_stride = 0, RF_ERR_SHAPE);
    REFUSED(a.kv_head_stride = -64, RF_ERR_SHAPE);
    REFUSED(a.out_row_stride = 0, RF_ERR_SHAPE);
    REFUSED(a.out_head_stride = 0, RF_ERR_SHAPE);
    REFUSED(a.out_batch_stride = 0, RF_ERR_SHAPE);
    REFUSED(a.q_batch_stride = -8, RF_ERR_SHAPE);
    REFUSED((a.num_ranges = 1, a.ranges[0] = (rf_key_range){5, 65}), RF_ERR_SHAPE);
    REFUSED((a.num_ranges = 1, a.ranges[0] = (rf_key_range){5, 4}), RF_ERR_SHAPE);
    REFUSED((a.num_ranges = 1, a.ranges[0] = (rf_key_range){-1, 4}), RF_ERR_SHAPE);
    REFUSED((a.num_ranges = 2, a.ranges[0] = (rf_key_range){5, 20}, a.ranges[1] = (rf_key_range){19, 30}),
            RF_ERR_SHAPE);
    REFUSED(a.num_ranges = 5, RF_ERR_ARGUMENT);
    REFUSED(a.num_ranges = -1, RF_ERR_ARGUMENT);
    REFUSED((a.num_ranges = 1, a.ranges[0] = (rf_key_range){0, 4}, a.kv_rows = some), RF_ERR_ARGUMENT);
    REFUSED((a.num_ranges = 1, a.ranges[0] = (rf_key_range){0, 4}, a.kv_lens = some), RF_ERR_ARGUMENT);
    REFUSED(a.mask = (rf_mask)5, RF_ERR_ARGUMENT);
    REFUSED(a.mask = RF_MASK_BLOCK_CAUSAL, RF_ERR_ARGUMENT);
    REFUSED((a.mask = RF_MASK_CAUSAL, a.q_pos_offset = -1), RF_ERR_ARGUMENT);
    REFUSED(a.softmax_scale = NAN, RF_ERR_ARGUMENT);
    REFUSED(a.kernel = (rf_attention_kernel)7, RF_ERR_ARGUMENT);
    float plane[4];
    REFUSED((a.out_rows = some, a.lse = plane), RF_ERR_SHAPE);
    REFUSED(a.lse_slots = 65, RF_ERR_ARGUMENT);
    REFUSED(a.lse_slots = -1, RF_ERR_SHAPE);
    REFUSED(a.join_rows = some, RF_ERR_ARGUMENT);
    REFUSED((a.join_out = plane, a.join_rows = some, a.join_slots = 9), RF_ERR_ARGUMENT);
    REFUSED((a.join_lse = plane, a.join_rows = some, a.join_slots = 9), RF_ERR_ARGUMENT);
    REFUSED((a.join_out = plane, a.join_lse = plane, a.join_slots = 128), RF_ERR_ARGUMENT); /* two samples, one list */
    REFUSED((a.join_out = plane, a.join_lse = plane, a.join_rows = some), RF_ERR_SHAPE);
    REFUSED((a.batch = 1, a.join_out = plane, a.join_lse = plane, a.join_slots = 63), RF_ERR_SHAPE);
    REFUSED(a.dtype = RF_DTYPE_F16, RF_ERR_DTYPE);
    REFUSED(a.dtype = RF_DTYPE_I64, RF_ERR_DTYPE);
    if (!test_is_cuda()) {
        REFUSED(a.dtype = RF_DTYPE_BF16, RF_ERR_DTYPE);
        REFUSED(a.kernel = RF_ATTENTION_MMA, RF_ERR_UNSUPPORTED);
        REFUSED(a.kernel = RF_ATTENTION_WGMMA, RF_ERR_UNSUPPORTED);
        REFUSED(a.kernel = RF_ATTENTION_DECODE, RF_ERR_UNSUPPORTED);
    } else if (test_dtype(_i) == RF_DTYPE_BF16) {
        REFUSED((a.kernel = RF_ATTENTION_WGMMA, a.kv_rows = some), RF_ERR_UNSUPPORTED);
        REFUSED((a.kernel = RF_ATTENTION_WGMMA, a.q_rows = some), RF_ERR_UNSUPPORTED);
        REFUSED((a.kernel = RF_ATTENTION_WGMMA, a.num_ranges = 2, a.ranges[0] = (rf_key_range){0, 5},
                 a.ranges[1] = (rf_key_range){9, 20}),
                RF_ERR_UNSUPPORTED);
    }
#undef REFUSED
    expect_status(ops->attention(NULL, NULL, &err), RF_ERR_ARGUMENT);

    rf_attention_merge_args m = {
        .out_a_dtype = test_dtype(_i), .dtype = test_dtype(_i), .rows = 4, .num_heads = 2, .head_dim = 64};
    expect_ok(ops->attention_merge(NULL, &m, &err));
    m.rows = -1;
    expect_status(ops->attention_merge(NULL, &m, &err), RF_ERR_SHAPE);
    m.rows = 4;
    m.num_heads = 0;
    expect_status(ops->attention_merge(NULL, &m, &err), RF_ERR_SHAPE);
    m.num_heads = 2;
    m.out_a_dtype = RF_DTYPE_F16;
    expect_status(ops->attention_merge(NULL, &m, &err), RF_ERR_DTYPE);
    m.out_a_dtype = m.dtype = RF_DTYPE_U8;
    expect_status(ops->attention_merge(NULL, &m, &err), RF_ERR_DTYPE);

    rf_softmax_args s = {.x_dtype = RF_DTYPE_F32, .y_dtype = test_dtype(_i), .rows = 4, .cols = 8, .scale = 1};
    expect_ok(ops->softmax(NULL, &s, &err));
    s.cols = 0;
    expect_status(ops->softmax(NULL, &s, &err), RF_ERR_SHAPE);
    s.cols = 8;
    s.x_dtype = RF_DTYPE_BF16;
    expect_status(ops->softmax(NULL, &s, &err), RF_ERR_DTYPE);
    s.x_dtype = RF_DTYPE_F32;
    s.y_dtype = RF_DTYPE_I32;
    expect_status(ops->softmax(NULL, &s, &err), RF_ERR_DTYPE);
    s.y_dtype = test_dtype(_i);
    s.scale = NAN;
    expect_status(ops->softmax(NULL, &s, &err), RF_ERR_ARGUMENT);
}
END_TEST

START_TEST(a_small_workspace_is_refused) {
    rf_dtype dtype = test_dtype(_i);
    operand q = op_normal(dtype, 2 * 4096 * 64, 0, 1), out = op_poison(dtype, 64);
    rf_attention_args a = rf_attention_args_packed(dtype, 1, 1, 1, 64, NULL, out.dev);
    a.q = q.dev;
    a.k = q.dev;
    a.v = q.dev;
    a.kv_len = 4096;
    a.kv_row_stride = 64;
    size_t need = test_ops()->attention_workspace(test_backend(), &a);
    if (need == 0) return; /* this backend does without */
    /* the decode kernel joins the parts of this shape in shared memory; the size asked for serves all kernels */
    if (rf_backend_get_kind(test_backend()) == RF_BACKEND_CUDA && dtype == RF_DTYPE_BF16) a.kernel = RF_ATTENTION_MMA;
    a.workspace = dev_bytes(need);
    a.workspace_bytes = need - 1;
    expect_status(test_ops()->attention(test_stream(), &a, &err), RF_ERR_WORKSPACE);
    a.workspace_bytes = need;
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    a.workspace = NULL;
    expect_status(test_ops()->attention(test_stream(), &a, &err), RF_ERR_WORKSPACE);
}
END_TEST

START_TEST(no_queries_is_nothing_to_do) {
    rf_attention_args a = rf_attention_args_packed(test_dtype(_i), 0, 64, 4, 64, NULL, NULL);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
    a = rf_attention_args_packed(test_dtype(_i), 2, 0, 4, 64, NULL, NULL);
    expect_ok(test_ops()->attention(test_stream(), &a, &err));
}
END_TEST

int main(void) {
    int rc = open_test_device();
    if (rc) return rc;
    Suite *suite = suite_create("attention");
    TCase *tc = kernel_tcase(suite, "values");
    tcase_add_loop_test(tc, matches_double, 0, NUM_CASES);
    if (test_is_cuda()) {
        tcase_add_loop_test(tc, matches_double_in_bf16, 0, NUM_CASES);
        tcase_add_loop_test(tc, mma_kernel_matches_double, 0, NUM_CASES);
        tcase_add_loop_test(tc, wgmma_kernel_matches_double, 0, NUM_CASES);
        tcase_add_loop_test(tc, decode_kernel_matches_double, 0, NUM_CASES);
        tcase_add_loop_test(tc, wgmma_rows_keep_their_bits, 0, 2);
    }
    add_for_dtypes(tc, packed_rows_match_double);
    add_for_dtypes(tc, unseen_keys_may_hold_anything);
    add_for_dtypes(tc, unseen_keys_may_hold_anything_with_a_tail);
    add_for_dtypes(tc, unseen_keys_may_hold_anything_in_wide_heads);
    add_for_dtypes(tc, listed_keys_equal_packed_keys);
    tc = kernel_tcase(suite, "merge and softmax");
    add_for_dtypes(tc, merge_of_two_parts_equals_the_whole);
    add_for_dtypes(tc, merge_matches_double_with_empty_sides_and_f32_cache);
    add_for_dtypes(tc, merge_takes_slots);
    add_for_dtypes(tc, kept_outside_attention_joins_the_inside);
    add_for_dtypes(tc, softmax_matches_double);
    tc = kernel_tcase(suite, "arguments");
    add_for_dtypes(tc, bad_arguments_are_refused_at_plan_time);
    add_for_dtypes(tc, a_small_workspace_is_refused);
    add_for_dtypes(tc, no_queries_is_nothing_to_do);
    return run_kernel_suite(suite);
}

/* kernels/kvq_cpu.c
 * Maths      the operators of kvq.h in f32. Attention takes scales and zeros out of the inner products: keys by channel meet
 *            queries that are multiplied by a block's scales, q.zero once a block; keys and values by token are unpacked row by row
 *            for HEADS heads at a time.
 * Attention  a task is a unit and CHUNK tokens: all logits, then p, then the values. Parts (max, sum, row) of chunks meet in the
 *            workspace in order of tokens.
 * Memory     a task keeps its tiles on the stack (50 KiB). */
#include "kernels/cpu.h"
#include "kernels/kv_cpu.h"
#include "kernels/kvq_checks.h"

enum { BLOCK = RF_KVQ_BLOCK, CHUNK = 512, HEADS = 8, MAX_DIM = RF_KVQ_MAX_HEAD_DIM };

static size_t round_up(size_t bytes) {
    return (bytes + RF_KVQ_ALIGNMENT - 1) / RF_KVQ_ALIGNMENT * RF_KVQ_ALIGNMENT;
}

static size_t blocks_for(int64_t tokens) {
    return (size_t)rf_div_up(tokens, BLOCK);
}

size_t rf_kvq_codes_bytes(const rf_kvq_store *s, int64_t tokens) {
    const size_t dim = (size_t)s->head_dim, num = (size_t)tokens;
    if (tokens <= 0 || s->head_dim <= 0) return 0;
    if (s->format == RF_KVQ_FP8) return round_up(num * dim);
    if (s->format == RF_KVQ_DIRECTION) return round_up(num * dim * rf_dtype_bytes(s->dtype));
    return round_up((s->keys_by_channel ? blocks_for(tokens) * BLOCK : num) * dim * (size_t)s->bits / 8);
}

size_t rf_kvq_scales_bytes(const rf_kvq_store *s, int64_t tokens) {
    const size_t pair = 2 * sizeof(uint16_t), num = (size_t)tokens;
    if (tokens <= 0 || s->head_dim <= 0) return 0;
    if (s->format != RF_KVQ_INT) return round_up(num * sizeof(float));
    const size_t by_token = num * (size_t)(s->head_dim / (s->group > 0 ? s->group : s->head_dim)) * pair;
    const size_t by_channel = s->keys_by_channel ? blocks_for(tokens) * (size_t)s->head_dim * pair : 0;
    return round_up(by_channel > by_token ? by_channel : by_token);
}

/* --- e4m3 and codes ------------------------------------------------------------------------------------------------------- */

RF_INLINE uint8_t to_e4m3(float x) {
    uint32_t bits, sign;
    memcpy(&bits, &x, sizeof bits);
    sign = bits >> 24 & 0x80;
    bits &= 0x7fffffff;
    if (bits > 0x7f800000) return (uint8_t)(sign | 0x7f);
    if (bits < 0x3c800000) { /* below 2^-6: steps of 2^-9 */
        float y;
        memcpy(&y, &bits, sizeof y);
        return (uint8_t)(sign | (uint32_t)rintf(y * 512.0f));
    }
    const uint32_t code = ((bits + 0x7ffff + (bits >> 20 & 1)) >> 20) - (120 << 3);
    return (uint8_t)(sign | (code > 0x7e ? 0x7e : code));
}

RF_INLINE float from_e4m3(uint8_t code) {
    const uint32_t bits = (uint32_t)(code & 0x80) << 24 | (uint32_t)(code & 0x7f) << 20;
    float x;
    memcpy(&x, &bits, sizeof x);
    return x * 0x1p120f;
}

typedef struct {
    uint16_t scale, zero; /* IEEE half */
} range;

static uint16_t to_half(float x) {
    return rf_f32_to_f16(fminf(fmaxf(x, -65504.0f), 65504.0f));
}

static range range_of(float least, float most, int bits) {
    return (range){to_half((most - least) / (float)((1 << bits) - 1)), to_half(least)};
}

/* Codes as numbers, low bits first; num a multiple of 16. */
RF_INLINE void expand_body(float *restrict out, const uint8_t *codes, int64_t num, int bits) {
    const int each = 32 / bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t w = 0; w < num / each; w++) {
        uint32_t word;
        memcpy(&word, codes + 4 * w, sizeof word);
        for (int i = 0; i < each; i++) out[w * each + i] = (float)(int32_t)(word >> (i * bits) & mask);
    }
}

RF_INLINE void expand(float *restrict out, const uint8_t *codes, int64_t num, int bits) {
    switch (bits) {
    case 2: expand_body(out, codes, num, 2); break;
    case 4: expand_body(out, codes, num, 4); break;
    default: expand_body(out, codes, num, 8); break;
    }
}

/* --- rows ------------------------------------------------------------------------------------------------------------------ */

/* One of a store's two planes, of one unit. */
typedef struct {
    const rf_kvq_store *store;
    uint8_t *codes;
    void *scales;
    const float *factor; /* or NULL */
    bool by_channel;
} plane;

static plane plane_of(const rf_kvq_store *s, int64_t unit, bool is_value) {
    const float *factor = is_value ? s->v_factor : s->k_factor;
    return (plane){.store = s,
                   .codes = (uint8_t *)(is_value ? s->v_codes : s->k_codes) + unit * s->codes_stride,
                   .scales = (char *)(is_value ? s->v_scales : s->k_scales) + unit * s->scales_stride,
                   .factor = factor ? factor + unit * s->head_dim : NULL,
                   .by_channel = !is_value && s->format == RF_KVQ_INT && s->keys_by_channel};
}

/* Row of a token of a plane that is not by channel, without the factor. */
RF_HOT static void row_by_token(float *restrict row, const plane *p, int64_t token) {
    const rf_kvq_store *s = p->store;
    const int64_t dim = s->head_dim;
    if (s->format == RF_KVQ_INT) {
        const range *ranges = (const range *)p->scales + token * (dim / s->group);
        expand(row, p->codes + token * dim * s->bits / 8, dim, s->bits);
        for (int64_t c = 0; c < dim; c += s->group, ranges++) {
            const float scale = rf_f16_to_f32(ranges->scale), zero = rf_f16_to_f32(ranges->zero);
            for (int64_t i = c; i < c + s->group; i++) row[i] = zero + scale * row[i];
        }
        return;
    }
    const float scale = ((const float *)p->scales)[token];
    if (s->format == RF_KVQ_FP8) {
        const uint8_t *codes = p->codes + token * dim;
        for (int64_t c = 0; c < dim; c++) row[c] = scale * from_e4m3(codes[c]);
        return;
    }
    const float *x = (const float *)(const void *)p->codes + token * dim;
    for (int64_t c = 0; c < dim; c++) row[c] = scale * x[c];
}

static void block_ranges(float *scales, float *zeros, const plane *p, int64_t block) {
    const int64_t dim = p->store->head_dim;
    const range *ranges = (const range *)p->scales + block * dim;
    for (int64_t c = 0; c < dim; c++) {
        scales[c] = rf_f16_to_f32(ranges[c].scale);
        zeros[c] = rf_f16_to_f32(ranges[c].zero);
    }
}

/* --- pack and unpack ------------------------------------------------------------------------------------------------------ */

/* Bytes of `num` codes, a multiple of 8 of them, MAX_DIM at most. */
RF_HOT static void store_codes(uint8_t *out, const float *x, int64_t num, float scale, float zero, int bits) {
    const int each = 8 / bits;
    const float last = (float)((1 << bits) - 1);
    int32_t codes[MAX_DIM];
    for (int64_t i = 0; i < num; i++) {
        const float code = rintf((x[i] - zero) / scale), low = code > 0.0f ? code : 0.0f; /* NaN: 0 */
        codes[i] = scale != 0.0f ? (int32_t)(low < last ? low : last) : 0;
    }
    for (int64_t b = 0; b < num / each; b++) {
        int32_t byte = 0;
        for (int i = 0; i < each; i++) byte |= codes[b * each + i] << (i * bits);
        out[b] = (uint8_t)byte;
    }
}

static range range_over(const float *x, int64_t num, int bits) {
    float least = x[0], most = x[0];
    for (int64_t i = 1; i < num; i++) {
        least = x[i] < least ? x[i] : least;
        most = x[i] > most ? x[i] : most;
    }
    return range_of(least, most, bits);
}

static void pack_row(const plane *p, int64_t token, const float *x) {
    const rf_kvq_store *s = p->store;
    const int64_t dim = s->head_dim;
    float row[MAX_DIM];
    for (int64_t c = 0; c < dim; c++) row[c] = p->factor ? x[c] / p->factor[c] : x[c];
    if (s->format == RF_KVQ_FP8) {
        float most = 0.0f;
        for (int64_t c = 0; c < dim; c++) most = most != most || fabsf(row[c]) <= most ? most : fabsf(row[c]);
        const float scale = most / 448.0f;
        ((float *)p->scales)[token] = scale;
        uint8_t *out = p->codes + token * dim;
        for (int64_t c = 0; c < dim; c++) out[c] = scale == 0.0f ? 0 : to_e4m3(row[c] / scale);
        return;
    }
    range *ranges = (range *)p->scales + token * (dim / s->group);
    uint8_t *out = p->codes + token * dim * s->bits / 8;
    for (int64_t c = 0; c < dim; c += s->group, ranges++) {
        *ranges = range_over(row + c, s->group, s->bits);
        store_codes(out + c * s->bits / 8, row + c, s->group, rf_f16_to_f32(ranges->scale), rf_f16_to_f32(ranges->zero),
                    s->bits);
    }
}

/* Rows of a block; codes of tokens that are not there are 0. */
static void pack_block(const plane *p, int64_t block, const float *x, int64_t row_stride, const int32_t *from,
                       int64_t num) {
    const rf_kvq_store *s = p->store;
    range *ranges = (range *)p->scales + block * s->head_dim;
    uint8_t *out = p->codes + block * s->head_dim * 4 * s->bits;
    for (int64_t c = 0; c < s->head_dim; c++, out += 4 * s->bits) {
        float column[BLOCK];
        for (int64_t i = 0; i < num; i++) {
            const float value = x[from[i] * row_stride + c];
            column[i] = p->factor ? value / p->factor[c] : value;
        }
        ranges[c] = range_over(column, num, s->bits);
        const float scale = rf_f16_to_f32(ranges[c].scale), zero = rf_f16_to_f32(ranges[c].zero);
        for (int64_t i = num; i < BLOCK; i++) column[i] = zero;
        store_codes(out, column, BLOCK, scale, zero, s->bits);
    }
}

rf_status rf_kvq_pack_cpu(rf_stream *stream, const rf_kvq_pack_args *a, rf_error *err) {
    RF_TRY(rf_kvq_pack_check(a, err));
    RF_TRY(rf_check_f32("kvq_pack: dtype", a->store.dtype, err));
    if (!stream || a->units == 0 || a->most == 0) return RF_OK;
    const void *const needed[] = {a->k, a->v, a->from, a->first, a->counts};
    RF_TRY(rf_text_pointers("kvq_pack", needed, 5, err));
    RF_TRY(rf_kvq_store_pointers("kvq_pack", &a->store, err));
    rf_stream_note_launch(stream, "kvq_pack");
    const int64_t blocks = rf_div_up(a->most, BLOCK);
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->units * a->most * a->store.head_dim > RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->units * blocks; task++) {
        const int64_t unit = task / blocks, begin = task % blocks * BLOCK;
        const int64_t num = rf_min64(rf_min64(a->counts[unit], a->most) - begin, BLOCK);
        if (num <= 0) continue;
        const plane keys = plane_of(&a->store, unit, false), values = plane_of(&a->store, unit, true);
        const float *k = (const float *)a->k + unit * a->head_stride, *v = (const float *)a->v + unit * a->head_stride;
        const int32_t *from = a->from + unit * a->list_stride + begin;
        const int64_t token = a->first[unit] + begin;
        if (keys.by_channel) pack_block(&keys, token / BLOCK, k, a->row_stride, from, num);
        for (int64_t i = 0; i < num; i++) {
            if (!keys.by_channel) pack_row(&keys, token + i, k + from[i] * a->row_stride);
            pack_row(&values, token + i, v + from[i] * a->row_stride);
        }
    }
    return RF_OK;
}

/* Rows of num tokens of a block. */
static void unpack_block(float *out, const plane *p, int64_t block, int64_t num) {
    const rf_kvq_store *s = p->store;
    const int64_t dim = s->head_dim;
    if (!p->by_channel) {
        for (int64_t i = 0; i < num; i++) row_by_token(out + i * dim, p, block * BLOCK + i);
    } else {
        float scales[MAX_DIM], zeros[MAX_DIM], codes[BLOCK];
        block_ranges(scales, zeros, p, block);
        for (int64_t c = 0; c < dim; c++) {
            expand(codes, p->codes + (block * dim + c) * 4 * s->bits, BLOCK, s->bits);
            for (int64_t i = 0; i < num; i++) out[i * dim + c] = zeros[c] + scales[c] * codes[i];
        }
    }
    for (int64_t i = 0; i < num && p->factor; i++)
        for (int64_t c = 0; c < dim; c++) out[i * dim + c] *= p->factor[c];
}

rf_status rf_kvq_unpack_cpu(rf_stream *stream, const rf_kvq_unpack_args *a, rf_error *err) {
    RF_TRY(rf_kvq_unpack_check(a, err));
    RF_TRY(rf_check_f32("kvq_unpack: dtype", a->store.dtype, err));
    if (!stream || a->units == 0 || a->most == 0) return RF_OK;
    const void *const needed[] = {a->lens, a->k_out, a->v_out};
    RF_TRY(rf_text_pointers("kvq_unpack", needed, 3, err));
    RF_TRY(rf_kvq_store_pointers("kvq_unpack", &a->store, err));
    rf_stream_note_launch(stream, "kvq_unpack");
    const int64_t blocks = rf_div_up(a->most, BLOCK), dim = a->store.head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->units * a->most * dim > RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->units * blocks; task++) {
        const int64_t unit = task / blocks, block = task % blocks;
        const int64_t num = rf_min64(rf_min64(a->lens[unit], a->most) - block * BLOCK, BLOCK);
        if (num <= 0) continue;
        const plane keys = plane_of(&a->store, unit, false), values = plane_of(&a->store, unit, true);
        const int64_t to = (unit * a->out_stride + block * BLOCK) * dim;
        unpack_block((float *)a->k_out + to, &keys, block, num);
        unpack_block((float *)a->v_out + to, &values, block, num);
    }
    return RF_OK;
}

/* --- attention ------------------------------------------------------------------------------------------------------------ */

RF_INLINE float dot_body(const float *a, const float *b, int64_t num) {
    float sum[16] = {0}; /* fixed partial sums, whatever the width of the machine's vectors */
    for (int64_t i = 0; i < num; i += 16)
        for (int j = 0; j < 16; j++) sum[j] += a[i + j] * b[i + j];
    for (int half = 8; half > 0; half /= 2)
        for (int j = 0; j < half; j++) sum[j] += sum[j + half];
    return sum[0];
}

/* sums[h][0..31] += products of a block of keys by channel and q [num][dim], num a constant: the sums stay in registers. */
RF_INLINE void block_body(float (*restrict sums)[BLOCK], int num, const float *q, const uint8_t *codes,
                          const float *scales, int64_t dim, int bits) {
    for (int64_t c = 0; c < dim; c++) {
        float x[BLOCK];
        expand_body(x, codes + c * 4 * bits, BLOCK, bits);
        for (int h = 0; h < num; h++) {
            const float w = q[h * dim + c] * scales[c];
            for (int i = 0; i < BLOCK; i++) sums[h][i] += w * x[i];
        }
    }
}

RF_INLINE void block_heads(float (*restrict sums)[BLOCK], int num, const float *q, const uint8_t *codes,
                           const float *scales, int64_t dim, int bits) {
    switch (num) {
    case 1: block_body(sums, 1, q, codes, scales, dim, bits); break;
    case 2: block_body(sums, 2, q, codes, scales, dim, bits); break;
    case 3: block_body(sums, 3, q, codes, scales, dim, bits); break;
    default: block_body(sums, 4, q, codes, scales, dim, bits); break;
    }
}

/* logits[h][0..31] of a block of keys by channel; q [heads][dim]. */
RF_HOT static void block_logits(float *logits, const float *q, int64_t heads, const uint8_t *codes, const float *scales,
                                const float *zeros, int64_t dim, int bits) {
    for (int64_t first = 0; first < heads; first += 4) {
        float sums[4][BLOCK] = {{0}};
        const int num = (int)rf_min64(4, heads - first);
        const float *from = q + first * dim;
        switch (bits) {
        case 2: block_heads(sums, num, from, codes, scales, dim, 2); break;
        case 4: block_heads(sums, num, from, codes, scales, dim, 4); break;
        default: block_heads(sums, num, from, codes, scales, dim, 8); break;
        }
        for (int h = 0; h < num; h++) {
            const float base = dot_body(from + h * dim, zeros, dim);
            for (int i = 0; i < BLOCK; i++) logits[(first + h) * CHUNK + i] = base + sums[h][i];
        }
    }
}

RF_HOT static void row_logits(float *logits, const float *q, int64_t heads, const float *row, int64_t dim) {
    for (int64_t h = 0; h < heads; h++) logits[h * CHUNK] = dot_body(q + h * dim, row, dim);
}

/* probs[i] = exp(logits[i] - top) in place; their sum. num <= CHUNK. */
RF_HOT static float exponentials(float *x, int64_t num, float top) {
    double sum = 0;
    for (int64_t i = 0; i < num; i++) x[i] = rf_exp(x[i] - top);
    for (int64_t i = 0; i < num; i++) sum += (double)x[i];
    return (float)sum;
}

RF_HOT static void add_row(float *out, const float *probs, int64_t heads, const float *row, int64_t dim) {
    for (int64_t h = 0; h < heads; h++) {
        const float p = probs[h * CHUNK];
        float *restrict to = out + h * dim;
        for (int64_t c = 0; c < dim; c++) to[c] += p * row[c];
    }
}

/* A part of a head: max, sum of exp(logit - max), row not yet divided by it. */
static size_t part_floats(const rf_kvq_attention_args *a) {
    return (size_t)a->store.head_dim + 2;
}

static size_t part_bytes(const rf_kvq_attention_args *a) {
    return (size_t)a->units * (size_t)rf_div_up(a->most, CHUNK) * (size_t)a->group_heads * part_floats(a) *
           sizeof(float);
}

/* Heads first .. first + heads - 1 of a unit over tokens begin .. begin + num - 1; parts of these heads one behind the other. */
static void attend_chunk(const rf_kvq_attention_args *a, int64_t unit, int64_t first, int64_t heads, int64_t begin,
                         int64_t num, float *parts) {
    const int64_t dim = a->store.head_dim;
    const plane keys = plane_of(&a->store, unit, false), values = plane_of(&a->store, unit, true);
    float q[HEADS * MAX_DIM], logits[HEADS * CHUNK], row[MAX_DIM], zeros[MAX_DIM];
    const float *from = (const float *)a->q + (unit * a->group_heads + first) * dim;
    for (int64_t h = 0; h < heads; h++)
        for (int64_t c = 0; c < dim; c++)
            q[h * dim + c] = from[h * dim + c] * a->scale * (keys.factor ? keys.factor[c] : 1.0f);
    if (keys.by_channel) {
        for (int64_t i = 0; i < num; i += BLOCK) {
            const int64_t block = (begin + i) / BLOCK;
            block_ranges(row, zeros, &keys, block);
            block_logits(logits + i, q, heads, keys.codes + block * dim * 4 * a->store.bits, row, zeros, dim,
                         a->store.bits);
        }
    } else {
        for (int64_t i = 0; i < num; i++) {
            row_by_token(row, &keys, begin + i);
            row_logits(logits + i, q, heads, row, dim);
        }
    }
    const int64_t floats = (int64_t)part_floats(a);
    float *const out = q; /* the queries have been read */
    for (int64_t h = 0; h < heads; h++) {
        float *x = logits + h * CHUNK, top = -INFINITY;
        if (a->logits)
            memcpy(a->logits + (unit * a->group_heads + first + h) * a->logits_stride + begin, x,
                   (size_t)num * sizeof *x);
        for (int64_t i = 0; i < num; i++) top = x[i] > top ? x[i] : top;
        parts[h * floats] = top;
        parts[h * floats + 1] = exponentials(x, num, top);
    }
    memset(out, 0, (size_t)(heads * dim) * sizeof *out);
    for (int64_t i = 0; i < num; i++) {
        row_by_token(row, &values, begin + i);
        add_row(out, logits + i, heads, row, dim);
    }
    for (int64_t h = 0; h < heads; h++)
        for (int64_t c = 0; c < dim; c++)
            parts[h * floats + 2 + c] = out[h * dim + c] * (values.factor ? values.factor[c] : 1.0f);
}

/* Chunks of a head, `step` floats apart. */
RF_HOT static void join_parts(float *out, float *lse, const float *parts, int64_t num, int64_t step, int64_t dim) {
    float top = -INFINITY, sum = 0.0f;
    for (int64_t i = 0; i < num; i++) top = parts[i * step] > top ? parts[i * step] : top;
    for (int64_t c = 0; c < dim; c++) out[c] = 0.0f;
    *lse = -INFINITY;
    if (num == 0) return;
    for (int64_t i = 0; i < num; i++) {
        const float *part = parts + i * step, w = rf_exp(part[0] - top);
        sum += w * part[1];
        for (int64_t c = 0; c < dim; c++) out[c] += w * part[2 + c];
    }
    for (int64_t c = 0; c < dim; c++) out[c] /= sum;
    *lse = top + logf(sum);
}

size_t rf_kvq_attention_workspace_cpu(rf_backend *backend, const rf_kvq_attention_args *a) {
    return rf_kvq_attention_check(a, NULL) == RF_OK ? part_bytes(a) : 0;
}

rf_status rf_kvq_attention_cpu(rf_stream *stream, const rf_kvq_attention_args *a, rf_error *err) {
    RF_TRY(rf_kvq_attention_check(a, err));
    RF_TRY(rf_check_f32("kvq_attention: dtype", a->store.dtype, err));
    if (!stream || a->units == 0) return RF_OK;
    const void *const needed[] = {a->q, a->out, a->lse, a->lens};
    RF_TRY(rf_text_pointers("kvq_attention", needed, 4, err));
    if (a->most > 0) RF_TRY(rf_kvq_store_pointers("kvq_attention", &a->store, err));
    RF_TRY(rf_check_workspace("kvq_attention", a->workspace, a->workspace_bytes, part_bytes(a), err));
    rf_stream_note_launch(stream, "kvq_attention");
    const int64_t dim = a->store.head_dim, chunks = rf_div_up(a->most, CHUNK), group = a->group_heads;
    const int64_t floats = (int64_t)part_floats(a), batches = rf_div_up(group, HEADS);
    float *const parts = a->workspace; /* [units][chunks][group][floats] */
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(dynamic) if (a->units * a->most * group * dim > 8 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->units * chunks * batches; task++) {
        const int64_t unit = task / batches / chunks, chunk = task / batches % chunks, first = task % batches * HEADS;
        const int64_t begin = chunk * CHUNK, num = rf_min64(rf_min64(a->lens[unit], a->most) - begin, CHUNK);
        if (num <= 0) continue;
        attend_chunk(a, unit, first, rf_min64(group - first, HEADS), begin, num,
                     parts + ((unit * chunks + chunk) * group + first) * floats);
    }
    for (int64_t head = 0; head < a->units * group; head++) {
        const int64_t unit = head / group, len = rf_max64(rf_min64(a->lens[unit], a->most), 0);
        const float *part = parts ? parts + (unit * chunks * group + head % group) * floats : NULL;
        join_parts((float *)a->out + head * dim, a->lse + head, part, rf_div_up(len, CHUNK), group * floats, dim);
    }
    return RF_OK;
}

/* --- directions ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    float length[2], angle; /* Omega */
} pair;

/* e NULL: lengths and the angle alone. Omega = 2 atan2(|u - w|, |u + w|), exact where u.w is near 1. */
static pair direction_of(float *e, const float *a, const float *b, int64_t dim, float t) {
    double aa = 0, bb = 0, less = 0, more = 0;
    for (int64_t c = 0; c < dim; c++) {
        aa += (double)a[c] * (double)a[c];
        bb += (double)b[c] * (double)b[c];
    }
    const double ia = aa > 0 ? 1 / sqrt(aa) : 0, ib = bb > 0 ? 1 / sqrt(bb) : 0;
    for (int64_t c = 0; c < dim; c++) {
        const double u = ia * (double)a[c], w = ib * (double)b[c];
        less += (u - w) * (u - w);
        more += (u + w) * (u + w);
    }
    const bool both = aa > 0 && bb > 0;
    const double omega = both ? 2 * atan2(sqrt(less), sqrt(more)) : 0, sine = sin(omega);
    double of_a = 1, of_b = 1; /* one of the rows is zeros */
    if (both && sine >= 1e-4) {
        of_a = sin((1 - (double)t) * omega) / sine;
        of_b = sin((double)t * omega) / sine;
    } else if (both) {
        of_a = more > 0 ? 1 / sqrt(more) : 1;
        of_b = more > 0 ? of_a : 0;
    }
    for (int64_t c = 0; c < dim && e; c++) e[c] = (float)(of_a * ia * (double)a[c] + of_b * ib * (double)b[c]);
    return (pair){{(float)sqrt(aa), (float)sqrt(bb)}, (float)omega};
}

rf_status rf_kvq_direction_cpu(rf_stream *stream, const rf_kvq_direction_args *a, rf_error *err) {
    RF_TRY(rf_kvq_direction_check(a, err));
    RF_TRY(rf_check_f32("kvq_direction: dtype", a->store.dtype, err));
    const rf_kvq_store *s = &a->store;
    if (!stream || a->units == 0 || a->most == 0 || (!s->k_codes && !a->angle)) return RF_OK;
    const bool writes = s->k_codes != NULL;
    const void *const needed[] = {a->k[0],
                                  a->k[1],
                                  a->v[0],
                                  a->v[1],
                                  a->from,
                                  a->counts,
                                  writes ? (const void *)a->first : a->from,
                                  writes ? a->later_k_scales : a->from,
                                  writes ? a->later_v_scales : a->from};
    RF_TRY(rf_text_pointers("kvq_direction", needed, 9, err));
    if (writes) RF_TRY(rf_kvq_store_pointers("kvq_direction", s, err));
    rf_stream_note_launch(stream, "kvq_direction");
    const int64_t dim = s->head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->units * a->most * dim > RF_SERIAL_WORK)
    for (int64_t task = 0; task < a->units * a->most * 2; task++) {
        const int64_t is_value = task % 2, unit = task / 2 / a->most, i = task / 2 % a->most;
        if (i >= a->counts[unit]) continue;
        const void *const *rows = is_value ? a->v : a->k;
        const int64_t at = a->from[unit * a->list_stride + i] * a->row_stride + unit * a->head_stride;
        const int64_t token = writes ? a->first[unit] + i : 0;
        float *e = NULL;
        if (writes) e = (float *)(void *)plane_of(s, unit, is_value).codes + token * dim;
        const pair p = direction_of(e, (const float *)rows[0] + at, (const float *)rows[1] + at, dim, a->t);
        if (a->angle) a->angle[(is_value * a->units + unit) * a->list_stride + i] = p.angle * 0.31830988618379067f;
        if (!writes) continue;
        char *later = (char *)(is_value ? a->later_v_scales : a->later_k_scales) + unit * s->scales_stride;
        ((float *)plane_of(s, unit, is_value).scales)[token] = p.length[0];
        ((float *)(void *)later)[token] = p.length[1];
    }
    return RF_OK;
}

/* kernels/attention_cpu.c
 * Maths    out = softmax(softmax_scale * q k^T + mask) v; lse = max + ln sum exp(s - max); see attention.h.
 * Tasks    (batch, query head, block of queries): scores of the block against all its keys by one GEMM per key range, a
 *          softmax over whole rows, one GEMM with the values. Listed queries and keys are packed first.
 * Memory   the workspace holds, per thread: scores, packed queries, keys, values and key positions. */
#include "kernels/cpu.h"

#define SCORE_ELEMS 65536 /* scores of a block that still fit a core's cache */
#define MIN_QUERIES 32
#define MAX_QUERIES 256

/* Sizes of a thread's scratch, in elements; each part starts on a cache line. */
typedef struct {
    int64_t queries; /* of a block */
    size_t scores, q, kv, key_pos;
} scratch_plan;

static size_t line_elems(int64_t elems) {
    return ((size_t)elems + 15) / 16 * 16;
}

static scratch_plan plan_scratch(const rf_attention_args *a) {
    scratch_plan p = {0};
    p.queries = SCORE_ELEMS / rf_max64(a->kv_len, 1);
    p.queries = rf_max64(MIN_QUERIES, rf_min64(MAX_QUERIES, p.queries));
    p.queries = rf_max64(1, rf_min64(p.queries, a->q_len));
    /* Lists are pointers, which may be missing when the size is asked for: room for them is always there. */
    p.scores = line_elems(p.queries * a->kv_len);
    p.q = line_elems(p.queries * a->head_dim);
    p.kv = line_elems(a->kv_len * a->head_dim);
    p.key_pos = line_elems(a->kv_len);
    return p;
}

static size_t scratch_elems(const scratch_plan *p) {
    return p->scores + p->q + 2 * p->kv + p->key_pos;
}

size_t rf_attention_workspace_cpu(rf_backend *backend, const rf_attention_args *a) {
    if (rf_attention_check(a, NULL) != RF_OK) return 0;
    scratch_plan p = plan_scratch(a);
    return (size_t)rf_backend_num_threads(backend) * scratch_elems(&p) * sizeof(float);
}

/* The first key position that a query at `pos` does not see. */
static int64_t key_limit(const rf_attention_args *a, int64_t pos) {
    switch (a->mask) {
    case RF_MASK_CAUSAL: return pos + 1;
    case RF_MASK_BLOCK_CAUSAL: return (pos / a->causal_block + 1) * a->causal_block;
    default: return INT64_MAX;
    }
}

RF_HOT static float row_max(const float *s, int64_t num) {
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < num; j++) top = s[j] > top ? s[j] : top;
    return top;
}

/* s[j] = exp(s[j] - top); partial sums of 512 are added in double. */
RF_HOT static double row_exp_sum(float *s, int64_t num, float top) {
    double total = 0;
    for (int64_t j0 = 0; j0 < num; j0 += 512) {
        int64_t end = j0 + 512 < num ? j0 + 512 : num;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = j0; j < end; j++) {
            s[j] = rf_exp(s[j] - top);
            sum += s[j];
        }
        total += sum;
    }
    return total;
}

/* Rows turned by their positions, dense in out (which may be x): row i stands at (rows[i], or first + i) + offset. */
RF_HOT static void turn_rows(float *out, const float *x, int64_t stride, const float *rope, int64_t pairs, int64_t d,
                             const int32_t *rows, int64_t first, int64_t offset, int64_t num) {
    for (int64_t i = 0; i < num; i++)
        rf_cpu_turn(out + i * d, x + i * stride, rope + ((rows ? rows[i] : first + i) + offset) * pairs * 2, pairs, d);
}

static void attend_block(const rf_attention_args *a, const scratch_plan *plan, float *scratch, int64_t batch, int head,
                         int64_t first, int64_t num) {
    int64_t d = a->head_dim;
    int kv_head = head / (a->num_q_heads / a->num_kv_heads);
    float *scores = scratch, *q_packed = scores + plan->scores;
    float *k_packed = q_packed + plan->q, *v_packed = k_packed + plan->kv;
    int32_t *key_pos = (int32_t *)(v_packed + plan->kv);

    /* Queries: in place, or packed from their list. */
    const int32_t *q_rows = a->q_rows ? a->q_rows + batch * a->q_batch_stride_rows + first : NULL;
    const float *q_base = (const float *)a->q + batch * a->q_batch_stride + head * a->q_head_stride;
    const float *q = q_base + first * a->q_row_stride;
    int64_t q_stride = a->q_row_stride;
    if (q_rows) {
        for (int64_t i = 0; i < num; i++)
            memcpy(q_packed + i * d, q_base + q_rows[i] * a->q_row_stride, (size_t)d * sizeof(float));
        q = q_packed;
        q_stride = d;
    }
    if (a->rope) {
        turn_rows(q_packed, q, q_stride, a->rope, a->rope_pairs, d, q_rows, first, a->q_pos_offset, num);
        q = q_packed;
        q_stride = d;
    }
    int64_t last_limit = 0; /* keys from here on are seen by no query of the block, and are not read */
    for (int64_t i = 0; i < num; i++) {
        int64_t pos = (q_rows ? q_rows[i] : first + i) + a->q_pos_offset;
        last_limit = rf_max64(last_limit, key_limit(a, pos));
    }

    /* Keys: up to four ranges of rows in place, or a packed list. */
    const float *k = (const float *)a->k + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    const float *v = (const float *)a->v + batch * a->kv_batch_stride + kv_head * a->kv_head_stride;
    int64_t kv_stride = a->kv_row_stride; /* of k; v_stride differs where only k is packed */
    int64_t len = a->kv_lens ? rf_max64(0, rf_min64(a->kv_lens[batch], a->kv_len)) : a->kv_len;
    int64_t begins[RF_MAX_KEY_RANGES] = {0}, ends[RF_MAX_KEY_RANGES] = {rf_min64(len, last_limit)};
    int num_ranges = 1;
    if (a->kv_rows) {
        const int32_t *rows = a->kv_rows + batch * a->kv_batch_stride_rows;
        int64_t packed = 0;
        for (int64_t j = 0; j < len; j++) {
            if (rows[j] >= last_limit) continue;
            memcpy(k_packed + packed * d, k + rows[j] * kv_stride, (size_t)d * sizeof(float));
            memcpy(v_packed + packed * d, v + rows[j] * kv_stride, (size_t)d * sizeof(float));
            key_pos[packed++] = rows[j];
        }
        k = k_packed;
        v = v_packed;
        kv_stride = d;
        ends[0] = packed;
        if (a->rope) turn_rows(k_packed, k_packed, d, a->rope, a->rope_pairs, d, key_pos, 0, 0, packed);
    } else if (a->num_ranges > 0) {
        num_ranges = a->num_ranges;
        for (int r = 0; r < num_ranges; r++) {
            begins[r] = a->ranges[r].begin;
            ends[r] = rf_max64(begins[r], rf_min64(a->ranges[r].end, last_limit));
        }
    }
    int64_t v_stride = kv_stride;
    if (a->rope && !a->kv_rows) {
        for (int r = 0; r < num_ranges; r++)
            turn_rows(k_packed + begins[r] * d, k + begins[r] * kv_stride, kv_stride, a->rope, a->rope_pairs, d, NULL,
                      begins[r], 0, ends[r] - begins[r]);
        k = k_packed;
        kv_stride = d;
    }
    int64_t num_keys = 0;
    for (int r = 0; r < num_ranges; r++) num_keys += ends[r] - begins[r];

    /* Scores, then probabilities without their common divisor. */
    int64_t at = 0;
    for (int r = 0; r < num_ranges; r++) {
        int64_t keys = ends[r] - begins[r];
        if (keys > 0)
            rf_cpu_sgemm(num, keys, d, a->softmax_scale, q, q_stride, k + begins[r] * kv_stride, kv_stride, true, 0.0f,
                         scores + at, num_keys);
        at += keys;
    }
    float *inv_sum = q_packed; /* the queries are used up; plan->q >= num */
    for (int64_t i = 0; i < num; i++) {
        float *s = scores + i * num_keys;
        int64_t num_visible = num_keys;
        if (a->mask != RF_MASK_NONE) {
            int64_t limit = key_limit(a, (q_rows ? q_rows[i] : first + i) + a->q_pos_offset);
            at = 0;
            for (int r = 0; r < num_ranges; r++) {
                for (int64_t j = begins[r]; j < ends[r]; j++, at++) {
                    if ((a->kv_rows ? key_pos[j] : j) < limit) continue;
                    s[at] = -INFINITY;
                    num_visible--;
                }
            }
        }
        float *lse = a->lse ? a->lse + (batch * a->num_q_heads + head) * a->q_len + first + i : NULL;
        if (num_visible == 0) {
            if (num_keys > 0) memset(s, 0, (size_t)num_keys * sizeof(float));
            inv_sum[i] = 0;
            if (lse) *lse = -INFINITY;
            continue;
        }
        float top = row_max(s, num_keys);
        double sum = row_exp_sum(s, num_keys, top);
        inv_sum[i] = (float)(1.0 / sum);
        if (lse) *lse = (float)((double)top + log(sum));
    }

    float *out = (float *)a->out + batch * a->out_batch_stride + head * a->out_head_stride + first * a->out_row_stride;
    int64_t out_stride = a->out_row_stride;
    if (num_keys == 0) {
        for (int64_t i = 0; i < num; i++) memset(out + i * out_stride, 0, (size_t)d * sizeof(float));
        return;
    }
    at = 0;
    bool started = false;
    for (int r = 0; r < num_ranges; r++) {
        int64_t keys = ends[r] - begins[r];
        if (keys > 0) {
            /* With one query the row stride may be anything; BLAS wants at least the row's length. */
            rf_cpu_sgemm(num, d, keys, 1.0f, scores + at, num_keys, v + begins[r] * v_stride, v_stride, false,
                         started ? 1.0f : 0.0f, out, rf_max64(out_stride, d));
            started = true;
        }
        at += keys;
    }
    for (int64_t i = 0; i < num; i++) {
        float *row = out + i * out_stride;
        for (int64_t c = 0; c < d; c++) row[c] *= inv_sum[i];
    }
}

/* BLAS takes row strides of 31 bits. */
static rf_status check_strides(const rf_attention_args *a, rf_error *err) {
    if (a->q_row_stride <= INT32_MAX && a->kv_row_stride <= INT32_MAX && a->out_row_stride <= INT32_MAX) return RF_OK;
    return rf_fail(err, RF_ERR_SHAPE, "attention: row strides must be below 2^31 on the CPU");
}

rf_status rf_attention_cpu(rf_stream *stream, const rf_attention_args *a, rf_error *err) {
    RF_TRY(stream ? rf_attention_check_run(a, err) : rf_attention_check(a, err));
    RF_TRY(rf_check_f32("attention: dtype", a->dtype, err));
    RF_TRY(check_strides(a, err));
    if (a->kernel != RF_ATTENTION_AUTO)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "attention: the CPU has one kernel, auto; another was asked for");
    if (!stream || a->batch == 0 || a->q_len == 0) return RF_OK;

    size_t need = rf_attention_workspace_cpu(rf_stream_backend(stream), a);
    RF_TRY(rf_check_workspace("attention", a->workspace, a->workspace_bytes, need, err));
    scratch_plan plan = plan_scratch(a);
    size_t thread_elems = scratch_elems(&plan);
    int64_t blocks = rf_div_up(a->q_len, plan.queries);
    int64_t num_tasks = a->batch * a->num_q_heads * blocks;
    rf_stream_note_launch(stream, "attention");
    rf_cpu_blas_single_thread();
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(dynamic) if (num_tasks > 1)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t first = task % blocks * plan.queries;
        attend_block(a, &plan, (float *)a->workspace + (size_t)rf_cpu_thread_idx() * thread_elems,
                     task / (blocks * a->num_q_heads), (int)(task / blocks % a->num_q_heads), first,
                     rf_min64(plan.queries, a->q_len - first));
    }
    return RF_OK;
}

rf_status rf_attention_merge_cpu(rf_stream *stream, const rf_attention_merge_args *a, rf_error *err) {
    RF_TRY(stream ? rf_attention_merge_check_run(a, err) : rf_attention_merge_check(a, err));
    RF_TRY(rf_check_f32("attention_merge: dtype", a->dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "attention_merge");
    int64_t d = a->head_dim;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t row = 0; row < a->rows; row++) {
        for (int head = 0; head < a->num_heads; head++) {
            int64_t at = head * a->rows + row, from = (row * a->num_heads + head) * d;
            const float *out_a = (const float *)a->out_a + from, *out_b = (const float *)a->out_b + from;
            float *out = (float *)a->out + from;
            double la = a->lse_a[at], lb = a->lse_b[at];
            double top = la > lb ? la : lb;
            double wa = la == -INFINITY ? 0 : exp(la - top), wb = lb == -INFINITY ? 0 : exp(lb - top);
            double sum = wa + wb;
            if (a->lse) a->lse[at] = sum == 0 ? -INFINITY : (float)(top + log(sum));
            float fa = sum == 0 ? 0.0f : (float)(wa / sum), fb = sum == 0 ? 0.0f : (float)(wb / sum);
            /* An empty side may hold anything: its values are not used. */
            if (wa == 0)
                for (int64_t c = 0; c < d; c++) out[c] = wb == 0 ? 0.0f : out_b[c];
            else if (wb == 0)
                for (int64_t c = 0; c < d; c++) out[c] = out_a[c];
            else
                for (int64_t c = 0; c < d; c++) out[c] = fa * out_a[c] + fb * out_b[c];
        }
    }
    return RF_OK;
}

static void softmax_row(float *y, const float *x, int64_t cols, float scale) {
    for (int64_t c = 0; c < cols; c++) y[c] = scale * x[c];
    float inv = (float)(1.0 / row_exp_sum(y, cols, row_max(y, cols)));
    for (int64_t c = 0; c < cols; c++) y[c] *= inv;
}

rf_status rf_softmax_cpu(rf_stream *stream, const rf_softmax_args *a, rf_error *err) {
    RF_TRY(stream ? rf_softmax_check_run(a, err) : rf_softmax_check(a, err));
    RF_TRY(rf_check_f32("softmax: y_dtype", a->y_dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "softmax");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t r = 0; r < a->rows; r++)
        softmax_row((float *)a->y + r * a->cols, (const float *)a->x + r * a->cols, a->cols, a->scale);
    return RF_OK;
}

/* kernels/gemm_cpu.c
 * Maths    y = act(alpha * x w^T + bias) + beta * y0 in f32; see gemm.h.
 * Tasks    blocks of 256 rows (and of columns, where rows alone give fewer than 16 blocks). A block is filled with its
 *          bias or addend, BLAS adds the product, and the activation runs while the block is in cache. One BLAS thread per
 *          task beats BLAS's own threads on the shapes of small transformers (2048 x 216..864 on two cores: 215 against
 *          163..203 GFLOP/s).
 * BLAS     OpenBLAS picks its kernel by processor model. An OPENBLAS_CORETYPE=Haswell left in the environment of a machine
 *          with AVX-512 costs 1.8x. */
#include <cblas.h>
#include <stdatomic.h>

#include "kernels/cpu.h"

#define ROW_BLOCK     256
#define MIN_TASKS     16
#define MIN_COL_BLOCK 192
#define TILE          64

RF_HOT static void act_gelu_tanh(float *y, int64_t num) {
    for (int64_t i = 0; i < num; i++) y[i] = rf_gelu_tanh(y[i]);
}

RF_HOT static void act_silu(float *y, int64_t num) {
    for (int64_t i = 0; i < num; i++) y[i] = rf_silu(y[i]);
}

void rf_cpu_act(float *y, int64_t num, rf_act act) {
    switch (act) {
    case RF_ACT_NONE: break;
    case RF_ACT_GELU_TANH: act_gelu_tanh(y, num); break;
    case RF_ACT_GELU_ERF:
        for (int64_t i = 0; i < num; i++) y[i] = rf_gelu_erf(y[i]);
        break;
    case RF_ACT_SILU: act_silu(y, num); break;
    }
}

void rf_cpu_sgemm(int64_t m, int64_t n, int64_t k, float alpha, const float *a, int64_t lda, const float *b,
                  int64_t ldb, bool b_is_nk, float beta, float *c, int64_t ldc) {
    cblas_sgemm(CblasRowMajor, CblasNoTrans, b_is_nk ? CblasTrans : CblasNoTrans, (int)m, (int)n, (int)k, alpha, a,
                (int)lda, b, (int)ldb, beta, c, (int)ldc);
}

void rf_cpu_blas_single_thread(void) {
#ifdef OPENBLAS_VERSION
    /* A setting of the whole process, so it is left alone once it is right. */
    if (openblas_get_num_threads() != 1) openblas_set_num_threads(1);
#endif
}

/* y = product in the bias's place, then act, then the addend; for blocks whose y is not also an addend under an act. */
static void gemm_block(const rf_gemm_args *g, const float *x, const float *w, const float *y0, float *y, int64_t m,
                       int64_t n, int64_t col) {
    const float *bias = g->bias ? (const float *)g->bias + col : NULL;
    bool addend_first = y0 && g->act == RF_ACT_NONE; /* no act between product and addend: one sum */
    bool filled = bias || addend_first;
    if (filled) {
        for (int64_t i = 0; i < m; i++) {
            float *row = y + i * g->ldy;
            if (addend_first) {
                const float *row0 = y0 + i * g->ldy;
                if (bias)
                    for (int64_t j = 0; j < n; j++) row[j] = g->beta * row0[j] + bias[j];
                else
                    for (int64_t j = 0; j < n; j++) row[j] = g->beta * row0[j];
            } else {
                memcpy(row, bias, (size_t)n * sizeof(float));
            }
        }
    }
    rf_cpu_sgemm(m, n, g->k, g->alpha, x, g->ldx, w, g->ldw, !g->w_is_kn, filled ? 1.0f : 0.0f, y, g->ldy);
    if (g->act == RF_ACT_NONE) return;
    for (int64_t i = 0; i < m; i++) {
        float *row = y + i * g->ldy;
        rf_cpu_act(row, n, g->act);
        if (!y0) continue;
        const float *row0 = y0 + i * g->ldy;
        for (int64_t j = 0; j < n; j++) row[j] += g->beta * row0[j];
    }
}

/* An act and an addend that lives in y: the product needs a place of its own, so work in tiles on the stack. */
static void gemm_block_tiled(const rf_gemm_args *g, const float *x, const float *w, float *y, int64_t m, int64_t n,
                             int64_t col) {
    float tile[TILE * TILE];
    for (int64_t i0 = 0; i0 < m; i0 += TILE) {
        for (int64_t j0 = 0; j0 < n; j0 += TILE) {
            int64_t tm = rf_min64(TILE, m - i0), tn = rf_min64(TILE, n - j0);
            const float *wt = w + (g->w_is_kn ? j0 : j0 * g->ldw);
            rf_cpu_sgemm(tm, tn, g->k, g->alpha, x + i0 * g->ldx, g->ldx, wt, g->ldw, !g->w_is_kn, 0.0f, tile, TILE);
            for (int64_t i = 0; i < tm; i++) {
                float *t = tile + i * TILE, *row = y + (i0 + i) * g->ldy + j0;
                if (g->bias)
                    for (int64_t j = 0; j < tn; j++) t[j] += ((const float *)g->bias)[col + j0 + j];
                rf_cpu_act(t, tn, g->act);
                for (int64_t j = 0; j < tn; j++) row[j] = t[j] + g->beta * row[j];
            }
        }
    }
}

rf_status rf_gemm_cpu(rf_stream *stream, const rf_gemm_args *g, rf_error *err) {
    RF_TRY(stream ? rf_gemm_check_run(g, err) : rf_gemm_check(g, err));
    RF_TRY(rf_check_f32("gemm: dtype", g->dtype, err));
    if (!stream || g->m == 0 || g->num_batches == 0) return RF_OK;

    int64_t row_blocks = rf_div_up(g->m, ROW_BLOCK);
    int64_t row_tasks = row_blocks * g->num_batches;
    int64_t col_blocks = 1;
    if (row_tasks < MIN_TASKS)
        col_blocks = rf_max64(1, rf_min64(rf_div_up(MIN_TASKS, row_tasks), g->n / MIN_COL_BLOCK));
    int64_t col_block = rf_div_up(rf_div_up(g->n, col_blocks), 16) * 16;
    col_blocks = rf_div_up(g->n, col_block);
    int64_t num_tasks = row_tasks * col_blocks;
    bool tiled = g->y0 == g->y && g->act != RF_ACT_NONE;

    rf_stream_note_launch(stream, "gemm");
    rf_cpu_blas_single_thread();
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(dynamic) if (num_tasks > 1 && g->m * g->n * g->k > 64 * RF_SERIAL_WORK)
    for (int64_t task = 0; task < num_tasks; task++) {
        int64_t batch = task / (row_blocks * col_blocks);
        int64_t row = task / col_blocks % row_blocks * ROW_BLOCK;
        int64_t col = task % col_blocks * col_block;
        int64_t m = rf_min64(ROW_BLOCK, g->m - row), n = rf_min64(col_block, g->n - col);
        const float *x = (const float *)g->x + batch * g->x_batch_stride + row * g->ldx;
        const float *w = (const float *)g->w + batch * g->w_batch_stride + (g->w_is_kn ? col : col * g->ldw);
        int64_t at = batch * g->y_batch_stride + row * g->ldy + col;
        float *y = (float *)g->y + at;
        if (tiled)
            gemm_block_tiled(g, x, w, y, m, n, col);
        else
            gemm_block(g, x, w, g->y0 ? (const float *)g->y0 + at : NULL, y, m, n, col);
    }
    return RF_OK;
}

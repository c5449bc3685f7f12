/* kernels/token_select_cpu.c
 * Maths    scores, cell bonus and the count highest rows of every site and group; see cache.h. A NaN score counts as +inf. A
 *          random score is a word of Philox4x32-10 with counter (row, branch, site, step), without age and bonus.
 * Tasks    one site and group each. */
#include "core/rng.h"
#include "kernels/cache_checks.h"
#include "kernels/cpu.h"
#include "kernels/select.h"

#define MAX_TOKENS 65536

/* ---- checks ---- */

rf_status rf_token_select_check(const rf_token_select_args *a, rf_error *err) {
    const char *op = "token_select";
    if (!a) return rf_fail(err, RF_ERR_ARGUMENT, "%s: no arguments", op);
    RF_TRY(rf_check_size(op, "num_sites", a->num_sites, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "groups", a->groups, 0, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "all_groups", a->all_groups, a->groups, INT32_MAX, err));
    RF_TRY(rf_check_size(op, "tokens", a->tokens, 1, MAX_TOKENS, err));
    RF_TRY(rf_check_count(op, "a list", a->all_groups, a->tokens, 1, err)); /* row numbers are int32 */
    RF_TRY(rf_check_count(op, "the grid of sites and groups", a->num_sites, a->groups, 1, err));
    if (a->list_stride < 0 || a->list_stride > INT64_MAX / 2)
        return rf_fail(err, RF_ERR_SHAPE, "%s: list_stride is %lld, must be at least 0", op, (long long)a->list_stride);
    if (a->place && a->list_stride < a->groups * a->tokens)
        return rf_fail(err, RF_ERR_SHAPE, "%s: list_stride is %lld, place needs %lld", op, (long long)a->list_stride,
                       (long long)(a->groups * a->tokens));
    RF_TRY(rf_check_size(op, "cell", a->cell, 0, MAX_TOKENS, err));
    RF_TRY(rf_check_value(op, "age_weight", a->age_weight, -1e30f, 1e30f, err));
    RF_TRY(rf_check_value(op, "bonus", a->bonus, 0, 1e30f, err));
    if (a->random) RF_TRY(rf_check_size(op, "groups_per_branch", a->groups_per_branch, 1, INT32_MAX, err));
    if (a->cell == 0 || a->bonus == 0) return RF_OK;
    RF_TRY(rf_check_size(op, "frames", a->frames, 1, MAX_TOKENS, err));
    RF_TRY(rf_check_size(op, "grid_h", a->grid_h, 1, MAX_TOKENS, err));
    RF_TRY(rf_check_size(op, "grid_w", a->grid_w, 1, MAX_TOKENS, err));
    if (a->frames * a->grid_h * a->grid_w == a->tokens) return RF_OK; /* at most 2^48 */
    return rf_fail(err, RF_ERR_SHAPE, "%s: a grid of %lld x %lld x %lld has not %lld tokens", op, (long long)a->frames,
                   (long long)a->grid_h, (long long)a->grid_w, (long long)a->tokens);
}

rf_status rf_token_select_check_run(const rf_token_select_args *a, rf_error *err) {
    const char *op = "token_select";
    RF_TRY(rf_token_select_check(a, err));
    if (a->num_sites == 0 || a->groups == 0) return RF_OK;
    if (!a->random) RF_TRY(rf_check_pointer(op, "s1", a->s1, err));
    if (a->random) RF_TRY(rf_check_pointer(op, "step", a->step, err));
    RF_TRY(rf_check_pointer(op, "age", a->age, err));
    RF_TRY(rf_check_pointer(op, "counts", a->counts, err));
    RF_TRY(rf_check_pointer(op, "rows_packed", a->rows_packed, err));
    RF_TRY(rf_check_pointer(op, "rows_state", a->rows_state, err));
    return rf_check_workspace(op, a->workspace, a->workspace_bytes,
                              (size_t)(a->num_sites * a->groups) * (size_t)a->tokens * sizeof(float), err);
}

/* ---- one site and group ---- */

static float random_score(const rf_token_select_args *a, int64_t site, int64_t group, int64_t row) {
    const uint32_t counter[4] = {(uint32_t)row, (uint32_t)group, (uint32_t)site, (uint32_t)*a->step};
    const uint32_t key[2] = {(uint32_t)a->seed, (uint32_t)(a->seed >> 32)};
    uint32_t words[4];
    rf_philox4x32(counter, key, words);
    return (float)(words[0] >> 8) * 0x1p-24f;
}

static void add_cell_bonus(const rf_token_select_args *a, float *score) {
    const int64_t cell = a->cell, h = a->grid_h, w = a->grid_w;
    for (int64_t f = 0; f < a->frames; f++) {
        float *frame = score + f * h * w;
        for (int64_t y0 = 0; y0 < h; y0 += cell) {
            for (int64_t x0 = 0; x0 < w; x0 += cell) {
                int64_t best = y0 * w + x0;
                for (int64_t y = y0; y < rf_min64(h, y0 + cell); y++)
                    for (int64_t x = x0; x < rf_min64(w, x0 + cell); x++)
                        if (frame[y * w + x] > frame[best]) best = y * w + x;
                frame[best] += a->bonus * frame[best];
            }
        }
    }
}

static void select_rows(const rf_token_select_args *a, int64_t site, int64_t packed) {
    const int64_t tokens = a->tokens, group = a->index ? a->index[packed] : packed;
    const int64_t at = (site * a->all_groups + group) * tokens;
    const int64_t count = rf_max64(0, rf_min64(a->counts[site], tokens));
    float *score = a->workspace + (site * a->groups + packed) * tokens;
    float *age = a->age + at;
    for (int64_t t = 0; t < tokens; t++) {
        float s = a->random ? random_score(a, site, group / a->groups_per_branch, t)
                            : a->s1[at + t] + a->age_weight * age[t] / (float)tokens;
        score[t] = isnan(s) ? INFINITY : s;
    }
    if (!a->random && a->cell > 0 && a->bonus != 0) add_cell_bonus(a, score);

    rf_selected last = {UINT32_MAX, 0, 0}; /* of the chosen rows, the lowest score; of its rows, need are chosen */
    if (count > 0) last = rf_select_rank(score, tokens, tokens - count);
    int32_t *rows_packed = a->rows_packed + site * a->list_stride, *rows_state = a->rows_state + site * a->list_stride;
    int32_t *place = a->place ? a->place + site * a->list_stride + packed * tokens : NULL;
    int64_t need = last.equal - last.rank, pos = packed * count;
    for (int64_t t = 0; t < tokens; t++) {
        uint32_t key = rf_float_key(score[t]);
        bool chosen = count > 0 && (key > last.key || (key == last.key && need-- > 0));
        if (place) place[t] = chosen ? (int32_t)pos : -1;
        if (chosen) {
            rows_packed[pos] = (int32_t)(packed * tokens + t);
            rows_state[pos] = (int32_t)(group * tokens + t);
            pos++;
        }
        age[t] = chosen ? 0.0f : age[t] + 1.0f;
    }
}

rf_status rf_token_select_cpu(rf_stream *stream, const rf_token_select_args *a, rf_error *err) {
    RF_TRY(stream ? rf_token_select_check_run(a, err) : rf_token_select_check(a, err));
    if (!stream || a->num_sites == 0 || a->groups == 0) return RF_OK;
    rf_stream_note_launch(stream, "token_select");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t i = 0; i < a->num_sites * a->groups; i++) select_rows(a, i / a->groups, i % a->groups);
    return RF_OK;
}

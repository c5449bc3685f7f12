/* kernels/cache.h - what feature caching needs from a device: move groups of rows in and out of rings of snapshots, predict from
 * them, measure how much they change, and choose rows.
 *
 * A group is what belongs to one sample of one branch: `rows` rows in a row (a sample's tokens). State holds every group of a
 * session; a step may compute only some of them, packed. An index list (device int32 [groups], NULL = identity) says which
 * group of the other side packed group g is.
 * A ring is [num_slots][all groups][rows][cols]; which slot holds which age differs from group to group, so weights come by
 * slot and a slot is looked up per group. A term whose weight is 0 is not read: it may hold anything. */
#ifndef RF_KERNELS_CACHE_H
#define RF_KERNELS_CACHE_H

#include "core/backend.h"
#include "kernels/norm.h"

#ifdef __cplusplus
extern "C" {
#endif

/* dst[dst_index[g]] in slot dst_slot[dst_index[g]] = a[a_index[g]] - b[b_index[g]], in f32, rounded to dst_dtype.
 *   a    [., rows, a_ld]  cols columns are read       b  [., rows, b_ld] or NULL; only its first b_cols (<= cols) columns count
 *   dst  [slots][., rows, dst_ld]; slot stride dst_slot_stride elements; dst_slot device int32 by dst group, NULL = slot 0
 * dtypes f32 or bf16, each its own (host: f32). dst may be a when nothing is permuted (in-place a -= b). */
typedef struct {
    const void *a, *b;
    void *dst;
    rf_dtype a_dtype, b_dtype, dst_dtype;
    int64_t groups, rows, cols, b_cols;
    int64_t a_ld, b_ld, dst_ld;
    const int32_t *a_index, *b_index, *dst_index;
    const int32_t *dst_slot;
    int64_t dst_slot_stride;
} rf_group_copy_args;

/* dst[dst_index[g]][r] = base[base_index[g]][r] (first base_cols columns) + sum_j w[c][j] * ring[j][src_index[g]][r]
 *   ring     num_slots slots of [., rows, cols] (dense rows), slot stride slot_stride elements; num_slots <= 64
 *   weights  device f32 [all groups, num_classes, num_slots], taken at src_index[g]
 *   row_class device u8 [all groups, rows] at src_index[g], or NULL = class 0; a class >= num_classes counts as the last one
 *   base     [., rows, base_ld] or NULL;  dst [., rows, dst_ld]; dst may be base if index and ld agree
 * Sums in f32, in order of slots after the base. Without any nonzero weight and base: zeros. */
typedef struct {
    const void *ring;
    rf_dtype ring_dtype;
    int num_slots, num_classes;
    int64_t slot_stride;
    const float *weights;
    const uint8_t *row_class;
    const void *base;
    rf_dtype base_dtype;
    int64_t base_cols, base_ld;
    void *dst;
    rf_dtype dst_dtype;
    int64_t dst_ld;
    int64_t groups, rows, cols;
    const int32_t *src_index, *base_index, *dst_index;
} rf_combine_args;

/* Curvature of the last three outputs of a run and what follows from it (WorldCache, arXiv 2603.06331, sections 3 and 4).
 *   ring      f32 [3][all groups, group_rows, ld]; of a group's first rows the first cols columns count. A stream of the outputs
 *             (some rows, some columns) is a call of its own with all pointers at its begin; group_rows 0 = rows
 *   index     device int32 [num_sets * groups_per_set] or NULL = identity: set s is the groups index[s], index[num_sets + s]
 *             (one group, or the two branches of a sample pooled)
 *   slots     device int32 [all groups][3]: slot of the newest, second and third snapshot of a group
 *   gaps      device f32 [all groups][2]: steps between newest and second, second and third; gaps[0] <= 0: fewer than three
 *             snapshots: the set's rows get class 2, its drift is 0, its ratio is 0
 * Per row: v0 = (y0-y1)/gap0, v1 = (y1-y2)/gap1, a = (v0-v1)/gap0, kappa = |a|_2 / (|v0|^2 + eps + floor * mean over the set of
 * |v0|^2); differences in f32. Quantiles p_stable, p_chaotic of kappa over the set: sorted value at p*(n-1), linearly
 * interpolated. Class 0 stable: kappa < Q_s; class 2 chaotic: kappa >= Q_c; 1 the rest.
 * drift[all groups][horizon]: for k = 1..horizon (<= 16), mean over chaotic rows (mean_over_all: over all rows, others count 0) of
 * kappa * | a_k v0 + b_k v1 |_2, the closed form sqrt(max(0, a^2 A + 2ab B + b^2 C)); both groups of a pooled set get the same.
 * Every row has num_classes_per_row classes, all the same, and the next row's are class_ld further on (0, 0 = 1, 1): for streams that
 * are ranges of columns, of which every range of equal width has a class.
 * step_a, step_b are host arrays copied into the launch. */
typedef struct {
    const float *ring;
    int64_t slot_stride, ld, cols, rows, group_rows;
    int64_t class_ld, num_classes_per_row;
    int64_t num_sets;
    int groups_per_set; /* 1 or 2 */
    const int32_t *index;
    const int32_t *slots;
    const float *gaps;
    float p_stable, p_chaotic, eps, floor;
    bool mean_over_all;
    int horizon;
    float step_a[16], step_b[16];
    uint8_t *row_class; /* [all groups, group_rows, class_ld] */
    float *kappa;       /* [all groups, group_rows] */
    float *drift;       /* [all groups, horizon] */
    float *workspace;   /* rf_curvature_workspace_bytes */
    size_t workspace_bytes;
} rf_curvature_args;
size_t rf_curvature_workspace_bytes(int64_t all_groups, int64_t rows);

/* Which token rows a partial step computes (ToCa, arXiv 2410.05317): for every site (a part of a block) and group the count
 * highest of   score = s1 + age_weight * age / tokens,   after which every cell x cell square of the grid adds bonus * (its
 * largest score) to the row that has it (ties: the lower row). Ties of the final score: the lower row wins. Lists ascend.
 * Then age = 0 for chosen rows, else age + 1. With random = true score is a counter-based uniform number of (seed, step, site,
 * branch, row) instead (a control).
 *   s1        f32 [num_sites][all groups, tokens];   age f32, same shape, read and written
 *   counts    device int32 [num_sites]: rows to choose, 0..tokens
 *   index     device int32 [groups]: state group of packed group g, NULL = identity
 *   rows_packed, rows_state  device int32 [num_sites][list_stride]: row numbers g * tokens + t and index[g] * tokens + t of
 *             the chosen rows; those of group g begin at g * count
 *   place     device int32 [num_sites][list_stride] or NULL: for packed row g * tokens + t its number in the packed list
 *             (g * count + position), -1 if not chosen
 *   grid      tokens = frames * grid_h * grid_w; cell 0 or bonus 0 = no bonus. tokens <= 65536 */
typedef struct {
    const float *s1;
    float *age;
    const int32_t *counts;
    const int32_t *index;
    int32_t *rows_packed, *rows_state, *place;
    int64_t list_stride;
    int64_t num_sites, groups, all_groups, tokens;
    int64_t frames, grid_h, grid_w;
    int cell;
    float age_weight, bonus;
    bool random;
    uint64_t seed;
    int64_t
        groups_per_branch; /* random: state group / this is the branch; an image's rows do not depend on its batch */
    const int32_t *step;   /* device step counter, for random */
    float *workspace;      /* f32 [num_sites * groups * tokens] */
    size_t workspace_bytes;
} rf_token_select_args;

/* The end of a block in which only some token rows were computed, the same rows in its first part a and its last part b; the first
 * part's output is already in x for the chosen rows.
 *   chosen row r (i = place[r] >= 0):  x[r] += gate_b * y[i];  ring_b[state(r)] = y[i]
 *   any other row:                     x[r] += gate_a * ring_a[state(r)] + gate_b * ring_b[state(r)]      (ring_a NULL: without it)
 * x [groups * rows, cols] x_dtype; y [chosen, cols] and rings [all groups * rows, cols] dtype; state(r) = index[g] * rows + r % rows,
 * g = r / rows (index NULL = identity). Gates are columns of mod as in kernels/norm.h (-1 = 1), row r's group for mod is r /
 * mod.rows_per_group. Sums in f32 in the order written. */
typedef struct {
    void *x;
    const void *y, *ring_a;
    void *ring_b;
    rf_dtype x_dtype, dtype;
    const int32_t *place, *index;
    int64_t groups, rows, cols;
    rf_modulation mod;
    int64_t gate_a, gate_b;
} rf_row_merge_args;

/* Signals to the host without a copy engine: host[(*step + step_offset) * stride + i] = src[i] for i < num; then *count += 1, and when
 * all of that can be seen by the host, *host_count = *count. host and host_count are page-locked host memory
 * (rf_backend_alloc_pinned), which the device writes directly; who waits for *host_count need not wait for the stream. */
typedef struct {
    const float *src;
    int64_t num, stride;
    float *host;
    const int32_t *step;
    int32_t step_offset;
    int32_t *count; /* device */
    int32_t *host_count;
} rf_post_args;

/* How much attention every key row received, or how small its value is: s1 above, for one attention part of a full step.
 *   ATTENTION  sum over heads and queries of exp(softmax_scale * q.k_i - lse_q): column sums of the attention map without the map
 *   VALUE      sum over heads of (1 - |v_i|_2) (DuCa, arXiv 2412.18911)
 * then divided by its L2 norm over the group's rows (by 1 if that is 0).
 *   q, k, v    rows with strides as in rf_attention_args (one sequence per group, q_len = kv_len = rows); dtype f32 or bf16
 *   lse        f32 [groups, heads, rows], natural log (ATTENTION)
 *   out        f32 [all groups, rows], written at index[g] (NULL = identity) */
typedef enum { RF_ROW_SCORE_ATTENTION = 0, RF_ROW_SCORE_VALUE } rf_row_score;
typedef struct {
    rf_row_score kind;
    const void *q, *k, *v;
    rf_dtype dtype;
    int64_t groups, rows;
    int num_heads, head_dim;
    int64_t batch_stride, row_stride, head_stride; /* of q, k and v */
    float softmax_scale;
    const float *lse;
    float *out;
    const int32_t *index;
    float *workspace; /* rf_row_score_workspace_bytes: every head's part of a row's score */
    size_t workspace_bytes;
} rf_row_score_args;
size_t rf_row_score_workspace_bytes(int64_t groups, int64_t rows, int num_heads);

#ifdef __cplusplus
}
#endif
#endif

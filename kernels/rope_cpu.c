/* kernels/rope_cpu.c
 * Maths    pair i of a head: (a, b) -> (c a - s b, s a + c b), (c, s) = table[position][i]; see rope.h. And the two
 *          tables.
 * Tasks    a row of x each. */
#include "kernels/cpu.h"

/* ---- tables ---- */

/* Value i of n from first to last in f32, counted from the nearer end: as the reference's linspace. */
static float spaced(float first, float last, int64_t i, int64_t n) {
    if (n == 1) return first;
    float step = (last - first) / (float)(n - 1);
    return i < n / 2 ? first + step * (float)i : last - step * (float)(n - 1 - i);
}

static void put_angle(float *out, float angle) {
    out[0] = (float)cos((double)angle);
    out[1] = (float)sin((double)angle);
}

void rf_rope_table_axial(float *out, int64_t grid_h, int64_t grid_w, int axis_pairs, double max_freq) {
    for (int64_t y = 0; y < grid_h; y++) {
        for (int64_t x = 0; x < grid_w; x++) {
            float *row = out + (y * grid_w + x) * 4 * axis_pairs;
            for (int i = 0; i < axis_pairs; i++) {
                float freq = spaced(1.0f, (float)(max_freq / 2), i, axis_pairs) * (float)M_PI;
                put_angle(row + 2 * i, spaced(-1.0f, 1.0f, y, grid_h) * freq);
                put_angle(row + 2 * (axis_pairs + i), spaced(-1.0f, 1.0f, x, grid_w) * freq);
            }
        }
    }
}

void rf_rope_table_time(float *out, int64_t positions, int num_pairs, double theta) {
    for (int64_t p = 0; p < positions; p++) {
        for (int i = 0; i < num_pairs; i++) {
            float freq = 1.0f / (float)pow(theta, (double)i / num_pairs);
            put_angle(out + 2 * (p * num_pairs + i), (float)p * freq);
        }
    }
}

/* ---- operator ---- */

RF_HOT static void turn_heads(float *x, const float *table, int num_heads, int64_t head_dim, int64_t num_pairs) {
    for (int h = 0; h < num_heads; h++) rf_cpu_turn(x + h * head_dim, x + h * head_dim, table, num_pairs, head_dim);
}

rf_status rf_rope_cpu(rf_stream *stream, const rf_rope_args *a, rf_error *err) {
    RF_TRY(stream ? rf_rope_check_run(a, err) : rf_rope_check(a, err));
    RF_TRY(rf_check_f32("rope: dtype", a->dtype, err));
    if (!stream || a->num_rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "rope");
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t r = 0; r < a->num_rows; r++) {
        int64_t pos = (a->rows ? a->rows[r] : r) % a->period;
        turn_heads((float *)a->x + r * a->row_stride, a->table + pos * a->num_pairs * 2, a->num_heads, a->head_dim,
                   a->num_pairs);
    }
    return RF_OK;
}

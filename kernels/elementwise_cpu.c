/* kernels/elementwise_cpu.c - maps, layout changes, embeddings; see elementwise.h. One row (or image) per task. */
#include "kernels/cpu.h"

RF_HOT static void affine(float *y, const float *x, int64_t num, float scale, float shift) {
    for (int64_t i = 0; i < num; i++) y[i] = scale * x[i] + shift;
}

RF_HOT static void affine_add(float *y, const float *x, const float *add, int64_t num, float scale, float shift) {
    for (int64_t i = 0; i < num; i++) y[i] = (scale * x[i] + shift) + add[i];
}

static void map_row(const rf_elementwise_args *a, int64_t row) {
    const float *x = (const float *)a->x + row * a->cols;
    float *y = (float *)a->y + row * a->cols;
    int64_t add_row = 0;
    bool adds = a->add != NULL;
    if (adds) {
        add_row = a->add_index ? a->add_index[row] : row % a->add_period;
        adds = add_row >= 0 && add_row < a->add_period;
    }
    if (adds)
        affine_add(y, x, (const float *)a->add + add_row * a->cols, a->cols, a->x_scale, a->x_shift);
    else
        affine(y, x, a->cols, a->x_scale, a->x_shift);
    rf_cpu_act(y, a->cols, a->act);
}

static void map_layout(const rf_elementwise_args *a, int64_t row) {
    const float *x = (const float *)a->x + row * a->cols;
    float *y = (float *)a->y + row * a->cols;
    int64_t pixels = a->cols / a->channels;
    for (int64_t p = 0; p < pixels; p++) {
        for (int64_t c = 0; c < a->channels; c++) {
            int64_t planar = c * pixels + p, last = p * a->channels + c;
            if (a->planar_to_last)
                y[last] = a->x_scale * x[planar] + a->x_shift;
            else
                y[planar] = a->x_scale * x[last] + a->x_shift;
        }
    }
    rf_cpu_act(y, a->cols, a->act);
}

rf_status rf_elementwise_cpu(rf_stream *stream, const rf_elementwise_args *a, rf_error *err) {
    RF_TRY(stream ? rf_elementwise_check_run(a, err) : rf_elementwise_check(a, err));
    RF_TRY(rf_check_f32("elementwise: x_dtype", a->x_dtype, err));
    RF_TRY(rf_check_f32("elementwise: y_dtype", a->y_dtype, err));
    if (a->add) RF_TRY(rf_check_f32("elementwise: add_dtype", a->add_dtype, err));
    if (!stream || a->rows == 0) return RF_OK;
    rf_stream_note_launch(stream, "elementwise");
    bool layout = a->planar_to_last || a->last_to_planar;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static) if (a->rows * a->cols > RF_SERIAL_WORK)
    for (int64_t row = 0; row < a->rows; row++) {
        if (layout)
            map_layout(a, row);
        else
            map_row(a, row);
    }
    return RF_OK;
}

rf_status rf_timestep_embed_cpu(rf_stream *stream, const rf_timestep_embed_args *a, rf_error *err) {
    RF_TRY(stream ? rf_timestep_embed_check_run(a, err) : rf_timestep_embed_check(a, err));
    RF_TRY(rf_check_f32("timestep_embed: dtype", a->dtype, err));
    if (!stream || a->num == 0) return RF_OK;
    rf_stream_note_launch(stream, "timestep_embed");
    int64_t half = a->dim / 2;
    float log_period = logf(a->max_period);
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t i = 0; i < a->num; i++) {
        float *out = (float *)a->out + i * a->dim;
        for (int64_t j = 0; j < half; j++) {
            /* In f32 like the reference implementations: the angle's rounding is part of what models were trained on. */
            float freq = expf(-log_period * (float)j / ((float)half - a->freq_shift));
            float angle = a->t[i] * freq;
            out[j] = cosf(angle);
            out[half + j] = sinf(angle);
        }
    }
    return RF_OK;
}

rf_status rf_patchify_cpu(rf_stream *stream, const rf_patchify_args *a, rf_error *err) {
    RF_TRY(stream ? rf_patchify_check_run(a, err) : rf_patchify_check(a, err));
    RF_TRY(rf_check_f32("patchify: dtype", a->dtype, err));
    if (!stream || a->batch == 0) return RF_OK;
    rf_stream_note_launch(stream, "patchify");
    float scale = a->scale ? a->scale[(a->step ? *a->step : 0) * a->scale_stride] : 1.0f;
    int64_t gf = a->frames / a->pt, gh = a->height / a->ph, gw = a->width / a->pw;
    int64_t tokens = gf * gh * gw;
    int64_t cols = a->channels * a->pt * a->ph * a->pw;
#pragma omp parallel for num_threads(rf_cpu_threads(stream))                                                           \
    schedule(static) if (a->branches * a->batch * tokens * cols > RF_SERIAL_WORK)
    for (int64_t row = 0; row < a->branches * a->batch * tokens; row++) {
        int64_t token = row % tokens, sample = row / tokens % a->batch;
        if (a->sample_index) sample = a->sample_index[sample];
        int64_t tx = token % gw, ty = token / gw % gh, tf = token / (gw * gh);
        float *out = (float *)a->out + row * cols;
        for (int64_t c = 0; c < a->channels; c++) {
            for (int64_t f = tf * a->pt; f < (tf + 1) * a->pt; f++) {
                for (int64_t y = ty * a->ph; y < (ty + 1) * a->ph; y++) {
                    const float *line =
                        a->latent + (((sample * a->channels + c) * a->frames + f) * a->height + y) * a->width;
                    for (int64_t x = tx * a->pw; x < (tx + 1) * a->pw; x++) *out++ = scale * line[x];
                }
            }
        }
    }
    return RF_OK;
}

/* kernels/sampler_cpu.c - the end of a denoising step and the step counter; see sampler.h for the formulas. */
#include "core/rng.h"
#include "kernels/cpu.h"

/* One line (sample, channel, frame, y) of the latent. */
static void step_line(const rf_sampler_step_args *a, const rf_sampler_coefs *co, int32_t step, int64_t line) {
    int64_t y = line % a->height, f = line / a->height % a->frames;
    int64_t c = line / (a->height * a->frames) % a->channels, b = line / (a->height * a->frames * a->channels);
    int64_t gh = a->height / a->ph, gw = a->width / a->pw;
    int64_t tokens = a->frames / a->pt * gh * gw;
    int64_t patch = (int64_t)a->pt * a->ph * a->pw, cols = a->out_channels * patch;
    int64_t branch_elems = a->batch * tokens * cols;
    int64_t noise_slice = a->batch * a->channels * a->frames * a->height * a->width;
    const float *model_out = a->model_out;
    bool guided = a->branches == 2 && c < a->guided_channels;

    for (int64_t x = 0; x < a->width; x++) {
        int64_t token = (f / a->pt * gh + y / a->ph) * gw + x / a->pw;
        int64_t in_patch = (f % a->pt * a->ph + y % a->ph) * a->pw + x % a->pw;
        int64_t row = (b * tokens + token) * cols;
        int64_t at = line * a->width + x;
        float out = model_out[row + c * patch + in_patch];
        if (guided) {
            float uncond = model_out[branch_elems + row + c * patch + in_patch];
            out = uncond + a->guidance_scale * (out - uncond);
        }
        float old_x = co->x0_x != 0 || co->x != 0 ? a->x[at] : 0.0f;
        float x0 = co->x0_x * old_x + co->x0_out * out;
        if (co->clip > 0) x0 = x0 < -co->clip ? -co->clip : x0 > co->clip ? co->clip : x0;
        float next = co->x * old_x + co->x0 * x0 + co->out * out;
        if (co->x0_prev != 0) next += co->x0_prev * a->x0_prev[at];
        if (co->noise != 0 && a->noise) {
            float s = co->noise;
            if (a->learned_variance) {
                float v = model_out[row + (a->channels + c) * patch + in_patch];
                float frac = 0.5f * (v + 1.0f);
                s *= expf(0.5f * (frac * co->log_max + (1.0f - frac) * co->log_min));
            }
            next += s * a->noise[step * noise_slice + at];
        }
        a->x[at] = next;
        a->x0_prev[at] = x0;
    }
}

rf_status rf_sampler_step_cpu(rf_stream *stream, const rf_sampler_step_args *a, rf_error *err) {
    RF_TRY(stream ? rf_sampler_step_check_run(a, err) : rf_sampler_step_check(a, err));
    RF_TRY(rf_check_f32("sampler_step: model_dtype", a->model_dtype, err));
    if (!stream || a->batch == 0) return RF_OK;
    rf_stream_note_launch(stream, "sampler_step");
    int32_t step = *a->step;
    const rf_sampler_coefs *coefs = a->coefs + step;
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t line = 0; line < a->batch * a->channels * a->frames * a->height; line++)
        step_line(a, coefs, step, line);
    return RF_OK;
}

rf_status rf_step_advance_cpu(rf_stream *stream, const rf_step_advance_args *a, rf_error *err) {
    RF_TRY(stream ? rf_step_advance_check_run(a, err) : rf_step_advance_check(a, err));
    if (!stream) return RF_OK;
    rf_stream_note_launch(stream, "step_advance");
    *a->step += a->increment;
    for (int64_t g = 0; g < a->num_groups; g++)
        a->mod_index[g] = *a->step % a->steps_per_chunk * a->rows_per_step + a->slots[g];
    return RF_OK;
}

rf_status rf_fill_normal_cpu(rf_stream *stream, const rf_fill_normal_args *a, rf_error *err) {
    RF_TRY(stream ? rf_fill_normal_check_run(a, err) : rf_fill_normal_check(a, err));
    RF_TRY(rf_check_f32("fill_normal: dtype", a->dtype, err));
    if (!stream || a->num == 0) return RF_OK;
    rf_stream_note_launch(stream, "fill_normal");
    const int64_t block = 4096; /* a multiple of 4: no generator block is computed twice */
#pragma omp parallel for num_threads(rf_cpu_threads(stream)) schedule(static)
    for (int64_t i = 0; i < rf_div_up(a->num, block); i++) {
        float *out = (float *)a->out + i * block;
        int64_t num = rf_min64(block, a->num - i * block);
        rf_rng_normal_at(a->seed, a->key, (uint64_t)(i * block), out, (size_t)num);
        for (int64_t j = 0; j < num; j++) out[j] = a->mean + a->std * out[j];
    }
    return RF_OK;
}

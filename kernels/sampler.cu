/* kernels/sampler.cu - end of a denoising step, step counter, counter-based normal draws.
 * Maths    kernels/sampler.h; the draws are those of core/rng.c (Philox4x32-10, block = index / 4, Box-Muller in
 *          double).
 * Launch   sampler_step: a thread per latent element; step_advance: one block; fill_normal: a thread per four draws.
 * Cost     4 * latent bytes read or written; model_out is gathered through L2. fill_normal is bound by double
 *          arithmetic.
 * Arch     sm_80 and later.  Checked  tests/kernels against the CPU table. */
#include <cuda_runtime.h>

#include "kernels/checks.h"
#include "kernels/device.cuh"
#include "kernels/launch.cuh"
#include "kernels/ops_cuda.h"

static constexpr int THREADS = 256;

/* --- solver update ------------------------------------------------------------------------------------------------ */

template <class T, class Index>
static __global__ void __launch_bounds__(THREADS) sampler_step_kernel(const __grid_constant__ rf_sampler_step_args p) {
    const int32_t step = *p.step;
    const rf_sampler_coefs co = p.coefs[step];
    const Index w = (Index)p.width, h = (Index)p.height, frames = (Index)p.frames, channels = (Index)p.channels;
    const Index gw = w / p.pw, gh = h / p.ph, tokens = frames / p.pt * gh * gw;
    const Index patch = (Index)p.pt * p.ph * p.pw;
    const int64_t cols = p.out_channels * (int64_t)patch;
    const int64_t branch_elems = p.batch * (int64_t)tokens * cols;
    const Index total = (Index)p.batch * channels * frames * h * w;
    const Index stride = (Index)gridDim.x * THREADS;
    const T *const model_out = (const T *)p.model_out;
    for (Index at = (Index)blockIdx.x * THREADS + threadIdx.x; at < total; at += stride) {
        const Index x = at % w, line = at / w, y = line % h, plane = line / h, f = plane % frames;
        const Index c = plane / frames % channels, b = plane / frames / channels;
        const Index token = (f / p.pt * gh + y / p.ph) * gw + x / p.pw;
        const Index in_patch = (f % p.pt * p.ph + y % p.ph) * p.pw + x % p.pw;
        const int64_t row = ((int64_t)b * tokens + token) * cols + in_patch;

        float out = rf_to_f32(model_out[row + (int64_t)c * patch]);
        if (p.branches == 2 && c < (Index)p.guided_channels) {
            const float uncond = rf_to_f32(model_out[branch_elems + row + (int64_t)c * patch]);
            out = uncond + p.guidance_scale * (out - uncond);
        }
        const float old_x = co.x0_x != 0.0f || co.x != 0.0f ? p.x[at] : 0.0f;
        float x0 = co.x0_x * old_x + co.x0_out * out;
        if (co.clip > 0.0f) x0 = x0 < -co.clip ? -co.clip : x0 > co.clip ? co.clip : x0; /* NaN stays */
        float next = co.x * old_x + co.x0 * x0 + co.out * out;
        if (co.x0_prev != 0.0f) next += co.x0_prev * p.x0_prev[at];
        if (co.noise != 0.0f && p.noise) {
            float s = co.noise;
            if (p.learned_variance) {
                const float v = rf_to_f32(model_out[row + (int64_t)(channels + c) * patch]);
                const float frac = 0.5f * (v + 1.0f);
                s *= expf(0.5f * (frac * co.log_max + (1.0f - frac) * co.log_min));
            }
            next += s * p.noise[step * (int64_t)total + at];
        }
        p.x[at] = next;
        p.x0_prev[at] = x0;
    }
}

extern "C" rf_status rf_sampler_step_cuda(rf_stream *stream, const rf_sampler_step_args *args, rf_error *err) {
    rf_status status = stream ? rf_sampler_step_check_run(args, err) : rf_sampler_step_check(args, err);
    if (status != RF_OK || !stream || args->batch == 0) return status;
    const int64_t total = args->batch * args->channels * args->frames * args->height * args->width;
    const dim3 grid(rf_blocks_for(total, THREADS));
    const bool small = total <= INT32_MAX;
    auto kernel = args->model_dtype == RF_DTYPE_F32
                      ? (small ? sampler_step_kernel<float, uint32_t> : sampler_step_kernel<float, uint64_t>)
                      : (small ? sampler_step_kernel<rf_bf16, uint32_t> : sampler_step_kernel<rf_bf16, uint64_t>);
    return rf_launch(stream, "sampler_step", err, kernel, grid, dim3(THREADS), 0, *args);
}

/* --- step counter ------------------------------------------------------------------------------------------------- */

static __global__ void __launch_bounds__(THREADS) step_advance_kernel(const __grid_constant__ rf_step_advance_args p) {
    const int32_t step = *p.step + p.increment;
    __syncthreads(); /* everybody has the old step */
    if (threadIdx.x == 0) *p.step = step;
    const int32_t base = step % p.steps_per_chunk * p.rows_per_step;
    for (int64_t g = threadIdx.x; g < p.num_groups; g += THREADS) p.mod_index[g] = base + p.slots[g];
}

extern "C" rf_status rf_step_advance_cuda(rf_stream *stream, const rf_step_advance_args *args, rf_error *err) {
    rf_status status = stream ? rf_step_advance_check_run(args, err) : rf_step_advance_check(args, err);
    if (status != RF_OK || !stream) return status;
    return rf_launch(stream, "step_advance", err, step_advance_kernel, dim3(1), dim3(THREADS), 0, *args);
}

/* --- normal draws ------------------------------------------------------------------------------------------------- */

/* Counter (block, key), 64 bits each; two key words from the seed: philox_block in core/rng.c. */
static __device__ __forceinline__ void philox_block(uint64_t seed, uint64_t key, uint64_t block, uint32_t out[4]) {
    uint32_t c0 = (uint32_t)block, c1 = (uint32_t)(block >> 32), c2 = (uint32_t)key, c3 = (uint32_t)(key >> 32);
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint32_t high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        const uint32_t high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

static __device__ __forceinline__ void box_muller(uint32_t a, uint32_t b, float out[2]) {
    const double u = ((double)a + 0.5) * 0x1p-32; /* in (0, 1) */
    const double v = ((double)b + 0.5) * 0x1p-32 * 6.283185307179586476925286766559;
    const double radius = sqrt(-2.0 * log(u));
    double sine, cosine;
    sincos(v, &sine, &cosine);
    out[0] = (float)(radius * cosine);
    out[1] = (float)(radius * sine);
}

template <class T>
static __global__ void __launch_bounds__(THREADS) fill_normal_kernel(const __grid_constant__ rf_fill_normal_args p) {
    const int64_t blocks = (p.num + 3) / 4;
    const bool aligned = ((uintptr_t)p.out & (4 * sizeof(T) - 1)) == 0;
    for (int64_t i = (int64_t)blockIdx.x * THREADS + threadIdx.x; i < blocks; i += (int64_t)gridDim.x * THREADS) {
        uint32_t words[4];
        float draws[4];
        philox_block(p.seed, p.key, (uint64_t)i, words);
        box_muller(words[0], words[1], draws);
        box_muller(words[2], words[3], draws + 2);
#pragma unroll
        for (int k = 0; k < 4; k++) draws[k] = p.mean + p.std * draws[k];
        T *const out = (T *)p.out + i * 4;
        if (aligned && i * 4 + 4 <= p.num) {
            rf_store4(out, draws);
        } else {
            for (int k = 0; k < 4 && i * 4 + k < p.num; k++) out[k] = rf_from_f32<T>(draws[k]);
        }
    }
}

extern "C" rf_status rf_fill_normal_cuda(rf_stream *stream, const rf_fill_normal_args *args, rf_error *err) {
    rf_status status = stream ? rf_fill_normal_check_run(args, err) : rf_fill_normal_check(args, err);
    if (status != RF_OK || !stream || args->num == 0) return status;
    const dim3 grid(rf_blocks_for(rf_ceil_div(args->num, 4), THREADS));
    if (args->dtype == RF_DTYPE_F32)
        return rf_launch(stream, "fill_normal", err, fill_normal_kernel<float>, grid, dim3(THREADS), 0, *args);
    return rf_launch(stream, "fill_normal", err, fill_normal_kernel<rf_bf16>, grid, dim3(THREADS), 0, *args);
}

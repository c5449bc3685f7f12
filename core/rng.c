/* core/rng.c - see rng.h for the three generators and their sources.
 *
 * The counter form computes in double and rounds once, so that the last bit hardly depends on the C library. The PyTorch
 * forms compute in the precision that PyTorch uses; PyTorch's vectorised log, sin and cos and the GPU's fast sin and cos
 * differ from the C library by a few units in the last place, so values agree to about 1e-6, not to the bit. */
#include "core/rng.h"

#include <math.h>
#include <string.h>

#define TWO_PI 6.283185307179586476925286766559

static const char *const kind_names[] = {"counter", "torch-cpu", "torch-cuda"};

bool rf_rng_kind_from_name(const char *name, rf_rng_kind *out) {
    for (int i = 0; name && i < 3; i++) {
        if (strcmp(name, kind_names[i]) == 0) {
            *out = (rf_rng_kind)i;
            return true;
        }
    }
    return false;
}

const char *rf_rng_kind_name(rf_rng_kind kind) {
    return (unsigned)kind < 3 ? kind_names[kind] : "unknown";
}

/* ---- Philox4x32-10 ---- */

void rf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3];
    uint32_t k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        uint64_t p0 = (uint64_t)0xD2511F53u * c0;
        uint64_t p1 = (uint64_t)0xCD9E8D57u * c2;
        c0 = (uint32_t)(p1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)p1;
        c2 = (uint32_t)(p0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)p0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    out[0] = c0;
    out[1] = c1;
    out[2] = c2;
    out[3] = c3;
}

/* Block `block` of subsequence `key` under `seed`: the counter is (block, key), 64 bits each. */
static void philox_block(uint64_t seed, uint64_t key, uint64_t block, uint32_t out[4]) {
    const uint32_t counter[4] = {(uint32_t)block, (uint32_t)(block >> 32), (uint32_t)key, (uint32_t)(key >> 32)};
    const uint32_t seed_words[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    rf_philox4x32(counter, seed_words, out);
}

/* ---- counter form: draw i is lane i % 4 of block i / 4; lanes (0, 1) and (2, 3) are Box-Muller pairs ---- */

static void box_muller(uint32_t x, uint32_t y, float out[2]) {
    double u = ((double)x + 0.5) * 0x1p-32; /* in (0, 1): the logarithm is finite */
    double v = ((double)y + 0.5) * 0x1p-32 * TWO_PI;
    double radius = sqrt(-2.0 * log(u));
    out[0] = (float)(radius * cos(v));
    out[1] = (float)(radius * sin(v));
}

void rf_rng_normal_at(uint64_t seed, uint64_t key, uint64_t first, float *out, size_t num) {
    for (size_t done = 0; done < num;) {
        uint64_t draw = first + done;
        uint32_t words[4];
        float normals[4];
        philox_block(seed, key, draw / 4, words);
        box_muller(words[0], words[1], normals);
        box_muller(words[2], words[3], normals + 2);
        for (unsigned lane = (unsigned)(draw % 4); lane < 4 && done < num; lane++) out[done++] = normals[lane];
    }
}

/* ---- torch-cpu ---- */

static void mt_seed(rf_rng *rng, uint32_t seed) {
    rng->mt[0] = seed;
    for (uint32_t i = 1; i < 624; i++) rng->mt[i] = 1812433253u * (rng->mt[i - 1] ^ (rng->mt[i - 1] >> 30)) + i;
    rng->mt_left = 1;
    rng->mt_next = 0;
}

static void mt_refill(rf_rng *rng) {
    uint32_t *mt = rng->mt;
    for (int i = 0; i < 624; i++) {
        uint32_t y = (mt[i] & 0x80000000u) | (mt[(i + 1) % 624] & 0x7fffffffu);
        mt[i] = mt[(i + 397) % 624] ^ (y >> 1) ^ ((y & 1) ? 0x9908b0dfu : 0);
    }
    rng->mt_left = 624;
    rng->mt_next = 0;
}

static uint32_t mt_random(rf_rng *rng) {
    if (--rng->mt_left == 0) mt_refill(rng);
    uint32_t y = rng->mt[rng->mt_next++];
    y ^= y >> 11;
    y ^= (y << 7) & 0x9d2c5680u;
    y ^= (y << 15) & 0xefc60000u;
    return y ^ (y >> 18);
}

static float mt_uniform24(rf_rng *rng) {
    return (float)(mt_random(rng) & 0xffffffu) * 0x1p-24f;
}

static double mt_uniform53(rf_rng *rng) {
    uint64_t high = mt_random(rng);
    uint64_t bits = (high << 32) | mt_random(rng);
    return (double)(bits & ((UINT64_C(1) << 53) - 1)) * 0x1p-53;
}

static double torch_cpu_normal_one(rf_rng *rng) {
    if (rng->has_cached) {
        rng->has_cached = false;
        return rng->cached;
    }
    double u1 = mt_uniform53(rng);
    double u2 = mt_uniform53(rng);
    double radius = sqrt(-2.0 * log1p(-u2));
    double theta = TWO_PI * u1;
    rng->cached = radius * sin(theta);
    rng->has_cached = true;
    return radius * cos(theta);
}

/* 16 uniforms to 16 normals in place; elements j and j + 8 are a pair. */
static void torch_cpu_fill16(float *x) {
    for (int j = 0; j < 8; j++) {
        float u1 = 1.0f - x[j]; /* [0, 1) to (0, 1] */
        float u2 = x[j + 8];
        float radius = sqrtf(-2.0f * logf(u1));
        float theta = (float)TWO_PI * u2;
        x[j] = radius * cosf(theta);
        x[j + 8] = radius * sinf(theta);
    }
}

static void torch_cpu_normal(rf_rng *rng, float *out, size_t num) {
    if (num < 16) {
        for (size_t i = 0; i < num; i++) out[i] = (float)torch_cpu_normal_one(rng);
        return;
    }
    for (size_t i = 0; i < num; i++) out[i] = mt_uniform24(rng);
    for (size_t i = 0; i + 16 <= num; i += 16) torch_cpu_fill16(out + i);
    if (num % 16 != 0) { /* the last 16 are drawn again, as PyTorch does */
        float *last = out + num - 16;
        for (int i = 0; i < 16; i++) last[i] = mt_uniform24(rng);
        torch_cpu_fill16(last);
    }
}

/* ---- torch-cuda: thread t of the grid is Philox subsequence t; each turn of its loop uses one block for 4 elements that
 * lie a whole grid apart ---- */

static void curand_box_muller(uint32_t x, uint32_t y, float out[2]) {
    const float inv = 2.3283064e-10f; /* 2^-32 */
    const float inv_2pi = 2.3283064e-10f * 6.2831855f;
    float u = fmaf((float)x, inv, inv / 2);
    float v = fmaf((float)y, inv_2pi, inv_2pi / 2);
    float s = sqrtf(-2.0f * logf(u));
    out[0] = s * sinf(v);
    out[1] = s * cosf(v);
}

static void torch_cuda_normal(rf_rng *rng, float *out, size_t num) {
    if (num == 0) return;
    const uint64_t block = 256, unroll = 4;
    uint64_t max_grid = (uint64_t)rng->cuda_num_sms * ((uint64_t)rng->cuda_threads_per_sm / block);
    uint64_t grid = (num + block - 1) / block;
    if (max_grid > 0 && grid > max_grid) grid = max_grid;
    uint64_t threads = block * grid;
    uint64_t turns = (num - 1) / (threads * unroll) + 1;
    for (uint64_t turn = 0; turn < turns; turn++) {
        for (uint64_t thread = 0; thread < threads; thread++) {
            uint64_t first = turn * threads * unroll + thread;
            if (first >= num) break;
            uint32_t words[4];
            float normals[4];
            philox_block(rng->seed, thread, rng->offset / 4 + turn, words);
            curand_box_muller(words[0], words[1], normals);
            curand_box_muller(words[2], words[3], normals + 2);
            for (uint64_t i = 0; i < unroll; i++) {
                uint64_t at = first + i * threads;
                if (at < num) out[at] = normals[i];
            }
        }
    }
    rng->offset += turns * 4;
}

/* ---- common ---- */

void rf_rng_init(rf_rng *rng, rf_rng_kind kind, uint64_t seed) {
    memset(rng, 0, sizeof *rng);
    rng->kind = kind;
    rng->seed = seed;
    rng->cuda_num_sms = 132;
    rng->cuda_threads_per_sm = 2048;
    mt_seed(rng, (uint32_t)seed);
}

void rf_rng_normal(rf_rng *rng, float *out, size_t num) {
    switch (rng->kind) {
    case RF_RNG_COUNTER:
        rf_rng_normal_at(rng->seed, 0, rng->offset, out, num);
        rng->offset += num;
        break;
    case RF_RNG_TORCH_CPU: torch_cpu_normal(rng, out, num); break;
    case RF_RNG_TORCH_CUDA: torch_cuda_normal(rng, out, num); break;
    }
}

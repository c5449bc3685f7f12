/* core/rng.h - normal draws that can be made again: our own counter-based generator and the two of PyTorch.
 *
 * Sources  Philox4x32-10: Salmon et al. 2011 (Random123). torch-cpu: mt19937 (Matsumoto and Nishimura 1998) with the
 *          draw order of PyTorch's normal_ on CPU (Box-Muller on pairs for < 16 elements through double draws with a
 *          cached second normal, the blocked form of 16 for >= 16 elements). torch-cuda: Philox4x32-10 with one
 *          subsequence per thread, the grid and unrolling of PyTorch's normal_ on CUDA and cuRAND's Box-Muller.
 * The counter form is the default: draw i of stream `key` depends on (seed, key, i) alone, whatever was drawn before. */
#ifndef RF_CORE_RNG_H
#define RF_CORE_RNG_H

#include "core/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum { RF_RNG_COUNTER = 0, RF_RNG_TORCH_CPU, RF_RNG_TORCH_CUDA } rf_rng_kind;

typedef struct {
    rf_rng_kind kind;
    uint64_t seed;
    uint64_t offset;  /* counter: draws so far; torch-cuda: Philox offset of the generator */
    uint32_t mt[624]; /* torch-cpu state */
    int mt_left;
    int mt_next;
    bool has_cached; /* torch-cpu: second normal of a pair, kept between calls of fewer than 16 */
    double cached;
    int cuda_num_sms;        /* torch-cuda: grid size depends on the card; default 132 (H100) */
    int cuda_threads_per_sm; /* default 2048 */
} rf_rng;

/* Names as on the command line: "counter", "torch-cpu", "torch-cuda". */
bool rf_rng_kind_from_name(const char *name, rf_rng_kind *out);
const char *rf_rng_kind_name(rf_rng_kind kind);

void rf_rng_init(rf_rng *rng, rf_rng_kind kind, uint64_t seed);

/* Writes num standard normals as one call of torch.randn(num, generator=g) would, and moves the generator on. */
void rf_rng_normal(rf_rng *rng, float *out, size_t num);

/* Counter form without state: num normals of stream key, starting at draw `first`. */
void rf_rng_normal_at(uint64_t seed, uint64_t key, uint64_t first, float *out, size_t num);

/* The Philox4x32-10 block function: counter (4 words) and key (2 words) to 4 words. */
void rf_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]);

#ifdef __cplusplus
}
#endif
#endif

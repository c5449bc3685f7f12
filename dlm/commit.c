/* dlm/commit.c - commit rules of diffusion decoding. */
#include "dlm/commit.h"

#include <math.h>
#include <stdlib.h>

#include "core/rng.h"

/* Streams of the counter generator: sampled tokens use (position, step, 0) (kernels/text.h); these have a last word of their own. */
enum { STREAM_ALG_TEMP = 1, STREAM_ORIGIN = 2 };

int32_t rf_commit_share(int32_t masks, int32_t steps, int32_t t) {
    return masks / steps + (t < masks % steps ? 1 : 0);
}

double rf_commit_uniform(uint64_t seed, uint32_t stream, int32_t step, int32_t position) {
    const uint32_t counter[4] = {0, (uint32_t)position, (uint32_t)step, stream};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t word[4];
    rf_philox4x32(counter, key, word);
    return ((double)word[0] + 0.5) / 4294967296.0;
}

double rf_commit_gumbel(uint64_t seed, uint32_t stream, int32_t step, int32_t position) {
    return -log(-log(rf_commit_uniform(seed, stream, step, position)));
}

static int by_confidence(const void *pa, const void *pb) {
    const rf_candidate *a = pa, *b = pb;
    if (a->confidence != b->confidence) return a->confidence > b->confidence ? -1 : 1;
    return a->position < b->position ? -1 : a->position > b->position;
}

static int by_entropy(const void *pa, const void *pb) {
    const rf_candidate *a = pa, *b = pb;
    if (a->entropy != b->entropy) return a->entropy < b->entropy ? -1 : 1;
    return a->position < b->position ? -1 : a->position > b->position;
}

static int by_position(const void *pa, const void *pb) {
    const rf_candidate *a = pa, *b = pb;
    return a->position < b->position ? -1 : a->position > b->position;
}

static int32_t above_threshold(const rf_decode_options *o, const rf_candidate *c, int32_t num) {
    int32_t n = 0;
    while (n < num && (o->threshold_strict ? c[n].confidence > o->threshold : c[n].confidence >= o->threshold)) n++;
    return n;
}

/* Fast-dLLM: if n tokens have p > 1 - eps and (n + 1) eps <= 1, the product of their argmaxes is the joint argmax. */
static int32_t within_factor(double factor, const rf_candidate *c, int32_t num) {
    int32_t n = 0;
    for (int32_t i = 1; i <= num; i++)
        if ((i + 1) * (1.0 - c[i - 1].confidence) < factor) n = i;
    return n;
}

static int32_t within_entropy(double bound, const rf_candidate *c, int32_t num) {
    double sum = 0.0;
    int32_t n = 0;
    for (; n < num; n++) { /* ascending: the newest is the largest */
        sum += c[n].entropy;
        if (sum - c[n].entropy > bound) break;
    }
    return n;
}

static int32_t origin(const rf_decode_options *o, double transfer, int32_t step, rf_candidate *c, int32_t num) {
    int32_t n = 0;
    for (int32_t i = 0; i < num; i++)
        if (transfer >= 1.0 || rf_commit_uniform(o->seed, STREAM_ORIGIN, step, c[i].position) < transfer) {
            const rf_candidate taken = c[i];
            c[i] = c[n];
            c[n++] = taken;
        }
    return n;
}

int32_t rf_commit_select(const rf_decode_options *o, int32_t count, double transfer, int32_t step, rf_candidate *c,
                         int32_t num) {
    if (num <= 0) return 0;
    if (o->commit == RF_COMMIT_SEQUENTIAL || o->commit == RF_COMMIT_ORIGIN || o->commit == RF_COMMIT_GUIDED)
        qsort(c, (size_t)num, sizeof *c, by_position);
    else if (o->commit == RF_COMMIT_ENTROPY_BOUND)
        qsort(c, (size_t)num, sizeof *c, by_entropy);
    else {
        if (o->alg_temp > 0.0 && o->commit == RF_COMMIT_SCHEDULE)
            /* the n largest of confidence / T + Gumbel noise are n draws without replacement from softmax(confidence / T) */
            for (int32_t i = 0; i < num; i++)
                c[i].confidence = (float)(c[i].confidence / o->alg_temp +
                                          rf_commit_gumbel(o->seed, STREAM_ALG_TEMP, step, c[i].position));
        qsort(c, (size_t)num, sizeof *c, by_confidence);
    }
    int32_t n = 0;
    switch (o->commit) {
    case RF_COMMIT_TOPN:
    case RF_COMMIT_SCHEDULE:
    case RF_COMMIT_SEQUENTIAL: return count < num ? count : num;
    case RF_COMMIT_ORIGIN: return origin(o, transfer, step, c, num);
    case RF_COMMIT_THRESHOLD:
        n = above_threshold(o, c, num);
        if (o->dynamic && n < count) n = count < num ? count : num;
        break;
    case RF_COMMIT_FACTOR: n = within_factor(o->factor, c, num); break;
    case RF_COMMIT_ENTROPY_BOUND: n = within_entropy(o->entropy_bound, c, num); break;
    case RF_COMMIT_GUIDED: break; /* decided by the guide (dlm/guide.h) */
    }
    return n > 0 ? n : 1;
}

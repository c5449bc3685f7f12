/* dlm/sampling.h - a token from a row of logits on the host, for the settings that need the whole row: top-k, top-p, min-p and
 * repetition penalty. Greedy decoding and plain temperature do not come here (kernels/text.h, head_stats).
 *
 * Order as in transformers' generate: penalty, temperature, top-k, top-p, min-p, then one categorical draw.
 *   top-k   the k largest, and all that are as large as the k-th
 *   top-p   sorted down, kept until the probability in front reaches p: the first that passes the line stays
 *   min-p   those with probability >= min_p * largest, of what top-k and top-p left */
#ifndef RF_DLM_SAMPLING_H
#define RF_DLM_SAMPLING_H

#include "dlm/decode.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct {
    double temperature; /* 0 = argmax of what the filters leave */
    int32_t top_k;
    double top_p, min_p, repetition_penalty;
    const int32_t *history; /* ids that the penalty meets, any order, repeats allowed */
    int32_t num_history;
    double uniform; /* the draw, in (0, 1) */
} rf_sampling;

/* logits [vocab] are changed by the penalty; scratch [vocab] rf_sampling_entry. stats: id, prob (of the id in the filtered
 * distribution), best, best_prob, margin and entropy likewise, lse of the filtered logits. NaN logits count as -inf. */
typedef struct {
    float z;
    int32_t id;
} rf_sampling_entry;
void rf_sample_row(const rf_sampling *s, float *logits, int32_t vocab, rf_sampling_entry *scratch,
                   rf_token_stats *stats);

#ifdef __cplusplus
}
#endif
#endif

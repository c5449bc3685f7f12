/* caching/kv/sentences.h - sentences of one sequence, and which of them are said again later (SkipKV, arXiv 2512.07993). Host only.
 *
 * A sentence ends behind a token that is one of the rule's delimiters. Its vector is the mean of the last layer's hidden states of its
 * tokens, at length 1. Of two sentences whose vectors have a cosine of at least the rule's sentence_threshold, the tokens of the
 * earlier one are penalised by that cosine, by the largest of several. Sentences of one token are of no account, and neither is one that
 * has not ended. Penalties are kept by true position: they follow whatever the cache drops. */
#ifndef RF_CACHING_KV_SENTENCES_H
#define RF_CACHING_KV_SENTENCES_H

#include "caching/kv/kv.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef struct rf_kv_sentences rf_kv_sentences;

/* dim: columns of a hidden state. The rule's delimiters and threshold are copied. */
rf_status rf_kv_sentences_create(rf_kv_sentences **out, const rf_kv_rule *rule, int32_t dim, rf_error *err);
void rf_kv_sentences_destroy(rf_kv_sentences *s); /* NULL is a no-op */
void rf_kv_sentences_reset(rf_kv_sentences *s);
/* The token behind those before, and its hidden state [dim]. */
rf_status rf_kv_sentences_add(rf_kv_sentences *s, int32_t token, const float *hidden, rf_error *err);
/* [*num] by true position, 0: not said again. Valid until the next add. */
const float *rf_kv_sentences_penalty(const rf_kv_sentences *s, int32_t *num);
int32_t rf_kv_sentences_num(const rf_kv_sentences *s);
/* Of vectors and penalties. */
size_t rf_kv_sentences_bytes(const rf_kv_sentences *s);

#ifdef __cplusplus
}
#endif
#endif

/* dlm/kv_calibrate.h - which heads of a model retrieve, and how much each layer loses under a window rule: what kv.json is made of
 * (dlm/kv_tables.h).
 *
 * Razor       K random tokens, four times over. Of the rows from the second time on: echo = attention to the same token one time
 *             before, induction = attention to the token behind that; means over rows. Retrieval heads: the most of either, a share
 *             of all heads of the model (RazorAttention, arXiv 2407.15891).
 * CompressKV  Of prompts with a needle and the answer that the model gave: rows whose next token is one of the needle's add the
 *             attention mass over the needle (arXiv 2508.02401). Layers: |W_O (o' - o)| / |W_O o| of the answer's rows, o' over the
 *             keys alone that the window rule (attention of the last rows of the prompt, sum, mean pool of 5, mean over listed
 *             heads) and the answer's own rows leave, mean over prompts. */
#ifndef RF_DLM_KV_CALIBRATE_H
#define RF_DLM_KV_CALIBRATE_H

#include "dlm/model.h"

#ifdef __cplusplus
extern "C" {
#endif

/* echo, induction [L][Hq]. num_random: K; 0 = a quarter of the model's positions, at most 2500. */
rf_status rf_kv_calibrate_razor(const rf_text_model *model, int32_t num_random, uint64_t seed, float *echo,
                                float *induction, rf_error *err);
/* flags [num] of the ceil(share * num) largest; ties to the first. */
rf_status rf_kv_flag_top(uint8_t *flags, const float *scores, int num, double share, rf_error *err);

typedef struct {
    const int32_t *tokens;            /* prompt and the model's answer */
    int32_t num, num_prompt;          /* num > num_prompt: rows num_prompt - 1..num - 2 say the answer */
    int32_t needle_begin, needle_end; /* of the prompt */
} rf_kv_needle;

/* scores [L][Hq], sums over prompts. */
rf_status rf_kv_calibrate_heads(const rf_text_model *model, const rf_kv_needle *needles, int num, float *scores,
                                rf_error *err);
/* shares [L], their sum 1. list [L][Hq] flags; ratio: of the prompt. */
rf_status rf_kv_calibrate_layers(const rf_text_model *model, const rf_kv_needle *needles, int num, const uint8_t *list,
                                 int32_t window, double ratio, float *shares, rf_error *err);

#ifdef __cplusplus
}
#endif
#endif

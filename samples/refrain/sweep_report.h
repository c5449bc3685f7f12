/* samples/refrain/sweep_report.h - what a sweep found: verdicts against the control, the table for a terminal, and
 * report.html.
 *
 * The control is the same sampler with fewer steps and no cache. Its curve (PSNR over the logarithm of the measured
 * speed-up) is what a policy has to beat: a point on or under the curve is worth nothing, since running fewer steps
 * gives as much. Of text it is exact match in place of PSNR. */
#ifndef REFRAIN_SWEEP_REPORT_H
#define REFRAIN_SWEEP_REPORT_H

#include "samples/refrain/sweep_store.h"

typedef enum {
    SWEEP_PSNR = 0,
    SWEEP_SSIM,
    SWEEP_LATENT,
    SWEEP_KEPT,
    SWEEP_SCORE, /* text: exact match */
    SWEEP_AGREEMENT,
    SWEEP_NUM_METRICS
} sweep_metric;
double sweep_metric_of(const sweep_row *row, sweep_metric metric); /* the mean over pictures; KEPT and text's in % */

bool sweep_is_control(const sweep_row *row);
/* `none`: the uncached run itself, or with its context treated otherwise. Not text with another commit rule. */
bool sweep_is_uncached(const sweep_row *row);
bool sweep_is_measured(const sweep_row *row); /* neither refused nor without numbers */

typedef enum {
    SWEEP_VERDICT_NONE = 0, /* refused, or no policy */
    SWEEP_VERDICT_ABOVE,
    SWEEP_VERDICT_BELOW,
    SWEEP_VERDICT_OPEN /* outside the speeds of the control, and not to be decided from there */
} sweep_verdict_kind;
typedef struct {
    sweep_verdict_kind kind;
    double delta; /* PSNR over the control's, dB; of text exact match, points; NaN where the curve has no value */
    char text[96];
} sweep_verdict;
sweep_verdict sweep_judge(const sweep_store *store, const sweep_row *row);

/* "fora:interval=3", "no cache, 20 steps": for people. */
void sweep_row_name(const sweep_row *row, char *out, size_t room);

/* Is row on the front: no measured policy is both faster and better. */
bool sweep_on_front(const sweep_store *store, const sweep_row *row, sweep_metric metric);

/* Indices of all rows by falling speed-up, of KV policies by falling score and then by what is kept, refused ones last. order:
 * [sweep_store_num]. */
void sweep_sort(const sweep_store *store, int *order);

/* The results as a table on standard output. RF_ERR_MEMORY. */
rf_status sweep_print_table(const sweep_store *store, rf_error *err);

/* Writes <folder>/report.html from what the store holds, with plots by gnuplot if it is found, else by own ones. */
rf_status sweep_write_report(const sweep_store *store, rf_error *err);

#endif

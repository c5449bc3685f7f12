/* samples/refrain/sweep_store.h - what `refrain sweep` has measured, in a folder that survives a kill at any moment.
 *
 *   settings.json    what a run is pinned to (model, sampler, steps, seeds, ...), written once
 *   reference.f32    the uncached run: one line of JSON (the pins and shapes), then raw little-endian floats:
 *                    latents [num, C, h, w], then decoded pictures [num, 3, H, W]
 *   results.csv      a line a setting, appended and synced when the setting is done; a torn last line is cut off
 *   baselines.csv    every timing of the uncached loop: seconds since 1970, milliseconds
 *   results.json     the same as the CSV files, rewritten as a whole under another name and renamed
 *   pictures/        PNGs that the report shows
 *
 * Of a world the pictures are frames, all new ones of a walk after the other, and a line has more columns. Of text the
 * latents are token ids (-1 behind the end), the "pictures" single numbers (1 right, 0 wrong); columns of pictures are left out.
 *
 * A folder made with other pins is refused with what differs. Without a folder everything lives in memory. */
#ifndef REFRAIN_SWEEP_STORE_H
#define REFRAIN_SWEEP_STORE_H

#include "core/status.h"

#define SWEEP_EQUAL_DB 100.0 /* stands for the infinite PSNR of equal pictures, so that means stay finite */

typedef struct {
    const char *name;
    char *value;
} sweep_pin;

/* Texts are rf_alloc'ed and never NULL in a store; numbers that were not measured are NaN. */
typedef struct {
    char *key, *policy, *options;
    char *status;                             /* "ok" or "refused" */
    char *reason;                             /* of a refusal */
    double steps;                             /* of the sampler */
    double speedup;                           /* base_ms / loop_ms */
    double loop_ms, loop_min_ms, loop_max_ms; /* all pictures through the denoising loop: median, least, most */
    double repeats;
    double base_ms;                                  /* the uncached loop around that time */
    double steps_full, steps_partial, steps_skipped; /* image-steps */
    double share_steps, share_blocks, share_rows;    /* computed / all: full steps, whole blocks, token rows */
    double cache_bytes, decide_ms;                   /* decide_ms: of the whole loop */
    double psnr_mean, psnr_median, psnr_worst;
    double ssim_mean, ssim_median, ssim_worst;
    double max_abs;
    double latent_mean, latent_median, latent_worst; /* relative L2 of the final latent */
    char *psnr_each, *ssim_each, *latent_each;       /* per picture, spaces between */
    char *kinds;                                     /* steps of picture 0: F full, P partial, s skipped */

    /* Worlds; a "loop" is all walks without decoding. */
    double plain_speedup; /* against the uncached run that computes its context in every step */
    double frame_denoise_ms, frame_context_ms, frame_decode_ms; /* of a new frame, means */
    double frames_per_s;                                        /* with decoding */
    double worst_frame, first_under_30; /* frame numbers, the prompt is 0; over all walks; NaN = never under 30 dB */
    double sim_psnr;                    /* to the simulator's frames, mean */
    double kept;                        /* that of the uncached run = 1 */
    double frame_forwards;              /* of one walk: frames through the transformer */
    double arena_bytes;
    char *sim_each; /* sim_psnr by frame, as psnr_each */

    /* Text; a "loop" is all samples of all tasks. The picture's columns are not there. */
    double score;     /* exact match, mean over tasks, 0..1 */
    double agreement; /* share of tokens equal to the uncached run's, mean over samples */
    double tok_s, nfe, row_passes, key_reads, text_tokens; /* tokens a second; the others a sample, means */
    char *score_each;                                      /* exact match by task, as psnr_each */

    /* Text with KV policies: means over samples, at their ends. */
    double kept_bytes, full_bytes;         /* keys and values kept; those that a full cache holds */
    double evictions, score_ms, kv_budget; /* score_ms: behind the prompt and while decoding */
} sweep_row;

void sweep_row_clear(sweep_row *row); /* frees texts, numbers become NaN */

typedef struct sweep_store sweep_store;

/* folder NULL: memory only. pins are copied; one named "frames" makes it a store of a world, "tasks" of text, and "kv" with it of KV policies. Makes the folder, locks it, reads
 * what is there. */
rf_status sweep_store_open(sweep_store **out, const char *folder, const sweep_pin *pins, int num_pins, rf_error *err);
bool sweep_store_is_world(const sweep_store *store);
bool sweep_store_is_text(const sweep_store *store);
bool sweep_store_is_kv(const sweep_store *store);         /* which is text too */
void sweep_store_close(sweep_store *store);               /* NULL is a no-op; does not write */
const char *sweep_store_folder(const sweep_store *store); /* NULL = memory */

int sweep_store_num(const sweep_store *store);
const sweep_row *sweep_store_at(const sweep_store *store, int index);
int sweep_store_find(const sweep_store *store, const char *key); /* -1 = not there */
/* Takes row's texts (row is zeroed, also on failure). The line is on disk when this returns. */
rf_status sweep_store_add(sweep_store *store, sweep_row *row, rf_error *err);
/* Forgets a refusal, so that it can be tried again. */
rf_status sweep_store_forget_refusal(sweep_store *store, const char *key, rf_error *err);
/* Rewrites results.json now (adding does it too, at most every two seconds). */
rf_status sweep_store_write_json(const sweep_store *store, rf_error *err);
/* The text of results.json, rf_free; found >= 0: with that row once more as "found", what a search ended at. */
rf_status sweep_store_json(const sweep_store *store, int found, char **out, rf_error *err);

/* Timings of the uncached loop. */
rf_status sweep_store_add_baseline(sweep_store *store, double ms, rf_error *err);
int sweep_store_num_baselines(const sweep_store *store);
double sweep_store_baseline(const sweep_store *store, int index, double *unix_seconds); /* ms */
/* Median of the last `last` timings (0 = all); NaN if there is none. */
double sweep_store_base_ms(const sweep_store *store, int last);

int sweep_store_num_pins(const sweep_store *store);
const sweep_pin *sweep_store_pin_at(const sweep_store *store, int index);
const char *sweep_store_pin(const sweep_store *store, const char *name); /* "" if there is none */

typedef struct {
    int num;
    int latent[3], image[3]; /* C, h, w; 3, H, W */
    float *latents, *pictures;
} sweep_reference;
/* RF_ERR_MISSING if there is none. */
rf_status sweep_store_load_reference(const sweep_store *store, sweep_reference *out, rf_error *err);
rf_status sweep_store_save_reference(const sweep_store *store, const sweep_reference *reference, rf_error *err);
void sweep_reference_free(sweep_reference *reference);

/* "<folder>/pictures/<name>", rf_free; makes the folder. */
rf_status sweep_store_picture_path(const sweep_store *store, const char *name, char **out, rf_error *err);
/* 16 hexadecimal digits for a key (FNV-1a, 64 bits). */
void sweep_key_hash(const char *key, char out[17]);

double sweep_median(const double *values, int num); /* NaN for none */

#endif

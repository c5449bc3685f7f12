/* tests/bench/bench_long_rollouts.c - do long rollouts of a world end in noise, in patches, in one colour or in a frozen
 * picture, and does their memory stay constant? Counted for several cache settings on the same first frames, actions, noise.
 *
 *   bench_long_rollouts [--model DIR] [--device cpu|cuda|cuda:N] [--dtype f32|bf16] [-t threads] [-b rollouts] [--frames N]
 *                       [--sheet FILE.png] SETTING...
 *   bench_long_rollouts --selftest
 *
 *   SETTING   none | decoded | latent-noise | POLICY[:option=value,...], then [@rebuild|@keep|@sinks] and
 *             [+carry=off|first|last]
 *             decoded and latent-noise are no rollouts and show what the judgement makes of them: every frame is the
 *             simulator's, encoded and decoded by the model's VAE; every frame decodes a fresh normal latent.
 *
 * Rollouts  1..b start at worlds 1..b of the maze simulator. Actions are held for 2..12 frames, drawn from the rollout's number
 *           alone: the walk sees no walls, so its law is the same in the model's world and in the simulator's.
 * Measured  on frames rounded to 8 bits, a mean over a window of 100 frames (a quarter of the rollout if that is less):
 *             difference  mean absolute change of a frame against the one before, where the action moves or turns
 *             Laplacian   mean |4 x - left - right - above - below| of luma
 *             borders     steps of luma across the borders of latent pixels over those next to them: of every stretch of
 *                         border between two latent pixels, (mean step across it + 1 level) / (mean of the two steps on
 *                         either side + 1 level); the median over a frame's stretches, as a horizon or a wall may well lie
 *                         on one line of the grid. 1 where the grid leaves no trace. A frame that falls apart into patches
 *                         can have the Laplacian and the colours of a true one.
 *             colours     mean and standard deviation over a frame of R, G and B
 * Bounds    from the simulator, every window of 64 other walks of 200 frames in other worlds:
 *             BLANK   Laplacian under half of its 0.1th percentile (checked first)
 *             FROZEN  difference under a quarter of its 1st percentile
 *             NOISE   Laplacian or difference over 1.25 x their 99.9th percentile; a colour value outside its extremes
 *                     widened by 10 % of their distance at both ends; or a value that is not finite
 *             PATCHES borders over 1.25 x their 99.9th percentile, of the frames of 16 of these walks after the model's VAE has
 *                     encoded and decoded them (it leaves faint borders) or of the true ones if that is more
 *           Verdicts are those of the windows that end at a quarter, at half and at the end of the rollout; "bad windows" counts
 *           all windows of all rollouts. The row "simulator" judges the true walks of the rollouts: its counts are false alarms.
 * Memory    statistics are running sums. Device bytes and live host allocations must be the same at frame 100 and at the end;
 *           VmRSS may grow by 1 KiB a frame at most, 256 KiB at least.
 * Exit      0; 1 an error; 2 usage; 3 memory grew, or a setting ends badly in more rollouts than the first `none` does. */
#include <errno.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include "core/image.h"
#include "core/memory.h"
#include "dit/world.h"
#include "samples/worlds/maze.h"

#define RENDER_SAMPLES   3 /* rays a pixel side: what the shipped model was trained on */
#define TRUE_WALKS       64
#define TRUE_FRAMES      200
#define TRUE_FIRST_WORLD 1000001 /* no rollout starts there */
#define DECODED_WALKS    16      /* of the true ones */
#define MAX_WINDOW       100
#define MIN_FRAMES       40
#define MAX_FRAMES       1000000
#define MAX_BATCH        256
#define MAX_SETTINGS     32
#define NAME_BYTES       128
#define NUM_CHECKPOINTS  3
#define SHEET_COLUMNS    9
#define SHEET_ROLLOUTS   4
#define SHEET_LABEL      132 /* pixels */
#define SHEET_GAP        2
#define SHEET_HEAD       12
#define DEFAULT_MODEL    "samples/models/maze"

enum {
    STAT_DIFFERENCE = 0,
    STAT_LAPLACIAN,
    STAT_BORDERS,
    STAT_COLORS, /* means of R, G, B, then deviations */
    NUM_STATS = STAT_COLORS + 6
};

typedef enum { VERDICT_FINE = 0, VERDICT_FROZEN, VERDICT_NOISE, VERDICT_PATCHES, VERDICT_BLANK, NUM_VERDICTS } verdict;
static const char verdict_marks[NUM_VERDICTS] = {'.', 'F', 'N', 'P', 'B'};

static double now_s(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

/* ---- walks ------------------------------------------------------------------------------------------------------- */

typedef struct {
    uint64_t seed;
    uint32_t num_holds;
    int action, frames_left;
} held_walk;

static int next_action(held_walk *w) {
    static const struct {
        int action;
        uint32_t percent;
    } law[] = {{MAZE_FORWARD, 40},    {MAZE_LEFT, 19},        {MAZE_RIGHT, 19}, {MAZE_BACK, 7},
               {MAZE_STRAFE_LEFT, 5}, {MAZE_STRAFE_RIGHT, 5}, {MAZE_NONE, 5}};
    if (w->frames_left == 0) {
        const uint32_t counter[4] = {w->num_holds++, 0, 0, 0};
        const uint32_t key[2] = {(uint32_t)w->seed, (uint32_t)(w->seed >> 32)};
        uint32_t drawn[4], left;
        rf_philox4x32(counter, key, drawn);
        w->frames_left = 2 + (int)(drawn[1] % 11);
        left = drawn[0] % 100;
        for (size_t i = 0; i < sizeof law / sizeof law[0]; i++) {
            w->action = law[i].action;
            if (left < law[i].percent) break;
            left -= law[i].percent;
        }
    }
    w->frames_left--;
    return w->action;
}

/* ---- what is measured -------------------------------------------------------------------------------------------- */

typedef struct {
    double sums[NUM_STATS];
    int num_frames, num_moving;
    bool finite;
} window_sums;

typedef struct {
    int width, height, patch_width, patch_height; /* patch: pixels of a latent pixel */
    float *frame, *last, *luma;                   /* levels 0..255: [3][height][width] twice and [height][width] */
    double *stretches;                            /* [num_stretches], scratch of border_ratio */
    bool has_last;
    window_sums sums;
} watcher;

static void clear_window(window_sums *w) {
    *w = (window_sums){.finite = true};
}

static bool create_watcher(watcher *w, int width, int height, int patch_width, int patch_height) {
    size_t pixels = (size_t)width * (size_t)height;
    *w = (watcher){.width = width, .height = height, .patch_width = patch_width, .patch_height = patch_height};
    w->frame = rf_alloc_zero(3 * pixels, sizeof(float));
    w->last = rf_alloc_zero(3 * pixels, sizeof(float));
    w->luma = rf_alloc_zero(pixels, sizeof(float));
    w->stretches = rf_alloc_zero(2 * (size_t)(width / patch_width) * (size_t)(height / patch_height), sizeof(double));
    clear_window(&w->sums);
    return w->frame && w->last && w->luma && w->stretches;
}

static void free_watcher(watcher *w) {
    rf_free(w->frame);
    rf_free(w->last);
    rf_free(w->luma);
    rf_free(w->stretches);
    *w = (watcher){0};
}

static void restart_watcher(watcher *w) {
    w->has_last = false;
    clear_window(&w->sums);
}

/* planar [3][height][width] in [-1, 1] to levels; false if a value is not finite. */
static bool to_levels(const float *planar, float *levels, size_t num) {
    bool finite = true;
    for (size_t i = 0; i < num; i++) {
        float x = planar[i] * 127.5F + 127.5F;
        finite = finite && isfinite(x);
        levels[i] = x > 0 ? (x < 255 ? rintf(x) : 255) : 0;
    }
    return finite;
}

static double mean_laplacian(const float *luma, int width, int height) {
    double sum = 0;
    for (int y = 1; y + 1 < height; y++) {
        const float *row = luma + (size_t)y * (size_t)width;
        float of_row = 0;
        for (int x = 1; x + 1 < width; x++)
            of_row += fabsf(4 * row[x] - row[x - 1] - row[x + 1] - row[x - width] - row[x + width]);
        sum += (double)of_row;
    }
    return sum / ((double)(width - 2) * (double)(height - 2));
}

static int by_value(const void *a, const void *b) {
    double x = *(const double *)a, y = *(const double *)b;
    return (x > y) - (x < y);
}

/* A stretch of border: `step` leads from pixel to pixel across it and `along` from pixel to pixel beside it; at: the first
 * pixel before it. Needs three pixels on either side. */
static double stretch_ratio(const float *at, int length, int step, int along) {
    double across = 0, beside = 0;
    for (int i = 0; i < length; i++, at += along) {
        across += (double)fabsf(at[step] - at[0]);
        beside += (double)(fabsf(at[0] - at[-step]) + fabsf(at[-step] - at[-2 * step]));
        beside += (double)(fabsf(at[2 * step] - at[step]) + fabsf(at[3 * step] - at[2 * step]));
    }
    return (across / length + 1) / (beside / (4 * length) + 1);
}

/* Median over the stretches of border of a frame; 1 if there are none, or latent pixels are under three pixels wide. */
static double border_ratio(const watcher *w) {
    const int pw = w->patch_width, ph = w->patch_height;
    size_t num = 0;
    for (int y = 0; y + ph <= w->height; y += ph) {
        for (int x = 0; x + pw <= w->width; x += pw) {
            const float *corner = w->luma + (size_t)y * (size_t)w->width + (size_t)x;
            if (x > 0 && pw >= 3) w->stretches[num++] = stretch_ratio(corner - 1, ph, 1, w->width);
            if (y > 0 && ph >= 3) w->stretches[num++] = stretch_ratio(corner - w->width, pw, w->width, 1);
        }
    }
    if (num == 0) return 1;
    qsort(w->stretches, num, sizeof *w->stretches, by_value);
    return 0.5 * (w->stretches[(num - 1) / 2] + w->stretches[num / 2]);
}

/* Statistics of one frame. difference stays unset where there is none. */
static void measure_frame(watcher *w, double stats[NUM_STATS]) {
    size_t pixels = (size_t)w->width * (size_t)w->height;
    for (int c = 0; c < 3; c++) {
        const float *plane = w->frame + (size_t)c * pixels;
        double sum = 0, squares = 0;
        for (size_t i = 0; i < pixels; i++) {
            sum += (double)plane[i];
            squares += (double)plane[i] * (double)plane[i];
        }
        double mean = sum / (double)pixels, variance = squares / (double)pixels - mean * mean;
        stats[STAT_COLORS + c] = mean;
        stats[STAT_COLORS + 3 + c] = sqrt(variance > 0 ? variance : 0);
    }
    const float *r = w->frame, *g = r + pixels, *b = g + pixels;
    for (size_t i = 0; i < pixels; i++) w->luma[i] = 0.299F * r[i] + 0.587F * g[i] + 0.114F * b[i];
    stats[STAT_LAPLACIAN] = mean_laplacian(w->luma, w->width, w->height);
    stats[STAT_BORDERS] = border_ratio(w);
    if (!w->has_last) return;
    double sum = 0;
    for (size_t i = 0; i < 3 * pixels; i++) sum += (double)fabsf(w->frame[i] - w->last[i]);
    stats[STAT_DIFFERENCE] = sum / (double)(3 * pixels);
}

/* Adds a frame to the window. moving: the action that led to it moves or turns. stats may be NULL. */
static void watch_frame(watcher *w, const float *planar, bool moving, double *stats) {
    double measured[NUM_STATS] = {0};
    bool finite = to_levels(planar, w->frame, 3 * (size_t)w->width * (size_t)w->height);
    measure_frame(w, measured);
    w->sums.finite = w->sums.finite && finite;
    w->sums.num_frames++;
    for (int i = STAT_LAPLACIAN; i < NUM_STATS; i++) w->sums.sums[i] += measured[i];
    if (moving && w->has_last) {
        w->sums.sums[STAT_DIFFERENCE] += measured[STAT_DIFFERENCE];
        w->sums.num_moving++;
    }
    if (stats) memcpy(stats, measured, sizeof measured);
    float *swap = w->last;
    w->last = w->frame;
    w->frame = swap;
    w->has_last = true;
}

/* Means of a window; the difference is NaN if no action moved. */
static void window_means(const window_sums *w, double means[NUM_STATS]) {
    for (int i = 0; i < NUM_STATS; i++) {
        int num = i == STAT_DIFFERENCE ? w->num_moving : w->num_frames;
        means[i] = num > 0 ? w->sums[i] / num : (double)NAN;
    }
}

/* ---- judgement --------------------------------------------------------------------------------------------------- */

typedef struct {
    double low[NUM_STATS], high[NUM_STATS], mean[NUM_STATS]; /* mean of the true windows, to compare with */
} true_bounds;

static verdict judge(const window_sums *w, const true_bounds *bounds) {
    double means[NUM_STATS];
    window_means(w, means);
    if (!w->finite || w->num_frames == 0) return VERDICT_NOISE;
    if (!(means[STAT_LAPLACIAN] >= bounds->low[STAT_LAPLACIAN])) return VERDICT_BLANK;
    if (w->num_moving > 0 && !(means[STAT_DIFFERENCE] >= bounds->low[STAT_DIFFERENCE])) return VERDICT_FROZEN;
    for (int i = 0; i < NUM_STATS; i++) {
        if (i == STAT_BORDERS || (i == STAT_DIFFERENCE && w->num_moving == 0)) continue;
        if (!(means[i] >= bounds->low[i] && means[i] <= bounds->high[i])) return VERDICT_NOISE;
    }
    if (!(means[STAT_BORDERS] <= bounds->high[STAT_BORDERS])) return VERDICT_PATCHES;
    return VERDICT_FINE;
}

static double percentile(const double *sorted, size_t num, double percent) {
    double at = percent / 100 * (double)(num - 1);
    size_t below = (size_t)at;
    if (below + 1 >= num) return sorted[num - 1];
    return sorted[below] + (at - (double)below) * (sorted[below + 1] - sorted[below]);
}

static void set_bounds(true_bounds *out, int stat, double *values, size_t num) {
    double sum = 0;
    qsort(values, num, sizeof *values, by_value);
    for (size_t i = 0; i < num; i++) sum += values[i];
    out->mean[stat] = sum / (double)num;
    double margin = 0.1 * (values[num - 1] - values[0]);
    out->low[stat] = values[0] - margin;
    out->high[stat] = values[num - 1] + margin;
    if (stat >= STAT_COLORS) return;
    out->low[stat] = stat == STAT_DIFFERENCE ? 0.25 * percentile(values, num, 1) : 0.5 * percentile(values, num, 0.1);
    out->high[stat] = 1.25 * percentile(values, num, 99.9);
}

static void to_planar(const uint8_t *rgb, float *planar, size_t pixels) {
    for (size_t i = 0; i < pixels; i++)
        for (size_t c = 0; c < 3; c++) planar[c * pixels + i] = (float)rgb[3 * i + c] / 127.5F - 1;
}

typedef struct {
    int width, height, patch_width, patch_height, samples, window;
} true_view;

/* A walk through the true world: stats [TRUE_FRAMES][NUM_STATS], moving [TRUE_FRAMES]. */
static bool measure_true_walk(const true_view *v, uint64_t number, double (*stats)[NUM_STATS], bool *moving) {
    size_t pixels = (size_t)v->width * (size_t)v->height;
    held_walk walk = {.seed = number};
    maze_world world;
    watcher w;
    bool ok = create_watcher(&w, v->width, v->height, v->patch_width, v->patch_height);
    uint8_t *rgb = rf_alloc(3 * pixels);
    float *planar = rf_alloc(3 * pixels * sizeof *planar);
    ok = ok && rgb && planar;
    maze_init(&world, number);
    for (int i = 0; i <= TRUE_FRAMES && ok; i++) {
        int action = i > 0 ? next_action(&walk) : MAZE_NONE;
        if (i > 0) maze_step(&world, action);
        maze_render(&world, v->width, v->height, v->samples, rgb);
        to_planar(rgb, planar, pixels);
        watch_frame(&w, planar, false, i > 0 ? stats[i - 1] : NULL);
        if (i > 0) moving[i - 1] = action != MAZE_NONE;
    }
    rf_free(planar);
    rf_free(rgb);
    free_watcher(&w);
    return ok;
}

/* values [NUM_STATS][num_windows]: of every window of a walk, from `at` on. */
static void true_windows(double (*stats)[NUM_STATS], const bool *moving, int window, double **values, size_t at) {
    for (int first = 0; first + window <= TRUE_FRAMES; first++) {
        window_sums w = {.finite = true};
        double means[NUM_STATS];
        for (int i = first; i < first + window; i++) {
            w.num_frames++;
            w.num_moving += moving[i];
            for (int s = 0; s < NUM_STATS; s++)
                if (s != STAT_DIFFERENCE || moving[i]) w.sums[s] += stats[i][s];
        }
        window_means(&w, means);
        if (w.num_moving == 0) means[STAT_DIFFERENCE] = 0; /* short windows only: lowers the bound, hides nothing */
        for (int s = 0; s < NUM_STATS; s++) values[s][at] = means[s];
        at++;
    }
}

static rf_status calibrate(true_bounds *out, const true_view *v, rf_error *err) {
    size_t per_walk = (size_t)(TRUE_FRAMES - v->window + 1), num = TRUE_WALKS * per_walk;
    double *memory = rf_alloc_zero(NUM_STATS * num, sizeof *memory), *values[NUM_STATS];
    double(*stats)[NUM_STATS] = rf_alloc_zero((size_t)TRUE_WALKS * TRUE_FRAMES, sizeof *stats);
    bool *moving = rf_alloc_zero((size_t)TRUE_WALKS * TRUE_FRAMES, sizeof *moving), ok = memory && stats && moving;
    for (int s = 0; s < NUM_STATS && memory; s++) values[s] = memory + (size_t)s * num;
    if (ok) {
        int failed = 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) reduction(+ : failed)
#endif
        for (int i = 0; i < TRUE_WALKS; i++) {
            double(*own)[NUM_STATS] = stats + (size_t)i * TRUE_FRAMES;
            bool *own_moving = moving + (size_t)i * TRUE_FRAMES;
            failed += !measure_true_walk(v, TRUE_FIRST_WORLD + (uint64_t)i, own, own_moving);
            true_windows(own, own_moving, v->window, values, (size_t)i * per_walk);
        }
        ok = failed == 0;
    }
    for (int s = 0; s < NUM_STATS && ok; s++) set_bounds(out, s, values[s], num);
    rf_free(moving);
    rf_free(stats);
    rf_free(memory);
    return ok ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for %d walks of the simulator", TRUE_WALKS);
}

/* ---- settings ---------------------------------------------------------------------------------------------------- */

typedef enum { SOURCE_MODEL = 0, SOURCE_SIMULATOR, SOURCE_DECODED, SOURCE_LATENT_NOISE } frame_source;

typedef struct {
    char name[NAME_BYTES];
    frame_source source;
    rf_policy *policy; /* NULL: none */
    rf_context_mode context;
    rf_cache_carry carry;
} setting;

static rf_status read_setting(setting *s, const char *text, rf_error *err) {
    char left[NAME_BYTES];
    if (strlen(text) >= sizeof left) return rf_fail(err, RF_ERR_ARGUMENT, "%.40s...: longer than %d", text, NAME_BYTES);
    *s = (setting){0};
    snprintf(s->name, sizeof s->name, "%s", text);
    snprintf(left, sizeof left, "%s", text);
    char *carry = strstr(left, "+carry=");
    if (carry && !rf_cache_carry_from_name(carry + strlen("+carry="), &s->carry))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected +carry=off|first|last at the end", text);
    if (carry) *carry = 0;
    char *context = strrchr(left, '@');
    if (context && !rf_context_mode_from_name(context + 1, &s->context))
        return rf_fail(err, RF_ERR_ARGUMENT, "%s: expected @rebuild, @keep or @sinks", text);
    if (context) *context = 0;
    if (strcmp(left, "latent-noise") == 0) s->source = SOURCE_LATENT_NOISE;
    if (strcmp(left, "decoded") == 0) s->source = SOURCE_DECODED;
    bool plain = strcmp(left, "none") == 0 || s->source != SOURCE_MODEL;
    if (plain && carry) return rf_fail(err, RF_ERR_ARGUMENT, "%s: +carry without a policy does nothing", text);
    if (plain) return RF_OK;
    char *options = strchr(left, ':');
    if (options) *options++ = 0;
    rf_status st = rf_policy_create(&s->policy, left, err);
    if (st == RF_OK && options) st = rf_policy_set(s->policy, options, err);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "%s", text);
}

/* What the others are compared with. */
static bool is_uncached(const setting *s) {
    return s->source == SOURCE_MODEL && !s->policy && s->context == RF_CONTEXT_REBUILD;
}

/* ---- a run ------------------------------------------------------------------------------------------------------- */

typedef struct {
    size_t device_bytes;
    long rss_kib;
    uint64_t live_allocs;
} memory_use;

typedef struct {
    int verdicts[NUM_CHECKPOINTS][NUM_VERDICTS];
    char ends[MAX_BATCH + 1]; /* a mark a rollout */
    int64_t windows, bad_windows;
    double end_laplacian, end_difference, end_borders; /* of the last window, mean over rollouts */
    double seconds;                                    /* making and reading frames */
    memory_use early, late;
    bool has_memory;
} run_result;

typedef struct {
    const char *model_name, *sheet_path;
    rf_backend *backend;
    rf_world_model *model;
    rf_world_model_info info;
    int batch, num_frames, window, memory_frame;
    int checkpoints[NUM_CHECKPOINTS];    /* frames */
    int action_places[MAZE_NUM_ACTIONS]; /* in an action row; -1: a row of zeros */
    true_bounds bounds;
    double decoded_borders; /* mean over the windows of decoded walks */
    setting settings[MAX_SETTINGS];
    int num_settings;
    rf_image sheet; /* rgb NULL: none wanted */

    /* of the run in progress */
    const setting *setting;
    int sheet_row;        /* in settings, the simulator first */
    uint64_t first_world; /* of the rollouts */
    rf_world_session *session;
    maze_world *mazes; /* [batch] */
    held_walk *walks;  /* [batch] */
    int *actions;      /* [batch] that led to the newest frame */
    watcher *watchers; /* [batch] */
    char *marks;       /* [batch] of the last whole window */
    uint64_t *seeds;   /* [batch] */
    float *rows;       /* [batch][action_dim] */
    float *latents;    /* [batch][C][h][w] */
    float *frames;     /* [batch][3][H][W] */
    uint8_t *rendered; /* [batch][H][W][3] */
} bench;

static size_t frame_elems(const bench *b) {
    return 3 * (size_t)b->info.frame_width * (size_t)b->info.frame_height;
}

static int patch_width(const bench *b) {
    return b->info.frame_width / b->info.latent_width;
}

static int patch_height(const bench *b) {
    return b->info.frame_height / b->info.latent_height;
}

static size_t latent_elems(const bench *b) {
    return (size_t)b->info.latent_channels * (size_t)b->info.latent_height * (size_t)b->info.latent_width;
}

static long resident_kib(void) {
    char line[256];
    long kib = -1;
    FILE *f = fopen("/proc/self/status", "r");
    while (f && fgets(line, sizeof line, f))
        if (strncmp(line, "VmRSS:", 6) == 0) kib = strtol(line + 6, NULL, 10);
    if (f) fclose(f);
    return kib;
}

static memory_use use_memory(const bench *b) {
    return (memory_use){.device_bytes = rf_backend_get_counts(b->backend).device_bytes,
                        .rss_kib = resident_kib(),
                        .live_allocs = rf_memory_get_counts().num_live};
}

static bool memory_grew(const memory_use *early, const memory_use *late, int num_frames) {
    long allowed = num_frames > 256 ? num_frames : 256;
    return late->device_bytes > early->device_bytes || late->live_allocs > early->live_allocs || early->rss_kib < 0 ||
           late->rss_kib > early->rss_kib + allowed;
}

static void render_mazes(bench *b) {
    size_t elems = frame_elems(b);
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic)
#endif
    for (int i = 0; i < b->batch; i++) {
        uint8_t *rgb = b->rendered + (size_t)i * elems;
        maze_render(&b->mazes[i], b->info.frame_width, b->info.frame_height, RENDER_SAMPLES, rgb);
        to_planar(rgb, b->frames + (size_t)i * elems, elems / 3);
    }
}

/* The first frames, in b->frames as the source shows them. */
static rf_status begin(bench *b, rf_error *err) {
    for (int i = 0; i < b->batch; i++) {
        b->seeds[i] = b->first_world + (uint64_t)i;
        maze_init(&b->mazes[i], b->seeds[i]);
        b->walks[i] = (held_walk){.seed = b->seeds[i]};
        restart_watcher(&b->watchers[i]);
        b->actions[i] = MAZE_NONE;
        b->marks[i] = verdict_marks[VERDICT_FINE];
    }
    render_mazes(b);
    if (b->setting->source == SOURCE_SIMULATOR) return RF_OK;
    RF_TRY(rf_world_session_start(b->session, b->frames, 1, NULL, b->seeds, err));
    return rf_world_session_read_frame(b->session, b->frames, err);
}

/* The next actions and the frames they lead to. */
static rf_status advance(bench *b, int frame, rf_error *err) {
    size_t dim = (size_t)b->info.action_dim;
    memset(b->rows, 0, (size_t)b->batch * dim * sizeof *b->rows);
    for (int i = 0; i < b->batch; i++) {
        int action = b->actions[i] = next_action(&b->walks[i]), place = b->action_places[action];
        if (place >= 0) b->rows[(size_t)i * dim + (size_t)place] = 1;
    }
    if (b->setting->source == SOURCE_SIMULATOR || b->setting->source == SOURCE_DECODED) {
        for (int i = 0; i < b->batch; i++) maze_step(&b->mazes[i], b->actions[i]);
        render_mazes(b);
        if (b->setting->source == SOURCE_SIMULATOR) return RF_OK;
        RF_TRY(rf_world_session_start(b->session, b->frames, 1, NULL, b->seeds, err));
    } else if (b->setting->source == SOURCE_LATENT_NOISE) {
        size_t elems = latent_elems(b);
        for (int i = 0; i < b->batch; i++)
            rf_rng_normal_at(b->seeds[i], (uint64_t)frame, 0, b->latents + (size_t)i * elems, elems);
        RF_TRY(rf_world_session_start_latents(b->session, b->latents, 1, NULL, b->seeds, err));
    } else {
        RF_TRY(rf_world_session_step(b->session, b->rows, NULL, err));
    }
    return rf_world_session_read_frame(b->session, b->frames, err);
}

static void watch_all(bench *b) {
    size_t elems = frame_elems(b);
#ifdef _OPENMP
#pragma omp parallel for
#endif
    for (int i = 0; i < b->batch; i++)
        watch_frame(&b->watchers[i], b->frames + (size_t)i * elems, b->actions[i] != MAZE_NONE, NULL);
}

/* A window ends at `frame`. */
static void judge_all(bench *b, int frame, run_result *r) {
    double laplacian = 0, difference = 0, borders = 0;
    int num_moving = 0;
    for (int i = 0; i < b->batch; i++) {
        double means[NUM_STATS];
        const window_sums *sums = &b->watchers[i].sums;
        verdict v = judge(sums, &b->bounds);
        window_means(sums, means);
        laplacian += means[STAT_LAPLACIAN];
        borders += means[STAT_BORDERS];
        if (sums->num_moving > 0) difference += means[STAT_DIFFERENCE];
        num_moving += sums->num_moving > 0;
        b->marks[i] = verdict_marks[v];
        r->windows++;
        r->bad_windows += v != VERDICT_FINE;
        for (int c = 0; c < NUM_CHECKPOINTS; c++) r->verdicts[c][v] += b->checkpoints[c] == frame;
        clear_window(&b->watchers[i].sums);
    }
    r->end_laplacian = laplacian / b->batch;
    r->end_borders = borders / b->batch;
    r->end_difference = num_moving > 0 ? difference / num_moving : (double)NAN;
    memcpy(r->ends, b->marks, (size_t)b->batch);
    r->ends[b->batch] = 0;
}

/* ---- contact sheet ----------------------------------------------------------------------------------------------- */

static int sheet_rollouts(const bench *b) {
    return b->batch < SHEET_ROLLOUTS ? b->batch : SHEET_ROLLOUTS;
}

static int sheet_frame(const bench *b, int column) {
    return (int)((int64_t)b->num_frames * column / (SHEET_COLUMNS - 1));
}

static rf_status create_sheet(bench *b, rf_error *err) {
    static const uint8_t white[3] = {255, 255, 255}, black[3] = {0, 0, 0};
    int rows = (1 + b->num_settings) * sheet_rollouts(b), tile = b->info.frame_width + SHEET_GAP;
    if (!b->sheet_path) return RF_OK;
    RF_TRY(rf_image_create(&b->sheet, SHEET_LABEL + SHEET_COLUMNS * tile,
                           SHEET_HEAD + rows * (b->info.frame_height + SHEET_GAP), white, err));
    for (int c = 0; c < SHEET_COLUMNS; c++) {
        char text[24];
        snprintf(text, sizeof text, "%d", sheet_frame(b, c));
        rf_image_draw_text(&b->sheet, SHEET_LABEL + c * tile, 2, 1, black, text);
    }
    return RF_OK;
}

/* The setting's name beside its first row, 21 characters a line. */
static void label_rows(bench *b) {
    static const uint8_t black[3] = {0, 0, 0};
    char line[22];
    int y = SHEET_HEAD + b->sheet_row * sheet_rollouts(b) * (b->info.frame_height + SHEET_GAP);
    for (size_t at = 0; b->sheet.rgb && at < strlen(b->setting->name); at += sizeof line - 1, y += 10) {
        snprintf(line, sizeof line, "%s", b->setting->name + at);
        rf_image_draw_text(&b->sheet, 2, y, 1, black, line);
    }
}

/* The frames of the first rollouts; a mark where the last whole window was bad. */
static rf_status place_on_sheet(bench *b, int frame, rf_error *err) {
    static const uint8_t red[3] = {255, 0, 0};
    int column = 0;
    while (column < SHEET_COLUMNS && sheet_frame(b, column) != frame) column++;
    if (!b->sheet.rgb || column == SHEET_COLUMNS) return RF_OK;
    int x = SHEET_LABEL + column * (b->info.frame_width + SHEET_GAP);
    for (int i = 0; i < sheet_rollouts(b); i++) {
        rf_image tile = {0};
        int row = b->sheet_row * sheet_rollouts(b) + i, y = SHEET_HEAD + row * (b->info.frame_height + SHEET_GAP);
        const float *planar = b->frames + (size_t)i * frame_elems(b);
        RF_TRY(rf_image_from_planar(&tile, planar, b->info.frame_width, b->info.frame_height, err));
        rf_image_blit(&b->sheet, &tile, x, y);
        rf_image_free(&tile);
        const char mark[2] = {b->marks[i], 0};
        if (mark[0] != verdict_marks[VERDICT_FINE]) rf_image_draw_text(&b->sheet, x + 1, y + 1, 2, red, mark);
    }
    return RF_OK;
}

/* ---- a setting --------------------------------------------------------------------------------------------------- */

static rf_status roll(bench *b, run_result *r, rf_error *err) {
    RF_TRY(begin(b, err));
    watch_all(b); /* frame 0 is the one before frame 1 */
    for (int i = 0; i < b->batch; i++) clear_window(&b->watchers[i].sums);
    RF_TRY(place_on_sheet(b, 0, err));
    for (int frame = 1; frame <= b->num_frames; frame++) {
        double start = now_s();
        RF_TRY(advance(b, frame, err));
        r->seconds += now_s() - start;
        watch_all(b);
        if (frame % b->window == 0) judge_all(b, frame, r);
        RF_TRY(place_on_sheet(b, frame, err));
        if (frame == b->memory_frame) r->early = use_memory(b);
    }
    r->late = use_memory(b);
    return RF_OK;
}

static rf_status run_setting(bench *b, const setting *s, int sheet_row, run_result *r, rf_error *err) {
    *r = (run_result){.has_memory = s->source == SOURCE_MODEL};
    b->setting = s;
    b->sheet_row = sheet_row;
    label_rows(b);
    rf_status st = RF_OK;
    if (s->source != SOURCE_SIMULATOR) {
        rf_world_options o = rf_world_options_default();
        o.batch = b->batch;
        o.context = s->context;
        o.policy = s->policy;
        o.carry = s->carry;
        st = rf_world_session_create(&b->session, b->model, &o, err);
    }
    if (st == RF_OK) st = roll(b, r, err);
    rf_world_session_destroy(b->session);
    b->session = NULL;
    if (st == RF_OK && b->sheet.rgb) st = rf_image_save_png(&b->sheet, b->sheet_path, NULL, 0, err);
    return st == RF_OK ? st : rf_fail_prefix(err, st, "%s", s->name);
}

/* ---- what the VAE leaves of true walks --------------------------------------------------------------------------- */

/* borders [DECODED_WALKS][TRUE_FRAMES] of the first true walks, encoded and decoded. b: its arrays are used, nothing else. */
static rf_status measure_decoded_walks(const bench *b, double (*borders)[TRUE_FRAMES], rf_error *err) {
    static const setting decoded = {.name = "decoded", .source = SOURCE_DECODED};
    bench part = *b;
    rf_world_options o = rf_world_options_default();
    rf_status st = RF_OK;
    part.setting = &decoded;
    part.batch = b->batch < DECODED_WALKS ? b->batch : DECODED_WALKS;
    o.batch = part.batch;
    o.window = 2; /* the least: there is nothing to remember */
    RF_TRY(rf_world_session_create(&part.session, b->model, &o, err));
    for (int first = 0; first < DECODED_WALKS && st == RF_OK; first += part.batch) {
        part.first_world = TRUE_FIRST_WORLD + (uint64_t)first;
        st = begin(&part, err);
        for (int frame = 1; frame <= TRUE_FRAMES && st == RF_OK; frame++) {
            st = advance(&part, frame, err);
            if (st != RF_OK) break;
            for (int i = 0; i < part.batch; i++) {
                double stats[NUM_STATS];
                watch_frame(&part.watchers[i], part.frames + (size_t)i * frame_elems(b), false, stats);
                if (first + i < DECODED_WALKS) borders[first + i][frame - 1] = stats[STAT_BORDERS];
            }
        }
    }
    rf_world_session_destroy(part.session);
    return st;
}

/* Allows for the borders that the VAE leaves in true frames. */
static rf_status calibrate_borders(bench *b, rf_error *err) {
    size_t per_walk = (size_t)(TRUE_FRAMES - b->window + 1), num = 0;
    double(*borders)[TRUE_FRAMES] = rf_alloc_zero(DECODED_WALKS, sizeof *borders);
    double *values = rf_alloc_zero(DECODED_WALKS * per_walk, sizeof *values);
    rf_status st = RF_OK;
    true_bounds decoded;
    if (!borders || !values) st = rf_fail(err, RF_ERR_MEMORY, "out of memory for %d decoded walks", DECODED_WALKS);
    if (st == RF_OK) st = measure_decoded_walks(b, borders, err);
    for (int walk = 0; walk < DECODED_WALKS && st == RF_OK; walk++) {
        for (int first = 0; first + b->window <= TRUE_FRAMES; first++) {
            double sum = 0;
            for (int i = 0; i < b->window; i++) sum += borders[walk][first + i];
            values[num++] = sum / b->window;
        }
    }
    if (st == RF_OK) {
        set_bounds(&decoded, STAT_BORDERS, values, num);
        b->decoded_borders = decoded.mean[STAT_BORDERS];
        if (decoded.high[STAT_BORDERS] > b->bounds.high[STAT_BORDERS])
            b->bounds.high[STAT_BORDERS] = decoded.high[STAT_BORDERS];
    }
    rf_free(values);
    rf_free(borders);
    return st;
}

/* ---- rows -------------------------------------------------------------------------------------------------------- */

static int num_bad_ends(const run_result *r) {
    const int *end = r->verdicts[NUM_CHECKPOINTS - 1];
    return end[VERDICT_FROZEN] + end[VERDICT_NOISE] + end[VERDICT_PATCHES] + end[VERDICT_BLANK];
}

static void print_head(const bench *b) {
    printf("%s, %s, batch %d, %d frames, %d steps a frame, windows of %d frames\n", b->model_name,
           rf_backend_description(b->backend), b->batch, b->num_frames, b->info.num_steps, b->window);
    printf(
        "Simulator, %d walks: difference %.2f (frozen under %.2f, noise over %.2f), Laplacian %.2f (blank under %.2f, "
        "noise over %.2f)\n",
        TRUE_WALKS, b->bounds.mean[STAT_DIFFERENCE], b->bounds.low[STAT_DIFFERENCE], b->bounds.high[STAT_DIFFERENCE],
        b->bounds.mean[STAT_LAPLACIAN], b->bounds.low[STAT_LAPLACIAN], b->bounds.high[STAT_LAPLACIAN]);
    printf("Borders %.3f, decoded %.3f (patches over %.3f)", b->bounds.mean[STAT_BORDERS], b->decoded_borders,
           b->bounds.high[STAT_BORDERS]);
    printf("; allowed means of R, G, B");
    for (int i = STAT_COLORS; i < NUM_STATS; i++)
        printf("%s %.0f..%.0f",
               i == STAT_COLORS + 3 ? "; deviations"
               : i == STAT_COLORS   ? ""
                                    : ",",
               b->bounds.low[i], b->bounds.high[i]);
    printf("\n\n| setting | frames/s |");
    for (int c = 0; c < NUM_CHECKPOINTS; c++) printf(" frozen/noise/patches/blank at %d |", b->checkpoints[c]);
    printf(
        " each end | bad windows | difference | Laplacian | borders | device MiB at %d, end | VmRSS MiB at %d, end |\n",
        b->memory_frame, b->memory_frame);
    printf("|---|---:|---|---|---|---|---:|---:|---:|---:|---:|---:|\n");
    fflush(stdout);
}

static void print_row(const char *name, const bench *b, const run_result *r) {
    printf("| %s | %.1f |", name, (double)b->batch * b->num_frames / r->seconds);
    for (int c = 0; c < NUM_CHECKPOINTS; c++)
        printf(" %d/%d/%d/%d of %d |", r->verdicts[c][VERDICT_FROZEN], r->verdicts[c][VERDICT_NOISE],
               r->verdicts[c][VERDICT_PATCHES], r->verdicts[c][VERDICT_BLANK], b->batch);
    printf(" `%s` | %lld of %lld | %.2f | %.2f | %.3f |", r->ends, (long long)r->bad_windows, (long long)r->windows,
           r->end_difference, r->end_laplacian, r->end_borders);
    if (r->has_memory) {
        const double mib = 1024 * 1024;
        printf(" %.3f, %.3f | %.2f, %.2f |\n", (double)r->early.device_bytes / mib, (double)r->late.device_bytes / mib,
               (double)r->early.rss_kib / 1024, (double)r->late.rss_kib / 1024);
    } else {
        printf(" - | - |\n");
    }
    fflush(stdout);
}

/* Says what follows from the rows; the exit status. */
static int conclude(const bench *b, const run_result *results) {
    const run_result *base = NULL;
    int code = 0;
    printf("\n");
    for (int i = 0; i < b->num_settings && !base; i++)
        if (is_uncached(&b->settings[i])) base = &results[i];
    for (int i = 0; i < b->num_settings; i++) {
        const run_result *r = &results[i];
        const char *name = b->settings[i].name;
        if (!r->has_memory) continue;
        if (memory_grew(&r->early, &r->late, b->num_frames)) {
            printf("%s: MEMORY GREW: device %+lld bytes, VmRSS %+ld KiB, live allocations %+lld\n", name,
                   (long long)r->late.device_bytes - (long long)r->early.device_bytes,
                   r->late.rss_kib - r->early.rss_kib,
                   (long long)r->late.live_allocs - (long long)r->early.live_allocs);
            code = 3;
        }
        if (!base || base == r) continue;
        bool worse = num_bad_ends(r) > num_bad_ends(base);
        printf("%s: %d of %d end badly, uncached %d: %s\n", name, num_bad_ends(r), b->batch, num_bad_ends(base),
               worse ? "MORE OFTEN" : "not more often");
        if (worse) code = 3;
    }
    if (!base) printf("No setting `none` with @rebuild: ends are not compared.\n");
    if (code == 0) printf("Memory constant in all settings.\n");
    return code;
}

/* ---- self-test --------------------------------------------------------------------------------------------------- */

typedef enum {
    FEED_TRUE = 0,
    FEED_FROZEN,
    FEED_NEARLY_FROZEN, /* one level up and down */
    FEED_WHITE_NOISE,
    FEED_STATIC_NOISE,
    FEED_BLOBS, /* noise of 8 x 8 squares, blended: little Laplacian */
    FEED_GREY,
    FEED_WASHED_OUT, /* a fifteenth of the contrast */
    FEED_FADED_RED,  /* red saturates, detail stays */
    FEED_NAN,
    FEED_PATCHES, /* every latent pixel brighter or darker by up to PATCH_LEVELS */
    FEED_EDGE,    /* one edge along a line of the grid, as strong */
    NUM_FEEDS
} feed;

#define PATCH_LEVELS 12

static float uniform(uint32_t a, uint32_t b) {
    const uint32_t counter[4] = {a, b, 0, 0}, key[2] = {7, 11};
    uint32_t drawn[4];
    rf_philox4x32(counter, key, drawn);
    return (float)(drawn[0] >> 8) / 8388608.0F - 1;
}

static float blob(uint32_t frame, int channel, int x, int y) {
    uint32_t at = (uint32_t)((y / 8) * 64 + x / 8 + channel * 65536);
    float fx = (float)(x % 8) / 8, fy = (float)(y % 8) / 8;
    float top = uniform(frame, at) * (1 - fx) + uniform(frame, at + 1) * fx;
    return top * (1 - fy) + (uniform(frame, at + 64) * (1 - fx) + uniform(frame, at + 65) * fx) * fy;
}

/* Turns the true frame into what is fed; `first` is the true frame of the walk's start. */
static void spoil(feed kind, uint32_t frame, const float *first, float *planar, const true_view *v) {
    size_t pixels = (size_t)v->width * (size_t)v->height;
    for (size_t i = 0; i < 3 * pixels; i++) {
        int channel = (int)(i / pixels), x = (int)(i % pixels) % v->width, y = (int)(i % pixels) / v->width;
        uint32_t patch = (uint32_t)(y / v->patch_height * v->width + x / v->patch_width);
        switch (kind) {
        case FEED_FROZEN: planar[i] = first[i]; break;
        case FEED_NEARLY_FROZEN: planar[i] = first[i] + (uniform(frame, (uint32_t)i) > 0 ? 1 : 0) / 127.5F; break;
        case FEED_WHITE_NOISE: planar[i] = uniform(frame, (uint32_t)i); break;
        case FEED_STATIC_NOISE: planar[i] = uniform(0, (uint32_t)i); break;
        case FEED_BLOBS: planar[i] = blob(frame, channel, x, y); break;
        case FEED_GREY: planar[i] = 0; break;
        case FEED_WASHED_OUT: planar[i] /= 15; break;
        case FEED_FADED_RED: planar[i] = channel == 0 ? 1 - (1 - planar[i]) / 20 : planar[i]; break;
        case FEED_NAN: planar[i] = i == 5 ? (float)NAN : planar[i]; break;
        case FEED_PATCHES: planar[i] += PATCH_LEVELS / 127.5F * uniform(frame, patch); break;
        case FEED_EDGE: planar[i] += (y < v->patch_height ? 2 : 0) * PATCH_LEVELS / 127.5F; break;
        default: break;
        }
    }
}

/* Two windows of a held-out walk: the first true, the second spoiled. */
static rf_status feed_walk(const true_view *v, const true_bounds *bounds, uint64_t number, feed kind, verdict got[2],
                           rf_error *err) {
    size_t pixels = (size_t)v->width * (size_t)v->height;
    held_walk walk = {.seed = number};
    maze_world world;
    watcher w;
    bool ok = create_watcher(&w, v->width, v->height, v->patch_width, v->patch_height);
    uint8_t *rgb = rf_alloc(3 * pixels);
    float *planar = rf_alloc(3 * pixels * sizeof *planar), *first = rf_alloc(3 * pixels * sizeof *first);
    ok = ok && rgb && planar && first;
    maze_init(&world, number);
    for (int i = 1; i <= 2 * v->window && ok; i++) {
        int action = next_action(&walk);
        maze_step(&world, action);
        maze_render(&world, v->width, v->height, v->samples, rgb);
        to_planar(rgb, planar, pixels);
        if (i == v->window) memcpy(first, planar, 3 * pixels * sizeof *first);
        if (i > v->window) spoil(kind, (uint32_t)i, first, planar, v);
        watch_frame(&w, planar, action != MAZE_NONE, NULL);
        if (i % v->window != 0) continue;
        got[i / v->window - 1] = judge(&w.sums, bounds);
        clear_window(&w.sums);
    }
    rf_free(first);
    rf_free(planar);
    rf_free(rgb);
    free_watcher(&w);
    return ok ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for a walk");
}

static bool expect(bool right, const char *what) {
    if (!right) fprintf(stderr, "bench_long_rollouts: %s\n", what);
    return right;
}

/* The conclusions: what must not pass does not. */
static bool test_memory_rule(void) {
    const memory_use base = {1000, 5000, 10};
    memory_use device = base, host = base, live = base, page = base, unread = base;
    device.device_bytes++;
    host.rss_kib += 2001;
    live.live_allocs++;
    page.rss_kib += 100;
    unread.rss_kib = -1;
    bool ok = expect(!memory_grew(&base, &base, 2000), "equal memory was said to grow");
    ok = expect(!memory_grew(&base, &page, 2000), "100 KiB in 2000 frames were said to grow") && ok;
    ok = expect(memory_grew(&base, &device, 2000), "a device byte more was overlooked") && ok;
    ok = expect(memory_grew(&base, &host, 2000), "2 MiB of VmRSS more were overlooked") && ok;
    ok = expect(memory_grew(&base, &live, 2000), "an allocation more was overlooked") && ok;
    return expect(memory_grew(&unread, &base, 2000), "VmRSS that cannot be read passed") && ok;
}

static int selftest(void) {
    static const struct {
        const char *name;
        verdict expected;
    } feeds[NUM_FEEDS] = {
        {"true frames", VERDICT_FINE},  {"one frame", VERDICT_FROZEN},    {"one frame with flicker", VERDICT_FROZEN},
        {"white noise", VERDICT_NOISE}, {"static noise", VERDICT_FROZEN}, {"blobs", VERDICT_NOISE},
        {"grey", VERDICT_BLANK},        {"washed out", VERDICT_BLANK},    {"faded to red", VERDICT_NOISE},
        {"NaN", VERDICT_NOISE},         {"patches", VERDICT_PATCHES},     {"edge on the grid", VERDICT_FINE}};
    const true_view view = {
        .width = 32, .height = 32, .patch_width = 4, .patch_height = 4, .samples = 2, .window = MAX_WINDOW};
    const int num_walks = 6;
    true_bounds bounds;
    rf_error err = {0};
    bool ok = test_memory_rule();
    if (calibrate(&bounds, &view, &err) != RF_OK) return expect(false, err.message) ? 0 : 1;
    for (int kind = 0; kind < NUM_FEEDS; kind++) {
        int counts[NUM_VERDICTS] = {0};
        for (int i = 0; i < num_walks; i++) {
            verdict got[2];
            if (feed_walk(&view, &bounds, (uint64_t)i + 1, (feed)kind, got, &err) != RF_OK)
                return expect(false, err.message) ? 0 : 1;
            counts[got[1]]++;
            ok = expect(got[0] == VERDICT_FINE, "a true window was judged bad") && ok;
        }
        printf("%-24s fine %d, frozen %d, noise %d, patches %d, blank %d\n", feeds[kind].name, counts[VERDICT_FINE],
               counts[VERDICT_FROZEN], counts[VERDICT_NOISE], counts[VERDICT_PATCHES], counts[VERDICT_BLANK]);
        ok = expect(counts[feeds[kind].expected] == num_walks, feeds[kind].name) && ok;
    }
    return ok ? 0 : 1;
}

/* ---- program ----------------------------------------------------------------------------------------------------- */

static void find_actions(bench *b) {
    bool all = true;
    for (int a = 0; a < MAZE_NUM_ACTIONS; a++) {
        b->action_places[a] = -1;
        for (int i = 0; i < b->info.action_dim; i++) {
            const char *name = rf_world_model_action_name(b->model, i);
            if (name && strcmp(name, maze_action_name(a)) == 0) b->action_places[a] = i;
        }
        if (b->action_places[a] >= 0 || a == MAZE_NONE) continue;
        all = false;
        b->action_places[a] = a % b->info.action_dim;
    }
    if (!all || !b->info.simulator || strcmp(b->info.simulator, "maze") != 0)
        fprintf(stderr, "bench_long_rollouts: %s is no maze: its verdicts mean little\n", b->model_name);
}

static rf_status allocate(bench *b, rf_error *err) {
    size_t batch = (size_t)b->batch;
    b->mazes = rf_alloc_zero(batch, sizeof *b->mazes);
    b->walks = rf_alloc_zero(batch, sizeof *b->walks);
    b->actions = rf_alloc_zero(batch, sizeof *b->actions);
    b->watchers = rf_alloc_zero(batch, sizeof *b->watchers);
    b->marks = rf_alloc_zero(batch, 1);
    b->seeds = rf_alloc_zero(batch, sizeof *b->seeds);
    b->rows = rf_alloc_zero(batch * (size_t)b->info.action_dim + 1, sizeof *b->rows);
    b->latents = rf_alloc_zero(batch * latent_elems(b), sizeof *b->latents);
    b->frames = rf_alloc_zero(batch * frame_elems(b), sizeof *b->frames);
    b->rendered = rf_alloc_zero(batch, frame_elems(b));
    bool ok = b->mazes && b->walks && b->actions && b->watchers && b->marks && b->seeds && b->rows && b->latents &&
              b->frames && b->rendered;
    for (int i = 0; i < b->batch && ok; i++)
        ok =
            create_watcher(&b->watchers[i], b->info.frame_width, b->info.frame_height, patch_width(b), patch_height(b));
    return ok ? RF_OK : rf_fail(err, RF_ERR_MEMORY, "out of memory for %d rollouts", b->batch);
}

static void close_all(bench *b) {
    for (int i = 0; i < b->batch && b->watchers; i++) free_watcher(&b->watchers[i]);
    rf_free(b->mazes);
    rf_free(b->walks);
    rf_free(b->actions);
    rf_free(b->watchers);
    rf_free(b->marks);
    rf_free(b->seeds);
    rf_free(b->rows);
    rf_free(b->latents);
    rf_free(b->frames);
    rf_free(b->rendered);
    rf_image_free(&b->sheet);
    rf_world_model_close(b->model);
    rf_backend_close(b->backend);
    for (int i = 0; i < b->num_settings; i++) rf_policy_destroy(b->settings[i].policy);
}

static void plan_frames(bench *b) {
    b->window = b->num_frames / 4 < MAX_WINDOW ? b->num_frames / 4 : MAX_WINDOW;
    int whole = b->num_frames / b->window;
    b->num_frames = whole * b->window;
    for (int c = 0; c < NUM_CHECKPOINTS; c++) b->checkpoints[c] = (whole >> (NUM_CHECKPOINTS - 1 - c)) * b->window;
    b->memory_frame = b->num_frames >= 2 * MAX_WINDOW ? MAX_WINDOW : 3 * b->num_frames / 4;
}

static rf_status run_all(bench *b, const char *device, const char *dtype_name, int threads, int *code, rf_error *err) {
    static const setting truth = {.name = "simulator", .source = SOURCE_SIMULATOR};
    static run_result results[MAX_SETTINGS], true_result;
    rf_dtype dtype = RF_DTYPE_F32;
    RF_TRY(rf_backend_open(&b->backend, device, threads, err));
    if (rf_backend_get_kind(b->backend) == RF_BACKEND_CUDA) dtype = RF_DTYPE_BF16;
    if (dtype_name && !rf_dtype_from_name(dtype_name, &dtype))
        return rf_fail(err, RF_ERR_ARGUMENT, "--dtype %s is unknown", dtype_name);
    RF_TRY(rf_world_model_load(&b->model, b->backend, b->model_name, dtype, err));
    b->info = rf_world_model_get_info(b->model);
    if (b->info.frame_width < 3 || b->info.frame_height < 3 || b->info.action_dim < 1)
        return rf_fail(err, RF_ERR_UNSUPPORTED, "%s: frames under 3 x 3 pixels or no actions", b->model_name);
    find_actions(b);
    plan_frames(b);
    RF_TRY(allocate(b, err));
    RF_TRY(create_sheet(b, err));
    const true_view view = {.width = b->info.frame_width,
                            .height = b->info.frame_height,
                            .patch_width = patch_width(b),
                            .patch_height = patch_height(b),
                            .samples = RENDER_SAMPLES,
                            .window = b->window};
    RF_TRY(calibrate(&b->bounds, &view, err));
    RF_TRY(calibrate_borders(b, err));
    print_head(b);
    RF_TRY(run_setting(b, &truth, 0, &true_result, err));
    print_row(truth.name, b, &true_result);
    for (int i = 0; i < b->num_settings; i++) {
        RF_TRY(run_setting(b, &b->settings[i], i + 1, &results[i], err));
        print_row(b->settings[i].name, b, &results[i]);
    }
    *code = conclude(b, results);
    return RF_OK;
}

static int usage(const char *why) {
    fprintf(stderr,
            "bench_long_rollouts: %s\n"
            "usage: bench_long_rollouts [--model DIR] [--device cpu|cuda|cuda:N] [--dtype f32|bf16] [-t threads]\n"
            "                           [-b 1..%d] [--frames %d..%d] [--sheet FILE.png] SETTING...\n"
            "       bench_long_rollouts --selftest\n"
            "SETTING: none, decoded, latent-noise or POLICY[:option=value,...], then [@rebuild|@keep|@sinks] "
            "[+carry=off|first|last]\n",
            why, MAX_BATCH, MIN_FRAMES, MAX_FRAMES);
    return 2;
}

static bool read_int(const char *text, int low, int high, int *out) {
    char *end;
    errno = 0;
    long value = strtol(text, &end, 10);
    if (errno != 0 || end == text || *end != 0 || value < low || value > high) return false;
    *out = (int)value;
    return true;
}

int main(int argc, char **argv) {
    static bench b = {.model_name = DEFAULT_MODEL, .batch = 16, .num_frames = 2000, .first_world = 1};
    const char *device = "cpu", *dtype = NULL;
    int threads = 0, code = 0;
    rf_error err = {0};
    if (argc == 2 && strcmp(argv[1], "--selftest") == 0) return selftest();
    for (int i = 1; i < argc; i++) {
        const char *arg = argv[i], *value = i + 1 < argc ? argv[i + 1] : NULL;
        if (arg[0] != '-') {
            if (b.num_settings == MAX_SETTINGS) return usage("too many settings");
            if (read_setting(&b.settings[b.num_settings++], arg, &err) != RF_OK) return usage(err.message);
            continue;
        }
        if (!value) return usage("an option without a value, or an unknown one");
        i++;
        if (strcmp(arg, "--model") == 0)
            b.model_name = value;
        else if (strcmp(arg, "--device") == 0)
            device = value;
        else if (strcmp(arg, "--dtype") == 0)
            dtype = value;
        else if (strcmp(arg, "--sheet") == 0)
            b.sheet_path = value;
        else if (strcmp(arg, "-t") == 0 && read_int(value, 0, 4096, &threads))
            continue;
        else if (strcmp(arg, "-b") == 0 && read_int(value, 1, MAX_BATCH, &b.batch))
            continue;
        else if (strcmp(arg, "--frames") == 0 && read_int(value, MIN_FRAMES, MAX_FRAMES, &b.num_frames))
            continue;
        else
            return usage("an unknown option, or a value it does not take");
    }
    if (b.num_settings == 0) return usage("no setting");
    if (run_all(&b, device, dtype, threads, &code, &err) != RF_OK) {
        fprintf(stderr, "bench_long_rollouts: %s\n", err.message);
        code = 1;
    }
    close_all(&b);
    return code;
}

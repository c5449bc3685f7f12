/* samples/refrain/sweep_plot.c - writing HTML with everything inside, and plots: by gnuplot, which leaves its scripts for people, else as SVG
 * of our own. */
#include <ctype.h>
#include <errno.h>
#include <fcntl.h>
#include <math.h>
#include <spawn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include "caching/policy.h"
#include "core/memory.h"
#include "samples/refrain/sweep_page.h"

#define MAX_PNG_BYTES ((size_t)64 << 20)
#define MAX_SVG_BYTES ((size_t)16 << 20)
#define PLOT_WIDTH    900
#define PLOT_HEIGHT   500
#define SSIM_TOP      .99999
#define LEAST_KEPT    80.0 /* %: what keeps less is not drawn, so that the rest can be told apart */

extern char **environ;

/* --- writing HTML ------------------------------------------------------------------------------------------------- */

void page_out(page *p, const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len > 0) rf_file_writer_write(p->file, text, (size_t)len < sizeof text ? (size_t)len : sizeof text - 1);
}

void page_out_text(page *p, const char *text) {
    for (; *text; text++) {
        const char *entity = *text == '&'   ? "&amp;"
                             : *text == '<' ? "&lt;"
                             : *text == '>' ? "&gt;"
                             : *text == '"' ? "&quot;"
                                            : NULL;
        if (entity) {
            rf_file_writer_write(p->file, entity, strlen(entity));
        } else if ((unsigned char)*text >= 32 && *text != 127) {
            rf_file_writer_write(p->file, text, 1);
        }
    }
}

void page_out_number(page *p, const char *before, const char *format_after, double value, int digits) {
    if (isfinite(value)) {
        page_out(p, "%s%.*f%s", before, digits, value, format_after);
    } else {
        page_out(p, "%s&ndash;%s", before, format_after);
    }
}

void page_out_base64(page *p, const uint8_t *bytes, size_t num) {
    static const char digits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    char text[1024];
    size_t used = 0;
    for (size_t i = 0; i < num; i += 3) {
        size_t left = num - i;
        uint32_t v =
            (uint32_t)bytes[i] << 16 | (left > 1 ? (uint32_t)bytes[i + 1] << 8 : 0) | (left > 2 ? bytes[i + 2] : 0);
        text[used++] = digits[v >> 18 & 63];
        text[used++] = digits[v >> 12 & 63];
        text[used++] = left > 1 ? digits[v >> 6 & 63] : '=';
        text[used++] = left > 2 ? digits[v & 63] : '=';
        if (used == sizeof text || left <= 3) {
            rf_file_writer_write(p->file, text, used);
            used = 0;
        }
    }
}

void page_out_png(page *p, const char *path, const char *alt) {
    char *bytes = NULL;
    size_t num = 0;
    if (rf_file_read(path, MAX_PNG_BYTES, &bytes, &num, NULL) != RF_OK) return;
    page_out(p, "<img alt='%s' src='data:image/png;base64,", alt);
    page_out_base64(p, (const uint8_t *)bytes, num);
    page_out(p, "'>");
    rf_free(bytes);
}

/* --- colours and shapes ------------------------------------------------------------------------------------------- */

const char *page_color_of(const char *policy) {
    static const struct {
        const char *policy, *color;
    } colors[] = {
        {"interval", "#8d8d8d"}, {"teacache", "#4e79a7"},   {"easycache", "#3fb7c6"},  {"magcache", "#2f9e44"},
        {"spectrum", "#8a63d2"}, {"adacache", "#9c6b4e"},   {"worldcache", "#e03131"}, {"fbcache", "#f08c00"},
        {"dbcache", "#b3a200"},  {"deltacache", "#e667af"}, {"fora", "#1c4f82"},       {"taylorseer", "#1b6b3a"},
        {"hicache", "#5b2a9d"},  {"speca", "#a61e4d"},      {"pab", "#c05621"},        {"toca", "#0b7285"},
        {"duca", "#66a80f"},     {"diffsparse", "#d6336c"}, {"none", "#111111"},       {"prefix", "#4e79a7"},
        {"dual", "#e03131"},     {"vicinity", "#f08c00"},   {"window", "#2f9e44"},     {"freecache", "#3fb7c6"},
        {"dkv", "#8a63d2"},      {"dllm-cache", "#9c6b4e"}, {"elastic", "#e667af"},    {"streaming", "#8d8d8d"},
        {"random", "#ced4da"},   {"h2o", "#f08c00"},        {"observed", "#fab005"},   {"tova", "#b3a200"},
        {"snapkv", "#1c7ed6"},   {"pyramidkv", "#3fb7c6"},  {"adakv", "#1c4f82"},      {"knorm", "#9c6b4e"},
        {"keydiff", "#c05621"},  {"expected", "#8a63d2"},   {"cake", "#e03131"},       {"obcache", "#2f9e44"},
        {"caote", "#e667af"},
    };
    size_t len = strcspn(policy, ":"); /* a KV policy may have options */
    for (size_t i = 0; i < sizeof colors / sizeof colors[0]; i++) {
        if (strlen(colors[i].policy) == len && strncmp(colors[i].policy, policy, len) == 0) return colors[i].color;
    }
    return "#495057";
}

typedef enum { CIRCLE = 0, SQUARE, TRIANGLE, DIAMOND } shape;

static shape shape_of(const char *policy) {
    const rf_policy_def *def = rf_policy_find(policy);
    const char *level = def ? def->level : "";
    return strcmp(level, "block") == 0   ? SQUARE
           : strcmp(level, "part") == 0  ? TRIANGLE
           : strcmp(level, "token") == 0 ? DIAMOND
                                         : CIRCLE;
}

/* --- plots -------------------------------------------------------------------------------------------------------- */

typedef struct {
    sweep_metric metric;
    const char *name, *title, *axis;
    bool log_y;
    sweep_axis x;
} plot;

static const plot image_plots[] = {
    {SWEEP_PSNR, "psnr", "Speed-up against PSNR (higher is better)", "PSNR, dB, mean over pictures", false,
     SWEEP_X_SPEED},
    {SWEEP_SSIM, "ssim", "Speed-up against SSIM (higher is better)",
     "SSIM, mean over pictures (logarithmic in 1 - SSIM)", false, SWEEP_X_SPEED},
    {SWEEP_LATENT, "latent", "Speed-up against the error of the final latent (lower is better)",
     "relative L2 of the final latent, mean over pictures", true, SWEEP_X_SPEED},
    {SWEEP_PSNR, "work", "Work left out against PSNR: what the machine's speed does not touch",
     "PSNR, dB, mean over pictures", false, SWEEP_X_WORK},
};
static const plot world_plots[] = {
    {SWEEP_KEPT, "kept", "Speed-up against quality kept: PSNR to the simulator's frames (from 80 % up)",
     "PSNR to the simulator, % of that of the uncached run", false, SWEEP_X_SPEED},
    {SWEEP_PSNR, "psnr", "Speed-up against PSNR to the uncached frames (higher is better)",
     "PSNR, dB, mean over frames", false, SWEEP_X_SPEED},
    {SWEEP_SSIM, "ssim", "Speed-up against SSIM (higher is better)", "SSIM, mean over frames (logarithmic in 1 - SSIM)",
     false, SWEEP_X_SPEED},
    {SWEEP_LATENT, "latent", "Speed-up against the error of the latents (lower is better)",
     "relative L2 of the latent, mean over frames", true, SWEEP_X_SPEED},
    {SWEEP_KEPT, "plain-kept", "With exact reuse and without: quality kept, speed-up against computing everything",
     "PSNR to the simulator, % of that of the uncached run", false, SWEEP_X_PLAIN},
    {SWEEP_PSNR, "plain", "With exact reuse and without: PSNR, speed-up against computing everything",
     "PSNR, dB, mean over frames", false, SWEEP_X_PLAIN},
    {SWEEP_PSNR, "work", "Work left out against PSNR: what the machine's speed does not touch",
     "PSNR, dB, mean over frames", false, SWEEP_X_WORK},
};
static const plot text_plots[] = {
    {SWEEP_SCORE, "score", "Tokens a second against exact match", "exact match, %, mean over tasks", false,
     SWEEP_X_RATE},
    {SWEEP_AGREEMENT, "agreement", "Tokens a second against agreement with uncached decoding",
     "tokens equal to one token a pass without a cache, %", false, SWEEP_X_RATE},
    {SWEEP_SCORE, "work-score", "Row-passes left out against exact match: what the machine's speed does not touch",
     "exact match, %, mean over tasks", false, SWEEP_X_WORK},
    {SWEEP_AGREEMENT, "work-agreement", "Row-passes left out against agreement",
     "tokens equal to one token a pass without a cache, %", false, SWEEP_X_WORK},
};
static const plot kv_plots[] = {
    {SWEEP_SCORE, "kept-score", "Bytes of the cache kept against exact match", "exact match, %, mean over tasks", false,
     SWEEP_X_KEPT},
    {SWEEP_AGREEMENT, "kept-agreement", "Bytes of the cache kept against agreement with the full cache",
     "tokens equal to those with the full cache, %", false, SWEEP_X_KEPT},
    {SWEEP_SCORE, "score", "Tokens a second against exact match", "exact match, %, mean over tasks", false,
     SWEEP_X_RATE},
};
#define NUM_KV_PLOTS    (sizeof kv_plots / sizeof kv_plots[0])
#define NUM_TEXT_PLOTS  (sizeof text_plots / sizeof text_plots[0])
#define NUM_IMAGE_PLOTS (sizeof image_plots / sizeof image_plots[0])
#define NUM_WORLD_PLOTS (sizeof world_plots / sizeof world_plots[0])

/* SSIM is shown as -log10(1 - SSIM), else everything good lies on one line; the ticks say SSIM. */
static double ssim_place(double ssim) {
    return -log10(1 - fmin(ssim, SSIM_TOP));
}

static double y_of(const plot *pl, const sweep_row *row) {
    double y = sweep_metric_of(row, pl->metric);
    return pl->metric == SWEEP_SSIM ? ssim_place(y) : y;
}

static const double ssim_ticks[] = {.3, .5, .7, .8, .9, .95, .98, .99, .995, .998, .999, .9998, .9999, SSIM_TOP};
#define NUM_SSIM_TICKS (sizeof ssim_ticks / sizeof ssim_ticks[0])

/* Has the row a place in this plot? Equal pictures have no finite PSNR, and no error on a logarithmic axis. */
static bool is_plotted(const plot *pl, const sweep_row *row) {
    double y = y_of(pl, row);
    if (!sweep_is_measured(row) || !isfinite(y) || !(sweep_x_of(row, pl->x) > 0)) return false;
    if (pl->metric == SWEEP_KEPT) return y >= LEAST_KEPT;
    return pl->metric == SWEEP_PSNR ? y < SWEEP_EQUAL_DB : !pl->log_y || y > 0;
}

typedef struct {
    double x0, x1, y0, y1;
} bounds;

static bool find_bounds(const page *p, const plot *pl, bounds *b) {
    *b = (bounds){INFINITY, -INFINITY, INFINITY, -INFINITY};
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (!is_plotted(pl, row)) continue;
        double y = y_of(pl, row);
        b->x0 = fmin(b->x0, sweep_x_of(row, pl->x));
        b->x1 = fmax(b->x1, sweep_x_of(row, pl->x));
        b->y0 = fmin(b->y0, y);
        b->y1 = fmax(b->y1, y);
    }
    if (!(b->x1 >= b->x0)) return false;
    bool own_range = pl->x == SWEEP_X_RATE || pl->x == SWEEP_X_KEPT; /* speed-ups begin at 1 */
    b->x0 = (own_range ? b->x0 : fmin(b->x0, 1)) / 1.04;
    b->x1 = fmax(b->x1, own_range ? 1.2 * b->x0 : 1.2) * 1.06;
    if (pl->log_y) {
        b->y0 /= 1.25;
        b->y1 *= 1.25;
    } else {
        double margin = .05 * (b->y1 - b->y0) + (pl->metric >= SWEEP_SCORE ? 1 : 1e-4); /* shares are in % */
        b->y0 -= margin;
        b->y1 += margin;
    }
    return true;
}

static const double x_ticks[] = {.25, .5,  .75, 1,    1.25, 1.5,  2,    2.5,  3,     4,     5,    6,
                                 8,   10,  12,  16,   20,   30,   40,   60,   80,    100,   150,  200,
                                 300, 500, 750, 1000, 1500, 2000, 3000, 5000, 10000, 20000, 50000};
#define NUM_X_TICKS (sizeof x_ticks / sizeof x_ticks[0])

static const char *x_title(const plot *pl) {
    switch (pl->x) {
    case SWEEP_X_WORK:
        return pl->metric >= SWEEP_SCORE ? "row-passes of the uncached run over those of the setting, times"
                                         : "token rows of the uncached run over computed ones";
    case SWEEP_X_KEPT: return "keys and values kept at the end, % of the bytes of a full cache";
    case SWEEP_X_RATE: return "tokens a second, before the end of text, wall-clock";
    case SWEEP_X_PLAIN: return "speed-up over the uncached run that computes the whole window in every step, times";
    case SWEEP_X_SPEED: break;
    }
    return "speed-up of the denoising loop over the uncached run, wall-clock, times";
}

/* Is there room for a tick label after the one before? *last: where that stands, as a share of the axis. */
static bool has_room(const bounds *b, double tick, double *last) {
    double at = log(tick / b->x0) / log(b->x1 / b->x0);
    if (at < 0 || at > 1 || at < *last + .045) return false;
    *last = at;
    return true;
}

/* First row of each policy in the plot: one entry of the legend. */
static bool is_first_of_policy(const page *p, const plot *pl, int index) {
    const sweep_row *row = sweep_store_at(p->store, index);
    if (!is_plotted(pl, row) || sweep_is_control(row)) return false;
    for (int i = 0; i < index; i++) {
        const sweep_row *other = sweep_store_at(p->store, i);
        if (is_plotted(pl, other) && strcmp(other->policy, row->policy) == 0) return false;
    }
    return true;
}

/* Number of a front member as the plot, the strips and the table show it: its place by falling speed-up. */
static int place_of(const page *p, const sweep_row *row) {
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (sweep_store_at(p->store, p->order[i]) == row) return i + 1;
    }
    return 0;
}

/* KV policies have a curve each: their points by rising x; after NULL the first, after the last NULL. */
static const sweep_row *next_of_policy(const page *p, const plot *pl, const char *policy, const sweep_row *after) {
    const sweep_row *next = NULL;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (strcmp(row->policy, policy) != 0 || !is_plotted(pl, row)) continue;
        double x = sweep_x_of(row, pl->x), last = after ? sweep_x_of(after, pl->x) : -INFINITY;
        if (x < last || (x <= last && row <= after)) continue; /* rows of one array */
        if (!next || x < sweep_x_of(next, pl->x)) next = row;
    }
    return next;
}

/* What the full cache gives, for a line across; NaN = not measured. */
static double full_cache_y(const page *p, const plot *pl) {
    for (int i = 0; i < sweep_store_num(p->store) && sweep_store_is_kv(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (sweep_is_uncached(row) && is_plotted(pl, row)) return y_of(pl, row);
    }
    return NAN;
}

/* The front from fast to slow; after NULL its first member, after the last NULL. Equal points count once. */
static const sweep_row *next_on_front(const page *p, const plot *pl, const sweep_row *after) {
    const sweep_row *next = NULL;
    if (pl->x == SWEEP_X_KEPT) return NULL; /* curves say it */
    double limit = after ? sweep_x_of(after, pl->x) : INFINITY;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        double x = sweep_x_of(row, pl->x);
        if (!is_plotted(pl, row) || !(x < limit) || !sweep_on_front_by(p->store, row, pl->metric, pl->x)) continue;
        if (!next || x > sweep_x_of(next, pl->x)) next = row;
    }
    return next;
}

/* The name of a data block: letters, digits and '_'. */
static const char *block_name(const char *policy, char name[64]) {
    size_t len = 0;
    for (; policy[len] && len < 63; len++) name[len] = isalnum((unsigned char)policy[len]) ? policy[len] : '_';
    name[len] = 0;
    return name;
}

/* gnuplot: data blocks, then one plot command. */
static void gnuplot_script(page *p, const void *of, const bounds *b, const char *svg_path) {
    const plot *pl = of;
    char name[64];
    static const int points[] = {[CIRCLE] = 7, [SQUARE] = 5, [TRIANGLE] = 9, [DIAMOND] = 13};
    page_out(
        p,
        "# %s\nset terminal svg size %d,%d dynamic font 'Helvetica,13' background '#ffffff' linewidth 1.2\nset output "
        "'",
        pl->title, PLOT_WIDTH, PLOT_HEIGHT);
    for (const char *c = svg_path; *c; c++) page_out(p, *c == '\'' ? "''" : "%c", *c);
    page_out(p, "'\nset datafile separator whitespace\nset logscale x\n%sset xrange [%g:%g]\nset yrange [%g:%g]\n",
             pl->log_y ? "set logscale y\n" : "", b->x0, b->x1, b->y0, b->y1);
    page_out(p, "set xtics (");
    const char *between = "";
    double last = -1;
    for (size_t i = 0; i < NUM_X_TICKS; i++) {
        if (!has_room(b, x_ticks[i], &last)) continue;
        page_out(p, "%s'%g' %g", between, x_ticks[i], x_ticks[i]);
        between = ", ";
    }
    page_out(
        p,
        ")\nset mxtics 1\nset format y '%%g'\nset xlabel '%s'\n"
        "set ylabel '%s'\nset grid xtics ytics lc rgb '#e3e6ea' lw 0.8\nset border 3 lc rgb '#868e96'\n"
        "set tics nomirror textcolor rgb '#343a40'\nset key outside right top Left reverse samplen 1.5 spacing 1.05\n",
        x_title(pl), pl->axis);
    if (pl->metric == SWEEP_SSIM) {
        page_out(p, "set ytics (");
        for (size_t i = 0; i < NUM_SSIM_TICKS; i++)
            page_out(p, "%s'%g' %.6f", i ? ", " : "", ssim_ticks[i], ssim_place(ssim_ticks[i]));
        page_out(p, ")\n");
    }
    double full = full_cache_y(p, pl);
    if (isfinite(full))
        page_out(p, "set arrow from graph 0, first %.6g to graph 1, first %.6g nohead dt 2 lc rgb '#868e96'\n", full,
                 full);
    page_out(p, "$control << EOD\n");
    int num = sweep_control_points(p->store, pl->x, NULL), controls = 0, front = 0;
    const sweep_row **control = rf_alloc_zero((size_t)num + 1, sizeof *control);
    if (control) sweep_control_points(p->store, pl->x, control);
    for (int i = 0; control && i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        page_out(p, "%.6g %.6g %.0f\n", sweep_x_of(control[i], pl->x), y_of(pl, control[i]), control[i]->steps);
        controls++;
    }
    rf_free(control);
    page_out(p, "EOD\n$front << EOD\n");
    for (const sweep_row *row = NULL; (row = next_on_front(p, pl, row)) != NULL; front++)
        page_out(p, "%.6g %.6g %d\n", sweep_x_of(row, pl->x), y_of(pl, row), place_of(p, row));
    page_out(p, "EOD\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (!is_first_of_policy(p, pl, i)) continue;
        const char *policy = sweep_store_at(p->store, i)->policy;
        page_out(p, "$%s << EOD\n", block_name(policy, name));
        for (const sweep_row *row = NULL; (row = next_of_policy(p, pl, policy, row)) != NULL;)
            page_out(p, "%.6g %.6g\n", sweep_x_of(row, pl->x), y_of(pl, row));
        page_out(p, "EOD\n");
    }
    page_out(p, "plot ");
    const char *comma = "";
    if (front > 0) {
        page_out(p, "$front using 1:2 with lines lc rgb '#ced4da' lw 5 title 'front'");
        comma = ", ";
    }
    if (controls > 0) {
        page_out(
            p,
            "%s$control using 1:2 with linespoints lc rgb '#212529' lw 1.6 pt 2 ps 0.7 title 'fewer steps, no cache', "
            "$control using 1:2:3 with labels font ',10' tc rgb '#212529' offset -1,-0.7 notitle",
            comma);
        comma = ", ";
    }
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (!is_first_of_policy(p, pl, i)) continue;
        const char *policy = sweep_store_at(p->store, i)->policy;
        page_out(p, "%s$%s using 1:2 with %s pt %d ps 0.75 lc rgb '%s' title \"%s\" noenhanced", comma,
                 block_name(policy, name), sweep_store_is_kv(p->store) ? "linespoints lw 1.4" : "points",
                 points[shape_of(policy)], page_color_of(policy), policy);
        comma = ", ";
    }
    if (front > 0)
        page_out(p, "%s$front using 1:2:3 with labels font ',10' tc rgb '#495057' offset 1,0.7 notitle", comma);
    page_out(p, "\n");
}

static bool run_program(const char *name, const char *argument) {
    posix_spawn_file_actions_t actions;
    char program[64];
    snprintf(program, sizeof program, "%s", name);
    char *argv[] = {program, (char *)(uintptr_t)argument, NULL};
    pid_t pid;
    int status = 0;
    if (posix_spawn_file_actions_init(&actions) != 0) return false;
    posix_spawn_file_actions_addopen(&actions, STDIN_FILENO, "/dev/null", O_RDONLY, 0);
    posix_spawn_file_actions_addopen(&actions, STDOUT_FILENO, "/dev/null", O_WRONLY, 0);
    posix_spawn_file_actions_addopen(&actions, STDERR_FILENO, "/dev/null", O_WRONLY, 0);
    int failed = posix_spawnp(&pid, program, &actions, NULL, argv, environ);
    posix_spawn_file_actions_destroy(&actions);
    if (failed) return false;
    while (waitpid(pid, &status, 0) < 0) {
        if (errno != EINTR) return false;
    }
    return WIFEXITED(status) && WEXITSTATUS(status) == 0;
}

char *page_path(const sweep_store *store, const char *folder, const char *name, const char *ending) {
    char tail[128];
    snprintf(tail, sizeof tail, "%s/%s%s", folder, name, ending);
    return rf_path_join(sweep_store_folder(store), tail);
}

typedef void (*script_function)(page *p, const void *plot, const bounds *b, const char *svg_path);

/* The SVG of a plot, rf_free; *svg_text stays NULL if gnuplot is not there or failed. The script stays beside it for
 * people. */
static void gnuplot_svg(const page *p, const char *name, script_function write, const void *pl, const bounds *b,
                        char **svg_text) {
    char *script = page_path(p->store, "plots", name, ".gp"), *svg = page_path(p->store, "plots", name, ".svg");
    char *folder = rf_path_join(sweep_store_folder(p->store), "plots");
    page to = *p;
    bool ok = script && svg && folder && (mkdir(folder, 0777) == 0 || rf_path_is_dir(folder)) &&
              rf_file_writer_open(&to.file, script, NULL) == RF_OK;
    if (ok) {
        write(&to, pl, b, svg);
        ok = rf_file_writer_commit(to.file, NULL) == RF_OK;
    }
    if (ok) unlink(svg);
    if (ok && run_program("gnuplot", script)) {
        size_t len;
        if (rf_file_read(svg, MAX_SVG_BYTES, svg_text, &len, NULL) != RF_OK) *svg_text = NULL;
    }
    rf_free(script);
    rf_free(svg);
    rf_free(folder);
}

/* An SVG file inside HTML: from its root on, without what names addresses (namespaces) and the title that would show
 * as a tip. */
static bool out_svg(page *p, const char *text) {
    static const char *const dropped[][2] = {{" xmlns", "\""}, {"<title>", "</title>"}, {"<desc>", "</desc>"}};
    const char *at = strstr(text, "<svg");
    if (!at || !strstr(at, "</svg>")) return false;
    while (*at) {
        size_t skip = 0;
        for (size_t i = 0; i < sizeof dropped / sizeof dropped[0]; i++) {
            size_t head = strlen(dropped[i][0]);
            if (strncmp(at, dropped[i][0], head) != 0) continue;
            const char *from = i == 0 ? strchr(at, '"') : at;
            const char *end = from ? strstr(from + 1, dropped[i][1]) : NULL;
            if (end) skip = (size_t)(end - at) + strlen(dropped[i][1]);
        }
        if (skip == 0) {
            rf_file_writer_write(p->file, at, 1);
            skip = 1;
        }
        at += skip;
    }
    return true;
}

/* --- our own plot, when there is no gnuplot ----------------------------------------------------------------------- */

#define LEFT   70.0
#define RIGHT  (PLOT_WIDTH - 190.0)
#define TOP    16.0
#define BOTTOM (PLOT_HEIGHT - 56.0)

static double x_at(const bounds *b, double v) {
    return LEFT + (RIGHT - LEFT) * log(v / b->x0) / log(b->x1 / b->x0);
}

static double y_at(const plot *pl, const bounds *b, double v) {
    double share = pl->log_y ? log(v / b->y0) / log(b->y1 / b->y0) : (v - b->y0) / (b->y1 - b->y0);
    return BOTTOM - (BOTTOM - TOP) * share;
}

static void out_shape(page *p, const char *policy, double x, double y) {
    const char *color = page_color_of(policy);
    switch (shape_of(policy)) {
    case CIRCLE: page_out(p, "<circle cx='%.1f' cy='%.1f' r='4.5' fill='%s'/>", x, y, color); return;
    case SQUARE: page_out(p, "<rect x='%.1f' y='%.1f' width='8' height='8' fill='%s'/>", x - 4, y - 4, color); return;
    case TRIANGLE: page_out(p, "<path d='M%.1f %.1fl5 9h-10z' fill='%s'/>", x, y - 5.5, color); return;
    case DIAMOND:
        page_out(p, "<path d='M%.1f %.1fl5.5 5.5l-5.5 5.5l-5.5 -5.5z' fill='%s'/>", x, y - 5.5, color);
        return;
    }
}

static void own_y_tick(page *p, const plot *pl, const bounds *b, double v, double shown) {
    if (v < b->y0 || v > b->y1) return;
    double y = y_at(pl, b, v);
    page_out(p, "<path d='M%g %.1fH%g' stroke='#e3e6ea'/><text x='%g' y='%.1f' text-anchor='end'>%g</text>", LEFT, y,
             RIGHT, LEFT - 8, y + 4, shown);
}

static void own_axes(page *p, const plot *pl, const bounds *b) {
    double last = -1;
    for (size_t i = 0; i < NUM_X_TICKS; i++) {
        if (!has_room(b, x_ticks[i], &last)) continue;
        double x = x_at(b, x_ticks[i]);
        page_out(p, "<path d='M%.1f %gV%g' stroke='#e3e6ea'/><text x='%.1f' y='%g' text-anchor='middle'>%g</text>", x,
                 TOP, BOTTOM, x, BOTTOM + 18, x_ticks[i]);
    }
    if (pl->metric == SWEEP_SSIM) {
        for (size_t i = 0; i < NUM_SSIM_TICKS; i++) own_y_tick(p, pl, b, ssim_place(ssim_ticks[i]), ssim_ticks[i]);
    } else if (pl->log_y) {
        for (int i = 0; i < 36; i++) {
            double v = pow(10, i / 3 - 8) * (i % 3 == 0 ? 1 : i % 3 == 1 ? 2 : 5);
            own_y_tick(p, pl, b, v, v);
        }
    } else {
        double raw = (b->y1 - b->y0) / 7, unit = pow(10, floor(log10(raw)));
        double step = unit * (raw / unit > 5 ? 10 : raw / unit > 2 ? 5 : raw / unit > 1 ? 2 : 1);
        for (double v = ceil(b->y0 / step); v * step <= b->y1; v++) own_y_tick(p, pl, b, v * step, v * step);
    }
    page_out(p, "<path d='M%g %gV%gH%g' fill='none' stroke='#868e96'/>", LEFT, TOP, BOTTOM, RIGHT);
    page_out(p, "<text x='%g' y='%d' text-anchor='middle'>%s</text>", (LEFT + RIGHT) / 2, PLOT_HEIGHT - 14,
             x_title(pl));
    page_out(p, "<text transform='translate(16 %g) rotate(-90)' text-anchor='middle'>%s</text>", (TOP + BOTTOM) / 2,
             pl->axis);
}

static void own_front(page *p, const plot *pl, const bounds *b) {
    const char *move = "M";
    page_out(p, "<path fill='none' stroke='#ced4da' stroke-width='6' d='");
    for (const sweep_row *row = NULL; (row = next_on_front(p, pl, row)) != NULL; move = "L")
        page_out(p, "%s%.1f %.1f", move, x_at(b, sweep_x_of(row, pl->x)), y_at(pl, b, y_of(pl, row)));
    page_out(p, "'/>");
}

static void own_control(page *p, const plot *pl, const bounds *b) {
    int num = sweep_control_points(p->store, pl->x, NULL);
    const sweep_row **control = rf_alloc_zero((size_t)num + 1, sizeof *control);
    if (!control) return;
    sweep_control_points(p->store, pl->x, control);
    page_out(p, "<path fill='none' stroke='#212529' stroke-width='1.6' d='");
    const char *move = "M";
    for (int i = 0; i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        page_out(p, "%s%.1f %.1f", move, x_at(b, sweep_x_of(control[i], pl->x)), y_at(pl, b, y_of(pl, control[i])));
        move = "L";
    }
    page_out(p, "'/>");
    for (int i = 0; i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        double x = x_at(b, sweep_x_of(control[i], pl->x)), y = y_at(pl, b, y_of(pl, control[i]));
        page_out(p,
                 "<path d='M%.1f %.1fl6 6m0 -6l-6 6' stroke='#212529'/><text x='%.1f' y='%.1f' text-anchor='end' "
                 "font-size='10'>%.0f</text>",
                 x - 3, y - 3, x - 5, y + 13, control[i]->steps);
    }
    rf_free(control);
}

static void own_curves(page *p, const plot *pl, const bounds *b) {
    double full = full_cache_y(p, pl);
    if (isfinite(full))
        page_out(p, "<path d='M%g %.1fH%g' stroke='#868e96' stroke-dasharray='6 4'/>", LEFT, y_at(pl, b, full), RIGHT);
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (!is_first_of_policy(p, pl, i)) continue;
        const char *policy = sweep_store_at(p->store, i)->policy, *move = "M";
        page_out(p, "<path fill='none' stroke='%s' stroke-width='1.6' d='", page_color_of(policy));
        for (const sweep_row *row = NULL; (row = next_of_policy(p, pl, policy, row)) != NULL; move = "L")
            page_out(p, "%s%.1f %.1f", move, x_at(b, sweep_x_of(row, pl->x)), y_at(pl, b, y_of(pl, row)));
        page_out(p, "'/>");
    }
}

static void own_legend(page *p, double legend) {
    page_out(p, "<path d='M%g %gh22' stroke='#ced4da' stroke-width='6'/><text x='%g' y='%g'>front</text>", RIGHT + 18,
             legend, RIGHT + 48, legend + 4);
    legend += 18;
    page_out(
        p, "<path d='M%g %gh22' stroke='#212529' stroke-width='1.6'/><text x='%g' y='%g'>fewer steps, no cache</text>",
        RIGHT + 18, legend, RIGHT + 48, legend + 4);
}

static void own_svg(page *p, const void *of, const bounds *b) {
    const plot *pl = of;
    page_out(p, "<svg viewBox='0 0 %d %d' font-family='Helvetica,Arial,sans-serif' font-size='12' fill='#343a40'>",
             PLOT_WIDTH, PLOT_HEIGHT);
    own_axes(p, pl, b);
    own_front(p, pl, b);
    own_control(p, pl, b);
    double legend = TOP + 10;
    if (sweep_store_is_kv(p->store)) {
        own_curves(p, pl, b);
        legend -= 18;
    } else {
        own_legend(p, legend);
        legend += 18;
    }
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (is_first_of_policy(p, pl, i)) {
            legend += 18;
            out_shape(p, row->policy, RIGHT + 29, legend);
            page_out(p, "<text x='%g' y='%g'>%s</text>", RIGHT + 48, legend + 4, row->policy);
        }
        if (!is_plotted(pl, row) || sweep_is_control(row)) continue;
        double x = x_at(b, sweep_x_of(row, pl->x)), y = y_at(pl, b, y_of(pl, row));
        char name[512];
        sweep_row_name(row, name, sizeof name);
        page_out(p, "<g><title>");
        page_out_text(p, name);
        page_out(p, "</title>");
        out_shape(p, row->policy, x, y);
        if (sweep_on_front_by(p->store, row, pl->metric, pl->x))
            page_out(p, "<text x='%.1f' y='%.1f' font-size='10'>%d</text>", x + 6, y - 6, place_of(p, row));
        page_out(p, "</g>");
    }
    page_out(p, "</svg>");
}

static void out_drawn(page *p, char *svg, void (*own)(page *, const void *, const bounds *), const void *pl,
                      const bounds *b) {
    if (svg && out_svg(p, svg)) {
        p->by_gnuplot = true;
    } else {
        own(p, pl, b);
    }
    rf_free(svg);
}

static void out_plot(page *p, const plot *pl) {
    bounds b;
    page_out(p, "<h3>%s</h3>\n<div class='plot'>", pl->title);
    if (!find_bounds(p, pl, &b)) {
        page_out(p, "<p>Nothing to draw.</p></div>\n");
        return;
    }
    char *svg = NULL;
    gnuplot_svg(p, pl->name, gnuplot_script, pl, &b, &svg);
    out_drawn(p, svg, own_svg, pl, &b);
    page_out(p, "</div>\n");
}

/* Has the store a number for it? A model without a simulator has no quality kept, a sweep without the plain run no speed-up against it. */
static bool has_numbers(const page *p, const plot *pl) {
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (isfinite(sweep_metric_of(row, pl->metric)) && sweep_x_of(row, pl->x) > 0) return true;
    }
    return false;
}

void page_out_plots(page *p) {
    bool world = sweep_store_is_world(p->store);
    bool text = sweep_store_is_text(p->store);
    bool kv = sweep_store_is_kv(p->store);
    size_t num = kv ? NUM_KV_PLOTS : text ? NUM_TEXT_PLOTS : world ? NUM_WORLD_PLOTS : NUM_IMAGE_PLOTS;
    for (size_t i = 0; i < num; i++) {
        const plot *pl = kv ? &kv_plots[i] : text ? &text_plots[i] : world ? &world_plots[i] : &image_plots[i];
        if (!world || has_numbers(p, pl)) out_plot(p, pl);
    }
}

/* --- lines over frames -------------------------------------------------------------------------------------------- */

static double line_value(const page_line_plot *pl, int line, int point) {
    return fmin(pl->lines[line].values[point], pl->top);
}

static bool line_bounds(const page_line_plot *pl, bounds *b) {
    *b = (bounds){1, pl->num_points > 1 ? pl->num_points : 2, INFINITY, -INFINITY};
    for (int l = 0; l < pl->num_lines; l++) {
        for (int i = 0; i < pl->num_points; i++) {
            double v = pl->lines[l].values[i];
            if (isnan(v)) continue;
            b->y0 = fmin(b->y0, fmin(v, pl->top));
            b->y1 = fmax(b->y1, fmin(v, pl->top));
        }
    }
    if (!(b->y1 >= b->y0)) return false;
    double margin = .05 * (b->y1 - b->y0) + .1;
    b->y0 -= margin;
    b->y1 += margin;
    return true;
}

static void lines_script(page *p, const void *of, const bounds *b, const char *svg_path) {
    const page_line_plot *pl = of;
    page_out(p,
             "# %s\nset terminal svg size %d,%d dynamic noenhanced font 'Helvetica,13' background '#ffffff' linewidth "
             "1.2\nset output '",
             pl->title, PLOT_WIDTH, PLOT_HEIGHT);
    for (const char *c = svg_path; *c; c++) page_out(p, *c == '\'' ? "''" : "%c", *c);
    page_out(p,
             "'\nset xrange [%g:%g]\nset yrange [%g:%g]\nset xlabel 'frame'\nset ylabel '%s'\n"
             "set grid xtics ytics lc rgb '#e3e6ea' lw 0.8\nset border 3 lc rgb '#868e96'\n"
             "set tics nomirror textcolor rgb '#343a40'\nset key outside below left Left reverse maxcols 2 samplen 2\n"
             "set datafile missing '?'\n$lines << EOD\n",
             b->x0, b->x1, b->y0, b->y1, pl->axis);
    for (int i = 0; i < pl->num_points; i++) {
        page_out(p, "%d", i + 1);
        for (int l = 0; l < pl->num_lines; l++) {
            double v = line_value(pl, l, i);
            page_out(p, isnan(pl->lines[l].values[i]) ? " ?" : " %.6g", v);
        }
        page_out(p, "\n");
    }
    page_out(p, "EOD\nplot ");
    for (int l = 0; l < pl->num_lines; l++)
        page_out(p, "%s$lines using 1:%d with lines lc rgb '%s' lw %s dt %d title '%s'", l ? ", " : "", l + 2,
                 pl->lines[l].color, pl->lines[l].dashed ? "1.4" : "1.8", pl->lines[l].dashed ? 2 : 1,
                 pl->lines[l].label);
    page_out(p, "\n");
}

static void own_lines(page *p, const void *of, const bounds *b) {
    const page_line_plot *pl = of;
    double width = PLOT_WIDTH - 20 - LEFT, raw = (b->y1 - b->y0) / 7, unit = pow(10, floor(log10(raw)));
    double step = unit * (raw / unit > 5 ? 10 : raw / unit > 2 ? 5 : raw / unit > 1 ? 2 : 1);
    int every = pl->num_points > 100 ? 20 : pl->num_points > 40 ? 5 : pl->num_points > 20 ? 2 : 1;
    page_out(p, "<svg viewBox='0 0 %d %d' font-family='Helvetica,Arial,sans-serif' font-size='12' fill='#343a40'>",
             PLOT_WIDTH, PLOT_HEIGHT + 18 * ((pl->num_lines + 1) / 2));
    for (double v = ceil(b->y0 / step); v * step <= b->y1; v++) {
        double y = BOTTOM - (BOTTOM - TOP) * (v * step - b->y0) / (b->y1 - b->y0);
        page_out(p, "<path d='M%g %.1fh%g' stroke='#e3e6ea'/><text x='%g' y='%.1f' text-anchor='end'>%g</text>", LEFT,
                 y, width, LEFT - 8, y + 4, v * step);
    }
    for (int i = 0; i < pl->num_points; i += every)
        page_out(p, "<text x='%.1f' y='%g' text-anchor='middle'>%d</text>",
                 LEFT + width * (i + 1 - b->x0) / (b->x1 - b->x0), BOTTOM + 18, i + 1);
    page_out(p, "<path d='M%g %gV%gh%g' fill='none' stroke='#868e96'/>", LEFT, TOP, BOTTOM, width);
    page_out(p, "<text x='%g' y='%g' text-anchor='middle'>frame</text>", LEFT + width / 2, BOTTOM + 36);
    page_out(p, "<text transform='translate(16 %g) rotate(-90)' text-anchor='middle'>%s</text>", (TOP + BOTTOM) / 2,
             pl->axis);
    for (int l = 0; l < pl->num_lines; l++) {
        const page_line *line = &pl->lines[l];
        const char *move = "M", *dash = line->dashed ? " stroke-dasharray='6 4'" : "";
        double x = LEFT + (l % 2) * (width / 2), y = PLOT_HEIGHT + 18 * (l / 2);
        page_out(p, "<path fill='none' stroke='%s' stroke-width='2'%s d='", line->color, dash);
        for (int i = 0; i < pl->num_points; i++) {
            double v = line_value(pl, l, i);
            if (isnan(line->values[i])) {
                move = "M";
                continue;
            }
            page_out(p, "%s%.1f %.1f", move, LEFT + width * (i + 1 - b->x0) / (b->x1 - b->x0),
                     BOTTOM - (BOTTOM - TOP) * (v - b->y0) / (b->y1 - b->y0));
            move = "L";
        }
        page_out(p, "'/><path d='M%.1f %.1fh24' stroke='%s' stroke-width='2'%s/><text x='%.1f' y='%.1f'>", x, y,
                 line->color, dash, x + 30, y + 4);
        page_out_text(p, line->label);
        page_out(p, "</text>");
    }
    page_out(p, "</svg>");
}

void page_out_lines(page *p, const page_line_plot *pl) {
    bounds b;
    if (pl->num_lines == 0 || !line_bounds(pl, &b)) return;
    page_out(p, "<h3>%s</h3>\n<div class='plot'>", pl->title);
    char *svg = NULL;
    gnuplot_svg(p, pl->name, lines_script, pl, &b, &svg);
    out_drawn(p, svg, own_lines, pl, &b);
    page_out(p, "</div>\n");
}

/* samples/refrain/sweep_report.c - one HTML file with everything inside: tables, inline SVG, pictures as data URIs. No
 * script, no address of anything outside, so it opens the same anywhere and for ever. */
#include "samples/refrain/sweep_report.h"

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
#include "core/file.h"
#include "core/image.h"
#include "core/memory.h"

#define MAX_STRIPS       8
#define MAX_STRIP_IMAGES 4
#define DIFFERENCE_GAIN  8
#define MAX_PNG_BYTES    ((size_t)64 << 20)
#define MAX_SVG_BYTES    ((size_t)16 << 20)
#define PLOT_WIDTH       900
#define PLOT_HEIGHT      500
#define UNSTEADY         1.25 /* slowest over fastest uncached loop */
#define SSIM_TOP         .99999
#define DOUBTFUL         1.1 /* speed-up times computed share of rows */

extern char **environ;

/* --- judging ------------------------------------------------------------------------------------------------------ */

double sweep_metric_of(const sweep_row *row, sweep_metric metric) {
    return metric == SWEEP_PSNR ? row->psnr_mean : metric == SWEEP_SSIM ? row->ssim_mean : row->latent_mean;
}

bool sweep_is_control(const sweep_row *row) {
    return strcmp(row->policy, "steps") == 0;
}

bool sweep_is_measured(const sweep_row *row) {
    return strcmp(row->status, "ok") == 0 && row->speedup > 0 && isfinite(row->psnr_mean);
}

/* Speed-up as measured, or what the work left out would allow: all token rows over the computed ones. */
static double x_of(const sweep_row *row, bool by_work) {
    return by_work ? (row->share_rows > 0 ? 1 / row->share_rows : NAN) : row->speedup;
}

/* A machine that changes its speed between a setting and the uncached loop can show more than the work left out
 * allows. */
static bool is_doubtful(const sweep_row *row) {
    return sweep_is_measured(row) && row->speedup * row->share_rows > DOUBTFUL;
}

static int num_doubtful(const sweep_store *store) {
    int num = 0;
    for (int i = 0; i < sweep_store_num(store); i++) num += is_doubtful(sweep_store_at(store, i));
    return num;
}

/* The control by rising x. Returns the number of points; points NULL: counts only. */
static int control_points(const sweep_store *store, bool by_work, const sweep_row **points) {
    int num = 0;
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *row = sweep_store_at(store, i);
        if (!sweep_is_control(row) || !sweep_is_measured(row)) continue;
        if (!points) {
            num++;
            continue;
        }
        int at = num++;
        for (; at > 0 && x_of(points[at - 1], by_work) > x_of(row, by_work); at--) points[at] = points[at - 1];
        points[at] = row;
    }
    return num;
}

static sweep_verdict verdict_of(sweep_verdict_kind kind, double delta, const char *format, double shown) {
    sweep_verdict v = {.kind = kind, .delta = delta};
    snprintf(v.text, sizeof v.text, "%s", format);
    char *mark = strchr(v.text, '#');
    if (mark) {
        char tail[96];
        snprintf(tail, sizeof tail, "%s", mark + 1);
        snprintf(mark, sizeof v.text - (size_t)(mark - v.text), "%.1f%s", shown, tail);
    }
    return v;
}

/* '#' in a text is where the number goes. */
static sweep_verdict judge(const sweep_row *row, const sweep_row **control, int num) {
    const sweep_row *mild = control[0], *fast = control[num - 1];
    double psnr = row->psnr_mean, delta;
    if (row->speedup < mild->speedup) {
        delta = psnr - mild->psnr_mean;
        if (delta < 0)
            return verdict_of(SWEEP_VERDICT_BELOW, delta, "below: a faster control is # dB better; worth nothing here",
                              -delta);
        return verdict_of(SWEEP_VERDICT_OPEN, NAN, "slower than every control point measured", 0);
    }
    if (row->speedup > fast->speedup) {
        delta = psnr - fast->psnr_mean;
        if (delta >= 0)
            return verdict_of(SWEEP_VERDICT_ABOVE, delta, "above the fewer-steps curve by # dB or more", delta);
        return verdict_of(SWEEP_VERDICT_OPEN, NAN, "faster than every control point measured", 0);
    }
    delta = psnr - fast->psnr_mean;
    for (int i = 0; i + 1 < num; i++) {
        double a = log(control[i]->speedup), b = log(control[i + 1]->speedup), x = log(row->speedup);
        if (x < a || x > b || b <= a) continue;
        delta =
            psnr - (control[i]->psnr_mean + (control[i + 1]->psnr_mean - control[i]->psnr_mean) * (x - a) / (b - a));
        break;
    }
    if (delta > 0) return verdict_of(SWEEP_VERDICT_ABOVE, delta, "above the fewer-steps curve by # dB", delta);
    return verdict_of(SWEEP_VERDICT_BELOW, delta, "below by # dB: worth nothing here", -delta);
}

sweep_verdict sweep_judge(const sweep_store *store, const sweep_row *row) {
    sweep_verdict none = {.kind = SWEEP_VERDICT_NONE, .delta = NAN};
    if (sweep_is_control(row)) {
        snprintf(none.text, sizeof none.text, "the control");
        return none;
    }
    if (strcmp(row->status, "ok") != 0) return none;
    if (!sweep_is_measured(row)) return verdict_of(SWEEP_VERDICT_BELOW, NAN, "diverged: not a number", 0);
    if (row->speedup <= 1) return verdict_of(SWEEP_VERDICT_BELOW, NAN, "not faster than the uncached run", 0);
    int num = control_points(store, false, NULL);
    const sweep_row **points = num > 0 ? rf_alloc_zero((size_t)num, sizeof *points) : NULL;
    if (!points) return verdict_of(SWEEP_VERDICT_OPEN, NAN, "no control was measured", 0);
    control_points(store, false, points);
    sweep_verdict v = judge(row, points, num);
    rf_free(points);
    return v;
}

static bool on_front(const sweep_store *store, const sweep_row *row, sweep_metric metric, bool by_work) {
    if (!sweep_is_measured(row) || sweep_is_control(row)) return false;
    double sign = metric == SWEEP_LATENT ? -1 : 1, mine = sign * sweep_metric_of(row, metric), x = x_of(row, by_work);
    if (!isfinite(mine)) return false;
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *other = sweep_store_at(store, i);
        if (other == row || !sweep_is_measured(other) || sweep_is_control(other)) continue;
        double its = sign * sweep_metric_of(other, metric), its_x = x_of(other, by_work);
        if ((its_x > x && its >= mine) || (its_x >= x && its > mine)) return false;
    }
    return true;
}

bool sweep_on_front(const sweep_store *store, const sweep_row *row, sweep_metric metric) {
    return on_front(store, row, metric, false);
}

static double sort_value(const sweep_row *row) {
    return sweep_is_measured(row) ? row->speedup : strcmp(row->status, "ok") == 0 ? 0 : -1;
}

void sweep_sort(const sweep_store *store, int *order) {
    for (int i = 0; i < sweep_store_num(store); i++) {
        int at = i;
        double value = sort_value(sweep_store_at(store, i));
        for (; at > 0 && sort_value(sweep_store_at(store, order[at - 1])) < value; at--) order[at] = order[at - 1];
        order[at] = i;
    }
}

static void name_row(const sweep_row *row, char *out, size_t room) {
    if (sweep_is_control(row)) {
        snprintf(out, room, "no cache, %.0f steps", row->steps);
    } else {
        snprintf(out, room, "%s%s%s", row->policy, row->options[0] ? ":" : "", row->options);
    }
}

static int *sorted_rows(const sweep_store *store, rf_error *err) {
    int *order = rf_alloc_zero((size_t)sweep_store_num(store) + 1, sizeof *order);
    if (order) {
        sweep_sort(store, order);
    } else {
        rf_fail(err, RF_ERR_MEMORY, "no memory for a table of %d rows", sweep_store_num(store));
    }
    return order;
}

rf_status sweep_print_table(const sweep_store *store, rf_error *err) {
    int *order = sorted_rows(store, err), width = 8, refused = 0;
    if (!order) return RF_ERR_MEMORY;
    char name[512];
    for (int i = 0; i < sweep_store_num(store); i++) {
        name_row(sweep_store_at(store, i), name, sizeof name);
        if ((int)strlen(name) > width) width = (int)strlen(name);
    }
    if (width > 64) width = 64;
    printf("%-*s %8s %8s %7s %9s %7s  %s\n", width, "setting", "speed-up", "PSNR dB", "SSIM", "latent L2", "rows %",
           "against fewer steps");
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *row = sweep_store_at(store, order[i]);
        name_row(row, name, sizeof name);
        if (strcmp(row->status, "ok") != 0) {
            refused++;
            continue;
        }
        printf("%-*s %8.3f %8.2f %7.4f %9.4f %7.1f  %s\n", width, name, row->speedup, row->psnr_mean, row->ssim_mean,
               row->latent_mean, 100 * row->share_rows, sweep_judge(store, row).text);
    }
    if (num_doubtful(store) > 0)
        printf("%d speed-ups are above what their computed rows allow: the machine was not steady\n",
               num_doubtful(store));
    if (refused > 0) printf("%d refused (named in --json and the report)\n", refused);
    rf_free(order);
    return RF_OK;
}

/* --- writing HTML ------------------------------------------------------------------------------------------------- */

typedef struct {
    rf_file_writer *file;
    const sweep_store *store;
    const int *order; /* by falling speed-up */
    bool by_gnuplot;
} page;

static void out(page *p, const char *format, ...) __attribute__((format(printf, 2, 3)));
static void out(page *p, const char *format, ...) {
    char text[4096];
    va_list args;
    va_start(args, format);
    int len = vsnprintf(text, sizeof text, format, args);
    va_end(args);
    if (len > 0) rf_file_writer_write(p->file, text, (size_t)len < sizeof text ? (size_t)len : sizeof text - 1);
}

/* Text of any origin. */
static void out_text(page *p, const char *text) {
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

static void out_number(page *p, const char *before, const char *format_after, double value, int digits) {
    if (isfinite(value)) {
        out(p, "%s%.*f%s", before, digits, value, format_after);
    } else {
        out(p, "%s&ndash;%s", before, format_after);
    }
}

static void out_base64(page *p, const uint8_t *bytes, size_t num) {
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

/* --- colours and shapes ------------------------------------------------------------------------------------------- */

static const char *color_of(const char *policy) {
    static const struct {
        const char *policy, *color;
    } colors[] = {
        {"interval", "#8d8d8d"}, {"teacache", "#4e79a7"},   {"easycache", "#3fb7c6"},  {"magcache", "#2f9e44"},
        {"spectrum", "#8a63d2"}, {"adacache", "#9c6b4e"},   {"worldcache", "#e03131"}, {"fbcache", "#f08c00"},
        {"dbcache", "#b3a200"},  {"deltacache", "#e667af"}, {"fora", "#1c4f82"},       {"taylorseer", "#1b6b3a"},
        {"hicache", "#5b2a9d"},  {"speca", "#a61e4d"},      {"pab", "#c05621"},        {"toca", "#0b7285"},
        {"duca", "#66a80f"},     {"diffsparse", "#d6336c"}, {"replay", "#495057"},
    };
    for (size_t i = 0; i < sizeof colors / sizeof colors[0]; i++) {
        if (strcmp(colors[i].policy, policy) == 0) return colors[i].color;
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
    bool log_y, by_work;
} plot;

static const plot plots[] = {
    {SWEEP_PSNR, "psnr", "Speed-up against PSNR (higher is better)", "PSNR, dB, mean over pictures", false, false},
    {SWEEP_SSIM, "ssim", "Speed-up against SSIM (higher is better)",
     "SSIM, mean over pictures (logarithmic in 1 - SSIM)", false, false},
    {SWEEP_LATENT, "latent", "Speed-up against the error of the final latent (lower is better)",
     "relative L2 of the final latent, mean over pictures", true, false},
    {SWEEP_PSNR, "work", "Work left out against PSNR: what the machine's speed does not touch",
     "PSNR, dB, mean over pictures", false, true},
};
#define NUM_PLOTS (sizeof plots / sizeof plots[0])

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
    if (!sweep_is_measured(row) || !isfinite(y) || !(x_of(row, pl->by_work) > 0)) return false;
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
        b->x0 = fmin(b->x0, x_of(row, pl->by_work));
        b->x1 = fmax(b->x1, x_of(row, pl->by_work));
        b->y0 = fmin(b->y0, y);
        b->y1 = fmax(b->y1, y);
    }
    if (!(b->x1 >= b->x0)) return false;
    b->x0 = fmin(b->x0, 1) / 1.04;
    b->x1 = fmax(b->x1, 1.2) * 1.06;
    if (pl->log_y) {
        b->y0 /= 1.25;
        b->y1 *= 1.25;
    } else {
        double margin = .05 * (b->y1 - b->y0) + 1e-4;
        b->y0 -= margin;
        b->y1 += margin;
    }
    return true;
}

static const double x_ticks[] = {.25, .5, .75, 1,  1.25, 1.5, 2,  2.5, 3,  4,  5,
                                 6,   8,  10,  12, 16,   20,  30, 40,  60, 80, 100};
#define NUM_X_TICKS (sizeof x_ticks / sizeof x_ticks[0])

static const char *x_title(const plot *pl) {
    return pl->by_work ? "token rows of the uncached run over computed ones"
                       : "speed-up of the denoising loop over the uncached run, wall-clock, times";
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

/* The front from fast to slow; after NULL its first member, after the last NULL. Equal points count once. */
static const sweep_row *next_on_front(const page *p, const plot *pl, const sweep_row *after) {
    const sweep_row *next = NULL;
    double limit = after ? x_of(after, pl->by_work) : INFINITY;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        double x = x_of(row, pl->by_work);
        if (!is_plotted(pl, row) || !(x < limit) || !on_front(p->store, row, pl->metric, pl->by_work)) continue;
        if (!next || x > x_of(next, pl->by_work)) next = row;
    }
    return next;
}

/* gnuplot: data blocks, then one plot command. */
static void gnuplot_script(page *p, const plot *pl, const bounds *b, const char *svg_path) {
    static const int points[] = {[CIRCLE] = 7, [SQUARE] = 5, [TRIANGLE] = 9, [DIAMOND] = 13};
    out(p,
        "# %s\nset terminal svg size %d,%d dynamic font 'Helvetica,13' background '#ffffff' linewidth 1.2\nset output "
        "'",
        pl->title, PLOT_WIDTH, PLOT_HEIGHT);
    for (const char *c = svg_path; *c; c++) out(p, *c == '\'' ? "''" : "%c", *c);
    out(p, "'\nset datafile separator whitespace\nset logscale x\n%sset xrange [%g:%g]\nset yrange [%g:%g]\n",
        pl->log_y ? "set logscale y\n" : "", b->x0, b->x1, b->y0, b->y1);
    out(p, "set xtics (");
    const char *between = "";
    double last = -1;
    for (size_t i = 0; i < NUM_X_TICKS; i++) {
        if (!has_room(b, x_ticks[i], &last)) continue;
        out(p, "%s'%g' %g", between, x_ticks[i], x_ticks[i]);
        between = ", ";
    }
    out(p,
        ")\nset mxtics 1\nset format y '%%g'\nset xlabel '%s'\n"
        "set ylabel '%s'\nset grid xtics ytics lc rgb '#e3e6ea' lw 0.8\nset border 3 lc rgb '#868e96'\n"
        "set tics nomirror textcolor rgb '#343a40'\nset key outside right top Left reverse samplen 1.5 spacing 1.05\n",
        x_title(pl), pl->axis);
    if (pl->metric == SWEEP_SSIM) {
        out(p, "set ytics (");
        for (size_t i = 0; i < NUM_SSIM_TICKS; i++)
            out(p, "%s'%g' %.6f", i ? ", " : "", ssim_ticks[i], ssim_place(ssim_ticks[i]));
        out(p, ")\n");
    }
    out(p, "$control << EOD\n");
    int num = control_points(p->store, pl->by_work, NULL), controls = 0, front = 0;
    const sweep_row **control = rf_alloc_zero((size_t)num + 1, sizeof *control);
    if (control) control_points(p->store, pl->by_work, control);
    for (int i = 0; control && i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        out(p, "%.6g %.6g %.0f\n", x_of(control[i], pl->by_work), y_of(pl, control[i]), control[i]->steps);
        controls++;
    }
    rf_free(control);
    out(p, "EOD\n$front << EOD\n");
    for (const sweep_row *row = NULL; (row = next_on_front(p, pl, row)) != NULL; front++)
        out(p, "%.6g %.6g %d\n", x_of(row, pl->by_work), y_of(pl, row), place_of(p, row));
    out(p, "EOD\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (!is_first_of_policy(p, pl, i)) continue;
        const char *policy = sweep_store_at(p->store, i)->policy;
        out(p, "$%s << EOD\n", policy);
        for (int j = i; j < sweep_store_num(p->store); j++) {
            const sweep_row *row = sweep_store_at(p->store, j);
            if (strcmp(row->policy, policy) == 0 && is_plotted(pl, row))
                out(p, "%.6g %.6g\n", x_of(row, pl->by_work), y_of(pl, row));
        }
        out(p, "EOD\n");
    }
    out(p, "plot ");
    const char *comma = "";
    if (front > 0) {
        out(p, "$front using 1:2 with lines lc rgb '#ced4da' lw 5 title 'front'");
        comma = ", ";
    }
    if (controls > 0) {
        out(p,
            "%s$control using 1:2 with linespoints lc rgb '#212529' lw 1.6 pt 2 ps 0.7 title 'fewer steps, no cache', "
            "$control using 1:2:3 with labels font ',10' tc rgb '#212529' offset -1,-0.7 notitle",
            comma);
        comma = ", ";
    }
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        if (!is_first_of_policy(p, pl, i)) continue;
        const char *policy = sweep_store_at(p->store, i)->policy;
        out(p, "%s$%s using 1:2 with points pt %d ps 0.75 lc rgb '%s' title '%s'", comma, policy,
            points[shape_of(policy)], color_of(policy), policy);
        comma = ", ";
    }
    if (front > 0) out(p, "%s$front using 1:2:3 with labels font ',10' tc rgb '#495057' offset 1,0.7 notitle", comma);
    out(p, "\n");
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

static char *join(const sweep_store *store, const char *folder, const char *name, const char *ending) {
    char tail[128];
    snprintf(tail, sizeof tail, "%s/%s%s", folder, name, ending);
    return rf_path_join(sweep_store_folder(store), tail);
}

/* The SVG of a plot, rf_free; *svg_text stays NULL if gnuplot is not there or failed. The script stays beside it for
 * people. */
static void gnuplot_svg(const page *p, const plot *pl, const bounds *b, char **svg_text) {
    char *script = join(p->store, "plots", pl->name, ".gp"), *svg = join(p->store, "plots", pl->name, ".svg");
    char *folder = rf_path_join(sweep_store_folder(p->store), "plots");
    page to = *p;
    bool ok = script && svg && folder && (mkdir(folder, 0777) == 0 || rf_path_is_dir(folder)) &&
              rf_file_writer_open(&to.file, script, NULL) == RF_OK;
    if (ok) {
        gnuplot_script(&to, pl, b, svg);
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
    const char *color = color_of(policy);
    switch (shape_of(policy)) {
    case CIRCLE: out(p, "<circle cx='%.1f' cy='%.1f' r='4.5' fill='%s'/>", x, y, color); return;
    case SQUARE: out(p, "<rect x='%.1f' y='%.1f' width='8' height='8' fill='%s'/>", x - 4, y - 4, color); return;
    case TRIANGLE: out(p, "<path d='M%.1f %.1fl5 9h-10z' fill='%s'/>", x, y - 5.5, color); return;
    case DIAMOND: out(p, "<path d='M%.1f %.1fl5.5 5.5l-5.5 5.5l-5.5 -5.5z' fill='%s'/>", x, y - 5.5, color); return;
    }
}

static void own_y_tick(page *p, const plot *pl, const bounds *b, double v, double shown) {
    if (v < b->y0 || v > b->y1) return;
    double y = y_at(pl, b, v);
    out(p, "<path d='M%g %.1fH%g' stroke='#e3e6ea'/><text x='%g' y='%.1f' text-anchor='end'>%g</text>", LEFT, y, RIGHT,
        LEFT - 8, y + 4, shown);
}

static void own_axes(page *p, const plot *pl, const bounds *b) {
    double last = -1;
    for (size_t i = 0; i < NUM_X_TICKS; i++) {
        if (!has_room(b, x_ticks[i], &last)) continue;
        double x = x_at(b, x_ticks[i]);
        out(p, "<path d='M%.1f %gV%g' stroke='#e3e6ea'/><text x='%.1f' y='%g' text-anchor='middle'>%g</text>", x, TOP,
            BOTTOM, x, BOTTOM + 18, x_ticks[i]);
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
    out(p, "<path d='M%g %gV%gH%g' fill='none' stroke='#868e96'/>", LEFT, TOP, BOTTOM, RIGHT);
    out(p, "<text x='%g' y='%d' text-anchor='middle'>%s</text>", (LEFT + RIGHT) / 2, PLOT_HEIGHT - 14, x_title(pl));
    out(p, "<text transform='translate(16 %g) rotate(-90)' text-anchor='middle'>%s</text>", (TOP + BOTTOM) / 2,
        pl->axis);
}

static void own_front(page *p, const plot *pl, const bounds *b) {
    const char *move = "M";
    out(p, "<path fill='none' stroke='#ced4da' stroke-width='6' d='");
    for (const sweep_row *row = NULL; (row = next_on_front(p, pl, row)) != NULL; move = "L")
        out(p, "%s%.1f %.1f", move, x_at(b, x_of(row, pl->by_work)), y_at(pl, b, y_of(pl, row)));
    out(p, "'/>");
}

static void own_control(page *p, const plot *pl, const bounds *b) {
    int num = control_points(p->store, pl->by_work, NULL);
    const sweep_row **control = rf_alloc_zero((size_t)num + 1, sizeof *control);
    if (!control) return;
    control_points(p->store, pl->by_work, control);
    out(p, "<path fill='none' stroke='#212529' stroke-width='1.6' d='");
    const char *move = "M";
    for (int i = 0; i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        out(p, "%s%.1f %.1f", move, x_at(b, x_of(control[i], pl->by_work)), y_at(pl, b, y_of(pl, control[i])));
        move = "L";
    }
    out(p, "'/>");
    for (int i = 0; i < num; i++) {
        if (!is_plotted(pl, control[i])) continue;
        double x = x_at(b, x_of(control[i], pl->by_work)), y = y_at(pl, b, y_of(pl, control[i]));
        out(p,
            "<path d='M%.1f %.1fl6 6m0 -6l-6 6' stroke='#212529'/><text x='%.1f' y='%.1f' text-anchor='end' "
            "font-size='10'>%.0f</text>",
            x - 3, y - 3, x - 5, y + 13, control[i]->steps);
    }
    rf_free(control);
}

static void own_svg(page *p, const plot *pl, const bounds *b) {
    out(p, "<svg viewBox='0 0 %d %d' font-family='Helvetica,Arial,sans-serif' font-size='12' fill='#343a40'>",
        PLOT_WIDTH, PLOT_HEIGHT);
    own_axes(p, pl, b);
    own_front(p, pl, b);
    own_control(p, pl, b);
    double legend = TOP + 10;
    out(p, "<path d='M%g %gh22' stroke='#ced4da' stroke-width='6'/><text x='%g' y='%g'>front</text>", RIGHT + 18,
        legend, RIGHT + 48, legend + 4);
    legend += 18;
    out(p, "<path d='M%g %gh22' stroke='#212529' stroke-width='1.6'/><text x='%g' y='%g'>fewer steps, no cache</text>",
        RIGHT + 18, legend, RIGHT + 48, legend + 4);
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (is_first_of_policy(p, pl, i)) {
            legend += 18;
            out_shape(p, row->policy, RIGHT + 29, legend);
            out(p, "<text x='%g' y='%g'>%s</text>", RIGHT + 48, legend + 4, row->policy);
        }
        if (!is_plotted(pl, row) || sweep_is_control(row)) continue;
        double x = x_at(b, x_of(row, pl->by_work)), y = y_at(pl, b, y_of(pl, row));
        char name[512];
        name_row(row, name, sizeof name);
        out(p, "<g><title>");
        out_text(p, name);
        out(p, "</title>");
        out_shape(p, row->policy, x, y);
        if (on_front(p->store, row, pl->metric, pl->by_work))
            out(p, "<text x='%.1f' y='%.1f' font-size='10'>%d</text>", x + 6, y - 6, place_of(p, row));
        out(p, "</g>");
    }
    out(p, "</svg>");
}

static void out_plot(page *p, const plot *pl) {
    bounds b;
    out(p, "<h3>%s</h3>\n<div class='plot'>", pl->title);
    if (!find_bounds(p, pl, &b)) {
        out(p, "<p>Nothing to draw.</p></div>\n");
        return;
    }
    char *svg = NULL;
    gnuplot_svg(p, pl, &b, &svg);
    if (svg && out_svg(p, svg)) {
        p->by_gnuplot = true;
    } else {
        own_svg(p, pl, &b);
    }
    rf_free(svg);
    out(p, "</div>\n");
}

/* --- parts of the page -------------------------------------------------------------------------------------------- */

static const char style[] =
    "body{font:15px/1.5 system-ui,-apple-system,'Segoe "
    "UI',Helvetica,Arial,sans-serif;color:#212529;background:#f8f9fa;margin:0}"
    "main{max-width:1240px;margin:0 auto;padding:28px 24px 60px}"
    "h1{font-size:27px;margin:0 0 4px}h2{font-size:20px;margin:42px 0 8px;border-bottom:1px solid "
    "#dee2e6;padding-bottom:4px}"
    "h3{font-size:15px;margin:22px 0 6px;color:#343a40}p{max-width:78em;margin:8px 0}.sub{color:#495057}"
    ".card,.plot{background:#fff;border:1px solid #dee2e6;border-radius:8px;padding:12px}"
    ".plot svg{width:100%;height:auto;display:block}.scroll{overflow-x:auto}"
    "table{border-collapse:collapse;font-size:13px;background:#fff;width:100%}"
    "th,td{padding:4px 9px;text-align:right;border-bottom:1px solid "
    "#e9ecef;white-space:nowrap;font-variant-numeric:tabular-nums}"
    "th{background:#f1f3f5;font-weight:600;color:#343a40;vertical-align:bottom}td.l,th.l{text-align:left}"
    "td.o{white-space:normal;min-width:170px}td.v{white-space:normal;min-width:150px}.all td,.all th{padding:3px "
    "6px;font-size:12.5px}tr.c td{background:#f1f3f5}tr.f td{background:#fff9db}"
    ".dot{display:inline-block;width:10px;height:10px;border-radius:3px;margin-right:6px}"
    ".up{color:#2b8a3e}.down{color:#c92a2a}.open{color:#868e96}"
    ".facts{display:flex;flex-wrap:wrap;gap:6px 22px;font-size:13.5px;color:#495057;margin:10px 0 0;padding:0}"
    ".facts b{color:#212529;font-weight:600}"
    ".strip{background:#fff;border:1px solid #dee2e6;border-radius:8px;padding:10px 14px;margin:12px 0}"
    ".strip h3{margin:0 0 8px}.row{display:flex;flex-wrap:wrap;gap:14px}"
    ".three{display:flex;gap:3px}.three img{width:90px;height:auto;display:block}"
    ".key span{margin-right:16px}";

static void out_facts(page *p) {
    static const char *const labels[][2] = {
        {"model", "model"},        {"parameters", "parameters"}, {"sampler", "sampler"},  {"steps", "steps"},
        {"cfg_scale", "guidance"}, {"pictures", "pictures"},     {"size", "size"},        {"seed", "first seed"},
        {"classes", "classes"},    {"batch", "at once"},         {"device", "device"},    {"dtype", "dtype"},
        {"threads", "threads"},    {"_date", "begun"},           {"_version", "refrain"},
    };
    out(p, "<div class='facts'>");
    for (size_t i = 0; i < sizeof labels / sizeof labels[0]; i++) {
        const char *value = sweep_store_pin(p->store, labels[i][0]);
        out(p, "<span>%s <b>", labels[i][1]);
        if (strlen(value) > 80) {
            char cut[84];
            snprintf(cut, sizeof cut, "%.77s...", value);
            out_text(p, cut);
        } else {
            out_text(p, value);
        }
        out(p, "</b></span>");
    }
    out(p, "</div>\n");
}

/* The fastest row at a level: of the policies, or of the control. NULL: none. */
static const sweep_row *fastest(const page *p, sweep_metric metric, double level, bool control) {
    const sweep_row *best = NULL;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (!sweep_is_measured(row) || sweep_is_control(row) != control || !(sweep_metric_of(row, metric) >= level))
            continue;
        if (!best || row->speedup > best->speedup) best = row;
    }
    return best;
}

static void out_name(page *p, const sweep_row *row) {
    char name[512];
    name_row(row, name, sizeof name);
    if (!sweep_is_control(row)) out(p, "<span class='dot' style='background:%s'></span>", color_of(row->policy));
    for (char *at = name, *end; *at; at = end) { /* may break behind a ';' */
        end = at + strcspn(at, ";");
        if (*end == ';') end++;
        char kept = *end;
        *end = 0;
        out_text(p, at);
        *end = kept;
        if (kept) out(p, "<wbr>");
    }
}

static void out_level(page *p, sweep_metric metric, double level) {
    const sweep_row *best = fastest(p, metric, level, false), *control = fastest(p, metric, level, true);
    out(p, metric == SWEEP_PSNR ? "<tr><td class='l'>PSNR &ge; %g dB</td>" : "<tr><td class='l'>SSIM &ge; %g</td>",
        level);
    if (best) {
        out(p, "<td class='l'>");
        out_name(p, best);
        out(p, "</td><td><b>%.2f&times;</b></td><td>%.2f</td><td>%.4f</td>", best->speedup, best->psnr_mean,
            best->ssim_mean);
    } else {
        out(p, "<td class='l open'>none reaches it</td><td></td><td></td><td></td>");
    }
    if (control) {
        out(p, "<td>%.2f&times;</td><td>%.0f</td>", control->speedup, control->steps);
    } else {
        out(p, "<td class='open'>none</td><td></td>");
    }
    if (best && control) {
        double gain = best->speedup / control->speedup;
        out(p, "<td class='%s'>%.2f&times;</td></tr>\n", gain > 1 ? "up" : "down", gain);
    } else {
        out(p, "<td></td></tr>\n");
    }
}

/* Timings that cannot be trusted are told where the speed-ups stand. */
static void out_doubts(page *p) {
    double lo = INFINITY, hi = 0, seconds;
    for (int i = 0; i < sweep_store_num_baselines(p->store); i++) {
        double ms = sweep_store_baseline(p->store, i, &seconds);
        lo = fmin(lo, ms);
        hi = fmax(hi, ms);
    }
    int doubtful = num_doubtful(p->store);
    if (!(hi > UNSTEADY * lo) && doubtful == 0) return;
    out(p,
        "<p class='down'><b>The machine was not steady:</b> the uncached loop took %.2f times as long at its slowest "
        "as at its fastest, "
        "and %d speed-ups are above what the computed rows allow (marked ? in the table). Quality is not touched by "
        "this; the plot of "
        "work left out is not either.</p>\n",
        hi / lo, doubtful);
}

static void out_summary(page *p) {
    static const double psnr[] = {45, 40, 35, 31.5, 28, 25}, ssim[] = {.99, .97, .95, .9, .8};
    int above = 0, below = 0, open = 0, refused = 0, num = 0;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (sweep_is_control(row)) continue;
        sweep_verdict v = sweep_judge(p->store, row);
        num++;
        above += v.kind == SWEEP_VERDICT_ABOVE;
        below += v.kind == SWEEP_VERDICT_BELOW;
        open += v.kind == SWEEP_VERDICT_OPEN;
        refused += strcmp(row->status, "ok") != 0;
    }
    out(p,
        "<h2>Fastest setting at a quality</h2>\n<p>%d settings: <span class='up'>%d above</span> the curve of fewer "
        "steps, "
        "<span class='down'>%d on or below it (worth nothing there)</span>, %d outside the speeds of the control, %d "
        "refused.</p>\n",
        num, above, below, open, refused);
    out(p, "<div class='scroll'><table><tr><th class='l'>level (mean)</th><th class='l'>fastest "
           "setting</th><th>speed-up</th><th>PSNR dB</th>"
           "<th>SSIM</th><th>fewer steps<br>reach</th><th>with<br>steps</th><th>gain over<br>fewer steps</th></tr>\n");
    for (size_t i = 0; i < sizeof psnr / sizeof psnr[0]; i++) out_level(p, SWEEP_PSNR, psnr[i]);
    for (size_t i = 0; i < sizeof ssim / sizeof ssim[0]; i++) out_level(p, SWEEP_SSIM, ssim[i]);
    out(p, "</table></div>\n");
    out_doubts(p);
}

static void out_method(page *p) {
    double lo = INFINITY, hi = 0, seconds, median = sweep_store_base_ms(p->store, 0);
    int num = sweep_store_num_baselines(p->store);
    for (int i = 0; i < num; i++) {
        double ms = sweep_store_baseline(p->store, i, &seconds);
        lo = fmin(lo, ms);
        hi = fmax(hi, ms);
    }
    out(p, "<h2>How it was measured</h2>\n<p>PSNR and SSIM are computed on floating-point pictures in [0, 1], not on "
           "8-bit ones, "
           "against <b>this program's own uncached run</b> of the same seeds: they say how far caching changes a "
           "picture, not how good "
           "the picture is. SSIM: Gaussian window 11&times;11, &sigma; 1.5, K<sub>1</sub> 0.01, K<sub>2</sub> 0.03, "
           "mean over channels. "
           "The error of the final latent is |cached &minus; uncached| / |uncached|. Means are over pictures; a "
           "picture equal to its "
           "reference counts as 100 dB.</p>\n");
    out(p, "<p>Speed-up is wall-clock of the denoising loop (all pictures, no decoding): the median of the last three "
           "timings of the "
           "uncached loop over the median of the setting's own runs, in one process, the uncached loop being timed "
           "again and again "
           "between the settings.");
    if (num > 0) {
        int digits = median < 100 ? 2 : 0;
        out(p, " It was timed %d times: median %.*f ms, %.*f to %.*f ms (%+.1f to %+.1f %%).", num, digits, median,
            digits, lo, digits, hi, 100 * (lo / median - 1), 100 * (hi / median - 1));
    }
    out(p, "</p>\n<p>The control is the same sampler with fewer steps and no cache, from the same noise. A setting on "
           "or below its curve "
           "(PSNR interpolated over the logarithm of the speed-up) is worth nothing there: fewer steps give as "
           "much.</p>\n");
    if (num < 2 || !(hi > 0)) return;
    out(p,
        "<h3>The uncached loop over the sweep</h3>\n<div class='plot'><svg viewBox='0 0 900 96' "
        "font-family='Helvetica,Arial,"
        "sans-serif' font-size='11' fill='#495057'><path d='M60 8V76H890' fill='none' stroke='#868e96'/>"
        "<text x='54' y='14' text-anchor='end'>%.*f ms</text><text x='54' y='78' text-anchor='end'>0</text>"
        "<text x='475' y='92' text-anchor='middle'>timings in order</text><path fill='none' stroke='#1c7ed6' "
        "stroke-width='1.5' d='",
        hi < 100 ? 2 : 0, hi);
    for (int i = 0; i < num; i++)
        out(p, "%s%.1f %.1f", i ? "L" : "M", 66 + 818.0 * i / (num - 1),
            76 - 66 * sweep_store_baseline(p->store, i, &seconds) / hi);
    out(p, "'/></svg></div>\n");
}

static void out_verdict(page *p, const sweep_verdict *v) {
    const char *kind = v->kind == SWEEP_VERDICT_ABOVE ? "up" : v->kind == SWEEP_VERDICT_BELOW ? "down" : "open";
    out(p, "<td class='l v %s'>", kind);
    out_text(p, v->text);
    out(p, "</td>");
}

static void out_row(page *p, int place) {
    const sweep_row *r = sweep_store_at(p->store, p->order[place]);
    bool refused = strcmp(r->status, "ok") != 0, front = sweep_on_front(p->store, r, SWEEP_PSNR);
    out(p, "<tr class='%s'><td>%d</td><td class='l o'>", sweep_is_control(r) ? "c" : front ? "f" : "", place + 1);
    out_name(p, r);
    if (refused) {
        out(p, "</td><td class='l open' colspan='15' style='white-space:normal'>refused: ");
        out_text(p, r->reason);
        out(p, "</td></tr>\n");
        return;
    }
    out(p, "</td>");
    out_number(p, "<td><b>", "&times;</b>", r->speedup, 2);
    out(p, is_doubtful(r) ? " <span class='down'>?</span></td>" : "</td>");
    sweep_verdict v = sweep_judge(p->store, r);
    out_verdict(p, &v);
    out_number(p, "<td>", "", r->loop_ms, r->loop_ms < 100 ? 2 : 0);
    if (r->loop_ms > 0)
        out(p, " <span class='open'>&plusmn;%.1f%%</span>", 50 * (r->loop_max_ms - r->loop_min_ms) / r->loop_ms);
    out_number(p, "</td><td><b>", "</b></td>", r->psnr_mean, 2);
    out_number(p, "<td>", "</td>", r->psnr_median, 2);
    out_number(p, "<td>", "</td>", r->psnr_worst, 2);
    out_number(p, "<td><b>", "</b></td>", r->ssim_mean, 4);
    out_number(p, "<td>", "</td>", r->ssim_worst, 4);
    out_number(p, "<td>", "</td>", r->latent_mean, 4);
    out_number(p, "<td>", "</td>", r->max_abs, 3);
    out_number(p, "<td>", "</td>", 100 * r->share_steps, 0);
    out_number(p, "<td>", "</td>", 100 * r->share_blocks, 0);
    out_number(p, "<td>", "</td>", 100 * r->share_rows, 0);
    out_number(p, "<td>", "</td>", r->cache_bytes / 1e6, 1);
    out_number(p, "<td>", "</td>", r->decide_ms, 2);
    out(p, "</tr>\n");
}

static void out_table(page *p) {
    out(p,
        "<h2>All settings, fastest first</h2>\n<p class='sub'>Yellow: on the PSNR front. Grey: the control. Computed: "
        "full steps, whole "
        "blocks, token rows, of what the uncached run computes. The spread of the timing is half of slowest minus "
        "fastest. A red ? marks a speed-up above what the "
        "computed rows allow.</p>\n"
        "<div class='scroll'><table class='all'><tr><th>#</th><th class='l'>setting</th><th>speed-up</th><th "
        "class='l'>against fewer steps</th><th>loop ms</th><th>PSNR dB<br>mean</th>"
        "<th>median</th><th>worst</th><th>SSIM<br>mean</th><th>worst</th><th>latent<br>rel. L2</th><th>max<br>abs</th>"
        "<th>steps<br>%%</th><th>blocks<br>%%</th><th>rows<br>%%</th><th>cache<br>MB</th><th>decide<br>ms</th></tr>\n");
    for (int i = 0; i < sweep_store_num(p->store); i++) out_row(p, i);
    out(p, "</table></div>\n");
}

/* One path for all steps of a kind: small, and exact to the pixel. */
static void out_cells(page *p, const char *kinds, char kind, double x, double y, double cell, const char *color) {
    if (!strchr(kinds, kind)) return;
    out(p, "<path fill='%s' d='", color);
    for (int s = 0; kinds[s]; s++) {
        if (kinds[s] == kind) out(p, "M%.1f %.1fh%.1fv11h-%.1fz", x + s * cell, y, cell * .88, cell * .88);
    }
    out(p, "'/>");
}

static void out_decisions(page *p) {
    int num = 0;
    size_t longest = 1;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        num += row->kinds[0] != 0;
        if (strlen(row->kinds) > longest) longest = strlen(row->kinds);
    }
    if (num == 0) return;
    double left = 330, cell = (1120 - left) / (double)longest, y = 18;
    out(p,
        "<h2>What was done at each step</h2>\n<p class='key'><span><span class='dot' "
        "style='background:#1c5d99'></span>full</span>"
        "<span><span class='dot' style='background:#f59f00'></span>partial: some blocks, parts or token rows</span>"
        "<span><span class='dot' style='background:#dbe4ec'></span>skipped: predicted</span> Picture 0, noisiest step "
        "at the left.</p>\n"
        "<div class='plot'><svg viewBox='0 0 1120 %d' font-family='Helvetica,Arial,sans-serif' font-size='10.5' "
        "fill='#343a40'>",
        num * 14 + 24);
    for (size_t s = 0; s<longest; s += longest> 200 ? 50 : longest > 60 ? 10 : 5)
        out(p, "<text x='%.1f' y='11'>%zu</text>", left + (double)s * cell, s);
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        if (!row->kinds[0]) continue;
        char name[512];
        name_row(row, name, sizeof name);
        if (strlen(name) > 46) snprintf(name + 43, sizeof name - 43, "...");
        out(p, "<text x='0' y='%.1f'>", y + 9);
        out_text(p, name);
        out(p, "</text><text x='%.1f' y='%.1f' text-anchor='end'>%.2f&times;</text>", left - 10, y + 9, row->speedup);
        out_cells(p, row->kinds, 'F', left, y, cell, "#1c5d99");
        out_cells(p, row->kinds, 'P', left, y, cell, "#f59f00");
        out_cells(p, row->kinds, 's', left, y, cell, "#dbe4ec");
        y += 14;
    }
    out(p, "</svg></div>\n");
}

/* --- pictures ----------------------------------------------------------------------------------------------------- */

static void out_png(page *p, const char *path, const char *alt) {
    char *bytes = NULL;
    size_t num = 0;
    if (rf_file_read(path, MAX_PNG_BYTES, &bytes, &num, NULL) != RF_OK) return;
    out(p, "<img alt='%s' src='data:image/png;base64,", alt);
    out_base64(p, (const uint8_t *)bytes, num);
    out(p, "'>");
    rf_free(bytes);
}

/* Makes the picture of the difference, middle grey aside: black where the two are equal. */
static bool save_difference(const char *a_path, const char *b_path, const char *to) {
    rf_image a = {0}, b = {0};
    bool ok = rf_image_load(&a, a_path, NULL) == RF_OK && rf_image_load(&b, b_path, NULL) == RF_OK &&
              a.width == b.width && a.height == b.height;
    for (size_t i = 0; ok && i < 3 * (size_t)a.width * (size_t)a.height; i++) {
        int d = abs((int)a.rgb[i] - (int)b.rgb[i]) * DIFFERENCE_GAIN;
        a.rgb[i] = (uint8_t)(d > 255 ? 255 : d);
    }
    if (ok) ok = rf_image_save_png(&a, to, NULL, 0, NULL) == RF_OK;
    rf_image_free(&a);
    rf_image_free(&b);
    return ok;
}

static void out_three(page *p, const char *hash, int index) {
    char ending[32];
    snprintf(ending, sizeof ending, "-%d.png", index);
    char *reference = join(p->store, "pictures", "reference", ending),
         *cached = join(p->store, "pictures", hash, ending);
    snprintf(ending, sizeof ending, "-%d-difference.png", index);
    char *difference = join(p->store, "pictures", hash, ending);
    if (reference && cached && difference && save_difference(cached, reference, difference)) {
        out(p, "<div class='three'>");
        out_png(p, reference, "reference");
        out_png(p, cached, "cached");
        out_png(p, difference, "difference");
        out(p, "</div>");
    }
    rf_free(reference);
    rf_free(cached);
    rf_free(difference);
}

static void out_strips(page *p) {
    int num = 0, shown = 0, seen = 0;
    for (int i = 0; i < sweep_store_num(p->store); i++)
        num += sweep_on_front(p->store, sweep_store_at(p->store, i), SWEEP_PSNR);
    if (num == 0) return;
    out(p,
        "<h2>Pictures along the front</h2>\n<p>Reference | cached | absolute difference &times;%d (of the saved 8-bit "
        "pictures), for the "
        "first pictures of the sweep. Settings of the PSNR front%s, fastest first.</p>\n",
        DIFFERENCE_GAIN, num > MAX_STRIPS ? ", evenly picked" : "");
    for (int i = 0; i < sweep_store_num(p->store) && shown < MAX_STRIPS; i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        if (!sweep_on_front(p->store, row, SWEEP_PSNR)) continue;
        bool picked = num <= MAX_STRIPS || seen == (shown * (num - 1) + (MAX_STRIPS - 1) / 2) / (MAX_STRIPS - 1);
        seen++;
        if (!picked) continue;
        char hash[17];
        sweep_key_hash(row->key, hash);
        out(p, "<div class='strip'><h3>#%d ", i + 1);
        out_name(p, row);
        out(p, " &nbsp; %.2f&times;, PSNR %.2f dB, SSIM %.4f</h3><div class='row'>", row->speedup, row->psnr_mean,
            row->ssim_mean);
        for (int image = 0; image < MAX_STRIP_IMAGES; image++) out_three(p, hash, image);
        out(p, "</div></div>\n");
        shown++;
    }
}

/* --- the page ----------------------------------------------------------------------------------------------------- */

static void out_page(page *p) {
    out(p, "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
           "content='width=device-width,initial-scale=1'>"
           "<title>Feature caching: ");
    out_text(p, sweep_store_pin(p->store, "model"));
    out(p, "</title><style>");
    rf_file_writer_write(p->file, style, sizeof style - 1);
    out(p, "</style></head><body><main>\n<h1>Feature caching on ");
    out_text(p, sweep_store_pin(p->store, "model"));
    out(p, ": speed against quality</h1>\n");
    out_facts(p);
    out_summary(p);
    out(p, "<h2>Speed against quality</h2>\n<p>Colour: policy. Shape: circle = decides by step, square = by block, "
           "triangle = by part, diamond "
           "= by token. Black line: the control, with its numbers of steps. Grey band: the front, numbered as in the "
           "table below.</p>\n");
    for (size_t i = 0; i < NUM_PLOTS; i++) out_plot(p, &plots[i]);
    out(p, "<p class='sub'>Plots drawn by %s.</p>\n",
        p->by_gnuplot ? "gnuplot; their scripts are in plots/" : "the program itself (gnuplot was not found)");
    out_strips(p);
    out_table(p);
    out_decisions(p);
    out_method(p);
    out(p, "</main></body></html>\n");
}

rf_status sweep_write_report(const sweep_store *store, rf_error *err) {
    page p = {.store = store};
    int *order = sorted_rows(store, err);
    if (!order) return RF_ERR_MEMORY;
    p.order = order;
    char *path = rf_path_join(sweep_store_folder(store), "report.html");
    rf_status st =
        path ? rf_file_writer_open(&p.file, path, err) : rf_fail(err, RF_ERR_MEMORY, "no memory for the report");
    if (st == RF_OK) {
        out_page(&p);
        st = rf_file_writer_commit(p.file, err);
    }
    rf_free(path);
    rf_free(order);
    return st;
}

/* samples/refrain/sweep_report.c - one HTML file with everything inside: tables, inline SVG, pictures as data URIs. No
 * script, no address of anything outside, so it opens the same anywhere and for ever. */
#include "samples/refrain/sweep_report.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "core/file.h"
#include "core/image.h"
#include "core/memory.h"
#include "samples/refrain/sweep_page.h"

#define MAX_STRIPS       8
#define MAX_STRIP_IMAGES 4
#define DIFFERENCE_GAIN  8
#define UNSTEADY         1.25 /* slowest over fastest uncached loop */
#define DOUBTFUL         1.1  /* speed-up times computed share of rows */

/* --- judging ------------------------------------------------------------------------------------------------------ */

double sweep_metric_of(const sweep_row *row, sweep_metric metric) {
    switch (metric) {
    case SWEEP_SSIM: return row->ssim_mean;
    case SWEEP_LATENT: return row->latent_mean;
    case SWEEP_KEPT: return 100 * row->kept;
    case SWEEP_SCORE: return 100 * row->score;
    case SWEEP_AGREEMENT: return 100 * row->agreement;
    case SWEEP_PSNR:
    case SWEEP_NUM_METRICS: break;
    }
    return row->psnr_mean;
}

sweep_metric sweep_main_metric(const sweep_store *store) {
    if (sweep_store_is_text(store)) return SWEEP_SCORE;
    for (int i = 0; i < sweep_store_num(store); i++) {
        if (isfinite(sweep_store_at(store, i)->kept)) return SWEEP_KEPT;
    }
    return SWEEP_PSNR;
}

bool sweep_is_uncached(const sweep_row *row) {
    return strcmp(row->policy, "none") == 0 && row->options[0] != '+';
}

bool sweep_is_control(const sweep_row *row) {
    return strcmp(row->policy, "steps") == 0;
}

bool sweep_is_measured(const sweep_row *row) {
    return strcmp(row->status, "ok") == 0 && row->speedup > 0 && (isfinite(row->psnr_mean) || isfinite(row->score));
}

double sweep_x_of(const sweep_row *row, sweep_axis axis) {
    switch (axis) {
    case SWEEP_X_WORK: return row->share_rows > 0 ? 1 / row->share_rows : NAN;
    case SWEEP_X_PLAIN: return row->plain_speedup;
    case SWEEP_X_RATE: return row->tok_s;
    case SWEEP_X_KEPT: return row->full_bytes > 0 ? 100 * row->kept_bytes / row->full_bytes : NAN;
    case SWEEP_X_SPEED: break;
    }
    return row->speedup;
}

/* A machine that changes its speed between a setting and the uncached loop can show more than the work left out
 * allows. What treats the context otherwise leaves out more than rows, and so do caches of text. */
bool sweep_is_doubtful(const sweep_row *row) {
    return sweep_is_measured(row) && row->speedup * row->share_rows > DOUBTFUL && !strstr(row->options, "context=") &&
           !isfinite(row->score);
}

static int num_doubtful(const sweep_store *store) {
    int num = 0;
    for (int i = 0; i < sweep_store_num(store); i++) num += sweep_is_doubtful(sweep_store_at(store, i));
    return num;
}

int sweep_control_points(const sweep_store *store, sweep_axis axis, const sweep_row **points) {
    int num = 0;
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *row = sweep_store_at(store, i);
        if (!sweep_is_control(row) || !sweep_is_measured(row)) continue;
        if (!points) {
            num++;
            continue;
        }
        int at = num++;
        for (; at > 0 && sweep_x_of(points[at - 1], axis) > sweep_x_of(row, axis); at--) points[at] = points[at - 1];
        points[at] = row;
    }
    return num;
}

static sweep_verdict verdict_of(sweep_verdict_kind kind, double delta, const char *format, double shown, bool text) {
    sweep_verdict v = {.kind = kind, .delta = delta};
    snprintf(v.text, sizeof v.text, "%s", format);
    char *mark = strchr(v.text, '#');
    if (mark) {
        char tail[96];
        snprintf(tail, sizeof tail, "%s", mark + 1);
        snprintf(mark, sizeof v.text - (size_t)(mark - v.text), "%.1f %s%s", shown, text ? "points" : "dB", tail);
    }
    return v;
}

/* What a verdict is about: PSNR, of text exact match in points. */
static double judged(const sweep_row *row) {
    return isfinite(row->score) ? 100 * row->score : row->psnr_mean;
}

/* '#' in a text is where the number goes, with its unit. */
static sweep_verdict judge(const sweep_row *row, const sweep_row **control, int num) {
    const sweep_row *mild = control[0], *fast = control[num - 1];
    bool text = isfinite(row->score);
    double value = judged(row), delta;
    if (row->speedup < mild->speedup) {
        delta = value - judged(mild);
        if (delta < 0)
            return verdict_of(SWEEP_VERDICT_BELOW, delta, "below: a faster control is # better; worth nothing here",
                              -delta, text);
        return verdict_of(SWEEP_VERDICT_OPEN, NAN, "slower than every control point measured", 0, text);
    }
    if (row->speedup > fast->speedup) {
        delta = value - judged(fast);
        if (delta > 0 || (delta >= 0 && !text))
            return verdict_of(SWEEP_VERDICT_ABOVE, delta, "above the fewer-steps curve by # or more", delta, text);
        return verdict_of(SWEEP_VERDICT_OPEN, NAN, "faster than every control point measured", 0, text);
    }
    delta = value - judged(fast);
    for (int i = 0; i + 1 < num; i++) {
        double a = log(control[i]->speedup), b = log(control[i + 1]->speedup), x = log(row->speedup);
        if (x < a || x > b || b <= a) continue;
        delta = value - (judged(control[i]) + (judged(control[i + 1]) - judged(control[i])) * (x - a) / (b - a));
        break;
    }
    if (text && fabs(delta) < 1e-9) return verdict_of(SWEEP_VERDICT_BELOW, 0, "no better than fewer steps", 0, text);
    if (delta > 0) return verdict_of(SWEEP_VERDICT_ABOVE, delta, "above the fewer-steps curve by #", delta, text);
    return verdict_of(SWEEP_VERDICT_BELOW, delta, "below by #: worth nothing here", -delta, text);
}

sweep_verdict sweep_judge(const sweep_store *store, const sweep_row *row) {
    sweep_verdict none = {.kind = SWEEP_VERDICT_NONE, .delta = NAN};
    if (sweep_is_control(row)) {
        snprintf(none.text, sizeof none.text, "the control");
        return none;
    }
    if (sweep_is_uncached(row)) {
        snprintf(none.text, sizeof none.text, "no policy");
        return none;
    }
    if (strcmp(row->status, "ok") != 0) return none;
    if (!sweep_is_measured(row)) return verdict_of(SWEEP_VERDICT_BELOW, NAN, "diverged: not a number", 0, false);
    if (row->speedup <= 1) return verdict_of(SWEEP_VERDICT_BELOW, NAN, "not faster than the uncached run", 0, false);
    int num = sweep_control_points(store, SWEEP_X_SPEED, NULL);
    const sweep_row **points = num > 0 ? rf_alloc_zero((size_t)num, sizeof *points) : NULL;
    if (!points) return verdict_of(SWEEP_VERDICT_OPEN, NAN, "no control was measured", 0, false);
    sweep_control_points(store, SWEEP_X_SPEED, points);
    sweep_verdict v = judge(row, points, num);
    rf_free(points);
    return v;
}

static bool may_lead(const sweep_row *row) {
    return sweep_is_measured(row) && !sweep_is_control(row) && !sweep_is_uncached(row);
}

bool sweep_on_front_by(const sweep_store *store, const sweep_row *row, sweep_metric metric, sweep_axis axis) {
    if (!may_lead(row)) return false;
    double sign = metric == SWEEP_LATENT ? -1 : 1, mine = sign * sweep_metric_of(row, metric);
    double toward = axis == SWEEP_X_KEPT ? -1 : 1, x = toward * sweep_x_of(row, axis); /* few bytes are good */
    if (!isfinite(mine)) return false;
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *other = sweep_store_at(store, i);
        if (other == row || !may_lead(other)) continue;
        double its = sign * sweep_metric_of(other, metric), its_x = toward * sweep_x_of(other, axis);
        if ((its_x > x && its >= mine) || (its_x >= x && its > mine)) return false;
    }
    return true;
}

bool sweep_on_front(const sweep_store *store, const sweep_row *row, sweep_metric metric) {
    return sweep_on_front_by(store, row, metric, SWEEP_X_SPEED);
}

static double sort_value(const sweep_row *row) {
    if (row->full_bytes > 0) return 1000 * row->score - row->kept_bytes / row->full_bytes + 1;
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

void sweep_row_name(const sweep_row *row, char *out, size_t room) {
    if (sweep_is_control(row)) {
        const char *unit = !isfinite(row->score) ? "steps" : row->steps > 1 ? "passes a block" : "pass a block";
        snprintf(out, room, "no cache, %.0f %s", row->steps, unit);
    } else {
        bool colon = row->options[0] && row->options[0] != '+';
        snprintf(out, room, "%s%s%s", row->policy, colon ? ":" : "", row->options);
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

/* A number in its column, "-" where there is none. */
static void print_number(int width, int digits, double value) {
    if (isfinite(value)) {
        printf(" %*.*f", width, digits, value);
    } else {
        printf(" %*s", width, "-");
    }
}

static void print_world_row(const sweep_store *store, const sweep_row *row, int width, const char *name) {
    printf("%-*s", width, name);
    print_number(8, 3, row->speedup);
    print_number(7, 2, row->plain_speedup);
    print_number(8, 2, row->frames_per_s);
    print_number(8, 2, row->psnr_mean);
    print_number(8, 2, row->psnr_worst);
    print_number(5, 0, row->first_under_30);
    print_number(7, 4, row->ssim_mean);
    print_number(6, 1, 100 * row->kept);
    print_number(6, 1, 100 * row->share_rows);
    printf("  %s\n", sweep_judge(store, row).text);
}

static void print_text_row(const sweep_store *store, const sweep_row *row, int width, const char *name) {
    printf("%-*s", width, name);
    print_number(8, 3, row->speedup);
    print_number(7, 1, 100 * row->score);
    print_number(7, 1, 100 * row->agreement);
    print_number(9, 1, row->tok_s);
    print_number(8, 1, row->nfe);
    print_number(10, 0, row->row_passes);
    print_number(6, 1, 100 * row->share_rows);
    printf("  %s\n", sweep_judge(store, row).text);
}

static void print_kv_row(const sweep_row *row, int width, const char *name) {
    printf("%-*s", width, name);
    print_number(7, 1, 100 * row->score);
    print_number(7, 1, 100 * row->agreement);
    print_number(7, 1, sweep_x_of(row, SWEEP_X_KEPT));
    print_number(9, 3, row->kept_bytes / 1e6);
    print_number(7, 0, row->kv_budget > 0 ? row->kv_budget : NAN);
    print_number(9, 0, row->evictions);
    print_number(9, 2, row->score_ms);
    print_number(9, 1, row->tok_s);
    print_number(8, 3, row->speedup);
    printf("  %s\n", row->score_each);
}

static void print_refusals(const sweep_store *store) {
    char name[512];
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *row = sweep_store_at(store, i);
        if (strcmp(row->status, "refused") != 0) continue;
        sweep_row_name(row, name, sizeof name);
        printf("refused: %s: %s\n", name, row->reason);
    }
}

rf_status sweep_print_table(const sweep_store *store, rf_error *err) {
    int *order = sorted_rows(store, err), width = 8, refused = 0;
    bool world = sweep_store_is_world(store), text = sweep_store_is_text(store);
    if (!order) return RF_ERR_MEMORY;
    char name[512];
    for (int i = 0; i < sweep_store_num(store); i++) {
        sweep_row_name(sweep_store_at(store, i), name, sizeof name);
        if ((int)strlen(name) > width) width = (int)strlen(name);
    }
    if (width > 64) width = 64;
    if (sweep_store_is_kv(store)) {
        printf("%-*s %7s %7s %7s %9s %7s %9s %9s %9s %8s  %s\n", width, "setting", "exact %", "agree %", "kept %",
               "kept MB", "budget", "evictions", "score ms", "tokens/s", "speed-up", "exact by task");
    } else if (text) {
        printf("%-*s %8s %7s %7s %9s %8s %10s %6s  %s\n", width, "setting", "speed-up", "exact %", "agree %",
               "tokens/s", "passes", "row-passes", "rows %", "against fewer steps");
    } else if (world) {
        printf("%-*s %8s %7s %8s %8s %8s %5s %7s %6s %6s  %s\n", width, "setting", "speed-up", "plain", "frames/s",
               "PSNR dB", "worst", "<30", "SSIM", "kept %", "rows %", "against fewer steps");
    } else {
        printf("%-*s %8s %8s %7s %9s %7s  %s\n", width, "setting", "speed-up", "PSNR dB", "SSIM", "latent L2", "rows %",
               "against fewer steps");
    }
    for (int i = 0; i < sweep_store_num(store); i++) {
        const sweep_row *row = sweep_store_at(store, order[i]);
        sweep_row_name(row, name, sizeof name);
        if (strcmp(row->status, "ok") != 0) {
            refused++;
        } else if (sweep_store_is_kv(store)) {
            print_kv_row(row, width, name);
        } else if (text) {
            print_text_row(store, row, width, name);
        } else if (world) {
            print_world_row(store, row, width, name);
        } else {
            printf("%-*s %8.3f %8.2f %7.4f %9.4f %7.1f  %s\n", width, name, row->speedup, row->psnr_mean,
                   row->ssim_mean, row->latent_mean, 100 * row->share_rows, sweep_judge(store, row).text);
        }
    }
    if (num_doubtful(store) > 0)
        printf("%d speed-ups are above what their computed rows allow: the machine was not steady\n",
               num_doubtful(store));
    if (world) {
        printf(
            "plain: against the uncached run that computes its whole window in every step; <30: first frame under 30 "
            "dB\n");
    }
    if (world || text) {
        print_refusals(store);
    } else if (refused > 0) {
        printf("%d refused (named in --json and the report)\n", refused);
    }
    rf_free(order);
    return RF_OK;
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
    ".key span{margin-right:16px}.frames td{padding:1px}.frames img{width:128px;height:auto;display:block;"
    "image-rendering:pixelated}.frames{width:auto}";

static void out_facts(page *p) {
    static const char *const labels[][2] = {
        {"model", "model"},        {"parameters", "parameters"}, {"sampler", "sampler"},  {"steps", "steps"},
        {"cfg_scale", "guidance"}, {"pictures", "pictures"},     {"size", "size"},        {"seed", "first seed"},
        {"classes", "classes"},    {"batch", "at once"},         {"device", "device"},    {"dtype", "dtype"},
        {"threads", "threads"},    {"_date", "begun"},           {"_version", "refrain"},
    };
    static const char *const world_labels[][2] = {
        {"model", "model"},     {"parameters", "parameters"}, {"steps", "steps a frame"},
        {"walks", "walks"},     {"frames", "frames"},         {"window", "window"},
        {"context", "context"}, {"simulator", "simulator"},   {"size", "size"},
        {"init", "from"},       {"actions", "actions"},       {"seed", "first seed"},
        {"batch", "at once"},   {"device", "device"},         {"dtype", "dtype"},
        {"threads", "threads"}, {"_date", "begun"},           {"_version", "refrain"},
    };
    static const char *const text_labels[][2] = {
        {"model", "model"},      {"parameters", "parameters"}, {"tasks", "tasks"},     {"samples", "samples of each"},
        {"block", "block"},      {"new", "new tokens"},        {"guide", "guide"},     {"seed", "first seed"},
        {"device", "device"},    {"dtype", "dtype"},           {"threads", "threads"}, {"_date", "begun"},
        {"_version", "refrain"}, {"kv", "the question is"},
    };
    bool world = sweep_store_is_world(p->store), text = sweep_store_is_text(p->store);
    size_t num = text    ? sizeof text_labels / sizeof text_labels[0]
                 : world ? sizeof world_labels / sizeof world_labels[0]
                         : sizeof labels / sizeof labels[0];
    page_out(p, "<div class='facts'>");
    for (size_t i = 0; i < num; i++) {
        const char *const *label = text ? text_labels[i] : world ? world_labels[i] : labels[i];
        const char *value = sweep_store_pin(p->store, label[0]);
        if (!value[0] && strcmp(label[0], "kv") == 0) continue;
        page_out(p, "<span>%s <b>", label[1]);
        if (strlen(value) > 80) {
            char cut[84];
            snprintf(cut, sizeof cut, "%.77s...", value);
            page_out_text(p, cut);
        } else {
            page_out_text(p, value);
        }
        page_out(p, "</b></span>");
    }
    page_out(p, "</div>\n");
}

const sweep_row *page_fastest(const page *p, sweep_metric metric, double level, bool control) {
    const sweep_row *best = NULL;
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, i);
        if (!sweep_is_measured(row) || sweep_is_control(row) != control || sweep_is_uncached(row) ||
            !(sweep_metric_of(row, metric) >= level))
            continue;
        if (!best || row->speedup > best->speedup) best = row;
    }
    return best;
}

void page_out_name(page *p, const sweep_row *row) {
    char name[512];
    sweep_row_name(row, name, sizeof name);
    if (!sweep_is_control(row))
        page_out(p, "<span class='dot' style='background:%s'></span>", page_color_of(row->policy));
    for (char *at = name, *end; *at; at = end) { /* may break behind a ';' or '+' */
        end = at + strcspn(at, ";+");
        if (*end) end++;
        char kept = *end;
        *end = 0;
        page_out_text(p, at);
        *end = kept;
        if (kept) page_out(p, "<wbr>");
    }
}

static void out_level(page *p, sweep_metric metric, double level) {
    const sweep_row *best = page_fastest(p, metric, level, false), *control = page_fastest(p, metric, level, true);
    bool world = sweep_store_is_world(p->store);
    page_out(p,
             metric == SWEEP_PSNR   ? "<tr><td class='l'>PSNR &ge; %g dB</td>"
             : metric == SWEEP_SSIM ? "<tr><td class='l'>SSIM &ge; %g</td>"
                                    : "<tr><td class='l'>%g %% of the PSNR to the simulator kept</td>",
             level);
    if (best) {
        page_out(p, "<td class='l'>");
        page_out_name(p, best);
        page_out(p, "</td><td><b>%.2f&times;</b></td><td>%.2f</td><td>%.4f</td>", best->speedup, best->psnr_mean,
                 best->ssim_mean);
        if (world) page_out_number(p, "<td>", "</td>", best->frames_per_s, 2);
        if (world) page_out_number(p, "<td>", "&times;</td>", best->plain_speedup, 2);
    } else {
        page_out(p, "<td class='l open'>none reaches it</td><td></td><td></td><td></td>%s",
                 world ? "<td></td><td></td>" : "");
    }
    if (control) {
        page_out(p, "<td>%.2f&times;</td><td>%.0f</td>", control->speedup, control->steps);
    } else {
        page_out(p, "<td class='open'>none</td><td></td>");
    }
    if (best && control) {
        double gain = best->speedup / control->speedup;
        page_out(p, "<td class='%s'>%.2f&times;</td></tr>\n", gain > 1 ? "up" : "down", gain);
    } else {
        page_out(p, "<td></td></tr>\n");
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
    page_out(
        p,
        "<p class='down'><b>The machine was not steady:</b> the uncached loop took %.2f times as long at its slowest "
        "as at its fastest, "
        "and %d speed-ups are above what the computed rows allow (marked ? in the table). Quality is not touched by "
        "this; the plot of "
        "work left out is not either.</p>\n",
        hi / lo, doubtful);
}

static void out_summary(page *p) {
    static const double psnr[] = {45, 40, 35, 31.5, 28, 25}, ssim[] = {.99, .97, .95, .9, .8},
                        kept[] = {99.5, 99, 98, 95, 90};
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
    page_out(
        p,
        "<h2>Fastest setting at a quality</h2>\n<p>%d settings: <span class='up'>%d above</span> the curve of fewer "
        "steps, "
        "<span class='down'>%d on or below it (worth nothing there)</span>, %d outside the speeds of the control, %d "
        "refused.</p>\n",
        num, above, below, open, refused);
    page_out(p,
             "<div class='scroll'><table><tr><th class='l'>level (mean)</th><th class='l'>fastest "
             "setting</th><th>speed-up</th><th>PSNR dB</th>"
             "<th>SSIM</th>%s<th>fewer steps<br>reach</th><th>with<br>steps</th><th>gain over<br>fewer "
             "steps</th></tr>\n",
             sweep_store_is_world(p->store) ? "<th>frames/s</th><th>over<br>no reuse</th>" : "");
    if (sweep_main_metric(p->store) == SWEEP_KEPT)
        for (size_t i = 0; i < sizeof kept / sizeof kept[0]; i++) out_level(p, SWEEP_KEPT, kept[i]);
    for (size_t i = 0; i < sizeof psnr / sizeof psnr[0]; i++) out_level(p, SWEEP_PSNR, psnr[i]);
    for (size_t i = 0; i < sizeof ssim / sizeof ssim[0]; i++) out_level(p, SWEEP_SSIM, ssim[i]);
    page_out(p, "</table></div>\n");
    out_doubts(p);
}

static void out_world_quality(page *p) {
    page_out(
        p,
        "<h2>How it was measured</h2>\n<p>A walk is a first frame, a list of actions and a seed of noise; every "
        "setting starts from the same and is free to drift, since errors compound along a rollout. PSNR and SSIM are "
        "of new frames, computed on floating-point frames in [0, 1], against <b>this program's own uncached run</b>, "
        "which "
        "keeps its context (exact reuse): they say how far caching changes a frame. SSIM: Gaussian window "
        "11&times;11, &sigma; 1.5, K<sub>1</sub> 0.01, K<sub>2</sub> 0.03, mean over channels. The error of the "
        "latent is |cached &minus; uncached| / |uncached|. A frame equal to its reference counts as 100 dB.</p>\n");
    if (sweep_main_metric(p->store) == SWEEP_KEPT)
        page_out(
            p, "<p><b>Quality kept</b>: mean PSNR of a setting's frames to those that the simulator shows for the same "
               "actions, over that of the uncached run.</p>\n");
    page_out(p, "<p><b>Plain</b>, &ldquo;over no reuse&rdquo;: against the uncached run that computes its whole window "
                "in every "
                "step, as the public code does (one run). The other speed-up is over the uncached run with exact "
                "reuse: what a policy adds.</p>\n");
}

static void out_quality(page *p) {
    page_out(p,
             "<h2>How it was measured</h2>\n<p>PSNR and SSIM are computed on floating-point pictures in [0, 1], not on "
             "8-bit ones, "
             "against <b>this program's own uncached run</b> of the same seeds: they say how far caching changes a "
             "picture, not how good "
             "the picture is. SSIM: Gaussian window 11&times;11, &sigma; 1.5, K<sub>1</sub> 0.01, K<sub>2</sub> 0.03, "
             "mean over channels. "
             "The error of the final latent is |cached &minus; uncached| / |uncached|. Means are over pictures; a "
             "picture equal to its "
             "reference counts as 100 dB.</p>\n");
}

static void out_method(page *p) {
    double lo = INFINITY, hi = 0, seconds, median = sweep_store_base_ms(p->store, 0);
    int num = sweep_store_num_baselines(p->store);
    for (int i = 0; i < num; i++) {
        double ms = sweep_store_baseline(p->store, i, &seconds);
        lo = fmin(lo, ms);
        hi = fmax(hi, ms);
    }
    bool text = sweep_store_is_text(p->store), kv = sweep_store_is_kv(p->store);
    if (kv) {
        page_out_kv_method(p);
    } else if (text) {
        page_out_words_method(p);
    } else if (sweep_store_is_world(p->store)) {
        out_world_quality(p);
    } else {
        out_quality(p);
    }
    page_out(p,
             "<p>Speed-up is wall-clock of %s: the median of the last three "
             "timings of the "
             "uncached loop over the median of the setting's own runs, in one process, the uncached loop being timed "
             "again and again "
             "between the settings.",
             text ? "all samples, prompts included"
                  : "the denoising loop (all pictures, no decoding; of a world with its context)");
    if (num > 0) {
        int digits = median < 100 ? 2 : 0;
        page_out(p, " It was timed %d times: median %.*f ms, %.*f to %.*f ms (%+.1f to %+.1f %%).", num, digits, median,
                 digits, lo, digits, hi, 100 * (lo / median - 1), 100 * (hi / median - 1));
    }
    if (kv) {
        page_out(p, "</p>\n");
        return;
    }
    page_out(
        p,
        "</p>\n<p>The control is %s. A setting on "
        "or below its curve "
        "(%s interpolated over the logarithm of the speed-up) is worth nothing there: fewer steps give as "
        "much.</p>\n",
        text ? "the same decoding with fewer passes a block, each committing more of the surest tokens, and no cache"
             : "the same sampler with fewer steps and no cache, from the same noise",
        text ? "exact match" : "PSNR");
    if (num < 2 || !(hi > 0)) return;
    page_out(p,
             "<h3>The uncached loop over the sweep</h3>\n<div class='plot'><svg viewBox='0 0 900 96' "
             "font-family='Helvetica,Arial,"
             "sans-serif' font-size='11' fill='#495057'><path d='M60 8V76H890' fill='none' stroke='#868e96'/>"
             "<text x='54' y='14' text-anchor='end'>%.*f ms</text><text x='54' y='78' text-anchor='end'>0</text>"
             "<text x='475' y='92' text-anchor='middle'>timings in order</text><path fill='none' stroke='#1c7ed6' "
             "stroke-width='1.5' d='",
             hi < 100 ? 2 : 0, hi);
    for (int i = 0; i < num; i++)
        page_out(p, "%s%.1f %.1f", i ? "L" : "M", 66 + 818.0 * i / (num - 1),
                 76 - 66 * sweep_store_baseline(p->store, i, &seconds) / hi);
    page_out(p, "'/></svg></div>\n");
}

void page_out_verdict(page *p, const sweep_verdict *v) {
    const char *kind = v->kind == SWEEP_VERDICT_ABOVE ? "up" : v->kind == SWEEP_VERDICT_BELOW ? "down" : "open";
    page_out(p, "<td class='l v %s'>", kind);
    page_out_text(p, v->text);
    page_out(p, "</td>");
}

static void out_row(page *p, int place) {
    const sweep_row *r = sweep_store_at(p->store, p->order[place]);
    bool refused = strcmp(r->status, "ok") != 0, front = sweep_on_front(p->store, r, SWEEP_PSNR);
    page_out(p, "<tr class='%s'><td>%d</td><td class='l o'>", sweep_is_control(r) ? "c" : front ? "f" : "", place + 1);
    page_out_name(p, r);
    if (refused) {
        page_out(p, "</td><td class='l open' colspan='15' style='white-space:normal'>refused: ");
        page_out_text(p, r->reason);
        page_out(p, "</td></tr>\n");
        return;
    }
    page_out(p, "</td>");
    page_out_number(p, "<td><b>", "&times;</b>", r->speedup, 2);
    page_out(p, sweep_is_doubtful(r) ? " <span class='down'>?</span></td>" : "</td>");
    sweep_verdict v = sweep_judge(p->store, r);
    page_out_verdict(p, &v);
    page_out_number(p, "<td>", "", r->loop_ms, r->loop_ms < 100 ? 2 : 0);
    if (r->loop_ms > 0)
        page_out(p, " <span class='open'>&plusmn;%.1f%%</span>", 50 * (r->loop_max_ms - r->loop_min_ms) / r->loop_ms);
    page_out_number(p, "</td><td><b>", "</b></td>", r->psnr_mean, 2);
    page_out_number(p, "<td>", "</td>", r->psnr_median, 2);
    page_out_number(p, "<td>", "</td>", r->psnr_worst, 2);
    page_out_number(p, "<td><b>", "</b></td>", r->ssim_mean, 4);
    page_out_number(p, "<td>", "</td>", r->ssim_worst, 4);
    page_out_number(p, "<td>", "</td>", r->latent_mean, 4);
    page_out_number(p, "<td>", "</td>", r->max_abs, 3);
    page_out_number(p, "<td>", "</td>", 100 * r->share_steps, 0);
    page_out_number(p, "<td>", "</td>", 100 * r->share_blocks, 0);
    page_out_number(p, "<td>", "</td>", 100 * r->share_rows, 0);
    page_out_number(p, "<td>", "</td>", r->cache_bytes / 1e6, 1);
    page_out_number(p, "<td>", "</td>", r->decide_ms, 2);
    page_out(p, "</tr>\n");
}

static void out_table(page *p) {
    page_out(
        p,
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
    page_out(p, "</table></div>\n");
}

/* One path for all steps of a kind: small, and exact to the pixel. */
static void out_cells(page *p, const char *kinds, char kind, double x, double y, double cell, const char *color) {
    if (!strchr(kinds, kind)) return;
    page_out(p, "<path fill='%s' d='", color);
    for (int s = 0; kinds[s]; s++) {
        if (kinds[s] == kind) page_out(p, "M%.1f %.1fh%.1fv11h-%.1fz", x + s * cell, y, cell * .88, cell * .88);
    }
    page_out(p, "'/>");
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
    page_out(
        p,
        "<h2>What was done at each step</h2>\n<p class='key'><span><span class='dot' "
        "style='background:#1c5d99'></span>full</span>"
        "<span><span class='dot' style='background:#f59f00'></span>partial: some blocks, parts or token rows</span>"
        "<span><span class='dot' style='background:#dbe4ec'></span>skipped: predicted</span> %s, noisiest step "
        "at the left.</p>\n"
        "<div class='plot'><svg viewBox='0 0 1120 %d' font-family='Helvetica,Arial,sans-serif' font-size='10.5' "
        "fill='#343a40'>",
        sweep_store_is_world(p->store) ? "Last frame of the first walk" : "Picture 0", num * 14 + 24);
    for (size_t s = 0; s<longest; s += longest> 200 ? 50 : longest > 60 ? 10 : 5)
        page_out(p, "<text x='%.1f' y='11'>%zu</text>", left + (double)s * cell, s);
    for (int i = 0; i < sweep_store_num(p->store); i++) {
        const sweep_row *row = sweep_store_at(p->store, p->order[i]);
        if (!row->kinds[0]) continue;
        char name[512];
        sweep_row_name(row, name, sizeof name);
        if (strlen(name) > 46) snprintf(name + 43, sizeof name - 43, "...");
        page_out(p, "<text x='0' y='%.1f'>", y + 9);
        page_out_text(p, name);
        page_out(p, "</text><text x='%.1f' y='%.1f' text-anchor='end'>%.2f&times;</text>", left - 10, y + 9,
                 row->speedup);
        out_cells(p, row->kinds, 'F', left, y, cell, "#1c5d99");
        out_cells(p, row->kinds, 'P', left, y, cell, "#f59f00");
        out_cells(p, row->kinds, 's', left, y, cell, "#dbe4ec");
        y += 14;
    }
    page_out(p, "</svg></div>\n");
}

/* --- pictures ----------------------------------------------------------------------------------------------------- */

bool sweep_save_difference(const char *a_path, const char *b_path, int gain, const char *to) {
    rf_image a = {0}, b = {0};
    bool ok = rf_image_load(&a, a_path, NULL) == RF_OK && rf_image_load(&b, b_path, NULL) == RF_OK &&
              a.width == b.width && a.height == b.height;
    for (size_t i = 0; ok && i < 3 * (size_t)a.width * (size_t)a.height; i++) {
        int d = abs((int)a.rgb[i] - (int)b.rgb[i]) * gain;
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
    char *reference = page_path(p->store, "pictures", "reference", ending),
         *cached = page_path(p->store, "pictures", hash, ending);
    snprintf(ending, sizeof ending, "-%d-difference.png", index);
    char *difference = page_path(p->store, "pictures", hash, ending);
    if (reference && cached && difference && sweep_save_difference(cached, reference, DIFFERENCE_GAIN, difference)) {
        page_out(p, "<div class='three'>");
        page_out_png(p, reference, "reference");
        page_out_png(p, cached, "cached");
        page_out_png(p, difference, "difference");
        page_out(p, "</div>");
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
    page_out(
        p,
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
        page_out(p, "<div class='strip'><h3>#%d ", i + 1);
        page_out_name(p, row);
        page_out(p, " &nbsp; %.2f&times;, PSNR %.2f dB, SSIM %.4f</h3><div class='row'>", row->speedup, row->psnr_mean,
                 row->ssim_mean);
        for (int image = 0; image < MAX_STRIP_IMAGES; image++) out_three(p, hash, image);
        page_out(p, "</div></div>\n");
        shown++;
    }
}

/* --- the page ----------------------------------------------------------------------------------------------------- */

static void out_page(page *p) {
    bool world = sweep_store_is_world(p->store), text = sweep_store_is_text(p->store);
    page_out(p,
             "<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
             "content='width=device-width,initial-scale=1'>"
             "<title>%s: ",
             text ? "Text decoding" : "Feature caching");
    page_out_text(p, sweep_store_pin(p->store, "model"));
    page_out(p, "</title><style>");
    rf_file_writer_write(p->file, style, sizeof style - 1);
    bool kv = sweep_store_is_kv(p->store);
    page_out(p, "</style></head><body><main>\n<h1>%s ",
             kv     ? "The cache under a budget, of"
             : text ? "Caches and commit rules of"
                    : "Feature caching on");
    page_out_text(p, sweep_store_pin(p->store, "model"));
    page_out(p, ": %s against quality</h1>\n", kv ? "bytes" : "speed");
    out_facts(p);
    if (kv) {
        page_out_kv_summary(p);
    } else if (text) {
        page_out_words_summary(p);
        out_doubts(p);
    } else {
        out_summary(p);
    }
    if (kv) {
        page_out(
            p, "<h2>Quality against what is kept</h2>\n<p>Colour: policy, a curve each. Dashed: the full cache.</p>\n");
    } else {
        page_out(
            p,
            "<h2>Speed against quality</h2>\n<p>Colour: policy. %sBlack line: the control, with its numbers of %s. "
            "Grey band: the front, numbered as in the table below.</p>\n",
            text ? "Black points: other commit rules without a cache. "
                 : "Shape: circle = decides by step, square = by block, triangle = by part, diamond = by token. ",
            text ? "passes a block" : "steps");
    }
    page_out_plots(p);
    if (world) page_out_curves(p);
    page_out(p, "<p class='sub'>Plots drawn by %s.</p>\n",
             p->by_gnuplot ? "gnuplot; their scripts are in plots/" : "the program itself (gnuplot was not found)");
    if (world) {
        page_out_frame_strips(p);
        page_out_frame_table(p);
        page_out_refusals(p);
    } else if (kv) {
        page_out_kv_table(p);
    } else if (text) {
        page_out_words_table(p);
    } else {
        out_strips(p);
        out_table(p);
    }
    out_decisions(p);
    out_method(p);
    page_out(p, "</main></body></html>\n");
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
